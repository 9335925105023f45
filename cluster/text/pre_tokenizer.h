#pragma once
// Cuts text into the words that BPE encodes independently: a list of splitting steps and a last
// byte-level step, as the "pre_tokenizer" of a tokenizer.json describes them.

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/text/split_pattern.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"

namespace spindle::text {

enum class SplitBehavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

// One "Split" (or "Digits") step. `invert` swaps matches and what lies between them.
struct SplitStep {
  SplitPattern pattern;
  SplitBehavior behavior;
  bool invert;
};

// Thread-safety: immutable after construction.
// Invariant: words handed out are never empty; concatenated they are the text, except for what
// kRemoved removes and add_prefix_space adds.
class PreTokenizer {
 public:
  using WordSink = std::function<Status(std::string_view word)>;

  // byte_level_split: the byte-level step's own pattern, if it uses one.
  PreTokenizer(std::vector<SplitStep> steps, bool add_prefix_space,
               std::optional<SplitPattern> byte_level_split);

  // Hands every word of `text` (valid UTF-8) to `sink`, until it fails. The views die with the
  // call of the sink.
  Status split(std::string_view text, const Deadline& deadline, PatternScratch& scratch,
               const WordSink& sink) const;

 private:
  Status split_at_byte_level(std::string_view piece, const Deadline& deadline,
                             PatternScratch& scratch, const WordSink& sink) const;

  std::vector<SplitStep> steps_;
  bool add_prefix_space_;
  std::optional<SplitPattern> byte_level_split_;
};

// The pieces that one step makes of `spans` (which it uses as scratch), empty pieces left out.
std::vector<std::string_view> pieces_of_step(std::string_view text, std::vector<PatternSpan> spans,
                                             SplitBehavior behavior, bool invert);

// The pattern of a ByteLevel step with use_regex (GPT-2's).
std::string_view byte_level_pattern();

}  // namespace spindle::text
