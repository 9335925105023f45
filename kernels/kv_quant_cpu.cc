#include "kernels/kv_quant.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/attention.h"
#include "kernels/core/check.h"

namespace spindle::kernels {
namespace {

// Encoding works on lanes: channel c of token t is at [c * kLanes + t], so that every step but the
// two transpositions is the same operation on 32 neighbours, without shuffles or reductions.
constexpr int kLanes = kKvBlockTokens;
constexpr int kGroup = 32;  // elements of one group of codes
constexpr float kMaxHalf = 65504.0F;

constexpr std::array<float, 2> kLevels1 = {-0.79788F, 0.79788F};
constexpr std::array<float, 4> kLevels2 = {-1.5104176F, -0.45278F, 0.45278F, 1.5104176F};
constexpr std::array<float, 8> kLevels3 = {-2.15195F, -1.34391F, -0.75600F, -0.24509F,
                                           0.24509F,  0.75600F,  1.34391F,  2.15195F};
constexpr std::array<float, 16> kLevels4 = {
    -2.7326F, -2.069F, -1.6181F, -1.2562F, -0.9424F, -0.6568F, -0.3881F, -0.1284F,
    0.1284F,  0.3881F, 0.6568F,  0.9424F,  1.2562F,  1.6181F,  2.069F,   2.7326F};

struct Lanes {
  alignas(64) float y[kMaxHeadDim * kLanes];
  alignas(64) std::uint8_t codes[kMaxHeadDim * kLanes];
};

// Values beyond fp16 saturate: finite rows must decode to finite rows.
std::uint16_t saturated_f16(float value) {
  return f32_to_f16(std::clamp(value, -kMaxHalf, kMaxHalf));
}

// Two stages of butterflies, at distances h and 2 h.
void butterflies_by_four(float* x, std::size_t count, std::size_t h) {
  for (std::size_t i = 0; i < count; i += 4 * h) {
    float* __restrict a = x + i;
    float* __restrict b = a + h;
    float* __restrict c = b + h;
    float* __restrict d = c + h;
    for (std::size_t j = 0; j < h; ++j) {
      const float ab = a[j] + b[j];
      const float a_b = a[j] - b[j];
      const float cd = c[j] + d[j];
      const float c_d = c[j] - d[j];
      a[j] = ab + cd;
      b[j] = a_b + c_d;
      c[j] = ab - cd;
      d[j] = a_b - c_d;
    }
  }
}

void butterflies_by_two(float* x, std::size_t count, std::size_t h) {
  for (std::size_t i = 0; i < count; i += 2 * h) {
    float* __restrict a = x + i;
    float* __restrict b = a + h;
    for (std::size_t j = 0; j < h; ++j) {
      const float sum = a[j] + b[j];
      b[j] = a[j] - b[j];
      a[j] = sum;
    }
  }
}

// hadamard() of `n_lanes` vectors of `dim` at once.
void hadamard_lanes(float* x, std::size_t dim, std::size_t n_lanes) {
  const std::size_t count = dim * n_lanes;
  const std::size_t n = dim & (~dim + 1);
  const std::size_t end = n * n_lanes;
  std::size_t h = n_lanes;
  for (; 4 * h <= end; h *= 4) butterflies_by_four(x, count, h);
  if (2 * h <= end) butterflies_by_two(x, count, h);
  const float scale = 1.0F / std::sqrt(static_cast<float>(n));
  for (std::size_t i = 0; i < count; ++i) x[i] *= scale;
}

// Lanes past the last row are zeros.
void load_lanes(ConstRows x, float* y) {
  for (std::int64_t t = 0; t < x.n_rows; ++t) {
    const float* row = x.row(t);
    for (std::int64_t c = 0; c < x.width; ++c) y[c * kLanes + t] = row[c];
  }
  for (std::int64_t t = x.n_rows; t < kLanes; ++t) {
    for (std::int64_t c = 0; c < x.width; ++c) y[c * kLanes + t] = 0.0F;
  }
}

// What the codes of a group of 2^bits even steps are computed with, for 32 groups side by side.
struct Steps {
  float divisor[kLanes];  // the fp16 scale, or infinity for scale 0, which makes all codes 0
  float minimum[kLanes];
  std::uint16_t scale_bits[kLanes];
  std::uint16_t minimum_bits[kLanes];

