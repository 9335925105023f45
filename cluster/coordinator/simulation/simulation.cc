#include "cluster/coordinator/simulation/simulation.h"

#include <algorithm>
#include <utility>

namespace spindle::coordinator::simulation {
namespace {

std::int64_t n_tokens_of(const control::StepPlan& plan) {
  std::int64_t n = 0;
  for (const control::Run& run : plan.runs()) n += run.tokens_size();
  return n;
}

// Tokens of steps that are on their way, or ready to be, when a request arrives.
std::int64_t slack_tokens(const SchedulerConfig& config) {
  return std::int64_t{config.max_num_batched_tokens} * (config.max_in_flight + 1);
}

}  // namespace

Simulation::Simulation(SimulationConfig config)
    : config_(std::move(config)),
      random_(mix(config_.seed) ^ 0x51ed2701ULL),
      scheduler_(config_.scheduler, KvLedger(config_.shape, config_.stages)),
      book_(config_.scheduler, config_.tokens),
      fair_share_(slack_tokens(config_.scheduler), config_.first_priority) {
  if (config_.balance) {
    scheduler_.set_balancer(config_.balance->balancer, config_.balance->ladder);
  }
  int first_layer = 0;
  for (std::size_t s = 0; s < config_.stages.size(); ++s) {
    SimulatedStageConfig stage;
    stage.stage = static_cast<int>(s);
    stage.is_last = s + 1 == config_.stages.size();
    stage.kv = {.shape = config_.shape,
                .model = config_.scheduler.kv_model,
                .first_layer = first_layer,
                .n_layers = config_.stages[s].n_layers,
                .n_pages = config_.stages[s].n_pages};
    stage.tokens = config_.tokens;
    stage.faults = &config_.faults;
    stages_.emplace_back(stage);
    first_layer += config_.stages[s].n_layers;
  }
  metrics_.stages.resize(stages_.size());
}

void Simulation::violate(const std::string& what) {
  if (!violation_.empty()) return;
  violation_ = "at " + std::to_string(clock_.now_us()) + " us: " + what;
  say("VIOLATION " + what);
}

void Simulation::say(const std::string& what) {
  if (config_.trace != nullptr) *config_.trace << clock_.now_us() << " us  " << what << "\n";
}

std::int64_t Simulation::delay(double us) {
  return static_cast<std::int64_t>(us * random_.between_real(1.0, 1.0 + config_.link.jitter));
}

std::int64_t Simulation::control_delay() {
  const bool is_late = config_.link.late_one_in > 0 && random_.one_in(config_.link.late_one_in);
  return delay(config_.link.control + (is_late ? config_.link.late_us : 0));
}

Result<engine::RequestHandle> Simulation::submit(engine::EngineRequest request) {
  if (has_failed_) return unavailable("the engine has stopped");
  const int n_waiting = scheduler_.counters().waiting;
  const int n_places = std::max(config_.scheduler.max_num_seqs - scheduler_.running_sequences(), 0);
  const auto handle = scheduler_.submit(request, clock_.now_us());
  if (!handle.ok()) {
    if (handle.status().code() == StatusCode::kInternal) require(handle.status());
    say("a request is refused: " + handle.status().to_string());
    return handle;
  }
  if (n_waiting >= config_.scheduler.max_num_queued_reqs + n_places) {
    violate("a request is taken where " + std::to_string(n_waiting) + " wait");
  }
  const Life& life = book_.accept(*handle, std::move(request), clock_.now_us());
  fair_share_.arrive(*handle, life.request, book_.work(life), clock_.now_us());
  say("request " + std::to_string(*handle) + ": prompt of " +
      std::to_string(life.request.prompt_ids.size()) + ", at most " +
      std::to_string(life.max_generated) + " more, " + std::to_string(life.choices.size()) +
      " choices");
  pump();
  return handle;
}

void Simulation::cancel(engine::RequestHandle handle) {
  if (has_failed_) return;
  say("cancel request " + std::to_string(handle));
  book_.cancel(handle);
  scheduler_.cancel(handle, clock_.now_us());
  pump();
}

void Simulation::finish_choice(engine::RequestHandle handle, std::int32_t choice) {
  if (has_failed_) return;
  say("finish choice " + std::to_string(choice) + " of request " + std::to_string(handle));
  take_events();  // what was sampled before
  book_.finish_choice(handle, choice);
  scheduler_.finish_choice(handle, choice, clock_.now_us());
  pump();
}

void Simulation::start_draining() {
  say("drain");
  scheduler_.start_draining();
}

void Simulation::end_all(const Status& status) {
  if (has_failed_) return;
  say("end all: " + status.to_string());
  book_.expect_failure(status.code());
  scheduler_.fail_all(status, clock_.now_us());
  pump();
}

void Simulation::stop_stage(std::size_t stage) {
  say("stage " + std::to_string(stage) + " stops");
  stages_[stage].is_stopped = true;
  may_fail_ = true;
}

void Simulation::fail_stage(std::size_t stage) {
  say("stage " + std::to_string(stage) + " will fail");
  stages_[stage].fails_next = true;
  may_fail_ = true;
}

void Simulation::run() {
  while (violation_.empty() && clock_.step()) {
  }
  if (!violation_.empty()) return;
  if (!has_failed_) {
    // Sessions expire.
    clock_.after(config_.scheduler.session_ttl_us + 1, [this] { pump(); });
    while (violation_.empty() && clock_.step()) {
    }
  }
  if (violation_.empty()) check_nothing_left();
}

void Simulation::check_nothing_left() {
  require(book_.check_all_ended());
  if (has_failed_) return;
  if (!scheduler_.idle()) violate("requests starve: nothing more happens");
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    const PageBook& pages = stages_[s].stage.kv().book();
    if (pages.n_used() != 0 || pages.n_reserved() != 0 ||
        scheduler_.ledger().committed_pages(s) != 0) {
      violate("stage " + std::to_string(s) + " is left with " + std::to_string(pages.n_used()) +
              " used pages, " + std::to_string(pages.n_reserved()) + " reserved and " +
              std::to_string(scheduler_.ledger().committed_pages(s)) + " in the ledger");
    }
  }
}

