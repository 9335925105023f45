// Vector primitives for AVX2 + FMA + F16C. Included inside an anonymous namespace by avx2.cc only.

using V = __m256;
constexpr int kLanes = 8;
constexpr int kVectorRegisters = 16;
// Accumulator rows of the widest micro-tile, with two vectors per row: 12 of 16 registers.
constexpr int kMaxTileRows = 6;

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V splat(float v) { return _mm256_set1_ps(v); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
// NaN in `v` wins over the bound.
inline V at_least(V bound, V v) { return _mm256_max_ps(bound, v); }
inline V at_most(V bound, V v) { return _mm256_min_ps(bound, v); }
// v where x >= bound or x is NaN, else 0.
inline V zero_below(V v, V x, V bound) {
  return _mm256_and_ps(_mm256_cmp_ps(x, bound, _CMP_NLT_UQ), v);
}
// 2^n for integral n in [-126, 127].
inline V exponent_of(V n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline V load_bf16(const std::uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline V load_f16(const std::uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void load_bf16_pair(const std::uint16_t* p, V& low, V& high) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
}
inline V fold(V v) { return _mm256_permute2f128_ps(v, v, 1); }
inline float sum_lanes(V v) {
  V s = _mm256_add_ps(v, fold(v));
  s = _mm256_add_ps(s, _mm256_permute_ps(s, 0x4e));
  s = _mm256_add_ps(s, _mm256_permute_ps(s, 0xb1));
  return _mm256_cvtss_f32(s);
}
inline float max_lanes(V v) {
  V s = _mm256_max_ps(v, fold(v));
  s = _mm256_max_ps(s, _mm256_permute_ps(s, 0x4e));
  s = _mm256_max_ps(s, _mm256_permute_ps(s, 0xb1));
  return _mm256_cvtss_f32(s);
}
