#include "worker/model/model_config.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <boost/json.hpp>
#include <cmath>
#include <filesystem>
#include <string>
#include <string_view>

#include "tests/source_dir.h"
#include "tests/worker/model/model_files.h"

namespace spindle::model {
namespace {

namespace json = boost::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// A complete config of the shape of Llama 3.1 8B, with `changes` (a JSON object) merged in; a value
// "<remove>" takes the field away.
std::string config_with(std::string_view changes) {
  json::object config = json::parse(R"({"architectures":["LlamaForCausalLM"],"model_type":"llama",
    "attention_bias":false,"attention_dropout":0.0,"bos_token_id":128000,
    "eos_token_id":[128001,128008,128009],"hidden_act":"silu","hidden_size":4096,
    "initializer_range":0.02,"intermediate_size":14336,"max_position_embeddings":131072,
    "mlp_bias":false,"num_attention_heads":32,"num_hidden_layers":32,"num_key_value_heads":8,
    "pretraining_tp":1,"rms_norm_eps":1e-05,"rope_scaling":null,"rope_theta":500000.0,
    "tie_word_embeddings":false,"torch_dtype":"bfloat16","transformers_version":"4.42.3",
    "use_cache":true,"vocab_size":128256})")
                            .as_object();
  const json::value parsed = json::parse(json::string_view(changes.data(), changes.size()));
  for (const auto& change : parsed.as_object()) {
    if (change.value() == "<remove>") {
      config.erase(change.key());
    } else {
      config[change.key()] = change.value();
    }
  }
  return json::serialize(config);
}

constexpr std::string_view kLlama3Scaling =
    R"({"factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
        "original_max_position_embeddings":8192,"rope_type":"llama3"})";

TEST(ModelConfig, ReadsLlama) {
  const auto config = parse_model_config(config_with("{}"));
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->architecture, "LlamaForCausalLM");
  EXPECT_EQ(config->n_layers, 32);
  EXPECT_EQ(config->hidden_size, 4096);
  EXPECT_EQ(config->intermediate_size, 14336);
  EXPECT_EQ(config->n_heads, 32);
  EXPECT_EQ(config->n_kv_heads, 8);
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_EQ(config->vocab_size, 128256);
  EXPECT_EQ(config->max_position_embeddings, 131072);
  EXPECT_EQ(config->rms_norm_eps, 1e-5f);
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(128001, 128008, 128009));
  EXPECT_EQ(config->bos_token_id, 128000);
  EXPECT_EQ(config->torch_dtype, "bfloat16");
  EXPECT_EQ(config->rope, (RopeConfig{.theta = 500000.0f}));
  EXPECT_THAT(config->unknown_fields, IsEmpty());
  EXPECT_EQ(count_weights(*config).value(), 8'030'261'248);  // the published size of 8B
}

TEST(ModelConfig, BundledModel) {
  const auto config = load_model_config(source_dir() + "/models/spindle-mini");
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->n_layers, 12);
  EXPECT_EQ(config->head_dim, 64);
  EXPECT_TRUE(config->tie_word_embeddings);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(2));
  EXPECT_THAT(config->unknown_fields, IsEmpty());
  EXPECT_EQ(count_weights(*config).value(), 10'492'160);  // its card
}

TEST(ModelConfig, DefaultsOfAbsentFields) {
  const auto config = parse_model_config(
      R"({"architectures":["LlamaForCausalLM"],"hidden_size":64,"intermediate_size":96,
          "num_hidden_layers":1,"num_attention_heads":4,"vocab_size":100})");
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->n_kv_heads, 4);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->max_position_embeddings, 2048);
  EXPECT_EQ(config->rms_norm_eps, 1e-6f);
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_EQ(config->rope, RopeConfig{});
  EXPECT_THAT(config->eos_token_ids, ElementsAre(2));
  EXPECT_EQ(config->bos_token_id, 1);
  EXPECT_EQ(config->torch_dtype, "");
}

TEST(ModelConfig, ExplicitNullTokensMeanNone) {
  const auto config =
      parse_model_config(config_with(R"({"eos_token_id":null,"bos_token_id":null})"));
  ASSERT_TRUE(config.ok());
  EXPECT_THAT(config->eos_token_ids, IsEmpty());
  EXPECT_FALSE(config->bos_token_id.has_value());
}

TEST(ModelConfig, HeadDimNeedNotDivideHidden) {
  const auto config = parse_model_config(config_with(R"({"head_dim":96})"));
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(config->head_dim, 96);
}

