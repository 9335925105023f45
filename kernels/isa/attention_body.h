// Attention over the pages of one kv head. Included inside an anonymous namespace by the per-ISA
// translation units, after gemm_body.h and math_body.h.
//
// One page is one block step: score_block, softmax_step, value_block. Other storage of a block of
// 32 tokens needs only its own way to widen K to [head_dim][32] and V to [32][head_dim].

// State of the online softmax of n_rows rows, one row per (query, head of the group).
struct OnlineSoftmax {
  std::int64_t n_rows;
  int head_dim;
  std::int64_t value_stride;  // head_dim rounded up to whole panels
  const float* q;             // tiles of rows, packed: [tile][head_dim][rows of tile]
  float* scores;              // [n_rows][32], then probabilities
  float* best;                // [n_rows]
  float* mass;                // [n_rows][kLanes], summed over lanes at the end
  float* values;              // [n_rows][value_stride]
  float scale;
};

// scores[r][t] = fma chain over d of q[r][d] * k[d][t], for the tiles that hold rows from
// `first_row` on.
template <class Loader>
void score_block(const OnlineSoftmax& state, std::int64_t first_row,
                 const typename Loader::Element* k, std::int64_t prefetch_bytes) {
  TileOperands<typename Loader::Element> t{};
  t.b = k;
  t.b_stride = kPanelColumns;
  t.n_k = state.head_dim;
  t.prefetch_bytes = prefetch_bytes;
  t.c_stride = kPanelColumns;
  const std::int64_t n_tiles = tile_count(state.n_rows);
  for (std::int64_t i = 0; i < n_tiles; ++i) {
    const std::int64_t begin = tile_begin(state.n_rows, i);
    const std::int64_t end = tile_begin(state.n_rows, i + 1);
    if (end <= first_row) continue;
    t.a = state.q + begin * state.head_dim;
    t.c = state.scores + begin * kPanelColumns;
    packed_tile<Loader>(static_cast<int>(end - begin), t, kUnitsPerPanel);
  }
}

// One row: scores of its first n_valid tokens to probabilities relative to the new maximum; what
// was summed before is rescaled when the maximum rose.
inline void softmax_step(const OnlineSoftmax& state, std::int64_t row, std::int64_t n_valid) {
  constexpr int kVectors = kPanelColumns / kLanes;
  float* scores = state.scores + row * kPanelColumns;
  for (std::int64_t t = n_valid; t < kPanelColumns; ++t) scores[t] = -__builtin_inff();
  V s[kVectors];
  V top = splat(-__builtin_inff());
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    s[i] = load(scores + i * kLanes) * splat(state.scale);
    top = at_least(s[i], top);
  }
  const float old_best = state.best[row];
  const float block_best = max_lanes(top);
  const float best = block_best > old_best ? block_best : old_best;
  float* mass = state.mass + row * kLanes;
  V sum = load(mass);
  if (best != old_best) {
    const V shrink = exp_of(splat(old_best - best));
    sum = sum * shrink;
    float* values = state.values + row * state.value_stride;
    for (std::int64_t d = 0; d < state.value_stride; d += kLanes) {
      store(values + d, load(values + d) * shrink);
    }
    state.best[row] = best;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    const V p = exp_of(s[i] - splat(best));
    store(scores + i * kLanes, p);
    sum = sum + p;
  }
  store(mass, sum);
}

// values[r] = fma chain over the first n_tokens of p[r][t] * v[t], continued; rows [begin, end).
template <class Loader>
void value_block(const OnlineSoftmax& state, std::int64_t begin, std::int64_t end,
                 std::int64_t n_tokens, const typename Loader::Element* v, std::int64_t v_stride,
                 std::int64_t prefetch_bytes) {
  if (begin >= end) return;
  TileOperands<typename Loader::Element> t{};
  t.b = v;
  t.b_stride = v_stride;
  t.b_panel = kPanelColumns;
  t.n_k = n_tokens;
  t.prefetch_bytes = prefetch_bytes;
  t.c_stride = state.value_stride;
  t.accumulate = true;
  const std::int64_t n_units = state.value_stride / kPanelColumns * kUnitsPerPanel;
  const std::int64_t n_tiles = tile_count(end - begin);
  for (std::int64_t i = 0; i < n_tiles; ++i) {
    const std::int64_t first = begin + tile_begin(end - begin, i);
    const std::int64_t last = begin + tile_begin(end - begin, i + 1);
    t.a = state.scores + first * kPanelColumns;
    t.c = state.values + first * state.value_stride;
    strided_tile<Loader>(static_cast<int>(last - first), t, n_units);
  }
}

// The step of one page. Queries see the tokens up to their own position: queries before `first` see
// none of this page, those from `full` on see all of it. A token that a query does not see is left
// out of its chains, so what lies behind the last written token is never used.
template <class KLoader, class VLoader>
void page_step(const OnlineSoftmax& state, const AttentionTile& tile, std::int64_t page_begin,
               const typename KLoader::Element* k, const typename VLoader::Element* v,
               std::int64_t v_stride, std::int64_t prefetch_bytes) {
  const std::int64_t group = tile.group;
  const std::int64_t before = page_begin - tile.position_begin;
  const std::int64_t first = before > 0 ? before : 0;
  std::int64_t full = before + kPanelColumns - 1;
  full = full < first ? first : full > tile.n_queries ? tile.n_queries : full;

  score_block<KLoader>(state, first * group, k, prefetch_bytes);
  for (std::int64_t query = first; query < tile.n_queries; ++query) {
    const std::int64_t seen = query - before + 1;
    const std::int64_t n_valid = seen < kPanelColumns ? seen : kPanelColumns;
    for (std::int64_t h = 0; h < group; ++h) softmax_step(state, query * group + h, n_valid);
  }
  for (std::int64_t query = first; query < full; ++query) {
    value_block<VLoader>(state, query * group, (query + 1) * group, query - before + 1, v, v_stride,
                         prefetch_bytes);
  }
  value_block<VLoader>(state, full * group, state.n_rows, kPanelColumns, v, v_stride,
                       prefetch_bytes);
}

