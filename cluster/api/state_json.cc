#include "cluster/api/state_json.h"

#include <boost/json.hpp>
#include <utility>

namespace spindle::api {
namespace json = boost::json;

namespace {

json::array layers_array(const engine::StageState& stage) {
  json::array layers;
  layers.reserve(stage.layers.size());
  for (const engine::LayerState& layer : stage.layers) {
    layers.push_back({{"layer", layer.layer},
                      {"used_bytes", layer.used_bytes},
                      {"full_bytes", layer.full_bytes},
                      {"plan", layer.plan},
                      {"logical_tokens", layer.logical_tokens},
                      {"retained_tokens", layer.retained_tokens}});
  }
  return layers;
}

json::object forms_object(const engine::StageState& stage) {
  json::object forms;
  for (std::size_t form = 0; form < engine::kKvForms; ++form) {
    const std::string_view name = engine::kKvFormNames[form];
    forms.emplace(json::string_view(name.data(), name.size()), stage.kv_form_bytes[form]);
  }
  return forms;
}

json::object stage_object(const engine::StageState& stage) {
  return {{"stage", stage.stage},
          {"host", stage.host},
          {"device", stage.device},
          {"first_layer", stage.first_layer},
          {"n_layers", stage.n_layers},
          {"weight_bytes", stage.weight_bytes},
          {"kv_capacity_bytes", stage.kv_capacity_bytes},
          {"kv_used_bytes", stage.kv_used_bytes},
          {"kv_peak_bytes", stage.kv_peak_bytes},
          {"kv_committed_bytes", stage.kv_committed_bytes},
          {"kv_budget_bytes", stage.kv_budget_bytes},
          {"kv_level_ratio", stage.kv_level_ratio},
          {"kv_price", stage.kv_price},
          {"kv_stored_bytes", forms_object(stage)},
          {"steps", stage.steps},
          {"busy_seconds", stage.busy_seconds},
          {"bubble_seconds", json::object{{"empty", stage.bubble.empty},
                                          {"upstream", stage.bubble.upstream},
                                          {"downstream", stage.bubble.downstream}}},
          {"compress_seconds", stage.compress_seconds},
          {"transfer_seconds", stage.send_seconds + stage.receive_seconds},
          {"report_age_seconds", stage.report_age_seconds},
          {"layers", layers_array(stage)}};
}

json::object requests_object(const engine::EngineStats& stats) {
  return {{"running", stats.running},
          {"waiting", stats.waiting},
          {"waiting_prompt_tokens", stats.waiting_prompt_tokens},
          {"accepted", stats.accepted},
          {"finished", stats.finished},
          {"failed", stats.failed},
          {"cancelled", stats.cancelled},
          {"refused", stats.refused},
          {"expired", stats.expired},
          {"preemptions", stats.preemptions},
          {"recomputed_tokens", stats.recomputed_tokens}};
}

json::object balancer_object(const engine::EngineSnapshot& snapshot) {
  const engine::EngineStats& stats = snapshot.stats;
  json::array moves;
  for (const engine::BudgetMove& move : snapshot.moves) {
    moves.push_back({{"unix_ms", move.unix_ms},
                     {"step", move.step},
                     {"stage", move.stage},
                     {"from_ratio", move.from_ratio},
                     {"to_ratio", move.to_ratio},
                     {"reason", move.reason}});
  }
  return {{"enabled", stats.balances},
          {"plans", stats.budget_plans},
          {"rounds", stats.budget_rounds},
          {"seconds", stats.budget_seconds},
          {"wanted_requests", stats.wanted_requests},
          {"fitting_requests", stats.fitting_requests},
          {"moves", std::move(moves)}};
}

json::object histogram_object(const telemetry::LatencyCounts& latency) {
  return {{"bounds", json::array(latency.bounds.begin(), latency.bounds.end())},
          {"counts", json::array(latency.counts.begin(), latency.counts.end())},
          {"sum", latency.sum}};
}

json::object latency_object(const telemetry::Latencies& latencies) {
  return {{"time_to_first_token_seconds", histogram_object(latencies.time_to_first_token)},
          {"inter_token_latency_seconds", histogram_object(latencies.inter_token)},
          {"e2e_request_latency_seconds", histogram_object(latencies.e2e)}};
}

json::array active_array(const engine::EngineSnapshot& snapshot) {
  json::array active;
  active.reserve(snapshot.active_requests.size());
  for (const engine::ActiveRequest& request : snapshot.active_requests) {
    active.push_back({{"id", std::to_string(request.handle)},
                      {"state", request.running ? "running" : "waiting"},
                      {"priority", request.priority},
                      {"prompt_tokens", request.prompt_tokens},
                      {"prefilled_tokens", request.prefilled_tokens},
                      {"generated_tokens", request.generated_tokens},
                      {"max_tokens", request.max_tokens},
                      {"age_ms", request.age_us / 1000},
                      {"policy", request.policy}});
  }
  return active;
}

}  // namespace

std::string state_json(const StateContext& context, const engine::EngineSnapshot& snapshot,
                       const telemetry::Latencies& latencies) {
  const engine::EngineStats& stats = snapshot.stats;
  json::array stages;
  for (const engine::StageState& stage : stats.stages) stages.push_back(stage_object(stage));
  return json::serialize(json::object{{"model", context.model},
                                      {"version", context.version},
                                      {"max_model_len", context.max_model_len},
                                      {"uptime_seconds", context.uptime_seconds},
                                      {"unix_ms", context.unix_ms},
                                      {"draining", stats.draining},
                                      {"requests", requests_object(stats)},
                                      {"prompt_tokens", stats.prompt_tokens},
                                      {"generation_tokens", stats.generation_tokens},
                                      {"steps", stats.steps},
                                      {"max_num_seqs", stats.max_num_seqs},
                                      {"micro_batches_in_flight", stats.micro_batches_in_flight},
                                      {"balancer", balancer_object(snapshot)},
                                      {"latency", latency_object(latencies)},
                                      {"stages", std::move(stages)},
                                      {"active_requests", active_array(snapshot)},
                                      {"active_requests_total", snapshot.n_active_requests}});
}

}  // namespace spindle::api
