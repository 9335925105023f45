#include "kernels/attention.h"

#include <algorithm>

#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {
namespace {

// Against softmax in double precision over the rounded K and V: scores are fp32 chains over at most
// 128 terms, so probabilities are off by a few 1e-6 relative, and the output is their mean of V.
constexpr double kTolerance = 2e-5;

using AttentionTest = KernelTest;

float rounded(float value, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return value;
    case DType::kF16:
      return f16_to_f32(f32_to_f16(value));
    case DType::kBF16:
      return bf16_to_f32(f32_to_bf16(value));
  }
  return value;
}

// Pages of one sequence for all kv heads, in shuffled memory order, filled with NaN bytes so that a
// read past the context shows.
class PagedCache {
 public:
  PagedCache(Random& random, const KvPageLayout& layout, int n_kv_heads, std::int64_t n_positions)
      : layout_(layout) {
    const std::int64_t pages_per_head = (n_positions + layout.page_tokens - 1) / layout.page_tokens;
    const std::int64_t n_pages = pages_per_head * n_kv_heads;
    const std::size_t stride = layout.page_bytes() + kGuardBytes;
    storage_.assign(static_cast<std::size_t>(n_pages) * stride + 64, std::byte{0xff});
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    std::byte* base = storage_.data() + (64 - address % 64) % 64;
    for (std::int64_t i = 0; i < n_pages; ++i) {
      pages_.push_back(base + static_cast<std::size_t>(i) * stride);
    }
    for (std::size_t i = pages_.size(); i > 1; --i) {
      std::swap(pages_[i - 1],
                pages_[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(i)))]);
    }
    for (int head = 0; head < n_kv_heads; ++head) {
      writable_.push_back({pages_.data() + head * pages_per_head});
      readable_.push_back({const_pages(head * pages_per_head)});
    }
  }
  PagedCache(const PagedCache&) = delete;

  const KvHeadPages* heads() const { return readable_.data(); }
  const KvWritableHeadPages* writable() const { return writable_.data(); }

  void check_guards() const {
    for (const std::byte* page : pages_) {
      for (std::size_t i = 0; i < kGuardBytes; ++i) {
        ASSERT_EQ(page[layout_.page_bytes() + i], std::byte{0xff}) << "written past a page";
      }
    }
  }

 private:
  static constexpr std::size_t kGuardBytes = 64;

  const std::byte* const* const_pages(std::int64_t first) const { return pages_.data() + first; }

  KvPageLayout layout_;
  std::vector<std::byte> storage_;
  std::vector<std::byte*> pages_;
  std::vector<KvWritableHeadPages> writable_;
  std::vector<KvHeadPages> readable_;
};

struct Model {
  AttentionShape shape;
  KvPageLayout layout;
  float scale;

  Model(int n_heads, int n_kv_heads, int head_dim, DType dtype)
      : shape{n_heads, n_kv_heads, head_dim},
        layout{head_dim, kKvPageTokens, dtype},
        scale(1.0F / std::sqrt(static_cast<float>(head_dim))) {}
  std::int64_t q_width() const { return std::int64_t{shape.n_heads} * shape.head_dim; }
  std::int64_t kv_width() const { return std::int64_t{shape.n_kv_heads} * shape.head_dim; }
};

// One sequence of random q, k, v rows and its cache.
struct Sequence {
  std::int64_t length;
  std::vector<float> q, k, v;
  PagedCache cache;

  Sequence(Random& random, const Model& model, std::int64_t n)
      : length(n),
        q(random.normals(n * model.q_width())),
        k(random.normals(n * model.kv_width())),
        v(random.normals(n * model.kv_width())),
        cache(random, model.layout, model.shape.n_kv_heads, std::max<std::int64_t>(n, 1)) {}

  // Appends positions [begin, end).
  void append(const CpuContext& context, const Model& model, std::int64_t begin, std::int64_t end) {
    const std::vector<KvAppendSequence> sequences = {{begin, end - begin, begin, cache.writable()}};
    kv_append(context, {k.data(), length, model.kv_width()}, {v.data(), length, model.kv_width()},
              sequences, model.shape.n_kv_heads, model.layout);
  }
};

