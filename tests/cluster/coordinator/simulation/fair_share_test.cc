#include "cluster/coordinator/simulation/fair_share.h"

#include <gtest/gtest.h>

#include "cluster/coordinator/simulation/event_queue.h"
#include "cluster/coordinator/simulation/latency_model.h"

namespace spindle::coordinator::simulation {
namespace {

engine::EngineRequest asked(std::size_t n_prompt, std::int32_t priority = 0,
                            std::uint64_t owner = 1) {
  engine::EngineRequest request;
  request.prompt_ids.resize(n_prompt);
  request.priority = priority;
  request.owner = owner;
  return request;
}

TEST(FairShare, WhatIsAheadMayRunThreeTimes) {
  FairShare shares(10);
  shares.arrive(1, asked(50), 100, 5);
  shares.progress(1, 40);
  shares.arrive(2, asked(20), 50, 10);
  EXPECT_EQ(shares.ahead(2, 1000), 60);
  shares.serve(100, 10);  // when it arrived: no part of its wait
  shares.serve(100, 20);
  shares.serve(90, 30);
  shares.serve(1, 40);
  EXPECT_EQ(shares.served(10, 30), 190);
  EXPECT_TRUE(shares.check(2, 30).ok());
  EXPECT_EQ(shares.check(2, 40).code(), StatusCode::kInternal) << "191 > 3 * 60 + 10";
}

TEST(FairShare, NobodyOvertakesWhatIsDue) {
  FairShare shares(0);
  shares.arrive(1, asked(10), 30, 1);  // due after 20 tokens
  shares.serve(19, 2);
  shares.arrive(2, asked(5), 7, 3);
  EXPECT_EQ(shares.ahead(1, 2), 0) << "not here yet";
  EXPECT_EQ(shares.ahead(1, 3), 7);
  shares.serve(1, 4);
  shares.arrive(3, asked(5), 11, 5);
  EXPECT_EQ(shares.ahead(1, 9), 7) << "due: the third comes after it";
  shares.arrive(4, asked(5, 0, 2), 13, 6);
  EXPECT_EQ(shares.ahead(1, 9), 20) << "another owner's turn may come first";
  shares.end(1);
  shares.arrive(5, asked(5), 1, 7);
  EXPECT_EQ(shares.ahead(5, 7), 31);
}

TEST(FairShare, ALaterPriorityIsDueLater) {
  FairShare shares(0);
  shares.arrive(1, asked(10, 1), 30, 1);
  shares.serve(100, 2);
  shares.arrive(2, asked(5), 7, 3);
  EXPECT_EQ(shares.ahead(1, 3), 7);
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
