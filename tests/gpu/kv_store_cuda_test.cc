// KvStore over DeviceMemory against KvStore over HostMemory, through the lives of sequences.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "kvstore/device_memory.h"
#include "kvstore/kv_store.h"
#include "tests/gpu/store_twins.h"

namespace spindle::kvstore {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;
using testing::TestBoundary;
using testing::Twins;

class KvStoreCudaTest : public ::spindle::testing::GpuTest {
 protected:
  static TestBoundary all_heads(const Twins& twins, const HeadPlan& plan, int recent) {
    TestBoundary boundary;
    boundary.recent = recent;
    boundary.heads.assign(twins.n_tables(), plan);
    return boundary;
  }
};

TEST_F(KvStoreCudaTest, TablesFollowExtendForkAndFree) {
  Twins twins(gpu(), {.seed = seed()});
  ASSERT_TRUE(twins.open(1, 300, 40).ok());
  twins.expect_same_sequence(1);
  for (const std::int64_t n : {1, 31, 1, 64, 0, 40}) {
    ASSERT_TRUE(twins.extend(1, n).ok());
    twins.expect_same_sequence(1);
  }
  ASSERT_TRUE(twins.fork(1, 2, 137, 300, 40).ok());
  ASSERT_TRUE(twins.fork(1, 3, 96, 200, 40).ok());
  ASSERT_TRUE(twins.extend(2, 50).ok());
  twins.expect_same_sequences();
  twins.free(1);
  ASSERT_TRUE(twins.open(1, 32, 4).ok());  // the same id at once
  ASSERT_TRUE(twins.extend(1, 20).ok());
  twins.expect_same_sequences();
  for (const SequenceId id : {1, 2, 3}) twins.free(id);
  EXPECT_EQ(twins.device().pool().n_used(), 0);
}

TEST_F(KvStoreCudaTest, ChangesOfManyStepsShowAtOneFlush) {
  Twins twins(gpu(), {.seed = seed()});
  ASSERT_TRUE(twins.open(1, 600, 100).ok());
  ASSERT_TRUE(twins.open(2, 600, 100).ok());
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(twins.extend(1, 7).ok());
    ASSERT_TRUE(twins.extend(2, 33).ok());
  }
  twins.free(1);
  ASSERT_TRUE(twins.fork(2, 4, 300, 600, 60).ok());
  ASSERT_TRUE(twins.extend(4, 100).ok());
  twins.expect_same_sequences();
}

