// What a sizing promises, against the scheduler itself with stages that are real KV stores.

#include "cluster/coordinator/sizing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "cluster/coordinator/request_demand.h"
#include "cluster/coordinator/sizing_search.h"
#include "tests/cluster/coordinator/simulated_stages.h"

namespace spindle::coordinator {
namespace {

using kvstore::KvPolicy;
using kvstore::KvProfile;

const std::uint64_t kPage = kShape.page_bytes();

// The stages of kv_config(): layers 0 and 1, and layer 2, with these pages.
ClusterDescription small_cluster(std::int64_t first_pages, std::int64_t second_pages) {
  ClusterDescription cluster;
  cluster.model = {.n_layers = 3,
                   .hidden_size = 64,
                   .intermediate_size = 64,
                   .n_heads = kGroup,
                   .n_kv_heads = 1,
                   .head_dim = 32,
                   .vocab_size = kVocab,
                   .max_position_embeddings = 1500};
  cluster.settings.layers_per_stage = {2, 1};
  cluster.settings.kv_bytes = {first_pages * static_cast<std::int64_t>(kPage),
                               second_pages * static_cast<std::int64_t>(kPage)};
  cluster.settings.max_model_len = 1000;
  cluster.settings.max_num_batched_tokens = 96;
  cluster.devices = {{"here", 0, 0}, {"here", 0, 0}};
  return cluster;
}

RequestKind kind_of(std::int64_t n_prompt, std::int64_t n_output, KvPolicy policy = {}) {
  policy.best_effort = true;
  return {.prompt_tokens = n_prompt, .output_tokens = n_output, .policy = std::move(policy)};
}

RequestSizing size(const ClusterDescription& cluster, const RequestKind& kind) {
  const auto sizing = size_cluster(cluster);
  EXPECT_TRUE(sizing.ok()) << sizing.status().to_string();
  auto requests = size_requests(cluster, *sizing, kind);
  EXPECT_TRUE(requests.ok()) << requests.status().to_string();
  return *std::move(requests);
}

struct Ran {
  std::uint64_t most_at_once = 0;
  std::uint64_t preemptions = 0;
};

// n requests of that kind, submitted together.
Ran run(const ClusterDescription& cluster, const RequestKind& kind, std::int64_t n) {
  SchedulerConfig config = kv_config(2);
  config.max_num_seqs = cluster.settings.max_num_seqs;
  config.max_num_queued_reqs = 1000;
  config.max_num_queued_tokens = 1 << 20;
  config.limits.max_model_len = 1000;
  config.kv_model.max_model_len = 1000;
  const auto sizing = size_cluster(cluster);
  EXPECT_TRUE(sizing.ok()) << sizing.status().to_string();
  std::vector<StageCapacity> capacities;
  for (const StageSizing& stage : sizing->stages) capacities.push_back(stage.capacity);
  Driver driver(config, capacities);
  for (std::int64_t i = 0; i < n; ++i) {
    engine::EngineRequest request =
        request_of(static_cast<int>(kind.prompt_tokens), static_cast<int>(kind.output_tokens));
    request.kv_policy = kind.policy;
    request.sampling.ignore_eos = true;
    const auto handle = driver.submit(std::move(request));
    EXPECT_TRUE(handle.ok()) << handle.status().to_string();
  }
  Ran ran;
  for (int i = 0; i < 50000; ++i) {
    const bool stepped = driver.step().has_value();
    // Those that have ended count until the stages have freed them.
    auto running = static_cast<std::uint64_t>(driver.scheduler().stats().running);
    for (const auto& [handle, life] : driver.lives()) {
      if (!life.finished.empty() && life.n_ended == 0) --running;
    }
    ran.most_at_once = std::max(ran.most_at_once, running);
    const bool delivered = driver.has_late();
    driver.deliver_all();
    if (!stepped && !delivered) break;
  }
  const engine::EngineStats stats = driver.scheduler().stats();
  EXPECT_EQ(stats.finished, static_cast<std::uint64_t>(n));
  ran.preemptions = stats.preemptions;
  return ran;
}

// How many fit if none took more than it holds after its prompt.
std::int64_t most_at_first(const ClusterDescription& cluster, const RequestKind& kind) {
  const auto sizing = size_cluster(cluster);
  const RequestSizing requests = size(cluster, kind);
  const BoundaryUse at_prompt = boundary_uses(*sizing, kind, requests.plan).front();
  std::int64_t most = cluster.settings.max_num_seqs;
  for (std::size_t s = 0; s < requests.stages.size(); ++s) {
    RequestUse use = requests.stages[s];
    use.held_pages = static_cast<std::int64_t>(at_prompt.bytes[s] / kPage);
    most = std::min(most, requests_that_fit(sizing->shape, sizing->stages[s].capacity, use));
  }
  return most;
}

TEST(Sizing, ByHand) {
  const ClusterDescription cluster = small_cluster(100, 60);
  const RequestSizing requests = size(cluster, kind_of(100, 40));
  // 139 tokens: five pages of each of two layers, and of one.
  EXPECT_EQ(requests.stages[0].admission_pages, 10);
  EXPECT_EQ(requests.stages[0].prefill_pages, 8);
  EXPECT_EQ(requests.stages[0].prompt_bytes, 8 * kPage);
  EXPECT_EQ(requests.stages[1].held_pages, 5);
  // They have all that they will take.
  EXPECT_EQ(requests.fitting[0], 10);
  EXPECT_EQ(requests.fitting[1], 12);
  EXPECT_EQ(requests.concurrency, 10);
  EXPECT_EQ(requests.limiting_stage, 0);
  // 299 tokens: ten pages of each layer, of which two are ahead of a request with 164.
  const RequestSizing longer = size(cluster, kind_of(100, 200));
  EXPECT_EQ(longer.stages[0].held_pages, 20);
  EXPECT_EQ(longer.stages[0].tokens_ahead, 64);
  EXPECT_EQ(longer.fitting[0], 4) << "80 of 100, and 12 kept free";
  EXPECT_EQ(longer.fitting[1], 5) << "50 of 60, and 7 kept free";
}

TEST(Sizing, MaxNumSeqsLimitsToo) {
  ClusterDescription cluster = small_cluster(100, 60);
  cluster.settings.max_num_seqs = 3;
  const RequestSizing requests = size(cluster, kind_of(100, 40));
  EXPECT_EQ(requests.concurrency, 3);
  EXPECT_EQ(requests.limiting_stage, -1);
}

// With an output of one boundary nobody grows, so the figure is exact.
TEST(Sizing, IsWhatTheSchedulerAdmitsAtOnce) {
  for (const auto& [first, second] : {std::pair(100, 60), std::pair(200, 64), std::pair(97, 90)}) {
    const ClusterDescription cluster = small_cluster(first, second);
    const RequestKind kind = kind_of(96, 60);
    const RequestSizing requests = size(cluster, kind);
    const Ran ran = run(cluster, kind, requests.concurrency + 5);
    EXPECT_EQ(ran.most_at_once, static_cast<std::uint64_t>(requests.concurrency));
    EXPECT_EQ(ran.preemptions, 0u);
  }
}

TEST(Sizing, SoManyRunToTheirEndAndNobodyIsPreempted) {
  constexpr unsigned kSeed = 20260114;
  std::mt19937 random(kSeed);
  const auto between = [&](int least, int most) {
    return least + static_cast<int>(random() % static_cast<unsigned>(most - least + 1));
  };
  const std::vector<KvPolicy> policies = {{},
                                          {.profile = KvProfile::kInt4},
                                          {.profile = KvProfile::kKivi2},
                                          {.profile = KvProfile::kSnapKv, .ratio = 0.3},
                                          {.profile = KvProfile::kStreaming, .ratio = 0.4},
                                          {.profile = KvProfile::kDefensive, .ratio = 0.3},
                                          {.profile = KvProfile::kSpindle, .ratio = 0.3}};
  for (int i = 0; i < 14; ++i) {
    SCOPED_TRACE("seed " + std::to_string(kSeed) + ", case " + std::to_string(i));
    const ClusterDescription cluster = small_cluster(between(120, 280), between(64, 150));
    const RequestKind kind = kind_of(between(200, 300), between(130, 220),
                                     policies[static_cast<std::size_t>(i) % policies.size()]);
    const RequestSizing requests = size(cluster, kind);
    ASSERT_GT(requests.concurrency, 0);
    const Ran ran = run(cluster, kind, requests.concurrency);
    EXPECT_EQ(ran.most_at_once, static_cast<std::uint64_t>(requests.concurrency));
    EXPECT_EQ(ran.preemptions, 0u);
    // When more come, more may run as long as the others are not at their longest; but no more than
    // if all held what they do after their prompt.
    const Ran more = run(cluster, kind, requests.concurrency + 8);
    EXPECT_GE(more.most_at_once, static_cast<std::uint64_t>(requests.concurrency));
    EXPECT_LE(more.most_at_once, static_cast<std::uint64_t>(most_at_first(cluster, kind)) + 1);
  }
}

TEST(Sizing, BoundariesAreThoseOfTheOutput) {
  const ClusterDescription cluster = small_cluster(500, 300);
  const RequestKind kind = kind_of(300, 200, {.profile = KvProfile::kInt4});
  const auto sizing = size_cluster(cluster);
  ASSERT_TRUE(sizing.ok());
  const RequestSizing requests = size(cluster, kind);
  const auto uses = boundary_uses(*sizing, kind, requests.plan);
  ASSERT_EQ(uses.size(), 4u);  // 300, 364, 428, 492 tokens of at most 499
  EXPECT_EQ(uses[3].n_tokens, 492);
  EXPECT_EQ(uses[0].bytes[0], requests.stages[0].prompt_bytes);
  EXPECT_EQ(uses[3].bytes[1], requests.stages[1].final_bytes);
  std::int64_t most = 0;
  for (const BoundaryUse& use : uses) most = std::max(most, use.held_pages[0]);
  EXPECT_EQ(most, requests.stages[0].held_pages);
  EXPECT_LT(uses[0].bytes[0], uses[3].bytes[0]);
}

TEST(Sizing, NamesWhatIsWrong) {
  const ClusterDescription cluster = small_cluster(100, 60);
  const auto sizing = size_cluster(cluster);
  ASSERT_TRUE(sizing.ok());
  const auto error = [&](const RequestKind& kind) {
    return size_requests(cluster, *sizing, kind).status().message();
  };
  EXPECT_NE(error(kind_of(900, 101)).find("longer than max_model_len, 1000"), std::string::npos);
  EXPECT_NE(error(kind_of(0, 5)).find("at least one token"), std::string::npos);
  ClusterDescription none = cluster;
  none.devices.clear();
  EXPECT_EQ(size_cluster(none).status().code(), StatusCode::kInvalidArgument);
  // A stage whose pool is smaller than one sequence of 1000 tokens.
  EXPECT_EQ(size_cluster(small_cluster(63, 60)).status().code(), StatusCode::kResourceExhausted);
}

ClusterDescription gpus(std::size_t n, std::uint64_t bytes) {
  ClusterDescription cluster;
  cluster.model = {.n_layers = 32,
                   .hidden_size = 4096,
                   .intermediate_size = 14336,
                   .n_heads = 32,
                   .n_kv_heads = 8,
                   .head_dim = 128,
                   .vocab_size = 128256,
                   .max_position_embeddings = 65536};
  cluster.settings.device = ComputeDevice::kCuda;
  for (std::size_t i = 0; i < n; ++i) cluster.devices.push_back({std::to_string(i), bytes, 0});
  return cluster;
}

TEST(Sizing, AGpuKeepsScratchAndLeavesATenthFree) {
  const ClusterDescription cluster = gpus(1, 80ULL << 30);
  const auto sizing = size_cluster(cluster);
  ASSERT_TRUE(sizing.ok()) << sizing.status().to_string();
  const StageSizing& stage = sizing->stages[0];
  EXPECT_TRUE(stage.pool_is_estimate);
  EXPECT_GT(stage.scratch_bytes, 0);
  const auto sum = static_cast<std::int64_t>(stage.kv_pool_bytes) + stage.scratch_bytes +
                   stage.workspace_bytes + stage.predicted.weight_bytes;
  EXPECT_NEAR(static_cast<double>(sum), 0.9 * static_cast<double>(80ULL << 30), 2.0);
  ClusterDescription other = cluster;
  other.settings.kv_dtype = DType::kF32;
  EXPECT_EQ(size_cluster(other).status().code(), StatusCode::kUnimplemented);
  other = cluster;
  other.model.n_heads = 9 * 8;
  EXPECT_EQ(size_cluster(other).status().code(), StatusCode::kUnimplemented);
  other = gpus(1, 800ULL << 30);
  EXPECT_NE(size_cluster(other).status().message().find("256 GiB"), std::string::npos);
  ClusterDescription unknown = gpus(1, 0);
  EXPECT_EQ(size_cluster(unknown).status().code(), StatusCode::kInvalidArgument);
}

TEST(SizingSearch, FindsTheLeastThatFits) {
  const ClusterDescription cluster = gpus(2, 24ULL << 30);
  const RequestKind kind = kind_of(32768, 512, {.profile = KvProfile::kSpindle, .ratio = 0.25});
  const std::int64_t now = size(cluster, kind).concurrency;
  ASSERT_GT(now, 0);
  ASSERT_LT(now, 40);
  EXPECT_TRUE(can_serve(cluster, kind, now));
  EXPECT_FALSE(can_serve(cluster, kind, 40));

  const auto memory = least_memory(cluster, kind, 40);
  ASSERT_TRUE(memory.has_value());
  EXPECT_GT(memory->front(), 24ULL << 30);
  EXPECT_TRUE(can_serve(gpus(2, memory->front()), kind, 40));
  EXPECT_FALSE(can_serve(gpus(2, memory->front() - (64ULL << 20)), kind, 40));

  const auto n = least_devices(cluster, kind, 40);
  ASSERT_TRUE(n.has_value());
  EXPECT_GT(*n, 2);
  EXPECT_TRUE(can_serve(gpus(static_cast<std::size_t>(*n), 24ULL << 30), kind, 40));

  const auto ratio = largest_ratio(cluster, kind, 40);
  ASSERT_TRUE(ratio.has_value());
  EXPECT_LT(*ratio, 0.25);
  RequestKind smaller = kind;
  smaller.policy.ratio = *ratio;
  EXPECT_TRUE(can_serve(cluster, smaller, 40));
  smaller.policy.ratio = *ratio + 0.001;
  EXPECT_FALSE(can_serve(cluster, smaller, 40));
}

TEST(SizingSearch, WeightsThatDoNotFitNeedMoreMemoryOrMoreDevices) {
  const ClusterDescription cluster = gpus(1, 16ULL << 30);
  const RequestKind kind = kind_of(4096, 128);
  EXPECT_EQ(size_cluster(cluster).status().code(), StatusCode::kResourceExhausted);
  EXPECT_FALSE(can_serve(cluster, kind, 0));
  const auto memory = least_memory(cluster, kind, 0);
  ASSERT_TRUE(memory.has_value());
  EXPECT_TRUE(size_cluster(gpus(1, memory->front())).ok());
  EXPECT_FALSE(size_cluster(gpus(1, memory->front() - (1ULL << 20))).ok());
  const auto n = least_devices(cluster, kind, 0);
  ASSERT_TRUE(n.has_value());
  EXPECT_TRUE(size_cluster(gpus(static_cast<std::size_t>(*n), 16ULL << 30)).ok());
  EXPECT_FALSE(longest_max_model_len(cluster, kind, 0).has_value()) << "16 GB are its weights";
  const auto shorter = longest_max_model_len(gpus(1, 24ULL << 30), kind, 0);
  ASSERT_TRUE(shorter.has_value());
  EXPECT_GE(*shorter, 4096 + 128);
}

TEST(RequestDemand, BoundariesOfOutputCountFromWhereItBegins) {
  EXPECT_EQ(most_cached_tokens(100, 1), 100);
  EXPECT_EQ(next_boundary_after(100, 50), 164);
  EXPECT_EQ(next_boundary_after(100, 100), 164);
  EXPECT_EQ(next_boundary_after(100, 163), 164);
  EXPECT_EQ(next_boundary_after(100, 164), 228);
}

TEST(RequestDemand, ShortPromptsAreNeverCompressed) {
  EXPECT_TRUE(request_demand({.n_before_output = 200,
                              .granted = 264,
                              .n_boundaries = 1,
                              .last_boundary = 200,
                              .sinks = 4})
                  .compresses);
  EXPECT_FALSE(request_demand({.n_before_output = 100,
                               .granted = 164,
                               .n_boundaries = 1,
                               .last_boundary = 100,
                               .sinks = 4})
                   .compresses);
  const KvDemand demand = request_demand({.n_before_output = 200,
                                          .granted = 264,
                                          .n_boundaries = 1,
                                          .last_boundary = 150,
                                          .recent = 64});
  EXPECT_EQ(demand.tail_tokens, 64 + 50);
  EXPECT_EQ(demand.max_tokens, 264);
}

}  // namespace
}  // namespace spindle::coordinator
