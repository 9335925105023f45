#pragma once
// The client side of the TCP API: blocking calls with deadlines. Depends on neither the server nor
// the tokenizer, so that client programs stay small.

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cluster/api/framing.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"
#include "proto/api.pb.h"

namespace spindle::api {

struct TcpClientOptions {
  std::string host = "127.0.0.1";
  std::uint16_t port = 8001;
  std::string api_key = {};
  std::string client_name = "spindle";
  std::size_t max_frame_bytes = kDefaultMaxFrameBytes;
};

// Lets another thread or a signal handler end a running generate(): trigger() is async-signal-safe.
// Any other readable descriptor, a signalfd for one, can be used in its place.
class CancelEvent {
 public:
  CancelEvent();
  ~CancelEvent();
  CancelEvent(const CancelEvent&) = delete;
  CancelEvent& operator=(const CancelEvent&) = delete;

  void trigger() const noexcept;
  // Readable after trigger(), and for ever.
  int fd() const { return fd_; }

 private:
  int fd_;
};

struct ChoiceOutput {
  std::string text;
  std::vector<std::int32_t> token_ids;
  std::vector<v1::TokenInfo> logprobs;
  v1::FinishReason finish_reason = v1::NOT_FINISHED;
  std::string stop_reason;
};

// How a request ended, with what came before the end.
struct GenerateOutcome {
  // CANCELLED after a cancel, UNAVAILABLE when the connection was lost.
  Status status;
  std::string param;  // the field at fault, if one is
  std::int32_t retry_after_ms = 0;
  std::string request_id;
  std::int32_t prompt_tokens = 0;
  std::vector<v1::PromptScore> prompt_scores;  // when asked for, in order of position
  std::vector<ChoiceOutput> choices;           // by choice; empty when there was no output
  v1::Usage usage;                             // set when status is OK
};

// Called with every delta, in order, on the thread that waits.
using DeltaCallback = std::function<void(const v1::Delta&)>;

struct GenerateOptions {
  // The longest wait for the next frame about the request, queueing included.
  std::chrono::milliseconds progress_timeout{300'000};
  // A descriptor that becomes readable to cancel; -1: none. It is polled, never read or closed.
  int cancel_fd = -1;
};

// One connection. Requests are multiplexed on it: submit() several, then run() until all finished;
// or generate() for a single one. Replies are received only while a call waits.
//
// When the connection is lost, every open request ends with UNAVAILABLE (or what the server's
// goodbye said), closed() is true and every later call fails with the same status.
//
// Thread-safety: none; one thread at a time. To cancel from elsewhere use a CancelEvent.
class TcpClient {
 public:
  // Connects and shakes hands. UNAVAILABLE "cannot reach HOST:PORT: ...", DEADLINE_EXCEEDED, or the
  // server's refusal (UNAUTHENTICATED, UNIMPLEMENTED version, RESOURCE_EXHAUSTED connections).
  // A host name is looked up by the system's resolver, which may take longer than the deadline.
  static Result<std::unique_ptr<TcpClient>> connect(TcpClientOptions options, Deadline deadline);
  ~TcpClient();
  TcpClient(const TcpClient&) = delete;
  TcpClient& operator=(const TcpClient&) = delete;

  const v1::Welcome& welcome() const;
  // Ok while the connection is usable, else why it is not.
  Status connection_status() const;

  // One request from start to end. After progress_timeout or a cancel the server is told, and its
  // confirmation is awaited for a short while.
  GenerateOutcome generate(v1::GenerateRequest request, const DeltaCallback& on_delta,
                           const GenerateOptions& options = {});

  // Queues a request and returns its id at once. TOO_LARGE when it does not fit into a frame.
  Result<std::uint64_t> submit(v1::GenerateRequest request, DeltaCallback on_delta);
  // Tells the server; the request ends with CANCELLED in a later run().
  void cancel(std::uint64_t id);
  // Sends and receives until a request ended or the deadline passed (DEADLINE_EXCEEDED). With no
  // request open: until the connection closes.
  Status run(Deadline deadline);
  bool finished(std::uint64_t id) const;
  std::size_t n_open() const;
  // The outcome of a finished request, once; NOT_FOUND in `status` otherwise.
  GenerateOutcome take(std::uint64_t id);

  Result<v1::Stats> stats(Deadline deadline);
  Result<v1::DrainReply> drain(Deadline deadline);
  Status ping(Deadline deadline);
  // DEADLINE_EXCEEDED if the server has not closed the connection by then. Pings meanwhile.
  Status wait_closed(Deadline deadline);

 private:
  class Connection;
  explicit TcpClient(std::unique_ptr<Connection> connection);
  Result<v1::Frame> call(v1::Frame request, v1::Frame::BodyCase reply, Deadline deadline);

  std::unique_ptr<Connection> connection_;
};

}  // namespace spindle::api
