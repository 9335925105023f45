#include "cluster/api/tcp_messages.h"

#include <gtest/gtest.h>

#include <string>

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

}  // namespace
}  // namespace spindle::api
