#include "kernels/kv_select.h"

#include <algorithm>

#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

class KvSelectCudaTest : public testing::GpuTest {
 protected:
  // Rows of every kind that selection meets.
  std::vector<std::vector<float>> rows() {
    std::vector<std::vector<float>> rows;
    rows.push_back({});
    rows.push_back({0.5F});
    rows.push_back({1, 3, 3, 2, 3, -1, 0, -0.0F});
    rows.emplace_back(1000, 0.25F);
    for (const int n : {31, 1024, 4096, 4097, 30000, 131072}) {
      rows.push_back(normal(static_cast<std::size_t>(n)));
      // Scores as attention gives them, many octaves.
      rows.push_back(normal(static_cast<std::size_t>(n), 4.0F));
      for (float& value : rows.back()) value = std::exp(value - 8.0F);
      // Few distinct values, so that ties cross every threshold.
      rows.push_back({});
      for (int i = 0; i < n; ++i) rows.back().push_back(static_cast<float>(uniform_int(-2, 3)));
    }
    rows.push_back(normal(5000));
    for (int i = 0; i < 2000; ++i) {
      const float special[] = {std::nanf(""), -std::nanf(""), INFINITY, -INFINITY,
                               0.0F,          -0.0F,          1e-41F,   -1e-41F};
      rows.back()[static_cast<std::size_t>(uniform_int(0, 4999))] = special[uniform_int(0, 7)];
    }
    return rows;
  }

  // All rows' scores in one vector, each aligned to four.
  struct Packed {
    std::vector<float> scores;
    std::vector<std::size_t> begin;
  };
  static Packed pack(const std::vector<std::vector<float>>& rows) {
    Packed packed;
    for (const std::vector<float>& row : rows) {
      packed.begin.push_back(packed.scores.size());
      packed.scores.insert(packed.scores.end(), row.begin(), row.end());
      packed.scores.resize((packed.scores.size() + 3) / 4 * 4, 1e30F);
    }
    return packed;
  }
};

TEST_F(KvSelectCudaTest, KeepsWhatTheCpuKeeps) {
  const std::vector<std::vector<float>> all = rows();
  const Packed packed = pack(all);
  const auto scores = upload(packed.scores);
  for (const double share : {0.0, 0.001, 0.1, 0.37, 0.9, 1.0, 2.0}) {
    const auto kept = device<std::int32_t>(packed.scores.size());
    std::vector<DeviceSelect> selects;
    for (std::size_t r = 0; r < all.size(); ++r) {
      DeviceSelect select;
      select.scores = scores.data() + packed.begin[r];
      select.n = static_cast<std::int32_t>(all[r].size());
      select.k = static_cast<std::int32_t>(std::ceil(share * static_cast<double>(all[r].size())));
      select.kept = kept.data() + packed.begin[r];
      select.add = static_cast<std::int32_t>(r);
      selects.push_back(select);
    }
    const auto device_selects = upload(selects);
    select_top_k(gpu(), device_selects.data(), static_cast<int>(selects.size()));
    const std::vector<std::int32_t> actual = kept.to_host();
    for (std::size_t r = 0; r < all.size(); ++r) {
      std::vector<std::int32_t> expected = select_top_k(all[r], selects[r].k);
      for (std::int32_t& index : expected) index += selects[r].add;
      const auto* from = actual.data() + packed.begin[r];
      ASSERT_TRUE(std::equal(expected.begin(), expected.end(), from))
          << "row " << r << " of " << all[r].size() << ", keeps " << selects[r].k;
      const std::size_t end = r + 1 < all.size() ? packed.begin[r + 1] : packed.scores.size();
      for (std::size_t i = packed.begin[r] + expected.size(); i < end; ++i) {
        ASSERT_EQ(static_cast<std::uint32_t>(actual[i]), 0xababababU) << "row " << r;
      }
    }
  }
}

TEST_F(KvSelectCudaTest, HistogramsEqualTheCpus) {
  const std::vector<std::vector<float>> all = rows();
  const Packed packed = pack(all);
  const auto scores = upload(packed.scores);
  std::vector<DeviceSelect> selects;
  std::size_t bound = 0;
  for (std::size_t r = 0; r < all.size(); ++r) {
    DeviceSelect select;
    select.scores = scores.data() + packed.begin[r];
    select.n = static_cast<std::int32_t>(all[r].size());
    selects.push_back(select);
    bound += std::min<std::size_t>(all[r].size(), 32768);
  }
  const auto device_selects = upload(selects);
  for (const std::size_t capacity : {bound, std::size_t{100}}) {
    const auto entries = device<DeviceHistogramEntry>(capacity);
    const auto begin = device<std::uint32_t>(all.size());
    const auto size = device<std::uint32_t>(all.size());
    const auto n_entries = device<std::uint32_t>(1);
    DeviceHistograms out{entries.data(), static_cast<std::int64_t>(capacity), begin.data(),
                         size.data(), n_entries.data()};
    score_histogram(gpu(), device_selects.data(), static_cast<int>(selects.size()), out);
    const std::vector<std::uint32_t> first = begin.to_host();
    const std::vector<std::uint32_t> count = size.to_host();
    const std::vector<DeviceHistogramEntry> actual = entries.to_host();
    std::size_t total = 0;
    for (std::size_t r = 0; r < all.size(); ++r) {
      const ScoreHistogram expected = score_histogram(all[r]);
      ASSERT_EQ(count[r], expected.bin.size()) << "row " << r;
      total += count[r];
      for (std::size_t i = 0; i < expected.bin.size(); ++i) {
        if (first[r] + i >= capacity) break;
        ASSERT_EQ(actual[first[r] + i].bin, expected.bin[i]) << "row " << r << " entry " << i;
        ASSERT_EQ(actual[first[r] + i].count, expected.count[i]) << "row " << r << " entry " << i;
      }
    }
    EXPECT_EQ(n_entries.to_host().front(), total);
  }
}

TEST_F(KvSelectCudaTest, NoRows) {
  select_top_k(gpu(), nullptr, 0);
  const auto n_entries = device<std::uint32_t>(1);
  score_histogram(gpu(), nullptr, 0, {nullptr, 0, nullptr, nullptr, n_entries.data()});
  EXPECT_EQ(n_entries.to_host().front(), 0U);
}

}  // namespace
}  // namespace spindle::kernels
