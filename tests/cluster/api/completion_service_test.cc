#include "cluster/api/completion_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <boost/asio/post.hpp>
#include <boost/asio/strand.hpp>
#include <condition_variable>
#include <future>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "tests/cluster/api/api_test_server.h"

namespace spindle::api {
namespace {

using ::testing::ElementsAre;

// Records what a sink is told, and lets a test wait for the end.
class RecordingSink : public OutputSink {
 public:
  void on_accepted(std::int32_t prompt_tokens) override {
    add("accepted " + std::to_string(prompt_tokens));
  }
  void on_scores(std::vector<engine::PromptScore> scores) override {
    add("scores " + std::to_string(scores.front().position) + " to " +
        std::to_string(scores.back().position));
  }
  void on_delta(OutputDelta delta) override {
    const std::lock_guard lock(mutex_);
    text_ += delta.text;
    texts_[delta.choice] += delta.text;
    changed_.notify_all();
  }
  void on_done(const engine::RequestSummary& summary) override {
    add("done " + std::to_string(summary.completion_tokens));
  }
  void on_error(const ApiError& error) override {
    {
      const std::lock_guard lock(mutex_);
      error_ = error;
    }
    add("error " + std::string(status_code_name(error.status.code())));
  }

  bool wait_for_end() {
    return wait([this] {
      return !calls_.empty() &&
             (calls_.back().starts_with("done") || calls_.back().starts_with("error"));
    });
  }
  bool wait_for_text() {
    return wait([this] { return !text_.empty(); });
  }
  std::vector<std::string> calls() {
    const std::lock_guard lock(mutex_);
    return calls_;
  }
  std::string text() {
    const std::lock_guard lock(mutex_);
    return text_;
  }
  std::string text_of_choice(std::int32_t choice) {
    const std::lock_guard lock(mutex_);
    return texts_[choice];
  }
  ApiError error() {
    const std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  void add(std::string call) {
    const std::lock_guard lock(mutex_);
    calls_.push_back(std::move(call));
    changed_.notify_all();
  }
  template <typename Condition>
  bool wait(Condition condition) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(10), condition);
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> calls_;
  std::string text_;
  std::map<std::int32_t, std::string> texts_;
  ApiError error_;
};

// Occupies the tokenizer pool until it is released.
class BlockedPool {
 public:
  explicit BlockedPool(CompletionService& service) {
    boost::asio::post(service.tokenizer_pool(), [released = release_.get_future().share()] {
      released.wait_for(std::chrono::seconds(20));
    });
  }
  ~BlockedPool() { release(); }
  void release() {
    if (!std::exchange(is_released_, true)) release_.set_value();
  }