std::vector<double> exact_row(const Model& model, const Sequence& s, std::int64_t position,
                              int head) {
  const int d_head = model.shape.head_dim;
  const int kv_head = head / (model.shape.n_heads / model.shape.n_kv_heads);
  const float* q = s.q.data() + position * model.q_width() + head * d_head;
  std::vector<double> scores;
  for (std::int64_t t = 0; t <= position; ++t) {
    const float* k = s.k.data() + t * model.kv_width() + kv_head * d_head;
    double score = 0;
    for (int d = 0; d < d_head; ++d)
      score += double{q[d]} * double{rounded(k[d], model.layout.dtype)};
    scores.push_back(score * double{model.scale});
  }
  const double best = *std::max_element(scores.begin(), scores.end());
  double mass = 0;
  std::vector<double> out(static_cast<std::size_t>(d_head), 0.0);
  for (std::int64_t t = 0; t <= position; ++t) {
    const double p = std::exp(scores[static_cast<std::size_t>(t)] - best);
    mass += p;
    const float* v = s.v.data() + t * model.kv_width() + kv_head * d_head;
    for (int d = 0; d < d_head; ++d) {
      out[static_cast<std::size_t>(d)] += p * double{rounded(v[d], model.layout.dtype)};
    }
  }
  for (double& value : out) value /= mass;
  return out;
}

void expect_exact(const Model& model, const Sequence& s, std::int64_t first_position,
                  ConstRows out) {
  for (std::int64_t i = 0; i < out.n_rows; ++i) {
    for (int head = 0; head < model.shape.n_heads; ++head) {
      const std::vector<double> exact = exact_row(model, s, first_position + i, head);
      for (int d = 0; d < model.shape.head_dim; ++d) {
        ASSERT_NEAR(out.row(i)[head * model.shape.head_dim + d], exact[static_cast<std::size_t>(d)],
                    kTolerance)
            << "position " << first_position + i << " head " << head << " element " << d;
      }
    }
  }
}

TEST_P(AttentionTest, ByEye) {
  // Token 0: K = 0, V = 2. Token 1: K = ln(3) in element 0, V = 6. A query of 1 in element 0 gives
  // them the weights 1/4 and 3/4, so its output is 5; at position 0 it sees only token 0.
  const Model model(1, 1, 16, DType::kF32);
  Random random(20);
  Sequence s(random, model, 2);
  std::fill(s.q.begin(), s.q.end(), 0.0F);
  std::fill(s.k.begin(), s.k.end(), 0.0F);
  s.q[0] = s.q[16] = 1.0F;
  s.k[16] = std::log(3.0F);
  std::fill(s.v.begin(), s.v.begin() + 16, 2.0F);
  std::fill(s.v.begin() + 16, s.v.end(), 6.0F);
  s.append(context(), model, 0, 2);
  s.cache.check_guards();
  GuardedRows out(2, 16);
  const std::vector<AttentionSequence> sequences = {{0, 2, 2, s.cache.heads()}};
  attention(context(), {s.q.data(), 2, 16}, sequences, model.shape, model.layout, 1.0F, out.view());
  out.check();
  EXPECT_EQ(out.at(0, 3), 2.0F);
  EXPECT_NEAR(out.at(1, 3), 5.0F, 1e-6);
}

TEST_P(AttentionTest, AppendLaysPagesOutAsTheHeaderSays) {
  const Model model(1, 1, 16, DType::kF16);
  Random random(21);
  Sequence s(random, model, 40);
  s.append(context(), model, 0, 35);
  s.append(context(), model, 35, 40);
  s.cache.check_guards();
  for (std::int64_t t = 0; t < 40; ++t) {
    const auto* page = reinterpret_cast<const std::uint16_t*>(s.cache.heads()[0].pages[t / 32]);
    for (std::int64_t d = 0; d < 16; ++d) {
      ASSERT_EQ(page[d * 32 + t % 32], f32_to_f16(s.k[static_cast<std::size_t>(t * 16 + d)]));
      ASSERT_EQ(page[16 * 32 + t % 32 * 16 + d],
                f32_to_f16(s.v[static_cast<std::size_t>(t * 16 + d)]));
    }
  }
}

TEST_P(AttentionTest, PrefillAgainstDoublePrecision) {
  Random random(22);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int head_dim : {64, 80, 96, 128}) {
      for (const int group : {1, 2, 4, 8}) {
        const Model model(2 * group, 2, head_dim, dtype);
        const std::int64_t n = 1 + random.below(90);
        Sequence s(random, model, n);
        s.append(context(), model, 0, n);
        GuardedRows out(n, model.q_width());
        const std::vector<AttentionSequence> sequences = {{0, n, n, s.cache.heads()}};
        attention(context(), {s.q.data(), n, model.q_width()}, sequences, model.shape, model.layout,
                  model.scale, out.view());
        out.check();
        expect_exact(model, s, 0, out.view());
      }
    }
  }
}

