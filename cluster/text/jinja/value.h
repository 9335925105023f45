#pragma once
// Run-time values of a template, with the semantics of the Python values they stand for.

#include <cstdint>
#include <memory_resource>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace spindle::text::jinja {

struct List;
struct Dict;
struct Namespace;
struct Callable;
struct Loop;

struct None {};

// A name or attribute that does not exist. It prints as nothing and is falsy; using it is an error
// that names it.
struct Undefined {
  std::string_view name{};
  std::string_view owner{};  // type of the object without that attribute; empty for a variable
  bool is_element = false;   // an element of a sequence rather than an attribute
};

// A small handle: strings are views and containers are pointers into the memory of one rendering
// (Runtime), the template or the context, all of which outlive it.
//
// Thread-safety: belongs to the one thread that renders.
class Value {
 public:
  Value() : data_(Undefined{}) {}
  Value(None none) : data_(none) {}                     // NOLINT: these are conversions by design
  Value(Undefined undefined) : data_(undefined) {}      // NOLINT
  Value(bool boolean) : data_(boolean) {}               // NOLINT
  Value(std::int64_t integer) : data_(integer) {}       // NOLINT
  Value(double real) : data_(real) {}                   // NOLINT
  Value(std::string_view string) : data_(string) {}     // NOLINT
  Value(const List* list) : data_(list) {}              // NOLINT
  Value(const Dict* dict) : data_(dict) {}              // NOLINT
  Value(Namespace* space) : data_(space) {}             // NOLINT
  Value(const Callable* callable) : data_(callable) {}  // NOLINT
  Value(Loop* loop) : data_(loop) {}                    // NOLINT
  // A string literal would otherwise become a bool.
  Value(const char*) = delete;

  bool is_undefined() const { return std::holds_alternative<Undefined>(data_); }
  bool is_none() const { return std::holds_alternative<None>(data_); }
  bool is_bool() const { return std::holds_alternative<bool>(data_); }
  bool is_integer() const { return std::holds_alternative<std::int64_t>(data_); }
  bool is_float() const { return std::holds_alternative<double>(data_); }
  bool is_string() const { return std::holds_alternative<std::string_view>(data_); }
  bool is_list() const { return std::holds_alternative<const List*>(data_); }
  bool is_dict() const { return std::holds_alternative<const Dict*>(data_); }
  bool is_number() const { return is_bool() || is_integer() || is_float(); }

  template <typename T>
  const T* get_if() const {
    return std::get_if<T>(&data_);
  }
  // Preconditions: the value is of that type.
  bool boolean() const { return std::get<bool>(data_); }
  std::string_view string() const { return std::get<std::string_view>(data_); }
  const List& list() const { return *std::get<const List*>(data_); }
  const Dict& dict() const { return *std::get<const Dict*>(data_); }
  // A bool or an integer.
  std::int64_t integer() const {
    return is_bool() ? std::int64_t{boolean()} : std::get<std::int64_t>(data_);
  }
  // Any number.
  double real() const {
    return is_float() ? std::get<double>(data_) : static_cast<double>(integer());
  }

  // Python's name of the type, "str".
  std::string_view type_name() const;

 private:
  std::variant<Undefined, None, bool, std::int64_t, double, std::string_view, const List*,
               const Dict*, Namespace*, const Callable*, Loop*>
      data_;
};

// Python has several ordered containers; most differ only in what may be asked of them.
enum class ListKind {
  kList,
  kTuple,
  kGenerator,  // no length, no subscripts, always truthy: what select, map and their kin give
  kKeys,       // views of a dict: a length, but no subscripts
  kValues,
  kItems,
};

struct List {
  ListKind kind = ListKind::kList;
  std::pmr::vector<Value> items;

  bool has_length() const { return kind != ListKind::kGenerator; }
  bool has_subscripts() const { return kind == ListKind::kList || kind == ListKind::kTuple; }
};

// Insertion order is kept. Keys are unique and hashable.
struct Dict {
  std::pmr::vector<std::pair<Value, Value>> entries;

  const Value* find(const Value& key) const;
  const Value* find(std::string_view key) const;
};

struct Namespace {
  std::pmr::vector<std::pair<std::string_view, Value>> attributes;

  Value* find(std::string_view name);
};

// The "loop" variable of a for statement.
struct Loop {
  const List* items;
  std::size_t index0 = 0;
  Value last_changed{};
  bool has_last_changed = false;
};

bool is_truthy(const Value& value);

// None, bool, numbers, strings, and short tuples of them.
bool is_hashable(const Value& value);

// Exact, also between integers and floats. Precondition: both are numbers.
bool numbers_equal(const Value& a, const Value& b);

// Python's == for hashable values.
bool keys_equal(const Value& a, const Value& b);

}  // namespace spindle::text::jinja
