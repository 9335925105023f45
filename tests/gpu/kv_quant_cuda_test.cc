#include "kernels/kv_quant.h"

#include <gtest/gtest.h>

#include "kernels/kv_compact.h"
#include "tests/gpu/device_pieces.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

using testing::code_bits;
using testing::is_kivi;

constexpr KvFormat kCoded[] = {KvFormat::kInt4,   KvFormat::kKivi4,  KvFormat::kKivi2,
                               KvFormat::kLloyd1, KvFormat::kLloyd2, KvFormat::kLloyd3,
                               KvFormat::kLloyd4};
constexpr KvSide kSides[] = {KvSide::kKey, KvSide::kValue};

std::string name_of(KvFormat format, KvSide side, int dim, int n) {
  return "format " + std::to_string(static_cast<int>(format)) +
         (side == KvSide::kKey ? " K" : " V") + " d " + std::to_string(dim) + " n " +
         std::to_string(n);
}

class KvQuantCudaTest : public testing::GpuTest {
 protected:
  // Rows of several kinds, as f16.
  std::vector<F16> rows_like(int kind, int n, int dim) {
    std::vector<float> values = normal(static_cast<std::size_t>(n * dim));
    const auto d = static_cast<std::size_t>(dim);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::size_t t = i / d;
      const std::size_t c = i % d;
      switch (kind) {
        case 1:  // loud channels, quiet tokens
          values[i] *= (c % 17 == 3 ? 40.0F : 1.0F) * (t % 5 == 1 ? 1e-3F : 1.0F);
          break;
        case 2:  // zero rows, constant rows, negative zeros
          if (t % 3 == 0) values[i] = 0.0F;
          if (t % 3 == 1) values[i] = 0.5F + static_cast<float>(t);
          if (t % 7 == 0 && c % 2 == 0) values[i] = -0.0F;
          break;
        case 3:  // near the largest f16
          values[i] = std::copysign(65504.0F - 100.0F * std::fabs(values[i]), values[i]);
          if (t % 4 == 1) values[i] = std::fabs(values[i]);
          break;
        case 4:  // subnormal in f16
          values[i] *= 1e-6F;
          break;
        case 5:  // few distinct values: ties of rounding
          values[i] = std::round(values[i] * 2.0F) / 2.0F;
          break;
        case 6:  // one large element a row
          values[i] = c == (t * 11) % d ? 100.0F : 0.0F;
          break;
        default:
          break;
      }
    }
    return testing::to_f16(values);
  }
  static constexpr int kKinds = 7;
};

TEST_F(KvQuantCudaTest, CodesAndScalesEqualTheCpuBodys) {
  struct Job {
    KvFormat format;
    KvSide side;
    int n;
    std::size_t row;    // first element of its rows
    std::size_t codes;  // byte in all codes
    std::size_t scales;
  };
  for (const int dim : {64, 128}) {
    std::vector<Job> jobs;
    std::vector<F16> rows;
    std::size_t code_bytes = 0;
    std::size_t scale_bytes = 0;
    for (const KvFormat format : kCoded) {
      for (const KvSide side : kSides) {
        const auto bytes = kv_side_bytes(format, side, dim, DType::kF16);
        const bool whole = is_kivi(format) && side == KvSide::kKey;
        for (int n = whole ? 32 : 0; n <= 32; ++n) {
          for (int kind = 0; kind < (n == 32 || n == 9 ? kKinds : 1); ++kind) {
            const std::vector<F16> block = rows_like(kind, n, dim);
            jobs.push_back({format, side, n, rows.size(), code_bytes, scale_bytes});
            rows.insert(rows.end(), block.begin(), block.end());
            code_bytes += bytes.codes;
            scale_bytes += bytes.scales;
          }
        }
      }
    }
    std::vector<float> mean_values = normal(static_cast<std::size_t>(dim), 0.3F);
    const std::vector<F16> mean = testing::to_f16(mean_values);
    std::vector<std::uint16_t> mean_bits;
    for (const F16 m : mean) mean_bits.push_back(m.bits);

    const auto rows_on_device = upload(rows);
    const auto mean_on_device = upload(mean_bits);
    const auto codes = device<std::byte>(code_bytes);
    const auto scales = device<std::byte>(scale_bytes);
    std::vector<DeviceEncode> list;
    for (const Job& job : jobs) {
      DeviceEncode block;
      block.rows = rows_on_device.data() + job.row;
      block.mean = mean_on_device.data();
      block.codes = codes.data() + job.codes;
      block.scales = scales.data() + job.scales;
      block.format = job.format;
      block.side = job.side;
      block.n = static_cast<std::uint8_t>(job.n);
      list.push_back(block);
    }
    const auto list_on_device = upload(list);
    kv_encode(gpu(), dim, DType::kF16, list_on_device.data(), static_cast<int>(list.size()));
    const std::vector<std::byte> actual_codes = codes.to_host();
    const std::vector<std::byte> actual_scales = scales.to_host();

    const std::vector<float> wide = testing::widened(rows);
    for (const Job& job : jobs) {
      const auto bytes = kv_side_bytes(job.format, job.side, dim, DType::kF16);
      std::vector<std::byte> expected_codes(bytes.codes);
      std::vector<std::byte> expected_scales(bytes.scales);
      kv_encode(job.format, job.side, {wide.data() + job.row, job.n, dim}, mean_bits,
                expected_codes.data(), expected_scales.data());
      const std::string name = name_of(job.format, job.side, dim, job.n);
      const auto first = actual_scales.begin() + static_cast<std::ptrdiff_t>(job.scales);
      ASSERT_TRUE(std::equal(expected_scales.begin(), expected_scales.end(), first))
          << name << ": scales";
      const auto unpacked =
          testing::to_host_order(job.side, code_bits(job.format), dim,
                                 std::span(actual_codes).subspan(job.codes, bytes.codes));
      ASSERT_EQ(unpacked, expected_codes) << name << ": codes";
    }
  }
}

