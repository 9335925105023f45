#include "worker/orders/order_channel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cluster/comm/local_group.h"

namespace spindle::worker {
namespace {

control::Order level(const std::string& name) {
  control::Order order;
  order.set_log_level(name);
  return order;
}

Deadline soon() { return Deadline::after_ms(10000); }

TEST(OrderChannel, EveryRankCarriesAnOrderOutAndReplies) {
  comm::LocalCluster cluster(3);
  std::vector<std::string> heard(3);
  const auto handler = [&heard](int rank) {
    return [&heard, rank](const control::Order& order) {
      heard[static_cast<std::size_t>(rank)] += order.log_level() + ";";
      control::OrderReply reply;
      reply.set_clock_ns(100 + rank);
      return reply;
    };
  };
  {
    OrderServer one(cluster.host(1), handler(1));
    OrderServer two(cluster.host(2), handler(2));
    OrderClient client(cluster.host(0), handler(0));
    for (int rank = 0; rank < 3; ++rank) {
      const auto reply = client.ask(rank, level("a"), soon());
      ASSERT_TRUE(reply.ok()) << reply.status().to_string();
      EXPECT_EQ(reply->clock_ns(), 100 + rank);
    }
    EXPECT_TRUE(client.ask_all(level("b"), soon()).ok());
  }
  EXPECT_EQ(heard, (std::vector<std::string>{"a;b;", "a;b;", "a;b;"}));
}

TEST(OrderChannel, WhatARankCannotDoIsAnErrorThatNamesIt) {
  comm::LocalCluster cluster(2);
  OrderServer one(cluster.host(1), [](const control::Order&) {
    control::OrderReply reply;
    reply.set_error("it does not want to");
    return reply;
  });
  OrderClient client(cluster.host(0), [](const control::Order&) { return control::OrderReply(); });
  const Status status = client.ask_all(level("a"), soon());
  EXPECT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_EQ(status.message(), "rank 1: it does not want to");
}

TEST(OrderChannel, AReplyThatComesTooLateIsNotTakenForTheNextOne) {
  comm::LocalCluster cluster(2);
  std::atomic<int> n_orders{0};
  OrderServer one(cluster.host(1), [&n_orders](const control::Order& order) {
    if (++n_orders == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
    control::OrderReply reply;
    reply.set_n_kept(order.fetch_records().first());
    return reply;
  });
  OrderClient client(cluster.host(0), [](const control::Order&) { return control::OrderReply(); });
  control::Order fetch;
  fetch.mutable_fetch_records()->set_first(7);
  EXPECT_EQ(client.ask(1, fetch, Deadline::after_ms(20)).status().code(),
            StatusCode::kDeadlineExceeded);
  fetch.mutable_fetch_records()->set_first(8);
  const auto reply = client.ask(1, fetch, soon());
  ASSERT_TRUE(reply.ok()) << reply.status().to_string();
  EXPECT_EQ(reply->n_kept(), 8U);
}

TEST(OrderChannel, ARankThatIsGoneIsADeadlineAndBytesThatAreNoOrderAreDropped) {
  comm::LocalCluster cluster(2);
  OrderClient client(cluster.host(0), [](const control::Order&) { return control::OrderReply(); });
  EXPECT_EQ(client.ask(1, level("a"), Deadline::after_ms(20)).status().code(),
            StatusCode::kDeadlineExceeded);
  ASSERT_TRUE(cluster.host(0).send(1, comm::Channel::kOrder, "\xff\xff\xff", soon()).ok());
  OrderServer late(cluster.host(1), [](const control::Order&) { return control::OrderReply(); });
  EXPECT_TRUE(client.ask(1, level("b"), soon()).ok());
}

TEST(OrderChannel, AServerLeavesWhenItsGroupIsShutDown) {
  comm::LocalCluster cluster(2);
  auto server = std::make_unique<OrderServer>(
      cluster.host(1), [](const control::Order&) { return control::OrderReply(); });
  cluster.host(1).shutdown("the end");
  server.reset();  // must not hang
}

}  // namespace
}  // namespace spindle::worker
