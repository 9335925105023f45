// Products with codes of int4 K and of int4 and KIVI V in integers, for AVX-512. Included inside an
// anonymous namespace by avx512.cc, after value_codes_body.h.
//
// Codes are below 16, so products of four of them with four bytes are summed by one instruction
// (vpdpbusd) for 16 columns at once. The other factor, a query or the tokens' weights, is taken as
// an integer of 24 bits in three bytes: a step of 2^-23 of the largest, as fine as fp32. Sums of
// integers are exact, so their order and the number of rows beside each other are free, and hosts
// without VNNI get the same bits by other instructions.

constexpr int kPlanes = 3;
// 127 * 65536: its bytes are in range, also when rounding adds one.
constexpr float kLargestInteger = 8323072.0F;

template <bool kVnni>
inline __m512i add_products(__m512i sum, __m512i codes, __m512i bytes) {
  if constexpr (kVnni) {
    // The unit is compiled without VNNI, which not all hosts with AVX-512 have.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(bytes));
    return sum;
  }
  const __m512i pairs = _mm512_maddubs_epi16(codes, bytes);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

// 16 integers to the planes of their signed bytes, `stride` apart.
inline void store_bytes(__m512i x, std::int64_t stride, std::int8_t* out) {
  const __m512i half = _mm512_set1_epi32(128);
  for (int plane = 0; plane < kPlanes; ++plane) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + plane * stride), _mm512_cvtepi32_epi8(x));
    x = _mm512_srai_epi32(_mm512_add_epi32(x, half), 8);
  }
}

// Four rows of 16 bytes, one in each quarter, to four bytes of each of 16 columns.
inline __m512i interleave_rows(__m512i x) {
  const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, x), bytes);
}

inline __m512i broadcast_bytes(const std::int8_t* p) {
  std::int32_t word;
  __builtin_memcpy(&word, p, sizeof(word));
  return _mm512_set1_epi32(word);
}

// Sums of kRows rows: for each plane of bytes, the 16 columns of low nibbles and those of high
// ones.
template <bool kVnni, int kRows>
struct CodeSums {
  __m512i sums[kRows][kPlanes][2];

  void clear() {
#pragma GCC unroll 24
    for (int i = 0; i < kRows * kPlanes * 2; ++i) {
      sums[i / (kPlanes * 2)][i / 2 % kPlanes][i % 2] = _mm512_setzero_si512();
    }
  }
  // `x` is four rows of codes; `bytes` their four factors, rows and planes apart as given.
  void add(__m512i x, const std::int8_t* bytes, std::int64_t row_stride,
           std::int64_t plane_stride) {
    const __m512i mask = _mm512_set1_epi8(15);
    x = interleave_rows(x);
    const __m512i low = _mm512_and_si512(x, mask);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(x, 4), mask);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int plane = 0; plane < kPlanes; ++plane) {
        const __m512i factor = broadcast_bytes(bytes + r * row_stride + plane * plane_stride);
        sums[r][plane][0] = add_products<kVnni>(sums[r][plane][0], low, factor);
        sums[r][plane][1] = add_products<kVnni>(sums[r][plane][1], high, factor);
      }
    }
  }
  V total(int row, int half) const {
    const V first = _mm512_cvtepi32_ps(sums[row][0][half]);
    const V second = _mm512_cvtepi32_ps(sums[row][1][half]);
    const V third = _mm512_cvtepi32_ps(sums[row][2][half]);
    return fma(third, splat(65536.0F), fma(second, splat(256.0F), first));
  }
};

// Calls step<kVnni, kRows>(row) for rows in fours, twos and ones.
template <class Step>
void for_rows(std::int64_t n_rows, const Step& step) {
  std::int64_t row = 0;
  if (__builtin_cpu_supports("avx512vnni")) {
    for (; row + 4 <= n_rows; row += 4) step.template operator()<true, 4>(row);
    for (; row + 2 <= n_rows; row += 2) step.template operator()<true, 2>(row);
    if (row < n_rows) step.template operator()<true, 1>(row);
    return;
  }
  for (; row + 4 <= n_rows; row += 4) step.template operator()<false, 4>(row);
  for (; row + 2 <= n_rows; row += 2) step.template operator()<false, 2>(row);
  if (row < n_rows) step.template operator()<false, 1>(row);
}

// Bytes of a query: planes [3][head_dim] in the room of head_dim floats.
inline std::int8_t* query_bytes(const OnlineSoftmax& state, const AttentionScratch& s,
                                std::int64_t row) {
  return reinterpret_cast<std::int8_t*>(s.rotated_q + row * state.head_dim);
}

// Leaves a query in the Hadamard basis as integers, their scale and the sum of its elements.
inline void rotate_query(const OnlineSoftmax& state, const AttentionScratch& s, std::int64_t row,
                         std::int64_t /*offset*/, std::int64_t /*stride*/, const float* rotated) {
  V top = splat(0.0F);
  for (int d = 0; d < state.head_dim; d += kLanes) {
    top = at_least(_mm512_abs_ps(load(rotated + d)), top);
  }
  const float largest = max_lanes(top);
  const float factor = largest > 0.0F ? kLargestInteger / largest : 0.0F;
  const float scale = largest / kLargestInteger;
  std::int8_t* bytes = query_bytes(state, s, row);
  V sum = splat(0.0F);
  for (int d = 0; d < state.head_dim; d += kLanes) {
    const __m512i x = _mm512_cvtps_epi32(load(rotated + d) * splat(factor));
    store_bytes(x, state.head_dim, bytes + d);
    sum = sum + _mm512_cvtepi32_ps(x);
  }
  s.rotated_scale[row] = scale;
  s.rotated_sum[row] = sum_lanes(sum) * scale;
}

