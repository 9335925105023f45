#pragma once
// What would have to change for a number of requests to run at once (sizing.h): more memory on
// every device, more devices, or a smaller share of the KV. Each answer was tried: it does fit.
//
// Thread-safety: pure functions.

#include <cstdint>
#include <optional>
#include <vector>

#include "cluster/coordinator/sizing.h"

namespace spindle::coordinator {

// Whether n requests at once fit; 0: whether the cluster starts at all. max_num_seqs does not
// count.
bool can_serve(const ClusterDescription& cluster, const RequestKind& kind, std::int64_t n);

// The least memory of every device, in their present proportion, that is enough; each in whole MiB.
// Memory that the settings state (cluster.device_memory_bytes, kv.memory_bytes) grows alike.
// Nothing when no memory is enough, or none of a device is known.
std::optional<std::vector<std::uint64_t>> least_memory(const ClusterDescription& cluster,
                                                       const RequestKind& kind, std::int64_t n);

// The fewest devices like the present ones, which must all be alike, as far as there are layers for
// them. Nothing when they are not alike, an explicit split says their number, or none is enough.
std::optional<int> least_devices(const ClusterDescription& cluster, const RequestKind& kind,
                                 std::int64_t n);

// The longest max_model_len that is enough, at least the request's own length.
std::optional<std::int64_t> longest_max_model_len(const ClusterDescription& cluster,
                                                  const RequestKind& kind, std::int64_t n);

// The largest KvPolicy::ratio, in steps of a thousandth, that is enough. Nothing for a policy that
// has no ratio, or when none is.
std::optional<double> largest_ratio(const ClusterDescription& cluster, const RequestKind& kind,
                                    std::int64_t n);

}  // namespace spindle::coordinator
