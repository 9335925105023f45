#include "ops/cli/eval_probe.h"

#include <algorithm>
#include <boost/json.hpp>
#include <utility>

#include "kernels/core/check.h"

namespace spindle::cli {
namespace {

Result<std::string> render(const text::ModelChatTemplate& chat_template, const EvalRecord& record,
                           std::size_t n_messages, bool generation_prompt) {
  boost::json::array messages;
  for (std::size_t i = 0; i < n_messages; ++i) {
    messages.push_back(boost::json::object{{"role", record.messages[i].role},
                                           {"content", record.messages[i].content}});
  }
  return chat_template.render(
      {{"messages", std::move(messages)}, {"add_generation_prompt", generation_prompt}});
}

// The last token that begins at or before the byte.
std::int32_t token_at(const TokenizedText& text, std::size_t byte, bool& moved) {
  const auto after = std::upper_bound(text.begins.begin(), text.begins.end(), byte);
  CHECK(after != text.begins.begin(), "tokens begin at byte 0");
  const auto at = after - 1;
  moved = moved || *at != byte;
  return static_cast<std::int32_t>(at - text.begins.begin());
}

TokenSpan answer_span(const TokenizedText& text, const Conversation::Answer& answer, bool& moved) {
  TokenSpan span{.first = token_at(text, answer.first, moved),
                 .end = token_at(text, answer.end, moved)};
  // The end-of-turn token is part of a right answer.
  span.end = std::min(span.end + 1, static_cast<std::int32_t>(text.tokens.size()));
  return span;
}

}  // namespace

Result<Conversation> render_conversation(const text::ModelChatTemplate& chat_template,
                                         const EvalRecord& record) {
  const Status unsuitable = invalid_argument(
      "the chat template does not render a conversation as its beginning continued");
  Result<std::string> whole =
      render(chat_template, record, record.messages.size(), /*generation_prompt=*/false);
  if (!whole.ok()) return whole.status();
  Conversation conversation;
  for (std::size_t turn = 0; turn < record.messages.size(); turn += 2) {
    const Result<std::string> before =
        render(chat_template, record, turn + 1, /*generation_prompt=*/true);
    if (!before.ok()) return before.status();
    const std::string& answer = record.messages[turn + 1].content;
    if (!whole->starts_with(*before) ||
        whole->compare(before->size(), answer.size(), answer) != 0) {
      return unsuitable;
    }
    conversation.answers.push_back({before->size(), before->size() + answer.size()});
  }
  const std::size_t document = whole->find(record.messages[0].content);
  if (document == std::string::npos || document > conversation.answers[0].first) return unsuitable;
  conversation.document_end = document + record.document_bytes;
  conversation.text = *std::move(whole);
  return conversation;
}

Result<TokenizedText> tokenize(const text::Tokenizer& tokenizer, const std::string& text) {
  Result<std::vector<std::int32_t>> tokens =
      tokenizer.encode(text, {.add_special_tokens = false, .parse_special = true});
  if (!tokens.ok()) return tokens.status();
  TokenizedText out;
  std::size_t begin = 0;
  for (const std::int32_t id : *tokens) {
    const std::string_view bytes = tokenizer.token_bytes(id);
    if (text.compare(begin, bytes.size(), bytes) != 0) {
      return invalid_argument("the tokenizer changes the text, so positions in it have no tokens");
    }
    out.begins.push_back(begin);
    begin += bytes.size();
  }
  if (begin != text.size()) {
    return invalid_argument("the tokenizer leaves out a part of the text");
  }
  out.begins.push_back(begin);
  out.tokens = *std::move(tokens);
  return out;
}

Probe qa_probe(const Conversation& conversation, const TokenizedText& text) {
  Probe probe;
  probe.cut = token_at(text, conversation.document_end, probe.moved);
  for (const Conversation::Answer& answer : conversation.answers) {
    probe.answers.push_back(answer_span(text, answer, probe.moved));
  }
  probe.tokens.assign(text.tokens.begin(), text.tokens.begin() + probe.answers.back().end);
  return probe;
}

Probe qw_probe(const Conversation& conversation, const TokenizedText& text) {
  Probe probe;
  TokenSpan answer = answer_span(text, conversation.answers[0], probe.moved);
  probe.cut = answer.first;
  answer.first += 1;
  if (answer.first < answer.end) probe.answers.push_back(answer);
  probe.tokens.assign(text.tokens.begin(), text.tokens.begin() + answer.end);
  return probe;
}

Probe prose_probe(const std::vector<std::int32_t>& tokens, std::size_t first, std::int32_t prefix,
                  std::int32_t n_scored) {
  const auto n = static_cast<std::size_t>(prefix + 1 + n_scored);
  CHECK(first + n <= tokens.size(), "a window beyond the text");
  Probe probe;
  const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(first);
  probe.tokens.assign(begin, begin + static_cast<std::ptrdiff_t>(n));
  probe.cut = prefix;
  probe.answers = {{.first = prefix + 1, .end = prefix + 1 + n_scored}};
  return probe;
}

std::vector<std::vector<TokenSpan>> split_answers(const std::vector<TokenSpan>& answers,
                                                  std::int32_t max_scores) {
  std::vector<std::vector<TokenSpan>> parts;
  for (const TokenSpan& answer : answers) {
    if (parts.empty() || answer.end - parts.back().front().first > max_scores) {
      parts.emplace_back();
    }
    parts.back().push_back(answer);
  }
  return parts;
}

}  // namespace spindle::cli
