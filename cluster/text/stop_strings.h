#pragma once
// Finds stop strings in streamed text, and holds back what may still become one.

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/text/aho_corasick.h"
#include "kernels/core/status.h"

namespace spindle::text {

// The stop string that ends first wins, of those that end together the longest, of equal ones the
// first.
//
// Thread-safety: none; one per generated sequence. Copying one is cheap (the automaton is shared)
// and gives a matcher in the same state.
// Invariants: pushed text == emitted text + held text, until a match; the held text is the longest
// suffix that is a proper prefix of a stop string. Time is linear in the text, memory in the
// longest stop string.
class StopStringMatcher {
 public:
  static constexpr std::size_t kMaxStopStrings = 256;
  static constexpr std::size_t kMaxStopBytes = std::size_t{64} << 10;  // all together

  struct Output {
    std::string emit;
    std::optional<std::size_t> matched;  // index of the stop string; nothing after it is emitted
  };

  // An empty stop string, or more than the limits, is kInvalidArgument.
  static Result<StopStringMatcher> create(std::vector<std::string> stop_strings,
                                          bool include_stop_str_in_output);

  // After a match, further pushes emit nothing and report the same match.
  Output push(std::string_view text);
  // The end of the text: what was held back.
  std::string finish();

 private:
  StopStringMatcher(std::vector<std::string> stop_strings, bool include)
      : automaton_(std::make_shared<const AhoCorasick>(stop_strings)),
        include_stop_str_in_output_(include) {}

  std::shared_ptr<const AhoCorasick> automaton_;
  bool include_stop_str_in_output_;
  AhoCorasick::State state_ = AhoCorasick::kRoot;
  std::string held_;  // held text is held_ from held_begin_ on
  std::size_t held_begin_ = 0;
  std::optional<std::size_t> matched_;
};

}  // namespace spindle::text
