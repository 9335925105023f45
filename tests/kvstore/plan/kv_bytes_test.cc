#include <gtest/gtest.h>

#include <map>
#include <random>

#include "tests/kvstore/plan/plan_fixture.h"

namespace spindle::kvstore {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;
using testing::mini_model;

constexpr KvCodec kLloyd44{KvFormat::kLloyd4, KvFormat::kLloyd4};

HeadPlan evict(KvCodec codec) {
  return {.mode = KvMode::kEvict, .selector = KvSelector::kSnapKvMean, .codec = codec};
}

TEST(KvBytes, OfTheModel) {
  const KvModel model = mini_model();
  EXPECT_EQ(full_bytes(model, 1), 6144);
  EXPECT_EQ(full_bytes(model, 2000), 12'288'000);
  EXPECT_EQ(page_bytes(model), 8192);
}

TEST(KvBytes, TailBeginsAtABlock) {
  EXPECT_EQ(tail_length(64, 2000), 80);  // 1936 down to 1920
  EXPECT_EQ(tail_length(64, 1984), 64);
  EXPECT_EQ(tail_length(32, 2000), 48);
  EXPECT_EQ(tail_length(0, 2000), 0);
  EXPECT_EQ(tail_length(4096, 100), 100);
}

TEST(KvBytes, BodiesByHand) {
  const KvModel model = mini_model();
  EXPECT_EQ(head_body_bytes(evict({}), model, 4, 0), 0);
  // 32 + 5 tokens, the latter in a block for 8; two position pieces.
  EXPECT_EQ(head_body_bytes(evict({}), model, 4, 37), 40 * 256 + 2 * 64);
  EXPECT_EQ(head_body_bytes({.mode = KvMode::kStream, .window = 64}, model, 4, 4), 4 * 256);
  // Sinks; 4 blocks of (1024 + 64) for each side; positions; two means.
  EXPECT_EQ(head_body_bytes(evict(kLloyd44), model, 4, 104), 1024 + 4 * 2176 + 4 * 64 + 2 * 128);
  EXPECT_EQ(head_body_bytes({.codec = kLloyd44}, model, 4, 104), 1024 + 4 * 2176 + 2 * 128);
  EXPECT_EQ(head_body_bytes({.codec = kLloyd44}, model, 6, 104), 8 * 256 + 4 * 2176 + 2 * 128);
  EXPECT_EQ(head_body_bytes({.codec = {KvFormat::kInt4, KvFormat::kInt4}}, model, 4, 68),
            1024 + 2 * 2304);
  EXPECT_EQ(head_body_bytes({.codec = {KvFormat::kKivi2, KvFormat::kKivi2}}, model, 0, 32),
            2 * (512 + 256));
  // A raw side has whole blocks beside a coded one.
  EXPECT_EQ(head_body_bytes({.codec = {KvFormat::kRaw, KvFormat::kLloyd4}}, model, 4, 5),
            1024 + 4096 + 1088 + 128);
  EXPECT_EQ(head_body_bytes({.codec = {KvFormat::kToken, KvFormat::kToken}}, model, 4, 100),
            4 * 64);
}

TEST(KvBytes, WideIdsAndPositions) {
  KvModel model = mini_model();
  model.vocab_size = 128'000;
  model.max_model_len = 131'072;
  EXPECT_EQ(head_body_bytes({.codec = {KvFormat::kToken, KvFormat::kToken}}, model, 4, 100),
            4 * 128);
  EXPECT_EQ(head_body_bytes(evict({}), model, 4, 37), 40 * 256 + 2 * 128);
}

TEST(KvBytes, OwnTablesOfTokenIdsCountTheirEntries) {
  KvModel model = mini_model();
  const HeadPlan plan{.codec = {KvFormat::kToken, KvFormat::kToken}};
  EXPECT_EQ(head_body_bytes(plan, model, 4, 2000, nullptr, 300), 63 * 64) << "with the whole table";
  model.token_table = false;
  // 63 blocks of references and magnitudes and 19 chunks of 16 entries, for each side.
  EXPECT_EQ(head_body_bytes(plan, model, 4, 2000, nullptr, 300), 2 * (63 * 128 + 19 * 2048));
  EXPECT_EQ(head_bytes(plan, model, 4, 2000, 80, nullptr, 300), 2 * (63 * 128 + 19 * 2048));
  // Raw blocks where that is no more, and where nobody counted.
  EXPECT_EQ(head_body_bytes(plan, model, 4, 2000, nullptr, 1999), 2000 * 256);
  EXPECT_EQ(head_body_bytes(plan, model, 4, 2000), 2000 * 256);
  EXPECT_EQ(head_body_bytes(plan, model, 4, 200'000, nullptr, 65'537), 200'000 * 256);
  EXPECT_LT(head_body_bytes(plan, model, 4, 200'000, nullptr, 65'536), 200'000 * 256);
}

TEST(KvBytes, NewIdsAreCountedOnce) {
  const std::vector<std::int32_t> ids = {5, 5, 7, 9, 7, 9, 5, 3};
  EXPECT_EQ(count_new_ids(ids, 0, 10), 4);
  EXPECT_EQ(count_new_ids(ids, 3, 10), 2);
  EXPECT_EQ(count_new_ids(ids, 8, 10), 0);
  EXPECT_EQ(count_new_ids({}, 0, 10), 0);
  // Nobody knows what an id outside the vocabulary is.
  EXPECT_EQ(count_new_ids(ids, 0, 6), 6);
}

TEST(KvBytes, CodebooksNeverCostMoreThanTheirFallback) {
  const KvModel model = mini_model();
  const HeadPlan plan{.codec = {KvFormat::kCodebook, KvFormat::kCodebook}};
  const HeadErrors errors{.codebook_k_entries = 0.25, .codebook_v_entries = 0.1};
  // K: 10 blocks of 128 and 5 chunks of 16 entries come to 11,520, lloyd4 with its mean to 11,008.
  // V: 10 blocks of 128 and 2 chunks.
  EXPECT_EQ(head_body_bytes(plan, model, 0, 320, &errors), 11'008 + 1280 + 2 * 2048);
  EXPECT_EQ(head_body_bytes(plan, model, 0, 320), 2 * 11'008);
}

TEST(KvBytes, WholeHeadsByHand) {
  const KvModel model = mini_model();
  EXPECT_EQ(head_bytes({}, model, 4, 2000, 80), 63 * 8192);
  EXPECT_EQ(head_bytes({.codec = {KvFormat::kToken, KvFormat::kToken}}, model, 4, 2000, 80),
            63 * 64);
  // 1920 tokens before the tail, 1916 of them in 60 blocks; 3 pages.
  EXPECT_EQ(head_bytes({.codec = kLloyd44}, model, 4, 2000, 80), 1024 + 60 * 2176 + 256 + 3 * 8192);
  // The tail from 1728 (2000 - 256 = 1744) on.
  EXPECT_EQ(head_bytes({.mode = KvMode::kStream, .window = 256}, model, 4, 2000, 80),
            1024 + 9 * 8192);
  // Tokens 1744 to 1919 in 6 blocks.
  EXPECT_EQ(
      head_bytes({.mode = KvMode::kStream, .codec = kLloyd44, .window = 256}, model, 4, 2000, 80),
      1024 + 6 * 2176 + 256 + 3 * 8192);
  HeadPlan plan = evict(kLloyd44);
  plan.n_keep = 100;
  EXPECT_EQ(head_bytes(plan, model, 4, 2000, 80), 1024 + 4 * (2176 + 64) + 256 + 3 * 8192);
  // Without a tail the observation window is encoded too.
  EXPECT_EQ(head_bytes(plan, model, 4, 2000, 0), 1024 + 5 * (2176 + 64) + 256);
}

// Counts token by token what the store's rules say.
std::uint64_t naive_head_bytes(const HeadPlan& plan, const KvModel& model, int sinks,
                               std::int64_t n_tokens, std::int64_t tail_tokens) {
  const bool raw = plan.codec == KvCodec{};
  std::int64_t tail_begin = n_tokens - tail_tokens;
  if (raw && plan.mode == KvMode::kFull) tail_begin = 0;
  if (raw && plan.mode == KvMode::kStream) {
    while (tail_begin > 0 && (tail_begin % 32 != 0 || tail_begin > n_tokens - plan.window)) {
      --tail_begin;
    }
  }
  std::int64_t n_sinks = 0;
  std::int64_t n_body = 0;
  std::int64_t candidates_left = plan.n_keep;
  std::map<std::int64_t, int> pages;
  for (std::int64_t t = 0; t < n_tokens; ++t) {
    if (t >= tail_begin) {
      ++pages[t / 32];
    } else if (t < sinks) {
      ++n_sinks;
    } else if (plan.mode == KvMode::kFull) {
      ++n_body;
    } else if (plan.mode == KvMode::kStream) {
      n_body += t >= n_tokens - plan.window ? 1 : 0;
    } else if (t >= n_tokens - kObservationWindow) {
      ++n_body;
    } else if (candidates_left > 0) {
      --candidates_left;
      ++n_body;
    }
  }
  std::uint64_t bytes = pages.size() * 32 * 256;
  if (raw) n_body += n_sinks;
  while (!raw && n_sinks % 4 != 0) ++n_sinks;
  if (!raw) bytes += static_cast<std::uint64_t>(n_sinks) * 256;
  const std::int64_t body_tokens = n_body;
  for (; n_body > 0; n_body -= 32) {
    if (plan.mode == KvMode::kEvict) bytes += 64;
    int capacity = 32;
    while (raw && capacity - 4 >= n_body) capacity -= 4;
    bytes += kernels::kv_side_bytes(plan.codec.k, kernels::KvSide::kKey, model.head_dim,
                                    model.dtype, capacity)
                 .total();
    bytes += kernels::kv_side_bytes(plan.codec.v, kernels::KvSide::kValue, model.head_dim,
                                    model.dtype, capacity)
                 .total();
  }
  if (body_tokens + n_sinks > 0) {
    bytes += kernels::is_lloyd(plan.codec.k) ? 128 : 0;
    bytes += kernels::is_lloyd(plan.codec.v) ? 128 : 0;
  }
  return bytes;
}

TEST(KvBytes, AgainstANaiveCount) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const KvModel model = mini_model();
  const std::vector<KvFormat> formats = {KvFormat::kRaw,    KvFormat::kInt4,   KvFormat::kKivi4,
                                         KvFormat::kLloyd1, KvFormat::kLloyd3, KvFormat::kLloyd4};
  for (int round = 0; round < 3000; ++round) {
    const auto n_tokens = static_cast<std::int64_t>(101 + random() % 700);
    const int sinks = static_cast<int>(random() % (n_tokens > 140 ? 65 : 5));
    const auto recent = static_cast<int>(random() % 5) * 32;
    HeadPlan plan{
        .mode = static_cast<KvMode>(random() % 3),
        .codec = {formats[random() % formats.size()], formats[random() % formats.size()]}};
    if (random() % 3 == 0) plan.codec = {};
    if (plan.mode == KvMode::kStream) plan.window = static_cast<std::int64_t>(1 + random() % 400);
    if (plan.mode == KvMode::kEvict) plan.n_keep = static_cast<std::int64_t>(random() % 500);
    const std::int64_t tail = tail_length(recent, n_tokens);
    ASSERT_EQ(head_bytes(plan, model, sinks, n_tokens, tail),
              naive_head_bytes(plan, model, sinks, n_tokens, tail))
        << plan_name(plan) << " n_keep " << plan.n_keep << " sinks " << sinks << " tokens "
        << n_tokens << " tail " << tail;
  }
}

TEST(KvBytes, UnionOfQueryHeadsIsBoundedByTheirSum) {
  HeadPlan plan{.mode = KvMode::kEvict, .selector = KvSelector::kSpindleKv, .n_keep = 100};
  EXPECT_EQ(head_tokens(plan, mini_model(), 4, 2000, 80).body, 204);
  plan.n_keep = 1500;
  EXPECT_EQ(head_tokens(plan, mini_model(), 4, 2000, 80).body, 1920);
}

}  // namespace
}  // namespace spindle::kvstore
