#include "worker/stage/token_sampler.h"

#include <algorithm>
#include <utility>

#include "kernels/core/check.h"

namespace spindle::worker {

TokenSampler::Sequence TokenSampler::make_sequence(const control::OpenSequence& open) {
  const control::Sampling& sampling = open.sampling();
  Sequence sequence;
  sequence.params.temperature = sampling.temperature();
  sequence.params.top_k = sampling.top_k();
  sequence.params.top_p = sampling.top_p();
  sequence.params.min_p = sampling.min_p();
  sequence.params.repetition_penalty = sampling.repetition_penalty();
  sequence.params.presence_penalty = sampling.presence_penalty();
  sequence.params.frequency_penalty = sampling.frequency_penalty();
  sequence.key.seed = sampling.seed();
  sequence.key.request = sampling.request();
  sequence.key.choice = static_cast<std::uint32_t>(sampling.choice());
  for (int i = 0; i < sampling.bias_ids_size() && i < sampling.bias_values_size(); ++i) {
    sequence.bias.push_back({sampling.bias_ids(i), sampling.bias_values(i)});
  }
  sequence.banned.assign(sampling.banned_before_min().begin(), sampling.banned_before_min().end());
  sequence.min_tokens = sampling.min_tokens();
  sequence.n_logprobs = sampling.n_logprobs();
  sequence.n_prompt = static_cast<std::size_t>(std::max(0, open.prompt_tokens()));
  sequence.keeps_history = sampling.repetition_penalty() != 1.0F ||
                           sampling.presence_penalty() != 0.0F ||
                           sampling.frequency_penalty() != 0.0F;
  return sequence;
}

void TokenSampler::open(const control::OpenSequence& sequence) {
  sequences_[sequence.sequence()] = make_sequence(sequence);
}

void TokenSampler::fork(std::uint64_t parent, const control::OpenSequence& child) {
  const auto from = sequences_.find(parent);
  CHECK(from != sequences_.end(), "a fork of a sequence that is not open");
  Sequence forked = make_sequence(child);
  forked.n_seen = std::min(forked.n_prompt, from->second.n_seen);
  if (forked.keeps_history) {
    const std::vector<std::int32_t>& seen = from->second.history;
    const std::size_t n = std::min(forked.n_seen, seen.size());
    forked.history.assign(seen.begin(), seen.begin() + static_cast<std::ptrdiff_t>(n));
  }
  sequences_[child.sequence()] = std::move(forked);
}

void TokenSampler::saw(std::uint64_t sequence, std::span<const std::int32_t> tokens) {
  const auto found = sequences_.find(sequence);
  CHECK(found != sequences_.end(), "tokens of a sequence that is not open");
  found->second.n_seen += tokens.size();
  if (found->second.keeps_history) {
    found->second.history.insert(found->second.history.end(), tokens.begin(), tokens.end());
  }
}

SampleRequest TokenSampler::request(std::uint64_t sequence, std::int64_t row) const {
  const auto found = sequences_.find(sequence);
  CHECK(found != sequences_.end(), "a sample of a sequence that is not open");
  return request_of(sequence, found->second, found->second.history, found->second.n_seen, row);
}

SampleRequest TokenSampler::first_request(std::uint64_t parent, const control::OpenSequence& choice,
                                          std::int64_t row) const {
  const auto found = sequences_.find(parent);
  CHECK(found != sequences_.end(), "a choice of a sequence that is not open");
  return request_of(choice.sequence(), make_sequence(choice), found->second.history,
                    found->second.n_seen, row);
}

SampleRequest TokenSampler::request_of(std::uint64_t id, const Sequence& sequence,
                                       std::span<const std::int32_t> history, std::size_t n_seen,
                                       std::int64_t row) {
  SampleRequest request;
  request.sequence = id;
  request.row = row;
  request.params = sequence.params;
  request.key = sequence.key;
  request.key.position = static_cast<std::uint32_t>(n_seen);
  const std::size_t n_prompt = std::min(sequence.n_prompt, history.size());
  request.prompt_ids = history.first(n_prompt);
  request.output_ids = history.subspan(n_prompt);
  request.bias = sequence.bias;
  const std::size_t n_generated = n_seen - std::min(sequence.n_prompt, n_seen);
  if (n_generated < static_cast<std::size_t>(std::max(0, sequence.min_tokens))) {
    request.banned = sequence.banned;
  }
  request.n_logprobs = sequence.n_logprobs;
  return request;
}

control::Sampled TokenSampler::report(const SampleRequest& request, std::int32_t token,
                                      std::span<const float> logits) {
  control::Sampled sampled;
  sampled.set_sequence(request.sequence);
  sampled.set_token(token);
  if (wants_logits(request, token)) add_logprobs(request.n_logprobs, logits, sampled);
  return sampled;
}

void TokenSampler::add_logprobs(std::int32_t n_logprobs, std::span<const float> logits,
                                control::Sampled& sampled) {
  const std::int32_t id = sampled.token();
  kernels::TokenLogprob chosen;
  kernels::log_softmax_at(context_, logits, {&id, 1}, {&chosen, 1});
  sampled.set_logprob(chosen.logprob);
  std::vector<kernels::TokenLogprob> top(
      std::min(static_cast<std::size_t>(n_logprobs), logits.size()));
  kernels::top_logprobs(context_, logits, top, workspace_);
  for (const kernels::TokenLogprob& entry : top) {
    control::TopLogprob& out = *sampled.add_top();
    out.set_id(entry.id);
    out.set_logprob(entry.logprob);
  }
}

void TokenSampler::score(std::span<const float> logits, std::int32_t token, bool dense,
                         control::PromptScore& score) const {
  const float sum = kernels::log_sum_exp(context_, logits);
  const auto best = std::max_element(logits.begin(), logits.end());
  score.set_logprob(logits[static_cast<std::size_t>(token)] - sum);
  score.set_best_id(static_cast<std::int32_t>(best - logits.begin()));
  score.set_best_logprob(*best - sum);
  if (!dense) return;
  score.mutable_dense()->Reserve(static_cast<int>(logits.size()));
  for (const float logit : logits) score.add_dense(logit - sum);
}

}  // namespace spindle::worker
