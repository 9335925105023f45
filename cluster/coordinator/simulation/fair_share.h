#pragma once
// Whether requests wait longer than they should.
//
// Work is counted in tokens that the stages run: prompts, output, and whatever is computed anew.
// *Ahead* of a request are, at its arrival, the requests of at least its priority that have not
// ended, with what they still have to run, and, while it waits, all work of higher priority that
// arrives. Served in order, a request waits exactly as long as the cluster takes for that: its fair
// share, (work ahead) / (tokens per second at that time). Checked is
//
//   tokens run between its arrival and its first step <= 3 x (work ahead) + slack,
//
// the same inequality multiplied by the rate, so that it needs no estimate of one. More than that
// means that others overtook it. Slack is what the steps that are on their way may hold. That the
// cluster does run something while requests wait is checked beside it (simulation.h): nothing may
// wait while nothing is in flight.
//
// Thread-safety: none.

#include <cstdint>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::coordinator::simulation {

class FairShare {
 public:
  explicit FairShare(std::int64_t slack_tokens) : slack_(slack_tokens) {}

  // `work`: tokens that the request will have run when it ends well. Higher priorities go first.
  void arrive(std::uint64_t request, int priority, std::int64_t work, std::int64_t now_us);
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
    int priority = 0;
    std::int64_t left = 0;
    std::int64_t ahead = 0;  // at its arrival
    std::int64_t arrived_us = 0;
    std::size_t n_arrivals = 0;  // before and with it
  };
  struct Arrival {
    std::int64_t time_us = 0;
    int priority = 0;
    std::int64_t work = 0;
  };

  std::int64_t slack_;
  std::unordered_map<std::uint64_t, Request> requests_;
  std::map<int, std::int64_t> left_;  // by priority
  std::vector<Arrival> arrivals_;
  std::vector<std::pair<std::int64_t, std::int64_t>> served_;  // (time, tokens so far)
};

}  // namespace spindle::coordinator::simulation
