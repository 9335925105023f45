#include "cluster/coordinator/budget_messages.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

namespace spindle::coordinator {
namespace {

constexpr BudgetReport kReport{.stage = 3,
                               .n_stages = 256,
                               .step = 0x0102030405060708,
                               .epoch = 9,
                               .capacity_bytes = 1'000'000'000'000,
                               .used_bytes = 600'000'000'000,
                               .reserved_bytes = 400'000'000'000,
                               .planned_bytes = ~std::uint64_t{0},
                               .kept_bytes = 1};

BudgetPlan some_plan() {
  BudgetPlan plan{.epoch = 7, .effective_step = 12345, .n_stages = 3};
  plan.reason = BudgetReason::kRelief;
  plan.levels = {0, 63, 5};
  return plan;
}

TEST(BudgetMessages, RoundTrips) {
  const auto report = decode_budget_report(encode(kReport));
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  EXPECT_EQ(*report, kReport);
  const auto plan = decode_budget_plan(encode(some_plan()));
  ASSERT_TRUE(plan.ok()) << plan.status().to_string();
  EXPECT_EQ(*plan, some_plan());
  BudgetPlan widest{.epoch = 1, .n_stages = kMaxBudgetStages};
  widest.levels.fill(kMaxBudgetLevels - 1);
  ASSERT_TRUE(decode_budget_plan(encode(widest)).ok());
  EXPECT_EQ(*decode_budget_plan(encode(widest)), widest);
}

// Ranks of one build must agree on every byte.
TEST(BudgetMessages, AreLittleEndianInOrder) {
  const auto bytes = encode(kReport);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes.data()), 4), "SPBR");
  const auto at = [&](std::size_t i) { return std::to_integer<int>(bytes[i]); };
  EXPECT_EQ(at(4), 1);   // version
  EXPECT_EQ(at(8), 3);   // stage
  EXPECT_EQ(at(13), 1);  // 256 stages
  EXPECT_EQ(at(16), 8);  // step
  EXPECT_EQ(at(23), 1);
  EXPECT_EQ(at(24), 9);  // epoch
  EXPECT_EQ(bytes.size(), 80u);
  EXPECT_EQ(encode(some_plan()).size(), 293u);
}

template <typename Bytes, typename Decode>
void expect_damage_refused(const Bytes& good, const Decode& decode) {
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      Bytes bad = good;
      bad[i] ^= static_cast<std::byte>(1 << bit);
      EXPECT_EQ(decode(bad).status().code(), StatusCode::kInvalidArgument) << i << " " << bit;
    }
  }
  std::vector<std::byte> longer(good.begin(), good.end());
  longer.push_back(std::byte{0});
  for (std::size_t size = 0; size <= longer.size(); ++size) {
    EXPECT_EQ(decode(std::span(longer).first(size)).ok(), size == good.size()) << size;
  }
}

TEST(BudgetMessages, DamageIsRefused) {
  expect_damage_refused(encode(kReport),
                        [](std::span<const std::byte> b) { return decode_budget_report(b); });
  expect_damage_refused(encode(some_plan()),
                        [](std::span<const std::byte> b) { return decode_budget_plan(b); });
}

TEST(BudgetMessages, ForeignBytesAreRefused) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  std::array<std::byte, kBudgetReportBytes> report;
  std::array<std::byte, kBudgetPlanBytes> plan;
  for (int i = 0; i < 1000; ++i) {
    for (std::byte& byte : report) byte = static_cast<std::byte>(random());
    for (std::byte& byte : plan) byte = static_cast<std::byte>(random());
    EXPECT_FALSE(decode_budget_report(report).ok());
    EXPECT_FALSE(decode_budget_plan(plan).ok());
  }
  auto other_version = encode(kReport);
  other_version[4] = std::byte{2};
  EXPECT_NE(decode_budget_report(other_version).status().message().find("version 2"),
            std::string::npos);
}

TEST(BudgetMessages, FiguresThatCannotBeAreRefused) {
  const auto refused = [](auto change) {
    BudgetReport report = kReport;
    change(report);
    return decode_budget_report(encode(report)).status().code() == StatusCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused([](BudgetReport& r) { r.stage = 256; }));
  EXPECT_TRUE(refused([](BudgetReport& r) { r.n_stages = 3; }));
  EXPECT_TRUE(refused([](BudgetReport& r) { r.n_stages = 257; }));
  EXPECT_TRUE(refused([](BudgetReport& r) { r.used_bytes = r.capacity_bytes + 1; }));
  EXPECT_TRUE(refused([](BudgetReport& r) { ++r.reserved_bytes; }));
  EXPECT_TRUE(refused([](BudgetReport& r) { r.reserved_bytes = ~std::uint64_t{0}; }));
  const auto plan_refused = [](auto change) {
    BudgetPlan plan = some_plan();
    change(plan);
    return decode_budget_plan(encode(plan)).status().code() == StatusCode::kInvalidArgument;
  };
  EXPECT_TRUE(plan_refused([](BudgetPlan& p) { p.n_stages = 0; }));
  EXPECT_TRUE(plan_refused([](BudgetPlan& p) { p.n_stages = 257; }));
  EXPECT_TRUE(plan_refused([](BudgetPlan& p) { p.reason = static_cast<BudgetReason>(2); }));
  EXPECT_TRUE(plan_refused([](BudgetPlan& p) { p.levels[1] = kMaxBudgetLevels; }));
  EXPECT_TRUE(plan_refused([](BudgetPlan& p) { p.levels[3] = 1; }));
}

}  // namespace
}  // namespace spindle::coordinator
