#pragma once
// What the event streams of a server share: one picture of the server's state per interval, and a
// bound on the number of streams.

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

namespace spindle::api {

// Nothing runs in the background: the first stream that asks after an interval has passed makes the
// next picture, the others are given the same one. A stream that cannot keep up misses pictures; it
// never queues any.
//
// Thread-safety: every member may be called from any thread.
class StateFeed {
 public:
  using Clock = std::chrono::steady_clock;
  // The state as one line of JSON.
  using Render = std::function<std::string()>;

  struct Picture {
    std::shared_ptr<const std::string> event;  // a whole server-sent event
    Clock::time_point next;                    // when to ask again
  };

  // A stream's place; free again when it is destroyed. Must not outlive the feed.
  class Place {
   public:
    explicit Place(StateFeed& feed) : feed_(&feed) {}
    Place(Place&& other) noexcept : feed_(other.feed_) { other.feed_ = nullptr; }
    ~Place();
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;
    Place& operator=(Place&&) = delete;

   private:
    StateFeed* feed_;
  };

  // `interval` > 0.
  StateFeed(Render render, std::chrono::milliseconds interval, std::size_t max_streams);

  // Nothing when all places are taken.
  std::optional<Place> join();
  Picture latest(Clock::time_point now);
  std::size_t n_streams() const;

 private:
  const Render render_;
  const std::chrono::milliseconds interval_;
  const std::size_t max_streams_;
  mutable std::mutex mutex_;
  std::size_t n_streams_ = 0;
  Picture picture_;
};

}  // namespace spindle::api
