#pragma once
// Appending JSON text to a string: the per-token path, where building a tree would cost more than
// the text itself.

#include <cstdint>
#include <string>
#include <string_view>

namespace spindle::api {

// Quoted and escaped. Bytes that are not valid UTF-8 become U+FFFD, so the result is always JSON.
void append_json_string(std::string& out, std::string_view text);
// The same, or null when `text` is empty.
void append_json_string_or_null(std::string& out, std::string_view text);
void append_json_integer(std::string& out, std::int64_t value);
// The shortest text that reads back as the same float. JSON has no infinities: a log-probability of
// minus infinity becomes -9999, as vLLM and OpenAI write it.
void append_json_logprob(std::string& out, float value);

}  // namespace spindle::api