TEST(ModelConfig, NewDtypeName) {
  EXPECT_EQ(parse_model_config(config_with(R"({"dtype":"float16"})"))->torch_dtype, "float16");
}

TEST(ModelConfig, BothFormsOfRope) {
  const RopeConfig llama3{500000.0f, RopeConfig::Scaling::kLlama3, 8.0f, 1.0f, 4.0f, 8192};
  const std::string scaling(kLlama3Scaling);
  const std::string inner = scaling.substr(1);
  struct Case {
    std::string changes;
    RopeConfig expected;
  };
  const RopeConfig linear{500000.0f, RopeConfig::Scaling::kLinear, 4.0f};
  for (const Case& good : {
           Case{R"({"rope_scaling":)" + scaling + "}", llama3},
           Case{R"({"rope_theta":"<remove>","rope_parameters":{"rope_theta":500000,)" + inner + "}",
                llama3},
           Case{R"({"rope_parameters":)" + scaling + "}", llama3},
           Case{R"({"rope_scaling":{"type":"linear","factor":4}})", linear},
           Case{R"({"rope_scaling":{"type":"linear","rope_type":"linear","factor":4.0}})", linear},
           Case{R"({"rope_theta":"<remove>",
                    "rope_parameters":{"rope_type":"linear","factor":4,"rope_theta":500000.0}})",
                linear},
           Case{R"({"rope_theta":"<remove>","rope_parameters":{"rope_type":"default",
                    "rope_theta":1000000.0,"partial_rotary_factor":1.0}})",
                RopeConfig{.theta = 1e6f}},
           Case{R"({"rope_theta":"<remove>"})", RopeConfig{}},
           Case{R"({"rope_parameters":null})", RopeConfig{.theta = 500000.0f}},
           Case{R"({"rope_scaling":{"rope_type":"default"}})", RopeConfig{.theta = 500000.0f}},
       }) {
    const auto config = parse_model_config(config_with(good.changes));
    ASSERT_TRUE(config.ok()) << good.changes << config.status().to_string();
    EXPECT_EQ(config->rope, good.expected) << good.changes;
    EXPECT_THAT(config->unknown_fields, IsEmpty()) << good.changes;
  }
}

struct Refusal {
  std::string_view changes;
  StatusCode code;
  std::string_view message;  // a part that names the field, and one that shows the value
  std::string_view value;
};

class ModelConfigRefusal : public ::testing::TestWithParam<Refusal> {};

TEST_P(ModelConfigRefusal, NamesFieldAndValue) {
  const auto config = parse_model_config(config_with(GetParam().changes));
  ASSERT_FALSE(config.ok()) << GetParam().changes;
  EXPECT_EQ(config.status().code(), GetParam().code) << config.status().to_string();
  EXPECT_THAT(config.status().message(), HasSubstr(std::string(GetParam().message)));
  EXPECT_THAT(config.status().message(), HasSubstr(std::string(GetParam().value)));
  EXPECT_THAT(config.status().message(), HasSubstr("config.json: "));
}

constexpr StatusCode kBad = StatusCode::kInvalidArgument;
constexpr StatusCode kNot = StatusCode::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    Unsupported, ModelConfigRefusal,
    ::testing::Values(
        Refusal{R"({"architectures":["MixtralForCausalLM"]})", kNot, "\"architectures\"",
                "MixtralForCausalLM"},
        Refusal{R"({"architectures":["LlamaForCausalLM","X"]})", kNot, "\"architectures\"", "X"},
        Refusal{R"({"architectures":"LlamaForCausalLM"})", kNot, "\"architectures\"", "Llama"},
        Refusal{R"({"architectures":null})", kBad, "\"architectures\"", "missing"},
        Refusal{R"({"model_type":"mistral"})", kNot, "\"model_type\"", "mistral"},
        Refusal{R"({"hidden_act":"gelu"})", kNot, "\"hidden_act\"", "gelu"},
        Refusal{R"({"hidden_act":3})", kNot, "\"hidden_act\"", "3"},
        Refusal{R"({"attention_bias":true})", kNot, "\"attention_bias\"", "true"},
        Refusal{R"({"mlp_bias":true})", kNot, "\"mlp_bias\"", "true"},
        Refusal{R"({"mlp_bias":"no"})", kNot, "\"mlp_bias\"", "no"},
        Refusal{R"({"sliding_window":4096})", kNot, "\"sliding_window\"", "4096"},
        Refusal{R"({"use_sliding_window":true})", kNot, "\"use_sliding_window\"", "true"},
        Refusal{R"({"quantization_config":{"quant_method":"awq"}})", kNot,
                "\"quantization_config\"", "awq"},
        Refusal{R"({"pretraining_tp":2})", kNot, "\"pretraining_tp\"", "2"},
        Refusal{R"({"partial_rotary_factor":0.5})", kNot, "\"partial_rotary_factor\"", "0.5"},
        Refusal{R"({"is_causal":false})", kNot, "\"is_causal\"", "false"},
        Refusal{R"({"num_local_experts":8})", kNot, "\"num_local_experts\"", "8"},
        Refusal{R"({"pruned_heads":{"0":[1]}})", kNot, "\"pruned_heads\"", "[1]"},
        Refusal{R"({"layer_types":["full_attention","sliding_attention"]})", kNot,
                "\"layer_types\"", "sliding_attention"},
        Refusal{R"({"rope_interleaved":true})", kNot, "\"rope_interleaved\"", "true"},
        Refusal{R"({"torch_dtype":"float8_e4m3fn"})", kNot, "\"torch_dtype\"", "float8_e4m3fn"},
        Refusal{R"({"dtype":"int8"})", kNot, "\"dtype\"", "int8"}));

