#pragma once
// What every request must get: its tokens, in order, as the model of token_model.h says, its end,
// once, and a status that somebody gave a reason for.
//
// Thread-safety: none.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cluster/coordinator/scheduler.h"
#include "cluster/coordinator/simulation/token_model.h"

namespace spindle::coordinator::simulation {

struct Life {
  struct Choice {
    SamplingKey key;
    std::uint64_t hash = 0;  // of prompt and output
    std::vector<std::int32_t> output;
    bool is_finished = false;
  };

  engine::EngineRequest request;
  std::vector<Choice> choices;
  std::int64_t submitted_us = 0;
  std::int64_t ended_us = 0;
  std::int64_t max_generated = 0;
  std::size_t n_scores = 0;
  bool is_cancelled = false;
  int n_ended = 0;
  Status status;
  engine::RequestSummary summary;
};

class RequestBook {
 public:
  // The figures of `config` that decide output: seed, end-of-sequence ids, context length.
  RequestBook(const SchedulerConfig& config, const TokenModel& model);

  // The tokens that the request will have run when nobody interrupts it.
  std::int64_t work(const Life& life) const;
  Life& accept(engine::RequestHandle handle, engine::EngineRequest request, std::int64_t now_us);
  void cancel(engine::RequestHandle handle);
  // The choice's output ends here, if there is any.
  void finish_choice(engine::RequestHandle handle, std::int32_t choice);
  // From now on requests may end with this status.
  void expect_failure(StatusCode code) { failure_ = code; }

  // INTERNAL, saying what is wrong.
  Status take(const RequestEvents& events, std::int64_t now_us);
  // The engine ended it, since the cluster failed.
  Status end_failed(engine::RequestHandle handle, const Status& status, std::int64_t now_us);
  // Every request ended once.
  Status check_all_ended() const;

  Life* find(engine::RequestHandle handle);
  const std::map<engine::RequestHandle, Life>& lives() const { return lives_; }
  std::size_t n_open() const { return n_open_; }

 private:
  Status take_token(Life& life, const engine::TokenEvent& event) const;
  Status take_scores(Life& life, const RequestEvents& events) const;
  Status check_end(const Life& life) const;
  bool is_stop(const Life& life, std::int32_t token) const;
  std::int32_t expected_token(const Life& life, const Life::Choice& choice) const;

  std::uint64_t seed_;
  std::vector<std::int32_t> eos_ids_;
  std::int64_t max_model_len_;
  TokenModel model_;
  StatusCode failure_ = StatusCode::kOk;
  std::map<engine::RequestHandle, Life> lives_;
  std::size_t n_open_ = 0;
};

}  // namespace spindle::coordinator::simulation
