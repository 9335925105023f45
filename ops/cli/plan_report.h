#pragma once
// The answer of `spindle plan`, for people and for programs.

#include <boost/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cluster/coordinator/sizing.h"
#include "ops/cli/plan_input.h"

namespace spindle::cli {

// What would let a number of requests run at once, or the cluster start; each where there is one.
struct PlanRemedies {
  std::optional<std::vector<std::uint64_t>> device_memory;  // of each device
  std::optional<int> n_devices;
  std::optional<std::int64_t> max_model_len;
  std::optional<double> ratio;
  std::optional<std::int64_t> max_num_seqs;  // beside one of the others, if there is any

  bool none() const { return !device_memory && !n_devices && !max_model_len && !ratio; }
};

struct PlanAnswer {
  coordinator::ClusterSizing cluster;
  coordinator::RequestSizing requests;
  // The same requests under profile full; unset when that is what was asked.
  std::optional<coordinator::RequestSizing> full;
  std::optional<PlanRemedies> remedies;  // of --concurrency, when it does not fit
};

// The table. Lines are at most 120 columns wide.
std::string plan_text(const PlanQuestion& question, const PlanAnswer& answer,
                      std::optional<std::int64_t> concurrency);
boost::json::object plan_json(const PlanQuestion& question, const PlanAnswer& answer,
                              std::optional<std::int64_t> concurrency);

// Of a plan that is impossible: a line for each remedy, each beginning with "  "; and the same as
// an object.
std::string remedies_text(const PlanQuestion& question, const PlanRemedies& remedies);
boost::json::object remedies_json(const PlanRemedies& remedies);

}  // namespace spindle::cli