INSTANTIATE_TEST_SUITE_P(
    Rope, ModelConfigRefusal,
    ::testing::Values(
        Refusal{R"({"rope_scaling":{"type":"dynamic","factor":2}})", kNot,
                "\"rope_scaling.rope_type\"", "dynamic"},
        Refusal{R"({"rope_scaling":{"rope_type":"yarn","factor":2}})", kNot,
                "\"rope_scaling.rope_type\"", "yarn"},
        Refusal{R"({"rope_parameters":{"rope_type":"longrope","factor":2}})", kNot,
                "\"rope_parameters.rope_type\"", "longrope"},
        Refusal{R"({"rope_parameters":{"rope_type":"default","partial_rotary_factor":0.25}})", kNot,
                "\"rope_parameters.partial_rotary_factor\"", "0.25"},
        Refusal{R"({"rope_scaling":{"type":"linear","rope_type":"llama3","factor":2}})", kBad,
                "\"rope_scaling.type\"", "linear"},
        Refusal{R"({"rope_scaling":{"type":"linear"}})", kBad, "\"rope_scaling.factor\"",
                "missing"},
        Refusal{R"({"rope_scaling":{"type":"linear","factor":0.5}})", kBad,
                "\"rope_scaling.factor\"", "0.5"},
        Refusal{R"({"rope_scaling":{"type":"linear","factor":"2"}})", kBad,
                "\"rope_scaling.factor\"", "\"2\""},
        Refusal{R"({"rope_scaling":{"rope_type":"llama3","factor":8}})", kBad,
                "\"rope_scaling.low_freq_factor\"", "missing"},
        Refusal{R"({"rope_scaling":{"rope_type":"llama3","factor":8,"low_freq_factor":4,
                    "high_freq_factor":4,"original_max_position_embeddings":8192}})",
                kBad, "\"rope_scaling.high_freq_factor\"", "greater"},
        Refusal{R"({"rope_scaling":{"rope_type":"llama3","factor":8,"low_freq_factor":1,
                    "high_freq_factor":4,"original_max_position_embeddings":0}})",
                kBad, "\"rope_scaling.original_max_position_embeddings\"", "got 0"},
        Refusal{R"({"rope_scaling":{"rope_type":7}})", kBad, "\"rope_scaling.rope_type\"", "7"},
        Refusal{R"({"rope_scaling":"linear"})", kBad, "\"rope_scaling\"", "linear"},
        Refusal{R"({"rope_scaling":{"type":"linear","factor":2},
                    "rope_parameters":{"type":"linear","factor":4}})",
                kBad, "\"rope_parameters\"", "differ"},
        Refusal{R"({"rope_parameters":{"rope_type":"default","rope_theta":10000}})", kBad,
                "\"rope_parameters.rope_theta\"", "10000"},
        Refusal{R"({"rope_theta":0})", kBad, "\"rope_theta\"", "got 0"},
        Refusal{R"({"rope_theta":"big"})", kBad, "\"rope_theta\"", "big"},
        Refusal{R"({"rope_theta":[1]})", kBad, "\"rope_theta\"", "[1]"}));

