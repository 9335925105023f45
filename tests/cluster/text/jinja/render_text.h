#pragma once
// Renders a template in a test: the text, or "error: " and the message.

#include <boost/json.hpp>
#include <string>

#include "cluster/text/chat_template.h"

namespace spindle::text::jinja {

inline std::string render_text(const std::string& source, const boost::json::object& context = {},
                               const RenderOptions& options = {}) {
  const auto parsed = ChatTemplate::parse(source);
  if (!parsed.ok()) return "error: " + parsed.status().message();
  const auto text = parsed->render(context, options);
  return text.ok() ? *text : "error: " + text.status().message();
}

}  // namespace spindle::text::jinja
