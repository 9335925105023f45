#include "cluster/comm/device_group.h"

#include <cstring>
#include <string>

#include "kernels/core/check.h"

namespace spindle::comm {
namespace {

// Holds the documented one-thread rule of a group of calls: two threads at once would interleave
// their tensors.
class ExclusiveUse {
 public:
  ExclusiveUse(std::atomic<bool>& in_use, std::string_view what) : in_use_(in_use) {
    CHECK(!in_use_.exchange(true, std::memory_order_acquire), what);
  }
  ~ExclusiveUse() { in_use_.store(false, std::memory_order_release); }
  ExclusiveUse(const ExclusiveUse&) = delete;
  ExclusiveUse& operator=(const ExclusiveUse&) = delete;

 private:
  std::atomic<bool>& in_use_;
};

}  // namespace

DeviceGroup::DeviceGroup(int rank, int size) : rank_(rank), size_(size) {
  CHECK(size >= 1 && rank >= 0 && rank < size, "rank outside its group");
}

MessageDeviceGroup::MessageDeviceGroup(int rank, int size) : DeviceGroup(rank, size) {
  for (auto& lane : broken_) lane.resize(static_cast<std::size_t>(size));
}

Status MessageDeviceGroup::size_mismatch(int source, std::size_t sent_bytes,
                                         std::size_t expected_bytes) {
  return internal_error("rank " + std::to_string(source) + " sent a tensor of " +
                        std::to_string(sent_bytes) + " bytes, but " +
                        std::to_string(expected_bytes) + " were expected");
}

Status MessageDeviceGroup::check_call(int peer, std::size_t n_bytes) const {
  if (peer < 0 || peer >= size()) {
    return invalid_argument("rank " + std::to_string(peer) + " is not in a group of " +
                            std::to_string(size()));
  }
  if (n_bytes > kMaxTensorBytes) {
    return too_large("a tensor of " + std::to_string(n_bytes) + " bytes; the limit is " +
                     std::to_string(kMaxTensorBytes));
  }
  return {};
}

Status MessageDeviceGroup::recv_in_step(Lane lane, int source, std::span<std::byte> out,
                                        Deadline deadline) {
  Status& broken = broken_[static_cast<std::size_t>(lane)][static_cast<std::size_t>(source)];
  if (!broken.ok()) return broken;
  Received received = recv_message(lane, source, out, deadline);
  if (!received.in_step) {
    broken = received.status.with_context("the stream from rank " + std::to_string(source) +
                                          " is broken");
  }
  if (lane == Lane::kTensor && received.status.ok()) {
    receive_ns_.fetch_add((Clock::now() - received.arrived).count(), std::memory_order_relaxed);
  }
  return received.status;
}

Status MessageDeviceGroup::send(int dest, std::span<const std::byte> data, Deadline deadline) {
  const ExclusiveUse use(sending_, "two threads send on one device group");
  if (Status s = check_call(dest, data.size()); !s.ok()) return s;
  if (dest == rank()) return invalid_argument("a stage does not send tensors to itself");
  std::chrono::nanoseconds waited{0};
  const Clock::time_point began = Clock::now();
  const Status status = send_message(Lane::kTensor, dest, data, deadline, waited);
  send_ns_.fetch_add((Clock::now() - began - waited).count(), std::memory_order_relaxed);
  return status;
}

TensorTimes MessageDeviceGroup::tensor_times() {
  TensorTimes times;
  times.send_us = static_cast<std::uint64_t>(send_ns_.load(std::memory_order_relaxed)) / 1000;
  times.receive_us = static_cast<std::uint64_t>(receive_ns_.load(std::memory_order_relaxed)) / 1000;
  return times;
}

Status MessageDeviceGroup::recv(int source, std::span<std::byte> out, Deadline deadline) {
  const ExclusiveUse use(receiving_, "two threads receive on one device group");
  if (Status s = check_call(source, out.size()); !s.ok()) return s;
  if (source == rank()) return invalid_argument("a stage does not receive tensors from itself");
  return recv_in_step(Lane::kTensor, source, out, deadline);
}

Status MessageDeviceGroup::all_gather(std::span<const std::byte> mine, std::span<std::byte> all,
                                      Deadline deadline) {
  const ExclusiveUse use(in_collective_, "two threads run collectives on one device group");
  if (Status s = check_call(rank(), mine.size()); !s.ok()) return s;
  if (all.size() != mine.size() * static_cast<std::size_t>(size())) {
    return invalid_argument("all_gather of " + std::to_string(mine.size()) + " bytes over " +
                            std::to_string(size()) + " ranks into " + std::to_string(all.size()) +
                            " bytes");
  }
  std::chrono::nanoseconds waited{0};
  for (int step = 1; step < size(); ++step) {
    const int dest = (rank() + step) % size();
    Status s = send_message(Lane::kCollective, dest, mine, deadline, waited);
    if (!s.ok()) return s;
  }
  for (int source = 0; source < size(); ++source) {
    const auto row = all.subspan(static_cast<std::size_t>(source) * mine.size(), mine.size());
    if (source == rank()) {
      if (!mine.empty()) std::memmove(row.data(), mine.data(), mine.size());
      continue;
    }
    if (Status s = recv_in_step(Lane::kCollective, source, row, deadline); !s.ok()) return s;
  }
  return {};
}

Status MessageDeviceGroup::broadcast(std::span<std::byte> data, int root, Deadline deadline) {
  const ExclusiveUse use(in_collective_, "two threads run collectives on one device group");
  if (Status s = check_call(root, data.size()); !s.ok()) return s;
  if (rank() != root) return recv_in_step(Lane::kCollective, root, data, deadline);
  std::chrono::nanoseconds waited{0};
  for (int dest = 0; dest < size(); ++dest) {
    if (dest == rank()) continue;
    Status s = send_message(Lane::kCollective, dest, data, deadline, waited);
    if (!s.ok()) return s;
  }
  return {};
}

}  // namespace spindle::comm
