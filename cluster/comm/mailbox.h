#pragma once
// Mailbox: a bounded queue of messages inside one process.

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cluster/comm/message.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"

namespace spindle::comm {

// Owns the messages between push() and pop(). Keeps the order of each source, and arrival order for
// kAnySource. Each source has its own share of `max_bytes_per_source`, so a slow reader of one
// source never blocks another; a message is always accepted from a source that has none waiting.
//
// Thread-safety: all functions, from any thread.
class Mailbox {
 public:
  Mailbox(int n_sources, std::size_t max_bytes_per_source);

  Status push(int source, std::string bytes, Deadline deadline);
  // Empty when nothing came until the deadline; looks at least once. `source` may be kAnySource.
  Result<std::optional<Message>> pop(int source, Deadline deadline);
  // Every pending and future call returns `reason`; waiting messages are dropped. Of several
  // reasons, here and below, the first counts.
  void close(Status reason);
  // The same for pop() only; what is pushed from now on is discarded.
  void end_reading(Status reason);
  // The same for push() of one source only.
  void end_writing(int source, Status reason);

 private:
  struct Writer {
    std::size_t waiting_bytes = 0;
    Status ended;  // OK while it may push
  };

  std::deque<Message>::iterator find(int source);
  void discard_all();

  const std::size_t max_bytes_per_source_;
  std::mutex mutex_;
  std::condition_variable changed_;
  // All guarded by mutex_.
  std::deque<Message> messages_;
  std::vector<Writer> writers_;  // [n_sources]
  Status reading_ended_;         // OK while it may pop
};

}  // namespace spindle::comm
