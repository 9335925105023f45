// DeviceLinear: upload, the choice among cuBLASLt's algorithms and our own kernels, and the calls.

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "kernels/activation.h"
#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/skinny_linear.h"
#include "kernels/linear.h"

namespace spindle::kernels {
namespace {

constexpr std::size_t kStagingBytes = std::size_t{8} << 20;
constexpr std::int64_t kColumnsMultiple = 8;  // 16 bytes of bf16
constexpr std::size_t kRowAlignment = 16;
constexpr int kMaxAlgorithms = 16;
// Split-K is forced on this many of the library's first choices when there are few rows.
constexpr int kSplitBases = 3;
constexpr std::int64_t kMaxSplitRows = 256;
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

void blas_check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw CudaError(std::string(what) + ": " + cublasLtGetStatusString(status));
}

LinearForms form_of(LinearOutput output) {
  return static_cast<LinearForms>(1U << static_cast<unsigned>(output));
}
LinearOutput output_of(LinearForms form) {
  CHECK(std::has_single_bit(static_cast<unsigned>(form)), "one form of product");
  return static_cast<LinearOutput>(std::countr_zero(static_cast<unsigned>(form)));
}

// One way to compute a product.
struct Choice {
  int variant = -1;               // of our own kernel; -1: `algorithm`
  std::uint32_t y_alignment = 0;  // that `algorithm` was asked for with
  cublasLtMatmulAlgo_t algorithm = {};
};

// Choices by bucket of rows: bucket b serves up to rows[b].
struct Tuning {
  std::vector<std::int64_t> rows;
  std::array<std::vector<std::optional<Choice>>, kLinearOutputs> choices;

