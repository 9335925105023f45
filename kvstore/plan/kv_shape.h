#pragma once
// Pure arithmetic on KV bytes, shared by the rank that holds the pages (kv_store.h) and by rank 0,
// which projects them for admission (cluster/coordinator/kv_ledger.h). Both must agree to the byte.
//
// Thread-safety: plain values and pure functions.

#include <cstdint>

#include "kernels/core/dtype.h"

namespace spindle::kvstore {

// The KV of one layer on one stage. A page holds `page_tokens` tokens of ONE KV head of one layer,
// K and V together, so every (layer, KV head) of a sequence has its own page table and may come to
// hold a different number of tokens.
struct KvShape {
  int n_kv_heads = 0;
  int head_dim = 0;
  DType dtype = DType::kF16;
  int page_tokens = 32;

  std::uint64_t token_bytes() const {  // K and V of one KV head
    return 2ULL * static_cast<std::uint64_t>(head_dim) * dtype_bytes(dtype);
  }
  std::uint64_t page_bytes() const {
    return token_bytes() * static_cast<std::uint64_t>(page_tokens);
  }
  bool operator==(const KvShape&) const = default;
};

// What packing pieces of several sizes into pages may waste, on each stage.
inline constexpr std::int64_t kPackingPages = 4;

// Pages that n_tokens of one KV head take.
constexpr std::int64_t pages_for_tokens(std::int64_t n_tokens, int page_tokens) {
  return (n_tokens + page_tokens - 1) / page_tokens;
}

// Pages that n_tokens of a sequence take on a stage of n_layers.
constexpr std::int64_t stage_pages(const KvShape& shape, int n_layers, std::int64_t n_tokens) {
  return pages_for_tokens(n_tokens, shape.page_tokens) * n_layers * shape.n_kv_heads;
}

// Of those, the pages that a fork of a sequence of n_tokens shares: the full ones.
constexpr std::int64_t shared_stage_pages(const KvShape& shape, int n_layers,
                                          std::int64_t n_tokens) {
  return n_tokens / shape.page_tokens * n_layers * shape.n_kv_heads;
}

// Layer 0's K before RoPE and V of every token id, in 16 bit.
constexpr std::uint64_t token_table_bytes(int vocab_size, int n_kv_heads, int head_dim) {
  return 4ULL * static_cast<std::uint64_t>(vocab_size) * static_cast<std::uint64_t>(n_kv_heads) *
         static_cast<std::uint64_t>(head_dim);
}

// What n_tokens take uncompressed in 16 bit, without paging: 2 h_kv d 2 l per layer. The
// denominator of every compression ratio.
constexpr std::uint64_t full_bytes(const KvShape& shape, int n_layers, std::int64_t n_tokens) {
  return 4ULL * static_cast<std::uint64_t>(shape.n_kv_heads) *
         static_cast<std::uint64_t>(shape.head_dim) * static_cast<std::uint64_t>(n_layers) *
         static_cast<std::uint64_t>(n_tokens);
}

}  // namespace spindle::kvstore
