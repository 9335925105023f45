#include "cluster/comm/nccl_device_group.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <thread>
#include <utility>

#include "kernels/core/cuda_check.h"

namespace spindle::comm {
namespace {

constexpr std::chrono::microseconds kPoll{50};
constexpr std::chrono::microseconds kSpin{500};
constexpr std::chrono::seconds kAbortWait{2};
// CTAs a transfer may take from the stage's own kernels.
constexpr int kMaxCtas = 8;

cudaStream_t make_stream() {
  int least = 0;
  int greatest = 0;
  cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
  cudaStream_t stream = nullptr;
  cuda_check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
             "cudaStreamCreate");
  return stream;
}

cudaEvent_t make_event() {
  cudaEvent_t event = nullptr;
  cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  return event;
}

// After `before` has reached this point, `after` goes on.
void order(cudaStream_t before, cudaStream_t after, cudaEvent_t event) {
  cuda_check(cudaEventRecord(event, before), "cudaEventRecord");
  cuda_check(cudaStreamWaitEvent(after, event, 0), "cudaStreamWaitEvent");
}

}  // namespace

NcclDeviceGroup::NcclDeviceGroup(int rank, int size, const CudaContext& context,
                                 std::size_t max_tensor_bytes)
    : DeviceGroup(rank, size), context_(context), max_tensor_bytes_(max_tensor_bytes) {}

Result<std::unique_ptr<NcclDeviceGroup>> NcclDeviceGroup::create(HostGroup& host,
                                                                 const CudaContext& context,
                                                                 std::size_t max_tensor_bytes,
                                                                 Deadline deadline) {
  std::unique_ptr<NcclDeviceGroup> group(
      new NcclDeviceGroup(host.rank(), host.size(), context, max_tensor_bytes));
  auto library = NcclLibrary::load();
  // Ranks agree before anyone waits inside NCCL.
  auto outcomes = host.all_gather(library.ok() ? "" : library.status().message(), deadline);
  if (!outcomes.ok()) return outcomes.status();
  for (std::size_t rank = 0; rank < outcomes->size(); ++rank) {
    if (!(*outcomes)[rank].empty()) {
      return unavailable("rank " + std::to_string(rank) + ": " + (*outcomes)[rank]);
    }
  }
  group->nccl_ = std::move(*library);
  if (Status status = group->connect(host, deadline); !status.ok()) return status;
  if (Status status = group->warm_up(deadline); !status.ok()) return status;
  return group;
}

Status NcclDeviceGroup::connect(HostGroup& host, Deadline deadline) {
  cuda_check(cudaSetDevice(context_.device()), "cudaSetDevice");
  collective_done_ = make_event();
  auto memory = context_.allocate(kMaxCollectiveBytes, "reports");
  if (!memory.ok()) return memory.status();
  collected_ = std::move(*memory);
  auto host_memory = context_.allocate_pinned(kMaxCollectiveBytes, "reports");
  if (!host_memory.ok()) return host_memory.status();
  collected_host_ = std::move(*host_memory);
  context_.synchronize();  // allocation is ordered on another stream than its use
  // Every rank names its edge to the next stage; rank 0 also the communicator of all.
  std::array<ncclUniqueId, 2> mine{};
  for (ncclUniqueId& id : mine) {
    if (const ncclResult_t result = nccl_->get_unique_id(&id); result != ncclSuccess) {
      return unavailable(std::string("NCCL: ") + nccl_->get_error_string(result));
    }
  }
  const std::string_view bytes(reinterpret_cast<const char*>(mine.data()), sizeof(mine));
  auto all = host.all_gather(bytes, deadline);
  if (!all.ok()) return all.status();
  const auto id_of = [&](int rank, std::size_t which) {
    std::array<ncclUniqueId, 2> ids{};
    const std::string& text = (*all)[static_cast<std::size_t>(rank)];
    if (text.size() == sizeof(ids)) std::memcpy(ids.data(), text.data(), sizeof(ids));
    return ids[which];
  };
  if (Status s = make_link(world_, id_of(0, 1), size(), rank(), -1, deadline); !s.ok()) return s;
  // Even edges first, then odd ones: both ends of an edge are at the same point.
  for (int parity = 0; parity < 2; ++parity) {
    if (rank() + 1 < size() && rank() % 2 == parity) {
      if (Status s = make_link(to_next_, id_of(rank(), 0), 2, 0, 1, deadline); !s.ok()) return s;
    }
    if (rank() > 0 && (rank() - 1) % 2 == parity) {
      Status s = make_link(from_previous_, id_of(rank() - 1, 0), 2, 1, 0, deadline);
      if (!s.ok()) return s;
    }
  }
  if (to_next_.comm != nullptr) {
    if (Status s = make_staging(sending_, "activations to send"); !s.ok()) return s;
  }
  if (from_previous_.comm != nullptr) {
    if (Status s = make_staging(receiving_, "activations to receive"); !s.ok()) return s;
    computed_ = make_event();
  }
  return ok_status();
}