  const Choice* find(LinearOutput output, std::int64_t n_rows) const {
    const auto& of_output = choices[static_cast<std::size_t>(output)];
    const auto bucket = std::lower_bound(rows.begin(), rows.end(), n_rows) - rows.begin();
    if (bucket >= static_cast<std::ptrdiff_t>(of_output.size())) return nullptr;
    const auto& choice = of_output[static_cast<std::size_t>(bucket)];
    return choice ? &*choice : nullptr;
  }
};

// A call, in plain values. kSwiglu: y is the scratch of the fused projection for cuBLASLt.
struct Call {
  const Bf16* x = nullptr;
  std::int64_t x_stride = 0;
  std::int64_t n_rows = 0;
  void* y = nullptr;
  std::int64_t y_stride = 0;
  Bf16* swiglu = nullptr;
  std::int64_t swiglu_stride = 0;
};

std::size_t output_bytes(LinearOutput output) {
  return output == LinearOutput::kBf16 ? sizeof(Bf16) : sizeof(float);
}

// What cuBLASLt is told, column-major: y^T [n_out, n_rows] = W^T' [n_out, n_in] x^T [n_in, n_rows].
class Product {
 public:
  Product(LinearOutput output, std::int64_t n_out, std::int64_t n_in, const Call& call)
      : output_(output) {
    const cudaDataType_t type = output_bytes(output) == sizeof(Bf16) ? CUDA_R_16BF : CUDA_R_32F;
    blas_check(cublasLtMatmulDescInit(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "product");
    const cublasOperation_t transposed = CUBLAS_OP_T;
    blas_check(cublasLtMatmulDescSetAttribute(&operation_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                              sizeof(transposed)),
               "transposition");
    const auto rows = static_cast<std::uint64_t>(call.n_rows);
    blas_check(cublasLtMatrixLayoutInit(&w_, CUDA_R_16BF, static_cast<std::uint64_t>(n_in),
                                        static_cast<std::uint64_t>(n_out), n_in),
               "layout of the weights");
    blas_check(cublasLtMatrixLayoutInit(&x_, CUDA_R_16BF, static_cast<std::uint64_t>(n_in), rows,
                                        std::max(call.x_stride, n_in)),
               "layout of x");
    blas_check(cublasLtMatrixLayoutInit(&y_, type, static_cast<std::uint64_t>(n_out), rows,
                                        std::max(call.y_stride, n_out)),
               "layout of y");
    const auto place = reinterpret_cast<std::uintptr_t>(call.y) |
                       static_cast<std::uintptr_t>(call.y_stride) * output_bytes(output);
    y_alignment_ =
        static_cast<std::uint32_t>(std::min<std::uintptr_t>(kRowAlignment, place & (~place + 1)));
  }

  // The library's choices, best guess first; at most `n`.
  std::vector<cublasLtMatmulAlgo_t> algorithms(const CudaContext& context, int n) {
    cublasLtMatmulPreferenceOpaque_t preference;
    blas_check(cublasLtMatmulPreferenceInit(&preference), "preference");
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t name, auto value) {
      blas_check(cublasLtMatmulPreferenceSetAttribute(&preference, name, &value, sizeof(value)),
                 "preference");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
        static_cast<std::uint64_t>(context.blas_workspace_bytes()));
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction_schemes());
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<std::uint32_t>(kRowAlignment));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<std::uint32_t>(kRowAlignment));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, y_alignment_);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, y_alignment_);
    std::array<cublasLtMatmulHeuristicResult_t, kMaxAlgorithms> found;
    int n_found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(context.blas(), &operation_, &w_, &x_, &y_, &y_, &preference,
                                       std::min(n, kMaxAlgorithms), found.data(), &n_found);
    std::vector<cublasLtMatmulAlgo_t> out;
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) return out;
    blas_check(status, "algorithms");
    for (int i = 0; i < n_found; ++i) {
      const auto& result = found[static_cast<std::size_t>(i)];
      if (result.state == CUBLAS_STATUS_SUCCESS) out.push_back(result.algo);
    }
    return out;
  }

  // `algorithm` with its columns split in `parts`, when the library can.
  std::optional<cublasLtMatmulAlgo_t> split(const CudaContext& context,
                                            cublasLtMatmulAlgo_t algorithm, std::int32_t parts) {
    const std::uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    if (cublasLtMatmulAlgoConfigSetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts,
                                             sizeof(parts)) != CUBLAS_STATUS_SUCCESS ||
        cublasLtMatmulAlgoConfigSetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME,
                                             &scheme, sizeof(scheme)) != CUBLAS_STATUS_SUCCESS) {
      return std::nullopt;
    }
    cublasLtMatmulHeuristicResult_t result = {};
    if (cublasLtMatmulAlgoCheck(context.blas(), &operation_, &w_, &x_, &y_, &y_, &algorithm,
                                &result) != CUBLAS_STATUS_SUCCESS ||
        result.workspaceSize > context.blas_workspace_bytes()) {
      return std::nullopt;
    }
    return algorithm;
  }

  // Rows of y start at multiples of so many bytes, at most 16.
  std::uint32_t y_alignment() const { return y_alignment_; }

  cublasStatus_t run(const CudaContext& context, const Bf16* weights, const Call& call,
                     const cublasLtMatmulAlgo_t& algorithm) const {
    const float one = 1.0F;
    const float beta = output_ == LinearOutput::kAddF32 ? 1.0F : 0.0F;
    // The library takes descriptions by pointers to non-const and does not change them.
    auto* self = const_cast<Product*>(this);
    return cublasLtMatmul(context.blas(), &self->operation_, &one, weights, &self->w_, call.x,
                          &self->x_, &beta, call.y, &self->y_, call.y, &self->y_, &algorithm,
                          context.blas_workspace(), context.blas_workspace_bytes(),
                          context.stream());
  }

 private:
  // Parts are added in fp32; in the output's own type only where that is fp32.
  std::uint32_t reduction_schemes() const {
    return output_bytes(output_) == sizeof(float) ? CUBLASLT_REDUCTION_SCHEME_MASK
                                                  : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  }

  LinearOutput output_;
  std::uint32_t y_alignment_ = 1;
  cublasLtMatmulDescOpaque_t operation_;
  cublasLtMatrixLayoutOpaque_t w_;
  cublasLtMatrixLayoutOpaque_t x_;
  cublasLtMatrixLayoutOpaque_t y_;
};

