#pragma once
// CPU caches (KvHeadPages: pages and blocks of any format) in the layout and tables of kv_device.h,
// so that CUDA bodies can be compared with the CPU bodies over the same tokens. Hidden slots and
// unused bytes of the pool are 0xff, which are NaN.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cuda/kv_device.h"
#include "kernels/rope.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::testing {

// A code in the planes of kv_block.h.
inline int plane_code(const std::byte* plane, int bits, int group, int j) {
  const int bytes_per_group = 4 * bits;
  const int groups = 32 / (8 / bits);  // bytes j is spread over
  const std::byte byte = plane[group * bytes_per_group + (bits == 1 ? j / 8 : j % groups)];
  const int shift = bits == 1 ? j % 8 : bits * (j / groups);
  return (std::to_integer<int>(byte) >> shift) & ((1 << bits) - 1);
}

// One plane in the order of kv_code_element().
inline void repack_plane(const std::byte* plane, kernels::KvSide side, int bits, int head_dim,
                         std::byte* out) {
  for (int word = 0; word < bits * head_dim; ++word) {
    std::uint32_t value = 0;
    for (int index = 0; index < 32 / bits; ++index) {
      const kernels::KvElement at = kernels::kv_code_element(side, bits, head_dim, word, index);
      const bool is_key = side == kernels::KvSide::kKey;
      const int group = is_key ? at.channel : at.token * (head_dim / 32) + at.channel / 32;
      const int j = is_key ? at.token : at.channel % 32;
      value |= static_cast<std::uint32_t>(plane_code(plane, bits, group, j)) << (index * bits);
    }
    std::memcpy(out + 4 * word, &value, 4);
  }
}

inline int code_bits(kernels::KvFormat format) {
  if (kernels::is_lloyd(format)) return kernels::lloyd_bits(format);
  return format == kernels::KvFormat::kKivi2 ? 2 : 4;
}

// 16-bit elements of `capacity` tokens: K [head_dim][capacity] and V [capacity][head_dim] to the
// orders of kv_device.h.
inline void repack_elements(const std::byte* from, kernels::KvSide side, int head_dim, int capacity,
                            std::byte* out) {
  for (int token = 0; token < capacity; ++token) {
    for (int channel = 0; channel < head_dim; ++channel) {
      const bool is_key = side == kernels::KvSide::kKey;
      const int source = is_key ? channel * capacity + token : token * head_dim + channel;
      const int target = is_key ? (channel / 32 * capacity + token) * 32 + channel % 32
                                : channel * capacity + token;
      std::memcpy(out + 2 * target, from + 2 * source, 2);
    }
  }
}

inline void repack_codes(const std::byte* from, kernels::KvFormat format, kernels::KvSide side,
                         int head_dim, std::byte* out) {
  const int bits = code_bits(format);
  if (bits != 3) return repack_plane(from, side, bits, head_dim, out);
  repack_plane(from, side, 2, head_dim, out);
  repack_plane(from + 8 * head_dim, side, 1, head_dim, out + 8 * head_dim);
}

class DeviceCache {
 public:
  explicit DeviceCache(const kernels::KvPageLayout& layout) : layout_(layout) {
    tables_.resize(64);  // offset 0 stands for a null pointer
  }

  // `heads` are [n_layers][n_kv_heads].
  void add_sequence(std::int64_t query_begin, std::int64_t n_queries, std::int64_t n_context,
                    const std::vector<kernels::KvHeadPages>& heads) {
    kernels::DeviceSequence sequence;
    sequence.query_begin = static_cast<std::int32_t>(query_begin);
    sequence.n_queries = static_cast<std::int32_t>(n_queries);
    sequence.n_context = static_cast<std::int32_t>(n_context);
    std::vector<kernels::DeviceKvHead> device_heads;
    for (const kernels::KvHeadPages& head : heads)
      device_heads.push_back(add_head(head, n_context));
    sequence.heads = table(device_heads);
    for (std::size_t i = 0; i < device_heads.size(); ++i) {
      const std::size_t at = offset_of(sequence.heads) + i * sizeof(kernels::DeviceKvHead);
      pointers_.push_back(at + offsetof(kernels::DeviceKvHead, pages));
      pointers_.push_back(at + offsetof(kernels::DeviceKvHead, blocks));
      pointers_.push_back(at + offsetof(kernels::DeviceKvHead, k_entries));
      pointers_.push_back(at + offsetof(kernels::DeviceKvHead, v_entries));
      pointers_.push_back(at + offsetof(kernels::DeviceKvHead, k_tokens));
      pointers_.push_back(at + offsetof(kernels::DeviceKvHead, v_tokens));
    }
    sequences_.push_back(sequence);
  }

