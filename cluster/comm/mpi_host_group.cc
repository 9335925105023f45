#include "cluster/comm/mpi_host_group.h"

#include <unistd.h>

#include <algorithm>
#include <thread>
#include <utility>

#include "cluster/comm/backoff.h"
#include "cluster/comm/watchdog.h"
#include "kernels/core/check.h"

namespace spindle::comm {
namespace {

using std::chrono::microseconds;

constexpr int kTag = 0;
constexpr std::chrono::milliseconds kAbortTimeout{2000};

// Nobody waits for a heartbeat in a hurry. An order may be late, but one that follows another
// closely is answered at once: that is how clocks are compared. The others are part of every step.
BackoffPolicy policy_of(Channel channel, int wait_share) {
  if (channel == Channel::kOrder) {
    return {.max_sleep = microseconds(5000), .wait_share = wait_share};
  }
  if (channel != Channel::kHeartbeat) {
    return {.max_sleep = microseconds(1000), .wait_share = wait_share};
  }
  return {
      .spin = microseconds(0), .min_sleep = microseconds(5000), .max_sleep = microseconds(5000)};
}

// What every step waits for.
bool comes_with_steps(Channel channel) {
  return channel == Channel::kPlan || channel == Channel::kResult;
}

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

}  // namespace

void abort_job(int rank, int exit_code, std::string_view why) {
  print_to_stderr("rank " + std::to_string(rank) + " ends the job: " + std::string(why));
  const Watchdog watchdog(kAbortTimeout, exit_code,
                          "rank " + std::to_string(rank) + ": MPI_Abort hangs, exiting");
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  ::_exit(exit_code);
}

MpiHostGroup::MpiHostGroup(const ChannelComms& comms, std::uint32_t epoch, MpiProgress& progress)
    : HostGroup(rank_in(comms[0]), size_of(comms[0]), epoch), progress_(progress) {
  for (std::size_t i = 0; i < kChannelCount; ++i) {
    inboxes_[i].comm = comms[i];
    inboxes_[i].sends = &progress.add_queue(comms[i], kMaxUnreceivedBytes);
    inboxes_[i].from_self = std::make_unique<Mailbox>(size(), kMaxUnreceivedBytes);
  }
}

void MpiHostGroup::shutdown(std::string_view why) {
  const Status reason =
      unavailable("rank " + std::to_string(rank()) + " has shut down: " + std::string(why));
  stop_.stop(reason);
  for (Inbox& inbox : inboxes_) inbox.from_self->close(reason);
}

void MpiHostGroup::abort(int exit_code, std::string_view why) { abort_job(rank(), exit_code, why); }

Status MpiHostGroup::send_frame(int dest, Channel channel, std::string frame, Deadline deadline) {
  Inbox& inbox = inboxes_[channel_index(channel)];
  if (stop_.stopped()) return stop_.reason();
  if (dest == rank()) return inbox.from_self->push(rank(), std::move(frame), deadline);
  const auto owner = std::make_shared<std::string>(std::move(frame));
  return progress_.send(*inbox.sends, dest, std::as_bytes(std::span(*owner)), owner, stop_,
                        deadline);
}

Result<std::optional<Message>> MpiHostGroup::recv_frame(int source, Channel channel,
                                                        Deadline deadline) {
  Inbox& inbox = inboxes_[channel_index(channel)];
  BackoffPolicy policy = policy_of(channel, progress_.wait_share());
  if (progress_.waiting() == Waiting::kSpinning && comes_with_steps(channel)) {
    const auto passed = Deadline::Clock::now().time_since_epoch() - inbox.last_message.load();
    policy.spin =
        std::max(policy.spin, std::chrono::duration_cast<microseconds>(kSpinAfterMessage - passed));
  }
  auto message = wait_frame(inbox, source, policy, deadline);
  if (message.ok() && message->has_value()) {
    inbox.last_message = Deadline::Clock::now().time_since_epoch();
  }
  return message;
}

Result<std::optional<Message>> MpiHostGroup::wait_frame(Inbox& inbox, int source,
                                                        const BackoffPolicy& policy,
                                                        Deadline deadline) {
  Backoff backoff(policy);
  for (;;) {
    if (stop_.stopped()) return stop_.reason();
    auto message = poll(inbox, source);
    if (!message.ok() || message->has_value()) return message;
    if (deadline.passed()) return message;
    progress_.reap();
    const auto wait = backoff.yield_or(deadline, progress_.sends_pending());
    if (source != kAnySource && source != rank()) {
      std::this_thread::sleep_for(wait);
    } else if (wait.count() > 0) {
      // A message to oneself ends the sleep.
      message = inbox.from_self->pop(rank(), Deadline::after(wait));
      if (!message.ok() || message->has_value()) return message;
    }
  }
}

Result<std::optional<Message>> MpiHostGroup::poll(Inbox& inbox, int source) {
  const bool any = source == kAnySource;
  if (any || source == rank()) {
    auto message = inbox.from_self->pop(rank(), Deadline::after_ms(0));
    if (!any || !message.ok() || message->has_value()) return message;
  }
  const std::lock_guard lock(inbox.mutex);
  std::vector<Arriving>& arriving = inbox.arriving;
  bool under_way = false;
  for (std::size_t i = 0; i < arriving.size(); ++i) {
    if (!any && arriving[i].source != source) continue;
    auto message = finish(inbox, i);
    if (!message.ok() || message->has_value()) return message;
    under_way = true;
  }
  // Starting another one would overtake it, or hold more than one message per source.
  if (under_way) return std::optional<Message>();
  Result<bool> started = start_next(inbox, source);
  if (!started.ok()) return started.status();
  if (!*started) return std::optional<Message>();
  return finish(inbox, arriving.size() - 1);
}

Result<std::optional<Message>> MpiHostGroup::finish(Inbox& inbox, std::size_t index) {
  Arriving& arriving = inbox.arriving[index];
  int done = 0;
  const int code = MPI_Test(&arriving.request, &done, MPI_STATUS_IGNORE);
  if (code == MPI_SUCCESS && done == 0) return std::optional<Message>();
  Arriving ended = std::move(arriving);
  inbox.arriving.erase(inbox.arriving.begin() + static_cast<std::ptrdiff_t>(index));
  if (code != MPI_SUCCESS) return mpi_status(code, "MPI_Imrecv");
  return std::optional<Message>({ended.source, std::move(ended.bytes)});
}

Result<bool> MpiHostGroup::start_next(Inbox& inbox, int source) {
  int found = 0;
  MPI_Message handle = MPI_MESSAGE_NULL;
  MPI_Status envelope;
  int code = MPI_Improbe(source == kAnySource ? MPI_ANY_SOURCE : source, kTag, inbox.comm, &found,
                         &handle, &envelope);
  if (code != MPI_SUCCESS) return mpi_status(code, "MPI_Improbe");
  if (found == 0) return false;
  MPI_Count n_bytes = 0;
  code = MPI_Get_elements_x(&envelope, MPI_BYTE, &n_bytes);
  if (code != MPI_SUCCESS) return mpi_status(code, "MPI_Get_elements_x");

  if (n_bytes < 0 || static_cast<std::size_t>(n_bytes) > kMaxFrameBytes) {
    // Left unreceived on purpose: receiving it into less memory is legal MPI, but Open MPI 4.1
    // overruns the memory when it reads a large message straight from the sender.
    return too_large("a frame of " + std::to_string(n_bytes) + " bytes from rank " +
                     std::to_string(envelope.MPI_SOURCE) + "; the limit is " +
                     std::to_string(kMaxFrameBytes));
  }
  inbox.arriving.push_back({.request = MPI_REQUEST_NULL,
                            .source = envelope.MPI_SOURCE,
                            .bytes = std::string(static_cast<std::size_t>(n_bytes), '\0')});
  Arriving& slot = inbox.arriving.back();
  // A short frame may live inside the string object, which erase() moves: give it heap memory.
  slot.bytes.reserve(kFrameHeaderBytes);
  code = MPI_Imrecv(slot.bytes.data(), static_cast<int>(slot.bytes.size()), MPI_BYTE, &handle,
                    &slot.request);
  if (code != MPI_SUCCESS) {
    inbox.arriving.pop_back();
    return mpi_status(code, "MPI_Imrecv");
  }
  return true;
}

void MpiHostGroup::discard_arrived() {
  CHECK(stop_.stopped(), "shut the group down first");
  for (Inbox& inbox : inboxes_) {
    const std::lock_guard lock(inbox.mutex);
    for (std::size_t i = inbox.arriving.size(); i-- > 0;) {
      static_cast<void>(finish(inbox, i));
    }
    // An error shows in the barrier that follows.
    static_cast<void>(start_next(inbox, kAnySource));
  }
}

bool MpiHostGroup::idle() {
  return std::all_of(inboxes_.begin(), inboxes_.end(), [](Inbox& inbox) {
    const std::lock_guard lock(inbox.mutex);
    return inbox.arriving.empty();
  });
}

}  // namespace spindle::comm
