#pragma once
// tokenizer.json patterns are written for Oniguruma with Ruby syntax; Spindle matches with PCRE2.
// The two differ silently in a few places (what \s, \w and \b cover, what \h and \v mean, that ^
// and $ are always multi-line, that {n,m}+ is not possessive). This translation removes the
// differences and refuses, by name, what it does not know.

#include <string>
#include <string_view>

#include "kernels/core/status.h"

namespace spindle::text {

// A pattern for PCRE2 with UTF, UCP and MULTILINE that matches as `pattern` does in Oniguruma.
// `pattern` must be valid UTF-8. kUnimplemented names the construct and its byte offset.
Result<std::string> translate_regex(std::string_view pattern);

// A pattern that matches exactly `literal`.
std::string escape_regex(std::string_view literal);

}  // namespace spindle::text
