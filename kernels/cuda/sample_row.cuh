#pragma once
// Sampling of one row (sample_cuda.cu): what its kernels share, and the draw by one block.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/sample.h"

namespace spindle::kernels::sampling {

using U32 = std::uint32_t;
using U64 = unsigned long long;

inline constexpr std::int64_t kMaxVocab = std::int64_t{1} << 19;  // masses of 2^44 stay below 2^63
inline constexpr float kOne = 0x1p44F;
inline constexpr int kSlice = 4096;
inline constexpr int kSliceThreads = 256;
inline constexpr int kPerThread = kSlice / kSliceThreads;
inline constexpr int kThreads = 1024;  // of choose
inline constexpr int kBins = 1024;
static_assert(kBins == kThreads, "a thread of choose looks after one bin");
inline constexpr float kBinsPerUnit = 32.0F;  // a unit is a factor e of weight
inline constexpr float kUnits = 32.0F;
inline constexpr int kListed = 4096;
inline constexpr U64 kNan = ~U64{0};
inline constexpr U32 kMinusInfinityKey = 0x007fffffU;

// The workspace, all arrays by row.
struct Workspace {
  U64* best = nullptr;        // [n_slices] key << 32 | ~id
  U64* mass = nullptr;        // [n_slices] of weights that min_p leaves
  U64* bin_mass = nullptr;    // [kBins]
  U32* bin_count = nullptr;   // [kBins]
  float* adjusted = nullptr;  // [n_vocab] of rows with adjustments
};

struct Arguments {
  const float* logits;
  std::int64_t stride;
  const DeviceSampleRow* rows;
  const DeviceSampleAdjust* adjusts;
  DeviceSampled* sampled;
  Workspace workspace;
  int n_vocab;
  int n_slices;
};

// Unsigned integers in the order of the floats; minus zero is zero.
__device__ inline U32 key_of(float value) {
  const U32 bits = __float_as_uint(__fadd_rn(value, 0.0F));
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}
__device__ inline float value_of(U32 key) {
  return __uint_as_float((key & 0x80000000U) != 0 ? key ^ 0x80000000U : ~key);
}

// exp_shifted of the CPU (isa/math_body.h), step by step.
__device__ inline float exp_weight(float logit, float best, float scale) {
  const float x = __fmul_rn(__fsub_rn(logit, best), scale);
  if (!(x >= -86.5F)) return 0.0F;
  const float magic = 12582912.0F;
  const float n = __fsub_rn(__fmaf_rn(x, 1.442695022F, magic), magic);
  float r = __fmaf_rn(n, -0.693359375F, x);
  r = __fmaf_rn(n, 2.121944417e-04F, r);
  float q = __fmaf_rn(r, 1.392625039e-03F, 8.363232948e-03F);
  q = __fmaf_rn(r, q, 4.166655242e-02F);
  q = __fmaf_rn(r, q, 1.666657627e-01F);
  q = __fmaf_rn(r, q, 0.5F);
  const float p = __fadd_rn(__fmaf_rn(__fmul_rn(r, r), q, r), 1.0F);
  const float exponent = __int_as_float((static_cast<int>(n) - 1 + 127) << 23);
  return __fmul_rn(__fadd_rn(p, p), exponent);
}

struct Softmax {
  float best;
  float scale;  // 1 / temperature

  __device__ float weight(float logit) const { return exp_weight(logit, best, scale); }
  __device__ U64 mass(float logit) const { return mass_of(weight(logit)); }
  __device__ static U64 mass_of(float weight) { return __float2ull_rn(weight * kOne); }
  // Bins descend with the logit; kBins for those without weight.
  __device__ int bin(float logit) const {
    const float distance = __fmul_rn(__fsub_rn(best, logit), scale);
    if (!(distance < kUnits)) return kBins;
    return min(static_cast<int>(distance * kBinsPerUnit), kBins - 1);
  }
};

__device__ inline const float* row_of(const Arguments& a, const DeviceSampleRow& row,
                                      unsigned index) {
  return row.n_adjust > 0 ? a.workspace.adjusted + std::int64_t{index} * a.n_vocab
                          : a.logits + row.logits_row * a.stride;
}

__device__ inline U64 warp_max(U64 value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffU, value, offset));
  }
  return value;
}
__device__ inline U64 warp_sum(U64 value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, offset);
  }
  return value;
}

