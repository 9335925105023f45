// Decode attention on the device against the CPU body over the same tokens.

#include <memory>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "tests/gpu/device_cache.h"
#include "tests/gpu/gpu_fixture.h"
#include "tests/kernels/block_cache.h"

namespace spindle::kernels {
namespace {

using enum KvFormat;
using testing::DeviceCache;
using testing::DeviceRopeTable;
using testing::DeviceVector;

// Queries and elements are exact in f16, weights are rounded to f16 (2^-12 of each value) and the
// output to bf16 (2^-9). Keys rotated in f16 add an error of some 2^-10 to a score. With a bf16
// pool queries and weights are bf16.
struct Tolerance {
  float absolute;
  float relative;
  double of_norm;
};
constexpr Tolerance kF16Tolerance{.absolute = 1e-2F, .relative = 0x1p-7F, .of_norm = 4e-3};
constexpr Tolerance kBf16Tolerance{.absolute = 4e-2F, .relative = 0x1p-6F, .of_norm = 1e-2};

struct Problem {
  AttentionShape shape;
  KvPageLayout layout;
  float scale;
  RopeTable rope;

  Problem(int n_kv_heads, int group, int head_dim, DType dtype, float attention_scale = 1.0F)
      : shape{n_kv_heads * group, n_kv_heads, head_dim},
        layout{head_dim, kKvPageTokens, dtype},
        scale(1.0F / std::sqrt(static_cast<float>(head_dim))),
        rope(make_rope(head_dim, attention_scale)) {}
  std::int64_t width() const { return std::int64_t{shape.n_heads} * shape.head_dim; }

  static RopeTable make_rope(int head_dim, float attention_scale) {
    std::vector<float> inv_freq;
    for (int i = 0; i < head_dim; i += 2) {
      inv_freq.push_back(std::pow(10000.0F, -static_cast<float>(i) / static_cast<float>(head_dim)));
    }
    return RopeTable::create(inv_freq, 20000, attention_scale).value();
  }
};

// One sequence: a cache of its own per kv head of every layer.
struct Sequence {
  // The caches of another one, which must outlive it.
  static std::unique_ptr<Sequence> with_caches_of(const Sequence& other) {
    auto sequence = std::make_unique<Sequence>();
    sequence->n_context = other.n_context;
    sequence->heads = other.heads;
    return sequence;
  }
  Sequence() = default;

  std::int64_t n_queries = 1;
  std::int64_t n_context = 0;
  std::vector<std::unique_ptr<BlockCache>> caches;
  std::vector<KvHeadPages> heads;  // [n_layers][n_kv_heads]

  // The blocks of head i are codecs[i % size]; n_tail positions follow the last place of a block.
  Sequence(Random& random, const Problem& p, const std::vector<std::vector<KvCodec>>& codecs,
           std::int64_t n_tail, std::int64_t max_gap = 3, int n_layers = 1) {
    std::int64_t before = 0;
    for (const auto& blocks : codecs) {
      before = std::max<std::int64_t>(
          before, static_cast<std::int64_t>(blocks.size()) * (32 * max_gap + 2));
    }
    n_context = before + n_tail;
    for (int head = 0; head < n_layers * p.shape.n_kv_heads; ++head) {
      HeadOptions options;
      options.head_dim = p.shape.head_dim;
      options.dtype = p.layout.dtype;
      options.codecs = codecs[static_cast<std::size_t>(head) % codecs.size()];
      options.max_gap = max_gap;
      options.max_tail_first = before;
      caches.push_back(std::make_unique<BlockCache>(random, p.rope, options, n_context));
      heads.push_back(caches.back()->view());
    }
  }
};

class AttentionDecodeTest : public testing::GpuTest {
 protected:
  Random cpu_random{std::random_device{}()};

