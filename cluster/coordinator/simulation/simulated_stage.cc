#include "cluster/coordinator/simulation/simulated_stage.h"

#include <algorithm>
#include <string>

namespace spindle::coordinator::simulation {
namespace {

Status not_allowed(std::uint64_t sequence, const std::string& what) {
  return invalid_argument("sequence " + std::to_string(sequence) + ": " + what);
}

// Scores of n candidates of one head, as a histogram: the same on every run.
void add_histogram(std::uint64_t key, std::int64_t n, control::Histogram& out) {
  constexpr std::uint32_t kFirstBin = 0x3900;  // of a score of about 1e-4
  std::uint32_t bin = kFirstBin;
  while (n > 0) {
    key = mix(key);
    const auto count = std::min<std::int64_t>(
        n, 1 + static_cast<std::int64_t>(key % static_cast<std::uint64_t>(n / 8 + 2)));
    bin += 1 + static_cast<std::uint32_t>((key >> 32) % 40);
    out.add_bin(bin);
    out.add_count(static_cast<std::uint32_t>(count));
    n -= count;
  }
}

// Even layers are lazy.
double lazy_mass(int layer) { return layer % 2 == 0 ? 0.95 : 0.5; }

}  // namespace

SamplingKey sampling_key(const control::OpenSequence& open) {
  const control::Sampling& sampling = open.sampling();
  return {.seed = sampling.seed(),
          .request = sampling.request(),
          .choice = sampling.choice(),
          .min_tokens = sampling.min_tokens(),
          .banned_before_min = {sampling.banned_before_min().begin(),
                                sampling.banned_before_min().end()}};
}

std::int64_t SimulatedStage::reserve_pages(const control::OpenSequence& open) {
  const std::int64_t told =
      config_.stage < open.reserve_pages_size() ? open.reserve_pages(config_.stage) : 0;
  return told + (strikes(Fault::kLargeReservation) ? 1 : 0);
}

SimulatedStage::Sequence SimulatedStage::make_sequence(const control::OpenSequence& open) const {
  Sequence sequence;
  sequence.key = sampling_key(open);
  sequence.prompt_tokens = open.prompt_tokens();
  sequence.boundaries.assign(open.boundaries().begin(), open.boundaries().end());
  sequence.needs = open.needs();
  if (config_.is_last) sequence.hashes = {kEmptySequence};
  return sequence;
}

Status SimulatedStage::carry_out(const control::StepPlan& plan, control::StepResult& result,
                                 StepWork& work) {
  if (plan.step() != step_ + 1) {
    return invalid_argument("step " + std::to_string(plan.step()) + " comes after step " +
                            std::to_string(step_));
  }
  step_ = plan.step();
  result.set_step(plan.step());
  result.set_stage(config_.stage);
  if (Status status = compress_all(plan, false, result, work); !status.ok()) return status;
  for (const control::ForkSequence& order : plan.fork()) {
    if (Status status = fork(order); !status.ok()) return status;
  }
  for (const std::uint64_t sequence : plan.free()) {
    if (Status status = free(sequence, result); !status.ok()) return status;
  }
  for (const control::OpenSequence& order : plan.open()) {
    if (Status status = open(order); !status.ok()) return status;
  }
  if (Status status = grow_all(plan, false, result); !status.ok()) return status;
  for (const control::Run& order : plan.runs()) {
    if (Status status = run(order, result, work); !status.ok()) return status;
  }
  if (Status status = compress_all(plan, true, result, work); !status.ok()) return status;
  if (Status status = grow_all(plan, true, result); !status.ok()) return status;
  for (const std::uint64_t sequence : plan.free_after_runs()) {
    if (Status status = free(sequence, result); !status.ok()) return status;
  }
  result.set_kv_used_bytes(static_cast<std::uint64_t>(kv_.book().n_used()) *
                           config_.kv.shape.page_bytes());
  result.set_used_pages(kv_.book().n_used());
  result.set_reserved_pages(kv_.book().n_reserved());
  return ok_status();
}

Status SimulatedStage::compress_all(const control::StepPlan& plan, bool after_runs,
                                    control::StepResult& result, StepWork& work) {
  for (const control::Compress& order : plan.compress()) {
    if (order.after_runs() != after_runs) continue;
    if (Status status = compress(order, result, work); !status.ok()) return status;
  }
  return ok_status();
}

Status SimulatedStage::grow_all(const control::StepPlan& plan, bool after_runs,
                                control::StepResult& result) {
  for (const control::GrowSequence& order : plan.grow()) {
    if (order.after_runs() != after_runs) continue;
    const std::int64_t more =
        config_.stage < order.more_pages_size() ? order.more_pages(config_.stage) : 0;
    if (Status status = kv_.grow(order, more, *result.add_grown()); !status.ok()) return status;
  }
  return ok_status();
}

Status SimulatedStage::compress(const control::Compress& order, control::StepResult& result,
                                StepWork& work) {
  auto* const found = sequences_.find(order.sequence());
  if (found == nullptr) return not_allowed(order.sequence(), "compressed and not open");
  Sequence& sequence = *found;
  if (order.selects() != sequence.is_scored) {
    return not_allowed(order.sequence(), "a selection without scores, or scores without it");
  }
  if (!order.heads().empty()) {
    sequence.is_compressed =
        std::any_of(order.heads().begin(), order.heads().end(), [](const auto& head) {
          return head.mode() != 0 || head.k_format() != 0 || head.v_format() != 0;
        });
    sequence.sinks = order.sinks();
  } else if (order.sinks() != sequence.sinks) {
    return not_allowed(order.sequence(), "its sinks change");
  }
  control::CompressedSequence report;
  if (Status status = kv_.compress(order, report); !status.ok()) return status;
  sequence.is_scored = false;
  sequence.compressed_at = order.n_tokens();
  work.boundary_tokens += order.n_tokens();
  if (config_.stage < order.planned_bytes_size()) {
    planned_bytes_ += order.planned_bytes(config_.stage);
    kept_bytes_ += static_cast<std::uint64_t>(report.used_pages()) * config_.kv.shape.page_bytes();
  }
  if (strikes(Fault::kLowReport)) report.set_used_pages(0);
  *result.add_compressed() = std::move(report);
  return ok_status();
}

Status SimulatedStage::fork(const control::ForkSequence& fork) {
  const control::OpenSequence& child = fork.child();
  auto* const found = sequences_.find(fork.parent());
  if (found == nullptr) return not_allowed(fork.parent(), "forked and not open");
  const Sequence& parent = *found;
  if (parent.is_scored) return not_allowed(fork.parent(), "forked before its boundary");
  if (Status status = kv_.fork(fork.parent(), child.sequence(), fork.n_tokens(), child.max_tokens(),
                               reserve_pages(child));
      !status.ok()) {
    return status;
  }
  Sequence forked = make_sequence(child);
  forked.n_tokens = fork.n_tokens();
  forked.is_compressed = parent.is_compressed;
  forked.compressed_at = parent.compressed_at;
  forked.sinks = parent.sinks;
  if (config_.is_last) {
    forked.hashes.assign(parent.hashes.begin(), parent.hashes.begin() + fork.n_tokens() + 1);
    if (!fork.tokens().empty() &&
        append(kEmptySequence,
               {fork.tokens().data(), static_cast<std::size_t>(fork.tokens_size())}) !=
            forked.hashes.back()) {
      return not_allowed(child.sequence(), "the tokens copied are not those of its parent");
    }
  }
  sequences_.open(child.sequence(), std::move(forked));
  return ok_status();
}

Status SimulatedStage::free(std::uint64_t sequence, control::StepResult& result) {
  control::FreedSequence report;
  if (Status status = kv_.free(sequence, report); !status.ok()) return status;
  sequences_.close(sequence);
  if (!strikes(Fault::kLostFree)) *result.add_freed() = std::move(report);
  return strikes(Fault::kLeakedPage) ? kv_.leak_page() : ok_status();
}

Status SimulatedStage::open(const control::OpenSequence& open) {
  if (Status status =
          kv_.open(open.sequence(), open.max_tokens(), reserve_pages(open), open.granted_tokens());
      !status.ok()) {
    return status;
  }
  sequences_.open(open.sequence(), make_sequence(open));
  return ok_status();
}

Status SimulatedStage::check_run(const control::Run& run, const Sequence& sequence) const {
  const std::int64_t begin = sequence.n_tokens;
  const std::int64_t end = begin + run.tokens_size();
  if (run.tokens().empty() || run.first_position() != begin) {
    return not_allowed(run.sequence(), "a run from " + std::to_string(run.first_position()) +
                                           " on, it holds " + std::to_string(begin));
  }
  if (sequence.ran_in == step_) return not_allowed(run.sequence(), "two runs in one step");
  if (sequence.is_scored) {
    return not_allowed(run.sequence(), "a run between a boundary and its compression");
  }
  if (sequence.next_boundary < sequence.boundaries.size() &&
      end > sequence.boundaries[sequence.next_boundary]) {
    return not_allowed(run.sequence(), "a run across a boundary");
  }
  if (!sequence.is_compressed) return ok_status();
  const std::int64_t n_generated = std::max<std::int64_t>(begin - sequence.prompt_tokens, 0);
  if (n_generated > 0 && n_generated % kvstore::kGeneratedBoundary == 0 &&
      sequence.compressed_at != begin) {
    return not_allowed(run.sequence(), "a boundary of its output was left out");
  }
  const std::int64_t next =
      (n_generated / kvstore::kGeneratedBoundary + 1) * kvstore::kGeneratedBoundary;
  if (end > sequence.prompt_tokens + next) {
    return not_allowed(run.sequence(), "a run across a boundary of its output");
  }
  return ok_status();
}

Status SimulatedStage::run(const control::Run& run, control::StepResult& result, StepWork& work) {
  auto* const found = sequences_.find(run.sequence());
  if (found == nullptr) return not_allowed(run.sequence(), "it runs and is not open");
  Sequence& sequence = *found;
  if (Status status = check_run(run, sequence); !status.ok()) return status;
  if (sequence.first_run < 0) sequence.first_run = run.first_position();
  if (Status status = kv_.extend(run.sequence(), run.tokens_size(), work.kv_pages); !status.ok()) {
    return status;
  }
  sequence.ran_in = step_;
  sequence.n_tokens += run.tokens_size();
  const std::int64_t length = sequence.n_tokens;
  work.n_tokens += run.tokens_size();
  work.attention_pairs += run.tokens_size() * length;
  if (sequence.next_boundary < sequence.boundaries.size() &&
      length == sequence.boundaries[sequence.next_boundary]) {
    score(run.sequence(), sequence, result);
    work.boundary_tokens += length;
  }
  if (!config_.is_last) return ok_status();
  for (const std::int32_t token : run.tokens()) {
    sequence.hashes.push_back(append(sequence.hashes.back(), token));
  }
  if (run.sample()) work.n_sampled += 1;
  sample(run, sequence, result);
  return ok_status();
}

void SimulatedStage::score(std::uint64_t id, Sequence& sequence, control::StepResult& result) {
  const std::int64_t n = kv_.length(id);
  std::int64_t window = std::max<std::int64_t>(n - kvstore::kObservationWindow, 0);
  if (sequence.needs.window_scores()) {
    const std::int64_t before =
        sequence.next_boundary == 0 ? 0 : sequence.boundaries[sequence.next_boundary - 1];
    window = std::max({window, before, sequence.first_run});
  }
  const std::int64_t tail = kv_.tail_begin(id);
  const std::int64_t first =
      std::min(tail == 0 ? std::int64_t{sequence.needs.sinks()} : tail, window);
  control::BoundaryScores report;
  report.set_sequence(id);
  report.set_n_tokens(static_cast<std::int32_t>(n));
  report.set_n_candidates(window - first);
  for (int i = 0; i < config_.kv.n_layers && sequence.needs.lazy_mass(); ++i) {
    report.add_lazy_mass(lazy_mass(config_.kv.first_layer + i));
  }
  const int first_table = config_.kv.first_layer * config_.kv.shape.n_kv_heads;
  for (int i = 0; i < kv_.n_tables() && sequence.needs.histograms(); ++i) {
    const auto table = static_cast<std::uint64_t>(first_table + i);
    add_histogram(mix(table) + static_cast<std::uint64_t>(n), window - first,
                  *report.add_histograms());
  }
  report.set_score_us(1);
  ++sequence.next_boundary;
  sequence.is_scored = true;
  if (!strikes(Fault::kLostScores)) *result.add_boundary_scores() = std::move(report);
}

void SimulatedStage::sample(const control::Run& run, const Sequence& sequence,
                            control::StepResult& result) {
  for (int row = run.score_first(); row < run.score_end(); ++row) {
    const std::int32_t token = row + 1 < run.tokens_size() ? run.tokens(row + 1) : run.score_next();
    if (token < 0) continue;
    control::PromptScore& score = *result.add_prompt_scores();
    score.set_sequence(run.sequence());
    score.set_position(run.first_position() + row + 1);
    score.set_logprob(-static_cast<float>(token));
  }
  if (!run.sample()) return;
  const auto length = static_cast<std::int64_t>(sequence.hashes.size()) - 1;
  const auto add = [&](std::uint64_t id, const SamplingKey& key, std::int64_t prompt_tokens) {
    std::int32_t token =
        next_token(config_.tokens, sequence.hashes.back(), key, length - prompt_tokens);
    if (strikes(Fault::kWrongToken)) token = (token + 1) % config_.tokens.vocab_size;
    const int n_times = strikes(Fault::kTokenTwice) ? 2 : 1;
    for (int i = 0; i < n_times; ++i) {
      control::Sampled& sampled = *result.add_sampled();
      sampled.set_sequence(id);
      sampled.set_token(token);
    }
  };
  add(run.sequence(), sequence.key, sequence.prompt_tokens);
  for (const control::OpenSequence& choice : run.also_sample()) {
    add(choice.sequence(), sampling_key(choice), choice.prompt_tokens());
  }
}

}  // namespace spindle::coordinator::simulation
