#pragma once
// Cuts a template into tokens, with trim_blocks and lstrip_blocks on (as transformers sets them)
// and the final newline removed (Jinja's default).

#include <string>
#include <string_view>
#include <vector>

#include "cluster/text/jinja/token.h"
#include "kernels/core/status.h"

namespace spindle::text::jinja {

// The source as positions count in it: "\r\n" and "\r" become "\n", one final newline goes.
std::string normalize_source(std::string_view source);

// Tokens of a normalised source (valid UTF-8), the last of them kEnd.
Result<std::vector<Token>> tokenize(std::string_view source);

}  // namespace spindle::text::jinja