// What the best logit alone decides.
struct Start {
  Softmax softmax;
  int best_id;   // -1: the row has no token
  bool decided;  // best_id is the token
};

// By all threads of a warp.
__device__ inline Start start_of(const Arguments& a, const DeviceSampleRow& row, unsigned index) {
  U64 best = 0;
  for (int i = static_cast<int>(threadIdx.x % 32); i < a.n_slices; i += 32) {
    best = max(best, a.workspace.best[index * a.n_slices + i]);
  }
  best = warp_max(best);
  const auto key = static_cast<U32>(best >> 32);
  Start start;
  start.softmax.best = value_of(key);
  start.softmax.scale = __fdiv_rn(1.0F, row.params.temperature);
  start.best_id =
      best == kNan || key <= kMinusInfinityKey ? -1 : static_cast<int>(~static_cast<U32>(best));
  start.decided = start.best_id < 0 || !(row.params.temperature > 0.0F) ||
                  !isfinite(start.softmax.scale) || !isfinite(start.softmax.best);
  return start;
}

__device__ inline bool limits_count(const SampleParams& params, int n_vocab) {
  return params.top_k > 0 && params.top_k < n_vocab;
}
__device__ inline bool is_ranked(const SampleParams& params, int n_vocab) {
  return limits_count(params, n_vocab) || params.top_p < 1.0F;
}

// Counts and masses by bin; a mass in two words, since shared memory adds words.
struct Histogram {
  U32 count[kBins];
  U32 low[kBins];
  U32 high[kBins];

  __device__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
      count[i] = 0;
      low[i] = 0;
      high[i] = 0;
    }
  }
  __device__ void add(int bin, U64 mass) {
    atomicAdd(&count[bin], 1U);
    const auto part = static_cast<U32>(mass);
    const U32 before = atomicAdd(&low[bin], part);
    const U32 rest = static_cast<U32>(mass >> 32) + (before + part < before ? 1U : 0U);
    if (rest != 0) atomicAdd(&high[bin], rest);
  }
  __device__ U64 mass(int bin) const { return U64{high[bin]} << 32 | low[bin]; }
};

// How much lies before and in a bin.
struct Found {
  int bin;
  U64 count_before;
  U64 mass_before;
  U64 count;
  U64 mass;
};

// Everything in the order up to a token: `place` of those equal to `key` are in it.
struct Prefix {
  U32 key;
  U64 place;
  U64 mass;
};

struct Shared {
  Histogram histogram;
  U32 keys[kListed];
  int ids[kListed];
  int n_listed;
  U64 warp_totals[2][32];
  Found found;
  U32 low_key;
  U32 high_key;
  int equal;
  int token;
};

// One row's draw, by all threads of a block.
class Chooser {
 public:
  __device__ Chooser(const Arguments& a, const DeviceSampleRow& row, const Start& start,
                     unsigned index, Shared& shared)
      : a_(a),
        params_(row.params),
        softmax_(start.softmax),
        logits_(row_of(a, row, index)),
        index_(index),
        uniform_(row.uniform),
        shared_(shared) {}

  // By the order of ids, when nothing but min_p limits.
  __device__ int draw_plain() {
    const int slice = static_cast<int>(threadIdx.x);
    const U64 mass = slice < a_.n_slices ? a_.workspace.mass[index_ * a_.n_slices + slice] : U64{0};
    const U64 total = block_total(mass);
    if (total == 0) return -1;
    const U64 target = drawn(total);
    const Found found = reach(0, mass, true, target);
    const int begin = found.bin * kSlice;
    return reach_id(begin, min(begin + kSlice, a_.n_vocab), target - found.mass_before,
                    [&](float logit) {
                      const float weight = softmax_.weight(logit);
                      return weight < params_.min_p ? U64{0} : Softmax::mass_of(weight);
                    });
  }