TEST_F(KvStoreCudaTest, EveryCodecHoldsWhatItHoldsOnTheHost) {
  for (const int head_dim : {64, 128}) {
    for (int k = 0; k <= static_cast<int>(KvFormat::kToken); ++k) {
      for (const bool wide : {false, true}) {
        const auto format = static_cast<KvFormat>(k);
        const auto other = static_cast<KvFormat>((k + 3) % (static_cast<int>(KvFormat::kToken)));
        Twins twins(gpu(), {.head_dim = head_dim, .vocab = 40, .wide = wide, .seed = seed()});
        TestBoundary boundary = all_heads(twins, {.codec = {format, other}}, wide ? 64 : 0);
        if (format == KvFormat::kToken) {
          for (HeadPlan& plan : boundary.heads) plan.codec = {KvFormat::kLloyd3, KvFormat::kInt4};
          for (int h = 0; h < 2; ++h) {
            boundary.heads[static_cast<std::size_t>(h)].codec = {format, format};
          }
        }
        SCOPED_TRACE(testing::describe(boundary.heads));
        ASSERT_TRUE(twins.open(1, 1000, 200).ok());
        ASSERT_TRUE(twins.extend(1, 277).ok());
        ASSERT_TRUE(twins.compress(1, boundary).ok());
        twins.expect_same_sequence(1);
        ASSERT_TRUE(twins.extend(1, 64).ok());
        ASSERT_TRUE(twins.compress(1, boundary).ok());
        twins.expect_same_sequence(1);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(KvStoreCudaTest, SelectionsKeepTheirPositions) {
  for (const KvCodec codec : {KvCodec{}, KvCodec{KvFormat::kInt4, KvFormat::kInt4},
                              KvCodec{KvFormat::kLloyd4, KvFormat::kLloyd2},
                              KvCodec{KvFormat::kCodebook, KvFormat::kCodebook}}) {
    for (const bool wide : {false, true}) {
      Twins twins(gpu(), {.head_dim = 128, .wide = wide, .seed = seed()});
      TestBoundary boundary = all_heads(
          twins, {.mode = KvMode::kEvict, .selector = KvSelector::kDefensive, .codec = codec}, 32);
      boundary.sinks = 40;
      boundary.selects = true;
      SCOPED_TRACE(testing::describe(boundary.heads));
      ASSERT_TRUE(twins.open(1, 1500, 250).ok());
      ASSERT_TRUE(twins.extend(1, 700).ok());
      ASSERT_TRUE(twins.compress(1, boundary).ok());
      ASSERT_TRUE(twins.extend(1, 100).ok());
      ASSERT_TRUE(twins.compress(1, boundary).ok());
      boundary.selects = false;
      ASSERT_TRUE(twins.extend(1, 64).ok());
      ASSERT_TRUE(twins.compress(1, boundary).ok());
      twins.expect_same_sequence(1);
      if (HasFatalFailure()) return;
    }
  }
}

// More than one tile of a codebook; few tokens share entries, many fall back in every tile.
TEST_F(KvStoreCudaTest, CodebooksGrowOverTilesAndBoundaries) {
  for (const int vocab : {20, 300, 5000}) {
    for (const KvFormat fallback : {KvFormat::kLloyd4, KvFormat::kRaw}) {
      Twins twins(gpu(), {.vocab = vocab, .n_pages = 1200, .seed = seed()});
      HeadPlan plan{.codec = {KvFormat::kCodebook, KvFormat::kCodebook}};
      plan.fallback = fallback;
      const TestBoundary boundary = all_heads(twins, plan, 32);
      SCOPED_TRACE("vocabulary of " + std::to_string(vocab));
      ASSERT_TRUE(twins.open(1, 4000, 700).ok());
      ASSERT_TRUE(twins.extend(1, 2300).ok());
      ASSERT_TRUE(twins.compress(1, boundary).ok());
      ASSERT_TRUE(twins.extend(1, 64).ok());
      ASSERT_TRUE(twins.compress(1, boundary).ok());
      const std::int64_t n = twins.length(1);
      ASSERT_TRUE(twins.fork(1, 2, n, 4000, 300).ok());
      ASSERT_TRUE(twins.extend(2, 64).ok());
      ASSERT_TRUE(twins.compress(2, boundary).ok());
      twins.expect_same_sequences();
      if (HasFatalFailure()) return;
    }
  }
}

// Layer 0 holds token ids without a table: entries are added at boundaries and by forks, and ids
// that are all different stay raw.
TEST_F(KvStoreCudaTest, OwnTablesOfTokenIdsHoldWhatTheyHoldOnTheHost) {
  for (const int head_dim : {64, 128}) {
    for (const int vocab : {20, 300, 150'000}) {
      for (const bool wide : {false, true}) {
        Twins twins(gpu(), {.head_dim = head_dim,
                            .vocab = vocab,
                            .wide = wide,
                            .token_table = false,
                            .n_pages = 700,
                            .seed = seed()});
        SCOPED_TRACE("vocabulary of " + std::to_string(vocab));
        TestBoundary boundary =
            all_heads(twins, {.codec = {KvFormat::kLloyd4, KvFormat::kCodebook}}, 32);
        boundary.heads[0] = {.codec = {KvFormat::kToken, KvFormat::kToken}};
        // One of directions beside it, or another one of ids.
        boundary.heads[1] = wide ? boundary.heads[0] : boundary.heads[2];
        ASSERT_TRUE(twins.open(1, 2500, 400).ok());
        ASSERT_TRUE(twins.extend(1, 1377).ok());
        ASSERT_TRUE(twins.compress(1, boundary).ok());
        twins.expect_same_sequence(1);
        ASSERT_EQ(twins.device().head_cache(1, 0, 0).token_entries.empty(), vocab == 150'000);
        ASSERT_TRUE(twins.fork(1, 2, 1377, 2500, 200).ok());
        for (int i = 0; i < 3; ++i) {
          for (const SequenceId id : {1, 2}) {
            ASSERT_TRUE(twins.extend(id, 64).ok());
            ASSERT_TRUE(twins.compress(id, boundary).ok());
          }
        }
        twins.expect_same_sequences();
        if (HasFatalFailure()) return;
        twins.free(1);
        twins.free(2);
        EXPECT_EQ(twins.device().pool().n_used(), 0);
        EXPECT_EQ(twins.device().pool().n_reserved(), 0);
      }
    }
  }
}

TEST_F(KvStoreCudaTest, StreamsExpireBlocks) {
  for (const KvCodec codec : {KvCodec{}, KvCodec{KvFormat::kKivi4, KvFormat::kKivi2},
                              KvCodec{KvFormat::kLloyd1, KvFormat::kInt4}}) {
    Twins twins(gpu(), {.head_dim = 128, .seed = seed()});
    const TestBoundary boundary =
        all_heads(twins, {.mode = KvMode::kStream, .codec = codec, .window = 150}, 32);
    SCOPED_TRACE(testing::describe(boundary.heads));
    ASSERT_TRUE(twins.open(1, 1500, 150).ok());
    ASSERT_TRUE(twins.extend(1, 300).ok());
    for (int i = 0; i < 8; ++i) {
      ASSERT_TRUE(twins.compress(1, boundary).ok());
      if (i % 3 == 0) twins.expect_same_sequence(1);
      ASSERT_TRUE(twins.extend(1, 64).ok());
      if (HasFatalFailure()) return;
    }
    twins.expect_same_sequence(1);
  }
}

// Sequences that open, grow, fork, are compressed and freed in any order.
class RandomTwins {
 public:
  RandomTwins(const CudaContext& gpu, unsigned seed)
      : twins_(gpu, {.head_dim = seed % 2 == 0 ? 64 : 128,
                     .vocab = 40,
                     .wide = seed % 3 == 0,
                     .token_table = seed % 4 < 2,
                     .n_pages = 500,
                     .seed = seed}),
        random_(seed) {}

  void run(int n_acts) {
    for (int i = 0; i < n_acts; ++i) {
      act();
      if (::testing::Test::HasFatalFailure()) return;
      if (i % 10 == 9) twins_.expect_same_sequences();
    }
    while (!lives_.empty()) {
      twins_.free(lives_.begin()->first);
      lives_.erase(lives_.begin());
    }
    EXPECT_EQ(twins_.device().pool().n_used(), 0);
    EXPECT_EQ(twins_.device().pool().n_reserved(), 0);
  }

 private:
  SequenceId pick() {
    auto it = lives_.begin();
    std::advance(it, static_cast<std::ptrdiff_t>(random_() % lives_.size()));
    return it->first;
  }
  void act() {
    const auto what = random_() % 8;
    if (lives_.empty() || what == 0) {
      TestBoundary boundary;
      boundary.recent = static_cast<int>(random_() % 4) * 32;
      boundary.heads = testing::random_plans(random_, twins_.n_tables(), 2);
      const auto max_tokens = 1 + static_cast<std::int64_t>(random_() % 600);
      const auto pages = static_cast<std::int64_t>(random_() % 150);
      if (twins_.open(next_, max_tokens, pages).ok()) lives_[next_++] = boundary;
    } else if (what == 1) {
      const SequenceId parent = pick();
      const std::int64_t n = twins_.length(parent);
      const auto pages = static_cast<std::int64_t>(random_() % 100);
      if (twins_.fork(parent, next_, n, std::min(n + 200, testing::kMaxModelLen), pages).ok()) {
        lives_[next_] = lives_[parent];
        ++next_;
      }
    } else if (what == 2) {
      const SequenceId id = pick();
      twins_.free(id);
      lives_.erase(id);
    } else if (what < 6) {
      static_cast<void>(twins_.extend(pick(), static_cast<std::int64_t>(random_() % 130)));
    } else {
      const SequenceId id = pick();
      if (twins_.length(id) == 0) return;
      lives_[id].selects = random_() % 2 == 0;
      static_cast<void>(twins_.compress(id, lives_[id]));
    }
  }

  Twins twins_;
  std::mt19937 random_;
  std::map<SequenceId, TestBoundary> lives_;
  SequenceId next_ = 1;
};

TEST_F(KvStoreCudaTest, RandomLivesAreTheSameOnBoth) {
  for (unsigned i = 0; i < 6; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed() + i));
    RandomTwins(gpu(), seed() + i).run(120);
    if (HasFatalFailure()) return;
  }
}

TEST_F(KvStoreCudaTest, WhatDoesNotFitIsAStatus) {
  DeviceMemoryConfig config;
  config.store.shape = {2, 64, DType::kF16, 32};
  config.store.n_layers = 1;
  config.store.budget_bytes = 1 << 20;
  config.max_model_len = 1000;
  config.store.budget_bytes = 100;
  EXPECT_EQ(DeviceMemory::create(gpu(), config).status().code(), StatusCode::kInvalidArgument);
  config.store.budget_bytes = std::uint64_t{1} << 50;
  EXPECT_EQ(DeviceMemory::create(gpu(), config).status().code(), StatusCode::kInvalidArgument);
  config.store.budget_bytes = std::uint64_t{255} << 30;
  EXPECT_EQ(DeviceMemory::create(gpu(), config).status().code(), StatusCode::kResourceExhausted);
  config.store.budget_bytes = 1 << 20;
  config.store.shape.head_dim = 96;
  EXPECT_EQ(DeviceMemory::create(gpu(), config).status().code(), StatusCode::kUnimplemented);
  config.store.shape.head_dim = 64;
  auto memory = DeviceMemory::create(gpu(), config);
  ASSERT_TRUE(memory.ok()) << memory.status().to_string();
  auto store = KvStore::create(config.store, std::move(*memory));
  ASSERT_TRUE(store.ok());
  EXPECT_EQ((*store)->open(1, 1001, 0).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ((*store)->pool().n_reserved(), 0);
  ASSERT_TRUE((*store)->open(1, 1000, 10).ok());
  ASSERT_TRUE((*store)->extend(1, std::vector<std::int32_t>(100)).ok());
  // Without a RoPE table keys cannot go back to before it.
  const std::vector<HeadPlan> plans(2, {.codec = {KvFormat::kLloyd4, KvFormat::kLloyd4}});
  StageBoundary boundary;
  boundary.heads = plans;
  EXPECT_EQ((*store)->compress(1, boundary).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace spindle::kvstore
