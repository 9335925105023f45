// The online softmax over blocks of 32 tokens: score_block, softmax_step, add_values. Included
// inside an anonymous namespace by the per-ISA translation units, after gemm_body.h and
// math_body.h.

// State of the online softmax of n_rows rows, one row per (query, head of the group).
struct OnlineSoftmax {
  std::int64_t n_rows;
  int head_dim;
  std::int64_t value_stride;  // head_dim rounded up to whole panels
  std::int64_t row_values;    // floats of a row in `values`
  const float* q;             // tiles of rows, packed: [tile][head_dim][rows of tile]
  float* scores;              // [n_rows][32], then probabilities
  float* best;                // [n_rows]
  float* mass;                // [n_rows][kLanes], summed over lanes at the end
  // [n_rows][row_values], relative to `best`: the sums over V [value_stride], and with blocks what
  // block_step_body.h keeps beside them.
  float* values;
  float scale;

  // Few rows use a block as it lies, many share one widened copy: the same values either way.
  bool is_short() const { return n_rows <= kMaxTileRows; }
};

struct Range {
  std::int64_t begin;
  std::int64_t end;
};

// scores[r][t] = fma chain over d of q[r][d] * k[d][t], for the tiles that hold rows from
// `first_row` on.
template <class Loader>
void score_block(const OnlineSoftmax& state, std::int64_t first_row,
                 const typename Loader::Element* k, std::int64_t prefetch_bytes,
                 std::int64_t k_stride = kPanelColumns) {
  TileOperands<typename Loader::Element> t{};
  t.b = k;
  t.b_stride = k_stride;
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

// The same into `scores` over n_k rows of a decoded key, for all rows of unpacked queries.
inline void score_decoded(const OnlineSoftmax& state, const float* q, const float* k,
                          std::int64_t n_k, float* scores) {
  TileOperands<float> t{};
  t.b = k;
  t.b_stride = kPanelColumns;
  t.n_k = n_k;
  t.c_stride = kPanelColumns;
  const std::int64_t n_tiles = tile_count(state.n_rows);
  for (std::int64_t i = 0; i < n_tiles; ++i) {
    const std::int64_t begin = tile_begin(state.n_rows, i);
    const std::int64_t end = tile_begin(state.n_rows, i + 1);
    t.a = q + begin * kQueryStride;
    t.c = scores + begin * kPanelColumns;
    strided_tile<LoadF32, kQueryStride>(static_cast<int>(end - begin), t, kUnitsPerPanel);
  }
}

// One row: scores of its tokens to probabilities relative to the new maximum, zero for the others;
// what was summed before is rescaled when the maximum rose.
inline void softmax_step(const OnlineSoftmax& state, std::int64_t row, Range tokens) {
  constexpr int kVectors = kPanelColumns / kLanes;
  float* scores = state.scores + row * kPanelColumns;
  for (std::int64_t t = 0; t < tokens.begin; ++t) scores[t] = -__builtin_inff();
  for (std::int64_t t = tokens.end; t < kPanelColumns; ++t) scores[t] = -__builtin_inff();
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
    float* values = state.values + row * state.row_values;
    for (std::int64_t d = 0; d < state.row_values; d += kLanes) {
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

// c[r] = fma chain over the tokens of weights[r][t] * v[t], continued, for the rows of a block;
// weights are kPanelColumns apart, c is state.row_values apart. `v` says where slot 0 lies.
template <class Loader>
void add_values(const OnlineSoftmax& state, const float* weights, float* c, Range rows,
                Range tokens, TileOperands<typename Loader::Element> v, std::int64_t n_panels) {
  if (rows.begin >= rows.end) return;
  v.b += tokens.begin * v.b_stride;
  v.n_k = tokens.end - tokens.begin;
  v.c_stride = state.row_values;
  v.accumulate = true;
  const std::int64_t n_rows = rows.end - rows.begin;
  const std::int64_t n_tiles = tile_count(n_rows);
  for (std::int64_t i = 0; i < n_tiles; ++i) {
    const std::int64_t first = rows.begin + tile_begin(n_rows, i);
    const std::int64_t last = rows.begin + tile_begin(n_rows, i + 1);
    v.a = weights + first * kPanelColumns + tokens.begin;
    v.c = c + first * state.row_values;
    strided_tile<Loader, kPanelColumns>(static_cast<int>(last - first), v,
                                        n_panels * kUnitsPerPanel);
  }
}

// The same with the probabilities as weights and rows of V that are `v_stride` apart.
template <class Loader>
void value_block(const OnlineSoftmax& state, Range rows, Range tokens,
                 const typename Loader::Element* v, std::int64_t v_stride,
                 std::int64_t prefetch_bytes) {
  TileOperands<typename Loader::Element> t{};
  t.b = v;
  t.b_stride = v_stride;
  t.b_panel = kPanelColumns;
  t.prefetch_bytes = prefetch_bytes;
  add_values<Loader>(state, state.scores, state.values, rows, tokens, t,
                     state.value_stride / kPanelColumns);
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
