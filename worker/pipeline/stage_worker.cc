#include "worker/pipeline/stage_worker.h"

#include <algorithm>
#include <utility>

#include "worker/trace/plan_trace.h"

namespace spindle::worker {
namespace {

using Clock = std::chrono::steady_clock;

// Long waits are cut into short ones, so that a shutdown of the group ends them.
constexpr std::int64_t kPlanWaitMs = 500;
// Shorter ones while it is recorded: a wait that outlasts the recording is lost.
constexpr std::int64_t kRecordedWaitMs = 20;
// Reports of all layers while nothing but decoding happens.
constexpr std::chrono::milliseconds kLayerReports{250};

std::uint64_t micros_since(Clock::time_point start) {
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start).count());
}

}  // namespace

StageWorker::StageWorker(comm::HostGroup& host, comm::DeviceGroup& device, Stage& stage,
                         kvstore::KvStore& store, const CpuContext& context,
                         StageWorkerOptions options)
    : host_(host),
      device_(device),
      stage_(stage),
      store_(store),
      sampler_(context),
      // Every rank reports when its step is done, and a step may take that long.
      budgets_(device, options.step_timeout),
      options_(std::move(options)),
      tracer_(options_.recorder) {}

Status StageWorker::run() {
  stage_.bind_thread();
  budgets_.start();
  const Status status = work();
  // After a failure the others may never come to an exchange under way.
  if (!status.ok() && budgets_.is_busy()) device_.abort(status.message());
  budgets_.stop();
  return status;
}

Status StageWorker::work() {
  stage_.clock().mark(StageTime::kOther);
  while (true) {
    if (!unreadable_.ok()) return unreadable_;
    if (!next_) {
      auto message =
          host_.recv(0, comm::Channel::kPlan,
                     Deadline::after_ms(tracer_.is_on() ? kRecordedWaitMs : kPlanWaitMs));
      tracer_.slice(TraceKind::kIdle, 0);
      if (!message.ok()) {
        if (message.status().code() == StatusCode::kDeadlineExceeded) continue;
        return message.status();
      }
      auto read = read_plan(*message);
      if (!read.ok()) return read.status();
      next_ = std::move(*read);
    }
    Step step = *std::exchange(next_, std::nullopt);
    const control::StepPlan& plan = step.plan;
    control::StepResult& result = step.result;
    if (plan.shutdown()) return device_.flush(Deadline::after(options_.step_timeout));
    carry_out(step);
    if (!step.status.ok()) result.set_error(step.status.to_string());
    if (!step.has_kv_report) report_kv(step);
    if (step.status.ok() && plan.report_budget()) {
      if (Status reported = report_budget(plan, result); !reported.ok()) {
        result.set_error(reported.to_string());
      }
    }
    const Status sent = host_.send(0, comm::Channel::kResult, result.SerializeAsString(),
                                   Deadline::after(options_.step_timeout));
    tracer_.slice(TraceKind::kReport, plan.step(), static_cast<std::int64_t>(result.busy_us()),
                  static_cast<std::int64_t>(result.compress_us()),
                  static_cast<std::int64_t>(result.empty_us() + result.upstream_us() +
                                            result.downstream_us()));
    tracer_.value(TraceKind::kKvUsed, plan.step(),
                  static_cast<std::int64_t>(result.kv_used_bytes()));
    if (!step.status.ok()) return step.status;
    if (!sent.ok()) return sent;
    if (options_.on_step) options_.on_step(plan.step());
    if (options_.check_invariants) store_.check_invariants();
  }
}

Result<StageWorker::Step> StageWorker::read_plan(const comm::Message& message) const {
  Step step;
  if (!step.plan.ParseFromString(message.bytes)) {
    return internal_error("rank " + std::to_string(host_.rank()) +
                          " received a step plan that cannot be parsed");
  }
  step.result.set_step(step.plan.step());
  step.result.set_stage(host_.rank());
  return step;
}

template <typename Part>
Status StageWorker::guarded(Part&& part) const {
  try {
    return part();
  } catch (const std::exception& error) {
    return internal_error("stage " + std::to_string(host_.rank()) + ": " + error.what());
  }
}

void StageWorker::carry_out(Step& step) {
  if (!step.has_begun) begin(step);
  if (!step.status.ok()) return;
  step.status = guarded([&] {
    Status status = step.plan.runs().empty() ? ok_status() : finish_runs(step);
    if (status.ok()) report_times(step.result);
    return status;
  });
}

