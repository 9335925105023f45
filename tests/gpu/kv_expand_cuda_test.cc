#include <gtest/gtest.h>

#include "kernels/attention.h"
#include "kernels/kv_quant.h"
#include "tests/gpu/device_pieces.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

constexpr int kMaxPositions = 4096;
constexpr int kVocabulary = 100;
constexpr int kEntries = 40;  // the last chunk is not full

struct Case {
  int dim;
  DType dtype;
  bool wide_positions;
  bool wide_ids;
};

// What the blocks of one head refer to, on the host.
struct HeadData {
  std::vector<std::uint16_t> mean[2];     // of K and of V
  std::vector<std::uint16_t> entries[2];  // [kEntries][d]
  std::vector<std::uint16_t> tokens[2];   // [kVocabulary][token_stride]
  std::int64_t token_stride = 0;
};

// One block: what the device gets and the rows the attention must see, [32][d].
struct BlockData {
  DeviceKvBlock block;
  std::vector<float> rows[2];
};

class KvExpandCudaTest : public testing::GpuTest {
 protected:
  void check(const Case& c);

 private:
  std::vector<std::uint16_t> f16_normal(std::size_t n, float scale = 1.0F) {
    std::vector<std::uint16_t> bits;
    for (const float value : normal(n, scale)) bits.push_back(f32_to_f16(value));
    return bits;
  }
  HeadData make_head(int dim);
  std::vector<float> make_side(const Case& c, KvFormat format, KvSide side, const HeadData& head,
                               const std::vector<std::uint32_t>& ids, int capacity, int n,
                               testing::HostPool& pool, DeviceKvBlock& block);
  BlockData make_block(const Case& c, KvFormat k, KvFormat v, const HeadData& head, int position,
                       const RopeTable& table, testing::HostPool& pool);
};

HeadData KvExpandCudaTest::make_head(int dim) {
  HeadData head;
  head.token_stride = 3 * dim + 1;  // rows of the table are not aligned
  for (int side = 0; side < 2; ++side) {
    head.mean[side] = f16_normal(static_cast<std::size_t>(dim), 0.4F);
    head.entries[side] = f16_normal(static_cast<std::size_t>(kEntries * dim), 0.1F);
    head.tokens[side] = f16_normal(static_cast<std::size_t>(kVocabulary * head.token_stride));
  }
  return head;
}

