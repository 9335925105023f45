#pragma once
// Whether requests wait longer than they should.
//
// Work is counted in tokens that the stages run: prompts, output, and whatever is computed anew. A
// request is *due* once so much work was done since its arrival that nobody may overtake it any
// more (waiting_queue.h): kPatience times its prompt, and kPriorityTokens for every step by which
// its priority comes behind the first. *Ahead* of it are
//
// - the requests that had not ended when it arrived, with what they still had to run then,
// - those that arrive before it is due, and those of other owners, who are served in turn; with all
//   their work.
//
// Served in order, it waits exactly as long as the cluster takes for what is ahead: its fair share,
// (work ahead) / (tokens per second at that time). Checked is
//
//   tokens run between its arrival and its first step <= 3 x (work ahead) + slack,
//
// the same inequality multiplied by the rate, so that it needs no estimate of one. More than that
// means that others overtook it who must not. Slack is what the steps that are on their way may
// hold. That the cluster does run something while requests wait is checked beside it
// (simulation.h): nothing may wait while nothing is in flight.
//
// Thread-safety: none.

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cluster/engine/engine.h"
#include "kernels/core/status.h"

namespace spindle::coordinator::simulation {

class FairShare {
 public:
  // Priorities begin at `first_priority`.
  explicit FairShare(std::int64_t slack_tokens, std::int32_t first_priority = 0)
      : slack_(slack_tokens), first_priority_(first_priority) {}

  // `work`: tokens that the request will have run when it ends well.
  void arrive(std::uint64_t request, const engine::EngineRequest& asked, std::int64_t work,
              std::int64_t now_us);
  // The request has n tokens less to run.
  void progress(std::uint64_t request, std::int64_t n);
  // The cluster was told to run n tokens, of anybody.
  void serve(std::int64_t n, std::int64_t now_us);
  // INTERNAL, with the figures, when the request waited more than three shares until `first_us`.
  Status check(std::uint64_t request, std::int64_t first_us) const;
  void end(std::uint64_t request);

  // Tokens run in (from_us, to_us].
  std::int64_t served(std::int64_t from_us, std::int64_t to_us) const;
  std::int64_t ahead(std::uint64_t request, std::int64_t until_us) const;

 private:
  struct Request {
    std::uint64_t owner = 0;
    std::int64_t patience = 0;  // tokens until it is due
    std::int64_t left = 0;
    std::int64_t ahead = 0;  // at its arrival
    std::int64_t arrived_us = 0;
    std::size_t n_arrivals = 0;  // before and with it
  };
  struct Arrival {
    std::int64_t time_us = 0;
    std::uint64_t owner = 0;
    std::int64_t work = 0;
  };

  std::int64_t slack_;
  std::int32_t first_priority_;
  std::unordered_map<std::uint64_t, Request> requests_;
  std::int64_t left_ = 0;  // of all of them
  std::vector<Arrival> arrivals_;
  std::vector<std::pair<std::int64_t, std::int64_t>> served_;  // (time, tokens so far)
};

}  // namespace spindle::coordinator::simulation
