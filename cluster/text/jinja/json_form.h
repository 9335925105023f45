#pragma once
// Between JSON and values: the context of a rendering, and the tojson filter.

#include <boost/json.hpp>
#include <cstdint>
#include <optional>
#include <string>

#include "cluster/text/jinja/runtime.h"
#include "cluster/text/jinja/value.h"

namespace spindle::text::jinja {

// Strings stay views into `json`, which must outlive the rendering.
Value from_json(Runtime& runtime, const boost::json::value& json);

// The arguments of Python's json.dumps that templates use.
struct JsonStyle {
  bool ensure_ascii = false;
  std::optional<std::string> indent{};  // the text of one level; none: all on one line
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool sort_keys = false;
};

// json.dumps(value, ...). Fails on values JSON has no form for.
Value to_json(Runtime& runtime, const Value& value, const JsonStyle& style);

}  // namespace spindle::text::jinja
