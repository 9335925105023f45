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
    config.store.budget_bytes = 1200 * config.store.shape.page_bytes();
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

  void open(const ScoringNeeds& needs, const std::vector<std::int32_t>& boundaries,
            std::int64_t n_pages) {
    for (kvstore::KvStore* store : {host_.get(), device_.get()}) {
      const Status status = store->open(id_, kMaxModelLen, n_pages);
      ASSERT_TRUE(status.ok()) << status.to_string();
    }
    host_scorer_.open(id_, needs, boundaries);
    device_scorer_->open(id_, needs, boundaries);
  }
  void close() {
    ASSERT_TRUE(host_->free(id_).ok());
    ASSERT_TRUE(device_->free(id_).ok());
    host_scorer_.free(id_);
    device_scorer_->free(id_);
  }

  // One chunk of random queries, keys and values for every layer.
  void run(int n) {
    const std::int64_t first = host_->length(id_);
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(n), 1);
    ASSERT_TRUE(host_->extend(id_, tokens).ok());
    ASSERT_TRUE(device_->extend(id_, tokens).ok());
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::vector<float> k = normal(static_cast<std::size_t>(n * kKvWidth), 1.2F);
      const std::vector<float> v = normal(static_cast<std::size_t>(n * kKvWidth));
      const kernels::KvAppendSequence append{0, n, first, host_->writable_heads(id_, layer).data()};
      kernels::kv_append(*cpu_, ConstRows(k.data(), n, kKvWidth), ConstRows(v.data(), n, kKvWidth),
                         {&append, 1}, kShape.n_kv_heads, host_->page_layout());
      for (int head = 0; head < kShape.n_kv_heads; ++head) {
        const auto& from = host_->head_cache(id_, layer, head);
        const auto& to = device_->head_cache(id_, layer, head);
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
      EXPECT_EQ(device_scorer_->wants_queries(id_, first, n), wants_queries_);
      host_scorer_.take_queries(id_, layer, first, ConstRows(wide.data(), n, kWidth));
      device_scorer_->take_queries(id_, layer, first, ConstF16Rows(device_q.data(), n, kWidth));
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
    compare_scores(needs, tolerance);
    if (!HasFatalFailure()) compare_selection(plan, recent, tolerance);
  }

  // A sequence that is in no store and has queries of its boundary's window.
  void take_some_queries(const ScoringNeeds& needs) {
    const DeviceVector<F16> q(gpu(), testing::to_f16(normal(kWidth)));
    device_scorer_->open(id_, needs, {100});
    device_scorer_->take_queries(id_, 0, 90, ConstF16Rows(q.data(), 1, kWidth));
  }
  void free_queries() { device_scorer_->free(id_); }

  void compare_scores(const ScoringNeeds& needs, const Tolerance& tolerance) {
    std::vector<const kernels::PackedLinear*> outputs;
    std::vector<const kernels::DeviceLinear*> device_outputs;
    for (int layer = 0; layer < kLayers; ++layer) {
      outputs.push_back(&outputs_[static_cast<std::size_t>(layer)]);
      device_outputs.push_back(&device_outputs_[static_cast<std::size_t>(layer)]);
    }
    ASSERT_TRUE(device_scorer_->is_boundary(id_, host_->length(id_)));
    const BoundarySummary expected = host_scorer_.score(*cpu_, id_, *host_, *rope_, outputs);
    CudaBoundaryScorer::Inputs inputs;
    inputs.pool = {device_->memory().base(), device_->page_layout()};
    inputs.rope = device_rope_;
    inputs.outputs = device_outputs;
    inputs.expanded_pages = expanded_->data();
    inputs.expanded_bytes = expanded_->size();
    const BoundarySummary actual = device_scorer_->score(id_, *device_, inputs);

    EXPECT_EQ(actual.n_candidates, expected.n_candidates);
    ASSERT_EQ(actual.lazy_mass.size(), expected.lazy_mass.size());
    for (std::size_t i = 0; i < actual.lazy_mass.size(); ++i) {
      EXPECT_NEAR(actual.lazy_mass[i], expected.lazy_mass[i], tolerance.score);
    }
    for (int layer = 0; layer < kLayers; ++layer) {
      for (int head = 0; head < kShape.n_kv_heads; ++head) {
        const auto& wanted = host_scorer_.head_scores(id_, layer, head).scores;
        const std::vector<float> scores = device_scorer_->head_scores(id_, layer, head);
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
  }

  void compare_selection(const kvstore::HeadPlan& plan, int recent, const Tolerance& tolerance) {
    const std::vector<kvstore::HeadPlan> plans(
        static_cast<std::size_t>(kLayers * kShape.n_kv_heads), plan);
    kept_ = host_scorer_.select(id_, *host_, recent, plans);
    const auto kept = device_scorer_->select(id_, *device_, recent, plans);
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
    const auto on_host = host_->compress(*cpu_, &*rope_, id_, boundary);
    ASSERT_TRUE(on_host.ok()) << on_host.status().to_string();
    const auto on_device = device_->compress(id_, boundary);
    ASSERT_TRUE(on_device.ok()) << on_device.status().to_string();
  }

  kvstore::SequenceId id_ = 7;  // that the calls above are about
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

ScoringNeeds needs_of(KvSelector selector, bool lazy_mass) {
  ScoringNeeds needs;
  needs.boundary.selector = selector;
  needs.boundary.window_scores = selector != KvSelector::kKeyDiff;
  needs.boundary.histograms = true;
  needs.boundary.lazy_mass = lazy_mass && needs.boundary.window_scores;
  needs.boundary.lazy_window = 128;
  needs.boost_share = 0.3;
  return needs;
}

kvstore::HeadPlan plan_of(KvSelector selector) {
  kvstore::HeadPlan plan;
  plan.mode = kvstore::KvMode::kEvict;
  plan.selector = selector;
  plan.n_keep = 100;
  plan.codec = {kernels::KvFormat::kInt4, kernels::KvFormat::kInt4};
  return plan;
}

TEST_F(BoundaryScorerGpuTest, BoundariesAreAsOnTheHost) {
  for (const bool lazy_mass : {false, true}) {
    for (const KvSelector selector :
         {KvSelector::kDefensive, KvSelector::kSnapKvMean, KvSelector::kSnapKvMax,
          KvSelector::kSpindleKv, KvSelector::kKeyDiff}) {
      SCOPED_TRACE(::testing::Message() << "selector " << static_cast<int>(selector)
                                        << (lazy_mass ? " and lazy mass" : ""));
      const ScoringNeeds needs = needs_of(selector, lazy_mass);
      const kvstore::HeadPlan plan = plan_of(selector);
      open(needs, {700, 1000}, 400);
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
      run(300);
      if (HasFatalFailure()) return;
      // Keys of blocks are rounded to f16 when they are expanded: logits of up to 15 move by 2^-11
      // of themselves at worst.
      compare_boundary(needs, plan, 64, {1e-2F, 0.6, 0.05});
      if (HasFatalFailure()) return;
      close();
    }
  }
}

// More sequences between queries and plan than the device has room for: the rest waits on the host.
TEST_F(BoundaryScorerGpuTest, WithoutRoomOnTheDeviceTheHostKeepsQueriesAndScores) {
  for (const KvSelector selector : {KvSelector::kDefensive, KvSelector::kSpindleKv}) {
    SCOPED_TRACE(::testing::Message() << "selector " << static_cast<int>(selector));
    const ScoringNeeds needs = needs_of(selector, false);
    // Nine sequences hold queries, eight of them on the device.
    for (id_ = 100; id_ < 109; ++id_) take_some_queries(needs);
    // Six hold scores, of which not all have room.
    for (id_ = 1; id_ <= 6; ++id_) {
      SCOPED_TRACE(::testing::Message() << "sequence " << id_);
      open(needs, {700}, 150);
      run(700);
      if (HasFatalFailure()) return;
      compare_scores(needs, {});
      if (HasFatalFailure()) return;
    }
    for (id_ = 6; id_ >= 1; --id_) {
      SCOPED_TRACE(::testing::Message() << "sequence " << id_);
      compare_selection(plan_of(selector), 64, {});
      close();
    }
    for (id_ = 100; id_ < 109; ++id_) free_queries();
  }
}

}  // namespace
}  // namespace spindle::worker
