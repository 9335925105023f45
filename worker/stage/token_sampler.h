#pragma once
// What the last stage draws tokens from. It remembers, for every open sequence, how it samples and
// the tokens it has seen, which the penalties need; the stage itself draws.

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "kernels/core/cpu_context.h"
#include "kernels/sample.h"
#include "proto/control.pb.h"
#include "worker/stage/stage.h"

namespace spindle::worker {

// Thread-safety: none; the last stage's thread owns it.
class TokenSampler {
 public:
  explicit TokenSampler(const CpuContext& context) : context_(context) {}

  void open(const control::OpenSequence& sequence);
  // `child` has seen what `parent` saw of the prompt.
  void fork(std::uint64_t parent, const control::OpenSequence& child);
  void free(std::uint64_t sequence) { sequences_.erase(sequence); }

  // Tokens that the stages ran for an open sequence, in order.
  void saw(std::uint64_t sequence, std::span<const std::int32_t> tokens);

  // What the next token of an open sequence is drawn from, given all it has seen, and row `row` of
  // the step's logits. Borrows the history until the sequence changes.
  SampleRequest request(std::uint64_t sequence, std::int64_t row) const;
  // The first token of a choice that is not forked yet: as its parent's prompt, its own parameters.
  SampleRequest first_request(std::uint64_t parent, const control::OpenSequence& choice,
                              std::int64_t row) const;
  // The report of a drawn token; -1: the logits had no finite probability. `logits` is the raw row,
  // needed when log-probabilities are wanted.
  control::Sampled report(const SampleRequest& request, std::int32_t token,
                          std::span<const float> logits);
  static bool wants_logits(const SampleRequest& request, std::int32_t token) {
    return token >= 0 && request.n_logprobs >= 0;
  }

  // Log-probability of `token` and of the most likely token, from the raw logits; with `dense` of
  // every token.
  void score(std::span<const float> logits, std::int32_t token, bool dense,
             control::PromptScore& score) const;

 private:
  struct Sequence {
    kernels::SampleParams params;
    kernels::SampleKey key;  // position is filled in for each draw
    std::vector<kernels::LogitBias> bias;
    std::vector<std::int32_t> banned;
    std::int32_t min_tokens = 0;
    std::int32_t n_logprobs = -1;
    std::size_t n_prompt = 0;
    bool keeps_history = false;  // a penalty is on
    std::size_t n_seen = 0;
    std::vector<std::int32_t> history;  // every token seen, when kept
  };

  static Sequence make_sequence(const control::OpenSequence& open);
  static SampleRequest request_of(std::uint64_t id, const Sequence& sequence,
                                  std::span<const std::int32_t> history, std::size_t n_seen,
                                  std::int64_t row);
  void add_logprobs(std::int32_t n_logprobs, std::span<const float> logits,
                    control::Sampled& sampled);

  const CpuContext& context_;
  std::unordered_map<std::uint64_t, Sequence> sequences_;
  kernels::SampleWorkspace workspace_;
};

}  // namespace spindle::worker
