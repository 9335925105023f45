#pragma once
// The in-process bodies: ranks are threads. Used by tests, simulations and a one-rank cluster.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cluster/comm/device_group.h"
#include "cluster/comm/host_group.h"
#include "cluster/comm/message.h"

namespace spindle::comm {

struct LocalClusterOptions {
  std::uint32_t epoch = 1;
  // What one rank may have sent to another on one channel (or as tensors) without it having been
  // taken. One message above it is still accepted when nothing else is waiting.
  std::size_t max_unreceived_bytes = kMaxUnreceivedBytes;
  // What device groups say of themselves. False: as a GPU's, for tests of what is done then.
  bool recv_waits = true;
};

// Owns `size` ranks, each with a host group and a device group, and the queues between them. An
// abort() on any group ends the waits of all groups of the cluster.
//
// Thread-safety: host() and device() may be called from any thread; the groups follow their own
// rules. Destroy the cluster only after all its users have left.
class LocalCluster {
 public:
  explicit LocalCluster(int size, LocalClusterOptions options = {});
  ~LocalCluster();

  int size() const { return static_cast<int>(hosts_.size()); }
  HostGroup& host(int rank) { return *hosts_.at(static_cast<std::size_t>(rank)); }
  DeviceGroup& device(int rank) { return *devices_.at(static_cast<std::size_t>(rank)); }

 private:
  class Hub;
  class LocalHostGroup;
  class LocalDeviceGroup;

  std::unique_ptr<Hub> hub_;
  std::vector<std::unique_ptr<HostGroup>> hosts_;
  std::vector<std::unique_ptr<DeviceGroup>> devices_;
};

}  // namespace spindle::comm
