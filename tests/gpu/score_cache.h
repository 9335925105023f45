#pragma once
// A sequence of blocks and a tail on the host and on the device, for tests of scores.

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include "kernels/cuda/value_norms.h"
#include "kernels/kv_score.h"
#include "kernels/kv_select.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {

// A page or a raw block of the CPU, aligned as they must be.
struct AlignedBytes {
  explicit AlignedBytes(std::size_t n_bytes)
      : data(static_cast<std::byte*>(std::aligned_alloc(64, n_bytes))) {
    std::memset(data, 0, n_bytes);
  }
  ~AlignedBytes() { std::free(data); }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  std::byte* data;
};

struct HeadSpec {
  int n_blocks = 0;
  int tail_origin = 0;
  int tail_first = 0;
};

struct CacheSpec {
  AttentionShape shape;
  DType dtype = DType::kF16;
  int n_tokens = 0;
  int n_queries = 0;
  std::vector<HeadSpec> heads;  // [n_kv_heads]
  int nan_position = -1;        // whose key is NaN, in the first head's tail
};

// The same keys and values as CPU pages and blocks, and as device tables with expanded blocks.
class Cache {
 public:
  Cache(const CudaContext& gpu, const CacheSpec& spec, std::mt19937& random)
      : spec_(spec),
        layout_{spec.shape.head_dim, kKvPageTokens, spec.dtype},
        gpu_(gpu),
        random_(random) {
    const auto n_heads = static_cast<std::size_t>(spec.shape.n_kv_heads);
    cpu_pages_.resize(n_heads);
    cpu_blocks_.resize(n_heads);
    cpu_heads_.resize(n_heads);
    contexts_.resize(n_heads);
    std::vector<std::int64_t> n_pages;
    std::int64_t n_all_pages = 0;
    std::int64_t n_all_blocks = 0;
    for (const HeadSpec& head : spec.heads) {
      n_pages.push_back((spec.n_tokens - head.tail_origin + 31) / 32);
      n_all_pages += n_pages.back();
      first_block_.push_back(n_all_blocks);
      n_all_blocks += head.n_blocks;
    }
    // Pages lie in the pool in any order.
    std::vector<std::uint32_t> order(static_cast<std::size_t>(n_all_pages));
    std::iota(order.begin(), order.end(), 0U);
    std::shuffle(order.begin(), order.end(), random);
    std::vector<std::uint16_t> pool(order.size() * page_elements());
    std::vector<std::uint16_t> expanded(static_cast<std::size_t>(n_all_blocks) * page_elements());
    std::vector<DeviceKvBlock> blocks;
    std::size_t page_at = 0;
    for (std::size_t h = 0; h < n_heads; ++h) {
      const HeadSpec& head = spec.heads[h];
      std::int64_t n_block_slots = 0;
      for (int b = 0; b < head.n_blocks; ++b) {
        const int first = uniform(0, 3) == 0 ? uniform(0, 20) : 0;
        const int end = uniform(0, 2) == 0 ? uniform(first + 1, 32) : 32;
        const std::byte* bytes = add_pages(
            &expanded[static_cast<std::size_t>(first_block_[h] + b) * page_elements()], first, end);
        KvBlock block;
        block.first = static_cast<std::uint8_t>(first);
        block.end = static_cast<std::uint8_t>(end);
        block.first_position = 32 * b;
        block.k = {bytes, nullptr};
        block.v = {bytes + layout_.k_bytes(), nullptr};
        cpu_blocks_[h].push_back(block);
        DeviceKvBlock device;
        device.first = block.first;
        device.end = block.end;
        blocks.push_back(device);
        n_block_slots += end - first;
      }
      for (std::int64_t i = 0; i < n_pages[h]; ++i) {
        cpu_pages_[h].push_back(add_pages(
            &pool[order[page_at + static_cast<std::size_t>(i)] * page_elements()], 0, 32));
      }
      if (h == 0 && spec.nan_position >= 0) {
        const auto at = static_cast<std::size_t>(spec.nan_position - head.tail_origin);
        auto* cpu = reinterpret_cast<std::uint16_t*>(
            owned_[owned_.size() - cpu_pages_[h].size() + at / 32]->data);
        cpu[at % 32] = 0x7fff;
        pool[order[at / 32] * page_elements() + at % 32 * 32] = 0x7fff;
      }
      page_at += static_cast<std::size_t>(n_pages[h]);
      cpu_heads_[h] = {cpu_pages_[h].data(),  head.tail_origin, head.tail_first,
                       cpu_blocks_[h].data(), head.n_blocks,    &contexts_[h]};
      n_slots_.push_back(n_block_slots + spec.n_tokens - head.tail_first);
      tail_first_.push_back(head.tail_first);
    }
    pool_ = std::make_unique<testing::DeviceVector<std::uint16_t>>(gpu, pool);
    expanded_ = std::make_unique<testing::DeviceVector<std::uint16_t>>(gpu, expanded);
    blocks_ = std::make_unique<testing::DeviceVector<DeviceKvBlock>>(gpu, blocks);
    page_numbers_ = std::make_unique<testing::DeviceVector<std::uint32_t>>(gpu, order);
    first_page_ = std::make_unique<testing::DeviceVector<std::int64_t>>(gpu, first_block_);
    // Layer 1 of 2; the other one's heads must not be read.
    std::vector<DeviceKvHead> heads(2 * n_heads);
    page_at = 0;
    for (std::size_t h = 0; h < n_heads; ++h) {
      DeviceKvHead& head = heads[n_heads + h];
      head.pages = page_numbers_->data() + page_at;
      head.blocks = blocks_->data() + first_block_[h];
      head.n_blocks = spec.heads[h].n_blocks;
      head.tail_origin = spec.heads[h].tail_origin;
      head.tail_first = spec.heads[h].tail_first;
      page_at += static_cast<std::size_t>(n_pages[h]);
    }
    heads_ = std::make_unique<testing::DeviceVector<DeviceKvHead>>(gpu, heads);
    DeviceSequence sequence;
    sequence.n_context = spec.n_tokens;
    sequence.heads = heads_->data();
    sequence_ = std::make_unique<testing::DeviceVector<DeviceSequence>>(
        gpu, std::vector<DeviceSequence>{sequence});
    const std::size_t width = static_cast<std::size_t>(spec.shape.n_heads) *
                              static_cast<std::size_t>(spec.shape.head_dim);
    std::vector<float> q(static_cast<std::size_t>(spec.n_queries) * width);
    for (float& value : q) value = 1.5F * normal_(random_);
    q_values_ = testing::widened(testing::to_f16(q));
    q_ = std::make_unique<testing::DeviceVector<F16>>(gpu, testing::to_f16(q));
  }

