// The bundled model through the real engine on GPUs: golden continuations, logits and what every
// KV profile keeps, beside the CPU's. Two stages share the one GPU here, with activations through
// host memory; tests of two GPUs are in nccl_gpu_test.cc.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/cuda/devices.h"
#include "tests/source_dir.h"
#include "tests/worker/local_cluster.h"
#include "worker/model/safetensors.h"

namespace spindle::worker {
namespace {

using kvstore::KvProfile;

class ClusterGpuTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto devices = kernels::list_cuda_devices();
    ASSERT_TRUE(devices.ok()) << devices.status().to_string();
    if (devices->empty()) GTEST_SKIP() << "no CUDA device on this machine";
  }
};

LocalClusterSettings settings_on(ComputeDevice device, int n_stages = 1) {
  LocalClusterSettings settings;
  settings.n_stages = n_stages;
  settings.rank.device = device;
  settings.rank.max_num_batched_tokens = device == ComputeDevice::kCuda ? 2048 : 512;
  settings.rank.kv_bytes = {std::int64_t{1} << 30};
  settings.max_num_seqs = 16;
  return settings;
}

// Two ranks that share the GPU start at the same time; each takes what is stated for it, whatever
// the other has taken by then.
TEST_F(ClusterGpuTest, StatedMemoryOfRanksThatShareAGpu) {
  LocalClusterSettings settings = settings_on(ComputeDevice::kCuda, 2);
  settings.rank.kv_bytes.clear();
  settings.rank.device_memory_bytes = {std::int64_t{4} << 30, std::int64_t{1} << 30};
  settings.max_num_seqs = 64;  // more than the smaller one holds
  TestCluster cluster(settings);
  std::vector<int> n_layers;
  for (int stage = 0; stage < 2; ++stage) {
    const control::StageInfo info = cluster.rank(stage).info();
    const auto memory = static_cast<std::uint64_t>(
        settings.rank.device_memory_bytes[static_cast<std::size_t>(stage)]);
    EXPECT_LT(info.weight_bytes() + info.kv_capacity_bytes(), memory);
    EXPECT_GT(info.weight_bytes() + info.kv_capacity_bytes(), memory / 4);
    n_layers.push_back(info.n_layers());
  }
  EXPECT_GT(n_layers[0], n_layers[1]);
  const GoldenGreedy golden = load_golden_greedy(256).front();
  EXPECT_TRUE(cluster.generate(greedy_request(golden.prompt, 8)).status.ok());
}

// Dense log-probabilities of the tokens after the last n of a prompt, [n][vocab].
std::vector<std::vector<float>> dense_scores(TestCluster& cluster, std::vector<std::int32_t> prompt,
                                             int n) {
  engine::EngineRequest request = greedy_request(std::move(prompt), 1);
  const auto length = static_cast<std::int32_t>(request.prompt_ids.size());
  request.prompt_scores = {.first = length - n, .end = length, .dense = true};
  auto sink = cluster.submit(std::move(request));
  EXPECT_TRUE(sink->wait().status.ok());
  std::vector<std::vector<float>> rows;
  std::vector<engine::PromptScore> scores = sink->scores();
  for (engine::PromptScore& score : scores) rows.push_back(std::move(score.dense));
  return rows;
}

// A difference of logits and one of log-probabilities are the same up to a constant of the row,
// which is taken out by the median.
float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  std::vector<float> differences;
  for (std::size_t i = 0; i < a.size(); ++i) differences.push_back(a[i] - b[i]);
  std::nth_element(differences.begin(),
                   differences.begin() + static_cast<std::ptrdiff_t>(differences.size() / 2),
                   differences.end());
  const float median = differences[differences.size() / 2];
  float largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_TRUE(std::isfinite(a[i]) && std::isfinite(b[i]));
    largest = std::max(largest, std::abs(a[i] - b[i] - median));
  }
  return largest;
}

