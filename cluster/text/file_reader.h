#pragma once
// Reads a small file of a model folder whole.

#include <cstddef>
#include <filesystem>
#include <string>

#include "kernels/core/status.h"

namespace spindle::text {

// Errors: kNotFound, kTooLarge over max_bytes, kInvalidArgument if it cannot be read (a folder, no
// permission). The message names the path.
Result<std::string> read_file(const std::filesystem::path& path, std::size_t max_bytes);

}  // namespace spindle::text
