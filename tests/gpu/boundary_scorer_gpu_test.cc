// BoundaryScorer on the host and CudaBoundaryScorer on a device go through the same boundaries of
// the same sequence, with every selector; the second boundary finds compressed blocks.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/attention.h"
#include "kvstore/device_memory.h"
#include "kvstore/kv_store.h"
#include "tests/gpu/gpu_fixture.h"
#include "worker/stage/boundary_scorer.h"
#include "worker/stage/cuda_boundary_scorer.h"

namespace spindle::worker {
namespace {

using kvstore::KvSelector;
using testing::DeviceVector;

constexpr int kLayers = 3;
constexpr kernels::AttentionShape kShape{8, 2, 64};
constexpr int kHidden = 256;
constexpr int kWidth = 8 * 64;
constexpr int kKvWidth = 2 * 64;
constexpr std::int64_t kMaxModelLen = 2048;
constexpr kvstore::SequenceId kSequence = 7;

// The CPU's page as the device's.
std::vector<std::uint16_t> device_page(const std::byte* page) {
  constexpr int kDim = 64;
  const auto* from = reinterpret_cast<const std::uint16_t*>(page);
  std::vector<std::uint16_t> to(2 * 32 * kDim);
  for (int t = 0; t < 32; ++t) {
    for (int c = 0; c < kDim; ++c) {
      to[static_cast<std::size_t>((c / 32 * 32 + t) * 32 + c % 32)] = from[c * 32 + t];
      to[static_cast<std::size_t>(32 * kDim + c * 32 + t)] = from[32 * kDim + t * kDim + c];
    }
  }
  return to;
}

class BoundaryScorerGpuTest : public testing::GpuTest {
 protected:
  void SetUp() override {
    testing::GpuTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    auto cpu = CpuContext::create({.n_threads = 2});
    ASSERT_TRUE(cpu.ok()) << cpu.status().to_string();
    cpu_ = std::move(*cpu);
    std::vector<float> inv_freq;
    for (int i = 0; i < 32; ++i)
      inv_freq.push_back(std::pow(10000.0F, -static_cast<float>(i) / 32));
    auto rope = kernels::RopeTable::create(inv_freq, kMaxModelLen);
    ASSERT_TRUE(rope.ok()) << rope.status().to_string();
    rope_.emplace(std::move(*rope));
    const std::size_t angles = static_cast<std::size_t>(kMaxModelLen) * 32;
    cos_ = std::make_unique<DeviceVector<float>>(gpu(), std::span(rope_->cos(0), angles));
    sin_ = std::make_unique<DeviceVector<float>>(gpu(), std::span(rope_->sin(0), angles));
    device_rope_ = {cos_->data(), sin_->data(), kMaxModelLen, 64, 1.0F};

    kvstore::DeviceMemoryConfig config;
    config.store.shape = {kShape.n_kv_heads, kShape.head_dim, DType::kF16, 32};
    config.store.n_layers = kLayers;
    config.store.budget_bytes = 800 * config.store.shape.page_bytes();
    config.max_model_len = kMaxModelLen;
    config.rope = device_rope_;
    host_ = std::move(*kvstore::KvStore::create(config.store));
    auto memory = kvstore::DeviceMemory::create(gpu(), config);
    ASSERT_TRUE(memory.ok()) << memory.status().to_string();
    device_ = std::move(*kvstore::KvStore::create(config.store, std::move(*memory)));

    for (int layer = 0; layer < kLayers; ++layer) {
      const std::vector<Bf16> weights = testing::to_bf16(normal(kHidden * kWidth, 0.03F));
      const kernels::WeightSource source[] = {{weights.data(), DType::kBF16, kHidden}};
      auto packed = kernels::PackedLinear::pack(*cpu_, source, kWidth);
      ASSERT_TRUE(packed.ok()) << packed.status().to_string();
      outputs_.push_back(std::move(*packed));
      auto uploaded = kernels::DeviceLinear::upload(gpu(), source, kWidth);
      ASSERT_TRUE(uploaded.ok()) << uploaded.status().to_string();
      device_outputs_.push_back(std::move(*uploaded));
    }
    LlamaStageConfig stage;
    stage.model.hidden_size = kHidden;
    stage.layers = {0, kLayers};
    stage.max_model_len = kMaxModelLen;
    auto scorer = CudaBoundaryScorer::create(gpu(), stage, kShape);
    ASSERT_TRUE(scorer.ok()) << scorer.status().to_string();
    device_scorer_ = std::move(*scorer);
    expanded_ = std::make_unique<DeviceVector<std::byte>>(
        gpu(), std::size_t{2} * 128 * host_->page_layout().page_bytes());
  }

