#include "cluster/api/openai_logprobs.h"

#include <algorithm>

#include "cluster/api/json_text.h"
#include "cluster/text/utf8.h"

namespace spindle::api {
namespace {

void append_token_fields(std::string& out, const OutputToken& token) {
  out += R"({"token":)";
  append_json_string(out, token.bytes);
  out += R"(,"logprob":)";
  append_json_logprob(out, token.logprob);
  out += R"(,"bytes":[)";
  for (std::size_t i = 0; i < token.bytes.size(); ++i) {
    if (i > 0) out += ',';
    append_json_integer(out, static_cast<unsigned char>(token.bytes[i]));
  }
  out += ']';
}

std::string completion_token_text(const std::string& bytes) {
  if (!text::find_invalid_utf8(bytes)) return bytes;
  static constexpr std::string_view kHex = "0123456789abcdef";
  std::string text = "bytes:";
  for (const char c : bytes) {
    text += "\\x";
    text += kHex[static_cast<unsigned char>(c) >> 4];
    text += kHex[static_cast<unsigned char>(c) & 0xF];
  }
  return text;
}

// Characters that begin in `bytes`; a character cut into several tokens counts once.
std::int64_t characters_begun(const std::string& bytes) {
  return std::count_if(bytes.begin(), bytes.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

void append_top_map(std::string& out, const OutputTokenInfo& info) {
  std::vector<std::string> keys;
  out += '{';
  const auto add = [&](const OutputToken& token) {
    std::string key = completion_token_text(token.bytes);
    if (std::find(keys.begin(), keys.end(), key) != keys.end()) return;
    if (!keys.empty()) out += ',';
    append_json_string(out, key);
    out += ':';
    append_json_logprob(out, token.logprob);
    keys.push_back(std::move(key));
  };
  for (const OutputToken& token : info.top) add(token);
  add(info.chosen);
  out += '}';
}

template <typename Item>
void append_list(std::string& out, const std::vector<OutputTokenInfo>& tokens, Item item) {
  out += '[';
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) out += ',';
    item(tokens[i]);
  }
  out += ']';
}

}  // namespace

void append_chat_logprobs(std::string& out, const std::vector<OutputTokenInfo>& tokens) {
  out += R"({"content":)";
  append_list(out, tokens, [&out](const OutputTokenInfo& info) {
    append_token_fields(out, info.chosen);
    out += R"(,"top_logprobs":[)";
    for (std::size_t i = 0; i < info.top.size(); ++i) {
      if (i > 0) out += ',';
      append_token_fields(out, info.top[i]);
      out += '}';
    }
    out += "]}";
  });
  out += R"(,"refusal":null})";
}

void append_completion_logprobs(std::string& out, const std::vector<OutputTokenInfo>& tokens,
                                std::int64_t& text_offset) {
  out += R"({"tokens":)";
  append_list(out, tokens, [&out](const OutputTokenInfo& info) {
    append_json_string(out, completion_token_text(info.chosen.bytes));
  });
  out += R"(,"token_logprobs":)";
  append_list(out, tokens, [&out](const OutputTokenInfo& info) {
    append_json_logprob(out, info.chosen.logprob);
  });
  out += R"(,"top_logprobs":)";
  append_list(out, tokens, [&out](const OutputTokenInfo& info) { append_top_map(out, info); });
  out += R"(,"text_offset":)";
  append_list(out, tokens, [&out, &text_offset](const OutputTokenInfo& info) {
    append_json_integer(out, text_offset);
    text_offset += characters_begun(info.chosen.bytes);
  });
  out += '}';
}

}  // namespace spindle::api
