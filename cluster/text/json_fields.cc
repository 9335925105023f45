#include "cluster/text/json_fields.h"

#include <utility>

namespace spindle::text {
namespace {

Status wrong_type(const std::string& path, std::string_view wanted,
                  const boost::json::value* value) {
  const std::string found =
      value == nullptr ? "nothing" : std::string(boost::json::to_string(value->kind()));
  return invalid_argument(path + " must be " + std::string(wanted) + ", found " + found);
}

}  // namespace

Result<boost::json::value> parse_json(std::string_view json, std::size_t max_depth) {
  boost::json::parse_options options;
  options.max_depth = max_depth;
  boost::json::stream_parser parser({}, options);
  boost::json::error_code error;
  const std::size_t n_parsed = parser.write_some(json.data(), json.size(), error);
  if (!error && n_parsed < json.size()) error = boost::json::error::extra_data;
  if (!error) parser.finish(error);
  if (error) {
    return invalid_argument("JSON: " + error.message() + " near byte " + std::to_string(n_parsed));
  }
  return parser.release();
}

Result<JsonFields> JsonFields::of(const boost::json::value& value, std::string path) {
  const auto* object = value.if_object();
  if (object == nullptr) return wrong_type(path, "an object", &value);
  return JsonFields(*object, std::move(path));
}

std::string JsonFields::path_of(std::string_view key) const {
  return path_.empty() ? std::string(key) : path_ + "." + std::string(key);
}

const boost::json::value* JsonFields::find(std::string_view key) const {
  const auto* value = object_->if_contains(boost::json::string_view(key.data(), key.size()));
  return value == nullptr || value->is_null() ? nullptr : value;
}

Result<bool> JsonFields::boolean(std::string_view key, bool if_absent) const {
  const auto* value = find(key);
  if (value == nullptr) return if_absent;
  if (!value->is_bool()) return wrong_type(path_of(key), "true or false", value);
  return value->get_bool();
}

Result<std::string_view> JsonFields::string(std::string_view key) const {
  const auto* value = find(key);
  if (value == nullptr || !value->is_string()) return wrong_type(path_of(key), "a string", value);
  return std::string_view(value->get_string().data(), value->get_string().size());
}

Result<std::string_view> JsonFields::string(std::string_view key,
                                            std::string_view if_absent) const {
  return find(key) == nullptr ? Result<std::string_view>(if_absent) : string(key);
}

Result<const boost::json::array*> JsonFields::array(std::string_view key) const {
  const auto* value = find(key);
  if (value == nullptr || !value->is_array()) return wrong_type(path_of(key), "an array", value);
  return &value->get_array();
}

Result<JsonFields> JsonFields::object(std::string_view key) const {
  const auto* value = find(key);
  if (value == nullptr) return wrong_type(path_of(key), "an object", nullptr);
  return of(*value, path_of(key));
}

}  // namespace spindle::text
