#include "cluster/text/jinja/runtime.h"

#include <algorithm>

namespace spindle::text::jinja {
namespace {

constexpr std::size_t kMaxMessageBytes = 2000;

}  // namespace

Value Runtime::fail(const std::string& message) {
  if (failed()) return {};
  // A template can put a whole conversation into its message.
  std::size_t n_bytes = std::min(message.size(), kMaxMessageBytes);
  while (n_bytes < message.size() &&
         (static_cast<unsigned char>(message[n_bytes]) & 0xC0u) == 0x80u) {
    --n_bytes;
  }
  status_ = invalid_argument("chat template, " + describe_position(source_, position_) + ": " +
                             message.substr(0, n_bytes));
  return {};
}

Value Runtime::fail_limit(const std::string& message) {
  if (!failed()) {
    status_ = too_large("chat template, " + describe_position(source_, position_) + ": " + message);
  }
  return {};
}

Value Runtime::fail_undefined(const Value& value) {
  const auto* undefined = value.get_if<Undefined>();
  const std::string name(undefined == nullptr ? "" : undefined->name);
  if (undefined == nullptr || undefined->owner.empty()) {
    return fail(name.empty() ? "the value is undefined" : "'" + name + "' is undefined");
  }
  return fail("'" + std::string(undefined->owner) + "' has no " +
              (undefined->is_element ? "element " + name : "attribute '" + name + "'"));
}

bool Runtime::step(std::uint64_t n_steps) {
  n_steps_ += n_steps;
  if (n_steps_ > limits_.max_steps) {
    fail_limit("more than " + std::to_string(limits_.max_steps) + " steps");
  }
  return !failed();
}

bool Runtime::reserve_memory(std::size_t n_bytes) {
  memory_bytes_ += n_bytes;
  if (memory_bytes_ > limits_.max_memory_bytes || n_bytes > limits_.max_memory_bytes) {
    memory_bytes_ = limits_.max_memory_bytes;
    fail_limit("more than " + std::to_string(limits_.max_memory_bytes) + " bytes of values");
  }
  return !failed();
}

bool Runtime::check_output(std::size_t n_bytes) {
  if (n_bytes > limits_.max_output_bytes) {
    fail_limit("more than " + std::to_string(limits_.max_output_bytes) + " bytes of output");
  }
  return !failed();
}

bool Runtime::enter() {
  if (++depth_ > limits_.max_depth) {
    fail_limit("calls or expressions nested deeper than " + std::to_string(limits_.max_depth));
  }
  return !failed();
}

char* Runtime::string_buffer(std::size_t n_bytes) {
  if (!reserve_memory(n_bytes) || !step(1 + n_bytes / 16)) return nullptr;
  return static_cast<char*>(memory_.allocate(n_bytes + 1, 1));
}

Value Runtime::string(std::string_view text) {
  char* buffer = string_buffer(text.size());
  if (buffer == nullptr) return {};
  text.copy(buffer, text.size());
  return std::string_view(buffer, text.size());
}

List* Runtime::list(ListKind kind) {
  return make<List>(List{kind, std::pmr::vector<Value>(&memory_)});
}

Dict* Runtime::dict() {
  return make<Dict>(Dict{std::pmr::vector<std::pair<Value, Value>>(&memory_)});
}

Namespace* Runtime::name_space() {
  return make<Namespace>(Namespace{std::pmr::vector<std::pair<std::string_view, Value>>(&memory_)});
}

void Runtime::push(List& list, const Value& value) {
  // A growing vector leaves its former buffers behind: three times the size in all.
  if (step() && reserve_memory(3 * sizeof(Value))) list.items.push_back(value);
}

void Runtime::set(Dict& dict, const Value& key, const Value& value) {
  if (key.is_undefined()) {
    fail_undefined(key);
  } else if (!is_hashable(key)) {
    fail("unhashable type: '" + std::string(key.type_name()) + "'");
  }
  if (failed() || !step_over(dict, key)) return;
  for (auto& [known, known_value] : dict.entries) {
    if (keys_equal(known, key)) {
      known_value = value;
      return;
    }
  }
  append(dict, key, value);
}

void Runtime::append(Dict& dict, const Value& key, const Value& value) {
  if (step() && reserve_memory(6 * sizeof(Value))) dict.entries.emplace_back(key, value);
}

}  // namespace spindle::text::jinja
