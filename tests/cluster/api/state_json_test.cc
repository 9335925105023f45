#include "cluster/api/state_json.h"

#include <gtest/gtest.h>

#include <boost/json.hpp>
#include <string>

namespace spindle::api {
namespace {

namespace json = boost::json;

engine::EngineSnapshot small_snapshot() {
  engine::EngineSnapshot snapshot;
  engine::EngineStats& stats = snapshot.stats;
  stats.accepted = 7;
  stats.finished = 3;
  stats.running = 1;
  stats.waiting = 2;
  stats.cancelled = 1;
  stats.expired = 0;
  stats.preemptions = 5;
  stats.recomputed_tokens = 70;
  stats.max_num_seqs = 64;
  stats.micro_batches_in_flight = 3;
  stats.balances = true;
  stats.budget_plans = 2;
  stats.wanted_requests = 8.5;
  engine::StageState& stage = stats.stages.emplace_back();
  stage.stage = 0;
  stage.device = "cpu";
  stage.n_layers = 1;
  stage.kv_budget_bytes = 900;
  stage.bubble = {0.25, 0.5, 0.125};
  stage.send_seconds = 1;
  stage.receive_seconds = 0.5;
  stage.compress_seconds = 2;
  stage.kv_form_bytes[4] = 77;
  stage.layers = {{0, 100, 400, "EVICT lloyd4", 50, 20}};
  snapshot.moves = {{1700000000000, 120, 0, 0.5, 0.25, "a \"reason\""}};
  snapshot.active_requests = {{18446744073709551615U, true, -1, 10, 10, 2, 30, 1500, "spindle"}};
  snapshot.n_active_requests = 3;
  return snapshot;
}

double number(const json::value& state, const char* pointer) {
  return state.at_pointer(pointer).to_number<double>();
}

TEST(StateJson, SaysWhatTheSnapshotHolds) {
  telemetry::Latencies latencies;
  latencies.e2e = {{0.5, 1}, {1, 2, 4}, 7.5};
  const json::value state =
      json::parse(state_json({"m", "1.0", 512, 12.5, 1700000000001}, small_snapshot(), latencies));
  EXPECT_EQ(state.at("model").as_string(), "m");
  EXPECT_EQ(number(state, "/uptime_seconds"), 12.5);
  EXPECT_EQ(number(state, "/max_num_seqs"), 64);
  EXPECT_EQ(number(state, "/requests/preemptions"), 5);
  EXPECT_EQ(number(state, "/requests/recomputed_tokens"), 70);
  EXPECT_EQ(state.at_pointer("/balancer/enabled").as_bool(), true);
  EXPECT_EQ(number(state, "/balancer/wanted_requests"), 8.5);
  EXPECT_EQ(number(state, "/balancer/moves/0/step"), 120);
  EXPECT_EQ(number(state, "/balancer/moves/0/to_ratio"), 0.25);
  EXPECT_EQ(state.at_pointer("/balancer/moves/0/reason").as_string(), "a \"reason\"");
  EXPECT_EQ(number(state, "/stages/0/bubble_seconds/empty"), 0.25);
  EXPECT_EQ(number(state, "/stages/0/bubble_seconds/upstream"), 0.5);
  EXPECT_EQ(number(state, "/stages/0/bubble_seconds/downstream"), 0.125);
  EXPECT_EQ(number(state, "/stages/0/transfer_seconds"), 1.5);
  EXPECT_EQ(number(state, "/stages/0/compress_seconds"), 2);
  EXPECT_EQ(number(state, "/stages/0/kv_budget_bytes"), 900);
  EXPECT_EQ(number(state, "/stages/0/kv_stored_bytes/lloyd"), 77);
  EXPECT_EQ(number(state, "/stages/0/layers/0/full_bytes"), 400);
  EXPECT_EQ(number(state, "/stages/0/layers/0/logical_tokens"), 50);
  EXPECT_EQ(number(state, "/stages/0/layers/0/retained_tokens"), 20);
  EXPECT_EQ(state.at_pointer("/stages/0/layers/0/plan").as_string(), "EVICT lloyd4");
  // Handles do not fit the numbers of JavaScript.
  EXPECT_EQ(state.at_pointer("/active_requests/0/id").as_string(), "18446744073709551615");
  EXPECT_EQ(number(state, "/active_requests/0/age_ms"), 1);
  EXPECT_EQ(number(state, "/active_requests_total"), 3);
  EXPECT_EQ(number(state, "/latency/e2e_request_latency_seconds/counts/2"), 4);
  EXPECT_EQ(number(state, "/latency/e2e_request_latency_seconds/sum"), 7.5);
}

// The largest cluster with as much as a snapshot may hold, and long numbers everywhere.
TEST(StateJson, IsBounded) {
  engine::EngineSnapshot snapshot = small_snapshot();
  engine::StageState& stage = snapshot.stats.stages[0];
  stage.layers.assign(128,
                      {1000, 1ULL << 40, 1ULL << 42, "STREAM lloyd3/lloyd2", 1LL << 30, 1 << 29});
  stage.host = std::string(64, 'h');
  stage.busy_seconds = 123456.789012;
  snapshot.stats.stages.assign(64, stage);
  snapshot.moves.assign(engine::kMaxBudgetMoves, snapshot.moves[0]);
  snapshot.active_requests.assign(engine::kMaxActiveRequests, snapshot.active_requests[0]);
  const std::string text = state_json({"m", "1.0", 512, 12.5, 1}, snapshot, {});
  EXPECT_LT(text.size(), 64u * 128 * 160 + 64 * 800 + 64 * 300 + 200 * 250 + 8000);
  EXPECT_EQ(json::parse(text).at("stages").as_array().size(), 64u);
}

}  // namespace
}  // namespace spindle::api
