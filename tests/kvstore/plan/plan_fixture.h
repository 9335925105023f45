#pragma once
// The bundled model's shape with made-up scores and a made-up calibration like its own.

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kvstore/plan/kv_plan.h"

namespace spindle::kvstore::testing {

inline KvModel mini_model() {
  return {.n_layers = 12,
          .n_heads = 4,
          .n_kv_heads = 2,
          .head_dim = 64,
          .vocab_size = 4096,
          .max_model_len = 8192};
}

// Head 9.0 does the retrieval, 11.1 and 5.1 a little; no other head is worth guarding.
inline ProfileTable mini_table() {
  ProfileTable table{.model = "mini"};
  for (int i = 0; i < mini_model().n_tables(); ++i) {
    HeadErrors errors{.k_bits = {2e-4, 8e-5, 3e-5, 1e-5},
                      .v_bits = {1e-4, 4e-5, 1e-5, 4e-6},
                      .int4 = 1e-5,
                      .codebook = 2e-5,
                      .codebook_k_entries = 0.3 + 0.025 * i,
                      .codebook_v_entries = 0.3 + 0.025 * i,
                      .window64 = 1e-3,
                      .window256 = 5e-4};
    if (i == 18)
      errors = {
          {1.2, 0.056, 0.02, 0.0036}, {0.1, 0.01, 0.002, 4e-4}, 0.0076, 0.01, 0.85, 0.88, 5.7, 5.4};
    if (i == 23) errors.window64 = 0.046;
    if (i == 11) errors.window64 = 0.012;
    table.heads.push_back(errors);
  }
  return table;
}

// Scores spread over many octaves, unequally over the heads, and reported as after a prompt.
inline BoundaryReport make_report(const KvModel& model, int sinks, std::int64_t n_tokens,
                                  std::uint64_t seed) {
  std::mt19937_64 random(seed);
  BoundaryReport report;
  report.n_tokens = n_tokens;
  report.n_candidates = n_tokens - kObservationWindow - sinks;
  report.n_new_tokens = n_tokens;
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  for (int layer = 0; layer < model.n_layers; ++layer) report.lazy_mass.push_back(uniform(random));
  for (int i = 0; i < model.n_tables(); ++i) {
    std::normal_distribution<double> log_score(-8.0 + 2.0 * uniform(random), 2.0);
    std::vector<float> scores(static_cast<std::size_t>(report.n_candidates));
    for (float& score : scores) score = static_cast<float>(std::exp(log_score(random)));
    report.histograms.push_back(kernels::score_histogram(scores));
  }
  return report;
}

inline std::uint64_t bytes_of(const SequencePlan& plan, const KvModel& model, std::int64_t n_tokens,
                              const ProfileTable* table = nullptr) {
  return plan_bytes(plan, model, n_tokens, tail_length(plan.recent, n_tokens), table);
}

}  // namespace spindle::kvstore::testing