  // Copies everything to the device; sequences() and pool() are valid from then on.
  void upload(const CudaContext& context) {
    const kernels::DeviceSequence* all = table(sequences_);
    const std::size_t at = offset_of(all);
    for (std::size_t i = 0; i < sequences_.size(); ++i) {
      pointers_.push_back(at + i * sizeof(kernels::DeviceSequence) +
                          offsetof(kernels::DeviceSequence, heads));
    }
    if (pool_.empty()) pool_.resize(64);
    device_pool_.emplace(context, pool_);
    device_tables_.emplace(context, tables_.size());
    for (const std::size_t pointer : pointers_) {
      std::uint64_t value = 0;
      std::memcpy(&value, tables_.data() + pointer, 8);
      if (value != 0) value += reinterpret_cast<std::uint64_t>(device_tables_->data());
      std::memcpy(tables_.data() + pointer, &value, 8);
    }
    context.to_device(device_tables_->data(), tables_.data(), tables_.size());
    context.synchronize();
    device_sequences_ =
        reinterpret_cast<const kernels::DeviceSequence*>(device_tables_->data() + at);
  }

  const kernels::DeviceSequence* sequences() const { return device_sequences_; }
  int n_sequences() const { return static_cast<int>(sequences_.size()); }
  kernels::DeviceKvPool pool() const { return {device_pool_->data(), layout_}; }
  std::vector<std::byte> pool_bytes() const { return device_pool_->to_host(); }
  const std::vector<std::byte>& host_pool() const { return pool_; }
  void check_guards() const {
    device_pool_->check_guard();
    device_tables_->check_guard();
  }

 private:
  // A table in the arena; the pointer is its offset until upload().
  template <typename T>
  const T* table(const std::vector<T>& values) {
    if (values.empty()) return nullptr;
    const std::size_t offset = (tables_.size() + 15) / 16 * 16;
    tables_.resize(offset + values.size() * sizeof(T));
    std::memcpy(tables_.data() + offset, values.data(), values.size() * sizeof(T));
    return reinterpret_cast<const T*>(offset);
  }
  static std::size_t offset_of(const void* pointer) {
    return reinterpret_cast<std::size_t>(pointer);
  }

  // Bytes of the pool at a multiple of `alignment`.
  std::size_t reserve(std::size_t n_bytes, std::size_t alignment = kernels::kKvPlaceBytes) {
    const std::size_t begin = (pool_.size() + alignment - 1) / alignment * alignment;
    pool_.resize(begin + n_bytes, std::byte{0xff});
    return begin;
  }
  static std::uint32_t place(std::size_t offset) {
    return static_cast<std::uint32_t>(offset / kernels::kKvPlaceBytes);
  }
  std::uint32_t add_bytes(const std::byte* from, std::size_t n_bytes) {
    if (from == nullptr || n_bytes == 0) return kernels::kNoPlace;
    const std::size_t at = reserve(n_bytes);
    std::memcpy(pool_.data() + at, from, n_bytes);
    return place(at);
  }

