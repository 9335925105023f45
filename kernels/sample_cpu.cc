#include "kernels/sample.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "kernels/core/check.h"
#include "kernels/core/philox.h"
#include "kernels/isa/dispatch.h"

namespace spindle::kernels {
namespace {

using Candidate = SampleWorkspace::Candidate;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// First guess at how many of the best tokens carry top_p of the mass; grows by kGrowth until true.
constexpr std::size_t kFirstSorted = 256;
constexpr std::size_t kGrowth = 8;
// The vocabulary is cut into this many blocks to find a floor under the best few logits.
constexpr std::size_t kFloorBlocks = 1024;

template <typename T>
std::span<T> grown(std::vector<T>& storage, std::size_t size) {
  if (storage.size() < size) storage.resize(size);
  return std::span(storage).first(size);
}

bool valid_id(std::int32_t id, std::span<const float> logits) {
  return id >= 0 && static_cast<std::size_t>(id) < logits.size();
}

// Best first; equal logits by id, so the order is total.
bool better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

float repeated(float logit, float penalty) {
  return logit > 0.0F ? logit / penalty : logit * penalty;
}

// A value that at least `count` logits reach: the count-th best of the block maxima. Cheap when
// count is small against the number of blocks, useless otherwise.
float floor_under_best(const KernelTable& kernels, std::span<const float> logits, std::size_t count,
                       SampleWorkspace& workspace) {
  if (count * 4 > kFloorBlocks || logits.size() < 4 * kFloorBlocks) return kMinusInfinity;
  const std::span<float> maxima = workspace.block_maxima(kFloorBlocks);
  for (std::size_t block = 0; block < kFloorBlocks; ++block) {
    const std::size_t begin = logits.size() * block / kFloorBlocks;
    const std::size_t end = logits.size() * (block + 1) / kFloorBlocks;
    maxima[block] = kernels.max(logits.data() + begin, static_cast<std::int64_t>(end - begin));
  }
  const auto nth = maxima.begin() + static_cast<std::ptrdiff_t>(count - 1);
  std::nth_element(maxima.begin(), nth, maxima.end(), std::greater<>());
  return *nth;
}

// The best `count` tokens (fewer if the rest is NaN), sorted, ties by id.
std::span<Candidate> sorted_best(const KernelTable& kernels, std::span<const float> logits,
                                 std::size_t count, SampleWorkspace& workspace) {
  const float floor = floor_under_best(kernels, logits, count, workspace);
  const std::span<Candidate> candidates = workspace.candidates(logits.size());
  std::size_t found = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] >= floor) candidates[found++] = {logits[i], static_cast<std::int32_t>(i)};
  }
  const std::span<Candidate> kept = candidates.first(found);
  const std::size_t wanted = std::min(count, found);
  const auto end = kept.begin() + static_cast<std::ptrdiff_t>(wanted);
  if (wanted < found) std::nth_element(kept.begin(), end, kept.end(), better);
  std::sort(kept.begin(), end, better);
  return kept.first(wanted);
}

double sum_of(std::span<const float> weights) {
  double total = 0.0;
  for (const float weight : weights) total += static_cast<double>(weight);
  return total;
}

// How many weights from the front reach `target`; size() + 1 if all of them do not.
std::size_t reach_mass(std::span<const float> weights, double target) {
  double mass = 0.0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    mass += static_cast<double>(weights[i]);
    if (mass >= target) return i + 1;
  }
  return weights.size() + 1;
}

// The index whose share of the weights in [0, 1) holds `uniform`; weights below `threshold` count
// as zero. -1 when nothing is left or a weight is not finite.
std::int64_t pick(std::span<float> weights, float threshold, double uniform) {
  for (float& weight : weights) weight = weight < threshold ? 0.0F : weight;
  const double total = sum_of(weights);
  if (!(total > 0.0) || !std::isfinite(total)) return -1;
  const double target = uniform * total;
  double sum = 0.0;
  std::int64_t last = -1;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0.0F) continue;
    sum += static_cast<double>(weights[i]);
    last = static_cast<std::int64_t>(i);
    if (sum > target) break;
  }
  return last;
}

// Weights are probabilities up to one factor: the best token of the row has weight 1.
struct Softmax {
  const KernelTable& kernels;
  float best;
  float scale;  // 1 / temperature