// Encodes n rows into the pool; answers them decoded by the CPU body, K before RoPE.
std::vector<float> KvExpandCudaTest::make_side(const Case& c, KvFormat format, KvSide side,
                                               const HeadData& head,
                                               const std::vector<std::uint32_t>& ids, int capacity,
                                               int n, testing::HostPool& pool,
                                               DeviceKvBlock& block) {
  const int d = c.dim;
  const int which = side == KvSide::kKey ? 0 : 1;
  std::uint32_t& codes = which == 0 ? block.k_codes : block.v_codes;
  std::uint32_t& scales = which == 0 ? block.k_scales : block.v_scales;
  std::vector<float> rows(static_cast<std::size_t>(32 * d));
  const std::vector<float> values = normal(static_cast<std::size_t>(32 * d), 2.0F);
  if (format == KvFormat::kRaw) {
    std::vector<std::uint16_t> raw(static_cast<std::size_t>(capacity * d));
    for (int t = 0; t < n; ++t) {
      for (int i = 0; i < d; ++i) {
        const auto at = static_cast<std::size_t>(t * d + i);
        const std::uint16_t bits = testing::narrow(c.dtype, values[at]);
        raw[which == 0 ? testing::k_at(t, i, capacity) : testing::v_at(t, i, capacity)] = bits;
        rows[at] = testing::widen(c.dtype, bits);
      }
    }
    codes = pool.add(raw);
  } else if (format == KvFormat::kCodebook) {
    std::vector<std::uint16_t> refs(32);
    std::vector<std::uint16_t> magnitudes(32);
    for (int t = 0; t < n; ++t) {
      const auto slot = static_cast<std::size_t>(t);
      refs[slot] = static_cast<std::uint16_t>(uniform_int(0, kEntries - 1));
      magnitudes[slot] = f32_to_f16(std::fabs(values[slot]) * 10.0F);
      for (int i = 0; i < d; ++i) {
        const auto at = static_cast<std::size_t>(refs[slot] * d + i);
        rows[static_cast<std::size_t>(t * d + i)] =
            f16_to_f32(head.entries[which][at]) * f16_to_f32(magnitudes[slot]);
      }
    }
    codes = pool.add(refs);
    scales = pool.add(magnitudes);
  } else if (format == KvFormat::kToken) {
    // V shares the ids of K.
    if (which == 0) {
      std::vector<std::uint16_t> narrow_ids(ids.begin(), ids.end());
      codes = c.wide_ids ? pool.add(ids) : pool.add(narrow_ids);
    }
    for (int t = 0; t < n; ++t) {
      for (int i = 0; i < d; ++i) {
        const auto at =
            static_cast<std::size_t>(ids[static_cast<std::size_t>(t)] * head.token_stride + i);
        rows[static_cast<std::size_t>(t * d + i)] = f16_to_f32(head.tokens[which][at]);
      }
    }
  } else {
    const auto bytes = kv_side_bytes(format, side, d, c.dtype);
    std::vector<std::byte> host_codes(bytes.codes);
    std::vector<std::byte> host_scales(bytes.scales);
    kv_encode(format, side, {values.data(), n, d}, head.mean[which], host_codes.data(),
              host_scales.data());
    codes = pool.add(testing::to_device_order(side, testing::code_bits(format), d, host_codes));
    scales = pool.add(host_scales);
    kv_decode(format, side, {host_codes.data(), host_scales.data()}, head.mean[which],
              {rows.data(), n, d});
  }
  return rows;
}

BlockData KvExpandCudaTest::make_block(const Case& c, KvFormat k, KvFormat v, const HeadData& head,
                                       int position, const RopeTable& table,
                                       testing::HostPool& pool) {
  BlockData data;
  DeviceKvBlock& block = data.block;
  // KIVI's K has whole blocks; raw blocks may be smaller.
  const bool raw = k == KvFormat::kRaw && v == KvFormat::kRaw;
  const int capacity = raw ? 8 * uniform_int(1, 4) : 32;
  const int n = testing::is_kivi(k) ? 32 : uniform_int(1, capacity);
  block.k_format = k;
  block.v_format = v;
  block.capacity = static_cast<std::uint8_t>(capacity);
  block.first = static_cast<std::uint8_t>(uniform_int(0, 1) * uniform_int(0, n - 1));
  block.end = static_cast<std::uint8_t>(uniform_int(block.first + 1, n));
  std::vector<std::int32_t> positions(32);
  if (uniform_int(0, 1) == 0) {
    block.first_position = position;
    for (int t = 0; t < 32; ++t) positions[static_cast<std::size_t>(t)] = position + t;
  } else {
    std::vector<std::uint32_t> wide;
    for (std::int32_t& at : positions) {
      position += uniform_int(1, 40);
      at = position;
      wide.push_back(static_cast<std::uint32_t>(at));
    }
    const std::vector<std::uint16_t> narrow(wide.begin(), wide.end());
    block.positions = c.wide_positions ? pool.add(wide) : pool.add(narrow);
  }
  std::vector<std::uint32_t> ids(32);
  for (std::uint32_t& id : ids) id = static_cast<std::uint32_t>(uniform_int(0, kVocabulary - 1));
  data.rows[0] = make_side(c, k, KvSide::kKey, head, ids, capacity, n, pool, block);
  data.rows[1] = make_side(c, v, KvSide::kValue, head, ids, capacity, n, pool, block);
  if (is_pre_rope(k)) {
    const auto cpu = *CpuContext::create({.n_threads = 1});
    rope(*cpu, table, positions, c.dim, {data.rows[0].data(), 32, c.dim},
         {data.rows[0].data(), 32, 0, c.dim});
  }
  return data;
}

