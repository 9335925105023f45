#pragma once
// Typed access to the fields of a JSON object that came from a file: every mismatch becomes a
// Status that names the field by its path, such as "model.merges".

#include <boost/json.hpp>
#include <cstddef>
#include <string>
#include <string_view>

#include "kernels/core/status.h"

namespace spindle::text {

// Parses a whole document. kInvalidArgument with the byte offset if it is malformed or nested
// deeper than `max_depth`.
Result<boost::json::value> parse_json(std::string_view json, std::size_t max_depth);

// A view of one object; the object must outlive it. An absent field and a null field are the same.
class JsonFields {
 public:
  static Result<JsonFields> of(const boost::json::value& value, std::string path);

  const std::string& path() const { return path_; }
  std::string path_of(std::string_view key) const;
  // nullptr if absent or null.
  const boost::json::value* find(std::string_view key) const;

  Result<bool> boolean(std::string_view key, bool if_absent) const;
  Result<std::string_view> string(std::string_view key) const;
  Result<std::string_view> string(std::string_view key, std::string_view if_absent) const;
  Result<const boost::json::array*> array(std::string_view key) const;
  Result<JsonFields> object(std::string_view key) const;

 private:
  JsonFields(const boost::json::object& object, std::string path)
      : object_(&object), path_(std::move(path)) {}

  const boost::json::object* object_;
  std::string path_;
};

}  // namespace spindle::text
