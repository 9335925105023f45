// Every profile through the real engine: what is kept and what is generated must not depend on the
// number of stages, on prefill chunks, or on what else runs.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "tests/worker/local_cluster.h"

namespace spindle::worker {
namespace {

using kvstore::KvProfile;

// A document of `n` tokens of the golden prompts.
std::vector<std::int32_t> document(std::size_t n) {
  std::vector<std::int32_t> tokens;
  for (const GoldenGreedy& golden : load_golden_greedy(8192)) {
    if (golden.prompt.size() >= n) {
      tokens.assign(golden.prompt.end() - static_cast<std::ptrdiff_t>(n), golden.prompt.end());
      break;
    }
  }
  CHECK(tokens.size() == n, "a golden prompt is long enough");
  return tokens;
}

engine::EngineRequest request_for(KvProfile profile, double ratio, std::size_t n_prompt,
                                  int max_tokens) {
  engine::EngineRequest request = greedy_request(document(n_prompt), max_tokens);
  request.sampling.ignore_eos = true;
  request.kv_policy.profile = profile;
  request.kv_policy.ratio = ratio;
  return request;
}

// Codecs alone have no size.
double ratio_of(KvProfile profile) {
  switch (profile) {
    case KvProfile::kFull:
    case KvProfile::kInt4:
    case KvProfile::kKivi4:
    case KvProfile::kKivi2:
    case KvProfile::kSimLayerKv:
    case KvProfile::kSimLayerKvInt4:
      return 0;
    default:
      return 0.25;
  }
}

// Layer 0 as token ids, everything else by snapkv.
engine::EngineRequest token_request(std::size_t n_prompt, int max_tokens) {
  engine::EngineRequest request = request_for(KvProfile::kSnapKv, 0.4, n_prompt, max_tokens);
  request.kv_policy.overrides.push_back(
      {.codec = kernels::KvCodec{kernels::KvFormat::kToken, kernels::KvFormat::kToken}});
  return request;
}

struct Outcome {
  std::vector<std::int32_t> tokens;
  std::vector<engine::BoundaryUse> boundaries;
};

Outcome run_one(TestCluster& cluster, engine::EngineRequest request) {
  const Generated generated = cluster.submit(std::move(request))->wait();
  EXPECT_TRUE(generated.status.ok()) << generated.status.to_string();
  return {generated.tokens.at(0), generated.summary.boundaries};
}

void expect_same(const Outcome& a, const Outcome& b) {
  EXPECT_EQ(a.tokens, b.tokens);
  ASSERT_EQ(a.boundaries.size(), b.boundaries.size());
  for (std::size_t i = 0; i < a.boundaries.size(); ++i) {
    EXPECT_EQ(a.boundaries[i].position, b.boundaries[i].position);
    EXPECT_EQ(a.boundaries[i].full_bytes, b.boundaries[i].full_bytes);
    ASSERT_EQ(a.boundaries[i].heads.size(), b.boundaries[i].heads.size());
    for (std::size_t h = 0; h < a.boundaries[i].heads.size(); ++h) {
      const engine::HeadKvUse& x = a.boundaries[i].heads[h];
      const engine::HeadKvUse& y = b.boundaries[i].heads[h];
      EXPECT_EQ(x.plan, y.plan) << "head " << h;
      EXPECT_EQ(x.kept_tokens, y.kept_tokens) << "head " << h;
      EXPECT_EQ(x.bytes, y.bytes) << "head " << h;
    }
  }
}

void expect_empty(TestCluster& cluster, int n_stages) {
  cluster.stop();
  for (int stage = 0; stage < n_stages; ++stage) {
    EXPECT_EQ(cluster.rank(stage).store().n_sequences(), 0u);
    EXPECT_EQ(cluster.rank(stage).store().pool().n_used(), 0);
    EXPECT_EQ(cluster.rank(stage).store().pool().n_reserved(), 0);
  }
}

class KvPolicyTest : public testing::TestWithParam<KvProfile> {};

TEST_P(KvPolicyTest, StagesChunksAndBatchesKeepAndGenerateTheSame) {
  constexpr std::size_t kPrompt = 700;
  constexpr int kGenerated = 140;  // two boundaries of generated tokens
  const KvProfile profile = GetParam();
  const auto request = [&] { return request_for(profile, ratio_of(profile), kPrompt, kGenerated); };
  Outcome reference;
  {
    LocalClusterSettings settings;
    TestCluster cluster(settings);
    reference = run_one(cluster, request());
    expect_empty(cluster, 1);
  }
  ASSERT_EQ(reference.tokens.size(), static_cast<std::size_t>(kGenerated));
  if (profile != KvProfile::kFull) {
    ASSERT_EQ(reference.boundaries.size(), 1u);
    EXPECT_EQ(reference.boundaries[0].position, static_cast<int>(kPrompt));
    EXPECT_LE(reference.boundaries[0].kept_bytes, reference.boundaries[0].full_bytes * 102 / 100);
    std::printf("%s: %.4f of the bytes\n", std::string(kvstore::profile_name(profile)).c_str(),
                static_cast<double>(reference.boundaries[0].kept_bytes) /
                    static_cast<double>(reference.boundaries[0].full_bytes));
  }
  struct Shape {
    int n_stages;
    int chunk;
    int at_once;
    bool begins_early = false;
  };
  for (const Shape& shape : {Shape{1, 37, 1}, Shape{2, 512, 3}, Shape{2, 64, 3, true},
                             Shape{3, 64, 1}, Shape{4, 512, 2, true}}) {
    SCOPED_TRACE(std::to_string(shape.n_stages) + " stages, chunks of " +
                 std::to_string(shape.chunk));
    LocalClusterSettings settings;
    settings.n_stages = shape.n_stages;
    settings.rank.max_num_batched_tokens = shape.chunk;
    settings.begins_early = shape.begins_early;
    TestCluster cluster(settings);
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    for (int i = 0; i < shape.at_once; ++i) sinks.push_back(cluster.submit(request()));
    // Something else beside it, without compression.
    auto other = cluster.submit(greedy_request(document(300), 40));
    for (auto& sink : sinks) {
      const Generated generated = sink->wait();
      ASSERT_TRUE(generated.status.ok()) << generated.status.to_string();
      expect_same({generated.tokens[0], generated.summary.boundaries}, reference);
    }
    EXPECT_TRUE(other->wait().status.ok());
    expect_empty(cluster, shape.n_stages);
  }
}

INSTANTIATE_TEST_SUITE_P(Profiles, KvPolicyTest, testing::ValuesIn(kvstore::all_profiles()),
                         [](const testing::TestParamInfo<KvProfile>& tested) {
                           std::string name(kvstore::profile_name(tested.param));
                           std::replace_if(
                               name.begin(), name.end(), [](char c) { return !std::isalnum(c); },
                               '_');
                           return name;
                         });

// Without the table of the whole vocabulary, requests keep their own ids, whatever the stages.
TEST(KvPolicy, OwnTablesOfTokenIdsAreTheSameOnAnyNumberOfStages) {
  constexpr std::size_t kPrompt = 700;
  const auto requests = [] {
    std::vector<engine::EngineRequest> out;
    out.push_back(token_request(kPrompt, 140));
    out.push_back(token_request(kPrompt, 140));
    out.back().compress_at = {300, 520, 700};  // ids are added in three segments
    // Four times the same: few ids, which the profile takes by itself.
    out.push_back(request_for(KvProfile::kSpindle, 0.5, 150, 140));
    const std::vector<std::int32_t> once = out.back().prompt_ids;
    for (int i = 1; i < 4; ++i) {
      out.back().prompt_ids.insert(out.back().prompt_ids.end(), once.begin(), once.end());
    }
    return out;
  };
  const std::vector<std::int32_t> prompt = document(kPrompt);
  const std::int64_t n_ids = kvstore::count_new_ids(prompt, 0, 4096);
  std::vector<Outcome> reference;
  for (const int n_stages : {1, 2, 3, 4}) {
    SCOPED_TRACE(std::to_string(n_stages) + " stages");
    LocalClusterSettings settings;
    settings.n_stages = n_stages;
    settings.rank.token_table_bytes = 0;
    settings.rank.max_num_batched_tokens = n_stages == 3 ? 64 : 512;
    TestCluster cluster(settings);
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    for (engine::EngineRequest& request : requests()) {
      sinks.push_back(cluster.submit(std::move(request)));
    }
    for (std::size_t i = 0; i < sinks.size(); ++i) {
      SCOPED_TRACE("request " + std::to_string(i));
      const Generated generated = sinks[i]->wait();
      ASSERT_TRUE(generated.status.ok()) << generated.status.to_string();
      const Outcome outcome{generated.tokens[0], generated.summary.boundaries};
      if (n_stages == 1) {
        reference.push_back(outcome);
      } else {
        expect_same(outcome, reference[i]);
      }
    }
    expect_empty(cluster, n_stages);
  }
  // The plan says what the store lays out, to the byte.
  const kvstore::KvModel model{.n_layers = 12,
                               .n_heads = 4,
                               .n_kv_heads = 2,
                               .head_dim = 64,
                               .vocab_size = 4096,
                               .max_model_len = 8192,
                               .token_table = false};
  const engine::HeadKvUse& head = reference[0].boundaries.at(0).heads[0];
  EXPECT_EQ(head.plan, "FULL token");
  EXPECT_EQ(head.kept_tokens, static_cast<std::int64_t>(kPrompt));
  EXPECT_EQ(head.bytes,
            kvstore::head_bytes({.codec = {kernels::KvFormat::kToken, kernels::KvFormat::kToken}},
                                model, 4, kPrompt, 0, nullptr, n_ids));
  EXPECT_LT(head.bytes, kPrompt * 256 * 7 / 10);
  EXPECT_EQ(reference[2].boundaries.at(0).heads[0].plan, "FULL token");
}

// Layer 0 loses nothing by it: the rest in full precision gives the uncompressed tokens.
TEST(KvPolicy, OwnTablesOfTokenIdsChangeNoToken) {
  LocalClusterSettings settings;
  settings.rank.token_table_bytes = 0;
  TestCluster cluster(settings);
  engine::EngineRequest request = request_for(KvProfile::kFull, 0, 700, 140);
  request.kv_policy.overrides = token_request(700, 140).kv_policy.overrides;
  const Outcome own = run_one(cluster, std::move(request));
  EXPECT_EQ(own.boundaries.at(0).heads[1].plan, "FULL token");
  EXPECT_GT(own.boundaries.at(0).heads[1].k_entries_per_token, 0);
  EXPECT_EQ(own.tokens, run_one(cluster, request_for(KvProfile::kFull, 0, 700, 140)).tokens);
  expect_empty(cluster, 1);
}

// Choices fork from the prompt's entries, and a session goes on with them.
TEST(KvPolicy, OwnTablesOfTokenIdsAreSharedByChoicesAndSessions) {
  LocalClusterSettings settings;
  settings.n_stages = 2;
  settings.rank.token_table_bytes = 0;
  TestCluster cluster(settings);
  engine::EngineRequest choices = token_request(500, 140);
  choices.sampling.n_choices = 3;
  const Generated generated = cluster.generate(std::move(choices));
  ASSERT_TRUE(generated.status.ok()) << generated.status.to_string();
  const Outcome single = run_one(cluster, token_request(500, 140));
  for (const auto& tokens : generated.tokens) EXPECT_EQ(tokens, single.tokens);
  engine::EngineRequest first = token_request(500, 100);
  first.session_id = "s";
  first.keep_session = true;
  std::vector<std::int32_t> prompt = first.prompt_ids;
  const Outcome begun = run_one(cluster, std::move(first));
  prompt.insert(prompt.end(), begun.tokens.begin(), begun.tokens.end());
  const std::vector<std::int32_t> question = document(80);
  prompt.insert(prompt.end(), question.begin(), question.end());
  engine::EngineRequest next = token_request(500, 70);
  next.prompt_ids = prompt;
  next.session_id = "s";
  const Generated continued = cluster.generate(std::move(next));
  ASSERT_TRUE(continued.status.ok()) << continued.status.to_string();
  EXPECT_GE(continued.summary.cached_tokens, 500);
  EXPECT_EQ(continued.tokens[0].size(), 70u);
  EXPECT_EQ(continued.summary.boundaries.at(0).heads[0].kept_tokens,
            static_cast<std::int64_t>(prompt.size()));
  cluster.stop();
}

// Recomputing a sequence from its prompt and the tokens it generated gives the same cache: the same
// next tokens as if it had never been dropped.
TEST(KvPolicy, RecomputeContinuesWithTheSameTokens) {
  for (const KvProfile profile : {KvProfile::kSpindle, KvProfile::kSnapKv, KvProfile::kInt4,
                                  KvProfile::kStreaming, KvProfile::kSpindleKv}) {
    SCOPED_TRACE(std::string(kvstore::profile_name(profile)));
    TestCluster cluster(LocalClusterSettings{});
    engine::EngineRequest request = request_for(profile, ratio_of(profile), 500, 200);
    const Outcome whole = run_one(cluster, request);
    // The generated tokens as a prompt whose boundaries are where those of the answer were.
    for (const int n_before : {1, 64, 65, 130}) {
      engine::EngineRequest again = request;
      again.prompt_ids.insert(again.prompt_ids.end(), whole.tokens.begin(),
                              whole.tokens.begin() + n_before);
      again.resumed_tokens = n_before;
      again.sampling.max_tokens = 200 - n_before;
      const Outcome rest = run_one(cluster, again);
      EXPECT_EQ(rest.tokens,
                std::vector<std::int32_t>(whole.tokens.begin() + n_before, whole.tokens.end()))
          << n_before << " tokens recomputed";
    }
  }
}

TEST(KvPolicy, ChoicesShareTheBoundary) {
  TestCluster cluster(LocalClusterSettings{});
  engine::EngineRequest request = request_for(KvProfile::kSpindle, 0.25, 600, 80);
  request.sampling.temperature = 1.0F;
  request.sampling.has_seed = true;
  request.sampling.seed = 7;
  request.sampling.n_choices = 3;
  const Generated together = cluster.submit(request)->wait();
  ASSERT_TRUE(together.status.ok()) << together.status.to_string();
  EXPECT_NE(together.tokens[0], together.tokens[1]);
  request.sampling.n_choices = 1;
  const Generated alone = cluster.submit(request)->wait();
  EXPECT_EQ(together.tokens[0], alone.tokens[0]);
  expect_empty(cluster, 1);
}

TEST(KvPolicy, StreamKeepsBytesConstantOverAThousandTokens) {
  TestCluster cluster(LocalClusterSettings{});
  engine::EngineRequest request = request_for(KvProfile::kStreaming, 0.25, 1200, 1000);
  auto sink = cluster.submit(request);
  std::vector<std::uint64_t> used;
  for (std::size_t n = 100; n <= 900; n += 64) {
    ASSERT_TRUE(sink->wait_tokens(n));
    used.push_back(cluster.engine().stats().stages[0].kv_used_bytes);
  }
  const Generated generated = sink->wait();
  ASSERT_TRUE(generated.status.ok()) << generated.status.to_string();
  // Between two boundaries the tail grows by 64 tokens, at most three pages for each of 24 heads.
  const auto [low, high] = std::minmax_element(used.begin(), used.end());
  EXPECT_LE(*high - *low, 3u * 24u * 8192u);
  EXPECT_LE(*high, generated.summary.boundaries[0].kept_bytes + 3u * 24u * 8192u);
}

TEST(KvPolicy, ImpossiblePoliciesAreRefusedAndNothingLeaks) {
  TestCluster cluster(LocalClusterSettings{});
  struct Bad {
    std::function<void(engine::EngineRequest&)> change;
    std::string names;
  };
  const Bad cases[] = {
      {[](auto& r) { r.kv_policy.ratio = 0.0001; }, "ratio"},
      {[](auto& r) { r.kv_policy.ratio = 1.5; }, "ratio"},
      {[](auto& r) {
         r.kv_policy.ratio = 0;
         r.kv_policy.max_bytes = 10;
       },
       "max_bytes"},
      {[](auto& r) { r.kv_policy.sinks = -1; }, "sinks"},
      {[](auto& r) {
         r.compress_at = {400, 300};
       },
       "compress_at"},
      {[](auto& r) { r.compress_at = {0}; }, "compress_at"},
      {[](auto& r) { r.compress_at = {501}; }, "compress_at"},
      {[](auto& r) {
         r.prompt_scores = {0, 10, false};
       },
       "prompt_scores"},
      {[](auto& r) {
         r.prompt_scores = {10, 501, false};
       },
       "prompt_scores"},
      {[](auto& r) { r.keep_session = true; }, "session_id"},
      {[](auto& r) { r.session_id = "unknown"; }, "session_id"},
      {[](auto& r) {
         r.kv_policy.profile = KvProfile::kStreaming;
         r.kv_policy.ratio = 0;
         r.kv_policy.window = 5000;
       },
       "window"},
  };
  for (const Bad& bad : cases) {
    engine::EngineRequest request = request_for(KvProfile::kSnapKv, 0.25, 500, 4);
    bad.change(request);
    const Generated generated = cluster.submit(std::move(request))->wait();
    ASSERT_FALSE(generated.status.ok()) << bad.names;
    EXPECT_NE(generated.status.message().find(bad.names), std::string::npos)
        << generated.status.to_string();
  }
  expect_empty(cluster, 1);
}

TEST(KvPolicy, PromptScoresAreTheLogitsOfThePrompt) {
  TestCluster cluster(LocalClusterSettings{});
  const std::vector<GoldenGreedy> cases = load_golden_greedy(900);
  ASSERT_FALSE(cases.empty());
  // The reference's greedy continuation, scored as part of a prompt: each token is the best one.
  const GoldenGreedy& golden = cases.front();
  engine::EngineRequest request = greedy_request(golden.prompt, 1);
  request.prompt_ids.insert(request.prompt_ids.end(), golden.output.begin(), golden.output.end());
  const auto n = static_cast<std::int32_t>(request.prompt_ids.size());
  request.prompt_scores = {static_cast<std::int32_t>(golden.prompt.size()), n, true};
  auto sink = cluster.submit(request);
  ASSERT_TRUE(sink->wait().status.ok());
  const std::vector<engine::PromptScore> scores = sink->scores();
  ASSERT_EQ(scores.size(), golden.output.size());
  for (std::size_t i = 0; i < scores.size(); ++i) {
    EXPECT_EQ(scores[i].position, static_cast<std::int32_t>(golden.prompt.size() + i));
    EXPECT_EQ(scores[i].best_id, golden.output[i]);
    EXPECT_EQ(scores[i].logprob, scores[i].best_logprob);
    ASSERT_EQ(scores[i].dense.size(), 4096u);
    double sum = 0;
    for (const float x : scores[i].dense) sum += std::exp(static_cast<double>(x));
    EXPECT_NEAR(sum, 1.0, 1e-4);
  }
}

// A kept sequence continues without its past being computed again, with the tokens that a request
// from scratch gives.
TEST(KvPolicy, SessionsContinueWhereTheyWere) {
  for (const int n_stages : {1, 2}) {
    LocalClusterSettings settings;
    settings.n_stages = n_stages;
    TestCluster cluster(settings);
    const std::vector<std::int32_t> text = document(900);
    engine::EngineRequest first = request_for(KvProfile::kFull, 0, 900, 20);
    first.prompt_ids.assign(text.begin(), text.begin() + 600);
    first.session_id = "chat";
    first.keep_session = true;
    const Generated one = cluster.submit(first)->wait();
    ASSERT_TRUE(one.status.ok()) << one.status.to_string();
    EXPECT_EQ(one.summary.cached_tokens, 0);

    engine::EngineRequest second = first;
    second.prompt_ids.insert(second.prompt_ids.end(), one.tokens[0].begin(), one.tokens[0].end());
    second.prompt_ids.insert(second.prompt_ids.end(), text.begin() + 600, text.end());
    engine::EngineRequest fresh = second;
    fresh.session_id.clear();
    fresh.keep_session = false;
    const Generated expected = cluster.submit(fresh)->wait();
    second.keep_session = false;
    const Generated two = cluster.submit(second)->wait();
    ASSERT_TRUE(two.status.ok()) << two.status.to_string();
    EXPECT_EQ(two.summary.cached_tokens, 619);  // all but the last sampled token
    EXPECT_EQ(two.tokens, expected.tokens);

    // Another key's session is not there, nor is one that a prompt does not repeat once compressed.
    engine::EngineRequest stranger = second;
    stranger.owner = 99;
    EXPECT_EQ(cluster.submit(stranger)->wait().status.code(), StatusCode::kNotFound);

    // Compressing at the end of the shared part runs the observation window again.
    engine::EngineRequest compressed = second;
    compressed.kv_policy.profile = KvProfile::kSpindle;
    compressed.kv_policy.ratio = 0.25;
    compressed.compress_at = {600};
    engine::EngineRequest compressed_fresh = compressed;
    compressed_fresh.session_id.clear();
    const Generated a = cluster.submit(compressed)->wait();
    const Generated b = cluster.submit(compressed_fresh)->wait();
    ASSERT_TRUE(a.status.ok()) << a.status.to_string();
    EXPECT_EQ(a.summary.cached_tokens, 568);
    expect_same({a.tokens[0], a.summary.boundaries}, {b.tokens[0], b.summary.boundaries});

    // A compressed session must be repeated up to its boundary.
    compressed.keep_session = true;
    compressed.session_id = "compressed";
    ASSERT_TRUE(cluster.submit(compressed)->wait().status.ok());
    engine::EngineRequest other = compressed;
    other.keep_session = false;
    other.prompt_ids[10] = other.prompt_ids[10] == 5 ? 6 : 5;
    EXPECT_EQ(cluster.submit(other)->wait().status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(cluster.rank(0).store().n_sequences(), 2u);
  }
}

TEST(KvPolicy, ExpiredSessionsAreGone) {
  LocalClusterSettings settings;
  settings.session_ttl_us = 1000;
  TestCluster cluster(settings);
  engine::EngineRequest request = request_for(KvProfile::kFull, 0, 200, 4);
  request.session_id = "short";
  request.keep_session = true;
  ASSERT_TRUE(cluster.submit(request)->wait().status.ok());
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  // Any step gives expired sessions up.
  ASSERT_TRUE(cluster.submit(greedy_request(document(50), 2))->wait().status.ok());
  request.keep_session = false;
  EXPECT_EQ(cluster.submit(request)->wait().status.code(), StatusCode::kNotFound);
}

}  // namespace
}  // namespace spindle::worker