void StageWorker::begin(Step& step) {
  step.has_begun = true;
  step.status = guarded([&] {
    const control::StepPlan& plan = step.plan;
    // Before the first plan the cluster was starting.
    const bool is_first = !std::exchange(began_, true);
    stage_.clock().mark(is_first ? StageTime::kOther : StageTime::kEmpty, plan.idle_us());
    if (plan.budget_epoch() > 0) {
      Status status = budgets_.await(plan.budget_epoch(), plan.step());
      if (!status.ok()) return status;
      awaited_epoch_ = std::max(awaited_epoch_, plan.budget_epoch());
      stage_.clock().mark(StageTime::kEmpty);
      tracer_.slice(TraceKind::kAwaitBudget, plan.step());
    }
    if (Status status = apply_sequences(plan, step.result); !status.ok()) return status;
    stage_.clock().mark(StageTime::kOther);
    tracer_.slice(TraceKind::kPrepare, plan.step(), count_sequences(plan));
    return plan.runs().empty() ? ok_status() : begin_runs(plan);
  });
}

bool StageWorker::begin_next(Step& step) {
  if (next_ || !unreadable_.ok()) return false;
  const auto message = host_.try_recv(0, comm::Channel::kPlan);
  // A failure is met by the next wait for a plan as well.
  if (!message.ok()) return false;
  if (!message->has_value()) return true;
  auto read = read_plan(**message);
  if (!read.ok()) {
    unreadable_ = read.status();
    return false;
  }
  next_ = std::move(*read);
  if (!may_begin_early(next_->plan)) return false;
  // As the store is now, without the next step's tokens.
  report_kv(step);
  stage_.clock().mark(StageTime::kBusy);
  begin(*next_);
  return false;
}

// Of a step whose tokens are being drawn.
bool StageWorker::only_tokens_are_left(const control::StepPlan& plan) const {
  if (!plan.free_after_runs().empty()) return false;
  for (const control::Run& run : plan.runs()) {
    if (run.score_end() > run.score_first() || stage_.is_boundary(run.sequence())) return false;
  }
  return std::ranges::none_of(requests_,
                              [](const SampleRequest& request) { return request.n_logprobs >= 0; });
}

// While the tokens of requests_ are being drawn. Boundaries and forks may wait for the device, a
// budget plan for the other ranks, a receive for the stage before.
bool StageWorker::may_begin_early(const control::StepPlan& plan) const {
  if (!stage_.config().is_first && device_.recv_waits()) return false;
  if (plan.shutdown() || plan.runs().empty() || plan.budget_epoch() > awaited_epoch_ ||
      !plan.compress().empty() || !plan.fork().empty()) {
    return false;
  }
  return std::ranges::none_of(plan.free(), [&](std::uint64_t freed) {
    return std::ranges::any_of(
        requests_, [&](const SampleRequest& request) { return request.sequence == freed; });
  });
}

Status StageWorker::report_budget(const control::StepPlan& plan,
                                  const control::StepResult& result) {
  coordinator::BudgetReport report;
  report.stage = static_cast<std::uint32_t>(host_.rank());
  report.n_stages = static_cast<std::uint32_t>(host_.size());
  report.step = plan.step();
  report.epoch = plan.budget_epoch();
  const std::uint64_t page = store_.pool().page_bytes();
  report.capacity_bytes = static_cast<std::uint64_t>(store_.pool().n_pages()) * page;
  report.used_bytes = static_cast<std::uint64_t>(result.used_pages()) * page;
  report.reserved_bytes = static_cast<std::uint64_t>(result.reserved_pages()) * page;
  report.planned_bytes = planned_bytes_;
  report.kept_bytes = kept_bytes_;
  return budgets_.report(report);
}

Status StageWorker::apply_sequences(const control::StepPlan& plan, control::StepResult& result) {
  const bool is_last = stage_.config().is_last;
  if (Status status = compress_all(plan, false, result); !status.ok()) return status;
  for (const control::ForkSequence& fork : plan.fork()) {
    const control::OpenSequence& child = fork.child();
    Status status = store_.fork(fork.parent(), child.sequence(), fork.n_tokens(),
                                child.max_tokens(), reserve_pages(child.reserve_pages()));
    if (!status.ok()) return status;
    open_boundaries(child);
    if (!is_last) continue;
    if (fork.tokens().empty()) {
      sampler_.fork(fork.parent(), child);
    } else {
      sampler_.open(child);
      sampler_.saw(child.sequence(),
                   {fork.tokens().data(), static_cast<std::size_t>(fork.tokens_size())});
    }
  }
  for (const std::uint64_t sequence : plan.free()) {
    if (Status status = free(sequence, result); !status.ok()) return status;
  }
  for (const control::OpenSequence& open : plan.open()) {
    const Status status = store_.open(open.sequence(), open.max_tokens(),
                                      reserve_pages(open.reserve_pages()), open.granted_tokens());
    if (!status.ok()) return status;
    open_boundaries(open);
    if (is_last) sampler_.open(open);
  }
  return grow_all(plan, false, result);
}

