#pragma once
// The KV cache of one rank: every sequence's page tables for the rank's own layers.
//
// A sequence has one page table per (layer, KV head), because what a head keeps is decided head by
// head. The *logical* length (positions seen) belongs to the sequence; the *physical* length
// (tokens stored) to each head. In full precision they are equal.
//
// Life of a sequence: open (reserves pages, so that later calls cannot run out) -> extend before
// each step that appends -> heads() for the kernels -> compress at boundaries -> free. fork makes a
// second sequence that shares full pages and compressed pieces with the first and copies the partly
// filled pages. How many pages a sequence may take is rank 0's decision when it opens (its ledger);
// at a boundary the store projects what it may still take, which is never more than it had, and
// reports that.
//
// Owner of: the page pool, all page tables and arenas, and the memory (kv_memory.h) behind the
// pages, which is the host's or a device's; every address in a cache or table is one of that
// memory, and the store itself follows none. Kernels get raw pointers that stay valid until the
// sequence is extended or compressed, for the tables, or freed, for the pages.
// Invariant, after every call: pool free + used = total, and used pages = distinct pages in tables
// and arenas.
// Thread-safety: none; one stage thread owns the store.

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "kernels/attention.h"
#include "kernels/core/cpu_context.h"
#include "kernels/core/status.h"
#include "kernels/rope.h"
#include "kvstore/encoded_head.h"
#include "kvstore/head_cache.h"
#include "kvstore/kv_memory.h"
#include "kvstore/kv_usage.h"
#include "kvstore/page_pool.h"
#include "kvstore/piece_placer.h"
#include "kvstore/plan/kv_plan.h"
#include "kvstore/plan/kv_shape.h"
#include "kvstore/sequence_arena.h"

namespace spindle::kvstore {

struct KvStoreConfig {
  KvShape shape;
  int n_layers = 0;  // of this stage
  std::uint64_t budget_bytes = 0;
  bool wide_positions = false;   // positions do not fit 16 bits
  bool wide_ids = false;         // token ids do not fit 16 bits
  bool keeps_token_ids = false;  // the stage has layer 0, whose codec may be the token ids
};

struct KvStats {
  std::uint64_t capacity_bytes = 0;
  std::uint64_t used_bytes = 0;
  std::uint64_t peak_bytes = 0;
  // [n_layers], shared pages once for each sequence that shares them; pieces of all layers lie in
  // common pages, so the unused ends of those pages are in used_bytes only.
  std::vector<std::uint64_t> layer_used_bytes;
};

struct FreedBytes {
  std::uint64_t full_bytes = 0;                 // the sequence uncompressed in 16 bit
  std::uint64_t kept_bytes = 0;                 // its pages, shared ones included
  std::vector<std::uint64_t> layer_kept_bytes;  // [n_layers]
};

// A boundary's work on one stage.
struct StageBoundary {
  int sinks = 0;
  int recent = 0;
  std::span<const HeadPlan> heads;  // [n_layers * n_kv_heads] of this stage
  // At the end of a prompt segment: for every head that evicts, the candidates that stay, ascending
  // positions. Empty at boundaries of generated tokens, which all stay.
  std::span<const std::vector<std::int32_t>> kept;
  // Prompt tokens and prompt boundaries that are still to come. Without any, later boundaries are
  // those of generated tokens, every kGeneratedBoundary from this one on.
  std::int64_t prompt_left = 0;
  int boundaries_left = 0;
  // Other sequences will fork from this one at the end of its prompt: pages of its tail will not
  // come back when it lets go of them.
  bool forks = false;
};

struct HeadKept {
  std::int64_t n_tokens = 0;
  std::uint64_t bytes = 0;          // tail pages and pieces
  double k_entries_per_token = -1;  // -1: no codebook
  double v_entries_per_token = -1;
};
// Shared pages included.
struct SequencePages {
  std::int64_t used = 0;
  std::int64_t reserved = 0;  // that it may still take
};
struct BoundaryKept {
  std::vector<HeadKept> heads;   // [n_layers * n_kv_heads]
  SequencePages pages;           // of the sequence
  std::uint64_t full_bytes = 0;  // the sequence uncompressed in 16 bit
};

class KvStore {
 public:
  // In the host's memory.
  static Result<std::unique_ptr<KvStore>> create(const KvStoreConfig& config);
  // In `memory`, all of which becomes pages; config.budget_bytes is not looked at.
  static Result<std::unique_ptr<KvStore>> create(const KvStoreConfig& config,
                                                 std::unique_ptr<KvMemory> memory);