INSTANTIATE_TEST_SUITE_P(
    Ranges, ModelConfigRefusal,
    ::testing::Values(
        Refusal{R"({"num_hidden_layers":1025})", kBad, "\"num_hidden_layers\"", "1025"},
        Refusal{R"({"num_hidden_layers":0})", kBad, "\"num_hidden_layers\"", "got 0"},
        Refusal{R"({"num_hidden_layers":"<remove>"})", kBad, "\"num_hidden_layers\"", "missing"},
        Refusal{R"({"hidden_size":-4096})", kBad, "\"hidden_size\"", "-4096"},
        Refusal{R"({"hidden_size":65537})", kBad, "\"hidden_size\"", "65537"},
        Refusal{R"({"hidden_size":4096.0})", kBad, "\"hidden_size\"", "4096"},
        Refusal{R"({"hidden_size":18446744073709551615})", kBad, "\"hidden_size\"", "1844674407"},
        Refusal{R"({"intermediate_size":1048577})", kBad, "\"intermediate_size\"", "1048577"},
        Refusal{R"({"vocab_size":4194305})", kBad, "\"vocab_size\"", "4194305"},
        Refusal{R"({"vocab_size":true})", kBad, "\"vocab_size\"", "true"},
        Refusal{R"({"num_attention_heads":5000})", kBad, "\"num_attention_heads\"", "5000"},
        Refusal{R"({"num_key_value_heads":5})", kBad, "\"num_key_value_heads\"", "5"},
        Refusal{R"({"num_attention_heads":24})", kBad, "\"head_dim\"", "24"},
        Refusal{R"({"head_dim":65})", kBad, "\"head_dim\"", "65"},
        Refusal{R"({"head_dim":2048})", kBad, "\"head_dim\"", "2048"},
        Refusal{R"({"hidden_size":32})", kBad, "\"head_dim\"", "got 1"},
        Refusal{R"({"max_position_embeddings":0})", kBad, "\"max_position_embeddings\"", "got 0"},
        Refusal{R"({"rms_norm_eps":0})", kBad, "\"rms_norm_eps\"", "got 0"},
        Refusal{R"({"rms_norm_eps":"tiny"})", kBad, "\"rms_norm_eps\"", "tiny"},
        Refusal{R"({"tie_word_embeddings":1})", kBad, "\"tie_word_embeddings\"", "1"},
        Refusal{R"({"eos_token_id":128256})", kBad, "\"eos_token_id\"", "128256"},
        Refusal{R"({"bos_token_id":-1})", kBad, "\"bos_token_id\"", "-1"},
        Refusal{R"({"torch_dtype":16})", kBad, "\"torch_dtype\"", "16"}));

TEST(ModelConfig, NeutralValuesOfRefusedFieldsAreAccepted) {
  const auto config = parse_model_config(config_with(
      R"({"sliding_window":null,"use_sliding_window":false,"quantization_config":null,
          "partial_rotary_factor":1.0,"pruned_heads":{},"layer_types":["full_attention"],
          "rope_interleaved":false,"num_experts":0,"is_causal":true,"logit_scale":1})"));
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_THAT(config->unknown_fields, IsEmpty());
}

TEST(ModelConfig, UnknownFieldsAreReported) {
  const auto config = parse_model_config(config_with(
      R"({"new_trick":{"a":1},"pad_token_id":-1,"line\nbreak":0,
          "rope_scaling":{"type":"linear","factor":2,"beta_fast":32,"low_freq_factor":1}})"));
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_THAT(config->unknown_fields, ::testing::UnorderedElementsAre(
                                          "new_trick", "line\\x0abreak", "rope_scaling.beta_fast",
                                          "rope_scaling.low_freq_factor"));
}

TEST(ModelConfig, ManyUnknownFieldsAreBounded) {
  json::object extra;
  for (int i = 0; i < 5000; ++i) extra["field" + std::to_string(i)] = i;
  const auto config = parse_model_config(config_with(json::serialize(extra)));
  ASSERT_TRUE(config.ok());
  EXPECT_LE(config->unknown_fields.size(), 64u);
}

TEST(ModelConfig, LargestSizesDoNotOverflow) {
  const auto config = parse_model_config(config_with(
      R"({"num_hidden_layers":1024,"hidden_size":65536,"intermediate_size":1048576,
          "num_attention_heads":4096,"num_key_value_heads":4096,"head_dim":1024,
          "vocab_size":4194304})"));
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_GT(count_weights(*config).value(), std::int64_t{1} << 50);
}

