// Scores, requests, the journal and calibration: everything between an answer of the server and a
// figure.

#include "ops/cli/eval_score.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <limits>

#include "ops/cli/eval_calibrate.h"
#include "ops/cli/eval_cells.h"
#include "ops/cli/eval_cluster.h"
#include "ops/cli/eval_journal.h"
#include "ops/cli/eval_runner.h"
#include "ops/cli/eval_work.h"
#include "ops/cli/progress.h"

namespace spindle::cli {
namespace {

api::v1::PromptScore make_score(std::int32_t position, std::int32_t best,
                                const std::vector<float>& probabilities, std::int32_t token) {
  api::v1::PromptScore score;
  score.set_position(position);
  score.set_best_id(best);
  for (const float p : probabilities) score.add_dense(std::log(p));
  score.set_logprob(score.dense(token));
  return score;
}

TEST(EvalScore, Divergence) {
  const std::vector<float> half{std::log(0.5F), std::log(0.5F)};
  const std::vector<float> skewed{std::log(0.25F), std::log(0.75F)};
  EXPECT_EQ(kl_divergence(half, half), 0);
  EXPECT_NEAR(kl_divergence(half, skewed), 0.5 * std::log(2.0) + 0.5 * std::log(2.0 / 3), 1e-6);
  const float none = -std::numeric_limits<float>::infinity();
  const std::vector<float> sure{0, none};
  EXPECT_NEAR(kl_divergence(sure, half), std::log(2.0), 1e-6);  // 0 log 0 is 0
  EXPECT_NEAR(kl_divergence(half, sure), 0.5 * std::log(0.5) + 0.5 * (std::log(0.5) + 1000), 1e-3);
}

TEST(EvalScore, Percentiles) {
  EXPECT_EQ(percentile({3, 1, 2}, 50), 2);
  EXPECT_EQ(percentile({3, 1, 2}, 0), 1);
  EXPECT_EQ(percentile({3, 1, 2}, 100), 3);
  EXPECT_NEAR(percentile({0, 10}, 95), 9.5, 1e-12);
  EXPECT_EQ(percentile({7}, 95), 7);
  EXPECT_TRUE(std::isnan(percentile({}, 95)));
  EXPECT_TRUE(std::isnan(mean({})));
}

// Two answers at positions 3-4 and 6; token 5 between them is not scored.
Probe small_probe() {
  Probe probe;
  probe.tokens = {9, 9, 9, 0, 1, 9, 1};
  probe.cut = 2;
  probe.answers = {{3, 5}, {6, 7}};
  return probe;
}

std::vector<api::v1::PromptScore> small_scores() {
  return {make_score(3, 0, {0.5F, 0.5F}, 0), make_score(4, 1, {0.25F, 0.75F}, 1),
          make_score(5, 0, {0.5F, 0.5F}, 0), make_score(6, 0, {0.75F, 0.25F}, 1)};
}

TEST(EvalScore, AnswersAreRightAsAWhole) {
  const Probe probe = small_probe();
  const auto scores = small_scores();
  ASSERT_TRUE(check_scores(probe.answers, scores).ok());
  CellResult result;
  score_answers(probe, probe.answers, scores, scores, result);
  EXPECT_EQ(result.right, (std::vector<int>{1, 0}));
  EXPECT_EQ(result.kl, (std::vector<double>{0, 0, 0}));
  EXPECT_EQ(result.n_tokens, 3);
  EXPECT_NEAR(result.nll, -std::log(0.5) - std::log(0.75) - std::log(0.25), 1e-6);
  // One wrong token makes the answer wrong.
  auto wrong = scores;
  wrong[1].set_best_id(0);
  CellResult second;
  score_answers(probe, probe.answers, wrong, {}, second);
  EXPECT_EQ(second.right, (std::vector<int>{0, 0}));
  EXPECT_TRUE(second.kl.empty());
}

TEST(EvalScore, RefusesWhatABrokenServerSends) {
  const Probe probe = small_probe();
  auto scores = small_scores();
  scores.pop_back();
  EXPECT_FALSE(check_scores(probe.answers, scores).ok());
  scores = small_scores();
  scores[1].set_position(3);
  EXPECT_FALSE(check_scores(probe.answers, scores).ok());
  scores = small_scores();
  scores[2].clear_dense();
  EXPECT_FALSE(check_scores(probe.answers, scores).ok());
  scores = small_scores();
  scores[2].set_dense(0, std::nanf(""));
  EXPECT_FALSE(check_scores(probe.answers, scores).ok());
}

TEST(EvalCells, FullIsFirstAndOnce) {
  const auto cells = make_cells({"spindle", "full", "int4"}, {50, 7.5});
  ASSERT_TRUE(cells.ok());
  std::vector<std::string> keys;
  for (const Cell& cell : *cells) keys.push_back(cell.key);
  EXPECT_EQ(keys,
            (std::vector<std::string>{"full", "spindle/50", "spindle/7.5", "int4/50", "int4/7.5"}));
  EXPECT_FALSE((*cells)[0].policy.has_ratio());
  EXPECT_EQ((*cells)[2].policy.ratio(), 0.075);
  EXPECT_FALSE(make_cells({"a"}, {0}).ok());
  EXPECT_FALSE(make_cells({"a"}, {101}).ok());
  EXPECT_FALSE(make_cells({"a"}, {std::nan("")}).ok());
  EXPECT_FALSE(make_cells({"a", "a"}, {50}).ok());
  EXPECT_FALSE(make_cells({""}, {50}).ok());
  EXPECT_FALSE(parse_regime("prose").ok());
}

TEST(EvalCells, TheServersOwnPolicyIsAskedForOnceAndWithoutOne) {
  const auto cells = make_cells({"server", "spindle"}, {50, 25});
  ASSERT_TRUE(cells.ok());
  ASSERT_EQ(cells->size(), 4U);
  const Cell& server = (*cells)[1];
  EXPECT_EQ(server.key, "server");
  EXPECT_FALSE(server.bytes_target.has_value());
  Probe probe;
  probe.tokens = {1, 2, 3, 4};
  probe.cut = 2;
  const std::vector<TokenSpan> answers = {{.first = 3, .end = 4}};
  EXPECT_FALSE(cell_request(probe, answers, server, "").has_kv_policy());
  EXPECT_TRUE(cell_request(probe, answers, (*cells)[2], "").has_kv_policy());
  EXPECT_FALSE(make_cells({"server", "server"}, {50}).ok());
}

CellResult some_result() {
  CellResult result;
  result.right = {1, 0};
  result.kl = {0.5, 1e-9};
  result.nll = 3.25;
  result.n_tokens = 2;
  result.full_bytes = 1'000'000'000'000;
  result.kept_bytes = 25;
  result.compress_ms = 1.5;
  result.compressed_tokens = 100;
  result.layer_bytes = {12, 13};
  result.k_entries = 0.25;
  return result;
}

class EvalJournalTest : public testing::Test {
 protected:
  void TearDown() override { ::unlink(path_.c_str()); }
  const std::string path_ = testing::TempDir() + "/spindle_eval_journal.jsonl";
  const boost::json::object settings_{{"spindle_eval_journal", 1}, {"data", 4000000000U}};
};

TEST_F(EvalJournalTest, ReadsWhatItWrote) {
  CellResult refused;
  refused.refused = "ratio below 0.1";
  {
    auto journal = EvalJournal::open(path_, settings_, false);
    ASSERT_TRUE(journal.ok()) << journal.status().to_string();
    ASSERT_TRUE((*journal)->add({"qa:1", "spindle/25"}, some_result()).ok());
    ASSERT_TRUE((*journal)->add({"qa:1", "int4/6"}, refused).ok());
  }
  EXPECT_FALSE(EvalJournal::open(path_, settings_, false).ok()) << "must not be overwritten";
  auto journal = EvalJournal::open(path_, settings_, true);
  ASSERT_TRUE(journal.ok()) << journal.status().to_string();
  EXPECT_EQ((*journal)->earlier(),
            (Results{{{"qa:1", "spindle/25"}, some_result()}, {{"qa:1", "int4/6"}, refused}}));
  ASSERT_TRUE((*journal)->remove().ok());
  EXPECT_NE(::access(path_.c_str(), F_OK), 0);
}

TEST_F(EvalJournalTest, DropsALineThatWasCut) {
  {
    auto journal = EvalJournal::open(path_, settings_, true);
    ASSERT_TRUE(journal.ok());
    ASSERT_TRUE((*journal)->add({"qa:1", "full"}, some_result()).ok());
  }
  std::ofstream(path_, std::ios::app) << "{\"item\": \"qa";
  {
    auto journal = EvalJournal::open(path_, settings_, true);
    ASSERT_TRUE(journal.ok()) << journal.status().to_string();
    EXPECT_EQ((*journal)->earlier().size(), 1U);
    ASSERT_TRUE((*journal)->add({"qa:2", "full"}, some_result()).ok());
  }
  EXPECT_EQ(EvalJournal::open(path_, settings_, true).value()->earlier().size(), 2U);
  // Even the header.
  std::ofstream(path_) << "{\"spindle";
  EXPECT_TRUE(EvalJournal::open(path_, settings_, true).ok());
  EXPECT_TRUE(EvalJournal::open(path_, settings_, true).ok());
}

TEST_F(EvalJournalTest, RefusesOtherSettingsAndGarbage) {
  ASSERT_TRUE(EvalJournal::open(path_, settings_, false).ok());
  auto other = settings_;
  other["data"] = 1;
  EXPECT_EQ(EvalJournal::open(path_, other, true).status().code(), StatusCode::kInvalidArgument);
  std::ofstream(path_, std::ios::app) << "{\"item\": 1}\n";
  EXPECT_FALSE(EvalJournal::open(path_, settings_, true).ok());
}

// A server that answers with small_scores, compresses to `kept` and refuses "never".
class FakeServer {
 public:
  api::GenerateOutcome answer(const api::v1::GenerateRequest& request) {
    requests.push_back(request);
    api::GenerateOutcome outcome;
    if (request.kv_policy().profile() == "never") {
      outcome.status = invalid_argument("ratio must be at least 0.3");
      outcome.param = "kv_policy.ratio";
      return outcome;
    }
    if (!request.keep_session() && !request.session_id().empty() && !has_session) {
      outcome.status = not_found("no such session");
      return outcome;
    }
    if (request.keep_session()) {
      has_session = true;
      return outcome;
    }
    for (const api::v1::PromptScore& score : small_scores()) {
      if (score.position() >= request.prompt_scores().first() &&
          score.position() < request.prompt_scores().end()) {
        outcome.prompt_scores.push_back(score);
      }
    }
    api::v1::KvBoundary& boundary = *outcome.usage.add_boundaries();
    boundary.set_position(2);
    boundary.set_full_bytes(400);
    boundary.set_kept_bytes(request.kv_policy().profile() == "full" ? 400 : 100);
    for (int head = 0; head < 4; ++head) {
      api::v1::KvHeadKept& kept = *boundary.add_heads();
      kept.set_layer(head / 2);
      kept.set_kv_head(head % 2);
      kept.set_bytes(25);
      kept.set_k_entries_per_token(0.1 * head);
    }
    return outcome;
  }
  std::vector<api::v1::GenerateRequest> requests;
  bool has_session = false;
};

Cell named_cell(const std::string& profile) {
  Cell cell = full_cell();
  cell.key = profile + "/25";
  cell.profile = profile;
  cell.policy.set_profile(profile);
  cell.policy.set_ratio(0.25);
  return cell;
}

std::map<std::string, CellResult> run(FakeServer& server, const std::vector<Cell>& cells,
                                      const RunnerOptions& options) {
  std::map<std::string, CellResult> results;
  const Status status = run_probe(
      small_probe(), cells, options,
      [&](const api::v1::GenerateRequest& request) { return server.answer(request); },
      [&](const Cell& cell, const CellResult& result) {
        results[cell.key] = result;
        return ok_status();
      });
  EXPECT_TRUE(status.ok()) << status.to_string();
  return results;
}

TEST(EvalRunner, RequestsAndResults) {
  FakeServer server;
  const auto results = run(server, {full_cell(), named_cell("never"), named_cell("some")},
                           {.session = "s", .max_scores = 4});
  ASSERT_EQ(server.requests.size(), 4U);
  const auto& prefill = server.requests[0];
  EXPECT_EQ(prefill.tokens().ids_size(), 2);
  EXPECT_EQ(prefill.kv_policy().profile(), "full");
  EXPECT_TRUE(prefill.keep_session());
  EXPECT_FALSE(prefill.has_prompt_scores());
  const auto& some = server.requests[3];
  EXPECT_EQ(some.tokens().ids_size(), 7);
  EXPECT_EQ(some.session_id(), "s");
  EXPECT_FALSE(some.keep_session());
  EXPECT_EQ(some.kv_policy().ratio(), 0.25);
  ASSERT_EQ(some.compress_at_size(), 1);
  EXPECT_EQ(some.compress_at(0), 2);
  EXPECT_EQ(some.prompt_scores().first(), 3);
  EXPECT_EQ(some.prompt_scores().end(), 7);
  EXPECT_TRUE(some.prompt_scores().dense());
  EXPECT_EQ(some.sampling().max_tokens(), 1);

  ASSERT_EQ(results.size(), 3U);
  EXPECT_EQ(results.at("never/25").refused, "ratio must be at least 0.3");
  const CellResult& result = results.at("some/25");
  EXPECT_EQ(result.right, (std::vector<int>{1, 0}));
  EXPECT_EQ(result.kept_bytes, 100U);
  EXPECT_EQ(result.full_bytes, 400U);
  EXPECT_EQ(result.compressed_tokens, 2);
  EXPECT_EQ(result.layer_bytes, (std::vector<std::uint64_t>{50, 50}));
  EXPECT_EQ(result.kl.size(), 3U);
}

TEST(EvalScore, WithoutABoundaryTheBytesAtTheEnd) {
  api::v1::Usage usage;
  for (int stage = 0; stage < 2; ++stage) {
    usage.add_kv()->set_full_bytes(100);
    usage.mutable_kv(stage)->set_kept_bytes(90);
  }
  CellResult result;
  take_boundary(usage, 5, result);
  EXPECT_EQ(result.full_bytes, 200U);
  EXPECT_EQ(result.kept_bytes, 180U);
  EXPECT_EQ(result.compressed_tokens, 0);
  usage.add_boundaries()->set_position(4);
  api::v1::KvBoundary& boundary = *usage.add_boundaries();
  boundary.set_position(5);
  boundary.set_full_bytes(80);
  boundary.set_kept_bytes(8);
  CellResult at_cut;
  take_boundary(usage, 5, at_cut);
  EXPECT_EQ(at_cut.full_bytes, 80U);
  EXPECT_EQ(at_cut.kept_bytes, 8U);
  EXPECT_EQ(at_cut.compressed_tokens, 5);
}

TEST(EvalRunner, PartsGiveTheSameResult) {
  FakeServer whole;
  FakeServer parts;
  const auto expected = run(whole, {named_cell("some")}, {.session = "", .max_scores = 4});
  EXPECT_EQ(run(parts, {named_cell("some")}, {.session = "", .max_scores = 2}), expected);
  ASSERT_EQ(parts.requests.size(), 4U);  // two parts of the reference and of the cell
  EXPECT_EQ(parts.requests[2].tokens().ids_size(), 5);
  EXPECT_EQ(parts.requests[3].tokens().ids_size(), 7);
  EXPECT_FALSE(expected.contains("full")) << "the reference was not asked for";
}

TEST(EvalRunner, ALostSessionIsMadeAgain) {
  FakeServer server;
  int n = 0;
  const Status status = run_probe(
      small_probe(), std::vector<Cell>{named_cell("some")}, {.session = "s", .max_scores = 4},
      [&](const api::v1::GenerateRequest& request) {
        if (++n == 3) server.has_session = false;
        return server.answer(request);
      },
      [](const Cell&, const CellResult&) { return ok_status(); });
  EXPECT_TRUE(status.ok()) << status.to_string();
  EXPECT_EQ(n, 5);  // prefill, reference, lost, prefill, cell
}

TEST(EvalRunner, ASessionThatIsLostAgainIsDoneWithout) {
  FakeServer whole;
  const auto expected = run(whole, {named_cell("some")}, {.session = "", .max_scores = 4});
  FakeServer server;
  std::map<std::string, CellResult> results;
  const Status status = run_probe(
      small_probe(), std::vector<Cell>{named_cell("some")}, {.session = "s", .max_scores = 4},
      [&](const api::v1::GenerateRequest& request) {
        if (!request.keep_session()) server.has_session = false;
        return server.answer(request);
      },
      [&](const Cell& cell, const CellResult& result) {
        results[cell.key] = result;
        return ok_status();
      });
  EXPECT_TRUE(status.ok()) << status.to_string();
  EXPECT_EQ(results, expected);
  // Prefill; reference and cell: lost, prefill, lost, without.
  ASSERT_EQ(server.requests.size(), 9U);
  EXPECT_EQ(server.requests[4].session_id(), "");
}

TEST(EvalRunner, OtherErrorsEndIt) {
  const auto ends_with = [](Status status, const std::string& param) {
    return run_probe(
        small_probe(), std::vector<Cell>{full_cell()}, {},
        [&](const api::v1::GenerateRequest&) {
          api::GenerateOutcome outcome;
          outcome.status = status;
          outcome.param = param;
          return outcome;
        },
        [](const Cell&, const CellResult&) { return ok_status(); });
  };
  EXPECT_EQ(ends_with(unavailable("gone"), "").code(), StatusCode::kUnavailable);
  EXPECT_FALSE(ends_with(invalid_argument("no"), "kv_policy").ok()) << "of the reference";
  api::GenerateOutcome outcome;
  outcome.status = invalid_argument("too many");
  outcome.param = "prompt_scores.dense";
  EXPECT_FALSE(policy_refusal(outcome).has_value());
  outcome.param = "";
  EXPECT_TRUE(policy_refusal(outcome).has_value());
}

TEST(EvalCalibrate, CellsAndTable) {
  const auto cells = calibration_cells(2, 2);
  ASSERT_EQ(cells.size(), 48U);
  EXPECT_EQ(cells[0].key, "0.0/k1");
  EXPECT_EQ(cells[0].policy.overrides(0).codec(), "lloyd1/raw");
  EXPECT_EQ(cells[12 + 11].key, "0.1/window256");
  EXPECT_EQ(cells[12 + 11].policy.overrides(0).window(), 256);
  EXPECT_EQ(cells[12 + 11].policy.overrides(0).mode(), "stream");
  EXPECT_EQ(cells[47].policy.overrides(0).first_layer(), 1);
  EXPECT_EQ(cells[47].policy.overrides(0).kv_head(), 1);

  Results results;
  for (const Cell& cell : cells) {
    CellResult a;
    a.kl = {0.0, 0.2};  // mean 0.1
    a.k_entries = 0.5;
    a.compressed_tokens = 100;
    CellResult b;
    b.compressed_tokens = 100;
    b.kl = {0.3};
    if (cell.key == "1.0/k3") b.kl = {0.5};
    results[{"a", cell.key}] = a;
    results[{"b", cell.key}] = b;
  }
  auto table = calibration_table("mini", 2, 2, {"a", "b"}, results);
  ASSERT_TRUE(table.ok()) << table.status().to_string();
  ASSERT_EQ(table->head_size(), 4);
  EXPECT_EQ(table->head(2).layer(), 1);
  EXPECT_EQ(table->head(2).k_bits_size(), 4);
  EXPECT_EQ(table->head(2).k_bits(2), 0.4);              // (mean 0.3 + worst 0.5) / 2
  EXPECT_EQ(table->head(2).k_bits(3), 0.25);             // (0.2 + 0.3) / 2
  EXPECT_EQ(table->head(0).codebook_k_entries(), 0.75);  // 0.5, and none
  EXPECT_EQ(table->head(0).codebook_v_entries(), 1);
  const std::string text = table_text(*table, "2 documents.");
  EXPECT_NE(text.find("# 2 documents.\nmodel: \"mini\"\n"), std::string::npos) << text;
  EXPECT_NE(text.find("k_bits: [0.25, 0.25, 0.4, 0.25]"), std::string::npos) << text;

  results[{"b", "1.1/int4"}].compressed_tokens = 0;
  EXPECT_FALSE(calibration_table("mini", 2, 2, {"a", "b"}, results).ok());
  results[{"b", "1.1/int4"}] = results[{"a", "1.1/int4"}];
  EXPECT_TRUE(calibration_table("mini", 2, 2, {"a", "b"}, results).ok());
  results[{"b", "1.1/int4"}].refused = "no";
  EXPECT_FALSE(calibration_table("mini", 2, 2, {"a", "b"}, results).ok());
  EXPECT_FALSE(calibration_table("mini", 2, 2, {"a", "c"}, results).ok());
  EXPECT_FALSE(calibration_table("mini", 2, 2, {}, results).ok());
}

TEST(EvalWork, MissingCells) {
  EvalTask task;
  task.item.key = "qa:1";
  task.cells = {full_cell(), named_cell("a")};
  EXPECT_EQ(missing_cells(task, {}).size(), 2U);
  const auto missing = missing_cells(task, {{{"qa:1", "full"}, {}}, {{"qa:2", "a/25"}, {}}});
  ASSERT_EQ(missing.size(), 1U);
  EXPECT_EQ(missing[0].key, "a/25");
}

TEST(EvalProgress, Text) {
  EXPECT_EQ(progress_text(0, 4, 0, 0, "cells"), "[                        ] 0/4 cells");
  EXPECT_EQ(progress_text(2, 4, 1, 100, "cells"),
            "[############            ] 2/4 cells, 3 min 20 s left");
  EXPECT_EQ(progress_text(4, 4, 0, 9, "cells"), "[########################] 4/4 cells");
}

TEST(EvalCluster, Command) {
  OwnClusterOptions options;
  options.config = "c.pbtxt";
  options.stages = 3;
  options.client.host = "127.0.0.1";
  options.client.port = 40123;
  const auto command = launch_command(options, "/bin/spindled", true);
  EXPECT_EQ(command[0], "mpirun");
  EXPECT_EQ(command[1], "--allow-run-as-root");
  const auto n = std::find(command.begin(), command.end(), "-n");
  ASSERT_NE(n, command.end());
  EXPECT_EQ(*(n + 1), "3");
  EXPECT_EQ(*(n + 2), "/bin/spindled");
  EXPECT_EQ(*(n + 4), "c.pbtxt");
  for (const char* setting : {"api.tcp.enabled=true", "api.tcp.host=127.0.0.1",
                              "api.tcp.port=40123", "api.http.enabled=false"}) {
    const auto found = std::find(command.begin(), command.end(), setting);
    ASSERT_NE(found, command.end()) << setting;
    EXPECT_EQ(*(found - 1), "--set");
  }
  EXPECT_EQ(launch_command(options, "/bin/spindled", false)[1], "--oversubscribe");
}

}  // namespace
}  // namespace spindle::cli