  __device__ int draw_ranked() {
    const int bin = static_cast<int>(threadIdx.x);
    const U64 total_count = block_total(a_.workspace.bin_count[index_ * kBins + bin]);
    U64 mass = block_total(a_.workspace.bin_mass[index_ * kBins + bin]);
    const bool count_limits =
        limits_count(params_, a_.n_vocab) && total_count > static_cast<U64>(params_.top_k);
    const bool mass_limits = params_.top_p < 1.0F;
    if (count_limits) {
      list_up_to(reach_row(false, static_cast<U64>(params_.top_k)));
      mass = prefix(false, static_cast<U64>(params_.top_k)).mass;
    }
    if (mass_limits) {
      const U64 target = max(U64{1}, static_cast<U64>(ceil(static_cast<double>(params_.top_p) *
                                                           static_cast<double>(mass))));
      if (!listed_) list_up_to(reach_row(true, min(target, mass)));
      mass = prefix(true, min(target, mass)).mass;
    }
    if (params_.min_p > 0.0F) {
      const int slice = static_cast<int>(threadIdx.x);
      mass = min(mass,
                 block_total(slice < a_.n_slices ? a_.workspace.mass[index_ * a_.n_slices + slice]
                                                 : U64{0}));
    }
    if (mass == 0) return -1;
    const U64 target = drawn(mass);
    if (!listed_) list_up_to(reach_row(true, target));
    return id_of(prefix(true, target));
  }

 private:
  // The mass at which the drawn token is reached.
  __device__ U64 drawn(U64 total) const {
    return min(static_cast<U64>(uniform_ * static_cast<double>(total)), total - 1) + 1;
  }

