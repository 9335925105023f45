#include "cluster/comm/local_group.h"

#include <cstring>
#include <string>
#include <utility>

#include "cluster/comm/mailbox.h"
#include "kernels/core/check.h"

namespace spindle::comm {

// All queues of the cluster: per rank one mailbox for each control channel and each tensor lane.
class LocalCluster::Hub {
 public:
  static constexpr std::size_t kLanes = 2;

  Hub(int size, const LocalClusterOptions& options) : size_(size) {
    const std::size_t n_boxes = static_cast<std::size_t>(size) * kBoxesPerRank;
    for (std::size_t i = 0; i < n_boxes; ++i) {
      boxes_.push_back(std::make_unique<Mailbox>(size, options.max_unreceived_bytes));
    }
  }

  Mailbox& control(int rank, Channel channel) { return box(rank, channel_index(channel)); }
  Mailbox& tensors(int rank, std::size_t lane) { return box(rank, kChannelCount + lane); }

  void close_all(const Status& reason) {
    for (auto& box : boxes_) box->close(reason);
  }
  void end_control_of(int rank, const Status& reason) {
    for (std::size_t channel = 0; channel < kChannelCount; ++channel) {
      box(rank, channel).end_reading(reason);
      for (int dest = 0; dest < size_; ++dest) box(dest, channel).end_writing(rank, reason);
    }
  }

 private:
  static constexpr std::size_t kBoxesPerRank = kChannelCount + kLanes;

  Mailbox& box(int rank, std::size_t index) {
    return *boxes_.at(static_cast<std::size_t>(rank) * kBoxesPerRank + index);
  }

  const int size_;
  std::vector<std::unique_ptr<Mailbox>> boxes_;
};

class LocalCluster::LocalHostGroup final : public HostGroup {
 public:
  LocalHostGroup(int rank, int size, std::uint32_t epoch, Hub& hub)
      : HostGroup(rank, size, epoch), hub_(hub) {}

  void shutdown(std::string_view why) override {
    hub_.end_control_of(rank(), unavailable("rank " + std::to_string(rank()) +
                                            " has shut down: " + std::string(why)));
  }

  void abort(int exit_code, std::string_view why) override {
    hub_.close_all(unavailable("rank " + std::to_string(rank()) + " aborted the cluster (code " +
                               std::to_string(exit_code) + "): " + std::string(why)));
  }

  Status send_frame(int dest, Channel channel, std::string frame, Deadline deadline) override {
    return hub_.control(dest, channel).push(rank(), std::move(frame), deadline);
  }

  Result<std::optional<Message>> recv_frame(int source, Channel channel,
                                            Deadline deadline) override {
    auto message = hub_.control(rank(), channel).pop(source, deadline);
    if (message.ok() && message->has_value() && (*message)->bytes.size() > kMaxFrameBytes) {
      return too_large("a frame of " + std::to_string((*message)->bytes.size()) +
                       " bytes from rank " + std::to_string((*message)->source));
    }
    return message;
  }

 private:
  Hub& hub_;
};

class LocalCluster::LocalDeviceGroup final : public MessageDeviceGroup {
 public:
  LocalDeviceGroup(int rank, int size, Hub& hub, bool recv_waits)
      : MessageDeviceGroup(rank, size), hub_(hub), recv_waits_(recv_waits) {
    static_assert(kLaneCount == Hub::kLanes);
  }

  bool recv_waits() const override { return recv_waits_; }

  Status flush(Deadline) override { return {}; }  // a message is in the receiver's queue at once

  void abort(std::string_view why) override {
    hub_.close_all(unavailable("rank " + std::to_string(rank()) +
                               " aborted the cluster: " + std::string(why)));
  }

 protected:
  Status send_message(Lane lane, int dest, std::span<const std::byte> data, Deadline deadline,
                      std::chrono::nanoseconds& waited) override {
    std::string copy(reinterpret_cast<const char*>(data.data()), data.size());
    const Clock::time_point began = Clock::now();
    Status status =
        hub_.tensors(dest, static_cast<std::size_t>(lane)).push(rank(), std::move(copy), deadline);
    waited += Clock::now() - began;
    return status;
  }

  Received recv_message(Lane lane, int source, std::span<std::byte> out,
                        Deadline deadline) override {
    auto got = hub_.tensors(rank(), static_cast<std::size_t>(lane)).pop(source, deadline);
    if (!got.ok()) return {got.status(), true};
    if (!got->has_value()) {
      return {deadline_exceeded("rank " + std::to_string(rank()) + " got no tensor from rank " +
                                std::to_string(source) + " in time"),
              true};
    }
    const Clock::time_point arrived = Clock::now();
    const std::string& bytes = (*got)->bytes;
    if (bytes.size() != out.size()) {
      return {size_mismatch(source, bytes.size(), out.size()), false};
    }
    if (!out.empty()) std::memcpy(out.data(), bytes.data(), out.size());
    return {.status = {}, .arrived = arrived};
  }

 private:
  Hub& hub_;
  const bool recv_waits_;
};

LocalCluster::LocalCluster(int size, LocalClusterOptions options)
    : hub_(std::make_unique<Hub>(size, options)) {
  CHECK(size >= 1, "a cluster has at least one rank");
  for (int rank = 0; rank < size; ++rank) {
    hosts_.push_back(std::make_unique<LocalHostGroup>(rank, size, options.epoch, *hub_));
    devices_.push_back(std::make_unique<LocalDeviceGroup>(rank, size, *hub_, options.recv_waits));
  }
}

LocalCluster::~LocalCluster() = default;

}  // namespace spindle::comm
