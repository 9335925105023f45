#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <string>

#include "kernels/core/cuda_check.h"
#include "kernels/cuda/device_linear.h"

namespace spindle::kernels {
namespace {

constexpr int kMaxAlgorithms = 16;

void blas_check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw CudaError(std::string(what) + ": " + cublasLtGetStatusString(status));
}

}  // namespace

BlasProduct::BlasProduct(LinearOutput output, std::int64_t n_out, std::int64_t n_in,
                         const LinearCall& call)
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

BlasProduct BlasProduct::gated_part(std::int64_t n_out, std::int64_t n_in, const LinearCall& call,
                                    int parts) {
  const std::int64_t width = n_out / 2 / parts;
  LinearCall part = call;
  part.y_stride = 2 * width;
  BlasProduct out(LinearOutput::kSwiglu, width, n_in, part);
  out.set_batch(out.w_, n_out / 2 * n_in);
  out.set_batch(out.x_, 0);
  out.set_batch(out.y_, width);
  return out;
}

void BlasProduct::set_batch(cublasLtMatrixLayoutOpaque_t& layout, std::int64_t distance) {
  const std::int32_t count = 2;
  blas_check(cublasLtMatrixLayoutSetAttribute(&layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                              sizeof(count)),
             "batch");
  blas_check(cublasLtMatrixLayoutSetAttribute(&layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                              &distance, sizeof(distance)),
             "batch");
}

std::vector<cublasLtMatmulAlgo_t> BlasProduct::algorithms(const CudaContext& context, int n) {
  cublasLtMatmulPreferenceOpaque_t preference = {};
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

std::optional<cublasLtMatmulAlgo_t> BlasProduct::split(const CudaContext& context,
                                                       cublasLtMatmulAlgo_t algorithm,
                                                       std::int32_t parts) {
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

cublasStatus_t BlasProduct::run(const CudaContext& context, const Bf16* weights,
                                const LinearCall& call,
                                const cublasLtMatmulAlgo_t& algorithm) const {
  const float one = 1.0F;
  const float beta = output_ == LinearOutput::kAddF32 ? 1.0F : 0.0F;
  // The library takes descriptions by pointers to non-const and does not change them.
  auto* self = const_cast<BlasProduct*>(this);
  return cublasLtMatmul(context.blas(), &self->operation_, &one, weights, &self->w_, call.x,
                        &self->x_, &beta, call.y, &self->y_, call.y, &self->y_, &algorithm,
                        context.blas_workspace(), context.blas_workspace_bytes(), context.stream());
}

// Parts are added in fp32; in the output's own type only where that is fp32.
std::uint32_t BlasProduct::reduction_schemes() const {
  return output_bytes(output_) == sizeof(float) ? CUBLASLT_REDUCTION_SCHEME_MASK
                                                : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
}

}  // namespace spindle::kernels
