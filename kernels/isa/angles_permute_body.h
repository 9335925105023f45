// Angles of listed positions from two tables of 32, by permutations of registers. Included inside
// an anonymous namespace by avx512.cc, before block_body.h.

// Steps from a block's first position that the tables reach.
constexpr std::int64_t kMaxListedSpan = 1024;

// cos and sin of the steps of 32 tokens, or their difference and sum, [half_dim][32].
template <bool kSums>
void compose_angles(const AttentionRope& rope, const std::int32_t* steps, float* first,
                    float* second) {
  const float* step_cos = rope.step_cos;
  const float* step_sin = rope.step_sin;
  const float* stride_cos = rope.stride_cos;
  const float* stride_sin = rope.stride_sin;
  const std::int64_t n_half = rope.half_dim * kPanelColumns;
  const __m512i fine[2] = {_mm512_loadu_si512(steps), _mm512_loadu_si512(steps + 16)};
  const __m512i coarse[2] = {_mm512_srli_epi32(fine[0], 5), _mm512_srli_epi32(fine[1], 5)};
  for (std::int64_t i = 0; i < n_half; i += kPanelColumns) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const V fine_cos = lookup_32(step_cos + i, fine[half]);
      const V fine_sin = lookup_32(step_sin + i, fine[half]);
      const V coarse_cos = lookup_32(stride_cos + i, coarse[half]);
      const V coarse_sin = lookup_32(stride_sin + i, coarse[half]);
      const V cos = fnma(coarse_sin, fine_sin, coarse_cos * fine_cos);
      const V sin = fma(coarse_cos, fine_sin, coarse_sin * fine_cos);
      store(first + i + 16 * half, kSums ? cos - sin : cos);
      store(second + i + 16 * half, kSums ? cos + sin : sin);
    }
  }
}
