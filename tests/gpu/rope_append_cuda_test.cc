#include <gtest/gtest.h>

#include "kernels/attention.h"
#include "kernels/rope.h"
#include "tests/gpu/device_pieces.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

struct Case {
  int head_dim;
  int rotary_dim;
  int n_heads;
  int n_kv_heads;
  DType dtype;
};

// New tokens of one sequence: positions [begin, begin + n).
struct Chunk {
  int begin = 0;
  int n = 0;
  int tail_origin = 0;
};

class RopeAppendCudaTest : public testing::GpuTest {
 protected:
  static constexpr int kMaxPositions = 512;
  static constexpr int kLayers = 2;
  static constexpr int kLayer = 1;
  static constexpr std::uint16_t kUntouched = 0xabab;

  void check(const Case& c, const std::vector<Chunk>& chunks, int n_padding_rows,
             float attention_scale = 1.0F);
};

void RopeAppendCudaTest::check(const Case& c, const std::vector<Chunk>& chunks, int n_padding_rows,
                               float attention_scale) {
  const int d = c.head_dim;
  const RopeTable table = testing::make_rope(c.rotary_dim, kMaxPositions, attention_scale);
  const testing::RopeOnDevice rope_on_device(gpu(), table);
  const auto cpu = *CpuContext::create({.n_threads = 1});

  // Rows of all chunks with padding rows in front and between.
  std::vector<std::int32_t> row_sequence;
  std::vector<std::int32_t> positions;
  const auto pad = [&] {
    for (int i = 0; i < n_padding_rows; ++i) {
      row_sequence.push_back(-1);
      positions.push_back(0);
    }
  };
  for (std::size_t s = 0; s < chunks.size(); ++s) {
    pad();
    for (int i = 0; i < chunks[s].n; ++i) {
      row_sequence.push_back(static_cast<std::int32_t>(s));
      positions.push_back(chunks[s].begin + i);
    }
  }
  const auto n_rows = static_cast<std::int64_t>(positions.size());
  const std::int64_t width = std::int64_t{c.n_heads + 2 * c.n_kv_heads} * d;
  const std::int64_t stride = width + 12;
  const std::vector<float> qkv = normal(static_cast<std::size_t>(n_rows * stride), 3.0F);

  // Pages: every (sequence, head) has as many as its chunk needs, in shuffled places.
  KvPageLayout layout;
  layout.head_dim = d;
  layout.dtype = c.dtype;
  std::vector<int> n_pages;
  std::uint32_t total_pages = 0;
  for (const Chunk& chunk : chunks) {
    n_pages.push_back((chunk.begin + chunk.n - chunk.tail_origin + 31) / 32);
    total_pages += static_cast<std::uint32_t>(n_pages.back() * c.n_kv_heads);
  }
  std::vector<std::uint32_t> order(total_pages);
  for (std::uint32_t i = 0; i < total_pages; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random());
  const auto page_numbers = upload(order);
  std::vector<DeviceKvHead> heads(chunks.size() * kLayers * static_cast<std::size_t>(c.n_kv_heads));
  std::vector<DeviceSequence> sequences(chunks.size());
  std::vector<std::size_t> first_page;  // of (sequence, head), in `order`
  std::size_t next = 0;
  const auto heads_on_device = device<DeviceKvHead>(heads.size());
  for (std::size_t s = 0; s < chunks.size(); ++s) {
    const std::size_t first = s * kLayers * static_cast<std::size_t>(c.n_kv_heads);
    sequences[s].heads = heads_on_device.data() + first;
    sequences[s].n_queries = chunks[s].n;
    for (int h = 0; h < c.n_kv_heads; ++h) {
      DeviceKvHead& head = heads[first + static_cast<std::size_t>(kLayer * c.n_kv_heads + h)];
      head.pages = page_numbers.data() + next;
      head.tail_origin = chunks[s].tail_origin;
      first_page.push_back(next);
      next += static_cast<std::size_t>(n_pages[s]);
    }
  }
  gpu().to_device(heads_on_device.data(), heads.data(), heads.size() * sizeof(DeviceKvHead));
  const auto sequences_on_device = upload(sequences);
  const std::size_t page_elements = layout.page_bytes() / 2;
  const auto pool = device<std::uint16_t>(total_pages * page_elements);
  const auto rows_on_device = upload(row_sequence);
  const auto positions_on_device = upload(positions);
  const auto qkv_on_device = upload(qkv);
  const std::int64_t q_width = std::int64_t{c.n_heads} * d;
  const std::int64_t q_stride = q_width + 8;
  const auto q = device<F16>(static_cast<std::size_t>(n_rows * q_stride));
  rope_append(gpu(), rope_on_device.view(), {qkv_on_device.data(), n_rows, width, stride},
              rows_on_device.data(), positions_on_device.data(), sequences_on_device.data(), kLayer,
              {c.n_heads, c.n_kv_heads, d}, {reinterpret_cast<std::byte*>(pool.data()), layout},
              {q.data(), n_rows, q_width, q_stride});

  // The CPU body rotates q and k in one view of heads.
  std::vector<float> wide = qkv;
  const Rows qk(wide.data(), n_rows, q_width + std::int64_t{c.n_kv_heads} * d, stride);
  rope(*cpu, table, positions, d, qk, Rows(wide.data(), n_rows, 0, stride));
  // fp32 differs in the last bits where the GPU contracts; one step of the 16-bit type at most.
  const std::vector<F16> actual_q = q.to_host();
  std::vector<std::uint16_t> expected_pool(pool.size(), kUntouched);
  const std::vector<std::uint16_t> actual_pool = pool.to_host();
  const float step = c.dtype == DType::kBF16 ? 0x1p-7F : 0x1p-10F;
  for (std::int64_t r = 0; r < n_rows; ++r) {
    const auto row = static_cast<std::size_t>(r);
    const float* expected = wide.data() + r * stride;
    for (std::int64_t i = 0; i < q_stride; ++i) {
      const std::uint16_t bits = actual_q[static_cast<std::size_t>(r * q_stride + i)].bits;
      if (row_sequence[row] < 0 || i >= q_width) {
        ASSERT_EQ(bits, kUntouched) << "q row " << r << " column " << i;
        continue;
      }
      ASSERT_LE(std::fabs(f16_to_f32(bits) - expected[i]),
                4e-6F + 0x1p-10F * std::fabs(expected[i]))
          << "q row " << r << " column " << i;
    }
    if (row_sequence[row] < 0) continue;
    const auto s = static_cast<std::size_t>(row_sequence[row]);
    const int offset = positions[row] - chunks[s].tail_origin;
    for (int h = 0; h < c.n_kv_heads; ++h) {
      const std::size_t entry =
          first_page[s * static_cast<std::size_t>(c.n_kv_heads) + static_cast<std::size_t>(h)] +
          static_cast<std::size_t>(offset / 32);
      const std::size_t page = order[entry] * page_elements;
      for (int i = 0; i < d; ++i) {
        const std::size_t k_index = page + testing::k_at(offset % 32, i);
        const float k = expected[q_width + h * d + i];
        ASSERT_LE(std::fabs(testing::widen(c.dtype, actual_pool[k_index]) - k),
                  4e-6F + step * std::fabs(k))
            << "K row " << r << " head " << h << " channel " << i;
        expected_pool[k_index] = actual_pool[k_index];
        const std::size_t v_index = page + page_elements / 2 + testing::v_at(offset % 32, i);
        expected_pool[v_index] =
            testing::narrow(c.dtype, expected[q_width + std::int64_t{c.n_kv_heads + h} * d + i]);
      }
    }
  }
  EXPECT_EQ(actual_pool, expected_pool) << "V, and what no new token owns";
}

