// Kept sequences, against simulated stages.

#include "tests/cluster/coordinator/simulated_stages.h"

namespace spindle::coordinator {
namespace {

using kvstore::KvProfile;

const std::vector<StageCapacity> kStages = {{2, 400}, {1, 250}};

// A prompt that begins with `prefix` and goes on with n tokens of its own.
engine::EngineRequest turn(std::vector<std::int32_t> prefix, int n, int max_tokens,
                           const std::string& session, KvProfile profile = KvProfile::kFull) {
  engine::EngineRequest request = request_of(n, max_tokens);
  prefix.insert(prefix.end(), request.prompt_ids.begin(), request.prompt_ids.end());
  request.prompt_ids = std::move(prefix);
  request.sampling.ignore_eos = true;
  request.session_id = session;
  request.keep_session = true;
  request.kv_policy.profile = profile;
  return request;
}

// What the cache has seen when the request ended.
std::vector<std::int32_t> history(const Life& life) {
  std::vector<std::int32_t> tokens = life.request.prompt_ids;
  const auto& output = life.tokens.at(0);
  tokens.insert(tokens.end(), output.begin(), output.end());
  return tokens;
}

TEST(SchedulerSession, ATurnContinuesWhereThePromptsPart) {
  for (const KvProfile profile : {KvProfile::kFull, KvProfile::kInt4, KvProfile::kSpindle}) {
    SCOPED_TRACE(std::string(kvstore::profile_name(profile)));
    Driver driver(kv_config(2), kStages);
    std::vector<std::int32_t> tokens;
    int n_cached = 0;
    for (int i = 0; i < 4; ++i) {
      Life& life = driver.run(turn(tokens, i == 0 ? 250 : 40, 20, "chat", profile));
      ASSERT_TRUE(life.status.ok()) << life.status.to_string();
      EXPECT_EQ(life.summary.cached_tokens, n_cached);
      EXPECT_EQ(life.tokens.at(0).size(), 20u);
      driver.stages().expect_content();
      tokens = history(life);
      // The last token was never run. A window that is scored again begins 32 before the boundary.
      n_cached = static_cast<int>(tokens.size()) - 1;
      if (profile == KvProfile::kFull) {
        EXPECT_EQ(life.summary.kv[0].full_bytes, static_cast<unsigned>(n_cached) * 4u * 32 * 2);
      } else {
        n_cached = std::min(n_cached, static_cast<int>(tokens.size()) + 40 - 32);
      }
    }
    EXPECT_EQ(driver.stages().store(0).sequences().size(), 1u) << "the last turn's alone";
  }
}

TEST(SchedulerSession, APromptIsKeptWithItsBoundaryAlthoughTheAnswerIsOneToken) {
  Driver driver(kv_config(3), kStages);
  const Life& life = driver.run(turn({}, 300, 1, "document", KvProfile::kInt4));
  EXPECT_EQ(life.n_ended, 1);
  ASSERT_TRUE(life.status.ok()) << life.status.to_string();
  ASSERT_EQ(life.summary.boundaries.size(), 1u);
  EXPECT_GT(life.summary.boundaries[0].kept_bytes, 0u);
  EXPECT_EQ(life.summary.kv[1].kept_bytes + life.summary.kv[0].kept_bytes,
            life.summary.boundaries[0].kept_bytes);
  driver.stages().expect_content();
  // The question sees the compressed document.
  engine::EngineRequest question = turn(life.request.prompt_ids, 30, 5, "document");
  question.keep_session = false;
  for (int i = 0; i < 3; ++i) {
    const Life& answer = driver.run(question);
    ASSERT_TRUE(answer.status.ok()) << answer.status.to_string();
    EXPECT_EQ(answer.summary.cached_tokens, 300);
  }
  EXPECT_EQ(driver.stages().store(0).sequences().size(), 1u);
}

TEST(SchedulerSession, ARequestThatWaitsForItsBoundaryToBeKeptCanBeCancelled) {
  for (int moment = 0; moment < 30; ++moment) {
    SCOPED_TRACE("moment " + std::to_string(moment));
    Driver driver(kv_config(3), kStages);
    const auto handle = driver.submit(turn({}, 300, 1, "document", KvProfile::kInt4));
    ASSERT_TRUE(handle.ok());
    for (int i = 0; i < moment; ++i) {
      if (i % 3 == 0) driver.step();
      if (i % 3 == 1) driver.deliver(1);
      if (i % 3 == 2) driver.deliver(0);
    }
    driver.cancel(*handle);
    driver.run();
    const Life& life = driver.lives().at(*handle);
    EXPECT_EQ(life.n_ended, 1);
    if (life.status.ok()) {
      EXPECT_EQ(driver.stages().store(0).sequences().size(), 1u);
    } else {
      driver.expect_nothing_left();
    }
    if (HasFailure()) return;
  }
}

TEST(SchedulerSession, APromptMustRepeatWhatIsCompressed) {
  Driver driver(kv_config(2), kStages);
  const Life& life = driver.run(turn({}, 300, 10, "s", KvProfile::kInt4));
  ASSERT_TRUE(life.status.ok());
  std::vector<std::int32_t> other = life.request.prompt_ids;
  other[250] = (other[250] + 1) % kVocab;
  const Life& refused = driver.run(turn(other, 20, 5, "s"));
  EXPECT_EQ(refused.status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(refused.status.message().find("250"), std::string::npos);
  // Scores of what is compressed cannot be had either.
  engine::EngineRequest scored = turn(life.request.prompt_ids, 20, 5, "s");
  scored.prompt_scores = {290, 310, false};
  EXPECT_EQ(driver.run(scored).status.code(), StatusCode::kInvalidArgument);
  scored.prompt_scores = {301, 320, false};
  const Life& good = driver.run(scored);
  EXPECT_TRUE(good.status.ok()) << good.status.to_string();
  EXPECT_EQ(good.scores.size(), 19u);
  EXPECT_EQ(good.summary.cached_tokens, 300);
}

TEST(SchedulerSession, InFullPrecisionAPromptMayPartAnywhere) {
  Driver driver(kv_config(2), kStages);
  const Life& life = driver.run(turn({}, 300, 10, "s"));
  std::vector<std::int32_t> other = life.request.prompt_ids;
  other[70] = (other[70] + 1) % kVocab;
  const Life& parted = driver.run(turn(other, 20, 5, "s"));
  ASSERT_TRUE(parted.status.ok());
  EXPECT_EQ(parted.summary.cached_tokens, 70);
  driver.stages().expect_content();
}

TEST(SchedulerSession, SessionsAreTheirOwnersAlone) {
  Driver driver(kv_config(2), kStages);
  engine::EngineRequest request = turn({}, 50, 5, "s");
  request.owner = 1;
  ASSERT_TRUE(driver.run(request).status.ok());
  request.owner = 2;
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kNotFound);
  request.owner = 1;
  request.keep_session = false;
  EXPECT_TRUE(driver.run(request).status.ok());
  request.session_id = "other";
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kNotFound);
  request.session_id = "";
  request.keep_session = true;
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kInvalidArgument);
}

