#include "worker/engine/pipeline_engine.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "kvstore/plan/kv_kind.h"
#include "worker/engine/request_lines.h"
#include "worker/logging/logging.h"
#include "worker/trace/plan_trace.h"

namespace spindle::worker {
namespace {

constexpr std::int64_t kPlanSendMs = 10000;
// How often an idle schedule loop looks at the oldest step's age.
constexpr std::chrono::milliseconds kDeadlinePoll{200};

void count_step_tokens(const control::StepPlan& plan, engine::StepTokens& tokens) {
  std::int64_t n_tokens = 0;
  for (const control::Run& run : plan.runs()) n_tokens += run.tokens_size();
  if (n_tokens == 0) return;  // it frees KV only
  const auto bucket =
      std::lower_bound(engine::kStepTokenBounds.begin(), engine::kStepTokenBounds.end(), n_tokens) -
      engine::kStepTokenBounds.begin();
  ++tokens.counts[static_cast<std::size_t>(bucket)];
  tokens.sum += static_cast<std::uint64_t>(n_tokens);
}

static_assert(engine::kKvForms == kvstore::kKvForms &&
              engine::kKvFormNames == kvstore::kKvFormNames);

double seconds_of(std::uint64_t us) { return static_cast<double>(us) * 1e-6; }

void take_times(const control::StepResult& result, engine::StageState& stage) {
  stage.busy_seconds += seconds_of(result.busy_us());
  stage.bubble.empty += seconds_of(result.empty_us());
  stage.bubble.upstream += seconds_of(result.upstream_us());
  stage.bubble.downstream += seconds_of(result.downstream_us());
  stage.compress_seconds += seconds_of(result.compress_us());
  stage.send_seconds += seconds_of(result.send_us());
  stage.receive_seconds += seconds_of(result.receive_us());
}

// Missing entries are zeros.
void take_layers(const control::KvReport& report, engine::StageState& stage) {
  const auto at = [](const auto& values, int i) {
    return i < values.size() ? values.Get(i) : std::decay_t<decltype(values.Get(i))>{};
  };
  stage.layers.resize(static_cast<std::size_t>(stage.n_layers));
  for (int i = 0; i < stage.n_layers; ++i) {
    engine::LayerState& layer = stage.layers[static_cast<std::size_t>(i)];
    layer.layer = stage.first_layer + i;
    layer.used_bytes = at(report.layer_used_bytes(), i);
    layer.full_bytes = report.layer_full_bytes();
    layer.plan = kvstore::plan_kind_name(static_cast<int>(at(report.layer_plan(), i)) - 1);
    layer.logical_tokens = report.logical_tokens();
    layer.retained_tokens = at(report.layer_retained_tokens(), i);
  }
  for (std::size_t form = 0; form < engine::kKvForms; ++form) {
    stage.kv_form_bytes[form] = at(report.form_bytes(), static_cast<int>(form));
  }
}

}  // namespace

PipelineEngine::PipelineEngine(comm::HostGroup& host, coordinator::SchedulerConfig config,
                               coordinator::KvLedger ledger,
                               const std::vector<control::StageInfo>& stages,
                               PipelineEngineOptions options, OnFailure on_failure)
    : host_(host),
      limits_(config.limits),
      options_(options),
      on_failure_(std::move(on_failure)),
      scheduler_(std::move(config), std::move(ledger)),
      last_step_(stages.size()),
      reported_us_(stages.size()) {
  for (const control::StageInfo& info : stages) {
    engine::StageState state;
    state.stage = info.stage();
    state.host = info.host();
    state.device = info.device();
    state.first_layer = info.first_layer();
    state.n_layers = info.n_layers();
    state.weight_bytes = info.weight_bytes();
    state.kv_capacity_bytes = info.kv_capacity_bytes();
    stages_.push_back(std::move(state));
  }
}

PipelineEngine::~PipelineEngine() { stop(); }

std::int64_t PipelineEngine::now_us() const {
  return 1 + std::chrono::duration_cast<std::chrono::microseconds>(
                 std::chrono::steady_clock::now() - epoch_)
                 .count();
}

void PipelineEngine::start() {
  schedule_thread_ = std::thread([this] { schedule_loop(); });
}

Result<engine::RequestHandle> PipelineEngine::submit(engine::EngineRequest request,
                                                     std::shared_ptr<engine::EventSink> sink) {
  const std::string accepted = logs(spdlog::level::debug) ? accepted_line(request) : "";
  std::string request_id = request.request_id;
  std::unique_lock lock(mutex_);
  if (stopping_ || !failure_.ok()) return unavailable("the engine has stopped");
  auto handle = scheduler_.submit(std::move(request), now_us());
  if (!handle.ok()) return handle;
  clients_.emplace(*handle, Client{std::move(sink), request_id});
  if (idle_since_us_ > 0) idle_us_ += now_us() - std::exchange(idle_since_us_, 0);
  wake();
  lock.unlock();
  if (!accepted.empty()) log_request(spdlog::level::debug, request_id, accepted);
  return handle;
}

bool PipelineEngine::cancel(engine::RequestHandle handle) {
  const std::lock_guard lock(mutex_);
  const bool is_known = scheduler_.cancel(handle, now_us());
  wake();
  return is_known;
}

void PipelineEngine::finish_choice(engine::RequestHandle handle, std::int32_t choice) {
  const std::lock_guard lock(mutex_);
  scheduler_.finish_choice(handle, choice, now_us());
  wake();
}

engine::EngineStats PipelineEngine::stats() const {
  const std::lock_guard lock(mutex_);
  return locked_stats();
}

engine::EngineStats PipelineEngine::locked_stats() const {
  const std::int64_t now = now_us();
  engine::EngineStats stats = scheduler_.stats();
  std::vector<engine::StageState> stages = stages_;
  for (std::size_t s = 0; s < stages.size(); ++s) {
    const engine::StageState& decided = stats.stages[s];
    stages[s].kv_committed_bytes = decided.kv_committed_bytes;
    stages[s].kv_budget_bytes = decided.kv_budget_bytes;
    stages[s].kv_level_ratio = decided.kv_level_ratio;
    stages[s].kv_price = decided.kv_price;
    stages[s].report_age_seconds = static_cast<double>(now - reported_us_[s]) * 1e-6;
  }
  stats.stages = std::move(stages);
  stats.step_tokens = step_tokens_;
  stats.budget_rounds = budget_rounds_;
  stats.budget_seconds = static_cast<double>(budget_us_) * 1e-6;
  return stats;
}

engine::EngineSnapshot PipelineEngine::snapshot() const {
  const std::lock_guard lock(mutex_);
  engine::EngineSnapshot snapshot;
  snapshot.stats = locked_stats();
  snapshot.moves.assign(moves_.begin(), moves_.end());
  snapshot.active_requests = scheduler_.active_requests(engine::kMaxActiveRequests, now_us());
  snapshot.n_active_requests =
      std::int64_t{snapshot.stats.running} + std::int64_t{snapshot.stats.waiting};
  return snapshot;
}

void PipelineEngine::set_balancer(coordinator::BudgetBalancer balancer,
                                  kvstore::LevelLadder ladder) {
  const std::lock_guard lock(mutex_);
  level_ratios_ = ladder.ratios;
  own_level_ = ladder.own;
  scheduler_.set_balancer(std::move(balancer), std::move(ladder));
}

Result<coordinator::BudgetPlan> PipelineEngine::balance(
    std::span<const coordinator::BudgetReport> reports) {
  const std::lock_guard lock(mutex_);
  const std::int64_t began = now_us();
  const coordinator::BudgetPlan before = scheduler_.budget_plan();
  const auto decision = scheduler_.balance(reports, began);
  ++budget_rounds_;
  budget_us_ += now_us() - began;
  if (!decision.ok()) return decision.status();
  coordinator::BudgetPlan plan = scheduler_.budget_plan();
  plan.n_stages = static_cast<std::uint32_t>(stages_.size());
  if (decision->has_value()) {
    spdlog::info("KV budgets, plan {} from step {}: {}", plan.epoch, plan.effective_step,
                 (*decision)->reason);
    note_moves(before, **decision);
  }
  return plan;
}

void PipelineEngine::note_moves(const coordinator::BudgetPlan& before,
                                const coordinator::BudgetDecision& decision) {
  const std::int64_t unix_ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                                   std::chrono::system_clock::now().time_since_epoch())
                                   .count();
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    const std::size_t from = before.epoch == 0 ? own_level_ : before.levels[s];
    const std::size_t to = decision.plan.levels[s];
    if (from == to) continue;
    record({.kind = TraceKind::kBudgetMove,
            .step = decision.plan.effective_step,
            .a = static_cast<std::int64_t>(s),
            .b = std::llround(level_ratios_[from] * 1e6),
            .c = std::llround(level_ratios_[to] * 1e6)});
    ++(to > from ? stages_[s].kv_moves_stronger : stages_[s].kv_moves_lighter);
    moves_.push_back({unix_ms, decision.plan.effective_step, static_cast<std::int32_t>(s),
                      level_ratios_[from], level_ratios_[to], decision.why});
    if (moves_.size() > engine::kMaxBudgetMoves) moves_.pop_front();
  }
}

