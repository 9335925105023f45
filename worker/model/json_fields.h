#pragma once
// Typed reading of the fields of a small JSON object, with errors that name the field and its
// value.

#include <boost/json.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::model {

// One JSON object from text of bounded size and depth. `what` names the file in errors.
Result<boost::json::object> parse_json_object(std::string_view text, std::string_view what);

// The value as JSON text, cut to a length fit for a message.
std::string show(const boost::json::value& value);

// True for a JSON number of that value, integer or not.
bool is_number(const boost::json::value& value, double number);

// kUnimplemented: `name` (quoted already) has a value that is understood but not supported.
Status refuse_value(const std::string& name, const boost::json::value& value,
                    std::string_view supported);

// A closed interval, or one open below when `above_min`.
struct NumberRange {
  double min = 0;
  double max = 0;
  bool above_min = false;
};

// Reads fields one after the other and remembers the first failure, so that the caller checks
// status() once at the end. A field that is missing or null reads as nullopt.
// Does not own the object, which must outlive it.
//
// Thread-safety: one thread at a time.
class FieldReader {
 public:
  // `prefix` goes in front of field names in messages, e.g. "rope_scaling.".
  explicit FieldReader(const boost::json::object& object, std::string prefix = {})
      : object_(object), prefix_(std::move(prefix)) {}

  const Status& status() const { return status_; }
  void fail(Status status) {
    if (status_.ok()) status_ = std::move(status);
  }
  // "hidden_act" with the prefix, quoted.
  std::string name_of(std::string_view field) const;

  // Null when missing or JSON null.
  const boost::json::value* find(std::string_view field) const;
  std::optional<std::int64_t> integer(std::string_view field, std::int64_t min, std::int64_t max);
  std::int64_t required_integer(std::string_view field, std::int64_t min, std::int64_t max);
  std::optional<float> number(std::string_view field, NumberRange range);
  std::optional<bool> boolean(std::string_view field);
  std::optional<std::string> string(std::string_view field);
  // One token id or a list of at most 256, each in [0, end).
  std::optional<std::vector<std::int32_t>> token_ids(std::string_view field, std::int64_t end);

 private:
  void wrong(std::string_view field, const std::string& expected, const boost::json::value& value);

  const boost::json::object& object_;
  std::string prefix_;
  Status status_;
};

}  // namespace spindle::model
