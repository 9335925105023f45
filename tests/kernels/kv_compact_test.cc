#include "kernels/kv_compact.h"

#include "tests/kernels/block_cache.h"

namespace spindle::kernels {
namespace {

using KvCompactTest = KernelTest;

RopeTable make_rope(int rotary_dim, float attention_scale) {
  std::vector<float> inv_freq;
  for (int i = 0; i < rotary_dim; i += 2) {
    inv_freq.push_back(std::pow(10000.0F, -static_cast<float>(i) / static_cast<float>(rotary_dim)));
  }
  return RopeTable::create(inv_freq, 4096, attention_scale).value();
}

TEST_P(KvCompactTest, WriteRawByEye) {
  // Two tokens of two channels in three slots: K (1 2) (3 4) lies as 1 3 0 | 2 4 0, V as it reads.
  const std::vector<float> x = {1, 2, 3, 4};
  const KvPageLayout layout{2, kKvPageTokens, DType::kF32};
  AlignedBytes k(24, std::byte{0xff});
  AlignedBytes v(24, std::byte{0xff});
  kv_write_raw(KvSide::kKey, {x.data(), 2, 2}, 3, layout, k.data());
  kv_write_raw(KvSide::kValue, {x.data(), 2, 2}, 3, layout, v.data());
  k.check();
  v.check();
  const std::vector<float> k_expected = {1, 3, 0, 2, 4, 0};
  const std::vector<float> v_expected = {1, 2, 3, 4, 0, 0};
  EXPECT_EQ(std::memcmp(k.data(), k_expected.data(), 24), 0);
  EXPECT_EQ(std::memcmp(v.data(), v_expected.data(), 24), 0);
}

TEST_P(KvCompactTest, WriteRawRoundsToTheLayoutsType) {
  Random random(50);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int capacity : {4, 8, 32}) {
      for (const int head_dim : {16, 48, 64}) {
        const std::int64_t n = 1 + random.below(capacity);
        const std::vector<float> x = random.normals(n * head_dim);
        const KvPageLayout layout{head_dim, kKvPageTokens, dtype};
        for (const KvSide side : {KvSide::kKey, KvSide::kValue}) {
          const std::size_t size =
              kv_side_bytes(KvFormat::kRaw, side, head_dim, dtype, capacity).codes;
          AlignedBytes codes(size, std::byte{0xff});
          kv_write_raw(side, {x.data(), n, head_dim}, capacity, layout, codes.data());
          codes.check();
          for (std::int64_t t = 0; t < capacity; ++t) {
            for (std::int64_t d = 0; d < head_dim; ++d) {
              const std::int64_t at = side == KvSide::kKey ? d * capacity + t : t * head_dim + d;
              const float expected =
                  t < n ? rounded_to(x[static_cast<std::size_t>(t * head_dim + d)], dtype) : 0.0F;
              const std::byte* p = codes.data() + static_cast<std::size_t>(at) * dtype_bytes(dtype);
              float got = 0.0F;
              std::uint16_t half = 0;
              std::memcpy(&half, p, 2);
              if (dtype == DType::kF32) std::memcpy(&got, p, 4);
              if (dtype == DType::kF16) got = f16_to_f32(half);
              if (dtype == DType::kBF16) got = bf16_to_f32(half);
              ASSERT_EQ(got, expected) << "token " << t << " channel " << d;
            }
          }
        }
      }
    }
  }
}

TEST_P(KvCompactTest, GatherReturnsWhatWasAppended) {
  Random random(51);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int head_dim : {16, 48, 64, 128}) {
      const KvPageLayout layout{head_dim, kKvPageTokens, dtype};
      const std::int64_t n = 90;
      const std::int64_t origin = 1000 + random.below(50);
      std::vector<std::unique_ptr<AlignedBytes>> storage;
      std::vector<std::byte*> writable;
      std::vector<const std::byte*> pages;
      for (int i = 0; i < 3; ++i) {
        storage.push_back(std::make_unique<AlignedBytes>(layout.page_bytes(), std::byte{0xff}));
        writable.push_back(storage.back()->data());
        pages.push_back(storage.back()->data());
      }
      const std::vector<float> k = random.normals(n * head_dim);
      const std::vector<float> v = random.normals(n * head_dim);
      const KvWritableHeadPages head{writable.data(), origin};
      kv_append(context(), {k.data(), n, head_dim}, {v.data(), n, head_dim},
                std::vector<KvAppendSequence>{{0, n, origin, &head}}, 1, layout);
      std::vector<std::int32_t> positions;
      for (std::int64_t t = random.below(3); t < n; t += 1 + random.below(6)) {
        positions.push_back(static_cast<std::int32_t>(origin + t));
      }
      const auto n_rows = std::ssize(positions);
      GuardedRows k_out(n_rows, head_dim);
      GuardedRows v_out(n_rows, head_dim);
      kv_gather(context(), pages.data(), origin, positions, layout, k_out.view(), v_out.view());
      k_out.check();
      v_out.check();
      for (std::int64_t i = 0; i < n_rows; ++i) {
        const std::int64_t t = positions[static_cast<std::size_t>(i)] - origin;
        for (int d = 0; d < head_dim; ++d) {
          const auto at = static_cast<std::size_t>(t * head_dim + d);
          ASSERT_EQ(k_out.at(i, d), rounded_to(k[at], dtype));
          ASSERT_EQ(v_out.at(i, d), rounded_to(v[at], dtype));
        }
      }
      for (const auto& page : storage) page->check();
    }
  }
  kv_gather(context(), nullptr, 0, {}, {64, kKvPageTokens, DType::kF16}, {nullptr, 0, 64},
            {nullptr, 0, 64});
}

// Against the inverse rotation in fp64; the result is rounded to f16.
TEST_P(KvCompactTest, UnrotateUndoesRope) {
  Random random(52);
  for (const float attention_scale : {1.0F, 1.25F}) {
    for (const int rotary_dim : {64, 32}) {
      const RopeTable table = make_rope(rotary_dim, attention_scale);
      const std::int64_t n = 40;
      const std::int64_t d = 64;
      const std::vector<float> before = random.normals(n * d);
      std::vector<std::int32_t> positions;
      for (std::int64_t i = 0; i < n; ++i) {
        positions.push_back(static_cast<std::int32_t>(random.below(4096)));
      }
      GuardedRows rows(n, d);
      for (std::int64_t i = 0; i < n; ++i)
        std::copy_n(before.data() + i * d, d, rows.view().row(i));
      rope(context(), table, positions, static_cast<int>(d), rows.view(), {nullptr, 0, 0});
      kv_unrotate(table, positions, rows.view());
      rows.check();
      for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t c = 0; c < d; ++c) {
          const float x = before[static_cast<std::size_t>(i * d + c)];
          const float got = rows.at(i, c);
          ASSERT_NEAR(got, x, std::abs(x) * 0x1p-11F + 2e-6F) << "row " << i << " element " << c;
          ASSERT_EQ(got, f16_to_f32(f32_to_f16(got)));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, KvCompactTest, testing::ValuesIn(all_backends()), backend_name);

}  // namespace
}  // namespace spindle::kernels