// Weights and activations are bf16, so a continuation may flip where the CPU's two best tokens are
// nearly equal; at most one of the fourteen may.
TEST_F(ClusterGpuTest, GoldenGreedyContinuations) {
  for (const int n_stages : {1, 2}) {
    SCOPED_TRACE(std::to_string(n_stages) + " stages");
    TestCluster cluster(settings_on(ComputeDevice::kCuda, n_stages));
    const std::vector<GoldenGreedy> cases = load_golden_greedy(8192);
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    for (const GoldenGreedy& golden : cases) {
      engine::EngineRequest request = greedy_request(
          golden.prompt, static_cast<int>(golden.output.size()) + (golden.ends_with_eos ? 1 : 0));
      request.sampling.n_logprobs = 2;
      sinks.push_back(cluster.submit(std::move(request)));
    }
    std::size_t n_same = 0;
    for (std::size_t i = 0; i < cases.size(); ++i) {
      const Generated generated = sinks[i]->wait();
      ASSERT_TRUE(generated.status.ok()) << cases[i].name << ": " << generated.status.to_string();
      if (generated.tokens[0] == cases[i].output) {
        ++n_same;
        continue;
      }
      const auto [mine, theirs] =
          std::mismatch(generated.tokens[0].begin(), generated.tokens[0].end(),
                        cases[i].output.begin(), cases[i].output.end());
      const auto at = static_cast<std::size_t>(mine - generated.tokens[0].begin());
      float margin = -1;
      if (at < generated.events[0].size() && generated.events[0][at].top.size() == 2) {
        margin = generated.events[0][at].top[0].logprob - generated.events[0][at].top[1].logprob;
      }
      std::printf("%s flips at token %zu, where the best two are %.4f apart\n",
                  cases[i].name.c_str(), at, margin);
    }
    std::printf("%zu of %zu continuations are the reference's\n", n_same, cases.size());
    EXPECT_GE(n_same + 1, cases.size());
  }
}

std::vector<float> golden_tensor(const std::string& name) {
  auto file = model::SafetensorsFile::open(source_dir() + "/tests/golden/golden.safetensors");
  CHECK(file.ok(), file.status().to_string());
  const model::TensorInfo* info = file->find(name);
  CHECK(info != nullptr, name);
  std::size_t n = 1;
  for (const auto size : info->shape) n *= static_cast<std::size_t>(size);
  std::vector<float> values(n);
  CHECK(file->read(*info, std::as_writable_bytes(std::span(values))).ok(), name);
  return values;
}

// The bar of bf16 against the reference's fp32 is 0.15 on a logit. Over 64 positions of prose one
// of the 262,144 logits was seen 0.154 apart: products take bf16 activations, whose rounding alone
// gives 0.14 there.
TEST_F(ClusterGpuTest, LogitsAreTheReferences) {
  TestCluster cluster(settings_on(ComputeDevice::kCuda));
  float worst = 0;
  for (const GoldenGreedy& golden : load_golden_greedy(8192)) {
    // What follows the prompt is scored by the prompt's last logits.
    std::vector<std::int32_t> tokens = golden.prompt;
    tokens.push_back(100);
    const auto rows = dense_scores(cluster, tokens, 1);
    ASSERT_EQ(rows.size(), 1U) << golden.name;
    const float difference =
        largest_difference(rows[0], golden_tensor(golden.name + ".last_logits"));
    EXPECT_LE(difference, 0.15F) << golden.name;
    worst = std::max(worst, difference);
  }
  std::printf("largest difference of a logit after the 14 prompts: %.4f\n", worst);
  const std::vector<float> expected = golden_tensor("prose64.logits");
  std::vector<std::int32_t> tokens = load_golden_greedy(64)[0].prompt;
  ASSERT_EQ(tokens.size(), 64U);
  tokens.push_back(100);
  const auto rows = dense_scores(cluster, tokens, 64);
  ASSERT_EQ(rows.size(), 64U);
  const std::size_t n_vocab = expected.size() / 64;
  worst = 0;
  for (std::size_t i = 0; i < 64; ++i) {
    const std::vector<float> row(expected.begin() + static_cast<std::ptrdiff_t>(i * n_vocab),
                                 expected.begin() + static_cast<std::ptrdiff_t>((i + 1) * n_vocab));
    const float difference = largest_difference(rows[i], row);
    EXPECT_LE(difference, 0.16F) << "position " << i;
    worst = std::max(worst, difference);
  }
  std::printf("largest difference of a logit over 64 positions of prose: %.4f\n", worst);
}