TEST_F(KvQuantCudaTest, RawBlocksOfEveryCapacity) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const int dim : {64, 128}) {
      for (const int capacity : {1, 2, 4, 7, 8, 16, 24, 32}) {
        const int n = uniform_int(0, capacity);
        const std::vector<F16> rows = rows_like(0, n, dim);
        const auto rows_on_device = upload(rows);
        const auto n_elements = static_cast<std::size_t>(dim * capacity);
        const auto k = device<std::uint16_t>(n_elements);
        const auto v = device<std::uint16_t>(n_elements);
        std::vector<DeviceEncode> list(2);
        for (std::size_t i = 0; i < 2; ++i) {
          list[i].rows = rows_on_device.data();
          list[i].codes = reinterpret_cast<std::byte*>(i == 0 ? k.data() : v.data());
          list[i].side = kSides[i];
          list[i].n = static_cast<std::uint8_t>(n);
          list[i].capacity = static_cast<std::uint8_t>(capacity);
        }
        const auto list_on_device = upload(list);
        kv_encode(gpu(), dim, dtype, list_on_device.data(), 2);
        std::vector<std::uint16_t> expected_k(n_elements);
        std::vector<std::uint16_t> expected_v(n_elements);
        for (int t = 0; t < n; ++t) {
          for (int c = 0; c < dim; ++c) {
            const std::uint16_t bits = testing::narrow(
                dtype, f16_to_f32(rows[static_cast<std::size_t>(t * dim + c)].bits));
            expected_k[testing::k_at(t, c, capacity)] = bits;
            expected_v[testing::v_at(t, c, capacity)] = bits;
          }
        }
        EXPECT_EQ(k.to_host(), expected_k) << "capacity " << capacity << " n " << n;
        EXPECT_EQ(v.to_host(), expected_v) << "capacity " << capacity << " n " << n;
      }
    }
  }
}

TEST_F(KvQuantCudaTest, MeansEqualTheCpuBodysBitForBit) {
  for (const int dim : {64, 128}) {
    const std::vector<int> counts = {0, 1, 2, 3, 31, 63, 64, 65, 127, 128, 383, 384, 385, 2049};
    std::vector<std::vector<F16>> rows;
    std::vector<testing::DeviceVector<F16>> rows_on_device;
    std::vector<DeviceMean> list;
    const auto means = device<std::uint16_t>(counts.size() * static_cast<std::size_t>(dim));
    for (const int n : counts) {
      rows.push_back(rows_like(n == 383 ? 3 : 0, n, dim));
      rows_on_device.push_back(upload(rows.back()));
      list.push_back({rows_on_device.back().data(), n,
                      means.data() + list.size() * static_cast<std::size_t>(dim)});
    }
    const auto list_on_device = upload(list);
    kv_mean(gpu(), dim, list_on_device.data(), static_cast<int>(list.size()));
    const std::vector<std::uint16_t> actual = means.to_host();
    for (std::size_t i = 0; i < counts.size(); ++i) {
      const std::vector<float> wide = testing::widened(rows[i]);
      std::vector<std::uint16_t> expected(static_cast<std::size_t>(dim));
      kv_mean({wide.data(), counts[i], dim}, expected);
      const auto first = actual.begin() + static_cast<std::ptrdiff_t>(i) * dim;
      EXPECT_EQ(std::vector<std::uint16_t>(first, first + dim), expected) << "n " << counts[i];
    }
  }
}

