#pragma once
// What one rendering carries through the interpreter, filters and methods: limits and counters, the
// first error, and the memory that values live in.

#include <cstddef>
#include <cstdint>
#include <ctime>
#include <memory_resource>
#include <optional>
#include <string>
#include <string_view>

#include "cluster/text/jinja/token.h"
#include "cluster/text/jinja/value.h"
#include "kernels/core/status.h"

namespace spindle::text::jinja {

// Passing any of them ends the rendering with an error.
struct RenderLimits {
  std::uint64_t max_steps = 20'000'000;  // about one per expression, item or 16 bytes of text
  std::size_t max_output_bytes = std::size_t{32} << 20;
  std::size_t max_memory_bytes = std::size_t{256} << 20;  // all values ever made, not the peak
  std::uint32_t max_depth = 500;  // of calls and nested expressions, statements, values
};

// Errors are sticky: the first one is kept, and everything that runs afterwards returns quickly and
// means nothing. So functions return plain values, and callers look at failed() in loops and
// before they trust a value with a side effect.
//
// Thread-safety: none; one per rendering.
// Invariant: memory handed out lives until the Runtime dies; nothing is freed before.
class Runtime {
 public:
  // `source`: the template's, for positions in messages. `now`: the clock of strftime_now.
  Runtime(std::string_view source, const RenderLimits& limits, std::optional<std::time_t> now)
      : source_(source), limits_(limits), now_(now) {}
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  // ---- errors ----
  bool failed() const { return !status_.ok(); }
  const Status& status() const { return status_; }
  // The position that errors name from now on.
  void set_position(Position position) { position_ = position; }
  // All return undefined, so that "return runtime.fail(...)" reads well.
  Value fail(const std::string& message);
  // The value is undefined and may not be.
  Value fail_undefined(const Value& value);

  // ---- bounds; false (and the error set) once a limit is passed ----
  bool step(std::uint64_t n_steps = 1);
  // For work that grows with a text's length.
  bool step_over(std::string_view text) { return step(1 + text.size() / 16); }
  // For work that grows with the product of two lengths, the second of them usually tiny.
  bool step_over(std::string_view text, std::string_view pattern) {
    return step(1 + text.size() / 16 * (1 + pattern.size() / 16));
  }
  // For a search for `key`.
  bool step_over(const Dict& dict, const Value& key) {
    const std::size_t key_bytes = key.is_string() ? key.string().size() : 0;
    return step(1 + dict.entries.size() * (4 + key_bytes) / 16);
  }
  bool reserve_memory(std::size_t n_bytes);
  bool check_output(std::size_t n_bytes);
  bool enter();
  void leave() { --depth_; }

  // ---- values; undefined once failed ----
  Value string(std::string_view text);
  // A text of known size, to be filled by the caller; nullptr once failed.
  char* string_buffer(std::size_t n_bytes);
  // Empty containers, never null.
  List* list(ListKind kind);
  Dict* dict();
  Namespace* name_space();
  void push(List& list, const Value& value);
  // Replaces the value of an equal key. Fails on an unhashable key.
  void set(Dict& dict, const Value& key, const Value& value);
  // The key must be new.
  void append(Dict& dict, const Value& key, const Value& value);

  template <typename T, typename... Arguments>
  T* make(Arguments&&... arguments) {
    reserve_memory(sizeof(T));
    return std::pmr::polymorphic_allocator<>(&memory_).new_object<T>(
        std::forward<Arguments>(arguments)...);
  }
  std::pmr::memory_resource* memory() { return &memory_; }

  std::optional<std::time_t> now() const { return now_; }

 private:
  Value fail_limit(const std::string& message);

  std::string_view source_;
  RenderLimits limits_;
  std::optional<std::time_t> now_;
  std::pmr::monotonic_buffer_resource memory_;
  Status status_;
  Position position_ = 0;
  std::uint64_t n_steps_ = 0;
  std::size_t memory_bytes_ = 0;
  std::uint32_t depth_ = 0;
};

// Counts one level of recursion for as long as it lives. Converts to false if there are too many.
class DepthGuard {
 public:
  explicit DepthGuard(Runtime& runtime) : runtime_(runtime), entered_(runtime.enter()) {}
  ~DepthGuard() { runtime_.leave(); }
  DepthGuard(const DepthGuard&) = delete;
  DepthGuard& operator=(const DepthGuard&) = delete;
  explicit operator bool() const { return entered_; }

 private:
  Runtime& runtime_;
  bool entered_;
};

}  // namespace spindle::text::jinja