// Scores of int4 K.
inline void score_codes(const AttentionTile& tile, const OnlineSoftmax& state,
                        const AttentionScratch& s, const KvBlock& block) {
  const std::int64_t d = tile.head_dim;
  const std::uint16_t* scales = halves(block.k.scales);
  const V scale[2] = {load_f16(scales), load_f16(scales + 16)};
  const V minimum[2] = {load_f16(scales + kPanelColumns), load_f16(scales + kPanelColumns + 16)};
  for_rows(state.n_rows, [&]<bool kVnni, int kRows>(std::int64_t row) {
    CodeSums<kVnni, kRows> sums;
    sums.clear();
    const std::int8_t* bytes = query_bytes(state, s, row);
    for (std::int64_t i = 0; i < d; i += 4) {
      prefetch_line(s.block.later_k + 16 * i);
      sums.add(_mm512_loadu_si512(block.k.codes + 16 * i), bytes + i, 4 * d, d);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const V product = sums.total(r, half) * splat(s.rotated_scale[row + r]);
        store(state.scores + (row + r) * kPanelColumns + 16 * half,
              fma(product, scale[half], splat(s.rotated_sum[row + r]) * minimum[half]));
      }
    }
  });
}

// Bytes of the weights of a row: planes [3][32] in the room of 32 floats.
inline std::int8_t* weight_bytes(const AttentionScratch& s, std::int64_t row) {
  return reinterpret_cast<std::int8_t*>(s.weights + row * kPanelColumns);
}

// Probabilities times scales as integers, and what is summed beside them. Probabilities are at most
// 1, so the largest scale bounds the weights of all rows. Returns the weight of one step.
inline float weigh_by_bytes(const OnlineSoftmax& state, const AttentionScratch& s,
                            const ValueGroup& group) {
  V scale[2] = {load_f16(group.scales), load_f16(group.scales + 16)};
  const V minimum[2] = {load_f16(group.minima), load_f16(group.minima + 16)};
  const float largest = max_lanes(at_least(scale[0], scale[1]));
  const V factor = splat(largest > 0.0F ? kLargestInteger / largest : 0.0F);
  scale[0] = scale[0] * factor;
  scale[1] = scale[1] * factor;
  for (std::int64_t row = 0; row < state.n_rows; ++row) {
    const float* p = state.scores + row * kPanelColumns;
    float* lanes = state.values + row * state.row_values + group.sum;
    V sum = load(lanes);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const V mass = load(p + 16 * half);
      store_bytes(_mm512_cvtps_epi32(mass * scale[half]), kPanelColumns,
                  weight_bytes(s, row) + 16 * half);
      sum = fma(mass, minimum[half], sum);
    }
    store(lanes, sum);
  }
  return largest / kLargestInteger;
}

inline __m512i four_rows(const std::uint8_t* p, std::int64_t stride) {
  const auto row = [p, stride](std::int64_t i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * stride));
  };
  __m512i x = _mm512_castsi128_si512(row(0));
  x = _mm512_inserti32x4(x, row(1), 1);
  x = _mm512_inserti32x4(x, row(2), 2);
  return _mm512_inserti32x4(x, row(3), 3);
}

// `ahead`: bytes from codes to those to be fetched meanwhile.
inline void add_group(const OnlineSoftmax& state, const AttentionScratch& s,
                      const ValueGroup& group, const std::uint8_t* codes, std::int64_t ahead) {
  const V step = splat(weigh_by_bytes(state, s, group));
  const std::int64_t stride = state.head_dim / 2;
  for_rows(state.n_rows, [&]<bool kVnni, int kRows>(std::int64_t row) {
    for (std::int64_t panel = 0; panel < group.n_panels; ++panel) {
      CodeSums<kVnni, kRows> sums;
      sums.clear();
      const std::uint8_t* p = codes + 16 * (group.first_panel + panel);
      for (std::int64_t t = 0; t < kPanelColumns; t += 4) {
        prefetch_line(reinterpret_cast<const std::byte*>(p + t * stride) + ahead);
        sums.add(four_rows(p + t * stride, stride), weight_bytes(s, row) + t, 4 * kPanelColumns,
                 kPanelColumns);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        float* values =
            state.values + (row + r) * state.row_values + group.values + panel * kPanelColumns;
        store(values, fma(sums.total(r, 0), step, load(values)));
        store(values + 16, fma(sums.total(r, 1), step, load(values + 16)));
      }
    }
  });
}

// What int4 and KIVI V adds to the values.
inline void sum_codes(const AttentionTile& tile, const OnlineSoftmax& state,
                      const AttentionScratch& s, const KvBlock& block) {
  const int bits = code_bits(block.codec.v);
  const std::uint8_t* codes = nibble_plane(bits, block.v.codes, tile.head_dim, s.block.codes);
  const std::int64_t ahead = bits == 4 ? s.block.later_v - block.v.codes : 0;
  for_value_groups(state, block,
                   [&](const ValueGroup& group) { add_group(state, s, group, codes, ahead); });
}
