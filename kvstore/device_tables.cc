#include "kvstore/device_tables.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/core/check.h"
#include "kvstore/plan/kv_shape.h"

namespace spindle::kvstore {

using kernels::DeviceKvBlock;
using kernels::DeviceKvHead;

Result<std::unique_ptr<DeviceTables>> DeviceTables::create(const CudaContext& context,
                                                           const std::byte* pool, int page_tokens) {
  std::unique_ptr<DeviceTables> tables(new DeviceTables(context, pool, page_tokens));
  auto staging = DeviceStaging::create(context, kStagingBytes, "changes of KV tables");
  if (!staging.ok()) return staging.status();
  tables->staging_ = std::move(*staging);
  return tables;
}

Status DeviceTables::lay_out_blocks(Tables& tables, std::span<const TableRoom> room,
                                    bool with_slack) {
  std::vector<std::size_t> first_block(tables.caches.size() + 1);
  std::size_t n_chunks = 0;
  for (std::size_t table = 0; table < room.size(); ++table) {
    const auto n_blocks = static_cast<std::size_t>(room[table].n_blocks);
    // Some more, so that not every boundary allocates.
    const std::size_t slack = with_slack && n_blocks > 0 ? n_blocks / 4 + 2 : 0;
    first_block[table + 1] = first_block[table] + n_blocks + slack;
    n_chunks += static_cast<std::size_t>(room[table].n_chunks);
  }
  if (with_slack) n_chunks += n_chunks / 4;
  auto blocks = context_.allocate(
      first_block.back() * sizeof(DeviceKvBlock) + n_chunks * sizeof(std::uint32_t),
      "a sequence's tables of KV blocks");
  if (!blocks.ok()) return blocks.status();
  retire(std::exchange(tables.blocks, std::move(*blocks)));
  tables.first_block = std::move(first_block);
  tables.n_chunks = n_chunks;
  tables.n_blocks.assign(tables.caches.size(), 0);
  return ok_status();
}

Status DeviceTables::open(SequenceId sequence, std::span<const HeadCache> caches,
                          std::int64_t max_tokens, std::span<const TableRoom> room) {
  CHECK(!sequences_.contains(sequence), "tables are opened once");
  CHECK(room.empty() || room.size() == caches.size(), "room for every table");
  Tables tables;
  tables.caches = caches;
  tables.page_capacity = pages_for_tokens(max_tokens, page_tokens_);
  tables.n_pages.resize(caches.size());
  const std::size_t table_bytes =
      sizeof(DeviceKvHead) + sizeof(std::uint32_t) * static_cast<std::size_t>(tables.page_capacity);
  auto heads = context_.allocate(caches.size() * table_bytes, "a sequence's KV page tables");
  if (!heads.ok()) return heads.status();
  tables.heads = std::move(*heads);
  if (Status status = lay_out_blocks(tables, room, false); !status.ok()) return status;
  Tables& opened = sequences_.emplace(sequence, std::move(tables)).first->second;
  mark(sequence, opened, TableChange::kAll);
  return ok_status();
}

Status DeviceTables::grow(SequenceId sequence, std::span<const TableRoom> room) {
  Tables& tables = find(sequence);
  CHECK(room.size() == tables.caches.size(), "room for every table");
  bool fits = true;
  std::size_t n_chunks = 0;
  for (std::size_t table = 0; table < room.size(); ++table) {
    const std::size_t capacity = tables.first_block[table + 1] - tables.first_block[table];
    fits = fits && static_cast<std::size_t>(room[table].n_blocks) <= capacity;
    n_chunks += static_cast<std::size_t>(room[table].n_chunks);
  }
  if (fits && n_chunks <= tables.n_chunks) return ok_status();
  if (Status status = lay_out_blocks(tables, room, true); !status.ok()) return status;
  mark(sequence, tables, TableChange::kAll);
  return ok_status();
}

void DeviceTables::changed(SequenceId sequence, TableChange change) {
  mark(sequence, find(sequence), change);
}

void DeviceTables::close(SequenceId sequence) {
  Tables& tables = find(sequence);
  retire(std::move(tables.heads));
  retire(std::move(tables.blocks));
  sequences_.erase(sequence);
}

const DeviceKvHead* DeviceTables::heads(SequenceId sequence) const {
  return find(sequence).device_heads();
}

const std::uint32_t* DeviceTables::pages(SequenceId sequence, std::size_t table) const {
  return find(sequence).device_pages(table);
}

const DeviceTables::Tables& DeviceTables::find(SequenceId sequence) const {
  const auto found = sequences_.find(sequence);
  CHECK(found != sequences_.end(), "device tables of a sequence that is not open");
  return found->second;
}

DeviceTables::Tables& DeviceTables::find(SequenceId sequence) {
  return const_cast<Tables&>(std::as_const(*this).find(sequence));
}

void DeviceTables::mark(SequenceId sequence, Tables& tables, TableChange change) {
  if (!tables.is_marked) marked_.push_back(sequence);
  tables.is_marked = true;
  if (change == TableChange::kAll) tables.only_pages = false;
}

void DeviceTables::retire(DeviceBuffer buffer) {
  if (buffer.n_bytes() > 0) retired_.push_back(std::move(buffer));
}

void DeviceTables::flush() {
  for (const SequenceId sequence : marked_) {
    const auto found = sequences_.find(sequence);
    // Closed since, or opened again and listed twice.
    if (found == sequences_.end() || !found->second.is_marked) continue;
    Tables& tables = found->second;
    if (!tables.only_pages) {
      std::fill(tables.n_pages.begin(), tables.n_pages.end(), 0U);
      add_blocks(tables);
      add_heads(tables);
    }
    add_pages(tables);
    tables.is_marked = false;
    tables.only_pages = true;
  }
  marked_.clear();
  send();
  retired_.clear();
}

void DeviceTables::add_pages(Tables& tables) {
  for (std::size_t table = 0; table < tables.caches.size(); ++table) {
    const std::vector<PageId>& pages = tables.caches[table].tail_pages;
    const std::size_t n_known = tables.n_pages[table];
    CHECK(
        pages.size() >= n_known && static_cast<std::int64_t>(pages.size()) <= tables.page_capacity,
        "pages of a tail within the sequence's length");
    add_words(tables.device_pages(table) + n_known, pages.data() + n_known, pages.size() - n_known);
    tables.n_pages[table] = pages.size();
  }
}

void DeviceTables::add_blocks(Tables& tables) {
  std::vector<DeviceKvBlock> blocks;
  for (std::size_t table = 0; table < tables.caches.size(); ++table) {
    const HeadCache& cache = tables.caches[table];
    CHECK(cache.blocks.size() <= tables.first_block[table + 1] - tables.first_block[table],
          "blocks within the room that was asked for");
    std::size_t& n_known = tables.n_blocks[table];
    if (cache.plan.mode == KvMode::kStream) n_known = 0;
    blocks.clear();
    for (std::size_t i = n_known; i < cache.blocks.size(); ++i) {
      blocks.push_back(device_block(cache.blocks[i]));
    }
    add_write(tables.device_blocks(table) + n_known, blocks);
    n_known = cache.blocks.size();
  }
}

void DeviceTables::add_heads(Tables& tables) {
  std::vector<DeviceKvHead> heads(tables.caches.size());
  std::vector<std::uint32_t> chunks;
  const auto add_book = [&](const HeadBook& book) -> const std::uint32_t* {
    if (book.chunks.empty()) return nullptr;
    const std::uint32_t* entries = tables.device_chunks() + chunks.size();
    for (const std::byte* chunk : book.chunks) chunks.push_back(place_of(chunk));
    return entries;
  };
  for (std::size_t table = 0; table < tables.caches.size(); ++table) {
    const HeadCache& cache = tables.caches[table];
    DeviceKvHead& head = heads[table];
    head.pages = tables.device_pages(table);
    head.blocks = cache.blocks.empty() ? nullptr : tables.device_blocks(table);
    head.n_blocks = static_cast<std::int32_t>(cache.blocks.size());
    head.tail_origin = static_cast<std::int32_t>(cache.tail_origin);
    head.tail_first = static_cast<std::int32_t>(cache.tail_first);
    head.k_mean = place_of(cache.context.k_mean);
    head.v_mean = place_of(cache.context.v_mean);
    head.wide_positions = cache.context.wide_positions ? 1 : 0;
    head.wide_ids = cache.context.wide_ids ? 1 : 0;
    head.k_entries = add_book(cache.k_book);
    head.v_entries = add_book(cache.v_book);
    head.k_tokens = cache.context.k_tokens;
    head.v_tokens = cache.context.v_tokens;
    head.token_stride = cache.context.token_stride;
  }
  CHECK(chunks.size() <= tables.n_chunks, "chunks within the room that was asked for");
  add_write(tables.device_heads(), heads);
  add_write(tables.device_chunks(), chunks);
}

std::uint32_t DeviceTables::place_of(const void* address) const {
  if (address == nullptr) return kernels::kNoPlace;
  const auto distance = static_cast<std::uint64_t>(static_cast<const std::byte*>(address) - pool_);
  CHECK(distance % kernels::kKvPlaceBytes == 0, "pieces are aligned");
  return static_cast<std::uint32_t>(distance / kernels::kKvPlaceBytes);
}

DeviceKvBlock DeviceTables::device_block(const kernels::KvBlock& block) const {
  DeviceKvBlock out;
  out.k_codes = place_of(block.k.codes);
  out.k_scales = place_of(block.k.scales);
  out.v_codes = place_of(block.v.codes);
  out.v_scales = place_of(block.v.scales);
  out.positions = place_of(block.positions);
  out.first_position = block.first_position;
  out.k_format = block.codec.k;
  out.v_format = block.codec.v;
  out.first = block.first;
  out.end = block.end;
  out.capacity = block.capacity;
  return out;
}

template <typename T>
void DeviceTables::add_write(T* target, const std::vector<T>& values) {
  static_assert(sizeof(T) % sizeof(std::uint32_t) == 0);
  add_words(reinterpret_cast<std::uint32_t*>(target),
            reinterpret_cast<const std::uint32_t*>(values.data()),
            values.size() * sizeof(T) / sizeof(std::uint32_t));
}

void DeviceTables::add_words(std::uint32_t* target, const std::uint32_t* words,
                             std::size_t n_words) {
  constexpr std::size_t kMaxWordBytes = kWordsPerWrite * sizeof(std::uint32_t);
  while (n_words > 0) {
    const std::size_t n = std::min(n_words, kWordsPerWrite);
    const std::size_t staged = DeviceStaging::bytes_of<TableWrite>(writes_.size() + 1) +
                               DeviceStaging::bytes_of<std::uint32_t>(words_.size());
    if (staged + kMaxWordBytes > kStagingBytes) send();
    writes_.push_back(
        {target, static_cast<std::uint32_t>(words_.size()), static_cast<std::uint32_t>(n)});
    const std::size_t first = words_.size();
    words_.resize(first + n);
    std::memcpy(words_.data() + first, words, n * sizeof(std::uint32_t));
    target += n;
    words += n;
    n_words -= n;
  }
}

void DeviceTables::send() {
  if (writes_.empty()) return;
  staging_->begin();
  const Staged<TableWrite> writes = staging_->add(writes_);
  const Staged<std::uint32_t> words = staging_->add(words_);
  staging_->send();
  write_tables(context_, writes.device, writes.n, words.device);
  writes_.clear();
  words_.clear();
}

}  // namespace spindle::kvstore
