// Hidden states and logits against the reference's fp32 tensors (tests/golden/golden.safetensors),
// with twelve stages of one layer each, so that every layer's output can be looked at.

#include "worker/stage/llama_stage.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "tests/source_dir.h"
#include "tests/worker/local_cluster.h"
#include "worker/model/checkpoint.h"
#include "worker/model/safetensors.h"

namespace spindle::worker {
namespace {

class GoldenTensors {
 public:
  GoldenTensors() {
    auto file = model::SafetensorsFile::open(source_dir() + "/tests/golden/golden.safetensors");
    CHECK(file.ok(), file.status().to_string());
    file_ = std::make_unique<model::SafetensorsFile>(std::move(*file));
  }
  std::vector<float> read(const std::string& name) const {
    const model::TensorInfo* info = file_->find(name);
    CHECK(info != nullptr, name);
    std::size_t n = 1;
    for (const auto size : info->shape) n *= static_cast<std::size_t>(size);
    std::vector<float> values(n);
    const Status status = file_->read(*info, std::as_writable_bytes(std::span(values)));
    CHECK(status.ok(), status.to_string());
    return values;
  }

 private:
  std::unique_ptr<model::SafetensorsFile> file_;
};

// The model cut into stages of `layers_per_stage` layers, each with its own store.
class Stages {
 public:
  Stages(int layers_per_stage, DType kv_dtype, int max_batched_tokens) {
    auto model = model::load_model_config(mini_model_dir());
    CHECK(model.ok(), model.status().to_string());
    model_ = *model;
    auto context = CpuContext::create({1, CpuIsa::kAvx512});
    CHECK(context.ok(), context.status().to_string());
    context_ = std::move(*context);
    auto checkpoint = model::Checkpoint::open(mini_model_dir());
    CHECK(checkpoint.ok(), checkpoint.status().to_string());
    for (int first = 0; first < model_.n_layers; first += layers_per_stage) {
      kvstore::KvStoreConfig kv;
      kv.shape = {model_.n_kv_heads, model_.head_dim, kv_dtype, kernels::kKvPageTokens};
      kv.n_layers = layers_per_stage;
      kv.budget_bytes = 256 << 20;
      stores_.push_back(*kvstore::KvStore::create(kv));
      LlamaStageConfig config;
      config.model = model_;
      config.layers = {first, layers_per_stage};
      config.is_first = first == 0;
      config.is_last = first + layers_per_stage == model_.n_layers;
      config.max_batched_tokens = max_batched_tokens;
      config.max_model_len = model_.max_position_embeddings;
      auto weights = model::load_llama_stage(*checkpoint, model_, config.layers, config.is_first,
                                             config.is_last);
      CHECK(weights.ok(), weights.status().to_string());
      auto stage = LlamaStage::create(config, std::move(*weights), *context_, *stores_.back());
      CHECK(stage.ok(), stage.status().to_string());
      stages_.push_back(std::move(*stage));
    }
  }

  void open(kvstore::SequenceId sequence, std::int64_t max_tokens) {
    for (auto& store : stores_) {
      const Status status =
          store->open(sequence, max_tokens,
                      kvstore::stage_pages(store->shape(), store->n_layers(), max_tokens));
      CHECK(status.ok(), status.to_string());
    }
  }

  // Runs tokens of one sequence through all stages; hidden states before the first and after every
  // stage go to `states` if asked for. Returns the last token's logits.
  std::vector<float> run(kvstore::SequenceId sequence, std::int32_t first_position,
                         std::span<const std::int32_t> tokens,
                         std::vector<std::vector<float>>* states = nullptr) {
    const StageRun run{sequence, first_position, static_cast<std::int32_t>(tokens.size()), true};
    StageRun no_logits = run;
    no_logits.wants_logits = false;
    std::vector<float> hidden(tokens.size() * static_cast<std::size_t>(model_.hidden_size));
    std::vector<float> logits(static_cast<std::size_t>(model_.vocab_size));
    const Rows rows(hidden.data(), static_cast<std::int64_t>(tokens.size()), model_.hidden_size);
    for (auto& stage : stages_) {
      const bool is_last = stage->config().is_last;
      const Status status = stage->forward({is_last ? &run : &no_logits, 1}, tokens, rows,
                                           Rows(logits.data(), is_last ? 1 : 0, model_.vocab_size));
      CHECK(status.ok(), status.to_string());
      if (states != nullptr) states->push_back(hidden);
    }
    return logits;
  }

