#include "worker/pipeline/stage_worker.h"

#include <utility>

namespace spindle::worker {
namespace {

using Clock = std::chrono::steady_clock;

// Long waits are cut into short ones, so that a shutdown of the group ends them.
constexpr std::int64_t kPlanWaitMs = 500;

std::uint64_t micros_since(Clock::time_point start) {
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start).count());
}

}  // namespace

StageWorker::StageWorker(comm::HostGroup& host, comm::DeviceGroup& device, LlamaStage& stage,
                         kvstore::KvStore& store, const CpuContext& context,
                         StageWorkerOptions options)
    : host_(host),
      device_(device),
      stage_(stage),
      store_(store),
      sampler_(context),
      options_(std::move(options)) {
  const LlamaStageConfig& config = stage.config();
  hidden_.resize(static_cast<std::size_t>(config.max_batched_tokens) *
                 static_cast<std::size_t>(config.model.hidden_size));
}

Status StageWorker::run() {
  while (true) {
    auto message = host_.recv(0, comm::Channel::kPlan, Deadline::after_ms(kPlanWaitMs));
    if (!message.ok()) {
      if (message.status().code() == StatusCode::kDeadlineExceeded) continue;
      return message.status();
    }
    control::StepPlan plan;
    if (!plan.ParseFromString(message->bytes)) {
      return internal_error("rank " + std::to_string(host_.rank()) +
                            " received a step plan that cannot be parsed");
    }
    if (plan.shutdown()) return device_.flush(Deadline::after(options_.step_timeout));
    control::StepResult result;
    result.set_step(plan.step());
    result.set_stage(host_.rank());
    const Status status = do_step(plan, result);
    if (!status.ok()) result.set_error(status.to_string());
    report_kv(result);
    const Status sent = host_.send(0, comm::Channel::kResult, result.SerializeAsString(),
                                   Deadline::after(options_.step_timeout));
    if (!status.ok()) return status;
    if (!sent.ok()) return sent;
    if (options_.on_step) options_.on_step(plan.step());
    if (options_.check_invariants) store_.check_invariants();
  }
}

Status StageWorker::do_step(const control::StepPlan& plan, control::StepResult& result) {
  if (Status status = apply_sequences(plan, result); !status.ok()) return status;
  return plan.runs().empty() ? ok_status() : run_tokens(plan, result);
}

Status StageWorker::apply_sequences(const control::StepPlan& plan, control::StepResult& result) {
  const bool is_last = stage_.config().is_last;
  for (const control::ForkSequence& fork : plan.fork()) {
    const control::OpenSequence& child = fork.child();
    const Status status =
        store_.fork(fork.parent(), child.sequence(), child.prompt_tokens(), child.max_tokens());
    if (!status.ok()) return status;
    if (is_last) sampler_.fork(fork.parent(), child);
  }
  for (const std::uint64_t sequence : plan.free()) {
    const auto freed = store_.free(sequence);
    if (!freed.ok()) return freed.status();
    control::FreedSequence& report = *result.add_freed();
    report.set_sequence(sequence);
    report.set_full_bytes(freed->full_bytes);
    report.set_kept_bytes(freed->kept_bytes);
    if (is_last) sampler_.free(sequence);
  }
  for (const control::OpenSequence& open : plan.open()) {
    const Status status = store_.open(open.sequence(), open.max_tokens());
    if (!status.ok()) return status;
    if (is_last) sampler_.open(open);
  }
  return ok_status();
}

Status StageWorker::run_tokens(const control::StepPlan& plan, control::StepResult& result) {
  const LlamaStageConfig& config = stage_.config();
  runs_.clear();
  tokens_.clear();
  std::int64_t n_logits = 0;
  for (const control::Run& run : plan.runs()) {
    const bool wants_logits = config.is_last && run.sample();
    runs_.push_back({run.sequence(), run.first_position(), run.tokens_size(), wants_logits});
    tokens_.insert(tokens_.end(), run.tokens().begin(), run.tokens().end());
    n_logits += wants_logits ? 1 : 0;
  }
  const auto n_tokens = static_cast<std::int64_t>(tokens_.size());
  if (n_tokens > config.max_batched_tokens) {
    return invalid_argument("a plan of " + std::to_string(n_tokens) + " tokens, at most " +
                            std::to_string(config.max_batched_tokens) + " are allowed");
  }
  const Rows hidden(hidden_.data(), n_tokens, config.model.hidden_size);
  const auto bytes = std::as_writable_bytes(
      std::span(hidden_).first(static_cast<std::size_t>(n_tokens * config.model.hidden_size)));
  if (!config.is_first) {
    const Status status =
        device_.recv(host_.rank() - 1, bytes, Deadline::after(options_.step_timeout));
    if (!status.ok()) return status;
  }
  const std::size_t n_logit_values =
      static_cast<std::size_t>(n_logits) * static_cast<std::size_t>(config.model.vocab_size);
  if (logits_.size() < n_logit_values) logits_.resize(n_logit_values);

  const Clock::time_point start = Clock::now();
  const Status status = stage_.forward(runs_, tokens_, hidden,
                                       Rows(logits_.data(), n_logits, config.model.vocab_size));
  if (!status.ok()) return status;
  if (!config.is_last) {
    result.set_busy_us(micros_since(start));
    return device_.send(host_.rank() + 1, bytes, Deadline::after(options_.step_timeout));
  }
  const Status sampled = sample(plan, result);
  result.set_busy_us(micros_since(start));
  return sampled;
}

Status StageWorker::sample(const control::StepPlan& plan, control::StepResult& result) {
  const auto n_vocab = static_cast<std::size_t>(stage_.config().model.vocab_size);
  std::span<const float> rest(logits_);
  for (const control::Run& run : plan.runs()) {
    sampler_.saw(run.sequence(),
                 {run.tokens().data(), static_cast<std::size_t>(run.tokens_size())});
    if (!run.sample()) continue;
    const std::span<const float> logits = rest.first(n_vocab);
    rest = rest.subspan(n_vocab);
    *result.add_sampled() = sampler_.sample(run.sequence(), logits);
    for (const control::OpenSequence& choice : run.also_sample()) {
      *result.add_sampled() = sampler_.sample_first(run.sequence(), choice, logits);
    }
  }
  return ok_status();
}

void StageWorker::report_kv(control::StepResult& result) const {
  const kvstore::KvStats stats = store_.stats();
  result.set_kv_used_bytes(stats.used_bytes);
  result.set_kv_peak_bytes(stats.peak_bytes);
  result.mutable_layer_used_bytes()->Add(stats.layer_used_bytes.begin(),
                                         stats.layer_used_bytes.end());
}

}  // namespace spindle::worker
