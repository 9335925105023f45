#include "cluster/comm/mpi_device_group.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "cluster/comm/backoff.h"
#include "kernels/core/check.h"

namespace spindle::comm {
namespace {

constexpr int kTag = 0;
constexpr std::uint32_t kMagic = 0x54445053;  // "SPDT"
constexpr std::size_t kMaxArriving = 4;       // chunks of one tensor under way at once

struct TensorHeader {
  std::uint32_t magic;
  std::uint32_t reserved;
  std::uint64_t sequence;
  std::uint64_t n_bytes;
};
static_assert(sizeof(TensorHeader) == 24);

int rank_in(MPI_Comm comm) {
  int rank = 0;
  MPI_Comm_rank(comm, &rank);
  return rank;
}

int size_of(MPI_Comm comm) {
  int size = 0;
  MPI_Comm_size(comm, &size);
  return size;
}

Status bad_chunk(int source, std::string_view what) {
  return internal_error("bad tensor chunk from rank " + std::to_string(source) + ": " +
                        std::string(what));
}

}  // namespace

std::shared_ptr<std::byte> ChunkPool::take() {
  std::unique_ptr<std::byte[]> buffer;
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      buffer = std::move(free_.back());
      free_.pop_back();
    }
  }
  if (!buffer) buffer = std::make_unique_for_overwrite<std::byte[]>(kChunkBytes);
  return {buffer.release(), [pool = shared_from_this()](std::byte* bytes) {
            std::unique_ptr<std::byte[]> returned(bytes);
            const std::lock_guard lock(pool->mutex_);
            if (pool->free_.size() < kMaxFree) pool->free_.push_back(std::move(returned));
          }};
}

MpiDeviceGroup::MpiDeviceGroup(const LaneComms& comms, MpiProgress& progress)
    : MessageDeviceGroup(rank_in(comms[0]), size_of(comms[0])),
      progress_(progress),
      pool_(std::make_shared<ChunkPool>()) {
  for (std::size_t i = 0; i < kLaneCount; ++i) {
    lanes_[i].comm = comms[i];
    lanes_[i].sends = &progress.add_queue(comms[i], kMaxStagedBytes);
    lanes_[i].streams.resize(static_cast<std::size_t>(size()));
  }
}

void MpiDeviceGroup::abort(std::string_view why) {
  stop_.stop(unavailable("rank " + std::to_string(rank()) +
                         " aborted its tensor transfers: " + std::string(why)));
}

Status MpiDeviceGroup::flush(Deadline deadline) {
  for (LaneState& lane : lanes_) {
    if (Status s = progress_.flush(*lane.sends, stop_, deadline); !s.ok()) return s;
  }
  return {};
}

Status MpiDeviceGroup::send_message(Lane lane, int dest, std::span<const std::byte> data,
                                    Deadline deadline, std::chrono::nanoseconds& waited) {
  LaneState& state = lane_state(lane);
  Stream& stream = state.streams[static_cast<std::size_t>(dest)];
  if (!stream.send_broken.ok()) return stream.send_broken;
  return send_chunks(state, stream, dest, data, deadline, waited);
}

Status MpiDeviceGroup::send_chunks(LaneState& lane, Stream& stream, int dest,
                                   std::span<const std::byte> data, Deadline deadline,
                                   std::chrono::nanoseconds& waited) {
  std::size_t n_done = 0;
  bool first = true;
  while (first || n_done < data.size()) {
    const auto buffer = pool_->take();
    std::size_t n_used = 0;
    if (first) {
      const TensorHeader header{
          .magic = kMagic, .reserved = 0, .sequence = stream.n_sent, .n_bytes = data.size()};
      std::memcpy(buffer.get(), &header, sizeof header);
      n_used = sizeof header;
    }
    const std::size_t n_copy = std::min(ChunkPool::kChunkBytes - n_used, data.size() - n_done);
    if (n_copy > 0) std::memcpy(buffer.get() + n_used, data.data() + n_done, n_copy);
    Status s = progress_.send(*lane.sends, dest, {buffer.get(), n_used + n_copy}, buffer, stop_,
                              deadline, &waited);
    if (!s.ok()) {
      if (!first) {
        stream.send_broken =
            s.with_context("a tensor to rank " + std::to_string(dest) + " was cut off");
      }
      return s;
    }
    n_done += n_copy;
    first = false;
  }
  ++stream.n_sent;
  return {};
}

Result<bool> MpiDeviceGroup::start_chunk(MPI_Comm comm, int source,
                                         std::deque<Arriving>& arriving) {
  int found = 0;
  MPI_Message handle = MPI_MESSAGE_NULL;
  MPI_Status envelope;
  int code = MPI_Improbe(source, kTag, comm, &found, &handle, &envelope);
  if (code != MPI_SUCCESS) return mpi_status(code, "MPI_Improbe");
  if (found == 0) return false;
  MPI_Count n_bytes = 0;
  code = MPI_Get_elements_x(&envelope, MPI_BYTE, &n_bytes);
  if (code != MPI_SUCCESS) return mpi_status(code, "MPI_Get_elements_x");
  if (n_bytes < 0 || static_cast<std::size_t>(n_bytes) > ChunkPool::kChunkBytes) {
    return bad_chunk(envelope.MPI_SOURCE, std::to_string(n_bytes) + " bytes are too many");
  }
  Arriving chunk{.request = MPI_REQUEST_NULL,
                 .n_bytes = static_cast<std::size_t>(n_bytes),
                 .buffer = pool_->take()};
  code =
      MPI_Imrecv(chunk.buffer.get(), static_cast<int>(n_bytes), MPI_BYTE, &handle, &chunk.request);
  if (code != MPI_SUCCESS) return mpi_status(code, "MPI_Imrecv");
  arriving.push_back(std::move(chunk));
  return true;
}

