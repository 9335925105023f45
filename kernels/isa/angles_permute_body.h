// Angles of listed positions from two tables of 32, by permutations of registers. Included inside
// an anonymous namespace by avx512.cc, before block_body.h.

// Steps from a block's first position that the tables reach.
constexpr std::int64_t kMaxListedSpan = 1024;
// Of a block with listed positions each half of 16 tokens has a first position of its own: most of
// their steps are then below 32, and their angles one permutation away.
constexpr int kTurnGroups = 2;

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

// Steps of a block's listed positions from the first position of their half, 0 in hidden slots, and
// those first positions. Returns the largest step, which may be out of the tables' reach.
inline std::uint32_t group_steps(const std::byte* positions, bool wide, int first, int end,
                                 std::int64_t last_position, std::int32_t* steps,
                                 std::int64_t* bases) {
  const __m512i last = _mm512_set1_epi32(static_cast<std::int32_t>(last_position));
  const auto visible =
      static_cast<std::uint32_t>((std::uint64_t{1} << end) - (std::uint64_t{1} << first));
  __m512i most = _mm512_setzero_si512();
  for (int half = 0; half < kTurnGroups; ++half) {
    const std::byte* p = positions + 16 * half * (wide ? 4 : 2);
    const __m512i listed =
        wide ? _mm512_loadu_si512(p)
             : _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const auto mask = static_cast<__mmask16>(visible >> (16 * half));
    const __m512i place = _mm512_min_epu32(listed, last);
    const int base =
        _mm_cvtsi128_si32(_mm512_castsi512_si128(_mm512_maskz_compress_epi32(mask, place)));
    const __m512i step = _mm512_maskz_sub_epi32(mask, place, _mm512_set1_epi32(base));
    bases[half] = base;
    most = _mm512_max_epu32(most, step);
    _mm512_storeu_si512(steps + 16 * half, step);
  }
  return _mm512_reduce_max_epu32(most);
}

// Numbers of a row of a table of 32 steps, for a vector of steps below 32.
inline V near_angles(const float* row, const std::int32_t* steps) {
  return lookup_32(row, _mm512_loadu_si512(steps));
}
