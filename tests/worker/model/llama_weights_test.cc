#include "worker/model/llama_weights.h"

#include <gmock/gmock.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "tests/source_dir.h"
#include "tests/worker/model/model_files.h"

namespace spindle::model {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

const std::string kMini = source_dir() + "/models/spindle-mini";

std::uint64_t hash_of(const HostTensor& tensor) { return fnv1a(tensor.data.bytes()); }

std::vector<std::int64_t> shape(std::initializer_list<std::int64_t> sizes) { return sizes; }

// ---- The bundled model; hashes and values were computed from the files by a separate script ----

TEST(LlamaWeights, BundledModelWhole) {
  const auto config = load_model_config(kMini);
  const auto checkpoint = Checkpoint::open(kMini);
  ASSERT_TRUE(config.ok() && checkpoint.ok());
  const auto stage = load_llama_stage(*checkpoint, *config, {0, 12}, true, true);
  ASSERT_TRUE(stage.ok()) << stage.status().to_string();
  ASSERT_EQ(stage->layers.size(), 12u);

  const HostTensor& q = stage->layers[7].q_proj;
  EXPECT_EQ(q.dtype, DType::kBF16);
  EXPECT_EQ(q.shape, shape({256, 256}));
  EXPECT_EQ(q.at(0), -0.0162353515625f);
  EXPECT_EQ(q.at(1), -0.08544921875f);
  EXPECT_EQ(q.at(65535), -0.006317138671875f);
  EXPECT_EQ(hash_of(q), 0x2d64b3a9d9bc9a55u);
  EXPECT_EQ(hash_of(stage->layers[11].down_proj), 0xbfebc423da9a79e5u);
  EXPECT_EQ(stage->layers[11].down_proj.shape, shape({256, 768}));
  EXPECT_EQ(hash_of(stage->layers[0].input_norm), 0xddee213de43173c9u);
  EXPECT_EQ(hash_of(*stage->final_norm), 0xeb12d4b466ad2737u);
  EXPECT_EQ(hash_of(*stage->embedding), 0x6f2eede2e0b95a6fu);
  EXPECT_EQ(stage->lm_head, stage->embedding);  // tied: the same object, read once
  EXPECT_EQ(checkpoint->bytes_read(), 20'984'320u);
}

TEST(LlamaWeights, AStageReadsOnlyItsOwn) {
  const auto config = load_model_config(kMini);
  ASSERT_TRUE(config.ok());
  {
    const auto checkpoint = Checkpoint::open(kMini);
    const auto stage = load_llama_stage(*checkpoint, *config, {0, 6}, true, false);
    ASSERT_TRUE(stage.ok()) << stage.status().to_string();
    EXPECT_EQ(checkpoint->bytes_read(), 11'540'480u);
    EXPECT_THAT(checkpoint->opened_shards(), ElementsAre("model-00001-of-00002.safetensors"));
    EXPECT_FALSE(stage->final_norm.has_value());
    EXPECT_EQ(stage->lm_head, nullptr);
  }
  {
    // The last stage reads the tied embedding as its head.
    const auto checkpoint = Checkpoint::open(kMini);
    const auto stage = load_llama_stage(*checkpoint, *config, {6, 6}, false, true);
    ASSERT_TRUE(stage.ok()) << stage.status().to_string();
    EXPECT_EQ(checkpoint->bytes_read(), 11'540'992u);
    EXPECT_EQ(stage->embedding, nullptr);
    EXPECT_EQ(hash_of(*stage->lm_head), 0x6f2eede2e0b95a6fu);
    EXPECT_EQ(hash_of(stage->layers[1].q_proj), 0x2d64b3a9d9bc9a55u);
  }
  {
    const auto checkpoint = Checkpoint::open(kMini);
    ASSERT_TRUE(load_llama_stage(*checkpoint, *config, {8, 2}, false, false).ok());
    EXPECT_THAT(checkpoint->opened_shards(), ElementsAre("model-00002-of-00002.safetensors"));
  }
}

// ---- The list of tensors ----

TEST(LlamaStageTensors, SplitCoversTheModelOnce) {
  const auto config = parse_model_config(tiny_config(false));
  ASSERT_TRUE(config.ok());
  std::multiset<std::string> names;
  for (int layer = 0; layer < 2; ++layer) {
    const auto specs = llama_stage_tensors(*config, {layer, 1}, layer == 0, layer == 1);
    ASSERT_TRUE(specs.ok());
    for (const TensorSpec& spec : *specs) names.insert(spec.name);
  }
  std::multiset<std::string> expected;
  for (const FileTensor& tensor : tiny_tensors(DType::kF32, false)) expected.insert(tensor.name);
  EXPECT_EQ(names, expected);
}

TEST(LlamaStageTensors, TiedHeadIsTheEmbedding) {
  const auto config = parse_model_config(tiny_config(true));
  const auto names = [&](bool embedding, bool head) {
    const auto specs = llama_stage_tensors(*config, {0, 0}, embedding, head);
    std::vector<std::string> result;
    for (const TensorSpec& spec : *specs) result.push_back(spec.name);
    return result;
  };
  EXPECT_THAT(names(true, false), ElementsAre("model.embed_tokens.weight"));
  EXPECT_THAT(names(false, true), ElementsAre("model.norm.weight", "model.embed_tokens.weight"));
  EXPECT_THAT(names(true, true), ElementsAre("model.embed_tokens.weight", "model.norm.weight"));
}

TEST(LlamaStageTensors, RefusesARangeOutsideTheModel) {
  const auto config = parse_model_config(tiny_config(true));
  for (const LayerRange range : {LayerRange{0, 3}, LayerRange{-1, 1}, LayerRange{2, 1},
                                 LayerRange{0, -1}, LayerRange{1, 2147483647}}) {
    EXPECT_EQ(llama_stage_tensors(*config, range, true, true).status().code(),
              StatusCode::kInvalidArgument);
    EXPECT_FALSE(make_dummy_llama_stage(*config, range, true, true, 1).ok());
  }
}

// ---- Checkpoints written here ----

Result<LlamaStageWeights> load_tiny(const std::vector<FileTensor>& tensors, bool tied,
                                    LayerRange range = {0, 2}) {
  const TempDir dir;
  dir.write("model.safetensors", safetensors_file(tensors));
  const auto checkpoint = Checkpoint::open(dir.path());
  if (!checkpoint.ok()) return checkpoint.status();
  return load_llama_stage(*checkpoint, *parse_model_config(tiny_config(tied)), range, true, true);
}

TEST(LlamaWeights, EveryDTypeAndUntiedHead) {
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    const std::vector<FileTensor> tensors = tiny_tensors(dtype, false);
    const auto stage = load_tiny(tensors, false);
    ASSERT_TRUE(stage.ok()) << stage.status().to_string();
    const auto expect = [&](const HostTensor& tensor, std::size_t at) {
      EXPECT_EQ(tensor.dtype, dtype);
      EXPECT_EQ(tensor.shape, tensors[at].shape);
      ASSERT_EQ(tensor.data.bytes().size(), tensors[at].bytes.size());
      EXPECT_EQ(std::memcmp(tensor.data.bytes().data(), tensors[at].bytes.data(),
                            tensors[at].bytes.size()),
                0)
          << tensors[at].name;
      EXPECT_EQ(tensor.at(1), static_cast<float>(at + 1) / 8.0f);
    };
    expect(*stage->embedding, 0);
    for (std::size_t layer = 0; layer < 2; ++layer) {
      const LlamaLayerWeights& weights = stage->layers[layer];
      const std::size_t first = 1 + 9 * layer;
      expect(weights.input_norm, first);
      expect(weights.q_proj, first + 1);
      expect(weights.k_proj, first + 2);
      expect(weights.v_proj, first + 3);
      expect(weights.o_proj, first + 4);
      expect(weights.post_attention_norm, first + 5);
      expect(weights.gate_proj, first + 6);
      expect(weights.up_proj, first + 7);
      expect(weights.down_proj, first + 8);
    }
    expect(*stage->final_norm, 19);
    expect(*stage->lm_head, 20);
  }
}

