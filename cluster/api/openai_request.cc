#include "cluster/api/openai_request.h"

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <limits>
#include <utility>

#include "cluster/api/json_fields.h"
#include "cluster/api/openai_kv.h"
#include "cluster/api/openai_messages.h"

namespace spindle::api {
namespace json = boost::json;

namespace {

// Known fields that are not supported. kTrue: refused when true; kAny: refused when present and not
// an empty string, array or object.
struct RefusedField {
  enum class When : std::uint8_t { kTrue, kAny };
  std::string_view name;
  When when;
};

constexpr std::array kRefusedEverywhere{
    RefusedField{"use_beam_search", RefusedField::When::kTrue},
    RefusedField{"prompt_logprobs", RefusedField::When::kAny},
    RefusedField{"allowed_token_ids", RefusedField::When::kAny},
    RefusedField{"bad_words", RefusedField::When::kAny},
    RefusedField{"truncate_prompt_tokens", RefusedField::When::kAny},
    RefusedField{"return_token_ids", RefusedField::When::kTrue},
    RefusedField{"return_tokens_as_token_ids", RefusedField::When::kTrue},
    RefusedField{"guided_json", RefusedField::When::kAny},
    RefusedField{"guided_regex", RefusedField::When::kAny},
    RefusedField{"guided_choice", RefusedField::When::kAny},
    RefusedField{"guided_grammar", RefusedField::When::kAny},
    RefusedField{"structured_outputs", RefusedField::When::kAny},
    RefusedField{"logits_processors", RefusedField::When::kAny},
    RefusedField{"prompt_scores", RefusedField::When::kAny},  // of the TCP API
};
constexpr std::array kRefusedInChat{
    RefusedField{"functions", RefusedField::When::kAny},
    RefusedField{"function_call", RefusedField::When::kAny},
    RefusedField{"audio", RefusedField::When::kAny},
    RefusedField{"web_search_options", RefusedField::When::kAny},
    RefusedField{"echo", RefusedField::When::kTrue},
    RefusedField{"continue_final_message", RefusedField::When::kTrue},
    RefusedField{"chat_template", RefusedField::When::kAny},
    RefusedField{"documents", RefusedField::When::kAny},
};
constexpr std::array kRefusedInCompletion{
    RefusedField{"suffix", RefusedField::When::kAny},
    RefusedField{"prompt_embeds", RefusedField::When::kAny},
};

bool is_empty(const json::value& value) {
  if (const json::string* text = value.if_string()) return text->empty();
  if (const json::array* array = value.if_array()) return array->empty();
  if (const json::object* object = value.if_object()) return object->empty();
  return false;
}

template <std::size_t N>
void refuse_fields(FieldReader& fields, const std::array<RefusedField, N>& table) {
  for (const RefusedField& field : table) {
    const json::value* value = fields.any(field.name);
    if (value == nullptr) continue;
    const bool asked = field.when == RefusedField::When::kTrue
                           ? fields.boolean(field.name).value_or(false)
                           : !is_empty(*value);
    if (asked) fields.unsupported(field.name, fmt::format("{} is not supported", field.name));
  }
}

void refuse_response_format(FieldReader& fields) {
  const json::object* format = fields.object("response_format");
  if (format == nullptr) return;
  FieldReader inner(*format, "response_format.");
  const std::string type = inner.string("type").value_or("");
  fields.keep(inner.error());
  if (type != "text") {
    fields.unsupported("response_format",
                       "response_format other than {\"type\": \"text\"} is not supported");
  }
}

void refuse_beam_length_penalty(FieldReader& fields) {
  if (fields.number("length_penalty").value_or(1.0) != 1.0) {
    fields.unsupported("length_penalty",
                       "length_penalty needs beam search, which is not supported");
  }
}

void read_stop(FieldReader& fields, std::vector<std::string>& stop) {
  const json::value* value = fields.any("stop");
  if (value == nullptr) return;
  if (const json::string* text = value->if_string()) {
    stop.emplace_back(*text);
    return;
  }
  const json::array* array = value->if_array();
  if (array == nullptr) {
    fields.fail("stop", "stop must be a string or an array of strings");
    return;
  }
  for (const json::value& item : *array) {
    const json::string* text = item.if_string();
    if (text == nullptr) {
      fields.fail("stop", "stop must be a string or an array of strings");
      return;
    }
    stop.emplace_back(*text);
  }
}

void read_logit_bias(FieldReader& fields, SamplingRequest& sampling) {
  const json::object* bias = fields.object("logit_bias");
  if (bias == nullptr) return;
  for (const auto& member : *bias) {
    const json::string_view key = member.key();
    std::int64_t id = 0;
    const auto end = std::from_chars(key.data(), key.data() + key.size(), id);
    const bool is_id = end.ec == std::errc() && end.ptr == key.data() + key.size();
    if (!is_id || !member.value().is_number()) {
      fields.fail("logit_bias", "logit_bias must map token ids to numbers");
      return;
    }
    sampling.logit_bias.emplace_back(id, member.value().to_number<double>());
  }
}

// Token ids in a JSON array; ranges are checked where the vocabulary is known.
bool read_prompt_ids(const json::array& array, std::vector<std::int32_t>& ids) {
  std::vector<std::int64_t> wide;
  if (!read_integers(array, wide)) return false;
  for (const std::int64_t id : wide) {
    if (id < 0 || id > std::numeric_limits<std::int32_t>::max()) return false;
    ids.push_back(static_cast<std::int32_t>(id));
  }
  return true;
}

void read_sampling(FieldReader& fields, SamplingRequest& out) {
  out.min_tokens = fields.integer("min_tokens");
  out.temperature = fields.number("temperature");
  out.top_k = fields.integer("top_k");
  out.top_p = fields.number("top_p");
  out.min_p = fields.number("min_p");
  out.repetition_penalty = fields.number("repetition_penalty");
  out.presence_penalty = fields.number("presence_penalty");
  out.frequency_penalty = fields.number("frequency_penalty");
  out.seed = fields.bits64("seed");
  out.n = fields.integer("n");
  out.max_tokens = fields.integer("max_tokens");
  read_stop(fields, out.stop);
  if (const json::array* ids = fields.array("stop_token_ids")) {
    if (!read_integers(*ids, out.stop_token_ids)) {
      fields.fail("stop_token_ids", "stop_token_ids must be an array of integers");
    }
  }
  read_logit_bias(fields, out);
  out.include_stop_str_in_output = fields.boolean("include_stop_str_in_output").value_or(false);
  out.ignore_eos = fields.boolean("ignore_eos").value_or(false);
  out.skip_special_tokens = fields.boolean("skip_special_tokens").value_or(true);
}

void read_stream_options(FieldReader& fields, OpenAiRequest& out) {
  out.stream = fields.boolean("stream").value_or(false);
  const json::object* options = fields.object("stream_options");
  if (options == nullptr) return;
  if (!out.stream) {
    fields.fail("stream_options", "stream_options is only allowed together with stream");
  }
  FieldReader inner(*options, "stream_options.");
  out.include_usage = inner.boolean("include_usage").value_or(false);
  if (inner.boolean("continuous_usage_stats").value_or(false)) {
    inner.unsupported("continuous_usage_stats", "continuous_usage_stats is not supported");
  }
  fields.keep(inner.error());
}

// What chat and completion bodies share. `request` is the first prompt's.
void read_common(FieldReader& fields, const config::Limits& limits, OpenAiRequest& out,
                 GenerateRequest& request) {
  refuse_fields(fields, kRefusedEverywhere);
  refuse_response_format(fields);
  refuse_beam_length_penalty(fields);
  request.model = fields.string("model").value_or("");
  read_sampling(fields, request.sampling);
  read_kv_fields(fields, request);
  request.priority = fields.integer("priority").value_or(0);
  request.timeout_ms = fields.integer("timeout_ms").value_or(0);
  read_stream_options(fields, out);
  request.add_special_tokens = fields.boolean("add_special_tokens").value_or(true);
  // The other ranges are the service's to check; this one sizes what the response is collected in.
  const std::int64_t n = request.sampling.n.value_or(1);
  if (n < 1 || n > limits.max_n()) {
    fields.fail("n", fmt::format("n must be between 1 and {}, got {}", limits.max_n(), n));
  } else {
    out.n = static_cast<std::int32_t>(n);
  }
}

void read_chat_logprobs(FieldReader& fields, SamplingRequest& sampling) {
  const bool wanted = fields.boolean("logprobs").value_or(false);
  const auto top = fields.integer("top_logprobs");
  if (top.value_or(0) != 0 && !wanted) {
    fields.fail("top_logprobs", "top_logprobs needs logprobs to be true");
  }
  if (wanted) sampling.logprobs = top.value_or(0);
}

void refuse_forced_tools(FieldReader& fields) {
  const json::value* choice = fields.any("tool_choice");
  if (choice == nullptr) return;
  const json::string* text = choice->if_string();
  if (text != nullptr && (*text == "none" || *text == "auto")) return;
  fields.unsupported("tool_choice",
                     "tool_choice other than \"none\" and \"auto\" is not supported");
}

void read_modalities(FieldReader& fields) {
  const json::array* modalities = fields.array("modalities");
  if (modalities == nullptr) return;
  for (const json::value& item : *modalities) {
    if (!item.is_string() || item.get_string() != "text") {
      fields.unsupported("modalities", "modalities other than \"text\" are not supported");
    }
  }
}

enum class PromptShape : std::uint8_t { kIds, kTexts, kIdLists, kMixed };

PromptShape shape_of(const json::array& prompts) {
  const json::kind first = prompts.front().kind();
  const bool number = prompts.front().is_number();
  for (const json::value& item : prompts) {
    if (number ? !item.is_number() : item.kind() != first) return PromptShape::kMixed;
  }
  if (number) return PromptShape::kIds;
  if (first == json::kind::string) return PromptShape::kTexts;
  return first == json::kind::array ? PromptShape::kIdLists : PromptShape::kMixed;
}

constexpr std::string_view kPromptTypes =
    "prompt must be a string, an array of strings, an array of token ids or an array of such "
    "arrays";

void read_prompt_list(FieldReader& fields, const json::array& list, std::size_t max_prompts,
                      std::vector<CompletionPrompt>& prompts) {
  if (list.empty()) {
    fields.fail("prompt", "prompt must not be empty");
    return;
  }
  const PromptShape shape = shape_of(list);
  if (shape == PromptShape::kMixed) {
    fields.fail("prompt", std::string(kPromptTypes));
    return;
  }
  if (shape == PromptShape::kIds) {
    std::vector<std::int32_t> ids;
    if (!read_prompt_ids(list, ids))
      fields.fail("prompt", "prompt holds a number that is no token id");
    prompts.emplace_back(std::move(ids));
    return;
  }
  if (list.size() > max_prompts) {
    fields.fail("prompt", fmt::format("prompt must have at most {} elements, got {}", max_prompts,
                                      list.size()));
    return;
  }
  for (const json::value& item : list) {
    if (const json::string* text = item.if_string()) {
      prompts.emplace_back(std::string(*text));
      continue;
    }
    std::vector<std::int32_t> ids;
    if (!read_prompt_ids(item.get_array(), ids)) {
      fields.fail("prompt", "prompt holds an array that is not of token ids");
      return;
    }
    prompts.emplace_back(std::move(ids));
  }
}

std::vector<CompletionPrompt> read_prompts(FieldReader& fields, std::size_t max_prompts) {
  std::vector<CompletionPrompt> prompts;
  const json::value* value = fields.any("prompt");
  if (value == nullptr) {
    fields.fail("prompt", "prompt is missing");
  } else if (const json::string* text = value->if_string()) {
    prompts.emplace_back(std::string(*text));
  } else if (const json::array* list = value->if_array()) {
    read_prompt_list(fields, *list, max_prompts, prompts);
  } else {
    fields.fail("prompt", std::string(kPromptTypes));
  }
  return prompts;
}

}  // namespace

std::optional<ApiError> parse_chat_request(const json::object& body, const config::Limits& limits,
                                           OpenAiRequest& out) {
  out.kind = OpenAiKind::kChat;
  FieldReader fields(body);
  GenerateRequest request;
  refuse_fields(fields, kRefusedInChat);
  refuse_forced_tools(fields);
  read_modalities(fields);
  read_common(fields, limits, out, request);
  if (fields.has("max_completion_tokens")) {
    request.sampling.max_tokens = fields.integer("max_completion_tokens");
  }
  read_chat_logprobs(fields, request.sampling);
  out.logprobs = request.sampling.logprobs.has_value();
  ChatPrompt prompt;
  read_chat_prompt(fields, prompt);
  request.prompt = std::move(prompt);
  if (!fields.ok()) return fields.error();
  out.prompts.push_back(std::move(request));
  return std::nullopt;
}

std::optional<ApiError> parse_completion_request(const json::object& body,
                                                 const config::Limits& limits, OpenAiRequest& out) {
  out.kind = OpenAiKind::kCompletion;
  FieldReader fields(body);
  GenerateRequest request;
  refuse_fields(fields, kRefusedInCompletion);
  read_common(fields, limits, out, request);
  const auto best_of = fields.integer("best_of");
  if (best_of && *best_of != request.sampling.n.value_or(1)) {
    fields.unsupported("best_of", "best_of other than n is not supported");
  }
  request.sampling.logprobs = fields.integer("logprobs");
  out.logprobs = request.sampling.logprobs.has_value();
  request.echo = fields.boolean("echo").value_or(false);
  if (request.echo && out.logprobs) {
    fields.unsupported("echo", "echo together with logprobs is not supported");
  }
  const auto max_prompts = static_cast<std::size_t>(limits.max_requests_per_connection());
  std::vector<CompletionPrompt> prompts = read_prompts(fields, max_prompts);
  const auto n_choices = prompts.size() * static_cast<std::size_t>(out.n);
  if (prompts.size() > 1 && n_choices > max_prompts) {
    fields.fail("n", fmt::format("{} prompts with n = {} are more than {} choices", prompts.size(),
                                 out.n, max_prompts));
  }
  if (prompts.size() > 1 && !request.session_id.empty()) {
    fields.fail("session_id", "session_id needs a single prompt");
  }
  for (const CompletionPrompt& prompt : prompts) {
    if (std::visit([](const auto& value) { return value.empty(); }, prompt)) {
      fields.fail("prompt", "prompt must not be empty");
    }
  }
  if (!fields.ok()) return fields.error();
  for (CompletionPrompt& prompt : prompts) {
    GenerateRequest one = request;
    std::visit([&one](auto& value) { one.prompt = std::move(value); }, prompt);
    out.prompts.push_back(std::move(one));
  }
  return std::nullopt;
}

std::optional<ApiError> parse_tokenize_request(const json::object& body, TokenizeRequest& out) {
  FieldReader fields(body);
  GenerateRequest& request = out.request;
  request.model = fields.string("model").value_or("");
  out.return_token_strs = fields.boolean("return_token_strs").value_or(false);
  if (fields.has("messages")) {
    if (fields.has("prompt")) fields.fail("prompt", "give either prompt or messages");
    request.add_special_tokens = fields.boolean("add_special_tokens").value_or(false);
    ChatPrompt prompt;
    read_chat_prompt(fields, prompt);
    request.prompt = std::move(prompt);
  } else {
    request.add_special_tokens = fields.boolean("add_special_tokens").value_or(true);
    const auto prompt = fields.string("prompt");
    if (!fields.has("prompt")) fields.fail("prompt", "prompt is missing");
    request.prompt = prompt.value_or("");
  }
  return fields.error();
}

std::optional<ApiError> parse_detokenize_request(const json::object& body, DetokenizeRequest& out) {
  FieldReader fields(body);
  out.model = fields.string("model").value_or("");
  const json::array* tokens = fields.array("tokens");
  if (tokens == nullptr) {
    fields.fail("tokens", "tokens is missing");
  } else if (!read_prompt_ids(*tokens, out.tokens)) {
    fields.fail("tokens", "tokens must be an array of token ids");
  }
  return fields.error();
}

}  // namespace spindle::api
