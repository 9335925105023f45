#include "cluster/coordinator/sizing_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace spindle::coordinator {
namespace {

constexpr std::uint64_t kMiB = 1ULL << 20;
// Beyond this no device will be: 2^50 bytes is also what the partition takes.
constexpr std::uint64_t kMostMemory = 1ULL << 49;
constexpr int kRatioSteps = 1000;
constexpr int kMostDevices = 256;

// The least of [least, most] for which `holds`, which then holds for all that are larger.
template <typename Holds>
std::optional<std::int64_t> least_that(std::int64_t least, std::int64_t most, Holds holds) {
  if (least > most || !holds(most)) return std::nullopt;
  std::int64_t fails = least - 1;
  while (most - fails > 1) {
    const std::int64_t middle = fails + (most - fails) / 2;
    (holds(middle) ? most : fails) = middle;
  }
  return most;
}

std::int64_t scaled(std::int64_t bytes, double factor) {
  return static_cast<std::int64_t>(std::llround(static_cast<double>(bytes) * factor));
}

// With `largest` bytes on the largest device and the others in proportion.
ClusterDescription with_memory(const ClusterDescription& cluster, std::uint64_t largest) {
  ClusterDescription changed = cluster;
  std::uint64_t present = 0;
  for (const DeviceFacts& device : cluster.devices) present = std::max(present, device.total_bytes);
  if (present == 0) {
    for (const std::int64_t bytes : cluster.settings.device_memory_bytes) {
      present = std::max(present, static_cast<std::uint64_t>(bytes));
    }
  }
  if (present == 0) return changed;
  const double factor = static_cast<double>(largest) / static_cast<double>(present);
  for (DeviceFacts& device : changed.devices) {
    const double bytes = static_cast<double>(device.total_bytes) * factor;
    device.total_bytes = static_cast<std::uint64_t>(std::ceil(bytes / kMiB)) * kMiB;
  }
  for (std::int64_t& bytes : changed.settings.device_memory_bytes) bytes = scaled(bytes, factor);
  for (std::int64_t& bytes : changed.settings.kv_bytes) bytes = scaled(bytes, factor);
  return changed;
}

}  // namespace

bool can_serve(const ClusterDescription& cluster, const RequestKind& kind, std::int64_t n) {
  ClusterDescription wide = cluster;
  const std::int64_t most = std::numeric_limits<int>::max();
  wide.settings.max_num_seqs =
      static_cast<int>(std::clamp<std::int64_t>(n, cluster.settings.max_num_seqs, most));
  const auto sizing = size_cluster(wide);
  if (!sizing.ok()) return false;
  if (n == 0) return true;
  const auto requests = size_requests(wide, *sizing, kind);
  return requests.ok() && requests->concurrency >= n;
}

std::optional<std::vector<std::uint64_t>> least_memory(const ClusterDescription& cluster,
                                                       const RequestKind& kind, std::int64_t n) {
  const auto enough = [&](std::int64_t mib) {
    return can_serve(with_memory(cluster, static_cast<std::uint64_t>(mib) * kMiB), kind, n);
  };
  // Upwards: a pool can also be too large for a GPU.
  std::int64_t too_little = 0;
  std::int64_t tried = 1;
  const auto most = static_cast<std::int64_t>(kMostMemory / kMiB);
  while (tried <= most && !enough(tried)) {
    too_little = tried;
    tried += std::max<std::int64_t>(tried / 4, 1);
  }
  if (tried > most) return std::nullopt;
  const auto found = least_that(too_little + 1, tried, enough);
  if (!found) return std::nullopt;
  const ClusterDescription changed =
      with_memory(cluster, static_cast<std::uint64_t>(*found) * kMiB);
  std::vector<std::uint64_t> memory;
  for (std::size_t i = 0; i < changed.devices.size(); ++i) {
    const std::vector<std::int64_t>& stated = changed.settings.device_memory_bytes;
    memory.push_back(stated.empty()
                         ? changed.devices[i].total_bytes
                         : static_cast<std::uint64_t>(stated[stated.size() == 1 ? 0 : i]));
  }
  return memory;
}

std::optional<int> least_devices(const ClusterDescription& cluster, const RequestKind& kind,
                                 std::int64_t n) {
  const ClusterSettings& settings = cluster.settings;
  if (!settings.layers_per_stage.empty() || settings.device_memory_bytes.size() > 1 ||
      settings.kv_bytes.size() > 1) {
    return std::nullopt;
  }
  const DeviceFacts& first = cluster.devices.front();
  for (const DeviceFacts& device : cluster.devices) {
    if (device.total_bytes != first.total_bytes || device.speed != first.speed) return std::nullopt;
  }
  const int most = std::min(cluster.model.n_layers, kMostDevices);
  // Not by halves: one device more can leave a stage with less.
  for (int count = 1; count <= most; ++count) {
    ClusterDescription changed = cluster;
    changed.devices.assign(static_cast<std::size_t>(count), first);
    for (int i = 0; i < count; ++i) {
      changed.devices[static_cast<std::size_t>(i)].id = std::to_string(i);
    }
    if (can_serve(changed, kind, n)) return count;
  }
  return std::nullopt;
}

std::optional<std::int64_t> longest_max_model_len(const ClusterDescription& cluster,
                                                  const RequestKind& kind, std::int64_t n) {
  const auto present = resolve_max_model_len(cluster.settings, cluster.model);
  const std::int64_t own = kind.prompt_tokens + kind.output_tokens;
  if (!present.ok() || own > *present) return std::nullopt;
  const auto lowered_by = least_that(0, *present - own, [&](std::int64_t less) {
    ClusterDescription changed = cluster;
    changed.settings.max_model_len = *present - less;
    return can_serve(changed, kind, n);
  });
  if (!lowered_by) return std::nullopt;
  return *present - *lowered_by;
}

std::optional<double> largest_ratio(const ClusterDescription& cluster, const RequestKind& kind,
                                    std::int64_t n) {
  RequestKind changed = kind;
  if (changed.policy.max_bytes > 0) return std::nullopt;
  // A ratio that is out of reach gives the smallest plan, which may be above it.
  const auto with = [&](std::int64_t steps) -> const RequestKind& {
    changed.policy.ratio = static_cast<double>(steps) / kRatioSteps;
    return changed;
  };
  const auto lowered_by = least_that(0, kRatioSteps - 1, [&](std::int64_t less) {
    return can_serve(cluster, with(kRatioSteps - less), n);
  });
  if (!lowered_by) return std::nullopt;
  return static_cast<double>(kRatioSteps - *lowered_by) / kRatioSteps;
}

}  // namespace spindle::coordinator
