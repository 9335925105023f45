#pragma once
// OpenAI's response bodies and SSE events, written straight from deltas.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/api/completion.h"
#include "cluster/api/openai_request.h"

namespace spindle::api {

struct UsageCounts {
  std::int64_t prompt_tokens = 0;
  std::int64_t completion_tokens = 0;
  std::int64_t cached_tokens = 0;        // of the prompts, taken from a session
  std::vector<engine::StageKvUse> kv{};  // empty: not known
};

// Appends `from` to `into`, which then says the same as both in order.
void merge_delta(OutputDelta& into, OutputDelta from);
// Memory held by a delta, about.
std::size_t delta_bytes(const OutputDelta& delta);

// Writes the output of one request. All events and the body carry the same id, time and model.
//
// Thread-safety: none. Invariant: deltas of one choice come in order, because completions with
// logprobs count text offsets.
class OpenAiWriter {
 public:
  OpenAiWriter(const OpenAiRequest& request, std::string_view request_id, std::int64_t created,
               std::string_view model);

  // Streaming: each appends whole events ("data: {...}\n\n").
  void append_role(std::string& out, std::int32_t choice) const;  // chat only; else nothing
  void append_delta(std::string& out, const OutputDelta& delta);
  void append_usage(std::string& out, const UsageCounts& usage) const;
  static void append_error(std::string& out, const ApiError& error);
  static void append_done(std::string& out) { out += "data: [DONE]\n\n"; }
  static constexpr std::string_view kPing = ": ping\n\n";

  // The response of a request that is not streamed; one merged delta per choice.
  std::string body(const std::vector<OutputDelta>& choices, const UsageCounts& usage);

 private:
  void begin_event(std::string& out, std::int32_t choice) const;
  void end_event(std::string& out) const;
  void append_chat_delta(std::string& out, const OutputDelta& delta);
  void append_completion_delta(std::string& out, const OutputDelta& delta);
  void append_choice_end(std::string& out, const OutputDelta& delta) const;
  void append_logprobs(std::string& out, const OutputDelta& delta);

  OpenAiKind kind_;
  bool logprobs_;
  bool include_usage_;
  std::string head_;  // {"id":...,"object":...,"created":...,"model":... of an event
  std::string body_head_;
  std::vector<std::int64_t> text_offsets_;  // by choice, in code points
};

}  // namespace spindle::api
