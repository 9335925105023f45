// Sampling of one step's rows from random normal logits; the share is that of reading them once.

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "kernels/bench/cuda/bench.h"
#include "kernels/sample.h"

namespace spindle::bench {
namespace {

constexpr std::size_t kRotatedBytes = std::size_t{300} << 20;
constexpr double kGreedyLimitUs = 100;

struct Mode {
  const char* name;
  kernels::SampleParams params;
  int n_adjust;
};
// The temperature of normal logits with deviation 1: 0.4 stands for the spread of a language
// model's, 1 is flatter than any.
constexpr Mode kModes[] = {
    {"greedy", {.temperature = 0.0F}, 0},
    {"penalties_greedy", {.temperature = 0.0F, .repetition_penalty = 1.1F}, 2000},
    {"plain", {.temperature = 0.4F}, 0},
    {"top_k_50", {.temperature = 0.4F, .top_k = 50}, 0},
    {"top_p", {.temperature = 0.2F, .top_p = 0.9F}, 0},
    {"top_k_50_top_p", {.temperature = 0.4F, .top_k = 50, .top_p = 0.9F}, 0},
    {"top_p_flat", {.temperature = 1.0F, .top_p = 0.9F}, 0},
    {"penalties_top_p", {.temperature = 0.2F, .top_p = 0.9F, .repetition_penalty = 1.1F}, 2000}};

void bench_mode(const Bench& bench, const Mode& mode, int n_rows, std::int64_t n_vocab) {
  const CudaContext& context = bench.context();
  const std::size_t n_bytes =
      static_cast<std::size_t>(n_rows) * static_cast<std::size_t>(n_vocab) * sizeof(float);
  const std::size_t n_copies = std::max<std::size_t>(1, kRotatedBytes / n_bytes);
  const DeviceBuffer logits = bench.random(n_copies * n_bytes, Bench::Fill::kNormalF32);
  std::vector<kernels::DeviceSampleRow> rows;
  std::vector<kernels::DeviceSampleAdjust> adjusts;
  for (int i = 0; i < n_rows; ++i) {
    kernels::DeviceSampleRow row;
    row.params = mode.params;
    row.uniform = kernels::sample_uniform({1, static_cast<std::uint64_t>(i), 0, 0});
    row.logits_row = i;
    row.first_adjust = static_cast<std::int32_t>(adjusts.size());
    row.n_adjust = mode.n_adjust;
    for (int j = 0; j < mode.n_adjust; ++j) {
      kernels::DeviceSampleAdjust adjust;
      adjust.id = static_cast<std::int32_t>((j * 7919 + i) % n_vocab);
      adjust.seen = 1;
      adjusts.push_back(adjust);
    }
    rows.push_back(row);
  }
  const DeviceBuffer device_rows = bench.allocate(rows.size() * sizeof(rows[0]));
  const DeviceBuffer device_adjusts =
      bench.allocate((adjusts.size() + 1) * sizeof(kernels::DeviceSampleAdjust));
  context.to_device(device_rows.data(), rows.data(), rows.size() * sizeof(rows[0]));
  context.to_device(device_adjusts.data(), adjusts.data(),
                    adjusts.size() * sizeof(kernels::DeviceSampleAdjust));
  const std::size_t workspace_bytes = kernels::sample_workspace_bytes(n_rows, n_vocab);
  const DeviceBuffer workspace = bench.allocate(workspace_bytes);
  const DeviceBuffer sampled =
      bench.allocate(static_cast<std::size_t>(n_rows) * sizeof(kernels::DeviceSampled));
  const double us = bench.median_us([&](int i) {
    const std::size_t copy = static_cast<std::size_t>(i) % n_copies;
    const auto* from = reinterpret_cast<const float*>(logits.data() + copy * n_bytes);
    sample(context, ConstRows(from, n_rows, n_vocab),
           device_rows.as<const kernels::DeviceSampleRow>(), n_rows,
           device_adjusts.as<const kernels::DeviceSampleAdjust>(), workspace.data(),
           workspace_bytes, sampled.as<kernels::DeviceSampled>());
  });
  std::string note;
  if (mode.n_adjust == 0 && mode.params.temperature == 0.0F && n_rows == 32) {
    note = us < kGreedyLimitUs ? "below the limit of 100 us" : "MISSED the limit of 100 us";
  }
  bench.report({.name = std::string("sample_") + mode.name,
                .parameters = {{"n_rows", static_cast<double>(n_rows)},
                               {"n_vocab", static_cast<double>(n_vocab)}},
                .median_us = us,
                .bytes = static_cast<double>(n_bytes),
                .yardstick = "copy",
                .note = note});
}

}  // namespace
}  // namespace spindle::bench

int main() {
  try {
    const spindle::bench::Bench bench;
    for (const auto& mode : spindle::bench::kModes) {
      for (const int n_rows : {1, 32, 256}) {
        spindle::bench::bench_mode(bench, mode, n_rows, 128256);
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
