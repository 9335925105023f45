// The parts of the client program that need no server.

#include <gtest/gtest.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <string>
#include <vector>

#include "ops/cli/input.h"
#include "ops/cli/kv_chart.h"
#include "ops/cli/options.h"
#include "ops/cli/output.h"
#include "ops/cli/stats.h"
#include "ops/cli/terminal.h"

namespace spindle::cli {
namespace {

TEST(Utf8, Accepts) {
  for (const std::string& text : std::vector<std::string>{
           "", "plain", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "\xED\x9F\xBF",
           "\xEE\x80\x80", "\xF4\x8F\xBF\xBF", std::string("nul\0", 4)}) {
    EXPECT_TRUE(check_utf8(text, "it").ok()) << text;
  }
}

TEST(Utf8, Refuses) {
  for (const std::string& text : std::vector<std::string>{
           "\x80", "\xC0\x80", "\xC1\xBF", "\xC3", "\xC3(", "\xE0\x9F\xBF", "\xED\xA0\x80",
           "\xE2\x82", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF"}) {
    const Status status = check_utf8("ab" + text, "it");
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.message(), "it is not UTF-8 text (at byte 2)");
  }
}

TEST(Input, Files) {
  const std::string path = testing::TempDir() + "/spindle_cli_input.txt";
  std::ofstream(path) << "text";
  EXPECT_EQ(read_text_file(path).value(), "text");
  std::ofstream(path) << std::string(kMaxInputBytes, 'x');
  EXPECT_TRUE(read_text_file(path).ok());
  std::ofstream(path) << std::string(kMaxInputBytes + 1, 'x');
  EXPECT_EQ(read_text_file(path).status().code(), StatusCode::kTooLarge);
  EXPECT_EQ(read_text_file(path + "-none").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(read_text_file(testing::TempDir()).status().code(), StatusCode::kInvalidArgument);
  ::unlink(path.c_str());
}

TEST(Terminal, Printable) {
  EXPECT_EQ(printable("a\tb\nc"), "a\tb\nc");
  EXPECT_EQ(printable("\x1b[31mred\x07\r\x7f"), "[31mred");
  EXPECT_EQ(printable("\xC2\x9B"
                      "31m"),
            "31m");
  EXPECT_EQ(printable("\xC2\xA0\xC3\xA9\xE2\x82\xAC"), "\xC2\xA0\xC3\xA9\xE2\x82\xAC");
}

TEST(Terminal, StyleIsOffWhenDisabled) {
  EXPECT_EQ(Style(false).red("x"), "x");
  EXPECT_EQ(Style(true).red("x"), "\x1b[31mx\x1b[0m");
}

TEST(Terminal, LineReader) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const std::string text = "one\n\ntwo three\nlast";
  ASSERT_EQ(::write(ends[1], text.data(), text.size()), static_cast<ssize_t>(text.size()));
  ::close(ends[1]);
  const InterruptSignal interrupt;
  LineReader reader(ends[0], 100);
  std::string line;
  for (const std::string expected : {"one", "", "two three", "last"}) {
    ASSERT_EQ(reader.read(interrupt, line), LineReader::Outcome::kLine);
    EXPECT_EQ(line, expected);
  }
  EXPECT_EQ(reader.read(interrupt, line), LineReader::Outcome::kEnd);
  ::close(ends[0]);
}

TEST(Terminal, LineReaderLimitAndInterrupt) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const InterruptSignal interrupt;
  LineReader reader(ends[0], 4);
  std::string line;
  ::kill(::getpid(), SIGINT);
  EXPECT_EQ(reader.read(interrupt, line), LineReader::Outcome::kInterrupted);
  ASSERT_EQ(::write(ends[1], "12345", 5), 5);
  EXPECT_EQ(reader.read(interrupt, line), LineReader::Outcome::kTooLong);
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST(Output, Units) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(1023), "1023 B");
  EXPECT_EQ(format_bytes(1536), "1.5 KiB");
  EXPECT_EQ(format_bytes(3ULL << 40U), "3.0 TiB");
  EXPECT_EQ(format_bytes(UINT64_MAX), "16384.0 PiB");
  EXPECT_EQ(format_seconds(0.25), "0.2 s");
  EXPECT_EQ(format_seconds(182), "3 min 2 s");
  EXPECT_EQ(format_seconds(7500), "2 h 5 min");
}