Status StageWorker::grow_all(const control::StepPlan& plan, bool after_runs,
                             control::StepResult& result) {
  for (const control::GrowSequence& grow : plan.grow()) {
    if (grow.after_runs() != after_runs) continue;
    const auto pages = store_.grow(grow.sequence(), grow.granted_tokens(),
                                   reserve_pages(grow.more_pages()), grow.sinks(), grow.recent());
    if (!pages.ok()) return pages.status();
    control::GrownSequence& report = *result.add_grown();
    report.set_sequence(grow.sequence());
    report.set_used_pages(pages->used);
    report.set_reserved_pages(pages->reserved);
  }
  return ok_status();
}

Status StageWorker::free(std::uint64_t sequence, control::StepResult& result) {
  const auto freed = store_.free(sequence);
  if (!freed.ok()) return freed.status();
  stage_.close_boundaries(sequence);
  control::FreedSequence& report = *result.add_freed();
  report.set_sequence(sequence);
  report.set_full_bytes(freed->full_bytes);
  report.set_kept_bytes(freed->kept_bytes);
  report.mutable_layer_kept_bytes()->Add(freed->layer_kept_bytes.begin(),
                                         freed->layer_kept_bytes.end());
  if (stage_.config().is_last) sampler_.free(sequence);
  return ok_status();
}

std::int64_t StageWorker::reserve_pages(
    const google::protobuf::RepeatedField<std::int64_t>& pages) const {
  return host_.rank() < pages.size() ? pages.Get(host_.rank()) : 0;
}

void StageWorker::open_boundaries(const control::OpenSequence& open) {
  if (open.boundaries().empty()) return;
  const control::BoundaryNeeds& message = open.needs();
  ScoringNeeds needs;
  needs.boundary.window_scores = message.window_scores();
  needs.boundary.lazy_mass = message.lazy_mass();
  needs.boundary.selector = static_cast<kvstore::KvSelector>(message.selector());
  needs.boundary.histograms = message.histograms();
  needs.boundary.lazy_window = message.lazy_window();
  needs.lazy_test =
      message.lazy_decode() ? kvstore::LazyTest::kDecode : kvstore::LazyTest::kPrefill;
  needs.sinks = message.sinks();
  needs.boost_share = message.boost_share();
  stage_.open_boundaries(open.sequence(), needs,
                         {open.boundaries().begin(), open.boundaries().end()});
}

Status StageWorker::carry_out_after_runs(const control::StepPlan& plan,
                                         control::StepResult& result) {
  if (Status status = compress_all(plan, true, result); !status.ok()) return status;
  return grow_all(plan, true, result);
}

Status StageWorker::compress_all(const control::StepPlan& plan, bool after_runs,
                                 control::StepResult& result) {
  int n = 0;
  for (const control::Compress& order : plan.compress()) {
    if (order.after_runs() != after_runs) continue;
    if (Status status = compress(order, result); !status.ok()) return status;
    ++n;
  }
  if (n > 0) {
    stage_.clock().mark(StageTime::kCompress);
    tracer_.slice(TraceKind::kCompress, plan.step(), n);
  }
  return ok_status();
}

