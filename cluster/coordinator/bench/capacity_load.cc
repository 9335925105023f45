#include "cluster/coordinator/bench/capacity_load.h"

#include <algorithm>
#include <cmath>

#include "cluster/coordinator/simulation/seeded_random.h"

namespace spindle::coordinator::bench {

std::vector<std::int32_t> prompt_lengths(const LoadSettings& settings) {
  simulation::SeededRandom random(settings.seed);
  std::vector<std::int32_t> lengths;
  for (int i = 0; i < settings.n_requests; ++i) {
    const bool is_document = random.unit() < settings.document_share;
    const double length = is_document
                              ? random.between_real(1, settings.max_prompt)
                              : settings.median_prompt * std::exp(settings.sigma * random.normal());
    lengths.push_back(static_cast<std::int32_t>(
        std::clamp(length, 1.0, static_cast<double>(settings.max_prompt))));
  }
  return lengths;
}

engine::EngineRequest load_request(const LoadSettings& settings, int index, std::int32_t n_prompt) {
  simulation::SeededRandom random(settings.seed + 1 + static_cast<std::uint64_t>(index));
  engine::EngineRequest request;
  request.prompt_ids.reserve(static_cast<std::size_t>(n_prompt));
  for (std::int32_t i = 0; i < n_prompt; ++i) {
    request.prompt_ids.push_back(
        static_cast<std::int32_t>(random.between(0, settings.vocab_size - 1)));
  }
  request.sampling.max_tokens = settings.max_output;
  request.kv_policy = settings.policy;
  return request;
}

}  // namespace spindle::coordinator::bench
