// What the store says of its contents, layer by layer. That the sums are those of all heads is in
// check_invariants(), which the other tests call after every change.

#include "kvstore/kv_usage.h"

#include <gtest/gtest.h>

#include <numeric>
#include <set>
#include <string>

#include "tests/kvstore/test_store.h"

namespace spindle::kvstore {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;
using testing::TestBoundary;
using testing::TestStore;

constexpr KvCodec kInt4{KvFormat::kInt4, KvFormat::kInt4};
constexpr KvCodec kLloyd44{KvFormat::kLloyd4, KvFormat::kLloyd4};
constexpr KvCodec kToken{KvFormat::kToken, KvFormat::kToken};

std::uint64_t sum(const FormBytes& bytes) {
  return std::accumulate(bytes.begin(), bytes.end(), std::uint64_t{0});
}

std::uint64_t bytes_of(const KvUse& use, KvForm form) {
  return use.form_bytes[static_cast<std::size_t>(form)];
}

TEST(KvUsage, KindsHaveNamesThatLeadBack) {
  std::set<std::string> names;
  std::set<std::string> groups;
  for (int kind = 0; kind < kPlanKinds; ++kind) {
    const std::string name = plan_kind_name(kind);
    groups.insert(plan_group_name(kind));
    names.insert(name);
    const bool half_token = name.find("token/") != name.npos || name.find("/token") != name.npos;
    EXPECT_EQ(parse_plan_kind_name(name), half_token ? -1 : kind) << name;
  }
  EXPECT_EQ(names.size(), static_cast<std::size_t>(kPlanKinds));
  EXPECT_EQ(groups.size(), 21u);
  EXPECT_EQ(plan_kind_name(plan_kind({})), "FULL raw");
  EXPECT_EQ(plan_kind_name(plan_kind({.mode = KvMode::kStream, .window = 256})), "STREAM raw");
  EXPECT_EQ(plan_kind_name(plan_kind({.codec = {KvFormat::kLloyd3, KvFormat::kLloyd2}})),
            "FULL lloyd3/lloyd2");
  EXPECT_EQ(plan_group_name(plan_kind({.codec = {KvFormat::kLloyd3, KvFormat::kLloyd2}})),
            "full_lloyd");
  EXPECT_EQ(plan_group_name(
                plan_kind({.mode = KvMode::kEvict, .codec = {KvFormat::kLloyd3, KvFormat::kInt4}})),
            "evict_mixed");
  for (const int kind : {-1, kPlanKinds}) {
    EXPECT_EQ(plan_kind_name(kind), "");
    EXPECT_EQ(plan_group_name(kind), "");
  }
  for (const char* name : {"", "FULL", "full raw", "FULL raw ", "FULL nothing", "FULL raw/raw"}) {
    EXPECT_EQ(parse_plan_kind_name(name), -1) << name;
  }
}

TEST(KvUsage, AnEmptyStoreHoldsNothing) {
  TestStore test({});
  const KvUse use = test.store().use();
  ASSERT_EQ(use.layers.size(), 2u);
  for (const KvUse::Layer& layer : use.layers) {
    EXPECT_EQ(layer.used_bytes, 0u);
    EXPECT_EQ(layer.retained_tokens, 0);
    EXPECT_EQ(layer.plan_kind, -1);
  }
  EXPECT_EQ(use.logical_tokens, 0);
  EXPECT_EQ(use.layer_full_bytes, 0u);
  EXPECT_EQ(sum(use.form_bytes), 0u);
}

// Two heads in each of two layers; pages of 4096 bytes hold 32 tokens of a head.
TEST(KvUsage, CountsTokensBytesAndPlans) {
  TestStore test({});
  ASSERT_TRUE(test.open(1, 400, 60).ok());
  ASSERT_TRUE(test.extend(1, 320).ok());
  KvUse use = test.store().use();
  EXPECT_EQ(use.logical_tokens, 320);
  EXPECT_EQ(use.layer_full_bytes, 320u * 2 * 2 * 32 * 2);
  for (const KvUse::Layer& layer : use.layers) {
    EXPECT_EQ(layer.used_bytes, 2u * 10 * 4096);
    EXPECT_EQ(layer.retained_tokens, 320);
    EXPECT_EQ(plan_kind_name(layer.plan_kind), "FULL raw");
  }
  EXPECT_EQ(bytes_of(use, KvForm::kRaw), 4u * 10 * 4096);
  EXPECT_EQ(sum(use.form_bytes), bytes_of(use, KvForm::kRaw));

  // Layer 0 goes to int4, layer 1 streams.
  TestBoundary boundary;
  boundary.heads = {{.codec = kInt4},
                    {.codec = kInt4},
                    {.mode = KvMode::kStream, .window = 64},
                    {.mode = KvMode::kStream, .window = 64}};
  ASSERT_TRUE(test.compress(1, boundary).ok());
  use = test.store().use();
  EXPECT_EQ(use.layers[0].retained_tokens, 320);
  EXPECT_EQ(plan_kind_name(use.layers[0].plan_kind), "FULL int4");
  EXPECT_EQ(plan_kind_name(use.layers[1].plan_kind), "STREAM raw");
  // Four sinks, and a window that begins with a block.
  EXPECT_GE(use.layers[1].retained_tokens, 4 + 64);
  EXPECT_LT(use.layers[1].retained_tokens, 4 + 64 + 32);
  EXPECT_EQ(bytes_of(use, KvForm::kInt4), 2u * 8 * 1280);
  EXPECT_EQ(bytes_of(use, KvForm::kRaw), 2u * (2 * 4096 + 512));
  EXPECT_EQ(bytes_of(use, KvForm::kWindow), use.layers[1].used_bytes);
  EXPECT_EQ(sum(use.form_bytes), use.layers[0].used_bytes + use.layers[1].used_bytes);

  // Generated tokens count as they come, also between pages.
  ASSERT_TRUE(test.extend(1, 3).ok());
  EXPECT_EQ(test.store().use().layers[0].retained_tokens, 323);
  EXPECT_EQ(test.store().use().logical_tokens, 323);
  // A fork counts what it shares once more, as the bytes of the layers do.
  ASSERT_TRUE(test.fork(1, 2, 320, 400, 40).ok());
  EXPECT_EQ(test.store().use().logical_tokens, 643);
  EXPECT_EQ(test.store().use().layers[0].retained_tokens, 643);
  ASSERT_TRUE(test.free(1).ok());
  EXPECT_EQ(test.store().use().logical_tokens, 320);
  ASSERT_TRUE(test.free(2).ok());
  use = test.store().use();
  EXPECT_EQ(use.logical_tokens, 0);
  EXPECT_EQ(use.layers[0].plan_kind, -1);
  EXPECT_EQ(sum(use.form_bytes), 0u);
}

TEST(KvUsage, MeansBelongToLloydAndIdsToTheToken) {
  for (const bool has_table : {true, false}) {
    SCOPED_TRACE(has_table);
    TestStore test({.token_table = has_table});
    ASSERT_TRUE(test.open(1, 400, 60).ok());
    ASSERT_TRUE(test.extend(1, 256).ok());
    TestBoundary boundary;
    boundary.recent = 32;
    boundary.heads.assign(4, {.codec = kLloyd44});
    boundary.heads[0].codec = boundary.heads[1].codec = kToken;
    ASSERT_TRUE(test.compress(1, boundary).ok());
    const KvUse use = test.store().use();
    EXPECT_EQ(plan_kind_name(use.layers[0].plan_kind), "FULL token");
    // Without a table its own ids are a codebook whose entries are ids.
    EXPECT_EQ(bytes_of(use, KvForm::kToken) + bytes_of(use, KvForm::kCodebook),
              use.layers[0].used_bytes);
    EXPECT_GT(bytes_of(use, KvForm::kToken), 0u);
    EXPECT_EQ(bytes_of(use, KvForm::kCodebook) > 0, !has_table);
    EXPECT_EQ(bytes_of(use, KvForm::kLloyd) + bytes_of(use, KvForm::kRaw),
              use.layers[1].used_bytes);
  }
}

}  // namespace
}  // namespace spindle::kvstore
