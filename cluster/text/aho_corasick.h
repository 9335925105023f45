#pragma once
// Aho-Corasick automaton over bytes: finds any of a set of patterns in time linear in the text.

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace spindle::text {

// Built once from non-empty patterns; of equal patterns the first counts. The caller bounds the sum
// of pattern bytes (the automaton takes about 50 bytes for each).
//
// Thread-safety: immutable after construction, so any number of threads may share it.
// Invariants: state 0 is the root; depth(state) is the length of the longest pattern prefix that is
// a suffix of the text read so far.
class AhoCorasick {
 public:
  using State = std::uint32_t;
  static constexpr State kRoot = 0;
  static constexpr std::uint32_t kNoPattern = std::numeric_limits<std::uint32_t>::max();

  struct Match {
    std::size_t begin;
    std::size_t end;
    std::uint32_t pattern;
  };

  explicit AhoCorasick(std::span<const std::string> patterns);

  State next(State state, unsigned char byte) const;
  std::size_t depth(State state) const { return nodes_[state].depth; }
  // The longest pattern that ends at this state, or kNoPattern.
  std::uint32_t longest_match(State state) const { return nodes_[state].longest_match; }
  std::size_t pattern_bytes(std::uint32_t pattern) const { return pattern_bytes_[pattern]; }

  // The match at or after `from` that starts first, and of those the longest.
  std::optional<Match> find_leftmost_longest(std::string_view text, std::size_t from) const;

 private:
  struct Node {
    std::uint32_t first_edge = 0;  // into edges_, sorted by byte
    std::uint32_t n_edges = 0;
    std::uint32_t depth = 0;
    State failure = kRoot;
    std::uint32_t longest_match = kNoPattern;
  };
  using Edge = std::pair<unsigned char, State>;

  std::optional<State> child(State state, unsigned char byte) const;
  void link_failures();

  std::vector<Node> nodes_;
  std::vector<Edge> edges_;
  std::array<State, 256> root_children_{};  // kRoot where there is none
  std::vector<std::size_t> pattern_bytes_;
};

}  // namespace spindle::text
