#pragma once
// The requests of the capacity study. Prompts are lognormal, most of a page or two and a few very
// long, with some documents of any length up to the limit, which is the tail that fills a KV pool;
// outputs end with the same chance after every token, so that their lengths are geometric, cut at
// what the client allows. Pure functions.

#include <cstdint>
#include <vector>

#include "cluster/engine/engine.h"

namespace spindle::coordinator::bench {

struct LoadSettings {
  int n_requests = 10'000;
  double median_prompt = 800;  // tokens
  double sigma = 1.1;          // of the logarithm: the mean is 1.8 medians
  double document_share = 0.03;
  std::int32_t max_prompt = 32'768 - 1'024;  // shorter ones are cut there
  std::int32_t max_output = 1'024;           // what every client allows
  int n_waiting = 256;  // that the clients keep in the queue, as long as there are requests
  std::int32_t vocab_size = 0;
  kvstore::KvPolicy policy;
  std::uint64_t seed = 0;
};

// The length of every prompt.
std::vector<std::int32_t> prompt_lengths(const LoadSettings& settings);
// A request with a prompt of that many tokens, number `index` of the load.
engine::EngineRequest load_request(const LoadSettings& settings, int index, std::int32_t n_prompt);

}  // namespace spindle::coordinator::bench