TEST(Output, UsageWithoutKvOrTokens) {
  api::v1::Usage usage;
  usage.set_prompt_tokens(4);
  EXPECT_EQ(usage_line(usage), "prompt 4 tokens, output 0 tokens, first token after 0 ms");
}

api::v1::Usage usage_with_layers() {
  api::v1::Usage usage;
  for (const int stage : {1, 0}) {  // whatever the order of the stages
    api::v1::StageKv& kv = *usage.add_kv();
    kv.set_stage(stage);
    for (int i = 0; i < 6; ++i) {
      api::v1::LayerKvUse& layer = *kv.add_layers();
      layer.set_layer(6 * stage + i);
      layer.set_full_bytes(396 << 10);
      // 0, 1/12, ... 11/12 of it
      layer.set_kept_bytes(static_cast<std::uint64_t>(33 << 10) *
                           static_cast<std::uint64_t>(6 * stage + i));
    }
  }
  return usage;
}

TEST(KvChart, OneLineForEachLayer) {
  const std::string chart = kv_chart(usage_with_layers(), Style(false), /*utf8=*/true);
  EXPECT_TRUE(
      chart.starts_with("layer  0                          0.0 %         0 B of 396.0 KiB\n"
                        "layer  1  █▋                      8.3 %    33.0 KiB of 396.0 KiB\n"))
      << chart;
  EXPECT_NE(chart.find("layer  6  ██████████             50.0 %   198.0 KiB of 396.0 KiB\n"),
            std::string::npos)
      << chart;
  EXPECT_TRUE(
      chart.ends_with("layer 11  ██████████████████▍    91.7 %   363.0 KiB of 396.0 KiB\n"
                      "all       █████████▏             45.8 %     2.1 MiB of 4.6 MiB\n"))
      << chart;
}

TEST(KvChart, WithoutUtf8AndWithColours) {
  const std::string chart = kv_chart(usage_with_layers(), Style(false), /*utf8=*/false);
  for (const char c : chart) EXPECT_LT(static_cast<unsigned char>(c), 0x7F);
  EXPECT_NE(chart.find("layer  1  ##                      8.3 % "), std::string::npos) << chart;
  const std::string colours = kv_chart(usage_with_layers(), Style(true), /*utf8=*/false);
  EXPECT_NE(colours.find("\x1b[32m##  "), std::string::npos) << colours;
}

TEST(KvChart, SmallestAndLargestShares) {
  const auto chart = [](std::uint64_t full, std::uint64_t kept, bool utf8) {
    api::v1::Usage usage;
    api::v1::LayerKvUse& layer = *usage.add_kv()->add_layers();
    layer.set_full_bytes(full);
    layer.set_kept_bytes(kept);
    const std::string text = kv_chart(usage, Style(false), utf8);
    return text.substr(0, text.find('\n'));
  };
  EXPECT_EQ(chart(0, 0, true), "layer 0                          0.0 %   0 B of 0 B");
  EXPECT_EQ(chart(1000000, 1, true).substr(0, 13), "layer 0  ▏ ");
  EXPECT_EQ(chart(1000000, 1, false).substr(0, 11), "layer 0  - ");
  // Pages round up, so small contexts can hold more than their tokens.
  EXPECT_EQ(chart(100, 130, false), "layer 0  ####################  130.0 %   130 B of 100 B");
  EXPECT_EQ(chart(1, UINT64_MAX, false).substr(0, 31), "layer 0  ####################  ");
}

TEST(KvChart, NoLayers) {
  EXPECT_EQ(kv_chart({}, Style(false), true), "the server did not report the KV of the layers\n");
}

TEST(Output, UsageNamesCachedTokens) {
  api::v1::Usage usage;
  usage.set_prompt_tokens(4);
  usage.set_cached_tokens(3);
  EXPECT_TRUE(usage_line(usage).starts_with("prompt 4 tokens (3 cached), output"))
      << usage_line(usage);
}

