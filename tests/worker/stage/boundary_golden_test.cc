// Boundaries of the bundled model against an independent implementation: scores of the observation
// window, lazy masses, kept sets, and the next-token logits after each policy's compression
// (tests/golden/golden-kv.json says how each was computed).

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/kv_compact.h"
#include "kernels/kv_score.h"
#include "kernels/kv_select.h"
#include "tests/kernels/golden_kv.h"
#include "tests/worker/local_cluster.h"
#include "worker/model/checkpoint.h"
#include "worker/model/llama_weights.h"
#include "worker/stage/llama_stage.h"

namespace spindle::worker {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;
using kvstore::HeadPlan;
using kvstore::KvMode;
using kvstore::KvSelector;

constexpr int kPrompt = 1755;
constexpr int kFed = 7;
constexpr int kLayers = 12;
constexpr int kHeads = 4;
constexpr int kKvHeads = 2;
constexpr int kTables = kLayers * kKvHeads;
constexpr std::size_t kVocab = 4096;

// The whole model on one stage, with f16 KV as the reference rounds it.
class Model {
 public:
  explicit Model(bool token_table = true) {
    auto config = model::load_model_config(mini_model_dir());
    CHECK(config.ok(), config.status().to_string());
    auto context = CpuContext::create({2, CpuIsa::kAvx512});
    CHECK(context.ok(), context.status().to_string());
    context_ = std::move(*context);
    kvstore::KvStoreConfig kv;
    kv.shape = {config->n_kv_heads, config->head_dim, DType::kF16, kernels::kKvPageTokens};
    kv.n_layers = config->n_layers;
    kv.budget_bytes = 256 << 20;
    kv.keeps_token_ids = true;
    store_ = *kvstore::KvStore::create(kv);
    LlamaStageConfig stage;
    stage.model = *config;
    stage.layers = {0, config->n_layers};
    stage.is_first = true;
    stage.is_last = true;
    stage.max_batched_tokens = 512;
    stage.max_model_len = config->max_position_embeddings;
    if (!token_table) stage.token_table_bytes = 0;
    auto checkpoint = model::Checkpoint::open(mini_model_dir());
    CHECK(checkpoint.ok(), checkpoint.status().to_string());
    auto weights = model::load_llama_stage(*checkpoint, *config, stage.layers, true, true);
    CHECK(weights.ok(), weights.status().to_string());
    auto made = LlamaStage::create(stage, std::move(*weights), *context_, *store_);
    CHECK(made.ok(), made.status().to_string());
    stage_ = std::move(*made);
    hidden_ = stage.model.hidden_size;
  }

  // Prefills the golden prompt and scores its boundary.
  BoundarySummary prefill(const ScoringNeeds& needs) {
    golden_ids_ = golden_.read<std::int32_t>("prompt_ids");
    CHECK(store_->open(1, kPrompt + kFed, store_->pool().n_free()).ok(), "open");
    stage_->open_boundaries(1, needs, {kPrompt});
    for (int first = 0; first < kPrompt; first += 512) {
      const int n = std::min(512, kPrompt - first);
      run(first, std::span(golden_ids_)
                     .subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n)));
    }
    CHECK(stage_->is_boundary(1), "the prompt's end is a boundary");
    return stage_->score_boundary(1);
  }

  std::vector<float> run(int first, std::span<const std::int32_t> tokens) {
    std::vector<float> hidden(tokens.size() * static_cast<std::size_t>(hidden_));
    std::vector<float> logits(kVocab);
    const StageRun run{1, first, static_cast<std::int32_t>(tokens.size()), true};
    const Status status = stage_->forward(
        {&run, 1}, tokens, Rows(hidden.data(), static_cast<std::int64_t>(tokens.size()), hidden_),
        Rows(logits.data(), 1, kVocab));
    CHECK(status.ok(), status.to_string());
    return logits;
  }

  // Feeds the golden answer token by token: [fed][vocab].
  std::vector<std::vector<float>> feed() {
    const auto ids = golden_.read<std::int32_t>("feed_ids");
    std::vector<std::vector<float>> logits;
    for (int i = 0; i < kFed; ++i) {
      logits.push_back(run(kPrompt + i, std::span(ids).subspan(static_cast<std::size_t>(i), 1)));
    }
    return logits;
  }

  LlamaStage& stage() { return *stage_; }
  kvstore::KvStore& store() { return *store_; }
  const CpuContext& context() const { return *context_; }
  const kernels::GoldenKv& golden() const { return golden_; }

 private:
  kernels::GoldenKv golden_;
  std::vector<std::int32_t> golden_ids_;
  std::unique_ptr<CpuContext> context_;
  std::unique_ptr<kvstore::KvStore> store_;
  std::unique_ptr<LlamaStage> stage_;
  std::int64_t hidden_ = 0;
};

