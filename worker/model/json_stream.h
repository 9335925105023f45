#pragma once
// Reading of large or hostile JSON as a stream of events: no document tree is built, so memory is
// what the sink keeps, and the sink sees every key, also those that occur twice in an object.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "kernels/core/status.h"

namespace spindle::model {

// Receives the events of one document in order; the first failure ends the parse.
class JsonSink {
 public:
  virtual ~JsonSink() = default;
  virtual Status on_object_begin() = 0;
  virtual Status on_object_end() = 0;
  virtual Status on_array_begin() = 0;
  virtual Status on_array_end() = 0;
  virtual Status on_key(std::string_view key) = 0;
  // `text` holds at most JsonLimits::max_string_bytes; `total_bytes` is the length before the cut.
  virtual Status on_string(std::string_view text, std::size_t total_bytes) = 0;
  virtual Status on_unsigned(std::uint64_t value) = 0;
  // A value of any other kind; `kind` names it for an error message ("null", "a negative number").
  virtual Status on_other(std::string_view kind) = 0;
};

struct JsonLimits {
  std::size_t max_depth = 4;
  std::size_t max_key_bytes = 512;
  std::size_t max_string_bytes = 512;
};

// Parses one standard JSON document (valid UTF-8, no comments) given in chunks.
// Does not own the sink, which must outlive it.
//
// Thread-safety: one thread at a time.
// Invariant: after a failure, feed and finish keep failing.
class JsonStream {
 public:
  JsonStream(JsonSink& sink, JsonLimits limits);
  ~JsonStream();
  JsonStream(const JsonStream&) = delete;
  JsonStream& operator=(const JsonStream&) = delete;

  Status feed(std::string_view chunk);
  // Fails unless exactly one complete document was fed.
  Status finish();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace spindle::model
