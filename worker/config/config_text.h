#pragma once
// A configuration as text: for people, and for comparing the ranks of a cluster.

#include <string>
#include <string_view>

#include "proto/config.pb.h"

namespace spindle::config {

// Protobuf text that load_config_file reads back to the same configuration, except for API keys:
// each is replaced by kHiddenKey. Fields that are decided at start are named in comments.
std::string effective_config_text(const Config& config);

// One line "api.http.port = 8000" per set field, in schema order; API keys as SHA-256 digests.
// Equal exactly when the configurations are.
std::string comparison_text(const Config& config);

// "" when equal, else the first field in which two comparison texts differ, e.g.
// "api.http.port is 8000 on rank 0 and 9000 on rank 1".
std::string describe_difference(std::string_view a, std::string_view a_name, std::string_view b,
                                std::string_view b_name);

}  // namespace spindle::config