ScoringNeeds needs_of(KvSelector selector, double boost_share = 0.25) {
  ScoringNeeds needs;
  needs.boundary.window_scores = true;
  needs.boundary.selector = selector;
  needs.sinks = 0;
  needs.boost_share = boost_share;
  return needs;
}

std::vector<double> log_softmax(std::span<const float> logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - top);
  std::vector<double> out;
  for (const float x : logits) out.push_back(static_cast<double>(x) - top - std::log(sum));
  return out;
}

struct Distance {
  double worst_kl = 0;
  double worst_logit = 0;
  bool same_argmax = true;
};

Distance distance(const Model& model, const std::string& policy,
                  const std::vector<std::vector<float>>& logits) {
  const auto golden = model.golden().read<float>("logits." + policy);
  Distance out;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const std::span expected = std::span(golden).subspan(i * kVocab, kVocab);
    const auto p = log_softmax(expected);
    const auto q = log_softmax(logits[i]);
    double kl = 0;
    for (std::size_t t = 0; t < kVocab; ++t) {
      kl += std::exp(p[t]) * (p[t] - q[t]);
      out.worst_logit = std::max(out.worst_logit, std::abs(static_cast<double>(expected[t]) -
                                                           static_cast<double>(logits[i][t])));
      EXPECT_TRUE(std::isfinite(logits[i][t]));
    }
    out.worst_kl = std::max(out.worst_kl, kl);
    out.same_argmax &= std::max_element(expected.begin(), expected.end()) - expected.begin() ==
                       std::max_element(logits[i].begin(), logits[i].end()) - logits[i].begin();
  }
  return out;
}

// [layer][KV head][N] flags of a golden policy.
std::vector<std::vector<std::int32_t>> kept_of(const Model& model, const std::string& policy,
                                               std::int64_t end) {
  const auto flags = model.golden().read<std::uint8_t>("keep." + policy);
  std::vector<std::vector<std::int32_t>> kept(kTables);
  for (std::size_t table = 0; table < kTables; ++table) {
    for (std::int32_t p = 0; p < end; ++p) {
      if (flags[table * kPrompt + static_cast<std::size_t>(p)] != 0) kept[table].push_back(p);
    }
  }
  return kept;
}

struct Case {
  std::string policy;
  KvSelector selector = KvSelector::kNone;
  int sinks = 0;
  std::function<HeadPlan(int layer, int head)> plan;
  std::string kept_from;  // golden flags instead of our own selection
  double worst_kl = 1e-6;
  double boost_share = 0.25;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.policy; }

HeadPlan full(KvCodec codec) { return {.codec = codec}; }
HeadPlan evict(KvSelector selector, std::int64_t n_keep, KvCodec codec = {}) {
  return {.mode = KvMode::kEvict, .selector = selector, .codec = codec, .n_keep = n_keep};
}
HeadPlan stream(std::int64_t window, KvCodec codec = {}) {
  return {.mode = KvMode::kStream, .codec = codec, .window = window};
}
constexpr KvCodec kLloyd44{KvFormat::kLloyd4, KvFormat::kLloyd4};
constexpr KvCodec kInt4{KvFormat::kInt4, KvFormat::kInt4};
constexpr KvCodec kKivi4{KvFormat::kKivi4, KvFormat::kKivi4};
constexpr KvCodec kToken{KvFormat::kToken, KvFormat::kToken};

bool is_lazy(int layer) { return layer == 1 || layer == 2 || layer == 3 || layer == 7; }

class BoundaryGoldenTest : public testing::TestWithParam<Case> {};

