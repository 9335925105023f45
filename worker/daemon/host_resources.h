#pragma once
// What this host offers to its ranks.

#include <cstdint>

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

// What max_num_seqs sequences of max_model_len would take (`wanted_bytes`), but at most half of the
// host's free memory divided by its ranks; `wanted_bytes` when the free memory is not known.
std::uint64_t default_kv_bytes(std::uint64_t wanted_bytes, std::uint64_t available_memory_bytes,
                               int ranks_on_host);

}  // namespace spindle::worker
