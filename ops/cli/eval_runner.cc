#include "ops/cli/eval_runner.h"

#include <algorithm>
#include <utility>

namespace spindle::cli {
namespace {

using Scores = std::vector<api::v1::PromptScore>;

void add_tokens(const Probe& probe, std::int32_t end, api::v1::GenerateRequest& request) {
  request.mutable_tokens()->mutable_ids()->Assign(probe.tokens.begin(), probe.tokens.begin() + end);
  request.mutable_sampling()->set_max_tokens(1);
  request.mutable_sampling()->set_temperature(0);
}

class ProbeRun {
 public:
  ProbeRun(const Probe& probe, const RunnerOptions& options, const Ask& ask)
      : probe_(probe),
        options_(options),
        ask_(ask),
        parts_(split_answers(probe.answers, options.max_scores)) {}

  Status prefill() {
    if (options_.session.empty()) return ok_status();
    return ask_(prefill_request(probe_, options_.session)).status;
  }

  // Fills `result`; its scores replace the reference when there is none yet.
  Status measure(const Cell& cell, CellResult& result) {
    const bool is_reference = full_.empty();
    for (std::size_t part = 0; part < parts_.size(); ++part) {
      const std::vector<TokenSpan>& answers = parts_[part];
      api::GenerateOutcome outcome = ask_(cell_request(probe_, answers, cell, options_.session));
      const auto is_lost = [&] {
        return !options_.session.empty() && outcome.status.code() == StatusCode::kNotFound;
      };
      if (is_lost()) {
        // The server gave the session's memory to somebody else.
        if (Status status = prefill(); !status.ok()) return status;
        outcome = ask_(cell_request(probe_, answers, cell, options_.session));
      }
      // And again: it has no room for sessions beside so many requests.
      if (is_lost()) outcome = ask_(cell_request(probe_, answers, cell, ""));
      if (const auto refusal = policy_refusal(outcome)) {
        result = {};
        result.refused = *refusal;
        return ok_status();
      }
      if (!outcome.status.ok()) return outcome.status;
      if (Status status = check_scores(answers, outcome.prompt_scores); !status.ok()) {
        return status;
      }
      if (part == 0) take_boundary(outcome.usage, probe_.cut, result);
      if (part == 0) take_entries(outcome.usage, cell, result);
      if (is_reference) {
        full_.push_back(std::move(outcome.prompt_scores));
        score_answers(probe_, answers, full_.back(), full_.back(), result);
        continue;
      }
      const Scores& full = full_[part];
      if (full[0].dense_size() != outcome.prompt_scores[0].dense_size()) {
        return internal_error("the server's vocabulary changed from one request to the next");
      }
      score_answers(probe_, answers, outcome.prompt_scores, full, result);
    }
    return ok_status();
  }

 private:
  void take_entries(const api::v1::Usage& usage, const Cell& cell, CellResult& result) const {
    if (cell.policy.overrides_size() != 1) return;
    const api::v1::KvOverride& changed = cell.policy.overrides(0);
    for (const api::v1::KvBoundary& boundary : usage.boundaries()) {
      for (const api::v1::KvHeadKept& head : boundary.heads()) {
        if (boundary.position() == probe_.cut && head.layer() == changed.first_layer() &&
            head.kv_head() == changed.kv_head()) {
          result.k_entries = head.k_entries_per_token();
          result.v_entries = head.v_entries_per_token();
        }
      }
    }
  }

  const Probe& probe_;
  const RunnerOptions& options_;
  const Ask& ask_;
  const std::vector<std::vector<TokenSpan>> parts_;
  std::vector<Scores> full_;  // of each part
};

}  // namespace

api::v1::GenerateRequest prefill_request(const Probe& probe, const std::string& session) {
  api::v1::GenerateRequest request;
  add_tokens(probe, probe.cut, request);
  *request.mutable_kv_policy() = full_cell().policy;
  request.set_session_id(session);
  request.set_keep_session(true);
  return request;
}

api::v1::GenerateRequest cell_request(const Probe& probe, const std::vector<TokenSpan>& answers,
                                      const Cell& cell, const std::string& session) {
  api::v1::GenerateRequest request;
  add_tokens(probe, answers.back().end, request);
  if (!cell.policy.profile().empty()) *request.mutable_kv_policy() = cell.policy;
  request.add_compress_at(probe.cut);
  request.set_session_id(session);
  request.mutable_prompt_scores()->set_first(answers.front().first);
  request.mutable_prompt_scores()->set_end(answers.back().end);
  request.mutable_prompt_scores()->set_dense(true);
  return request;
}

std::optional<std::string> policy_refusal(const api::GenerateOutcome& outcome) {
  // A budget that cannot be met may be found out at the boundary itself, where no field has a name.
  const bool of_policy = outcome.param.empty() || outcome.param.starts_with("kv_policy");
  if (outcome.status.code() != StatusCode::kInvalidArgument || !of_policy) return std::nullopt;
  return outcome.status.message();
}

Status run_probe(const Probe& probe, std::span<const Cell> cells, const RunnerOptions& options,
                 const Ask& ask, const TakeResult& take) {
  if (probe.answers.empty() || cells.empty()) return ok_status();
  ProbeRun run(probe, options, ask);
  if (Status status = run.prefill(); !status.ok()) return status;
  const Cell full = full_cell();
  CellResult reference;
  if (Status status = run.measure(full, reference); !status.ok()) return status;
  if (!reference.refused.empty()) {
    return invalid_argument("the server refuses the uncompressed reference: " + reference.refused);
  }
  for (const Cell& cell : cells) {
    CellResult result;
    if (cell == full) {
      result = reference;
    } else if (Status status = run.measure(cell, result); !status.ok()) {
      return status;
    }
    if (Status status = take(cell, result); !status.ok()) return status;
  }
  return ok_status();
}

}  // namespace spindle::cli