  // Layer 0's K before RoPE and V of every token id, f16 [vocab, n_kv_heads, head_dim] each, where
  // the kernels of the store's memory can read them; they outlive the store. Sequences opened
  // before do not see it. Without it a plan with the token codec makes each sequence keep a table
  // of its own ids (token_book.h).
  void set_token_table(const std::uint16_t* k, const std::uint16_t* v);
  bool has_token_table() const { return token_k_ != nullptr; }

  // Opens an empty sequence that will hold at most max_tokens and take at most reserve_pages, which
  // are for its first granted_tokens (0: all of them); grow() adds to both. INVALID_ARGUMENT when
  // the id is open already; RESOURCE_EXHAUSTED when the pages cannot be reserved. Nothing changes
  // on error.
  Status open(SequenceId sequence, std::int64_t max_tokens, std::int64_t reserve_pages,
              std::int64_t granted_tokens = 0);

  // Lets a sequence hold up to granted_tokens, for at most more_pages beyond its reservation: as
  // many of them as that may take are reserved. `recent` is that of its last boundary. Not for
  // sequences whose prompt has boundaries to come. INVALID_ARGUMENT for an unknown sequence or
  // beyond its max_tokens; RESOURCE_EXHAUSTED when the pool has too few. Nothing changes on error.
  Result<SequencePages> grow(SequenceId sequence, std::int64_t granted_tokens,
                             std::int64_t more_pages, int sinks, int recent);

  // Opens `child` as a copy of `parent`'s first n_tokens, which must reach into every head's tail,
  // to hold at most max_tokens and take at most reserve_pages of its own.
  Status fork(SequenceId parent, SequenceId child, std::int64_t n_tokens, std::int64_t max_tokens,
              std::int64_t reserve_pages);

  // Makes room for more tokens in every layer and head. INVALID_ARGUMENT for an unknown sequence or
  // beyond its granted tokens; RESOURCE_EXHAUSTED beyond its reservation.
  Status extend(SequenceId sequence, std::span<const std::int32_t> tokens);

  // Carries out a boundary at the sequence's present length: tokens leave the tail, are dropped or
  // encoded, and their pages are freed, layer by layer, so that the peak is never above the
  // uncompressed form. What it then may still take is projected, and the rest of its reservation
  // given back. INVALID_ARGUMENT for a plan that does not fit this store, RESOURCE_EXHAUSTED when
  // the pieces do not fit the reservation; nothing changes then.
  Result<BoundaryKept> compress(const CpuContext& context, const kernels::RopeTable* rope,
                                SequenceId sequence, const StageBoundary& boundary) {
    return compress(HostEncoding{&context, rope}, sequence, boundary);
  }
  // On a device, whose memory has what encoding needs.
  Result<BoundaryKept> compress(SequenceId sequence, const StageBoundary& boundary) {
    return compress(HostEncoding{}, sequence, boundary);
  }

  // Tokens seen; 0 for an unknown sequence.
  std::int64_t length(SequenceId sequence) const;
  // Position up to which all heads' tokens may have been dropped or encoded.
  std::int64_t compressed_length(SequenceId sequence) const;

  // For kernels of the host: the caches of one layer, [n_kv_heads]; valid until the next extend,
  // compress or free of the sequence. The sequence must be open and the layer in [0, n_layers).
  std::span<const kernels::KvHeadPages> heads(SequenceId sequence, int layer) const;
  // The same for appending. Only positions added by the last extend may be written: earlier pages
  // can be shared with forks.
  std::span<const kernels::KvWritableHeadPages> writable_heads(SequenceId sequence,
                                                               int layer) const;
  // For kernels of a device: the tables [n_layers][n_kv_heads] of an open sequence in its memory,
  // valid until the sequence is freed. They show what was true at the last flush_tables(), which is
  // one small upload for everything that changed since the one before, in any sequence: a stage
  // calls it before the kernels of a step, after its extend() calls. On the host null, and nothing
  // to do.
  const kernels::DeviceKvHead* device_heads(SequenceId sequence) const {
    return memory_->device_heads(sequence);
  }
  void flush_tables() { memory_->flush_tables(); }
  // What the scheduler, the scorer and tests look at.
  const HeadCache& head_cache(SequenceId sequence, int layer, int kv_head) const;

  // Returns every page; NOT_FOUND for an unknown sequence.
  Result<FreedBytes> free(SequenceId sequence);

  std::size_t n_sequences() const { return sequences_.size(); }
  const KvShape& shape() const { return config_.shape; }
  int n_layers() const { return config_.n_layers; }
  kernels::KvPageLayout page_layout() const;
  KvStats stats() const;
  // Work in proportion to the layers.
  KvUse use() const;
  const PagePool& pool() const { return *pool_; }
  const KvMemory& memory() const { return *memory_; }
  // Compares the pool with the page tables; walks everything, for tests and debug builds.
  void check_invariants() const;