// What the engine's thread does when it wakes: sends what can be sent, hands out what came.
void Simulation::pump() {
  if (has_failed_ || !violation_.empty()) return;
  if (pumps_) {  // an ended request submits the next one
    pumps_again_ = true;
    return;
  }
  pumps_ = true;
  do {
    pumps_again_ = false;
    take_events();
    while (violation_.empty()) {
      const std::int64_t begin = real_ns();
      auto plan = scheduler_.next_step(clock_.now_us());
      const std::int64_t ns = real_ns() - begin;
      if (plan) count_decision(plan->step(), ns);
      take_events();
      if (!plan) break;
      send(*std::move(plan));
    }
  } while (pumps_again_ && violation_.empty());
  pumps_ = false;
  count_time();
  check_rank0();
}

void Simulation::count_decision(std::uint64_t step, std::int64_t ns) {
  if (!config_.real_ns || step == 0) return;
  if (metrics_.decision_ns.size() < step) metrics_.decision_ns.resize(step);
  metrics_.decision_ns[step - 1] += ns;
}

void Simulation::count_time() {
  const auto elapsed = static_cast<double>(clock_.now_us() - metrics_.now_us);
  metrics_.now_us = clock_.now_us();
  metrics_.running_us += elapsed * n_running_;
  metrics_.waiting_us += elapsed * n_waiting_;
  const engine::EngineStats& stats = scheduler_.counters();
  n_running_ = stats.running;
  n_waiting_ = stats.waiting;
}

void Simulation::check_plan(const control::StepPlan& plan) {
  if (plan.step() != last_step_ + 1) violate("steps are not numbered in order");
  last_step_ = plan.step();
  if (n_tokens_of(plan) > config_.scheduler.max_num_batched_tokens) {
    violate("step " + std::to_string(plan.step()) + " has " + std::to_string(n_tokens_of(plan)) +
            " tokens");
  }
  if (plan.runs_size() > config_.scheduler.max_num_seqs) {
    violate("step " + std::to_string(plan.step()) + " runs " + std::to_string(plan.runs_size()) +
            " sequences");
  }
}