Status PipelineEngine::admission() const {
  const std::lock_guard lock(mutex_);
  if (stopping_ || !failure_.ok()) return unavailable("the engine has stopped");
  return scheduler_.admission();
}

void PipelineEngine::start_draining() {
  const std::lock_guard lock(mutex_);
  scheduler_.start_draining();
}

Status PipelineEngine::drain(Deadline deadline) {
  std::unique_lock lock(mutex_);
  scheduler_.start_draining();
  const auto is_drained = [this] { return clients_.empty() || !failure_.ok(); };
  if (drained_.wait_until(lock, deadline.at(), is_drained)) return failure_;
  const std::size_t n_left = clients_.size();
  scheduler_.fail_all(cancelled("the server is stopping"), now_us());
  wake();
  drained_.wait_for(lock, options_.step_timeout, is_drained);
  return deadline_exceeded(std::to_string(n_left) +
                           " requests were cancelled by the drain's limit");
}

void PipelineEngine::stop() {
  {
    const std::lock_guard lock(mutex_);
    if (!stopping_) {
      stopping_ = true;
      scheduler_.fail_all(unavailable("the server is stopping"), now_us());
    }
    wake();
  }
  if (schedule_thread_.joinable()) schedule_thread_.join();
}

// A message to itself, which no rank sends: one wait is for results and for the callers.
void PipelineEngine::wake() {
  if (std::exchange(woken_, true)) return;
  // Refused only while results wait, which wake it as well.
  static_cast<void>(
      host_.send(host_.rank(), comm::Channel::kResult, std::string_view(), Deadline::after_ms(0)));
}