// Prefill chunks and decode tokens of several sequences in one call, in rows that are out of order
// and with rows in between that belong to nobody.
TEST_P(AttentionTest, MixedBatch) {
  Random random(23);
  const Model model(4, 2, 64, DType::kBF16);
  struct Part {
    std::int64_t length, n_queries, row;
  };
  const std::vector<Part> parts = {{100, 1, 70}, {64, 64, 0}, {33, 0, 5}, {1, 1, 66}, {75, 20, 80}};
  std::vector<std::unique_ptr<Sequence>> owned;
  std::vector<AttentionSequence> sequences;
  std::vector<float> q(static_cast<std::size_t>(110 * model.q_width()), 0.0F);
  for (const Part& part : parts) {
    owned.push_back(std::make_unique<Sequence>(random, model, part.length));
    owned.back()->append(context(), model, 0, part.length);
    std::copy_n(owned.back()->q.data() + (part.length - part.n_queries) * model.q_width(),
                part.n_queries * model.q_width(), q.data() + part.row * model.q_width());
    sequences.push_back({part.row, part.n_queries, part.length, owned.back()->cache.heads()});
  }
  std::vector<float> out(static_cast<std::size_t>(110 * model.q_width()), -7.0F);
  const Rows view{out.data(), 110, model.q_width()};
  attention(context(), {q.data(), 110, model.q_width()}, sequences, model.shape, model.layout,
            model.scale, view);
  std::vector<bool> owned_row(110, false);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    expect_exact(model, *owned[i], part.length - part.n_queries,
                 view.rows(part.row, part.n_queries));
    for (std::int64_t r = 0; r < part.n_queries; ++r)
      owned_row[static_cast<std::size_t>(part.row + r)] = true;
  }
  for (std::int64_t r = 0; r < 110; ++r) {
    EXPECT_EQ(view.row(r)[0] == -7.0F, !owned_row[static_cast<std::size_t>(r)]) << "row " << r;
  }
}

// The contract: decode, prefill in any chunks, and any number of threads give the same bits. In the
// decode run later pages do not exist yet, so nothing behind the context can play a part.
TEST_P(AttentionTest, ChunksAndDecodeGiveTheSameBits) {
  Random random(24);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int head_dim : {64, 80}) {
      for (const int group : {1, 2, 4, 8}) {
        const Model model(2 * group, 2, head_dim, dtype);
        const std::int64_t n = 150;
        Sequence s(random, model, n);
        s.append(context(), model, 0, n);
        const ConstRows q{s.q.data(), n, model.q_width()};
        GuardedRows whole(n, model.q_width());
        const std::vector<AttentionSequence> sequences = {{0, n, n, s.cache.heads()}};
        attention(context(), q, sequences, model.shape, model.layout, model.scale, whole.view());
        whole.check();
        const auto other = context_with(1 + GetParam().n_threads % 3);
        for (const std::int64_t chunk : {1, 7, 32, 64}) {
          PagedCache fresh(random, model.layout, model.shape.n_kv_heads, n);
          GuardedRows out(n, model.q_width());
          for (std::int64_t begin = 0; begin < n; begin += chunk) {
            const std::int64_t end = std::min(begin + chunk, n);
            const std::vector<KvAppendSequence> append = {
                {begin, end - begin, begin, fresh.writable()}};
            kv_append(*other, {s.k.data(), n, model.kv_width()}, {s.v.data(), n, model.kv_width()},
                      append, model.shape.n_kv_heads, model.layout);
            const std::vector<AttentionSequence> step = {{begin, end - begin, end, fresh.heads()}};
            attention(*other, q, step, model.shape, model.layout, model.scale, out.view());
          }
          out.check();
          expect_same_bits(out.view(), whole.view());
        }
      }
    }
  }
}

TEST_P(AttentionTest, LargeScoresDoNotOverflow) {
  Random random(25);
  const Model model(2, 1, 64, DType::kF32);
  Sequence s(random, model, 70);
  for (float& value : s.q) value *= 60.0F;
  s.append(context(), model, 0, 70);
  GuardedRows out(70, model.q_width());
  const std::vector<AttentionSequence> sequences = {{0, 70, 70, s.cache.heads()}};
  attention(context(), {s.q.data(), 70, model.q_width()}, sequences, model.shape, model.layout,
            model.scale, out.view());
  out.check();
  for (std::int64_t i = 0; i < 70; ++i) {
    for (std::int64_t j = 0; j < model.q_width(); ++j) ASSERT_LT(std::abs(out.at(i, j)), 6.0F);
  }
}

TEST_P(AttentionTest, NothingToDo) {
  const Model model(2, 1, 64, DType::kF16);
  attention(context(), {nullptr, 0, 128}, {}, model.shape, model.layout, 1.0F, {nullptr, 0, 128});
  kv_append(context(), {nullptr, 0, 64}, {nullptr, 0, 64}, {}, 1, model.layout);
}

INSTANTIATE_TEST_SUITE_P(Cpu, AttentionTest, testing::ValuesIn(all_backends()), backend_name);

}  // namespace
}  // namespace spindle::kernels
