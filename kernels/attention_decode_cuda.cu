// Decode attention: split-KV over a grid that fills the device once. kernels/cuda/decode_plan.cuh
// says how the work is cut, decode_pipe.cuh how data comes in, decode_softmax.cuh what a warp
// holds.
//
// Within a CTA the warps take the units of a segment (a range of units of one entry) round robin,
// each with a softmax of its own, and merge at the segment's end. A segment that is a whole entry
// is written out. Parts of an entry go to the CTA's slots, and the CTA that arrives last merges
// them.

#include <cuda_runtime.h>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/decode_int4.cuh"
#include "kernels/cuda/decode_launch.h"
#include "kernels/cuda/decode_plan.cuh"
#include "kernels/cuda/decode_raw.cuh"

namespace spindle::kernels {
namespace device {
namespace {

inline constexpr int kThreads = 32 * kWarps;

template <int kDim>
struct alignas(128) Shared {
  static constexpr int kRowFloats = kDim + 4;  // so that 8 rows' channels lie in different banks

  // [warp][stage]; at a segment's end the sums of each warp, [8][kRowFloats].
  std::byte ring[kWarps][kStages * kStageBytes];
  DeviceKvBlock descriptors[kWarps][kDescriptors];
  uint4 q[kDim / 32 * 32];           // fragments of load_query()
  uint4 q_hadamard[kDim / 32 * 32];  // as nibble_products() wants it
  DecodeEntry entry;
  float best[kWarps][kDecodeTileHeads];
  float mass[kWarps][kDecodeTileHeads];
  float q_sums[kDecodeTileHeads];
  int is_last;
};
static_assert(sizeof(Shared<128>::ring[0]) >= sizeof(float) * 8 * Shared<128>::kRowFloats);

// A range of units of one entry, and how its sums leave the CTA.
struct Segment {
  int entry;
  int begin;
  int end;
  bool whole;
  int slot;  // of the CTA, when not whole
};

// Fragment that holds the channels 8 k .. 8 k + 7 of a head.
__device__ inline int query_fragment(int head, int k) { return k / 4 * 32 + head * 4 + k % 4; }

template <int kDim>
__device__ void load_queries(Shared<kDim>& shared, const DecodeCall& call) {
  const DecodeEntry& entry = shared.entry;
  const F16* q = call.q + entry.row * call.q_stride + std::int64_t{entry.first_head} * kDim;
  for (int i = threadIdx.x; i < kDecodeTileHeads * kDim / 8; i += kThreads) {
    const int head = i / (kDim / 8);
    const int k = i % (kDim / 8);
    uint4 x = {};
    if (head < entry.n_heads) x = *reinterpret_cast<const uint4*>(q + head * kDim + 8 * k);
    shared.q[query_fragment(head, k)] = x;
  }
}

// The tile in the Hadamard basis. A lane has channels 32 i + lane.
template <int kDim>
__device__ void rotate_queries(Shared<kDim>& shared) {
  const int lane = threadIdx.x % 32;
  auto* in = reinterpret_cast<const __half*>(shared.q);
  auto* out = reinterpret_cast<__half*>(shared.q_hadamard);
  for (int head = threadIdx.x / 32; head < kDecodeTileHeads; head += kWarps) {
    float x[kDim / 32];
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      x[i] = __half2float(in[query_fragment(head, (32 * i + lane) / 8) * 8 + lane % 8]);
#pragma unroll
      for (int bit = 1; bit < 32; bit *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, x[i], bit);
        x[i] = other + ((lane & bit) != 0 ? -x[i] : x[i]);
      }
    }
#pragma unroll
    for (int bit = 1; bit < kDim / 32; bit *= 2) {
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        if ((i & bit) != 0) continue;
        const float sum = x[i] + x[i + bit];
        x[i + bit] = x[i] - x[i + bit];
        x[i] = sum;
      }
    }
    // Odd pairs of channels are divided by 16; their sum is taken of what was rounded.
    const float step = lane / 2 % 2 == 0 ? 1.0F : 0.0625F;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const __half rounded = __float2half_rn(x[i] * norm<kDim>() * step);
      out[query_fragment(head, (32 * i + lane) / 8) * 8 + lane % 8] = rounded;
      sum += __half2float(rounded) / step;
    }
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    if (lane == 0) shared.q_sums[head] = sum;
  }
}

