#pragma once
// Records in the replies of ranks (proto/control.proto).

#include <cstddef>
#include <span>
#include <vector>

#include "kernels/core/status.h"
#include "proto/control.pb.h"
#include "worker/trace/trace_record.h"

namespace spindle::worker {

// Of one reply: well below the limit of a control message, at most 60 bytes each.
inline constexpr std::size_t kRecordsPerReply = 8192;

void encode(std::span<const TraceRecord> records, control::OrderReply& reply);
// INTERNAL when a record is of no known kind, has a negative duration, or there are more than were
// asked for.
Result<std::vector<TraceRecord>> decode_records(const control::OrderReply& reply,
                                                std::size_t max_records);

}  // namespace spindle::worker
