#include "cluster/text/jinja/value.h"

#include <algorithm>

namespace spindle::text::jinja {
namespace {

// Larger tuples are no keys, so that comparing two keys is cheap.
constexpr std::size_t kMaxTupleKeyItems = 64;

bool scalars_equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return numbers_equal(a, b);
  if (a.is_string() && b.is_string()) return a.string() == b.string();
  return a.is_none() && b.is_none();
}

struct TypeNamer {
  std::string_view operator()(Undefined) const { return "Undefined"; }
  std::string_view operator()(None) const { return "NoneType"; }
  std::string_view operator()(bool) const { return "bool"; }
  std::string_view operator()(std::int64_t) const { return "int"; }
  std::string_view operator()(double) const { return "float"; }
  std::string_view operator()(std::string_view) const { return "str"; }
  std::string_view operator()(const Dict*) const { return "dict"; }
  std::string_view operator()(Namespace*) const { return "Namespace"; }
  std::string_view operator()(const Callable*) const { return "function"; }
  std::string_view operator()(Loop*) const { return "LoopContext"; }
  std::string_view operator()(const List* list) const {
    switch (list->kind) {
      case ListKind::kList:
        return "list";
      case ListKind::kTuple:
        return "tuple";
      case ListKind::kGenerator:
        return "generator";
      case ListKind::kKeys:
        return "dict_keys";
      case ListKind::kValues:
        return "dict_values";
      case ListKind::kItems:
        return "dict_items";
    }
    return "list";
  }
};

}  // namespace

std::string_view Value::type_name() const { return std::visit(TypeNamer(), data_); }

const Value* Dict::find(const Value& key) const {
  if (!is_hashable(key)) return nullptr;
  for (const auto& [known, value] : entries) {
    if (keys_equal(known, key)) return &value;
  }
  return nullptr;
}

const Value* Dict::find(std::string_view key) const {
  for (const auto& [known, value] : entries) {
    if (known.is_string() && known.string() == key) return &value;
  }
  return nullptr;
}

Value* Namespace::find(std::string_view name) {
  for (auto& [known, value] : attributes) {
    if (known == name) return &value;
  }
  return nullptr;
}

bool is_truthy(const Value& value) {
  if (value.is_undefined() || value.is_none()) return false;
  if (value.is_bool()) return value.boolean();
  if (value.is_integer()) return value.integer() != 0;
  if (value.is_float()) return value.real() != 0;
  if (value.is_string()) return !value.string().empty();
  if (value.is_list()) return !value.list().has_length() || !value.list().items.empty();
  if (value.is_dict()) return !value.dict().entries.empty();
  return true;
}

bool numbers_equal(const Value& a, const Value& b) {
  if (a.is_float() && b.is_float()) return a.real() == b.real();
  if (!a.is_float() && !b.is_float()) return a.integer() == b.integer();
  // Every integer of 64 bits is exact as a long double.
  const Value& real = a.is_float() ? a : b;
  const Value& integer = a.is_float() ? b : a;
  return static_cast<long double>(real.real()) == static_cast<long double>(integer.integer());
}

bool keys_equal(const Value& a, const Value& b) {
  if (!a.is_list() || !b.is_list()) return scalars_equal(a, b);
  return std::equal(a.list().items.begin(), a.list().items.end(), b.list().items.begin(),
                    b.list().items.end(), scalars_equal);
}

bool is_hashable(const Value& value) {
  if (value.is_list()) {
    const List& list = value.list();
    return list.kind == ListKind::kTuple && list.items.size() <= kMaxTupleKeyItems &&
           std::all_of(list.items.begin(), list.items.end(),
                       [](const Value& item) { return !item.is_list() && is_hashable(item); });
  }
  return value.is_none() || value.is_number() || value.is_string();
}

}  // namespace spindle::text::jinja
