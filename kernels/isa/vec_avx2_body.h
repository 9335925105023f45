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
// c - a b
inline V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
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
// kLanes bytes of two codes of 4 bits: the low halves and the high ones as numbers, or as places in
// a table of 16.
inline __m256i widen_bytes(const std::uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void codes_to_float(const std::uint8_t* p, V& low, V& high) {
  const __m256i both = widen_bytes(p);
  low = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
  high = _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
}
// The permutation looks at the low 3 bits of an index, the blend at bit 3, moved to the sign.
inline V lookup(const float* table, __m256i index) {
  const V first = _mm256_permutevar8x32_ps(load(table), index);
  const V second = _mm256_permutevar8x32_ps(load(table + 8), index);
  return _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline void lookup_codes(const float* table, const std::uint8_t* p, V& low, V& high) {
  const __m256i both = widen_bytes(p);
  low = lookup(table, both);
  high = lookup(table, _mm256_srli_epi32(both, 4));
}
template <class Word>
inline Word load_word(const std::uint8_t* p) {
  Word word;
  __builtin_memcpy(&word, p, sizeof(word));
  return word;
}
// Planes of pairs and of bits (either may be null) of n_groups groups, a multiple of 4, to nibbles;
// bits go to `shift`.
inline void planes_to_nibbles(const std::uint8_t* pairs, const std::uint8_t* bits, int shift,
                              std::int64_t n_groups, std::uint8_t* out) {
  const __m256i bit = _mm256_set1_epi64x(static_cast<std::int64_t>(0x8040201008040201U));
  const __m256i bytes =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i value = _mm256_setr_m128i(_mm_set1_epi8(static_cast<char>(1 << shift)),
                                          _mm_set1_epi8(static_cast<char>(16 << shift)));
  for (std::int64_t g = 0; g < n_groups; ++g) {
    __m128i x = _mm_setzero_si128();
    if (pairs != nullptr) {
      const __m128i twice = _mm_set1_epi64x(load_word<std::int64_t>(pairs + 8 * g));
      x = _mm_and_si128(_mm_srlv_epi64(twice, _mm_set_epi64x(2, 0)), _mm_set1_epi8(0x33));
    }
    if (bits != nullptr) {
      // Byte j / 8 of the word in byte j, its bit j % 8 to all bits.
      const __m256i word = _mm256_set1_epi32(load_word<std::int32_t>(bits + 4 * g));
      const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(word, bytes), bit);
      const __m256i set = _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), value);
      x = _mm_or_si128(x,
                       _mm_or_si128(_mm256_castsi256_si128(set), _mm256_extracti128_si256(set, 1)));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * g), x);
  }
}
// Column `column` + i of kLanes rows to r[i].
inline void load_transposed(const float* const* rows, std::int64_t column, V* r) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) r[i] = load(rows[i] + column);
  V t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  V u[8];
#pragma GCC unroll 2
  for (int g = 0; g < 8; g += 4) {
    u[g] = _mm256_shuffle_ps(t[g], t[g + 2], 0x44);
    u[g + 1] = _mm256_shuffle_ps(t[g], t[g + 2], 0xee);
    u[g + 2] = _mm256_shuffle_ps(t[g + 1], t[g + 3], 0x44);
    u[g + 3] = _mm256_shuffle_ps(t[g + 1], t[g + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    r[4 + c] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
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
