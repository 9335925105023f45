#include "kvstore/sequence_arena.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>

#include "tests/kvstore/test_pool.h"

namespace spindle::kvstore {
namespace {

constexpr std::uint64_t kPage = 4096;

testing::TestPool make_pool(std::int64_t n_pages) {
  testing::TestPool pool(static_cast<std::uint64_t>(n_pages) * kPage, kPage);
  EXPECT_TRUE(pool->reserve(n_pages).ok());
  return pool;
}

TEST(SequenceArena, PiecesAreAlignedAndRoundedUp) {
  const auto pool = make_pool(2);
  std::int64_t reserved = 2;
  SequenceArena arena(*pool);
  for (const std::uint64_t bytes : {1U, 63U, 64U, 65U, 130U}) {
    const std::byte* piece = arena.allocate(bytes, &reserved);
    ASSERT_NE(piece, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(piece) % 64, 0u);
  }
  EXPECT_EQ(arena.live_bytes(), 64u + 64 + 64 + 128 + 192);
  EXPECT_EQ(arena.n_pages(), 1);
}

TEST(SequenceArena, LargestFirstLeavesNoGap) {
  const auto pool = make_pool(3);
  std::int64_t reserved = 3;
  SequenceArena arena(*pool);
  // 2048 + 3 x 512 + 2 x 256 = 4096, twice: two full pages.
  for (const std::uint64_t bytes :
       {2048U, 2048U, 512U, 512U, 512U, 512U, 512U, 512U, 256U, 256U, 256U, 256U}) {
    ASSERT_NE(arena.allocate(bytes, &reserved), nullptr);
  }
  EXPECT_EQ(arena.n_pages(), 2);
  EXPECT_EQ(arena.live_bytes(), 2 * kPage);
  EXPECT_EQ(reserved, 1);
}

TEST(SequenceArena, APageGoesWithItsLastPiece) {
  const auto pool = make_pool(4);
  std::int64_t reserved = 4;
  SequenceArena arena(*pool);
  const std::byte* a = arena.allocate(3072, &reserved);
  const std::byte* b = arena.allocate(1024, &reserved);
  const std::byte* c = arena.allocate(2048, &reserved);
  EXPECT_EQ(pool->n_used(), 2);
  EXPECT_EQ(arena.release(a, 3072), 0);
  EXPECT_EQ(arena.release(b, 1024), 1);
  EXPECT_EQ(pool->n_used(), 1);
  EXPECT_EQ(arena.n_pages(), 1);
  EXPECT_EQ(arena.release(c, 2048), 1);
  EXPECT_EQ(arena.n_pages(), 0);
  EXPECT_EQ(arena.live_bytes(), 0u);
}

TEST(SequenceArena, GapsAreReusedAndNeighboursBecomeOne) {
  const auto pool = make_pool(2);
  std::int64_t reserved = 2;
  SequenceArena arena(*pool);
  std::vector<const std::byte*> pieces;
  for (int i = 0; i < 8; ++i) pieces.push_back(arena.allocate(512, &reserved));
  arena.release(pieces[2], 512);
  EXPECT_EQ(arena.allocate(512, &reserved), pieces[2]);
  // 512-byte neighbours make room for 1536 bytes, released in any order.
  arena.release(pieces[4], 512);
  arena.release(pieces[6], 512);
  arena.release(pieces[5], 512);
  EXPECT_EQ(arena.allocate(1536, &reserved), pieces[4]);
  EXPECT_EQ(arena.n_pages(), 1);
  EXPECT_EQ(arena.live_bytes(), kPage);
}

TEST(SequenceArena, WithoutAReservationItAnswersNull) {
  const auto pool = make_pool(2);
  std::int64_t reserved = 1;
  SequenceArena arena(*pool);
  ASSERT_NE(arena.allocate(3000, &reserved), nullptr);
  EXPECT_EQ(reserved, 0);
  EXPECT_EQ(arena.allocate(2000, &reserved), nullptr);
  EXPECT_EQ(arena.live_bytes(), 3008u);
  EXPECT_NE(arena.allocate(1000, &reserved), nullptr);  // the gap needs none
  EXPECT_EQ(pool->n_used(), 1);
}

TEST(SequenceArena, AForkSharesAndNeitherWritesIntoSharedPages) {
  const auto pool = make_pool(6);
  std::int64_t reserved = 6;
  SequenceArena parent(*pool);
  std::byte* shared = parent.allocate(1024, &reserved);
  std::fill_n(shared, 1024, std::byte{7});
  SequenceArena child = parent.fork();
  EXPECT_EQ(pool->n_used(), 1);
  EXPECT_EQ(child.live_bytes(), 1024u);
  // Three quarters of the page are free, and neither takes them.
  std::byte* of_parent = parent.allocate(512, &reserved);
  std::byte* of_child = child.allocate(512, &reserved);
  EXPECT_EQ(pool->n_used(), 3);
  std::fill_n(of_parent, 512, std::byte{1});
  std::fill_n(of_child, 512, std::byte{2});
  EXPECT_TRUE(std::all_of(shared, shared + 1024, [](std::byte b) { return b == std::byte{7}; }));
  // The shared piece outlives its first owner.
  EXPECT_EQ(parent.release(shared, 1024), 0);
  EXPECT_EQ(parent.n_pages(), 1);
  EXPECT_EQ(shared[0], std::byte{7});
  EXPECT_EQ(child.release(shared, 1024), 1);
  EXPECT_EQ(parent.clear(), 1);
  EXPECT_EQ(child.clear(), 1);
  EXPECT_EQ(pool->n_used(), 0);
}

TEST(SequenceArena, ReleasesInASharedPageMakeNoGapInIt) {
  const auto pool = make_pool(4);
  std::int64_t reserved = 4;
  SequenceArena parent(*pool);
  const std::byte* a = parent.allocate(1024, &reserved);
  const std::byte* b = parent.allocate(1024, &reserved);
  SequenceArena child = parent.fork();
  EXPECT_EQ(parent.release(a, 1024), 0);
  const std::byte* next = parent.allocate(1024, &reserved);
  EXPECT_TRUE(next < b || next >= b + 3072) << "a piece in a shared page";
  // Alone again, the child may use what it releases.
  parent.clear();
  EXPECT_EQ(child.release(b, 1024), 0);
  EXPECT_EQ(child.allocate(1024, &reserved), b);
}

TEST(SequenceArena, ATrialTakesThePagesThatTheArenaWould) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const auto pool = make_pool(500);
  std::int64_t reserved = 500;
  SequenceArena arena(*pool);
  for (int round = 0; round < 40; ++round) {
    std::vector<std::uint64_t> sizes;
    for (unsigned i = 0; i < random() % 30; ++i)
      sizes.push_back(64 * (1 + random() % (round % 2 == 0 ? 32 : 4)));
    std::sort(sizes.begin(), sizes.end(), std::greater<>());
    SequenceArena::Trial trial = arena.trial();
    std::int64_t expected = 0;
    for (const std::uint64_t size : sizes) expected = trial.allocate(size);
    // The same in runs of equal sizes.
    SequenceArena::Trial runs = arena.trial();
    std::int64_t in_runs = 0;
    for (std::size_t i = 0, n = 0; i < sizes.size(); i += n) {
      n = static_cast<std::size_t>(std::count(sizes.begin(), sizes.end(), sizes[i]));
      in_runs = runs.allocate(sizes[i], static_cast<std::int64_t>(n));
    }
    ASSERT_EQ(in_runs, expected);
    const std::int64_t before = arena.n_pages();
    for (const std::uint64_t size : sizes) ASSERT_NE(arena.allocate(size, &reserved), nullptr);
    ASSERT_EQ(arena.n_pages() - before, expected);
  }
}

// Pieces of several arenas and their forks against a map of what was written.
class RandomArenas {
 public:
  explicit RandomArenas(unsigned seed) : random_(seed) {}

