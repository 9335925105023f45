#pragma once
// The prompt of a chat request: messages, tools and the template's variables.

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "cluster/api/completion.h"
#include "cluster/api/json_fields.h"

namespace spindle::api {

using CompletionPrompt = std::variant<std::string, std::vector<std::int32_t>>;

// Reads "messages", "tools", "chat_template_kwargs" and "add_generation_prompt". Messages keep the
// fields a template may use, and "compress" marks where the KV is compressed; content parts of type
// text are joined by newlines (as vLLM does), and the arguments of earlier tool calls, which travel
// as JSON text, become objects.
void read_chat_prompt(FieldReader& fields, ChatPrompt& out);

}  // namespace spindle::api
