#include "ops/cli/eval_plan.h"

#include <algorithm>
#include <utility>

namespace spindle::cli {
namespace {

void add_task(EvalItem item, Probe probe, const std::vector<Cell>& cells,
              std::int32_t max_model_len, TaskPlan& plan) {
  // One token is generated, because the server generates at least one.
  if (static_cast<std::int64_t>(probe.tokens.size()) + 1 > max_model_len) {
    ++plan.n_too_long;
    return;
  }
  plan.n_moved += probe.moved ? 1 : 0;
  plan.tasks.push_back({.item = std::move(item), .probe = std::move(probe), .cells = cells});
}

Status add_prose_record(const EvalRecord& record, const std::vector<Cell>& cells,
                        const EvalModel& model, std::int32_t max_model_len, TaskPlan& plan) {
  const Result<TokenizedText> text = tokenize(*model.tokenizer, record.text);
  if (!text.ok()) return text.status();
  const auto n = static_cast<std::int64_t>(text->tokens.size());
  if (n < 2 * kProseScored) {
    return invalid_argument("prose of " + std::to_string(n) + " tokens is too short");
  }
  const std::int64_t prefix = std::min<std::int64_t>(n, max_model_len - 1) - 1 - kProseScored;
  if (prefix < 1) {
    ++plan.n_too_long;
    return ok_status();
  }
  add_task({.key = "prose:" + std::to_string(record.index),
            .regime = Regime::kProse,
            .task = record.task,
            .length = std::to_string(prefix)},
           prose_probe(text->tokens, 0, static_cast<std::int32_t>(prefix), kProseScored), cells,
           max_model_len, plan);
  return ok_status();
}

Status add_record(const EvalRecord& record, const std::vector<Regime>& regimes,
                  const std::vector<Cell>& cells, const EvalModel& model,
                  std::int32_t max_model_len, TaskPlan& plan) {
  if (record.is_prose()) return add_prose_record(record, cells, model, max_model_len, plan);
  const Result<Conversation> conversation = render_conversation(*model.chat_template, record);
  if (!conversation.ok()) return conversation.status();
  const Result<TokenizedText> text = tokenize(*model.tokenizer, conversation->text);
  if (!text.ok()) return text.status();
  for (const Regime regime : regimes) {
    Probe probe =
        regime == Regime::kQa ? qa_probe(*conversation, *text) : qw_probe(*conversation, *text);
    add_task({.key = regime_name(regime) + ":" + std::to_string(record.index),
              .regime = regime,
              .task = record.task,
              .length = length_bucket(record.n_tokens)},
             std::move(probe), cells, max_model_len, plan);
  }
  return ok_status();
}

}  // namespace

Status add_records(const std::vector<EvalRecord>& records, const std::vector<Regime>& regimes,
                   const std::vector<Cell>& cells, const EvalModel& model,
                   std::int32_t max_model_len, TaskPlan& plan) {
  for (const EvalRecord& record : records) {
    if (Status status = add_record(record, regimes, cells, model, max_model_len, plan);
        !status.ok()) {
      return status.with_context("line " + std::to_string(record.index + 1));
    }
  }
  return ok_status();
}

Status add_prose(const std::string& text, const std::vector<std::int32_t>& prefixes,
                 std::size_t max_windows, const std::vector<Cell>& cells, const EvalModel& model,
                 std::int32_t max_model_len, TaskPlan& plan) {
  const Result<TokenizedText> tokenized = tokenize(*model.tokenizer, text);
  if (!tokenized.ok()) return tokenized.status();
  for (const std::int32_t prefix : prefixes) {
    const auto length = static_cast<std::size_t>(prefix + 1 + kProseScored);
    const std::size_t n_windows = std::min(tokenized->tokens.size() / length, max_windows);
    if (n_windows == 0) {
      return invalid_argument("the prose has only " + std::to_string(tokenized->tokens.size()) +
                              " tokens, a window needs " + std::to_string(length));
    }
    if (static_cast<std::int64_t>(length) + 1 > max_model_len) {
      return invalid_argument("a prefix of " + std::to_string(prefix) +
                              " tokens does not fit into the server's context of " +
                              std::to_string(max_model_len));
    }
    for (std::size_t window = 0; window < n_windows; ++window) {
      add_task({.key = "prose-" + std::to_string(prefix) + ":" + std::to_string(window),
                .regime = Regime::kProse,
                .task = "prose",
                .length = std::to_string(prefix)},
               prose_probe(tokenized->tokens, window * length, prefix, kProseScored), cells,
               max_model_len, plan);
    }
  }
  return ok_status();
}

}  // namespace spindle::cli
