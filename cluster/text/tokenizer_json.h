#pragma once
// Reads a Hugging Face tokenizer.json into the parts of a Tokenizer. Everything that would change a
// token and is not supported is refused by name, so a tokenizer that loads is exact.

#include <cstdint>
#include <memory>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cluster/text/added_tokens.h"
#include "cluster/text/bpe.h"
#include "cluster/text/pre_tokenizer.h"
#include "cluster/text/vocabulary.h"
#include "kernels/core/status.h"

namespace spindle::text {

// Parts are immutable once read. Tokens of a TemplateProcessing stand in prefix_ids and suffix_ids.
struct TokenizerParts {
  Vocabulary vocabulary;
  std::unique_ptr<const Bpe> bpe;
  // Word bytes to id; filled only if the model has ignore_merges, where a word that is a token as
  // a whole is not merged. Views into `vocabulary`.
  std::unordered_map<std::string_view, std::int32_t> whole_words;
  bool normalize_nfc = false;
  std::unique_ptr<const AddedTokenScanner> raw_added_tokens;
  std::unique_ptr<const AddedTokenScanner> normalized_added_tokens;
  std::unique_ptr<const PreTokenizer> pre_tokenizer;
  std::vector<std::int32_t> prefix_ids;
  std::vector<std::int32_t> suffix_ids;
  std::size_t max_token_bytes = 1;
};

inline constexpr std::size_t kMaxTokenizerFileBytes = std::size_t{64} << 20;

// Errors: kTooLarge over the size limit, kUnimplemented for features outside the supported set,
// kInvalidArgument for anything malformed.
Result<TokenizerParts> parse_tokenizer_json(std::string_view json);

}  // namespace spindle::text
