// DeviceLinear: upload and the calls.

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "kernels/activation.h"
#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/device_linear.h"
#include "kernels/linear.h"

namespace spindle::kernels {
namespace {

using Access = DeviceLinearAccess;

constexpr std::size_t kStagingBytes = std::size_t{8} << 20;
constexpr std::int64_t kColumnsMultiple = 8;  // 16 bytes of bf16

LinearOutput output_of(LinearForms form) {
  CHECK(std::has_single_bit(static_cast<unsigned>(form)), "one form of product");
  return static_cast<LinearOutput>(std::countr_zero(static_cast<unsigned>(form)));
}

std::string describe(const LinearChoice& choice) {
  if (choice.variant >= 0) return skinny_name(choice.variant);
  const auto value = [&](cublasLtMatmulAlgoConfigAttributes_t name) {
    std::int32_t out = 0;
    std::size_t written = 0;
    static_cast<void>(
        cublasLtMatmulAlgoConfigGetAttribute(&choice.algorithm, name, &out, sizeof(out), &written));
    return std::to_string(out);
  };
  return "cuBLASLt " + value(CUBLASLT_ALGO_CONFIG_ID) + ", tile " +
         value(CUBLASLT_ALGO_CONFIG_TILE_ID) + ", split " + value(CUBLASLT_ALGO_CONFIG_SPLITK_NUM) +
         (choice.parts > 1 ? ", " + std::to_string(choice.parts) + " parts" : "");
}

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

void finish(const CudaContext& context, const Access::Body& b, LinearOutput output,
            const LinearCall& call) {
  if (output != LinearOutput::kSwiglu) return;
  swiglu(context, ConstRows(static_cast<const float*>(call.y), call.n_rows, b.n_out, call.y_stride),
         Bf16Rows(call.swiglu, call.n_rows, b.n_out / 2, call.swiglu_stride));
}

bool run_gated_parts(const CudaContext& context, const Access::Body& b, const Bf16* weights,
                     const LinearCall& call, const LinearChoice& choice) {
  const std::int64_t width = b.n_out / 2 / choice.parts;
  const BlasProduct product = BlasProduct::gated_part(b.n_out, b.n_in, call, choice.parts);
  if (product.y_alignment() < choice.y_alignment) return false;
  const ConstRows gate_up(static_cast<const float*>(call.y), call.n_rows, 2 * width);
  for (int part = 0; part < choice.parts; ++part) {
    if (product.run(context, weights + part * width * b.n_in, call, choice.algorithm) !=
        CUBLAS_STATUS_SUCCESS) {
      return false;
    }
    swiglu(context, gate_up,
           Bf16Rows(call.swiglu + part * width, call.n_rows, width, call.swiglu_stride));
  }
  return true;
}

template <typename T>
LinearCall call_of(ConstBf16Rows x, RowsView<T> y) {
  LinearCall call;
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

std::optional<LinearChoice> Access::choice(const CudaContext& context, const Body& body,
                                           LinearOutput output, std::int64_t n_rows) {
  if (body.tuning != nullptr) {
    if (const LinearChoice* found = body.tuning->find(output, n_rows)) return *found;
  }
  if (n_rows > kSkinnyDefaultTokens) return std::nullopt;
  const int variant = skinny_default(context, static_cast<int>(n_rows));
  return variant < 0 ? std::nullopt : std::optional(LinearChoice{variant, 0, {}, 1});
}

void Access::run(const CudaContext& context, const DeviceLinear& weights, LinearOutput output,
                 const LinearCall& call) {
  const Body& b = body(weights);
  if (call.n_rows == 0) return;
  CHECK(reinterpret_cast<std::uintptr_t>(call.x) % kRowAlignment == 0 &&
            (call.n_rows == 1 || call.x_stride % kColumnsMultiple == 0),
        "rows of x must start at multiples of 16 bytes");
  const std::optional<LinearChoice> chosen = choice(context, b, output, call.n_rows);
  if (chosen && run_choice(context, b, weights.data(), output, call, *chosen)) return;
  BlasProduct product(output, b.n_out, b.n_in, call);
  const std::vector<cublasLtMatmulAlgo_t> algorithms = product.algorithms(context, 1);
  if (algorithms.empty()) throw CudaError("cuBLASLt has no algorithm for a product");
  const cublasStatus_t status = product.run(context, weights.data(), call, algorithms.front());
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw CudaError(std::string("cuBLASLt product: ") + cublasLtGetStatusString(status));
  }
  finish(context, b, output, call);
}

bool Access::run_choice(const CudaContext& context, const Body& b, const Bf16* weights,
                        LinearOutput output, const LinearCall& call, const LinearChoice& choice) {
  if (choice.variant >= 0) {
    const bool swiglu = output == LinearOutput::kSwiglu;
    const int n_tokens = static_cast<int>(call.n_rows);
    if (!skinny_fits(context, choice.variant, n_tokens)) return false;
    skinny_linear(context, output, choice.variant,
                  {weights, b.n_out, b.n_in, call.x, call.x_stride, n_tokens,
                   swiglu ? call.swiglu : call.y, swiglu ? call.swiglu_stride : call.y_stride});
    return true;
  }
  if (choice.parts > 1) return run_gated_parts(context, b, weights, call, choice);
  const BlasProduct product(output, b.n_out, b.n_in, call);
  if (product.y_alignment() < choice.y_alignment) return false;
  if (product.run(context, weights, call, choice.algorithm) != CUBLAS_STATUS_SUCCESS) {
    return false;
  }
  finish(context, b, output, call);
  return true;
}

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
  const std::optional<LinearChoice> choice =
      Access::choice(context, *body_, output_of(form), n_rows);
  return choice ? describe(*choice) : "cuBLASLt's first choice";
}

void DeviceLinear::copy_tuning(const DeviceLinear& tuned) {
  CHECK(n_in() == tuned.n_in() && n_out() == tuned.n_out(), "a tuning is for one shape");
  body_->tuning = tuned.body_->tuning;
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
  LinearCall call = call_of(x, scratch);
  call.swiglu = out.data;
  call.swiglu_stride = out.stride;
  Access::run(context, gate_up, LinearOutput::kSwiglu, call);
}

}  // namespace spindle::kernels