  kernels::DeviceKvHead add_head(const kernels::KvHeadPages& head, std::int64_t n_context) {
    kernels::DeviceKvHead out;
    out.tail_origin = static_cast<std::int32_t>(head.tail_origin);
    out.tail_first = static_cast<std::int32_t>(head.tail_first);
    out.n_blocks = static_cast<std::int32_t>(head.n_blocks);
    const std::int64_t n_pages = (n_context - head.tail_origin + 31) / 32;
    std::vector<std::uint32_t> pages;
    for (std::int64_t i = 0; i < n_pages; ++i) pages.push_back(add_page(head.pages[i]));
    out.pages = table(pages);
    std::vector<kernels::DeviceKvBlock> blocks;
    for (std::int64_t i = 0; i < head.n_blocks; ++i) {
      blocks.push_back(add_block(head.blocks[i], *head.context));
    }
    out.blocks = table(blocks);
    if (head.n_blocks > 0) add_context(head, out);
    return out;
  }

  std::uint32_t add_page(const std::byte* page) {
    reserve(64);  // so that pages are not always neighbours
    const std::size_t at = reserve(layout_.page_bytes(), layout_.page_bytes());
    repack_elements(page, kernels::KvSide::kKey, layout_.head_dim, 32, pool_.data() + at);
    repack_elements(page + layout_.k_bytes(), kernels::KvSide::kValue, layout_.head_dim, 32,
                    pool_.data() + at + layout_.k_bytes());
    return static_cast<std::uint32_t>(at / layout_.page_bytes());
  }

  kernels::DeviceKvBlock add_block(const kernels::KvBlock& block,
                                   const kernels::KvHeadContext& context) {
    kernels::DeviceKvBlock out;
    out.k_format = block.codec.k;
    out.v_format = block.codec.v;
    out.first = block.first;
    out.end = block.end;
    out.capacity = block.capacity;
    out.first_position = block.first_position;
    if (block.positions != nullptr) {
      out.positions = add_bytes(block.positions, context.wide_positions ? 128 : 64);
      // Without a base now and then, which is slower and must give the same.
      if (++n_listed_ % 4 != 0) out.first_position = position_of(block, context, block.first);
    }
    add_side(block, kernels::KvSide::kKey, context, out.k_codes, out.k_scales);
    add_side(block, kernels::KvSide::kValue, context, out.v_codes, out.v_scales);
    return out;
  }

  static std::int32_t position_of(const kernels::KvBlock& block,
                                  const kernels::KvHeadContext& context, int slot) {
    std::uint32_t position = 0;
    const int width = context.wide_positions ? 4 : 2;
    std::memcpy(&position, block.positions + slot * width, static_cast<std::size_t>(width));
    return static_cast<std::int32_t>(position);
  }

  void add_side(const kernels::KvBlock& block, kernels::KvSide side,
                const kernels::KvHeadContext& context, std::uint32_t& codes,
                std::uint32_t& scales) {
    const bool is_key = side == kernels::KvSide::kKey;
    const kernels::KvFormat format = is_key ? block.codec.k : block.codec.v;
    const kernels::KvPieces& pieces = is_key ? block.k : block.v;
    const kernels::KvSideBytes sizes = kernels::kv_side_bytes(
        format, side, layout_.head_dim, layout_.dtype, block.capacity, context.wide_ids);
    scales = add_bytes(pieces.scales, sizes.scales);
    if (format == kernels::KvFormat::kCodebook || format == kernels::KvFormat::kToken) {
      codes = add_bytes(pieces.codes, sizes.codes);
      return;
    }
    const std::size_t at = reserve(sizes.codes);
    codes = place(at);
    if (format == kernels::KvFormat::kRaw) {
      repack_elements(pieces.codes, side, layout_.head_dim, block.capacity, pool_.data() + at);
    } else {
      repack_codes(pieces.codes, format, side, layout_.head_dim, pool_.data() + at);
    }
  }

  static std::int64_t largest_index(const kernels::KvBlock& block, const std::byte* values,
                                    bool wide) {
    std::int64_t largest = -1;
    for (int t = block.first; t < block.end; ++t) {
      std::uint32_t value = 0;
      std::memcpy(&value, values + t * (wide ? 4 : 2), wide ? 4 : 2);
      largest = std::max<std::int64_t>(largest, value);
    }
    return largest;
  }