  // Runs both bodies; rows of padding sequences and of nobody must stay as they were.
  void expect_same(const Problem& p, const std::vector<std::unique_ptr<Sequence>>& sequences,
                   int layer = 0, int n_layers = 1, std::int64_t gap = 0, float q_scale = 1.0F) {
    const auto n = static_cast<std::int64_t>(sequences.size());
    const std::int64_t n_rows = n + 2;
    const std::int64_t stride = p.width() + gap;
    std::vector<float> plain = normal(static_cast<std::size_t>(n_rows * stride), q_scale);
    const std::vector<F16> q16 = testing::to_f16(plain);
    const std::vector<float> q = testing::widened(q16);
    DeviceCache cache(p.layout);
    std::vector<AttentionSequence> batch;
    for (std::int64_t i = 0; i < n; ++i) {
      const Sequence& s = *sequences[static_cast<std::size_t>(i)];
      cache.add_sequence(n - i, s.n_queries, s.n_context, s.heads);
      batch.push_back({n - i, s.n_queries, s.n_context,
                       s.heads.data() + std::int64_t{layer} * p.shape.n_kv_heads});
    }
    std::vector<float> expected(static_cast<std::size_t>(n_rows * stride), -7.0F);
    attention(*make_context(2), {q.data(), n_rows, p.width(), stride}, batch, p.shape, p.layout,
              p.scale, {expected.data(), n_rows, p.width(), stride}, &p.rope);

    cache.upload(gpu());
    const DeviceRopeTable rope(gpu(), p.rope);
    const DeviceVector<F16> device_q(gpu(), q16);
    auto workspace = DecodeWorkspace::create(gpu(), static_cast<int>(n) + 1, n_layers, p.shape);
    ASSERT_TRUE(workspace.ok()) << workspace.status().to_string();
    const Tolerance t = p.layout.dtype == DType::kBF16 ? kBf16Tolerance : kF16Tolerance;
    // By the narrowest kernel and by that of all formats, which also is a second step in a graph.
    for (const DecodeFormats formats : {formats_of(sequences), DecodeFormats::kAll}) {
      SCOPED_TRACE("formats " + std::to_string(static_cast<int>(formats)));
      const DeviceVector<Bf16> out(gpu(),
                                   testing::to_bf16(std::vector<float>(expected.size(), -7.0F)));
      plan_decode(gpu(), cache.sequences(), cache.n_sequences(), n_layers, p.shape, *workspace);
      attention_decode(gpu(), {device_q.data(), n_rows, p.width(), stride}, cache.sequences(),
                       cache.n_sequences(), layer, p.shape, cache.pool(), p.scale, rope.view(),
                       formats, *workspace, {out.data(), n_rows, p.width(), stride});
      const std::vector<float> actual = testing::widened(out.to_host());
      cache.check_guards();
      testing::expect_close(actual, expected, t.absolute, t.relative);
      EXPECT_LE(testing::relative_error(actual, expected), t.of_norm);
    }
  }

  static DecodeFormats formats_of(const std::vector<std::unique_ptr<Sequence>>& sequences) {
    std::uint32_t mask = 0;
    for (const auto& sequence : sequences) {
      for (const KvHeadPages& head : sequence->heads) {
        for (std::int64_t i = 0; i < head.n_blocks; ++i) {
          mask |= 1U << static_cast<unsigned>(head.blocks[i].codec.k);
          mask |= 1U << static_cast<unsigned>(head.blocks[i].codec.v);
        }
      }
    }
    return decode_formats(mask);
  }

  // One sequence whose heads all have these blocks.
  void expect_same_one(const Problem& p, const std::vector<KvCodec>& codecs, std::int64_t n_tail,
                       std::int64_t max_gap = 3) {
    std::vector<std::unique_ptr<Sequence>> sequences;
    sequences.push_back(std::make_unique<Sequence>(
        cpu_random, p, std::vector<std::vector<KvCodec>>{codecs}, n_tail, max_gap));
    expect_same(p, sequences);
  }
};

std::string codec_name(const KvCodec& codec) {
  static const char* const kNames[] = {"Raw",    "Int4",   "Kivi4",  "Kivi2",    "Lloyd1",
                                       "Lloyd2", "Lloyd3", "Lloyd4", "Codebook", "Token"};
  return std::string(kNames[static_cast<int>(codec.k)]) + kNames[static_cast<int>(codec.v)];
}

// Sides of one kind and mixtures.
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

TEST_F(AttentionDecodeTest, PagesOfEveryLength) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const int head_dim : {64, 128}) {
      const Problem p(2, 4, head_dim, dtype);
      for (const std::int64_t n : {1, 2, 31, 32, 33, 64, 300, 2000}) {
        SCOPED_TRACE("head_dim " + std::to_string(head_dim) + " tokens " + std::to_string(n));
        expect_same_one(p, {}, n);
      }
    }
  }
}

TEST_F(AttentionDecodeTest, EveryGroup) {
  for (const int head_dim : {64, 128}) {
    for (const int group : {1, 2, 3, 5, 7, 8, 16, 32}) {
      SCOPED_TRACE("head_dim " + std::to_string(head_dim) + " group " + std::to_string(group));
      const Problem p(group > 8 ? 1 : 3, group, head_dim, DType::kF16);
      expect_same_one(p, {{kInt4, kInt4}}, 70);
    }
  }
}

TEST_F(AttentionDecodeTest, LongContext) {
  const Problem p(1, 4, 128, DType::kF16);
  expect_same_one(p, {}, 17000);
}

