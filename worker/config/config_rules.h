#pragma once
// What a configuration means beyond its schema: defaults written out, and the range of every field.

#include <cstdint>
#include <span>
#include <string_view>

#include "kernels/core/status.h"
#include "proto/config.pb.h"

namespace spindle::config {

// What --print-config shows in place of an API key. Never accepted as a key, so a printed
// configuration that is used again cannot open a server with a known key.
inline constexpr std::string_view kHiddenKey = "<hidden>";

// Sets every unset field that has a default in the schema to that default, and
// model.served_model_name to the last part of model.path. Fields whose default depends on the
// model, the ranks or chance stay unset: max_model_len, micro_batches, layers_per_stage,
// device_memory_bytes, threads_per_rank, memory_bytes, max_session_bytes, seed. So do fields
// without which something is left to the profile or is none: the size and window of kv.policy,
// kv.profile_table.
void fill_defaults(Config& config);

// INVALID_ARGUMENT naming the first field at fault and its range. Call after fill_defaults.
Status validate_config(const Config& config);

// The allowed values of an integer field, both ends included.
struct IntegerRange {
  std::string_view path;
  std::int64_t least;
  std::int64_t most;
};

// One entry for every integer field of the schema except scheduler.seed, which may be any.
std::span<const IntegerRange> integer_ranges();

}  // namespace spindle::config
