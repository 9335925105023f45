// Attention over compressed blocks against fp64 over what the codecs' oracles decode.

#include <map>

#include "tests/kernels/block_cache.h"

namespace spindle::kernels {
namespace {

using enum KvFormat;

// Scores are fp32 chains over at most 128 terms and keys pass up to seven stages of butterflies and
// a rotation, so probabilities are off by some 1e-6 relative; values are a few units large.
constexpr double kTolerance = 4e-5;
// Of a logit, relative to |q| |k| * scale plus one.
constexpr double kLogitTolerance = 4e-6;

// Sides of one kind and mixtures; the first entry can be a block of few sinks.
const std::vector<KvCodec>& all_codecs() {
  static const std::vector<KvCodec> kCodecs = {
      {kRaw, kRaw},       {kInt4, kInt4},       {kKivi4, kKivi4},     {kKivi2, kKivi2},
      {kLloyd1, kLloyd1}, {kLloyd2, kLloyd2},   {kLloyd3, kLloyd3},   {kLloyd4, kLloyd4},
      {kRaw, kLloyd4},    {kLloyd3, kLloyd2},   {kLloyd4, kRaw},      {kCodebook, kCodebook},
      {kToken, kToken},   {kCodebook, kLloyd3}, {kLloyd2, kCodebook}, {kInt4, kLloyd1},
      {kLloyd1, kInt4},   {kKivi4, kLloyd4},    {kLloyd3, kKivi2},    {kRaw, kKivi4},
      {kKivi2, kRaw},     {kRaw, kInt4},        {kInt4, kKivi4},      {kCodebook, kRaw},
  };
  return kCodecs;
}

std::string codec_name(const KvCodec& codec) {
  return "K " + std::to_string(static_cast<int>(codec.k)) + " V " +
         std::to_string(static_cast<int>(codec.v));
}

RopeTable make_rope(int rotary_dim, float attention_scale = 1.0F) {
  std::vector<float> inv_freq;
  for (int i = 0; i < rotary_dim; i += 2) {
    inv_freq.push_back(std::pow(10000.0F, -static_cast<float>(i) / static_cast<float>(rotary_dim)));
  }
  return RopeTable::create(inv_freq, 8192, attention_scale).value();
}

// One sequence: a ragged cache per kv head, queries at its last positions.
struct BlockSequence {
  std::int64_t n_queries;
  std::int64_t n_context;
  std::vector<float> q;
  std::vector<std::unique_ptr<BlockCache>> caches;
  std::vector<KvHeadPages> heads;

  BlockSequence(Random& random, const RopeTable& rope, const AttentionShape& shape, DType dtype,
                std::int64_t queries, const std::vector<std::vector<KvCodec>>& codecs,
                std::int64_t max_gap = 3)
      : n_queries(queries),
        n_context(0),
        q(random.normals(queries * shape.n_heads * shape.head_dim)) {
    // Blocks are up to two positions apart.
    std::int64_t before = 30;
    for (const auto& blocks : codecs) {
      before = std::max<std::int64_t>(
          before, static_cast<std::int64_t>(blocks.size()) * (32 * max_gap + 2) + 30);
    }
    n_context = before + queries;
    for (int head = 0; head < shape.n_kv_heads; ++head) {
      HeadOptions options;
      options.head_dim = shape.head_dim;
      options.dtype = dtype;
      options.codecs = codecs[static_cast<std::size_t>(head) % codecs.size()];
      options.max_gap = max_gap;
      options.max_tail_first = before;
      caches.push_back(std::make_unique<BlockCache>(random, rope, options, n_context));
      heads.push_back(caches.back()->view());
    }
  }
};

struct Problem {
  AttentionShape shape;
  KvPageLayout layout;
  float scale;
  RopeTable rope;

