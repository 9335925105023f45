#include "worker/config/config_override.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <string>
#include <vector>

namespace spindle::config {
namespace {

// Of values: field, name, name in the schema.
constexpr auto kOtherNames = std::to_array<std::array<std::string_view, 3>>({
    {"kv.dtype", "float16", "F16"},
    {"kv.dtype", "half", "F16"},
    {"kv.dtype", "bfloat16", "BF16"},
    {"kv.dtype", "float32", "F32"},
    {"kv.dtype", "float", "F32"},
    {"model.load_format", "auto", "SAFETENSORS"},
});

using google::protobuf::Descriptor;
using google::protobuf::EnumDescriptor;
using google::protobuf::EnumValueDescriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  while (true) {
    const std::size_t at = text.find(separator);
    parts.emplace_back(text.substr(0, at));
    if (at == std::string_view::npos) return parts;
    text.remove_prefix(at + 1);
  }
}

std::string field_names(const Descriptor& type) {
  std::string names;
  for (int i = 0; i < type.field_count(); ++i) {
    if (i > 0) names += ", ";
    names += type.field(i)->name();
  }
  return names;
}

std::string value_names(const EnumDescriptor& type) {
  std::string names;
  for (int i = 0; i < type.value_count(); ++i) {
    if (i > 0) names += ", ";
    names += type.value(i)->name();
  }
  return names;
}

const EnumValueDescriptor* find_value(const EnumDescriptor& type, std::string_view name) {
  const auto same = [](char a, char b) {
    return std::toupper(static_cast<unsigned char>(a)) ==
           std::toupper(static_cast<unsigned char>(b));
  };
  for (int i = 0; i < type.value_count(); ++i) {
    const std::string& candidate = type.value(i)->name();
    if (std::equal(candidate.begin(), candidate.end(), name.begin(), name.end(), same)) {
      return type.value(i);
    }
  }
  return nullptr;
}

template <typename Number>
bool parse_number(std::string_view text, Number& out) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, out);
  return error == std::errc() && stop == end && !text.empty();
}

// Where a value goes: the message, the field, and set or add.
struct Target {
  Message* message;
  const FieldDescriptor* field;

  template <typename Value, typename Set, typename Add>
  void store(Value&& value, Set set, Add add) const {
    const Reflection* reflection = message->GetReflection();
    if (field->is_repeated()) {
      (reflection->*add)(message, field, std::forward<Value>(value));
    } else {
      (reflection->*set)(message, field, std::forward<Value>(value));
    }
  }
};

// Stores one value; returns what was expected instead, or "" when it fits.
std::string store_value(const Target& target, const std::string& text) {
  switch (target.field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32: {
      std::int32_t value = 0;
      if (!parse_number(text, value)) return "a 32-bit integer";
      target.store(value, &Reflection::SetInt32, &Reflection::AddInt32);
      return "";
    }
    case FieldDescriptor::CPPTYPE_INT64: {
      std::int64_t value = 0;
      if (!parse_number(text, value)) return "a 64-bit integer";
      target.store(value, &Reflection::SetInt64, &Reflection::AddInt64);
      return "";
    }
    case FieldDescriptor::CPPTYPE_UINT32: {
      std::uint32_t value = 0;
      if (!parse_number(text, value)) return "a 32-bit integer from 0";
      target.store(value, &Reflection::SetUInt32, &Reflection::AddUInt32);
      return "";
    }
    case FieldDescriptor::CPPTYPE_UINT64: {
      std::uint64_t value = 0;
      if (!parse_number(text, value)) return "a 64-bit integer from 0";
      target.store(value, &Reflection::SetUInt64, &Reflection::AddUInt64);
      return "";
    }
    case FieldDescriptor::CPPTYPE_DOUBLE: {
      double value = 0;
      if (!parse_number(text, value)) return "a number";
      target.store(value, &Reflection::SetDouble, &Reflection::AddDouble);
      return "";
    }
    case FieldDescriptor::CPPTYPE_FLOAT: {
      float value = 0;
      if (!parse_number(text, value)) return "a number";
      target.store(value, &Reflection::SetFloat, &Reflection::AddFloat);
      return "";
    }
    case FieldDescriptor::CPPTYPE_BOOL: {
      if (text != "true" && text != "false") return "true or false";
      target.store(text == "true", &Reflection::SetBool, &Reflection::AddBool);
      return "";
    }
    case FieldDescriptor::CPPTYPE_ENUM: {
      const EnumValueDescriptor* value = find_value(*target.field->enum_type(), text);
      if (value == nullptr) return "one of " + value_names(*target.field->enum_type());
      target.store(value, &Reflection::SetEnum, &Reflection::AddEnum);
      return "";
    }
    case FieldDescriptor::CPPTYPE_STRING:
      target.store(text, &Reflection::SetString, &Reflection::AddString);
      return "";
    case FieldDescriptor::CPPTYPE_MESSAGE:
      break;
  }
  return "a field, not a group of fields";
}

// Walks `path` from the configuration to the group that holds its last field.
Result<Target> find_target(Config& config, std::string_view path) {
  Message* message = &config;
  std::string walked;
  const std::vector<std::string> names = split(path, '.');
  for (std::size_t i = 0; i < names.size(); ++i) {
    const Descriptor* type = message->GetDescriptor();
    const FieldDescriptor* field = type->FindFieldByName(names[i]);
    const std::string where = walked.empty() ? "the configuration" : "'" + walked + "'";
    if (field == nullptr) {
      return invalid_argument("'" + std::string(path) + "': " + where + " has no field '" +
                              names[i] + "'; it has " + field_names(*type));
    }
    walked += (walked.empty() ? "" : ".") + names[i];
    const bool is_group = field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
    const bool is_last = i + 1 == names.size();
    if (is_group && is_last) {
      return invalid_argument("'" + walked + "' is a group; set one of its fields: " +
                              field_names(*field->message_type()));
    }
    if (!is_group && !is_last) {
      return invalid_argument("'" + std::string(path) + "': '" + walked +
                              "' is a value and has no fields");
    }
    if (is_last) return Target{message, field};
    if (field->is_repeated()) {
      return invalid_argument("'" + walked + "' is a list of groups: set it in the file");
    }
    message = message->GetReflection()->MutableMessage(message, field);
  }
  return invalid_argument("an empty path");
}

}  // namespace

Status apply_override(Config& config, std::string_view path, std::string_view value) {
  Config changed = config;
  Result<Target> target = find_target(changed, path);
  if (!target.ok()) return target.status();

  std::vector<std::string> values = {std::string(value)};
  if (target->field->is_repeated()) {
    target->message->GetReflection()->ClearField(target->message, target->field);
    values = value.empty() ? std::vector<std::string>{} : split(value, ',');
  }
  for (const std::string& item : values) {
    const std::string expected = store_value(*target, item);
    if (!expected.empty()) {
      return invalid_argument("'" + std::string(path) + "' must be " + expected + ", got '" + item +
                              "'");
    }
  }
  config = std::move(changed);
  return ok_status();
}

Status apply_assignment(Config& config, std::string_view assignment) {
  const std::size_t at = assignment.find('=');
  if (at == std::string_view::npos || at == 0) {
    return invalid_argument("'" + std::string(assignment) +
                            "' must have the form FIELD=VALUE, e.g. api.http.port=9000");
  }
  return apply_override(config, assignment.substr(0, at), assignment.substr(at + 1));
}

std::string_view schema_value(std::string_view path, std::string_view value) {
  for (const auto& [field, known_as, in_schema] : kOtherNames) {
    if (path == field && value == known_as) return in_schema;
  }
  return value;
}

}  // namespace spindle::config
