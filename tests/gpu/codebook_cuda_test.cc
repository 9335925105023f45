#include "kernels/codebook.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

// Cosines of both bodies are within this of exact; thresholds keep twice as far from every cosine.
constexpr double kCosError = 2e-6;

// The tiles of one side of one head, matched one after the other.
struct Book {
  std::vector<std::vector<F16>> tiles;
  float theta = 0;
};

class CodebookCudaTest : public testing::GpuTest {
 protected:
  // n rows around `n_clusters` directions, at angles to them that spread around theta's; a few rows
  // of zeros, large ones and small ones.
  std::vector<F16> clustered(int n, int dim, int n_clusters, std::mt19937::result_type seed) {
    std::mt19937 centre_random(seed);
    std::normal_distribution<float> distribution;
    std::vector<float> centres(static_cast<std::size_t>(n_clusters * dim));
    for (float& value : centres) value = distribution(centre_random);
    std::vector<float> rows = normal(static_cast<std::size_t>(n * dim));
    for (int i = 0; i < n; ++i) {
      const int cluster = uniform_int(0, n_clusters - 1);
      const float noise = 0.01F * static_cast<float>(uniform_int(0, 45));
      const float size = uniform_int(0, 9) == 0 ? 1e-3F : 2.0F;
      const bool zero = uniform_int(0, 199) == 0;
      for (int k = 0; k < dim; ++k) {
        float& value = rows[static_cast<std::size_t>(i * dim + k)];
        value = size * (centres[static_cast<std::size_t>(cluster * dim + k)] + noise * value);
        if (zero) value = 0.0F;
      }
    }
    return testing::to_f16(rows);
  }

  std::vector<double> units(const std::vector<F16>& rows, int dim, bool half) const {
    std::vector<double> out;
    for (std::size_t first = 0; first < rows.size(); first += static_cast<std::size_t>(dim)) {
      double square = 0;
      for (std::size_t k = first; k < first + static_cast<std::size_t>(dim); ++k) {
        square += double{f16_to_f32(rows[k].bits)} * double{f16_to_f32(rows[k].bits)};
      }
      const auto norm = static_cast<float>(std::sqrt(square));
      for (std::size_t k = first; k < first + static_cast<std::size_t>(dim); ++k) {
        const float unit = norm > 0 ? f16_to_f32(rows[k].bits) / norm : 0.0F;
        out.push_back(half ? f16_to_f32(f32_to_f16(unit)) : unit);
      }
    }
    return out;
  }
  static double dot(const double* a, const double* b, int dim) {
    double sum = 0;
    for (int k = 0; k < dim; ++k) sum += a[k] * b[k];
    return sum;
  }

  // The middle of the widest gap near 0.95 between all cosines that a match may look at.
  float threshold(const std::vector<std::vector<F16>>& tiles, int dim) const {
    std::vector<double> seen = {0.94, 0.96};
    const auto collect = [&](const std::vector<double>& a, const std::vector<double>& b) {
      for (std::size_t i = 0; i < a.size(); i += static_cast<std::size_t>(dim)) {
        for (std::size_t j = 0; j < b.size(); j += static_cast<std::size_t>(dim)) {
          const double cos = dot(a.data() + i, b.data() + j, dim);
          if (cos > 0.94 && cos < 0.96) seen.push_back(cos);
        }
      }
    };
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      const std::vector<double> own = units(tiles[i], dim, false);
      collect(own, own);
      for (std::size_t j = 0; j < i; ++j) collect(own, units(tiles[j], dim, true));
    }
    std::sort(seen.begin(), seen.end());
    double gap = 0;
    double middle = 0;
    for (std::size_t i = 1; i < seen.size(); ++i) {
      if (seen[i] - seen[i - 1] <= gap) continue;
      gap = seen[i] - seen[i - 1];
      middle = (seen[i] + seen[i - 1]) / 2;
    }
    EXPECT_GT(gap, 4 * kCosError) << "the data leave no place for a threshold";
    return static_cast<float>(middle);
  }

  void check(const std::vector<Book>& books, int dim, std::int32_t max_entries);
};