std::string describe(const Choice& choice) {
  if (choice.variant >= 0) return skinny_name(choice.variant);
  const auto value = [&](cublasLtMatmulAlgoConfigAttributes_t name) {
    std::int32_t out = 0;
    std::size_t written = 0;
    static_cast<void>(
        cublasLtMatmulAlgoConfigGetAttribute(&choice.algorithm, name, &out, sizeof(out), &written));
    return std::to_string(out);
  };
  return "cuBLASLt " + value(CUBLASLT_ALGO_CONFIG_ID) + ", tile " +
         value(CUBLASLT_ALGO_CONFIG_TILE_ID) + ", split " + value(CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
}

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

// Copies pageable host memory to the device through two page-locked buffers in turn.
class Uploader {
 public:
  static Result<Uploader> create(const CudaContext& context, std::size_t n_bytes, bool converts) {
    Uploader out(context);
    out.chunk_bytes_ = std::min(kStagingBytes, (n_bytes + 255) / 256 * 256);
    for (Stage& stage : out.stages_) {
      auto host = context.allocate_pinned(out.chunk_bytes_, "the upload of weights");
      if (!host.ok()) return host.status();
      stage.host = std::move(*host);
      if (converts) {
        auto device = context.allocate(out.chunk_bytes_, "the upload of weights");
        if (!device.ok()) return device.status();
        stage.device = std::move(*device);
      }
      cuda_check(cudaEventCreateWithFlags(&stage.done, cudaEventDisableTiming), "cudaEventCreate");
    }
    return out;
  }
  Uploader(Uploader&&) = default;
  Uploader& operator=(Uploader&&) = delete;
  ~Uploader() {
    for (Stage& stage : stages_) {
      if (stage.done != nullptr) static_cast<void>(cudaEventDestroy(stage.done));
    }
  }

  void upload(const void* source, DType dtype, std::int64_t n, Bf16* target) {
    const std::size_t element = dtype_bytes(dtype);
    const auto per_chunk = static_cast<std::int64_t>(chunk_bytes_ / element);
    for (std::int64_t at = 0; at < n; at += per_chunk) {
      const std::int64_t count = std::min(per_chunk, n - at);
      const std::size_t n_bytes = static_cast<std::size_t>(count) * element;
      Stage& stage = stages_[next_];
      next_ = 1 - next_;
      cuda_check(cudaEventSynchronize(stage.done), "cudaEventSynchronize");
      std::memcpy(stage.host.data(),
                  static_cast<const std::byte*>(source) + static_cast<std::size_t>(at) * element,
                  n_bytes);
      if (dtype == DType::kBF16) {
        context_->to_device(target + at, stage.host.data(), n_bytes);
      } else {
        context_->to_device(stage.device.data(), stage.host.data(), n_bytes);
        round_to_bf16(*context_, stage.device.data(), dtype, count, target + at);
      }
      cuda_check(cudaEventRecord(stage.done, context_->stream()), "cudaEventRecord");
    }
  }

 private:
  struct Stage {
    Stage() = default;
    Stage(Stage&& other) noexcept
        : host(std::move(other.host)),
          device(std::move(other.device)),
          done(std::exchange(other.done, nullptr)) {}
    PinnedBuffer host;
    DeviceBuffer device;
    cudaEvent_t done = nullptr;
  };

  explicit Uploader(const CudaContext& context) : context_(&context) {}

  const CudaContext* context_;
  std::size_t chunk_bytes_ = 0;
  std::array<Stage, 2> stages_;
  std::size_t next_ = 0;
};

Status check_sources(std::span<const WeightSource> sources, std::int64_t n_in,
                     std::int64_t& n_out) {
  n_out = 0;
  if (sources.empty()) return invalid_argument("a linear layer needs a weight");
  if (n_in < 1 || n_in > PackedLinear::kMaxElements) {
    return invalid_argument("bad weight width " + std::to_string(n_in));
  }
  if (n_in % kColumnsMultiple != 0) {
    return invalid_argument("weight width " + std::to_string(n_in) +
                            " is not a multiple of 8, which the CUDA kernels need");
  }
  for (const WeightSource& source : sources) {
    if (source.data == nullptr || source.n_out < 1 ||
        source.n_out > PackedLinear::kMaxElements / n_in - n_out) {
      return invalid_argument("bad weight of " + std::to_string(source.n_out) + " rows of " +
                              std::to_string(n_in));
    }
    n_out += source.n_out;
  }
  return ok_status();
}

}  // namespace

struct DeviceLinear::Body {
  std::int64_t n_in = 0;
  std::int64_t n_out = 0;
  DeviceBuffer weights;
  DeviceBuffer arrived;  // SkinnyProduct::arrived
  std::shared_ptr<const Tuning> tuning;
};

class DeviceLinearAccess {
 public:
  using Body = DeviceLinear::Body;

  static Body& body(DeviceLinear& weights) { return *weights.body_; }
  static const Body& body(const DeviceLinear& weights) { return *weights.body_; }

  // What the tuning says; without one our own kernel for few rows; null: the library's first
  // choice.
  static std::optional<Choice> choice(const CudaContext& context, const Body& body,
                                      LinearOutput output, std::int64_t n_rows) {
    if (body.tuning != nullptr) {
      if (const Choice* found = body.tuning->find(output, n_rows)) return *found;
    }
    if (n_rows > kSkinnyDefaultTokens) return std::nullopt;
    const int variant = skinny_default(context, static_cast<int>(n_rows));
    return variant < 0 ? std::nullopt : std::optional(Choice{variant, 0, {}});
  }

