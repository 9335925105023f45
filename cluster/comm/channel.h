#pragma once
// The fixed set of control channels. Messages of one (source, destination, channel) arrive in the
// order they were sent; different channels never wait for each other.

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace spindle::comm {

enum class Channel : std::uint8_t {
  kBootstrap,   // one-off exchanges while the cluster starts
  kPlan,        // rank 0 -> every rank: step plans
  kResult,      // every rank -> rank 0: step results
  kHeartbeat,   // PeerMonitor only
  kOrder,       // rank 0 <-> every other rank: orders beside the steps, and their replies
  kCollective,  // HostGroup::broadcast, all_gather and barrier only
};

inline constexpr std::size_t kChannelCount = 6;

constexpr std::size_t channel_index(Channel channel) { return static_cast<std::size_t>(channel); }

constexpr std::string_view channel_name(Channel channel) {
  switch (channel) {
    case Channel::kBootstrap:
      return "bootstrap";
    case Channel::kPlan:
      return "plan";
    case Channel::kResult:
      return "result";
    case Channel::kHeartbeat:
      return "heartbeat";
    case Channel::kOrder:
      return "order";
    case Channel::kCollective:
      return "collective";
  }
  return "?";
}

}  // namespace spindle::comm
