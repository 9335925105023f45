#pragma once
// The KV cache of one rank: every sequence's page tables for the rank's own layers.
//
// A sequence has one page table per (layer, KV head), because what a head keeps is decided head by
// head. The *logical* length (positions seen) belongs to the sequence; the *physical* length
// (tokens stored) to each head. In full precision they are equal.
//
// Life of a sequence: open (reserves pages for its longest form, so that later calls cannot run
// out)
// -> extend before each step that appends -> heads() for the kernels -> free. fork makes a second
// sequence that shares the full pages of the first and copies the partly filled one.
//
// Owner of: the page pool and all page tables. Kernels get raw page pointers that stay valid until
// the sequence is freed.
// Invariant, after every call: pool free + used = total, and used pages = pages in tables, each
// shared page counted once.
// Thread-safety: none; one stage thread owns the store.

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "kernels/attention.h"
#include "kernels/core/status.h"
#include "kvstore/page_pool.h"
#include "kvstore/plan/kv_shape.h"

namespace spindle::kvstore {

using SequenceId = std::uint64_t;

struct KvStoreConfig {
  KvShape shape;
  int n_layers = 0;  // of this stage
  std::uint64_t budget_bytes = 0;
};

struct KvStats {
  std::uint64_t capacity_bytes = 0;
  std::uint64_t used_bytes = 0;
  std::uint64_t peak_bytes = 0;
  std::vector<std::uint64_t> layer_used_bytes;  // [n_layers], shared pages counted once
};

struct FreedBytes {
  std::uint64_t full_bytes = 0;  // the sequence uncompressed in 16 bit
  std::uint64_t kept_bytes = 0;  // pages in its tables, shared ones included
};

class KvStore {
 public:
  static Result<std::unique_ptr<KvStore>> create(const KvStoreConfig& config);

  // Opens an empty sequence that will hold at most max_tokens. INVALID_ARGUMENT when the id is open
  // already; RESOURCE_EXHAUSTED when its pages cannot be reserved. Nothing changes on error.
  Status open(SequenceId sequence, std::int64_t max_tokens);

  // Opens `child` as a copy of `parent`'s first n_tokens, to hold at most max_tokens.
  Status fork(SequenceId parent, SequenceId child, std::int64_t n_tokens, std::int64_t max_tokens);

  // Makes room for n_new more tokens in every layer and head. INVALID_ARGUMENT for an unknown
  // sequence or beyond its max_tokens.
  Status extend(SequenceId sequence, std::int64_t n_new);

  // Tokens seen; 0 for an unknown sequence.
  std::int64_t length(SequenceId sequence) const;

  // Page tables of one layer, [n_kv_heads]; valid until the next extend or free of the sequence.
  // The sequence must be open and the layer in [0, n_layers).
  std::span<const kernels::KvHeadPages> heads(SequenceId sequence, int layer) const;
  // The same tables for appending. Only positions added by the last extend may be written: earlier
  // pages can be shared with forks.
  std::span<const kernels::KvWritableHeadPages> writable_heads(SequenceId sequence,
                                                               int layer) const;

  // Returns every page; NOT_FOUND for an unknown sequence.
  Result<FreedBytes> free(SequenceId sequence);

  std::size_t n_sequences() const { return sequences_.size(); }
  const KvShape& shape() const { return config_.shape; }
  kernels::KvPageLayout page_layout() const;
  KvStats stats() const;
  const PagePool& pool() const { return *pool_; }
  // Compares the pool with the page tables; walks everything, for tests and debug builds.
  void check_invariants() const;

 private:
  struct Sequence {
    std::int64_t n_tokens = 0;
    std::int64_t max_tokens = 0;
    std::int64_t reserved_pages = 0;                           // not yet allocated
    std::vector<std::vector<PageId>> pages;                    // [n_layers * n_kv_heads][...]
    std::vector<std::vector<std::byte*>> page_data;            // the same as addresses
    std::vector<kernels::KvHeadPages> heads;                   // [n_layers * n_kv_heads]
    std::vector<kernels::KvWritableHeadPages> writable_heads;  // [n_layers * n_kv_heads]
  };

  KvStore(const KvStoreConfig& config, std::unique_ptr<PagePool> pool);
  std::size_t n_tables() const;
  Sequence make_sequence(std::int64_t max_tokens) const;
  const Sequence& find_open(SequenceId sequence, int layer) const;
  void append_page(Sequence& sequence, std::size_t table, PageId page);
  void refresh_heads(Sequence& sequence);

  KvStoreConfig config_;
  std::unique_ptr<PagePool> pool_;
  std::unordered_map<SequenceId, Sequence> sequences_;
  std::vector<std::int64_t> layer_pages_;  // [n_layers] distinct pages in use
};

}  // namespace spindle::kvstore