// Entries in parts, and padding between them.
TEST_F(AttentionDecodeTest, LargeBatches) {
  const Problem p(2, 4, 64, DType::kF16);
  std::vector<std::unique_ptr<Sequence>> sequences;
  sequences.push_back(std::make_unique<Sequence>(
      cpu_random, p, std::vector<std::vector<KvCodec>>{{{kInt4, kInt4}, {kLloyd4, kLloyd4}}, {}},
      13000));
  for (int i = 1; i < 70; ++i) {
    sequences.push_back(Sequence::with_caches_of(*sequences.front()));
    if (i % 9 == 0) sequences.back()->n_queries = 0;
  }
  expect_same(p, sequences);
}

// More entries than teams: a share has several, and padding among them.
TEST_F(AttentionDecodeTest, ManySequences) {
  const Problem p(2, 4, 64, DType::kF16);
  std::vector<std::unique_ptr<Sequence>> sequences;
  for (const std::int64_t n_tail : {1, 40, 300}) {
    sequences.push_back(std::make_unique<Sequence>(
        cpu_random, p, std::vector<std::vector<KvCodec>>{{{kInt4, kInt4}, {kLloyd4, kLloyd4}}, {}},
        n_tail));
  }
  for (std::size_t i = 3; i < 600; ++i) {
    sequences.push_back(Sequence::with_caches_of(*sequences[i % 3]));
    if (i % 7 == 0) sequences.back()->n_queries = 0;
  }
  expect_same(p, sequences);
}

class CodecTest : public AttentionDecodeTest, public ::testing::WithParamInterface<KvCodec> {};

TEST_P(CodecTest, AgainstTheCpu) {
  const KvCodec codec = GetParam();
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const int head_dim : {64, 128}) {
      for (const std::int64_t max_gap : {1, 3, 40, 200}) {
        const Problem p(2, 4, head_dim, dtype, max_gap == 3 ? 0.9F : 1.0F);
        SCOPED_TRACE(codec_name(codec) + " head_dim " + std::to_string(head_dim) + " gap " +
                     std::to_string(max_gap));
        expect_same_one(p, {codec}, 1, max_gap);
        expect_same_one(p, std::vector<KvCodec>(max_gap == 200 ? 3 : 19, codec), 40, max_gap);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, CodecTest, ::testing::ValuesIn(all_codecs()),
                         [](const auto& codec) { return codec_name(codec.param); });

// Ragged heads of mixed formats, many sequences, some of them padding, several layers.
TEST_F(AttentionDecodeTest, MixedBatches) {
  const std::vector<KvCodec>& codecs = all_codecs();
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const int head_dim : {64, 128}) {
      const Problem p(2, 4, head_dim, dtype);
      for (const int n : {1, 5, 37}) {
        std::vector<std::unique_ptr<Sequence>> sequences;
        for (int i = 0; i < n; ++i) {
          std::vector<std::vector<KvCodec>> heads(4);
          for (auto& head : heads) {
            if (uniform_int(0, 1) == 1) head.push_back({kRaw, kRaw});
            for (int blocks = uniform_int(0, 8); blocks > 0; --blocks) {
              head.push_back(codecs[static_cast<std::size_t>(
                  uniform_int(0, static_cast<int>(codecs.size()) - 1))]);
            }
          }
          sequences.push_back(
              std::make_unique<Sequence>(cpu_random, p, heads, uniform_int(1, 200), 3, 2));
          if (uniform_int(0, 5) == 0) sequences.back()->n_queries = 0;
        }
        SCOPED_TRACE(std::to_string(n) + " sequences, head_dim " + std::to_string(head_dim));
        expect_same(p, sequences, 1, 2, 8);
      }
    }
  }
}

TEST_F(AttentionDecodeTest, LargeScoresDoNotOverflow) {
  const Problem p(1, 2, 64, DType::kF16);
  std::vector<std::unique_ptr<Sequence>> sequences;
  sequences.push_back(std::make_unique<Sequence>(
      cpu_random, p,
      std::vector<std::vector<KvCodec>>{{{kRaw, kRaw}, {kInt4, kInt4}, {kInt4, kInt4}}}, 50));
  // With scores this far apart one token has all the weight: only its own error is left.
  expect_same(p, sequences, 0, 1, 0, 20.0F);
}

TEST_F(AttentionDecodeTest, NothingToDo) {
  const Problem p(1, 2, 64, DType::kF16);
  std::vector<std::unique_ptr<Sequence>> sequences;
  for (int i = 0; i < 3; ++i) {
    sequences.push_back(
        std::make_unique<Sequence>(cpu_random, p, std::vector<std::vector<KvCodec>>{{}}, 5));
    sequences.back()->n_queries = 0;
  }
  expect_same(p, sequences);
}

}  // namespace
}  // namespace spindle::kernels
