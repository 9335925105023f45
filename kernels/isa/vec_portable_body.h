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
// c - a b
inline V fnma(V a, V b, V c) { return _mm_sub_ps(c, _mm_mul_ps(a, b)); }
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
// kLanes bytes of two codes of 4 bits: the low halves and the high ones as numbers, or as places in
// a table of 16.
inline void codes_to_float(const std::uint8_t* p, V& low, V& high) {
  std::int32_t word;
  __builtin_memcpy(&word, p, sizeof(word));
  const __m128i zero = _mm_setzero_si128();
  const __m128i both = _mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(word), zero), zero);
  low = _mm_cvtepi32_ps(_mm_and_si128(both, _mm_set1_epi32(15)));
  high = _mm_cvtepi32_ps(_mm_srli_epi32(both, 4));
}
inline void lookup_codes(const float* table, const std::uint8_t* p, V& low, V& high) {
  low = _mm_setr_ps(table[p[0] & 15], table[p[1] & 15], table[p[2] & 15], table[p[3] & 15]);
  high = _mm_setr_ps(table[p[0] >> 4], table[p[1] >> 4], table[p[2] >> 4], table[p[3] >> 4]);
}
// The bits of one byte to eight bytes of 0 or 1.
inline std::uint64_t spread_bits(std::uint8_t bits) {
  const std::uint64_t kept = bits * 0x0101010101010101U & 0x8040201008040201U;
  return (kept + 0x7f7f7f7f7f7f7f7fU) >> 7 & 0x0101010101010101U;
}
// Planes of pairs and of bits (either may be null) of n_groups groups, a multiple of 4, to nibbles;
// bits go to `shift`.
inline void planes_to_nibbles(const std::uint8_t* pairs, const std::uint8_t* bits, int shift,
                              std::int64_t n_groups, std::uint8_t* out) {
  constexpr std::uint64_t kPairs = 0x3333333333333333U;
  for (std::int64_t g = 0; g < n_groups; ++g) {
    std::uint64_t nibbles[2] = {};
    if (pairs != nullptr) {
      std::uint64_t word;
      __builtin_memcpy(&word, pairs + 8 * g, sizeof(word));
      nibbles[0] = word & kPairs;
      nibbles[1] = word >> 2 & kPairs;
    }
    for (int i = 0; bits != nullptr && i < 2; ++i) {
      nibbles[i] |= spread_bits(bits[4 * g + i]) << shift;
      nibbles[i] |= spread_bits(bits[4 * g + i + 2]) << (shift + 4);
    }
    __builtin_memcpy(out + 16 * g, nibbles, sizeof(nibbles));
  }
}
// Column `column` + i of kLanes rows to r[i].
inline void load_transposed(const float* const* rows, std::int64_t column, V* r) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) r[i] = load(rows[i] + column);
  const V low01 = _mm_unpacklo_ps(r[0], r[1]);
  const V high01 = _mm_unpackhi_ps(r[0], r[1]);
  const V low23 = _mm_unpacklo_ps(r[2], r[3]);
  const V high23 = _mm_unpackhi_ps(r[2], r[3]);
  r[0] = _mm_movelh_ps(low01, low23);
  r[1] = _mm_movehl_ps(low23, low01);
  r[2] = _mm_movelh_ps(high01, high23);
  r[3] = _mm_movehl_ps(high23, high01);
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
