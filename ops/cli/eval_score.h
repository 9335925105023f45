#pragma once
// What the log-probabilities of answer tokens say: right or wrong, divergence, perplexity.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/core/status.h"
#include "ops/cli/eval_probe.h"
#include "proto/api.pb.h"

namespace spindle::cli {

// KL(full || other) in nats of two distributions given as log-probabilities of the same
// vocabulary; never negative (rounding is cut off).
double kl_divergence(std::span<const float> full, std::span<const float> other);

// p in [0, 100], linear between the nearest ranks; NaN for no values.
double percentile(std::vector<double> values, double p);
double mean(const std::vector<double>& values);  // NaN for no values

// The result of one probe in one cell: what the journal holds.
struct CellResult {
  std::string refused;     // why the server refused the policy; nothing else is set then
  std::vector<int> right;  // 0 or 1 for each answer
  std::vector<double> kl;  // of each scored token, against the full cache
  double nll = 0;          // sum over scored tokens, nats
  std::int64_t n_tokens = 0;
  // Right after the compression.
  std::uint64_t full_bytes = 0;
  std::uint64_t kept_bytes = 0;
  double compress_ms = 0;
  std::int64_t compressed_tokens = 0;  // 0: nothing was compressed
  std::vector<std::uint64_t> layer_bytes;
  // Of the head that calibration changes; 0 when it has no codebook.
  double k_entries = 0;
  double v_entries = 0;
  bool operator==(const CellResult&) const = default;
};

// Positions of `scores`, in order; INTERNAL when the server left one out or repeated one, or when
// dense scores are missing.
Status check_scores(const std::vector<TokenSpan>& answers,
                    std::span<const api::v1::PromptScore> scores);

// Adds answers to `result`. Both have passed check_scores; without `full` there is no divergence.
void score_answers(const Probe& probe, const std::vector<TokenSpan>& answers,
                   std::span<const api::v1::PromptScore> scores,
                   std::span<const api::v1::PromptScore> full, CellResult& result);

// The bytes at the probe's cut into `result`; where nothing was compressed there is no boundary,
// and they are those that the request held at its end.
void take_boundary(const api::v1::Usage& usage, std::int32_t cut, CellResult& result);

}  // namespace spindle::cli
