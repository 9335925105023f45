#include "cluster/text/stop_strings.h"

#include <utility>

namespace spindle::text {

Result<StopStringMatcher> StopStringMatcher::create(std::vector<std::string> stop_strings,
                                                    bool include_stop_str_in_output) {
  if (stop_strings.size() > kMaxStopStrings) {
    return invalid_argument("more than " + std::to_string(kMaxStopStrings) + " stop strings");
  }
  std::size_t n_bytes = 0;
  for (const std::string& stop_string : stop_strings) {
    if (stop_string.empty()) return invalid_argument("an empty stop string");
    n_bytes += stop_string.size();
  }
  if (n_bytes > kMaxStopBytes) {
    return invalid_argument("stop strings of more than " + std::to_string(kMaxStopBytes) +
                            " bytes");
  }
  return StopStringMatcher(std::move(stop_strings), include_stop_str_in_output);
}

StopStringMatcher::Output StopStringMatcher::push(std::string_view text) {
  if (matched_) return {"", matched_};
  for (std::size_t i = 0; i < text.size(); ++i) {
    state_ = automaton_->next(state_, static_cast<unsigned char>(text[i]));
    const std::uint32_t pattern = automaton_->longest_match(state_);
    if (pattern == AhoCorasick::kNoPattern) continue;
    matched_ = pattern;
    held_.append(text, 0, i + 1);
    std::string emit = held_.substr(held_begin_);
    if (!include_stop_str_in_output_) {
      emit.resize(emit.size() - automaton_->pattern_bytes(pattern));
    }
    held_.clear();
    held_begin_ = 0;
    return {std::move(emit), matched_};
  }
  held_ += text;
  const std::size_t emit_end = held_.size() - automaton_->depth(state_);
  Output output{held_.substr(held_begin_, emit_end - held_begin_), std::nullopt};
  held_begin_ = emit_end;
  // Moving the rest only when most of the buffer is spent keeps the total work linear.
  if (held_begin_ > held_.size() / 2) {
    held_.erase(0, held_begin_);
    held_begin_ = 0;
  }
  return output;
}

std::string StopStringMatcher::finish() {
  std::string rest = held_.substr(held_begin_);
  held_.clear();
  held_begin_ = 0;
  state_ = AhoCorasick::kRoot;
  return rest;
}

}  // namespace spindle::text
