// Levels of KV by stage, as the balancer decides them. The rest of the class is in scheduler.cc.

#include <algorithm>
#include <cmath>
#include <utility>

#include "cluster/coordinator/scheduler.h"
#include "cluster/coordinator/scheduler_state.h"

namespace spindle::coordinator {
namespace {

// A size that a request asked for is not the balancer's to change.
bool is_balanced(const kvstore::KvPolicy& policy) {
  return policy.profile != kvstore::KvProfile::kFull &&
         (policy.best_effort || (policy.ratio == 0 && policy.max_bytes == 0));
}

}  // namespace

void Scheduler::set_balancer(BudgetBalancer balancer, kvstore::LevelLadder ladder) {
  balancer_.emplace(std::move(balancer));
  ladder_ = std::move(ladder);
  levels_.assign(ledger_.stages().size(), ladder_.own);
}

// Boundaries that are planned from here on are carried out by this plan or a later one.
void Scheduler::plan_budget(control::StepPlan& plan) {
  if (!balancer_) return;
  if (budget_plan_.epoch > budget_epoch_ && plan.step() >= budget_plan_.effective_step) {
    budget_epoch_ = budget_plan_.epoch;
    for (std::size_t s = 0; s < levels_.size(); ++s) levels_[s] = budget_plan_.levels[s];
  }
  plan.set_budget_epoch(budget_epoch_);
  if (report_outstanding_ || plan.step() < next_report_step_) return;
  plan.set_report_budget(true);
}

void Scheduler::add_budget(engine::EngineStats& stats) const {
  stats.stages.reserve(ledger_.stages().size());
  for (std::size_t s = 0; s < ledger_.stages().size(); ++s) {
    engine::StageState& stage = stats.stages.emplace_back();
    stage.stage = static_cast<std::int32_t>(s);
    stage.kv_committed_bytes =
        static_cast<std::uint64_t>(ledger_.committed_pages(s)) * ledger_.shape().page_bytes();
    stage.kv_budget_bytes =
        static_cast<std::uint64_t>(ledger_.stages()[s].n_pages) * ledger_.shape().page_bytes();
    if (!balancer_) continue;
    if (const double planned = balancer_->planned_bytes()[s]; planned > 0) {
      stage.kv_budget_bytes = static_cast<std::uint64_t>(planned);
    }
    stage.kv_level_ratio = ladder_.ratios[levels_[s]];
    stage.kv_price = balancer_->prices()[s];
  }
  stats.balances = balancer_.has_value();
  if (!balancer_) return;
  stats.budget_plans = budget_plan_.epoch;
  stats.wanted_requests = balancer_->wanted_requests();
  stats.fitting_requests = balancer_->fitting_requests();
}

// Levels reach the requests whose sizes they decide; what others and sessions hold is fixed.
BalancerInput Scheduler::balancer_input(std::int64_t now_us, std::vector<LedgerUse>& ledger) const {
  const std::uint64_t page = ledger_.shape().page_bytes();
  const std::vector<std::int64_t> kept_free = headroom();
  for (std::size_t s = 0; s < ledger_.stages().size(); ++s) {
    ledger.push_back(
        {.committed_bytes = static_cast<std::uint64_t>(ledger_.committed_pages(s)) * page,
         .capacity_bytes = static_cast<std::uint64_t>(ledger_.stages()[s].n_pages) * page,
         .headroom_bytes = static_cast<std::uint64_t>(kept_free[s]) * page});
  }
  const auto add_fixed = [&](const std::vector<std::int64_t>& pages) {
    for (std::size_t s = 0; s < pages.size(); ++s) {
      ledger[s].fixed_bytes += static_cast<std::uint64_t>(pages[s]) * page;
    }
  };
  for (const auto& [id, session] : sessions_) add_fixed(ledger_.kept_pages(session.sequence));
  BalancerInput input;
  input.now_us = now_us;
  input.next_step = next_step_;
  double tokens = 0;
  std::vector<std::int64_t> extra(ledger.size());
  std::int64_t n_compressed = 0;
  for (const auto& [handle, request] : requests_) {
    if (request->choices_left == 0) continue;
    if (!is_balanced(request->request.kv_policy)) {
      if (request->admitted) add_fixed(ledger_.pages_of(handle));
      continue;
    }
    ++(request->admitted ? input.n_running : input.n_waiting);
    const auto n_prompt = static_cast<double>(request->n_before_output());
    tokens += n_prompt;
    input.peak_tokens =
        std::max(input.peak_tokens, static_cast<double>(request->first_demand().max_tokens));
    if (!request->admitted) continue;
    const std::vector<std::int64_t> pages = ledger_.pages_of(handle);
    if (request->prompt_pages.empty()) {
      ++input.n_prefilling;
      for (std::size_t s = 0; s < pages.size(); ++s) {
        ledger[s].prefill_bytes += static_cast<std::uint64_t>(pages[s]) * page;
      }
      continue;
    }
    if (request->page_reports_pending > 0) continue;
    for (std::size_t s = 0; s < extra.size(); ++s) extra[s] += pages[s] - request->prompt_pages[s];
    ++n_compressed;
  }
  const int n_requests = input.n_running + input.n_waiting;
  if (n_requests > 0) input.mean_tokens = tokens / n_requests;
  for (std::size_t s = 0; s < extra.size() && n_compressed > 0; ++s) {
    ledger[s].extra_bytes =
        static_cast<std::uint64_t>(std::max<std::int64_t>(extra[s], 0) / n_compressed) * page;
  }
  return input;
}

Result<std::optional<BudgetDecision>> Scheduler::balance(std::span<const BudgetReport> reports,
                                                         std::int64_t now_us) {
  report_outstanding_ = false;
  next_report_step_ = next_step_ + static_cast<std::uint64_t>(config_.budget_report_steps);
  if (!balancer_) return std::optional<BudgetDecision>();
  std::vector<LedgerUse> ledger;
  BalancerInput input = balancer_input(now_us, ledger);
  input.reports = reports;
  input.ledger = ledger;
  auto decision = balancer_->decide(input);
  if (decision.ok() && decision->has_value()) budget_plan_ = (*decision)->plan;
  return decision;
}

// At a boundary of n_tokens that is not planned yet; only ever stronger than at the one before.
Result<std::vector<kvstore::LayerRatio>> Scheduler::levels_of(Request& request,
                                                              std::int32_t n_tokens) const {
  std::vector<kvstore::LayerRatio> ranges;
  const kvstore::KvPolicy& policy = request.request.kv_policy;
  if (!balancer_ || !is_balanced(policy)) return ranges;
  const std::size_t boundary = request.reported.size() - 1;
  if (boundary == request.boundary_levels.size()) {
    std::vector<std::size_t> levels = levels_;
    if (boundary > 0) {
      const std::vector<std::size_t>& before = request.boundary_levels.back();
      for (std::size_t s = 0; s < levels.size(); ++s) levels[s] = std::max(levels[s], before[s]);
    }
    request.boundary_levels.push_back(std::move(levels));
  }
  const std::vector<std::size_t>& levels = request.boundary_levels[boundary];
  const bool own = std::all_of(levels.begin(), levels.end(),
                               [this](std::size_t level) { return level == ladder_.own; });
  if (own) return ranges;
  for (std::size_t s = 0; s < levels.size(); ++s) {
    const auto ratio = kvstore::level_ratio(ladder_, levels[s], policy, config_.kv_model,
                                            config_.profile_table.get(), n_tokens);
    if (!ratio.ok()) return ratio.status();
    ranges.push_back({first_layer(s), ledger_.stages()[s].n_layers, *ratio});
  }
  return ranges;
}

// By the curves, not by the request's own plan: what the two differ by is then in what stages keep
// of it, and in the projections of the balancer, which are by the curves too.
void Scheduler::add_planned_bytes(const Request& request, std::int64_t n_tokens,
                                  control::Compress& order) const {
  if (!balancer_ || !is_balanced(request.request.kv_policy)) return;
  const std::vector<std::size_t>& levels = request.boundary_levels.front();
  for (std::size_t s = 0; s < levels.size(); ++s) {
    order.add_planned_bytes(static_cast<std::uint64_t>(std::llround(
        balancer_->request_bytes(s, static_cast<int>(levels[s]), static_cast<double>(n_tokens)))));
  }
}

}  // namespace spindle::coordinator
