#include "cluster/text/bpe.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace spindle::text {
namespace {

constexpr std::uint32_t kNoSymbol = std::numeric_limits<std::uint32_t>::max();

}  // namespace

std::uint64_t Bpe::hash(std::int32_t left, std::int32_t right) {
  const std::uint64_t key =
      (std::uint64_t{static_cast<std::uint32_t>(left)} << 32) | static_cast<std::uint32_t>(right);
  const std::uint64_t mixed = key * 0x9E3779B97F4A7C15u;
  return mixed ^ (mixed >> 29);
}

Bpe::Bpe(const std::array<std::int32_t, 256>& byte_ids, std::span<const BpeMerge> merges)
    : byte_ids_(byte_ids), slots_(std::bit_ceil(std::max<std::size_t>(merges.size() * 2, 2))) {
  const std::size_t mask = slots_.size() - 1;
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const BpeMerge& merge = merges[rank];
    std::size_t at = hash(merge.left, merge.right) & mask;
    while (slots_[at].merged != kNoToken &&
           (slots_[at].left != merge.left || slots_[at].right != merge.right)) {
      at = (at + 1) & mask;
    }
    slots_[at] = {merge.left, merge.right, merge.merged, static_cast<std::uint32_t>(rank)};
  }
}

const Bpe::Slot* Bpe::find(std::int32_t left, std::int32_t right) const {
  const std::size_t mask = slots_.size() - 1;
  for (std::size_t at = hash(left, right) & mask;; at = (at + 1) & mask) {
    const Slot& slot = slots_[at];
    if (slot.merged == kNoToken) return nullptr;
    if (slot.left == left && slot.right == right) return &slot;
  }
}

void Bpe::push_candidate(BpeScratch& scratch, std::uint32_t left, std::uint32_t right) const {
  const std::int32_t left_id = scratch.symbols_[left].id;
  const std::int32_t right_id = scratch.symbols_[right].id;
  if (const Slot* slot = find(left_id, right_id)) {
    scratch.queue_.push_back({std::uint64_t{slot->rank} << 32 | left, left_id, right_id});
  }
}

void Bpe::run_merges(BpeScratch& scratch) const {
  const auto later = [](const BpeScratch::Candidate& a, const BpeScratch::Candidate& b) {
    return a.order > b.order;
  };
  auto& symbols = scratch.symbols_;
  auto& queue = scratch.queue_;
  std::make_heap(queue.begin(), queue.end(), later);
  while (!queue.empty()) {
    std::pop_heap(queue.begin(), queue.end(), later);
    const BpeScratch::Candidate candidate = queue.back();
    queue.pop_back();
    auto& left = symbols[candidate.position()];
    // A consumed symbol has the id kNoToken, which no candidate holds.
    if (left.id != candidate.left || left.next == kNoSymbol) continue;
    auto& right = symbols[left.next];
    if (right.id != candidate.right) continue;
    left.id = find(candidate.left, candidate.right)->merged;
    left.next = right.next;
    right.id = kNoToken;
    if (left.next != kNoSymbol) {
      symbols[left.next].previous = candidate.position();
      const std::size_t before = queue.size();
      push_candidate(scratch, candidate.position(), left.next);
      if (queue.size() > before) std::push_heap(queue.begin(), queue.end(), later);
    }
    if (left.previous != kNoSymbol) {
      const std::size_t before = queue.size();
      push_candidate(scratch, left.previous, candidate.position());
      if (queue.size() > before) std::push_heap(queue.begin(), queue.end(), later);
    }
  }
}

void Bpe::encode_word(std::string_view word, BpeScratch& scratch,
                      std::vector<std::int32_t>& out) const {
  const auto n = static_cast<std::uint32_t>(word.size());
  auto& symbols = scratch.symbols_;
  symbols.clear();
  scratch.queue_.clear();
  for (std::uint32_t i = 0; i < n; ++i) {
    symbols.push_back({byte_ids_[static_cast<unsigned char>(word[i])], i - 1, i + 1});
  }
  if (n == 0) return;
  symbols.front().previous = kNoSymbol;
  symbols.back().next = kNoSymbol;
  for (std::uint32_t i = 0; i + 1 < n; ++i) push_candidate(scratch, i, i + 1);
  run_merges(scratch);
  for (std::uint32_t i = 0; i != kNoSymbol; i = symbols[i].next) out.push_back(symbols[i].id);
}

}  // namespace spindle::text
