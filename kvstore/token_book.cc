#include "kvstore/token_book.h"

#include <algorithm>
#include <unordered_map>

namespace spindle::kvstore {
namespace {

constexpr std::int64_t kBlock = kernels::kKvBlockTokens;
constexpr std::int64_t kChunk = kernels::kCodebookChunkEntries;

// Of one side.
std::uint64_t raw_bytes(const kernels::KvPageLayout& layout, std::int64_t n) {
  std::uint64_t bytes = 0;
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const int capacity = block_form({}, std::min(kBlock, n - first)).capacity;
    bytes += kernels::kv_side_bytes(kernels::KvFormat::kRaw, kernels::KvSide::kKey, layout.head_dim,
                                    layout.dtype, capacity)
                 .total();
  }
  return bytes;
}
std::uint64_t book_bytes(const kernels::KvPageLayout& layout, std::int64_t n, std::int64_t n_new) {
  const auto n_blocks = static_cast<std::uint64_t>((n + kBlock - 1) / kBlock);
  const auto n_chunks = static_cast<std::uint64_t>((n_new + kChunk - 1) / kChunk);
  return n_blocks * kernels::kv_side_bytes(kernels::KvFormat::kCodebook, kernels::KvSide::kKey,
                                           layout.head_dim, layout.dtype)
                        .total() +
         n_chunks * codebook_chunk_bytes(layout.head_dim);
}

}  // namespace

TokenMatch match_token_ids(const HeadCache& head, const HeadTask& task,
                           std::span<const std::int32_t> tokens,
                           const kernels::KvPageLayout& layout) {
  TokenMatch match;
  match.refs.reserve(tokens.size());
  const std::int64_t n_stored = head.k_book.n_entries();
  std::unordered_map<std::int32_t, std::uint16_t> fresh;
  for (const std::int32_t token : tokens) {
    const std::int32_t id = task.token_ids[static_cast<std::size_t>(token - head.tail_origin)];
    if (const auto known = head.token_entries.find(id); known != head.token_entries.end()) {
      match.refs.push_back(known->second);
      continue;
    }
    const std::int64_t next = n_stored + static_cast<std::int64_t>(match.new_ids.size());
    const auto [entry, is_new] = fresh.try_emplace(id, static_cast<std::uint16_t>(next));
    if (is_new) {
      if (next >= kMaxTokenEntries) return {};
      match.new_ids.push_back(id);
      match.new_tokens.push_back(token);
    }
    match.refs.push_back(entry->second);
  }
  const auto n = static_cast<std::int64_t>(tokens.size());
  const auto n_new = static_cast<std::int64_t>(match.new_ids.size());
  if (book_bytes(layout, n, n_new) >= raw_bytes(layout, n)) return {};
  match.pays = true;
  return match;
}

}  // namespace spindle::kvstore
