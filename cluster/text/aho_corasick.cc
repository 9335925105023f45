#include "cluster/text/aho_corasick.h"

#include <algorithm>

namespace spindle::text {

AhoCorasick::AhoCorasick(std::span<const std::string> patterns) {
  std::vector<std::vector<Edge>> children(1);
  nodes_.resize(1);
  for (std::size_t p = 0; p < patterns.size(); ++p) {
    pattern_bytes_.push_back(patterns[p].size());
    State state = kRoot;
    for (const char c : patterns[p]) {
      const auto byte = static_cast<unsigned char>(c);
      auto& edges = children[state];
      const auto at = std::lower_bound(
          edges.begin(), edges.end(), byte,
          [](const Edge& edge, unsigned char wanted) { return edge.first < wanted; });
      if (at != edges.end() && at->first == byte) {
        state = at->second;
        continue;
      }
      const auto created = static_cast<State>(nodes_.size());
      edges.insert(at, {byte, created});
      nodes_.push_back({.depth = nodes_[state].depth + 1});
      children.emplace_back();  // invalidates `edges`
      state = created;
    }
    if (state != kRoot && nodes_[state].longest_match == kNoPattern) {
      nodes_[state].longest_match = static_cast<std::uint32_t>(p);
    }
  }
  for (State state = 0; state < nodes_.size(); ++state) {
    nodes_[state].first_edge = static_cast<std::uint32_t>(edges_.size());
    nodes_[state].n_edges = static_cast<std::uint32_t>(children[state].size());
    edges_.insert(edges_.end(), children[state].begin(), children[state].end());
  }
  for (const auto& [byte, state] : children[kRoot]) root_children_[byte] = state;
  link_failures();
}

void AhoCorasick::link_failures() {
  std::vector<State> queue;  // breadth first, so that a failure link is complete before it is used
  for (const State state : root_children_) {
    if (state != kRoot) queue.push_back(state);
  }
  for (std::size_t i = 0; i < queue.size(); ++i) {
    const Node& node = nodes_[queue[i]];
    for (std::uint32_t e = node.first_edge; e < node.first_edge + node.n_edges; ++e) {
      const auto& [byte, to] = edges_[e];
      nodes_[to].failure = next(node.failure, byte);
      if (nodes_[to].longest_match == kNoPattern) {
        nodes_[to].longest_match = nodes_[nodes_[to].failure].longest_match;
      }
      queue.push_back(to);
    }
  }
}

std::optional<AhoCorasick::State> AhoCorasick::child(State state, unsigned char byte) const {
  const auto begin = edges_.begin() + nodes_[state].first_edge;
  const auto end = begin + nodes_[state].n_edges;
  const auto at = std::lower_bound(
      begin, end, byte, [](const Edge& edge, unsigned char wanted) { return edge.first < wanted; });
  if (at == end || at->first != byte) return std::nullopt;
  return at->second;
}

AhoCorasick::State AhoCorasick::next(State state, unsigned char byte) const {
  while (state != kRoot) {
    if (const auto to = child(state, byte)) return *to;
    state = nodes_[state].failure;
  }
  return root_children_[byte];
}

std::optional<AhoCorasick::Match> AhoCorasick::find_leftmost_longest(std::string_view text,
                                                                     std::size_t from) const {
  std::optional<Match> best;
  State state = kRoot;
  for (std::size_t i = from; i < text.size(); ++i) {
    state = next(state, static_cast<unsigned char>(text[i]));
    // Once every pattern still possible starts after the best match, that match is final.
    if (best && i + 1 - depth(state) > best->begin) return best;
    const std::uint32_t pattern = longest_match(state);
    if (pattern == kNoPattern) continue;
    const Match match{i + 1 - pattern_bytes(pattern), i + 1, pattern};
    if (!best || match.begin <= best->begin) best = match;
  }
  return best;
}

}  // namespace spindle::text
