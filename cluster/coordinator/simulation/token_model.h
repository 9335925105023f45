#pragma once
// A model whose next token is a hash of the sequence so far and of how it samples, so that the
// output of every request is known beforehand, however it is batched, split or computed anew.
//
// Thread-safety: plain values and pure functions.

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "cluster/coordinator/simulation/seeded_random.h"

namespace spindle::coordinator::simulation {

struct TokenModel {
  std::int32_t vocab_size = 0;
  std::int32_t eos = 0;
  std::int32_t eos_every = 0;  // a sequence ends with this mean length; 0: only by chance
};

// How one choice samples; what the stages are told when its sequence opens.
struct SamplingKey {
  std::uint64_t seed = 0;
  std::uint64_t request = 0;
  std::int32_t choice = 0;
  std::int32_t min_tokens = 0;
  std::vector<std::int32_t> banned_before_min = {};
  bool operator==(const SamplingKey&) const = default;
};

inline constexpr std::uint64_t kEmptySequence = 14695981039346656037ULL;

constexpr std::uint64_t append(std::uint64_t hash, std::int32_t token) {
  return (hash ^ static_cast<std::uint64_t>(token)) * 1099511628211ULL;
}
constexpr std::uint64_t append(std::uint64_t hash, std::span<const std::int32_t> tokens) {
  for (const std::int32_t token : tokens) hash = append(hash, token);
  return hash;
}

// The token after a sequence of that hash, of which n_generated are output.
inline std::int32_t next_token(const TokenModel& model, std::uint64_t hash, const SamplingKey& key,
                               std::int64_t n_generated) {
  const std::uint64_t draw = mix(hash + mix(key.seed + mix(key.request)) +
                                 static_cast<std::uint64_t>(key.choice) * 0x632be59bd9b4e019ULL);
  const auto vocab = static_cast<std::uint64_t>(model.vocab_size);
  auto token = static_cast<std::int32_t>((draw >> 20) % vocab);
  if (model.eos_every > 0 && draw % static_cast<std::uint64_t>(model.eos_every) == 0) {
    token = model.eos;
  }
  if (n_generated >= key.min_tokens) return token;
  while (std::find(key.banned_before_min.begin(), key.banned_before_min.end(), token) !=
         key.banned_before_min.end()) {
    token = (token + 1) % model.vocab_size;
  }
  return token;
}

}  // namespace spindle::coordinator::simulation