TEST(LlamaWeights, MissingTensorIsNamed) {
  for (const FileTensor& missing : tiny_tensors(DType::kF32, false)) {
    std::vector<FileTensor> tensors = tiny_tensors(DType::kF32, false);
    std::erase_if(tensors, [&](const FileTensor& tensor) { return tensor.name == missing.name; });
    const auto stage = load_tiny(tensors, false);
    ASSERT_FALSE(stage.ok()) << missing.name;
    EXPECT_EQ(stage.status().code(), StatusCode::kNotFound);
    EXPECT_THAT(stage.status().message(), HasSubstr("lacks \"" + missing.name + "\""));
  }
  const auto none = load_tiny({}, false);
  EXPECT_THAT(none.status().message(), HasSubstr("and 17 more"));
}

TEST(LlamaWeights, WrongShapeNamesTensorExpectedAndFound) {
  std::vector<FileTensor> tensors = tiny_tensors(DType::kF32, true);
  tensors[3] = counting_tensor(tensors[3].name, DType::kF32, {8, 4}, 0);
  const auto stage = load_tiny(tensors, true);
  ASSERT_FALSE(stage.ok());
  EXPECT_EQ(stage.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(stage.status().message(),
              HasSubstr("\"model.layers.0.self_attn.k_proj.weight\" has shape [8, 4], but "
                        "config.json asks for [4, 8]"));
  tensors[3].shape = {32};
  EXPECT_THAT(load_tiny(tensors, true).status().message(), HasSubstr("has shape [32]"));
}

TEST(LlamaWeights, OtherElementTypesAreRefusedByName) {
  std::vector<FileTensor> tensors = tiny_tensors(DType::kBF16, true);
  tensors[4].dtype = "I16";
  const auto stage = load_tiny(tensors, true);
  ASSERT_FALSE(stage.ok());
  EXPECT_EQ(stage.status().code(), StatusCode::kUnimplemented);
  EXPECT_THAT(stage.status().message(),
              HasSubstr("\"model.layers.0.self_attn.v_proj.weight\" is I16"));
}

TEST(LlamaWeights, TensorsWithoutAPlaceAreRefusedByName) {
  for (const std::string name :
       {"model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.down_proj.bias",
        "model.layers.1.self_attn.q_norm.weight", "model.layers.2.mlp.up_proj.weight",
        "model.layers.01.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.-1.mlp.up_proj.weight", "model.layers.99999999999.mlp.up_proj.weight",
        "model.norm.bias", "lm_head.bias", "something_else"}) {
    std::vector<FileTensor> tensors = tiny_tensors(DType::kBF16, true);
    tensors.push_back(counting_tensor(name, DType::kBF16, {8}, 0));
    const auto stage = load_tiny(tensors, true);
    ASSERT_FALSE(stage.ok()) << name;
    EXPECT_EQ(stage.status().code(), StatusCode::kUnimplemented);
    EXPECT_THAT(stage.status().message(), HasSubstr("\"" + name + "\""));
  }
}

TEST(LlamaWeights, HarmlessExtrasAreIgnored) {
  std::vector<FileTensor> tensors = tiny_tensors(DType::kBF16, true);
  tensors.push_back(
      counting_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", DType::kF32, {2}, 0));
  tensors.push_back(counting_tensor("lm_head.weight", DType::kBF16, {10, 8}, 77));
  const auto stage = load_tiny(tensors, true);
  ASSERT_TRUE(stage.ok()) << stage.status().to_string();
  EXPECT_EQ(stage->lm_head, stage->embedding);
}

TEST(LlamaWeights, BiasThatTheIndexDoesNotNameIsStillRefused) {
  const TempDir dir;
  std::vector<FileTensor> tensors = tiny_tensors(DType::kBF16, true);
  std::map<std::string, std::string> index;
  for (const FileTensor& tensor : tensors) index[tensor.name] = "a.safetensors";
  tensors.push_back(counting_tensor("model.layers.0.self_attn.k_proj.bias", DType::kBF16, {4}, 0));
  dir.write("a.safetensors", safetensors_file(tensors));
  dir.write("model.safetensors.index.json", index_json(index));
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok());
  const auto stage =
      load_llama_stage(*checkpoint, *parse_model_config(tiny_config(true)), {0, 1}, true, false);
  EXPECT_THAT(stage.status().message(), HasSubstr("k_proj.bias"));
  EXPECT_EQ(checkpoint->bytes_read(), 0u);
}

TEST(LlamaWeights, AShardOfOtherLayersIsNotNeeded) {
  const TempDir dir;
  std::map<std::string, std::string> index;
  std::vector<FileTensor> own;
  for (const FileTensor& tensor : tiny_tensors(DType::kF16, true)) {
    const bool other = tensor.name.find("layers.1.") != std::string::npos;
    index[tensor.name] = other ? "absent.safetensors" : "own.safetensors";
    if (!other) own.push_back(tensor);
  }
  dir.write("own.safetensors", safetensors_file(own));
  dir.write("model.safetensors.index.json", index_json(index));
  const auto config = parse_model_config(tiny_config(true));
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_TRUE(load_llama_stage(*checkpoint, *config, {0, 1}, true, true).ok());
  EXPECT_THAT(load_llama_stage(*checkpoint, *config, {1, 1}, false, false).status().message(),
              HasSubstr("absent.safetensors"));
}

TEST(LlamaWeights, FileCutAfterOpeningFailsTheLoad) {
  const TempDir dir;
  const auto path =
      dir.write("model.safetensors", safetensors_file(tiny_tensors(DType::kF32, true)));
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok());
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 4);
  const auto stage =
      load_llama_stage(*checkpoint, *parse_model_config(tiny_config(true)), {0, 2}, true, true);
  ASSERT_FALSE(stage.ok());
  EXPECT_THAT(stage.status().message(), HasSubstr("became shorter"));
}

