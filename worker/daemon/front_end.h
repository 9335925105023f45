#pragma once
// What rank 0 shows to clients: tokenizer, completion service, HTTP and TCP servers, metrics.

#include <cstdint>
#include <functional>
#include <memory>

#include "cluster/api/cluster_admin.h"
#include "cluster/engine/engine.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"
#include "proto/config.pb.h"
#include "worker/model/generation_config.h"

namespace spindle::worker {

struct FrontEndOptions {
  config::Config config;  // complete
  model::GenerationConfig generation;
  int n_stages = 1;
  // A client asked to drain. Called on an I/O thread.
  std::function<void()> on_drain;
  // Orders to the whole cluster; outlives the front end. Null: refused.
  api::ClusterAdmin* admin = nullptr;
};

// Owns the I/O and tokenizer threads and both servers; does not own the engine, which must outlive
// it.
// Thread-safety: create, stop and destroy from one thread.
class FrontEnd {
 public:
  // Loads the tokenizer, listens and serves. An error says what is wrong with which file or
  // address.
  static Result<std::unique_ptr<FrontEnd>> start(engine::Engine& engine, FrontEndOptions options);
  // stop() with no time left.
  ~FrontEnd();

  // Takes no more connections, lets responses under way go out until the deadline, closes the rest.
  // The engine must have ended its requests.
  void stop(Deadline deadline);

  // Prompts turned away before they ran, for whatever reason.
  std::uint64_t n_refused() const;

  std::uint16_t http_port() const;  // 0: not enabled
  std::uint16_t tcp_port() const;

 private:
  struct State;
  explicit FrontEnd(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace spindle::worker