  static void run(const CudaContext& context, const DeviceLinear& weights, LinearOutput output,
                  const Call& call) {
    const Body& b = body(weights);
    if (call.n_rows == 0) return;
    CHECK(reinterpret_cast<std::uintptr_t>(call.x) % kRowAlignment == 0 &&
              (call.n_rows == 1 || call.x_stride % kColumnsMultiple == 0),
          "rows of x must start at multiples of 16 bytes");
    const std::optional<Choice> chosen = choice(context, b, output, call.n_rows);
    if (chosen && run_choice(context, b, weights.data(), output, call, *chosen)) return;
    Product product(output, b.n_out, b.n_in, call);
    const std::vector<cublasLtMatmulAlgo_t> algorithms = product.algorithms(context, 1);
    if (algorithms.empty()) throw CudaError("cuBLASLt has no algorithm for a product");
    blas_check(product.run(context, weights.data(), call, algorithms.front()), "cuBLASLt product");
    finish(context, b, output, call);
  }

  // False when the library refuses the algorithm for this call.
  static bool run_choice(const CudaContext& context, const Body& b, const Bf16* weights,
                         LinearOutput output, const Call& call, const Choice& choice) {
    if (choice.variant >= 0) {
      const bool swiglu = output == LinearOutput::kSwiglu;
      const int n_tokens = static_cast<int>(call.n_rows);
      if (!skinny_fits(context, choice.variant, n_tokens)) return false;
      skinny_linear(
          context, output, choice.variant,
          {weights, b.n_out, b.n_in, call.x, call.x_stride, n_tokens, swiglu ? call.swiglu : call.y,
           swiglu ? call.swiglu_stride : call.y_stride, b.arrived.as<int>()});
      return true;
    }
    const Product product(output, b.n_out, b.n_in, call);
    if (product.y_alignment() < choice.y_alignment) return false;
    if (product.run(context, weights, call, choice.algorithm) != CUBLAS_STATUS_SUCCESS) {
      return false;
    }
    finish(context, b, output, call);
    return true;
  }

 private:
  static void finish(const CudaContext& context, const Body& b, LinearOutput output,
                     const Call& call) {
    if (output != LinearOutput::kSwiglu) return;
    swiglu(context,
           ConstRows(static_cast<const float*>(call.y), call.n_rows, b.n_out, call.y_stride),
           Bf16Rows(call.swiglu, call.n_rows, b.n_out / 2, call.swiglu_stride));
  }
};

namespace {

using Access = DeviceLinearAccess;

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

