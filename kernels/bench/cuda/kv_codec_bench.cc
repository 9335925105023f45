// What happens to KV beside attention, at the shape of Llama-3-8B (32 query heads, 8 kv heads,
// d = 128): appending a step's tokens, moving 32k tokens out of the tail and encoding them,
// expanding blocks for prefill, codebook tiles, and copies.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/bench/cuda/bench.h"
#include "kernels/codebook.h"
#include "kernels/kv_compact.h"
#include "kernels/kv_quant.h"
#include "kernels/rope.h"

namespace spindle::bench {
namespace {

using namespace kernels;  // NOLINT: a benchmark of that namespace

constexpr int kDim = 128;
constexpr int kHeads = 32;
constexpr int kKvHeads = 8;
constexpr int kLayers = 32;
constexpr int kBatch = 32;
constexpr int kTokens = 32768;
constexpr int kBlocksPerHead = kTokens / 32;
constexpr int kMaxPositions = 40960;
// A decode step at batch 32 and 4,096 tokens of context reads the weights and the cache once.
constexpr double kStepBytes = 15.0e9 + 32.0 * 4096 * 131072;

template <typename T>
DeviceBuffer upload(const Bench& bench, const std::vector<T>& values) {
  DeviceBuffer buffer = bench.allocate(values.size() * sizeof(T));
  bench.context().to_device(buffer.data(), values.data(), values.size() * sizeof(T));
  return buffer;
}

class KvCodecBench {
 public:
  KvCodecBench() {
    layout_.head_dim = kDim;
    layout_.dtype = DType::kF16;
    std::vector<float> frequencies;
    for (int i = 0; i < kDim; i += 2) {
      frequencies.push_back(std::pow(500000.0F, -static_cast<float>(i) / kDim));
    }
    const auto table = RopeTable::create(frequencies, kMaxPositions);
    const std::size_t n = std::size_t{kMaxPositions} * kDim / 2;
    cos_ = upload(bench_, std::vector<float>(table->cos(0), table->cos(0) + n));
    sin_ = upload(bench_, std::vector<float>(table->sin(0), table->sin(0) + n));
    rope_ = {cos_.as<float>(), sin_.as<float>(), kMaxPositions, kDim, 1.0F};
    // One pool for all: the tails of 8 heads with 32k tokens, or of 32 sequences.
    pool_ = bench_.random(std::size_t{kKvHeads} * kBlocksPerHead * layout_.page_bytes(),
                          Bench::Fill::kNormalF16);
  }

  void run() {
    const double append_us = append();
    const double boundary_us = boundary();
    const double step_us = kStepBytes / bench_.copy_bytes_per_second() * 1e6;
    // All sequences pass a boundary every 64 steps.
    const double share = kLayers * (append_us + boundary_us / 64) / step_us;
    std::fprintf(stderr,
                 "append and encode: %.2f %% of a decode step at batch 32, context 4096 that reads "
                 "weights and cache at the speed of a copy (%.0f us); bar 5 %%\n",
                 100 * share, step_us);
    std::printf(
        "{\"name\": \"append_and_encode_share_of_step\", \"step_us\": %.1f, \"share\": %.5f, "
        "\"bar\": 0.05}\n",
        step_us, share);
    append_chunk();
    gather_and_mean();
    for (const auto& [name, format] :
         {std::pair{"int4", KvFormat::kInt4}, std::pair{"kivi4", KvFormat::kKivi4},
          std::pair{"lloyd4", KvFormat::kLloyd4}, std::pair{"lloyd3", KvFormat::kLloyd3},
          std::pair{"raw", KvFormat::kRaw}}) {
      encode_and_expand(name, format);
    }
    codebook(1, 0, 0);
    codebook(1, 0);
    codebook(1, 2048);
    codebook(16, 0);
    codebook(16, 2048);
    copies(8192, 16384);
    copies(64, 8192);
  }