  void set(int i, float low, float high, float top) {
    scale_bits[i] = saturated_f16((high - low) / top);
    minimum_bits[i] = saturated_f16(low);
    const float scale = f16_to_f32(scale_bits[i]);
    divisor[i] = scale == 0.0F ? std::numeric_limits<float>::infinity() : scale;
    minimum[i] = f16_to_f32(minimum_bits[i]);
  }
};

// Nearest even integer of (y - minimum) / divisor within [0, top]. The clamp compares the bits as
// integers, which order like the floats from zero up: compilers vectorise that at once, and NaN
// gives an end of the range.
inline std::uint8_t step_code(float y, float minimum, float divisor, float top) {
  const auto top_bits = std::bit_cast<std::int32_t>(top);
  auto bits = std::bit_cast<std::int32_t>((y - minimum) / divisor);
  bits = bits > 0 ? bits : 0;
  bits = bits < top_bits ? bits : top_bits;
  // The sum's mantissa ends in the rounded integer.
  const float sum = std::bit_cast<float>(bits) + 0x1p23F;
  return static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(sum) & 0xffU);
}

inline void widen_range(const float* values, float* low, float* high) {
  for (int i = 0; i < kGroup; ++i) {
    low[i] = values[i] < low[i] ? values[i] : low[i];
    high[i] = values[i] > high[i] ? values[i] : high[i];
  }
}

// One group per lane over `n` channels.
Steps encode_steps_of_lanes(const float* y, int n, float top, std::uint8_t* codes) {
  float low[kLanes];
  float high[kLanes];
  std::copy_n(y, kLanes, low);
  std::copy_n(y, kLanes, high);
  for (int c = 1; c < n; ++c) widen_range(y + c * kLanes, low, high);
  Steps steps;
  for (int t = 0; t < kLanes; ++t) steps.set(t, low[t], high[t], top);
  for (int c = 0; c < n; ++c) {
    for (int t = 0; t < kLanes; ++t) {
      codes[c * kLanes + t] = step_code(y[c * kLanes + t], steps.minimum[t], steps.divisor[t], top);
    }
  }
  return steps;
}

// One group per channel over the 32 lanes, for the channels [first, first + 32) of x.
Steps encode_steps_of_channels(ConstRows x, int first, const float* y, float top,
                               std::uint8_t* codes) {
  float low[kGroup];
  float high[kGroup];
  std::copy_n(x.row(0) + first, kGroup, low);
  std::copy_n(x.row(0) + first, kGroup, high);
  for (int t = 1; t < kLanes; ++t) widen_range(x.row(t) + first, low, high);
  Steps steps;
  for (int c = 0; c < kGroup; ++c) steps.set(c, low[c], high[c], top);
  for (int c = 0; c < kGroup; ++c) {
    const float minimum = steps.minimum[c];
    const float divisor = steps.divisor[c];
    for (int t = 0; t < kLanes; ++t) {
      codes[c * kLanes + t] = step_code(y[c * kLanes + t], minimum, divisor, top);
    }
  }
  return steps;
}

// Sums of squares of the lanes; eights of channels are added first, which halves the digits lost.
void sum_squares(const float* y, int dim, float* sums) {
  for (int t = 0; t < kLanes; ++t) sums[t] = 0.0F;
  for (int c = 0; c < dim; c += 8) {
    float part[kLanes] = {};
    for (int i = c; i < c + 8; ++i) {
      for (int t = 0; t < kLanes; ++t) part[t] += y[i * kLanes + t] * y[i * kLanes + t];
    }
    for (int t = 0; t < kLanes; ++t) sums[t] += part[t];
  }
}

// The levels are symmetric, so a code is a sign and a magnitude class: the number of midpoints of
// positive levels below |z|. Codes are (half - 1 - class) for z <= 0 and mirrored for z > 0.
template <int kBits>
void lloyd_codes(const float* y, const float* divisor, int dim, std::uint8_t* codes) {
  constexpr int kHalf = 1 << (kBits - 1);
  constexpr int kMask = 2 * kHalf - 1;
  const std::span<const float> levels = lloyd_levels(kBits);
  std::array<std::int32_t, std::size_t{kHalf}> midpoints{};
  for (int i = 0; i + 1 < kHalf; ++i) {
    const float midpoint = (levels[static_cast<std::size_t>(kHalf + i)] +
                            levels[static_cast<std::size_t>(kHalf + i + 1)]) /
                           2.0F;
    midpoints[static_cast<std::size_t>(i)] = std::bit_cast<std::int32_t>(midpoint);
  }
  for (int c = 0; c < dim; ++c) {
    for (int t = 0; t < kLanes; ++t) {
      const float z = y[c * kLanes + t] / divisor[t];
      // As integers, so that a negative z on a midpoint can count as beyond it: the lower level is
      // the one farther from zero.
      const auto bits = std::bit_cast<std::uint32_t>(z);
      const auto key = static_cast<std::int32_t>((bits & 0x7fffffffU) + (bits >> 31));
      int magnitude = 0;
      for (int i = 0; i + 1 < kHalf; ++i)
        magnitude += key > midpoints[static_cast<std::size_t>(i)] ? 1 : 0;
      const int mirror = z > 0.0F ? kMask : 0;
      codes[c * kLanes + t] = static_cast<std::uint8_t>((kHalf - 1 - magnitude) ^ mirror);
    }
  }
}

// Sums of squares of the codes' levels, from how often each magnitude class occurs.
void sum_level_squares(const std::uint8_t* codes, int dim, int bits, double* sums) {
  const std::span<const float> levels = lloyd_levels(bits);
  const int half = 1 << (bits - 1);
  const auto square = [&](int magnitude) {
    const auto level = static_cast<double>(levels[static_cast<std::size_t>(half + magnitude)]);
    return level * level;
  };
  for (int t = 0; t < kLanes; ++t) sums[t] = dim * square(0);
  for (int first = 0; first < dim; first += kGroup) {
    for (int magnitude = 1; magnitude < half; ++magnitude) {
      const auto above = static_cast<std::uint8_t>(half + magnitude);
      const auto below = static_cast<std::uint8_t>(half - 1 - magnitude);
      std::uint8_t count[kLanes] = {};
      for (int c = first; c < first + kGroup; ++c) {
        for (int t = 0; t < kLanes; ++t) {
          const std::uint8_t code = codes[c * kLanes + t];
          count[t] = static_cast<std::uint8_t>(count[t] + (code == above ? 1 : 0) +
                                               (code == below ? 1 : 0));
        }
      }
      const double gain = square(magnitude) - square(0);
      for (int t = 0; t < kLanes; ++t) sums[t] += count[t] * gain;
    }
  }
}

void encode_lloyd(int bits, std::span<const std::uint16_t> mean, Lanes& lanes, int dim,
                  std::uint16_t* scales) {
  for (int c = 0; c < dim; ++c) {
    const float m = f16_to_f32(mean[static_cast<std::size_t>(c)]);
    for (int t = 0; t < kLanes; ++t) lanes.y[c * kLanes + t] -= m;
  }
  hadamard_lanes(lanes.y, static_cast<std::size_t>(dim), kLanes);
  float norm[kLanes];
  float divisor[kLanes];
  sum_squares(lanes.y, dim, norm);
  const float root = std::sqrt(static_cast<float>(dim));
  for (int t = 0; t < kLanes; ++t) {
    norm[t] = std::sqrt(norm[t]);
    divisor[t] = norm[t] > 0.0F ? norm[t] / root : std::numeric_limits<float>::infinity();
  }
  switch (bits) {
    case 1:
      lloyd_codes<1>(lanes.y, divisor, dim, lanes.codes);
      break;
    case 2:
      lloyd_codes<2>(lanes.y, divisor, dim, lanes.codes);
      break;
    case 3:
      lloyd_codes<3>(lanes.y, divisor, dim, lanes.codes);
      break;
    default:
      lloyd_codes<4>(lanes.y, divisor, dim, lanes.codes);
      break;
  }
  double squares[kLanes];
  sum_level_squares(lanes.codes, dim, bits, squares);
  for (int t = 0; t < kLanes; ++t) {
    scales[t] = saturated_f16(norm[t] / static_cast<float>(std::sqrt(squares[t])));
    if ((scales[t] & 0x7fffU) != 0) continue;
    for (int c = 0; c < dim; ++c) lanes.codes[c * kLanes + t] = 0;
  }
}

// Eight bytes of 0 or 1 to the bits of one byte.
std::uint8_t gather_bits(const std::uint8_t* flags) {
  std::uint64_t word;
  std::memcpy(&word, flags, sizeof(word));
  return static_cast<std::uint8_t>((word * 0x0102040810204080ULL) >> 56);
}

// Group `index` of `n_groups` into its planes.
void pack_group(const std::uint8_t* codes, int bits, int index, int n_groups, std::uint8_t* out) {
  if (bits == 4) {
    std::uint8_t* nibbles = out + index * 16;
    for (int j = 0; j < 16; ++j) {
      nibbles[j] = static_cast<std::uint8_t>(codes[j] | (codes[j + 16] << 4));
    }
    return;
  }
  if (bits >= 2) {
    std::uint8_t* pairs = out + index * 8;
    for (int j = 0; j < 8; ++j) {
      pairs[j] = static_cast<std::uint8_t>((codes[j] & 3) | ((codes[j + 8] & 3) << 2) |
                                           ((codes[j + 16] & 3) << 4) | ((codes[j + 24] & 3) << 6));
    }
    if (bits == 2) return;
    out += n_groups * 8;
  }
  std::uint8_t flags[kGroup];
  for (int j = 0; j < kGroup; ++j) {
    flags[j] = static_cast<std::uint8_t>((codes[j] >> (bits - 1)) & 1);
  }
  for (int j = 0; j < 4; ++j) out[index * 4 + j] = gather_bits(flags + 8 * j);
}

void pack_codes(const std::uint8_t* codes, KvSide side, int bits, int dim, std::uint8_t* out) {
  if (side == KvSide::kKey) {
    for (int c = 0; c < dim; ++c) pack_group(codes + c * kLanes, bits, c, dim, out);
    return;
  }
  for (int g = 0; g < dim / kGroup; ++g) {
    for (int t = 0; t < kLanes; ++t) {
      std::uint8_t channels[kGroup];
      for (int j = 0; j < kGroup; ++j) channels[j] = codes[(g * kGroup + j) * kLanes + t];
      pack_group(channels, bits, t * (dim / kGroup) + g, dim, out);
    }
  }
}

int code_bits(KvFormat format) {
  switch (format) {
    case KvFormat::kInt4:
    case KvFormat::kKivi4:
      return 4;
    case KvFormat::kKivi2:
      return 2;
    default:
      CHECK(is_lloyd(format), "a format without codes");
      return lloyd_bits(format);
  }
}

bool is_kivi(KvFormat format) { return format == KvFormat::kKivi4 || format == KvFormat::kKivi2; }

void check_head(KvFormat format, std::int64_t dim, std::int64_t n_rows,
                std::span<const std::uint16_t> mean) {
  CHECK(dim > 0 && dim <= kMaxHeadDim && dim % kGroup == 0, "head_dim must be a multiple of 32");
  CHECK(n_rows >= 0 && n_rows <= kKvBlockTokens, "a block holds 32 tokens");
  CHECK(!is_lloyd(format) || static_cast<std::int64_t>(mean.size()) == dim, "lloyd needs a mean");
}

// Codes and scales of all lanes; returns the number of scale elements. KIVI's come in two runs of
// dim: scales, then minima.
int encode_lanes(KvFormat format, KvSide side, ConstRows x, std::span<const std::uint16_t> mean,
                 Lanes& lanes, std::uint16_t* scales) {
  const int bits = code_bits(format);
  const int dim = static_cast<int>(x.width);
  if (is_lloyd(format)) {
    encode_lloyd(bits, mean, lanes, dim, scales);
    return kLanes;
  }
  const auto top = static_cast<float>((1 << bits) - 1);
  if (format == KvFormat::kInt4) {
    hadamard_lanes(lanes.y, static_cast<std::size_t>(dim), kLanes);
    const Steps steps = encode_steps_of_lanes(lanes.y, dim, top, lanes.codes);
    std::copy_n(steps.scale_bits, kLanes, scales);
    std::copy_n(steps.minimum_bits, kLanes, scales + kLanes);
    return 2 * kLanes;
  }
  for (int c = 0; c < dim; c += kGroup) {
    const float* y = lanes.y + c * kLanes;
    std::uint8_t* codes = lanes.codes + c * kLanes;
    const Steps steps = side == KvSide::kKey ? encode_steps_of_channels(x, c, y, top, codes)
                                             : encode_steps_of_lanes(y, kGroup, top, codes);
    std::copy_n(steps.scale_bits, kGroup, scales + c);
    std::copy_n(steps.minimum_bits, kGroup, scales + dim + c);
  }
  return 2 * dim;
}

std::uint8_t code_at(const std::uint8_t* codes, int bits, int group, int n_groups, int j) {
  if (bits == 4) return (codes[group * 16 + j % 16] >> (4 * (j / 16))) & 15;
  int code = 0;
  if (bits >= 2) {
    code = (codes[group * 8 + j % 8] >> (2 * (j / 8))) & 3;
    if (bits == 2) return static_cast<std::uint8_t>(code);
    codes += n_groups * 8;
  }
  const int bit = (codes[group * 4 + j / 8] >> (j % 8)) & 1;
  return static_cast<std::uint8_t>(code | (bit << (bits - 1)));
}

}  // namespace

