#include "ops/cli/eval_score.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/core/check.h"

namespace spindle::cli {
namespace {

constexpr double kLeastLogprob = -1000;

std::span<const float> dense(const api::v1::PromptScore& score) {
  return {score.dense().data(), static_cast<std::size_t>(score.dense_size())};
}

}  // namespace

double kl_divergence(std::span<const float> full, std::span<const float> other) {
  CHECK(full.size() == other.size(), "two vocabularies");
  double sum = 0;
  for (std::size_t i = 0; i < full.size(); ++i) {
    const double log_p = full[i];
    const double p = std::exp(log_p);
    // A token that the other rules out entirely must not make every mean infinite.
    if (p > 0) sum += p * (log_p - std::max(static_cast<double>(other[i]), kLeastLogprob));
  }
  // NaN stays, so that a broken server is seen.
  return sum < 0 ? 0 : sum;
}

double percentile(std::vector<double> values, double p) {
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  std::sort(values.begin(), values.end());
  const double rank = p / 100 * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(rank);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (rank - static_cast<double>(below)) * (values[above] - values[below]);
}

double mean(const std::vector<double>& values) {
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

Status check_scores(const std::vector<TokenSpan>& answers,
                    std::span<const api::v1::PromptScore> scores) {
  const std::int32_t first = answers.front().first;
  if (scores.size() != static_cast<std::size_t>(answers.back().end - first)) {
    return internal_error("the server sent " + std::to_string(scores.size()) + " scores for " +
                          std::to_string(answers.back().end - first) + " positions");
  }
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (scores[i].position() != first + static_cast<std::int32_t>(i)) {
      return internal_error("the server's scores are not in order of position");
    }
    if (scores[i].dense_size() == 0 || scores[i].dense_size() != scores[0].dense_size()) {
      return internal_error("the server's scores are not of the whole vocabulary");
    }
    const std::span<const float> values = dense(scores[i]);
    if (std::any_of(values.begin(), values.end(), [](float x) { return std::isnan(x); })) {
      return internal_error("the server sent a score that is not a number");
    }
  }
  return ok_status();
}

void score_answers(const Probe& probe, const std::vector<TokenSpan>& answers,
                   std::span<const api::v1::PromptScore> scores,
                   std::span<const api::v1::PromptScore> full, CellResult& result) {
  const std::int32_t first = answers.front().first;
  for (const TokenSpan& answer : answers) {
    bool right = true;
    for (std::int32_t position = answer.first; position < answer.end; ++position) {
      const auto i = static_cast<std::size_t>(position - first);
      const api::v1::PromptScore& score = scores[i];
      right = right && score.best_id() == probe.tokens[static_cast<std::size_t>(position)];
      result.nll -= static_cast<double>(score.logprob());
      ++result.n_tokens;
      if (!full.empty()) result.kl.push_back(kl_divergence(dense(full[i]), dense(score)));
    }
    result.right.push_back(right ? 1 : 0);
  }
}

void take_boundary(const api::v1::Usage& usage, std::int32_t cut, CellResult& result) {
  for (const api::v1::StageKv& stage : usage.kv()) {
    result.full_bytes += stage.full_bytes();
    result.kept_bytes += stage.kept_bytes();
  }
  for (const api::v1::KvBoundary& boundary : usage.boundaries()) {
    if (boundary.position() != cut) continue;
    result.full_bytes = boundary.full_bytes();
    result.kept_bytes = boundary.kept_bytes();
    result.compress_ms = boundary.compress_ms();
    result.compressed_tokens = cut;
    result.layer_bytes.clear();
    for (const api::v1::KvHeadKept& head : boundary.heads()) {
      constexpr std::int32_t kMostLayers = 1 << 16;  // a server that names more is broken
      if (head.layer() < 0 || head.layer() >= kMostLayers) continue;
      const auto layer = static_cast<std::size_t>(head.layer());
      if (result.layer_bytes.size() <= layer) result.layer_bytes.resize(layer + 1);
      result.layer_bytes[layer] += head.bytes();
    }
  }
}

}  // namespace spindle::cli
