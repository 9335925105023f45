#include "cluster/api/choice_text.h"

#include <algorithm>
#include <utility>

namespace spindle::api {

ChoiceText::ChoiceText(const text::Tokenizer& tokenizer, ChoiceOptions options,
                       std::optional<text::StopStringMatcher> matcher)
    : tokenizer_(&tokenizer),
      options_(std::move(options)),
      detokenizer_(tokenizer, options_.skip_special_tokens),
      matcher_(std::move(matcher)) {}

OutputToken ChoiceText::token_of(std::int32_t id, float logprob) const {
  return {id, std::string(tokenizer_->token_bytes(id)), logprob};
}

void ChoiceText::hold_token(const engine::TokenEvent& event, std::uint64_t begin) {
  PendingToken token{event.token, begin, decoded_bytes_, {}};
  if (options_.logprobs) {
    token.info.chosen = token_of(event.token, event.logprob);
    token.info.top.reserve(event.top.size());
    for (const engine::TokenLogprob& top : event.top) {
      token.info.top.push_back(token_of(top.id, top.logprob));
    }
  }
  pending_.push_back(std::move(token));
}

void ChoiceText::emit(const std::string& text, bool is_last, OutputDelta& delta) {
  const std::size_t before = delta.text.size();
  if (!matcher_) {
    delta.text += text;
  } else if (generated_ < options_.min_tokens) {
    delta.text += text;
  } else {
    auto output = matcher_->push(text);
    delta.text += output.emit;
    matched_stop_ = output.matched;
  }
  if (is_last && matcher_ && !matched_stop_) delta.text += matcher_->finish();
  emitted_bytes_ += delta.text.size() - before;
}

void ChoiceText::finish(engine::FinishReason reason, OutputDelta& delta) {
  finish_ = reason;
  delta.finish = reason;
}

void ChoiceText::release_tokens(OutputDelta& delta) {
  while (!pending_.empty()) {
    PendingToken& token = pending_.front();
    const bool is_out = matched_stop_ ? token.begin < emitted_bytes_ : token.end <= emitted_bytes_;
    if (!is_out) break;
    delta.token_ids.push_back(token.id);
    if (options_.logprobs) delta.logprobs.push_back(std::move(token.info));
    pending_.pop_front();
  }
  if (finished()) pending_.clear();
}

bool ChoiceText::push(const engine::TokenEvent& event, OutputDelta& delta) {
  if (finished()) return false;
  ++generated_;
  const bool is_last = event.finish != engine::FinishReason::kNone;
  const std::uint64_t begin = decoded_bytes_;
  std::string text;
  if (!event.is_stop_token) text = detokenizer_.push(event.token);
  if (is_last) text += detokenizer_.finish();
  decoded_bytes_ += text.size();
  if (!event.is_stop_token) hold_token(event, begin);
  emit(text, is_last, delta);
  if (matched_stop_) {
    delta.stop_reason = options_.stop[*matched_stop_];
    finish(engine::FinishReason::kStop, delta);
  } else if (is_last) {
    const auto& ids = options_.stop_token_ids;
    if (event.is_stop_token && std::find(ids.begin(), ids.end(), event.token) != ids.end()) {
      delta.stop_reason = std::to_string(event.token);
      delta.stopped_by_token = true;
    }
    finish(event.finish, delta);
  }
  release_tokens(delta);
  return matched_stop_.has_value() && !is_last;
}

}  // namespace spindle::api
