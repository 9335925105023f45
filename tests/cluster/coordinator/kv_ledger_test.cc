#include "cluster/coordinator/kv_ledger.h"

#include <gtest/gtest.h>

namespace spindle::coordinator {
namespace {

constexpr kvstore::KvShape kShape{1, 16, DType::kF16, 32};

KvDemand plain(std::int64_t prompt, std::int64_t max_tokens, int n_choices = 1) {
  return {.prompt_tokens = prompt, .max_tokens = max_tokens, .n_choices = n_choices};
}
KvDemand compressing(std::int64_t prompt, std::int64_t max_tokens, int n_choices = 1) {
  return {.prompt_tokens = prompt,
          .max_tokens = max_tokens,
          .n_choices = n_choices,
          .compresses = true,
          .n_boundaries = 1,
          .tail_tokens = 64};
}

TEST(KvLedger, TheTightestStageDecides) {
  KvLedger ledger(kShape, {{2, 100}, {3, 12}});
  EXPECT_TRUE(ledger.fits_alone(plain(10, 128)));   // 4 pages x 3 layers
  EXPECT_FALSE(ledger.fits_alone(plain(10, 129)));  // 5 x 3
  EXPECT_TRUE(ledger.try_commit(1, plain(10, 64)));
  EXPECT_EQ(ledger.committed_pages(0), 4);
  EXPECT_EQ(ledger.committed_pages(1), 6);
  EXPECT_FALSE(ledger.try_commit(2, plain(10, 96)));
  EXPECT_EQ(ledger.committed_pages(0), 4);  // nothing changed
  EXPECT_FALSE(ledger.fits(plain(10, 96), {0, 2}));
  EXPECT_TRUE(ledger.fits(plain(10, 96), {0, 3}));
  EXPECT_TRUE(ledger.try_commit(3, plain(10, 64)));
  ledger.release_choice(1, 0);
  ledger.release_choice(3, 0);
  EXPECT_EQ(ledger.committed_pages(0), 0);
  EXPECT_EQ(ledger.committed_pages(1), 0);
}

TEST(KvLedger, ChoicesShareTheFullPagesOfThePrompt) {
  KvLedger ledger(kShape, {{1, 100}});
  // 40 prompt tokens: one full page is shared; 70 tokens at most: two more pages for each choice.
  ASSERT_TRUE(ledger.try_commit(1, plain(40, 70, 3)));
  EXPECT_EQ(ledger.committed_pages(0), 1 + 3 * 2);
  ledger.release_choice(1, 0);
  EXPECT_EQ(ledger.committed_pages(0), 1 + 2 * 2);
  ledger.release_choice(1, 2);
  ledger.release_choice(1, 1);
  EXPECT_EQ(ledger.committed_pages(0), 0);
}

TEST(KvLedger, ACompressingRequestShrinksToWhatItsBoundariesReport) {
  KvLedger ledger(kShape, {{2, 1000}, {1, 1000}});
  const KvDemand demand = compressing(320, 400);
  ASSERT_TRUE(ledger.try_commit(1, demand));
  // 10 + 3 pages a table; 128 of 2048 bytes a page for positions; 3 for tails and the last block;
  // packing.
  const std::int64_t stage0 = 2 * 13 + 2 + 2 * 3 + kvstore::kPackingPages;
  EXPECT_EQ(ledger.committed_pages(0), stage0);
  EXPECT_EQ(ledger.reserve_pages(demand, 0, false), stage0);
  ledger.update_choice(1, 0, 0, 12, true);
  EXPECT_EQ(ledger.committed_pages(0), 12);
  EXPECT_GT(ledger.committed_pages(1), 12);
  ledger.update_choice(1, 0, 0, 15, false);  // it can only shrink
  EXPECT_EQ(ledger.committed_pages(0), 12);
  ledger.update_choice(1, 0, 1, 7, true);
  ledger.update_choice(9, 0, 1, 7, true);  // nobody's
  EXPECT_EQ(ledger.committed_pages(1), 7);
  ledger.release_choice(1, 0);
  EXPECT_EQ(ledger.committed_pages(0), 0);
  EXPECT_EQ(ledger.committed_pages(1), 0);
}

TEST(KvLedger, WhatForksShareStaysUntilTheLastOneEnds) {
  KvLedger ledger(kShape, {{1, 1000}});
  const KvDemand demand = compressing(320, 400, 3);
  ASSERT_TRUE(ledger.try_commit(1, demand));
  const std::int64_t fork = ledger.reserve_pages(demand, 0, true);
  EXPECT_EQ(ledger.committed_pages(0), ledger.reserve_pages(demand, 0, false) + 2 * fork);
  ledger.update_choice(1, 0, 0, 10, true);
  EXPECT_EQ(ledger.committed_pages(0), 10 + 2 * fork);
  // The first choice's later boundaries, and its end, leave what the others hold.
  ledger.update_choice(1, 0, 0, 4, false);
  EXPECT_EQ(ledger.committed_pages(0), 10 + 2 * fork);
  ledger.release_choice(1, 0);
  EXPECT_EQ(ledger.committed_pages(0), 10 + 2 * fork);
  ledger.update_choice(1, 2, 0, 3, false);
  EXPECT_EQ(ledger.committed_pages(0), 10 + fork + 3);
  ledger.release_choice(1, 1);
  EXPECT_EQ(ledger.committed_pages(0), 10 + 3);
  ledger.release_choice(1, 2);
  EXPECT_EQ(ledger.committed_pages(0), 0);
}

TEST(KvLedger, AKeptSequenceIsCountedOnceWhileItIsContinued) {
  KvLedger ledger(kShape, {{1, 100}});
  ASSERT_TRUE(ledger.try_commit(1, plain(100, 150)));  // 5 pages
  ledger.keep(1, 77);
  EXPECT_EQ(ledger.committed_pages(0), 5);
  EXPECT_EQ(ledger.kept_pages(77), std::vector<std::int64_t>{5});
  EXPECT_EQ(ledger.releasable_pages(77), std::vector<std::int64_t>{5});
  EXPECT_TRUE(ledger.kept_pages(78).empty());
  // 130 tokens of it are 4 full pages; the longer form takes 8 in all.
  KvDemand demand = plain(200, 250);
  demand.cached_tokens = 130;
  EXPECT_EQ(ledger.reserve_pages(demand, 0, false), 8 - 4);
  ASSERT_TRUE(ledger.try_commit(2, demand, 77));
  EXPECT_EQ(ledger.committed_pages(0), 5 + 4);
  EXPECT_TRUE(ledger.releasable_pages(77).empty());
  // Given up while it is continued: its pages stay until the request ends.
  ledger.release_kept(77);
  EXPECT_EQ(ledger.committed_pages(0), 9);
  // The continuation is kept: alone it has 8.
  ledger.keep(2, 78);
  EXPECT_EQ(ledger.committed_pages(0), 8);
  ledger.release_kept(78);
  EXPECT_EQ(ledger.committed_pages(0), 0);
}

TEST(KvLedger, AContinuationThatEndsLeavesTheKeptSequence) {
  KvLedger ledger(kShape, {{1, 100}});
  ASSERT_TRUE(ledger.try_commit(1, plain(100, 150)));
  ledger.keep(1, 77);
  KvDemand demand = compressing(200, 250);
  demand.cached_tokens = 100;
  ASSERT_TRUE(ledger.try_commit(2, demand, 77));
  ledger.release_choice(2, 0);
  EXPECT_EQ(ledger.committed_pages(0), 5);
  ASSERT_TRUE(ledger.try_commit(3, demand, 77));
  ledger.update_choice(3, 0, 0, 3, true);
  ledger.keep(3, 79);
  EXPECT_EQ(ledger.kept_pages(79), std::vector<std::int64_t>{3});
  EXPECT_EQ(ledger.committed_pages(0), 5 + 3);
  ledger.release_kept(77);
  ledger.release_kept(79);
  EXPECT_EQ(ledger.committed_pages(0), 0);
}

}  // namespace
}  // namespace spindle::coordinator