TEST_P(BoundaryGoldenTest, LogitsAfterTheBoundary) {
  const Case& c = GetParam();
  Model model;
  model.prefill(needs_of(c.selector, c.boost_share));
  std::vector<HeadPlan> heads;
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int head = 0; head < kKvHeads; ++head) heads.push_back(c.plan(layer, head));
  }
  kvstore::StageBoundary boundary;
  boundary.sinks = c.sinks;
  boundary.recent = 0;
  boundary.heads = heads;
  std::vector<std::vector<std::int32_t>> kept;
  if (!c.kept_from.empty()) {
    kept = kept_of(model, c.kept_from, kPrompt - kvstore::kObservationWindow);
    boundary.kept = kept;
  }
  const auto compressed =
      model.stage().compress(1, boundary, c.kept_from.empty() && c.selector != KvSelector::kNone);
  ASSERT_TRUE(compressed.ok()) << compressed.status().to_string();
  model.store().check_invariants();
  const Distance d = distance(model, c.policy, model.feed());
  RecordProperty("worst_kl", std::to_string(d.worst_kl));
  std::printf("%-26s worst KL %.3g, worst logit %.3g, kept %.4f of the bytes\n", c.policy.c_str(),
              d.worst_kl, d.worst_logit,
              static_cast<double>(compressed->pages.used) *
                  static_cast<double>(model.store().pool().page_bytes()) /
                  static_cast<double>(compressed->full_bytes));
  EXPECT_LE(d.worst_kl, c.worst_kl);
  EXPECT_TRUE(d.same_argmax);
}

std::int64_t pyramid_keep(int layer) {
  constexpr int kKept[] = {1636, 1498, 1358, 1218, 1080, 940, 800, 662, 522, 382, 244, 104};
  return kKept[layer] / 2 - kvstore::kObservationWindow;
}

