#pragma once
// Stages for the scheduler's tests: real KV stores that carry out every plan as the workers do,
// made-up scores at boundaries, and a model whose next token is a hash of the sequence. They check
// that a plan makes sense.

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "cluster/coordinator/scheduler.h"
#include "tests/kvstore/test_store.h"

namespace spindle::coordinator {

inline constexpr kvstore::KvShape kShape{1, 32, DType::kF16, 32};
inline constexpr std::int32_t kVocab = 50;
inline constexpr std::int32_t kEos = 7;
inline constexpr int kGroup = 2;  // query heads of a KV head

inline std::int32_t next_token(const std::vector<std::int32_t>& tokens) {
  std::uint32_t hash = 2166136261u;
  for (const std::int32_t token : tokens)
    hash = (hash ^ static_cast<std::uint32_t>(token)) * 16777619u;
  return static_cast<std::int32_t>((hash >> 7) % kVocab);
}

// What a sequence that sampled `choice` of this prompt generates.
inline std::vector<std::int32_t> expected_output(std::vector<std::int32_t> tokens, int choice,
                                                 std::size_t n) {
  std::vector<std::int32_t> output;
  for (std::size_t i = 0; i < n; ++i) {
    output.push_back((next_token(tokens) + (i == 0 ? choice : 0)) % kVocab);
    tokens.push_back(output.back());
  }
  return output;
}

class SimulatedStages {
 public:
  explicit SimulatedStages(const std::vector<StageCapacity>& stages, bool token_table = true) {
    int first_layer = 0;
    for (const StageCapacity& stage : stages) {
      kvstore::testing::TestStore::Options options;
      options.n_layers = stage.n_layers;
      options.n_kv_heads = kShape.n_kv_heads;
      options.head_dim = kShape.head_dim;
      options.vocab = kVocab;
      options.token_table = token_table;
      options.n_pages = stage.n_pages;
      stages_.push_back({std::make_unique<kvstore::testing::TestStore>(options), first_layer, {}});
      first_layer += stage.n_layers;
    }
  }

  std::vector<control::StepResult> run(const control::StepPlan& plan) {
    std::vector<control::StepResult> results;
    for (std::size_t stage = 0; stage < stages_.size(); ++stage) {
      control::StepResult& result = results.emplace_back();
      result.set_step(plan.step());
      result.set_stage(static_cast<int>(stage));
      apply_sequences(plan, stage, result);
      run_tokens(plan, stage, result);
      compress_all(plan, true, stages_[stage], result);
      grow_all(plan, true, stage, result);
      for (const std::uint64_t id : plan.free_after_runs()) free(id, stages_[stage], result);
      result.set_used_pages(stages_[stage].kv->store().pool().n_used());
      result.set_reserved_pages(stages_[stage].kv->store().pool().n_reserved());
    }
    return results;
  }

  std::int64_t held_pages(std::size_t stage) const { return stages_[stage].kv->held_pages(); }
  kvstore::testing::TestStore& store(std::size_t stage) { return *stages_[stage].kv; }
  // Decodes everything that every sequence holds.
  void expect_content() {
    for (Stage& stage : stages_) {
      for (const auto& [id, tokens] : stage.kv->sequences()) stage.kv->expect_content_of(id);
    }
  }

 private:
  struct Sequence {
    control::OpenSequence open;
    std::size_t next_boundary = 0;
    bool scored = false;  // a boundary that is not carried out yet
    std::int64_t first_run = -1;
    bool is_compressed = false;      // its plan is not the full-precision one
    std::int64_t compressed_at = 0;  // last
    int sinks = 0;
    // Of the last boundary, by table: first candidate and the end of them.
    std::vector<std::pair<std::int64_t, std::int64_t>> candidates;
  };
  struct Stage {
    std::unique_ptr<kvstore::testing::TestStore> kv;
    int first_layer = 0;
    std::map<std::uint64_t, Sequence> sequences;
  };