void Simulation::send(control::StepPlan plan) {
  check_plan(plan);
  if (config_.trace != nullptr) say("plan " + plan.ShortDebugString());
  const std::int64_t n_tokens = n_tokens_of(plan);
  fair_share_.serve(n_tokens, clock_.now_us());
  ++metrics_.n_steps;
  metrics_.n_step_tokens += n_tokens;
  auto sent = std::make_shared<SentPlan>();
  sent->plan = std::move(plan);
  if (!sent->plan.runs().empty() && config_.faults.strikes(Fault::kLongerRun, sent->plan.step())) {
    sent->plan.mutable_runs(0)->add_tokens(0);
  }
  if (last_budget_.epoch > sent->plan.budget_epoch() &&
      sent->plan.step() < last_budget_.effective_step &&
      config_.faults.strikes(Fault::kEarlyBudget, sent->plan.step())) {
    sent->plan.set_budget_epoch(last_budget_.epoch);
  }
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    sent->committed.push_back(scheduler_.ledger().committed_pages(s));
  }
  const PlanPointer pointer = sent;
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    std::int64_t& arrives_us = stages_[s].plan_arrives_us;
    arrives_us = std::max(arrives_us, clock_.now_us() + control_delay());
    clock_.at(arrives_us, [this, s, pointer] { receive_plan(s, pointer); });
  }
  watch_deadline();
}

void Simulation::receive_plan(std::size_t stage, PlanPointer plan) {
  std::deque<PlanPointer>& inbox = stages_[stage].inbox;
  const std::uint64_t step = plan->plan.step();
  inbox.push_back(std::move(plan));
  if (inbox.size() > 1 && config_.faults.strikes(Fault::kPlansSwapped, step)) {
    std::swap(inbox[inbox.size() - 1], inbox[inbox.size() - 2]);
  }
  try_start(stage);
}

void Simulation::try_start(std::size_t index) {
  Stage& stage = stages_[index];
  if (stage.is_busy || stage.is_stopped || stage.inbox.empty() || !violation_.empty()) return;
  const PlanPointer sent = stage.inbox.front();
  const control::StepPlan& plan = sent->plan;
  if (index > 0 && !plan.runs().empty() && stage.activations_of < plan.step()) return;
  if (plan.budget_epoch() > stage.budgets.size()) return;  // waits for it, as the stages do
  require(check_budget(index, plan));
  stage.inbox.pop_front();
  auto result = std::make_shared<control::StepResult>();
  StepWork work;
  if (stage.fails_next) {
    result->set_step(plan.step());
    result->set_stage(static_cast<int>(index));
    result->set_error("it was told to");
    stage.is_stopped = true;
  } else if (Status status = stage.stage.carry_out(plan, *result, work); !status.ok()) {
    violate("stage " + std::to_string(index) + " cannot carry out step " +
            std::to_string(plan.step()) + ": " + status.message());
    return;
  }
  if (result->error().empty()) check_stage(index, *sent);
  const std::int64_t us = std::max<std::int64_t>(delay(step_us(config_.latency[index], work)), 1);
  result->set_busy_us(static_cast<std::uint64_t>(us));
  stage.is_busy = true;
  StageMetrics& metrics = metrics_.stages[index];
  metrics.busy_us += static_cast<double>(us);
  ++metrics.n_steps;
  clock_.after(us, [this, index, sent, result] { finish_step(index, sent, result); });
}

void Simulation::finish_step(std::size_t index, const PlanPointer& sent,
                             std::shared_ptr<control::StepResult> result) {
  Stage& stage = stages_[index];
  stage.is_busy = false;
  const bool failed = !result->error().empty();
  if (stage.is_stopped && !failed) return;
  const control::StepPlan& plan = sent->plan;
  if (index + 1 < stages_.size() && !plan.runs().empty() && !failed) {
    const LinkModel& link = config_.link;
    const double us =
        link.activations + link.activations_token * static_cast<double>(n_tokens_of(plan));
    std::int64_t& arrive_us = stage.activations_arrive_us;
    arrive_us = std::max(arrive_us, clock_.now_us() + delay(us));
    clock_.at(arrive_us, [this, index, step = plan.step()] {
      stages_[index + 1].activations_of = step;
      try_start(index + 1);
    });
  }
  if (plan.report_budget() && !failed) report_budget(index, plan);
  const int n_copies = config_.faults.strikes(Fault::kResultTwice, plan.step()) ? 2 : 1;
  for (int i = 0; i < n_copies; ++i) {
    stage.result_arrives_us = std::max(stage.result_arrives_us, clock_.now_us() + control_delay());
    clock_.at(stage.result_arrives_us, [this, result] { receive_result(*result); });
  }
  try_start(index);
}

