#pragma once
// Finds ranks that were started with different settings before they compute different things.

#include <string_view>

#include "cluster/comm/host_group.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"

namespace spindle::comm {

// A collective: every rank calls it with the same short name `what` (at most 256 bytes) and its own
// `value`, for example the printed configuration. OK on every rank if all values are equal.
// Otherwise every rank gets the same INVALID_ARGUMENT: the ranks that differ from rank 0, and the
// first line where the lowest of them does. Values travel only when their hashes differ.
Status verify_same_on_all_ranks(HostGroup& group, std::string_view what, std::string_view value,
                                Deadline deadline);

}  // namespace spindle::comm