  DeviceScoreLayer layer() const {
    DeviceScoreLayer layer;
    layer.sequence = sequence_->data();
    layer.layer = 1;
    layer.shape = spec_.shape;
    layer.pool = {reinterpret_cast<std::byte*>(pool_->data()), layout_};
    layer.expanded = {reinterpret_cast<std::byte*>(expanded_->data()), first_page_->data()};
    layer.n_tokens = spec_.n_tokens;
    layer.n_queries = spec_.n_queries;
    layer.q = q_->data();
    layer.n_slots = n_slots_;
    layer.tail_first = tail_first_;
    return layer;
  }

  int group() const { return spec_.shape.n_heads / spec_.shape.n_kv_heads; }
  std::int64_t n_slots(int head) const { return n_slots_[static_cast<std::size_t>(head)]; }
  const std::vector<std::int64_t>& n_slots() const { return n_slots_; }
  const KvPageLayout& layout() const { return layout_; }
  const KvHeadPages& head(int h) const { return cpu_heads_[static_cast<std::size_t>(h)]; }
  const std::vector<float>& q() const { return q_values_; }

  // [n_tokens - first][head_dim] of a head's tail.
  std::vector<float> tail(int h, std::int64_t first, KvSide side) const {
    const KvHeadPages& head = this->head(h);
    const int d = spec_.shape.head_dim;
    std::vector<float> rows;
    for (std::int64_t t = first; t < spec_.n_tokens; ++t) {
      const std::int64_t at = t - head.tail_origin;
      const auto* page = reinterpret_cast<const std::uint16_t*>(head.pages[at / 32]);
      for (int c = 0; c < d; ++c) {
        rows.push_back(
            widen(side == KvSide::kKey ? page[c * 32 + at % 32] : page[32 * d + at % 32 * d + c]));
      }
    }
    return rows;
  }