// The same over more positions, against the CPU, for the size of the typical difference.
TEST_F(ClusterGpuTest, LogitsAreNearTheCpus) {
  TestCluster on_cpu(settings_on(ComputeDevice::kCpu));
  TestCluster on_gpu(settings_on(ComputeDevice::kCuda));
  double squares = 0;
  std::size_t n_values = 0;
  float worst = 0;
  for (const GoldenGreedy& golden : load_golden_greedy(1000)) {
    const int n = std::min<int>(24, static_cast<int>(golden.prompt.size()) - 1);
    if (n < 1) continue;
    const auto expected = dense_scores(on_cpu, golden.prompt, n);
    const auto actual = dense_scores(on_gpu, golden.prompt, n);
    ASSERT_EQ(actual.size(), expected.size()) << golden.name;
    for (std::size_t i = 0; i < actual.size(); ++i) {
      worst = std::max(worst, largest_difference(actual[i], expected[i]));
      for (std::size_t j = 0; j < actual[i].size(); ++j) {
        const double d = static_cast<double>(actual[i][j]) - expected[i][j];
        squares += d * d;
        ++n_values;
      }
    }
  }
  const double rms = std::sqrt(squares / static_cast<double>(n_values));
  std::printf("log-probabilities differ by %.4f (rms), a logit by up to %.4f\n", rms, worst);
  EXPECT_LE(rms, 0.05);
}

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

class ProfileGpuTest : public ClusterGpuTest, public testing::WithParamInterface<KvProfile> {};

// Plans are made from the stages' scores. Where those differ in the last bits the global threshold
// may move a token from one head to another, so counts may differ a little; bytes and the sum do
// not differ by more than a block for each head.
TEST_P(ProfileGpuTest, KeepsWhatTheCpuKeeps) {
  constexpr std::size_t kPrompt = 3000;
  constexpr int kGenerated = 140;
  std::vector<std::int32_t> prompt;
  for (const GoldenGreedy& golden : load_golden_greedy(8192)) {
    if (golden.prompt.size() < kPrompt) continue;
    prompt.assign(golden.prompt.end() - static_cast<std::ptrdiff_t>(kPrompt), golden.prompt.end());
    break;
  }
  ASSERT_EQ(prompt.size(), kPrompt);
  engine::EngineRequest request = greedy_request(prompt, kGenerated);
  request.sampling.ignore_eos = true;
  request.kv_policy.profile = GetParam();
  request.kv_policy.ratio = ratio_of(GetParam());
  Generated generated[2];
  for (const ComputeDevice device : {ComputeDevice::kCpu, ComputeDevice::kCuda}) {
    TestCluster cluster(settings_on(device));
    generated[static_cast<int>(device)] = cluster.generate(request);
    cluster.stop();
    EXPECT_EQ(cluster.rank(0).store().pool().n_used(), 0);
    EXPECT_EQ(cluster.rank(0).store().pool().n_reserved(), 0);
  }
  const Generated& cpu = generated[0];
  const Generated& gpu = generated[1];
  ASSERT_TRUE(gpu.status.ok()) << gpu.status.to_string();
  ASSERT_EQ(gpu.tokens[0].size(), static_cast<std::size_t>(kGenerated));
  ASSERT_EQ(gpu.summary.boundaries.size(), cpu.summary.boundaries.size());
  for (std::size_t b = 0; b < gpu.summary.boundaries.size(); ++b) {
    const auto& mine = gpu.summary.boundaries[b];
    const auto& theirs = cpu.summary.boundaries[b];
    EXPECT_EQ(mine.position, theirs.position);
    EXPECT_EQ(mine.full_bytes, theirs.full_bytes);
    ASSERT_EQ(mine.heads.size(), theirs.heads.size());
    std::int64_t n_differ = 0;
    for (std::size_t h = 0; h < mine.heads.size(); ++h) {
      const auto difference = std::abs(static_cast<std::int64_t>(mine.heads[h].kept_tokens) -
                                       static_cast<std::int64_t>(theirs.heads[h].kept_tokens));
      n_differ += difference != 0 ? 1 : 0;
      EXPECT_LE(difference, 64 + theirs.heads[h].kept_tokens / 50) << "head " << h;
    }
    std::printf(
        "%s: %lld of %zu heads keep another number of tokens; %llu bytes on the GPU, %llu "
        "on the CPU\n",
        std::string(kvstore::profile_name(GetParam())).c_str(), static_cast<long long>(n_differ),
        mine.heads.size(), static_cast<unsigned long long>(mine.kept_bytes),
        static_cast<unsigned long long>(theirs.kept_bytes));
    EXPECT_NEAR(static_cast<double>(mine.kept_bytes), static_cast<double>(theirs.kept_bytes),
                0.02 * static_cast<double>(theirs.kept_bytes));
  }
  const auto [mine, theirs] =
      std::mismatch(gpu.tokens[0].begin(), gpu.tokens[0].end(), cpu.tokens[0].begin());
  std::printf("%s: the first %td of %d tokens are the CPU's\n",
              std::string(kvstore::profile_name(GetParam())).c_str(), mine - gpu.tokens[0].begin(),
              kGenerated);
}

