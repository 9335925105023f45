#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "tests/kvstore/test_store.h"

namespace spindle::kvstore {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;
using testing::describe;
using testing::positions_of;
using testing::random_plans;
using testing::range;
using testing::StoredToken;
using testing::TestBoundary;
using testing::TestStore;

constexpr KvCodec kInt4{KvFormat::kInt4, KvFormat::kInt4};
constexpr KvCodec kLloyd44{KvFormat::kLloyd4, KvFormat::kLloyd4};
constexpr KvCodec kToken{KvFormat::kToken, KvFormat::kToken};

TestBoundary all_heads(const TestStore& store, const HeadPlan& plan, int recent) {
  TestBoundary boundary;
  boundary.recent = recent;
  boundary.heads.assign(store.n_tables(), plan);
  return boundary;
}

TEST(KvStoreBoundary, PiecesTakeFewerPagesAndEveryByteIsReported) {
  TestStore test({});  // pages of 4096 bytes
  ASSERT_TRUE(test.open(1, 400, 60).ok());
  ASSERT_TRUE(test.extend(1, 320).ok());
  EXPECT_EQ(test.store().pool().n_used(), 40);
  const auto kept = test.compress(1, all_heads(test, {.codec = kInt4}, 64));
  ASSERT_TRUE(kept.ok()) << kept.status().to_string();
  test.expect_content_of(1);
  // A head: 8 pages go, their 256 tokens are a raw block of 4 sinks (512 bytes) and 8 blocks of
  // int4 (2 x (512 + 128) bytes); 2 pages stay.
  const std::uint64_t head_bytes = 2 * 4096 + 512 + 8 * 1280;
  ASSERT_EQ(kept->heads.size(), 4u);
  for (const HeadKept& head : kept->heads) {
    EXPECT_EQ(head.n_tokens, 320);
    EXPECT_EQ(head.bytes, head_bytes);
    EXPECT_LT(head.k_entries_per_token, 0);
  }
  EXPECT_EQ(kept->full_bytes, 320u * 4 * 2 * 32 * 2);
  EXPECT_EQ(kept->pages.used, 4 * 2 + (4 * (512 + 8 * 1280) + 4095) / 4096);
  EXPECT_EQ(kept->pages.used, test.store().pool().n_used());
  EXPECT_EQ(kept->pages.reserved, test.store().pool().n_reserved());
  const KvStats stats = test.store().stats();
  EXPECT_EQ(stats.used_bytes, static_cast<std::uint64_t>(kept->pages.used) * 4096);
  EXPECT_EQ(stats.layer_used_bytes, (std::vector<std::uint64_t>{2 * head_bytes, 2 * head_bytes}));
  const auto freed = test.free(1);
  ASSERT_TRUE(freed.ok());
  EXPECT_EQ(freed->kept_bytes, static_cast<std::uint64_t>(kept->pages.used) * 4096);
  EXPECT_EQ(freed->layer_kept_bytes, stats.layer_used_bytes);
  EXPECT_EQ(test.held_pages(), 0);
}

TEST(KvStoreBoundary, TokenIdsAloneServeLayerZero) {
  TestStore test({});
  ASSERT_TRUE(test.open(1, 300, 50).ok());
  ASSERT_TRUE(test.extend(1, 150).ok());
  TestBoundary boundary = all_heads(test, {.codec = kLloyd44}, 32);
  boundary.heads[0].codec = boundary.heads[1].codec = kToken;
  ASSERT_TRUE(test.compress(1, boundary).ok());
  test.expect_content_of(1);
  EXPECT_EQ(test.store().head_cache(1, 0, 0).tail_first, 150);
  EXPECT_EQ(test.store().head_cache(1, 1, 0).tail_first, 96);
  EXPECT_EQ(test.store().compressed_length(1), 150);
  // Ids of new tokens, of forks too.
  ASSERT_TRUE(test.extend(1, 40).ok());
  ASSERT_TRUE(test.fork(1, 2, 160, 300, 40).ok());
  ASSERT_TRUE(test.extend(2, 54).ok());
  ASSERT_TRUE(test.extend(1, 24).ok());
  ASSERT_TRUE(test.compress(1, boundary).ok());
  ASSERT_TRUE(test.compress(2, boundary).ok());
  test.expect_content_of(1);
  test.expect_content_of(2);
  EXPECT_FALSE(test.fork(1, 3, 200, 300, 40).ok()) << "before the end of what is compressed";
}

// The same without a table: the ids' own entries lie in the arena and are counted to the byte.
TEST(KvStoreBoundary, WithoutATableLayerZeroKeepsItsOwnIds) {
  TestStore test({.vocab = 40, .token_table = false});
  ASSERT_TRUE(test.open(1, 400, 60).ok());
  ASSERT_TRUE(test.extend(1, 200).ok());
  TestBoundary boundary = all_heads(test, {.codec = kLloyd44}, 32);
  boundary.heads[0].codec = boundary.heads[1].codec = kToken;
  boundary.forks = true;
  const auto kept = test.compress(1, boundary);
  ASSERT_TRUE(kept.ok()) << kept.status().to_string();
  const auto ids_of = [&](SequenceId id) {
    const auto& tokens = test.sequences().at(id);
    return static_cast<std::int64_t>(std::set(tokens.begin(), tokens.end()).size());
  };
  // Seven blocks of references and magnitudes, K and V; chunks of 16 entries of 32 channels.
  const std::int64_t n_chunks = (ids_of(1) + 15) / 16;
  EXPECT_EQ(kept->heads[0].bytes, 7u * 4 * 64 + 2 * static_cast<std::uint64_t>(n_chunks) * 1024);
  EXPECT_DOUBLE_EQ(kept->heads[0].k_entries_per_token, static_cast<double>(ids_of(1)) / 200);
  EXPECT_EQ(test.store().head_cache(1, 0, 0).tail_first, 200);
  EXPECT_EQ(test.store().head_cache(1, 1, 0).tail_first, 160);
  test.expect_content_of(1);
  // A fork has the parent's entries, and each of the two adds its own.
  ASSERT_TRUE(test.fork(1, 2, 200, 400, 60).ok());
  std::vector<std::int32_t> of_child(64, 3);
  of_child[10] = 39;
  ASSERT_TRUE(test.extend(1, 64).ok());
  ASSERT_TRUE(test.extend(2, of_child).ok());
  boundary.forks = false;
  ASSERT_TRUE(test.compress(2, boundary).ok());
  ASSERT_TRUE(test.compress(1, boundary).ok());
  for (const SequenceId id : {1, 2}) {
    test.expect_content_of(id);
    for (int head = 0; head < 2; ++head) {
      const HeadCache& cache = test.store().head_cache(id, 0, head);
      EXPECT_EQ(cache.k_book.n_filled, ids_of(id));
      for (const StoredToken& token : test.read(id, 0, head)) {
        const std::int32_t token_id =
            test.sequences().at(id)[static_cast<std::size_t>(token.position)];
        ASSERT_EQ(token.v, test.model().v(0, head, token_id));
      }
    }
  }
  // Such a book takes no directions, and one of directions takes no ids.
  TestBoundary mixed = boundary;
  mixed.heads[0] = {.codec = {KvFormat::kCodebook, KvFormat::kLloyd4}};
  EXPECT_EQ(test.compress(1, mixed).status().code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(test.free(1).ok());
  test.expect_content_of(2);
  ASSERT_TRUE(test.open(3, 300, 60).ok());
  ASSERT_TRUE(test.extend(3, 200).ok());
  const HeadPlan directions{.codec = {KvFormat::kCodebook, KvFormat::kLloyd4},
                            .fallback = KvFormat::kRaw};
  ASSERT_TRUE(test.compress(3, all_heads(test, directions, 32)).ok());
  ASSERT_GT(test.store().head_cache(3, 0, 0).k_book.n_filled, 0);
  EXPECT_EQ(test.compress(3, boundary).status().code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(test.free(2).ok());
  ASSERT_TRUE(test.free(3).ok());
  EXPECT_EQ(test.held_pages(), 0);
}

TEST(KvStoreBoundary, PlansThatDoNotFitAreErrors) {
  TestStore test({});
  ASSERT_TRUE(test.open(1, 300, 50).ok());
  ASSERT_TRUE(test.extend(1, 150).ok());
  const auto refused = [&](const TestBoundary& boundary) {
    return test.compress(1, boundary).status().code() == StatusCode::kInvalidArgument;
  };
  TestBoundary boundary = all_heads(test, {.codec = kLloyd44}, 32);
  EXPECT_TRUE(test.compress(7, boundary).status().code() == StatusCode::kInvalidArgument);
  boundary.heads.pop_back();
  EXPECT_TRUE(refused(boundary));
  boundary.heads.push_back({.codec = kToken});  // not layer 0
  EXPECT_TRUE(refused(boundary));
  boundary.heads.back() = {.codec = {KvFormat::kToken, KvFormat::kRaw}};
  EXPECT_TRUE(refused(boundary));
  boundary.heads.back() = {.mode = KvMode::kStream};
  EXPECT_TRUE(refused(boundary));
  boundary.heads.back() = {.fallback = KvFormat::kCodebook};
  EXPECT_TRUE(refused(boundary));
  boundary.heads.back() = {};
  boundary.recent = -1;
  EXPECT_TRUE(refused(boundary));
  boundary.recent = 32;
  boundary.boundaries_left = -1;
  EXPECT_TRUE(refused(boundary));
  StageBoundary without_rope;
  boundary.boundaries_left = 0;
  without_rope.heads = boundary.heads;
  EXPECT_EQ(test.store().compress(testing::cpu(), nullptr, 1, without_rope).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(test.store().pool().n_used(), 20);
  test.expect_content_of(1);
}

TEST(KvStoreBoundary, WithoutRoomNothingChanges) {
  // Everything raw and kept: pieces and position lists are more than the pages they replace.
  TestStore test({.n_pages = 25});
  ASSERT_TRUE(test.open(1, 160, 20).ok());
  ASSERT_TRUE(test.extend(1, 160).ok());
  TestBoundary boundary =
      all_heads(test, {.mode = KvMode::kEvict, .selector = KvSelector::kDefensive}, 0);
  boundary.selects = true;
  boundary.keep_share = 1.0;
  const auto failed = test.compress(1, boundary);
  EXPECT_EQ(failed.status().code(), StatusCode::kResourceExhausted) << failed.status().to_string();
  EXPECT_EQ(test.store().pool().n_used(), 20);
  EXPECT_EQ(test.store().compressed_length(1), 0);
  test.expect_content_of(1);
  for (int layer = 0; layer < 2; ++layer) {
    EXPECT_EQ(positions_of(test.read(1, layer, 0)), range(0, 160));
  }
  boundary.keep_share = 0.5;
  EXPECT_TRUE(test.compress(1, boundary).ok());
  test.expect_content_of(1);
}

TEST(KvStoreBoundary, AStreamTakesTheSameBytesHoweverLongItRuns) {
  for (const KvCodec codec : {KvCodec{}, kInt4, KvCodec{KvFormat::kKivi4, KvFormat::kKivi4},
                              KvCodec{KvFormat::kLloyd3, KvFormat::kLloyd2}}) {
    TestStore test({.n_pages = 400});
    const HeadPlan plan{.mode = KvMode::kStream, .codec = codec, .window = 200};
    SCOPED_TRACE(plan_name(plan));
    ASSERT_TRUE(test.open(1, 320 + 1000, 400).ok());
    ASSERT_TRUE(test.extend(1, 320).ok());
    std::set<std::int64_t> used;
    std::set<std::uint64_t> bytes;
    for (int i = 0; i < 16; ++i) {
      const auto kept = test.compress(1, all_heads(test, plan, 64));
      ASSERT_TRUE(kept.ok()) << kept.status().to_string();
      if (i >= 4) {  // the first window has passed
        used.insert(kept->pages.used);
        bytes.insert(kept->heads[0].bytes);
        EXPECT_EQ(positions_of(test.read(1, 1, 1)).size(), 204u);
      }
      test.expect_content_of(1);
      ASSERT_TRUE(test.extend(1, std::min<std::int64_t>(64, 1320 - test.store().length(1))).ok());
    }
    EXPECT_EQ(bytes.size(), 1u);
    EXPECT_EQ(used.size(), 1u);
  }
}

TEST(KvStoreBoundary, CountsSayWhichFormatsBlocksHave) {
  const auto bit = [](KvFormat format) { return 1U << static_cast<unsigned>(format); };
  kernels::KvBlock raw;
  raw.end = 4;
  kernels::KvBlock mixed;
  mixed.codec = {KvFormat::kLloyd3, KvFormat::kCodebook};
  mixed.end = 32;
  BlockCounts counts;
  EXPECT_EQ(counts.format_mask(), 0u);
  counts.count(mixed, 1);
  counts.count(mixed, 1);
  counts.count(raw, 1);
  EXPECT_EQ(counts.format_mask(),
            bit(KvFormat::kRaw) | bit(KvFormat::kLloyd3) | bit(KvFormat::kCodebook));
  counts.count(mixed, -1);
  counts.count(raw, -1);
  EXPECT_EQ(counts.format_mask(), bit(KvFormat::kLloyd3) | bit(KvFormat::kCodebook));
  counts.count(mixed, -1);
  EXPECT_EQ(counts, BlockCounts());
}

TEST(KvStoreBoundary, AForkHoldsWhatATwinHoldsThatNeverForked) {
  const unsigned seed = std::random_device{}();
  for (unsigned i = 0; i < 25; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed + i));
    TestStore test({.token_table = i % 2 == 0, .n_pages = 2000, .seed = seed + i});
    std::mt19937& random = test.random();
    TestBoundary boundary;
    boundary.recent = static_cast<int>(random() % 3) * 32;
    boundary.heads = random_plans(random, test.n_tables(), 2);
    if (i % 4 == 1) boundary.heads[0] = boundary.heads[1] = {.codec = kToken};
    SCOPED_TRACE(describe(boundary.heads));
    // 1 is forked, 2 is not; they see the same tokens.
    const auto both = [&](std::int64_t n) {
      const auto tokens = testing::random_tokens(n, 60, random);
      ASSERT_TRUE(test.extend(1, tokens).ok());
      ASSERT_TRUE(test.extend(2, tokens).ok());
    };
    ASSERT_TRUE(test.open(1, 2000, 500).ok());
    ASSERT_TRUE(test.open(2, 2000, 500).ok());
    both(150 + static_cast<std::int64_t>(random() % 200));
    boundary.forks = true;
    ASSERT_TRUE(test.compress(1, boundary).ok());
    boundary.forks = false;
    ASSERT_TRUE(test.compress(2, boundary).ok());
    const std::int64_t n_more = static_cast<std::int64_t>(random() % 64);
    both(n_more);
    const std::int64_t n = test.store().length(1);
    ASSERT_TRUE(test.fork(1, 3, n, 2000, 500).ok());
    // The parent goes on, and one of them goes away.
    ASSERT_TRUE(test.extend(1, 64 - n_more).ok());
    ASSERT_TRUE(test.compress(1, boundary).ok());
    if (random() % 2 == 0) {
      ASSERT_TRUE(test.free(1).ok());
    }
    for (int step = 0; step < 4; ++step) {
      const auto tokens = testing::random_tokens(step == 0 ? 64 - n_more : 64, 60, random);
      ASSERT_TRUE(test.extend(3, tokens).ok());
      ASSERT_TRUE(test.extend(2, tokens).ok());
      ASSERT_TRUE(test.compress(3, boundary).ok());
      ASSERT_TRUE(test.compress(2, boundary).ok());
      for (int table = 0; table < 4; ++table) {
        const auto child = test.read(3, table / 2, table % 2);
        const auto twin = test.read(2, table / 2, table % 2);
        ASSERT_EQ(child.size(), twin.size());
        for (std::size_t t = 0; t < child.size(); ++t) {
          ASSERT_EQ(child[t].position, twin[t].position);
          ASSERT_EQ(child[t].codec, twin[t].codec);
          ASSERT_EQ(child[t].k, twin[t].k);
          ASSERT_EQ(child[t].v, twin[t].v);
        }
      }
    }
  }
}

// One request's life in a pool that has exactly the pages that rank 0 would commit for it: nothing
// may fail, and what a sequence holds and may take never grows.
class TightLife {
 public:
  explicit TightLife(unsigned seed) : random_(seed) {
    const int recents[] = {0, 32, 64, 160, 1024};
    boundary_.recent = recents[random_() % 5];
    boundary_.sinks = random_() % 3 == 0 ? 40 : 4;
    boundary_.keep_share = static_cast<double>(random_() % 11) / 10.0;
    options_.n_layers = 1 + static_cast<int>(random_() % 3);
    options_.n_kv_heads = 1 + static_cast<int>(random_() % 3);
    options_.head_dim = random_() % 3 == 0 ? 128 : 32;
    options_.vocab = random_() % 2 == 0 ? 20 : 1500;
    options_.wide = random_() % 2 == 0;
    options_.seed = seed;
    options_.token_table = random_() % 2 == 0;
    boundary_.heads =
        random_plans(random_, static_cast<std::size_t>(options_.n_layers * options_.n_kv_heads),
                     static_cast<std::size_t>(options_.n_kv_heads));
    if (random_() % 3 == 0) {
      for (int h = 0; h < options_.n_kv_heads; ++h) {
        boundary_.heads[static_cast<std::size_t>(h)] = {.codec = kToken};
      }
    }
    demand_.compresses = true;
    std::int64_t at = 100 + static_cast<std::int64_t>(random_() % 300);
    for (unsigned i = 0; i <= random_() % 4; ++i) {
      boundaries_.push_back(at);
      at += 1 + static_cast<std::int64_t>(random_() % 90);
    }
    if (random_() % 3 == 0) n_uncompressed_ = random_() % boundaries_.size();
    demand_.prompt_tokens = random_() % 2 == 0 ? boundaries_.back() : at;
    demand_.max_tokens = demand_.prompt_tokens + static_cast<std::int64_t>(random_() % 500);
    demand_.n_choices = 1 + static_cast<int>(random_() % 3);
    demand_.n_boundaries = static_cast<int>(boundaries_.size());
    demand_.tail_tokens = boundary_.recent + demand_.prompt_tokens - boundaries_.back();
  }

  std::string text() const {
    return describe(boundary_.heads) + "recent " + std::to_string(boundary_.recent) + ", sinks " +
           std::to_string(boundary_.sinks) + ", head_dim " + std::to_string(options_.head_dim) +
           ", prompt " + std::to_string(demand_.prompt_tokens) + ", max " +
           std::to_string(demand_.max_tokens) + ", n " + std::to_string(demand_.n_choices) +
           ", keeps " + std::to_string(boundary_.keep_share);
  }

  void run() {
    const KvShape shape{options_.n_kv_heads, options_.head_dim, DType::kF16, 32};
    const std::int64_t first = reserve_pages(shape, options_.n_layers, demand_, false);
    const std::int64_t fork = reserve_pages(shape, options_.n_layers, demand_, true);
    options_.n_pages = first + (demand_.n_choices - 1) * fork;
    promised_ = (demand_.n_choices - 1) * fork;
    test_ = std::make_unique<TestStore>(options_);
    ASSERT_TRUE(test_->open(1, demand_.max_tokens, first).ok());
    prefill();
    if (::testing::Test::HasFatalFailure()) return;
    for (int c = 1; c < demand_.n_choices; ++c) {
      const Status status = test_->fork(1, static_cast<SequenceId>(1 + c), demand_.prompt_tokens,
                                        demand_.max_tokens, fork);
      ASSERT_TRUE(status.ok()) << status.to_string();
      promised_ -= fork;
    }
    decode();
    for (int c = 0; c < demand_.n_choices; ++c) {
      ASSERT_TRUE(test_->free(static_cast<SequenceId>(1 + c)).ok());
    }
    for (SequenceId hog = kFirstHog; hog < next_hog_; ++hog) {
      ASSERT_TRUE(test_->store().free(hog).ok());
    }
    EXPECT_EQ(test_->held_pages(), 0);
  }

 private:
  void compress(SequenceId id) {
    const std::int64_t before = test_->held_pages();
    const auto kept = test_->compress(id, boundary_);
    ASSERT_TRUE(kept.ok()) << kept.status().to_string();
    ASSERT_LE(test_->held_pages(), before);
    take_what_is_free();
  }

  // What a boundary gives back is another's at once.
  void take_what_is_free() {
    const PagePool& pool = test_->store().pool();
    const std::int64_t free = pool.n_free() - pool.n_reserved() - promised_;
    ASSERT_GE(free, 0);
    ASSERT_TRUE(test_->store().open(next_hog_++, 1, free).ok());
  }

  void prefill() {
    boundary_.selects = true;
    std::int64_t n = 0;
    for (std::size_t i = 0; i < boundaries_.size(); ++i) {
      const Status status = test_->extend(1, boundaries_[i] - n);
      ASSERT_TRUE(status.ok()) << status.to_string();
      n = boundaries_[i];
      boundary_.prompt_left = demand_.prompt_tokens - n;
      boundary_.boundaries_left = static_cast<int>(boundaries_.size() - i) - 1;
      boundary_.forks = demand_.n_choices > 1;
      // A plan may leave the first segments as they are.
      const std::vector<HeadPlan> heads = boundary_.heads;
      if (i < n_uncompressed_) boundary_.heads.assign(heads.size(), {});
      compress(1);
      boundary_.heads = heads;
      if (::testing::Test::HasFatalFailure()) return;
    }
    const Status status = test_->extend(1, demand_.prompt_tokens - n);
    ASSERT_TRUE(status.ok()) << status.to_string();
    boundary_.selects = false;
    boundary_.prompt_left = 0;
    boundary_.boundaries_left = 0;
    boundary_.forks = false;
  }

  // The choices take turns; one may end early.
  void decode() {
    std::vector<SequenceId> running;
    for (int c = 0; c < demand_.n_choices; ++c) running.push_back(static_cast<SequenceId>(1 + c));
    for (std::int64_t n = demand_.prompt_tokens; n < demand_.max_tokens; n += 64) {
      std::shuffle(running.begin(), running.end(), random_);
      for (const SequenceId id : running) {
        if (n > demand_.prompt_tokens) compress(id);
        const Status status = test_->extend(id, std::min<std::int64_t>(64, demand_.max_tokens - n));
        ASSERT_TRUE(status.ok()) << status.to_string() << " at " << n;
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
    for (const SequenceId id : running) test_->expect_content_of(id);
  }

  static constexpr SequenceId kFirstHog = 1000;

  std::mt19937 random_;
  SequenceId next_hog_ = kFirstHog;
  std::int64_t promised_ = 0;  // to choices that are not forked yet
  TestStore::Options options_;
  TestBoundary boundary_;
  KvDemand demand_;
  std::vector<std::int64_t> boundaries_;
  std::size_t n_uncompressed_ = 0;
  std::unique_ptr<TestStore> test_;
};

TEST(KvStoreBoundary, WhatRankZeroCommitsIsEnoughToTheLastToken) {
  const unsigned seed = std::random_device{}();
  for (unsigned i = 0; i < 150; ++i) {
    TightLife life(seed + i);
    SCOPED_TRACE("seed " + std::to_string(seed + i) + ": " + life.text());
    life.run();
    if (HasFatalFailure()) return;
  }
}

// Sequences that open, grow, fork, are compressed and freed in any order; a call may be refused but
// never leaves anything behind.
class RandomStore {
 public:
  explicit RandomStore(unsigned seed)
      : test_({.vocab = 40, .wide = seed % 2 == 0, .n_pages = 700, .seed = seed}), random_(seed) {}

  void run() {
    for (int i = 0; i < 250; ++i) {
      act();
      if (::testing::Test::HasFatalFailure()) return;
    }
    while (!lives_.empty()) end_one();
    EXPECT_EQ(test_.held_pages(), 0);
    EXPECT_EQ(test_.store().stats().used_bytes, 0u);
  }

 private:
  struct Life {
    TestBoundary boundary;
    std::int64_t max_tokens = 0;
    bool is_forked = false;
  };

  SequenceId pick() {
    auto it = lives_.begin();
    std::advance(it, static_cast<std::ptrdiff_t>(random_() % lives_.size()));
    return it->first;
  }

  void act() {
    const auto what = random_() % 8;
    if (lives_.empty() || what == 0) {
      Life life;
      life.max_tokens = 1 + static_cast<std::int64_t>(random_() % 600);
      life.boundary.recent = static_cast<int>(random_() % 4) * 32;
      life.boundary.heads = random_plans(random_, test_.n_tables(), 2);
      if (test_.open(next_, life.max_tokens, static_cast<std::int64_t>(random_() % 150)).ok()) {
        lives_[next_++] = life;
      }
    } else if (what == 1) {
      fork(pick());
    } else if (what == 2) {
      end_one();
    } else if (what < 6) {
      const SequenceId id = pick();
      const std::int64_t room = lives_[id].max_tokens - test_.store().length(id);
      const auto n = static_cast<std::int64_t>(random_() % 130);
      const Status status = test_.extend(id, n);
      if (n > room) {
        ASSERT_EQ(status.code(), StatusCode::kInvalidArgument);
      }
      if (!status.ok()) {
        ASSERT_NE(status.code(), StatusCode::kInternal);
      }
    } else {
      compress(pick());
    }
  }

  void fork(SequenceId parent) {
    const std::int64_t n = test_.store().length(parent);
    const std::int64_t from = test_.store().compressed_length(parent);
    const std::int64_t at =
        from + static_cast<std::int64_t>(random_() % static_cast<unsigned>(n - from + 1));
    const std::int64_t max_tokens = at + 1 + static_cast<std::int64_t>(random_() % 300);
    const auto pages = static_cast<std::int64_t>(random_() % 100);
    if (!test_.fork(parent, next_, at, max_tokens, pages).ok()) return;
    lives_[parent].is_forked = true;
    Life child = lives_[parent];
    child.max_tokens = max_tokens;
    lives_[next_] = child;
    test_.expect_content_of(next_++);
  }

  void compress(SequenceId id) {
    Life& life = lives_[id];
    const std::int64_t n = test_.store().length(id);
    if (n == 0) return;
    life.boundary.selects = random_() % 2 == 0;
    const std::int64_t held = test_.held_pages();
    const auto kept = test_.compress(id, life.boundary);
    test_.expect_content_of(id);
    ASSERT_LE(test_.held_pages(), held);
    if (!kept.ok()) {
      ASSERT_EQ(kept.status().code(), StatusCode::kResourceExhausted);
      ASSERT_EQ(test_.held_pages(), held);
      return;
    }
    std::uint64_t head_bytes = 0;
    for (std::size_t i = 0; i < kept->heads.size(); ++i) {
      const auto stored = test_.read(id, static_cast<int>(i) / 2, static_cast<int>(i) % 2);
      ASSERT_EQ(kept->heads[i].n_tokens, static_cast<std::int64_t>(stored.size()));
      head_bytes += kept->heads[i].bytes;
    }
    const std::uint64_t page = test_.shape().page_bytes();
    // Beside the heads' bytes only the unused ends of the pages that pieces lie in.
    ASSERT_LE(head_bytes, static_cast<std::uint64_t>(kept->pages.used) * page);
    if (lives_.size() == 1) {
      ASSERT_EQ(kept->pages.used, test_.store().pool().n_used());
    }
  }

  void end_one() {
    const SequenceId id = pick();
    const std::int64_t used = test_.store().pool().n_used();
    const auto freed = test_.free(id);
    ASSERT_TRUE(freed.ok());
    const auto n_freed = static_cast<std::uint64_t>(used - test_.store().pool().n_used());
    ASSERT_LE(n_freed * test_.shape().page_bytes(), freed->kept_bytes);
    if (!lives_[id].is_forked) {
      ASSERT_EQ(n_freed * test_.shape().page_bytes(), freed->kept_bytes);
    }
    lives_.erase(id);
    for (const auto& [other, life] : lives_) test_.expect_content_of(other);
  }

  TestStore test_;
  std::mt19937 random_;
  std::map<SequenceId, Life> lives_;
  SequenceId next_ = 1;
};

TEST(KvStoreBoundary, RandomLivesKeepTheirContentAndEveryByteAccounted) {
  const unsigned seed = std::random_device{}();
  for (unsigned i = 0; i < 6; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed + i));
    RandomStore(seed + i).run();
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace spindle::kvstore
