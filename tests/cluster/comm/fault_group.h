#pragma once
// Groups that misbehave on purpose, for tests of whatever sits on top of them: they wrap one rank's
// groups and drop, delay, corrupt or fail chosen messages, or fall silent as a dead rank does.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cluster/comm/device_group.h"
#include "cluster/comm/host_group.h"

namespace spindle::comm::testing {

enum class FaultAction {
  kDrop,     // the send succeeds, nothing arrives
  kDelay,    // the send takes `delay` longer (bounded by its deadline)
  kCorrupt,  // one bit of the message flips (control messages; tensors have no checksum)
  kFail,     // the send returns UNAVAILABLE, nothing arrives
};

struct Fault {
  FaultAction action = FaultAction::kDrop;
  // The k-th message this rank sends on `channel` (counted from 1, over all destinations).
  std::uint64_t nth = 1;
  Channel channel = Channel::kPlan;  // control messages only
  std::chrono::milliseconds delay{0};
};

// Counts messages and says what happens to each. Thread-safety: any thread.
class FaultPlan {
 public:
  explicit FaultPlan(std::vector<Fault> faults) : faults_(std::move(faults)) {}

  // The fault for the next message on `channel`, if it has one.
  std::optional<Fault> next(Channel channel) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t n = ++n_sent_[channel_index(channel)];
    for (const Fault& fault : faults_) {
      if (fault.channel == channel && fault.nth == n) return fault;
    }
    return std::nullopt;
  }

 private:
  const std::vector<Fault> faults_;
  std::mutex mutex_;
  std::uint64_t n_sent_[kChannelCount] = {};  // guarded by mutex_
};

inline void sleep_within(std::chrono::milliseconds wait, Deadline deadline) {
  std::this_thread::sleep_for(std::min<Deadline::Clock::duration>(wait, deadline.remaining()));
}

// Thread-safety: as HostGroup. Does not own `inner`.
class FaultHostGroup final : public HostGroup {
 public:
  FaultHostGroup(HostGroup& inner, std::vector<Fault> faults)
      : HostGroup(inner.rank(), inner.size(), inner.epoch()),
        inner_(inner),
        plan_(std::move(faults)) {}

  // From now on this rank neither sends nor hears anything; its own calls look normal to it.
  void kill() { killed_ = true; }

  void shutdown(std::string_view why) override { inner_.shutdown(why); }
  void abort(int exit_code, std::string_view why) override { inner_.abort(exit_code, why); }

  Status send_frame(int dest, Channel channel, std::string frame, Deadline deadline) override {
    if (killed_) return {};
    const std::optional<Fault> fault = plan_.next(channel);
    if (fault) {
      switch (fault->action) {
        case FaultAction::kDrop:
          return {};
        case FaultAction::kFail:
          return unavailable("injected fault");
        case FaultAction::kDelay:
          sleep_within(fault->delay, deadline);
          break;
        case FaultAction::kCorrupt:
          frame[frame.size() / 2] = static_cast<char>(frame[frame.size() / 2] ^ 0x10);
          break;
      }
    }
    return inner_.send_frame(dest, channel, std::move(frame), deadline);
  }

  Result<std::optional<Message>> recv_frame(int source, Channel channel,
                                            Deadline deadline) override {
    for (;;) {
      auto message = inner_.recv_frame(source, channel, deadline);
      if (!killed_ || !message.ok() || !message->has_value()) return message;
    }
  }

 private:
  HostGroup& inner_;
  FaultPlan plan_;
  std::atomic<bool> killed_{false};
};

// Counts tensors only, as Channel::kPlan messages. Thread-safety: as DeviceGroup.
class FaultDeviceGroup final : public DeviceGroup {
 public:
  FaultDeviceGroup(DeviceGroup& inner, std::vector<Fault> faults)
      : DeviceGroup(inner.rank(), inner.size()), inner_(inner), plan_(std::move(faults)) {}

  void kill() { killed_ = true; }

  Status send(int dest, std::span<const std::byte> data, Deadline deadline) override {
    if (killed_) return {};
    const std::optional<Fault> fault = plan_.next(Channel::kPlan);
    if (fault) {
      switch (fault->action) {
        case FaultAction::kDrop:
          return {};
        case FaultAction::kFail:
          return unavailable("injected fault");
        case FaultAction::kDelay:
          sleep_within(fault->delay, deadline);
          break;
        case FaultAction::kCorrupt: {
          std::vector<std::byte> copy(data.begin(), data.end());
          if (!copy.empty()) copy[copy.size() / 2] ^= std::byte{0x10};
          return inner_.send(dest, copy, deadline);
        }
      }
    }
    return inner_.send(dest, data, deadline);
  }
  Status recv(int source, std::span<std::byte> out, Deadline deadline) override {
    return inner_.recv(source, out, deadline);
  }
  bool recv_waits() const override { return inner_.recv_waits(); }
  Status flush(Deadline deadline) override { return inner_.flush(deadline); }
  Status all_gather(std::span<const std::byte> mine, std::span<std::byte> all,
                    Deadline deadline) override {
    return inner_.all_gather(mine, all, deadline);
  }
  Status broadcast(std::span<std::byte> data, int root, Deadline deadline) override {
    return inner_.broadcast(data, root, deadline);
  }
  void abort(std::string_view why) override { inner_.abort(why); }
  TensorTimes tensor_times() override { return inner_.tensor_times(); }

 private:
  DeviceGroup& inner_;
  FaultPlan plan_;
  std::atomic<bool> killed_{false};
};

}  // namespace spindle::comm::testing
