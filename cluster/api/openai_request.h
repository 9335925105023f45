#pragma once
// OpenAI's request bodies, with vLLM's extra fields, turned into GenerateRequests. Types and shapes
// are checked here, ranges in request_validation.h. Fields nobody knows are ignored, as vLLM does;
// known fields that would change the output and are not supported are refused by name.

#include <boost/json.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cluster/api/completion.h"
#include "proto/config.pb.h"

namespace spindle::api {

enum class OpenAiKind : std::uint8_t { kChat, kCompletion };

// One HTTP request. Every prompt becomes one GenerateRequest; choice c of prompt p has the index
// p * n + c in the response.
struct OpenAiRequest {
  OpenAiKind kind = OpenAiKind::kChat;
  std::vector<GenerateRequest> prompts;
  std::int32_t n = 1;
  bool stream = false;
  bool include_usage = false;
  bool logprobs = false;
};

std::optional<ApiError> parse_chat_request(const boost::json::object& body,
                                           const config::Limits& limits, OpenAiRequest& out);
std::optional<ApiError> parse_completion_request(const boost::json::object& body,
                                                 const config::Limits& limits, OpenAiRequest& out);

// POST /tokenize: {"prompt"} or {"messages"}, as vLLM.
struct TokenizeRequest {
  GenerateRequest request;
  bool return_token_strs = false;
};
std::optional<ApiError> parse_tokenize_request(const boost::json::object& body,
                                               TokenizeRequest& out);

// POST /detokenize: {"tokens"}.
struct DetokenizeRequest {
  std::string model;
  std::vector<std::int32_t> tokens;
};
std::optional<ApiError> parse_detokenize_request(const boost::json::object& body,
                                                 DetokenizeRequest& out);

}  // namespace spindle::api
