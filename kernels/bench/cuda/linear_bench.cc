// Matrix products of an 8B model's layers: share of the copy yardstick while reading the weights
// bounds them, of the product yardstick beyond. Then the products and norms of whole layers for one
// token, as a graph, the way a decode step runs them.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "kernels/bench/cuda/bench.h"
#include "kernels/core/cuda_check.h"
#include "kernels/cuda/skinny_linear.h"
#include "kernels/linear.h"
#include "kernels/norm.h"

namespace spindle::bench {
namespace {

using kernels::DeviceLinear;
using kernels::LinearForms;

struct Shape {
  const char* name;
  std::int64_t n_out;
  std::int64_t n_in;
  LinearForms form;
  std::int64_t max_rows;
};
constexpr Shape kShapes[] = {{"qkv", 6144, 4096, kernels::kLinearF32, 4096},
                             {"o", 4096, 4096, kernels::kLinearAdd, 4096},
                             {"gate_up", 28672, 4096, kernels::kLinearSwiglu, 4096},
                             {"down", 4096, 14336, kernels::kLinearAdd, 4096},
                             {"lm_head", 128256, 4096, kernels::kLinearF32, 64}};
constexpr std::int64_t kRows[] = {1, 4, 8, 16, 32, 64, 512, 4096};
constexpr std::int64_t kMaxReadBound = 64;
constexpr double kOneTokenBar = 0.88;
// Copies of a weight are taken in turn, more bytes in all than any cache holds.
constexpr std::size_t kRotatedBytes = std::size_t{400} << 20;
constexpr int kChain = 8;  // calls between two events
constexpr int kLayers = 6;
constexpr std::int64_t kHidden = 4096;
constexpr std::int64_t kInter = 14336;

std::vector<std::uint16_t> random_weights(std::int64_t n) {
  std::vector<std::uint16_t> out(static_cast<std::size_t>(n));
  std::uint64_t state = 0x9e3779b97f4a7c15ULL;
  for (std::uint16_t& value : out) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    // Any sign and fraction, sizes from 2^-10 to 2^-6.
    value = static_cast<std::uint16_t>((state & 0x807fU) | ((117 + (state >> 32) % 4) << 7));
  }
  return out;
}

DeviceLinear upload(const Bench& bench, const Shape& shape,
                    const std::vector<std::uint16_t>& host) {
  const kernels::WeightSource source{host.data(), DType::kBF16, shape.n_out};
  auto weight = DeviceLinear::upload(bench.context(), std::span(&source, 1), shape.n_in);
  if (!weight.ok()) throw std::runtime_error(weight.status().to_string());
  return std::move(*weight);
}

struct Memory {
  DeviceBuffer x;
  DeviceBuffer y;
  DeviceBuffer out;
};

void run(const Bench& bench, const Shape& shape, const DeviceLinear& weight, std::int64_t n_rows,
         const Memory& memory) {
  const ConstBf16Rows x(memory.x.as<const Bf16>(), n_rows, shape.n_in);
  const Bf16Rows y16(memory.y.as<Bf16>(), n_rows, shape.n_out);
  const Rows y32(memory.y.as<float>(), n_rows, shape.n_out);
  switch (shape.form) {
    case kernels::kLinearBf16:
      return linear(bench.context(), weight, x, y16);
    case kernels::kLinearF32:
      return linear(bench.context(), weight, x, y32);
    case kernels::kLinearAdd:
      return linear_add(bench.context(), weight, x, y32);
    default:
      return linear_swiglu(bench.context(), weight, x, y32,
                           Bf16Rows(memory.out.as<Bf16>(), n_rows, shape.n_out / 2));
  }
}

double moved_bytes(const Shape& shape, std::int64_t n_rows) {
  double out = 2.0 * static_cast<double>(shape.n_out) * static_cast<double>(shape.n_in);
  out += 2.0 * static_cast<double>(n_rows * shape.n_in);
  const double per_output = shape.form == kernels::kLinearBf16     ? 2
                            : shape.form == kernels::kLinearF32    ? 4
                            : shape.form == kernels::kLinearSwiglu ? 1
                                                                   : 8;
  return out + per_output * static_cast<double>(n_rows * shape.n_out);
}

void bench_shape(const Bench& bench, const Shape& shape) {
  const std::vector<std::uint16_t> host = random_weights(shape.n_out * shape.n_in);
  std::vector<DeviceLinear> weights;
  const std::size_t n_copies = 1 + kRotatedBytes / (host.size() * sizeof(Bf16));
  for (std::size_t i = 0; i < n_copies; ++i) weights.push_back(upload(bench, shape, host));
  const Status status = tune_linear(bench.context(), weights[0], shape.max_rows, shape.form);
  if (!status.ok()) throw std::runtime_error(status.to_string());
  for (std::size_t i = 1; i < n_copies; ++i) weights[i].copy_tuning(weights[0]);

  const auto rows = static_cast<std::size_t>(shape.max_rows);
  const Memory memory{
      bench.random(rows * static_cast<std::size_t>(shape.n_in) * 2, Bench::Fill::kNormalBf16),
      bench.random(rows * static_cast<std::size_t>(shape.n_out) * 4, Bench::Fill::kNormalF32),
      bench.allocate(rows * static_cast<std::size_t>(shape.n_out))};
  const auto weight_of = [&](int call) -> const DeviceLinear& {
    return weights[static_cast<std::size_t>(call) % n_copies];
  };
  const auto measure = [&](const auto& call) {
    return bench.median_us([&](int i) {
      for (int j = 0; j < kChain; ++j) call(weight_of(i * kChain + j));
    }) / kChain;
  };
  for (const std::int64_t n_rows : kRows) {
    if (n_rows > shape.max_rows) continue;
    const bool read_bound = n_rows <= kMaxReadBound;
    const double us =
        measure([&](const DeviceLinear& weight) { run(bench, shape, weight, n_rows, memory); });
    bench.report({.name = std::string("linear_") + shape.name,
                  .parameters = {{"n_rows", static_cast<double>(n_rows)}},
                  .median_us = us,
                  .bytes = moved_bytes(shape, n_rows),
                  .flops = 2.0 * static_cast<double>(n_rows) * static_cast<double>(shape.n_out) *
                           static_cast<double>(shape.n_in),
                  .yardstick = read_bound ? "copy" : "gemm",
                  .bar = n_rows == 1 ? kOneTokenBar : 0,
                  .note = weights[0].choice(bench.context(), shape.form, n_rows)});
    if (n_rows > 16) continue;
    for (int variant = 0; variant < kernels::kSkinnyVariants; ++variant) {
      if (!kernels::skinny_fits(bench.context(), variant, static_cast<int>(n_rows))) continue;
      const bool swiglu = shape.form == kernels::kLinearSwiglu;
      const auto output = shape.form == kernels::kLinearBf16  ? kernels::LinearOutput::kBf16
                          : shape.form == kernels::kLinearF32 ? kernels::LinearOutput::kF32
                          : swiglu                            ? kernels::LinearOutput::kSwiglu
                                                              : kernels::LinearOutput::kAddF32;
      const double own_us = measure([&](const DeviceLinear& weight) {
        kernels::skinny_linear(
            bench.context(), output, variant,
            {weight.data(), shape.n_out, shape.n_in, memory.x.as<const Bf16>(), shape.n_in,
             static_cast<int>(n_rows), swiglu ? memory.out.data() : memory.y.data(),
             swiglu ? shape.n_out / 2 : shape.n_out});
      });
      bench.report({.name = std::string("skinny_") + shape.name,
                    .parameters = {{"n_rows", static_cast<double>(n_rows)},
                                   {"variant", static_cast<double>(variant)}},
                    .median_us = own_us,
                    .bytes = moved_bytes(shape, n_rows),
                    .yardstick = "copy",
                    .note = kernels::skinny_name(variant)});
    }
  }
}

// The products and norms of layers in a graph; attention and rope are left out.
void bench_layers(const Bench& bench) {
  const CudaContext& context = bench.context();
  std::vector<DeviceLinear> weights;  // four per layer
  double bytes = 0;
  for (int kind = 0; kind < 4; ++kind) {
    const Shape& shape = kShapes[kind];
    const std::vector<std::uint16_t> host = random_weights(shape.n_out * shape.n_in);
    for (int layer = 0; layer < kLayers; ++layer) {
      weights.push_back(upload(bench, shape, host));
      if (layer > 0) {
        weights.back().copy_tuning(weights[weights.size() - 2]);
      } else if (Status status = tune_linear(context, weights.back(), 16, shape.form);
                 !status.ok()) {
        throw std::runtime_error(status.to_string());
      }
    }
    bytes += kLayers * 2.0 * static_cast<double>(host.size());
  }
  const DeviceBuffer residual = bench.random(16 * kHidden * 4, Bench::Fill::kNormalF32);
  const DeviceBuffer norm = bench.random(kHidden * 4, Bench::Fill::kNormalF32);
  const DeviceBuffer hidden = bench.random(16 * kHidden * 2, Bench::Fill::kNormalBf16);
  const DeviceBuffer wide = bench.allocate(16 * 2 * kInter * 4);
  const DeviceBuffer inter = bench.allocate(16 * kInter * 2);
  const auto weight_of = [&](int kind, int layer) -> const DeviceLinear& {
    return weights[static_cast<std::size_t>(kind * kLayers + layer)];
  };
  const DeviceBuffer qkv_out = bench.allocate(16 * 2 * kInter * 4);
  for (const std::int64_t n_rows : {1, 2, 4, 8, 16}) {
    const Rows stream(residual.as<float>(), n_rows, kHidden);
    const Bf16Rows h(hidden.as<Bf16>(), n_rows, kHidden);
    const Rows qkv(qkv_out.as<float>(), n_rows, kShapes[0].n_out);
    const Rows scratch(wide.as<float>(), n_rows, 2 * kInter);
    const Bf16Rows gated(inter.as<Bf16>(), n_rows, kInter);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cuda_check(cudaStreamBeginCapture(context.stream(), cudaStreamCaptureModeThreadLocal));
    for (int layer = 0; layer < kLayers; ++layer) {
      const auto* norm_weight = norm.as<const float>();
      kernels::rms_norm(context, stream, norm_weight, 1e-5F, h);
      linear(context, weight_of(0, layer), h, qkv);
      linear_add(context, weight_of(1, layer), h, stream);
      kernels::rms_norm(context, stream, norm_weight, 1e-5F, h);
      linear_swiglu(context, weight_of(2, layer), h, scratch, gated);
      linear_add(context, weight_of(3, layer), gated, stream);
    }
    cuda_check(cudaStreamEndCapture(context.stream(), &graph));
    cuda_check(cudaGraphInstantiate(&executable, graph, 0));
    const double us =
        bench.median_us([&](int) { cuda_check(cudaGraphLaunch(executable, context.stream())); });
    bench.report({.name = "linear_layers",
                  .parameters = {{"n_rows", static_cast<double>(n_rows)}, {"n_layers", kLayers}},
                  .median_us = us,
                  .bytes = bytes,
                  .yardstick = "copy",
                  .bar = n_rows == 1 ? kOneTokenBar : 0,
                  .note = {}});
    cuda_check(cudaGraphExecDestroy(executable));
    cuda_check(cudaGraphDestroy(graph));
  }
}

}  // namespace
}  // namespace spindle::bench

int main() {
  try {
    const spindle::bench::Bench bench;
    spindle::bench::bench_layers(bench);
    for (const auto& shape : spindle::bench::kShapes) spindle::bench::bench_shape(bench, shape);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
