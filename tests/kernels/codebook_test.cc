#include "kernels/codebook.h"

#include <algorithm>

#include "tests/kernels/golden_kv.h"
#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {
namespace {

using testing::Each;
using testing::ElementsAre;
using testing::IsEmpty;

constexpr std::int64_t kNoLimit = 65536;

ConstRows rows_of(const std::vector<float>& x, std::int64_t dim) {
  return {x.data(), static_cast<std::int64_t>(x.size()) / dim, dim};
}

// The rules of codebook.h, one by one, with similarities in fp64.
class Oracle {
 public:
  explicit Oracle(std::int64_t dim) : dim_(dim) {}

  std::vector<std::int32_t> entry_rows;

  std::vector<std::uint16_t> match(ConstRows x, double theta) {
    std::vector<std::uint16_t> refs(static_cast<std::size_t>(x.n_rows));
    for (std::int64_t first = 0; first < x.n_rows; first += 1024) {
      match_tile(x, theta, first, std::min<std::int64_t>(x.n_rows, first + 1024), refs);
    }
    n_rows_seen_ += x.n_rows;
    return refs;
  }

 private:
  std::vector<double> unit(const float* row, bool half) const {
    double square = 0;
    for (std::int64_t k = 0; k < dim_; ++k) square += double{row[k]} * double{row[k]};
    std::vector<double> u(static_cast<std::size_t>(dim_));
    if (square == 0) return u;
    for (std::size_t k = 0; k < u.size(); ++k) {
      const auto value = static_cast<float>(row[k] / std::sqrt(square));
      u[k] = half ? f16_to_f32(f32_to_f16(value)) : value;
    }
    return u;
  }
  static double dot(const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0;
    for (std::size_t k = 0; k < a.size(); ++k) sum += a[k] * b[k];
    return sum;
  }

