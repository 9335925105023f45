#pragma once
// Parsing of untrusted JSON, and typed access to the fields of an object.

#include <boost/json.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/api/completion.h"
#include "kernels/core/status.h"

namespace spindle::api {

// Strict JSON in valid UTF-8, at most 32 levels deep; nothing may follow the value. Numbers too
// large for a double are refused.
Result<boost::json::value> parse_json(std::string_view text);

// Typed reads of optional fields: absent and null are the same. The first error is kept, names the
// field by `prefix` + name, and makes all later reads return nothing; read everything, then look at
// error() once.
class FieldReader {
 public:
  explicit FieldReader(const boost::json::object& object, std::string prefix = {})
      : object_(object), prefix_(std::move(prefix)) {}

  bool has(std::string_view name) const;
  std::optional<bool> boolean(std::string_view name);
  // Whole numbers; 5.0 is one, "5" and true are not.
  std::optional<std::int64_t> integer(std::string_view name);
  // The full range of 64 bits, signed or unsigned, as a bit pattern.
  std::optional<std::uint64_t> bits64(std::string_view name);
  std::optional<double> number(std::string_view name);
  std::optional<std::string> string(std::string_view name);
  const boost::json::array* array(std::string_view name);
  const boost::json::object* object(std::string_view name);
  // The value whatever its type, or nullptr.
  const boost::json::value* any(std::string_view name) const;

  void fail(std::string_view name, std::string message);
  void unsupported(std::string_view name, std::string message);
  // Keeps an error from elsewhere unless there is one already.
  void keep(std::optional<ApiError> error);
  bool ok() const { return !error_.has_value(); }
  const std::optional<ApiError>& error() const { return error_; }

 private:
  const boost::json::value* find(std::string_view name) const;
  void wrong_type(std::string_view name, std::string_view expected, const boost::json::value& got);

  const boost::json::object& object_;
  std::string prefix_;
  std::optional<ApiError> error_;
};

// A whole number in any of JSON's number forms.
std::optional<std::int64_t> whole_number(const boost::json::value& value);
// False when the array holds anything but whole numbers.
bool read_integers(const boost::json::array& array, std::vector<std::int64_t>& out);

}  // namespace spindle::api