Status StageWorker::compress(const control::Compress& order, control::StepResult& result) {
  const Clock::time_point start = Clock::now();
  if (store_.length(order.sequence()) != order.n_tokens()) {
    return invalid_argument("a boundary at " + std::to_string(order.n_tokens()) + " of sequence " +
                            std::to_string(order.sequence()) + ", which holds " +
                            std::to_string(store_.length(order.sequence())) + " tokens");
  }
  const int n_kv_heads = store_.shape().n_kv_heads;
  const int first = stage_.config().layers.first * n_kv_heads;
  const int n_heads = store_.n_layers() * n_kv_heads;
  if (!order.heads().empty() && order.heads_size() < first + n_heads) {
    return invalid_argument("a plan of " + std::to_string(order.heads_size()) + " heads");
  }
  std::vector<kvstore::HeadPlan> heads;
  for (int i = 0; i < n_heads; ++i) {
    if (order.heads().empty()) {
      heads.push_back(store_.head_cache(order.sequence(), i / n_kv_heads, i % n_kv_heads).plan);
      continue;
    }
    const control::HeadPlan& plan = order.heads(first + i);
    heads.push_back({.mode = static_cast<kvstore::KvMode>(plan.mode()),
                     .selector = static_cast<kvstore::KvSelector>(plan.selector()),
                     .codec = {static_cast<kernels::KvFormat>(plan.k_format()),
                               static_cast<kernels::KvFormat>(plan.v_format())},
                     .fallback = static_cast<kernels::KvFormat>(plan.fallback()),
                     .n_keep = plan.n_keep(),
                     .window = plan.window()});
  }
  kvstore::StageBoundary boundary;
  boundary.sinks = order.sinks();
  boundary.recent = order.recent();
  boundary.heads = heads;
  boundary.prompt_left = order.prompt_left();
  boundary.boundaries_left = order.boundaries_left();
  boundary.forks = order.forks();
  const auto kept = stage_.compress(order.sequence(), boundary, order.selects());
  if (!kept.ok()) {
    return kept.status().with_context("compressing sequence " + std::to_string(order.sequence()));
  }
  if (host_.rank() < order.planned_bytes_size()) {
    planned_bytes_ += order.planned_bytes(host_.rank());
    kept_bytes_ += static_cast<std::uint64_t>(kept->pages.used) * store_.pool().page_bytes();
  }
  control::CompressedSequence& report = *result.add_compressed();
  report.set_sequence(order.sequence());
  report.set_n_tokens(order.n_tokens());
  report.set_full_bytes(kept->full_bytes);
  report.set_used_pages(kept->pages.used);
  report.set_reserved_pages(kept->pages.reserved);
  for (const kvstore::HeadKept& head : kept->heads) {
    control::HeadKept& out = *report.add_heads();
    out.set_n_tokens(head.n_tokens);
    out.set_bytes(head.bytes);
    out.set_k_entries_per_token(head.k_entries_per_token);
    out.set_v_entries_per_token(head.v_entries_per_token);
  }
  report.set_compress_us(micros_since(start));
  return ok_status();
}

Status StageWorker::begin_runs(const control::StepPlan& plan) {
  const LlamaStageConfig& config = stage_.config();
  runs_.clear();
  tokens_.clear();
  for (const control::Run& run : plan.runs()) {
    const bool wants_logits = config.is_last && run.sample();
    runs_.push_back({run.sequence(), run.first_position(), run.tokens_size(), wants_logits});
    tokens_.insert(tokens_.end(), run.tokens().begin(), run.tokens().end());
  }
  const auto n_tokens = static_cast<std::int64_t>(tokens_.size());
  if (n_tokens > config.max_batched_tokens) {
    return invalid_argument("a plan of " + std::to_string(n_tokens) + " tokens, at most " +
                            std::to_string(config.max_batched_tokens) + " are allowed");
  }
  if (!config.is_first) {
    const std::span<std::byte> activations = stage_.activations(n_tokens);
    const comm::TensorTimes before = traced_tensor_times();
    const Status status =
        device_.recv(host_.rank() - 1, activations, Deadline::after(options_.step_timeout));
    if (!status.ok()) return status;
    stage_.clock().mark(StageTime::kUpstream);
    trace_transfer(plan.step(), before, activations.size(), /*sent=*/false);
  }
  if (Status status = stage_.forward(runs_, tokens_); !status.ok()) return status;
  const PlanTokens counts = tracer_.is_on() ? count_tokens(plan) : PlanTokens();
  tracer_.slice(TraceKind::kForward, plan.step(), counts.prefill, counts.decode);
  return ok_status();
}

