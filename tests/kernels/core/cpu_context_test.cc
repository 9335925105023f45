#include "kernels/core/cpu_context.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace spindle {
namespace {

std::unique_ptr<CpuContext> context_of(int n_threads) {
  return std::move(CpuContext::create({.n_threads = n_threads})).value();
}

TEST(CpuContext, RefusesBadThreadCounts) {
  for (const int n_threads : {0, -1, CpuContext::kMaxThreads + 1}) {
    EXPECT_EQ(CpuContext::create({.n_threads = n_threads}).status().code(),
              StatusCode::kInvalidArgument);
  }
}

TEST(CpuContext, IsaIsOneTheHostHas) {
  const auto supported = supported_cpu_isas();
  ASSERT_EQ(supported.front(), CpuIsa::kPortable);
  EXPECT_EQ(context_of(1)->isa(), supported.back());
  const auto portable = CpuContext::create({.n_threads = 1, .isa = CpuIsa::kPortable});
  EXPECT_EQ(portable.value()->isa(), CpuIsa::kPortable);
}

TEST(CpuContext, RangesCoverEverythingOnce) {
  for (const int n_threads : {1, 2, 3, 5}) {
    const auto context = context_of(n_threads);
    for (const std::int64_t n_items : {0, 1, 2, 3, 4, 7, 100}) {
      for (const std::int64_t grain : {0, 1, 2, 50}) {
        std::vector<std::atomic<int>> hits(static_cast<std::size_t>(n_items));
        std::atomic<int> n_ranges = 0;
        context->parallel_for(n_items, grain,
                              [&](std::int64_t begin, std::int64_t end, int thread) {
                                EXPECT_GE(thread, 0);
                                EXPECT_LT(thread, n_threads);
                                ++n_ranges;
                                for (std::int64_t i = begin; i < end; ++i)
                                  ++hits[static_cast<std::size_t>(i)];
                              });
        for (const auto& hit : hits) EXPECT_EQ(hit.load(), 1);
        EXPECT_LE(n_ranges * grain, std::max(n_items, grain));
      }
    }
  }
}

TEST(CpuContext, SmallWorkStaysOnTheCallingThread) {
  const auto context = context_of(3);
  context->parallel_for(9, 5, [&](std::int64_t begin, std::int64_t end, int thread) {
    EXPECT_EQ(begin, 0);
    EXPECT_EQ(end, 9);
    EXPECT_EQ(thread, 0);
  });
  const auto caller = std::this_thread::get_id();
  context->parallel_for(9, 5, [&](std::int64_t, std::int64_t, int) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
  });
}

TEST(CpuContext, UsesAllThreadsForLargeWork) {
  const auto context = context_of(3);
  std::mutex mutex;
  std::set<std::thread::id> seen;
  context->parallel_for(300, 1, [&](std::int64_t, std::int64_t, int) {
    const std::lock_guard lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  EXPECT_EQ(seen.size(), 3U);
}

TEST(CpuContext, WakesWorkersThatWentToSleep) {
  const auto context = context_of(3);
  std::int64_t sums[3] = {};
  for (int round = 0; round < 200; ++round) {
    if (round % 20 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    context->parallel_for(3, 1, [&](std::int64_t begin, std::int64_t end, int) {
      if (round % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
      for (std::int64_t i = begin; i < end; ++i) sums[i] += i;
    });
  }
  EXPECT_EQ(sums[0], 0);
  EXPECT_EQ(sums[1], 200);
  EXPECT_EQ(sums[2], 400);
}

TEST(CpuContext, ScratchIsAlignedAndPerThread) {
  const auto context = context_of(2);
  std::byte* first = context->scratch(0, 1000);
  std::byte* second = context->scratch(1, 1000);
  EXPECT_NE(first, second);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(first) % 64, 0U);
  EXPECT_EQ(context->scratch(0, 10), first);
  std::byte* larger = context->scratch(0, 1 << 20);
  larger[(1 << 20) - 1] = std::byte{1};
}

}  // namespace
}  // namespace spindle