  LlamaStage& stage(std::size_t i) { return *stages_[i]; }
  kvstore::KvStore& store(std::size_t i) { return *stores_[i]; }

 private:
  model::ModelConfig model_;
  std::unique_ptr<CpuContext> context_;
  std::vector<std::unique_ptr<kvstore::KvStore>> stores_;
  std::vector<std::unique_ptr<LlamaStage>> stages_;
};

float largest_difference(std::span<const float> a, std::span<const float> b) {
  CHECK(a.size() == b.size(), "sizes differ");
  float largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    CHECK(std::isfinite(a[i]) && std::isfinite(b[i]), "not a number");
    largest = std::max(largest, std::abs(a[i] - b[i]));
  }
  return largest;
}

TEST(LlamaStage, HiddenStatesAreTheReferences) {
  const GoldenTensors golden;
  const std::vector<std::int32_t> prompt = load_golden_greedy(64)[0].prompt;
  Stages stages(1, DType::kF32, 64);
  stages.open(1, 64);
  std::vector<std::vector<float>> states;
  stages.run(1, 0, prompt, &states);
  ASSERT_EQ(states.size(), 12u);
  // hidden.i is the output of layer i - 1; the reference's last one has passed the final norm.
  for (std::size_t i = 1; i < 12; ++i) {
    const float difference =
        largest_difference(states[i - 1], golden.read("prose64.hidden." + std::to_string(i)));
    EXPECT_LE(difference, 2e-3F) << "after layer " << i - 1;
  }
}

TEST(LlamaStage, LogitsAreTheReferences) {
  const GoldenTensors golden;
  float worst = 0;
  for (const GoldenGreedy& golden_case : load_golden_greedy(8192)) {
    Stages stages(12, DType::kF32, 1024);
    stages.open(1, 8192);
    std::vector<float> logits;
    for (std::size_t begin = 0; begin < golden_case.prompt.size(); begin += 1024) {
      const std::size_t n = std::min<std::size_t>(1024, golden_case.prompt.size() - begin);
      logits = stages.run(1, static_cast<std::int32_t>(begin),
                          std::span(golden_case.prompt).subspan(begin, n));
    }
    const float difference =
        largest_difference(logits, golden.read(golden_case.name + ".last_logits"));
    EXPECT_LE(difference, 5e-3F) << golden_case.name;
    worst = std::max(worst, difference);
  }
  RecordProperty("worst_logit_difference", std::to_string(worst));
  std::printf("worst logit difference over 14 prompts: %.3g\n", static_cast<double>(worst));
}

TEST(LlamaStage, ChunksDecodeAndStagesGiveTheSameBits) {
  const std::vector<std::int32_t> prompt = load_golden_greedy(1000)[1].prompt;
  const std::span<const std::int32_t> tokens = std::span(prompt).first(150);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    Stages whole(12, dtype, 150);
    whole.open(1, 150);
    const std::vector<float> reference = whole.run(1, 0, tokens);

    Stages split(3, dtype, 150);
    split.open(7, 150);
    std::vector<float> logits;
    std::int32_t position = 0;
    for (const std::int32_t n : {1, 31, 33, 64, 1, 1, 19}) {  // chunks, then one by one
      logits = split.run(
          7, position,
          tokens.subspan(static_cast<std::size_t>(position), static_cast<std::size_t>(n)));
      position += n;
    }
    ASSERT_EQ(position, 150);
    EXPECT_EQ(logits, reference);
  }
}

TEST(LlamaStage, APlanThatDoesNotFitTheStoreIsRefused) {
  Stages stages(12, DType::kF16, 16);
  stages.open(1, 32);
  std::vector<float> hidden(32 * 256);
  const std::vector<std::int32_t> tokens(32, 5);
  const auto forward = [&](StageRun run, std::int32_t token) {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(run.n_tokens), token);
    return stages.stage(0).forward({&run, 1}, ids, Rows(hidden.data(), run.n_tokens, 256),
                                   Rows(nullptr, 0, 4096));
  };
  EXPECT_EQ(forward({2, 0, 4, false}, 5).code(), StatusCode::kInvalidArgument);   // not open
  EXPECT_EQ(forward({1, 3, 4, false}, 5).code(), StatusCode::kInvalidArgument);   // a gap
  EXPECT_EQ(forward({1, 0, 17, false}, 5).code(), StatusCode::kInvalidArgument);  // over the batch
  EXPECT_EQ(forward({1, 0, 4, false}, 4096).code(), StatusCode::kInvalidArgument);  // no such token
}

}  // namespace
}  // namespace spindle::worker
