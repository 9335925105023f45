#include "cluster/text/pre_tokenizer.h"

#include <algorithm>
#include <utility>

namespace spindle::text {
namespace {

// Joins a match to the piece before it. Going backwards over reversed spans this is
// MergedWithNext.
std::vector<PatternSpan> merge_matches(const std::vector<PatternSpan>& spans) {
  std::vector<PatternSpan> merged;
  bool previous_was_match = false;
  for (const PatternSpan& span : spans) {
    if (span.is_match && !previous_was_match && !merged.empty()) {
      merged.back().begin = std::min(merged.back().begin, span.begin);
      merged.back().end = std::max(merged.back().end, span.end);
    } else {
      merged.push_back(span);
    }
    previous_was_match = span.is_match;
  }
  return merged;
}

std::vector<PatternSpan> merge_runs(const std::vector<PatternSpan>& spans) {
  std::vector<PatternSpan> merged;
  for (const PatternSpan& span : spans) {
    if (!merged.empty() && merged.back().is_match == span.is_match) {
      merged.back().end = span.end;
    } else {
      merged.push_back(span);
    }
  }
  return merged;
}

}  // namespace

std::string_view byte_level_pattern() {
  return R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
}

std::vector<std::string_view> pieces_of_step(std::string_view text, std::vector<PatternSpan> spans,
                                             SplitBehavior behavior, bool invert) {
  if (invert) {
    for (PatternSpan& span : spans) span.is_match = !span.is_match;
  }
  switch (behavior) {
    case SplitBehavior::kIsolated:
      break;
    case SplitBehavior::kRemoved:
      std::erase_if(spans, [](const PatternSpan& span) { return span.is_match; });
      break;
    case SplitBehavior::kMergedWithPrevious:
      spans = merge_matches(spans);
      break;
    case SplitBehavior::kMergedWithNext:
      std::reverse(spans.begin(), spans.end());
      spans = merge_matches(spans);
      std::reverse(spans.begin(), spans.end());
      break;
    case SplitBehavior::kContiguous:
      spans = merge_runs(spans);
      break;
  }
  std::vector<std::string_view> pieces;
  pieces.reserve(spans.size());
  for (const PatternSpan& span : spans) {
    if (span.end > span.begin) pieces.push_back(text.substr(span.begin, span.end - span.begin));
  }
  return pieces;
}

PreTokenizer::PreTokenizer(std::vector<SplitStep> steps, bool add_prefix_space,
                           std::optional<SplitPattern> byte_level_split)
    : steps_(std::move(steps)),
      add_prefix_space_(add_prefix_space),
      byte_level_split_(std::move(byte_level_split)) {}

Status PreTokenizer::split(std::string_view text, const Deadline& deadline, PatternScratch& scratch,
                           const WordSink& sink) const {
  std::vector<std::string_view> pieces;
  if (!text.empty()) pieces.push_back(text);
  std::vector<PatternSpan> spans;
  for (const SplitStep& step : steps_) {
    std::vector<std::string_view> next;
    for (const std::string_view piece : pieces) {
      spans.clear();
      const Status status = step.pattern.find_all(piece, deadline, scratch, spans);
      if (!status.ok()) return status;
      const auto split_pieces = pieces_of_step(piece, spans, step.behavior, step.invert);
      next.insert(next.end(), split_pieces.begin(), split_pieces.end());
    }
    pieces = std::move(next);
  }
  for (const std::string_view piece : pieces) {
    const Status status = split_at_byte_level(piece, deadline, scratch, sink);
    if (!status.ok()) return status;
  }
  return {};
}

Status PreTokenizer::split_at_byte_level(std::string_view piece, const Deadline& deadline,
                                         PatternScratch& scratch, const WordSink& sink) const {
  std::string prefixed;
  if (add_prefix_space_ && !piece.starts_with(' ')) {
    prefixed.reserve(piece.size() + 1);
    prefixed.append(1, ' ').append(piece);
    piece = prefixed;
  }
  if (!byte_level_split_) return sink(piece);
  std::vector<PatternSpan> spans;
  const Status status = byte_level_split_->find_all(piece, deadline, scratch, spans);
  if (!status.ok()) return status;
  for (const PatternSpan& span : spans) {
    if (span.end == span.begin) continue;
    const Status sunk = sink(piece.substr(span.begin, span.end - span.begin));
    if (!sunk.ok()) return sunk;
  }
  return {};
}

}  // namespace spindle::text
