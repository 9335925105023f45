#include "cluster/api/state_feed.h"

#include <utility>

namespace spindle::api {

StateFeed::Place::~Place() {
  if (feed_ == nullptr) return;
  const std::lock_guard lock(feed_->mutex_);
  --feed_->n_streams_;
}

StateFeed::StateFeed(Render render, std::chrono::milliseconds interval, std::size_t max_streams)
    : render_(std::move(render)), interval_(interval), max_streams_(max_streams) {}

std::optional<StateFeed::Place> StateFeed::join() {
  const std::lock_guard lock(mutex_);
  if (n_streams_ >= max_streams_) return std::nullopt;
  ++n_streams_;
  return std::optional<Place>(std::in_place, *this);
}

StateFeed::Picture StateFeed::latest(Clock::time_point now) {
  // Rendering under the lock makes the others wait for the picture instead of making their own.
  const std::lock_guard lock(mutex_);
  if (!picture_.event || now >= picture_.next) {
    picture_.event =
        std::make_shared<const std::string>("event: state\ndata: " + render_() + "\n\n");
    picture_.next = now + interval_;
  }
  return picture_;
}

std::size_t StateFeed::n_streams() const {
  const std::lock_guard lock(mutex_);
  return n_streams_;
}

}  // namespace spindle::api