 private:
  struct Sequence {
    explicit Sequence(PagePool& pool) : arena(pool) {}
    std::int64_t n_tokens = 0;
    std::int64_t max_tokens = 0;
    std::int64_t granted_tokens = 0;  // that its reservation is for
    std::int64_t covered_tokens = 0;  // that every tail has a page for
    std::int64_t reserved_pages = 0;  // not yet allocated
    std::vector<HeadCache> caches;    // [n_layers * n_kv_heads]
    // [n_layers * n_kv_heads], positions that the pages of the tails reach: a step looks at these
    // alone, since the caches are some 100 KB of a sequence.
    std::vector<std::int64_t> tail_ends;
    SequenceArena arena;
    // Ids of the positions from token_ids_begin on, as long as a tail may need them.
    std::vector<std::int32_t> token_ids;
    std::int64_t token_ids_begin = 0;
    std::vector<kernels::KvHeadPages> heads;                   // [n_layers * n_kv_heads]
    std::vector<kernels::KvWritableHeadPages> writable_heads;  // [n_layers * n_kv_heads]
  };

  KvStore(const KvStoreConfig& config, std::unique_ptr<KvMemory> memory,
          std::unique_ptr<PagePool> pool);
  Result<BoundaryKept> compress(const HostEncoding& host, SequenceId sequence,
                                const StageBoundary& boundary);
  std::size_t n_tables() const;
  Sequence make_sequence(std::int64_t max_tokens) const;
  const Sequence& find_open(SequenceId sequence, int layer) const;
  Status check_boundary(const Sequence& sequence, const HostEncoding& host,
                        const StageBoundary& boundary) const;
  // What a boundary moves, and what the tables then need room for, at most; [n_tables] each.
  struct BoundaryWork {
    std::vector<HeadMove> moves;
    std::vector<TableRoom> room;
  };
  // That the pieces fit the reservation.
  Result<BoundaryWork> check_room(const Sequence& sequence, const StageBoundary& boundary) const;
  static std::vector<TableRoom> table_room(const Sequence& sequence);
  HeadTask head_task(const Sequence& sequence, const StageBoundary& boundary,
                     std::size_t table) const;
  std::int64_t pages_to_extend(const Sequence& sequence, std::int64_t n_tokens) const;
  void add_tail_page(Sequence& sequence, HeadCache& cache);
  void shrink_reservation(Sequence& sequence, std::int64_t pages);
  // Of the first n_pages of a tail, those that no other sequence shares.
  std::int64_t own_tail_pages(const HeadCache& cache, std::size_t n_pages) const;
  SequencePages pages_of(const Sequence& sequence) const;
  std::int64_t future_pages(const Sequence& sequence, const StageBoundary& boundary) const;
  // Pages of a tail that lie before a new origin.
  std::size_t n_tail_pages_freed(const HeadCache& cache, std::int64_t tail_origin) const;
  void free_tail(Sequence& sequence, HeadCache& cache, std::int64_t tail_origin);
  void expire_blocks(Sequence& sequence, HeadCache& cache, const HeadMove& move);
  // What is to be copied to the places is added to copies_.
  Status place_layer(Sequence& sequence, std::size_t first_table, std::span<EncodedHead> encoded);
  // The end of the layers from table `first` on that are encoded together.
  std::size_t end_of_encode(const Sequence& sequence, const StageBoundary& boundary,
                            std::span<const HeadMove> moves, std::size_t first) const;
  Status compress_tables(const HostEncoding& host, SequenceId id, Sequence& sequence,
                         const StageBoundary& boundary, std::span<HeadMove> moves,
                         std::size_t first, std::size_t end);
  void forget_token_ids(Sequence& sequence) const;
  void refresh_heads(Sequence& sequence);
  void refresh_pages(Sequence& sequence, std::size_t table);
  static void refresh_covered(Sequence& sequence);
  std::uint64_t tail_bytes(const HeadCache& cache) const {
    return cache.tail_pages.size() * pool_->page_bytes();
  }
  std::uint64_t head_bytes(const HeadCache& cache) const {
    return tail_bytes(cache) + cache.piece_bytes;
  }
  void count_use(const Sequence& sequence, int sign);
  // Walks the blocks.
  FormBytes form_bytes(const HeadCache& cache) const;
  HeadKept head_kept(const HeadCache& cache, std::int64_t n_tokens) const;

  KvStoreConfig config_;
  std::unique_ptr<KvMemory> memory_;
  std::unique_ptr<PagePool> pool_;
  const std::uint16_t* token_k_ = nullptr;
  const std::uint16_t* token_v_ = nullptr;
  std::unordered_map<SequenceId, Sequence> sequences_;
  KvUsage usage_;
  // Of the boundary at hand.
  PiecePlacer placer_;
  std::vector<KvCopy> copies_;
};

}  // namespace spindle::kvstore
