#pragma once
// The text of one choice, token by token.

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "cluster/api/completion.h"
#include "cluster/engine/engine.h"
#include "cluster/text/detokenizer.h"
#include "cluster/text/stop_strings.h"
#include "cluster/text/tokenizer.h"

namespace spindle::api {

struct ChoiceOptions {
  bool skip_special_tokens = true;
  bool logprobs = false;
  std::int32_t min_tokens = 0;  // stop strings do not count before
  std::vector<std::string> stop;
  bool include_stop = false;
  std::vector<std::int32_t> stop_token_ids;  // the request's own
};

// Detokenises, looks for stop strings, and keeps ids and log-probabilities in step with the text: a
// token is given out once all its characters are, and tokens behind a stop string never are.
//
// Thread-safety: none. Invariants: text given out is valid UTF-8; nothing is given out after the
// choice has finished.
class ChoiceText {
 public:
  // `matcher`: of options.stop, empty when there are none.
  ChoiceText(const text::Tokenizer& tokenizer, ChoiceOptions options,
             std::optional<text::StopStringMatcher> matcher);

  // Appends what this event brings to `delta`. Returns true when a stop string ended the choice
  // although the engine goes on, so that the engine must be told.
  bool push(const engine::TokenEvent& event, OutputDelta& delta);

  bool finished() const { return finish_ != engine::FinishReason::kNone; }
  engine::FinishReason finish_reason() const { return finish_; }
  std::int32_t generated_tokens() const { return generated_; }

 private:
  struct PendingToken {
    std::int32_t id;
    std::uint64_t begin;  // of its text, in decoded bytes
    std::uint64_t end;
    OutputTokenInfo info;
  };

  void hold_token(const engine::TokenEvent& event, std::uint64_t begin);
  // Appends text that has passed the detokenizer, as far as it cannot be part of a stop string.
  void emit(const std::string& text, bool is_last, OutputDelta& delta);
  void finish(engine::FinishReason reason, OutputDelta& delta);
  void release_tokens(OutputDelta& delta);
  OutputToken token_of(std::int32_t id, float logprob) const;

  const text::Tokenizer* tokenizer_;
  ChoiceOptions options_;
  text::IncrementalDetokenizer detokenizer_;
  std::optional<text::StopStringMatcher> matcher_;
  std::deque<PendingToken> pending_;
  std::uint64_t decoded_bytes_ = 0;
  std::uint64_t emitted_bytes_ = 0;
  std::int32_t generated_ = 0;
  std::optional<std::size_t> matched_stop_;
  engine::FinishReason finish_ = engine::FinishReason::kNone;
};

}  // namespace spindle::api