 private:
  std::size_t page_elements() const { return layout_.page_bytes() / 2; }
  int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  float widen(std::uint16_t bits) const {
    return spec_.dtype == DType::kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
  }

  // Random tokens [first, end) into a device page and a CPU page, which it answers.
  const std::byte* add_pages(std::uint16_t* device, int first, int end) {
    const int d = spec_.shape.head_dim;
    owned_.push_back(std::make_unique<AlignedBytes>(layout_.page_bytes()));
    auto* cpu = reinterpret_cast<std::uint16_t*>(owned_.back()->data);
    for (int t = first; t < end; ++t) {
      for (int c = 0; c < d; ++c) {
        const float k = normal_(random_);
        const float v = normal_(random_);
        const bool f16 = spec_.dtype == DType::kF16;
        const std::uint16_t k_bits = f16 ? f32_to_f16(k) : f32_to_bf16(k);
        const std::uint16_t v_bits = f16 ? f32_to_f16(v) : f32_to_bf16(v);
        cpu[c * 32 + t] = k_bits;
        cpu[d * 32 + t * d + c] = v_bits;
        device[(c / 32 * 32 + t) * 32 + c % 32] = k_bits;
        device[d * 32 + c * 32 + t] = v_bits;
      }
    }
    return owned_.back()->data;
  }

  CacheSpec spec_;
  KvPageLayout layout_;
  const CudaContext& gpu_;
  std::mt19937& random_;
  std::normal_distribution<float> normal_;
  std::vector<std::unique_ptr<AlignedBytes>> owned_;
  std::vector<std::vector<const std::byte*>> cpu_pages_;
  std::vector<std::vector<KvBlock>> cpu_blocks_;
  std::vector<KvHeadPages> cpu_heads_;
  std::vector<KvHeadContext> contexts_;
  std::vector<std::int64_t> n_slots_;
  std::vector<std::int64_t> tail_first_;
  std::vector<std::int64_t> first_block_;
  std::vector<float> q_values_;
  std::unique_ptr<testing::DeviceVector<std::uint16_t>> pool_;
  std::unique_ptr<testing::DeviceVector<std::uint16_t>> expanded_;
  std::unique_ptr<testing::DeviceVector<DeviceKvBlock>> blocks_;
  std::unique_ptr<testing::DeviceVector<std::uint32_t>> page_numbers_;
  std::unique_ptr<testing::DeviceVector<std::int64_t>> first_page_;
  std::unique_ptr<testing::DeviceVector<DeviceKvHead>> heads_;
  std::unique_ptr<testing::DeviceVector<DeviceSequence>> sequence_;
  std::unique_ptr<testing::DeviceVector<F16>> q_;
};

// Rows of n values with a poisoned gap behind each, as the kernels get them.
class DeviceRows {
 public:
  DeviceRows(const CudaContext& gpu, std::int64_t n_rows, std::int64_t stride)
      : n_rows_(n_rows), stride_(stride), values_(gpu, static_cast<std::size_t>(n_rows * stride)) {}
  DeviceRows(const CudaContext& gpu, const std::vector<float>& values, std::int64_t stride)
      : n_rows_(static_cast<std::int64_t>(values.size()) / stride),
        stride_(stride),
        values_(gpu, values) {}

  Rows view() const { return {values_.data(), n_rows_, stride_, stride_}; }
  std::vector<float> to_host() const { return values_.to_host(); }

 private:
  std::int64_t n_rows_;
  std::int64_t stride_;
  testing::DeviceVector<float> values_;
};

inline bool is_poison(float value) { return std::bit_cast<std::uint32_t>(value) == 0xababababU; }

}  // namespace spindle::kernels
