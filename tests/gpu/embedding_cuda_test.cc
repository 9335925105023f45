#include "kernels/embedding.h"

#include <gtest/gtest.h>

#include "kernels/core/cpu_context.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

class EmbeddingCudaTest : public testing::GpuTest {
 protected:
  std::vector<std::int32_t> random_ids(std::int64_t n, int n_vocab) {
    std::vector<std::int32_t> ids;
    for (std::int64_t i = 0; i < n; ++i) ids.push_back(uniform_int(0, n_vocab - 1));
    return ids;
  }

  template <typename T>
  void check(const std::vector<T>& values, DType dtype, std::int64_t hidden, std::int64_t n_tokens,
             std::int64_t gap) {
    SCOPED_TRACE(::testing::Message() << dtype_name(dtype) << ", " << n_tokens << " rows of "
                                      << hidden << ", gap " << gap);
    const std::int64_t n_vocab = static_cast<std::int64_t>(values.size()) / hidden;
    const std::vector<std::int32_t> ids = random_ids(n_tokens, static_cast<int>(n_vocab));
    const std::int64_t stride = hidden + gap;
    std::vector<float> expected(static_cast<std::size_t>(n_tokens * hidden));
    const auto cpu = CpuContext::create({.n_threads = 1}).value();
    embedding(*cpu, {values.data(), dtype, n_vocab, hidden}, ids,
              Rows(expected.data(), n_tokens, hidden));
    const auto table = upload(values);
    const auto device_ids = upload(ids);
    const auto out = device<float>(static_cast<std::size_t>(n_tokens * stride));
    embedding(gpu(), {table.data(), dtype, n_vocab, hidden}, device_ids.data(),
              Rows(out.data(), n_tokens, hidden, stride));
    const std::vector<float> got = out.to_host();
    for (std::int64_t i = 0; i < n_tokens * stride; ++i) {
      const float value = got[static_cast<std::size_t>(i)];
      if (i % stride < hidden) {
        ASSERT_EQ(value, expected[static_cast<std::size_t>(i / stride * hidden + i % stride)]);
      } else {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(value), 0xababababU) << "written between rows";
      }
    }
  }
};

TEST_F(EmbeddingCudaTest, EqualsTheCpuBodyExactly) {
  for (const std::int64_t hidden : {1, 6, 64, 768, 4096}) {
    const std::vector<float> values = normal(static_cast<std::size_t>(50 * hidden));
    for (const std::int64_t n_tokens : {0, 1, 7, 333}) {
      check(values, DType::kF32, hidden, n_tokens, 0);
      check(testing::to_f16(values), DType::kF16, hidden, n_tokens, 4);
      check(testing::to_bf16(values), DType::kBF16, hidden, n_tokens, 3);
    }
  }
}

TEST_F(EmbeddingCudaTest, AnIdOutsideTheTableIsARowOfNan) {
  const auto table = upload(normal(10 * 8));
  const auto ids = upload(std::vector<std::int32_t>{-1, 3, 10, 1 << 30});
  const auto out = device<float>(4 * 8);
  embedding(gpu(), {table.data(), DType::kF32, 10, 8}, ids.data(), Rows(out.data(), 4, 8));
  const std::vector<float> got = out.to_host();
  for (std::size_t i = 0; i < got.size(); ++i) EXPECT_EQ(std::isnan(got[i]), i / 8 != 1) << i;
}

TEST_F(EmbeddingCudaTest, GatherRowsCopiesThem) {
  for (const std::int64_t width : {1, 30, 4096}) {
    const std::int64_t stride = width + 2;
    const std::vector<float> rows = normal(static_cast<std::size_t>(20 * stride));
    const std::vector<std::int32_t> index = random_ids(33, 20);
    const auto device_rows = upload(rows);
    const auto device_index = upload(index);
    const auto out = device<float>(static_cast<std::size_t>(33 * width));
    gather_rows(gpu(), ConstRows(device_rows.data(), 20, width, stride), device_index.data(),
                Rows(out.data(), 33, width));
    const std::vector<float> got = out.to_host();
    for (std::int64_t i = 0; i < 33 * width; ++i) {
      const std::int64_t row = index[static_cast<std::size_t>(i / width)];
      ASSERT_EQ(got[static_cast<std::size_t>(i)],
                rows[static_cast<std::size_t>(row * stride + i % width)]);
    }
  }
  gather_rows(gpu(), ConstRows(nullptr, 0, 8), nullptr, Rows(nullptr, 0, 8));
}

}  // namespace
}  // namespace spindle::kernels