// V [32][head_dim] to fp32 [32][value_stride]; the columns past head_dim were zeroed once.
template <class Loader>
void expand_values(const typename Loader::Element* v, int head_dim, std::int64_t value_stride,
                   float* out) {
  for (int t = 0; t < kPanelColumns; ++t) {
    for (int d = 0; d < head_dim; d += 16) {
#pragma GCC unroll 4
      for (int lane = 0; lane < 16; lane += kLanes) {
        store(out + d + lane, Loader::one(v + d + lane));
      }
    }
    v += head_dim;
    out += value_stride;
  }
}

inline void start_softmax(const AttentionTile& tile, OnlineSoftmax& state, float* packed_q) {
  const std::int64_t n_tiles = tile_count(state.n_rows);
  for (std::int64_t i = 0; i < n_tiles; ++i) {
    const std::int64_t begin = tile_begin(state.n_rows, i);
    const std::int64_t n = tile_begin(state.n_rows, i + 1) - begin;
    for (std::int64_t r = 0; r < n; ++r) {
      const std::int64_t row = begin + r;
      const float* q = tile.q + row / tile.group * tile.q_stride + row % tile.group * tile.head_dim;
      float* out = packed_q + begin * tile.head_dim + r;
      for (int d = 0; d < tile.head_dim; ++d) out[d * n] = q[d];
    }
  }
  for (std::int64_t r = 0; r < state.n_rows; ++r) state.best[r] = -__builtin_inff();
  for (std::int64_t i = 0; i < state.n_rows * kLanes; ++i) state.mass[i] = 0.0F;
  for (std::int64_t i = 0; i < state.n_rows * state.value_stride; ++i) state.values[i] = 0.0F;
}

inline void finish_softmax(const AttentionTile& tile, const OnlineSoftmax& state) {
  for (std::int64_t row = 0; row < state.n_rows; ++row) {
    const V factor = splat(1.0F / sum_lanes(load(state.mass + row * kLanes)));
    const float* values = state.values + row * state.value_stride;
    float* out = tile.out + row / tile.group * tile.out_stride + row % tile.group * tile.head_dim;
    for (int d = 0; d < tile.head_dim; d += kLanes) store(out + d, load(values + d) * factor);
  }
}

template <class Loader>
void attention_format(const AttentionTile& tile) {
  using Element = typename Loader::Element;
  OnlineSoftmax state{};
  state.n_rows = tile.n_queries * tile.group;
  state.head_dim = tile.head_dim;
  state.value_stride = (tile.head_dim + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  state.scale = tile.scale;
  float* next = tile.scratch;
  float* packed_q = next;
  state.q = packed_q;
  next += state.n_rows * tile.head_dim;
  state.scores = next;
  next += state.n_rows * kPanelColumns;
  state.best = next;
  next += (state.n_rows + 15) / 16 * 16;
  state.mass = next;
  next += state.n_rows * 16;
  state.values = next;
  next += state.n_rows * state.value_stride;
  float* wide_k = next;
  next += static_cast<std::int64_t>(tile.head_dim) * kPanelColumns;
  float* wide_v = next;
  start_softmax(tile, state, packed_q);
  for (std::int64_t i = 0; i < kPanelColumns * state.value_stride; ++i) wide_v[i] = 0.0F;

  // Few rows use a page as it lies, many share one widened copy: the same values either way.
  const bool direct = state.n_rows <= kMaxTileRows && tile.head_dim % kPanelColumns == 0;
  const std::int64_t n_pages =
      (tile.position_begin + tile.n_queries + kPanelColumns - 1) / kPanelColumns;
  for (std::int64_t page = 0; page < n_pages; ++page) {
    const Element* k = reinterpret_cast<const Element*>(tile.pages[page]);
    const Element* v = k + static_cast<std::int64_t>(tile.head_dim) * kPanelColumns;
    const std::int64_t page_begin = page * kPanelColumns;
    if (direct) {
      const std::int64_t ahead = page + 1 < n_pages ? tile.pages[page + 1] - tile.pages[page] : 0;
      page_step<Loader, Loader>(state, tile, page_begin, k, v, tile.head_dim, ahead);
    } else {
      expand_panel<Loader>(k, tile.head_dim, wide_k);
      expand_values<Loader>(v, tile.head_dim, state.value_stride, wide_v);
      page_step<LoadF32, LoadF32>(state, tile, page_begin, wide_k, wide_v, state.value_stride, 0);
    }
  }
  finish_softmax(tile, state);
}

void attention_tile(const AttentionTile& tile) {
  switch (tile.format) {
    case ElementFormat::kF32:
      return attention_format<LoadF32>(tile);
    case ElementFormat::kF16:
      return attention_format<LoadF16>(tile);
    case ElementFormat::kBF16:
    case ElementFormat::kBF16Paired:
      return attention_format<LoadBf16>(tile);
  }
}
