#pragma once
// The tables of kernels/cuda/kv_device.h for the sequences of one store: per (layer, KV head) a
// DeviceKvHead, the page numbers of its tail, its blocks and the places of its codebook's chunks.
//
// A change only marks its sequence; flush() looks at what the store's caches hold now and brings
// the device up to date with one upload and one launch for all sequences: the new page numbers
// where pages were added; heads, pages and new blocks after a boundary, as blocks only expire in
// streams. Kernels enqueued before it see the tables as they were.
//
// Device memory of a sequence with t = n_layers * n_kv_heads tables: t (80 + 4 ceil(max_tokens /
// 32)) bytes from open() to close(), and about 40 bytes a block and 5 a codebook chunk from the
// first boundary on. For 128 channels and 16 bits that is 0.03 % of the sequence's uncompressed
// KV, and 1 to 5 % of the blocks' bytes.
//
// Thread-safety: none; the store's thread.

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "kernels/core/cuda_context.h"
#include "kernels/cuda/kv_device.h"
#include "kvstore/device_staging.h"
#include "kvstore/kv_memory.h"
#include "kvstore/table_writes.h"

namespace spindle::kvstore {

class DeviceTables {
 public:
  // Device memory beside that of sequences.
  static std::uint64_t fixed_bytes() { return kStagingBytes; }
  // `pool` is what places count from.
  static Result<std::unique_ptr<DeviceTables>> create(const CudaContext& context,
                                                      const std::byte* pool, int page_tokens);

  // As KvMemory says.
  Status open(SequenceId sequence, std::span<const HeadCache> caches, std::int64_t max_tokens,
              std::span<const TableRoom> room);
  Status grow(SequenceId sequence, std::span<const TableRoom> room);
  void changed(SequenceId sequence, TableChange change);
  void close(SequenceId sequence);
  void flush();

  const kernels::DeviceKvHead* heads(SequenceId sequence) const;
  // Page numbers of the tail of table layer * n_kv_heads + kv_head.
  const std::uint32_t* pages(SequenceId sequence, std::size_t table) const;

 private:
  static constexpr std::size_t kStagingBytes = std::size_t{4} << 20;
  static constexpr std::size_t kWordsPerWrite = 1024;

  struct Tables {
    std::span<const HeadCache> caches;
    DeviceBuffer heads;   // DeviceKvHead [n_tables], then page numbers [n_tables][page_capacity]
    DeviceBuffer blocks;  // DeviceKvBlock [first_block.back()], then places [n_chunks]
    std::int64_t page_capacity = 0;
    std::vector<std::size_t> first_block;  // [n_tables + 1]
    std::size_t n_chunks = 0;
    // What the device knows.
    std::vector<std::size_t> n_pages;   // [n_tables]
    std::vector<std::size_t> n_blocks;  // [n_tables]
    bool is_marked = false;
    bool only_pages = true;

    kernels::DeviceKvHead* device_heads() const { return heads.as<kernels::DeviceKvHead>(); }
    std::uint32_t* device_pages(std::size_t table) const {
      return reinterpret_cast<std::uint32_t*>(device_heads() + caches.size()) +
             table * static_cast<std::size_t>(page_capacity);
    }
    kernels::DeviceKvBlock* device_blocks(std::size_t table) const {
      return blocks.as<kernels::DeviceKvBlock>() + first_block[table];
    }
    std::uint32_t* device_chunks() const {
      return reinterpret_cast<std::uint32_t*>(device_blocks(caches.size()));
    }
  };

  DeviceTables(const CudaContext& context, const std::byte* pool, int page_tokens)
      : context_(context), pool_(pool), page_tokens_(page_tokens) {}
  // Regions of the blocks for at least `room`, or RESOURCE_EXHAUSTED with nothing changed.
  Status lay_out_blocks(Tables& tables, std::span<const TableRoom> room, bool with_slack);
  Tables& find(SequenceId sequence);
  const Tables& find(SequenceId sequence) const;
  void mark(SequenceId sequence, Tables& tables, TableChange change);
  void retire(DeviceBuffer buffer);
  std::uint32_t place_of(const void* address) const;
  kernels::DeviceKvBlock device_block(const kernels::KvBlock& block) const;
  void add_pages(Tables& tables);
  void add_blocks(Tables& tables);
  void add_heads(Tables& tables);
  template <typename T>
  void add_write(T* target, const std::vector<T>& values);
  void add_words(std::uint32_t* target, const std::uint32_t* words, std::size_t n_words);
  void send();

  const CudaContext& context_;
  const std::byte* pool_;
  int page_tokens_;
  std::unique_ptr<DeviceStaging> staging_;
  std::unordered_map<SequenceId, Tables> sequences_;
  std::vector<SequenceId> marked_;
  // Replaced or closed since the last flush: kernels may be told to look there until then.
  std::vector<DeviceBuffer> retired_;
  std::vector<TableWrite> writes_;
  std::vector<std::uint32_t> words_;
};

}  // namespace spindle::kvstore
