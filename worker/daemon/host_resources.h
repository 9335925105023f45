#pragma once
// What this host offers to its ranks.

#include <cstdint>

#include "cluster/comm/backoff.h"

namespace spindle::worker {

struct HostResources {
  int n_cores = 1;                           // that this process may run on
  std::uint64_t total_memory_bytes = 0;      // 0: unknown
  std::uint64_t available_memory_bytes = 0;  // of it; 0: unknown
};

// Reads the system; never fails, unknown parts keep their defaults.
HostResources read_host_resources();

// Cores divided among the ranks of one host, at least 1.
int default_threads_per_rank(int n_cores, int ranks_on_host);

// How the waiting threads of ranks with so many computing threads each should wait. With a GPU
// n_threads does not count: one thread computes.
comm::Waiting choose_waiting(int n_cores, int ranks_on_host, int n_threads, bool on_gpu);

}  // namespace spindle::worker