  // In the order of a stage worker.
  void apply_sequences(const control::StepPlan& plan, std::size_t index,
                       control::StepResult& result) {
    Stage& stage = stages_[index];
    compress_all(plan, false, stage, result);
    for (const auto& fork : plan.fork()) {
      const Sequence parent = stage.sequences.at(fork.parent());
      ASSERT_FALSE(parent.scored) << "a fork of what is to be compressed";
      const auto& child = fork.child();
      const Status status =
          stage.kv->fork(fork.parent(), child.sequence(), fork.n_tokens(), child.max_tokens(),
                         child.reserve_pages(static_cast<int>(index)));
      ASSERT_TRUE(status.ok()) << status.to_string();
      Sequence& sequence = open(stage, child);
      sequence.is_compressed = parent.is_compressed;
      sequence.sinks = parent.sinks;
      const auto& tokens = stage.kv->sequences().at(child.sequence());
      ASSERT_EQ(static_cast<int>(tokens.size()), fork.n_tokens());
      if (!fork.tokens().empty()) {
        ASSERT_TRUE(
            std::equal(fork.tokens().begin(), fork.tokens().end(), tokens.begin(), tokens.end()));
      }
    }
    for (const std::uint64_t id : plan.free()) free(id, stage, result);
    for (const auto& opened : plan.open()) {
      const Status status =
          stage.kv->open(opened.sequence(), opened.max_tokens(),
                         opened.reserve_pages(static_cast<int>(index)), opened.granted_tokens());
      ASSERT_TRUE(status.ok()) << status.to_string();
      open(stage, opened);
    }
    grow_all(plan, false, index, result);
  }

  void grow_all(const control::StepPlan& plan, bool after_runs, std::size_t index,
                control::StepResult& result) {
    Stage& stage = stages_[index];
    for (const auto& grow : plan.grow()) {
      if (grow.after_runs() != after_runs) continue;
      const auto pages = stage.kv->store().grow(grow.sequence(), grow.granted_tokens(),
                                                grow.more_pages(static_cast<int>(index)),
                                                grow.sinks(), grow.recent());
      ASSERT_TRUE(pages.ok()) << pages.status().to_string();
      auto& report = *result.add_grown();
      report.set_sequence(grow.sequence());
      report.set_used_pages(pages->used);
      report.set_reserved_pages(pages->reserved);
    }
  }

  static Sequence& open(Stage& stage, const control::OpenSequence& opened) {
    Sequence& sequence = stage.sequences[opened.sequence()];
    sequence.open = opened;
    return sequence;
  }

  static void free(std::uint64_t id, Stage& stage, control::StepResult& result) {
    const auto freed = stage.kv->free(id);
    ASSERT_TRUE(freed.ok()) << freed.status().to_string();
    stage.sequences.erase(id);
    auto& report = *result.add_freed();
    report.set_sequence(id);
    report.set_full_bytes(freed->full_bytes);
    report.set_kept_bytes(freed->kept_bytes);
    report.mutable_layer_kept_bytes()->Add(freed->layer_kept_bytes.begin(),
                                           freed->layer_kept_bytes.end());
  }

  void compress_all(const control::StepPlan& plan, bool after_runs, Stage& stage,
                    control::StepResult& result) {
    for (const auto& order : plan.compress()) {
      if (order.after_runs() == after_runs) compress(order, stage, result);
    }
  }

  void compress(const control::Compress& order, Stage& stage, control::StepResult& result) {
    Sequence& sequence = stage.sequences.at(order.sequence());
    ASSERT_EQ(stage.kv->store().length(order.sequence()), order.n_tokens());
    ASSERT_EQ(order.selects(), sequence.scored);
    const std::size_t n_tables = stage.kv->n_tables();
    std::vector<kvstore::HeadPlan> heads;
    for (std::size_t i = 0; i < n_tables; ++i) {
      if (order.heads().empty()) {
        heads.push_back(
            stage.kv->store().head_cache(order.sequence(), static_cast<int>(i), 0).plan);
        continue;
      }
      const auto& plan = order.heads(stage.first_layer + static_cast<int>(i));
      heads.push_back({.mode = static_cast<kvstore::KvMode>(plan.mode()),
                       .selector = static_cast<kvstore::KvSelector>(plan.selector()),
                       .codec = {static_cast<kernels::KvFormat>(plan.k_format()),
                                 static_cast<kernels::KvFormat>(plan.v_format())},
                       .fallback = static_cast<kernels::KvFormat>(plan.fallback()),
                       .n_keep = plan.n_keep(),
                       .window = plan.window()});
    }
    if (!order.heads().empty()) {
      sequence.is_compressed =
          std::any_of(order.heads().begin(), order.heads().end(), [](const auto& head) {
            return head.mode() != 0 || head.k_format() != 0 || head.v_format() != 0;
          });
      sequence.sinks = order.sinks();
    }
    ASSERT_EQ(order.sinks(), sequence.sinks);
    const auto kept = order.selects() ? select(stage, order, heads, sequence)
                                      : std::vector<std::vector<std::int32_t>>();
    kvstore::StageBoundary boundary;
    boundary.sinks = order.sinks();
    boundary.recent = order.recent();
    boundary.heads = heads;
    boundary.kept = kept;
    boundary.prompt_left = order.prompt_left();
    boundary.boundaries_left = order.boundaries_left();
    boundary.forks = order.forks();
    const std::int64_t held = stage.kv->held_pages();
    const auto done = stage.kv->store().compress(kvstore::testing::cpu(), &stage.kv->rope(),
                                                 order.sequence(), boundary);
    ASSERT_TRUE(done.ok()) << done.status().to_string();
    stage.kv->store().check_invariants();
    ASSERT_LE(stage.kv->held_pages(), held);
    sequence.scored = false;
    sequence.compressed_at = order.n_tokens();
    auto& report = *result.add_compressed();
    report.set_sequence(order.sequence());
    report.set_n_tokens(order.n_tokens());
    report.set_full_bytes(done->full_bytes);
    report.set_used_pages(done->pages.used);
    report.set_reserved_pages(done->pages.reserved);
    for (const kvstore::HeadKept& head : done->heads) {
      auto& out = *report.add_heads();
      out.set_n_tokens(head.n_tokens);
      out.set_bytes(head.bytes);
      out.set_k_entries_per_token(head.k_entries_per_token);
      out.set_v_entries_per_token(head.v_entries_per_token);
    }
    report.set_compress_us(10);
  }

