#pragma once
// One field set from text, as `--set a.b=c` and the named flags do, through protobuf reflection.

#include <string_view>

#include "kernels/core/status.h"
#include "proto/config.pb.h"

namespace spindle::config {

// Sets the field at `path` ("api.http.port") to `value`. Enums are named, in either case; booleans
// are true and false; a repeated field is replaced by the comma-separated list, and an empty value
// empties it. INVALID_ARGUMENT names the path and what would have been valid: the fields of the
// group, the names of the enum, the type. `config` is unchanged then.
// Thread-safety: as of `config`.
Status apply_override(Config& config, std::string_view path, std::string_view value);

// The same from one "path=value" text.
Status apply_assignment(Config& config, std::string_view assignment);

// The value as the schema names it, where users of vLLM's flags know it by another name.
std::string_view schema_value(std::string_view path, std::string_view value);

}  // namespace spindle::config