TEST(Options, EveryKvOptionIsSent) {
  CLI::App app;
  KvOptions options;
  add_kv_options(app, options);
  app.parse("--kv-policy streaming --kv-ratio 0.25 --session s --keep-session", false);
  api::v1::GenerateRequest request;
  ASSERT_TRUE(set_kv_fields(options, request).ok());
  EXPECT_EQ(request.kv_policy().profile(), "streaming");
  EXPECT_EQ(request.kv_policy().ratio(), 0.25);
  EXPECT_EQ(request.session_id(), "s");
  EXPECT_TRUE(request.keep_session());

  CLI::App bytes_app;
  KvOptions bytes;
  add_kv_options(bytes_app, bytes);
  bytes_app.parse("--kv-max-bytes 4096", false);
  api::v1::GenerateRequest bytes_request;
  ASSERT_TRUE(set_kv_fields(bytes, bytes_request).ok());
  EXPECT_EQ(bytes_request.kv_policy().max_bytes(), 4096U);
  EXPECT_EQ(bytes_request.kv_policy().profile(), "");

  api::v1::GenerateRequest nothing;
  ASSERT_TRUE(set_kv_fields({}, nothing).ok());
  EXPECT_EQ(nothing.ByteSizeLong(), 0U);
  EXPECT_FALSE(
      set_kv_fields({.profile = "\xFF", .ratio = {}, .max_bytes = {}, .session = {}}, nothing)
          .ok());
}

TEST(Options, KvOptionsThatDoNotGoTogether) {
  for (const char* wrong :
       {"--kv-ratio 0.5 --kv-max-bytes 9", "--keep-session", "--kv-max-bytes -1"}) {
    CLI::App app;
    KvOptions options;
    add_kv_options(app, options);
    EXPECT_THROW(app.parse(wrong, false), CLI::ParseError) << wrong;
  }
}

TEST(Options, EverySamplingOptionIsSent) {
  CLI::App app;
  SamplingOptions options;
  add_sampling_options(app, options);
  app.parse(
      "--max-tokens 1 --min-tokens 2 --temperature 0.5 --top-k 3 --top-p 0.25 --min-p 0.125 "
      "--repetition-penalty 1.5 --presence-penalty -1 --frequency-penalty 2 --logit-bias 7:-2.5 "
      "--logit-bias 8:1 --seed 18446744073709551615 --stop a --stop b --stop-token-id 4 "
      "--include-stop --ignore-eos --keep-special-tokens --logprobs 5 --n 6",
      false);
  const Result<api::v1::SamplingParams> result = to_sampling_params(options, {.json = true});
  ASSERT_TRUE(result.ok());
  const api::v1::SamplingParams& params = *result;
  // Every field of the message has an option.
  std::vector<const google::protobuf::FieldDescriptor*> set;
  params.GetReflection()->ListFields(params, &set);
  EXPECT_EQ(static_cast<int>(set.size()), api::v1::SamplingParams::descriptor()->field_count());
  EXPECT_EQ(params.max_tokens(), 1);
  EXPECT_EQ(params.min_tokens(), 2);
  EXPECT_EQ(params.top_k(), 3);
  EXPECT_EQ(params.top_p(), 0.25F);
  EXPECT_EQ(params.min_p(), 0.125F);
  EXPECT_EQ(params.presence_penalty(), -1.0F);
  EXPECT_EQ(params.frequency_penalty(), 2.0F);
  EXPECT_EQ(params.repetition_penalty(), 1.5F);
  EXPECT_EQ(params.logit_bias().at(7), -2.5F);
  EXPECT_EQ(params.logit_bias().at(8), 1.0F);
  EXPECT_EQ(params.seed(), UINT64_MAX);
  EXPECT_EQ(params.stop_size(), 2);
  EXPECT_EQ(params.stop_token_ids(0), 4);
  EXPECT_TRUE(params.include_stop_str_in_output());
  EXPECT_TRUE(params.ignore_eos());
  EXPECT_FALSE(params.skip_special_tokens());
  EXPECT_EQ(params.logprobs(), 5);
  EXPECT_EQ(params.n(), 6);
}

TEST(Options, UnsetStaysUnset) {
  const Result<api::v1::SamplingParams> params = to_sampling_params({}, {});
  ASSERT_TRUE(params.ok());
  EXPECT_EQ(params->ByteSizeLong(), 0U);
}

TEST(Options, MalformedLogitBias) {
  for (const std::string entry : {"5", "5:", ":1", "a:1", "5:x", "5:1:2", "99999999999:1"}) {
    SamplingOptions options;
    options.logit_bias = {entry};
    EXPECT_FALSE(to_sampling_params(options, {}).ok()) << entry;
  }
}

TEST(Stats, TableOfAnEmptyCluster) {
  const std::string table = stats_table(api::v1::Stats(), true);
  EXPECT_NE(table.find("0 running, 0 waiting"), std::string::npos);
  EXPECT_NE(table.find("stage  host"), std::string::npos);
}

}  // namespace
}  // namespace spindle::cli
