#pragma once
// From a record to token positions: where the KV is compressed and which tokens are scored. The
// server gets token ids, so that these positions mean the same on both sides.

#include <cstdint>
#include <string>
#include <vector>

#include "cluster/text/chat_template.h"
#include "cluster/text/tokenizer.h"
#include "kernels/core/status.h"
#include "ops/cli/eval_data.h"

namespace spindle::cli {

struct TokenSpan {
  std::int32_t first = 0;
  std::int32_t end = 0;
  bool operator==(const TokenSpan&) const = default;
};

// One prompt to measure. Scored tokens are part of the prompt (teacher forcing) and lie behind the
// cut, ascending.
struct Probe {
  std::vector<std::int32_t> tokens;
  std::int32_t cut = 0;            // the KV of tokens [0, cut) is compressed
  std::vector<TokenSpan> answers;  // right or wrong as a whole each
  // A position of the text lies inside a token; the token's begin was taken.
  bool moved = false;
};

// A conversation as text, and the places in it, in bytes.
struct Conversation {
  struct Answer {
    std::size_t first = 0;
    std::size_t end = 0;
  };
  std::string text;
  std::size_t document_end = 0;
  std::vector<Answer> answers;
};
// INVALID_ARGUMENT when the template does not render a conversation as its beginnings continued.
Result<Conversation> render_conversation(const text::ModelChatTemplate& chat_template,
                                         const EvalRecord& record);

// The tokens of a text with the byte at which each begins, and the text's length behind them.
struct TokenizedText {
  std::vector<std::int32_t> tokens;
  std::vector<std::size_t> begins;  // [tokens + 1]
};
// INVALID_ARGUMENT when the tokenizer changes the text (a normaliser).
Result<TokenizedText> tokenize(const text::Tokenizer& tokenizer, const std::string& text);

// Document compressed before any question is seen; every answer is scored, with its end-of-turn
// token.
Probe qa_probe(const Conversation& conversation, const TokenizedText& text);
// Document and first question compressed, with the header of its answer. Only that answer is
// scored, from its second token on: the first one's prediction was made before the compression.
Probe qw_probe(const Conversation& conversation, const TokenizedText& text);
// `n_scored` tokens after the one that follows tokens [first, first + prefix): the first
// predictions that depend on the compressed prefix. The tokens must be there.
Probe prose_probe(const std::vector<std::int32_t>& tokens, std::size_t first, std::int32_t prefix,
                  std::int32_t n_scored);

// Parts of the probe with at most `max_scores` positions from the first answer's begin to the last
// one's end, each a request of its own; a longer answer gets a part of its own and is cut nowhere.
std::vector<std::vector<TokenSpan>> split_answers(const std::vector<TokenSpan>& answers,
                                                  std::int32_t max_scores);

}  // namespace spindle::cli