INSTANTIATE_TEST_SUITE_P(
    Policies, BoundaryGoldenTest,
    testing::Values(
        Case{"full", KvSelector::kNone, 0, [](int, int) { return full({}); }, "", 1e-6},
        Case{"stream", KvSelector::kNone, 4, [](int, int) { return stream(434); }, "", 1e-4},
        Case{"snapkv-mean", KvSelector::kSnapKvMean, 0,
             [](int, int) { return evict(KvSelector::kSnapKvMean, 403); }, "", 1e-4},
        Case{"snapkv-max", KvSelector::kSnapKvMax, 0,
             [](int, int) { return evict(KvSelector::kSnapKvMax, 403); }, "", 1e-4},
        Case{"pyramidkv", KvSelector::kSnapKvMean, 0,
             [](int layer, int) { return evict(KvSelector::kSnapKvMean, pyramid_keep(layer)); }, "",
             1e-4},
        Case{"simlayer-p256-d0.7", KvSelector::kNone, 4,
             [](int layer, int) { return is_lazy(layer) ? stream(256) : full({}); }, "", 1e-5},
        Case{"simlayer-p256-d0.7+kivi4", KvSelector::kNone, 4,
             [](int layer, int) { return is_lazy(layer) ? stream(256, kKivi4) : full(kKivi4); }, "",
             1e-4},
        Case{"kivi4", KvSelector::kNone, 0, [](int, int) { return full(kKivi4); }, "", 1e-4},
        Case{"rot4", KvSelector::kNone, 0, [](int, int) { return full(kInt4); }, "", 1e-4},
        Case{"pc44", KvSelector::kNone, 4, [](int, int) { return full(kLloyd44); }, "", 1e-4},
        Case{"pc32", KvSelector::kNone, 4,
             [](int, int) {
               return full({KvFormat::kLloyd3, KvFormat::kLloyd2});
             },
             "", 1e-3},
        Case{"layer-def+rot4", KvSelector::kNone, 0,
             [](int, int) { return evict(KvSelector::kDefensive, 0, kInt4); }, "layer-def+rot4",
             1e-4},
        Case{"auto44", KvSelector::kNone, 4,
             [](int layer, int) {
               return layer == 0 ? full(kToken) : evict(KvSelector::kDefensive, 0, kLloyd44);
             },
             "auto44", 1e-4},
        Case{"spindle", KvSelector::kNone, 4,
             [](int layer, int head) {
               if (layer == 0) return full(kToken);
               if (layer == 9 && head == 0) return full({KvFormat::kRaw, KvFormat::kLloyd4});
               if ((layer == 11 || layer == 5) && head == 1) return full(kLloyd44);
               return evict(KvSelector::kDefensive, 0, kLloyd44);
             },
             "spindle", 1e-4}),
    [](const testing::TestParamInfo<Case>& tested) {
      std::string name = tested.param.policy;
      std::replace_if(
          name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
      return name;
    });

// Our own scores against the reference's.
TEST(BoundaryGolden, LazyMass) {
  Model model;
  ScoringNeeds needs = needs_of(KvSelector::kNone);
  needs.boundary.lazy_mass = true;
  needs.boundary.lazy_window = 256;
  needs.sinks = 4;
  const BoundarySummary summary = model.prefill(needs);
  const auto golden = model.golden().read<float>("lazy.prefill.256");
  ASSERT_EQ(summary.lazy_mass.size(), static_cast<std::size_t>(kLayers));
  for (std::size_t layer = 0; layer < kLayers; ++layer) {
    double expected = 0;
    for (std::size_t head = 0; head < kHeads; ++head) {
      expected += static_cast<double>(golden[layer * kHeads + head]) / kHeads;
    }
    EXPECT_NEAR(summary.lazy_mass[layer], expected, 3e-4) << "layer " << layer;
    EXPECT_EQ(summary.lazy_mass[layer] > 0.7, is_lazy(static_cast<int>(layer)));
  }
}

// Kept sets agree wherever the reference's margin is above the difference of the scores.
TEST(BoundaryGolden, KeptSetsOfSnapKvMax) {
  Model model;
  model.prefill(needs_of(KvSelector::kSnapKvMax));
  const auto golden = kept_of(model, "snapkv-max", kPrompt - kvstore::kObservationWindow);
  const auto scores = model.golden().read<float>("snap.max.score");
  const std::size_t n = kPrompt - kvstore::kObservationWindow;
  std::vector<HeadPlan> heads(kTables, evict(KvSelector::kSnapKvMax, 403));
  BoundaryScorer::HeadScores ours;
  std::size_t n_different = 0;
  for (std::size_t table = 0; table < kTables; ++table) {
    ours = model.stage().scorer().head_scores(1, static_cast<int>(table) / kKvHeads,
                                              static_cast<int>(table) % kKvHeads);
    ASSERT_EQ(ours.scores.size(), n);
    double worst = 0;
    for (std::size_t i = 0; i < n; ++i) {
      worst = std::max(worst, std::abs(static_cast<double>(ours.scores[i]) -
                                       static_cast<double>(scores[table * n + i])));
    }
    EXPECT_LE(worst, 1e-4);
    const auto kept = kernels::select_top_k(ours.scores, 403);
    for (const std::int32_t p : kept) {
      n_different += std::binary_search(golden[table].begin(), golden[table].end(), p) ? 0 : 1;
    }
  }
  // Of 24 * 403 positions; neighbours of the threshold whose scores differ by less than the error.
  EXPECT_LE(n_different, 12u);
}

TEST(BoundaryGolden, KeptSetsOfSpindleKv) {
  Model model;
  model.prefill(needs_of(KvSelector::kSpindleKv));
  const auto golden = kept_of(model, "spindlekv", kPrompt - kvstore::kObservationWindow);
  std::size_t n_different = 0;
  std::size_t n_kept = 0;
  for (std::size_t table = 0; table < kTables; ++table) {
    const auto& scores = model.stage().scorer().head_scores(1, static_cast<int>(table) / kKvHeads,
                                                            static_cast<int>(table) % kKvHeads);
    const double ratio =
        kernels::spindlekv_layer_ratio(0.25305, static_cast<int>(table) / kKvHeads, kLayers);
    const std::int64_t n = kPrompt - kvstore::kObservationWindow;
    const auto k = std::max<std::int64_t>(1, std::llround(ratio * static_cast<double>(n)));
    const auto kept = kernels::select_union(
        ConstRows(scores.scores.data(), kHeads / kKvHeads,
                  static_cast<std::int64_t>(scores.scores.size()) / (kHeads / kKvHeads)),
        k);
    n_kept += kept.size();
    for (const std::int32_t p : kept) {
      n_different += std::binary_search(golden[table].begin(), golden[table].end(), p) ? 0 : 1;
    }
  }
  EXPECT_GT(n_kept, 10000u);
  EXPECT_LE(n_different, 20u);
}

// Layer 0 as the request's own table of ids, and all else in full precision: the reference's
// uncompressed logits, in fewer bytes than its K and V.
TEST(BoundaryGolden, LayerZeroAsItsOwnTableOfIds) {
  Model model(false);
  model.prefill(needs_of(KvSelector::kNone));
  ASSERT_FALSE(model.store().has_token_table());
  std::vector<HeadPlan> heads(kTables);
  for (std::size_t head = 0; head < kKvHeads; ++head) heads[head] = full(kToken);
  kvstore::StageBoundary boundary;
  boundary.heads = heads;
  const auto compressed = model.stage().compress(1, boundary, false);
  ASSERT_TRUE(compressed.ok()) << compressed.status().to_string();
  model.store().check_invariants();
  auto ids = model.golden().read<std::int32_t>("prompt_ids");
  std::sort(ids.begin(), ids.end());
  const std::int64_t n_ids = std::unique(ids.begin(), ids.end()) - ids.begin();
  EXPECT_EQ(model.store().head_cache(1, 0, 0).k_book.n_filled, n_ids);
  const Distance d = distance(model, "full", model.feed());
  std::printf("own ids: worst KL %.3g, worst logit %.3g, %lld ids, %.4f of the head's bytes\n",
              d.worst_kl, d.worst_logit, static_cast<long long>(n_ids),
              static_cast<double>(compressed->heads[0].bytes) / (kPrompt * 256.0));
  EXPECT_LE(d.worst_kl, 1e-6);
  EXPECT_TRUE(d.same_argmax);
}

// The reference's "keydiff" has our scores (kernels/kv_score.h) and keeps the 435 highest of all
// 1,755 tokens of each head, with nothing forced: the observation window competes like any other
// token, and so the last row's KL to the full cache is 3.9. Our selectors always keep the window
// (KL 1e-5), so what a boundary makes of KeyDiff cannot be the reference's. What can be compared is
// the scores' ranking with nothing forced: attention is over a set of keys that RoPE has turned
// already, so the kept rows are moved to the end of the tail and all before them is dropped.
TEST(BoundaryGolden, KeyDiffsRankingWithNothingForced) {
  constexpr std::int64_t kKept = 435;
  Model model;
  model.prefill(needs_of(KvSelector::kNone));
  const kernels::KvPageLayout layout = model.store().page_layout();
  const std::int64_t d = layout.head_dim;
  std::vector<std::int32_t> all(kPrompt);
  std::iota(all.begin(), all.end(), 0);
  std::size_t n_of_window = 0;
  for (int layer = 0; layer < kLayers; ++layer) {
    std::vector<float> k(static_cast<std::size_t>(kKept * kKvHeads * d));
    std::vector<float> v(k.size());
    const auto columns = [&](std::vector<float>& values, std::int64_t head) {
      return Rows(values.data(), kKept, kKvHeads * d).columns(head * d, d);
    };
    for (std::int64_t head = 0; head < kKvHeads; ++head) {
      const kernels::KvHeadPages& pages =
          model.store().heads(1, layer)[static_cast<std::size_t>(head)];
      std::vector<float> keys(static_cast<std::size_t>(kPrompt * d));
      std::vector<float> values(keys.size());
      kernels::kv_gather(model.context(), pages.pages, 0, all, layout,
                         Rows(keys.data(), kPrompt, d), Rows(values.data(), kPrompt, d));
      std::vector<float> scores(kPrompt);
      kernels::keydiff_scores(model.context(), ConstRows(keys.data(), kPrompt, d), scores);
      const std::vector<std::int32_t> kept = kernels::select_top_k(scores, kKept);
      n_of_window += static_cast<std::size_t>(
          kept.end() -
          std::lower_bound(kept.begin(), kept.end(), kPrompt - kvstore::kObservationWindow));
      kernels::kv_gather(model.context(), pages.pages, 0, kept, layout, columns(k, head),
                         columns(v, head));
    }
    const kernels::KvAppendSequence to_the_end{0, kKept, kPrompt - kKept,
                                               model.store().writable_heads(1, layer).data()};
    kernels::kv_append(model.context(), ConstRows(k.data(), kKept, kKvHeads * d),
                       ConstRows(v.data(), kKept, kKvHeads * d), {&to_the_end, 1}, kKvHeads,
                       layout);
  }
  // It would be the same as forcing the window if everything in it were kept.
  EXPECT_LT(n_of_window, std::size_t{kTables * kvstore::kObservationWindow * 3 / 4});
  kvstore::StageBoundary boundary;
  const std::vector<HeadPlan> heads(kTables, stream(kKept));
  boundary.heads = heads;
  ASSERT_TRUE(model.stage().compress(1, boundary, false).ok());
  const Distance apart = distance(model, "keydiff", model.feed());
  std::printf("keydiff, nothing forced: worst KL %.3g, worst logit %.3g, %zu window tokens kept\n",
              apart.worst_kl, apart.worst_logit, n_of_window);
  EXPECT_LE(apart.worst_kl, 1e-5);
  EXPECT_TRUE(apart.same_argmax);
}

}  // namespace
}  // namespace spindle::worker
