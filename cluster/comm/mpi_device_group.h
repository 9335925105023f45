#pragma once
// DeviceGroup over MPI, for stages in host memory. Internal to spindle_comm_mpi (includes mpi.h);
// users see it through MpiWorld.

#include <mpi.h>

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "cluster/comm/device_group.h"
#include "cluster/comm/mpi_progress.h"

namespace spindle::comm {

// Fixed-size staging buffers. A buffer returns to the pool when its last owner lets go, which may
// be after the group is gone.
// Thread-safety: all functions, from any thread.
class ChunkPool : public std::enable_shared_from_this<ChunkPool> {
 public:
  static constexpr std::size_t kChunkBytes = std::size_t{256} << 10;

  std::shared_ptr<std::byte> take();

 private:
  static constexpr std::size_t kMaxFree = 64;

  std::mutex mutex_;
  std::vector<std::unique_ptr<std::byte[]>> free_;  // guarded by mutex_
};

// A tensor travels as chunks of at most kChunkBytes; the first one starts with a header that gives
// the total size and a sequence number. Both sides copy through staging buffers: a request that
// MPI cannot cancel then never holds the caller's memory, and the copy of one chunk overlaps the
// transfer of the next.
//
// Needs MPI_THREAD_MULTIPLE and MPI_ERRORS_RETURN. Thread-safety: as DeviceGroup.
class MpiDeviceGroup final : public MessageDeviceGroup {
 public:
  using LaneComms = std::array<MPI_Comm, kLaneCount>;

  // Staging memory that may wait to be sent, per destination. A larger tensor makes send() wait
  // until the peer has taken the excess.
  static constexpr std::size_t kMaxStagedBytes = std::size_t{64} << 20;

  // `comms` are duplicates of one communicator, not owned.
  MpiDeviceGroup(const LaneComms& comms, MpiProgress& progress);

  Status flush(Deadline deadline) override;
  void abort(std::string_view why) override;

  // For the end of the job, after abort(): receives and drops whatever has arrived.
  void discard_arrived();
  bool idle() const;

 protected:
  Status send_message(Lane lane, int dest, std::span<const std::byte> data, Deadline deadline,
                      std::chrono::nanoseconds& waited) override;
  Received recv_message(Lane lane, int source, std::span<std::byte> out,
                        Deadline deadline) override;

 private:
  struct Arriving {
    MPI_Request request;
    std::size_t n_bytes;
    std::shared_ptr<std::byte> buffer;
  };
  // Both directions of one lane with one peer.
  struct Stream {
    std::uint64_t n_sent = 0;
    std::uint64_t n_received = 0;
    Status send_broken;             // why sending cannot go on; OK while it can
    std::deque<Arriving> arriving;  // chunks MPI is writing to, oldest first
  };
  struct LaneState {
    MPI_Comm comm = MPI_COMM_NULL;
    SendQueue* sends = nullptr;
    std::vector<Stream> streams;  // [size]
  };
  // How far one recv_message() has come.
  struct Assembly {
    std::span<std::byte> out;
    bool started = false;            // the header has come
    Clock::time_point arrived = {};  // the first chunk
    std::size_t n_requested = 0;     // bytes of the tensor in chunks received or arriving
    std::size_t n_done = 0;
  };

  LaneState& lane_state(Lane lane) { return lanes_[static_cast<std::size_t>(lane)]; }
  // Each moves at most one chunk; true if it did.
  Result<bool> start_chunk(MPI_Comm comm, int source, std::deque<Arriving>& arriving);
  Result<bool> take_chunk(Stream& stream, int source, Assembly& assembly);
  Status send_chunks(LaneState& lane, Stream& stream, int dest, std::span<const std::byte> data,
                     Deadline deadline, std::chrono::nanoseconds& waited);

  MpiProgress& progress_;
  StopFlag stop_;
  std::shared_ptr<ChunkPool> pool_;
  std::array<LaneState, kLaneCount> lanes_;
  std::deque<Arriving> discarded_;  // discard_arrived() only
};

}  // namespace spindle::comm
