// Requests of all kinds, submitted, cancelled and run at random against simulated stages; results
// come back in order per stage but late.

#include <random>

#include "tests/cluster/coordinator/simulated_stages.h"

namespace spindle::coordinator {
namespace {

class RandomRun {
 public:
  // `tight`: a pool that one long request fills, requests that grow, priorities and time limits.
  RandomRun(unsigned seed, int max_in_flight, bool with_kv, bool tight = false)
      : random_(seed),
        with_kv_(with_kv),
        tight_(tight),
        driver_(config_of(max_in_flight, with_kv, seed % 2 == 0),
                with_kv ? tight ? std::vector<StageCapacity>{{2, 96}, {1, 48}}
                                : std::vector<StageCapacity>{{2, 260}, {1, 130}}
                        : std::vector<StageCapacity>{{2, 24}, {1, 14}}) {}

  void run(int n_acts) {
    for (int i = 0; i < n_acts; ++i) {
      act();
      check();
      if (::testing::Test::HasFailure()) return;
    }
    driver_.run();
    ASSERT_TRUE(driver_.scheduler().idle()) << "requests starve";
    for (const auto& [handle, life] : driver_.lives()) {
      EXPECT_EQ(life.n_ended, 1) << "request " << handle;
      n_ok_ += life.status.ok() ? 1 : 0;
      n_continued_ += life.status.ok() && life.summary.cached_tokens > 0 ? 1 : 0;
      for (const engine::BoundaryUse& use : life.summary.boundaries) {
        n_compressed_ += use.heads.back().plan != "FULL raw/raw" ? 1 : 0;
      }
      EXPECT_NE(life.status.code(), StatusCode::kInternal) << life.status.to_string();
    }
    n_preemptions_ = driver_.scheduler().stats().preemptions;
    n_expired_ = driver_.scheduler().stats().expired;
    driver_.now() += 1'000'000'000'000;  // sessions expire
    driver_.run();
    driver_.expect_nothing_left();
  }
  int n_ok() const { return n_ok_; }
  int n_continued() const { return n_continued_; }
  int n_compressed() const { return n_compressed_; }
  std::uint64_t n_preemptions() const { return n_preemptions_; }
  std::uint64_t n_expired() const { return n_expired_; }

 private:
  static SchedulerConfig config_of(int max_in_flight, bool with_kv, bool token_table) {
    SchedulerConfig config = with_kv ? kv_config(max_in_flight) : small_config(max_in_flight);
    config.kv_model.token_table = token_table;
    config.max_sessions = 4;
    config.max_session_bytes = 1 << 20;
    return config;
  }

  engine::EngineRequest random_request() {
    if (!with_kv_) {
      return request_of(1 + static_cast<int>(random_() % 60), 1 + static_cast<int>(random_() % 40),
                        1 + static_cast<int>(random_() % 3));
    }
    engine::EngineRequest request =
        request_of(1 + static_cast<int>(random_() % 300), 1 + static_cast<int>(random_() % 150),
                   1 + static_cast<int>(random_() % 3));
    request.sampling.ignore_eos = random_() % 2 == 0;
    if (tight_) {
      request.priority = static_cast<int>(random_() % 5) - 2;
      request.owner = random_() % 3;
      if (random_() % 4 == 0) request.timeout_us = 1 + static_cast<std::int64_t>(random_() % 400);
      if (random_() % 3 != 0) {
        request = request_of(1 + static_cast<int>(random_() % 200),
                             1 + static_cast<int>(random_() % 400));
        request.sampling.ignore_eos = true;
        if (random_() % 2 == 0) add_policy(request);
        return request;
      }
    }
    if (random_() % 3 != 0) add_session(request);
    if (random_() % 4 != 0) add_policy(request);
    const auto n = static_cast<std::int32_t>(request.prompt_ids.size());
    if (random_() % 4 == 0 && n > 1) {
      request.prompt_scores.first = 1 + static_cast<std::int32_t>(random_()) % (n - 1);
      if (request.prompt_scores.first < 1) request.prompt_scores.first = n - 1;
      request.prompt_scores.end =
          request.prompt_scores.first + 1 +
          static_cast<std::int32_t>(random_() %
                                    static_cast<unsigned>(n - request.prompt_scores.first));
      request.prompt_scores.end = std::min(request.prompt_scores.end, n);
    }
    return request;
  }

  void add_policy(engine::EngineRequest& request) {
    const auto profiles = kvstore::all_profiles();
    request.kv_policy.profile = profiles[random_() % profiles.size()];
    const int recents[] = {0, 32, 64, 200};
    request.kv_policy.recent = recents[random_() % 4];
    request.kv_policy.best_effort = true;
    if (random_() % 3 == 0) request.kv_policy.window = 40;
    if (random_() % 4 == 0) {
      request.kv_policy.overrides.push_back(
          {.codec = kernels::KvCodec{kernels::KvFormat::kToken, kernels::KvFormat::kToken}});
    }
    std::int32_t at = 0;
    while (random_() % 3 != 0) {
      at += 1 + static_cast<std::int32_t>(random_() % 150);
      if (at > static_cast<std::int32_t>(request.prompt_ids.size())) break;
      request.compress_at.push_back(at);
    }
  }

