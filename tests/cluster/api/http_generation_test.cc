#include "cluster/api/http_generation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <boost/asio/post.hpp>
#include <boost/asio/strand.hpp>
#include <future>
#include <string>

#include "tests/cluster/api/api_test_server.h"

namespace spindle::api {
namespace {

namespace json = boost::json;

struct Outcome {
  std::string events;
  bool overflowed = false;
  std::optional<ApiError> error;
};

// Lets a streamed completion of `n_tokens` tokens end while nobody reads, then takes the events.
Outcome run_unread(std::int64_t n_tokens, std::size_t max_buffered_bytes, bool logprobs) {
  ApiTestOptions options;
  options.max_model_len = 100000;
  ApiTestServer server(options);
  OpenAiRequest request;
  request.kind = OpenAiKind::kCompletion;
  request.stream = true;
  request.logprobs = logprobs;
  GenerateRequest& prompt = request.prompts.emplace_back();
  prompt.prompt = "a";
  prompt.sampling.max_tokens = n_tokens;
  prompt.sampling.ignore_eos = true;
  if (logprobs) prompt.sampling.logprobs = 5;
  OpenAiWriter writer(request, "id", 0, "model");

  std::promise<Outcome> outcome;
  bool ended = false;
  std::shared_ptr<HttpGeneration> generation;
  const auto strand = boost::asio::make_strand(server.io());
  boost::asio::post(strand, [&] {
    generation = std::make_shared<
        HttpGeneration>(std::move(request), std::move(writer), max_buffered_bytes, [&] {
      if (ended || !generation->finished()) return;
      ended = true;
      outcome.set_value({generation->take_events(), generation->overflowed(), generation->error()});
    });
    generation->start(server.service(), strand);
  });
  auto future = outcome.get_future();
  if (future.wait_for(std::chrono::seconds(30)) != std::future_status::ready) {
    ADD_FAILURE() << "the generation did not end";
    return {};
  }
  Outcome result = future.get();
  std::promise<void> dropped;
  boost::asio::post(strand, [&] {
    generation->abandon();
    generation.reset();
    dropped.set_value();
  });
  dropped.get_future().wait_for(std::chrono::seconds(10));
  return result;
}

std::string joined_text(const std::string& events, std::size_t* n_events) {
  std::string text;
  *n_events = 0;
  for (std::size_t begin = 0; begin < events.size();) {
    const std::size_t end = events.find("\n\n", begin);
    const std::string payload = events.substr(begin + 6, end - begin - 6);
    begin = end + 2;
    if (payload == "[DONE]") break;
    ++*n_events;
    text += std::string(json::parse(payload).at_pointer("/choices/0/text").as_string());
  }
  return text;
}

TEST(HttpGeneration, MergesDeltasThatNobodyReads) {
  constexpr std::size_t kMaxBuffered = 16384;
  const Outcome outcome = run_unread(2000, kMaxBuffered, false);
  EXPECT_FALSE(outcome.overflowed);
  std::size_t n_events = 0;
  const std::string text = joined_text(outcome.events, &n_events);
  // 2,000 events would take about 400 kB.
  EXPECT_LT(outcome.events.size(), 3 * kMaxBuffered);
  EXPECT_LT(n_events, 200u);
  const std::string once = ApiTestServer::kText;
  ASSERT_GT(text.size(), 100 * once.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    ASSERT_EQ(text[i], once[i % once.size()]) << "at byte " << i;
  }
}

TEST(HttpGeneration, CancelsWhenMergedOutputOverflowsToo) {
  const Outcome outcome = run_unread(90000, 4096, false);
  EXPECT_TRUE(outcome.overflowed);
  ASSERT_TRUE(outcome.error.has_value());
  EXPECT_EQ(outcome.error->status.code(), StatusCode::kResourceExhausted);
  EXPECT_LT(outcome.events.size(), 4u * 4096);
}

TEST(HttpGeneration, CountsLogprobsAsBufferedBytes) {
  const Outcome outcome = run_unread(5000, 16384, true);
  EXPECT_TRUE(outcome.overflowed);
  EXPECT_LT(outcome.events.size(), 8u * 16384);
}

}  // namespace
}  // namespace spindle::api