 private:
  std::promise<void> release_;
  bool is_released_ = false;
};

struct Started {
  std::shared_ptr<RecordingSink> sink = std::make_shared<RecordingSink>();
  std::shared_ptr<Completion> completion;
};

Started start(ApiTestServer& server, GenerateRequest request) {
  Started started;
  started.completion = server.service().start(std::move(request),
                                              boost::asio::make_strand(server.io()), started.sink);
  return started;
}

GenerateRequest text_request(const std::string& prompt) {
  GenerateRequest request;
  request.prompt = prompt;
  return request;
}

TEST(CompletionService, RunsARequest) {
  ApiTestServer server;
  GenerateRequest request = text_request("Say:");
  request.sampling.max_tokens = 50;
  Started started = start(server, request);
  ASSERT_TRUE(started.sink->wait_for_end());
  EXPECT_EQ(started.sink->text(), ApiTestServer::kText);
  const std::size_t n_output = server.ids_of(ApiTestServer::kText).size() + 1;
  EXPECT_THAT(started.sink->calls(),
              ElementsAre("accepted " + std::to_string(server.ids_of("Say:").size()),
                          "done " + std::to_string(n_output)));
}

TEST(CompletionService, RefusesBeforeItTokenises) {
  ApiTestServer server;
  BlockedPool blocked(server.service());
  server.engine().set_capacity(0);
  Started full = start(server, text_request("a"));
  ASSERT_TRUE(full.sink->wait_for_end());
  EXPECT_THAT(full.sink->calls(), ElementsAre("error RESOURCE_EXHAUSTED"));
  EXPECT_GT(full.sink->error().retry_after_ms, 0);
  server.engine().set_capacity(100);

  GenerateRequest other = text_request("a");
  other.model = "other";
  Started model = start(server, other);
  ASSERT_TRUE(model.sink->wait_for_end());
  EXPECT_EQ(model.sink->error().code, "model_not_found");

  GenerateRequest hot = text_request("a");
  hot.sampling.temperature = 9;
  Started range = start(server, hot);
  ASSERT_TRUE(range.sink->wait_for_end());
  EXPECT_EQ(range.sink->error().param, "temperature");

  Started empty = start(server, text_request(""));
  ASSERT_TRUE(empty.sink->wait_for_end());
  EXPECT_EQ(empty.sink->error().param, "prompt");

  Started huge = start(server, text_request(std::string(1 << 20, 'a')));
  ASSERT_TRUE(huge.sink->wait_for_end());
  EXPECT_EQ(huge.sink->error().code, "context_length_exceeded");
  EXPECT_TRUE(server.engine().submitted().empty());
}

TEST(CompletionService, CountsTokensAgainstTheContext) {
  ApiTestOptions options;
  options.max_model_len = 20;
  ApiTestServer server(options);
  const auto prompt_of = [&](std::size_t n) {
    GenerateRequest request;
    request.prompt = std::vector<std::int32_t>(n, 5);
    return request;
  };
  Started fits = start(server, prompt_of(19));
  ASSERT_TRUE(fits.sink->wait_for_end());
  EXPECT_EQ(fits.sink->calls().back(), "done 1");
  for (const std::size_t n : {20u, 21u}) {
    Started over = start(server, prompt_of(n));
    ASSERT_TRUE(over.sink->wait_for_end());
    EXPECT_EQ(over.sink->error().code, "context_length_exceeded") << n;
  }
  GenerateRequest text = text_request("a b c d e f g h i j k l m n o p q r s t u v w x y z");
  Started long_text = start(server, text);
  ASSERT_TRUE(long_text.sink->wait_for_end());
  EXPECT_EQ(long_text.sink->error().code, "context_length_exceeded");
  GenerateRequest bad = prompt_of(1);
  bad.prompt =
      std::vector<std::int32_t>{static_cast<std::int32_t>(server.tokenizer().vocab_size())};
  Started range = start(server, bad);
  ASSERT_TRUE(range.sink->wait_for_end());
  EXPECT_EQ(range.sink->error().param, "prompt");
}

TEST(CompletionService, RefusesInvalidUtf8) {
  ApiTestServer server;
  Started started = start(server, text_request("ab\xff"));
  ASSERT_TRUE(started.sink->wait_for_end());
  EXPECT_EQ(started.sink->error().param, "prompt");
  EXPECT_THAT(started.sink->error().status.message(), ::testing::HasSubstr("byte 2"));
}

TEST(CompletionService, CancelsARequestThatWaitsForTheTokenizer) {
  ApiTestServer server;
  BlockedPool blocked(server.service());
  Started started = start(server, text_request("a"));
  started.completion->cancel();
  started.completion->cancel();
  ASSERT_TRUE(started.sink->wait_for_end());
  blocked.release();
  // One more request shows that the first has passed through the pool.
  Started next = start(server, text_request("b"));
  ASSERT_TRUE(next.sink->wait_for_end());
  EXPECT_THAT(started.sink->calls(), ElementsAre("error CANCELLED"));
  EXPECT_EQ(server.engine().submitted().size(), 1u);
}

TEST(CompletionService, CancelsARunningRequestOnce) {
  ApiTestOptions options;
  options.max_model_len = 1000000;
  ApiTestServer server(options);
  GenerateRequest request = text_request("a");
  request.sampling.ignore_eos = true;
  request.sampling.max_tokens = 900000;
  Started started = start(server, request);
  ASSERT_TRUE(started.sink->wait_for_text());
  started.completion->cancel();
  ASSERT_TRUE(started.sink->wait_for_end());
  EXPECT_TRUE(server.engine().wait_for(
      [](const engine::EngineStats& stats) { return stats.cancelled == 1; },
      Deadline::after_ms(10000)));
  EXPECT_THAT(started.sink->calls(), ElementsAre("accepted 1", "error CANCELLED"));
}

TEST(CompletionService, BoundsThePromptsThatWait) {
  ApiTestServer server;
  BlockedPool blocked(server.service());
  std::vector<Started> waiting;
  for (int i = 0; i < server.service().config().max_queued_prompts; ++i) {
    waiting.push_back(start(server, text_request("a")));
  }
  Started over = start(server, text_request("a"));
  ASSERT_TRUE(over.sink->wait_for_end());
  EXPECT_THAT(over.sink->calls(), ElementsAre("error RESOURCE_EXHAUSTED"));
  blocked.release();
  for (Started& started : waiting) {
    ASSERT_TRUE(started.sink->wait_for_end());
    EXPECT_THAT(started.sink->calls().back(), ::testing::StartsWith("done"));
  }
  Started again = start(server, text_request("a"));
  ASSERT_TRUE(again.sink->wait_for_end());
  EXPECT_THAT(again.sink->calls().back(), ::testing::StartsWith("done"));
}

TEST(CompletionService, PassesOnWhatTheEngineSays) {
  ApiTestOptions options;
  options.script_for = [](const engine::EngineRequest&) {
    return FakeScript{
        .tokens = {5, 6, 7}, .fail_after = 2, .failure = internal_error("a stage is gone")};
  };
  ApiTestServer server(options);
  Started failed = start(server, text_request("a"));
  ASSERT_TRUE(failed.sink->wait_for_end());
  EXPECT_THAT(failed.sink->calls(), ElementsAre("accepted 1", "error INTERNAL"));
  EXPECT_FALSE(failed.sink->text().empty());
  server.engine().set_submit(resource_exhausted("the queue filled meanwhile"));
  Started refused = start(server, text_request("a"));
  ASSERT_TRUE(refused.sink->wait_for_end());
  EXPECT_THAT(refused.sink->calls(), ElementsAre("error RESOURCE_EXHAUSTED"));
  EXPECT_GT(refused.sink->error().retry_after_ms, 0);
}

TEST(CompletionService, EndsEachChoiceAtItsStopString) {
  ApiTestServer server;
  GenerateRequest request = text_request("a");
  request.sampling.n = 3;
  request.sampling.stop = {"quick"};
  request.sampling.max_tokens = 300;
  request.sampling.ignore_eos = true;
  Started started = start(server, request);
  ASSERT_TRUE(started.sink->wait_for_end());
  for (std::int32_t i = 0; i < 3; ++i) EXPECT_EQ(started.sink->text_of_choice(i), " The ");
  EXPECT_EQ(server.engine().n_finished_choices(), 3u);
  EXPECT_EQ(started.sink->calls().back(), "done 6");  // not what was sampled behind the stop
}

GenerateRequest chat_request(const std::vector<std::string>& contents,
                             std::vector<std::size_t> compress_after) {
  ChatPrompt chat;
  for (const std::string& content : contents) {
    chat.messages.push_back(boost::json::object{{"role", "user"}, {"content", content}});
  }
  chat.compress_after = std::move(compress_after);
  GenerateRequest request;
  request.prompt = std::move(chat);
  request.sampling.max_tokens = 1;
  return request;
}

TEST(CompletionService, WhatARequestSaysAboutItsKvReachesTheEngine) {
  ApiTestOptions options;
  options.kv_policy.profile = kvstore::KvProfile::kStreaming;
  ApiTestServer server(std::move(options));
  GenerateRequest request = text_request("one two three");
  request.sampling.max_tokens = 1;
  Started plain = start(server, request);
  ASSERT_TRUE(plain.sink->wait_for_end());
  request.kv_policy = {.profile = "int4", .ratio = 0.5};
  request.compress_at = {1, 2};
  request.session_id = "s";
  request.owner = 77;
  request.keep_session = true;
  request.priority = -3;
  request.timeout_ms = 2500;
  request.prompt_scores = {.first = 1, .end = 2, .dense = true};
  Started full = start(server, request);
  ASSERT_TRUE(full.sink->wait_for_end());
  const auto submitted = server.engine().submitted();
  ASSERT_EQ(submitted.size(), 2u);
  EXPECT_EQ(submitted[0].kv_policy.profile, kvstore::KvProfile::kStreaming);
  EXPECT_TRUE(submitted[0].compress_at.empty());
  EXPECT_EQ(submitted[0].prompt_scores.end, 0);
  EXPECT_EQ(submitted[1].kv_policy.profile, kvstore::KvProfile::kInt4);
  EXPECT_EQ(submitted[1].kv_policy.ratio, 0.5);
  EXPECT_THAT(submitted[1].compress_at, ElementsAre(1, 2));
  EXPECT_EQ(submitted[1].session_id, "s");
  EXPECT_EQ(submitted[1].owner, 77u);
  EXPECT_EQ(submitted[1].priority, -3);
  EXPECT_EQ(submitted[1].timeout_us, 2'500'000);
  EXPECT_EQ(submitted[0].timeout_us, 0);
  EXPECT_TRUE(submitted[1].keep_session);
  EXPECT_EQ(submitted[1].prompt_scores.first, 1);
  EXPECT_EQ(submitted[1].prompt_scores.end, 2);
  EXPECT_TRUE(submitted[1].prompt_scores.dense);
}

TEST(CompletionService, RefusesUrgencyOutOfRangeBeforeTheEngineSeesIt) {
  ApiTestServer server;
  for (const auto& [priority, timeout_ms, field] :
       std::vector<std::tuple<std::int64_t, std::int64_t, std::string>>{
           {101, 0, "priority"},
           {-101, 0, "priority"},
           {0, -1, "timeout_ms"},
           {0, std::numeric_limits<std::int64_t>::max(), "timeout_ms"}}) {
    GenerateRequest request = text_request("one");
    request.priority = priority;
    request.timeout_ms = timeout_ms;
    Started started = start(server, request);
    ASSERT_TRUE(started.sink->wait_for_end());
    EXPECT_EQ(started.sink->error().param, field);
    EXPECT_EQ(started.sink->error().status.code(), StatusCode::kInvalidArgument);
  }
  EXPECT_TRUE(server.engine().submitted().empty());
}

TEST(CompletionService, RefusesKvFieldsBeforeTheEngineSeesThem) {
  ApiTestServer server;
  GenerateRequest request = text_request("one two three");
  request.kv_policy = {.profile = "none"};
  Started unknown = start(server, request);
  ASSERT_TRUE(unknown.sink->wait_for_end());
  EXPECT_EQ(unknown.sink->error().param, "kv_policy.profile");
  // Only the tokenizer knows that the prompt is shorter.
  request = text_request("one two three");
  request.compress_at = {100};
  Started beyond = start(server, request);
  ASSERT_TRUE(beyond.sink->wait_for_end());
  EXPECT_EQ(beyond.sink->error().param, "compress_at");
  EXPECT_TRUE(server.engine().submitted().empty());
}

TEST(CompletionService, CompressesAtTheEndsOfMessages) {
  ApiTestServer server;
  Started started =
      start(server, chat_request({"The document.", "A second one.", "A question?"}, {0, 1}));
  ASSERT_TRUE(started.sink->wait_for_end());
  const std::string first = "<|im_start|>user\nThe document.<|im_end|>\n";
  const std::string second = first + "<|im_start|>user\nA second one.<|im_end|>\n";
  const auto submitted = server.engine().submitted();
  ASSERT_EQ(submitted.size(), 1u);
  EXPECT_THAT(submitted[0].compress_at,
              ElementsAre(static_cast<std::int32_t>(server.ids_of(first).size()),
                          static_cast<std::int32_t>(server.ids_of(second).size())));
  EXPECT_LT(submitted[0].compress_at.back(),
            static_cast<std::int32_t>(submitted[0].prompt_ids.size()));
}

// A token that reaches over the end of the message belongs to what follows.
TEST(CompletionService, AMessageEndsBeforeATokenThatReachesOverIt) {
  ApiTestOptions options;
  options.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}";
  ApiTestServer server(std::move(options));
  const std::vector<std::int32_t> begin = server.ids_of("The quick bro");
  const std::vector<std::int32_t> whole = server.ids_of("The quick brown fox");
  std::size_t common = 0;
  while (common < begin.size() && begin[common] == whole[common]) ++common;
  ASSERT_LT(common, begin.size()) << "the vocabulary has no token that reaches over";
  Started started = start(server, chat_request({"The quick bro", "wn fox"}, {0}));
  ASSERT_TRUE(started.sink->wait_for_end());
  const auto submitted = server.engine().submitted();
  ASSERT_EQ(submitted.size(), 1u);
  EXPECT_EQ(submitted[0].prompt_ids, whole);
  EXPECT_THAT(submitted[0].compress_at, ElementsAre(static_cast<std::int32_t>(common)));
}

TEST(CompletionService, ATemplateThatChangesItsBeginningCannotBeCompressedAtMessages) {
  ApiTestOptions options;
  options.chat_template =
      "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}";
  ApiTestServer server(std::move(options));
  Started started = start(server, chat_request({"one", "two"}, {0}));
  ASSERT_TRUE(started.sink->wait_for_end());
  EXPECT_EQ(started.sink->error().status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(started.sink->error().param, "messages[0].compress");
  // The last message's end is the end of the prompt.
  Started last = start(server, chat_request({"one", "two"}, {1}));
  ASSERT_TRUE(last.sink->wait_for_end());
  const auto submitted = server.engine().submitted();
  ASSERT_EQ(submitted.size(), 1u);
  EXPECT_THAT(submitted[0].compress_at,
              ElementsAre(static_cast<std::int32_t>(submitted[0].prompt_ids.size())));
}

TEST(CompletionService, ScoresComeBeforeTheOutput) {
  ApiTestServer server;
  GenerateRequest request = text_request("one two three four five six seven eight nine ten");
  request.sampling.max_tokens = 1;
  request.prompt_scores = {.first = 1, .end = 10};
  Started started = start(server, request);
  ASSERT_TRUE(started.sink->wait_for_end());
  const auto calls = started.sink->calls();
  ASSERT_EQ(calls.size(), 4u);
  EXPECT_EQ(calls[1], "scores 1 to 7");
  EXPECT_EQ(calls[2], "scores 8 to 9");
  EXPECT_EQ(calls[3], "done 1");
}

}  // namespace
}  // namespace spindle::api
