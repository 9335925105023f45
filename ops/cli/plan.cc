#include "ops/cli/plan.h"

#include <algorithm>
#include <iostream>

#include "cluster/coordinator/sizing_search.h"
#include "ops/cli/exit_codes.h"
#include "ops/cli/output.h"

namespace spindle::cli {
namespace {

// `question` outlives it.
coordinator::RequestKind kind_of(const PlanQuestion& question) {
  coordinator::RequestKind kind = question.kind;
  kind.table = question.table ? &*question.table : nullptr;
  return kind;
}

bool compresses(const kvstore::KvPolicy& policy) {
  return policy.profile != kvstore::KvProfile::kFull || !policy.overrides.empty();
}

int report_impossible(const PlanOptions& options, const PlanQuestion& question,
                      const Status& status) {
  const PlanRemedies remedies = find_remedies(question, 0);
  if (options.json) {
    boost::json::object object{{"error", status.message()},
                               {"would_start", remedies_json(remedies)}};
    std::cout << boost::json::serialize(object) << "\n" << std::flush;
  } else {
    print_error(status.message());
    std::cerr << (remedies.none() ? "no single change of those that were tried lets it start\n"
                                  : "any one of these lets it start:\n")
              << remedies_text(question, remedies) << std::flush;
  }
  return kExitRequestFailed;
}

}  // namespace

Result<PlanAnswer> answer_plan(const PlanQuestion& question,
                               std::optional<std::int64_t> concurrency) {
  auto cluster = coordinator::size_cluster(question.cluster);
  if (!cluster.ok()) return cluster.status();
  const coordinator::RequestKind kind = kind_of(question);
  auto requests = coordinator::size_requests(question.cluster, *cluster, kind);
  if (!requests.ok()) return requests.status();
  PlanAnswer answer;
  answer.cluster = std::move(*cluster);
  answer.requests = std::move(*requests);
  if (compresses(kind.policy)) {
    coordinator::RequestKind full = kind;
    full.policy = {};
    full.table = nullptr;
    auto sized = coordinator::size_requests(question.cluster, answer.cluster, full);
    if (!sized.ok()) return sized.status();
    answer.full = std::move(*sized);
  }
  if (concurrency && answer.requests.concurrency < *concurrency) {
    const std::vector<std::int64_t>& fitting = answer.requests.fitting;
    answer.remedies = PlanRemedies{};
    if (*std::min_element(fitting.begin(), fitting.end()) < *concurrency) {
      answer.remedies = find_remedies(question, *concurrency);
    }
    if (question.cluster.settings.max_num_seqs < *concurrency) {
      answer.remedies->max_num_seqs = *concurrency;
    }
  }
  return answer;
}

PlanRemedies find_remedies(const PlanQuestion& question, std::int64_t n) {
  const coordinator::RequestKind kind = kind_of(question);
  PlanRemedies remedies;
  remedies.device_memory = coordinator::least_memory(question.cluster, kind, n);
  remedies.n_devices = coordinator::least_devices(question.cluster, kind, n);
  remedies.max_model_len = coordinator::longest_max_model_len(question.cluster, kind, n);
  if (n > 0 && compresses(kind.policy)) {
    remedies.ratio = coordinator::largest_ratio(question.cluster, kind, n);
  }
  return remedies;
}

int run_plan(const PlanOptions& options) {
  const auto question = read_plan_question(options);
  if (!question.ok()) return report_usage_error(question.status());
  const auto answer = answer_plan(*question, options.concurrency);
  if (!answer.ok()) {
    if (answer.status().code() != StatusCode::kResourceExhausted) {
      return report_usage_error(answer.status());
    }
    return report_impossible(options, *question, answer.status());
  }
  if (options.json) {
    std::cout << boost::json::serialize(plan_json(*question, *answer, options.concurrency)) << "\n";
  } else {
    std::cout << plan_text(*question, *answer, options.concurrency);
  }
  std::cout.flush();
  return answer->remedies ? kExitRequestFailed : kExitOk;
}

}  // namespace spindle::cli