  // Deterministic, by layer, row and position.
  static std::vector<float> scores(int layer, int row, std::int64_t first, std::int64_t end) {
    std::vector<float> out;
    for (std::int64_t p = first; p < end; ++p) {
      const auto hash = static_cast<std::uint32_t>((p * 131 + layer * 17 + row) * 2654435761u);
      out.push_back(static_cast<float>(hash >> 8) * 0x1p-24F + 1e-6F);
    }
    return out;
  }

  std::vector<std::vector<std::int32_t>> select(Stage& stage, const control::Compress& order,
                                                const std::vector<kvstore::HeadPlan>& heads,
                                                const Sequence& sequence) {
    std::vector<std::vector<std::int32_t>> kept(heads.size());
    for (std::size_t i = 0; i < heads.size(); ++i) {
      if (heads[i].mode != kvstore::KvMode::kEvict) continue;
      const int layer = stage.first_layer + static_cast<int>(i);
      const auto& cache = stage.kv->store().head_cache(order.sequence(), static_cast<int>(i), 0);
      const auto [first, end] = sequence.candidates[i];
      const std::int64_t cut = std::clamp(kvstore::tail_begin(cache.tail_origin, cache.tail_first,
                                                              order.recent(), order.n_tokens()),
                                          first, std::max(first, end));
      if (heads[i].selector == kvstore::KvSelector::kSpindleKv) {
        std::vector<float> rows;
        for (int row = 0; row < kGroup; ++row) {
          const auto values = scores(layer, row, first, cut);
          rows.insert(rows.end(), values.begin(), values.end());
        }
        kept[i] =
            kernels::select_union(ConstRows(rows.data(), kGroup, cut - first), heads[i].n_keep);
      } else {
        kept[i] = kernels::select_top_k(scores(layer, 0, first, cut), heads[i].n_keep);
      }
      for (std::int32_t& index : kept[i]) index += static_cast<std::int32_t>(first);
    }
    return kept;
  }

  void score_boundary(Stage& stage, std::uint64_t id, control::StepResult& result) {
    Sequence& sequence = stage.sequences.at(id);
    const auto& needs = sequence.open.needs();
    const std::int64_t n = stage.kv->store().length(id);
    std::int64_t window = std::max<std::int64_t>(n - kvstore::kObservationWindow, 0);
    if (needs.window_scores()) {
      const std::int64_t before =
          sequence.next_boundary == 0
              ? 0
              : sequence.open.boundaries(static_cast<int>(sequence.next_boundary) - 1);
      window = std::max({window, before, sequence.first_run});
    }
    auto& report = *result.add_boundary_scores();
    report.set_sequence(id);
    report.set_n_tokens(static_cast<std::int32_t>(n));
    sequence.candidates.clear();
    for (std::size_t i = 0; i < stage.kv->n_tables(); ++i) {
      const auto& cache = stage.kv->store().head_cache(id, static_cast<int>(i), 0);
      const std::int64_t first =
          std::min(cache.tail_first == 0 ? std::int64_t{needs.sinks()} : cache.tail_first, window);
      sequence.candidates.emplace_back(first, window);
      report.set_n_candidates(std::max(report.n_candidates(), window - first));
      const int layer = stage.first_layer + static_cast<int>(i);
      if (needs.lazy_mass()) report.add_lazy_mass(layer % 2 == 0 ? 0.95 : 0.5);
      if (!needs.histograms()) continue;
      const auto histogram = kernels::score_histogram(scores(layer, 0, first, window));
      auto& out = *report.add_histograms();
      out.mutable_bin()->Add(histogram.bin.begin(), histogram.bin.end());
      out.mutable_count()->Add(histogram.count.begin(), histogram.count.end());
    }
    report.set_score_us(5);
    ++sequence.next_boundary;
    sequence.scored = true;
  }

