#pragma once
// Byte-pair encoding of one word: adjacent symbols are merged, lowest rank first and leftmost on
// ties, until no merge applies.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace spindle::text {

struct BpeMerge {
  std::int32_t left;
  std::int32_t right;
  std::int32_t merged;
};

// The working memory of one thread's encoding, kept between words so that short words allocate
// nothing.
class BpeScratch {
 private:
  friend class Bpe;
  struct Symbol {
    std::int32_t id;
    std::uint32_t previous;
    std::uint32_t next;
  };
  // A merge that was possible when it was queued; stale once either symbol has changed.
  struct Candidate {
    std::uint64_t order;  // rank, then position of the left symbol: the least goes first
    std::int32_t left;
    std::int32_t right;

    std::uint32_t position() const { return static_cast<std::uint32_t>(order); }
  };
  std::vector<Symbol> symbols_;
  std::vector<Candidate> queue_;
};

// Thread-safety: immutable after construction; each thread brings its own BpeScratch.
// Cost: O(n log n) for a word of n bytes, 32 bytes of scratch per byte.
class Bpe {
 public:
  static constexpr std::int32_t kNoToken = -1;

  // byte_ids: the token of every single byte, kNoToken for bytes that never occur in UTF-8.
  // merges: in rank order; of two merges of one pair the later counts.
  Bpe(const std::array<std::int32_t, 256>& byte_ids, std::span<const BpeMerge> merges);

  // Appends the tokens of `word` (bytes of valid UTF-8 below 4 GiB) to `out`.
  void encode_word(std::string_view word, BpeScratch& scratch,
                   std::vector<std::int32_t>& out) const;

 private:
  // Open addressing, at most half full; an empty slot has merged == kNoToken.
  struct Slot {
    std::int32_t left = 0;
    std::int32_t right = 0;
    std::int32_t merged = kNoToken;
    std::uint32_t rank = 0;
  };

  static std::uint64_t hash(std::int32_t left, std::int32_t right);
  const Slot* find(std::int32_t left, std::int32_t right) const;
  void push_candidate(BpeScratch& scratch, std::uint32_t left, std::uint32_t right) const;
  void run_merges(BpeScratch& scratch) const;

  std::array<std::int32_t, 256> byte_ids_;
  std::vector<Slot> slots_;
};

}  // namespace spindle::text