Status NcclDeviceGroup::make_link(Link& link, const ncclUniqueId& id, int n_ranks, int rank,
                                  int peer, Deadline deadline) {
  link.stream = make_stream();
  link.peer = peer;
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  config.maxCTAs = kMaxCtas;
  const ncclResult_t result = nccl_->comm_init_rank_config(&link.comm, n_ranks, id, rank, &config);
  return settle(link.comm, result, "connecting the GPUs", deadline);
}

Status NcclDeviceGroup::make_staging(Staging& staging, std::string_view what) {
  auto memory = context_.allocate(kSlots * max_tensor_bytes_, what);
  if (!memory.ok()) return memory.status();
  staging.memory = std::move(*memory);
  for (std::size_t slot = 0; slot < kSlots; ++slot) {
    staging.filled[slot] = make_event();
    staging.drained[slot] = make_event();
  }
  return ok_status();
}

Status NcclDeviceGroup::settle(ncclComm_t comm, ncclResult_t result, std::string_view what,
                               Deadline deadline) {
  const auto began = Deadline::Clock::now();
  while (result == ncclInProgress) {
    if (aborted_) return fail(unavailable("the group was aborted"));
    if (deadline.passed()) {
      return fail(deadline_exceeded("NCCL did not finish in time: " + std::string(what)));
    }
    // A transfer is accepted within some 100 us, and a step waits for it; connecting takes longer.
    if (Deadline::Clock::now() - began < kSpin) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kPoll);
    }
    if (nccl_->comm_get_async_error(comm, &result) != ncclSuccess) break;
  }
  if (result == ncclSuccess) return ok_status();
  return fail(unavailable("NCCL, " + std::string(what) + ": " + nccl_->get_error_string(result)));
}

Status NcclDeviceGroup::warm_up(Deadline deadline) {
  // One byte over every edge and one collective: connections are made at the first use.
  auto scratch = context_.allocate(1, "warming NCCL up");
  if (!scratch.ok()) return scratch.status();
  context_.fill(scratch->data(), 1, scratch->n_bytes());
  const std::span<std::byte> one(scratch->data(), 1);
  if (rank() > 0) {
    if (Status s = recv(rank() - 1, one, deadline); !s.ok()) return s;
  }
  if (rank() + 1 < size()) {
    if (Status s = send(rank() + 1, one, deadline); !s.ok()) return s;
  }
  const std::byte mine{};
  std::vector<std::byte> all(static_cast<std::size_t>(size()));
  if (Status s = all_gather({&mine, 1}, all, deadline); !s.ok()) return s;
  return flush(deadline);
}

Status NcclDeviceGroup::fail(Status status) {
  abort(status.message());
  return status;
}

void NcclDeviceGroup::remember(cudaEvent_t event, Deadline deadline, std::string what) {
  std::erase_if(pending_, [event](const Pending& pending) { return pending.event == event; });
  pending_.push_back({event, deadline, std::move(what)});
}

