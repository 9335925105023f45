#include "worker/config/config_text.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <google/protobuf/text_format.h>
#include <openssl/sha.h>

#include <array>
#include <string_view>
#include <utility>
#include <vector>

#include "worker/config/config_rules.h"

namespace spindle::config {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;
using google::protobuf::TextFormat;

std::string sha256_hex(std::string_view text) {
  std::array<unsigned char, SHA256_DIGEST_LENGTH> digest{};
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  static constexpr std::string_view kDigits = "0123456789abcdef";
  std::string hex;
  for (const unsigned char byte : digest) {
    hex += kDigits[byte >> 4];
    hex += kDigits[byte & 15];
  }
  return hex;
}

using Lines = std::vector<std::string>;

// On one line, lists of groups too.
std::string value_text(const Message& message, const FieldDescriptor* field, int index) {
  TextFormat::Printer printer;
  printer.SetSingleLineMode(true);
  std::string value;
  printer.PrintFieldValueToString(message, field, index, &value);
  if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) return value;
  return "{ " + value + "}";
}

void append_lines(const Message& message, const std::string& prefix, Lines& lines) {
  const Descriptor* type = message.GetDescriptor();
  const Reflection* reflection = message.GetReflection();
  for (int i = 0; i < type->field_count(); ++i) {
    const FieldDescriptor* field = type->field(i);
    const std::string path = prefix + field->name();
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && !field->is_repeated()) {
      append_lines(reflection->GetMessage(message, field), path + ".", lines);
      continue;
    }
    const int count = field->is_repeated() ? reflection->FieldSize(message, field)
                                           : static_cast<int>(reflection->HasField(message, field));
    std::string values;
    for (int k = 0; k < count; ++k) {
      values += (k > 0 ? "," : "") + value_text(message, field, field->is_repeated() ? k : -1);
    }
    lines.push_back(path + " = " + (count > 0 ? values : "(not set)"));
  }
}

// Fields that stay as they are when they are not set; all others are decided at start.
constexpr auto kUnset = std::to_array<std::pair<std::string_view, std::string_view>>({
    {"api.api_key", "none, clients need no key"},
    {"cluster.device_memory_bytes", "what the device has"},
    {"kv.policy.ratio", "none, the profile's own size"},
    {"kv.policy.max_bytes", "none, the profile's own size"},
    {"kv.policy.window", "the profile's own"},
    {"kv.profile_table", "none"},
});

std::string_view meaning_of_unset(std::string_view path) {
  for (const auto& [known, meaning] : kUnset) {
    if (known == path) return meaning;
  }
  return "decided at start";
}

// Scalar fields that have no default in the schema and are not set.
void append_undecided(const Message& message, const std::string& prefix, Lines& paths) {
  const Descriptor* type = message.GetDescriptor();
  const Reflection* reflection = message.GetReflection();
  for (int i = 0; i < type->field_count(); ++i) {
    const FieldDescriptor* field = type->field(i);
    const std::string path = prefix + field->name();
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      if (field->is_repeated()) continue;
      append_undecided(reflection->GetMessage(message, field), path + ".", paths);
    } else if (field->is_repeated() ? reflection->FieldSize(message, field) == 0
                                    : !reflection->HasField(message, field)) {
      paths.push_back(path);
    }
  }
}

}  // namespace

std::string effective_config_text(const Config& config) {
  Config shown = config;
  if (shown.has_api()) {
    for (std::string& key : *shown.mutable_api()->mutable_api_key()) key = kHiddenKey;
  }
  std::string text;
  TextFormat::PrintToString(shown, &text);

  Lines undecided;
  append_undecided(shown, "", undecided);
  for (const std::string& path : undecided) {
    text += "# " + path + ": " + std::string(meaning_of_unset(path)) + "\n";
  }
  return text;
}

std::string comparison_text(const Config& config) {
  Config shown = config;
  if (shown.has_api()) {
    for (std::string& key : *shown.mutable_api()->mutable_api_key()) key = sha256_hex(key);
  }
  Lines lines;
  append_lines(shown, "", lines);
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

}  // namespace spindle::config
