#include "kernels/bench/cuda/bench.h"

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "kernels/bench/cuda/random_fill.h"
#include "kernels/core/cuda_check.h"

namespace spindle::bench {
namespace {

constexpr std::size_t kCopyBytes = std::size_t{2} << 30;
constexpr int kGemmSize = 8192;

void check_blas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw std::runtime_error(std::string(what) + ": cuBLASLt status " + std::to_string(status));
  }
}

}  // namespace

Bench::Bench(int device) {
  auto context = CudaContext::create(device);
  if (!context.ok()) throw std::runtime_error(context.status().to_string());
  context_ = std::move(*context);
  measure_copy();
  measure_gemm();
  std::printf(
      "{\"name\": \"yardsticks\", \"device\": \"%s\", \"copy_bytes_per_second\": %.6g, "
      "\"gemm_flops_per_second\": %.6g}\n",
      context_->device_name().c_str(), copy_, gemm_);
  std::fprintf(stderr, "%s: copy %.2f TB/s, bf16 product %.0f TFLOP/s\n",
               context_->device_name().c_str(), copy_ * 1e-12, gemm_ * 1e-12);
}

DeviceBuffer Bench::allocate(std::size_t n_bytes) const {
  auto buffer = context_->allocate(n_bytes, "a benchmark");
  if (!buffer.ok()) throw std::runtime_error(buffer.status().to_string());
  return std::move(*buffer);
}

DeviceBuffer Bench::random(std::size_t n_bytes, Fill fill, std::uint64_t seed) const {
  DeviceBuffer buffer = allocate((n_bytes + 7) / 8 * 8);
  random_fill(*context_, buffer.data(), n_bytes, fill, seed);
  return buffer;
}

double Bench::median_us(const std::function<void(int)>& run, int n_runs, int n_warm_up) const {
  for (int i = 0; i < n_warm_up; ++i) run(i);
  std::vector<cudaEvent_t> events(static_cast<std::size_t>(2 * n_runs));
  for (cudaEvent_t& event : events) cuda_check(cudaEventCreate(&event), "cudaEventCreate");
  for (int i = 0; i < n_runs; ++i) {
    const auto at = static_cast<std::size_t>(2 * i);
    cuda_check(cudaEventRecord(events[at], context_->stream()), "cudaEventRecord");
    run(n_warm_up + i);
    cuda_check(cudaEventRecord(events[at + 1], context_->stream()), "cudaEventRecord");
  }
  context_->synchronize();
  std::vector<float> times;
  for (int i = 0; i < n_runs; ++i) {
    const auto at = static_cast<std::size_t>(2 * i);
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, events[at], events[at + 1]), "cudaEventElapsedTime");
    times.push_back(ms * 1000.0F);
  }
  for (cudaEvent_t event : events) cuda_check(cudaEventDestroy(event), "cudaEventDestroy");
  std::nth_element(times.begin(), times.begin() + n_runs / 2, times.end());
  return times[static_cast<std::size_t>(n_runs / 2)];
}

void Bench::measure_copy() {
  const DeviceBuffer source = random(kCopyBytes, Fill::kBytes);
  const DeviceBuffer target = allocate(kCopyBytes);
  const double us =
      median_us([&](int) { context_->copy(target.data(), source.data(), kCopyBytes); }, 20, 3);
  copy_ = 2.0 * static_cast<double>(kCopyBytes) / (us * 1e-6);
}

void Bench::measure_gemm() {
  const std::size_t n = kGemmSize;
  const DeviceBuffer a = random(2 * n * n, Fill::kNormalBf16, 1);
  const DeviceBuffer b = random(2 * n * n, Fill::kNormalBf16, 2);
  const DeviceBuffer c = allocate(2 * n * n);
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t layout = nullptr;
  check_blas(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "product");
  const cublasOperation_t transposed = CUBLAS_OP_T;
  check_blas(cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                            sizeof(transposed)),
             "transposition");
  check_blas(cublasLtMatrixLayoutCreate(&layout, CUDA_R_16BF, n, n, kGemmSize), "layout");
  cublasLtMatmulPreference_t preference = nullptr;
  check_blas(cublasLtMatmulPreferenceCreate(&preference), "preference");
  const std::size_t workspace = context_->blas_workspace_bytes();
  check_blas(
      cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                           &workspace, sizeof(workspace)),
      "workspace");
  std::vector<cublasLtMatmulHeuristicResult_t> choices(8);
  int n_choices = 0;
  check_blas(cublasLtMatmulAlgoGetHeuristic(context_->blas(), product, layout, layout, layout,
                                            layout, preference, 8, choices.data(), &n_choices),
             "algorithms");
  const float one = 1.0F;
  const float zero = 0.0F;
  double best_us = 0;
  for (int i = 0; i < n_choices; ++i) {
    const auto& choice = choices[static_cast<std::size_t>(i)];
    const double us = median_us(
        [&](int) {
          check_blas(cublasLtMatmul(context_->blas(), product, &one, a.data(), layout, b.data(),
                                    layout, &zero, c.data(), layout, c.data(), layout, &choice.algo,
                                    context_->blas_workspace(), workspace, context_->stream()),
                     "product");
        },
        10, 3);
    if (best_us == 0 || us < best_us) best_us = us;
  }
  gemm_ = 2.0 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n) /
          (best_us * 1e-6);
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulDescDestroy(product);
}

double Bench::report(const Result& result) const {
  const double seconds = result.median_us * 1e-6;
  double share = 0;
  if (result.yardstick == "copy") share = result.bytes / seconds / copy_;
  if (result.yardstick == "gemm") share = result.flops / seconds / gemm_;
  std::string parameters;
  std::string readable;
  for (const Parameter& parameter : result.parameters) {
    char text[96];
    std::snprintf(text, sizeof(text), "%s\"%s\": %.10g", parameters.empty() ? "" : ", ",
                  parameter.name.c_str(), parameter.value);
    parameters += text;
    std::snprintf(text, sizeof(text), " %s %.10g", parameter.name.c_str(), parameter.value);
    readable += text;
  }
  std::printf(
      "{\"name\": \"%s\", \"parameters\": {%s}, \"median_us\": %.4f, \"bytes\": %.0f, \"flops\": "
      "%.0f, \"yardstick\": \"%s\", \"share\": %.4f, \"bar\": %.4g, \"note\": \"%s\"}\n",
      result.name.c_str(), parameters.c_str(), result.median_us, result.bytes, result.flops,
      result.yardstick.c_str(), share, result.bar, result.note.c_str());
  std::fflush(stdout);
  std::fprintf(stderr, "%-28s%s: %.1f us, %.2f TB/s, %.1f TFLOP/s", result.name.c_str(),
               readable.c_str(), result.median_us, result.bytes / seconds * 1e-12,
               result.flops / seconds * 1e-12);
  if (!result.yardstick.empty()) {
    std::fprintf(stderr, ", %.3f of %s", share, result.yardstick.c_str());
  }
  if (result.bar > 0)
    std::fprintf(stderr, " (bar %.2f%s)", result.bar, share >= result.bar ? "" : ", MISSED");
  std::fprintf(stderr, "%s%s\n", result.note.empty() ? "" : "; ", result.note.c_str());
  return share;
}

double share_of_copy(const Bench& bench, double bytes, double us) {
  return bytes / (us * 1e-6) / bench.copy_bytes_per_second();
}

}  // namespace spindle::bench
