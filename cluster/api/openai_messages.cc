#include "cluster/api/openai_messages.h"

#include <fmt/format.h>

#include <utility>

namespace spindle::api {
namespace json = boost::json;

namespace {

constexpr std::size_t kMaxRoleBytes = 64;

// Joins content parts; anything but text is refused.
std::optional<ApiError> join_parts(const json::array& parts, const std::string& where,
                                   std::string& text) {
  bool first = true;
  for (const json::value& part : parts) {
    const json::object* object = part.if_object();
    if (object == nullptr) {
      return ApiError{invalid_argument(where + ".content must hold objects"), where + ".content"};
    }
    FieldReader fields(*object, where + ".content.");
    const std::string type = fields.string("type").value_or("");
    if (fields.ok() && type != "text") {
      fields.unsupported("type", "content parts other than {\"type\": \"text\"} are not supported");
    }
    const auto piece = fields.string("text");
    if (fields.ok() && !piece) fields.fail("text", "a text part needs a text");
    if (!fields.ok()) return fields.error();
    if (!first) text += '\n';
    first = false;
    text += *piece;
  }
  return std::nullopt;
}

void decode_arguments(json::object& message) {
  json::value* calls = message.if_contains("tool_calls");
  if (calls == nullptr || !calls->is_array()) return;
  for (json::value& call : calls->get_array()) {
    if (!call.is_object()) continue;
    json::value* function = call.get_object().if_contains("function");
    if (function == nullptr || !function->is_object()) continue;
    json::value* arguments = function->get_object().if_contains("arguments");
    if (arguments == nullptr || !arguments->is_string()) continue;
    // Text that is no JSON object stays text: the template may still print it.
    auto parsed = parse_json(arguments->get_string());
    if (parsed.ok() && parsed->is_object()) *arguments = std::move(*parsed);
  }
}

std::optional<ApiError> read_content(const json::object& source, const std::string& where,
                                     json::object& message) {
  const json::value* content = source.if_contains("content");
  if (content == nullptr || content->is_null()) {
    // Only an assistant's turn that called tools may be without a text.
    const json::value* calls = source.if_contains("tool_calls");
    if (calls == nullptr || !calls->is_array() || calls->get_array().empty()) {
      return ApiError{invalid_argument(where + ".content is missing"), where + ".content"};
    }
    message["content"] = "";
    return std::nullopt;
  }
  if (content->is_string()) {
    message["content"] = content->get_string();
    return std::nullopt;
  }
  if (content->is_array()) {
    std::string text;
    auto error = join_parts(content->get_array(), where, text);
    message["content"] = text;
    return error;
  }
  return ApiError{invalid_argument(where + ".content must be a string or an array of text parts"),
                  where + ".content"};
}

std::optional<ApiError> read_message(const json::value& value, std::size_t index, ChatPrompt& out) {
  const std::string where = fmt::format("messages[{}]", index);
  const json::object* source = value.if_object();
  if (source == nullptr) {
    return ApiError{invalid_argument(where + " must be an object"), where};
  }
  FieldReader fields(*source, where + ".");
  const auto role = fields.string("role");
  if (fields.ok() && (!role || role->empty() || role->size() > kMaxRoleBytes)) {
    fields.fail("role",
                fmt::format("{}.role must be a string of 1 to {} bytes", where, kMaxRoleBytes));
  }
  const bool compress = fields.boolean("compress").value_or(false);
  if (!fields.ok()) return fields.error();
  json::object message = *source;
  message.erase("compress");  // ours, not the template's
  if (auto error = read_content(*source, where, message)) return error;
  decode_arguments(message);
  if (compress) out.compress_after.push_back(out.messages.size());
  out.messages.push_back(std::move(message));
  return std::nullopt;
}

void read_tools(FieldReader& fields, ChatPrompt& out) {
  const json::array* tools = fields.array("tools");
  if (tools == nullptr || tools->empty()) return;
  for (const json::value& tool : *tools) {
    if (!tool.is_object()) {
      fields.fail("tools", "tools must be an array of objects");
      return;
    }
  }
  out.template_variables["tools"] = *tools;
}

}  // namespace

void read_chat_prompt(FieldReader& fields, ChatPrompt& out) {
  out.add_generation_prompt = fields.boolean("add_generation_prompt").value_or(true);
  if (const json::object* variables = fields.object("chat_template_kwargs")) {
    out.template_variables = *variables;
  }
  read_tools(fields, out);
  const json::array* messages = fields.array("messages");
  if (messages == nullptr) {
    fields.fail("messages", "messages is missing");
    return;
  }
  if (messages->empty()) {
    fields.fail("messages", "messages must not be empty");
    return;
  }
  for (std::size_t i = 0; i < messages->size() && fields.ok(); ++i) {
    fields.keep(read_message((*messages)[i], i, out));
  }
}

}  // namespace spindle::api