Status NcclDeviceGroup::check_health() {
  {
    const std::lock_guard lock(abort_mutex_);
    if (aborted_) return unavailable(abort_reason_);
  }
  for (const Link* link : {&to_next_, &from_previous_}) {
    if (link->comm == nullptr) continue;
    ncclResult_t error = ncclSuccess;
    const ncclResult_t asked = nccl_->comm_get_async_error(link->comm, &error);
    const ncclResult_t worst = asked != ncclSuccess ? asked : error;
    if (worst != ncclSuccess && worst != ncclInProgress) {
      return fail(unavailable(std::string("NCCL: ") + nccl_->get_error_string(worst)));
    }
  }
  while (!pending_.empty()) {
    if (event_reached(pending_.front().event)) {
      pending_.pop_front();
      continue;
    }
    if (!pending_.front().deadline.passed()) break;
    return fail(deadline_exceeded(pending_.front().what + " did not finish in time"));
  }
  return ok_status();
}

Status NcclDeviceGroup::send(int dest, std::span<const std::byte> data, Deadline deadline) {
  if (Status s = check_health(); !s.ok()) return s;
  if (dest != rank() + 1 || to_next_.comm == nullptr) {
    return invalid_argument("stage " + std::to_string(rank()) + " sends to the next stage only");
  }
  if (data.size() > max_tensor_bytes_) {
    return too_large("a tensor of " + std::to_string(data.size()) + " bytes; the limit is " +
                     std::to_string(max_tensor_bytes_));
  }
  if (data.empty()) return ok_status();
  Staging& staging = sending_;
  const std::size_t slot = std::exchange(staging.next, (staging.next + 1) % kSlots);
  std::byte* memory = staging.memory.data() + slot * max_tensor_bytes_;
  if (std::exchange(staging.used[slot], true)) {
    cuda_check(cudaStreamWaitEvent(context_.stream(), staging.drained[slot], 0),
               "waiting for a staging slot");
  }
  context_.copy(memory, data.data(), data.size());
  order(context_.stream(), to_next_.stream, staging.filled[slot]);
  SendTimer& timer = send_timers_[slot];
  count_send(timer);
  if (timer.began == nullptr) {
    cuda_check(cudaEventCreate(&timer.began), "cudaEventCreate");
    cuda_check(cudaEventCreate(&timer.ended), "cudaEventCreate");
  }
  cuda_check(cudaEventRecord(timer.began, to_next_.stream), "cudaEventRecord");
  const ncclResult_t result =
      nccl_->send(memory, data.size(), ncclUint8, to_next_.peer, to_next_.comm, to_next_.stream);
  if (Status s = settle(to_next_.comm, result, "sending activations", deadline); !s.ok()) return s;
  cuda_check(cudaEventRecord(timer.ended, to_next_.stream), "cudaEventRecord");
  timer.open = true;
  cuda_check(cudaEventRecord(staging.drained[slot], to_next_.stream), "cudaEventRecord");
  remember(staging.drained[slot], deadline, "sending to stage " + std::to_string(dest));
  return ok_status();
}

