#pragma once
// Added tokens: strings that become one token before anything else looks at the text, such as
// "<|im_start|>".

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/text/aho_corasick.h"
#include "kernels/core/status.h"

namespace spindle::text {

struct AddedToken {
  std::int32_t id;
  std::string content;
  bool single_word;  // matches only where no word character touches it
  bool lstrip;       // swallows white space before it
  bool rstrip;       // swallows white space after it
  bool normalized;   // matches in normalised text, not in the text as given
  bool special;
};

// A stretch of text: one added token, or ordinary text (no id).
struct TextSegment {
  std::string_view text;
  std::optional<std::int32_t> id;
};

// Finds added tokens in one pass over the text; where several match, the one that starts first, and
// of those the longest.
//
// Thread-safety: immutable after construction.
class AddedTokenScanner {
 public:
  // Tokens whose content is empty never match.
  explicit AddedTokenScanner(std::vector<AddedToken> tokens);

  // Appends the segments of `text` (valid UTF-8), empty ones left out. Without parse_special,
  // special tokens are ordinary text.
  void split(std::string_view text, bool parse_special, std::vector<TextSegment>& segments) const;

 private:
  std::vector<AddedToken> tokens_;
  AhoCorasick automaton_;
};

}  // namespace spindle::text
