#include "cluster/text/added_tokens.h"

#include <utf8proc.h>

#include <algorithm>
#include <utility>

#include "cluster/text/utf8.h"

namespace spindle::text {
namespace {

std::vector<std::string> contents_of(const std::vector<AddedToken>& tokens) {
  std::vector<std::string> contents;
  for (const AddedToken& token : tokens) contents.push_back(token.content);
  return contents;
}

// Alphabetic, mark, decimal digit, connector or joiner, as a regular expression's \w has it.
bool is_word_character(char32_t c) {
  if (c == 0x200C || c == 0x200D) return true;
  if ((c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
      (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189)) {
    return true;  // circled and squared letters are alphabetic symbols
  }
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return false;
  }
}

bool touches_a_word(std::string_view text, std::size_t begin, std::size_t end) {
  if (begin > 0 && is_word_character(last_code_point(text.substr(0, begin)))) return true;
  return end < text.size() && is_word_character(next_code_point(text, end));
}

// Moves `begin` left over white space, not past `limit`.
std::size_t skip_white_space_left(std::string_view text, std::size_t begin, std::size_t limit) {
  while (begin > limit) {
    const std::string_view before = text.substr(limit, begin - limit);
    const char32_t c = last_code_point(before);
    if (!is_white_space(c)) break;
    std::string encoded;
    append_utf8(encoded, c);
    begin -= encoded.size();
  }
  return begin;
}

std::size_t skip_white_space_right(std::string_view text, std::size_t end) {
  while (end < text.size()) {
    std::size_t after = end;
    if (!is_white_space(next_code_point(text, after))) break;
    end = after;
  }
  return end;
}

}  // namespace

AddedTokenScanner::AddedTokenScanner(std::vector<AddedToken> tokens)
    : tokens_(std::move(tokens)), automaton_(contents_of(tokens_)) {}

void AddedTokenScanner::split(std::string_view text, bool parse_special,
                              std::vector<TextSegment>& segments) const {
  std::size_t covered = 0;  // segments cover text[0, covered)
  std::size_t from = 0;
  while (!tokens_.empty() && from < text.size()) {
    const auto match = automaton_.find_leftmost_longest(text, from);
    if (!match) break;
    const AddedToken& token = tokens_[match->pattern];
    from = match->end;
    // A match that rstrip of the token before has already swallowed in part is not one.
    if (match->begin < covered || (token.special && !parse_special) ||
        (token.single_word && touches_a_word(text, match->begin, match->end))) {
      continue;
    }
    const std::size_t begin =
        token.lstrip ? skip_white_space_left(text, match->begin, covered) : match->begin;
    const std::size_t end = token.rstrip ? skip_white_space_right(text, match->end) : match->end;
    if (covered < begin) segments.push_back({text.substr(covered, begin - covered), std::nullopt});
    segments.push_back({text.substr(begin, end - begin), token.id});
    covered = end;
  }
  if (covered < text.size()) segments.push_back({text.substr(covered), std::nullopt});
}

}  // namespace spindle::text