TEST(ModelConfig, RefusesWhatIsNotAnObject) {
  for (const std::string_view text : {"", "[]", "{", "null", "{\"a\":\xff}", "{}x"}) {
    EXPECT_EQ(parse_model_config(text).status().code(), kBad) << text;
  }
  EXPECT_EQ(parse_model_config(std::string(100'000, '[')).status().code(), kBad);
  EXPECT_EQ(parse_model_config(std::string((1 << 20) + 1, ' ')).status().code(),
            StatusCode::kTooLarge);
}

TEST(ModelConfig, MissingFileAndFolder) {
  const TempDir dir;
  EXPECT_EQ(load_model_config(dir.path()).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(load_model_config(dir.path() / "none").status().code(), StatusCode::kNotFound);
  std::filesystem::create_directory(dir.path() / "config.json");
  EXPECT_EQ(load_model_config(dir.path()).status().code(), kBad);
}

// ---- rope_inv_freq: expected values computed apart with theta^(-2i/d) in double precision ----

struct Frequency {
  std::size_t index;
  double value;
};

void expect_frequencies(const ModelConfig& config, std::initializer_list<Frequency> expected,
                        double tolerance) {
  const std::vector<float> actual = rope_inv_freq(config);
  ASSERT_EQ(actual.size(), static_cast<std::size_t>(config.head_dim / 2));
  EXPECT_TRUE(std::is_sorted(actual.rbegin(), actual.rend()));
  for (const Frequency& frequency : expected) {
    EXPECT_NEAR(actual[frequency.index] / frequency.value, 1.0, tolerance)
        << "index " << frequency.index << " is " << actual[frequency.index];
  }
}

TEST(RopeInvFreq, SmallByEye) {
  ModelConfig config;
  config.head_dim = 4;
  config.rope.theta = 10000.0f;
  EXPECT_THAT(rope_inv_freq(config), ElementsAre(1.0f, ::testing::FloatEq(0.01f)));
  config.rope.scaling = RopeConfig::Scaling::kLinear;
  config.rope.factor = 4.0f;
  EXPECT_THAT(rope_inv_freq(config), ElementsAre(0.25f, ::testing::FloatEq(0.0025f)));
}

TEST(RopeInvFreq, Default) {
  ModelConfig config;
  config.head_dim = 64;
  config.rope.theta = 500000.0f;
  expect_frequencies(
      config,
      {{0, 1.0}, {1, 0.663601279258728}, {15, 0.002131119603291154}, {31, 3.01385807688348e-06}},
      3e-7);
}

TEST(RopeInvFreq, Linear) {
  ModelConfig config;
  config.head_dim = 128;
  config.rope = {10000.0f, RopeConfig::Scaling::kLinear, 4.0f};
  expect_frequencies(
      config,
      {{0, 0.25}, {1, 0.21649108827114105}, {32, 0.0024999999441206455}, {63, 2.8869548e-05}},
      3e-7);
}

TEST(RopeInvFreq, Llama31) {
  const auto config =
      parse_model_config(config_with(R"({"rope_scaling":)" + std::string(kLlama3Scaling) + "}"));
  ASSERT_TRUE(config.ok());
  // Short wavelengths are kept, long ones divided by 8.
  expect_frequencies(*config,
                     {{0, 1.0},
                      {1, 0.8146172165870667},
                      {28, 0.0032114461064338684},
                      {35, 9.556212171446532e-05},
                      {36, 7.784655463183299e-05},
                      {63, 3.068925877869333e-07}},
                     3e-7);
  // In between the interpolation cancels a few bits.
  expect_frequencies(
      *config,
      {{29, 0.0021665704517852013}, {30, 0.0013718936642866317}, {34, 0.00017850780240757209}},
      3e-6);
}

TEST(RopeInvFreq, Llama32) {
  ModelConfig config;
  config.head_dim = 64;
  config.rope = {500000.0f, RopeConfig::Scaling::kLlama3, 32.0f, 1.0f, 4.0f, 8192};
  expect_frequencies(config,
                     {{0, 1.0},
                      {14, 0.0032114461064338684},
                      {15, 0.0012905480279647187},
                      {16, 0.00042955669189436585},
                      {17, 9.708286858481353e-05},
                      {18, 1.9461638657958247e-05},
                      {31, 9.418306490260875e-08}},
                     3e-6);
}

}  // namespace
}  // namespace spindle::model
