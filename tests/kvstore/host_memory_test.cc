#include "kvstore/host_memory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

namespace spindle::kvstore {
namespace {

TEST(HostMemory, RefusesMoreAddressSpaceThanThereIs) {
  EXPECT_EQ(HostMemory::create(1ULL << 62).status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(HostMemory::create(0).status().code(), StatusCode::kInvalidArgument);
}

TEST(HostMemory, CopiesInTheOrderOfTheCalls) {
  auto memory = *HostMemory::create(4096);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory->base()) % 64, 0u);
  const std::vector<std::byte> piece(128, std::byte{7});
  const KvCopy first[] = {{piece.data(), memory->base(), 128}};
  const KvCopy second[] = {{memory->base(), memory->base() + 1024, 64},
                           {memory->base() + 64, memory->base() + 2048, 64}};
  memory->copy(first);
  memory->copy(second);
  EXPECT_EQ(std::memcmp(memory->base() + 1024, piece.data(), 64), 0);
  EXPECT_EQ(std::memcmp(memory->base() + 2048, piece.data(), 64), 0);
  EXPECT_EQ(memory->base()[1024 + 64], std::byte{0});
  memory->copy({});
}

TEST(HostMemory, HasNoTablesOfItsOwn) {
  auto memory = *HostMemory::create(4096);
  const std::vector<HeadCache> caches(2);
  EXPECT_TRUE(memory->open_tables(1, caches, 100, {}).ok());
  const std::vector<TableRoom> room = {{10, 10}, {10, 10}};
  EXPECT_TRUE(memory->grow_tables(1, room).ok());
  memory->tables_changed(1, TableChange::kAll);
  memory->flush_tables();
  EXPECT_EQ(memory->device_heads(1), nullptr);
  memory->close_tables(1);
}

TEST(HostScratch, PiecesAreAlignedAndApartUntilItIsReset) {
  HostScratch scratch;
  std::vector<std::span<std::byte>> pieces;
  std::byte value{0};
  for (const std::size_t n : {1U, 64U, 65U, 1U << 20, 3U << 20, 0U, 100U, (1U << 20) - 64, 128U}) {
    const std::span<std::byte> piece =
        n % 2 == 0 ? scratch.allocate(n) : scratch.allocate_zeroed(n);
    EXPECT_EQ(piece.size(), n);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(piece.data()) % 64, 0u);
    if (n % 2 == 1) {
      EXPECT_TRUE(
          std::all_of(piece.begin(), piece.end(), [](std::byte b) { return b == std::byte{}; }));
    }
    value = static_cast<std::byte>(static_cast<int>(value) + 1);
    std::fill(piece.begin(), piece.end(), value);
    pieces.push_back(piece);
  }
  value = std::byte{0};
  for (const std::span<std::byte> piece : pieces) {
    value = static_cast<std::byte>(static_cast<int>(value) + 1);
    EXPECT_TRUE(std::all_of(piece.begin(), piece.end(), [&](std::byte b) { return b == value; }));
  }
  scratch.reset();
  EXPECT_EQ(scratch.allocate(10).data(), pieces[0].data());
}

}  // namespace
}  // namespace spindle::kvstore