TEST(SchedulerSession, SessionsExpire) {
  SchedulerConfig config = kv_config(2);
  config.session_ttl_us = 1000;
  Driver driver(config, kStages);
  const Life& life = driver.run(turn({}, 50, 5, "s"));
  driver.now() += 900;
  const auto tokens = history(life);
  EXPECT_EQ(driver.run(turn(tokens, 10, 5, "s")).summary.cached_tokens, 54);
  driver.now() += 900;  // since it was used, not since it was made
  driver.step();
  EXPECT_EQ(driver.stages().store(0).sequences().size(), 1u);
  driver.now() += 200;
  const auto plan = driver.step();
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->free_size(), 1);
  driver.deliver_all();
  driver.expect_nothing_left();
}

TEST(SchedulerSession, ASessionThatGoesWhileARequestWaitsForItIsMissedOrStartedAnew) {
  for (const bool keep : {false, true}) {
    SchedulerConfig config = kv_config(1);
    config.max_num_seqs = 1;
    config.session_ttl_us = 1000;
    Driver driver(config, kStages);
    const auto tokens = history(driver.run(turn({}, 300, 5, "s", KvProfile::kInt4)));
    // Another request is in the way until the session is gone.
    ASSERT_TRUE(driver.submit(request_of(30, 30)).ok());
    driver.step();
    engine::EngineRequest request = turn(tokens, 10, 5, "s", KvProfile::kInt4);
    request.keep_session = keep;
    const auto handle = driver.submit(request);
    ASSERT_TRUE(handle.ok());
    driver.step();
    driver.now() += 2000;
    driver.run();
    const Life& life = driver.lives().at(*handle);
    EXPECT_EQ(life.n_ended, 1);
    if (keep) {
      EXPECT_TRUE(life.status.ok()) << life.status.to_string();
      EXPECT_EQ(life.summary.cached_tokens, 0);
    } else {
      EXPECT_EQ(life.status.code(), StatusCode::kNotFound);
      driver.expect_nothing_left();
    }
  }
}

