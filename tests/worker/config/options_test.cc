#include "worker/config/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "cluster/api/framing.h"
#include "kernels/core/build_info.h"
#include "tests/worker/config/config_files.h"
#include "worker/config/config_text.h"

namespace spindle::config {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

Result<Options> parse(std::vector<std::string> arguments) {
  std::vector<const char*> argv = {"spindled"};
  for (const std::string& argument : arguments) argv.push_back(argument.c_str());
  return parse_command_line(static_cast<int>(argv.size()), argv.data());
}

class OptionsTest : public testing::Test {
 protected:
  void SetUp() override { unsetenv("SPINDLE_API_KEY"); }
  void TearDown() override { unsetenv("SPINDLE_API_KEY"); }
};

struct Flag {
  std::vector<std::string> arguments;
  std::string line;  // of comparison_text
};

class NamedFlag : public testing::TestWithParam<Flag> {};

TEST_P(NamedFlag, SetsItsField) {
  std::vector<std::string> arguments = {"--model", "/data/m"};
  arguments.insert(arguments.end(), GetParam().arguments.begin(), GetParam().arguments.end());
  const auto options = parse(arguments);
  ASSERT_TRUE(options.ok()) << options.status().to_string();
  EXPECT_THAT(comparison_text(options->config), HasSubstr(GetParam().line + "\n"));
}

INSTANTIATE_TEST_SUITE_P(
    All, NamedFlag,
    testing::Values(
        Flag{{"--host", "0.0.0.0"}, "api.http.host = \"0.0.0.0\""},
        Flag{{"--port", "9000"}, "api.http.port = 9000"},
        Flag{{"--port=9000"}, "api.http.port = 9000"},
        Flag{{"--max-model-len", "4096"}, "model.max_model_len = 4096"},
        Flag{{"--max-num-seqs", "7"}, "scheduler.max_num_seqs = 7"},
        Flag{{"--max-num-batched-tokens", "99"}, "scheduler.max_num_batched_tokens = 99"},
        Flag{{"--max-num-queued-reqs", "3"}, "scheduler.max_num_queued_reqs = 3"},
        Flag{{"--max-num-queued-tokens", "5"}, "scheduler.max_num_queued_tokens = 5"},
        Flag{{"--kv-cache-dtype", "auto"}, "kv.dtype = AUTO"},
        Flag{{"--kv-cache-dtype", "float16"}, "kv.dtype = F16"},
        Flag{{"--kv-cache-dtype", "bfloat16"}, "kv.dtype = BF16"},
        Flag{{"--kv-cache-dtype", "float32"}, "kv.dtype = F32"},
        Flag{{"--kv-cache-dtype", "bf16"}, "kv.dtype = BF16"},
        Flag{{"--served-model-name", "mine"}, "model.served_model_name = \"mine\""},
        Flag{{"--load-format", "dummy"}, "model.load_format = DUMMY"},
        Flag{{"--load-format", "safetensors"}, "model.load_format = SAFETENSORS"},
        Flag{{"--load-format", "auto"}, "model.load_format = SAFETENSORS"},
        Flag{{"--kv-policy", "int4"}, "kv.policy.profile = \"int4\""},
        Flag{{"--kv-ratio", "0.25"}, "kv.policy.ratio = 0.25"},
        Flag{{"--set", "kv.profile_table=/data/../t.pbtxt"}, "kv.profile_table = \"/t.pbtxt\""},
        Flag{{"--device", "cuda"}, "compute.device = CUDA"},
        Flag{{"--device", "auto"}, "compute.device = AUTO"},
        Flag{{"--gpu-memory-utilization", "0.5"}, "compute.gpu_memory_utilization = 0.5"},
        Flag{{"--metrics-compat", "vllm"}, "api.http.metrics_compat = VLLM"},
        Flag{{"--seed", "42"}, "scheduler.seed = 42"},
        Flag{{"--set", "api.tcp.port=9001"}, "api.tcp.port = 9001"},
        Flag{{"--set", "api.tcp.port=1", "--set", "api.tcp.port=2"}, "api.tcp.port = 2"},
        // --set is the later word.
        Flag{{"--set", "api.http.port=2", "--port", "1"}, "api.http.port = 2"}));

TEST_F(OptionsTest, DefaultsAreFilledIn) {
  const auto options = parse({"--model", "/data/m"});
  ASSERT_TRUE(options.ok()) << options.status().to_string();
  EXPECT_EQ(options->config.model().path(), "/data/m");
  EXPECT_TRUE(options->config.api().http().has_port());
  EXPECT_FALSE(options->print_config);
  EXPECT_EQ(options->text, "");
}

TEST_F(OptionsTest, FlagBeatsFileBeatsDefault) {
  const TemporaryFolder folder;
  const std::string file =
      folder.write("c.pbtxt", "model { path: \"m\" } api { http { port: 7000 host: \"::1\" } }")
          .string();
  const auto options = parse({"--config", file, "--port", "7001"});
  ASSERT_TRUE(options.ok()) << options.status().to_string();
  EXPECT_EQ(options->config.api().http().port(), 7001);
  EXPECT_EQ(options->config.api().http().host(), "::1");
  EXPECT_EQ(options->config.api().tcp().port(), 8001);
  EXPECT_EQ(options->config.model().path(), (folder.path() / "m").string());
  EXPECT_EQ(options->config.model().served_model_name(), "m");
}

TEST_F(OptionsTest, ApiKeyFlagBeatsEnvironmentBeatsFile) {
  const TemporaryFolder folder;
  const std::string file =
      folder.write("c.pbtxt", "model { path: \"m\" } api { api_key: \"from-file\" }").string();
  const auto keys = [](const Result<Options>& options) {
    EXPECT_TRUE(options.ok()) << options.status().to_string();
    return options->config.api().api_key();
  };
  EXPECT_THAT(keys(parse({"--config", file})), ElementsAre("from-file"));
  setenv("SPINDLE_API_KEY", "", 1);
  EXPECT_THAT(keys(parse({"--config", file})), ElementsAre("from-file"));
  setenv("SPINDLE_API_KEY", "from-environment", 1);
  EXPECT_THAT(keys(parse({"--config", file})), ElementsAre("from-environment"));
  EXPECT_THAT(keys(parse({"--config", file, "--api-key", "a", "--api-key", "b"})),
              ElementsAre("a", "b"));
}

TEST_F(OptionsTest, RelativeModelFlagIsTakenFromTheWorkingFolder) {
  const auto options = parse({"--model", "some/m"});
  ASSERT_TRUE(options.ok());
  EXPECT_EQ(options->config.model().path(), (std::filesystem::current_path() / "some/m").string());
}

TEST_F(OptionsTest, PrintConfigRoundTrips) {
  const auto options = parse({"--model", "/data/m", "--print-config", "--port", "9"});
  ASSERT_TRUE(options.ok());
  EXPECT_TRUE(options->print_config);
  const TemporaryFolder folder;
  const std::string file = folder.write("c.pbtxt", effective_config_text(options->config)).string();
  const auto again = parse({"--config", file});
  ASSERT_TRUE(again.ok()) << again.status().to_string();
  EXPECT_EQ(comparison_text(again->config), comparison_text(options->config));
}

TEST_F(OptionsTest, HelpAndVersion) {
  const auto help = parse({"--help"});
  ASSERT_TRUE(help.ok());
  for (const char* flag : {"--config", "--set", "--print-config", "--api-key", "--port"}) {
    EXPECT_THAT(help->text, HasSubstr(flag));
  }
  const auto version = parse({"--version"});
  ASSERT_TRUE(version.ok());
  EXPECT_EQ(version->text,
            version_text("spindled", build_info(), api::kProtocolMajor, api::kProtocolMinor));
  const auto tree = parse({"--cli-tree"});
  ASSERT_TRUE(tree.ok());
  EXPECT_THAT(tree->text, HasSubstr(R"("names":["--max-num-seqs"])"));
}

struct BadCommandLine {
  std::vector<std::string> arguments;
  std::string message;
};

class BadCommandLines : public testing::TestWithParam<BadCommandLine> {};

TEST_P(BadCommandLines, NameTheFlag) {
  const auto options = parse(GetParam().arguments);
  ASSERT_FALSE(options.ok());
  EXPECT_EQ(options.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(options.status().message(), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadCommandLines,
    testing::Values(
        BadCommandLine{{}, "model.path is not set"},
        BadCommandLine{{"--model", "m", "--prot", "1"}, "--prot"},
        BadCommandLine{{"--model", "m", "stray"}, "stray"}, BadCommandLine{{"--model"}, "--model"},
        BadCommandLine{{"--model", "m", "--port", "x"}, "--port: 'api.http.port' must be a 32-bit"},
        BadCommandLine{{"--model", "m", "--port", "-1"}, "api.http.port must be from 1 to 65535"},
        BadCommandLine{{"--model", "m", "--kv-cache-dtype", "fp8"},
                       "--kv-cache-dtype: 'kv.dtype' must be one of AUTO, F32, F16, BF16"},
        BadCommandLine{{"--model", "m", "--load-format", "gguf"}, "SAFETENSORS, DUMMY"},
        BadCommandLine{{"--model", "m", "--set", "api.http"}, "--set: 'api.http' must have"},
        BadCommandLine{{"--model", "m", "--set", "a.b=1"}, "--set: 'a.b'"},
        BadCommandLine{{"--model", "m", "--gpu-memory-utilization", "1.5"},
                       "compute.gpu_memory_utilization"},
        BadCommandLine{{"--model", "m", "--device", "abacus"}, "--device"},
        BadCommandLine{{"--config", "/"}, "is a directory"}));

TEST_F(OptionsTest, MissingConfigFile) {
  const auto options = parse({"--config", "none.pbtxt"});
  ASSERT_FALSE(options.ok());
  EXPECT_EQ(options.status().code(), StatusCode::kNotFound);
  EXPECT_THAT(options.status().message(), StartsWith("none.pbtxt: "));
}

}  // namespace
}  // namespace spindle::config
