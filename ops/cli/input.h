#pragma once
// Text from files and pipes, limited to what one request can carry.

#include <cstddef>
#include <cstdio>
#include <string>
#include <string_view>

#include "kernels/core/status.h"

namespace spindle::cli {

// Room for text in a frame; the rest is for the request's other fields.
inline constexpr std::size_t kMaxInputBytes = (16U << 20U) - (64U << 10U);

// INVALID_ARGUMENT with the offset of the first byte that is not UTF-8 (RFC 3629). `name` is how
// the text is called in the message.
Status check_utf8(std::string_view text, const std::string& name);

// The whole text; "-" is standard input. TOO_LARGE, NOT_FOUND or INVALID_ARGUMENT (not text).
Result<std::string> read_text_file(const std::string& path);
Result<std::string> read_standard_input();

}  // namespace spindle::cli
