// Attention over the cache of one kv head: its blocks, then the pages of its tail. Included inside
// an anonymous namespace by the per-ISA translation units, after block_step_body.h.

// The step of one page. Queries see the tokens up to their own position: queries before `first` see
// none of this page, those from `full` on see all of it. A token that a query does not see is left
// out of its chains, so what lies behind the last written token is never used.
template <class KLoader, class VLoader>
void page_step(const OnlineSoftmax& state, const AttentionTile& tile, std::int64_t page_begin,
               const typename KLoader::Element* k, const typename VLoader::Element* v,
               std::int64_t v_stride, std::int64_t prefetch_bytes) {
  const std::int64_t group = tile.group;
  const std::int64_t before = page_begin - tile.position_begin;
  const std::int64_t n_hidden = tile.tail_first - page_begin;
  const std::int64_t n_skip = n_hidden > 0 ? n_hidden : 0;
  const std::int64_t first = before > 0 ? before : 0;
  std::int64_t full = before + kPanelColumns - 1;
  full = full < first ? first : full > tile.n_queries ? tile.n_queries : full;

  score_block<KLoader>(state, first * group, k, prefetch_bytes);
  for (std::int64_t query = first; query < tile.n_queries; ++query) {
    const std::int64_t seen = query - before + 1;
    const std::int64_t n_valid = seen < kPanelColumns ? seen : kPanelColumns;
    for (std::int64_t h = 0; h < group; ++h) {
      softmax_step(state, query * group + h, {n_skip, n_valid});
    }
  }
  for (std::int64_t query = first; query < full; ++query) {
    value_block<VLoader>(state, {query * group, (query + 1) * group}, {n_skip, query - before + 1},
                         v, v_stride, prefetch_bytes);
  }
  value_block<VLoader>(state, {full * group, state.n_rows}, {n_skip, kPanelColumns}, v, v_stride,
                       prefetch_bytes);
}

// Packs the tile's queries by tiles of rows.
inline void pack_queries(const AttentionTile& tile, std::int64_t n_rows, float* packed) {
  const std::int64_t n_tiles = tile_count(n_rows);
  for (std::int64_t i = 0; i < n_tiles; ++i) {
    const std::int64_t begin = tile_begin(n_rows, i);
    const std::int64_t n = tile_begin(n_rows, i + 1) - begin;
    for (std::int64_t r = 0; r < n; ++r) {
      const std::int64_t index = begin + r;
      const float* q =
          tile.q + index / tile.group * tile.q_stride + index % tile.group * tile.head_dim;
      float* out = packed + begin * tile.head_dim + r;
      for (int d = 0; d < tile.head_dim; ++d) out[d * n] = q[d];
    }
  }
}

// The other forms of the packed queries that blocks need: unpacked, and packed in the Hadamard
// basis with the sum over each row's elements.
inline void prepare_queries(const OnlineSoftmax& state, const AttentionScratch& s) {
  const int d_head = state.head_dim;
  float* row = s.block.rows;
  const std::int64_t n_tiles = tile_count(state.n_rows);
  for (std::int64_t i = 0; i < n_tiles; ++i) {
    const std::int64_t begin = tile_begin(state.n_rows, i);
    const std::int64_t n = tile_begin(state.n_rows, i + 1) - begin;
    for (std::int64_t r = 0; r < n; ++r) {
      const float* q = s.packed_q + begin * d_head + r;
      float* plain = s.plain_q + (begin + r) * kQueryStride;
      for (int d = 0; d < d_head; ++d) row[d] = plain[d] = q[d * n];
      hadamard_vector(row, d_head);
      rotate_query(state, s, begin + r, begin * d_head + r, n, row);
    }
  }
}