  Problem(int n_kv_heads, int group, int head_dim, DType dtype, int rotary_dim,
          float attention_scale = 1.0F)
      : shape{n_kv_heads * group, n_kv_heads, head_dim},
        layout{head_dim, kKvPageTokens, dtype},
        scale(1.0F / std::sqrt(static_cast<float>(head_dim))),
        rope(make_rope(rotary_dim, attention_scale)) {}
  std::int64_t width() const { return std::int64_t{shape.n_heads} * shape.head_dim; }
  std::size_t group() const { return static_cast<std::size_t>(shape.n_heads / shape.n_kv_heads); }
};

std::vector<double> exact_logits(const Problem& p, const BlockCache& cache, const float* q,
                                 std::int64_t position) {
  std::vector<double> logits;
  for (std::size_t slot = 0; slot < cache.positions().size(); ++slot) {
    if (cache.positions()[slot] > position) break;
    double sum = 0;
    for (int d = 0; d < p.shape.head_dim; ++d) sum += double{q[d]} * cache.key(slot)[d];
    logits.push_back(sum * double{p.scale});
  }
  return logits;
}

std::vector<double> exact_row(const Problem& p, const BlockCache& cache, const float* q,
                              std::int64_t position) {
  const std::vector<double> logits = exact_logits(p, cache, q, position);
  const double best = *std::max_element(logits.begin(), logits.end());
  double mass = 0;
  std::vector<double> out(static_cast<std::size_t>(p.shape.head_dim), 0.0);
  for (std::size_t slot = 0; slot < logits.size(); ++slot) {
    const double weight = std::exp(logits[slot] - best);
    mass += weight;
    for (std::size_t d = 0; d < out.size(); ++d) out[d] += weight * cache.value(slot)[d];
  }
  for (double& value : out) value /= mass;
  return out;
}

// Rows of `out` that are the sequence's, from its query `first` on.
void expect_exact(const Problem& p, const BlockSequence& s, ConstRows out, std::int64_t first = 0) {
  for (std::int64_t i = 0; i < out.n_rows; ++i) {
    for (int head = 0; head < p.shape.n_heads; ++head) {
      const BlockCache& cache = *s.caches[static_cast<std::size_t>(head) / p.group()];
      const float* q = s.q.data() + (first + i) * p.width() + head * p.shape.head_dim;
      const std::vector<double> exact =
          exact_row(p, cache, q, s.n_context - s.n_queries + first + i);
      for (int d = 0; d < p.shape.head_dim; ++d) {
        ASSERT_NEAR(out.row(i)[head * p.shape.head_dim + d], exact[static_cast<std::size_t>(d)],
                    kTolerance)
            << "query " << first + i << " head " << head << " element " << d;
      }
    }
  }
}

using AttentionBlocksTest = KernelTest;

TEST_P(AttentionBlocksTest, ByEye) {
  // No rotation (frequency 0), scale 1, query 1 in element 0. Token 5: K = 0, V = 2; token 9:
  // K = ln 3, V = 6; in the tail K = 0, V = 11. Weights 1, 3 and 1: (2 + 18 + 11) / 5.
  constexpr int kDim = 32;
  const std::vector<float> zeros(kDim / 2, 0.0F);
  const RopeTable rope = RopeTable::create(zeros, 64).value();
  std::vector<std::uint16_t> k_table(10 * kDim, 0);
  std::vector<std::uint16_t> v_table(10 * kDim, 0);
  k_table[9 * kDim] = f32_to_f16(std::log(3.0F));
  std::fill_n(v_table.begin() + 5 * kDim, kDim, f32_to_f16(2.0F));
  std::fill_n(v_table.begin() + 9 * kDim, kDim, f32_to_f16(6.0F));
  AlignedBytes ids(64, std::byte{0});
  ids.data()[0] = std::byte{5};
  ids.data()[2] = std::byte{9};
  KvHeadContext head_context;
  head_context.k_tokens = k_table.data();
  head_context.v_tokens = v_table.data();
  head_context.token_stride = kDim;
  KvBlock block;
  block.codec = {kToken, kToken};
  block.end = 2;
  block.k.codes = ids.data();
  const KvPageLayout layout{kDim, kKvPageTokens, DType::kF16};
  AlignedBytes page(layout.page_bytes(), std::byte{0xff});
  std::byte* pages[1] = {page.data()};
  const KvWritableHeadPages writable{pages, 2};
  const std::vector<float> k(kDim, 0.0F);
  const std::vector<float> v(kDim, 11.0F);
  kv_append(context(), {k.data(), 1, kDim}, {v.data(), 1, kDim},
            std::vector<KvAppendSequence>{{0, 1, 2, &writable}}, 1, layout);
  const std::byte* const_pages[1] = {page.data()};
  const KvHeadPages head{const_pages, 2, 2, &block, 1, &head_context};
  std::vector<float> q(kDim, 0.0F);
  q[0] = 1.0F;
  GuardedRows out(1, kDim);
  attention(context(), {q.data(), 1, kDim}, std::vector<AttentionSequence>{{0, 1, 3, &head}},
            {1, 1, kDim}, layout, 1.0F, out.view(), &rope);
  out.check();
  for (int d = 0; d < kDim; ++d) EXPECT_NEAR(out.at(0, d), 6.2F, 1e-3) << d;
  GuardedRows logits(1, 3);
  attention_logits(context(), {q.data(), 1, kDim}, 3, head, 1, layout, 1.0F, &rope, logits.view());
  logits.check();
  EXPECT_EQ(logits.at(0, 0), 0.0F);
  EXPECT_NEAR(logits.at(0, 1), std::log(3.0F), 1e-3);
  EXPECT_EQ(logits.at(0, 2), 0.0F);
}

// Each codec alone, at every head_dim: a failure names it.
TEST_P(AttentionBlocksTest, EveryCodecAgainstDoublePrecision) {
  Random random(40);
  for (const KvCodec& codec : all_codecs()) {
    for (const int head_dim : {32, 64, 96, 128}) {
      SCOPED_TRACE(codec_name(codec) + " head_dim " + std::to_string(head_dim));
      const Problem p(1, 2, head_dim, DType::kF16, head_dim);
      // One decode token, and a chunk long enough to widen blocks.
      for (const std::int64_t n_queries : {1, 9}) {
        const BlockSequence s(random, p.rope, p.shape, p.layout.dtype, n_queries,
                              {{codec, codec, codec}});
        GuardedRows out(n_queries, p.width());
        attention(context(), {s.q.data(), n_queries, p.width()},
                  std::vector<AttentionSequence>{{0, n_queries, s.n_context, s.heads.data()}},
                  p.shape, p.layout, p.scale, out.view(), &p.rope);
        out.check();
        expect_exact(p, s, out.view());
        s.caches[0]->check_guards();
      }
    }
  }
}

// Listed positions near each other and far apart, with a table that scales, and heads that are
// rotated in part; up to the largest head_dim.
TEST_P(AttentionBlocksTest, PositionsOfKeysBeforeRope) {
  Random random(48);
  for (const KvCodec& codec : {KvCodec{kLloyd4, kLloyd3}, KvCodec{kToken, kToken},
                               KvCodec{kCodebook, kInt4}, KvCodec{kLloyd1, kKivi4}}) {
    for (const auto& [head_dim, rotary_dim] :
         {std::pair{64, 64}, {64, 32}, {64, 24}, {96, 96}, {128, 128}, {256, 256}}) {
      for (const std::int64_t max_gap : {1, 3, 20, 60, 120}) {
        SCOPED_TRACE(codec_name(codec) + " head_dim " + std::to_string(head_dim) + " rotary " +
                     std::to_string(rotary_dim) + " gap " + std::to_string(max_gap));
        const Problem p(1, 2, head_dim, DType::kF16, rotary_dim, 0.9F);
        for (const std::int64_t n_queries : {1, 2, 7}) {
          const BlockSequence s(random, p.rope, p.shape, p.layout.dtype, n_queries,
                                {{codec, codec}}, max_gap);
          GuardedRows out(n_queries, p.width());
          attention(context(), {s.q.data(), n_queries, p.width()},
                    std::vector<AttentionSequence>{{0, n_queries, s.n_context, s.heads.data()}},
                    p.shape, p.layout, p.scale, out.view(), &p.rope);
          out.check();
          expect_exact(p, s, out.view());
        }
      }
    }
  }
}

std::vector<KvCodec> random_codecs(Random& random, std::int64_t n_max) {
  std::vector<KvCodec> codecs;
  const std::int64_t n = random.below(n_max + 1);
  if (n > 0 && random.below(2) == 0) codecs.push_back({kRaw, kRaw});
  while (static_cast<std::int64_t>(codecs.size()) < n) {
    codecs.push_back(
        all_codecs()[static_cast<std::size_t>(random.below(std::ssize(all_codecs())))]);
  }
  return codecs;
}

// Prefill chunks and decode tokens of ragged caches of mixed formats in one call, with rows that
// belong to nobody.
TEST_P(AttentionBlocksTest, MixedBatch) {
  Random random(41);
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    for (const int group : {1, 2, 4}) {
      const int head_dim = 32 * (1 + static_cast<int>(random.below(4)));
      const int rotary_dim = random.below(2) == 0 ? head_dim : head_dim / 2;
      const Problem p(3, group, head_dim, dtype, rotary_dim);
      std::vector<std::unique_ptr<BlockSequence>> owned;
      std::vector<AttentionSequence> sequences;
      std::int64_t n_rows = 2;
      for (const std::int64_t n_queries : {1, 40, 0, 1, 7}) {
        std::vector<std::vector<KvCodec>> codecs;
        for (int head = 0; head < 3; ++head) codecs.push_back(random_codecs(random, 5));
        owned.push_back(
            std::make_unique<BlockSequence>(random, p.rope, p.shape, dtype, n_queries, codecs));
        sequences.push_back(
            {n_rows, n_queries, owned.back()->n_context, owned.back()->heads.data()});
        n_rows += n_queries + 1;
      }
      std::vector<float> q(static_cast<std::size_t>(n_rows * p.width()), 0.0F);
      std::vector<float> out(q.size(), -7.0F);
      for (std::size_t i = 0; i < owned.size(); ++i) {
        std::copy(owned[i]->q.begin(), owned[i]->q.end(),
                  q.begin() + sequences[i].query_begin * p.width());
      }
      const Rows view{out.data(), n_rows, p.width()};
      attention(context(), {q.data(), n_rows, p.width()}, sequences, p.shape, p.layout, p.scale,
                view, &p.rope);
      std::vector<bool> is_owned(static_cast<std::size_t>(n_rows), false);
      for (std::size_t i = 0; i < owned.size(); ++i) {
        expect_exact(p, *owned[i], view.rows(sequences[i].query_begin, owned[i]->n_queries));
        for (std::int64_t r = 0; r < owned[i]->n_queries; ++r) {
          is_owned[static_cast<std::size_t>(sequences[i].query_begin + r)] = true;
        }
      }
      for (std::int64_t r = 0; r < n_rows; ++r) {
        EXPECT_EQ(view.row(r)[0] == -7.0F, !is_owned[static_cast<std::size_t>(r)]) << "row " << r;
      }
    }
  }
}

TEST_P(AttentionBlocksTest, RawBlocksOfHeadsThatAreNoMultipleOf32) {
  Random random(42);
  for (const int head_dim : {16, 48, 80}) {
    for (const int group : {1, 4}) {
      const Problem p(2, group, head_dim, DType::kBF16, head_dim);
      for (const std::int64_t n_queries : {1, 20}) {
        const BlockSequence s(random, p.rope, p.shape, p.layout.dtype, n_queries,
                              {{{kRaw, kRaw}, {kRaw, kRaw}, {kRaw, kRaw}}, {{kRaw, kRaw}}});
        GuardedRows out(n_queries, p.width());
        attention(context(), {s.q.data(), n_queries, p.width()},
                  std::vector<AttentionSequence>{{0, n_queries, s.n_context, s.heads.data()}},
                  p.shape, p.layout, p.scale, out.view());
        out.check();
        expect_exact(p, s, out.view());
      }
    }
  }
}

// The contract: a token's result has the same bits in any chunk, beside any other sequence, and on
// any number of threads.
TEST_P(AttentionBlocksTest, ChunksAndDecodeGiveTheSameBits) {
  Random random(43);
  const auto other = context_with(1 + GetParam().n_threads % 3);
  const std::int64_t n = 40;
  for (std::size_t first = 0; first < all_codecs().size(); first += 2) {
    const int group = 1 << random.below(3);
    const int head_dim = 32 * (1 + static_cast<int>(random.below(4)));
    const Problem p(2, group, head_dim, DType::kF16, head_dim);
    const KvCodec a = all_codecs()[first];
    const KvCodec b = all_codecs()[first + 1];
    const BlockSequence s(random, p.rope, p.shape, p.layout.dtype, n, {{a, b, a}, {b, a}});
    const BlockSequence neighbour(random, p.rope, p.shape, p.layout.dtype, 3, {{b, b}, {}});
    const ConstRows q{s.q.data(), n, p.width()};
    GuardedRows whole(n, p.width());
    attention(context(), q, std::vector<AttentionSequence>{{0, n, s.n_context, s.heads.data()}},
              p.shape, p.layout, p.scale, whole.view(), &p.rope);
    whole.check();
    for (const std::int64_t chunk : {1, 5, 24}) {
      SCOPED_TRACE(codec_name(a) + ", " + codec_name(b) + ", chunks of " + std::to_string(chunk));
      GuardedRows out(n, p.width());
      for (std::int64_t begin = 0; begin < n; begin += chunk) {
        const std::int64_t n_rows = std::min(chunk, n - begin);
        std::vector<float> rows = neighbour.q;
        rows.insert(rows.end(), q.row(begin), q.row(begin) + n_rows * p.width());
        GuardedRows step(3 + n_rows, p.width());
        const std::int64_t seen = s.n_context - n + begin + n_rows;
        attention(
            *other, {rows.data(), 3 + n_rows, p.width()},
            std::vector<AttentionSequence>{{3, n_rows, seen, s.heads.data()},
                                           {0, 3, neighbour.n_context, neighbour.heads.data()}},
            p.shape, p.layout, p.scale, step.view(), &p.rope);
        step.check();
        for (std::int64_t r = 0; r < n_rows; ++r) {
          std::copy_n(step.view().row(3 + r), p.width(), out.view().row(begin + r));
        }
      }
      out.check();
      expect_same_bits(out.view(), whole.view());
    }
  }
}

TEST_P(AttentionBlocksTest, LogitsAgainstDoublePrecision) {
  Random random(44);
  for (const KvCodec& codec : all_codecs()) {
    SCOPED_TRACE(codec_name(codec));
    const int head_dim = 32 * (1 + static_cast<int>(random.below(4)));
    const int group = 1 << random.below(3);
    const Problem p(1, group, head_dim, DType::kF16, head_dim);
    for (const std::int64_t n_queries : {1, 32}) {
      const BlockSequence s(random, p.rope, p.shape, p.layout.dtype, n_queries,
                            {{{kRaw, kRaw}, codec, {kInt4, kInt4}, codec}});
      const BlockCache& cache = *s.caches[0];
      const KvHeadPages& head = s.heads[0];
      // Also before the tail is full, down to no tail at all.
      for (const std::int64_t n_context : {s.n_context, head.tail_first + 1, head.tail_first}) {
        const std::int64_t n_slots = visible_slots(head, n_context);
        const auto n_seen = std::count_if(cache.positions().begin(), cache.positions().end(),
                                          [&](std::int64_t at) { return at < n_context; });
        ASSERT_EQ(n_slots, n_seen);
        GuardedRows logits(n_queries * group, n_slots);
        attention_logits(context(), {s.q.data(), n_queries, p.width()}, n_context, head, group,
                         p.layout, p.scale, &p.rope, logits.view());
        logits.check();
        for (std::int64_t row = 0; row < n_queries * group; ++row) {
          const float* q = s.q.data() + row * head_dim;
          const std::vector<double> exact = exact_logits(p, cache, q, n_context - 1);
          ASSERT_EQ(std::ssize(exact), n_slots);
          double q_norm = 0;
          for (int d = 0; d < head_dim; ++d) q_norm += double{q[d]} * double{q[d]};
          for (std::int64_t slot = 0; slot < n_slots; ++slot) {
            double k_norm = 0;
            for (int d = 0; d < head_dim; ++d) {
              const double k = cache.key(static_cast<std::size_t>(slot))[d];
              k_norm += k * k;
            }
            const double size = std::sqrt(q_norm * k_norm) * double{p.scale} + 1.0;
            ASSERT_NEAR(logits.at(row, slot), exact[static_cast<std::size_t>(slot)],
                        kLogitTolerance * size)
                << "row " << row << " slot " << slot;
          }
        }
      }
    }
  }
}

// A token's K alone, seen by one or by many queries, has the same logits.
TEST_P(AttentionBlocksTest, LogitsDoNotDependOnTheRows) {
  Random random(45);
  const Problem p(1, 2, 64, DType::kF16, 64);
  const std::int64_t n = 24;
  const BlockSequence s(random, p.rope, p.shape, p.layout.dtype, n, {all_codecs()});
  const std::int64_t n_slots = visible_slots(s.heads[0], s.n_context);
  GuardedRows whole(2 * n, n_slots);
  attention_logits(context(), {s.q.data(), n, p.width()}, s.n_context, s.heads[0], 2, p.layout,
                   p.scale, &p.rope, whole.view());
  whole.check();
  for (std::int64_t i = 0; i < n; ++i) {
    GuardedRows one(2, n_slots);
    attention_logits(context(), {s.q.data() + i * p.width(), 1, p.width()}, s.n_context, s.heads[0],
                     2, p.layout, p.scale, &p.rope, one.view());
    one.check();
    expect_same_bits(one.view(), whole.view().rows(2 * i, 2));
  }
}

// Slots outside [first, end) play no part: not their positions and ids, which are arbitrary in
// every test here, and not their numbers.
TEST_P(AttentionBlocksTest, HiddenSlotsPlayNoPart) {
  Random random(46);
  const Problem p(1, 2, 64, DType::kF16, 64);
  for (const std::int64_t n_queries : {1, 12}) {
    BlockSequence s(random, p.rope, p.shape, p.layout.dtype, n_queries,
                    {{{kRaw, kRaw}, {kRaw, kRaw}, {kRaw, kRaw}}});
    const auto run = [&] {
      GuardedRows out(n_queries, p.width());
      attention(context(), {s.q.data(), n_queries, p.width()},
                std::vector<AttentionSequence>{{0, n_queries, s.n_context, s.heads.data()}},
                p.shape, p.layout, p.scale, out.view());
      out.check();
      return out;
    };
    GuardedRows before = run();
    for (KvBlock& block : s.caches[0]->blocks()) {
      auto* k = const_cast<std::uint16_t*>(reinterpret_cast<const std::uint16_t*>(block.k.codes));
      auto* v = const_cast<std::uint16_t*>(reinterpret_cast<const std::uint16_t*>(block.v.codes));
      for (int t = 0; t < block.capacity; ++t) {
        if (t >= block.first && t < block.end) continue;
        for (int d = 0; d < 64; ++d) k[d * block.capacity + t] = v[t * 64 + d] = 0x7e00;
      }
    }
    GuardedRows after = run();
    expect_same_bits(after.view(), before.view());
  }
}

TEST_P(AttentionBlocksTest, LargeScoresDoNotOverflow) {
  Random random(47);
  const Problem p(1, 2, 64, DType::kF16, 64);
  BlockSequence s(random, p.rope, p.shape, p.layout.dtype, 5, {all_codecs()});
  for (float& value : s.q) value *= 60.0F;
  GuardedRows out(5, p.width());
  attention(context(), {s.q.data(), 5, p.width()},
            std::vector<AttentionSequence>{{0, 5, s.n_context, s.heads.data()}}, p.shape, p.layout,
            p.scale, out.view(), &p.rope);
  out.check();
  for (std::int64_t i = 0; i < 5; ++i) {
    for (std::int64_t j = 0; j < p.width(); ++j) ASSERT_LT(std::abs(out.at(i, j)), 12.0F);
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, AttentionBlocksTest, testing::ValuesIn(all_backends()), backend_name);

}  // namespace
}  // namespace spindle::kernels
