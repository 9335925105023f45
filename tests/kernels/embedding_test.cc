#include "kernels/embedding.h"

#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {
namespace {

using EmbeddingTest = KernelTest;

TEST_P(EmbeddingTest, GathersRowsByEye) {
  const std::vector<float> table = {0, 1, 10, 11, 20, 21};
  GuardedRows out(3, 2);
  embedding(context(), {table.data(), DType::kF32, 3, 2}, std::vector<std::int32_t>{2, 0, 2},
            out.view());
  out.check();
  EXPECT_EQ(out.at(0, 0), 20);
  EXPECT_EQ(out.at(0, 1), 21);
  EXPECT_EQ(out.at(1, 0), 0);
  EXPECT_EQ(out.at(1, 1), 1);
  EXPECT_EQ(out.at(2, 1), 21);
}

TEST_P(EmbeddingTest, WidensSixteenBitTypesExactly) {
  const std::vector<std::uint16_t> bf16 = {f32_to_bf16(1.5F), f32_to_bf16(-0.0F),
                                           f32_to_bf16(3e38F)};
  const std::vector<std::uint16_t> f16 = {f32_to_f16(1.5F), 0x0001, f32_to_f16(-65504.0F)};
  GuardedRows out(1, 3);
  const std::vector<std::int32_t> ids = {0};
  embedding(context(), {bf16.data(), DType::kBF16, 1, 3}, ids, out.view());
  out.check();
  EXPECT_EQ(out.at(0, 0), 1.5F);
  EXPECT_TRUE(std::signbit(out.at(0, 1)));
  EXPECT_EQ(out.at(0, 2), bf16_to_f32(bf16[2]));
  embedding(context(), {f16.data(), DType::kF16, 1, 3}, ids, out.view());
  EXPECT_EQ(out.at(0, 0), 1.5F);
  EXPECT_EQ(out.at(0, 1), 0x1p-24F);
  EXPECT_EQ(out.at(0, 2), -65504.0F);
}

TEST_P(EmbeddingTest, NoTokensAndManyTokens) {
  Random random(1);
  const std::int64_t hidden = 130;
  const std::vector<float> table = random.normals(50 * hidden);
  const EmbeddingTable view{table.data(), DType::kF32, 50, hidden};
  GuardedRows none(0, hidden);
  embedding(context(), view, {}, none.view());
  none.check();
  std::vector<std::int32_t> ids(3000);
  for (auto& id : ids) id = static_cast<std::int32_t>(random.below(50));
  GuardedRows out(3000, hidden);
  embedding(context(), view, ids, out.view());
  out.check();
  for (std::int64_t i = 0; i < 3000; ++i) {
    ASSERT_EQ(
        0, std::memcmp(out.view().row(i),
                       &table[static_cast<std::size_t>(ids[static_cast<std::size_t>(i)] * hidden)],
                       static_cast<std::size_t>(hidden) * sizeof(float)));
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, EmbeddingTest, testing::ValuesIn(all_backends()), backend_name);

}  // namespace
}  // namespace spindle::kernels
