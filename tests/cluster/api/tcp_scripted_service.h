#pragma once
// A completion service without a tokenizer or an engine: the prompt's first word says what happens.
//
//   refuse    on_error RESOURCE_EXHAUSTED, retry after 250 ms
//   invalid   on_error INVALID_ARGUMENT for top_p
//   fail      one delta, then on_error INTERNAL
//   slow      a word every 10 ms until cancelled (or max_tokens)
//   silent    accepted, then nothing until cancelled
//   flood     4 KiB deltas as fast as they are taken until cancelled
//   escape    a delta with terminal escape sequences
//   urgency   priority and time limit in ms: "-7 2500"
//   policy    profile, ratio, bytes, session and whether it is kept: "int4 0.5 0 name keep"
//   otherwise the prompt is echoed word by word (max_tokens words of it), for each of n choices
//
// Asked for prompt_scores, it sends them first, whatever the prompt's length: dense ones of 4096
// values. A request with a session_id has one cached token.
//
// A chat echoes its last message, with the number of messages in front: "3: hello", unless that
// message begins with slow, fail or refuse.

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "cluster/api/tcp_server.h"

namespace spindle::api {

struct ScriptedCounts {
  int started = 0;
  int cancelled = 0;
  int done = 0;
  int errors = 0;
  int drains = 0;
};

// Thread-safety: every member may be called from any thread. Outlives its requests.
class ScriptedService {
 public:
  TcpServerHooks hooks();
  std::shared_ptr<Completion> start(GenerateRequest request, boost::asio::any_io_executor executor,
                                    std::shared_ptr<OutputSink> sink);

  ScriptedCounts counts() const;
  // False when the deadline (10 s) passed first.
  bool wait_until(const std::function<bool(const ScriptedCounts&)>& reached);
  std::vector<GenerateRequest> requests() const;
  engine::EngineStats stats() const;

 private:
  class Run;
  void count(int ScriptedCounts::*counter);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  ScriptedCounts counts_;
  std::vector<GenerateRequest> requests_;
};

}  // namespace spindle::api