  void open(const ScoringNeeds& needs, const std::vector<std::int32_t>& boundaries) {
    for (kvstore::KvStore* store : {host_.get(), device_.get()}) {
      const Status status = store->open(kSequence, kMaxModelLen, store->pool().n_free() - 8);
      ASSERT_TRUE(status.ok()) << status.to_string();
    }
    host_scorer_.open(kSequence, needs, boundaries);
    device_scorer_->open(kSequence, needs, boundaries);
  }
  void close() {
    ASSERT_TRUE(host_->free(kSequence).ok());
    ASSERT_TRUE(device_->free(kSequence).ok());
    host_scorer_.free(kSequence);
    device_scorer_->free(kSequence);
  }

  // One chunk of random queries, keys and values for every layer.
  void run(int n) {
    const std::int64_t first = host_->length(kSequence);
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(n), 1);
    ASSERT_TRUE(host_->extend(kSequence, tokens).ok());
    ASSERT_TRUE(device_->extend(kSequence, tokens).ok());
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::vector<float> k = normal(static_cast<std::size_t>(n * kKvWidth), 1.2F);
      const std::vector<float> v = normal(static_cast<std::size_t>(n * kKvWidth));
      const kernels::KvAppendSequence append{0, n, first,
                                             host_->writable_heads(kSequence, layer).data()};
      kernels::kv_append(*cpu_, ConstRows(k.data(), n, kKvWidth), ConstRows(v.data(), n, kKvWidth),
                         {&append, 1}, kShape.n_kv_heads, host_->page_layout());
      for (int head = 0; head < kShape.n_kv_heads; ++head) {
        const auto& from = host_->head_cache(kSequence, layer, head);
        const auto& to = device_->head_cache(kSequence, layer, head);
        ASSERT_EQ(from.tail_data.size(), to.tail_data.size());
        for (std::size_t page = 0; page < from.tail_data.size(); ++page) {
          const std::vector<std::uint16_t> content = device_page(from.tail_data[page]);
          gpu().to_device(to.tail_data[page], content.data(), content.size() * 2);
        }
      }
      const std::vector<F16> q =
          testing::to_f16(normal(static_cast<std::size_t>(n * kWidth), 1.3F));
      const std::vector<float> wide = testing::widened(q);
      const DeviceVector<F16> device_q(gpu(), q);
      EXPECT_EQ(device_scorer_->wants_queries(kSequence, first, n), wants_queries_);
      host_scorer_.take_queries(kSequence, layer, first, ConstRows(wide.data(), n, kWidth));
      device_scorer_->take_queries(kSequence, layer, first,
                                   ConstF16Rows(device_q.data(), n, kWidth));
    }
    device_->flush_tables();
  }

  struct Tolerance {
    float score = 1e-4F;           // relative
    double bins = 0.02;            // share of tokens in another bin of a histogram
    double kept_elsewhere = 0.01;  // share of kept tokens, neighbours of the threshold
  };