Status StageWorker::finish_runs(Step& step) {
  const control::StepPlan& plan = step.plan;
  control::StepResult& result = step.result;
  stage_.clock().mark(StageTime::kBusy);
  if (stage_.config().is_last) {
    // On a device before the wait for what is sampled, which then hides the host's part of it.
    if (Status status = carry_out_after_runs(plan, result); !status.ok()) return status;
    if (Status status = sample(step); !status.ok()) return status;
    if (Status status = score_prompt(plan, result); !status.ok()) return status;
    stage_.clock().mark(StageTime::kBusy);
    const PlanTokens counts = tracer_.is_on() ? count_tokens(plan) : PlanTokens();
    tracer_.slice(TraceKind::kSample, plan.step(), counts.prefill, counts.decode);
    // The next step has begun: this one had nothing else, and sequences may be further now.
    if (step.has_kv_report) return ok_status();
  } else {
    // The next stage works while this one scores.
    const std::span<std::byte> activations =
        stage_.activations(static_cast<std::int64_t>(tokens_.size()));
    const comm::TensorTimes sending = traced_tensor_times();
    const Status sent =
        device_.send(host_.rank() + 1, activations, Deadline::after(options_.step_timeout));
    if (!sent.ok()) return sent;
    stage_.clock().mark(StageTime::kDownstream);
    trace_transfer(plan.step(), sending, activations.size(), /*sent=*/true);
    if (Status status = carry_out_after_runs(plan, result); !status.ok()) return status;
  }
  score_boundaries(plan, result);
  if (!result.boundary_scores().empty()) {
    stage_.clock().mark(StageTime::kCompress);
    tracer_.slice(TraceKind::kScore, plan.step(), result.boundary_scores_size());
  }
  for (const std::uint64_t sequence : plan.free_after_runs()) {
    if (Status status = free(sequence, result); !status.ok()) return status;
  }
  return ok_status();
}

comm::TensorTimes StageWorker::traced_tensor_times() {
  return tracer_.is_on() ? device_.tensor_times() : comm::TensorTimes();
}

// A slice of what moving a tensor took since `before`, after one of the wait for the other side.
void StageWorker::trace_transfer(std::uint64_t step, const comm::TensorTimes& before,
                                 std::size_t n_bytes, bool sent) {
  if (!tracer_.is_on()) return;
  const comm::TensorTimes now = device_.tensor_times();
  const std::uint64_t us = sent ? now.send_us - before.send_us : now.receive_us - before.receive_us;
  const auto bytes = static_cast<std::int64_t>(n_bytes);
  if (sent && !now.in_calls) {  // it was handed to the device
    tracer_.slice(TraceKind::kSend, step, 0, 0, bytes);
    return;
  }
  const std::int64_t transfer_ns = now.in_calls ? static_cast<std::int64_t>(us) * 1000 : 0;
  if (sent) {
    tracer_.transfer_and_wait(TraceKind::kSend, TraceKind::kAwaitRoom, step, transfer_ns, bytes);
  } else {
    tracer_.wait_and_transfer(TraceKind::kAwaitStage, TraceKind::kReceive, step, transfer_ns,
                              bytes);
  }
}

void StageWorker::score_boundaries(const control::StepPlan& plan, control::StepResult& result) {
  for (const control::Run& run : plan.runs()) {
    if (!stage_.is_boundary(run.sequence())) continue;
    const Clock::time_point start = Clock::now();
    const BoundarySummary summary = stage_.score_boundary(run.sequence());
    control::BoundaryScores& report = *result.add_boundary_scores();
    report.set_sequence(run.sequence());
    report.set_n_tokens(static_cast<std::int32_t>(store_.length(run.sequence())));
    report.set_n_candidates(summary.n_candidates);
    report.mutable_lazy_mass()->Add(summary.lazy_mass.begin(), summary.lazy_mass.end());
    for (const kernels::ScoreHistogram& histogram : summary.histograms) {
      control::Histogram& out = *report.add_histograms();
      out.mutable_bin()->Add(histogram.bin.begin(), histogram.bin.end());
      out.mutable_count()->Add(histogram.count.begin(), histogram.count.end());
    }
    report.set_score_us(micros_since(start));
  }
}

// The prompt tokens after rows [score_first, score_end) of a run, given the row's logits.
Status StageWorker::score_prompt(const control::StepPlan& plan, control::StepResult& result) {
  constexpr std::int32_t kRows = 16;
  const auto n_vocab = static_cast<std::int64_t>(stage_.config().model.vocab_size);
  std::int64_t first_row = 0;
  for (const control::Run& run : plan.runs()) {
    const std::int64_t begin = first_row;
    first_row += run.tokens_size();
    if (run.score_end() <= run.score_first()) continue;
    score_logits_.resize(static_cast<std::size_t>(kRows * n_vocab));
    const std::int32_t end = std::min(run.score_end(), run.tokens_size());
    for (std::int32_t row = std::max(run.score_first(), 0); row < end; row += kRows) {
      const std::int32_t n = std::min(kRows, end - row);
      const Rows logits(score_logits_.data(), n, n_vocab);
      if (Status status = stage_.prompt_logits(begin + row, logits); !status.ok()) return status;
      for (std::int32_t i = 0; i < n; ++i) {
        const std::int32_t next = row + i + 1;
        const std::int32_t token = next < run.tokens_size() ? run.tokens(next) : run.score_next();
        if (token < 0 || token >= n_vocab) continue;
        control::PromptScore& score = *result.add_prompt_scores();
        score.set_sequence(run.sequence());
        score.set_position(run.first_position() + next);
        sampler_.score({logits.row(i), static_cast<std::size_t>(n_vocab)}, token, run.score_dense(),
                       score);
      }
    }
  }
  return ok_status();
}

