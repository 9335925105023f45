#include "cluster/api/openai_request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "cluster/api/json_fields.h"

namespace spindle::api {
namespace {

namespace json = boost::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr const char* kMessages = R"("messages":[{"role":"user","content":"x"}])";

std::optional<ApiError> chat(const std::string& fields, OpenAiRequest& out) {
  return parse_chat_request(
      json::parse("{" + std::string(kMessages) + (fields.empty() ? "" : ",") + fields + "}")
          .as_object(),
      config::Limits(), out);
}

std::optional<ApiError> completion(const std::string& body, OpenAiRequest& out) {
  return parse_completion_request(json::parse(body).as_object(), config::Limits(), out);
}

TEST(OpenAiRequest, ReadsEverySamplingField) {
  OpenAiRequest request;
  ASSERT_FALSE(chat(R"("model":"m","max_tokens":5,"min_tokens":1,"temperature":0.5,"top_k":7,
                       "top_p":0.9,"min_p":0.1,"repetition_penalty":1.1,"presence_penalty":0.2,
                       "frequency_penalty":-0.2,"logit_bias":{"3":-100,"4":1.5},"seed":42,
                       "stop":["a","b"],"stop_token_ids":[1,2],"include_stop_str_in_output":true,
                       "ignore_eos":true,"skip_special_tokens":false,"logprobs":true,
                       "top_logprobs":3,"n":2,"stream":true,
                       "stream_options":{"include_usage":true},"unknown_field":{"a":[1]},
                       "user":"someone")",
                    request)
                   .has_value());
  ASSERT_EQ(request.prompts.size(), 1u);
  const GenerateRequest& prompt = request.prompts[0];
  const SamplingRequest& sampling = prompt.sampling;
  EXPECT_EQ(prompt.model, "m");
  EXPECT_EQ(sampling.max_tokens, 5);
  EXPECT_EQ(sampling.min_tokens, 1);
  EXPECT_EQ(sampling.temperature, 0.5);
  EXPECT_EQ(sampling.top_k, 7);
  EXPECT_EQ(sampling.top_p, 0.9);
  EXPECT_EQ(sampling.min_p, 0.1);
  EXPECT_EQ(sampling.repetition_penalty, 1.1);
  EXPECT_EQ(sampling.presence_penalty, 0.2);
  EXPECT_EQ(sampling.frequency_penalty, -0.2);
  EXPECT_THAT(sampling.logit_bias, ElementsAre(std::make_pair(3, -100.0), std::make_pair(4, 1.5)));
  EXPECT_EQ(sampling.seed, 42u);
  EXPECT_THAT(sampling.stop, ElementsAre("a", "b"));
  EXPECT_THAT(sampling.stop_token_ids, ElementsAre(1, 2));
  EXPECT_TRUE(sampling.include_stop_str_in_output);
  EXPECT_TRUE(sampling.ignore_eos);
  EXPECT_FALSE(sampling.skip_special_tokens);
  EXPECT_EQ(sampling.logprobs, 3);
  EXPECT_EQ(request.n, 2);
  EXPECT_TRUE(request.stream);
  EXPECT_TRUE(request.include_usage);
  EXPECT_TRUE(request.logprobs);
}

TEST(OpenAiRequest, ReadsWhatIsSaidAboutTheKv) {
  OpenAiRequest request;
  ASSERT_FALSE(chat(R"("kv_policy":{"profile":"streaming","ratio":0.1,"max_bytes":7,"sinks":1,
                       "recent":2,"window":3},"compress_at":[4,5.0],"session_id":"s",
                       "keep_session":true,"priority":-7,"timeout_ms":1500)",
                    request)
                   .has_value());
  const GenerateRequest& prompt = request.prompts.at(0);
  ASSERT_TRUE(prompt.kv_policy.has_value());
  EXPECT_EQ(prompt.kv_policy->profile, "streaming");
  EXPECT_EQ(prompt.kv_policy->ratio, 0.1);
  EXPECT_EQ(prompt.kv_policy->max_bytes, 7);
  EXPECT_EQ(prompt.kv_policy->sinks, 1);
  EXPECT_EQ(prompt.kv_policy->recent, 2);
  EXPECT_EQ(prompt.kv_policy->window, 3);
  EXPECT_THAT(prompt.compress_at, ElementsAre(4, 5));
  EXPECT_EQ(prompt.session_id, "s");
  EXPECT_EQ(prompt.priority, -7);
  EXPECT_EQ(prompt.timeout_ms, 1500);
  EXPECT_TRUE(prompt.keep_session);

  OpenAiRequest plain;
  ASSERT_FALSE(chat(R"("kv_policy":null,"compress_at":null,"session_id":null)", plain).has_value());
  EXPECT_FALSE(plain.prompts.at(0).kv_policy.has_value());
  EXPECT_TRUE(plain.prompts.at(0).session_id.empty());
}