  void run_tokens(const control::StepPlan& plan, std::size_t index, control::StepResult& result) {
    Stage& stage = stages_[index];
    const bool is_last = index + 1 == stages_.size();
    std::set<std::uint64_t> seen;
    for (const auto& run : plan.runs()) {
      ASSERT_TRUE(seen.insert(run.sequence()).second) << "a sequence runs twice in one step";
      Sequence& sequence = stage.sequences.at(run.sequence());
      ASSERT_EQ(stage.kv->store().length(run.sequence()), run.first_position());
      ASSERT_FALSE(sequence.scored) << "a run between a boundary and its compression";
      const std::int64_t n_generated = run.first_position() - sequence.open.prompt_tokens();
      if (sequence.is_compressed && n_generated > 0 &&
          n_generated % kvstore::kGeneratedBoundary == 0) {
        ASSERT_EQ(sequence.compressed_at, run.first_position()) << "a boundary of the answer";
      }
      if (sequence.first_run < 0) sequence.first_run = run.first_position();
      const Status status = stage.kv->extend(
          run.sequence(), std::vector<std::int32_t>(run.tokens().begin(), run.tokens().end()));
      ASSERT_TRUE(status.ok()) << status.to_string();
      const std::int64_t n = stage.kv->store().length(run.sequence());
      const auto next = static_cast<int>(sequence.next_boundary);
      if (next < sequence.open.boundaries_size()) {
        ASSERT_LE(n, sequence.open.boundaries(next)) << "a run across a boundary";
        if (n == sequence.open.boundaries(next)) score_boundary(stage, run.sequence(), result);
      }
      if (is_last) sample(stage, run, result);
    }
  }

  static void sample(Stage& stage, const control::Run& run, control::StepResult& result) {
    const std::vector<std::int32_t>& tokens = stage.kv->sequences().at(run.sequence());
    for (int row = run.score_first(); row < run.score_end(); ++row) {
      const std::int32_t token =
          row + 1 < run.tokens_size() ? run.tokens(row + 1) : run.score_next();
      if (token < 0) continue;
      auto& score = *result.add_prompt_scores();
      score.set_sequence(run.sequence());
      score.set_position(run.first_position() + row + 1);
      score.set_logprob(-static_cast<float>(token));
    }
    if (!run.sample()) return;
    add(result, run.sequence(), next_token(tokens));
    for (const auto& choice : run.also_sample()) {
      add(result, choice.sequence(), (next_token(tokens) + choice.sampling().choice()) % kVocab);
    }
  }

  static void add(control::StepResult& result, std::uint64_t sequence, std::int32_t token) {
    auto& sampled = *result.add_sampled();
    sampled.set_sequence(sequence);
    sampled.set_token(token);
  }

  std::vector<Stage> stages_;
};

inline SchedulerConfig small_config(int max_in_flight) {
  SchedulerConfig config;
  config.max_num_seqs = 8;
  config.max_num_batched_tokens = 20;
  config.max_in_flight = max_in_flight;
  config.max_num_queued_reqs = 10;
  config.max_num_queued_tokens = 1000;
  config.eos_token_ids = {kEos};
  config.limits = {kVocab, 200, 4, 5, 10};
  return config;
}

// With room for long prompts, and the model that the stages {2 layers, 1 layer} hold.
inline SchedulerConfig kv_config(int max_in_flight) {
  SchedulerConfig config = small_config(max_in_flight);
  config.max_num_batched_tokens = 96;
  config.max_num_queued_tokens = 20000;
  config.limits.max_model_len = 1500;
  config.kv_model = {.n_layers = 3,
                     .n_heads = kGroup,
                     .n_kv_heads = 1,
                     .head_dim = 32,
                     .vocab_size = kVocab,
                     .max_model_len = 1500};
  return config;
}

inline engine::EngineRequest request_of(int n_prompt, int max_tokens, int n_choices = 1) {
  engine::EngineRequest request;
  for (int i = 0; i < n_prompt; ++i) request.prompt_ids.push_back((i * 13 + n_prompt) % kVocab);
  request.sampling.max_tokens = max_tokens;
  request.sampling.n_choices = n_choices;
  return request;
}

// Everything that happened to one request.
struct Life {
  engine::EngineRequest request;
  std::map<int, std::vector<std::int32_t>> tokens;
  std::map<int, engine::FinishReason> finished;
  std::vector<engine::PromptScore> scores;
  int n_ended = 0;
  Status status;
  engine::RequestSummary summary;
};

// A scheduler with its stages, in steps that the test takes.
class Driver {
 public:
  Driver(const SchedulerConfig& config, const std::vector<StageCapacity>& capacities)
      : capacities_(capacities),
        scheduler_(config, KvLedger(kShape, capacities)),
        stages_(capacities, config.kv_model.token_table) {}

