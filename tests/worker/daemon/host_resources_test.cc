#include "worker/daemon/host_resources.h"

#include <gtest/gtest.h>

namespace spindle::worker {
namespace {

TEST(HostResources, ReadsThisHost) {
  const HostResources resources = read_host_resources();
  EXPECT_GE(resources.n_cores, 1);
  EXPECT_GT(resources.available_memory_bytes, 1u << 20);
  EXPECT_GT(resources.total_memory_bytes, resources.available_memory_bytes);
}

TEST(HostResources, ThreadsAreSharedAmongRanks) {
  EXPECT_EQ(default_threads_per_rank(2, 2), 1);
  EXPECT_EQ(default_threads_per_rank(2, 4), 1);  // never zero
  EXPECT_EQ(default_threads_per_rank(16, 3), 5);
  EXPECT_EQ(default_threads_per_rank(8, 0), 8);
}

TEST(HostResources, KvTakesWhatItNeedsButAtMostHalfOfFreeMemory) {
  EXPECT_EQ(default_kv_bytes(100, 1000, 2), 100u);
  EXPECT_EQ(default_kv_bytes(1000, 1000, 2), 250u);
  EXPECT_EQ(default_kv_bytes(1000, 0, 2), 1000u);  // unknown
}

}  // namespace
}  // namespace spindle::worker
