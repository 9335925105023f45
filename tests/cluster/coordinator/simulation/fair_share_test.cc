#include "cluster/coordinator/simulation/fair_share.h"

#include <gtest/gtest.h>

#include "cluster/coordinator/simulation/event_queue.h"
#include "cluster/coordinator/simulation/latency_model.h"

namespace spindle::coordinator::simulation {
namespace {

TEST(FairShare, WhatIsAheadMayRunThreeTimes) {
  FairShare shares(10);
  shares.arrive(1, 0, 100, 5);
  shares.progress(1, 40);
  shares.arrive(2, 0, 50, 10);
  EXPECT_EQ(shares.ahead(2, 1000), 60);
  shares.serve(100, 10);  // when it arrived: no part of its wait
  shares.serve(100, 20);
  shares.serve(90, 30);
  shares.serve(1, 40);
  EXPECT_EQ(shares.served(10, 30), 190);
  EXPECT_TRUE(shares.check(2, 30).ok());
  EXPECT_EQ(shares.check(2, 40).code(), StatusCode::kInternal) << "191 > 3 * 60 + 10";
}

TEST(FairShare, HigherPrioritiesMayOvertake) {
  FairShare shares(0);
  shares.arrive(1, 0, 100, 1);
  shares.arrive(2, 1, 100, 2);
  EXPECT_EQ(shares.ahead(2, 9), 0) << "what is running has a lower priority";
  shares.arrive(3, 0, 10, 3);
  shares.arrive(4, 2, 7, 4);
  EXPECT_EQ(shares.ahead(3, 3), 200);
  EXPECT_EQ(shares.ahead(3, 4), 207);
  EXPECT_EQ(shares.ahead(4, 9), 0);
  shares.end(1);
  shares.arrive(5, 0, 10, 5);
  EXPECT_EQ(shares.ahead(5, 5), 117);
}

TEST(EventQueue, TimesThenOrder) {
  EventQueue queue;
  std::vector<int> seen;
  queue.at(30, [&] { seen.push_back(3); });
  queue.at(10, [&] {
    seen.push_back(1);
    queue.at(2, [&] { seen.push_back(2); });  // has passed: now
  });
  queue.at(30, [&] { seen.push_back(4); });
  while (queue.step()) {
  }
  EXPECT_EQ(seen, (std::vector<int>{1, 2, 3, 4}));
  EXPECT_EQ(queue.now_us(), 30);
}

TEST(LatencyModel, TheLargerOfReadingAndArithmetic) {
  const LatencyModel model{.launch = 10,
                           .weights = 100,
                           .token = 2,
                           .logits = 5,
                           .kv_page = 0.5,
                           .pair = 0.1,
                           .boundary_token = 1};
  EXPECT_EQ(step_us(model, {}), 10);
  EXPECT_EQ(step_us(model, {.n_tokens = 1, .n_sampled = 1, .kv_pages = 40}), 10 + 100 + 20 + 5);
  EXPECT_EQ(step_us(model, {.n_tokens = 80, .kv_pages = 40, .attention_pairs = 300}),
            10 + 160 + 30);
  EXPECT_EQ(step_us(model, {.boundary_tokens = 7}), 17);
}

}  // namespace
}  // namespace spindle::coordinator::simulation