  __device__ U64 block_total(U64 value) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared_.warp_totals[0][threadIdx.x / 32] = value;
    __syncthreads();
    return warp_sum(shared_.warp_totals[0][threadIdx.x % 32]);
  }

  // The first thread, each with a count and a mass, at which the sum of one of them reaches
  // `target`, which their total does.
  __device__ Found reach(U64 count, U64 mass, bool by_mass, U64 target) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned warp = threadIdx.x / 32;
    U64 counts = count;
    U64 masses = mass;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const U64 more_count = __shfl_up_sync(0xffffffffU, counts, offset);
      const U64 more_mass = __shfl_up_sync(0xffffffffU, masses, offset);
      if (lane >= offset) {
        counts += more_count;
        masses += more_mass;
      }
    }
    __syncthreads();
    if (lane == 31) {
      shared_.warp_totals[0][warp] = counts;
      shared_.warp_totals[1][warp] = masses;
    }
    if (threadIdx.x == 0) shared_.found = Found{-1, 0, 0, 0, 0};
    __syncthreads();
    const U64 count_before = warp_sum(lane < warp ? shared_.warp_totals[0][lane] : U64{0});
    const U64 mass_before = warp_sum(lane < warp ? shared_.warp_totals[1][lane] : U64{0});
    counts += count_before;
    masses += mass_before;
    const U64 inclusive = by_mass ? masses : counts;
    const U64 own = by_mass ? mass : count;
    if (inclusive >= target && inclusive - own < target) {
      shared_.found =
          Found{static_cast<int>(threadIdx.x), counts - count, masses - mass, count, mass};
    }
    __syncthreads();
    return shared_.found;
  }

  // In the row's own histogram.
  __device__ Found reach_row(bool by_mass, U64 target) {
    const unsigned at = index_ * kBins + threadIdx.x;
    return reach(a_.workspace.bin_count[at], a_.workspace.bin_mass[at], by_mass, target);
  }

  // Copies the tokens of the bins up to the found one, if there are few.
  __device__ void list_up_to(const Found& found) {
    if (found.count_before + found.count > kListed) return;
    listed_ = true;
    if (threadIdx.x == 0) shared_.n_listed = 0;
    __syncthreads();
    for_each_logit([&](int id, float logit) {
      if (softmax_.bin(logit) > found.bin) return;
      const int at = atomicAdd(&shared_.n_listed, 1);
      shared_.keys[at] = key_of(logit);
      shared_.ids[at] = id;
    });
    __syncthreads();
  }

  // Loads go ahead of the visits, which the compiler may not reorder.
  template <typename Visit>
  __device__ void for_each_logit(Visit visit) const {
    constexpr int kAhead = 16;
    for (int base = static_cast<int>(threadIdx.x); base < a_.n_vocab; base += kAhead * kThreads) {
      float logits[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int id = base + i * kThreads;
        logits[i] = id < a_.n_vocab ? logits_[id] : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (base + i * kThreads < a_.n_vocab) visit(base + i * kThreads, logits[i]);
      }
    }
  }

  template <typename Visit>
  __device__ void for_each_key(Visit visit) const {
    if (listed_) {
      for (int i = static_cast<int>(threadIdx.x); i < shared_.n_listed; i += kThreads) {
        visit(shared_.keys[i]);
      }
    } else {
      for_each_logit([&](int, float logit) { visit(key_of(logit)); });
    }
  }

  // The shortest prefix of the order whose count or mass reaches `target`, which the row has.
  __device__ Prefix prefix(bool by_mass, U64 target) {
    Found found = reach_row(by_mass, target);
    U64 count_before = found.count_before;
    U64 mass_before = found.mass_before;
    if (threadIdx.x == 0) {
      shared_.low_key = ~U32{0};
      shared_.high_key = 0;
    }
    __syncthreads();
    U32 low = ~U32{0};
    U32 high = 0;
    for_each_key([&](U32 key) {
      if (softmax_.bin(value_of(key)) != found.bin) return;
      low = min(low, key);
      high = max(high, key);
    });
    if (low <= high) {
      atomicMin(&shared_.low_key, low);
      atomicMax(&shared_.high_key, high);
    }
    __syncthreads();
    low = shared_.low_key;
    high = shared_.high_key;
    while (low < high) {
      const int shift = max(0, 32 - __clz(static_cast<int>(high - low)) - 10);
      shared_.histogram.clear();
      __syncthreads();
      for_each_key([&](U32 key) {
        if (key < low || key > high) return;
        shared_.histogram.add(static_cast<int>((high - key) >> shift),
                              softmax_.mass(value_of(key)));
      });
      __syncthreads();
      const int bin = static_cast<int>(threadIdx.x);
      found = reach(shared_.histogram.count[bin], shared_.histogram.mass(bin), by_mass,
                    target - (by_mass ? mass_before : count_before));
      count_before += found.count_before;
      mass_before += found.mass_before;
      high -= static_cast<U32>(found.bin) << shift;
      const U32 width = (U32{1} << shift) - 1;
      if (high - low > width) low = high - width;
    }
    const U64 each = softmax_.mass(value_of(high));
    const U64 missing = target - (by_mass ? mass_before : count_before);
    const U64 place = by_mass ? (missing + each - 1) / max(each, U64{1}) : missing;
    return {high, place, mass_before + place * each};
  }

  __device__ int id_of(const Prefix& end) {
    if (listed_) {
      if (threadIdx.x == 0) shared_.equal = 0;
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < shared_.n_listed; i += kThreads) {
        if (shared_.keys[i] != end.key) continue;
        if (atomicAdd(&shared_.equal, 1) == 0) shared_.token = shared_.ids[i];
      }
      __syncthreads();
      if (shared_.equal == 1) return shared_.token;
    }
    return reach_id(0, a_.n_vocab, end.place,
                    [&](float logit) { return key_of(logit) == end.key ? U64{1} : U64{0}; });
  }

  // The first id of [begin, end) at which the sum of measure(logit) reaches `target`.
  template <typename Measure>
  __device__ int reach_id(int begin, int end, U64 target, Measure measure) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int lane = static_cast<int>(threadIdx.x % 32);
    while (end - begin > kThreads) {
      const int part = ((end - begin + 31) / 32 + 31) / 32 * 32;
      const int part_begin = min(begin + warp * part, end);
      const int part_end = min(part_begin + part, end);
      U64 sum = 0;
#pragma unroll 8
      for (int i = part_begin + lane; i < part_end; i += 32) sum += measure(logits_[i]);
      sum = warp_sum(sum);
      const Found found = reach(0, lane == 0 ? sum : U64{0}, true, target);
      const int found_warp = found.bin / 32;
      target -= found.mass_before;
      begin = min(begin + found_warp * part, end);
      end = min(begin + part, end);
    }
    const int at = begin + static_cast<int>(threadIdx.x);
    return begin + reach(0, at < end ? measure(logits_[at]) : U64{0}, true, target).bin;
  }

  const Arguments& a_;
  const SampleParams params_;
  const Softmax softmax_;
  const float* logits_;
  const unsigned index_;
  const double uniform_;
  Shared& shared_;
  bool listed_ = false;
};

}  // namespace spindle::kernels::sampling