TEST(OpenAiRequest, MessagesMayBeWhereTheKvIsCompressed) {
  OpenAiRequest request;
  const auto body = json::parse(R"({"messages":[
      {"role":"user","content":"a","compress":true},{"role":"assistant","content":"b"},
      {"role":"user","content":"c","compress":false},
      {"role":"user","content":[{"type":"text","text":"d"}],"compress":true}]})");
  ASSERT_FALSE(parse_chat_request(body.as_object(), config::Limits(), request).has_value());
  const auto& prompt = std::get<ChatPrompt>(request.prompts.at(0).prompt);
  EXPECT_THAT(prompt.compress_after, ElementsAre(0u, 3u));
  for (const json::value& message : prompt.messages) {
    EXPECT_FALSE(message.as_object().contains("compress"));  // not the template's business
  }
  OpenAiRequest wrong;
  const auto bad = json::parse(R"({"messages":[{"role":"user","content":"a","compress":1}]})");
  EXPECT_EQ(parse_chat_request(bad.as_object(), config::Limits(), wrong)->param,
            "messages[0].compress");
}

TEST(OpenAiRequest, ASessionHasOnePrompt) {
  OpenAiRequest one;
  EXPECT_FALSE(completion(R"({"prompt":["a"],"session_id":"s"})", one).has_value());
  OpenAiRequest two;
  EXPECT_EQ(completion(R"({"prompt":["a","b"],"session_id":"s"})", two)->param, "session_id");
}

TEST(OpenAiRequest, TakesNullAsAbsent) {
  OpenAiRequest request;
  EXPECT_FALSE(chat(R"("max_tokens":null,"stop":null,"n":null,"stream_options":null,
                       "response_format":null,"tools":null,"logit_bias":null,"seed":null)",
                    request)
                   .has_value());
  EXPECT_FALSE(request.prompts[0].sampling.max_tokens.has_value());
}

TEST(OpenAiRequest, PrefersMaxCompletionTokens) {
  OpenAiRequest request;
  ASSERT_FALSE(chat(R"("max_tokens":5,"max_completion_tokens":6)", request).has_value());
  EXPECT_EQ(request.prompts[0].sampling.max_tokens, 6);
}

TEST(OpenAiRequest, TakesSeedsOfEitherSign) {
  for (const auto& [text, bits] : std::vector<std::pair<std::string, std::uint64_t>>{
           {"-1", ~std::uint64_t{0}}, {"18446744073709551615", ~std::uint64_t{0}}, {"0", 0}}) {
    OpenAiRequest request;
    ASSERT_FALSE(chat("\"seed\":" + text, request).has_value()) << text;
    EXPECT_EQ(request.prompts[0].sampling.seed, bits);
  }
}

TEST(OpenAiRequest, NamesTheFieldOfAWrongType) {
  const std::vector<std::pair<std::string, std::string>> cases{
      {"model", R"("model":5)"},
      {"max_tokens", R"("max_tokens":"5")"},
      {"max_tokens", R"("max_tokens":1.5)"},
      {"max_tokens", R"("max_tokens":1e300)"},
      {"max_tokens", R"("max_tokens":true)"},
      {"temperature", R"("temperature":"hot")"},
      {"top_k", R"("top_k":[1])"},
      {"n", R"("n":{})"},
      {"seed", R"("seed":"1")"},
      {"seed", R"("seed":1e30)"},
      {"stream", R"("stream":1)"},
      {"stop", R"("stop":5)"},
      {"stop", R"("stop":["a",5])"},
      {"stop_token_ids", R"("stop_token_ids":["a"])"},
      {"stop_token_ids", R"("stop_token_ids":5)"},
      {"logit_bias", R"("logit_bias":[1])"},
      {"logit_bias", R"("logit_bias":{"a":1})"},
      {"logit_bias", R"("logit_bias":{"1":"a"})"},
      {"logprobs", R"("logprobs":5)"},
      {"top_logprobs", R"("logprobs":true,"top_logprobs":"a")"},
      {"top_logprobs", R"("top_logprobs":2)"},
      {"stream_options", R"("stream_options":{"include_usage":true})"},
      {"stream_options", R"("stream":true,"stream_options":true)"},
      {"stream_options.include_usage", R"("stream":true,"stream_options":{"include_usage":1})"},
      {"tools", R"("tools":{})"},
      {"tools", R"("tools":["a"])"},
      {"chat_template_kwargs", R"("chat_template_kwargs":[])"},
      {"add_generation_prompt", R"("add_generation_prompt":"yes")"},
      {"response_format.type", R"("response_format":{"type":5})"},
      {"kv_policy", R"("kv_policy":"full")"},
      {"kv_policy.profile", R"("kv_policy":{"profile":1})"},
      {"kv_policy.ratio", R"("kv_policy":{"ratio":"a"})"},
      {"kv_policy.max_bytes", R"("kv_policy":{"max_bytes":1.5})"},
      {"kv_policy.sinks", R"("kv_policy":{"sinks":true})"},
      {"kv_policy.recent", R"("kv_policy":{"recent":[]})"},
      {"kv_policy.window", R"("kv_policy":{"window":"8"})"},
      {"kv_policy.ration", R"("kv_policy":{"ration":0.1})"},
      {"compress_at", R"("compress_at":5)"},
      {"compress_at", R"("compress_at":[1,"a"])"},
      {"compress_at", R"("compress_at":[1.5])"},
      {"session_id", R"("session_id":5)"},
      {"keep_session", R"("keep_session":"yes")"},
  };
  for (const auto& [param, fields] : cases) {
    OpenAiRequest request;
    const auto error = chat(fields, request);
    ASSERT_TRUE(error.has_value()) << fields;
    EXPECT_EQ(error->param, param) << fields;
    EXPECT_EQ(error->status.code(), StatusCode::kInvalidArgument) << fields;
  }
}

