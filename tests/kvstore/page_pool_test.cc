#include "kvstore/page_pool.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <set>

#include "tests/kvstore/test_pool.h"

namespace spindle::kvstore {
namespace {

testing::TestPool make_pool(std::uint64_t budget, std::uint64_t page) { return {budget, page}; }

TEST(PagePool, CutsTheBudgetIntoWholePages) {
  const auto pool = make_pool(1000, 256);
  EXPECT_EQ(pool->n_pages(), 3);
  EXPECT_EQ(pool->n_free(), 3);
  EXPECT_EQ(pool->n_used(), 0);
}

TEST(PagePool, RefusesABudgetWithoutAPage) {
  EXPECT_EQ(PagePool::create(nullptr, 255, 256).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(PagePool::create(nullptr, 1, 0).status().code(), StatusCode::kInvalidArgument);
}

TEST(PagePool, RefusesMorePagesThanNumbers) {
  EXPECT_EQ(PagePool::create(nullptr, 1ULL << 40, 64).status().code(),
            StatusCode::kInvalidArgument);
}

TEST(PagePool, AReservationIsAPromise) {
  const auto pool = make_pool(1024, 256);
  ASSERT_TRUE(pool->reserve(3).ok());
  EXPECT_EQ(pool->reserve(2).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(pool->n_reserved(), 3);
  const std::set<PageId> pages = {pool->allocate(), pool->allocate(), pool->allocate()};
  EXPECT_EQ(pages.size(), 3u);
  EXPECT_EQ(pool->n_reserved(), 0);
  EXPECT_EQ(pool->n_used(), 3);
  EXPECT_EQ(pool->peak_used(), 3);
  for (const PageId page : pages) EXPECT_TRUE(pool->release(page));
  EXPECT_EQ(pool->n_used(), 0);
  EXPECT_EQ(pool->peak_used(), 3);
  pool->check_invariants();
}

TEST(PagePool, ASharedPageIsFreeAfterItsLastOwner) {
  const auto pool = make_pool(512, 256);
  ASSERT_TRUE(pool->reserve(1).ok());
  const PageId page = pool->allocate();
  pool->add_reference(page);
  EXPECT_FALSE(pool->release(page));
  EXPECT_EQ(pool->n_used(), 1);
  EXPECT_TRUE(pool->release(page));
  EXPECT_EQ(pool->n_free(), 2);
}

TEST(PagePool, PagesDoNotOverlapAndAreAligned) {
  const auto pool = make_pool(64 * 4096, 4096);
  ASSERT_TRUE(pool->reserve(64).ok());
  for (int i = 0; i < 64; ++i) {
    const PageId page = pool->allocate();
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pool->address(page)) % 64, 0u);
    std::memset(pool->address(page), static_cast<int>(page), 4096);
  }
  for (PageId page = 0; page < 64; ++page) {
    EXPECT_EQ(pool->address(page)[0], static_cast<std::byte>(page));
    EXPECT_EQ(pool->address(page)[4095], static_cast<std::byte>(page));
  }
}

TEST(PagePoolDeathTest, MisuseIsABug) {
  const auto pool = make_pool(512, 256);
  EXPECT_DEATH(pool->allocate(), "not reserved");
  EXPECT_DEATH(pool->release(0), "free page");
  EXPECT_DEATH(pool->unreserve(1), "given back");
}

TEST(PagePool, RandomOperationsKeepTheInvariants) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const auto pool = make_pool(100 * 64, 64);
  std::vector<PageId> held;
  std::int64_t reserved = 0;
  for (int i = 0; i < 20000; ++i) {
    switch (random() % 5) {
      case 0: {
        const auto n = static_cast<std::int64_t>(random() % 20);
        if (pool->reserve(n).ok()) reserved += n;
        break;
      }
      case 1:
        if (reserved > 0) {
          pool->unreserve(1);
          --reserved;
        }
        break;
      case 2:
        if (reserved > 0) {
          held.push_back(pool->allocate());
          --reserved;
        }
        break;
      case 3:
        if (!held.empty()) {
          const PageId page = held[random() % held.size()];
          pool->add_reference(page);
          held.push_back(page);
        }
        break;
      default:
        if (!held.empty()) {
          std::swap(held[random() % held.size()], held.back());
          pool->release(held.back());
          held.pop_back();
        }
    }
    ASSERT_EQ(pool->n_free() + pool->n_used(), pool->n_pages());
    ASSERT_EQ(pool->n_used(), static_cast<std::int64_t>(std::set(held.begin(), held.end()).size()));
    if (i % 500 == 0) pool->check_invariants();
  }
}

}  // namespace
}  // namespace spindle::kvstore
