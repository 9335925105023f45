#include "kvstore/piece_placer.h"

#include <algorithm>

namespace spindle::kvstore {

// There are a handful.
PiecePlacer::Group& PiecePlacer::group(std::size_t n_bytes) {
  const auto at = std::find_if(groups_.begin(), groups_.end(),
                               [&](const Group& group) { return group.n_bytes <= n_bytes; });
  if (at != groups_.end() && at->n_bytes == n_bytes) return *at;
  return *groups_.insert(at, Group{n_bytes, {}});
}

bool PiecePlacer::place_group(const Group& group, SequenceArena& arena, PagePool& pool,
                              std::int64_t* n_reserved, std::vector<KvCopy>& copies) {
  for (auto next = group.waiting.begin(); next != group.waiting.end();) {
    const auto n_left = static_cast<std::int64_t>(group.waiting.end() - next);
    SequenceArena::Run run = arena.allocate_run(group.n_bytes, n_left, n_reserved);
    // The check of room took codebooks for their fallback, whose pieces may have met gaps that a
    // codebook's do not fit.
    if (run.n == 0 && pool.reserve(1).ok()) {
      ++*n_reserved;
      run = arena.allocate_run(group.n_bytes, n_left, n_reserved);
    }
    if (run.n == 0) return false;
    for (std::int64_t i = 0; i < run.n; ++i, ++next) {
      std::byte* target = run.first + static_cast<std::uint64_t>(i) * run.stride;
      copies.push_back({next->source, target, group.n_bytes});
      *next->place = target;
    }
  }
  return true;
}

bool PiecePlacer::place(SequenceArena& arena, PagePool& pool, std::int64_t* n_reserved,
                        std::vector<KvCopy>& copies) {
  const bool fits = std::ranges::all_of(groups_, [&](const Group& group) {
    return place_group(group, arena, pool, n_reserved, copies);
  });
  for (Group& group : groups_) group.waiting.clear();
  return fits;
}

}  // namespace spindle::kvstore