  void add_context(const kernels::KvHeadPages& head, kernels::DeviceKvHead& out) {
    const kernels::KvHeadContext& context = *head.context;
    const auto d = static_cast<std::size_t>(layout_.head_dim);
    out.wide_positions = context.wide_positions ? 1 : 0;
    out.wide_ids = context.wide_ids ? 1 : 0;
    out.k_mean = add_bytes(reinterpret_cast<const std::byte*>(context.k_mean), 2 * d);
    out.v_mean = add_bytes(reinterpret_cast<const std::byte*>(context.v_mean), 2 * d);
    std::int64_t last_k = -1;
    std::int64_t last_v = -1;
    std::int64_t last_id = -1;
    for (std::int64_t i = 0; i < head.n_blocks; ++i) {
      const kernels::KvBlock& block = head.blocks[i];
      using enum kernels::KvFormat;
      if (block.codec.k == kCodebook) {
        last_k = std::max(last_k, largest_index(block, block.k.codes, false));
      }
      if (block.codec.v == kCodebook) {
        last_v = std::max(last_v, largest_index(block, block.v.codes, false));
      }
      if (block.codec.k == kToken) {
        last_id = std::max(last_id, largest_index(block, block.k.codes, context.wide_ids));
      }
    }
    out.k_entries = add_entries(context.k_entries, last_k);
    out.v_entries = add_entries(context.v_entries, last_v);
    if (last_id < 0) return;
    out.token_stride = context.token_stride;
    out.k_tokens = add_tokens(context.k_tokens, context.token_stride, last_id);
    out.v_tokens = add_tokens(context.v_tokens, context.token_stride, last_id);
  }

  const std::uint32_t* add_entries(const std::byte* const* chunks, std::int64_t last) {
    std::vector<std::uint32_t> places;
    for (std::int64_t chunk = 0; chunk <= last / 16 && last >= 0; ++chunk) {
      places.push_back(add_bytes(chunks[chunk], static_cast<std::size_t>(layout_.head_dim) * 32));
    }
    return table(places);
  }
  const std::uint16_t* add_tokens(const std::uint16_t* rows, std::int64_t stride,
                                  std::int64_t last) {
    std::vector<std::uint16_t> values(static_cast<std::size_t>(stride * (last + 1)), 0xffff);
    for (std::int64_t id = 0; id <= last; ++id) {
      std::copy_n(rows + id * stride, layout_.head_dim, values.begin() + id * stride);
    }
    return table(values);
  }

  kernels::KvPageLayout layout_;
  int n_listed_ = 0;
  std::vector<std::byte> pool_;
  std::vector<std::byte> tables_;
  std::vector<std::size_t> pointers_;  // offsets in tables_ of pointers into tables_
  std::vector<kernels::DeviceSequence> sequences_;
  std::optional<DeviceVector<std::byte>> device_pool_;
  std::optional<DeviceVector<std::byte>> device_tables_;
  const kernels::DeviceSequence* device_sequences_ = nullptr;
};

// A RopeTable on the device.
class DeviceRopeTable {
 public:
  DeviceRopeTable(const CudaContext& context, const kernels::RopeTable& table)
      : cos_(context, rows(table, table.cos(0))),
        sin_(context, rows(table, table.sin(0))),
        view_{.cos = cos_.data(),
              .sin = sin_.data(),
              .max_positions = table.max_positions(),
              .rotary_dim = table.rotary_dim(),
              .attention_scale = table.attention_scale()} {}
  const kernels::DeviceRope& view() const { return view_; }

 private:
  static std::vector<float> rows(const kernels::RopeTable& table, const float* first) {
    return {first, first + table.max_positions() * table.rotary_dim() / 2};
  }

  DeviceVector<float> cos_;
  DeviceVector<float> sin_;
  kernels::DeviceRope view_;
};

}  // namespace spindle::testing