TEST(OpenAiRequest, RefusesByNameWhatItCannotDo) {
  const std::vector<std::pair<std::string, std::string>> cases{
      {"response_format", R"("response_format":{"type":"json_object"})"},
      {"tool_choice", R"("tool_choice":"required")"},
      {"tool_choice", R"("tool_choice":{"type":"function","function":{"name":"f"}})"},
      {"functions", R"("functions":[{"name":"f"}])"},
      {"modalities", R"("modalities":["text","audio"])"},
      {"guided_json", R"("guided_json":{"type":"object"})"},
      {"use_beam_search", R"("use_beam_search":true)"},
      {"length_penalty", R"("length_penalty":2)"},
      {"chat_template", R"("chat_template":"{{ x }}")"},
      {"continue_final_message", R"("continue_final_message":true)"},
      {"prompt_scores", R"("prompt_scores":{"first":1,"end":2})"},
      {"stream_options.continuous_usage_stats",
       R"("stream":true,"stream_options":{"continuous_usage_stats":true})"},
  };
  for (const auto& [param, fields] : cases) {
    OpenAiRequest request;
    const auto error = chat(fields, request);
    ASSERT_TRUE(error.has_value()) << fields;
    EXPECT_EQ(error->param, param);
    EXPECT_EQ(error->status.code(), StatusCode::kUnimplemented) << fields;
  }
  for (const std::string fields :
       {R"("response_format":{"type":"text"})", R"("tool_choice":"auto")", R"("functions":[])",
        R"("use_beam_search":false)", R"("length_penalty":1)", R"("modalities":["text"])"}) {
    OpenAiRequest request;
    EXPECT_FALSE(chat(fields, request).has_value()) << fields;
  }
}

TEST(OpenAiRequest, RefusesCompletionFieldsByName) {
  const std::vector<std::pair<std::string, std::string>> cases{
      {"suffix", R"({"prompt":"a","suffix":"b"})"},
      {"best_of", R"({"prompt":"a","best_of":2})"},
      {"echo", R"({"prompt":"a","echo":true,"logprobs":1})"},
  };
  for (const auto& [param, body] : cases) {
    OpenAiRequest request;
    const auto error = completion(body, request);
    ASSERT_TRUE(error.has_value()) << body;
    EXPECT_EQ(error->param, param);
    EXPECT_EQ(error->status.code(), StatusCode::kUnimplemented);
  }
  OpenAiRequest request;
  EXPECT_FALSE(completion(R"({"prompt":"a","best_of":2,"n":2,"suffix":""})", request).has_value());
}

TEST(OpenAiRequest, RefusesBadMessages) {
  const std::vector<std::pair<std::string, std::string>> cases{
      {"messages", R"({})"},
      {"messages", R"({"messages":[]})"},
      {"messages", R"({"messages":"hi"})"},
      {"messages[0]", R"({"messages":["hi"]})"},
      {"messages[0].role", R"({"messages":[{"content":"x"}]})"},
      {"messages[0].role", R"({"messages":[{"role":5,"content":"x"}]})"},
      {"messages[0].role", R"({"messages":[{"role":"","content":"x"}]})"},
      {"messages[1].content", R"({"messages":[{"role":"user","content":"x"},{"role":"user"}]})"},
      {"messages[0].content", R"({"messages":[{"role":"user","content":5}]})"},
      {"messages[0].content", R"({"messages":[{"role":"user","content":["x"]}]})"},
      {"messages[0].content.text", R"({"messages":[{"role":"user","content":[{"type":"text"}]}]})"},
  };
  for (const auto& [param, body] : cases) {
    OpenAiRequest request;
    const auto error = parse_chat_request(json::parse(body).as_object(), config::Limits(), request);
    ASSERT_TRUE(error.has_value()) << body;
    EXPECT_EQ(error->param, param) << body;
    EXPECT_EQ(error->status.code(), StatusCode::kInvalidArgument) << body;
  }
  OpenAiRequest request;
  const auto image = parse_chat_request(
      json::parse(
          R"({"messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]})")
          .as_object(),
      config::Limits(), request);
  ASSERT_TRUE(image.has_value());
  EXPECT_EQ(image->status.code(), StatusCode::kUnimplemented);
}