  Result<engine::RequestHandle> submit(engine::EngineRequest request) {
    auto handle = scheduler_.submit(request, ++now_);
    if (handle.ok()) lives_[*handle].request = std::move(request);
    return handle;
  }

  // Sends the next plan, if there is one, and queues its results.
  std::optional<control::StepPlan> step() {
    auto plan = scheduler_.next_step(++now_);
    take_events();
    if (!plan) return plan;
    for (auto& result : stages_.run(*plan)) {
      late_[static_cast<std::size_t>(result.stage())].push_back(std::move(result));
    }
    // What the stages hold or have promised is never more than the ledger's book.
    for (std::size_t s = 0; s < capacities_.size(); ++s) {
      EXPECT_LE(stages_.held_pages(s), scheduler_.ledger().committed_pages(s)) << "stage " << s;
    }
    return plan;
  }
  // The oldest result of a stage that is still on its way.
  void deliver(std::size_t stage) {
    if (late_[stage].empty()) return;
    const Status status = scheduler_.on_result(late_[stage].front(), ++now_);
    EXPECT_TRUE(status.ok()) << status.to_string();
    late_[stage].pop_front();
    take_events();
  }
  void deliver_all() {
    for (auto& [stage, results] : late_) {
      while (!results.empty()) deliver(stage);
    }
  }
  bool has_late() const {
    return std::any_of(late_.begin(), late_.end(),
                       [](const auto& entry) { return !entry.second.empty(); });
  }
  // Until nothing more happens.
  void run() {
    for (int i = 0; i < 20000; ++i) {
      const bool stepped = step().has_value();
      const bool delivered = has_late();
      deliver_all();
      if (!stepped && !delivered) return;
      if (::testing::Test::HasFailure()) return;
    }
    ADD_FAILURE() << "it never ends";
  }
  Life& run(engine::EngineRequest request) {
    const auto handle = submit(std::move(request));
    if (!handle.ok()) {
      ADD_FAILURE() << handle.status().to_string();
      return lives_[0];
    }
    run();
    return lives_.at(*handle);
  }

  void cancel(engine::RequestHandle request) {
    scheduler_.cancel(request, ++now_);
    take_events();
  }
  void finish_choice(engine::RequestHandle request, int choice) {
    scheduler_.finish_choice(request, choice, ++now_);
    take_events();
  }

  void expect_nothing_left() {
    for (std::size_t s = 0; s < capacities_.size(); ++s) {
      EXPECT_EQ(stages_.held_pages(s), 0);
      EXPECT_EQ(scheduler_.ledger().committed_pages(s), 0);
    }
  }

  std::map<engine::RequestHandle, Life>& lives() { return lives_; }
  Scheduler& scheduler() { return scheduler_; }
  SimulatedStages& stages() { return stages_; }
  const std::vector<StageCapacity>& capacities() const { return capacities_; }
  std::int64_t& now() { return now_; }

 private:
  void take_events() {
    for (RequestEvents& events : scheduler_.take_events()) {
      Life& life = lives_.at(events.request);
      EXPECT_EQ(life.n_ended, 0) << "an event after the end";
      for (engine::PromptScore& score : events.scores) life.scores.push_back(std::move(score));
      for (const engine::TokenEvent& event : events.tokens) {
        EXPECT_EQ(life.finished.count(event.choice), 0u) << "a token after the last";
        life.tokens[event.choice].push_back(event.token);
        if (event.finish != engine::FinishReason::kNone) life.finished[event.choice] = event.finish;
      }
      if (!events.ended) continue;
      ++life.n_ended;
      life.status = events.status;
      life.summary = events.summary;
      for (const auto& [choice, tokens] : life.tokens) {
        EXPECT_EQ(tokens, expected_output(life.request.prompt_ids, choice, tokens.size()));
      }
    }
  }

  std::vector<StageCapacity> capacities_;
  std::int64_t now_ = 0;
  Scheduler scheduler_;
  SimulatedStages stages_;
  std::map<std::size_t, std::deque<control::StepResult>> late_;
  std::map<engine::RequestHandle, Life> lives_;
};

}  // namespace spindle::coordinator
