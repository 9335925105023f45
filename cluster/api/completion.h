#pragma once
// The values that pass between a session (TCP or HTTP) and the CompletionService: what a client
// asked for, and the deltas of text it gets back.

#include <boost/json.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cluster/engine/engine.h"
#include "kernels/core/status.h"

namespace spindle::api {

// What a client asked for; unset fields take the model's and then the server's defaults.
struct SamplingRequest {
  std::optional<std::int64_t> max_tokens;
  std::optional<std::int64_t> min_tokens;
  std::optional<double> temperature;
  std::optional<std::int64_t> top_k;
  std::optional<double> top_p;
  std::optional<double> min_p;
  std::optional<double> repetition_penalty;
  std::optional<double> presence_penalty;
  std::optional<double> frequency_penalty;
  std::vector<std::pair<std::int64_t, double>> logit_bias;
  std::optional<std::uint64_t> seed;
  std::vector<std::string> stop;
  std::vector<std::int64_t> stop_token_ids;
  bool include_stop_str_in_output = false;
  bool ignore_eos = false;
  bool skip_special_tokens = true;
  std::optional<std::int64_t> logprobs;  // number of most likely tokens to report beside the chosen
  std::optional<std::int64_t> n;
};

// A policy as a client names it. With a profile, unset fields take that profile's values; without
// one, those of the server's default policy.
struct KvOverrideRequest {
  std::int64_t first_layer = 0;
  std::optional<std::int64_t> last_layer = {};  // unset: first_layer
  std::optional<std::int64_t> kv_head = {};     // unset: all
  std::string mode = {};
  std::string codec = {};
  std::optional<std::int64_t> window = {};
  std::optional<double> keep_ratio = {};
};

struct KvPolicyRequest {
  std::string profile = {};
  std::optional<double> ratio = {};
  std::optional<std::int64_t> max_bytes = {};
  std::optional<std::int64_t> sinks = {};
  std::optional<std::int64_t> recent = {};
  std::optional<std::int64_t> window = {};
  std::vector<KvOverrideRequest> overrides = {};
};

// Prompt tokens at positions [first, end) whose log-probabilities are wanted.
struct PromptScoresRequest {
  std::int64_t first = 0;
  std::int64_t end = 0;
  bool dense = false;
};

struct ChatPrompt {
  boost::json::array messages;  // [{role, content, ...}] as the template sees them
  std::vector<std::size_t>
      compress_after;                      // messages at whose ends the KV is compressed, ascending
  boost::json::object template_variables;  // tools and chat_template_kwargs, if any
  bool add_generation_prompt = true;
};

struct GenerateRequest {
  std::string request_id;
  std::string model;  // empty: the served model
  std::variant<std::string, std::vector<std::int32_t>, ChatPrompt> prompt;
  bool add_special_tokens = true;  // text prompts only
  bool echo = false;               // the prompt's text comes first
  SamplingRequest sampling;
  std::optional<KvPolicyRequest> kv_policy;  // unset: the server's default policy
  std::vector<std::int64_t> compress_at;     // prompt lengths; not together with compress_after
  std::string session_id;                    // empty: no session
  std::uint64_t owner = 0;                   // ApiKeys::owner_of the client's key
  bool keep_session = false;
  std::int64_t priority = 0;    // lower goes first
  std::int64_t timeout_ms = 0;  // 0: none
  std::optional<PromptScoresRequest> prompt_scores;
};

struct OutputToken {
  std::int32_t id = 0;
  std::string bytes;  // the token's raw bytes
  float logprob = 0.0F;
};

struct OutputTokenInfo {
  OutputToken chosen;
  std::vector<OutputToken> top;
};

struct OutputDelta {
  std::int32_t choice = 0;
  std::string text;  // complete UTF-8 characters only
  std::vector<std::int32_t> token_ids;
  std::vector<OutputTokenInfo> logprobs;  // one per token id when asked for
  engine::FinishReason finish = engine::FinishReason::kNone;
  std::string stop_reason;        // the stop string, or the stop token's id in decimal
  bool stopped_by_token = false;  // stop_reason is a token id
};

// An error with the request field at fault, if one is: {INVALID_ARGUMENT "top_p must be ...",
// "top_p"}.
struct ApiError {
  Status status;
  std::string param = {};
  std::int64_t retry_after_ms = 0;  // > 0 with RESOURCE_EXHAUSTED and UNAVAILABLE
  // A machine-readable code where the status alone does not say it, e.g. "context_length_exceeded".
  std::string code = {};
};

// Receives one request's output, on the executor given to CompletionService::start. on_accepted,
// then scores of the prompt if they were asked for, then deltas, then on_done; or on_error alone;
// or on_error after some output when the request failed.
class OutputSink {
 public:
  virtual ~OutputSink() = default;
  virtual void on_accepted(std::int32_t prompt_tokens) = 0;
  // In order of position. A sink whose requests never ask for scores need not care.
  virtual void on_scores(std::vector<engine::PromptScore> scores) { (void)scores; }
  virtual void on_delta(OutputDelta delta) = 0;
  virtual void on_done(const engine::RequestSummary& summary) = 0;
  virtual void on_error(const ApiError& error) = 0;
};

// A running request. Dropping the handle does not cancel it.
class Completion {
 public:
  virtual ~Completion() = default;
  // Thread-safe; no call of the sink follows except on_error(CANCELLED), once. A request that has
  // already ended is left alone.
  virtual void cancel() = 0;
};

}  // namespace spindle::api