void KvExpandCudaTest::check(const Case& c) {
  constexpr int kKvHeads = 2;
  constexpr int kLayers = 2;
  constexpr int kLayer = 1;
  const int d = c.dim;
  const RopeTable table = testing::make_rope(d, kMaxPositions, 1.1F);
  const testing::RopeOnDevice rope_on_device(gpu(), table);
  testing::HostPool pool;

  // Sequence 0 has every pair of formats in head 0 and a few in head 1; sequence 1 is padding;
  // sequence 2 has a few in head 1 only.
  std::vector<HeadData> head_data;
  std::vector<std::vector<BlockData>> blocks;
  const auto add_head = [&](int n_random, bool all) {
    head_data.push_back(make_head(d));
    blocks.emplace_back();
    const auto add = [&](int k, int v) {
      const bool tokens = k == static_cast<int>(KvFormat::kToken);
      if (tokens != (v == static_cast<int>(KvFormat::kToken))) return;
      blocks.back().push_back(make_block(c, static_cast<KvFormat>(k), static_cast<KvFormat>(v),
                                         head_data.back(), uniform_int(0, 2000), table, pool));
    };
    if (all) {
      for (int k = 0; k < 10; ++k) {
        for (int v = 0; v < 10; ++v) add(k, v);
      }
    }
    for (int i = 0; i < n_random; ++i) add(uniform_int(0, 9), uniform_int(0, 9));
  };
  add_head(0, true);
  add_head(7, false);
  add_head(0, false);  // sequence 2, head 0
  add_head(11, false);

  std::vector<std::uint32_t> chunk_places[4][2];
  std::vector<DeviceKvHead> heads(3 * kLayers * kKvHeads);
  std::vector<testing::DeviceVector<DeviceKvBlock>> blocks_on_device;
  std::vector<testing::DeviceVector<std::uint32_t>> chunks_on_device;
  std::vector<testing::DeviceVector<std::uint16_t>> tokens_on_device;
  std::vector<std::int64_t> first_page(3 * kKvHeads);
  std::int64_t n_pages = 1;  // an untouched page first
  int max_blocks = 0;
  for (int h = 0; h < 4; ++h) {
    const int sequence = h / 2 * 2;
    const auto index = static_cast<std::size_t>(h);
    DeviceKvHead& head =
        heads[static_cast<std::size_t>((sequence * kLayers + kLayer) * kKvHeads + h % 2)];
    const HeadData& data = head_data[index];
    std::vector<DeviceKvBlock> list;
    for (const BlockData& block : blocks[index]) list.push_back(block.block);
    blocks_on_device.push_back(upload(list));
    head.blocks = blocks_on_device.back().data();
    head.n_blocks = static_cast<std::int32_t>(list.size());
    head.k_mean = pool.add(data.mean[0]);
    head.v_mean = pool.add(data.mean[1]);
    head.wide_positions = c.wide_positions ? 1 : 0;
    head.wide_ids = c.wide_ids ? 1 : 0;
    head.token_stride = data.token_stride;
    for (int side = 0; side < 2; ++side) {
      std::vector<std::uint32_t> places;
      const auto chunk = static_cast<std::size_t>(kCodebookChunkEntries * d);
      for (std::size_t at = 0; at < data.entries[side].size(); at += chunk) {
        const std::size_t n = std::min(chunk, data.entries[side].size() - at);
        places.push_back(pool.add(std::span(data.entries[side]).subspan(at, n)));
      }
      chunks_on_device.push_back(upload(places));
      tokens_on_device.push_back(upload(data.tokens[side]));
    }
    head.k_entries = chunks_on_device[2 * index].data();
    head.v_entries = chunks_on_device[2 * index + 1].data();
    head.k_tokens = tokens_on_device[2 * index].data();
    head.v_tokens = tokens_on_device[2 * index + 1].data();
    first_page[static_cast<std::size_t>(sequence * kKvHeads + h % 2)] = n_pages;
    n_pages += head.n_blocks;
    max_blocks = std::max(max_blocks, head.n_blocks);
  }
  const auto heads_on_device = upload(heads);
  std::vector<DeviceSequence> sequences(3);
  for (std::size_t i = 0; i < 3; ++i) {
    sequences[i].n_queries = i == 1 ? 0 : 1;
    sequences[i].heads = heads_on_device.data() + i * kLayers * kKvHeads;
  }
  const auto sequences_on_device = upload(sequences);
  const auto first_page_on_device = upload(first_page);
  const auto pool_on_device = upload(pool.bytes());
  KvPageLayout layout;
  layout.head_dim = d;
  layout.dtype = c.dtype;
  const std::size_t page_elements = layout.page_bytes() / 2;
  const auto pages = device<std::uint16_t>(static_cast<std::size_t>(n_pages + 1) * page_elements);
  kv_expand(gpu(), sequences_on_device.data(), 3, kLayer, {2 * kKvHeads, kKvHeads, d},
            {pool_on_device.data(), layout}, rope_on_device.view(), max_blocks,
            {reinterpret_cast<std::byte*>(pages.data()), first_page_on_device.data()});

  // Every operation is rounded as on the CPU, so that the pages are equal to the bit.
  std::vector<std::uint16_t> expected(pages.size(), 0xabab);
  std::size_t page = page_elements;
  for (const std::vector<BlockData>& list : blocks) {
    for (const BlockData& data : list) {
      for (int t = 0; t < 32; ++t) {
        for (int i = 0; i < d; ++i) {
          const auto at = static_cast<std::size_t>(t * d + i);
          const bool visible = t >= data.block.first && t < data.block.end;
          expected[page + testing::k_at(t, i)] =
              visible ? testing::narrow(c.dtype, data.rows[0][at]) : std::uint16_t{0};
          expected[page + page_elements / 2 + testing::v_at(t, i)] =
              visible ? testing::narrow(c.dtype, data.rows[1][at]) : std::uint16_t{0};
        }
      }
      page += page_elements;
    }
  }
  const std::vector<std::uint16_t> actual = pages.to_host();
  page = page_elements;
  for (std::size_t h = 0; h < blocks.size(); ++h) {
    for (const BlockData& data : blocks[h]) {
      for (std::size_t i = 0; i < page_elements; ++i) {
        ASSERT_EQ(actual[page + i], expected[page + i])
            << "head " << h << " formats " << static_cast<int>(data.block.k_format) << " "
            << static_cast<int>(data.block.v_format) << " tokens " << int{data.block.first} << ".."
            << int{data.block.end} << " element " << i << ": "
            << testing::widen(c.dtype, actual[page + i]) << " instead of "
            << testing::widen(c.dtype, expected[page + i]);
      }
      page += page_elements;
    }
  }
  EXPECT_EQ(actual, expected) << "pages of no block";
}

TEST_F(KvExpandCudaTest, EveryPairOfFormats) {
  check({128, DType::kF16, false, false});
  check({128, DType::kBF16, true, true});
  check({64, DType::kF16, true, false});
  check({64, DType::kBF16, false, true});
}

TEST_F(KvExpandCudaTest, NoBlocks) {
  kv_expand(gpu(), nullptr, 0, 0, {2, 1, 128}, {nullptr, {.head_dim = 128}}, {}, 5, {});
  kv_expand(gpu(), nullptr, 3, 0, {2, 1, 128}, {nullptr, {.head_dim = 128}}, {}, 0, {});
  gpu().synchronize();
}

}  // namespace
}  // namespace spindle::kernels