void CodebookCudaTest::check(const std::vector<Book>& books, int dim, std::int32_t max_entries) {
  const auto cpu = *CpuContext::create({.n_threads = 1});
  const auto d = static_cast<std::size_t>(dim);
  std::size_t n_rounds = 0;
  for (const Book& book : books) n_rounds = std::max(n_rounds, book.tiles.size());
  std::vector<Codebook> expected(books.size());
  std::vector<bool> failed(books.size(), false);
  std::vector<testing::DeviceVector<F16>> entries;
  for (std::size_t i = 0; i < books.size(); ++i) {
    entries.push_back(device<F16>(static_cast<std::size_t>(max_entries) * d));
  }
  const auto counts = upload(std::vector<std::int32_t>(books.size(), 0));
  for (std::size_t round = 0; round < n_rounds; ++round) {
    std::vector<std::size_t> order;  // books that have a tile in this round
    std::vector<testing::DeviceVector<F16>> rows;
    std::vector<testing::DeviceVector<std::uint16_t>> refs;
    std::vector<testing::DeviceVector<std::uint16_t>> magnitudes;
    std::vector<DeviceCodebookTile> tiles;
    for (std::size_t i = 0; i < books.size(); ++i) {
      if (round >= books[i].tiles.size()) continue;
      const std::vector<F16>& tile_rows = books[i].tiles[round];
      const std::size_t n = tile_rows.size() / d;
      order.push_back(i);
      rows.push_back(upload(tile_rows));
      refs.push_back(device<std::uint16_t>(n));
      magnitudes.push_back(device<std::uint16_t>(n));
      DeviceCodebookTile tile;
      tile.rows = rows.back().data();
      tile.n_rows = static_cast<std::int32_t>(n);
      tile.theta = books[i].theta;
      tile.entries = entries[i].data();
      tile.max_entries = max_entries;
      tile.n_entries = counts.data() + i;
      tile.refs = refs.back().data();
      tile.magnitudes = magnitudes.back().data();
      tiles.push_back(tile);
    }
    const auto tiles_on_device = upload(tiles);
    const auto workspace = device<std::byte>(tiles.size() * codebook_workspace_bytes(dim));
    codebook_match(gpu(), dim, tiles_on_device.data(), static_cast<int>(tiles.size()),
                   workspace.data());
    workspace.check_guard();
    const std::vector<std::int32_t> actual_counts = counts.to_host();

    for (std::size_t t = 0; t < tiles.size(); ++t) {
      const std::size_t i = order[t];
      const std::string what = "book " + std::to_string(i) + " tile " + std::to_string(round) +
                               " of " + std::to_string(tiles[t].n_rows) + " rows";
      const std::vector<float> wide = testing::widened(books[i].tiles[round]);
      if (!failed[i]) {
        const CodebookMatch match = codebook_match(
            *cpu, expected[i], {wide.data(), tiles[t].n_rows, dim}, books[i].theta, max_entries);
        failed[i] = !match.complete;
        if (match.complete) {
          ASSERT_EQ(actual_counts[i], expected[i].n_entries()) << what;
          ASSERT_EQ(magnitudes[t].to_host(), match.refs.magnitude) << what;
          const std::vector<F16> actual_entries = entries[i].to_host();
          for (std::size_t k = 0; k < expected[i].entries.size(); ++k) {
            ASSERT_EQ(actual_entries[k].bits, expected[i].entries[k])
                << what << " entry " << k / d << " channel " << k % d;
          }
          for (std::size_t k = expected[i].entries.size(); k < actual_entries.size(); ++k) {
            ASSERT_EQ(actual_entries[k].bits, 0xabab) << what << ": past the entries";
          }
          // Where two earlier entries are equally near, either is right.
          const std::vector<std::uint16_t> actual_refs = refs[t].to_host();
          const std::vector<double> unit = units(books[i].tiles[round], dim, false);
          for (std::size_t r = 0; r < actual_refs.size(); ++r) {
            if (actual_refs[r] == match.refs.entry[r]) continue;
            ASSERT_LT(actual_refs[r], expected[i].n_entries()) << what << " row " << r;
            double cos[2] = {0, 0};
            for (std::size_t k = 0; k < d; ++k) {
              cos[0] += unit[r * d + k] * f16_to_f32(expected[i].entries[actual_refs[r] * d + k]);
              cos[1] +=
                  unit[r * d + k] * f16_to_f32(expected[i].entries[match.refs.entry[r] * d + k]);
            }
            ASSERT_LT(std::fabs(cos[0] - cos[1]), 2 * kCosError)
                << what << " row " << r << ": " << actual_refs[r] << " instead of "
                << match.refs.entry[r];
          }
          continue;
        }
      }
      ASSERT_EQ(actual_counts[i], max_entries + 1) << what << " fills the book";
    }
  }
}

