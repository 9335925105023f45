#pragma once
// What became of a request's KV, layer by layer.

#include <string>

#include "ops/cli/terminal.h"
#include "proto/api.pb.h"

namespace spindle::cli {

// One line for each layer and one for all of them, by usage.kv[].layers:
// "layer  0  ██▌                    12.5 %    49.5 KiB of 396.0 KiB". Without `utf8` the bars are
// of
// '#' and '-'. A line that says so when the server named no layers.
std::string kv_chart(const api::v1::Usage& usage, const Style& style, bool utf8);

}  // namespace spindle::cli
