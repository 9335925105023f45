#include "kvstore/head_encoder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "kvstore/token_book.h"
#include "tests/kvstore/test_head.h"

namespace spindle::kvstore {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;
using testing::error_limit;
using testing::expect_content;
using testing::positions_of;
using testing::range;
using testing::TestHead;

constexpr KvCodec kRaw{};
constexpr KvCodec kInt4{KvFormat::kInt4, KvFormat::kInt4};
constexpr KvCodec kKivi4{KvFormat::kKivi4, KvFormat::kKivi4};
constexpr KvCodec kLloyd44{KvFormat::kLloyd4, KvFormat::kLloyd4};
constexpr KvCodec kBook{KvFormat::kCodebook, KvFormat::kCodebook};
constexpr KvCodec kToken{KvFormat::kToken, KvFormat::kToken};

HeadPlan full(KvCodec codec) { return {.codec = codec}; }
HeadPlan evict(KvCodec codec, KvSelector selector = KvSelector::kDefensive) {
  return {.mode = KvMode::kEvict, .selector = selector, .codec = codec, .n_keep = 1};
}
HeadPlan stream(KvCodec codec, std::int64_t window) {
  return {.mode = KvMode::kStream, .codec = codec, .window = window};
}

std::vector<std::int64_t> joined(std::vector<std::int64_t> a, const std::vector<std::int64_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// Codec, first position and tokens of each block.
struct BlockShape {
  KvCodec codec;
  std::int64_t first = 0;
  int n = 0;
  int capacity = 0;
  bool operator==(const BlockShape&) const = default;
};
std::vector<BlockShape> shapes(const HeadCache& head) {
  std::vector<BlockShape> out;
  for (const kernels::KvBlock& block : head.blocks) {
    out.push_back({block.codec, block.first_position, block.end, block.capacity});
  }
  return out;
}

TEST(TailBegin, RecentTokensStayInWholePages) {
  EXPECT_EQ(tail_begin(0, 0, 64, 200), 128);  // 136 down to a page
  EXPECT_EQ(tail_begin(0, 0, 64, 192), 128);
  EXPECT_EQ(tail_begin(0, 0, 32, 200), 160);
  EXPECT_EQ(tail_begin(0, 0, 0, 200), 200);
  EXPECT_EQ(tail_begin(0, 0, 64, 60), 0);
  EXPECT_EQ(tail_begin(128, 128, 64, 190), 128);  // nothing more leaves yet
  EXPECT_EQ(tail_begin(200, 200, 64, 300), 232);  // from an origin that is no page's
  EXPECT_EQ(tail_begin(128, 150, 64, 210), 150);  // hidden slots do not come back
}

TEST(HeadEncoder, AFullRawHeadKeepsItsTail) {
  TestHead head({});
  head.append(200);
  EXPECT_FALSE(head.boundary(full(kRaw), 4, 64).move.changes);
  std::vector<std::int32_t> kept;
  EXPECT_FALSE(head.boundary(full(kRaw), 4, 0, &kept).move.changes);
  EXPECT_EQ(positions_of(head.read()), range(0, 200));
  head.expect_everything_right();
}

TEST(HeadEncoder, SinksLieInARawBlockAndTheRestInFullBlocks) {
  TestHead head({});
  head.append(200);
  const EncodedHead encoded = head.boundary(full(kInt4), 4, 64);
  EXPECT_EQ(encoded.move.tail_first, 128);
  EXPECT_EQ(encoded.move.tail_origin, 128);
  EXPECT_EQ(shapes(head.head()), (std::vector<BlockShape>{{kRaw, 0, 4, 4},
                                                          {kInt4, 4, 32, 32},
                                                          {kInt4, 36, 32, 32},
                                                          {kInt4, 68, 32, 32},
                                                          {kInt4, 100, 28, 32}}));
  EXPECT_EQ(positions_of(head.read()), range(0, 200));
  head.expect_everything_right();
}

TEST(HeadEncoder, SinksBeyondABlockTakeSeveral) {
  TestHead head({});
  head.append(200);
  head.boundary(full(kLloyd44), 50, 0);
  const auto got = shapes(head.head());
  ASSERT_EQ(got.size(), 2u + 5u);
  EXPECT_EQ(got[0], (BlockShape{kRaw, 0, 32, 32}));
  EXPECT_EQ(got[1], (BlockShape{kRaw, 32, 18, 20}));
  EXPECT_EQ(got[2], (BlockShape{kLloyd44, 50, 32, 32}));
  EXPECT_EQ(got[6], (BlockShape{kLloyd44, 178, 22, 32}));
  EXPECT_EQ(positions_of(head.read()), range(0, 200));
  head.expect_everything_right();
}

TEST(HeadEncoder, WithoutARecentTailEverythingIsEncoded) {
  for (const int n : {161, 192}) {
    TestHead head({});
    head.append(n);
    const EncodedHead encoded = head.boundary(full(kLloyd44), 4, 0);
    EXPECT_EQ(encoded.move.tail_first, n);
    EXPECT_EQ(encoded.move.tail_origin, n);
    EXPECT_TRUE(head.head().tail_data.empty());
    EXPECT_EQ(positions_of(head.read()), range(0, n));
    head.expect_everything_right();
    // The tail then begins where it was left, which need be no multiple of a page.
    head.append(40);
    EXPECT_EQ(head.head().tail_data.size(), 2u);
    head.expect_everything_right();
  }
}

TEST(HeadEncoder, OfEvictedHeadsSinksWindowAndSelectionStay) {
  for (const KvCodec codec : {kRaw, kInt4, kLloyd44}) {
    for (const bool wide : {false, true}) {
      TestHead head({.wide = wide});
      head.append(200);
      // The tail of 32 begins at 160; the window of 32 is [168, 200).
      const std::vector<std::int32_t> kept = {10, 11, 64, 150, 167};
      head.boundary(evict(codec), 4, 0, &kept);
      EXPECT_EQ(positions_of(head.read()),
                joined({0, 1, 2, 3, 10, 11, 64, 150, 167}, range(168, 200)));
      head.expect_everything_right();
      TestHead with_tail({.wide = wide});
      with_tail.append(200);
      const std::vector<std::int32_t> outside_the_tail = {10, 11, 64, 150};
      with_tail.boundary(evict(codec), 4, 32, &outside_the_tail);
      EXPECT_EQ(positions_of(with_tail.read()),
                joined({0, 1, 2, 3, 10, 11, 64, 150}, range(160, 200)));
      EXPECT_EQ(with_tail.head().tail_first, 160);
      with_tail.expect_everything_right();
    }
  }
}

TEST(HeadEncoder, PositionsAreOfSelectedTokensOnly) {
  TestHead head({});
  head.append(200);
  const std::vector<std::int32_t> kept = {10, 150};
  const EncodedHead first = head.boundary(evict(kInt4), 4, 0, &kept);
  ASSERT_EQ(first.blocks.size(), 3u);
  EXPECT_TRUE(first.blocks[0].positions.empty());  // the sinks' block
  EXPECT_EQ(first.blocks[1].positions.size(), 64u);
  EXPECT_EQ(first.blocks[2].positions.size(), 64u);
  // Generated tokens all stay, one after the other.
  head.append(64);
  const EncodedHead second = head.boundary(evict(kInt4), 4, 0);
  ASSERT_EQ(second.blocks.size(), 2u);
  EXPECT_TRUE(second.blocks[0].positions.empty());
  EXPECT_EQ(positions_of(head.read()),
            joined(joined({0, 1, 2, 3, 10, 150}, range(168, 200)), range(200, 264)));
  head.expect_everything_right();
  // Raw ones stay in the tail.
  TestHead raw({});
  raw.append(200);
  raw.boundary(evict(kRaw), 4, 32, &kept);
  raw.append(64);
  EXPECT_FALSE(raw.boundary(evict(kRaw), 4, 32).move.changes);
  EXPECT_EQ(raw.head().tail_first, 160);
}

TEST(HeadEncoder, ALaterPromptBoundarySelectsAmongNewTokensAlone) {
  TestHead head({});
  head.append(200);
  std::vector<std::int32_t> kept = {50};
  head.boundary(evict(kLloyd44), 4, 32, &kept);  // tail [160, 200)
  const std::uint16_t* k_mean = head.head().context.k_mean;
  ASSERT_NE(k_mean, nullptr);
  head.append(100);
  kept = {170, 200};
  const EncodedHead second = head.boundary(evict(kLloyd44), 4, 32, &kept);  // tail [256, 300)
  EXPECT_TRUE(second.k_mean.empty()) << "means are frozen at the first boundary";
  EXPECT_TRUE(second.v_mean.empty());
  EXPECT_EQ(head.head().context.k_mean, k_mean);
  EXPECT_EQ(positions_of(head.read()), joined({0, 1, 2, 3, 50, 170, 200}, range(256, 300)));
  head.expect_everything_right();
}

TEST(HeadEncoder, RemaindersOfKiviStayRaw) {
  TestHead head({});
  head.append(197);
  head.boundary(full(kKivi4), 4, 0);
  const auto got = shapes(head.head());
  ASSERT_EQ(got.size(), 1u + 6u + 1u);
  EXPECT_EQ(got[6].codec, kKivi4);
  EXPECT_EQ(got[7], (BlockShape{kRaw, 196, 1, 4}));
  head.expect_everything_right();
  // Beside another codec the raw side has all 32 slots.
  TestHead mixed({});
  mixed.append(197);
  mixed.boundary(full({KvFormat::kKivi2, KvFormat::kLloyd3}), 4, 0);
  EXPECT_EQ(shapes(mixed.head()).back(),
            (BlockShape{{KvFormat::kRaw, KvFormat::kLloyd3}, 196, 1, 32}));
  mixed.expect_everything_right();
}

TEST(HeadEncoder, TokenIdsLeaveNoTailAndAreExact) {
  for (const bool wide : {false, true}) {
    TestHead head({.wide = wide});
    head.append(150);
    head.boundary(full(kToken), 4, 64);
    EXPECT_EQ(head.head().tail_first, 150);
    EXPECT_EQ(shapes(head.head()).front(), (BlockShape{kToken, 0, 32, 32}));
    head.append(64);
    head.boundary(full(kToken), 4, 64);
    EXPECT_EQ(head.head().tail_first, 214);
    EXPECT_EQ(positions_of(head.read()), range(0, 214));
    head.expect_everything_right();
  }
}

// Every value is the one that was put in, and every key is off by no more than undoing RoPE rounds.
void expect_exact(const TestHead& head) {
  for (const testing::StoredToken& token : head.read()) {
    const std::int32_t id = head.tokens()[static_cast<std::size_t>(token.position)];
    ASSERT_EQ(token.v, head.model().v(0, 0, id)) << "value at " << token.position;
    if (token.codec.k != KvFormat::kCodebook) continue;  // the raw ones are compared elsewhere
    // f16 rounds by 2^-11 of a component, once in the tail and once before RoPE; a rotation mixes
    // two of them.
    const std::vector<float> k = head.model().k_before_rope(0, 0, id);
    for (std::size_t c = 0; c < k.size(); ++c) {
      const std::size_t other = (c + k.size() / 2) % k.size();
      ASSERT_NEAR(token.k[c], k[c], 1e-3 * std::hypot(k[c], k[other]))
          << "key at " << token.position;
    }
  }
}

TEST(HeadEncoder, WithoutATableTokenIdsHaveOneOfTheirOwn) {
  // Twelve ids, and many more than the positions that see them.
  for (const int vocab : {12, 100}) {
    TestHead head({.vocab = vocab, .token_table = false});
    head.append(400);
    const EncodedHead first = head.boundary(full(kToken), 4, 64);
    EXPECT_EQ(head.head().tail_first, 400) << "nothing stays in the tail";
    EXPECT_EQ(shapes(head.head()).front(), (BlockShape{kBook, 0, 32, 32})) << "sinks are exact too";
    const std::set<std::int32_t> ids(head.tokens().begin(), head.tokens().end());
    EXPECT_EQ(first.entry_ids.size(), ids.size());
    EXPECT_EQ(head.head().k_book.n_filled, static_cast<std::int64_t>(ids.size()));
    EXPECT_EQ(head.head().v_book.n_filled, static_cast<std::int64_t>(ids.size()));
    EXPECT_EQ(head.placed_bytes(), 13u * 4 * 64 + 2 * ((ids.size() + 15) / 16) * 16 * 64);
    EXPECT_EQ(positions_of(head.read()), range(0, 400));
    expect_exact(head);
    // Ids that are known take references alone.
    for (int i = 0; i < 4; ++i) {
      head.append(64);
      const EncodedHead next = head.boundary(full(kToken), 4, 64);
      const std::set<std::int32_t> all(head.tokens().begin(), head.tokens().end());
      EXPECT_EQ(head.head().k_book.n_filled, static_cast<std::int64_t>(all.size()));
      EXPECT_EQ(next.k_entries.empty(), next.entry_ids.empty());
      EXPECT_EQ(positions_of(head.read()), range(0, head.n_tokens()));
      expect_exact(head);
    }
  }
}

TEST(HeadEncoder, ATableOfIdsThatAreAllDifferentWouldCostMoreThanRawBlocks) {
  TestHead head({.vocab = 100000, .token_table = false});
  head.append(100);
  const EncodedHead first = head.boundary(full(kToken), 4, 64);
  EXPECT_TRUE(first.entry_ids.empty());
  EXPECT_EQ(shapes(head.head()).front(), (BlockShape{kRaw, 0, 32, 32}));
  EXPECT_EQ(shapes(head.head()).back(), (BlockShape{kRaw, 96, 4, 4}));
  EXPECT_EQ(positions_of(head.read()), range(0, 100));
  head.expect_everything_right();
  expect_exact(head);
}

TEST(TokenBook, IsFullAtTheLastSixteenBitReference) {
  HeadCache head;
  head.k_book.chunks.resize(65536 / 16 - 1);  // 16 entries are left
  HeadTask task;
  task.by_id = true;
  std::vector<std::int32_t> ids(500);
  std::vector<std::int32_t> tokens(500);
  for (std::int32_t i = 0; i < 500; ++i) {
    ids[static_cast<std::size_t>(i)] = 70000 + i % 16;
    tokens[static_cast<std::size_t>(i)] = i;
  }
  task.token_ids = ids;
  const kernels::KvPageLayout layout{.head_dim = 32};
  const TokenMatch last = match_token_ids(head, task, tokens, layout);
  ASSERT_TRUE(last.pays);
  EXPECT_EQ(last.new_ids.size(), 16u);
  EXPECT_EQ(last.refs[0], 65520);
  EXPECT_EQ(last.refs[15], 65535);
  EXPECT_EQ(last.refs[16], 65520);
  EXPECT_EQ(last.new_tokens[15], 15);
  ids[499] = 1;
  EXPECT_FALSE(match_token_ids(head, task, tokens, layout).pays);
  // Known ids need no room.
  head.token_entries.emplace(1, 7);
  const TokenMatch known = match_token_ids(head, task, tokens, layout);
  ASSERT_TRUE(known.pays);
  EXPECT_EQ(known.refs[499], 7);
}

TEST(HeadEncoder, CodebooksAreSharedBetweenBoundariesAndFallBackWhereTheyDoNotPay) {
  // Twelve different tokens: a few entries serve all.
  TestHead few({.vocab = 12});
  few.append(300);
  const EncodedHead first = few.boundary(full(kBook), 4, 32);
  EXPECT_EQ(few.head().k_book.n_filled, 12);
  EXPECT_EQ(few.head().v_book.n_filled, 12);
  EXPECT_EQ(shapes(few.head())[1].codec, kBook);
  few.append(64);
  const EncodedHead second = few.boundary(full(kBook), 4, 32);
  EXPECT_FALSE(second.blocks.empty());
  EXPECT_TRUE(second.k_entries.empty()) << "all tokens match earlier entries";
  few.expect_everything_right();
  // Two thousand: no two alike.
  TestHead many({.vocab = 2000});
  many.append(300);
  many.boundary(full(kBook), 4, 32);
  EXPECT_EQ(shapes(many.head())[1].codec, kLloyd44);
  EXPECT_EQ(many.head().k_book.n_filled, 0);
  many.expect_everything_right();
  // When the fallback is raw nobody reads a mean.
  TestHead raw({.vocab = 2000});
  raw.append(300);
  std::vector<std::int32_t> kept;
  for (std::int32_t p = 10; p < 234; ++p) kept.push_back(p);
  HeadPlan with_raw = evict(kBook, KvSelector::kSpindleKv);
  with_raw.fallback = KvFormat::kRaw;
  const EncodedHead evicted = raw.boundary(with_raw, 4, 32, &kept);
  EXPECT_EQ(shapes(raw.head())[1].codec, kRaw);
  EXPECT_TRUE(evicted.k_mean.empty());
  raw.expect_everything_right();
}

TEST(HeadEncoder, StreamsKeepSinksAndWindow) {
  TestHead head({});
  head.append(105);
  // Sinks, window and one: nothing to drop.
  EXPECT_FALSE(head.boundary(stream(kRaw, 100), 4, 64).move.changes);
  head.append(1);
  head.boundary(stream(kRaw, 100), 4, 64);
  EXPECT_EQ(positions_of(head.read()), joined({0, 1, 2, 3}, range(6, 106)));
  EXPECT_EQ(head.head().tail_origin, 0);
  for (int i = 0; i < 20; ++i) {
    head.append(64);
    head.boundary(stream(kRaw, 100), 4, 64);
    const std::int64_t n = head.n_tokens();
    ASSERT_EQ(positions_of(head.read()), joined({0, 1, 2, 3}, range(n - 100, n)));
    ASSERT_LE(head.head().tail_data.size(), 5u);
    head.expect_everything_right();
  }
}

TEST(HeadEncoder, CodedStreamsRollOverManyBoundaries) {
  for (const KvCodec codec : {kInt4, kKivi4, kLloyd44, kBook}) {
    for (const int recent : {0, 32, 64}) {
      for (const int window : {40, 64, 100, 257}) {
        TestHead head({.vocab = 40});
        head.append(300);
        std::size_t most_blocks = 0;
        for (int i = 0; i < 20; ++i) {
          head.boundary(stream(codec, window), 7, recent);
          const std::int64_t n = head.n_tokens();
          ASSERT_EQ(positions_of(head.read()), joined(range(0, 7), range(n - window, n)))
              << "window " << window << ", recent " << recent << ", boundary " << i;
          head.expect_everything_right();
          most_blocks = std::max(most_blocks, head.head().blocks.size());
          head.append(64);
        }
        EXPECT_LE(most_blocks, 1u + static_cast<std::size_t>(window) / 32 + 3u +
                                   static_cast<std::size_t>(window) / 64);
      }
    }
  }
}

// Every codec, tail and mode against a naive account of which positions stay.
struct RandomCase {
  HeadPlan plan;
  int sinks = 0;
  int recent = 0;
};

RandomCase random_case(std::mt19937& random) {
  RandomCase out;
  out.sinks = static_cast<int>(random() % 5) * static_cast<int>(random() % 17);
  const int recents[] = {0, 32, 64, 128};
  out.recent = recents[random() % 4];
  const auto format = [&] {
    return static_cast<KvFormat>(random() % (static_cast<unsigned>(KvFormat::kCodebook) + 1));
  };
  out.plan.codec = random() % 8 == 0 ? kToken : KvCodec{format(), format()};
  out.plan.fallback = static_cast<KvFormat>(random() % static_cast<unsigned>(KvFormat::kCodebook));
  out.plan.mode = static_cast<KvMode>(random() % 3);
  if (out.plan.codec == kToken) out.plan.mode = KvMode::kFull;
  if (out.plan.mode == KvMode::kEvict) {
    out.plan.selector = random() % 2 == 0 ? KvSelector::kSpindleKv : KvSelector::kDefensive;
  }
  if (out.plan.mode == KvMode::kStream) out.plan.window = 1 + static_cast<int>(random() % 200);
  return out;
}

class NaiveHead {
 public:
  explicit NaiveHead(const RandomCase& c) : case_(c) {}

  void boundary(std::int64_t n, const std::vector<std::int32_t>* kept) {
    const HeadPlan& plan = case_.plan;
    const bool raw = plan.codec == kRaw;
    const std::int64_t old_cut = cut_;
    if (plan.mode == KvMode::kStream) {
      if (n <= case_.sinks + plan.window + 1) return;
      for (std::int64_t p = case_.sinks; p < n - plan.window; ++p) dropped_.insert(p);
      return;
    }
    if (plan.mode == KvMode::kFull || kept == nullptr) {
      if (!raw) cut_ = tail_cut(n);
      return;
    }
    cut_ = tail_cut(n);
    for (std::int64_t p = old_cut; p < cut_; ++p) {
      const bool stays =
          p < case_.sinks || p >= n - 32 || std::find(kept->begin(), kept->end(), p) != kept->end();
      if (!stays) dropped_.insert(p);
    }
  }
  std::vector<std::int64_t> positions(std::int64_t n) const {
    std::vector<std::int64_t> out;
    for (std::int64_t p = 0; p < n; ++p) {
      if (dropped_.count(p) == 0) out.push_back(p);
    }
    return out;
  }
  std::int64_t cut() const { return cut_; }

 private:
  std::int64_t tail_cut(std::int64_t n) const {
    if (case_.recent == 0 || case_.plan.codec == kToken) return n;
    std::int64_t cut = cut_;
    while (n - (cut + 32) >= case_.recent) cut += 32;
    return cut;
  }

  RandomCase case_;
  std::set<std::int64_t> dropped_;
  std::int64_t cut_ = 0;
};

void run_random_case(unsigned seed) {
  std::mt19937 random(seed);
  const RandomCase c = random_case(random);
  SCOPED_TRACE(plan_name(c.plan) + ", sinks " + std::to_string(c.sinks) + ", recent " +
               std::to_string(c.recent));
  TestHead head({.vocab = random() % 2 == 0 ? 30 : 900,
                 .wide = random() % 2 == 0,
                 .token_table = random() % 2 == 0,
                 .seed = seed});
  const bool by_id = is_by_id(head.head(), c.plan);
  NaiveHead naive(c);
  for (int i = 0; i < 6; ++i) {
    const bool is_prompt = i < 3;
    head.append(is_prompt ? 1 + static_cast<std::int64_t>(random() % 250) : 64);
    std::vector<std::int32_t> kept;
    for (std::int64_t p = 0; p < head.n_tokens(); ++p) {
      if (random() % 4 == 0) kept.push_back(static_cast<std::int32_t>(p));
    }
    head.boundary(c.plan, c.sinks, c.recent, is_prompt ? &kept : nullptr);
    naive.boundary(head.n_tokens(), is_prompt ? &kept : nullptr);
    ASSERT_EQ(positions_of(head.read()), naive.positions(head.n_tokens())) << "boundary " << i;
    if (c.plan.mode != KvMode::kStream) {
      ASSERT_EQ(head.head().tail_first, naive.cut());
    }
    head.expect_everything_right();
    ASSERT_LE(head.placed_bytes(), head.foretold_bytes());
    if (c.plan.codec.k != KvFormat::kCodebook && c.plan.codec.v != KvFormat::kCodebook && !by_id) {
      ASSERT_EQ(head.placed_bytes(), head.foretold_bytes());
    }
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(HeadEncoder, RandomBoundariesKeepWhatANaiveAccountKeeps) {
  const unsigned seed = std::random_device{}();
  for (unsigned i = 0; i < 300; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed + i));
    run_random_case(seed + i);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace spindle::kvstore