TEST(SchedulerSession, NumberAndBytesAreLimited) {
  SchedulerConfig config = kv_config(2);
  config.max_sessions = 2;
  Driver driver(config, kStages);
  for (const char* name : {"a", "b", "c"}) {
    ASSERT_TRUE(driver.run(turn({}, 50, 5, name)).status.ok());
  }
  EXPECT_EQ(driver.stages().store(0).sequences().size(), 2u);
  engine::EngineRequest request = turn({}, 50, 5, "a");
  request.keep_session = false;
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kNotFound) << "the oldest";
  // 8 pages of a stage: 54 tokens take 2 for each of two layers.
  config.max_sessions = 10;
  config.max_session_bytes = 8 * kShape.page_bytes();
  Driver small(config, kStages);
  for (const char* name : {"a", "b", "c"}) {
    ASSERT_TRUE(small.run(turn({}, 50, 5, name)).status.ok());
  }
  EXPECT_EQ(small.stages().store(0).sequences().size(), 2u);
  ASSERT_TRUE(small.run(turn({}, 300, 5, "too long")).status.ok());
  EXPECT_EQ(small.stages().store(0).sequences().size(), 0u);
  small.expect_nothing_left();
}

TEST(SchedulerSession, OldSessionsMakeRoomForRequestsAsFarAsItHelps) {
  Driver driver(kv_config(2), {{2, 40}, {1, 20}});
  for (const char* name : {"a", "b", "c"}) {  // 4 and 2 pages each
    ASSERT_TRUE(driver.run(turn({}, 50, 5, name)).status.ok());
  }
  EXPECT_EQ(driver.scheduler().ledger().committed_pages(1), 6);
  // 16 pages on stage 1 leave room for two sessions.
  ASSERT_TRUE(driver.submit(request_of(500, 12)).ok());
  const auto plan = driver.step();
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->free_size(), 1);
  EXPECT_EQ(plan->open_size(), 1);
  // A second such request does not fit however many sessions go, so they stay.
  ASSERT_TRUE(driver.submit(request_of(501, 11)).ok());
  const auto next = driver.step();
  ASSERT_TRUE(next.has_value());
  EXPECT_EQ(next->free_size(), 0);
  driver.deliver_all();
  driver.run();
  EXPECT_EQ(driver.stages().store(0).sequences().size(), 2u);
}

