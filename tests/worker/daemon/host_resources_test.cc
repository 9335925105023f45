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

TEST(HostResources, EveryRankWantsACoreBesideItsComputingThreads) {
  using comm::Waiting;
  EXPECT_EQ(choose_waiting(2, 2, 1, false), Waiting::kSparing);
  EXPECT_EQ(choose_waiting(4, 2, 1, false), Waiting::kEager);
  EXPECT_EQ(choose_waiting(16, 2, 8, false), Waiting::kSparing);
  EXPECT_EQ(choose_waiting(2, 1, 1, false), Waiting::kEager);
}

TEST(HostResources, OnlyBesideGpusThereAreCoresToSpend) {
  using comm::Waiting;
  EXPECT_EQ(choose_waiting(16, 2, 8, true), Waiting::kSpinning);
  EXPECT_EQ(choose_waiting(15, 2, 1, true), Waiting::kEager);
  EXPECT_EQ(choose_waiting(3, 2, 1, true), Waiting::kSparing);
  EXPECT_EQ(choose_waiting(64, 2, 1, false), Waiting::kEager);
}

}  // namespace
}  // namespace spindle::worker