  void match_tile(ConstRows x, double theta, std::int64_t first, std::int64_t end,
                  std::vector<std::uint16_t>& refs) {
    const std::size_t n_earlier = entries_.size();
    std::vector<std::int64_t> left;
    for (std::int64_t i = first; i < end; ++i) {
      const std::vector<double> u = unit(x.row(i), false);
      double best = theta;
      for (std::size_t e = 0; e < n_earlier; ++e) {
        if (const double cos = dot(u, entries_[e]); cos > best) {
          best = cos;
          refs[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(e);
        }
      }
      if (best == theta) left.push_back(i);
    }
    cover(x, theta, left, refs);
  }

  void cover(ConstRows x, double theta, std::vector<std::int64_t> left,
             std::vector<std::uint16_t>& refs) {
    const auto similar = [&](std::int64_t a, std::int64_t b) {
      return a == b || dot(unit(x.row(a), false), unit(x.row(b), false)) > theta;
    };
    std::vector<std::vector<bool>> edge(left.size(), std::vector<bool>(left.size()));
    for (std::size_t a = 0; a < left.size(); ++a) {
      for (std::size_t b = 0; b < left.size(); ++b) edge[a][b] = similar(left[a], left[b]);
    }
    std::vector<bool> covered(left.size());
    while (true) {
      std::size_t best = 0;
      std::size_t best_degree = 0;
      for (std::size_t a = 0; a < left.size(); ++a) {
        if (covered[a]) continue;
        std::size_t degree = 0;
        for (std::size_t b = 0; b < left.size(); ++b) degree += !covered[b] && edge[a][b] ? 1 : 0;
        if (degree > best_degree) {
          best = a;
          best_degree = degree;
        }
      }
      if (best_degree == 0) return;
      for (std::size_t b = 0; b < left.size(); ++b) {
        if (covered[b] || !edge[best][b]) continue;
        covered[b] = true;
        refs[static_cast<std::size_t>(left[b])] = static_cast<std::uint16_t>(entries_.size());
      }
      entries_.push_back(unit(x.row(left[best]), true));
      entry_rows.push_back(static_cast<std::int32_t>(n_rows_seen_ + left[best]));
    }
  }

  std::int64_t dim_;
  std::int64_t n_rows_seen_ = 0;
  std::vector<std::vector<double>> entries_;
};

// Directions at whole steps of 0.2 plus `offset` in one of dim / 4 planes, so that no cosine is
// near cos(3.5 steps) and no two distances from later offsets are alike; some zero rows.
constexpr double kStep = 0.2;
const float kStepTheta = static_cast<float>(std::cos(3.5 * kStep));

std::vector<float> fans(Random& random, std::int64_t n, std::int64_t dim, double offset) {
  std::vector<float> x(static_cast<std::size_t>(n * dim));
  for (std::int64_t i = 0; i < n; ++i) {
    if (random.below(100) == 0) continue;
    const std::int64_t plane = random.below(dim / 4);
    const double angle = kStep * (static_cast<double>(random.below(12)) + offset);
    const double magnitude = std::exp(2.0 * double{random.normal()});
    float* row = x.data() + i * dim + 4 * plane;
    row[1] = static_cast<float>(magnitude * std::cos(angle));
    row[3] = static_cast<float>(magnitude * std::sin(angle));
  }
  return x;
}

class CodebookMatching : public KernelTest {};
INSTANTIATE_TEST_SUITE_P(Backends, CodebookMatching, testing::ValuesIn(all_backends()),
                         backend_name);

// A star: row 2 is similar to rows 0, 1 and 4, which are not similar to each other.
TEST_P(CodebookMatching, StarByEye) {
  const std::vector<float> x = {
      1, 0, 0, 0,  // 0
      0, 2, 0, 0,  // 1
      3, 3, 3, 0,  // 2, cos 0.577 to rows 0, 1, 4
      0, 0, 0, 5,  // 3, alone
      0, 0, 1, 0,  // 4
      0, 0, 0, 0,  // 5, its own entry
      0, 0, 0, 0,  // 6, its own entry
  };
  Codebook book;
  const CodebookMatch match = codebook_match(context(), book, rows_of(x, 4), 0.5F, kNoLimit);
  ASSERT_TRUE(match.complete);
  EXPECT_THAT(match.refs.entry, ElementsAre(0, 0, 0, 1, 0, 2, 3));
  EXPECT_THAT(book.entry_rows, ElementsAre(2, 3, 5, 6));
  EXPECT_EQ(book.head_dim, 4);
  EXPECT_EQ(book.n_rows_seen, 7);
  EXPECT_EQ(book.n_entries(), 4);
  EXPECT_EQ(book.entries[4 + 3], f32_to_f16(1.0F));
  EXPECT_EQ(book.entries[0], f32_to_f16(1.0F / std::sqrt(3.0F)));
  EXPECT_EQ(match.refs.magnitude[3], f32_to_f16(5.0F));
  EXPECT_EQ(match.refs.magnitude[5], 0);

  GuardedRows decoded(7, 4);
  codebook_decode(book, match.refs, decoded.view());
  decoded.check();
  EXPECT_EQ(decoded.at(3, 3), 5.0F);
  EXPECT_NEAR(decoded.at(1, 0), 2.0 / std::sqrt(3.0), 1e-3);
  EXPECT_EQ(decoded.at(5, 0), 0.0F);
}

// A path 0 - 1 - 2 - 3: rows 1 and 2 have two neighbours each, the lower one is picked; row 3 is
// then alone although its neighbour is covered.
TEST_P(CodebookMatching, TiesTakeTheLowestPosition) {
  std::vector<float> x(4 * 32);
  for (std::size_t i = 0; i < 4; ++i) {
    x[32 * i + 7] = static_cast<float>(std::cos(0.5 * static_cast<double>(i)));
    x[32 * i + 9] = static_cast<float>(std::sin(0.5 * static_cast<double>(i)));
  }
  Codebook book;
  const CodebookMatch match = codebook_match(context(), book, rows_of(x, 32), 0.8F, kNoLimit);
  EXPECT_THAT(book.entry_rows, ElementsAre(1, 3));
  EXPECT_THAT(match.refs.entry, ElementsAre(0, 0, 0, 1));
}

TEST_P(CodebookMatching, TheThresholdIsStrict) {
  std::vector<float> x = {1, 0, 3, 4};  // cos is 0.6 to the bit
  x.resize(2 * 64);                     // 62 zero rows, each an entry of its own
  for (const bool same_tile : {true, false}) {
    for (const float theta : {0.6F, std::nextafter(0.6F, 0.0F)}) {
      Codebook book;
      if (same_tile) {
        codebook_match(context(), book, rows_of(x, 2), theta, kNoLimit);
        EXPECT_EQ(book.n_entries(), theta == 0.6F ? 64 : 63);
        Codebook small;  // a tile that fills no word of the graph
        codebook_match(context(), small, {x.data(), 2, 2}, theta, kNoLimit);
        EXPECT_EQ(small.n_entries(), theta == 0.6F ? 2 : 1);
      } else {
        codebook_match(context(), book, {x.data(), 1, 2}, theta, kNoLimit);
        codebook_match(context(), book, {x.data() + 2, 1, 2}, theta, kNoLimit);
        EXPECT_EQ(book.n_entries(), theta == 0.6F ? 2 : 1);
      }
    }
  }
}

TEST_P(CodebookMatching, LaterTilesTakeTheNearestEntryAndTheLowerOfTwo) {
  const std::vector<float> axes = {1, 0, 0, 0, 1, 0, 0, 0, 1};
  Codebook book;
  codebook_match(context(), book, rows_of(axes, 3), 0.5F, kNoLimit);
  ASSERT_EQ(book.n_entries(), 3);
  const std::vector<float> x = {0, 1, 1, 3, 0, 4, -1, 0, 0, 4, 3, 0};
  const CodebookMatch match = codebook_match(context(), book, rows_of(x, 3), 0.5F, kNoLimit);
  // Equally near to 1 and 2; nearer to 2; away from all; nearer to 0.
  EXPECT_THAT(match.refs.entry, ElementsAre(1, 2, 3, 0));
  EXPECT_THAT(book.entry_rows, ElementsAre(0, 1, 2, 5));
}

TEST_P(CodebookMatching, ZeroVectorsShareNothing) {
  const std::vector<float> x(70 * 32, 0.0F);
  Codebook book;
  CodebookMatch match = codebook_match(context(), book, rows_of(x, 32), 0.9F, kNoLimit);
  EXPECT_EQ(book.n_entries(), 70);
  EXPECT_EQ(match.refs.entry[69], 69);
  match = codebook_match(context(), book, {x.data(), 1, 32}, 0.9F, kNoLimit);
  EXPECT_THAT(match.refs.entry, ElementsAre(70));
  EXPECT_THAT(match.refs.magnitude, ElementsAre(0));
}

TEST_P(CodebookMatching, IsTheOracle) {
  Random random(31);
  for (const std::int64_t dim : {32, 64, 96}) {
    Codebook book;
    Oracle oracle(dim);
    double offset = 0.0;
    for (const std::int64_t n : {0, 1, 63, 65, 200, 129}) {
      const std::vector<float> x = fans(random, n, dim, offset);
      const CodebookMatch match =
          codebook_match(context(), book, rows_of(x, dim), kStepTheta, kNoLimit);
      ASSERT_TRUE(match.complete);
      ASSERT_EQ(match.refs.entry, oracle.match(rows_of(x, dim), double{kStepTheta})) << n;
      ASSERT_EQ(book.entry_rows, oracle.entry_rows) << n;
      offset = offset == 0.0 ? 0.2 : 0.0;
    }
  }
}

TEST_P(CodebookMatching, HugeTinyAndBadRowsAreContained) {
  std::vector<float> x(6 * 32, 1.0F);
  for (std::size_t k = 0; k < 32; ++k) {
    x[k] = 1e30F;
    x[32 + k] = 1e-30F;
    x[64 + k] = std::numeric_limits<float>::quiet_NaN();
    x[96 + k] = std::numeric_limits<float>::infinity();
  }
  Codebook book;
  const CodebookMatch match = codebook_match(context(), book, rows_of(x, 32), 0.9F, kNoLimit);
  EXPECT_THAT(match.refs.entry, ElementsAre(0, 0, 1, 2, 0, 0));
  GuardedRows decoded(6, 32);
  codebook_decode(book, match.refs, decoded.view());
  EXPECT_NEAR(decoded.at(0, 0), 65504.0F / std::sqrt(32.0F), 10.0F);
  EXPECT_EQ(decoded.at(1, 0), 0.0F);
  EXPECT_NEAR(decoded.at(4, 31), 1.0F, 1e-3F);
}

TEST_P(CodebookMatching, AFullBookIsLeftAsItWas) {
  Random random(32);
  const std::vector<float> first = fans(random, 100, 64, 0.0);
  const std::vector<float> x = fans(random, 1500, 64, 0.2);
  Codebook book;
  ASSERT_FALSE(codebook_match(context(), book, rows_of(first, 64), kStepTheta, 0).complete);
  EXPECT_EQ(book.head_dim, 0);
  EXPECT_EQ(book.n_rows_seen, 0);
  EXPECT_THAT(book.entries, IsEmpty());
  ASSERT_TRUE(codebook_match(context(), book, rows_of(first, 64), kStepTheta, kNoLimit).complete);

  Codebook unlimited = book;
  const CodebookMatch all =
      codebook_match(context(), unlimited, rows_of(x, 64), kStepTheta, kNoLimit);
  ASSERT_TRUE(all.complete);
  ASSERT_GT(unlimited.n_entries(), book.n_entries() + 1);
  for (const std::int64_t limit :
       {std::int64_t{0}, book.n_entries(), book.n_entries() + 1, unlimited.n_entries() - 1}) {
    Codebook limited = book;
    const CodebookMatch match =
        codebook_match(context(), limited, rows_of(x, 64), kStepTheta, limit);
    EXPECT_FALSE(match.complete);
    EXPECT_THAT(match.refs.entry, IsEmpty());
    EXPECT_THAT(match.refs.magnitude, IsEmpty());
    EXPECT_EQ(limited.entries, book.entries);
    EXPECT_EQ(limited.entry_rows, book.entry_rows);
    EXPECT_EQ(limited.n_rows_seen, book.n_rows_seen);
  }
  Codebook exact = book;
  const CodebookMatch match =
      codebook_match(context(), exact, rows_of(x, 64), kStepTheta, unlimited.n_entries());
  EXPECT_TRUE(match.complete);
  EXPECT_EQ(match.refs.entry, all.refs.entry);
  EXPECT_EQ(exact.entries, unlimited.entries);
}

// A tile that its caller takes back matters to nothing that comes later, and neither does where the
// first entries came from.
TEST_P(CodebookMatching, UndoneTilesLeaveNoTrace) {
  Random random(34);
  const std::vector<float> first = fans(random, 300, 64, 0.0);
  const std::vector<float> undone = fans(random, 700, 64, 0.2);
  const std::vector<float> last = fans(random, 500, 64, 0.4);
  Codebook expected;
  codebook_match(context(), expected, rows_of(first, 64), kStepTheta, kNoLimit);
  Codebook copied;
  copied.head_dim = 64;
  copied.entries = expected.entries;
  Codebook book = expected;
  for (Codebook* one : {&book, &copied}) {
    const std::int64_t n = one->n_entries();
    const std::int64_t n_rows = one->n_rows_seen;
    for (int i = 0; i < 2; ++i) {  // the second one's products see the first one's entries
      codebook_match(context(), *one, rows_of(undone, 64), kStepTheta, kNoLimit);
    }
    ASSERT_GT(one->n_entries(), n + 10);
    one->undo_to(n, n_rows);
    EXPECT_EQ(one->entries, expected.entries);
  }
  EXPECT_EQ(book.entry_rows, expected.entry_rows);
  EXPECT_THAT(copied.entry_rows, IsEmpty());
  const CodebookMatch match =
      codebook_match(context(), expected, rows_of(last, 64), kStepTheta, kNoLimit);
  for (Codebook* one : {&book, &copied}) {
    const CodebookMatch again =
        codebook_match(context(), *one, rows_of(last, 64), kStepTheta, kNoLimit);
    EXPECT_EQ(again.refs.entry, match.refs.entry);
    EXPECT_EQ(again.refs.magnitude, match.refs.magnitude);
    EXPECT_EQ(one->entries, expected.entries);
  }
  EXPECT_EQ(book.entry_rows, expected.entry_rows);
  EXPECT_EQ(book.n_rows_seen, expected.n_rows_seen);
}

// Real similarities, near the threshold too: no thread count may change them.
TEST_P(CodebookMatching, DoesNotDependOnThreads) {
  Random random(33);
  const std::int64_t dim = 64;
  const std::vector<float> centres = random.normals(40 * dim);
  std::vector<float> x = random.normals(1300 * dim);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t centre = i / 64 * 7919 % 40;
    x[i] = 0.22F * x[i] + centres[centre * 64 + i % 64];
  }
  Codebook book;
  const CodebookMatch match = codebook_match(context(), book, rows_of(x, dim), 0.95F, kNoLimit);
  EXPECT_GT(book.n_entries(), 60);
  EXPECT_LT(book.n_entries(), 1000);
  const std::unique_ptr<CpuContext> one = context_with(1);
  Codebook expected_book;
  const CodebookMatch expected =
      codebook_match(*one, expected_book, rows_of(x, dim), 0.95F, kNoLimit);
  EXPECT_EQ(match.refs.entry, expected.refs.entry);
  EXPECT_EQ(match.refs.magnitude, expected.refs.magnitude);
  EXPECT_EQ(book.entries, expected_book.entries);
  EXPECT_EQ(book.entry_rows, expected_book.entry_rows);