  void run() {
    arenas_.emplace_back(*pool_);
    owned_.emplace_back();
    for (int i = 0; i < 4000; ++i) {
      act();
      check();
      if (::testing::Test::HasFatalFailure()) return;
    }
    for (SequenceArena& arena : arenas_) arena.clear();
    EXPECT_EQ(pool_->n_used(), 0);
    pool_->unreserve(reserved_);
    EXPECT_EQ(pool_->n_reserved(), 0);
  }

 private:
  struct Piece {
    std::byte* data;
    std::uint64_t bytes;
    std::byte fill;
  };

  void act() {
    const std::size_t index = random_() % arenas_.size();
    SequenceArena& arena = arenas_[index];
    std::vector<Piece>& owned = owned_[index];
    switch (random_() % 8) {
      case 0:
        if (arenas_.size() < 5) {
          SequenceArena child = arena.fork();
          auto copy = owned;
          arenas_.push_back(std::move(child));
          owned_.push_back(std::move(copy));
        } else {
          reserved_ += arena.clear();
          owned.clear();
          rebook();
        }
        break;
      case 1:
      case 2:
      case 3:
        if (!owned.empty()) {
          const std::size_t which = random_() % owned.size();
          reserved_ += arena.release(owned[which].data, owned[which].bytes);
          owned.erase(owned.begin() + static_cast<std::ptrdiff_t>(which));
          rebook();
        }
        break;
      default: {
        const std::uint64_t sizes[] = {64, 128, 192, 512, 1024, 1536, 2048, kPage};
        const std::uint64_t bytes = sizes[random_() % std::size(sizes)] - random_() % 20;
        std::byte* data = arena.allocate(bytes, &reserved_);
        if (data == nullptr) break;
        const auto fill = static_cast<std::byte>(random_() % 256);
        std::fill_n(data, bytes, fill);
        owned.push_back({data, bytes, fill});
      }
    }
  }

  // Freed pages are this test's to take again.
  void rebook() { ASSERT_TRUE(pool_->reserve(reserved_ - pool_->n_reserved()).ok()); }

  void check() {
    pool_->check_invariants();
    std::vector<PageId> pages;
    for (std::size_t i = 0; i < arenas_.size(); ++i) {
      std::uint64_t live = 0;
      for (const Piece& piece : owned_[i]) {
        live += (piece.bytes + 63) / 64 * 64;
        ASSERT_TRUE(std::all_of(piece.data, piece.data + piece.bytes,
                                [&](std::byte b) { return b == piece.fill; }));
      }
      ASSERT_EQ(arenas_[i].live_bytes(), live);
      arenas_[i].append_pages(pages);
    }
    std::sort(pages.begin(), pages.end());
    pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
    ASSERT_EQ(static_cast<std::int64_t>(pages.size()), pool_->n_used());
    ASSERT_EQ(reserved_, pool_->n_reserved());
  }

  std::mt19937 random_;
  testing::TestPool pool_ = make_pool(24);
  std::int64_t reserved_ = 24;
  std::vector<SequenceArena> arenas_;
  std::vector<std::vector<Piece>> owned_;
};

TEST(SequenceArena, RandomLivesKeepEveryByte) {
  const unsigned seed = std::random_device{}();
  for (unsigned i = 0; i < 6; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed + i));
    RandomArenas(seed + i).run();
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace spindle::kvstore
