#include "worker/daemon/host_resources.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <string_view>

namespace spindle::worker {
namespace {

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
}

// The bytes that /proc/meminfo gives for `wanted`; 0 when it does not.
std::uint64_t memory(std::string_view wanted) {
  std::ifstream file("/proc/meminfo");
  std::string key;
  std::uint64_t kib = 0;
  std::string unit;
  while (file >> key >> kib >> unit) {
    if (key == wanted) return kib * 1024;
  }
  return 0;
}

}  // namespace

HostResources read_host_resources() {
  HostResources resources;
  resources.n_cores = usable_cores();
  resources.total_memory_bytes = memory("MemTotal:");
  resources.available_memory_bytes = memory("MemAvailable:");
  return resources;
}

int default_threads_per_rank(int n_cores, int ranks_on_host) {
  return std::max(1, n_cores / std::max(1, ranks_on_host));
}

comm::Waiting choose_waiting(int n_cores, int ranks_on_host, int n_threads, bool on_gpu) {
  // Of a rank with a GPU two or three threads compute and wait for steps; the other cores are for
  // text, sockets and the rest of the machine.
  constexpr std::int64_t kCoresPerGpu = 8;
  const std::int64_t n_ranks = ranks_on_host;
  const int n_computing = on_gpu ? 1 : n_threads;
  if (n_ranks * (n_computing + 1) > n_cores) return comm::Waiting::kSparing;
  const bool has_plenty = on_gpu && kCoresPerGpu * n_ranks <= n_cores;
  return has_plenty ? comm::Waiting::kSpinning : comm::Waiting::kEager;
}

}  // namespace spindle::worker
