#pragma once
// The calibrated table of a model (proto/profile.proto): what each way to store or drop one head's
// KV costs when only that head gets it.

#include <string>
#include <vector>

#include "kernels/core/status.h"
#include "ops/cli/eval_cells.h"
#include "ops/cli/eval_journal.h"
#include "proto/profile.pb.h"

namespace spindle::cli {

// One cell for each (layer, KV head) and option: everything uncompressed but for one override. Keys
// are "LAYER.HEAD/OPTION", options "k1" to "k4", "v1" to "v4", "int4", "codebook", "window64" and
// "window256".
std::vector<Cell> calibration_cells(int n_layers, int n_kv_heads);

// The table from results of calibration_cells for all `items`: an error is the mean over items and
// the worst item's, half and half, of the mean divergence at the item's tokens. INVALID_ARGUMENT
// when the server refused an option or did nothing for it, NOT_FOUND when a result is missing.
Result<profile::Profile> calibration_table(const std::string& model, int n_layers, int n_kv_heads,
                                           const std::vector<std::string>& items,
                                           const Results& results);

// Protobuf text with a comment about where it comes from.
std::string table_text(const profile::Profile& table, const std::string& origin);

}  // namespace spindle::cli