// K and V of a tail in random places, gathered at some of its positions.
TEST_F(KvQuantCudaTest, GatheredRowsEqualTheCpuBodys) {
  struct Case {
    int dim;
    int rotary_dim;
    DType dtype;
    float attention_scale;
  };
  for (const Case& c : {Case{128, 128, DType::kF16, 1.0F}, Case{128, 128, DType::kBF16, 1.3F},
                        Case{64, 64, DType::kF16, 0.8F}, Case{64, 32, DType::kBF16, 1.0F}}) {
    const int d = c.dim;
    const RopeTable table = testing::make_rope(c.rotary_dim, 1024, c.attention_scale);
    const testing::RopeOnDevice rope(gpu(), table);
    constexpr int kPages = 9;
    constexpr int kOrigin = 96;
    const auto page_elements = static_cast<std::size_t>(64 * d);
    const std::vector<std::uint32_t> numbers = {4, 7, 1, 8, 0, 3, 2, 6, 5};
    std::vector<std::uint16_t> pool(kPages * page_elements);
    const std::vector<float> values = normal(static_cast<std::size_t>(2 * kPages * 32 * d), 4.0F);
    std::vector<float> k_values;  // rounded, [position][d]
    std::vector<float> v_values;
    for (int t = 0; t < kPages * 32; ++t) {
      std::uint16_t* page = pool.data() + numbers[static_cast<std::size_t>(t / 32)] * page_elements;
      for (int i = 0; i < d; ++i) {
        const auto at = static_cast<std::size_t>((t * d + i) * 2);
        const std::uint16_t k = testing::narrow(c.dtype, values[at]);
        const std::uint16_t v = testing::narrow(c.dtype, values[at + 1]);
        page[testing::k_at(t % 32, i)] = k;
        page[page_elements / 2 + testing::v_at(t % 32, i)] = v;
        k_values.push_back(testing::widen(c.dtype, k));
        v_values.push_back(testing::widen(c.dtype, v));
      }
    }
    // A run, scattered positions, one position, none, a run that is not listed.
    std::vector<std::vector<std::int32_t>> wanted(5);
    for (int t = 3; t < 240; ++t) wanted[0].push_back(kOrigin + t);
    for (int t = 0; t < kPages * 32; ++t) {
      if (uniform_int(0, 2) == 0) wanted[1].push_back(kOrigin + t);
    }
    wanted[2] = {kOrigin + kPages * 32 - 1};
    for (int t = 45; t < 211; ++t) wanted[4].push_back(kOrigin + t);

    const auto pool_on_device = upload(pool);
    const auto numbers_on_device = upload(numbers);
    std::vector<testing::DeviceVector<std::int32_t>> positions;
    std::vector<testing::DeviceVector<F16>> outputs;
    std::vector<DeviceGather> gathers;
    for (const auto& list : wanted) {
      const auto n_elements = list.size() * static_cast<std::size_t>(d);
      positions.push_back(upload(list));
      for (int i = 0; i < 3; ++i) outputs.push_back(device<F16>(n_elements));
      DeviceGather gather;
      gather.pages = numbers_on_device.data();
      gather.tail_origin = kOrigin;
      gather.n_tokens = static_cast<std::int32_t>(list.size());
      gather.positions = positions.back().data();
      if (positions.size() == 5) {
        gather.positions = nullptr;
        gather.first_position = list.front();
      }
      const std::size_t first = outputs.size() - 3;
      gather.k = outputs[first].data();
      gather.k_pre = outputs[first + 1].data();
      gather.v = outputs[first + 2].data();
      gathers.push_back(gather);
    }
    const auto gathers_on_device = upload(gathers);
    kv_gather(gpu(), reinterpret_cast<const std::byte*>(pool_on_device.data()), c.dtype, d,
              rope.view(), gathers_on_device.data(), static_cast<int>(gathers.size()), kPages * 32);

    for (std::size_t g = 0; g < wanted.size(); ++g) {
      const auto n = static_cast<std::int64_t>(wanted[g].size());
      std::vector<float> k;
      std::vector<float> v;
      for (const std::int32_t position : wanted[g]) {
        const auto at = static_cast<std::ptrdiff_t>(position - kOrigin) * d;
        k.insert(k.end(), k_values.begin() + at, k_values.begin() + at + d);
        v.insert(v.end(), v_values.begin() + at, v_values.begin() + at + d);
      }
      std::vector<float> k_pre = k;
      kv_unrotate(table, wanted[g], {k_pre.data(), n, d});
      const auto rounded = [](const std::vector<float>& x) {
        return testing::widened(testing::to_f16(x));
      };
      EXPECT_EQ(testing::widened(outputs[3 * g].to_host()), rounded(k)) << "K, list " << g;
      EXPECT_EQ(testing::widened(outputs[3 * g + 1].to_host()), k_pre) << "K before, list " << g;
      EXPECT_EQ(testing::widened(outputs[3 * g + 2].to_host()), rounded(v)) << "V, list " << g;
    }

    // Outputs that are not wanted are left out one by one.
    const auto n_elements = wanted[1].size() * static_cast<std::size_t>(d);
    for (int only = 0; only < 3; ++only) {
      const auto out = device<F16>(n_elements);
      DeviceGather gather = gathers[1];
      gather.k = only == 0 ? out.data() : nullptr;
      gather.k_pre = only == 1 ? out.data() : nullptr;
      gather.v = only == 2 ? out.data() : nullptr;
      const auto one = upload(std::vector<DeviceGather>{gather});
      kv_gather(gpu(), reinterpret_cast<const std::byte*>(pool_on_device.data()), c.dtype, d,
                rope.view(), one.data(), 1, kPages * 32);
      EXPECT_EQ(testing::widened(out.to_host()),
                testing::widened(outputs[static_cast<std::size_t>(3 + only)].to_host()));
    }
  }
}