void hadamard(std::span<float> x) {
  if (!x.empty()) hadamard_lanes(x.data(), x.size(), 1);
}

void kv_mean(ConstRows x, std::span<std::uint16_t> mean) {
  CHECK(static_cast<std::int64_t>(mean.size()) == x.width, "mean width");
  constexpr std::int64_t kColumns = 64;
  const float count = static_cast<float>(std::max<std::int64_t>(x.n_rows, 1));
  for (std::int64_t first = 0; first < x.width; first += kColumns) {
    const std::int64_t n = std::min(kColumns, x.width - first);
    float sum[kColumns] = {};
    std::int64_t t = 0;
    for (; t + 1 < x.n_rows; t += 2) {
      const float* a = x.row(t) + first;
      const float* b = x.row(t + 1) + first;
      for (std::int64_t c = 0; c < n; ++c) sum[c] += a[c] + b[c];
    }
    for (; t < x.n_rows; ++t) {
      for (std::int64_t c = 0; c < n; ++c) sum[c] += x.row(t)[first + c];
    }
    for (std::int64_t c = 0; c < n; ++c) {
      mean[static_cast<std::size_t>(first + c)] = saturated_f16(sum[c] / count);
    }
  }
}

std::span<const float> lloyd_levels(int bits) {
  switch (bits) {
    case 1:
      return kLevels1;
    case 2:
      return kLevels2;
    case 3:
      return kLevels3;
    default:
      CHECK(bits == 4, "lloyd levels of 1 to 4 bits");
      return kLevels4;
  }
}