template <int kDim, bool kBf16>
__device__ void run_units(Shared<kDim>& shared, const DecodeCall& call, Pipe<kDim>& pipe,
                          Softmax<kDim>& s) {
  const Lane lane;
  const std::uint32_t q = shared_address(shared.q);
  const std::uint32_t q_hadamard = shared_address(shared.q_hadamard);
  int unit_index = 0;
  int part = 0;
  int slot = 0;
  while (unit_index < pipe.n_units) {
    wait_copies<kStages - 1>();
    __syncwarp();
    const Unit unit = pipe.read_unit(unit_index);
    const std::uint32_t stage = pipe.ring + slot * kStageBytes;
    const int k_parts = Pipe<kDim>::parts(unit.k_format);
    if (part < k_parts) {
      switch (unit.k_format) {
        case KvFormat::kInt4:
          int4_scores(s, stage, q_hadamard, shared.q_sums, lane);
          break;
        default:
          raw_scores<kDim, kBf16>(s, stage, part, q, lane);
      }
    } else {
      switch (unit.v_format) {
        case KvFormat::kInt4:
          int4_values(s, stage, lane);
          break;
        default:
          raw_values<kDim, kBf16>(s, stage, part - k_parts, unit, lane);
      }
    }
    __syncwarp();
    pipe.issue();
    if (part == k_parts - 1) s.step(unit, lane, call.scale);
    slot = (slot + 1) % kStages;
    if (++part == k_parts + Pipe<kDim>::parts(unit.v_format)) {
      part = 0;
      ++unit_index;
    }
  }
  wait_copies<0>();
  __syncwarp();
}

// The sums of one head over parts whose maxima, masses and values `part(i)` gives: maximum and
// mass.
struct Merged {
  float best = -INFINITY;
  float mass = 0;
};

__device__ inline float part_factor(float best, float of_all) {
  return best == -INFINITY ? 0.0F : exp2_fast(best - of_all);
}

__device__ inline void add_scaled(float4& sum, const float4& x, float factor) {
  sum.x = fmaf(x.x, factor, sum.x);
  sum.y = fmaf(x.y, factor, sum.y);
  sum.z = fmaf(x.z, factor, sum.z);
  sum.w = fmaf(x.w, factor, sum.w);
}

template <int kDim>
__device__ void write_output(const DecodeCall& call, const DecodeEntry& entry, int head,
                             int channel, const float4& sum, float mass) {
  const float factor = 1.0F / mass;
  const uint2 bits = {pack<true>(sum.x * factor, sum.y * factor),
                      pack<true>(sum.z * factor, sum.w * factor)};
  Bf16* out = call.out + entry.row * call.out_stride +
              std::int64_t{entry.first_head + head} * kDim + channel;
  *reinterpret_cast<uint2*>(out) = bits;
}

// Sums of the CTA's warps, which lie in the ring, to the output or to the CTA's slot.
template <int kDim>
__device__ void write_segment(Shared<kDim>& shared, const DecodeCall& call, const Segment& segment,
                              float* partial) {
  constexpr int kQuads = kDim / 4;
  for (int i = threadIdx.x; i < shared.entry.n_heads * kQuads; i += kThreads) {
    const int head = i / kQuads;
    const int channel = 4 * (i % kQuads);
    Merged all;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all.best = fmaxf(all.best, shared.best[w][head]);
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = part_factor(shared.best[w][head], all.best);
      all.mass = fmaf(shared.mass[w][head], factor, all.mass);
      const auto* row = reinterpret_cast<const float*>(shared.ring[w]) +
                        head * Shared<kDim>::kRowFloats + channel;
      add_scaled(sum, *reinterpret_cast<const float4*>(row), factor);
    }
    if (segment.whole) {
      write_output<kDim>(call, shared.entry, head, channel, sum, all.mass);
      continue;
    }
    *reinterpret_cast<float4*>(partial + head * kDim + channel) = sum;
    if (channel == 0) {
      partial[kDecodeTileHeads * kDim + head] = all.best;
      partial[kDecodeTileHeads * (kDim + 1) + head] = all.mass;
    }
  }
}