TEST_F(CodebookCudaTest, TilesOfManySizes) {
  for (const int dim : {64, 128}) {
    std::vector<Book> books;
    for (const int n : {0, 1, 2, 5, 31, 32, 33, 63, 64, 65, 127, 129, 700, 1000, 1023, 1024}) {
      Book book;
      book.tiles = {clustered(n, dim, n / 20 + 1, random()())};
      book.theta = threshold(book.tiles, dim);
      books.push_back(book);
    }
    check(books, dim, 1024);
  }
}

TEST_F(CodebookCudaTest, LaterTilesMatchEarlierEntries) {
  for (const int dim : {64, 128}) {
    std::vector<Book> books(3);
    const auto seed = random()();
    books[0].tiles = {clustered(1024, dim, 60, seed), clustered(1024, dim, 80, seed),
                      clustered(333, dim, 60, seed)};
    books[1].tiles = {clustered(64, dim, 3, seed), clustered(64, dim, 3, seed),
                      clustered(64, dim, 4, seed), clustered(64, dim, 4, seed)};
    books[2].tiles = {clustered(1024, dim, 1024, seed), clustered(1024, dim, 1024, seed)};
    for (Book& book : books) book.theta = threshold(book.tiles, dim);
    check(books, dim, 2048);
  }
}

// Everything is similar to everything, and nothing to anything.
TEST_F(CodebookCudaTest, OneEntryAndAllEntries) {
  constexpr int kDim = 128;
  std::vector<Book> books(3);
  std::vector<float> same(1024 * kDim);
  for (std::size_t i = 0; i < same.size(); ++i) {
    same[i] = static_cast<float>(1 + i % kDim % 7) * static_cast<float>(1 + i / kDim % 9);
  }
  books[0].tiles = {testing::to_f16(same), testing::to_f16(same)};
  books[0].theta = 0.98F;
  books[1].tiles = {testing::to_f16(normal(1024 * kDim))};
  books[1].theta = 0.98F;
  books[2].tiles = {std::vector<F16>(100 * kDim)};
  books[2].theta = 0.98F;
  check(books, kDim, 1024);
}

TEST_F(CodebookCudaTest, AFullBookSaysSo) {
  for (const int dim : {64, 128}) {
    std::vector<Book> books(3);
    const auto seed = random()();
    // Full in the first tile, in a later one, and by rows that are alone.
    books[0].tiles = {clustered(1024, dim, 500, seed), clustered(100, dim, 5, seed)};
    books[1].tiles = {clustered(300, dim, 10, seed), clustered(1024, dim, 1024, seed + 1),
                      clustered(10, dim, 2, seed)};
    books[2].tiles = {testing::to_f16(normal(static_cast<std::size_t>(201 * dim)))};
    for (Book& book : books) book.theta = threshold(book.tiles, dim);
    check(books, dim, 200);
  }
}

TEST_F(CodebookCudaTest, NoTiles) {
  codebook_match(gpu(), 128, nullptr, 0, nullptr);
  gpu().synchronize();
}

}  // namespace
}  // namespace spindle::kernels