void kv_encode(KvFormat format, KvSide side, ConstRows x, std::span<const std::uint16_t> mean,
               std::byte* codes, std::byte* scales) {
  check_head(format, x.width, x.n_rows, mean);
  CHECK(!is_kivi(format) || side == KvSide::kValue || x.n_rows == kKvBlockTokens,
        "KIVI's groups of K are whole blocks");
  const int dim = static_cast<int>(x.width);
  const int bits = code_bits(format);
  Lanes lanes;
  std::uint16_t scale_bits[2 * std::max(kMaxHeadDim, kLanes)];
  load_lanes(x, lanes.y);
  const int n_scales = encode_lanes(format, side, x, mean, lanes, scale_bits);
  // Scales are per token in runs of 32, but for the channels of KIVI's K, which has no free slots.
  if (x.n_rows < kLanes) {
    for (int t = static_cast<int>(x.n_rows); t < kLanes; ++t) {
      for (int c = 0; c < dim; ++c) lanes.codes[c * kLanes + t] = 0;
      for (int run = 0; run < n_scales; run += kLanes) scale_bits[run + t] = 0;
    }
  }
  pack_codes(lanes.codes, side, bits, dim, reinterpret_cast<std::uint8_t*>(codes));
  std::memcpy(scales, scale_bits, static_cast<std::size_t>(n_scales) * sizeof(std::uint16_t));
}

