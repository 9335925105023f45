#include "cluster/text/split_pattern.h"

#include <algorithm>
#include <array>
#include <limits>
#include <new>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "cluster/text/regex_translation.h"
#include "cluster/text/utf8.h"

namespace spindle::text {
namespace {

// Backtracking steps at one start position: ordinary patterns go at most a few times over a run of
// white space, however long, but never over the text for each of its bytes.
constexpr std::size_t kMatchLimitBase = 1'000'000;
constexpr std::size_t kMatchLimitPerByte = 4;
constexpr std::uint32_t kHeapLimitKib = 64 * 1024;
constexpr std::size_t kMaxStartsPerSearch = 256;
constexpr std::size_t kMaxBytesPerSearch = std::size_t{64} << 20;
constexpr std::size_t kMatchesPerDeadlineCheck = 1024;

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

// Start positions tried before the deadline is looked at again; each may look at the whole text.
std::size_t starts_per_search(std::size_t text_bytes) {
  return std::clamp<std::size_t>(kMaxBytesPerSearch / (text_bytes + 1), 1, kMaxStartsPerSearch);
}

}  // namespace

PatternScratch::PatternScratch()
    : data_(pcre2_match_data_create(1, nullptr)), context_(pcre2_match_context_create(nullptr)) {
  if (data_ == nullptr || context_ == nullptr) throw std::bad_alloc();
  pcre2_set_heap_limit(context_, kHeapLimitKib);
}

PatternScratch::~PatternScratch() {
  pcre2_match_context_free(context_);
  pcre2_match_data_free(data_);
}

void SplitPattern::CodeDeleter::operator()(pcre2_real_code_8* code) const { pcre2_code_free(code); }

Result<SplitPattern> SplitPattern::compile(std::string_view regex) {
  auto translated = translate_regex(regex);
  if (!translated.ok()) return translated.status();
  return compile_translated(*translated);
}

Result<SplitPattern> SplitPattern::compile_literal(std::string_view literal) {
  return compile_translated(escape_regex(literal));
}

Result<SplitPattern> SplitPattern::compile_translated(const std::string& pattern) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  const std::uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_USE_OFFSET_LIMIT |
                                PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_AUTO_CAPTURE;
  const std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), &pcre2_compile_context_free);
  if (context == nullptr) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  Code code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), options,
                          &error, &offset, context.get()));
  if (code == nullptr) {
    return invalid_argument("regular expression: " + pcre2_message(error) + " at byte " +
                            std::to_string(offset) + " of " + pattern);
  }
  // Without JIT (unsupported machine, no executable memory) matching is slower but the same.
  static_cast<void>(pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE));
  return SplitPattern(std::move(code));
}

Result<SplitPattern::Found> SplitPattern::search(std::string_view text, std::size_t from,
                                                 PatternScratch& scratch) const {
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const std::size_t last_start = from + starts_per_search(text.size()) - 1;
  pcre2_set_offset_limit(scratch.context_, last_start);
  // The caller guarantees valid UTF-8; checking it again here would make the loop quadratic.
  int rc = pcre2_match(code_.get(), subject, text.size(), from, PCRE2_NO_UTF_CHECK, scratch.data_,
                       scratch.context_);
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter uses the heap, up to its limit
    rc = pcre2_match(code_.get(), subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                     scratch.data_, scratch.context_);
  }
  if (rc >= 0) return Found::kMatch;
  if (rc != PCRE2_ERROR_NOMATCH) {
    return invalid_argument("splitting the text into words: " + pcre2_message(rc) + " near byte " +
                            std::to_string(from));
  }
  return last_start >= text.size() ? Found::kNone : Found::kNotYet;
}

Status SplitPattern::find_all(std::string_view text, const Deadline& deadline,
                              PatternScratch& scratch, std::vector<PatternSpan>& spans) const {
  std::size_t covered = 0;  // spans cover text[0, covered)
  std::size_t from = 0;
  bool has_match = false;
  std::size_t n_until_check = 0;
  const std::size_t match_limit = kMatchLimitBase + kMatchLimitPerByte * text.size();
  pcre2_set_match_limit(scratch.context_, static_cast<std::uint32_t>(std::min<std::size_t>(
                                              match_limit, std::numeric_limits<int>::max())));
  while (from <= text.size() && !text.empty()) {
    if (n_until_check == 0) {
      if (deadline.passed()) {
        return deadline_exceeded("splitting the text into words takes too long near byte " +
                                 std::to_string(from));
      }
      n_until_check = kMatchesPerDeadlineCheck;
    }
    --n_until_check;
    const auto found = search(text, from, scratch);
    if (!found.ok()) return found.status();
    if (*found == Found::kNone) break;
    if (*found == Found::kNotYet) {
      n_until_check = 0;
      from += starts_per_search(text.size());
      while (from < text.size() && (static_cast<unsigned char>(text[from]) & 0xC0u) == 0x80u) {
        ++from;
      }
      continue;
    }
    const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(scratch.data_);
    const std::size_t begin = ends[0];
    const std::size_t end = ends[1];
    if (begin == end && has_match && begin == covered) {
      // An empty match right after a match is none; go on one character further.
      if (from >= text.size()) break;
      from += utf8_sequence_bytes(static_cast<unsigned char>(text[from]));
      continue;
    }
    if (covered < begin) spans.push_back({covered, begin, false});
    spans.push_back({begin, end, true});
    covered = end;
    from = end;
    has_match = true;
  }
  if (covered < text.size()) spans.push_back({covered, text.size(), false});
  return {};
}

}  // namespace spindle::text