// The last rank's report completes the exchange.
void Simulation::report_budget(std::size_t index, const control::StepPlan& plan) {
  const SimulatedStage& stage = stages_[index].stage;
  const PageBook& pages = stage.kv().book();
  const std::uint64_t page_bytes = config_.shape.page_bytes();
  BudgetReport report;
  report.stage = static_cast<std::uint32_t>(index);
  report.n_stages = static_cast<std::uint32_t>(stages_.size());
  report.step = plan.step();
  report.epoch = plan.budget_epoch();
  report.capacity_bytes = static_cast<std::uint64_t>(pages.n_pages()) * page_bytes;
  report.used_bytes = static_cast<std::uint64_t>(pages.n_used()) * page_bytes;
  report.reserved_bytes = static_cast<std::uint64_t>(pages.n_reserved()) * page_bytes;
  report.planned_bytes = stage.planned_bytes();
  report.kept_bytes = stage.kept_bytes();
  reports_.push_back(report);
  if (reports_.size() < stages_.size()) return;
  std::sort(reports_.begin(), reports_.end(),
            [](const BudgetReport& a, const BudgetReport& b) { return a.stage < b.stage; });
  clock_.after(control_delay(), [this] { balance(); });
}

void Simulation::balance() {
  if (has_failed_) return;
  const auto decision = scheduler_.balance(reports_, clock_.now_us());
  reports_.clear();
  if (!decision.ok()) {
    fail(decision.status());
    return;
  }
  if (decision->has_value()) send_budget((*decision)->plan);
  pump();
}

void Simulation::send_budget(const BudgetPlan& plan) {
  say("budget plan " + std::to_string(plan.epoch) + " from step " +
      std::to_string(plan.effective_step));
  if (plan.epoch != last_budget_.epoch + 1) violate("budget plans are not numbered in order");
  if (plan.effective_step <= last_step_) violate("a budget plan for a step that has been sent");
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    const int level = plan.levels[s];
    if (level < config_.balance->balancer.lightest_level() ||
        level >= static_cast<int>(config_.balance->ladder.size())) {
      violate("level " + std::to_string(level) + " of stage " + std::to_string(s));
    }
  }
  last_budget_ = plan;
  ++metrics_.n_budget_plans;
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    std::int64_t& arrives_us = stages_[s].budget_arrives_us;
    arrives_us = std::max(arrives_us, clock_.now_us() + control_delay());
    clock_.at(arrives_us, [this, s, plan] {
      stages_[s].budgets.push_back(plan);
      try_start(s);
    });
  }
}

// Every stage goes over to a budget plan with the first step that is planned by it, which is the
// same step for all of them, and not before the step that the plan names.
Status Simulation::check_budget(std::size_t index, const control::StepPlan& plan) {
  Stage& stage = stages_[index];
  const std::uint64_t epoch = plan.budget_epoch();
  if (epoch < stage.budget_epoch) return internal_error("a step goes back to an older budget plan");
  if (epoch == stage.budget_epoch) return ok_status();
  stage.budget_epoch = epoch;
  if (plan.step() < stage.budgets[epoch - 1].effective_step) {
    return internal_error("step " + std::to_string(plan.step()) +
                          " comes before the step from which its budget plan is in effect");
  }
  return ok_status();
}

void Simulation::receive_result(const control::StepResult& result) {
  if (has_failed_) return;
  if (config_.trace != nullptr) {
    say("result of stage " + std::to_string(result.stage()) + " for step " +
        std::to_string(result.step()));
  }
  const std::int64_t begin = real_ns();
  const Status status = scheduler_.on_result(result, clock_.now_us());
  count_decision(result.step(), real_ns() - begin);
  if (!status.ok()) {
    fail(status);
    return;
  }
  pump();
}

