#include "kvstore/piece_placer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "tests/kvstore/test_pool.h"

namespace spindle::kvstore {
namespace {

constexpr std::uint64_t kPage = 4096;

testing::TestPool make_pool(std::int64_t n_pages) {
  return testing::TestPool(static_cast<std::uint64_t>(n_pages) * kPage, kPage);
}

// Twice the same pool and arena: what the placer does, piece by piece.
TEST(PiecePlacer, PlacesAsPieceByPieceTheLargestFirst) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const auto pool = make_pool(400);
  const auto twin_pool = make_pool(400);
  std::int64_t reserved = 400;
  std::int64_t twin_reserved = 400;
  ASSERT_TRUE(pool->reserve(reserved).ok() && twin_pool->reserve(reserved).ok());
  SequenceArena arena(*pool);
  SequenceArena twin(*twin_pool);
  PiecePlacer placer;
  const std::vector<std::byte> bytes(kPage);
  struct Placed {
    const std::byte* at;
    std::size_t offset;  // in the twin
    std::size_t n_bytes;
  };
  std::vector<Placed> all;
  for (int round = 0; round < 30; ++round) {
    std::vector<std::size_t> sizes;
    for (unsigned i = 0; i < random() % 60; ++i) sizes.push_back(64U << (random() % 6));
    std::vector<const std::byte*> places(sizes.size());
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      placer.add(std::span(bytes).first(sizes[i]), &places[i]);
    }
    placer.add({}, nullptr);
    std::vector<KvCopy> copies;
    ASSERT_TRUE(placer.place(arena, *pool, &reserved, copies));
    ASSERT_EQ(copies.size(), sizes.size());
    std::vector<std::size_t> order(sizes.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::ranges::stable_sort(order, [&](auto a, auto b) { return sizes[a] > sizes[b]; });
    for (std::size_t n = 0; n < order.size(); ++n) {
      const std::size_t i = order[n];
      const std::byte* expected = twin.allocate(sizes[i], &twin_reserved);
      const auto offset = static_cast<std::size_t>(expected - twin_pool->address(0));
      ASSERT_EQ(static_cast<std::size_t>(places[i] - pool->address(0)), offset);
      ASSERT_EQ(copies[n].source, bytes.data());
      ASSERT_EQ(copies[n].target, places[i]);
      ASSERT_EQ(copies[n].n_bytes, sizes[i]);
      all.push_back({places[i], offset, sizes[i]});
    }
    ASSERT_EQ(reserved, twin_reserved);
    // Gaps for the next round.
    std::ranges::shuffle(all, random);
    for (std::size_t n = all.size() / 2; all.size() > n;) {
      arena.release(all.back().at, all.back().n_bytes);
      twin.release(twin_pool->address(0) + all.back().offset, all.back().n_bytes);
      all.pop_back();
    }
  }
}

TEST(PiecePlacer, TakesFromThePoolWhatTheReservationLacks) {
  const auto pool = make_pool(3);
  std::int64_t reserved = 1;
  ASSERT_TRUE(pool->reserve(reserved).ok());
  SequenceArena arena(*pool);
  PiecePlacer placer;
  const std::vector<std::byte> bytes(kPage);
  const std::byte* places[5] = {};
  for (int i = 0; i < 3; ++i) placer.add(bytes, &places[i]);
  std::vector<KvCopy> copies;
  EXPECT_TRUE(placer.place(arena, *pool, &reserved, copies));
  EXPECT_EQ(reserved, 0);
  EXPECT_EQ(pool->n_used(), 3);

  placer.add(bytes, &places[3]);
  copies.clear();
  EXPECT_FALSE(placer.place(arena, *pool, &reserved, copies));
  EXPECT_TRUE(copies.empty());
  EXPECT_EQ(places[3], nullptr);

  // What found no place is forgotten.
  arena.release(places[1], kPage);
  placer.add(std::span(bytes).first(64), &places[4]);
  EXPECT_TRUE(placer.place(arena, *pool, &reserved, copies));
  EXPECT_EQ(copies.size(), 1u);
  EXPECT_NE(places[4], nullptr);
  EXPECT_EQ(places[3], nullptr);
}

}  // namespace
}  // namespace spindle::kvstore