Status NcclDeviceGroup::recv(int source, std::span<std::byte> out, Deadline deadline) {
  if (Status s = check_health(); !s.ok()) return s;
  if (source != rank() - 1 || from_previous_.comm == nullptr) {
    return invalid_argument("stage " + std::to_string(rank()) +
                            " receives from the stage before it only");
  }
  if (out.size() > max_tensor_bytes_) {
    return too_large("a tensor of " + std::to_string(out.size()) + " bytes; the limit is " +
                     std::to_string(max_tensor_bytes_));
  }
  if (out.empty()) return ok_status();
  Staging& staging = receiving_;
  const std::size_t slot = std::exchange(staging.next, (staging.next + 1) % kSlots);
  std::byte* memory = staging.memory.data() + slot * max_tensor_bytes_;
  if (std::exchange(staging.used[slot], true)) {
    cuda_check(cudaStreamWaitEvent(from_previous_.stream, staging.drained[slot], 0),
               "waiting for a staging slot");
  }
  // Not before what computes already: until the sender is there, the transfer's kernel would hold
  // multiprocessors and have nothing to do.
  order(context_.stream(), from_previous_.stream, computed_);
  const ncclResult_t result = nccl_->recv(memory, out.size(), ncclUint8, from_previous_.peer,
                                          from_previous_.comm, from_previous_.stream);
  Status s = settle(from_previous_.comm, result, "receiving activations", deadline);
  if (!s.ok()) return s;
  order(from_previous_.stream, context_.stream(), staging.filled[slot]);
  remember(staging.filled[slot], deadline, "receiving from stage " + std::to_string(source));
  context_.copy(out.data(), memory, out.size());
  cuda_check(cudaEventRecord(staging.drained[slot], context_.stream()), "cudaEventRecord");
  return ok_status();
}

// Adds what a send took, if it is over. One that is not when its slot is used again is left out.
void NcclDeviceGroup::count_send(SendTimer& timer) {
  if (!timer.open) return;
  float ms = 0;
  const cudaError_t state = cudaEventElapsedTime(&ms, timer.began, timer.ended);
  if (state == cudaSuccess) send_us_ += 1000.0 * ms;
  if (state != cudaErrorNotReady) timer.open = false;
  static_cast<void>(cudaGetLastError());
}

TensorTimes NcclDeviceGroup::tensor_times() {
  for (SendTimer& timer : send_timers_) count_send(timer);
  return {.send_us = static_cast<std::uint64_t>(send_us_), .receive_us = 0, .in_calls = false};
}

Status NcclDeviceGroup::flush(Deadline deadline) {
  while (true) {
    if (Status s = check_health(); !s.ok()) return s;
    if (pending_.empty()) return ok_status();
    if (deadline.passed()) {
      return fail(deadline_exceeded(pending_.front().what + " did not finish in time"));
    }
    std::this_thread::sleep_for(kPoll);
  }
}

Status NcclDeviceGroup::all_gather(std::span<const std::byte> mine, std::span<std::byte> all,
                                   Deadline deadline) {
  if (all.size() != mine.size() * static_cast<std::size_t>(size())) {
    return invalid_argument("all_gather of " + std::to_string(mine.size()) + " bytes over " +
                            std::to_string(size()) + " ranks into " + std::to_string(all.size()) +
                            " bytes");
  }
  return collect(mine, all, "an all-gather", deadline, [&](std::byte* in, std::byte* out) {
    return nccl_->all_gather(in, out, mine.size(), ncclUint8, world_.comm, world_.stream);
  });
}

Status NcclDeviceGroup::broadcast(std::span<std::byte> data, int root, Deadline deadline) {
  if (root < 0 || root >= size()) {
    return invalid_argument("rank " + std::to_string(root) + " is not in a group of " +
                            std::to_string(size()));
  }
  return collect(data, data, "a broadcast", deadline, [&](std::byte* in, std::byte* out) {
    return nccl_->broadcast(in, out, data.size(), ncclUint8, root, world_.comm, world_.stream);
  });
}

