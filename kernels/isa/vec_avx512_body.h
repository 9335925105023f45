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
// c - a b
inline V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
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
// kLanes bytes of two codes of 4 bits: the low halves and the high ones as numbers, or as places in
// a table of 16. The permutation looks at the low 4 bits of an index only.
inline void lookup_codes(const float* table, const std::uint8_t* p, V& low, V& high) {
  const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const V values = load(table);
  low = _mm512_permutexvar_ps(both, values);
  high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), values);
}
inline void codes_to_float(const std::uint8_t* p, V& low, V& high) {
  const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const V values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  low = _mm512_permutexvar_ps(both, values);
  high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), values);
}
// Planes of pairs and of bits (either may be null) of n_groups groups, a multiple of 4, to nibbles;
// bits go to `shift`.
inline void planes_to_nibbles(const std::uint8_t* pairs, const std::uint8_t* bits, int shift,
                              std::int64_t n_groups, std::uint8_t* out) {
  const __m512i twice = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
  const __m512i shifts = _mm512_setr_epi64(0, 2, 0, 2, 0, 2, 0, 2);
  // The low halves of four words, then the high ones.
  const __m128i by_halves = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m512i low_bit = _mm512_set1_epi8(static_cast<char>(1 << shift));
  const __m512i high_bit = _mm512_set1_epi8(static_cast<char>(16 << shift));
  for (std::int64_t g = 0; g < n_groups; g += 4) {
    __m512i x = _mm512_setzero_si512();
    if (pairs != nullptr) {
      x = _mm512_castsi256_si512(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs + 8 * g)));
      x = _mm512_srlv_epi64(_mm512_permutexvar_epi64(twice, x), shifts);
      x = _mm512_and_si512(x, _mm512_set1_epi8(0x33));
    }
    if (bits != nullptr) {
      const __m128i words = _mm_shuffle_epi8(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + 4 * g)), by_halves);
      const auto low = static_cast<__mmask64>(_mm_cvtsi128_si64(words));
      const auto high = static_cast<__mmask64>(_mm_extract_epi64(words, 1));
      x = _mm512_mask_add_epi8(x, low, x, low_bit);
      x = _mm512_mask_add_epi8(x, high, x, high_bit);
    }
    _mm512_storeu_si512(out + 16 * g, x);
  }
}
// Entries of a table of 32.
inline V lookup_32(const float* table, __m512i index) {
  return _mm512_permutex2var_ps(load(table), index, load(table + 16));
}
// Column `column` + i of 16 rows to r[i]. Quarters of rows are put together while they are loaded,
// which leaves two stages inside of 128 bits.
inline void load_transposed(const float* const* rows, std::int64_t column, V* r) {
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; ++quarter) {
    V t[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const std::int64_t first = column + 4 * quarter;
      t[i] = _mm512_castps128_ps512(_mm_loadu_ps(rows[i] + first));
      t[i] = _mm512_insertf32x4(t[i], _mm_loadu_ps(rows[4 + i] + first), 1);
      t[i] = _mm512_insertf32x4(t[i], _mm_loadu_ps(rows[8 + i] + first), 2);
      t[i] = _mm512_insertf32x4(t[i], _mm_loadu_ps(rows[12 + i] + first), 3);
    }
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(t[0], t[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(t[0], t[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(t[2], t[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(t[2], t[3]));
    r[4 * quarter] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    r[4 * quarter + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    r[4 * quarter + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    r[4 * quarter + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
}
inline float sum_lanes(V v) { return _mm512_reduce_add_ps(v); }
inline float max_lanes(V v) { return _mm512_reduce_max_ps(v); }
