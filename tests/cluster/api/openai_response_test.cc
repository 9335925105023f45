#include "cluster/api/openai_response.h"

#include <gtest/gtest.h>

#include <boost/json.hpp>
#include <limits>
#include <string>

#include "cluster/api/openai_kv.h"
#include "cluster/api/openai_logprobs.h"

namespace spindle::api {
namespace {

OpenAiRequest request_of(OpenAiKind kind, bool logprobs = false, bool include_usage = false) {
  OpenAiRequest request;
  request.kind = kind;
  request.prompts.resize(1);
  request.n = 2;
  request.logprobs = logprobs;
  request.include_usage = include_usage;
  return request;
}

OutputDelta delta_of(std::string text, engine::FinishReason finish = engine::FinishReason::kNone) {
  OutputDelta delta;
  delta.choice = 1;
  delta.text = std::move(text);
  delta.finish = finish;
  return delta;
}

OutputTokenInfo token(std::string bytes, float logprob) {
  return {{1, std::move(bytes), logprob}, {}};
}

TEST(OpenAiWriter, WritesChatEvents) {
  OpenAiWriter writer(request_of(OpenAiKind::kChat), "r", 12, "m");
  const std::string head =
      R"({"id":"chatcmpl-r","object":"chat.completion.chunk","created":12,"model":"m",)"
      R"("system_fingerprint":null,"choices":[{"index":1,)";
  std::string out;
  writer.append_role(out, 1);
  EXPECT_EQ(out, "data: " + head +
                     R"("delta":{"role":"assistant","content":""},)"
                     R"("logprobs":null,"finish_reason":null}]})"
                     "\n\n");
  out.clear();
  OutputDelta last = delta_of("a\"b", engine::FinishReason::kStop);
  last.stop_reason = "7";
  last.stopped_by_token = true;
  writer.append_delta(out, last);
  EXPECT_EQ(out, "data: " + head +
                     R"("delta":{"content":"a\"b"},"logprobs":null,"finish_reason":null}]})"
                     "\n\ndata: " +
                     head +
                     R"("delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":7}]})"
                     "\n\n");
}

TEST(OpenAiWriter, WritesNothingForNothing) {
  for (const OpenAiKind kind : {OpenAiKind::kChat, OpenAiKind::kCompletion}) {
    OpenAiWriter writer(request_of(kind), "r", 12, "m");
    std::string out;
    writer.append_delta(out, delta_of(""));
    EXPECT_EQ(out, "");
  }
}

TEST(OpenAiWriter, WritesCompletionEventsAndUsage) {
  OpenAiWriter writer(request_of(OpenAiKind::kCompletion, false, true), "r", 12, "m");
  const std::string head = R"({"id":"cmpl-r","object":"text_completion","created":12,"model":"m",)"
                           R"("system_fingerprint":null,"choices":[)";
  std::string out;
  OutputDelta last = delta_of("x", engine::FinishReason::kStop);
  last.stop_reason = "END";
  writer.append_delta(out, last);
  EXPECT_EQ(out, "data: " + head +
                     R"({"index":1,"text":"x","logprobs":null,"finish_reason":"stop",)"
                     R"("stop_reason":"END"}],"usage":null})"
                     "\n\n");
  out.clear();
  writer.append_usage(out, {3, 4});
  EXPECT_EQ(out, "data: " + head +
                     R"(],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,)"
                     R"("prompt_tokens_details":{"cached_tokens":0}}})"
                     "\n\n");
}

TEST(OpenAiWriter, CountsTextOffsetsAcrossEvents) {
  OpenAiWriter writer(request_of(OpenAiKind::kCompletion, true), "r", 12, "m");
  std::string out;
  OutputDelta first = delta_of("aé");
  first.logprobs = {token("a", -1), token("\xc3", -1), token("\xa9", -1)};
  writer.append_delta(out, first);
  EXPECT_NE(out.find(R"("tokens":["a","bytes:\\xc3","bytes:\\xa9"])"), std::string::npos) << out;
  EXPECT_NE(out.find(R"("text_offset":[0,1,2])"), std::string::npos) << out;
  out.clear();
  OutputDelta second = delta_of("b");
  second.logprobs = {token("b", -std::numeric_limits<float>::infinity())};
  writer.append_delta(out, second);
  EXPECT_NE(out.find(R"("text_offset":[2])"), std::string::npos) << out;
  EXPECT_NE(out.find(R"("token_logprobs":[-9999])"), std::string::npos) << out;
}

