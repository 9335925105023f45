#pragma once
// What every body of the groups must do, as functions that each rank of a cluster runs at the same
// time: ranks are threads in local_group_test.cc and processes in comm_mpi_test_main.cc.

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <source_location>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cluster/comm/device_group.h"
#include "cluster/comm/host_group.h"
#include "kernels/core/status.h"

namespace spindle::comm::testing {

// Collects what went wrong. Thread-safety: any thread.
class CheckLog {
 public:
  void expect(bool condition, std::string_view what,
              const std::source_location& where = std::source_location::current());
  void expect_ok(const Status& status,
                 const std::source_location& where = std::source_location::current());
  void expect_code(const Status& status, StatusCode code,
                   const std::source_location& where = std::source_location::current());
  // Empty if everything held.
  std::string text() const;

 private:
  mutable std::mutex mutex_;
  std::string text_;  // guarded by mutex_
};

// n_bytes bytes that anybody can compute from the three numbers.
std::string pattern(std::uint64_t seed, int rank, std::uint64_t index, std::size_t n_bytes);

// Runs `body(rank)` for all ranks, each in a thread of its own.
template <typename Body>
void run_ranks(int size, Body body) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) threads.emplace_back([&body, rank] { body(rank); });
  for (std::thread& thread : threads) thread.join();
}

// Every check that leaves the groups usable, in an order that is the same on all ranks.
void check_groups(HostGroup& host, DeviceGroup& device, std::uint64_t seed, CheckLog& log);

// Engine, stages and a second control channel at work at once, as in a running cluster.
void check_pipeline(HostGroup& host, DeviceGroup& device, std::uint64_t seed, int n_steps,
                    CheckLog& log);

// Tensors of another size than expected. Leaves the stream from rank 0 to rank 1 broken.
void check_size_mismatch(HostGroup& host, DeviceGroup& device, CheckLog& log);

// Ends this rank's groups while threads wait in them.
void check_shutdown(HostGroup& host, DeviceGroup& device, CheckLog& log);

}  // namespace spindle::comm::testing
