#pragma once
// Files in protobuf text format: reading them, and errors with line and column. Pure functions.
//
// Thread-safety: free functions without shared state.

#include <google/protobuf/message.h>

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

#include "kernels/core/status.h"

namespace spindle::config {

// A regular file of at most `max_bytes`. NOT_FOUND, INVALID_ARGUMENT or TOO_LARGE; the message
// begins with the path.
Result<std::string> read_text_file(const std::filesystem::path& path, std::size_t max_bytes);

// A field that the schema does not have, a value of the wrong type or range, a field set twice:
// INVALID_ARGUMENT "NAME:LINE:COLUMN: what", counted from 1. TOO_LARGE for a longer text.
Status parse_text(std::string_view text, std::string_view name, std::size_t max_bytes,
                  google::protobuf::Message& message);

}  // namespace spindle::config