INSTANTIATE_TEST_SUITE_P(Profiles, ProfileGpuTest, testing::ValuesIn(kvstore::all_profiles()),
                         [](const testing::TestParamInfo<KvProfile>& tested) {
                           std::string name(kvstore::profile_name(tested.param));
                           std::replace_if(
                               name.begin(), name.end(), [](char c) { return !std::isalnum(c); },
                               '_');
                           return name;
                         });

// Requests join and leave, are cancelled and share choices; every page comes back.
TEST_F(ClusterGpuTest, ManyAtOnceLeaveNothingBehind) {
  TestCluster cluster(settings_on(ComputeDevice::kCuda, 2));
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  std::vector<engine::RequestHandle> handles;
  const std::vector<GoldenGreedy> cases = load_golden_greedy(2000);
  for (int i = 0; i < 40; ++i) {
    engine::EngineRequest request =
        greedy_request(cases[static_cast<std::size_t>(i) % cases.size()].prompt, 10 + i);
    request.sampling.ignore_eos = true;
    request.sampling.temperature = i % 3 == 0 ? 0.8F : 0.0F;
    request.sampling.n_choices = i % 5 == 0 ? 2 : 1;
    request.sampling.repetition_penalty = i % 4 == 0 ? 1.1F : 1.0F;
    request.kv_policy.profile =
        kvstore::all_profiles()[static_cast<std::size_t>(i) % kvstore::all_profiles().size()];
    request.kv_policy.best_effort = true;
    engine::RequestHandle handle{};
    sinks.push_back(cluster.submit(std::move(request), &handle));
    handles.push_back(handle);
  }
  for (std::size_t i = 0; i < handles.size(); i += 7) cluster.engine().cancel(handles[i]);
  for (std::size_t i = 0; i < sinks.size(); ++i) {
    const Generated generated = sinks[i]->wait();
    if (i % 7 != 0) {
      EXPECT_TRUE(generated.status.ok()) << i << ": " << generated.status.to_string();
    }
  }
  cluster.stop();
  for (int stage = 0; stage < 2; ++stage) {
    EXPECT_EQ(cluster.rank(stage).store().n_sequences(), 0U);
    EXPECT_EQ(cluster.rank(stage).store().pool().n_used(), 0);
    EXPECT_EQ(cluster.rank(stage).store().pool().n_reserved(), 0);
  }
}

}  // namespace
}  // namespace spindle::worker
