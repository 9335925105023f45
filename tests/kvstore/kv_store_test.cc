#include "kvstore/kv_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <vector>

namespace spindle::kvstore {
namespace {

const KvShape kShape{2, 16, DType::kF16, 32};

// Two layers, two KV heads, pages of 32 tokens x 16 elements x K and V x 2 bytes = 2048 bytes.
std::unique_ptr<KvStore> make_store(std::int64_t n_pages) {
  KvStoreConfig config;
  config.shape = kShape;
  config.n_layers = 2;
  config.budget_bytes = static_cast<std::uint64_t>(n_pages) * 2048;
  auto store = KvStore::create(config);
  EXPECT_TRUE(store.ok()) << store.status().to_string();
  return std::move(*store);
}

// With the pages of the uncompressed form.
Status open(KvStore& store, SequenceId sequence, std::int64_t max_tokens) {
  return store.open(sequence, max_tokens,
                    stage_pages(kShape, 2, std::max<std::int64_t>(max_tokens, 0)));
}
Status extend(KvStore& store, SequenceId sequence, std::int64_t n_tokens) {
  return store.extend(sequence, std::vector<std::int32_t>(static_cast<std::size_t>(n_tokens)));
}
Status fork(KvStore& store, SequenceId parent, SequenceId child, std::int64_t n_tokens,
            std::int64_t max_tokens) {
  return store.fork(parent, child, n_tokens, max_tokens,
                    stage_pages(kShape, 2, max_tokens) - shared_stage_pages(kShape, 2, n_tokens));
}

TEST(KvStore, ASequenceTakesAPageForEveryLayerAndHead) {
  const auto store = make_store(16);
  ASSERT_TRUE(open(*store, 5, 40).ok());
  EXPECT_EQ(store->pool().n_reserved(), 8);
  EXPECT_EQ(store->stats().used_bytes, 0u);
  ASSERT_TRUE(extend(*store, 5, 32).ok());
  EXPECT_EQ(store->pool().n_used(), 4);
  ASSERT_TRUE(extend(*store, 5, 1).ok());
  EXPECT_EQ(store->pool().n_used(), 8);
  EXPECT_EQ(store->length(5), 33);
  EXPECT_EQ(store->stats().layer_used_bytes, (std::vector<std::uint64_t>{8192, 8192}));
  store->check_invariants();

  const auto freed = store->free(5);
  ASSERT_TRUE(freed.ok());
  EXPECT_EQ(freed->kept_bytes, 8u * 2048);
  EXPECT_EQ(freed->full_bytes, 4u * 2 * 16 * 2 * 33);
  EXPECT_EQ(store->pool().n_used(), 0);
  EXPECT_EQ(store->pool().n_reserved(), 0);
  EXPECT_EQ(store->stats().peak_bytes, 8u * 2048);
}

TEST(KvStore, OpenReservesSoThatExtendCannotRunOut) {
  const auto store = make_store(12);
  ASSERT_TRUE(open(*store, 1, 64).ok());  // 8 pages
  EXPECT_EQ(open(*store, 2, 64).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(store->n_sequences(), 1u);
  ASSERT_TRUE(open(*store, 3, 32).ok());  // 4 pages
  EXPECT_TRUE(extend(*store, 1, 64).ok());
  EXPECT_TRUE(extend(*store, 3, 32).ok());
  store->check_invariants();
}

TEST(KvStore, MistakesOfAPlanAreErrors) {
  const auto store = make_store(16);
  ASSERT_TRUE(open(*store, 1, 10).ok());
  EXPECT_EQ(open(*store, 1, 10).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(open(*store, 2, 0).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(extend(*store, 1, 11).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(extend(*store, 9, 1).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(store->free(9).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(fork(*store, 9, 3, 0, 5).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(fork(*store, 1, 3, 5, 10).code(), StatusCode::kInvalidArgument);  // only 0 tokens there
  EXPECT_EQ(store->open(4, 10, -1).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(store->length(9), 0);
  store->check_invariants();
}

TEST(KvStore, TheReservationLimitsWhatASequenceTakes) {
  const auto store = make_store(16);
  ASSERT_TRUE(store->open(1, 100, 4).ok());
  ASSERT_TRUE(extend(*store, 1, 32).ok());
  EXPECT_EQ(extend(*store, 1, 1).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(store->length(1), 32);
  // A fork of 32 tokens copies nothing, one of 20 a page for every head.
  EXPECT_EQ(store->fork(1, 2, 20, 100, 3).code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(store->fork(1, 2, 20, 100, 4).ok());
  ASSERT_TRUE(store->fork(1, 3, 32, 100, 0).ok());
  EXPECT_EQ(extend(*store, 3, 1).code(), StatusCode::kResourceExhausted);
  store->check_invariants();
}

TEST(KvStore, AForkSharesFullPagesAndCopiesThePartlyFilledOne) {
  const auto store = make_store(40);
  ASSERT_TRUE(open(*store, 1, 100).ok());
  ASSERT_TRUE(extend(*store, 1, 40).ok());
  for (int layer = 0; layer < 2; ++layer) {
    for (const auto& head : store->writable_heads(1, layer)) {
      std::memset(head.pages[0], 1, 2048);
      std::memset(head.pages[1], 2, 2048);
    }
  }
  ASSERT_TRUE(fork(*store, 1, 2, 40, 70).ok());
  EXPECT_EQ(store->length(2), 40);
  EXPECT_EQ(store->pool().n_used(), 8 + 4);
  for (int layer = 0; layer < 2; ++layer) {
    for (int head = 0; head < 2; ++head) {
      const auto& parent = store->heads(1, layer)[static_cast<std::size_t>(head)];
      const auto& child = store->heads(2, layer)[static_cast<std::size_t>(head)];
      EXPECT_EQ(parent.pages[0], child.pages[0]);
      ASSERT_NE(parent.pages[1], child.pages[1]);
      EXPECT_EQ(std::memcmp(parent.pages[1], child.pages[1], 2048), 0);
    }
  }
  store->check_invariants();
  // The shared pages outlive the parent.
  ASSERT_TRUE(store->free(1).ok());
  EXPECT_EQ(store->pool().n_used(), 8);
  EXPECT_EQ(store->heads(2, 0)[0].pages[0][100], std::byte{1});
  ASSERT_TRUE(extend(*store, 2, 30).ok());
  store->check_invariants();
  ASSERT_TRUE(store->free(2).ok());
  EXPECT_EQ(store->pool().n_used(), 0);
  EXPECT_EQ(store->pool().n_reserved(), 0);
}

TEST(KvStore, AForkAtAPageBoundaryCopiesNothing) {
  const auto store = make_store(40);
  ASSERT_TRUE(open(*store, 1, 64).ok());
  ASSERT_TRUE(extend(*store, 1, 64).ok());
  ASSERT_TRUE(fork(*store, 1, 2, 64, 65).ok());
  EXPECT_EQ(store->pool().n_used(), 8);
  EXPECT_EQ(store->pool().n_reserved(), 4);
  store->check_invariants();
}

TEST(KvStore, RandomLivesKeepEveryByteAccounted) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const auto store = make_store(200);
  std::map<SequenceId, std::int64_t> max_tokens;
  SequenceId next = 1;
  for (int i = 0; i < 5000; ++i) {
    const auto pick = [&] {
      auto it = max_tokens.begin();
      std::advance(it, static_cast<std::ptrdiff_t>(random() % max_tokens.size()));
      return it->first;
    };
    const auto limit = 1 + static_cast<std::int64_t>(random() % 200);
    switch (random() % 4) {
      case 0:
        if (open(*store, next, limit).ok()) max_tokens[next++] = limit;
        break;
      case 1:
        if (!max_tokens.empty()) {
          const SequenceId parent = pick();
          const std::int64_t n = store->length(parent);
          if (fork(*store, parent, next, n, n + limit).ok()) max_tokens[next++] = n + limit;
        }
        break;
      case 2:
        if (!max_tokens.empty()) {
          const SequenceId id = pick();
          const std::int64_t room = max_tokens[id] - store->length(id);
          ASSERT_TRUE(
              extend(*store, id, room == 0 ? 0 : static_cast<std::int64_t>(random()) % (room + 1))
                  .ok());
        }
        break;
      default:
        if (!max_tokens.empty()) {
          const SequenceId id = pick();
          ASSERT_TRUE(store->free(id).ok());
          max_tokens.erase(id);
        }
    }
    store->check_invariants();
  }
  for (const auto& [id, limit] : max_tokens) ASSERT_TRUE(store->free(id).ok());
  EXPECT_EQ(store->pool().n_used(), 0);
  EXPECT_EQ(store->pool().n_reserved(), 0);
}

}  // namespace
}  // namespace spindle::kvstore
