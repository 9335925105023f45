// Vector primitives for any x86-64 (SSE2). There is no fused multiply-add: fma() rounds the
// product, so these results differ from the wider ISAs in the last bits. Included inside an
// anonymous namespace by portable.cc only.

using V = __m128;
constexpr int kLanes = 4;
constexpr int kVectorRegisters = 16;
// Accumulator rows of the widest micro-tile, with two vectors per row: 8 of 16 registers, which
// leaves room for the separate products.
constexpr int kMaxTileRows = 4;

inline V load(const float* p) { return _mm_loadu_ps(p); }
inline void store(float* p, V v) { _mm_storeu_ps(p, v); }
inline V splat(float v) { return _mm_set1_ps(v); }
inline V fma(V a, V b, V c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
// NaN in `v` wins over the bound.
inline V at_least(V bound, V v) { return _mm_max_ps(bound, v); }
inline V at_most(V bound, V v) { return _mm_min_ps(bound, v); }
// v where x >= bound or x is NaN, else 0.
inline V zero_below(V v, V x, V bound) { return _mm_and_ps(_mm_cmpnlt_ps(x, bound), v); }
// 2^n for integral n in [-126, 127].
inline V exponent_of(V n) {
  const __m128i biased = _mm_add_epi32(_mm_cvtps_epi32(n), _mm_set1_epi32(127));
  return _mm_castsi128_ps(_mm_slli_epi32(biased, 23));
}
inline V load_bf16(const std::uint16_t* p) {
  const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), half));
}
inline V load_f16(const std::uint16_t* p) {
  const __m128i half =
      _mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128());
  const __m128i magnitude = _mm_and_si128(half, _mm_set1_epi32(0x7fff));
  const __m128i sign = _mm_slli_epi32(_mm_and_si128(half, _mm_set1_epi32(0x8000)), 16);
  // The exponent bias differs by 112; the product is exact, also for subnormals.
  const __m128 value =
      _mm_mul_ps(_mm_castsi128_ps(_mm_slli_epi32(magnitude, 13)), _mm_set1_ps(0x1p112F));
  const __m128i special =
      _mm_and_si128(_mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7bff)), _mm_set1_epi32(0x7f800000));
  return _mm_or_ps(_mm_or_ps(value, _mm_castsi128_ps(special)), _mm_castsi128_ps(sign));
}
inline void load_bf16_pair(const std::uint16_t* p, V& low, V& high) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  low = _mm_castsi128_ps(_mm_slli_epi32(both, 16));
  high = _mm_castsi128_ps(_mm_and_si128(both, _mm_set1_epi32(-65536)));
}
inline float sum_lanes(V v) {
  V s = _mm_add_ps(v, _mm_shuffle_ps(v, v, 0x4e));
  s = _mm_add_ps(s, _mm_shuffle_ps(s, s, 0xb1));
  return _mm_cvtss_f32(s);
}
inline float max_lanes(V v) {
  V s = _mm_max_ps(v, _mm_shuffle_ps(v, v, 0x4e));
  s = _mm_max_ps(s, _mm_shuffle_ps(s, s, 0xb1));
  return _mm_cvtss_f32(s);
}
