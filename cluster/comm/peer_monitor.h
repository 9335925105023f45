#pragma once
// PeerMonitor: notices within seconds that another rank, or the launcher, is dead or frozen.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <sys/types.h>

#include "cluster/comm/host_group.h"

namespace spindle::comm {

enum class RankState : std::uint32_t { kStarting, kServing, kDraining, kLeaving };

std::string_view rank_state_name(RankState state);

struct PeerMonitorOptions {
  std::chrono::milliseconds beat_interval{250};
  // Silence after which a peer is lost.
  std::chrono::milliseconds peer_timeout{2000};
  // The same for the very first beat: the peer's process may still be starting.
  std::chrono::milliseconds first_beat_timeout{30000};
  // Also report the end of the parent process. For ranks started by mpirun, whose own sudden death
  // nobody else would tell them.
  bool watch_parent = false;
};

// What is known of one peer; for telemetry.
struct PeerReport {
  int rank = 0;
  bool heard = false;  // false: no beat yet, the fields below are empty
  std::uint64_t step = 0;
  RankState state = RankState::kStarting;
  std::chrono::milliseconds silence{0};  // since the last beat
};

// A thread that sends this rank's step counter and state on Channel::kHeartbeat every
// beat_interval: rank 0 to all ranks, the others to rank 0. Rank 0 watches everybody, the others
// watch rank 0; so the loss of any rank is seen by rank 0 or, if it is rank 0's, by all.
//
// A monitor that was itself kept from running does not blame its peers: time in which it was not
// scheduled does not count as their silence. stop() says good-bye, so an orderly exit is no loss.
//
// Does not own the group, which must outlive it.
// Thread-safety: report() and peers() from any thread; start(), stop() and the destructor from one
// thread, never from the callback. The callback runs on the monitor's thread.
class PeerMonitor {
 public:
  // As the rank of a loss that is no rank's: the launcher's, or of the heartbeat channel itself.
  static constexpr int kNoRank = -1;
  using OnPeerLost = std::function<void(int rank, const std::string& message)>;

  // `on_peer_lost` is called once for each lost peer.
  PeerMonitor(HostGroup& group, PeerMonitorOptions options, OnPeerLost on_peer_lost);
  ~PeerMonitor();

  void start();
  void stop();

  // What the next beats say about this rank.
  void report(std::uint64_t step, RankState state);
  // Rank 0: every other rank; elsewhere: rank 0.
  std::vector<PeerReport> peers() const;

 private:
  using Clock = Deadline::Clock;

  struct Peer {
    int rank = 0;
    bool heard = false;
    bool done = false;  // left in order, or reported as lost
    std::uint64_t step = 0;
    RankState state = RankState::kStarting;
    Clock::time_point last_beat{};
  };

  void run();
  void send_beats(RankState state);
  // Returns false when the group no longer delivers.
  bool receive_beats(Deadline until);
  void note_beat(const Message& message);
  void forgive_own_pause(Clock::time_point expected, Clock::time_point now);
  void find_lost(Clock::time_point now);
  void check_parent();

  HostGroup& group_;
  const PeerMonitorOptions options_;
  const OnPeerLost on_peer_lost_;
  const pid_t parent_;
  bool parent_lost_ = false;  // monitor thread only
  std::atomic<std::uint64_t> step_{0};
  std::atomic<RankState> state_{RankState::kStarting};
  std::atomic<bool> stopping_{false};
  mutable std::mutex mutex_;
  std::vector<Peer> peers_;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace spindle::comm