  void weigh(std::span<const float> logits, std::span<float> weights) const {
    kernels.exp_shifted(logits.data(), static_cast<std::int64_t>(logits.size()), best, scale,
                        weights.data());
  }
  std::span<float> weigh(std::span<const Candidate> candidates, SampleWorkspace& workspace) const {
    const std::span<float> weights = workspace.ranked_weights(candidates.size());
    for (std::size_t i = 0; i < candidates.size(); ++i) weights[i] = candidates[i].logit;
    weigh(weights, weights);
    return weights;
  }
};

bool has_nan(std::span<const float> logits) {
  bool found = false;
  for (const float logit : logits) found |= std::isnan(logit);
  return found;
}

// top_p, min_p and the draw among sorted candidates.
std::int32_t pick_ranked(const SampleParams& params, std::span<const Candidate> candidates,
                         std::span<float> weights, std::size_t n_kept, double uniform) {
  const std::int64_t index = pick(weights.first(n_kept), params.min_p, uniform);
  return index < 0 ? -1 : candidates[static_cast<std::size_t>(index)].id;
}

std::int32_t draw_top_k(const Softmax& softmax, std::span<const float> logits,
                        const SampleParams& params, double uniform, SampleWorkspace& workspace) {
  const std::span<Candidate> candidates =
      sorted_best(softmax.kernels, logits, static_cast<std::size_t>(params.top_k), workspace);
  const std::span<float> weights = softmax.weigh(candidates, workspace);
  std::size_t n_kept = candidates.size();
  if (params.top_p < 1.0F) {
    const double target = static_cast<double>(params.top_p) * sum_of(weights);
    n_kept = std::min(n_kept, reach_mass(weights, target));
  }
  return pick_ranked(params, candidates, weights, n_kept, uniform);
}

std::int32_t draw_top_p(const Softmax& softmax, std::span<const float> logits,
                        const SampleParams& params, double uniform, SampleWorkspace& workspace) {
  const std::span<float> all = workspace.weights(logits.size());
  softmax.weigh(logits, all);
  const double target = static_cast<double>(params.top_p) * sum_of(all);
  for (std::size_t count = kFirstSorted;; count *= kGrowth) {
    count = std::min(count, logits.size());
    const std::span<Candidate> candidates = sorted_best(softmax.kernels, logits, count, workspace);
    const std::span<float> weights = softmax.weigh(candidates, workspace);
    const std::size_t n_kept = reach_mass(weights, target);
    if (n_kept <= candidates.size() || count == logits.size()) {
      return pick_ranked(params, candidates, weights, std::min(n_kept, candidates.size()), uniform);
    }
  }
}

}  // namespace

std::span<float> SampleWorkspace::logits(std::size_t n) { return grown(logits_, n); }
std::span<float> SampleWorkspace::weights(std::size_t n) { return grown(weights_, n); }
std::span<float> SampleWorkspace::ranked_weights(std::size_t n) {
  return grown(ranked_weights_, n);
}
std::span<float> SampleWorkspace::block_maxima(std::size_t n) { return grown(block_maxima_, n); }
std::span<SampleWorkspace::Candidate> SampleWorkspace::candidates(std::size_t n) {
  return grown(candidates_, n);
}
std::span<std::int32_t> SampleWorkspace::counts(std::size_t n) { return grown(counts_, n); }

double sample_uniform(const SampleKey& key) {
  const PhiloxCounter counter = {key.position, key.choice, static_cast<std::uint32_t>(key.request),
                                 static_cast<std::uint32_t>(key.request >> 32)};
  return philox_uniform(philox4x32_10(
      counter, {static_cast<std::uint32_t>(key.seed), static_cast<std::uint32_t>(key.seed >> 32)}));
}

void apply_penalties(std::span<float> logits, const SampleParams& params,
                     const SampleHistory& history, SampleWorkspace& workspace) {
  const bool repeats = params.repetition_penalty != 1.0F;
  const bool counts_output = params.presence_penalty != 0.0F || params.frequency_penalty != 0.0F;
  if (!repeats && !counts_output) return;

  // counts[id] = 1 + occurrences in the output, so that an id seen at all is marked.
  const std::span<std::int32_t> counts = workspace.counts(logits.size());
  for (const auto& ids : {history.prompt_ids, history.output_ids}) {
    for (const std::int32_t id : ids) {
      if (!valid_id(id, logits) || counts[static_cast<std::size_t>(id)] != 0) continue;
      counts[static_cast<std::size_t>(id)] = 1;
      float& logit = logits[static_cast<std::size_t>(id)];
      if (repeats) logit = repeated(logit, params.repetition_penalty);
    }
  }
  if (counts_output) {
    for (const std::int32_t id : history.output_ids) {
      if (valid_id(id, logits)) ++counts[static_cast<std::size_t>(id)];
    }
  }
  // Each output id is charged where it is met first, which also clears its count.
  for (const auto& ids : {history.output_ids, history.prompt_ids}) {
    for (const std::int32_t id : ids) {
      if (!valid_id(id, logits)) continue;
      std::int32_t& count = counts[static_cast<std::size_t>(id)];
      if (count > 1) {
        logits[static_cast<std::size_t>(id)] -=
            params.presence_penalty + params.frequency_penalty * static_cast<float>(count - 1);
      }
      count = 0;
    }
  }
}

