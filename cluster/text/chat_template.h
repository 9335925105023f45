#pragma once
// Chat templates: from a conversation in JSON to the text that the model continues.

#include <boost/json.hpp>
#include <ctime>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "cluster/text/jinja/runtime.h"
#include "kernels/core/status.h"

namespace spindle::text {

struct RenderOptions {
  jinja::RenderLimits limits{};
  // What strftime_now shows; the time of rendering if absent.
  std::optional<std::time_t> now{};
};

// A parsed Jinja template, with the settings of transformers (trim_blocks, lstrip_blocks, loop
// controls, immutable values). jinja/README.md lists the language.
//
// Thread-safety: immutable; any number of threads may render. Copies share the parsed template.
class ChatTemplate {
 public:
  static constexpr std::size_t kMaxSourceBytes = std::size_t{1} << 20;

  // Errors name line and column.
  static Result<ChatTemplate> parse(std::string source);

  // Errors: kInvalidArgument for what the template itself refuses (raise_exception) or does wrong,
  // kTooLarge when a limit is passed.
  Result<std::string> render(const boost::json::object& context,
                             const RenderOptions& options = {}) const;
  // With the members of `defaults` that the context does not have.
  Result<std::string> render(const boost::json::object& context,
                             const boost::json::object& defaults,
                             const RenderOptions& options = {}) const;

  const std::string& source() const;

 private:
  struct Parsed;

  explicit ChatTemplate(std::shared_ptr<const Parsed> parsed) : parsed_(std::move(parsed)) {}

  std::shared_ptr<const Parsed> parsed_;
};

// A model folder's template with the variables that it may use beside the conversation.
struct ModelChatTemplate {
  ChatTemplate chat_template;
  // "bos_token", "eos_token" and the other "*_token" entries of tokenizer_config.json, as strings.
  boost::json::object special_tokens;

  // Renders what transformers' apply_chat_template does: `conversation` holds "messages" and may
  // hold "tools", "documents", "add_generation_prompt" and anything else the template reads. It
  // wins over special_tokens; tools and documents are none if absent.
  Result<std::string> render(const boost::json::object& conversation,
                             const RenderOptions& options = {}) const;
};

// Reads chat_template.jinja, or else the "chat_template" of tokenizer_config.json: a string, or a
// list of {name, template} of which "default" is taken. kNotFound if the model has none.
Result<ModelChatTemplate> load_chat_template(const std::filesystem::path& model_folder);

}  // namespace spindle::text