Result<bool> MpiDeviceGroup::take_chunk(Stream& stream, int source, Assembly& assembly) {
  if (stream.arriving.empty()) return false;
  int done = 0;
  const int code = MPI_Test(&stream.arriving.front().request, &done, MPI_STATUS_IGNORE);
  if (code == MPI_SUCCESS && done == 0) return false;
  const Arriving chunk = std::move(stream.arriving.front());
  stream.arriving.pop_front();
  if (code != MPI_SUCCESS) return mpi_status(code, "MPI_Imrecv");

  std::span<const std::byte> payload(chunk.buffer.get(), chunk.n_bytes);
  if (!assembly.started) {
    TensorHeader header;
    if (payload.size() < sizeof header) return bad_chunk(source, "no header");
    std::memcpy(&header, payload.data(), sizeof header);
    if (header.magic != kMagic) return bad_chunk(source, "not a tensor");
    if (header.sequence != stream.n_received) {
      return bad_chunk(source, "tensor number " + std::to_string(header.sequence) + " instead of " +
                                   std::to_string(stream.n_received));
    }
    if (header.n_bytes != assembly.out.size()) {
      return size_mismatch(source, header.n_bytes, assembly.out.size());
    }
    payload = payload.subspan(sizeof header);
    assembly.started = true;
    assembly.arrived = Clock::now();
    assembly.n_requested = payload.size();
  }
  if (payload.size() > assembly.out.size() - assembly.n_done) {
    return bad_chunk(source, "more bytes than the header said");
  }
  if (!payload.empty()) {
    std::memcpy(assembly.out.data() + assembly.n_done, payload.data(), payload.size());
  }
  assembly.n_done += payload.size();
  return true;
}

MessageDeviceGroup::Received MpiDeviceGroup::recv_message(Lane lane, int source,
                                                          std::span<std::byte> out,
                                                          Deadline deadline) {
  LaneState& state = lane_state(lane);
  Stream& stream = state.streams[static_cast<std::size_t>(source)];
  Assembly assembly{.out = out};
  Backoff backoff({.wait_share = progress_.wait_share()});
  for (;;) {
    // The header chunk may be left from a call whose deadline passed: it is still the first one.
    const bool untouched = !assembly.started;
    if (stop_.stopped()) return {stop_.reason(), untouched};
    bool moved = false;
    const bool want_more =
        assembly.started ? assembly.n_requested < out.size() : stream.arriving.empty();
    if (want_more && stream.arriving.size() < kMaxArriving) {
      Result<bool> started = start_chunk(state.comm, source, stream.arriving);
      if (!started.ok()) return {started.status(), false};
      moved = *started;
      if (moved && assembly.started) assembly.n_requested += stream.arriving.back().n_bytes;
    }
    Result<bool> taken = take_chunk(stream, source, assembly);
    if (!taken.ok()) return {taken.status(), false};
    if (assembly.started && assembly.n_done == out.size()) {
      ++stream.n_received;
      return {.status = {}, .arrived = assembly.arrived};
    }
    if (moved || *taken) {
      backoff.restart();
      continue;
    }
    if (deadline.passed()) {
      return {deadline_exceeded("rank " + std::to_string(rank()) + " got " +
                                (untouched ? "no" : "only a part of a") + " tensor from rank " +
                                std::to_string(source) + " in time"),
              untouched};
    }
    progress_.reap();
    backoff.pause(deadline, progress_.sends_pending());
  }
}

void MpiDeviceGroup::discard_arrived() {
  CHECK(stop_.stopped(), "abort the group first");
  const auto drop_done = [](std::deque<Arriving>& chunks) {
    std::erase_if(chunks, [](Arriving& chunk) {
      int done = 0;
      return MPI_Test(&chunk.request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done != 0;
    });
  };
  for (LaneState& lane : lanes_) {
    for (Stream& stream : lane.streams) drop_done(stream.arriving);
    // An error shows in the barrier that follows.
    static_cast<void>(start_chunk(lane.comm, MPI_ANY_SOURCE, discarded_));
  }
  drop_done(discarded_);
}

bool MpiDeviceGroup::idle() const {
  return discarded_.empty() && std::all_of(lanes_.begin(), lanes_.end(), [](const LaneState& l) {
           return std::all_of(l.streams.begin(), l.streams.end(),
                              [](const Stream& s) { return s.arriving.empty(); });
         });
}

}  // namespace spindle::comm
