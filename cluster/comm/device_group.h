#pragma once
// DeviceGroup: tensors between pipeline stages, in the memory the stage computes in (host memory
// for the CPU bodies, device memory for a GPU body), and small reports between all ranks, which are
// in host memory and travel the same way.

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/core/deadline.h"
#include "kernels/core/status.h"

namespace spindle::comm {

// Largest tensor in one call; sizes above INT_MAX bytes are fine.
inline constexpr std::size_t kMaxTensorBytes = std::size_t{4} << 30;

// How long moving tensors took this rank, in all since the start, from the moment that the other
// side was there: waits for it are not counted. With in_calls it was time of the calls themselves;
// else the device moved them beside its other work.
struct TensorTimes {
  std::uint64_t send_us = 0;
  std::uint64_t receive_us = 0;
  bool in_calls = true;
};

// One rank's end of the group.
//
// Buffers: send() returns when the caller may overwrite `data`; delivery goes on behind it, which
// is how a stage starts its next step while the last activations travel. A body keeps its own
// staging memory for that and never touches the caller's memory after a call has returned, whatever
// the outcome. A failure behind a returned send() shows in the next call on the group or in
// flush(). A body on device memory is made with the stage's compute stream: its tensors are ordered
// after the work already on that stream, and what they produce is visible to work submitted later.
// Collectives are ordered with nothing; they are done when the call returns.
//
// Sizes are agreed by the plan, not by the message: recv() must be called with exactly the size
// that was sent. A mismatch is INTERNAL and, like a deadline in the middle of a tensor, leaves the
// stream from that peer failed for good: later calls return the same error. A deadline before
// anything arrived consumes nothing and the call may be repeated.
//
// Thread-safety: send() and flush() from one thread, recv() from one thread, the collectives from
// one thread; these may be three threads or the same one (checked). abort() from any thread.
class DeviceGroup {
 public:
  virtual ~DeviceGroup() = default;
  DeviceGroup(const DeviceGroup&) = delete;
  DeviceGroup& operator=(const DeviceGroup&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }

  // To another rank; order per destination is kept.
  virtual Status send(int dest, std::span<const std::byte> data, Deadline deadline) = 0;
  virtual Status recv(int source, std::span<std::byte> out, Deadline deadline) = 0;
  // recv() holds its caller until the sender is there; else it is the device that waits.
  virtual bool recv_waits() const = 0;
  // Returns once every sent tensor has left this rank's staging memory.
  virtual Status flush(Deadline deadline) = 0;

  // `all` is [size, mine.size()] bytes; row r is what rank r gave. Same size on every rank.
  virtual Status all_gather(std::span<const std::byte> mine, std::span<std::byte> all,
                            Deadline deadline) = 0;
  // On `root` reads `data`, elsewhere overwrites it. Same size on every rank.
  virtual Status broadcast(std::span<std::byte> data, int root, Deadline deadline) = 0;

  // Every pending and future wait returns UNAVAILABLE with `why`: of this rank in the MPI body, of
  // every rank in the in-process body. Peers in other processes are told by HostGroup::abort().
  virtual void abort(std::string_view why) = 0;

  // Of tensors, not of collectives. From the threads of send() and recv().
  virtual TensorTimes tensor_times() = 0;

 protected:
  DeviceGroup(int rank, int size);

 private:
  const int rank_;
  const int size_;
};

// Collectives and argument checks for bodies that move tensors as messages. Tensors and collectives
// have a lane each, so that they never take each other's messages.
class MessageDeviceGroup : public DeviceGroup {
 public:
  Status send(int dest, std::span<const std::byte> data, Deadline deadline) final;
  Status recv(int source, std::span<std::byte> out, Deadline deadline) final;
  bool recv_waits() const override { return true; }
  Status all_gather(std::span<const std::byte> mine, std::span<std::byte> all,
                    Deadline deadline) final;
  Status broadcast(std::span<std::byte> data, int root, Deadline deadline) final;
  TensorTimes tensor_times() final;

 protected:
  using Clock = std::chrono::steady_clock;
  enum class Lane { kTensor, kCollective };
  static constexpr std::size_t kLaneCount = 2;

  struct Received {
    Status status;
    bool in_step = true;  // false: part of a tensor was consumed, the stream cannot go on
    Clock::time_point arrived = {};  // when the first of it was there
  };

  MessageDeviceGroup(int rank, int size);

  // Adds the time that it waited for the receiver to `waited`.
  virtual Status send_message(Lane lane, int dest, std::span<const std::byte> data,
                              Deadline deadline, std::chrono::nanoseconds& waited) = 0;
  virtual Received recv_message(Lane lane, int source, std::span<std::byte> out,
                                Deadline deadline) = 0;

  static Status size_mismatch(int source, std::size_t sent_bytes, std::size_t expected_bytes);

 private:
  Status check_call(int peer, std::size_t n_bytes) const;
  Status recv_in_step(Lane lane, int source, std::span<std::byte> out, Deadline deadline);

  std::atomic<std::int64_t> send_ns_{0};
  std::atomic<std::int64_t> receive_ns_{0};
  std::atomic<bool> sending_{false};
  std::atomic<bool> receiving_{false};
  std::atomic<bool> in_collective_{false};
  // Why the stream from a source cannot go on; OK while it can. [lane][source]
  std::array<std::vector<Status>, kLaneCount> broken_;
};

}  // namespace spindle::comm
