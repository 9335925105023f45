#pragma once
// Reads a configuration file (protobuf text format, schema proto/config.proto). Pure functions:
// nothing is cached and nothing is printed.
//
// Thread-safety: free functions without shared state.

#include <cstddef>
#include <filesystem>
#include <string_view>

#include "kernels/core/status.h"
#include "proto/config.pb.h"

namespace spindle::config {

// A configuration is a page of text; anything larger is the wrong file.
inline constexpr std::size_t kMaxConfigFileBytes = 1 << 20;

// Parses `text`. A field that the schema does not have, a value of the wrong type or range, a field
// set twice: INVALID_ARGUMENT "NAME:LINE:COLUMN: what", counted from 1. Sets no defaults and checks
// no ranges (config_rules.h).
Result<Config> parse_config_text(std::string_view text, std::string_view name);

// Reads and parses a regular file of at most kMaxConfigFileBytes. Relative paths in it are taken
// from the file's folder, so that the result does not depend on the working directory.
// NOT_FOUND, INVALID_ARGUMENT or TOO_LARGE; the message begins with the path.
Result<Config> load_config_file(const std::filesystem::path& path);

// `path` as an absolute, normalised path; a relative one is taken from `folder`.
std::string absolute_path(const std::string& path, const std::filesystem::path& folder);

// The same for model.path and kv.profile_table where they are set.
void make_paths_absolute(Config& config, const std::filesystem::path& folder);

}  // namespace spindle::config
