// Functions that every template can call.

#include <array>
#include <ctime>
#include <string>

#include "cluster/text/jinja/callable.h"
#include "cluster/text/jinja/text_form.h"

namespace spindle::text::jinja {
namespace {

constexpr std::size_t kMaxTimeFormatBytes = 512;
constexpr std::int64_t kMaxRange = 100'000;  // the limit of Jinja's sandbox

Value global_raise_exception(Runtime& runtime, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "raise_exception", arguments, "message");
  const Value message = bound.required(0);
  return runtime.fail(std::string(to_text(runtime, message)));
}

Value global_strftime_now(Runtime& runtime, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "strftime_now", arguments, "format");
  bound.required(0);
  const auto format = bound.string(0);
  if (!format || runtime.failed()) return {};
  if (format->empty()) return std::string_view("");
  if (format->size() > kMaxTimeFormatBytes) {
    return runtime.fail("strftime_now(): the format is too long");
  }
  const std::time_t now = runtime.now().value_or(std::time(nullptr));
  std::tm local{};
  if (localtime_r(&now, &local) == nullptr) return runtime.fail("the clock cannot be read");
  std::array<char, 1024> buffer{};
  const std::size_t n_bytes =
      std::strftime(buffer.data(), buffer.size(), std::string(*format).c_str(), &local);
  if (n_bytes == 0) return runtime.fail("strftime_now(): the result is empty or too long");
  return runtime.string({buffer.data(), n_bytes});
}

Value global_range(Runtime& runtime, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "range", arguments, "start", "stop", "step");
  bound.required(0);
  const bool only_stop = !bound.has(1);
  const std::int64_t begin = only_stop ? 0 : bound.integer(0, 0);
  const std::int64_t end = only_stop ? bound.integer(0, 0) : bound.integer(1, 0);
  const std::int64_t step = bound.integer(2, 1);
  if (step == 0) return runtime.fail("range(): the step must not be zero");
  List* list = runtime.list(ListKind::kList);
  for (std::int64_t i = begin; step > 0 ? i < end : i > end;) {
    if (runtime.failed()) return {};
    if (list->items.size() == static_cast<std::size_t>(kMaxRange)) {
      return runtime.fail("range() of more than " + std::to_string(kMaxRange) + " items");
    }
    runtime.push(*list, i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  return static_cast<const List*>(list);
}

Value global_dict(Runtime& runtime, const Arguments& arguments) {
  Dict* dict = runtime.dict();
  if (arguments.positional.size() > 1 ||
      (arguments.positional.size() == 1 && !arguments.positional[0].is_dict())) {
    return runtime.fail("dict() takes one dict and keyword arguments");
  }
  if (arguments.positional.size() == 1) {
    for (const auto& [key, value] : arguments.positional[0].dict().entries) {
      runtime.append(*dict, key, value);
    }
  }
  for (const auto& [name, value] : arguments.keywords) runtime.set(*dict, name, value);
  return static_cast<const Dict*>(dict);
}

Value global_namespace(Runtime& runtime, const Arguments& arguments) {
  Namespace* space = runtime.name_space();
  const auto set = [&](std::string_view name, const Value& value) {
    if (!runtime.step(1 + space->attributes.size() / 8) ||
        !runtime.reserve_memory(5 * sizeof(Value))) {
      return;
    }
    if (Value* known = space->find(name)) {
      *known = value;
    } else {
      space->attributes.emplace_back(name, value);
    }
  };
  for (const Value& source : arguments.positional) {
    if (!source.is_dict()) return runtime.fail("namespace() takes dicts and keyword arguments");
    for (const auto& [key, value] : source.dict().entries) {
      if (!key.is_string()) return runtime.fail("namespace() takes dicts with str keys");
      set(key.string(), value);
    }
  }
  for (const auto& [name, value] : arguments.keywords) set(name, value);
  return space;
}

struct NamedGlobal {
  std::string_view name;
  GlobalFunction function;
};

constexpr std::array kGlobals = std::to_array<NamedGlobal>({
    {"dict", global_dict},
    {"namespace", global_namespace},
    {"raise_exception", global_raise_exception},
    {"range", global_range},
    {"strftime_now", global_strftime_now},
});

}  // namespace

std::optional<GlobalFunction> find_global(std::string_view name) {
  for (const NamedGlobal& global : kGlobals) {
    if (global.name == name) return global.function;
  }
  return std::nullopt;
}

}  // namespace spindle::text::jinja
