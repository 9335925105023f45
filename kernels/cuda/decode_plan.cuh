#pragma once
// How the work of a layer is cut. Every entry (a tile of query heads of one kv head of one
// sequence) is a row of units: its blocks, then the pages of its tail. Units have weights by what
// they cost; the teams that are active take equal shares of the line of all weights, and a unit
// belongs to the team in whose share it begins. Everyone derives the same cuts from the same few
// numbers.

#include <cstdint>

#include "kernels/cuda/decode_launch.h"

namespace spindle::kernels::device {

inline constexpr std::int32_t kPageWeight = 16;
// Of beginning and ending an entry, before its units.
inline constexpr std::int32_t kEntryWeight = 3 * kPageWeight;

// Relative cost of a unit of 32 tokens, in sixteenths of a page.
__device__ inline std::int32_t side_weight(KvFormat format) {
  switch (format) {
    case KvFormat::kRaw:
      return 8;
    case KvFormat::kInt4:
      return 3;
    case KvFormat::kKivi4:
    case KvFormat::kKivi2:
      return 4;
    case KvFormat::kCodebook:
    case KvFormat::kToken:
      return 8;
    default:
      return 6;
  }
}

// Few units go to few teams: whole entries where there are enough of them.
__device__ inline int active_teams(std::int64_t total, int n_entries, int n_teams) {
  constexpr int kLeastPages = 6;
  std::int64_t wanted =
      (total - std::int64_t{n_entries} * kEntryWeight) / (kLeastPages * kPageWeight);
  if (wanted < n_entries) wanted = n_entries;
  if (wanted * kPageWeight > total) wanted = total / kPageWeight;
  return wanted < 1 ? 1 : wanted < n_teams ? static_cast<int>(wanted) : n_teams;
}
__device__ inline std::int64_t share_begin(std::int64_t total, int active, int team) {
  return total * team / active;
}
// The team in whose share the weight `at` lies.
__device__ inline int team_of(std::int64_t total, int active, std::int64_t at) {
  int team = static_cast<int>(at * active / total);
  while (team > 0 && share_begin(total, active, team) > at) --team;
  while (team + 1 < active && share_begin(total, active, team + 1) <= at) ++team;
  return team;
}

__device__ inline int first_tail_page(const DecodeEntry& entry) {
  return (entry.head.tail_first - entry.head.tail_origin) / kKvBlockTokens;
}
__device__ inline int n_tail_pages(const DecodeEntry& entry) {
  const int end = (entry.n_context - entry.head.tail_origin + kKvBlockTokens - 1) / kKvBlockTokens;
  return end - first_tail_page(entry);
}
// The first unit that begins at or behind weight `at` of the entry.
__device__ inline int unit_at(const DecodeEntry& entry, std::int64_t at) {
  if (at <= kEntryWeight) return 0;
  const auto weight = static_cast<std::uint32_t>(at) - kEntryWeight;
  const auto block = static_cast<std::uint32_t>(entry.block_weight);
  const std::uint32_t body = static_cast<std::uint32_t>(entry.head.n_blocks) * block;
  if (weight > body) {
    return entry.head.n_blocks + static_cast<int>((weight - body + kPageWeight - 1) / kPageWeight);
  }
  return block == 0 ? 0 : static_cast<int>((weight + block - 1) / block);
}

}  // namespace spindle::kernels::device