  Choice best(LinearOutput output, std::int64_t n_rows) {
    Call call;
    call.x = x_.as<const Bf16>();
    call.x_stride = body_->n_in;
    call.n_rows = n_rows;
    call.y = y_.data();
    call.y_stride = body_->n_out;
    call.swiglu = swiglu_.as<Bf16>();
    call.swiglu_stride = body_->n_out / 2;
    std::optional<Choice> best;
    float best_ms = 0;
    for (const Choice& candidate : candidates(output, call)) {
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

  std::vector<Choice> candidates(LinearOutput output, const Call& call) const {
    std::vector<Choice> out;
    for (int variant = 0; variant < kSkinnyVariants; ++variant) {
      if (call.n_rows <= kMaxSkinnyRows &&
          skinny_fits(*context_, variant, static_cast<int>(call.n_rows))) {
        out.push_back({variant, 0, {}});
      }
    }
    Product product(output, body_->n_out, body_->n_in, call);
    const std::vector<cublasLtMatmulAlgo_t> algorithms =
        product.algorithms(*context_, kMaxAlgorithms);
    for (const cublasLtMatmulAlgo_t& algorithm : algorithms)
      out.push_back({-1, product.y_alignment(), algorithm});
    if (call.n_rows > kMaxSplitRows) return out;
    for (std::size_t i = 0; i < algorithms.size() && i < kSplitBases; ++i) {
      for (const std::int32_t parts : {2, 4, 8}) {
        if (auto split = product.split(*context_, algorithms[i], parts))
          out.push_back({-1, product.y_alignment(), *split});
      }
    }
    return out;
  }

  // The median time of a call; nothing when the candidate cannot run.
  std::optional<float> time_ms(LinearOutput output, const Call& call, const Choice& candidate) {
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

  bool run_chain(LinearOutput output, const Call& call, const Choice& candidate, int n_calls) {
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

template <typename T>
Call call_of(ConstBf16Rows x, RowsView<T> y) {
  Call call;
  call.x = x.data;
  call.x_stride = x.stride;
  call.n_rows = x.n_rows;
  call.y = y.data;
  call.y_stride = y.stride;
  return call;
}

template <typename T>
void check_shapes(const DeviceLinear& weights, ConstBf16Rows x, RowsView<T> y) {
  CHECK(x.n_rows == y.n_rows && x.width == weights.n_in() && y.width == weights.n_out(),
        "shapes of a product");
}

}  // namespace

Result<DeviceLinear> DeviceLinear::upload(const CudaContext& context,
                                          std::span<const WeightSource> sources,
                                          std::int64_t n_in) {
  auto body = std::make_unique<Body>();
  body->n_in = n_in;
  if (Status status = check_sources(sources, n_in, body->n_out); !status.ok()) return status;
  prepare_skinny_linear(context);
  const auto n_elements = static_cast<std::size_t>(body->n_out) * static_cast<std::size_t>(n_in);
  auto weights = context.allocate(n_elements * sizeof(Bf16), "weights");
  if (!weights.ok()) return weights.status();
  body->weights = std::move(*weights);
  auto arrived = context.allocate(
      static_cast<std::size_t>(body->n_out / kCountedOutputs + 1) * sizeof(int), "weights");
  if (!arrived.ok()) return arrived.status();
  body->arrived = std::move(*arrived);
  context.fill(body->arrived.data(), 0, body->arrived.n_bytes());
  const bool converts = std::any_of(sources.begin(), sources.end(), [](const WeightSource& source) {
    return source.dtype != DType::kBF16;
  });
  auto uploader = Uploader::create(context, n_elements * sizeof(float), converts);
  if (!uploader.ok()) return uploader.status();
  Bf16* target = body->weights.as<Bf16>();
  for (const WeightSource& source : sources) {
    const std::int64_t n = source.n_out * n_in;
    uploader->upload(source.data, source.dtype, n, target);
    target += n;
  }
  context.synchronize();  // before the page-locked buffers go
  return DeviceLinear(std::move(body));
}

DeviceLinear::DeviceLinear(std::unique_ptr<Body> body) : body_(std::move(body)) {}
DeviceLinear::~DeviceLinear() = default;
DeviceLinear::DeviceLinear(DeviceLinear&&) noexcept = default;
DeviceLinear& DeviceLinear::operator=(DeviceLinear&&) noexcept = default;

std::int64_t DeviceLinear::n_in() const { return body_->n_in; }
std::int64_t DeviceLinear::n_out() const { return body_->n_out; }
std::size_t DeviceLinear::bytes() const { return body_->weights.n_bytes(); }
const Bf16* DeviceLinear::data() const { return body_->weights.as<const Bf16>(); }

std::string DeviceLinear::choice(const CudaContext& context, LinearForms form,
                                 std::int64_t n_rows) const {
  const std::optional<Choice> choice = Access::choice(context, *body_, output_of(form), n_rows);
  return choice ? describe(*choice) : "cuBLASLt's first choice";
}

void DeviceLinear::copy_tuning(const DeviceLinear& tuned) {
  CHECK(n_in() == tuned.n_in() && n_out() == tuned.n_out(), "a tuning is for one shape");
  body_->tuning = tuned.body_->tuning;
}

Status tune_linear(const CudaContext& context, DeviceLinear& weights, std::int64_t max_rows,
                   unsigned forms) {
  CHECK(max_rows >= 1, "rows to tune for");
  Access::Body& body = Access::body(weights);
  auto tuner = Tuner::create(context, body, max_rows, forms);
  if (!tuner.ok()) return tuner.status();
  auto tuning = std::make_shared<Tuning>();
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

void linear(const CudaContext& context, const DeviceLinear& weights, ConstBf16Rows x, Bf16Rows y) {
  check_shapes(weights, x, y);
  Access::run(context, weights, LinearOutput::kBf16, call_of(x, y));
}

void linear(const CudaContext& context, const DeviceLinear& weights, ConstBf16Rows x, Rows y) {
  check_shapes(weights, x, y);
  Access::run(context, weights, LinearOutput::kF32, call_of(x, y));
}

void linear_add(const CudaContext& context, const DeviceLinear& weights, ConstBf16Rows x, Rows y) {
  check_shapes(weights, x, y);
  Access::run(context, weights, LinearOutput::kAddF32, call_of(x, y));
}

void linear_swiglu(const CudaContext& context, const DeviceLinear& gate_up, ConstBf16Rows x,
                   Rows scratch, Bf16Rows out) {
  check_shapes(gate_up, x, scratch);
  CHECK(out.n_rows == x.n_rows && 2 * out.width == gate_up.n_out(), "shapes of a gated product");
  Call call = call_of(x, scratch);
  call.swiglu = out.data;
  call.swiglu_stride = out.stride;
  Access::run(context, gate_up, LinearOutput::kSwiglu, call);
}

}  // namespace spindle::kernels
