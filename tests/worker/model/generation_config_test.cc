#include "worker/model/generation_config.h"

#include <gmock/gmock.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>

#include "tests/source_dir.h"
#include "tests/worker/model/model_files.h"

namespace spindle::model {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(GenerationConfig, ReadsEveryField) {
  const auto config = parse_generation_config(R"({"bos_token_id":1,"eos_token_id":[2,7,2],
    "pad_token_id":0,"do_sample":true,"temperature":0.6,"top_k":50,"top_p":0.9,"min_p":0.05,
    "repetition_penalty":1.1,"max_new_tokens":4096,"transformers_version":"4.44.0"})");
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(2, 7));
  EXPECT_EQ(config->bos_token_id, 1);
  EXPECT_EQ(config->pad_token_id, 0);
  EXPECT_EQ(config->do_sample, true);
  EXPECT_EQ(config->temperature, 0.6f);
  EXPECT_EQ(config->top_k, 50);
  EXPECT_EQ(config->top_p, 0.9f);
  EXPECT_EQ(config->min_p, 0.05f);
  EXPECT_EQ(config->repetition_penalty, 1.1f);
  EXPECT_EQ(config->max_new_tokens, 4096);
}

TEST(GenerationConfig, AbsentAndNullFieldsStayEmpty) {
  for (const std::string_view json : {"{}", R"({"eos_token_id":null,"temperature":null})"}) {
    const auto config = parse_generation_config(json);
    ASSERT_TRUE(config.ok());
    EXPECT_THAT(config->eos_token_ids, IsEmpty());
    EXPECT_FALSE(config->bos_token_id || config->pad_token_id || config->do_sample ||
                 config->temperature || config->top_k || config->top_p || config->min_p ||
                 config->repetition_penalty || config->max_new_tokens);
  }
}

TEST(GenerationConfig, DoSampleFalseMeansGreedy) {
  EXPECT_EQ(parse_generation_config(R"({"do_sample":false})")->temperature, 0.0f);
  EXPECT_EQ(parse_generation_config(R"({"do_sample":false,"temperature":0.7})")->temperature, 0.0f);
  EXPECT_EQ(parse_generation_config(R"({"temperature":0.7})")->temperature, 0.7f);
}

TEST(GenerationConfig, OneEosAndNoPadding) {
  const auto config = parse_generation_config(R"({"eos_token_id":128009,"pad_token_id":-1})");
  ASSERT_TRUE(config.ok());
  EXPECT_THAT(config->eos_token_ids, ElementsAre(128009));
  EXPECT_FALSE(config->pad_token_id.has_value());
}

TEST(GenerationConfig, RefusesBadValuesByName) {
  struct Case {
    std::string_view field;
    std::string_view value;
  };
  for (const Case& bad : {
           Case{"eos_token_id", "\"x\""},
           Case{"eos_token_id", "-1"},
           Case{"eos_token_id", "[1,-2]"},
           Case{"eos_token_id", "[[1]]"},
           Case{"eos_token_id", "1.5"},
           Case{"eos_token_id", "99999999999"},
           Case{"bos_token_id", "[1]"},
           Case{"bos_token_id", "-1"},
           Case{"pad_token_id", "-2"},
           Case{"do_sample", "1"},
           Case{"temperature", "-0.1"},
           Case{"temperature", "\"hot\""},
           Case{"temperature", "1e999"},
           Case{"temperature", "true"},
           Case{"top_k", "-1"},
           Case{"top_k", "1.5"},
           Case{"top_p", "0"},
           Case{"top_p", "1.01"},
           Case{"min_p", "-0.01"},
           Case{"min_p", "2"},
           Case{"repetition_penalty", "0"},
           Case{"max_new_tokens", "0"},
           Case{"max_new_tokens", "1e3"},
       }) {
    const std::string json = "{\"" + std::string(bad.field) + "\":" + std::string(bad.value) + "}";
    const auto config = parse_generation_config(json);
    ASSERT_FALSE(config.ok()) << json;
    EXPECT_EQ(config.status().code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(config.status().message(), HasSubstr("\"" + std::string(bad.field) + "\""));
    EXPECT_THAT(config.status().message(), HasSubstr("got "));
  }
  EXPECT_FALSE(parse_generation_config("[]").ok());
  EXPECT_FALSE(parse_generation_config("{").ok());
}

TEST(GenerationConfig, FileIsOptional) {
  const TempDir dir;
  ASSERT_TRUE(load_generation_config(dir.path()).ok());
  dir.write("generation_config.json", R"({"top_k":3})");
  EXPECT_EQ(load_generation_config(dir.path())->top_k, 3);
  std::filesystem::remove(dir.path() / "generation_config.json");
  ASSERT_EQ(mkfifo((dir.path() / "generation_config.json").c_str(), 0600), 0);
  EXPECT_EQ(load_generation_config(dir.path()).status().code(), StatusCode::kInvalidArgument);
}

TEST(GenerationConfig, BundledModel) {
  const auto config = load_generation_config(source_dir() + "/models/spindle-mini");
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(2, 0));
  EXPECT_EQ(config->temperature, 0.0f);
}

}  // namespace
}  // namespace spindle::model