Status StageWorker::sample(Step& step) {
  const control::StepPlan& plan = step.plan;
  requests_.clear();
  std::int64_t row = 0;
  for (const control::Run& run : plan.runs()) {
    sampler_.saw(run.sequence(),
                 {run.tokens().data(), static_cast<std::size_t>(run.tokens_size())});
    if (!run.sample()) continue;
    requests_.push_back(sampler_.request(run.sequence(), row));
    for (const control::OpenSequence& choice : run.also_sample()) {
      requests_.push_back(sampler_.first_request(run.sequence(), choice, row));
    }
    ++row;
  }
  sampled_.resize(requests_.size());
  std::function<bool()> meanwhile;
  if (only_tokens_are_left(plan)) meanwhile = [&] { return begin_next(step); };
  if (Status status = stage_.sample(requests_, sampled_, meanwhile); !status.ok()) return status;
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    std::span<const float> logits;
    if (TokenSampler::wants_logits(requests_[i], sampled_[i])) {
      const auto raw = stage_.logits(requests_[i].row);
      if (!raw.ok()) return raw.status();
      logits = *raw;
    }
    *step.result.add_sampled() = sampler_.report(requests_[i], sampled_[i], logits);
  }
  return ok_status();
}

// Waits are what is left of an interval without the moving of bytes in it.
void StageWorker::report_times(control::StepResult& result) {
  StageTimes times = stage_.clock().take();
  const comm::TensorTimes now = device_.tensor_times();
  const std::uint64_t send_us = now.send_us - reported_tensor_times_.send_us;
  const std::uint64_t receive_us = now.receive_us - reported_tensor_times_.receive_us;
  reported_tensor_times_ = now;
  if (now.in_calls) {
    std::uint64_t& downstream = times[StageTime::kDownstream];
    downstream -= std::min(downstream, send_us);
    std::uint64_t& upstream = times[StageTime::kUpstream];
    upstream -= std::min(upstream, receive_us);
  }
  result.set_busy_us(times[StageTime::kBusy]);
  result.set_empty_us(times[StageTime::kEmpty]);
  result.set_upstream_us(times[StageTime::kUpstream]);
  result.set_downstream_us(times[StageTime::kDownstream]);
  result.set_compress_us(times[StageTime::kCompress]);
  result.set_send_us(send_us);
  result.set_receive_us(receive_us);
}

// Layers are reported when sequences came, went or were compressed, so that the last step before a
// pause leaves nothing out, and now and then while they only grow.
void StageWorker::report_kv(Step& step) {
  const control::StepPlan& plan = step.plan;
  control::StepResult& result = step.result;
  step.has_kv_report = true;
  const kvstore::PagePool& pool = store_.pool();
  result.set_kv_used_bytes(static_cast<std::uint64_t>(pool.n_used()) * pool.page_bytes());
  result.set_kv_peak_bytes(static_cast<std::uint64_t>(pool.peak_used()) * pool.page_bytes());
  result.set_used_pages(pool.n_used());
  result.set_reserved_pages(pool.n_reserved());
  const Clock::time_point now = Clock::now();
  const bool only_grew = plan.free().empty() && plan.free_after_runs().empty() &&
                         plan.compress().empty() && plan.fork().empty();
  if (only_grew && now - layers_reported_at_ < kLayerReports) return;
  layers_reported_at_ = now;
  const kvstore::KvUse use = store_.use();
  control::KvReport& report = *result.mutable_kv();
  report.set_logical_tokens(use.logical_tokens);
  report.set_layer_full_bytes(use.layer_full_bytes);
  report.mutable_form_bytes()->Add(use.form_bytes.begin(), use.form_bytes.end());
  for (const kvstore::KvUse::Layer& layer : use.layers) {
    report.add_layer_used_bytes(layer.used_bytes);
    report.add_layer_retained_tokens(layer.retained_tokens);
    report.add_layer_plan(static_cast<std::uint32_t>(layer.plan_kind + 1));
  }
}

}  // namespace spindle::worker
