#pragma once
// Where the pool's bytes live and who moves them. The store decides on pages, pieces and tables by
// address alone; everything that reads or writes what is at an address is here, with one body for
// the host (host_memory.h) and one for a CUDA device (device_memory.h).
//
// Calls take effect in the order they are made, before whatever its kernels do next with the pool;
// none needs to have run when it returns.
//
// Owner of: the pool's memory, the scratch that encoded pieces wait in, and the kernels' tables.
// Thread-safety: none; the store's thread.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention.h"
#include "kernels/core/cpu_context.h"
#include "kernels/core/status.h"
#include "kernels/rope.h"
#include "kvstore/encoded_head.h"
#include "kvstore/head_cache.h"
#include "kvstore/head_move.h"

namespace spindle::kernels {
struct DeviceKvHead;
}

namespace spindle::kvstore {

using SequenceId = std::uint64_t;

// What encoding on the host computes with. Memory of a device brings its own, and these are null.
struct HostEncoding {
  const CpuContext* context = nullptr;
  const kernels::RopeTable* rope = nullptr;
};

// All KV heads of a layer at a boundary, or of several layers that follow each other.
struct EncodeTask {
  SequenceId sequence = 0;
  std::size_t first_table = 0;  // layer * n_kv_heads
  std::span<const HeadCache> heads;
  std::span<const HeadTask> tasks;  // as heads
  std::span<HeadMove> moves;        // as heads, move_head of the tasks; taken
};

// What decides how many layers can be encoded together.
struct EncodeSize {
  std::size_t n_heads = 0;
  std::int64_t n_tokens = 0;  // of all heads
  bool has_books = false;     // of directions or of token ids
};

struct KvCopy {
  const std::byte* source = nullptr;  // in the pool, or a piece
  std::byte* target = nullptr;        // in the pool
  std::uint64_t n_bytes = 0;
};

// What a head's table has room for beside its tail.
struct TableRoom {
  std::int64_t n_blocks = 0;
  std::int64_t n_chunks = 0;  // of codebooks
};

enum class TableChange : std::uint8_t {
  kPages,  // pages were added to tails
  kAll,
};

class KvMemory {
 public:
  virtual ~KvMemory() = default;
  KvMemory(const KvMemory&) = delete;
  KvMemory& operator=(const KvMemory&) = delete;

  // Address of the pool, aligned to 64 bytes. Kernels of this memory may follow it; the host can
  // only on the host.
  std::byte* base() const { return base_; }
  std::uint64_t n_bytes() const { return n_bytes_; }

  // No source overlaps a target. Pieces stay in the scratch until the next encode().
  virtual void copy(std::span<const KvCopy> copies) = 0;

  // Whether keys before RoPE can be made.
  virtual bool has_rope(const HostEncoding& host) const = 0;
  // Whether so much of several layers can be one encode() and is better so; a single layer always
  // can.
  virtual bool encodes_together(const EncodeSize& size) const = 0;
  // Encodes what the moves take out of the tails. Replaces what the scratch held.
  virtual std::vector<EncodedHead> encode(const HostEncoding& host,
                                          const kernels::KvPageLayout& layout,
                                          const EncodeTask& task) = 0;

  // The tables by which kernels find a sequence's pages and blocks. `caches` [n_layers *
  // n_kv_heads] stay where they are until close_tables(). RESOURCE_EXHAUSTED, with nothing changed,
  // without room for them; with it every later change up to max_tokens and `room` succeeds.
  virtual Status open_tables(SequenceId sequence, std::span<const HeadCache> caches,
                             std::int64_t max_tokens,
                             std::span<const TableRoom> room) = 0;  // as caches, or empty
  virtual Status grow_tables(SequenceId sequence, std::span<const TableRoom> room) = 0;
  virtual void tables_changed(SequenceId sequence, TableChange change) = 0;
  virtual void close_tables(SequenceId sequence) = 0;
  // Makes all changes since the last call visible to kernels.
  virtual void flush_tables() = 0;
  // [n_layers][n_kv_heads] in device memory as of the last flush; null on the host.
  virtual const kernels::DeviceKvHead* device_heads(SequenceId sequence) const = 0;

 protected:
  KvMemory() = default;
  void set_memory(std::byte* base, std::uint64_t n_bytes) {
    base_ = base;
    n_bytes_ = n_bytes;
  }

 private:
  std::byte* base_ = nullptr;
  std::uint64_t n_bytes_ = 0;
};

}  // namespace spindle::kvstore
