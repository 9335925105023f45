#include "cluster/api/json_fields.h"

#include <fmt/format.h>

#include <bit>
#include <cmath>

#include "cluster/api/request_validation.h"

namespace spindle::api {
namespace json = boost::json;

namespace {

constexpr std::size_t kMaxDepth = 32;

std::string_view kind_name(const json::value& value) {
  switch (value.kind()) {
    case json::kind::null:
      return "null";
    case json::kind::bool_:
      return "a boolean";
    case json::kind::int64:
    case json::kind::uint64:
    case json::kind::double_:
      return "a number";
    case json::kind::string:
      return "a string";
    case json::kind::array:
      return "an array";
    case json::kind::object:
      return "an object";
  }
  return "?";
}

// Depth is bounded by the parser.
bool all_finite(const json::value& value) {
  if (const double* number = value.if_double()) return std::isfinite(*number);
  if (const json::array* array = value.if_array()) {
    for (const json::value& item : *array) {
      if (!all_finite(item)) return false;
    }
  }
  if (const json::object* object = value.if_object()) {
    for (const auto& member : *object) {
      if (!all_finite(member.value())) return false;
    }
  }
  return true;
}

}  // namespace

Result<json::value> parse_json(std::string_view text) {
  json::parse_options options;
  options.max_depth = kMaxDepth;
  boost::system::error_code error;
  json::value value =
      json::parse(json::string_view(text.data(), text.size()), error, json::storage_ptr(), options);
  if (error) return invalid_argument("the body is not valid JSON: " + error.message());
  if (!all_finite(value)) return invalid_argument("the body holds a number out of range");
  return value;
}

std::optional<std::int64_t> whole_number(const json::value& value) {
  if (const std::int64_t* number = value.if_int64()) return *number;
  if (const double* number = value.if_double()) {
    // Beyond 2^53 a double no longer says which integer was meant.
    if (std::trunc(*number) == *number && std::abs(*number) <= 0x1p53) {
      return static_cast<std::int64_t>(*number);
    }
  }
  return std::nullopt;
}

bool read_integers(const json::array& array, std::vector<std::int64_t>& out) {
  out.reserve(array.size());
  for (const json::value& item : array) {
    const auto number = item.is_number() ? whole_number(item) : std::nullopt;
    if (!number) return false;
    out.push_back(*number);
  }
  return true;
}

const json::value* FieldReader::find(std::string_view name) const {
  const json::value* value = object_.if_contains(json::string_view(name.data(), name.size()));
  return value == nullptr || value->is_null() ? nullptr : value;
}

bool FieldReader::has(std::string_view name) const { return find(name) != nullptr; }

const json::value* FieldReader::any(std::string_view name) const { return find(name); }

void FieldReader::keep(std::optional<ApiError> error) {
  if (!error_) error_ = std::move(error);
}

void FieldReader::fail(std::string_view name, std::string message) {
  keep(invalid_field(prefix_ + std::string(name), std::move(message)));
}

void FieldReader::unsupported(std::string_view name, std::string message) {
  keep(ApiError{unimplemented(std::move(message)), prefix_ + std::string(name)});
}

void FieldReader::wrong_type(std::string_view name, std::string_view expected,
                             const json::value& got) {
  ApiError error = invalid_field(
      prefix_ + std::string(name),
      fmt::format("{}{} must be {}, got {}", prefix_, name, expected, kind_name(got)));
  error.code = "invalid_type";
  keep(std::move(error));
}

std::optional<bool> FieldReader::boolean(std::string_view name) {
  const json::value* value = find(name);
  if (!ok() || value == nullptr) return std::nullopt;
  if (const bool* flag = value->if_bool()) return *flag;
  wrong_type(name, "a boolean", *value);
  return std::nullopt;
}

std::optional<std::int64_t> FieldReader::integer(std::string_view name) {
  const json::value* value = find(name);
  if (!ok() || value == nullptr) return std::nullopt;
  if (!value->is_number()) {
    wrong_type(name, "an integer", *value);
    return std::nullopt;
  }
  const auto number = whole_number(*value);
  if (!number) fail(name, fmt::format("{}{} must be an integer of 64 bits", prefix_, name));
  return number;
}

std::optional<std::uint64_t> FieldReader::bits64(std::string_view name) {
  const json::value* value = find(name);
  if (!ok() || value == nullptr) return std::nullopt;
  if (const std::uint64_t* number = value->if_uint64()) return *number;
  const auto number = integer(name);
  if (!number) return std::nullopt;
  return std::bit_cast<std::uint64_t>(*number);
}

std::optional<double> FieldReader::number(std::string_view name) {
  const json::value* value = find(name);
  if (!ok() || value == nullptr) return std::nullopt;
  if (const double* number = value->if_double()) return *number;
  if (const std::int64_t* number = value->if_int64()) return static_cast<double>(*number);
  if (const std::uint64_t* number = value->if_uint64()) return static_cast<double>(*number);
  wrong_type(name, "a number", *value);
  return std::nullopt;
}

std::optional<std::string> FieldReader::string(std::string_view name) {
  const json::value* value = find(name);
  if (!ok() || value == nullptr) return std::nullopt;
  if (const json::string* text = value->if_string()) return std::string(*text);
  wrong_type(name, "a string", *value);
  return std::nullopt;
}

const json::array* FieldReader::array(std::string_view name) {
  const json::value* value = find(name);
  if (!ok() || value == nullptr) return nullptr;
  if (const json::array* array = value->if_array()) return array;
  wrong_type(name, "an array", *value);
  return nullptr;
}

const json::object* FieldReader::object(std::string_view name) {
  const json::value* value = find(name);
  if (!ok() || value == nullptr) return nullptr;
  if (const json::object* object = value->if_object()) return object;
  wrong_type(name, "an object", *value);
  return nullptr;
}

}  // namespace spindle::api
