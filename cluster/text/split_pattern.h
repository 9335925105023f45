#pragma once
// A compiled pre-tokenizer pattern: finds all matches in a piece of text, within bounds.

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/deadline.h"
#include "kernels/core/status.h"

struct pcre2_real_code_8;
struct pcre2_real_match_data_8;
struct pcre2_real_match_context_8;

namespace spindle::text {

// A stretch of a text; together the spans of one text cover it without gaps.
struct PatternSpan {
  std::size_t begin;
  std::size_t end;
  bool is_match;
};

// The matcher's working memory; one per thread of matching.
class PatternScratch {
 public:
  PatternScratch();
  ~PatternScratch();
  PatternScratch(const PatternScratch&) = delete;
  PatternScratch& operator=(const PatternScratch&) = delete;

 private:
  friend class SplitPattern;
  pcre2_real_match_data_8* data_;
  pcre2_real_match_context_8* context_;
};

// Owns the PCRE2 program (UTF, UCP, JIT where the machine has it).
//
// Thread-safety: immutable after compile; each thread brings its own PatternScratch.
// Bounds: each match attempt is limited in steps and memory by PCRE2; the search over start
// positions returns to us every few hundred positions so that the deadline is looked at.
class SplitPattern {
 public:
  // `regex` as tokenizer.json writes it (see regex_translation.h).
  static Result<SplitPattern> compile(std::string_view regex);
  static Result<SplitPattern> compile_literal(std::string_view literal);

  // Appends the spans of `text` (valid UTF-8): its matches, left to right, and what lies between.
  Status find_all(std::string_view text, const Deadline& deadline, PatternScratch& scratch,
                  std::vector<PatternSpan>& spans) const;

 private:
  struct CodeDeleter {
    void operator()(pcre2_real_code_8* code) const;
  };
  using Code = std::unique_ptr<pcre2_real_code_8, CodeDeleter>;
  enum class Found { kMatch, kNone, kNotYet };

  explicit SplitPattern(Code code) : code_(std::move(code)) {}
  static Result<SplitPattern> compile_translated(const std::string& pattern);
  Result<Found> search(std::string_view text, std::size_t from, PatternScratch& scratch) const;

  Code code_;
};

}  // namespace spindle::text
