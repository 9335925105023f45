#pragma once
// Byte-level BPE tokenizer of a Hugging Face model folder (tokenizer.json).

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/text/tokenizer_json.h"
#include "kernels/core/status.h"

namespace spindle::text {

struct EncodeOptions {
  // Put the tokens of the file's post-processor (such as a BOS token) around the text.
  bool add_special_tokens = true;
  // Read special tokens written in the text as those tokens; otherwise they are plain characters.
  bool parse_special = true;
  // More tokens than this are an error, found as early as possible.
  std::size_t max_tokens = std::numeric_limits<std::size_t>::max();
};

// Text to token ids and back. Owns vocabulary, merges and compiled patterns.
//
// Thread-safety: immutable after load; any number of threads may encode and decode.
// Invariants: without a normaliser, decode(encode(x)) == x for every valid UTF-8 text x (added
// tokens with lstrip or rstrip aside). encode costs O(n log n) and a bounded multiple of n memory.
class Tokenizer {
 public:
  // Longest text that encode accepts.
  static constexpr std::size_t kMaxTextBytes = std::size_t{256} << 20;

  static Result<std::unique_ptr<Tokenizer>> load(const std::filesystem::path& model_folder);
  static Result<std::unique_ptr<Tokenizer>> from_json(std::string_view json);

  // Errors: kInvalidArgument for invalid UTF-8 (names the byte offset) and for more than
  // max_tokens, kTooLarge over kMaxTextBytes.
  Result<std::vector<std::int32_t>> encode(std::string_view utf8,
                                           const EncodeOptions& options = {}) const;

  // Ids outside the vocabulary decode to nothing. Invalid bytes become U+FFFD.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special) const;

  // The bytes of one token, possibly only a part of a character; an added token's content.
  std::string_view token_bytes(std::int32_t id) const { return parts_.vocabulary.bytes(id); }
  // The same as valid text, for showing a single token.
  std::string token_text(std::int32_t id) const;
  // The token as the file writes it, "Ġthe" for " the".
  std::string_view token_content(std::int32_t id) const { return parts_.vocabulary.content(id); }
  bool is_special(std::int32_t id) const { return parts_.vocabulary.is_special(id); }
  // The largest id plus one; a model's embedding has at least this many rows.
  std::size_t vocab_size() const { return parts_.vocabulary.size(); }
  // By token_content.
  std::optional<std::int32_t> token_to_id(std::string_view content) const {
    return parts_.vocabulary.find(content);
  }
  // The longest token, in bytes.
  std::size_t max_token_bytes() const { return parts_.max_token_bytes; }

 private:
  struct EncodeState;

  explicit Tokenizer(TokenizerParts parts) : parts_(std::move(parts)) {}

  Status encode_normalized(std::string_view text, EncodeState& state) const;
  Status encode_plain(std::string_view text, EncodeState& state) const;
  Status encode_word(std::string_view word, EncodeState& state) const;

  TokenizerParts parts_;
};

}  // namespace spindle::text
