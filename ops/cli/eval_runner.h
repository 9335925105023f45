#pragma once
// Measures one probe in many cells. Knows requests and answers but no connection, so that it can be
// tested without a server.

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cluster/api/tcp_client.h"
#include "kernels/core/status.h"
#include "ops/cli/eval_cells.h"
#include "ops/cli/eval_probe.h"
#include "ops/cli/eval_score.h"

namespace spindle::cli {

// Sends a request and waits for its end.
using Ask = std::function<api::GenerateOutcome(const api::v1::GenerateRequest&)>;
using TakeResult = std::function<Status(const Cell&, const CellResult&)>;

struct RunnerOptions {
  // The cut's tokens are computed once, kept under this name and shared by all cells; the name's
  // next use replaces them. Empty: every cell computes everything.
  std::string session;
  std::int32_t max_scores = 256;  // dense scores that the server sends for one request
};

// The tokens before the cut, uncompressed, kept for the cells.
api::v1::GenerateRequest prefill_request(const Probe& probe, const std::string& session);
// One cell; the prompt ends where its last score is.
api::v1::GenerateRequest cell_request(const Probe& probe, const std::vector<TokenSpan>& answers,
                                      const Cell& cell, const std::string& session);

// The message when the outcome says that the server does not do this policy (a ratio below its
// floor, say), which is a result and no failure.
std::optional<std::string> policy_refusal(const api::GenerateOutcome& outcome);

// Measures the uncompressed reference and then `cells`, whose results go to `take` in order (the
// reference's too, when it is the first cell). The first error ends it.
Status run_probe(const Probe& probe, std::span<const Cell> cells, const RunnerOptions& options,
                 const Ask& ask, const TakeResult& take);

}  // namespace spindle::cli
