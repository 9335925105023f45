// HostGroup's own part (framing, collectives) over groups that misbehave.
#include "cluster/comm/host_group.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>

#include "cluster/comm/local_group.h"
#include "tests/cluster/comm/fault_group.h"
#include "tests/cluster/comm/group_checks.h"

namespace spindle::comm {
namespace {

using testing::Fault;
using testing::FaultAction;
using testing::FaultDeviceGroup;
using testing::FaultHostGroup;
using testing::run_ranks;

Deadline soon() { return Deadline::after_ms(5000); }

TEST(HostGroupFaults, ADroppedMessageIsADeadlineAndTheNextOneArrives) {
  LocalCluster cluster(2);
  FaultHostGroup sender(cluster.host(0), {{.action = FaultAction::kDrop, .nth = 2}});
  for (const char* text : {"one", "two", "three"}) {
    EXPECT_TRUE(sender.send(1, Channel::kPlan, text, soon()).ok());
  }
  HostGroup& receiver = cluster.host(1);
  EXPECT_EQ(receiver.recv(0, Channel::kPlan, soon())->bytes, "one");
  EXPECT_EQ(receiver.recv(0, Channel::kPlan, soon())->bytes, "three");
  const Status s = receiver.recv(0, Channel::kPlan, Deadline::after_ms(20)).status();
  EXPECT_EQ(s.to_string(), "DEADLINE_EXCEEDED: rank 1 got no plan message from rank 0 in time");
}

TEST(HostGroupFaults, ADamagedMessageIsRefusedAndNamesItsSender) {
  LocalCluster cluster(2);
  FaultHostGroup sender(cluster.host(1),
                        {{.action = FaultAction::kCorrupt, .channel = Channel::kResult}});
  EXPECT_TRUE(sender.send(0, Channel::kResult, std::string(100, 'r'), soon()).ok());
  EXPECT_TRUE(sender.send(0, Channel::kResult, "good", soon()).ok());
  EXPECT_EQ(cluster.host(0).recv(kAnySource, Channel::kResult, soon()).status().to_string(),
            "INTERNAL: bad frame from rank 1: checksum mismatch");
  EXPECT_EQ(cluster.host(0).try_recv(1, Channel::kResult).value()->bytes, "good");
}

TEST(HostGroupFaults, AFrameOverTheLimitIsRefusedByTheReceiver) {
  LocalCluster cluster(2);
  EXPECT_TRUE(cluster.host(0)
                  .send_frame(1, Channel::kPlan, std::string(kMaxFrameBytes + 1, 'x'), soon())
                  .ok());
  EXPECT_EQ(cluster.host(1).recv(0, Channel::kPlan, soon()).status().code(), StatusCode::kTooLarge);
}

TEST(HostGroupFaults, AFrameOfAnotherEpochIsRefused) {
  LocalCluster cluster(2, {.epoch = 5});
  EXPECT_TRUE(cluster.host(0)
                  .send_frame(1, Channel::kPlan,
                              encode_frame({.channel = Channel::kPlan, .epoch = 4, .source = 0}, {},
                                           "an old plan"),
                              soon())
                  .ok());
  EXPECT_EQ(cluster.host(1).recv(0, Channel::kPlan, soon()).status().message(),
            "bad frame from rank 0: epoch 4, this is 5");
}

TEST(HostGroupFaults, AFailedOrDelayedSendIsReportedToItsCaller) {
  LocalCluster cluster(2);
  FaultHostGroup sender(
      cluster.host(0),
      {{.action = FaultAction::kFail, .nth = 1},
       {.action = FaultAction::kDelay, .nth = 2, .delay = std::chrono::milliseconds(60)}});
  EXPECT_EQ(sender.send(1, Channel::kPlan, "a", soon()).code(), StatusCode::kUnavailable);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_TRUE(sender.send(1, Channel::kPlan, "b", soon()).ok());
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(60));
  EXPECT_EQ(cluster.host(1).recv(0, Channel::kPlan, soon())->bytes, "b");
}

TEST(HostGroupFaults, ADeadRankMakesABarrierFailOnTheOthers) {
  LocalCluster cluster(3);
  FaultHostGroup dead(cluster.host(2), {});
  dead.kill();
  std::vector<Status> statuses(3);
  run_ranks(3, [&](int rank) {
    HostGroup& group = rank == 2 ? static_cast<HostGroup&>(dead) : cluster.host(rank);
    statuses[static_cast<std::size_t>(rank)] = group.barrier(Deadline::after_ms(100));
  });
  EXPECT_EQ(statuses[0].message(),
            "barrier number 1: rank 0 got no collective message from rank 2 in time");
  EXPECT_EQ(statuses[1].code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(statuses[2].code(), StatusCode::kDeadlineExceeded);
}

TEST(HostGroupFaults, DifferentCollectivesAreNotMixedUp) {
  LocalCluster cluster(2);
  std::vector<Status> statuses(2);
  run_ranks(2, [&](int rank) {
    std::string bytes = "b";
    statuses[static_cast<std::size_t>(rank)] =
        rank == 0 ? cluster.host(0).barrier(soon())
                  : cluster.host(1).all_gather("g", soon()).status();
  });
  EXPECT_EQ(statuses[0].to_string(),
            "INTERNAL: ranks are out of step: rank 0 is in barrier number 1, rank 1 in "
            "all_gather number 1");
  EXPECT_EQ(statuses[1].code(), StatusCode::kInternal);
}

TEST(DeviceGroupFaults, ADroppedTensorIsADeadlineThatConsumesNothing) {
  LocalCluster cluster(2);
  FaultDeviceGroup sender(cluster.device(0), {{.action = FaultAction::kDrop, .nth = 1}});
  std::byte out[3] = {};
  const std::byte data[3] = {std::byte{1}, std::byte{2}, std::byte{3}};
  EXPECT_TRUE(sender.send(1, data, soon()).ok());
  EXPECT_EQ(cluster.device(1).recv(0, out, Deadline::after_ms(20)).code(),
            StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(sender.send(1, data, soon()).ok());
  EXPECT_TRUE(cluster.device(1).recv(0, out, soon()).ok());
  EXPECT_EQ(out[2], std::byte{3});
}

}  // namespace
}  // namespace spindle::comm
