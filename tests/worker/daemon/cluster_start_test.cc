#include "worker/daemon/cluster_start.h"

#include <gtest/gtest.h>

#include <functional>
#include <thread>
#include <vector>

#include "cluster/comm/local_group.h"

namespace spindle::worker {
namespace {

void on_all_ranks(int n, const std::function<void(comm::HostGroup&)>& body) {
  comm::LocalCluster cluster(n);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n; ++rank) {
    threads.emplace_back([&, rank] { body(cluster.host(rank)); });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(AgreeOnOutcome, AllWellIsWell) {
  on_all_ranks(3, [](comm::HostGroup& host) {
    EXPECT_TRUE(agree_on_outcome(host, ok_status(), Deadline::after_ms(5000)).ok());
  });
}

TEST(AgreeOnOutcome, OneFailureIsEverybodysAndNamesItsRank) {
  on_all_ranks(3, [](comm::HostGroup& host) {
    const Status mine = host.rank() == 1 ? not_found("no such file") : ok_status();
    const Status agreed = agree_on_outcome(host, mine, Deadline::after_ms(5000));
    EXPECT_FALSE(agreed.ok());
    EXPECT_EQ(agreed.message(), "rank 1: no such file");
    EXPECT_EQ(agreed.code(), host.rank() == 1 ? StatusCode::kNotFound : StatusCode::kUnavailable);
  });
}

TEST(AgreeOnOutcome, TheSameMistakeIsSaidOnce) {
  on_all_ranks(4, [](comm::HostGroup& host) {
    const Status agreed =
        agree_on_outcome(host, invalid_argument("bad field"), Deadline::after_ms(5000));
    EXPECT_EQ(agreed.message(), "rank 0: bad field");
  });
}

TEST(AgreeOnOutcome, AMissingRankEndsAtTheDeadline) {
  comm::LocalCluster cluster(2);
  const Status agreed = agree_on_outcome(cluster.host(0), ok_status(), Deadline::after_ms(50));
  EXPECT_EQ(agreed.code(), StatusCode::kDeadlineExceeded);
}

control::StageInfo info_of(int stage) {
  control::StageInfo info;
  info.set_stage(stage);
  info.set_n_layers(stage + 1);
  info.set_kv_page_bytes(2048);
  info.set_kv_capacity_bytes(2048 * 10 + 5);
  return info;
}

TEST(GatherStages, ComesInOrderAndMakesALedger) {
  on_all_ranks(3, [](comm::HostGroup& host) {
    const auto stages = gather_stages(host, info_of(host.rank()), Deadline::after_ms(5000));
    ASSERT_TRUE(stages.ok());
    const coordinator::KvLedger ledger = make_ledger({2, 16, DType::kF16, 32}, *stages);
    ASSERT_EQ(ledger.stages().size(), 3u);
    for (int stage = 0; stage < 3; ++stage) {
      EXPECT_EQ(ledger.stages()[static_cast<std::size_t>(stage)].n_layers, stage + 1);
      EXPECT_EQ(ledger.stages()[static_cast<std::size_t>(stage)].n_pages, 10);
    }
  });
}

TEST(GatherStages, ARankThatCallsItselfAnotherIsAnError) {
  on_all_ranks(2, [](comm::HostGroup& host) {
    EXPECT_EQ(gather_stages(host, info_of(0), Deadline::after_ms(5000)).status().code(),
              StatusCode::kInternal);
  });
}

}  // namespace
}  // namespace spindle::worker