 private:
  // Tables of `n_sequences` sequences whose heads share the pool's pages evenly.
  void make_tables(int n_sequences) {
    const int n_pages = kKvHeads * kBlocksPerHead;
    std::vector<std::uint32_t> pages(static_cast<std::size_t>(n_pages));
    for (std::size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<std::uint32_t>(i);
    std::shuffle(pages.begin(), pages.end(), random_);
    pages_ = upload(bench_, pages);
    const int n_heads = n_sequences * kKvHeads;
    std::vector<DeviceKvHead> heads(static_cast<std::size_t>(n_heads));
    for (int h = 0; h < n_heads; ++h) {
      heads[static_cast<std::size_t>(h)].pages =
          pages_.as<std::uint32_t>() + std::int64_t{h} * (n_pages / n_heads);
    }
    heads_ = upload(bench_, heads);
    std::vector<DeviceSequence> sequences(static_cast<std::size_t>(n_sequences));
    for (int s = 0; s < n_sequences; ++s) {
      DeviceSequence& sequence = sequences[static_cast<std::size_t>(s)];
      sequence.n_queries = 1;
      sequence.heads = heads_.as<DeviceKvHead>() + std::int64_t{s} * kKvHeads;
    }
    sequences_ = upload(bench_, sequences);
  }

  double append() {
    make_tables(kBatch);
    constexpr int kInputs = 64;  // 50 MB of activations, and other slots of the pages each time
    constexpr int kWidth = (kHeads + 2 * kKvHeads) * kDim;
    const DeviceBuffer qkv =
        bench_.random(std::size_t{kInputs} * kBatch * kWidth * 4, Bench::Fill::kNormalF32);
    const DeviceBuffer q = bench_.allocate(std::size_t{kBatch} * kHeads * kDim * 2);
    std::vector<std::int32_t> row_sequence;
    std::vector<std::int32_t> positions;
    for (int s = 0; s < kBatch; ++s) row_sequence.push_back(s);
    for (int i = 0; i < kInputs * kBatch; ++i) {
      positions.push_back(std::uniform_int_distribution<int>(0, 1023)(random_));
    }
    const DeviceBuffer rows = upload(bench_, row_sequence);
    const DeviceBuffer at = upload(bench_, positions);
    const auto append_once = [&](int run) {
      const int input = run % kInputs;
      const ConstRows in(qkv.as<float>() + std::int64_t{input} * kBatch * kWidth, kBatch, kWidth);
      rope_append(bench_.context(), rope_, in, rows.as<std::int32_t>(),
                  at.as<std::int32_t>() + std::int64_t{input} * kBatch,
                  sequences_.as<DeviceSequence>(), 0, {kHeads, kKvHeads, kDim},
                  {pool_.data(), layout_}, F16Rows(q.as<F16>(), kBatch, kHeads * kDim));
    };
    const double bytes = kBatch * (6.0 * kWidth + 4.0 * kDim);
    const double us = bench_.median_us(append_once);
    report("rope_append", {{"rows", kBatch}}, us, bytes);
    // As behind another kernel of a step, without what an empty stream and two events cost.
    const double chained_us = bench_.median_us([&](int run) {
      for (int i = 0; i < kLayers; ++i) append_once(run * kLayers + i);
    }) / kLayers;
    report("rope_append_in_a_row", {{"rows", kBatch}}, chained_us, bytes);
    return us;
  }

  // A prefill chunk of one sequence.
  void append_chunk() {
    make_tables(1);
    constexpr int kRows = 8192;
    constexpr int kWidth = (kHeads + 2 * kKvHeads) * kDim;
    const DeviceBuffer qkv =
        bench_.random(std::size_t{kRows} * kWidth * 4, Bench::Fill::kNormalF32);
    const DeviceBuffer q = bench_.allocate(std::size_t{kRows} * kHeads * kDim * 2);
    std::vector<std::int32_t> positions(kRows);
    for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int>(i);
    const DeviceBuffer rows = upload(bench_, std::vector<std::int32_t>(kRows, 0));
    const DeviceBuffer at = upload(bench_, positions);
    const double us = bench_.median_us([&](int) {
      rope_append(bench_.context(), rope_, ConstRows(qkv.as<float>(), kRows, kWidth),
                  rows.as<std::int32_t>(), at.as<std::int32_t>(), sequences_.as<DeviceSequence>(),
                  0, {kHeads, kKvHeads, kDim}, {pool_.data(), layout_},
                  F16Rows(q.as<F16>(), kRows, kHeads * kDim));
    });
    report("rope_append", {{"rows", kRows}}, us, kRows * (6.0 * kWidth + 4.0 * kDim));
  }

  // What one layer does when 32 sequences move 64 tokens each out of their tails, as int4.
  double boundary() {
    constexpr int kMoved = 64;
    constexpr int kPairs = kBatch * kKvHeads;
    const std::size_t n_elements = std::size_t{kPairs} * kMoved * kDim;
    const DeviceBuffer k = bench_.allocate(n_elements * 2);
    const DeviceBuffer v = bench_.allocate(n_elements * 2);
    const DeviceBuffer codes = bench_.allocate(n_elements);  // half a byte each, two sides
    const DeviceBuffer scales = bench_.allocate(std::size_t{kPairs} * 2 * 2 * 128);
    std::vector<std::int32_t> positions;
    for (int i = 0; i < kMoved; ++i) positions.push_back(i);
    const DeviceBuffer at = upload(bench_, positions);
    std::vector<DeviceGather> gathers;
    std::vector<DeviceEncode> blocks;
    for (int h = 0; h < kPairs; ++h) {
      DeviceGather gather;
      gather.pages =
          pages_.as<std::uint32_t>() + std::int64_t{h} * (kKvHeads * kBlocksPerHead / kPairs);
      gather.n_tokens = kMoved;
      gather.positions = at.as<std::int32_t>();
      gather.k = k.as<F16>() + std::int64_t{h} * kMoved * kDim;
      gather.v = v.as<F16>() + std::int64_t{h} * kMoved * kDim;
      gathers.push_back(gather);
      for (int b = 0; b < 4; ++b) {
        DeviceEncode block;
        block.side = b % 2 == 0 ? KvSide::kKey : KvSide::kValue;
        block.rows = (b % 2 == 0 ? gather.k : gather.v) + std::int64_t{b / 2} * 32 * kDim;
        block.codes = codes.data() + std::int64_t{h * 4 + b} * 16 * kDim;
        block.scales = scales.data() + std::int64_t{h * 4 + b} * 128;
        block.format = KvFormat::kInt4;
        block.n = 32;
        blocks.push_back(block);
      }
    }
    const DeviceBuffer gather_list = upload(bench_, gathers);
    const DeviceBuffer block_list = upload(bench_, blocks);
    const double us = bench_.median_us([&](int) {
      kv_gather(bench_.context(), pool_.data(), DType::kF16, kDim, rope_,
                gather_list.as<DeviceGather>(), kPairs, kMoved);
      kv_encode(bench_.context(), kDim, DType::kF16, block_list.as<DeviceEncode>(),
                static_cast<int>(blocks.size()));
    });
    report("boundary_64_tokens_int4", {{"sequences", kBatch}}, us,
           static_cast<double>(n_elements) * 2 * (2 + 2 + 2 + 0.5));
    return us;
  }

  void gather_and_mean() {
    make_tables(1);
    const std::size_t n_elements = std::size_t{kKvHeads} * kTokens * kDim;
    k_ = bench_.allocate(n_elements * 2);
    const DeviceBuffer k_pre = bench_.allocate(n_elements * 2);
    v_ = bench_.allocate(n_elements * 2);
    means_ = bench_.allocate(std::size_t{2} * kKvHeads * kDim * 2);
    std::vector<std::int32_t> positions;
    for (int i = 0; i < kTokens; ++i) positions.push_back(i);
    const DeviceBuffer at = upload(bench_, positions);
    std::vector<DeviceGather> gathers;
    std::vector<DeviceMean> means;
    for (std::int64_t h = 0; h < kKvHeads; ++h) {
      DeviceGather gather;
      gather.pages = pages_.as<std::uint32_t>() + h * kBlocksPerHead;
      gather.n_tokens = kTokens;
      gather.positions = at.as<std::int32_t>();
      gather.k_pre = k_pre.as<F16>() + h * kTokens * kDim;
      gather.v = v_.as<F16>() + h * kTokens * kDim;
      gathers.push_back(gather);
      means.push_back({gather.k_pre, kTokens, means_.as<std::uint16_t>() + 2 * h * kDim});
      means.push_back({gather.v, kTokens, means_.as<std::uint16_t>() + (2 * h + 1) * kDim});
    }
    std::vector<DeviceGather> both = gathers;
    for (std::size_t h = 0; h < both.size(); ++h) {
      both[h].k = k_.as<F16>() + static_cast<std::int64_t>(h) * kTokens * kDim;
    }
    const auto time = [&](const char* name, const std::vector<DeviceGather>& list, double sides) {
      const DeviceBuffer on_device = upload(bench_, list);
      const double us = bench_.median_us([&](int) {
        kv_gather(bench_.context(), pool_.data(), DType::kF16, kDim, rope_,
                  on_device.as<DeviceGather>(), kKvHeads, kTokens);
      });
      report(name, {{"tokens", kTokens}, {"kv_heads", kKvHeads}}, us,
             sides * 2 * static_cast<double>(n_elements));
    };
    time("kv_gather_k_pre_and_v", gathers, 4);
    time("kv_gather_k_k_pre_and_v", both, 5);
    const DeviceBuffer mean_list = upload(bench_, means);
    const double us = bench_.median_us(
        [&](int) { kv_mean(bench_.context(), kDim, mean_list.as<DeviceMean>(), 2 * kKvHeads); });
    report("kv_mean", {{"tokens", kTokens}, {"kv_heads", kKvHeads}}, us,
           4 * static_cast<double>(n_elements));
  }

  // Both sides of 32k tokens of 8 heads; rows and codes are far beyond the cache.
  void encode_and_expand(const std::string& name, KvFormat format) {
    const auto bytes = kv_side_bytes(format, KvSide::kKey, kDim, DType::kF16);
    constexpr std::int64_t kBlocks = std::int64_t{kKvHeads} * kBlocksPerHead;
    const auto side_bytes = static_cast<std::int64_t>(bytes.total());
    const DeviceBuffer pieces = bench_.allocate(static_cast<std::size_t>(2 * kBlocks * side_bytes));
    std::vector<DeviceEncode> list;
    std::vector<DeviceKvBlock> blocks;
    const auto place = [](std::int64_t byte) {
      return static_cast<std::uint32_t>(byte / kKvPlaceBytes);
    };
    for (std::int64_t b = 0; b < kBlocks; ++b) {
      DeviceKvBlock block;
      block.first_position = static_cast<std::int32_t>(b % kBlocksPerHead * 32);
      block.k_format = format;
      block.v_format = format;
      block.end = 32;
      for (int side = 0; side < 2; ++side) {
        const std::int64_t codes = (2 * b + side) * side_bytes;
        const std::int64_t scales = codes + static_cast<std::int64_t>(bytes.codes);
        DeviceEncode encode;
        encode.rows = (side == 0 ? k_ : v_).as<F16>() + b * 32 * kDim;
        encode.mean = means_.as<std::uint16_t>() + (2 * (b / kBlocksPerHead) + side) * kDim;
        encode.codes = pieces.data() + codes;
        encode.scales = pieces.data() + scales;
        encode.format = format;
        encode.side = side == 0 ? KvSide::kKey : KvSide::kValue;
        encode.n = 32;
        list.push_back(encode);
        (side == 0 ? block.k_codes : block.v_codes) = place(codes);
        (side == 0 ? block.k_scales : block.v_scales) = place(scales);
      }
      blocks.push_back(block);
    }
    const DeviceBuffer encode_list = upload(bench_, list);
    const double rows_bytes = 4.0 * kKvHeads * kTokens * kDim;
    const double moved = rows_bytes + static_cast<double>(2 * kBlocks * side_bytes);
    const double encode_us = bench_.median_us([&](int) {
      kv_encode(bench_.context(), kDim, DType::kF16, encode_list.as<DeviceEncode>(),
                static_cast<int>(list.size()));
    });
    report("kv_encode_" + name, {{"tokens", kTokens}, {"kv_heads", kKvHeads}}, encode_us, moved);

    const DeviceBuffer block_list = upload(bench_, blocks);
    std::vector<DeviceKvHead> heads(kKvHeads);
    std::vector<std::int64_t> first_page;
    for (std::int64_t h = 0; h < kKvHeads; ++h) {
      DeviceKvHead& head = heads[static_cast<std::size_t>(h)];
      head.blocks = block_list.as<DeviceKvBlock>() + h * kBlocksPerHead;
      head.n_blocks = kBlocksPerHead;
      // Any bytes serve as a mean: the time does not depend on them.
      head.k_mean = place(0);
      head.v_mean = place(kDim * 2);
      first_page.push_back(h * kBlocksPerHead);
    }
    const DeviceBuffer head_list = upload(bench_, heads);
    DeviceSequence sequence;
    sequence.n_queries = 1;
    sequence.heads = head_list.as<DeviceKvHead>();
    const DeviceBuffer sequences = upload(bench_, std::vector<DeviceSequence>{sequence});
    const DeviceBuffer first = upload(bench_, first_page);
    const DeviceBuffer pages =
        bench_.allocate(static_cast<std::size_t>(kBlocks) * layout_.page_bytes());
    const double expand_us = bench_.median_us([&](int) {
      kv_expand(bench_.context(), sequences.as<DeviceSequence>(), 1, 0, {kHeads, kKvHeads, kDim},
                {pieces.data(), layout_}, rope_, kBlocksPerHead,
                {pages.data(), first.as<std::int64_t>()});
    });
    report("kv_expand_" + name, {{"tokens", kTokens}, {"kv_heads", kKvHeads}}, expand_us, moved);
  }

  // Tiles of 1,024 rows in 300 clusters, of which about half the rows become entries, or in none:
  // then the cover is one step, and the time is that of the products.
  void codebook(int n_tiles, int n_entries, int n_clusters = 300) {
    constexpr int kRows = static_cast<int>(kCodebookTileTokens);
    constexpr int kRuns = 35;
    std::normal_distribution<float> normal;
    std::vector<float> centres(static_cast<std::size_t>(std::max(n_clusters, 1)) * kDim);
    for (float& value : centres) value = normal(random_);
    std::vector<F16> rows;
    for (int r = 0; r < n_tiles * kRows; ++r) {
      const int cluster =
          std::uniform_int_distribution<int>(0, std::max(n_clusters, 1) - 1)(random_);
      const float noise = std::uniform_real_distribution<float>(0.05F, 0.35F)(random_);
      for (int i = 0; i < kDim; ++i) {
        const float centre =
            n_clusters == 0 ? 0.0F : centres[static_cast<std::size_t>(cluster * kDim + i)];
        rows.push_back({f32_to_f16(centre + noise * normal(random_))});
      }
    }
    const DeviceBuffer rows_on_device = upload(bench_, rows);
    const int max_entries = n_entries + kRows;
    // Earlier entries point elsewhere: scaled to about unit length, none is near.
    std::vector<F16> earlier(static_cast<std::size_t>(n_tiles) *
                             static_cast<std::size_t>(max_entries) * kDim);
    for (F16& value : earlier) value = {f32_to_f16(0.088F * normal(random_))};
    const DeviceBuffer entries = upload(bench_, earlier);
    // Each run has counters of its own, since a match adds to them.
    const DeviceBuffer counts = upload(
        bench_, std::vector<std::int32_t>(static_cast<std::size_t>(kRuns * n_tiles), n_entries));
    const DeviceBuffer refs = bench_.allocate(static_cast<std::size_t>(n_tiles) * kRows * 2);
    const DeviceBuffer magnitudes = bench_.allocate(static_cast<std::size_t>(n_tiles) * kRows * 2);
    const DeviceBuffer workspace =
        bench_.allocate(static_cast<std::size_t>(n_tiles) * codebook_workspace_bytes(kDim));
    std::vector<DeviceCodebookTile> tiles;
    for (std::int64_t i = 0; i < std::int64_t{kRuns} * n_tiles; ++i) {
      const std::int64_t t = i % n_tiles;
      DeviceCodebookTile tile;
      tile.rows = rows_on_device.as<F16>() + t * kRows * kDim;
      tile.n_rows = kRows;
      tile.theta = 0.95F;
      tile.entries = entries.as<F16>() + t * max_entries * kDim;
      tile.max_entries = max_entries;
      tile.n_entries = counts.as<std::int32_t>() + i;
      tile.refs = refs.as<std::uint16_t>() + t * kRows;
      tile.magnitudes = magnitudes.as<std::uint16_t>() + t * kRows;
      tiles.push_back(tile);
    }
    const DeviceBuffer tiles_on_device = upload(bench_, tiles);
    const double us = bench_.median_us(
        [&](int run) {
          codebook_match(bench_.context(), kDim,
                         tiles_on_device.as<DeviceCodebookTile>() + std::int64_t{run} * n_tiles,
                         n_tiles, workspace.data());
        },
        kRuns - 5, 5);
    std::vector<std::int32_t> after(1);
    bench_.context().to_host(after.data(), counts.data(), sizeof(std::int32_t));
    bench_.context().synchronize();
    Result result;
    result.name = "codebook_match";
    result.parameters = {{"tiles", static_cast<double>(n_tiles)},
                         {"clusters", static_cast<double>(n_clusters)},
                         {"rows", kRows},
                         {"earlier_entries", static_cast<double>(n_entries)}};
    result.median_us = us;
    result.flops = n_tiles * 2.0 * kDim * kRows * (kRows / 2.0 + n_entries);
    result.bytes = n_tiles * 2.0 * kDim * (kRows + n_entries);
    result.note = std::to_string(after[0] - n_entries) + " new entries in the first tile; bar 1 ms";
    bench_.report(result);
  }

  void copies(int n, std::size_t n_bytes) {
    const DeviceBuffer target = bench_.allocate(static_cast<std::size_t>(n) * n_bytes);
    std::vector<DeviceCopy> list;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t from = (i * 7919) % n;
      list.push_back({pool_.data() + from * static_cast<std::int64_t>(n_bytes),
                      target.data() + i * static_cast<std::int64_t>(n_bytes), n_bytes});
    }
    const DeviceBuffer on_device = upload(bench_, list);
    const double us =
        bench_.median_us([&](int) { kv_copy(bench_.context(), on_device.as<DeviceCopy>(), n); });
    report("kv_copy", {{"copies", static_cast<double>(n)}, {"bytes", static_cast<double>(n_bytes)}},
           us, 2.0 * n * static_cast<double>(n_bytes));
  }

  void report(const std::string& name, std::vector<Parameter> parameters, double us, double bytes) {
    Result result;
    result.name = name;
    result.parameters = std::move(parameters);
    result.median_us = us;
    result.bytes = bytes;
    result.yardstick = "copy";
    bench_.report(result);
  }

  Bench bench_;
  std::mt19937 random_{1};
  KvPageLayout layout_;
  DeviceBuffer cos_;
  DeviceBuffer sin_;
  DeviceRope rope_;
  DeviceBuffer pool_;
  DeviceBuffer pages_;
  DeviceBuffer heads_;
  DeviceBuffer sequences_;
  DeviceBuffer k_;
  DeviceBuffer v_;
  DeviceBuffer means_;
};

}  // namespace
}  // namespace spindle::bench

int main() {
  try {
    spindle::bench::KvCodecBench().run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