inline AttentionScratch carve_scratch(const AttentionTile& tile, OnlineSoftmax& state) {
  AttentionScratch s{};
  const std::int64_t d = tile.head_dim;
  state.n_rows = tile.n_queries * tile.group;
  state.head_dim = tile.head_dim;
  state.value_stride = (d + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  state.row_values = tile.n_blocks > 0 ? ValueRow{state.value_stride}.size() : state.value_stride;
  state.scale = tile.scale;
  float* next = tile.scratch;
  const auto take = [&next](std::int64_t n_floats) {
    float* begin = next;
    next += (n_floats + 15) / 16 * 16;
    return begin;
  };
  s.packed_q = take(state.n_rows * d);
  state.q = s.packed_q;
  state.scores = take(state.n_rows * kPanelColumns);
  state.best = take(state.n_rows);
  state.mass = take(state.n_rows * kLanes);
  state.values = take(state.n_rows * state.row_values);
  s.block.k = take(d * kPanelColumns);
  s.block.v = take(kPanelColumns * state.value_stride);
  if (tile.n_blocks > 0) {
    s.rotated_q = take(state.n_rows * d);
    s.rotated_sum = take(state.n_rows);
    s.rotated_scale = take(state.n_rows);
    s.weights = take(state.n_rows * kPanelColumns);
    s.next_scores = take(state.n_rows * kPanelColumns);
    s.plain_q = take(state.n_rows * kQueryStride);
    s.turned_q = take(kTurnGroups * state.n_rows * kQueryStride);
    s.block.rows = take(kPanelColumns * d);
    s.block.angles = take(2 * tile.rope.half_dim * kPanelColumns);
    s.block.steps = take(2 * tile.rope.half_dim * kPanelColumns);
    s.block.k_mean = take(d);
    s.block.codes = reinterpret_cast<std::uint8_t*>(take(4 * d));
  }
  if (next > tile.scratch + tile.scratch_floats) __builtin_trap();
  return s;
}

inline AttentionScratch start_softmax(const AttentionTile& tile, OnlineSoftmax& state) {
  const AttentionScratch s = carve_scratch(tile, state);
  pack_queries(tile, state.n_rows, s.packed_q);
  if (tile.n_blocks > 0) {
    prepare_queries(state, s);
    start_block_decoding(tile, s.block);
  }
  for (std::int64_t r = 0; r < state.n_rows; ++r) state.best[r] = -__builtin_inff();
  for (std::int64_t i = 0; i < state.n_rows * kLanes; ++i) state.mass[i] = 0.0F;
  for (std::int64_t i = 0; i < state.n_rows * state.row_values; ++i) state.values[i] = 0.0F;
  for (std::int64_t i = 0; i < kPanelColumns * state.value_stride; ++i) s.block.v[i] = 0.0F;
  return s;
}

inline void finish_softmax(const AttentionTile& tile, const OnlineSoftmax& state,
                           const AttentionScratch& s) {
  for (std::int64_t row = 0; row < state.n_rows; ++row) {
    const V factor = splat(1.0F / sum_lanes(load(state.mass + row * kLanes)));
    float* values = state.values + row * state.row_values;
    if (tile.n_blocks > 0) finish_values(tile, state, s, values);
    float* out = tile.out + row / tile.group * tile.out_stride + row % tile.group * tile.head_dim;
    for (int d = 0; d < tile.head_dim; d += kLanes) store(out + d, load(values + d) * factor);
  }
}

template <class Loader>
void attention_format(const AttentionTile& tile) {
  using Element = typename Loader::Element;
  OnlineSoftmax state{};
  const AttentionScratch s = start_softmax(tile, state);
  if (tile.n_blocks > 0) block_steps<Loader>(tile, state, s);

  const bool direct = state.is_short() && tile.head_dim % kPanelColumns == 0;
  const std::int64_t n_tail = tile.position_begin + tile.n_queries - tile.tail_origin;
  const std::int64_t n_pages = (n_tail + kPanelColumns - 1) / kPanelColumns;
  const std::int64_t first_page = (tile.tail_first - tile.tail_origin) / kPanelColumns;
  for (std::int64_t page = first_page; page < n_pages; ++page) {
    const Element* k = reinterpret_cast<const Element*>(tile.pages[page]);
    const Element* v = k + static_cast<std::int64_t>(tile.head_dim) * kPanelColumns;
    const std::int64_t page_begin = tile.tail_origin + page * kPanelColumns;
    if (direct) {
      const std::int64_t ahead = page + 1 < n_pages ? tile.pages[page + 1] - tile.pages[page] : 0;
      page_step<Loader, Loader>(state, tile, page_begin, k, v, tile.head_dim, ahead);
    } else {
      expand_panel<Loader>(k, tile.head_dim, s.block.k);
      expand_values<Loader>(v, tile.head_dim, state.value_stride, s.block.v);
      page_step<LoadF32, LoadF32>(state, tile, page_begin, s.block.k, s.block.v, state.value_stride,
                                  0);
    }
  }
  finish_softmax(tile, state, s);
}

inline void copy_logits(const OnlineSoftmax& state, Range tokens, std::int64_t column, float* out,
                        std::int64_t out_stride) {
  for (std::int64_t row = 0; row < state.n_rows; ++row) {
    const float* scores = state.scores + row * kPanelColumns;
    float* to = out + row * out_stride + column;
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
      to[t - tokens.begin] = scores[t] * state.scale;
    }
  }
}

template <class Loader>
void logits_format(const AttentionTile& tile, float* out, std::int64_t out_stride) {
  OnlineSoftmax state{};
  AttentionScratch s = start_softmax(tile, state);
  std::int64_t column = 0;
  for (std::int64_t i = 0; i < tile.n_blocks; ++i) {
    const KvBlock& block = tile.blocks[i];
    s.block.later_k = later_codes(tile, i, true);
    block_scores<Loader>(tile, state, s, block, 0);
    copy_logits(state, {block.first, block.end}, column, out, out_stride);
    column += block.end - block.first;
  }
  const std::int64_t n_tail = tile.position_begin + tile.n_queries - tile.tail_origin;
  std::int64_t slot = tile.tail_first - tile.tail_origin;
  while (slot < n_tail) {
    const std::int64_t page = slot / kPanelColumns;
    const std::int64_t left = n_tail - page * kPanelColumns;
    const Range tokens{slot % kPanelColumns, left < kPanelColumns ? left : kPanelColumns};
    raw_score_step<Loader>(tile, state, s, tile.pages[page], 0);
    copy_logits(state, tokens, column, out, out_stride);
    column += tokens.end - tokens.begin;
    slot = (page + 1) * kPanelColumns;
  }
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

void attention_logits_tile(const AttentionTile& tile, float* out, std::int64_t out_stride) {
  switch (tile.format) {
    case ElementFormat::kF32:
      return logits_format<LoadF32>(tile, out, out_stride);
    case ElementFormat::kF16:
      return logits_format<LoadF16>(tile, out, out_stride);
    case ElementFormat::kBF16:
    case ElementFormat::kBF16Paired:
      return logits_format<LoadBf16>(tile, out, out_stride);
  }
}