void PipelineEngine::schedule_loop() {
  std::unique_lock lock(mutex_);
  while (failure_.ok() && !(stopping_ && scheduler_.idle())) {
    lock.unlock();
    const auto message =
        host_.recv(comm::kAnySource, comm::Channel::kResult, Deadline::after(kDeadlinePoll));
    lock.lock();
    woken_ = false;
    Status status = check_step_deadline();
    if (status.ok()) status = take_messages(message);
    if (!status.ok()) {
      fail(lock, status);
      break;
    }
    if (!send_plans(lock)) break;
    if (scheduler_.idle() && idle_since_us_ == 0) idle_since_us_ = now_us();
    dispatch_events(lock);
  }
  if (!failure_.ok()) return;
  control::StepPlan farewell;
  farewell.set_shutdown(true);
  const std::string bytes = farewell.SerializeAsString();
  stopping_ = true;
  lock.unlock();
  for (int rank = 0; rank < host_.size(); ++rank) {
    const Status status =
        host_.send(rank, comm::Channel::kPlan, bytes, Deadline::after_ms(kPlanSendMs));
    if (!status.ok()) spdlog::warn("shutdown of rank {}: {}", rank, status.to_string());
  }
}

void PipelineEngine::record(TraceRecord moment) const {
  if (options_.recorder == nullptr || !options_.recorder->is_on()) return;
  moment.begin_ns = trace_clock_ns();
  options_.recorder->add(moment);
}

void PipelineEngine::record_plan(const control::StepPlan& plan) const {
  if (options_.recorder == nullptr || !options_.recorder->is_on()) return;
  const PlanTokens tokens = count_tokens(plan);
  record({.kind = TraceKind::kPlan,
          .step = plan.step(),
          .a = tokens.prefill,
          .b = tokens.decode,
          .c = plan.runs_size()});
  const engine::EngineStats& stats = scheduler_.counters();
  record({.kind = TraceKind::kRequests, .a = stats.running, .b = stats.waiting});
}

bool PipelineEngine::send_plans(std::unique_lock<std::mutex>& lock) {
  while (auto plan = scheduler_.next_step(now_us())) {
    record_plan(*plan);
    plan->set_idle_us(static_cast<std::uint64_t>(std::exchange(idle_us_, 0)));
    const std::string bytes = plan->SerializeAsString();
    count_step_tokens(*plan, step_tokens_);
    lock.unlock();
    Status status;
    for (int rank = 0; rank < host_.size() && status.ok(); ++rank) {
      status = host_.send(rank, comm::Channel::kPlan, bytes, Deadline::after_ms(kPlanSendMs));
    }
    lock.lock();
    if (!status.ok()) {
      fail(lock, status.with_context("sending step " + std::to_string(plan->step())));
      return false;
    }
  }
  return true;
}