TEST(SchedulerSession, ASessionCanBeGivenUpInThePlanThatForksIt) {
  Driver driver(kv_config(2), {{2, 46}, {1, 23}});
  const auto tokens = history(driver.run(turn({}, 200, 5, "s")));  // 7 pages a table
  EXPECT_EQ(driver.scheduler().ledger().committed_pages(1), 7);
  // The first continues it, the second needs its pages.
  engine::EngineRequest first = turn(tokens, 20, 5, "s");
  first.keep_session = false;
  ASSERT_TRUE(driver.submit(first).ok());
  driver.now() += 2'000'000'000;  // and it expires at the same time
  const auto plan = driver.step();
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->free_size(), 1);
  driver.deliver_all();
  driver.run();
  driver.expect_nothing_left();
}

TEST(SchedulerSession, ASessionCanBeReplacedWhileAnotherRequestContinuesIt) {
  Driver driver(kv_config(3), kStages);
  const auto tokens = history(driver.run(turn({}, 200, 5, "s", KvProfile::kInt4)));
  engine::EngineRequest longer = turn(tokens, 20, 80, "s");
  longer.keep_session = false;
  const auto a = driver.submit(longer);
  const auto b = driver.submit(turn(tokens, 20, 2, "s", KvProfile::kInt4));
  ASSERT_TRUE(a.ok() && b.ok());
  while (driver.lives().at(*b).n_ended == 0) {
    driver.step();
    driver.deliver_all();
  }
  EXPECT_EQ(driver.lives().at(*a).n_ended, 0);
  driver.step();
  EXPECT_EQ(driver.stages().store(1).sequences().size(), 2u) << "the old session is gone";
  driver.deliver_all();
  driver.stages().expect_content();
  driver.run();
  EXPECT_TRUE(driver.lives().at(*a).status.ok());
  EXPECT_EQ(driver.lives().at(*a).summary.cached_tokens, 204);
  // The window of the boundary at 225 is scored again from 200 on, where the last one was.
  EXPECT_EQ(driver.lives().at(*b).summary.cached_tokens, 200);
  EXPECT_EQ(driver.stages().store(1).sequences().size(), 1u);
}

TEST(SchedulerSession, AContinuationThatDoesNotFitBesideItsSessionDoesNotWaitForEver) {
  // Full precision: computed again from the start.
  Driver plain(kv_config(2), {{2, 60}, {1, 30}});
  const auto tokens = history(plain.run(turn({}, 400, 60, "s")));  // 15 pages a table
  const Life& life = plain.run(turn({tokens.begin(), tokens.begin() + 30}, 700, 60, "s"));
  ASSERT_TRUE(life.status.ok()) << life.status.to_string();
  EXPECT_EQ(life.summary.cached_tokens, 0);
  // Compressed: it cannot be had again, so the request is told. Two layers are in full precision,
  // so that the session is not small.
  SchedulerConfig config = kv_config(2);
  config.max_session_bytes = 100 * kShape.page_bytes();
  Driver compressed(config, {{2, 68}, {1, 100}});
  engine::EngineRequest first = turn({}, 500, 150, "s");
  first.kv_policy.overrides = {
      {.first_layer = 2, .last_layer = 2, .mode = kvstore::KvMode::kStream, .window = 64}};
  const auto kept = history(compressed.run(first));
  engine::EngineRequest second = turn(kept, 20, 150, "s");
  second.kv_policy = first.kv_policy;
  const Life& refused = compressed.run(second);
  EXPECT_EQ(refused.n_ended, 1);
  EXPECT_EQ(refused.status.code(), StatusCode::kResourceExhausted) << refused.status.to_string();
  // The session is still there, and requests without it are served at its cost.
  EXPECT_EQ(compressed.stages().store(0).sequences().size(), 1u);
  EXPECT_TRUE(compressed.run(request_of(670, 150)).status.ok());
  EXPECT_EQ(compressed.stages().store(0).sequences().size(), 0u);
}

}  // namespace
}  // namespace spindle::coordinator