TEST_F(RopeAppendCudaTest, DecodeStepsOfManySequences) {
  std::vector<Chunk> chunks;
  for (int s = 0; s < 37; ++s) {
    const int origin = 32 * uniform_int(0, 5);
    chunks.push_back({origin + uniform_int(0, 200), 1, origin});
  }
  check({128, 128, 8, 2, DType::kBF16}, chunks, 0);
  check({64, 64, 8, 8, DType::kF16}, chunks, 1);
}

TEST_F(RopeAppendCudaTest, PrefillChunksThatBeginInsideAPage) {
  const std::vector<Chunk> chunks = {{0, 75, 0}, {13, 1, 0}, {45, 40, 32}, {96, 32, 64}};
  check({128, 128, 4, 1, DType::kF16}, chunks, 3);
  check({64, 64, 6, 3, DType::kBF16}, chunks, 0);
}

TEST_F(RopeAppendCudaTest, PartOfTheHeadIsRotated) {
  const std::vector<Chunk> chunks = {{5, 9, 0}};
  check({128, 32, 2, 2, DType::kBF16}, chunks, 1);
  check({64, 48, 2, 1, DType::kF16}, chunks, 0, 1.25F);
}

TEST_F(RopeAppendCudaTest, NoRows) { check({128, 128, 4, 2, DType::kBF16}, {}, 0); }

}  // namespace
}  // namespace spindle::kernels