// `message` and those that have come as well.
Status PipelineEngine::take_messages(const Result<comm::Message>& message) {
  if (!message.ok()) {
    const bool is_late = message.status().code() == StatusCode::kDeadlineExceeded;
    return is_late ? ok_status() : message.status();
  }
  Status status = take_message(*message);
  while (status.ok()) {
    const auto more = host_.try_recv(comm::kAnySource, comm::Channel::kResult);
    if (!more.ok()) return more.status();
    if (!more->has_value()) break;
    status = take_message(**more);
  }
  return status;
}

Status PipelineEngine::take_message(const comm::Message& message) {
  if (message.bytes.empty() && message.source == host_.rank()) return ok_status();  // wake()
  control::StepResult result;
  if (!result.ParseFromString(message.bytes) || result.stage() != message.source) {
    return internal_error("a result from rank " + std::to_string(message.source) +
                          " cannot be understood");
  }
  return take_result(result);
}

Status PipelineEngine::take_result(const control::StepResult& result) {
  if (Status status = scheduler_.on_result(result, now_us()); !status.ok()) return status;
  const auto index = static_cast<std::size_t>(result.stage());  // on_result checked it
  engine::StageState& stage = stages_[index];
  stage.kv_used_bytes = result.kv_used_bytes();
  stage.kv_peak_bytes = result.kv_peak_bytes();
  if (result.has_kv()) take_layers(result.kv(), stage);
  take_times(result, stage);
  ++stage.steps;
  last_step_[index] = result.step();
  reported_us_[index] = now_us();
  return ok_status();
}

void PipelineEngine::dispatch_events(std::unique_lock<std::mutex>& lock) {
  struct Delivery {
    Client client;
    coordinator::RequestEvents events;
  };
  std::vector<Delivery> deliveries;
  for (coordinator::RequestEvents& events : scheduler_.take_events()) {
    const auto found = clients_.find(events.request);
    CHECK(found != clients_.end(), "events of a request without a client");
    deliveries.push_back({found->second, std::move(events)});
    if (deliveries.back().events.ended) clients_.erase(found);
  }
  if (deliveries.empty()) return;
  if (clients_.empty()) drained_.notify_all();
  lock.unlock();
  for (const auto& [client, events] : deliveries) {
    if (events.preemptions > 0) {
      log_request(spdlog::level::debug, client.request_id, "preempted: waits for room again");
      record({.kind = TraceKind::kPreempt, .a = events.preemptions});
    }
    if (!events.scores.empty()) client.sink->on_prompt_scores(events.scores);
    if (!events.tokens.empty()) client.sink->on_tokens(events.tokens);
    if (events.ended) end(client, events.status, events.summary);
  }
  lock.lock();
}

void PipelineEngine::end(const Client& client, const Status& status,
                         const engine::RequestSummary& summary) {
  const bool failed = !status.ok() && status.code() != StatusCode::kCancelled;
  const auto level = failed ? spdlog::level::warn : spdlog::level::debug;
  if (logs(level)) log_request(level, client.request_id, ended_line(status, summary));
  client.sink->on_end(status, summary);
}

void PipelineEngine::fail(std::unique_lock<std::mutex>& lock, const Status& status) {
  failure_ = status;
  dispatch_events(lock);
  // The stages will not report what they freed, so the scheduler cannot end these in order.
  auto clients = std::exchange(clients_, {});
  drained_.notify_all();
  lock.unlock();
  const Status reason = internal_error("the cluster failed: " + status.message());
  for (const auto& [handle, client] : clients) end(client, reason, {});
  if (on_failure_) on_failure_(status);
  lock.lock();
}

std::string PipelineEngine::slowest_stages(std::uint64_t step) const {
  std::string names;
  for (std::size_t i = 0; i < last_step_.size(); ++i) {
    if (last_step_[i] >= step) continue;
    names += (names.empty() ? "" : ", ") + std::to_string(i);
  }
  return names;
}

Status PipelineEngine::check_step_deadline() const {
  const auto oldest = scheduler_.oldest_step();
  if (!oldest) return ok_status();
  const auto age = std::chrono::microseconds(now_us() - oldest->first);
  if (age <= options_.step_timeout) return ok_status();
  return deadline_exceeded("step " + std::to_string(oldest->second) + " is not done after " +
                           std::to_string(options_.step_timeout.count()) +
                           " ms; waiting for stage " + slowest_stages(oldest->second));
}

}  // namespace spindle::worker
