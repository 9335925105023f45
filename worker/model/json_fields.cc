#include "worker/model/json_fields.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include "worker/model/printable.h"

namespace spindle::model {
namespace {

namespace json = boost::json;

constexpr std::size_t kMaxDepth = 16;
constexpr std::size_t kMaxTokenIds = 256;

std::string shown_number(double value) { return show(json::value(value)); }

std::optional<std::int64_t> as_integer(const json::value& value) {
  if (value.is_int64()) return value.get_int64();
  return std::nullopt;
}

}  // namespace

Result<json::object> parse_json_object(std::string_view text, std::string_view what) {
  json::parse_options options;
  options.max_depth = kMaxDepth;
  json::error_code ec;
  json::value value = json::parse(json::string_view(text.data(), text.size()), ec, {}, options);
  if (ec) return invalid_argument(std::string(what) + ": not valid JSON: " + ec.message());
  if (!value.is_object()) return invalid_argument(std::string(what) + ": not a JSON object");
  return std::move(value.get_object());
}

std::string show(const json::value& value) {
  if (!value.is_double()) return shortened(json::serialize(value));
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.9g", value.get_double());
  return text.data();
}

Status refuse_value(const std::string& name, const json::value& value, std::string_view supported) {
  return unimplemented(name + " is " + show(value) + "; supported: " + std::string(supported));
}

bool is_number(const json::value& value, double number) {
  json::error_code ec;
  return value.is_number() && value.to_number<double>(ec) == number;
}

std::string FieldReader::name_of(std::string_view field) const {
  return in_quotes(prefix_ + std::string(field));
}

const json::value* FieldReader::find(std::string_view field) const {
  const json::value* value = object_.if_contains(json::string_view(field.data(), field.size()));
  return value == nullptr || value->is_null() ? nullptr : value;
}

void FieldReader::wrong(std::string_view field, const std::string& expected,
                        const json::value& value) {
  fail(invalid_argument(name_of(field) + " must be " + expected + ", got " + show(value)));
}

std::optional<std::int64_t> FieldReader::integer(std::string_view field, std::int64_t min,
                                                 std::int64_t max) {
  const json::value* value = find(field);
  if (value == nullptr) return std::nullopt;
  const std::optional<std::int64_t> result = as_integer(*value);
  if (!result || *result < min || *result > max) {
    wrong(field, "an integer in [" + std::to_string(min) + ", " + std::to_string(max) + "]",
          *value);
    return std::nullopt;
  }
  return result;
}

std::int64_t FieldReader::required_integer(std::string_view field, std::int64_t min,
                                           std::int64_t max) {
  if (find(field) == nullptr) fail(invalid_argument(name_of(field) + " is missing"));
  return integer(field, min, max).value_or(min);
}

std::optional<float> FieldReader::number(std::string_view field, NumberRange range) {
  const json::value* value = find(field);
  if (value == nullptr) return std::nullopt;
  json::error_code ec;
  const double result = value->is_number() ? value->to_number<double>(ec) : 0.0;
  const bool inside = range.above_min ? result > range.min : result >= range.min;
  if (!value->is_number() || ec || !inside || !(result <= range.max)) {
    wrong(field,
          std::string("a number in ") + (range.above_min ? "(" : "[") + shown_number(range.min) +
              ", " + shown_number(range.max) + "]",
          *value);
    return std::nullopt;
  }
  return static_cast<float>(result);
}

std::optional<bool> FieldReader::boolean(std::string_view field) {
  const json::value* value = find(field);
  if (value == nullptr) return std::nullopt;
  if (!value->is_bool()) {
    wrong(field, "true or false", *value);
    return std::nullopt;
  }
  return value->get_bool();
}

std::optional<std::string> FieldReader::string(std::string_view field) {
  const json::value* value = find(field);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) {
    wrong(field, "a string", *value);
    return std::nullopt;
  }
  return std::string(value->get_string());
}

std::optional<std::vector<std::int32_t>> FieldReader::token_ids(std::string_view field,
                                                                std::int64_t end) {
  const json::value* value = find(field);
  if (value == nullptr) return std::nullopt;
  const std::string expected = "a token id in [0, " + std::to_string(end) + ") or a list of them";
  std::vector<std::int32_t> ids;
  const auto add = [&](const json::value& item) {
    const std::optional<std::int64_t> id = as_integer(item);
    if (!id || *id < 0 || *id >= end || ids.size() >= kMaxTokenIds) return false;
    if (std::find(ids.begin(), ids.end(), *id) == ids.end()) {
      ids.push_back(static_cast<std::int32_t>(*id));
    }
    return true;
  };
  const bool good = value->is_array()
                        ? std::all_of(value->get_array().begin(), value->get_array().end(), add)
                        : add(*value);
  if (!good) {
    wrong(field, expected, *value);
    return std::nullopt;
  }
  return ids;
}

}  // namespace spindle::model
