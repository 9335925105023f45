// The choice among cuBLASLt's algorithms and our own kernels, by their times.

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/cuda/device_linear.h"

namespace spindle::kernels {
namespace {

using Access = DeviceLinearAccess;

constexpr int kMaxAlgorithms = 16;
// Split-K is forced on this many of the library's first choices when there are few rows.
constexpr int kSplitBases = 3;
constexpr std::int64_t kMaxSplitRows = 256;
// Gated products in parts: for many rows, each part so large that it fills the device and so small
// that it stays in the L2 cache.
constexpr std::int64_t kMinPartedRows = 512;
constexpr std::int64_t kMinPartBytes = std::int64_t{8} << 20;
constexpr std::int64_t kMaxPartBytes = std::int64_t{48} << 20;
constexpr int kPartAlgorithms = 4;
// A candidate is timed as a chain of calls, as a step runs it: launches overlap. The weights are
// copies taken in turn, more bytes in all than the L2 cache holds; long calls need no chain.
constexpr int kTimedRuns = 3;
constexpr int kChain = 6;
constexpr std::size_t kCacheTurns = 3;
constexpr std::size_t kMaxCopies = 16;
constexpr double kLongCallFlops = 5e10;
constexpr std::int64_t kMaxSkinnyRows = 1024;  // more cannot fit; before the cast to int
// A later candidate must be this much faster, so that noise does not choose between equals.
constexpr float kClearlyFaster = 0.985F;

// CUDA events and what lies between them.
class Stopwatch {
 public:
  Stopwatch() {
    for (cudaEvent_t& event : events_) cuda_check(cudaEventCreate(&event), "cudaEventCreate");
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() {
    for (cudaEvent_t event : events_) static_cast<void>(cudaEventDestroy(event));
  }

  void start(const CudaContext& context) {
    cuda_check(cudaEventRecord(events_[0], context.stream()), "cudaEventRecord");
  }
  // Waits for the end.
  float stop_ms(const CudaContext& context) {
    cuda_check(cudaEventRecord(events_[1], context.stream()), "cudaEventRecord");
    cuda_check(cudaEventSynchronize(events_[1]), "cudaEventSynchronize");
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, events_[0], events_[1]), "cudaEventElapsedTime");
    return ms;
  }

 private:
  cudaEvent_t events_[2] = {};
};

// Times the candidates of one weight.
class Tuner {
 public:
  static Result<Tuner> create(const CudaContext& context, const Access::Body& body,
                              std::int64_t max_rows, unsigned forms) {
    Tuner out(context, body);
    int l2_bytes = 0;
    cuda_check(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, context.device()),
               "size of the L2 cache");
    const auto rows = static_cast<std::size_t>(max_rows);
    const auto n_in = static_cast<std::size_t>(body.n_in);
    const auto n_out = static_cast<std::size_t>(body.n_out);
    const std::size_t n_bytes = body.weights.n_bytes();
    const bool wide = (forms & (kLinearF32 | kLinearAdd | kLinearSwiglu)) != 0;
    const std::size_t y_bytes = wide ? sizeof(float) : sizeof(Bf16);
    out.n_weights_ = std::clamp<std::size_t>(
        kCacheTurns * static_cast<std::size_t>(l2_bytes) / n_bytes + 1, 1, kMaxCopies);
    for (const auto& [buffer, size] :
         {std::pair{&out.x_, rows * n_in * sizeof(Bf16)},
          std::pair{&out.y_, rows * n_out * y_bytes},
          std::pair{&out.swiglu_, (forms & kLinearSwiglu) != 0 ? rows * n_out : 0},
          std::pair{&out.copies_, (out.n_weights_ - 1) * n_bytes}}) {
      auto allocated = context.allocate(size, "tuning a matrix product");
      if (!allocated.ok()) return allocated.status();
      *buffer = std::move(*allocated);
    }
    for (std::size_t i = 1; i < out.n_weights_; ++i) {
      context.copy(out.copies_.data() + (i - 1) * n_bytes, body.weights.data(), n_bytes);
    }
    fill_for_tuning(context, out.x_.as<Bf16>(), max_rows * body.n_in);
    context.fill(out.y_.data(), 0, out.y_.n_bytes());
    return out;
  }

  LinearChoice best(LinearOutput output, std::int64_t n_rows) {
    LinearCall call;
    call.x = x_.as<const Bf16>();
    call.x_stride = body_->n_in;
    call.n_rows = n_rows;
    call.y = y_.data();
    call.y_stride = body_->n_out;
    call.swiglu = swiglu_.as<Bf16>();
    call.swiglu_stride = body_->n_out / 2;
    std::optional<LinearChoice> best;
    float best_ms = 0;
    for (const LinearChoice& candidate : candidates(output, call)) {
      const std::optional<float> ms = time_ms(output, call, candidate);
      if (!ms || (best && *ms >= kClearlyFaster * best_ms)) continue;
      best = candidate;
      best_ms = *ms;
    }
    if (!best) throw CudaError("no algorithm for a product of " + std::to_string(n_rows) + " rows");
    return *best;
  }

 private:
  Tuner(const CudaContext& context, const Access::Body& body) : context_(&context), body_(&body) {}

