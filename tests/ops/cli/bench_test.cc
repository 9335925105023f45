#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <set>

#include "ops/cli/bench_load.h"
#include "ops/cli/bench_summary.h"

namespace spindle::cli {
namespace {

TEST(BenchLoad, RandomPromptsHaveLengthsInRangeAndACommonPrefix) {
  const RandomDataset dataset{
      .input_tokens = 100, .output_tokens = 20, .prefix_tokens = 7, .range_ratio = 0.5};
  const auto prompts = random_prompts(dataset, 200, 1000, 3);
  ASSERT_EQ(prompts.size(), 200u);
  std::set<std::size_t> lengths;
  for (const BenchPrompt& prompt : prompts) {
    EXPECT_GE(prompt.tokens.size(), 57u);
    EXPECT_LE(prompt.tokens.size(), 157u);
    EXPECT_GE(prompt.output_tokens, 10);
    EXPECT_LE(prompt.output_tokens, 30);
    lengths.insert(prompt.tokens.size());
    for (std::size_t i = 0; i < 7; ++i) EXPECT_EQ(prompt.tokens[i], prompts[0].tokens[i]);
    for (const std::int32_t id : prompt.tokens) {
      EXPECT_GE(id, 0);
      EXPECT_LT(id, 1000);
    }
  }
  EXPECT_GT(lengths.size(), 50u);
  EXPECT_NE(prompts[0].tokens, prompts[1].tokens);
}

TEST(BenchLoad, OneSeedGivesOneLoad) {
  const auto a = random_prompts({}, 3, 5000, 1);
  const auto b = random_prompts({}, 3, 5000, 1);
  const auto c = random_prompts({}, 3, 5000, 2);
  EXPECT_EQ(a[2].tokens, b[2].tokens);
  EXPECT_NE(a[2].tokens, c[2].tokens);
  EXPECT_EQ(a[0].tokens.size(), 1024u);
  EXPECT_EQ(arrival_times({.rate = 5}, 9, 1), arrival_times({.rate = 5}, 9, 1));
  EXPECT_NE(arrival_times({.rate = 5}, 9, 1), arrival_times({.rate = 5}, 9, 2));
}

TEST(BenchLoad, CustomPromptsAreTakenAgainAndErrorsNameTheLine) {
  const auto prompts =
      custom_prompts("{\"prompt\": \"a\"}\n\n{\"prompt\": \"b\", \"output_len\": 3}\n", 5, 9);
  ASSERT_TRUE(prompts.ok()) << prompts.status().to_string();
  ASSERT_EQ(prompts->size(), 5u);
  EXPECT_EQ((*prompts)[0].text, "a");
  EXPECT_EQ((*prompts)[0].output_tokens, 9);
  EXPECT_EQ((*prompts)[3].text, "b");
  EXPECT_EQ((*prompts)[3].output_tokens, 3);
  for (const auto& [text, expected] :
       {std::pair{"{\"prompt\": \"a\"}\n{", "line 2: not JSON"},
        {"{\"prompt\": 1}", "line 1: no \"prompt\" with text"},
        {"[]", "line 1: no \"prompt\" with text"},
        {"{\"prompt\": \"a\", \"output_len\": 0}", "line 1: \"output_len\""},
        {" \n", "the dataset has no prompts"}}) {
    const auto bad = custom_prompts(text, 5, 9);
    ASSERT_FALSE(bad.ok()) << text;
    EXPECT_NE(bad.status().message().find(expected), std::string::npos)
        << bad.status().message() << " for " << text;
  }
}

TEST(BenchLoad, DocumentPromptsAreWholeCharacters) {
  std::string text;
  for (int i = 0; i < 500; ++i) text += i * i % 7 == 0 ? "é" : i * i % 11 < 6 ? "x" : "漢";
  const auto prompts = document_prompts(text, 50, 400, 8, 5);
  ASSERT_TRUE(prompts.ok()) << prompts.status().to_string();
  std::set<std::string> different;
  for (const BenchPrompt& prompt : *prompts) {
    EXPECT_GE(prompt.text.size(), 398u);
    EXPECT_LE(prompt.text.size(), 404u);
    EXPECT_NE(static_cast<unsigned char>(prompt.text[0]) & 0xc0U, 0x80U);
    different.insert(prompt.text);
    // A cut character would be an incomplete sequence: every first byte says how many follow.
    for (std::size_t i = 0; i < prompt.text.size();) {
      const auto byte = static_cast<unsigned char>(prompt.text[i]);
      i += byte < 0x80 ? 1 : byte < 0xe0 ? 2 : 3;
      ASSERT_LE(i, prompt.text.size());
    }
  }
  EXPECT_GT(different.size(), 40u);
  EXPECT_FALSE(document_prompts("short", 1, 400, 8, 5).ok());
}

// Mean and spread of the gaps are those of a gamma distribution.
TEST(BenchLoad, ArrivalsHaveTheRateAndTheBurstiness) {
  constexpr std::size_t kN = 20000;
  for (const double burstiness : {0.25, 1.0, 4.0}) {
    const auto times = arrival_times({.rate = 8, .burstiness = burstiness}, kN, 11);
    std::vector<double> gaps;
    for (std::size_t i = 1; i < kN; ++i) gaps.push_back(times[i] - times[i - 1]);
    const BenchStatistics statistics = statistics_of(gaps, {});
    EXPECT_NEAR(statistics.mean, 1 / 8.0, 0.01);
    EXPECT_NEAR(statistics.std, 1 / 8.0 / std::sqrt(burstiness), 0.02);
  }
  for (const double at : arrival_times({}, 5, 1)) EXPECT_EQ(at, 0);
}

TEST(BenchLoad, ARampChangesTheRate) {
  for (const auto ramp : {Arrivals::Ramp::kLinear, Arrivals::Ramp::kExponential}) {
    const auto times =
        arrival_times({.burstiness = 100, .ramp = ramp, .ramp_start = 1, .ramp_end = 100}, 2000, 4);
    EXPECT_NEAR(times[2] / 2, 1.0, 0.3);
    EXPECT_NEAR((times[1999] - times[1899]) / 100, 0.01, 0.003);
  }
}

BenchRecord answer(double sent, std::vector<double> at, double ended) {
  BenchRecord record;
  record.due = sent - 0.5;
  record.sent = sent;
  record.ended = ended;
  for (const double time : at) record.outputs.push_back({time, 1});
  record.prompt_tokens = 10;
  record.output_tokens = static_cast<std::int32_t>(at.size());
  return record;
}

TEST(BenchSummary, TimesOfARequest) {
  const BenchRecord record = answer(1.0, {1.2, 1.3, 1.5}, 1.6);
  EXPECT_NEAR(ttft_ms(record), 200, 1e-9);
  EXPECT_NEAR(e2el_ms(record), 600, 1e-9);
  EXPECT_NEAR(*tpot_ms(record), 200, 1e-9);  // (600 - 200) / 2
  EXPECT_FALSE(tpot_ms(answer(0, {0.1}, 0.1)).has_value());
}

TEST(BenchSummary, StatisticsAreThoseOfNumpy) {
  const BenchStatistics statistics = statistics_of({4, 1, 3, 2}, {0, 25, 90, 100});
  EXPECT_DOUBLE_EQ(statistics.mean, 2.5);
  EXPECT_DOUBLE_EQ(statistics.median, 2.5);
  EXPECT_NEAR(statistics.std, std::sqrt(1.25), 1e-12);
  EXPECT_DOUBLE_EQ(statistics.percentiles[0], 1);
  EXPECT_DOUBLE_EQ(statistics.percentiles[1], 1.75);
  EXPECT_NEAR(statistics.percentiles[2], 3.7, 1e-12);
  EXPECT_DOUBLE_EQ(statistics.percentiles[3], 4);
  EXPECT_DOUBLE_EQ(statistics_of({}, {99}).percentiles[0], 0);
}

TEST(BenchSummary, CountsOnlyWhatSucceeded) {
  std::vector<BenchRecord> records = {answer(0, {0.1, 0.2}, 0.2), answer(0.1, {0.5, 0.9}, 0.9),
                                      answer(0.3, {0.4}, 1.4)};
  records[2].error = "INTERNAL: the stream broke";
  BenchSummaryOptions options;
  options.metrics = {BenchMetric::kTtft, BenchMetric::kE2el};
  options.goals = {{BenchMetric::kTtft, 150}, {BenchMetric::kE2el, 500}};
  const BenchSummary summary = summarize(records, 2.0, options);
  EXPECT_EQ(summary.completed, 2u);
  EXPECT_EQ(summary.failed, 1u);
  EXPECT_EQ(summary.total_input_tokens, 20);
  EXPECT_EQ(summary.total_output_tokens, 4);
  EXPECT_DOUBLE_EQ(summary.request_throughput, 1.0);
  EXPECT_DOUBLE_EQ(summary.output_throughput, 2.0);
  EXPECT_DOUBLE_EQ(summary.total_token_throughput, 12.0);
  EXPECT_DOUBLE_EQ(summary.request_goodput.value(), 0.5);
  EXPECT_DOUBLE_EQ(summary.max_output_tokens_per_s, 4);
  EXPECT_EQ(summary.max_concurrent_requests, 2u);
  EXPECT_NEAR(summary.statistics[0].mean, 250, 1e-9);
  EXPECT_NEAR(summary.statistics[1].median, 500, 1e-9);

  const boost::json::object json = to_json(summary, options);
  EXPECT_EQ(json.at("completed").to_number<int>(), 2);
  EXPECT_NEAR(json.at("mean_ttft_ms").to_number<double>(), 250, 1e-9);
  EXPECT_NEAR(json.at("p99_e2el_ms").to_number<double>(), 794, 1e-9);
  const std::string text = report_text(summary, options, 4.0, 8);
  EXPECT_NE(text.find("Failed requests:                         1\n"), std::string::npos) << text;
  EXPECT_NE(text.find("Request goodput (req/s):                 0.50\n"), std::string::npos)
      << text;
  EXPECT_NE(text.find("P99 E2EL (ms):                           794.00\n"), std::string::npos)
      << text;
}

TEST(BenchSummary, GoalsAreReadOrRefused) {
  const auto goal = parse_goal("tpot:12.5");
  ASSERT_TRUE(goal.ok());
  EXPECT_EQ(goal->metric, BenchMetric::kTpot);
  EXPECT_DOUBLE_EQ(goal->limit_ms, 12.5);
  for (const char* text : {"", "ttft", "ttft:", "ttft:x", "ttft:-1", "ttft:1x", "itl:5", "a:1",
                           "ttft:inf", "ttft:nan"}) {
    EXPECT_FALSE(parse_goal(text).ok()) << text;
  }
}

}  // namespace
}  // namespace spindle::cli
