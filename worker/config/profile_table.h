#pragma once
// Reads the calibrated table of a model (protobuf text format, schema proto/profile.proto).
//
// Thread-safety: free functions without shared state.

#include <cstddef>
#include <filesystem>
#include <string_view>

#include "kernels/core/status.h"
#include "kvstore/plan/kv_plan.h"

namespace spindle::config {

// Some 300 bytes for each head: room for the heads of any model.
inline constexpr std::size_t kMaxProfileTableBytes = std::size_t{8} << 20;

// The table of a model with these layers and KV heads, both at least 1. INVALID_ARGUMENT naming
// line and column or the head at fault: another shape, a head that is missing or there twice, a
// field that is not set, an error that is negative or not finite, entries that are not above 0 and
// at most 1.
Result<kvstore::ProfileTable> parse_profile_table(std::string_view text, std::string_view name,
                                                  int n_layers, int n_kv_heads);

// The same from a regular file of at most kMaxProfileTableBytes; also NOT_FOUND and TOO_LARGE. The
// message begins with the path.
Result<kvstore::ProfileTable> load_profile_table(const std::filesystem::path& path, int n_layers,
                                                 int n_kv_heads);

}  // namespace spindle::config