TEST(OpenAiLogprobs, WritesEachTopTokenOnce) {
  OutputTokenInfo info = token("a", -0.5F);
  info.top = {{1, "a", -0.5F}, {2, "\xff", -1.5F}};
  std::string out;
  std::int64_t offset = 0;
  append_completion_logprobs(out, {info}, offset);
  EXPECT_NE(out.find(R"("top_logprobs":[{"a":-0.5,"bytes:\\xff":-1.5}])"), std::string::npos)
      << out;
  out.clear();
  append_chat_logprobs(out, {info});
  EXPECT_EQ(out,
            R"({"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":[)"
            R"({"token":"a","logprob":-0.5,"bytes":[97]},)"
            "{\"token\":\"\xEF\xBF\xBD\",\"logprob\":-1.5,\"bytes\":[255]}]}],\"refusal\":null}");
}

TEST(OpenAiWriter, MergesDeltas) {
  OutputDelta into = delta_of("a");
  into.token_ids = {1};
  OutputDelta from = delta_of("b", engine::FinishReason::kLength);
  from.token_ids = {2};
  from.logprobs = {token("b", -1)};
  merge_delta(into, from);
  merge_delta(into, delta_of(""));
  EXPECT_EQ(into.text, "ab");
  EXPECT_EQ(into.token_ids, (std::vector<std::int32_t>{1, 2}));
  EXPECT_EQ(into.logprobs.size(), 1u);
  EXPECT_EQ(into.finish, engine::FinishReason::kLength);
}

TEST(OpenAiWriter, WritesBodies) {
  OpenAiWriter writer(request_of(OpenAiKind::kChat), "r", 12, "m");
  OutputDelta choice = delta_of("hi", engine::FinishReason::kLength);
  const auto body = boost::json::parse(writer.body({choice}, {1, 2}));
  EXPECT_EQ(body.at("object").as_string(), "chat.completion");
  EXPECT_EQ(body.at_pointer("/choices/0/message/content").as_string(), "hi");
  EXPECT_EQ(body.at_pointer("/choices/0/finish_reason").as_string(), "length");
  EXPECT_EQ(body.at_pointer("/usage/total_tokens").as_int64(), 3);
}

TEST(OpenAiWriter, WritesWhatBecameOfTheKv) {
  OpenAiWriter writer(request_of(OpenAiKind::kChat), "r", 12, "m");
  UsageCounts usage{.prompt_tokens = 9, .completion_tokens = 2, .cached_tokens = 7};
  const engine::StageKvUse first{
      .stage = 0, .full_bytes = 300, .kept_bytes = 60, .layers = {{0, 100, 10}, {1, 200, 50}}};
  const engine::StageKvUse second{
      .stage = 1, .full_bytes = 100, .kept_bytes = 20, .layers = {{2, 100, 20}}};
  add_kv_use(usage.kv, {second});
  add_kv_use(usage.kv, {first, second});  // another prompt of the same request
  const auto body = boost::json::parse(writer.body({delta_of("hi")}, usage));
  EXPECT_EQ(body.at_pointer("/usage/prompt_tokens_details/cached_tokens").as_int64(), 7);
  EXPECT_EQ(boost::json::serialize(body.at_pointer("/usage/spindle_kv")),
            R"({"full_bytes":500,"kept_bytes":100,"ratio":2E-1,"stages":[)"
            R"({"stage":1,"full_bytes":200,"kept_bytes":40,"layers":[)"
            R"({"layer":2,"full_bytes":200,"kept_bytes":40}]},)"
            R"({"stage":0,"full_bytes":300,"kept_bytes":60,"layers":[)"
            R"({"layer":0,"full_bytes":100,"kept_bytes":10},)"
            R"({"layer":1,"full_bytes":200,"kept_bytes":50}]}]})");
}

TEST(OpenAiWriter, NoKvBytesAreARatioOfOne) {
  std::string out;
  append_kv_use(out, {{.stage = 0, .full_bytes = 0, .kept_bytes = 0, .layers = {}}});
  EXPECT_EQ(boost::json::parse(out).at("ratio").as_double(), 1.0);
}

}  // namespace
}  // namespace spindle::api
