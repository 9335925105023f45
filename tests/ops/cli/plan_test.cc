#include "ops/cli/plan.h"
#include "tests/source_dir.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>

namespace spindle::cli {
namespace {

using testing::AllOf;
using testing::HasSubstr;

const std::string kModels = source_dir() + "/models/";

// As main() has it.
Result<PlanQuestion> ask(const std::string& flags) {
  CLI::App app("test", "plan");
  PlanOptions options;
  add_plan_options(app, options);
  app.parse(flags);
  return read_plan_question(options);
}
std::string error_of(const std::string& flags) {
  try {
    return ask(flags).status().message();
  } catch (const CLI::ParseError& error) {
    return error.what();
  }
}
std::string model(const std::string& name) { return "--model " + kModels + name + " "; }
const std::string kEight = model("shapes/llama-3-8b");

TEST(ParseMemory, TakesSizesWithTheirUnit) {
  EXPECT_EQ(*parse_memory("--m", "80GiB"), 80ULL << 30);
  EXPECT_EQ(*parse_memory("--m", "24GB"), 24'000'000'000U);
  EXPECT_EQ(*parse_memory("--m", "1.5 MiB"), 3U << 19);
  EXPECT_EQ(*parse_memory("--m", "77"), 77U);
  for (const char* wrong : {"", "GiB", "80gib", "80GiB ", "-3GB", "0", "nan", "inf", "600TiB",
                            "1e400", "80,0GiB", "0x10"}) {
    EXPECT_THAT(parse_memory("--m", wrong).status().message(),
                AllOf(HasSubstr("--m"), HasSubstr(std::string("\"") + wrong + "\"")));
  }
}

TEST(PlanQuestion, TakesFlags) {
  const auto question = ask(kEight +
                            "--gpus 4 --gpu-memory 24GiB --gpu-memory-utilization 0.8 --context "
                            "8192 --output 256 --profile spindle --ratio 0.15 --dtype bfloat16 "
                            "--max-num-batched-tokens 2048 --layers-per-stage 7,8,8,9");
  ASSERT_TRUE(question.ok()) << question.status().to_string();
  EXPECT_EQ(question->model_name, "llama-3-8b");
  EXPECT_EQ(question->n_weights, 8'030'261'248);
  const coordinator::ClusterSettings& settings = question->cluster.settings;
  EXPECT_EQ(settings.device, coordinator::ComputeDevice::kCuda);
  EXPECT_DOUBLE_EQ(settings.gpu_memory_utilization, 0.8);
  EXPECT_EQ(settings.kv_dtype, DType::kBF16);
  EXPECT_EQ(settings.max_num_batched_tokens, 2048);
  EXPECT_EQ(settings.layers_per_stage, (std::vector<int>{7, 8, 8, 9}));
  ASSERT_EQ(question->cluster.devices.size(), 4U);
  EXPECT_EQ(question->cluster.devices[3].total_bytes, 24ULL << 30);
  EXPECT_EQ(question->kind.prompt_tokens, 8192);
  EXPECT_EQ(question->kind.policy.profile, kvstore::KvProfile::kSpindle);
  EXPECT_DOUBLE_EQ(question->kind.policy.ratio, 0.15);
}

TEST(PlanQuestion, TakesAConfigurationAndChangesIt) {
  const std::string config =
      "--config " + source_dir() + "/configs/mini-cpu.pbtxt --context 1000 --ranks 2 ";
  auto question = ask(config);
  ASSERT_TRUE(question.ok()) << question.status().to_string();
  EXPECT_EQ(question->cluster.settings.device, coordinator::ComputeDevice::kCpu);
  EXPECT_EQ(question->model_name, "spindle-mini");
  question = ask(config + "--set scheduler.max_num_seqs=7 --device-memory 100MB,50MB");
  ASSERT_TRUE(question.ok()) << question.status().to_string();
  EXPECT_EQ(question->cluster.settings.max_num_seqs, 7);
  EXPECT_EQ(question->cluster.settings.device_memory_bytes,
            (std::vector<std::int64_t>{100'000'000, 50'000'000}));
}

TEST(PlanQuestion, ErrorsNameTheFlagAndItsValue) {
  EXPECT_THAT(error_of("--context 100 --gpus 1 --gpu-memory 1GiB"), HasSubstr("--model FOLDER"));
  EXPECT_THAT(error_of(kEight + "--context 100"), HasSubstr("--gpus N"));
  EXPECT_THAT(error_of(kEight + "--context 100 --gpus 2"), HasSubstr("--gpu-memory"));
  EXPECT_THAT(error_of(kEight + "--context 0 --gpus 2"), HasSubstr("--context"));
  EXPECT_THAT(error_of(kEight + "--context 100 --gpus 0"), HasSubstr("--gpus"));
  EXPECT_THAT(error_of(kEight + "--context 100 --gpus 2 --gpu-memory lots"),
              AllOf(HasSubstr("--gpu-memory"), HasSubstr("\"lots\"")));
  EXPECT_THAT(error_of(kEight + "--context 100 --gpus 3 --device-memory 8GiB,8GiB"),
              HasSubstr("--device-memory has 2 entries for 3 devices"));
  EXPECT_THAT(error_of(kEight + "--context 9 --gpus 1 --gpu-memory 8GiB --device-memory 8GiB"),
              HasSubstr("either --gpu-memory or --device-memory"));
  EXPECT_THAT(error_of(kEight + "--context 9 --gpus 1 --gpu-memory 80GiB --max-num-seqs 0"),
              AllOf(HasSubstr("--max-num-seqs 0"), HasSubstr("must be from 1")));
  EXPECT_THAT(error_of(kEight + "--context 9 --gpus 1 --gpu-memory 80GiB --profile best"),
              AllOf(HasSubstr("'best'"), HasSubstr("spindle")));
  EXPECT_THAT(error_of(kEight + "--context 9 --gpus 1 --gpu-memory 80GiB --dtype int3"),
              HasSubstr("--dtype int3"));
  EXPECT_THAT(error_of(kEight + "--context 9 --gpus 1 --gpu-memory 8GiB --device-bandwidth fast"),
              HasSubstr("--device-bandwidth fast"));
  EXPECT_THAT(error_of(kEight + "--context 9 --ranks 1 --device cpu --gpu-memory 8GiB"),
              HasSubstr("--gpu-memory 8GiB with --device cpu"));
  EXPECT_THAT(error_of("--model /nowhere --context 9 --gpus 1 --gpu-memory 8GiB"),
              HasSubstr("/nowhere"));
  EXPECT_THAT(error_of(kEight + "--context 9 --gpus 1 --gpu-memory 8GiB --set a.b=c"),
              HasSubstr("--set a.b=c"));
}

TEST(PlanAnswer, ComparesWithTheFullProfile) {
  const auto question =
      ask(kEight + "--gpus 1 --gpu-memory 80GiB --context 32768 --profile spindle --ratio 0.1");
  ASSERT_TRUE(question.ok()) << question.status().to_string();
  const auto answer = answer_plan(*question, std::nullopt);
  ASSERT_TRUE(answer.ok()) << answer.status().to_string();
  ASSERT_TRUE(answer->full.has_value());
  EXPECT_GT(answer->requests.concurrency, 3 * answer->full->concurrency);
  const std::string text = plan_text(*question, *answer, std::nullopt);
  EXPECT_THAT(text,
              AllOf(HasSubstr("llama-3-8b: 32 layers"), HasSubstr("profile spindle at 10.0 %"),
                    HasSubstr("profile full: "), HasSubstr("No calibrated table")));
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 120U) << line;
  const boost::json::object json = plan_json(*question, *answer, std::nullopt);
  EXPECT_EQ(json.at("requests").at("concurrency").to_number<std::int64_t>(),
            answer->requests.concurrency);
  EXPECT_EQ(json.at("stages").as_array().size(), 1U);
  EXPECT_EQ(json.at("requests").at("boundaries").as_array().size(), 8U);
  EXPECT_TRUE(json.at("stages").at(0).at("kv_pool_is_estimate").as_bool());
}

TEST(PlanAnswer, SaysWhatWouldFit) {
  const auto question =
      ask(kEight + "--gpus 2 --gpu-memory 24GiB --context 32768 --profile spindle --ratio 0.25");
  ASSERT_TRUE(question.ok()) << question.status().to_string();
  const auto answer = answer_plan(*question, 30);
  ASSERT_TRUE(answer.ok()) << answer.status().to_string();
  ASSERT_TRUE(answer->remedies.has_value());
  EXPECT_THAT(plan_text(*question, *answer, 30),
              AllOf(HasSubstr("is the slowest, with "),
                    HasSubstr("--concurrency 30: does not fit; any one of these"),
                    HasSubstr("--gpu-memory "), HasSubstr("--gpus "), HasSubstr("--ratio 0.")));
  const auto fits = answer_plan(*question, 2);
  ASSERT_TRUE(fits.ok());
  EXPECT_THAT(plan_text(*question, *fits, 2), HasSubstr("--concurrency 2: fits"));
  EXPECT_TRUE(plan_json(*question, *fits, 2).at("concurrency").at("fits").as_bool());
}

TEST(PlanAnswer, MoreSequencesThanAreLetRunNeedTheFlag) {
  const auto question =
      ask(model("spindle-mini") + "--gpus 1 --gpu-memory 80GiB --context 1000 --max-num-seqs 4");
  ASSERT_TRUE(question.ok()) << question.status().to_string();
  const auto answer = answer_plan(*question, 9);
  ASSERT_TRUE(answer.ok()) << answer.status().to_string();
  EXPECT_THAT(plan_text(*question, *answer, 9), AllOf(HasSubstr("limited by max_num_seqs 4"),
                                                      HasSubstr("it needs --max-num-seqs 9\n")));
  const boost::json::object json = plan_json(*question, *answer, 9);
  EXPECT_EQ(boost::json::serialize(json.at("concurrency").at("would_fit")), "{\"max_num_seqs\":9}");
}

TEST(PlanAnswer, AnImpossiblePlanSaysByHowMuch) {
  const auto question = ask(kEight + "--gpus 1 --gpu-memory 16GiB --context 4096");
  ASSERT_TRUE(question.ok()) << question.status().to_string();
  const auto answer = answer_plan(*question, std::nullopt);
  EXPECT_EQ(answer.status().code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(answer.status().message(), HasSubstr("lacks "));
  const PlanRemedies remedies = find_remedies(*question, 0);
  ASSERT_TRUE(remedies.device_memory && remedies.n_devices);
  EXPECT_GT(remedies.device_memory->front(), 16ULL << 30);
  EXPECT_GE(*remedies.n_devices, 2);
  EXPECT_THAT(remedies_text(*question, remedies), HasSubstr("  --gpus "));
}

}  // namespace
}  // namespace spindle::cli
