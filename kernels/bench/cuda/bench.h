#pragma once
// What the CUDA benchmarks share: event timing, the card's two yardsticks measured in the same run,
// random device data, and one JSON object per result on standard output.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/core/cuda_context.h"

namespace spindle::bench {

struct Parameter {
  std::string name;
  double value = 0;
};

struct Result {
  std::string name;  // "attention_decode"
  std::vector<Parameter> parameters;
  double median_us = 0;
  double bytes = 0;       // that must move, each input read once, each output written once
  double flops = 0;       // that must happen
  std::string yardstick;  // "copy" or "gemm": what the share is of; empty: a ratio only
  double bar = 0;         // share that is asked for; 0: none
  std::string note;       // "against dense: 2.7x", "torch: 143 us"
};

class Bench {
 public:
  // Measures the yardsticks; throws when there is no device.
  explicit Bench(int device = 0);

  const CudaContext& context() const { return *context_; }
  double copy_bytes_per_second() const { return copy_; }  // device to device, read plus written
  double gemm_flops_per_second() const { return gemm_; }  // cuBLASLt, bf16, 8192^3, random data

  // Median over `n_runs` of one call's time between events, after warm-up calls. `run` gets the
  // number of the call, to rotate between inputs so that the cache does not hold them.
  double median_us(const std::function<void(int)>& run, int n_runs = 30, int n_warm_up = 5) const;

  // Prints the JSON line and, on stderr, a readable one; answers the share of the yardstick.
  double report(const Result& result) const;

  // Device memory filled with random numbers: f16 or bf16 normal values, or random bytes.
  enum class Fill { kNormalF16, kNormalBf16, kNormalF32, kBytes };
  DeviceBuffer random(std::size_t n_bytes, Fill fill, std::uint64_t seed = 1) const;
  DeviceBuffer allocate(std::size_t n_bytes) const;

 private:
  void measure_copy();
  void measure_gemm();

  std::unique_ptr<CudaContext> context_;
  double copy_ = 0;
  double gemm_ = 0;
};

// Bytes of what must move, over the median time and the copy yardstick, as printed by report().
double share_of_copy(const Bench& bench, double bytes, double us);

}  // namespace spindle::bench
