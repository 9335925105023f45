#pragma once
// What `spindle bench` sends, and when: prompts of a dataset and times of arrival. Pure functions
// of their arguments; one seed gives one load on one build.

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::cli {

struct BenchPrompt {
  std::vector<std::int32_t> tokens;  // or, when empty, `text`
  std::string text;
  std::int32_t output_tokens = 0;
};

// Random token ids. Lengths are uniform in [n (1 - range_ratio), n (1 + range_ratio)], at least 1;
// all prompts begin with the same `prefix_tokens` ids, which come on top.
struct RandomDataset {
  std::int32_t input_tokens = 1024;
  std::int32_t output_tokens = 128;
  std::int32_t prefix_tokens = 0;
  double range_ratio = 0;
};
std::vector<BenchPrompt> random_prompts(const RandomDataset& dataset, std::size_t n,
                                        std::int32_t vocab_size, std::uint64_t seed);

// JSON Lines: {"prompt": text, "output_len": tokens}, the latter optional. With fewer lines than
// prompts they are taken again from the first. INVALID_ARGUMENT names the line at fault.
Result<std::vector<BenchPrompt>> custom_prompts(std::string_view json_lines, std::size_t n,
                                                std::int32_t output_tokens);

// Pieces of `n_bytes` of one long text, each from a random place on, going on at its beginning
// where it ends; cut between characters. INVALID_ARGUMENT for a text with less than `n_bytes`.
Result<std::vector<BenchPrompt>> document_prompts(std::string_view text, std::size_t n,
                                                  std::size_t n_bytes, std::int32_t output_tokens,
                                                  std::uint64_t seed);

// Requests per second, and how the gaps between them are distributed: gamma with shape
// `burstiness`, so that 1 is a Poisson process, less is burstier, more is evener. With a ramp the
// rate goes from `ramp_start` to `ramp_end` over the requests, and `rate` is not used.
struct Arrivals {
  enum class Ramp : std::uint8_t { kNone, kLinear, kExponential };

  double rate = std::numeric_limits<double>::infinity();
  double burstiness = 1;
  Ramp ramp = Ramp::kNone;
  double ramp_start = 0;
  double ramp_end = 0;
};
// Seconds from the start, ascending; the first is 0.
std::vector<double> arrival_times(const Arrivals& arrivals, std::size_t n, std::uint64_t seed);

}  // namespace spindle::cli