// Host to device, the collective, and back, on the collectives' own stream.
template <typename Enqueue>
Status NcclDeviceGroup::collect(std::span<const std::byte> in, std::span<std::byte> out,
                                std::string_view what, Deadline deadline, Enqueue enqueue) {
  if (in.size() + out.size() > kMaxCollectiveBytes) {
    return too_large(std::string(what) + " of " + std::to_string(in.size() + out.size()) +
                     " bytes in all; the limit is " + std::to_string(kMaxCollectiveBytes));
  }
  if (in.empty()) return ok_status();
  {
    const std::lock_guard lock(abort_mutex_);
    if (aborted_) return unavailable(abort_reason_);
  }
  cuda_check(cudaSetDevice(context_.device()), "cudaSetDevice");
  std::byte* const host_out = collected_host_.data() + in.size();
  std::byte* const device_out = collected_.data() + in.size();
  std::copy(in.begin(), in.end(), collected_host_.data());
  cuda_check(cudaMemcpyAsync(collected_.data(), collected_host_.data(), in.size(),
                             cudaMemcpyHostToDevice, world_.stream),
             "cudaMemcpyAsync");
  const ncclResult_t result = enqueue(collected_.data(), device_out);
  if (Status s = settle(world_.comm, result, what, deadline); !s.ok()) return s;
  cuda_check(
      cudaMemcpyAsync(host_out, device_out, out.size(), cudaMemcpyDeviceToHost, world_.stream),
      "cudaMemcpyAsync");
  cuda_check(cudaEventRecord(collective_done_, world_.stream), "cudaEventRecord");
  while (!event_reached(collective_done_)) {
    if (aborted_) return fail(unavailable("the group was aborted"));
    ncclResult_t error = ncclSuccess;
    const ncclResult_t asked = nccl_->comm_get_async_error(world_.comm, &error);
    const ncclResult_t worst = asked != ncclSuccess ? asked : error;
    if (worst != ncclSuccess && worst != ncclInProgress) {
      return fail(
          unavailable("NCCL, " + std::string(what) + ": " + nccl_->get_error_string(worst)));
    }
    if (deadline.passed()) {
      return fail(deadline_exceeded(std::string(what) + " did not finish in time"));
    }
    std::this_thread::sleep_for(kPoll);
  }
  std::copy(host_out, host_out + out.size(), out.begin());
  return ok_status();
}

void NcclDeviceGroup::abort(std::string_view why) {
  const std::lock_guard lock(abort_mutex_);
  if (aborted_) return;
  abort_reason_ = why;
  aborted_ = true;
  abort_communicators();
}

void NcclDeviceGroup::abort_communicators() {
  std::vector<ncclComm_t> comms;
  for (Link* link : {&world_, &to_next_, &from_previous_}) {
    if (link->comm != nullptr) comms.push_back(std::exchange(link->comm, nullptr));
  }
  if (comms.empty()) return;
  auto done = std::make_shared<std::promise<void>>();
  std::future<void> finished = done->get_future();
  std::thread([comms, done, nccl = nccl_, device = context_.device()] {
    static_cast<void>(cudaSetDevice(device));
    // Ends the kernels that wait for a peer.
    for (ncclComm_t comm : comms) static_cast<void>(nccl->comm_abort(comm));
    done->set_value();
  }).detach();
  static_cast<void>(finished.wait_for(kAbortWait));
}

NcclDeviceGroup::~NcclDeviceGroup() {
  // Aborted, not destroyed: destroying waits for the peer, which may be gone or still at work.
  // Whoever wants its last tensors to arrive flushes first.
  abort_communicators();
  for (Link* link : {&world_, &to_next_, &from_previous_}) {
    if (link->stream != nullptr) static_cast<void>(cudaStreamDestroy(link->stream));
  }
  for (const Staging* staging : {&sending_, &receiving_}) {
    for (std::size_t slot = 0; slot < kSlots; ++slot) {
      if (staging->filled[slot] != nullptr)
        static_cast<void>(cudaEventDestroy(staging->filled[slot]));
      if (staging->drained[slot] != nullptr) {
        static_cast<void>(cudaEventDestroy(staging->drained[slot]));
      }
    }
  }
  if (computed_ != nullptr) static_cast<void>(cudaEventDestroy(computed_));
  if (collective_done_ != nullptr) static_cast<void>(cudaEventDestroy(collective_done_));
  for (const SendTimer& timer : send_timers_) {
    if (timer.began != nullptr) static_cast<void>(cudaEventDestroy(timer.began));
    if (timer.ended != nullptr) static_cast<void>(cudaEventDestroy(timer.ended));
  }
}

}  // namespace spindle::comm