void Simulation::take_events() {
  for (const RequestEvents& events : scheduler_.take_events()) {
    require(book_.take(events, clock_.now_us()));
    if (!violation_.empty()) return;
    metrics_.n_output_tokens += static_cast<std::int64_t>(events.tokens.size());
    fair_share_.progress(events.request, static_cast<std::int64_t>(events.tokens.size()));
    if (!events.ended) continue;
    const Life& life = *book_.find(events.request);
    say("request " + std::to_string(events.request) + " ends: " + life.status.to_string());
    const auto queue_us = static_cast<std::int64_t>(life.summary.queue_ms * 1000.0 + 0.5);
    if (!may_fail_) {
      require(fair_share_.check(events.request, life.submitted_us + queue_us));
    }
    fair_share_.end(events.request);
    if (config_.faults.strikes(Fault::kRepeatedEnd, last_step_)) {
      require(book_.take(events, clock_.now_us()));
    }
    if (on_end_) on_end_(events.request, life);
  }
}

void Simulation::check_rank0() {
  const engine::EngineStats& stats = scheduler_.counters();
  const std::uint64_t n_open = static_cast<std::uint64_t>(stats.running + stats.waiting);
  if (stats.running < 0 || stats.waiting < 0 ||
      stats.accepted != stats.finished + stats.failed + stats.cancelled + n_open ||
      stats.accepted != book_.lives().size() || n_open != book_.n_open()) {
    violate("accepted " + std::to_string(stats.accepted) + " is not finished " +
            std::to_string(stats.finished) + " + failed " + std::to_string(stats.failed) +
            " + cancelled " + std::to_string(stats.cancelled) + " + running " +
            std::to_string(stats.running) + " + waiting " + std::to_string(stats.waiting));
  }
  if (scheduler_.in_flight() > config_.scheduler.max_in_flight) violate("too many steps in flight");
  if (scheduler_.in_flight() == 0 && n_open > 0) {
    violate("nothing is in flight, and " + std::to_string(n_open) + " requests wait for it");
  }
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    const std::int64_t committed = scheduler_.ledger().committed_pages(s);
    if (committed <= config_.stages[s].n_pages) continue;
    violate("the ledger promises " + std::to_string(committed) + " of " +
            std::to_string(config_.stages[s].n_pages) + " pages of stage " + std::to_string(s));
  }
}

// After a plan was carried out.
void Simulation::check_stage(std::size_t index, const SentPlan& sent) {
  const StageKv& kv = stages_[index].stage.kv();
  const std::int64_t n_held = kv.book().n_used() + kv.book().n_reserved();
  metrics_.stages[index].used_pages += static_cast<double>(kv.book().n_used());
  metrics_.stages[index].reserved_pages += static_cast<double>(kv.book().n_reserved());
  if (n_held > sent.committed[index]) {
    violate("stage " + std::to_string(index) + " holds or has promised " + std::to_string(n_held) +
            " pages after step " + std::to_string(sent.plan.step()) + ", the ledger " +
            std::to_string(sent.committed[index]));
  }
  if (config_.walks_pages) {
    require(kv.check().with_context("stage " + std::to_string(index)));
  }
}

void Simulation::watch_deadline() {
  if (is_watching_) return;
  const auto oldest = scheduler_.oldest_step();
  if (!oldest) return;
  is_watching_ = true;
  clock_.at(oldest->first + config_.step_timeout_us + 1, [this] {
    is_watching_ = false;
    if (has_failed_) return;
    const auto still = scheduler_.oldest_step();
    if (still && clock_.now_us() - still->first > config_.step_timeout_us) {
      fail(deadline_exceeded("step " + std::to_string(still->second) + " is not done"));
      return;
    }
    watch_deadline();
  });
}

// As PipelineEngine::fail: what ended is handed out, the rest ends here, since stages will not
// report what they free.
void Simulation::fail(const Status& status) {
  say("the cluster fails: " + status.to_string());
  if (!may_fail_) violate("the cluster fails for no reason: " + status.message());
  if (!violation_.empty()) return;
  take_events();
  has_failed_ = true;
  const Status reason = internal_error("the cluster failed: " + status.message());
  book_.expect_failure(reason.code());
  scheduler_.fail_all(reason, clock_.now_us());
  take_events();
  for (const auto& [handle, life] : book_.lives()) {
    if (life.n_ended == 0) require(book_.end_failed(handle, reason, clock_.now_us()));
  }
}

}  // namespace spindle::coordinator::simulation