  // A first turn, or one that goes on with what an earlier one of that name left.
  void add_session(engine::EngineRequest& request) {
    const auto index = random_() % 3;
    request.session_id = "session " + std::to_string(index);
    request.keep_session = random_() % 4 != 0;
    std::vector<std::int32_t> before = histories_[index];
    if (before.size() > 600 || random_() % 8 == 0) before.clear();
    if (random_() % 6 == 0) before.resize(before.size() / 2);
    before.insert(before.end(), request.prompt_ids.begin(), request.prompt_ids.end());
    request.prompt_ids = std::move(before);
  }

  void act() {
    auto& lives = driver_.lives();
    switch (random_() % 9) {
      case 0: {
        const auto handle = driver_.submit(random_request());
        if (!handle.ok()) {
          ASSERT_NE(handle.status().code(), StatusCode::kInternal);
        }
        break;
      }
      case 1:
        if (!lives.empty() && random_() % 4 == 0) {
          auto it = lives.begin();
          std::advance(it, static_cast<std::ptrdiff_t>(random_() % lives.size()));
          if (random_() % 2 == 0) {
            driver_.cancel(it->first);
          } else {
            driver_.finish_choice(it->first, static_cast<int>(random_() % 3));
          }
        }
        break;
      case 2:
      case 3:
      case 4:
        driver_.step();
        break;
      default:
        driver_.deliver(random_() % 2);
    }
  }

  void check() {
    Scheduler& scheduler = driver_.scheduler();
    for (std::size_t s = 0; s < driver_.capacities().size(); ++s) {
      ASSERT_LE(scheduler.ledger().committed_pages(s), driver_.capacities()[s].n_pages);
    }
    const engine::EngineStats stats = scheduler.stats();
    ASSERT_EQ(stats.accepted, stats.finished + stats.failed + stats.cancelled +
                                  static_cast<std::uint64_t>(stats.running + stats.waiting));
    ASSERT_LE(stats.waiting, 10 + 8);  // those that were preempted come on top
    for (auto& [handle, life] : driver_.lives()) {
      if (life.n_ended == 0 || !seen_.insert(handle).second) continue;
      check_end(life);
    }
  }

  void check_end(const Life& life) {
    const engine::PromptScores& scores = life.request.prompt_scores;
    if (life.status.ok()) {
      ASSERT_EQ(static_cast<int>(life.scores.size()), scores.end - scores.first);
    }
    for (std::size_t i = 0; i < life.scores.size(); ++i) {
      ASSERT_EQ(life.scores[i].position, scores.first + static_cast<int>(i));
    }
    if (!life.status.ok() || life.request.session_id.empty() || life.tokens.count(0) == 0) return;
    auto& history = histories_[static_cast<std::size_t>(life.request.session_id.back() - '0')];
    history = life.request.prompt_ids;
    history.insert(history.end(), life.tokens.at(0).begin(), life.tokens.at(0).end());
    driver_.stages().expect_content();
  }

  std::mt19937 random_;
  bool with_kv_;
  bool tight_;
  Driver driver_;
  std::set<engine::RequestHandle> seen_;
  std::map<std::size_t, std::vector<std::int32_t>> histories_;
  int n_ok_ = 0;
  int n_continued_ = 0;   // from a session
  int n_compressed_ = 0;  // boundaries whose plan was not the uncompressed one
  std::uint64_t n_preemptions_ = 0;
  std::uint64_t n_expired_ = 0;
};

TEST(SchedulerSoak, RandomLivesEndOnceAndFreeEverything) {
  const unsigned seed = std::random_device{}();
  for (unsigned i = 0; i < 30; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed + i));
    RandomRun(seed + i, 1 + static_cast<int>(i % 4), false).run(2000);
    if (HasFailure()) return;
  }
}

TEST(SchedulerSoak, PoliciesAndSessionsEndOnceAndFreeEverything) {
  const unsigned seed = std::random_device{}();
  int n_ok = 0;
  int n_continued = 0;
  int n_compressed = 0;
  for (unsigned i = 0; i < 12; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed + i) + ", in flight " + std::to_string(1 + i % 4));
    RandomRun run(seed + i, 1 + static_cast<int>(i % 4), true);
    run.run(4000);
    n_ok += run.n_ok();
    n_continued += run.n_continued();
    n_compressed += run.n_compressed();
    if (HasFailure()) return;
  }
  // Else most requests are refused or fail, and little is tested.
  EXPECT_GT(n_ok, 100);
  EXPECT_GT(n_continued, 10);
  EXPECT_GT(n_compressed, 30);
  RecordProperty("ok", n_ok);
  RecordProperty("continued", n_continued);
  RecordProperty("compressed", n_compressed);
}

TEST(SchedulerSoak, ATightPoolPreemptsAndChangesNoOutput) {
  const unsigned seed = std::random_device{}();
  int n_ok = 0;
  std::uint64_t n_preemptions = 0;
  std::uint64_t n_expired = 0;
  for (unsigned i = 0; i < 16; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed + i) + ", in flight " + std::to_string(1 + i % 4));
    RandomRun run(seed + i, 1 + static_cast<int>(i % 4), true, true);
    run.run(4000);
    n_ok += run.n_ok();
    n_preemptions += run.n_preemptions();
    n_expired += run.n_expired();
    if (HasFailure()) return;
  }
  EXPECT_GT(n_ok, 200);
  EXPECT_GT(n_preemptions, 50U);
  EXPECT_GT(n_expired, 5U);
  RecordProperty("ok", n_ok);
  RecordProperty("preemptions", static_cast<int>(n_preemptions));
}

}  // namespace
}  // namespace spindle::coordinator