TEST(OpenAiRequest, PassesMessagesAndToolsToTheTemplate) {
  OpenAiRequest request;
  const json::value body = json::parse(R"({
      "messages":[
        {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
        {"role":"assistant","content":null,"tool_calls":[
           {"id":"1","type":"function","function":{"name":"f","arguments":"{\"x\":1}"}}]},
        {"role":"tool","tool_call_id":"1","content":"7"}],
      "tools":[{"type":"function","function":{"name":"f"}}],
      "chat_template_kwargs":{"enable_thinking":false},
      "add_generation_prompt":false})");
  ASSERT_FALSE(parse_chat_request(body.as_object(), config::Limits(), request).has_value());
  const auto& prompt = std::get<ChatPrompt>(request.prompts[0].prompt);
  EXPECT_FALSE(prompt.add_generation_prompt);
  EXPECT_EQ(json::serialize(prompt.messages),
            R"([{"role":"user","content":"a\nb"},)"
            R"({"role":"assistant","content":"","tool_calls":[{"id":"1","type":"function",)"
            R"("function":{"name":"f","arguments":{"x":1}}}]},)"
            R"({"role":"tool","tool_call_id":"1","content":"7"}])");
  EXPECT_EQ(json::serialize(prompt.template_variables),
            R"({"enable_thinking":false,"tools":[{"type":"function","function":{"name":"f"}}]})");
}

TEST(OpenAiRequest, TakesPromptsInFourShapes) {
  for (const auto& [body, n] :
       std::vector<std::pair<std::string, std::size_t>>{{R"({"prompt":"a"})", 1},
                                                        {R"({"prompt":["a","b"]})", 2},
                                                        {R"({"prompt":[1,2]})", 1},
                                                        {R"({"prompt":[[1],[2,3],[4]]})", 3}}) {
    OpenAiRequest request;
    ASSERT_FALSE(completion(body, request).has_value()) << body;
    EXPECT_EQ(request.prompts.size(), n);
  }
  for (const std::string body :
       {R"({})", R"({"prompt":5})", R"({"prompt":[]})", R"({"prompt":["a",1]})",
        R"({"prompt":[1,"a"]})", R"({"prompt":[1.5]})", R"({"prompt":[-1]})",
        R"({"prompt":[4294967296]})", R"({"prompt":[[1],["a"]]})", R"({"prompt":[{}]})",
        R"({"prompt":[true]})", R"({"prompt":[null]})", R"({"prompt":""})",
        R"({"prompt":["a",""]})", R"({"prompt":[[1],[]]})"}) {
    OpenAiRequest request;
    const auto error = completion(body, request);
    ASSERT_TRUE(error.has_value()) << body;
    EXPECT_EQ(error->param, "prompt") << body;
  }
}

TEST(OpenAiRequest, BoundsPromptsAndChoices) {
  const auto body = [](std::size_t n_prompts, int n) {
    json::array prompts(n_prompts, "a");
    return json::serialize(json::object{{"prompt", prompts}, {"n", n}});
  };
  OpenAiRequest fits;
  EXPECT_FALSE(completion(body(128, 1), fits).has_value());
  OpenAiRequest over;
  EXPECT_EQ(completion(body(129, 1), over)->param, "prompt");
  OpenAiRequest product_fits;
  EXPECT_FALSE(completion(body(64, 2), product_fits).has_value());
  OpenAiRequest product;
  EXPECT_EQ(completion(body(65, 2), product)->param, "n");
}

TEST(ParseJson, RefusesWhatIsNotStrictJson) {
  for (const std::string text :
       {"", "{", "nul", "{\"a\":1,}", "[1] 2", "{'a':1}", "[NaN]", "[1e999]", "[-1e999]",
        "\"\xff\"", "\"\xc0\xaf\"", "\"\xed\xa0\x80\"", "\"\\ud800\"", "\"a\nb\"", "// c\n1"}) {
    EXPECT_FALSE(parse_json(text).ok()) << text;
  }
}

TEST(ParseJson, BoundsTheDepth) {
  const auto nested = [](std::size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
  };
  EXPECT_TRUE(parse_json(nested(32)).ok());
  EXPECT_FALSE(parse_json(nested(33)).ok());
  EXPECT_FALSE(parse_json(nested(1000000)).ok());
}

}  // namespace
}  // namespace spindle::api