// The parts of an entry: those of the CTAs [first, last].
struct Parts {
  int first;
  int last;
  std::int64_t total;
  int active;
};

// A CTA's slot for an entry is 0 when its share begins in it, else 1.
template <int kDim>
__device__ const float* part_of(const DecodePlan& plan, const DecodeEntry& entry,
                                const Parts& parts, int cta) {
  const int slot = share_begin(parts.total, parts.active, cta) >= entry.begin ? 0 : 1;
  return plan.partials + (std::int64_t{cta} * 2 + slot) * decode_partial_floats(kDim);
}

template <int kDim>
__device__ void merge_parts(const Shared<kDim>& shared, const DecodePlan& plan,
                            const DecodeCall& call, const Parts& parts) {
  constexpr int kQuads = kDim / 4;
  const DecodeEntry& entry = shared.entry;
  for (int i = threadIdx.x; i < entry.n_heads * kQuads; i += kThreads) {
    const int head = i / kQuads;
    const int channel = 4 * (i % kQuads);
    Merged all;
    for (int cta = parts.first; cta <= parts.last; ++cta) {
      const float* part = part_of<kDim>(plan, entry, parts, cta);
      all.best = fmaxf(all.best, __ldcg(part + kDecodeTileHeads * kDim + head));
    }
    float4 sum = {};
#pragma unroll 4
    for (int cta = parts.first; cta <= parts.last; ++cta) {
      const float* part = part_of<kDim>(plan, entry, parts, cta);
      const float factor = part_factor(__ldcg(part + kDecodeTileHeads * kDim + head), all.best);
      all.mass = fmaf(__ldcg(part + kDecodeTileHeads * (kDim + 1) + head), factor, all.mass);
      add_scaled(sum, __ldcg(reinterpret_cast<const float4*>(part + head * kDim + channel)),
                 factor);
    }
    write_output<kDim>(call, entry, head, channel, sum, all.mass);
  }
}

template <int kDim, bool kBf16>
__device__ void run_segment(Shared<kDim>& shared, const DecodePlan& plan, const DecodeCall& call,
                            const Segment& segment, const Parts& parts) {
  const int warp = threadIdx.x / 32;
  const int n_units = segment.end - segment.begin - warp;
  Pipe<kDim> pipe{.pool = call.pool,
                  .page_bytes = call.page_bytes,
                  .entry = &shared.entry,
                  .ring = shared_address(shared.ring[warp]),
                  .descriptors = shared_address(shared.descriptors[warp]),
                  .lane = {},
                  .first_unit = segment.begin + warp,
                  .n_units = n_units > 0 ? (n_units + kWarps - 1) / kWarps : 0};
  pipe.start();
  load_queries(shared, call);
  __syncthreads();
  if (shared.entry.head.n_blocks > 0) {
    rotate_queries(shared);
    __syncthreads();
  }
  Softmax<kDim> s;
  s.start();
  run_units<kDim, kBf16>(shared, call, pipe, s);
  const std::uint32_t v_mean = shared.entry.head.v_mean;
  s.finish(pipe.lane,
           v_mean == kNoPlace ? nullptr : reinterpret_cast<const std::uint16_t*>(pipe.at(v_mean)));

  const Lane lane;
  auto* sums = reinterpret_cast<float*>(shared.ring[warp]);
#pragma unroll
  for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      sums[(2 * lane.q + r % 2) * Shared<kDim>::kRowFloats + 16 * m + 8 * (r / 2) + lane.g] =
          s.values[m][r];
    }
  }
  if (lane.g == 0) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      shared.best[warp][2 * lane.q + e] = s.best[e];
      shared.mass[warp][2 * lane.q + e] = s.mass[e];
    }
  }
  __syncthreads();
  float* partial =
      plan.partials + (std::int64_t{blockIdx.x} * 2 + segment.slot) * decode_partial_floats(kDim);
  write_segment(shared, call, segment, partial);
  if (segment.whole) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto last = static_cast<std::uint32_t>(parts.last - parts.first);
    shared.is_last = atomicAdd(plan.arrivals + segment.entry, 1U) == last;
    if (shared.is_last != 0) plan.arrivals[segment.entry] = 0;
  }
  __syncthreads();
  if (shared.is_last == 0) return;
  __threadfence();
  merge_parts(shared, plan, call, parts);
}