void apply_bias(std::span<float> logits, std::span<const LogitBias> bias) {
  for (const LogitBias& entry : bias) {
    if (valid_id(entry.id, logits)) logits[static_cast<std::size_t>(entry.id)] += entry.bias;
  }
}

void apply_mask(std::span<float> logits, std::span<const std::int32_t> banned_ids) {
  for (const std::int32_t id : banned_ids) {
    if (valid_id(id, logits)) logits[static_cast<std::size_t>(id)] = kMinusInfinity;
  }
}

std::int32_t argmax(const CpuContext& context, std::span<const float> logits) {
  const float best =
      kernels_for(context).max(logits.data(), static_cast<std::int64_t>(logits.size()));
  if (!(best > kMinusInfinity)) return -1;
  const auto found = std::find(logits.begin(), logits.end(), best);
  return static_cast<std::int32_t>(found - logits.begin());
}

std::int32_t draw(const CpuContext& context, std::span<const float> logits,
                  const SampleParams& params, double uniform, SampleWorkspace& workspace) {
  const std::int32_t best_id = argmax(context, logits);
  if (best_id < 0 || has_nan(logits)) return -1;
  const float best = logits[static_cast<std::size_t>(best_id)];
  const float scale = 1.0F / params.temperature;
  // A temperature too small to divide by, and an infinite logit, leave only the best token.
  if (!(params.temperature > 0.0F) || !std::isfinite(scale) || !std::isfinite(best)) {
    return best_id;
  }
  const Softmax softmax{kernels_for(context), best, scale};
  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < logits.size()) {
    return draw_top_k(softmax, logits, params, uniform, workspace);
  }
  if (params.top_p < 1.0F) return draw_top_p(softmax, logits, params, uniform, workspace);
  const std::span<float> weights = workspace.weights(logits.size());
  softmax.weigh(logits, weights);
  return static_cast<std::int32_t>(pick(weights, params.min_p, uniform));
}

std::int32_t sample(const CpuContext& context, std::span<const float> logits,
                    const SampleParams& params, const SampleHistory& history, const SampleKey& key,
                    SampleWorkspace& workspace) {
  const std::span<float> row = workspace.logits(logits.size());
  std::copy(logits.begin(), logits.end(), row.begin());
  apply_penalties(row, params, history, workspace);
  apply_bias(row, history.logit_bias);
  apply_mask(row, history.banned_ids);
  return draw(context, row, params, sample_uniform(key), workspace);
}

float log_sum_exp(const CpuContext& context, std::span<const float> logits) {
  const KernelTable& kernels = kernels_for(context);
  const auto n = static_cast<std::int64_t>(logits.size());
  const float best = kernels.max(logits.data(), n);
  if (!std::isfinite(best)) return best;
  return static_cast<float>(static_cast<double>(best) +
                            std::log(kernels.sum_exp(logits.data(), n, best)));
}

void log_softmax_at(const CpuContext& context, std::span<const float> logits,
                    std::span<const std::int32_t> ids, std::span<TokenLogprob> out) {
  CHECK(ids.size() == out.size(), "one output per id");
  const float total = log_sum_exp(context, logits);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    CHECK(valid_id(ids[i], logits), "token id outside the vocabulary");
    out[i] = {ids[i], logits[static_cast<std::size_t>(ids[i])] - total};
  }
}

std::size_t top_logprobs(const CpuContext& context, std::span<const float> logits,
                         std::span<TokenLogprob> out, SampleWorkspace& workspace) {
  const std::size_t count = std::min(out.size(), logits.size());
  if (count == 0) return 0;
  const float total = log_sum_exp(context, logits);
  const std::span<Candidate> best = sorted_best(kernels_for(context), logits, count, workspace);
  for (std::size_t i = 0; i < best.size(); ++i) out[i] = {best[i].id, best[i].logit - total};
  return best.size();
}

}  // namespace spindle::kernels
