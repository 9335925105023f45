#include "cluster/coordinator/simulation/scenario.h"

#include <algorithm>
#include <utility>

#include "cluster/coordinator/kv_balance.h"

namespace spindle::coordinator::simulation {
namespace {

constexpr int kMaxModelLen = 700;
constexpr std::int32_t kEos = 7;
constexpr std::int64_t kStepTimeoutUs = 2'000'000;

}  // namespace

Scenario::Scenario(std::uint64_t seed, Fault fault, std::ostream* trace)
    : seed_(seed), fault_(fault), trace_(trace), random_(seed) {
  simulation_ = std::make_unique<Simulation>(random_config());
  simulation_->set_on_end([this](engine::RequestHandle, const Life& life) { on_end(life); });
  schedule_arrivals();
  if (fault == Fault::kNone) schedule_disruptions();
}

LatencyModel Scenario::random_latency() {
  LatencyModel latency;
  latency.launch = random_.between_real(2, 40);
  latency.weights = random_.between_real(10, 300);
  latency.token = random_.between_real(0.2, 4);
  latency.logits = random_.between_real(0, 5);
  latency.kv_page = random_.between_real(0, 0.5);
  latency.pair = random_.between_real(0, 0.01);
  latency.boundary_token = random_.between_real(0, 1);
  return latency;
}

SimulationConfig Scenario::random_config() {
  SimulationConfig config;
  n_stages_ = static_cast<std::size_t>(random_.between(1, 5));
  vocab_size_ = static_cast<std::int32_t>(random_.between(40, 400));
  config.seed = seed_;
  config.trace = trace_;
  config.step_timeout_us = kStepTimeoutUs;
  config.faults = FaultInjector(fault_, static_cast<std::uint64_t>(random_.between(1, 60)));
  config.shape.n_kv_heads = static_cast<int>(random_.between(1, 2));
  config.shape.head_dim = 32;
  config.tokens = {.vocab_size = vocab_size_,
                   .eos = kEos,
                   .eos_every = static_cast<std::int32_t>(random_.between(0, 2) * 40)};

  habits_.has_policies = random_.one_in(2);
  habits_.has_sessions = random_.one_in(2);
  habits_.bursts = random_.one_in(2);
  habits_.n_priorities = random_.one_in(3) ? 3 : 1;
  habits_.n_owners = random_.one_in(3) ? 3 : 1;
  habits_.timeout_one_in = random_.one_in(3) ? static_cast<int>(random_.between(2, 10)) : 0;
  habits_.n_requests = static_cast<int>(random_.between(8, 70));
  habits_.gap_us = random_.between(50, 8000);
  habits_.cancel_one_in = static_cast<int>(random_.between(3, 12));
  habits_.finish_one_in = static_cast<int>(random_.between(5, 20));
  habits_.patience_us = random_.between(100, 40000);
  habits_.max_prompt = static_cast<int>(random_.between(20, 350));
  habits_.max_output = static_cast<int>(random_.between(4, 150));

  // A pool of this many tokens where memory is plenty; never so little that nothing fits.
  const std::int64_t pool_tokens = random_.between(400, 2600);
  for (std::size_t s = 0; s < n_stages_; ++s) {
    StageCapacity stage;
    stage.n_layers = static_cast<int>(random_.between(1, 2));
    const double share = random_.between_real(0.5, 1.0);
    stage.n_pages =
        kvstore::stage_pages(config.shape, stage.n_layers,
                             static_cast<std::int64_t>(share * static_cast<double>(pool_tokens)));
    n_layers_ += stage.n_layers;
    config.stages.push_back(stage);
    config.latency.push_back(random_latency());
  }
  config.link.control = random_.between_real(5, 400);
  config.link.activations = random_.between_real(1, 60);
  config.link.activations_token = random_.between_real(0, 0.5);
  config.link.jitter = random_.between_real(0, 1);
  config.link.late_one_in = random_.one_in(2) ? static_cast<int>(random_.between(4, 40)) : 0;
  config.link.late_us = random_.between_real(100, 10000);

  SchedulerConfig& scheduler = config.scheduler;
  max_num_seqs_ = static_cast<int>(random_.between(2, 10));
  scheduler.max_num_seqs = max_num_seqs_;
  scheduler.max_num_batched_tokens =
      static_cast<int>(random_.one_in(16) ? random_.between(1, 15) : random_.between(16, 160));
  scheduler.max_in_flight =
      static_cast<int>(random_.between(1, static_cast<std::int64_t>(n_stages_) + 2));
  scheduler.max_num_queued_reqs = static_cast<int>(random_.between(3, 40));
  scheduler.max_num_queued_tokens = random_.between(600, 8000);
  if (random_.one_in(2)) scheduler.attention_parity_tokens = random_.between(50, 2000);
  scheduler.seed = seed_;
  scheduler.eos_token_ids = {kEos};
  scheduler.limits.vocab_size = vocab_size_;
  scheduler.limits.max_model_len = kMaxModelLen;
  scheduler.kv_model.n_layers = n_layers_;
  scheduler.kv_model.n_heads = config.shape.n_kv_heads * static_cast<int>(random_.between(1, 3));
  scheduler.kv_model.n_kv_heads = config.shape.n_kv_heads;
  scheduler.kv_model.head_dim = config.shape.head_dim;
  scheduler.kv_model.vocab_size = vocab_size_;
  scheduler.kv_model.max_model_len = kMaxModelLen;
  scheduler.kv_model.token_table = random_.one_in(2);
  scheduler.max_sessions = static_cast<int>(random_.between(1, 4));
  scheduler.session_ttl_us = random_.between(20'000, 5'000'000);
  scheduler.max_session_bytes = random_.one_in(2) ? 0 : 1 << 18;
  if (habits_.has_policies && random_.one_in(2)) add_balance(config);
  return config;
}

// Requests of one profile whose size the balancer may change, on a cluster where they fill the
// memory, and a balancer that is in a hurry.
void Scenario::add_balance(SimulationConfig& config) {
  constexpr std::array kProfiles{kvstore::KvProfile::kSpindle, kvstore::KvProfile::kSnapKv,
                                 kvstore::KvProfile::kDefensive, kvstore::KvProfile::kStreaming};
  kvstore::KvPolicy policy;
  policy.profile = kProfiles[static_cast<std::size_t>(random_.index(kProfiles.size()))];
  policy.best_effort = true;
  KvBalanceOptions settings;
  settings.typical_tokens = 300;
  settings.warmup_us = 1000;
  settings.warmup_steps = 2;
  settings.cooldown_us = random_.between(500, 20'000);
  settings.relief_hold_us = random_.between(1000, 50'000);
  settings.smoothing_us = random_.between(500, 20'000);
  config.scheduler.budget_report_steps = static_cast<int>(random_.between(1, 8));
  auto balance = make_kv_balance(settings, policy, config.scheduler, config.stages);
  if (!balance.ok() || !balance->has_value()) return;
  config.balance = **std::move(balance);
  habits_.balanced_profile = policy.profile;
  habits_.max_prompt = 350;
}

void Scenario::schedule_arrivals() {
  std::int64_t at = 1;
  for (int i = 0; i < habits_.n_requests; ++i) {
    const bool is_same_burst = habits_.bursts && !random_.one_in(8);
    if (!is_same_burst) {
      const double mean = static_cast<double>(habits_.gap_us) * (habits_.bursts ? 8 : 1);
      at += static_cast<std::int64_t>(random_.exponential(mean));
    }
    simulation_->clock().at(at, [this] { arrive(); });
  }
}

void Scenario::schedule_disruptions() {
  const std::int64_t span = habits_.gap_us * habits_.n_requests + 10'000;
  EventQueue& clock = simulation_->clock();
  const auto sometime = [&] { return random_.between(1, span); };
  if (random_.one_in(16)) {
    clock.at(sometime(), [this] { simulation_->start_draining(); });
  }
  if (random_.one_in(14)) {
    clock.at(sometime(), [this] {
      simulation_->start_draining();
      simulation_->end_all(unavailable("the server is stopping"));
    });
  }
  if (random_.one_in(12)) {
    const auto stage = static_cast<std::size_t>(random_.index(n_stages_));
    clock.at(sometime(), [this, stage] { simulation_->stop_stage(stage); });
  }
  if (random_.one_in(20)) {
    const auto stage = static_cast<std::size_t>(random_.index(n_stages_));
    clock.at(sometime(), [this, stage] { simulation_->fail_stage(stage); });
  }
}

void Scenario::arrive() {
  engine::EngineRequest request = random_request();
  const int n_choices = request.sampling.n_choices;
  const auto handle = simulation_->submit(std::move(request));
  if (!handle.ok()) {
    ++result_.n_refused;
    return;
  }
  EventQueue& clock = simulation_->clock();
  if (random_.one_in(habits_.cancel_one_in)) {
    clock.after(random_.between(0, habits_.patience_us),
                [this, id = *handle] { simulation_->cancel(id); });
  }
  if (random_.one_in(habits_.finish_one_in)) {
    const auto choice = static_cast<std::int32_t>(random_.between(0, n_choices - 1));
    clock.after(random_.between(0, habits_.patience_us),
                [this, id = *handle, choice] { simulation_->finish_choice(id, choice); });
  }
}

engine::EngineRequest Scenario::random_request() {
  engine::EngineRequest request;
  const std::int64_t n_prompt = random_.between(1, habits_.max_prompt);
  for (std::int64_t i = 0; i < n_prompt; ++i) {
    request.prompt_ids.push_back(static_cast<std::int32_t>(random_.between(0, vocab_size_ - 1)));
  }
  engine::SamplingParams& sampling = request.sampling;
  sampling.max_tokens = static_cast<std::int32_t>(random_.between(1, habits_.max_output));
  if (random_.one_in(4)) {
    sampling.n_choices = static_cast<std::int32_t>(random_.between(2, std::min(max_num_seqs_, 4)));
  }
  sampling.ignore_eos = random_.one_in(2);
  if (random_.one_in(3)) {
    sampling.has_seed = true;
    sampling.seed = static_cast<std::uint64_t>(random_.between(0, 1000));
  }
  if (random_.one_in(4)) {
    sampling.min_tokens = static_cast<std::int32_t>(random_.between(0, sampling.max_tokens));
  }
  if (random_.one_in(6)) {
    sampling.stop_token_ids.push_back(
        static_cast<std::int32_t>(random_.between(0, vocab_size_ - 1)));
  }
  request.priority = static_cast<std::int32_t>(random_.between(0, habits_.n_priorities - 1));
  request.owner = static_cast<std::uint64_t>(random_.between(1, habits_.n_owners));
  if (habits_.timeout_one_in > 0 && random_.one_in(habits_.timeout_one_in)) {
    request.timeout_us = random_.between(500, 2 * habits_.patience_us);
  }
  if (habits_.has_sessions && !random_.one_in(3)) add_session(request);
  if (habits_.has_policies && !random_.one_in(4)) add_policy(request);
  if (random_.one_in(6)) add_scores(request);
  const auto n_before = static_cast<std::int64_t>(request.prompt_ids.size());
  if (request.session_id.empty() && sampling.n_choices == 1 && n_before > 1 && random_.one_in(6)) {
    request.resumed_tokens = static_cast<std::int32_t>(random_.between(1, n_before - 1));
  }
  return request;
}

void Scenario::add_policy(engine::EngineRequest& request) {
  const auto profiles = kvstore::all_profiles();
  kvstore::KvPolicy& policy = request.kv_policy;
  policy.profile = profiles[static_cast<std::size_t>(random_.index(profiles.size()))];
  if (habits_.balanced_profile && !random_.one_in(5)) policy.profile = *habits_.balanced_profile;
  constexpr std::array kRecents{0, 32, 64, 200};
  policy.recent = kRecents[static_cast<std::size_t>(random_.index(kRecents.size()))];
  policy.best_effort = true;
  const bool streams = policy.profile == kvstore::KvProfile::kStreaming ||
                       policy.profile == kvstore::KvProfile::kSimLayerKv ||
                       policy.profile == kvstore::KvProfile::kSimLayerKvInt4;
  if (streams && random_.one_in(3)) policy.window = 40;
  if (random_.one_in(4)) policy.overrides.push_back(random_override());
  std::int64_t at = 0;
  while (!random_.one_in(3)) {
    at += random_.between(1, 150);
    if (at > static_cast<std::int64_t>(request.prompt_ids.size())) break;
    request.compress_at.push_back(static_cast<std::int32_t>(at));
  }
}

kvstore::HeadOverride Scenario::random_override() {
  kvstore::HeadOverride range;
  range.last_layer = static_cast<int>(random_.between(0, n_layers_ - 1));
  range.first_layer = static_cast<int>(random_.between(0, range.last_layer));
  switch (random_.between(0, 2)) {
    case 0:
      range.codec = kvstore::parse_codec("int4");
      break;
    case 1:
      range.keep_ratio = random_.between_real(0.1, 0.9);
      break;
    default:
      range.window = random_.between(8, 64);
  }
  return range;
}

// A first turn, or one that goes on with what an earlier one of that name left.
void Scenario::add_session(engine::EngineRequest& request) {
  const auto index = static_cast<std::size_t>(random_.index(histories_.size()));
  request.session_id = std::to_string(index);
  request.owner = 1;
  std::vector<std::int32_t> before = histories_[index];
  request.keep_session = before.empty() || !random_.one_in(4);
  if (before.size() > 400 || random_.one_in(8)) before.clear();
  if (random_.one_in(6)) before.resize(before.size() / 2);
  before.insert(before.end(), request.prompt_ids.begin(), request.prompt_ids.end());
  request.prompt_ids = std::move(before);
}

void Scenario::add_scores(engine::EngineRequest& request) {
  const auto n = static_cast<std::int64_t>(request.prompt_ids.size());
  if (n < 2) return;
  const std::int64_t first = random_.between(1, n - 1);
  request.prompt_scores.first = static_cast<std::int32_t>(first);
  request.prompt_scores.end = static_cast<std::int32_t>(random_.between(first + 1, n));
}

void Scenario::on_end(const Life& life) {
  if (!life.status.ok()) {
    ++(life.status.code() == StatusCode::kCancelled ? result_.n_cancelled : result_.n_other);
    return;
  }
  ++result_.n_ok;
  result_.n_continued += life.summary.cached_tokens > 0 ? 1 : 0;
  result_.n_forked += static_cast<int>(life.choices.size()) - 1;
  for (const engine::BoundaryUse& use : life.summary.boundaries) {
    result_.n_compressed += use.heads.back().plan != "FULL raw/raw" ? 1 : 0;
  }
  if (!life.request.keep_session) return;
  std::vector<std::int32_t>& history =
      histories_[static_cast<std::size_t>(life.request.session_id.front() - '0')];
  history = life.request.prompt_ids;
  const std::vector<std::int32_t>& output = life.choices.front().output;
  history.insert(history.end(), output.begin(), output.end());
}

ScenarioResult Scenario::run() {
  simulation_->run();
  result_.violation = simulation_->violation();
  result_.fault_struck = simulation_->faults().has_struck();
  result_.cluster_failed = simulation_->has_failed();
  result_.n_steps = simulation_->metrics().n_steps;
  result_.n_budget_plans = static_cast<int>(simulation_->metrics().n_budget_plans);
  const engine::EngineStats stats = simulation_->scheduler().stats();
  result_.n_preempted = static_cast<int>(stats.preemptions);
  result_.n_expired = static_cast<int>(stats.expired);
  return result_;
}

}  // namespace spindle::coordinator::simulation
