#include "cluster/comm/peer_monitor.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/core/check.h"

namespace spindle::comm {
namespace {

using std::chrono::duration_cast;
using std::chrono::milliseconds;

// How often the monitor looks at its clock: bounds the delay of a stop() and of a detection.
constexpr milliseconds kTick{50};
// A tick that took this much longer than asked was the machine's fault, not the peers'.
constexpr milliseconds kOwnPause{200};

struct Beat {
  std::uint64_t step;
  std::uint32_t state;
  std::uint32_t reserved;
};
static_assert(sizeof(Beat) == 16);

}  // namespace

std::string_view rank_state_name(RankState state) {
  switch (state) {
    case RankState::kStarting:
      return "starting";
    case RankState::kServing:
      return "serving";
    case RankState::kDraining:
      return "draining";
    case RankState::kLeaving:
      return "leaving";
  }
  return "?";
}

PeerMonitor::PeerMonitor(HostGroup& group, PeerMonitorOptions options, OnPeerLost on_peer_lost)
    : group_(group),
      options_(options),
      on_peer_lost_(std::move(on_peer_lost)),
      parent_(::getppid()) {
  if (group.rank() != 0) {
    peers_.push_back({.rank = 0});
  } else {
    for (int rank = 1; rank < group.size(); ++rank) peers_.push_back({.rank = rank});
  }
}

PeerMonitor::~PeerMonitor() { stop(); }

void PeerMonitor::start() {
  CHECK(!thread_.joinable(), "the monitor runs already");
  stopping_ = false;
  const auto now = Clock::now();
  {
    const std::lock_guard lock(mutex_);
    for (Peer& peer : peers_) peer.last_beat = now;
  }
  thread_ = std::thread([this] { run(); });
}

void PeerMonitor::stop() {
  if (!thread_.joinable()) return;
  stopping_ = true;
  thread_.join();
}

void PeerMonitor::report(std::uint64_t step, RankState state) {
  step_.store(step, std::memory_order_relaxed);
  state_.store(state, std::memory_order_relaxed);
}

std::vector<PeerReport> PeerMonitor::peers() const {
  const auto now = Clock::now();
  std::vector<PeerReport> reports;
  const std::lock_guard lock(mutex_);
  for (const Peer& peer : peers_) {
    reports.push_back({.rank = peer.rank,
                       .heard = peer.heard,
                       .step = peer.step,
                       .state = peer.state,
                       .silence = duration_cast<milliseconds>(now - peer.last_beat)});
  }
  return reports;
}

void PeerMonitor::run() {
  auto next_beat = Clock::now();
  while (!stopping_) {
    const auto now = Clock::now();
    if (now >= next_beat) {
      send_beats(state_.load(std::memory_order_relaxed));
      next_beat = now + options_.beat_interval;
    }
    const auto wake = std::min(next_beat, now + kTick);
    if (!receive_beats(Deadline(wake))) return;
    const auto woken = Clock::now();
    forgive_own_pause(wake, woken);
    find_lost(woken);
    if (options_.watch_parent) check_parent();
  }
  send_beats(RankState::kLeaving);
}

void PeerMonitor::send_beats(RankState state) {
  const Beat beat{.step = step_.load(std::memory_order_relaxed),
                  .state = static_cast<std::uint32_t>(state),
                  .reserved = 0};
  const auto bytes = std::as_bytes(std::span(&beat, 1));
  for (const Peer& peer : peers_) {  // the list itself never changes
    // A beat that cannot be sent is a beat the peer misses; that is for the peer to judge.
    static_cast<void>(group_.send(peer.rank, Channel::kHeartbeat, bytes, Deadline::after(kTick)));
  }
}

bool PeerMonitor::receive_beats(Deadline until) {
  for (;;) {
    Result<Message> message = group_.recv(kAnySource, Channel::kHeartbeat, until);
    if (message.ok()) {
      note_beat(*message);
      // Beats that queued up while this thread was not scheduled are all read before anybody is
      // judged, even when `until` has passed.
      continue;
    }
    if (message.status().code() == StatusCode::kDeadlineExceeded) return true;
    // UNAVAILABLE is our own side's shutdown or abort, whose origin reports itself.
    if (message.status().code() != StatusCode::kUnavailable) {
      on_peer_lost_(kNoRank, "heartbeats failed: " + message.status().message());
    }
    return false;
  }
}

void PeerMonitor::note_beat(const Message& message) {
  Beat beat;
  if (message.bytes.size() != sizeof beat) return;  // not a beat: its sender stays silent
  std::memcpy(&beat, message.bytes.data(), sizeof beat);
  const std::lock_guard lock(mutex_);
  for (Peer& peer : peers_) {
    if (peer.rank != message.source) continue;
    peer.heard = true;
    peer.step = beat.step;
    peer.state = static_cast<RankState>(
        std::min(beat.state, static_cast<std::uint32_t>(RankState::kLeaving)));
    peer.last_beat = Clock::now();
    if (peer.state == RankState::kLeaving) peer.done = true;
  }
}

void PeerMonitor::forgive_own_pause(Clock::time_point expected, Clock::time_point now) {
  if (now - expected < kOwnPause) return;
  const std::lock_guard lock(mutex_);
  for (Peer& peer : peers_) peer.last_beat = std::min(now, peer.last_beat + (now - expected));
}

void PeerMonitor::find_lost(Clock::time_point now) {
  std::vector<std::pair<int, std::string>> lost;
  {
    const std::lock_guard lock(mutex_);
    for (Peer& peer : peers_) {
      const auto limit = peer.heard ? options_.peer_timeout : options_.first_beat_timeout;
      const auto silence = duration_cast<milliseconds>(now - peer.last_beat);
      if (peer.done || silence < limit) continue;
      peer.done = true;
      lost.emplace_back(peer.rank,
                        "rank " + std::to_string(peer.rank) + " is lost: no heartbeat for " +
                            std::to_string(silence.count()) + " ms" +
                            (peer.heard ? " (last: step " + std::to_string(peer.step) + ", " +
                                              std::string(rank_state_name(peer.state)) + ")"
                                        : std::string(" since the monitor started")));
    }
  }
  for (const auto& [rank, message] : lost) on_peer_lost_(rank, message);
}

void PeerMonitor::check_parent() {
  if (parent_lost_ || ::getppid() == parent_) return;
  parent_lost_ = true;
  on_peer_lost_(kNoRank, "the launcher (parent process " + std::to_string(parent_) + ") is gone");
}

}  // namespace spindle::comm
