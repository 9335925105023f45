#pragma once
// How long a stage works on a step, as a roofline: a fixed launch, then the weights or the
// arithmetic, whichever takes longer, then attention, which reads what the sequences hold, and the
// scoring and encoding of boundaries.
//
// Thread-safety: plain values and pure functions.

#include <algorithm>
#include <cstdint>

namespace spindle::coordinator::simulation {

// What one step asks of one stage.
struct StepWork {
  std::int64_t n_tokens = 0;
  std::int64_t n_sampled = 0;        // rows of logits; of the last stage
  std::int64_t kv_pages = 0;         // that attention reads
  std::int64_t attention_pairs = 0;  // (token, token before it) of all runs
  std::int64_t boundary_tokens = 0;  // scored or encoded
};

// Microseconds.
struct LatencyModel {
  double launch = 20;
  double weights = 100;   // reading them once
  double token = 1;       // arithmetic of one token in the layers
  double logits = 0;      // one row, on the last stage
  double kv_page = 0.01;  // reading it
  double pair = 0;        // arithmetic of one (token, token before it)
  double boundary_token = 0.05;
};

inline double step_us(const LatencyModel& model, const StepWork& work) {
  double us = model.launch + model.boundary_token * static_cast<double>(work.boundary_tokens);
  if (work.n_tokens == 0) return us;
  us += std::max(model.weights, model.token * static_cast<double>(work.n_tokens));
  us += std::max(model.kv_page * static_cast<double>(work.kv_pages),
                 model.pair * static_cast<double>(work.attention_pairs));
  return us + model.logits * static_cast<double>(work.n_sampled);
}

// Delays of messages, in microseconds.
struct LinkModel {
  double control = 30;           // a plan to a stage, or a result to rank 0
  double activations = 10;       // to the next stage
  double activations_token = 0;  // and for each token
  // Every delay and every stage's time is stretched by up to this share, at random.
  double jitter = 0.2;
  // One control message in so many is late by `late_us`; 0: none.
  int late_one_in = 0;
  double late_us = 0;
};

}  // namespace spindle::coordinator::simulation
