#include "cluster/coordinator/kv_ledger.h"

#include <gtest/gtest.h>

namespace spindle::coordinator {
namespace {

constexpr kvstore::KvShape kShape{1, 16, DType::kF16, 32};

TEST(KvLedger, TheTightestStageDecides) {
  KvLedger ledger(kShape, {{2, 100}, {3, 12}});
  EXPECT_TRUE(ledger.fits_alone({10, 128, 1}));   // 4 pages x 3 layers
  EXPECT_FALSE(ledger.fits_alone({10, 129, 1}));  // 5 x 3
  EXPECT_TRUE(ledger.try_commit(1, {10, 64, 1}));
  EXPECT_EQ(ledger.committed_pages(0), 4);
  EXPECT_EQ(ledger.committed_pages(1), 6);
  EXPECT_FALSE(ledger.try_commit(2, {10, 96, 1}));
  EXPECT_EQ(ledger.committed_pages(0), 4);  // nothing changed
  EXPECT_TRUE(ledger.try_commit(3, {10, 64, 1}));
  ledger.release_choice(1);
  ledger.release_choice(3);
  EXPECT_EQ(ledger.committed_pages(0), 0);
  EXPECT_EQ(ledger.committed_pages(1), 0);
}

TEST(KvLedger, ChoicesShareTheFullPagesOfThePrompt) {
  KvLedger ledger(kShape, {{1, 100}});
  // 40 prompt tokens: one full page is shared; 70 tokens at most: two more pages for each choice.
  ASSERT_TRUE(ledger.try_commit(1, {40, 70, 3}));
  EXPECT_EQ(ledger.committed_pages(0), 1 + 3 * 2);
  ledger.release_choice(1);
  EXPECT_EQ(ledger.committed_pages(0), 1 + 2 * 2);
  ledger.release_choice(1);
  ledger.release_choice(1);
  EXPECT_EQ(ledger.committed_pages(0), 0);
}

}  // namespace
}  // namespace spindle::coordinator