void kv_decode(KvFormat format, KvSide side, KvPieces pieces, std::span<const std::uint16_t> mean,
               Rows out) {
  check_head(format, out.width, out.n_rows, mean);
  const int dim = static_cast<int>(out.width);
  const int bits = code_bits(format);
  const auto* codes = reinterpret_cast<const std::uint8_t*>(pieces.codes);
  const auto scale_at = [&](int index) {
    std::uint16_t half;
    std::memcpy(&half, pieces.scales + static_cast<std::size_t>(index) * sizeof(half),
                sizeof(half));
    return f16_to_f32(half);
  };
  for (int t = 0; t < out.n_rows; ++t) {
    float* row = out.row(t);
    for (int c = 0; c < dim; ++c) {
      const int code = side == KvSide::kKey
                           ? code_at(codes, bits, c, dim, t)
                           : code_at(codes, bits, t * (dim / kGroup) + c / kGroup, dim, c % kGroup);
      if (is_lloyd(format)) {
        row[c] = lloyd_levels(bits)[static_cast<std::size_t>(code)] * scale_at(t);
        continue;
      }
      const int value_group = is_kivi(format) ? c / kGroup * kLanes + t : t;
      const int group = is_kivi(format) && side == KvSide::kKey ? c : value_group;
      const int n_groups = is_kivi(format) ? dim : kLanes;
      row[c] = static_cast<float>(code) * scale_at(group) + scale_at(n_groups + group);
    }
    if (is_rotated(format)) hadamard({row, static_cast<std::size_t>(dim)});
    if (!is_lloyd(format)) continue;
    for (int c = 0; c < dim; ++c) row[c] += f16_to_f32(mean[static_cast<std::size_t>(c)]);
  }
}

}  // namespace spindle::kernels