  // Every token points within theta of its entry, but for fp16, and has its magnitude.
  GuardedRows decoded(1300, dim);
  codebook_decode(book, match.refs, decoded.view());
  decoded.check();
  for (std::int64_t i = 0; i < 1300; ++i) {
    double dot = 0;
    double xx = 0;
    double yy = 0;
    for (std::int64_t k = 0; k < dim; ++k) {
      const double a = x[static_cast<std::size_t>(i * dim + k)];
      const double b = decoded.at(i, k);
      dot += a * b;
      xx += a * a;
      yy += b * b;
    }
    ASSERT_GT(dot / std::sqrt(xx * yy), 0.95 - 1e-3);
    ASSERT_NEAR(std::sqrt(yy / xx), 1.0, 2e-3);
  }
}

TEST(Codebook, TilesAreCutAt1024Rows) {
  const std::unique_ptr<CpuContext> context = make_context(2);
  Random random(34);
  for (const std::int64_t n : {1023, 1024, 1025, 2100}) {
    const std::vector<float> x = fans(random, n, 32, 0.0);
    // One call is the calls for its tiles.
    Codebook whole;
    const CodebookMatch match =
        codebook_match(*context, whole, rows_of(x, 32), kStepTheta, kNoLimit);
    Codebook parts;
    std::vector<std::uint16_t> refs;
    for (std::int64_t first = 0; first < n; first += 1024) {
      const ConstRows tile = rows_of(x, 32).rows(first, std::min<std::int64_t>(1024, n - first));
      const CodebookMatch part = codebook_match(*context, parts, tile, kStepTheta, kNoLimit);
      refs.insert(refs.end(), part.refs.entry.begin(), part.refs.entry.end());
    }
    EXPECT_EQ(match.refs.entry, refs);
    EXPECT_EQ(whole.entries, parts.entries);
    EXPECT_EQ(whole.entry_rows, parts.entry_rows);
  }
  // A full tile against the oracle, in rows that lie apart.
  const std::vector<float> x = fans(random, 1024, 32, 0.0);
  std::vector<float> apart(1024 * 40, 7.0F);
  for (std::size_t i = 0; i < x.size(); ++i) apart[i / 32 * 40 + i % 32] = x[i];
  Codebook book;
  Oracle oracle(32);
  const CodebookMatch match =
      codebook_match(*context, book, {apart.data(), 1024, 32, 40}, kStepTheta, kNoLimit);
  EXPECT_EQ(match.refs.entry, oracle.match(rows_of(x, 32), double{kStepTheta}));
  EXPECT_EQ(book.entry_rows, oracle.entry_rows);
}

// --- golden ------------------------------------------------------------------------------------

class CodebookGolden : public KernelTest {};
INSTANTIATE_TEST_SUITE_P(Backends, CodebookGolden, testing::ValuesIn(all_backends()), backend_name);

TEST_P(CodebookGolden, Layers) {
  const GoldenKv golden;
  for (const std::string layer : {"0", "1", "2", "11"}) {
    for (const std::string side : {"k", "v"}) {
      const std::string prefix = "codebook." + layer + "." + side + ".";
      SCOPED_TRACE(prefix);
      const std::vector<float> input = golden.read_f16(prefix + "input");
      const auto ref = golden.read<std::int32_t>(prefix + "ref");
      const auto codeword_token = golden.read<std::int32_t>(prefix + "codeword_token");
      const auto count = golden.read<std::int32_t>(prefix + "count");
      const auto magnitude = golden.read<float>(prefix + "mag");
      const auto margin = golden.read<float>(prefix + "margin");
      for (std::size_t head = 0; head < 2; ++head) {
        // No edge may flip: fp32 sums of 64 products of unit vectors are off by less.
        ASSERT_GT(margin[head], 5e-7F);
        Codebook book;
        const ConstRows x{input.data() + head * 512 * 64, 512, 64};
        const CodebookMatch match =
            codebook_match(context(), book, x, side == "k" ? 0.98F : 0.95F, kNoLimit);
        ASSERT_EQ(book.n_entries(), count[head]);
        for (std::size_t e = 0; e < book.entry_rows.size(); ++e) {
          ASSERT_EQ(book.entry_rows[e], codeword_token[head * 512 + e]);
        }
        for (std::size_t i = 0; i < 512; ++i) {
          ASSERT_EQ(match.refs.entry[i], ref[head * 512 + i]) << i;
          ASSERT_EQ(match.refs.magnitude[i], f32_to_f16(magnitude[head * 512 + i])) << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace spindle::kernels
