#pragma once
// The sessions of a server: how many there are, and who is to be told when it stops.

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/core/deadline.h"

namespace spindle::api {

enum class Admission {
  kServed,
  kRefused,  // over the limit: to be told so, then closed
  kClosed,   // far over the limit, or the server stops: closed at once, and not in the set
};

// Does not own the sessions; each removes itself in its destructor.
// Thread-safety: all members, from any thread.
template <typename Session>
class SessionSet {
 public:
  // Connections over the limit that are told so; more are closed at once.
  static constexpr std::size_t kMaxRefused = 64;

  Admission add(const std::shared_ptr<Session>& session, std::size_t limit) {
    const std::lock_guard lock(mutex_);
    const std::size_t n_before = sessions_.size();
    if (stopped_ || n_before >= limit + kMaxRefused) return Admission::kClosed;
    sessions_.emplace(session.get(), session);
    return n_before < limit ? Admission::kServed : Admission::kRefused;
  }
  void remove(const Session* session) {
    const std::lock_guard lock(mutex_);
    sessions_.erase(session);
    ended_.notify_all();
  }
  // Adds none from now on; those that there are.
  std::vector<std::shared_ptr<Session>> stop() {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    std::vector<std::shared_ptr<Session>> alive;
    for (const auto& [address, session] : sessions_) {
      if (auto one = session.lock()) alive.push_back(std::move(one));
    }
    return alive;
  }
  std::size_t size() const {
    const std::lock_guard lock(mutex_);
    return sessions_.size();
  }
  // False: some are left at the deadline.
  bool wait_empty(Deadline deadline) {
    std::unique_lock lock(mutex_);
    return ended_.wait_until(lock, deadline.at(), [this] { return sessions_.empty(); });
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable ended_;
  // Guarded by mutex_.
  std::unordered_map<const Session*, std::weak_ptr<Session>> sessions_;
  bool stopped_ = false;
};

}  // namespace spindle::api
