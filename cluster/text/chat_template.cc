#include "cluster/text/chat_template.h"

#include <utility>

#include "cluster/text/file_reader.h"
#include "cluster/text/jinja/interpreter.h"
#include "cluster/text/jinja/lexer.h"
#include "cluster/text/jinja/parser.h"
#include "cluster/text/json_fields.h"
#include "cluster/text/utf8.h"

namespace spindle::text {
namespace {

constexpr std::size_t kMaxConfigBytes = std::size_t{16} << 20;
constexpr std::size_t kMaxConfigDepth = 32;

std::string_view view_of(const boost::json::string& string) {
  return {string.data(), string.size()};
}

// A special token is a string, or an object with its content.
std::optional<std::string_view> token_content(const boost::json::value& token) {
  if (const auto* text = token.if_string()) return view_of(*text);
  const auto* object = token.if_object();
  const auto* content = object == nullptr ? nullptr : object->if_contains("content");
  if (content == nullptr || !content->is_string()) return std::nullopt;
  return view_of(content->get_string());
}

boost::json::object read_special_tokens(const boost::json::object& config) {
  boost::json::object tokens;
  for (const auto& [name, value] : config) {
    const std::string_view key(name.data(), name.size());
    if (!key.ends_with("_token")) continue;
    if (const auto content = token_content(value)) tokens[name] = *content;
  }
  return tokens;
}

Result<std::string> find_template(const JsonFields& config) {
  const auto* entry = config.find("chat_template");
  if (entry == nullptr) return not_found("the model has no chat template");
  if (const auto* text = entry->if_string()) return std::string(view_of(*text));
  const auto* list = entry->if_array();
  if (list == nullptr) return invalid_argument("chat_template must be a string or a list");
  for (const auto& item : *list) {
    const auto fields = JsonFields::of(item, "chat_template[]");
    if (!fields.ok()) return fields.status();
    const auto name = fields->string("name");
    if (!name.ok()) return name.status();
    if (*name != "default") continue;
    const auto text = fields->string("template");
    if (!text.ok()) return text.status();
    return std::string(*text);
  }
  return not_found("chat_template has no entry named \"default\"");
}

}  // namespace

struct ChatTemplate::Parsed {
  std::string source;
  jinja::Body body;
};

Result<ChatTemplate> ChatTemplate::parse(std::string source) {
  if (source.size() > kMaxSourceBytes) {
    return too_large("the chat template has " + std::to_string(source.size()) +
                     " bytes, the limit is " + std::to_string(kMaxSourceBytes));
  }
  if (const auto offset = find_invalid_utf8(source)) {
    return invalid_argument("the chat template is not valid UTF-8 at byte " +
                            std::to_string(*offset));
  }
  auto parsed = std::make_shared<Parsed>();
  parsed->source = jinja::normalize_source(source);
  auto body = jinja::parse(parsed->source);
  if (!body.ok()) return body.status().with_context("chat template");
  parsed->body = *std::move(body);
  return ChatTemplate(std::move(parsed));
}

const std::string& ChatTemplate::source() const { return parsed_->source; }

Result<std::string> ChatTemplate::render(const boost::json::object& context,
                                         const RenderOptions& options) const {
  return render(context, {}, options);
}

Result<std::string> ChatTemplate::render(const boost::json::object& context,
                                         const boost::json::object& defaults,
                                         const RenderOptions& options) const {
  jinja::Runtime runtime(parsed_->source, options.limits, options.now);
  return jinja::render(parsed_->body, context, defaults, runtime);
}

Result<std::string> ModelChatTemplate::render(const boost::json::object& conversation,
                                              const RenderOptions& options) const {
  boost::json::object defaults = special_tokens;
  defaults["tools"] = nullptr;
  defaults["documents"] = nullptr;
  defaults["add_generation_prompt"] = false;
  return chat_template.render(conversation, defaults, options);
}

Result<ModelChatTemplate> load_chat_template(const std::filesystem::path& model_folder) {
  const std::filesystem::path config_path = model_folder / "tokenizer_config.json";
  const std::filesystem::path template_path = model_folder / "chat_template.jinja";
  boost::json::value document = boost::json::object();
  const auto config_text = read_file(config_path, kMaxConfigBytes);
  if (config_text.ok()) {
    auto parsed = parse_json(*config_text, kMaxConfigDepth);
    if (!parsed.ok()) return parsed.status().with_context(config_path.string());
    document = *std::move(parsed);
  } else if (config_text.status().code() != StatusCode::kNotFound) {
    return config_text.status();
  }
  const auto config = JsonFields::of(document, config_path.string());
  if (!config.ok()) return config.status();

  std::filesystem::path origin = template_path;
  auto source = read_file(template_path, ChatTemplate::kMaxSourceBytes);
  if (!source.ok() && source.status().code() == StatusCode::kNotFound) {
    origin = config_path;
    source = find_template(*config);
  }
  if (!source.ok()) return source.status().with_context(origin.string());
  auto parsed = ChatTemplate::parse(*std::move(source));
  if (!parsed.ok()) return parsed.status().with_context(origin.string());
  return ModelChatTemplate{*std::move(parsed), read_special_tokens(document.get_object())};
}

}  // namespace spindle::text
