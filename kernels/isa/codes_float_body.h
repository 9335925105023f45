// Products with codes of int4 K and of int4 and KIVI V in fp32. Included inside an anonymous
// namespace by per-ISA translation units, after value_codes_body.h.

// Leaves a query in the Hadamard basis and the sum of its elements, packed as the plain ones are.
inline void rotate_query(const OnlineSoftmax& state, const AttentionScratch& s, std::int64_t row,
                         std::int64_t offset, std::int64_t stride, const float* rotated) {
  float sum = 0.0F;
  for (int d = 0; d < state.head_dim; ++d) {
    s.rotated_q[offset + d * stride] = rotated[d];
    sum += rotated[d];
  }
  s.rotated_sum[row] = sum;
}

// Scores of int4 K.
inline void score_codes(const AttentionTile& tile, const OnlineSoftmax& state,
                        const AttentionScratch& s, const KvBlock& block) {
  const auto* codes = reinterpret_cast<const std::uint8_t*>(block.k.codes);
  OnlineSoftmax rotated = state;
  rotated.q = s.rotated_q;
  if (state.is_short()) {
    score_block<LoadCodes>(rotated, 0, codes, s.block.later_k - block.k.codes, 16);
  } else {
    expand_codes<LoadCodes>(nullptr, codes, tile.head_dim, 1, kPanelColumns, s.block.k);
    score_block<LoadF32>(rotated, 0, s.block.k, 0);
  }
  for (int t = 0; t < kPanelColumns; t += kLanes) {
    const V scale = load_f16(halves(block.k.scales) + t);
    const V minimum = load_f16(halves(block.k.scales) + kPanelColumns + t);
    for (std::int64_t row = 0; row < state.n_rows; ++row) {
      float* score = state.scores + row * kPanelColumns + t;
      store(score, fma(load(score), scale, splat(s.rotated_sum[row]) * minimum));
    }
  }
}

// What int4 and KIVI V adds to the values.
inline void sum_codes(const AttentionTile& tile, const OnlineSoftmax& state,
                      const AttentionScratch& s, const KvBlock& block) {
  value_step<LoadCodes>(tile, state, s, block);
}