TEST_F(KvQuantCudaTest, GatheredValuesBeyondF16Saturate) {
  constexpr int kDim = 64;
  const RopeTable table = testing::make_rope(kDim, 8);
  const testing::RopeOnDevice rope(gpu(), table);
  std::vector<std::uint16_t> page(std::size_t{64} * kDim);
  page[testing::k_at(0, 5)] = f32_to_bf16(1e30F);
  page[page.size() / 2 + testing::v_at(0, 7)] = f32_to_bf16(-70000.0F);
  const auto pool = upload(page);
  const auto number = upload(std::vector<std::uint32_t>{0});
  const auto position = upload(std::vector<std::int32_t>{0});
  const auto k = device<F16>(kDim);
  const auto k_pre = device<F16>(kDim);
  const auto v = device<F16>(kDim);
  const DeviceGather gather{number.data(), 0, 1, position.data(), k.data(), k_pre.data(), v.data()};
  const auto gathers = upload(std::vector<DeviceGather>{gather});
  kv_gather(gpu(), reinterpret_cast<const std::byte*>(pool.data()), DType::kBF16, kDim, rope.view(),
            gathers.data(), 1, 1);
  std::vector<float> expected_k(kDim);
  std::vector<float> expected_v(kDim);
  expected_k[5] = 65504.0F;
  expected_v[7] = -65504.0F;
  EXPECT_EQ(testing::widened(k.to_host()), expected_k);
  EXPECT_EQ(testing::widened(k_pre.to_host()), expected_k);
  EXPECT_EQ(testing::widened(v.to_host()), expected_v);
}

TEST_F(KvQuantCudaTest, NothingToDo) {
  kv_gather(gpu(), nullptr, DType::kF16, 128, {}, nullptr, 0, 0);
  kv_mean(gpu(), 128, nullptr, 0);
  kv_encode(gpu(), 128, DType::kF16, nullptr, 0);
  gpu().synchronize();
}

}  // namespace
}  // namespace spindle::kernels