template <int kDim, bool kBf16>
__global__ void __launch_bounds__(kThreads, kCtasPerMultiprocessor)
    decode_kernel(const __grid_constant__ DecodePlan plan,
                  const __grid_constant__ DecodeCall call) {
  extern __shared__ std::byte dynamic_shared[];
  auto& shared = *reinterpret_cast<Shared<kDim>*>(dynamic_shared);
  const std::int64_t total = plan.totals[call.layer];
  if (total == 0) return;
  const int active = active_ctas(total, plan.n_ctas);
  const int cta = static_cast<int>(blockIdx.x);
  if (cta >= active) return;
  const DecodeEntry* entries = plan.entries + std::int64_t{call.layer} * plan.max_entries;
  const std::int64_t end = share_begin(total, active, cta + 1);
  std::int64_t at = share_begin(total, active, cta);
  int index = plan.first_entry[std::int64_t{call.layer} * plan.n_ctas + cta];
  while (at < end) {
    __syncthreads();
    if (threadIdx.x < sizeof(DecodeEntry) / sizeof(uint4)) {
      reinterpret_cast<uint4*>(&shared.entry)[threadIdx.x] =
          reinterpret_cast<const uint4*>(entries + index)[threadIdx.x];
    }
    __syncthreads();
    const DecodeEntry& entry = shared.entry;
    if (entry.begin < entry.end) {
      const Parts parts = {cta_of(total, active, entry.begin), cta_of(total, active, entry.end - 1),
                           total, active};
      const std::int64_t stop = end < entry.end ? end : entry.end;
      const Segment segment = {index, unit_at(entry, at - entry.begin),
                               unit_at(entry, stop - entry.begin), parts.first == parts.last,
                               at == entry.begin && at != share_begin(total, active, cta)};
      run_segment<kDim, kBf16>(shared, plan, call, segment, parts);
      at = stop;
    }
    ++index;
  }
}

template <int kDim, bool kBf16>
void allow_shared_memory() {
  cuda_check(
      cudaFuncSetAttribute(decode_kernel<kDim, kBf16>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(sizeof(Shared<kDim>))),
      "shared memory of attention_decode");
}

template <int kDim>
int ctas_per_multiprocessor() {
  allow_shared_memory<kDim, false>();
  allow_shared_memory<kDim, true>();
  int n = 0;
  cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, decode_kernel<kDim, false>, kThreads,
                                                           sizeof(Shared<kDim>)),
             "occupancy of attention_decode");
  return n;
}

template <int kDim, bool kBf16>
void launch(cudaStream_t stream, const DecodePlan& plan, const DecodeCall& call) {
  decode_kernel<kDim, kBf16><<<plan.n_ctas, kThreads, sizeof(Shared<kDim>), stream>>>(plan, call);
}

}  // namespace
}  // namespace device

int decode_ctas_per_multiprocessor(int head_dim) {
  return head_dim == 64 ? device::ctas_per_multiprocessor<64>()
                        : device::ctas_per_multiprocessor<128>();
}

void launch_plan_decode(CUstream_st* stream, const DecodePlan& plan,
                        const DeviceSequence* sequences, int n_sequences, int n_layers,
                        int n_kv_heads, int group) {
  device::plan_kernel<<<n_layers, device::kPlanThreads, 0, stream>>>(plan, sequences, n_sequences,
                                                                     n_kv_heads, group);
  check_launch("plan_decode");
}

void launch_attention_decode(CUstream_st* stream, const DecodePlan& plan, const DecodeCall& call) {
  const bool is_bf16 = call.dtype == DType::kBF16;
  if (call.head_dim == 64) {
    is_bf16 ? device::launch<64, true>(stream, plan, call)
            : device::launch<64, false>(stream, plan, call);
  } else {
    is_bf16 ? device::launch<128, true>(stream, plan, call)
            : device::launch<128, false>(stream, plan, call);
  }
  check_launch("attention_decode");
}

}  // namespace spindle::kernels