  std::vector<LinearChoice> candidates(LinearOutput output, const LinearCall& call) const {
    std::vector<LinearChoice> out;
    for (int variant = 0; variant < kSkinnyVariants; ++variant) {
      if (call.n_rows <= kMaxSkinnyRows &&
          skinny_fits(*context_, variant, static_cast<int>(call.n_rows))) {
        out.push_back({variant, 0, {}, 1});
      }
    }
    BlasProduct product(output, body_->n_out, body_->n_in, call);
    const std::vector<cublasLtMatmulAlgo_t> algorithms =
        product.algorithms(*context_, kMaxAlgorithms);
    for (const cublasLtMatmulAlgo_t& algorithm : algorithms)
      out.push_back({-1, product.y_alignment(), algorithm, 1});
    if (output == LinearOutput::kSwiglu && call.n_rows >= kMinPartedRows) add_parted(call, out);
    if (call.n_rows > kMaxSplitRows) return out;
    for (std::size_t i = 0; i < algorithms.size() && i < kSplitBases; ++i) {
      for (const std::int32_t parts : {2, 4, 8}) {
        if (auto split = product.split(*context_, algorithms[i], parts))
          out.push_back({-1, product.y_alignment(), *split, 1});
      }
    }
    return out;
  }

  void add_parted(const LinearCall& call, std::vector<LinearChoice>& out) const {
    const std::int64_t inter = body_->n_out / 2;
    for (const int parts : {4, 7, 8, 14, 16, 28}) {
      const std::int64_t part_bytes =
          call.n_rows * 2 * inter / parts * static_cast<std::int64_t>(sizeof(float));
      if (inter % (8 * parts) != 0 || part_bytes > kMaxPartBytes || part_bytes < kMinPartBytes) {
        continue;
      }
      BlasProduct product = BlasProduct::gated_part(body_->n_out, body_->n_in, call, parts);
      for (const cublasLtMatmulAlgo_t& algorithm : product.algorithms(*context_, kPartAlgorithms)) {
        out.push_back({-1, product.y_alignment(), algorithm, parts});
      }
    }
  }

  // The median time of a call; nothing when the candidate cannot run.
  std::optional<float> time_ms(LinearOutput output, const LinearCall& call,
                               const LinearChoice& candidate) {
    const double flops = 2.0 * static_cast<double>(call.n_rows) * static_cast<double>(body_->n_in) *
                         static_cast<double>(body_->n_out);
    const int n_calls = flops > kLongCallFlops ? 1 : kChain;
    std::array<float, kTimedRuns> times;
    if (!run_chain(output, call, candidate, 1)) return std::nullopt;
    for (float& ms : times) {
      // The calls before the clock starts keep the device busy while the others are launched.
      if (!run_chain(output, call, candidate, std::min(n_calls, 2))) return std::nullopt;
      watch_->start(*context_);
      if (!run_chain(output, call, candidate, n_calls)) return std::nullopt;
      ms = watch_->stop_ms(*context_) / static_cast<float>(n_calls);
    }
    std::nth_element(times.begin(), times.begin() + kTimedRuns / 2, times.end());
    return times[kTimedRuns / 2];
  }

  bool run_chain(LinearOutput output, const LinearCall& call, const LinearChoice& candidate,
                 int n_calls) {
    for (int i = 0; i < n_calls; ++i) {
      const std::size_t copy = next_weights_++ % n_weights_;
      const Bf16* weights = copy == 0 ? body_->weights.as<const Bf16>()
                                      : reinterpret_cast<const Bf16*>(
                                            copies_.data() + (copy - 1) * body_->weights.n_bytes());
      if (!Access::run_choice(*context_, *body_, weights, output, call, candidate)) return false;
    }
    return true;
  }

  const CudaContext* context_;
  const Access::Body* body_;
  DeviceBuffer x_;
  DeviceBuffer y_;
  DeviceBuffer swiglu_;
  DeviceBuffer copies_;
  std::size_t n_weights_ = 1;
  std::size_t next_weights_ = 0;
  std::unique_ptr<Stopwatch> watch_ = std::make_unique<Stopwatch>();
};

}  // namespace

Status tune_linear(const CudaContext& context, DeviceLinear& weights, std::int64_t max_rows,
                   unsigned forms) {
  CHECK(max_rows >= 1, "rows to tune for");
  Access::Body& body = Access::body(weights);
  auto tuner = Tuner::create(context, body, max_rows, forms);
  if (!tuner.ok()) return tuner.status();
  auto tuning = std::make_shared<LinearTuning>();
  for (std::int64_t rows = 1;; rows *= 2) {
    tuning->rows.push_back(std::min(rows, max_rows));
    if (rows >= max_rows) break;
  }
  for (int i = 0; i < kLinearOutputs; ++i) {
    const auto output = static_cast<LinearOutput>(i);
    if ((forms & form_of(output)) == 0) continue;
    if (output == LinearOutput::kSwiglu && body.n_out % 2 != 0) continue;
    for (const std::int64_t rows : tuning->rows) {
      tuning->choices[static_cast<std::size_t>(i)].push_back(tuner->best(output, rows));
    }
  }
  context.synchronize();
  body.tuning = std::move(tuning);
  return ok_status();
}

}  // namespace spindle::kernels
