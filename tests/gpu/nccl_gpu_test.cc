// NcclDeviceGroup between two GPUs, ranks as threads of one process; and two stages on two GPUs.

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cluster/comm/local_group.h"
#include "cluster/comm/nccl_device_group.h"
#include "kernels/cuda/devices.h"
#include "tests/worker/local_cluster.h"

namespace spindle::comm {
namespace {

constexpr std::size_t kMaxTensor = std::size_t{8} << 20;

std::vector<std::byte> pattern(std::size_t n, unsigned seed) {
  std::vector<std::byte> bytes(n);
  std::uint32_t x = seed * 2654435761U + 1;
  for (std::byte& b : bytes) {
    x = x * 1664525U + 1013904223U;
    b = static_cast<std::byte>(x >> 24);
  }
  return bytes;
}

class NcclTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto devices = kernels::list_cuda_devices();
    ASSERT_TRUE(devices.ok()) << devices.status().to_string();
    if (devices->size() < 2) {
      GTEST_SKIP() << "needs two CUDA devices, this machine has " << devices->size();
    }
  }

  // Runs `body` on two threads, each with its own GPU.
  static void on_two_gpus(
      const std::function<void(int rank, const CudaContext&, NcclDeviceGroup&)>& body) {
    LocalCluster hosts(2);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 2; ++rank) {
      threads.emplace_back([rank, &hosts, &body] {
        auto context = CudaContext::create(rank);
        ASSERT_TRUE(context.ok()) << context.status().to_string();
        auto group = NcclDeviceGroup::create(hosts.host(rank), **context, kMaxTensor,
                                             Deadline::after_ms(60000));
        ASSERT_TRUE(group.ok()) << group.status().to_string();
        body(rank, **context, **group);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

TEST_F(NcclTest, TensorsArriveInOrderAndTheSendersMemoryIsFreeAtOnce) {
  on_two_gpus([](int rank, const CudaContext& context, NcclDeviceGroup& group) {
    const std::vector<std::size_t> sizes = {1, 4, 255, 4096, 65536, 1 << 20, kMaxTensor, 7, 100000};
    auto memory = context.allocate(kMaxTensor, "a test");
    ASSERT_TRUE(memory.ok());
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const std::vector<std::byte> bytes = pattern(sizes[i], static_cast<unsigned>(i));
      const std::span<std::byte> tensor(memory->data(), sizes[i]);
      if (rank == 0) {
        context.to_device(memory->data(), bytes.data(), bytes.size());
        ASSERT_TRUE(group.send(1, tensor, Deadline::after_ms(30000)).ok());
        // What comes next on the stream must not reach the tensor that travels.
        context.fill(memory->data(), 0xee, sizes[i]);
      } else {
        context.fill(memory->data(), 0, sizes[i]);
        ASSERT_TRUE(group.recv(0, tensor, Deadline::after_ms(30000)).ok());
        std::vector<std::byte> got(sizes[i]);
        context.to_host(got.data(), memory->data(), got.size());
        context.synchronize();
        ASSERT_EQ(got, bytes) << sizes[i] << " bytes";
      }
    }
    EXPECT_TRUE(group.flush(Deadline::after_ms(30000)).ok());
  });
}

TEST_F(NcclTest, CollectivesReachEveryRank) {
  on_two_gpus([](int rank, const CudaContext&, NcclDeviceGroup& group) {
    for (const std::size_t n : {std::size_t{16}, std::size_t{1024}, std::size_t{100000}}) {
      std::vector<std::byte> all(2 * n);
      ASSERT_TRUE(
          group.all_gather(pattern(n, static_cast<unsigned>(rank)), all, Deadline::after_ms(30000))
              .ok());
      std::vector<std::byte> expected = pattern(n, 0);
      const std::vector<std::byte> second = pattern(n, 1);
      expected.insert(expected.end(), second.begin(), second.end());
      EXPECT_EQ(all, expected);
      std::vector<std::byte> data = pattern(n, static_cast<unsigned>(5 + rank));
      ASSERT_TRUE(group.broadcast(data, 1, Deadline::after_ms(30000)).ok());
      EXPECT_EQ(data, pattern(n, 6));
    }
  });
}

TEST_F(NcclTest, APeerThatNeverSendsIsADeadlineNotAHang) {
  std::promise<void> rank_1_is_done;
  std::shared_future<void> done = rank_1_is_done.get_future().share();
  on_two_gpus([&](int rank, const CudaContext& context, NcclDeviceGroup& group) {
    if (rank == 0) {
      // Alive, but it never sends.
      done.wait_for(std::chrono::seconds(20));
      return;
    }
    // Also when an assertion below leaves early.
    const std::unique_ptr<void, std::function<void(void*)>> at_end(
        &rank_1_is_done, [&](void*) { rank_1_is_done.set_value(); });
    auto memory = context.allocate(1024, "a test");
    ASSERT_TRUE(memory.ok());
    const auto start = std::chrono::steady_clock::now();
    ASSERT_TRUE(group.recv(0, {memory->data(), 1024}, Deadline::after_ms(500)).ok());
    const Status status = group.flush(Deadline::after_ms(2000));
    EXPECT_EQ(status.code(), StatusCode::kDeadlineExceeded) << status.to_string();
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
    EXPECT_FALSE(group.recv(0, {memory->data(), 1024}, Deadline::after_ms(500)).ok());
  });
}

TEST_F(NcclTest, MistakesAreErrors) {
  on_two_gpus([](int rank, const CudaContext& context, NcclDeviceGroup& group) {
    auto memory = context.allocate(kMaxTensor + 1, "a test");
    ASSERT_TRUE(memory.ok());
    const std::span<std::byte> one(memory->data(), 1);
    const Deadline soon = Deadline::after_ms(1000);
    EXPECT_EQ(group.send(rank, one, soon).code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(group.recv(rank, one, soon).code(), StatusCode::kInvalidArgument);
    if (rank == 0) {
      EXPECT_EQ(group.send(1, {memory->data(), kMaxTensor + 1}, soon).code(),
                StatusCode::kTooLarge);
    }
    EXPECT_EQ(group.broadcast(one, 2, soon).code(), StatusCode::kInvalidArgument);
  });
}

}  // namespace
}  // namespace spindle::comm

namespace spindle::worker {
namespace {

TEST(TwoGpus, StagesContinueAsTheReferenceDoes) {
  const auto devices = kernels::list_cuda_devices();
  ASSERT_TRUE(devices.ok()) << devices.status().to_string();
  if (devices->size() < 2) GTEST_SKIP() << "needs two CUDA devices";
  LocalClusterSettings settings;
  settings.n_stages = 2;
  settings.rank.device = ComputeDevice::kCuda;
  settings.rank.max_num_batched_tokens = 1024;
  settings.rank.kv_bytes = {std::int64_t{1} << 30};
  settings.max_num_seqs = 16;
  TestCluster cluster(settings);
  const std::vector<GoldenGreedy> cases = load_golden_greedy(8192);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (const GoldenGreedy& golden : cases) {
    sinks.push_back(cluster.submit(greedy_request(
        golden.prompt, static_cast<int>(golden.output.size()) + (golden.ends_with_eos ? 1 : 0))));
  }
  std::size_t n_same = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const Generated generated = sinks[i]->wait();
    ASSERT_TRUE(generated.status.ok()) << generated.status.to_string();
    n_same += generated.tokens[0] == cases[i].output ? 1 : 0;
  }
  std::printf("%zu of %zu continuations are the reference's\n", n_same, cases.size());
  EXPECT_GE(n_same + 1, cases.size());
}

}  // namespace
}  // namespace spindle::worker
