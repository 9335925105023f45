#include "cluster/api/tcp_messages.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "cluster/api/framing.h"
#include "cluster/api/tcp_errors.h"

namespace spindle::api {
namespace {

TEST(TcpErrors, EveryCodeTravelsBothWays) {
  for (int value = 0; value <= static_cast<int>(StatusCode::kInternal); ++value) {
    const auto code = static_cast<StatusCode>(value);
    EXPECT_EQ(status_code_of(error_code_of(code)), code) << status_code_name(code);
    if (code != StatusCode::kCancelled) {
      EXPECT_EQ(v1::ErrorCode_Name(error_code_of(code)), status_code_name(code));
    }
  }
  EXPECT_EQ(status_code_of(static_cast<v1::ErrorCode>(99)), StatusCode::kInternal);
}

TEST(TcpErrors, AnErrorIsNeverOk) {
  EXPECT_EQ(status_of(v1::Error()).code(), StatusCode::kInternal);
}

TEST(TcpMessages, LongErrorTextIsCutAtACharacter) {
  std::string text(kMaxErrorMessageBytes - 1, 'a');
  text += "\xC3\xA9\xC3\xA9";  // the first crosses the limit
  const v1::Error error = to_message(ApiError{invalid_argument(text)});
  EXPECT_EQ(error.message(), std::string(kMaxErrorMessageBytes - 1, 'a') + "...");
  const std::string exact(kMaxErrorMessageBytes, 'b');
  EXPECT_EQ(to_message(ApiError{invalid_argument(exact)}).message(), exact);
}

TEST(TcpMessages, ParamNamesFollowTheMessage) {
  EXPECT_EQ(to_message(ApiError{invalid_argument(""), "top_p"}).param(), "sampling.top_p");
  EXPECT_EQ(to_message(ApiError{invalid_argument(""), "model"}).param(), "model");
  EXPECT_EQ(to_message(ApiError{invalid_argument("")}).param(), "");
}

TEST(TcpMessages, Delta) {
  OutputDelta delta;
  delta.choice = 2;
  delta.text = "hi";
  delta.token_ids = {5, 6};
  delta.logprobs = {{.chosen = {5, "h\xFF", -1.0F}, .top = {{5, "h\xFF", -1.0F}, {7, "x", -2.0F}}}};
  delta.finish = engine::FinishReason::kLength;
  const v1::Delta message = to_message(std::move(delta));
  EXPECT_EQ(message.choice(), 2);
  EXPECT_EQ(message.text(), "hi");
  EXPECT_EQ(message.token_ids_size(), 2);
  ASSERT_EQ(message.logprobs_size(), 1);
  EXPECT_EQ(message.logprobs(0).chosen().text(), "h\xFF");  // bytes, not text
  ASSERT_EQ(message.logprobs(0).top_size(), 2);
  EXPECT_EQ(message.logprobs(0).top(1).id(), 7);
  EXPECT_EQ(message.finish_reason(), v1::LENGTH);
}

TEST(TcpMessages, EmptyChatAndTokens) {
  v1::GenerateRequest chat;
  chat.mutable_chat();
  const ParsedRequest empty_chat = to_generate_request(std::move(chat));
  EXPECT_TRUE(empty_chat.error.status.ok());  // the service refuses it, with its own words
  EXPECT_TRUE(std::get<ChatPrompt>(empty_chat.request.prompt).messages.empty());
  v1::GenerateRequest tokens;
  tokens.mutable_tokens()->add_ids(3);
  tokens.mutable_tokens()->add_ids(-1);
  EXPECT_EQ(
      std::get<std::vector<std::int32_t>>(to_generate_request(std::move(tokens)).request.prompt),
      (std::vector<std::int32_t>{3, -1}));
}

TEST(TcpMessages, WhatARequestSaysAboutItsKv) {
  v1::GenerateRequest message;
  message.set_text("x");
  v1::KvPolicy& policy = *message.mutable_kv_policy();
  policy.set_profile("streaming");
  policy.set_ratio(0.25);
  policy.set_sinks(0);
  policy.set_window(9);
  message.add_compress_at(3);
  message.add_compress_at(-1);  // the service's to refuse
  message.set_session_id("s");
  message.set_priority(-7);
  message.set_timeout_ms(1500);
  message.set_keep_session(true);
  message.mutable_prompt_scores()->set_first(2);
  message.mutable_prompt_scores()->set_end(5);
  message.mutable_prompt_scores()->set_dense(true);
  const GenerateRequest request = to_generate_request(std::move(message)).request;
  ASSERT_TRUE(request.kv_policy.has_value());
  EXPECT_EQ(request.kv_policy->profile, "streaming");
  EXPECT_EQ(request.kv_policy->ratio, 0.25);
  EXPECT_FALSE(request.kv_policy->max_bytes.has_value());
  EXPECT_EQ(request.kv_policy->sinks, 0);
  EXPECT_FALSE(request.kv_policy->recent.has_value());
  EXPECT_EQ(request.kv_policy->window, 9);
  EXPECT_EQ(request.compress_at, (std::vector<std::int64_t>{3, -1}));
  EXPECT_EQ(request.session_id, "s");
  EXPECT_EQ(request.priority, -7);
  EXPECT_EQ(request.timeout_ms, 1500);
  EXPECT_TRUE(request.keep_session);
  ASSERT_TRUE(request.prompt_scores.has_value());
  EXPECT_EQ(request.prompt_scores->first, 2);
  EXPECT_EQ(request.prompt_scores->end, 5);
  EXPECT_TRUE(request.prompt_scores->dense);

  v1::GenerateRequest plain;
  plain.set_text("x");
  const GenerateRequest none = to_generate_request(std::move(plain)).request;
  EXPECT_FALSE(none.kv_policy.has_value());
  EXPECT_FALSE(none.prompt_scores.has_value());
}

TEST(TcpMessages, BytesBeyondSignedNumbersStayHuge) {
  v1::GenerateRequest message;
  message.mutable_kv_policy()->set_max_bytes(std::numeric_limits<std::uint64_t>::max());
  const GenerateRequest request = to_generate_request(std::move(message)).request;
  EXPECT_EQ(request.kv_policy->max_bytes, std::numeric_limits<std::int64_t>::max());
}

TEST(TcpMessages, ChatMessagesThatCompress) {
  v1::GenerateRequest message;
  for (const bool compress : {false, true, false, true}) {
    v1::ChatMessage& turn = *message.mutable_chat()->add_messages();
    turn.set_role("user");
    turn.set_compress(compress);
  }
  const GenerateRequest request = to_generate_request(std::move(message)).request;
  EXPECT_EQ(std::get<ChatPrompt>(request.prompt).compress_after, (std::vector<std::size_t>{1, 3}));
}

TEST(TcpMessages, UsageSaysWhatBecameOfTheKv) {
  engine::RequestSummary summary;
  summary.cached_tokens = 40;
  summary.kv = {{.stage = 1, .full_bytes = 200, .kept_bytes = 30, .layers = {{6, 200, 30}}}};
  engine::HeadKvUse head{.layer = 6,
                         .kv_head = 1,
                         .plan = "EVICT int4/int4",
                         .kept_tokens = 12,
                         .bytes = 15,
                         .lazy_mass = 0.5,
                         .k_entries_per_token = {},
                         .v_entries_per_token = 0.25};
  summary.boundaries = {
      {.position = 64, .full_bytes = 100, .kept_bytes = 15, .compress_ms = 1.5, .heads = {head}}};
  const v1::Usage usage = to_message(summary);
  EXPECT_EQ(usage.cached_tokens(), 40);
  ASSERT_EQ(usage.kv_size(), 1);
  ASSERT_EQ(usage.kv(0).layers_size(), 1);
  EXPECT_EQ(usage.kv(0).layers(0).layer(), 6);
  EXPECT_EQ(usage.kv(0).layers(0).full_bytes(), 200U);
  EXPECT_EQ(usage.kv(0).layers(0).kept_bytes(), 30U);
  ASSERT_EQ(usage.boundaries_size(), 1);
  const v1::KvBoundary& boundary = usage.boundaries(0);
  EXPECT_EQ(boundary.position(), 64);
  EXPECT_EQ(boundary.full_bytes(), 100U);
  EXPECT_EQ(boundary.kept_bytes(), 15U);
  EXPECT_EQ(boundary.compress_ms(), 1.5);
  ASSERT_EQ(boundary.heads_size(), 1);
  EXPECT_EQ(boundary.heads(0).layer(), 6);
  EXPECT_EQ(boundary.heads(0).kv_head(), 1);
  EXPECT_EQ(boundary.heads(0).plan(), "EVICT int4/int4");
  EXPECT_EQ(boundary.heads(0).kept_tokens(), 12);
  EXPECT_EQ(boundary.heads(0).bytes(), 15U);
  EXPECT_EQ(boundary.heads(0).lazy_mass(), 0.5);
  EXPECT_FALSE(boundary.heads(0).has_k_entries_per_token());
  EXPECT_EQ(boundary.heads(0).v_entries_per_token(), 0.25);
}

// A client could not read a frame with more parts than framing.h allows.
TEST(TcpMessages, HeadsBeyondTheLimitAreLeftOutOfTheEarliestBoundaries) {
  engine::RequestSummary summary;
  for (int i = 0; i < 3; ++i) {
    engine::BoundaryUse boundary;
    boundary.position = i;
    boundary.heads.resize(kMaxUsageHeads / 2);
    for (engine::HeadKvUse& head : boundary.heads) head.plan = "FULL raw/raw";
    summary.boundaries.push_back(std::move(boundary));
  }
  v1::Frame frame;
  *frame.mutable_done()->mutable_usage() = to_message(summary);
  EXPECT_EQ(frame.done().usage().boundaries(0).heads_size(), 0);
  EXPECT_EQ(frame.done().usage().boundaries(1).heads_size(), static_cast<int>(kMaxUsageHeads / 2));
  EXPECT_EQ(frame.done().usage().boundaries(2).heads_size(), static_cast<int>(kMaxUsageHeads / 2));
  std::string bytes;
  ASSERT_TRUE(append_frame(frame, kDefaultMaxFrameBytes, bytes).ok());
  FrameDecoder decoder(kDefaultMaxFrameBytes);
  decoder.feed(bytes);
  const auto read = decoder.next();
  EXPECT_TRUE(read.ok()) << read.status().to_string();
}

TEST(TcpMessages, ScoresAreSplit) {
  std::deque<engine::PromptScore> scores;
  for (std::int32_t i = 0; i < 5; ++i) {
    engine::PromptScore score;
    score.position = i + 1;
    score.logprob = -1.5F;
    score.best_id = 7;
    score.best_logprob = -0.5F;
    score.dense.assign(1000, 0.25F * static_cast<float>(i));
    scores.push_back(std::move(score));
  }
  v1::Scores message;
  move_scores(scores, 10'000, message);  // two of some 4,050 bytes
  ASSERT_EQ(message.scores_size(), 2);
  EXPECT_LT(message.ByteSizeLong(), 10'000U);
  EXPECT_EQ(message.scores(1).position(), 2);
  EXPECT_EQ(message.scores(1).logprob(), -1.5F);
  EXPECT_EQ(message.scores(1).best_id(), 7);
  EXPECT_EQ(message.scores(1).best_logprob(), -0.5F);
  ASSERT_EQ(message.scores(1).dense_size(), 1000);
  EXPECT_EQ(message.scores(1).dense(999), 0.25F);
  v1::Scores one;
  move_scores(scores, 1, one);  // never none
  EXPECT_EQ(one.scores_size(), 1);
  EXPECT_EQ(scores.size(), 2U);
}

}  // namespace
}  // namespace spindle::api
