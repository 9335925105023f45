#pragma once
// A configuration as text: for people, and for comparing the ranks of a cluster.

#include <string>

#include "proto/config.pb.h"

namespace spindle::config {

// Protobuf text that load_config_file reads back to the same configuration, except for API keys:
// each is replaced by kHiddenKey. Fields that are decided at start are named in comments.
std::string effective_config_text(const Config& config);

// One line "api.http.port = 8000" per field, in schema order, so that line n of two texts is about
// the same field; "api.api_key" shows SHA-256 digests. Equal exactly when the configurations are.
std::string comparison_text(const Config& config);

}  // namespace spindle::config