// ---- Made-up weights ----

TEST(DummyWeights, DoNotDependOnTheSplit) {
  const auto config = parse_model_config(tiny_config(false));
  const auto whole = make_dummy_llama_stage(*config, {0, 2}, true, true, 7);
  const auto last = make_dummy_llama_stage(*config, {1, 1}, false, true, 7);
  const auto other = make_dummy_llama_stage(*config, {1, 1}, false, true, 8);
  ASSERT_TRUE(whole.ok() && last.ok() && other.ok());
  EXPECT_EQ(hash_of(whole->layers[1].gate_proj), hash_of(last->layers[0].gate_proj));
  EXPECT_EQ(hash_of(*whole->lm_head), hash_of(*last->lm_head));
  EXPECT_NE(hash_of(whole->layers[0].gate_proj), hash_of(whole->layers[1].gate_proj));
  EXPECT_NE(hash_of(last->layers[0].gate_proj), hash_of(other->layers[0].gate_proj));
  EXPECT_NE(hash_of(*whole->embedding), hash_of(*whole->lm_head));
  EXPECT_EQ(last->embedding, nullptr);
  for (std::int64_t i = 0; i < 8; ++i) EXPECT_EQ(whole->layers[0].input_norm.at(i), 1.0f);
}

TEST(DummyWeights, TiedHeadIsTheEmbeddingOfStageZero) {
  const auto config = parse_model_config(tiny_config(true));
  const auto first = make_dummy_llama_stage(*config, {0, 1}, true, false, 7);
  const auto last = make_dummy_llama_stage(*config, {1, 1}, false, true, 7);
  ASSERT_TRUE(first.ok() && last.ok());
  EXPECT_EQ(hash_of(*first->embedding), hash_of(*last->lm_head));
}

TEST(DummyWeights, AreCloseToNormal) {
  const auto config = load_model_config(kMini);
  const auto stage = make_dummy_llama_stage(*config, {0, 1}, false, false, 1);
  ASSERT_TRUE(stage.ok());
  const HostTensor& tensor = stage->layers[0].gate_proj;
  double sum = 0;
  double squares = 0;
  int beyond_two_sigma = 0;
  const auto n = tensor.n_elements();
  for (std::int64_t i = 0; i < n; ++i) {
    const double value = tensor.at(i) / 0.02;
    sum += value;
    squares += value * value;
    if (std::abs(value) > 2) ++beyond_two_sigma;
    ASSERT_LT(std::abs(value), 3.5);
  }
  EXPECT_NEAR(sum / static_cast<double>(n), 0.0, 0.01);
  EXPECT_NEAR(squares / static_cast<double>(n), 1.0, 0.01);
  EXPECT_NEAR(beyond_two_sigma / static_cast<double>(n), 0.0455, 0.01);
}

}  // namespace
}  // namespace spindle::model
