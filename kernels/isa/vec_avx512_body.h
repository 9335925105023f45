// Vector primitives for AVX-512. Included inside an anonymous namespace by avx512.cc only.

using V = __m512;
constexpr int kLanes = 16;
constexpr int kVectorRegisters = 32;
// Accumulator rows of the widest micro-tile, with two vectors per row: 24 of 32 registers.
constexpr int kMaxTileRows = 12;

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V splat(float v) { return _mm512_set1_ps(v); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// NaN in `v` wins over the bound.
inline V at_least(V bound, V v) { return _mm512_max_ps(bound, v); }
inline V at_most(V bound, V v) { return _mm512_min_ps(bound, v); }
// v where x >= bound or x is NaN, else 0.
inline V zero_below(V v, V x, V bound) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), v);
}
// 2^n for integral n in [-126, 127].
inline V exponent_of(V n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline V load_bf16(const std::uint16_t* p) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline V load_f16(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void load_bf16_pair(const std::uint16_t* p, V& low, V& high) {
  const __m512i both = _mm512_loadu_si512(p);
  low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
}
inline float sum_lanes(V v) { return _mm512_reduce_add_ps(v); }
inline float max_lanes(V v) { return _mm512_reduce_max_ps(v); }