  void compare_boundary(const ScoringNeeds& needs, const kvstore::HeadPlan& plan, int recent,
                        const Tolerance& tolerance) {
    std::vector<const kernels::PackedLinear*> outputs;
    std::vector<const kernels::DeviceLinear*> device_outputs;
    for (int layer = 0; layer < kLayers; ++layer) {
      outputs.push_back(&outputs_[static_cast<std::size_t>(layer)]);
      device_outputs.push_back(&device_outputs_[static_cast<std::size_t>(layer)]);
    }
    ASSERT_TRUE(device_scorer_->is_boundary(kSequence, host_->length(kSequence)));
    const BoundarySummary expected = host_scorer_.score(*cpu_, kSequence, *host_, *rope_, outputs);
    CudaBoundaryScorer::Inputs inputs;
    inputs.pool = {device_->memory().base(), device_->page_layout()};
    inputs.rope = device_rope_;
    inputs.outputs = device_outputs;
    inputs.expanded_pages = expanded_->data();
    inputs.expanded_bytes = expanded_->size();
    const BoundarySummary actual = device_scorer_->score(kSequence, *device_, inputs);

    EXPECT_EQ(actual.n_candidates, expected.n_candidates);
    ASSERT_EQ(actual.lazy_mass.size(), expected.lazy_mass.size());
    for (std::size_t i = 0; i < actual.lazy_mass.size(); ++i) {
      EXPECT_NEAR(actual.lazy_mass[i], expected.lazy_mass[i], tolerance.score);
    }
    for (int layer = 0; layer < kLayers; ++layer) {
      for (int head = 0; head < kShape.n_kv_heads; ++head) {
        const auto& wanted = host_scorer_.head_scores(kSequence, layer, head).scores;
        const std::vector<float> scores = device_scorer_->head_scores(kSequence, layer, head);
        ASSERT_EQ(scores.size(), wanted.size());
        // KeyDiff's are cosines about zero.
        const float absolute = needs.boundary.selector == KvSelector::kKeyDiff ? 1e-5F : 0.0F;
        std::size_t n_other = 0;
        for (std::size_t i = 0; i < scores.size(); ++i) {
          ASSERT_TRUE(std::isfinite(scores[i]));
          if (std::fabs(scores[i] - wanted[i]) >
              absolute + tolerance.score * std::fabs(wanted[i])) {
            ++n_other;
          }
        }
        // One at the end of the boost.
        EXPECT_LE(n_other, 1U) << "layer " << layer << " head " << head;
      }
    }
    ASSERT_EQ(actual.histograms.size(), expected.histograms.size());
    for (std::size_t h = 0; h < actual.histograms.size(); ++h) {
      std::vector<double> difference(kernels::kScoreHistogramBins);
      const auto add = [&](const kernels::ScoreHistogram& histogram, double sign) {
        for (std::size_t i = 0; i < histogram.bin.size(); ++i) {
          difference[histogram.bin[i]] += sign * histogram.count[i];
        }
      };
      add(actual.histograms[h], 1);
      add(expected.histograms[h], -1);
      double moved = 0;
      for (const double d : difference) moved += std::fabs(d) / 2;
      EXPECT_EQ(actual.histograms[h].total(), expected.histograms[h].total());
      EXPECT_LE(moved, 1 + tolerance.bins * static_cast<double>(expected.histograms[h].total()));
    }
    const std::vector<kvstore::HeadPlan> plans(
        static_cast<std::size_t>(kLayers * kShape.n_kv_heads), plan);
    kept_ = host_scorer_.select(kSequence, *host_, recent, plans);
    const auto kept = device_scorer_->select(kSequence, *device_, recent, plans);
    ASSERT_EQ(kept.size(), kept_.size());
    for (std::size_t h = 0; h < kept.size(); ++h) {
      EXPECT_TRUE(std::is_sorted(kept[h].begin(), kept[h].end()));
      std::vector<std::int32_t> other;
      std::set_difference(kept[h].begin(), kept[h].end(), kept_[h].begin(), kept_[h].end(),
                          std::back_inserter(other));
      EXPECT_LE(static_cast<double>(other.size()),
                1 + tolerance.kept_elsewhere * static_cast<double>(kept_[h].size()));
      if (plan.selector != KvSelector::kSpindleKv) {
        EXPECT_EQ(kept[h].size(), kept_[h].size());
      }
      EXPECT_FALSE(kept[h].empty());
    }
  }

