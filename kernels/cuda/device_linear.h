#pragma once
// Between the files of DeviceLinear: linear_cuda_host.cc (upload and calls),
// linear_blas_cuda_host.cc (cuBLASLt) and linear_tuning_cuda_host.cc.

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/core/cuda_context.h"
#include "kernels/core/dtype.h"
#include "kernels/core/tensor_view.h"
#include "kernels/cuda/skinny_linear.h"
#include "kernels/linear.h"

namespace spindle::kernels {

inline constexpr std::size_t kRowAlignment = 16;

// One way to compute a product.
struct LinearChoice {
  int variant = -1;               // of our own kernel; -1: `algorithm`
  std::uint32_t y_alignment = 0;  // that `algorithm` was asked for with
  cublasLtMatmulAlgo_t algorithm = {};
  // kSwiglu with `algorithm`: gates and their values are taken in so many parts, so that what goes
  // through memory between product and gate stays in the L2 cache.
  int parts = 1;
};

// Choices by bucket of rows: bucket b serves up to rows[b].
struct LinearTuning {
  std::vector<std::int64_t> rows;
  std::array<std::vector<std::optional<LinearChoice>>, kLinearOutputs> choices;

  const LinearChoice* find(LinearOutput output, std::int64_t n_rows) const {
    const auto& of_output = choices[static_cast<std::size_t>(output)];
    const auto bucket = std::lower_bound(rows.begin(), rows.end(), n_rows) - rows.begin();
    if (bucket >= static_cast<std::ptrdiff_t>(of_output.size())) return nullptr;
    const auto& choice = of_output[static_cast<std::size_t>(bucket)];
    return choice ? &*choice : nullptr;
  }
};

// A call, in plain values. kSwiglu: y is the scratch of the fused projection for cuBLASLt.
struct LinearCall {
  const Bf16* x = nullptr;
  std::int64_t x_stride = 0;
  std::int64_t n_rows = 0;
  void* y = nullptr;
  std::int64_t y_stride = 0;
  Bf16* swiglu = nullptr;
  std::int64_t swiglu_stride = 0;
};

// Of an element of `y` of a call.
inline std::size_t output_bytes(LinearOutput output) {
  return output == LinearOutput::kBf16 ? sizeof(Bf16) : sizeof(float);
}
inline LinearForms form_of(LinearOutput output) {
  return static_cast<LinearForms>(1U << static_cast<unsigned>(output));
}

// What cuBLASLt is told of a product, column-major: y^T [n_out, n_rows] = W [n_out, n_in] x^T. The
// calls take the context's fixed workspace, so that they can be captured in a graph.
class BlasProduct {
 public:
  BlasProduct(LinearOutput output, std::int64_t n_out, std::int64_t n_in, const LinearCall& call);
  // Two products of n_out / 2 / parts outputs each in one call, of the gates and of the values of
  // one part; y has them side by side, and its rows lie together.
  static BlasProduct gated_part(std::int64_t n_out, std::int64_t n_in, const LinearCall& call,
                                int parts);

  // The library's choices, best guess first; at most `n`, and at most 16.
  std::vector<cublasLtMatmulAlgo_t> algorithms(const CudaContext& context, int n);
  // `algorithm` with its columns split in `parts`, when the library can.
  std::optional<cublasLtMatmulAlgo_t> split(const CudaContext& context,
                                            cublasLtMatmulAlgo_t algorithm, std::int32_t parts);
  // Rows of y start at multiples of so many bytes, at most 16.
  std::uint32_t y_alignment() const { return y_alignment_; }
  cublasStatus_t run(const CudaContext& context, const Bf16* weights, const LinearCall& call,
                     const cublasLtMatmulAlgo_t& algorithm) const;

 private:
  void set_batch(cublasLtMatrixLayoutOpaque_t& layout, std::int64_t distance);
  std::uint32_t reduction_schemes() const;

  LinearOutput output_;
  std::uint32_t y_alignment_ = 1;
  cublasLtMatmulDescOpaque_t operation_;
  cublasLtMatrixLayoutOpaque_t w_;
  cublasLtMatrixLayoutOpaque_t x_;
  cublasLtMatrixLayoutOpaque_t y_;
};

struct DeviceLinear::Body {
  std::int64_t n_in = 0;
  std::int64_t n_out = 0;
  DeviceBuffer weights;
  std::shared_ptr<const LinearTuning> tuning;
};

class DeviceLinearAccess {
 public:
  using Body = DeviceLinear::Body;

  static Body& body(DeviceLinear& weights) { return *weights.body_; }
  static const Body& body(const DeviceLinear& weights) { return *weights.body_; }

  // What the tuning says; without one our own kernel for few rows; nothing: the library's first
  // choice.
  static std::optional<LinearChoice> choice(const CudaContext& context, const Body& body,
                                            LinearOutput output, std::int64_t n_rows);
  static void run(const CudaContext& context, const DeviceLinear& weights, LinearOutput output,
                  const LinearCall& call);
  // With `weights` in the place of the body's. False when the library refuses the algorithm for
  // this call.
  static bool run_choice(const CudaContext& context, const Body& body, const Bf16* weights,
                         LinearOutput output, const LinearCall& call, const LinearChoice& choice);
};

}  // namespace spindle::kernels
