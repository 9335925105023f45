#pragma once
// Turns a stream of token ids into a stream of text.

#include <cstdint>
#include <string>

#include "cluster/text/tokenizer.h"
#include "cluster/text/utf8.h"

namespace spindle::text {

// Holds a reference to the tokenizer, which must outlive it.
//
// Thread-safety: none; one per generated sequence.
// Invariant: the pushes and the final finish, concatenated, are tokenizer.decode of all ids; every
// returned piece is valid UTF-8 by itself.
class IncrementalDetokenizer {
 public:
  IncrementalDetokenizer(const Tokenizer& tokenizer, bool skip_special)
      : tokenizer_(tokenizer), skip_special_(skip_special) {}

  // The characters that this token completes; an incomplete one waits for its next bytes.
  std::string push(std::int32_t id) {
    std::string text;
    if (!skip_special_ || !tokenizer_.is_special(id)) {
      decoder_.feed(tokenizer_.token_bytes(id), text);
    }
    return text;
  }

  // What was held back, as U+FFFD.
  std::string finish() {
    std::string text;
    decoder_.finish(text);
    return text;
  }

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_;
  LossyUtf8Decoder decoder_;
};

}  // namespace spindle::text