  void compress(const kvstore::HeadPlan& plan, int recent) {
    const std::vector<kvstore::HeadPlan> plans(
        static_cast<std::size_t>(kLayers * kShape.n_kv_heads), plan);
    kvstore::StageBoundary boundary;
    boundary.sinks = 4;
    boundary.recent = recent;
    boundary.heads = plans;
    boundary.kept = kept_;
    boundary.prompt_left = 300;
    boundary.boundaries_left = 1;
    const auto on_host = host_->compress(*cpu_, &*rope_, kSequence, boundary);
    ASSERT_TRUE(on_host.ok()) << on_host.status().to_string();
    const auto on_device = device_->compress(kSequence, boundary);
    ASSERT_TRUE(on_device.ok()) << on_device.status().to_string();
  }

  bool wants_queries_ = true;

 private:
  std::unique_ptr<CpuContext> cpu_;
  std::optional<kernels::RopeTable> rope_;
  std::unique_ptr<DeviceVector<float>> cos_;
  std::unique_ptr<DeviceVector<float>> sin_;
  kernels::DeviceRope device_rope_;
  std::unique_ptr<kvstore::KvStore> host_;
  std::unique_ptr<kvstore::KvStore> device_;
  std::vector<kernels::PackedLinear> outputs_;
  std::vector<kernels::DeviceLinear> device_outputs_;
  BoundaryScorer host_scorer_{{kLayers, kShape.n_heads, kShape.n_kv_heads, kShape.head_dim}};
  std::unique_ptr<CudaBoundaryScorer> device_scorer_;
  std::unique_ptr<DeviceVector<std::byte>> expanded_;
  std::vector<std::vector<std::int32_t>> kept_;
};

TEST_F(BoundaryScorerGpuTest, BoundariesAreAsOnTheHost) {
  for (const KvSelector selector :
       {KvSelector::kDefensive, KvSelector::kSnapKvMean, KvSelector::kSnapKvMax,
        KvSelector::kSpindleKv, KvSelector::kKeyDiff}) {
    SCOPED_TRACE(::testing::Message() << "selector " << static_cast<int>(selector));
    ScoringNeeds needs;
    needs.boundary.selector = selector;
    needs.boundary.window_scores = selector != KvSelector::kKeyDiff;
    needs.boundary.histograms = true;
    needs.boundary.lazy_mass = needs.boundary.window_scores;
    needs.boundary.lazy_window = 128;
    needs.boost_share = 0.3;
    kvstore::HeadPlan plan;
    plan.mode = kvstore::KvMode::kEvict;
    plan.selector = selector;
    plan.n_keep = 100;
    plan.codec = {kernels::KvFormat::kInt4, kernels::KvFormat::kInt4};
    open(needs, {700, 1000});
    wants_queries_ = false;
    run(650);
    // The window begins within a chunk and goes on in the next.
    wants_queries_ = needs.boundary.window_scores;
    run(30);
    run(20);
    if (HasFatalFailure()) return;
    compare_boundary(needs, plan, 64, {});
    if (HasFatalFailure()) return;
    compress(plan, 64);
    if (HasFatalFailure()) return;
    wants_queries_ = needs.boundary.window_scores;
    run(300);
    if (HasFatalFailure()) return;
    // Keys of blocks are rounded to f16 when they are expanded: logits of up to 15 move by 2^-11
    // of themselves at worst.
    compare_boundary(needs, plan, 64, {1e-2F, 0.6, 0.05});
    if (HasFatalFailure()) return;
    close();
  }
}

}  // namespace
}  // namespace spindle::worker
