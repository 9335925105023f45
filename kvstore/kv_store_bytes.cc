// What sequences hold, need at a boundary and may still take; the rest of the class is in
// kv_store.cc.

#include <algorithm>
#include <string>

#include "kvstore/kv_store.h"

namespace spindle::kvstore {
namespace {

using kernels::KvFormat;
using kernels::KvSide;
constexpr std::int64_t kBlock = kernels::kKvBlockTokens;

std::int64_t n_blocks(const HeadMove& move) {
  const auto n_sinks = static_cast<std::int64_t>(move.n_sinks);
  const auto n_tokens = static_cast<std::int64_t>(move.tokens.size());
  return (n_sinks + kBlock - 1) / kBlock + (n_tokens - n_sinks + kBlock - 1) / kBlock;
}
// No token needs an entry of its own on each side and more.
std::int64_t max_chunks(const HeadPlan& plan, const HeadMove& move) {
  const int n_sides =
      (plan.codec.k == KvFormat::kCodebook ? 1 : 0) + (plan.codec.v == KvFormat::kCodebook ? 1 : 0);
  const auto n_tokens = static_cast<std::int64_t>(move.tokens.size());
  return n_sides *
         ((n_tokens + kernels::kCodebookChunkEntries - 1) / kernels::kCodebookChunkEntries);
}

}  // namespace

void KvStore::shrink_reservation(Sequence& sequence, std::int64_t pages) {
  const std::int64_t unneeded = std::max<std::int64_t>(sequence.reserved_pages - pages, 0);
  pool_->unreserve(unneeded);
  sequence.reserved_pages -= unneeded;
}

std::int64_t KvStore::own_tail_pages(const HeadCache& cache, std::size_t n_pages) const {
  return std::count_if(cache.tail_pages.begin(),
                       cache.tail_pages.begin() + static_cast<std::ptrdiff_t>(n_pages),
                       [this](PageId page) { return pool_->references(page) == 1; });
}

// Layer by layer, as compress() goes: the pages that a layer's tails give back, then those that its
// pieces take.
Result<KvStore::BoundaryWork> KvStore::check_room(const Sequence& sequence,
                                                  const StageBoundary& boundary) const {
  const auto n_heads = static_cast<std::size_t>(config_.shape.n_kv_heads);
  SequenceArena::Trial arena = sequence.arena.trial();
  std::int64_t n_pages = sequence.reserved_pages;
  BoundaryWork work;
  work.moves.resize(n_tables());
  work.room = table_room(sequence);
  for (std::size_t first = 0; first < n_tables(); first += n_heads) {
    PieceSizes sizes;
    for (std::size_t table = first; table < first + n_heads; ++table) {
      const HeadCache& cache = sequence.caches[table];
      const HeadTask task = head_task(sequence, boundary, table);
      HeadMove& move = work.moves[table];
      move = move_head(cache, task);
      if (!move.changes) continue;
      work.room[table].n_blocks +=
          n_blocks(move) - static_cast<std::int64_t>(move.n_expired_blocks);
      work.room[table].n_chunks += max_chunks(task.plan, move);
      append_piece_sizes(cache, task, move, page_layout(), sizes);
      n_pages += own_tail_pages(cache, n_tail_pages_freed(cache, move.tail_origin));
    }
    std::int64_t n_taken = 0;
    for (const auto& [size, n] : sizes) n_taken = arena.allocate(size, n);
    if (n_taken > n_pages) {
      return resource_exhausted("compressed KV needs " + std::to_string(n_taken) +
                                " pages, the sequence may take " + std::to_string(n_pages));
    }
  }
  return work;
}

// Pages that the sequence may still take until it holds its granted tokens, when generated tokens
// leave the tail every kGeneratedBoundary tokens. Pages that others share do not come back when
// this sequence lets go of them. With what it holds, never more than before.
SequencePages KvStore::pages_of(const Sequence& sequence) const {
  SequencePages pages{sequence.arena.n_pages(), sequence.reserved_pages};
  for (const HeadCache& cache : sequence.caches) {
    pages.used += static_cast<std::int64_t>(cache.tail_pages.size());
  }
  return pages;
}

std::int64_t KvStore::future_pages(const Sequence& sequence, const StageBoundary& boundary) const {
  const Ahead ahead{.n_tokens = sequence.n_tokens,
                    .granted_tokens = sequence.granted_tokens,
                    .sinks = boundary.sinks,
                    .recent = boundary.recent,
                    .prompt_left = boundary.prompt_left,
                    .boundaries_left = boundary.boundaries_left,
                    .forks = boundary.forks};
  const PieceFormat format{config_.shape, config_.wide_positions, config_.wide_ids};
  std::int64_t n_pages = 0;
  std::uint64_t bytes = 0;
  for (std::size_t table = 0; table < n_tables(); ++table) {
    const HeadCache& cache = sequence.caches[table];
    const HeadPlan& plan = boundary.heads[table];
    const std::size_t n_tail_pages = cache.tail_pages.size();
    const TailState tail{
        .origin = cache.tail_origin,
        .first = cache.tail_first,
        .n_pages = static_cast<std::int64_t>(n_tail_pages),
        .n_own_pages = tail_only_grows(plan, ahead) ? 0 : own_tail_pages(cache, n_tail_pages),
        .has_k_mean = cache.context.k_mean != nullptr,
        .has_v_mean = cache.context.v_mean != nullptr,
        .by_id = is_by_id(cache, plan)};
    n_pages += future_tail_pages(config_.shape, plan, tail, ahead);
    bytes += future_piece_bytes(format, plan, tail, ahead);
  }
  return n_pages + future_piece_pages(config_.shape, bytes);
}

void KvStore::count_use(const Sequence& sequence, int sign) {
  const auto n_heads = static_cast<std::size_t>(config_.shape.n_kv_heads);
  for (std::size_t table = 0; table < n_tables(); ++table) {
    const HeadCache& cache = sequence.caches[table];
    if (sign > 0) {
      usage_.add(table / n_heads, cache, tail_bytes(cache));
    } else {
      usage_.remove(table / n_heads, cache, tail_bytes(cache));
    }
  }
}

FormBytes KvStore::form_bytes(const HeadCache& cache) const {
  FormBytes forms = {};
  const auto bytes_of = [&forms](KvForm form) -> std::uint64_t& {
    return forms[static_cast<std::size_t>(form)];
  };
  const int d = config_.shape.head_dim;
  for (const kernels::KvBlock& block : cache.blocks) {
    const auto k = kernels::kv_side_bytes(block.codec.k, KvSide::kKey, d, config_.shape.dtype,
                                          block.capacity, config_.wide_ids);
    const auto v = kernels::kv_side_bytes(block.codec.v, KvSide::kValue, d, config_.shape.dtype,
                                          block.capacity, config_.wide_ids);
    bytes_of(form_of(block.codec.k)) += arena_bytes(k.codes) + arena_bytes(k.scales);
    bytes_of(form_of(block.codec.v)) += arena_bytes(v.codes) + arena_bytes(v.scales);
    if (block.positions != nullptr) {
      bytes_of(form_of(block.codec.k)) += config_.wide_positions ? 128 : 64;
    }
  }
  const std::uint64_t mean_bytes = arena_bytes(2ULL * static_cast<std::uint64_t>(d));
  if (cache.context.k_mean != nullptr) bytes_of(KvForm::kLloyd) += mean_bytes;
  if (cache.context.v_mean != nullptr) bytes_of(KvForm::kLloyd) += mean_bytes;
  bytes_of(cache.token_entries.empty() ? KvForm::kCodebook : KvForm::kToken) +=
      (cache.k_book.chunks.size() + cache.v_book.chunks.size()) *
      arena_bytes(codebook_chunk_bytes(d));
  return forms;
}

HeadKept KvStore::head_kept(const HeadCache& cache, std::int64_t n_tokens) const {
  HeadKept kept;
  kept.n_tokens = cache.n_block_tokens() + n_tokens - cache.tail_first;
  kept.bytes = head_bytes(cache);
  const std::int64_t k_tokens = cache.counts.n_in_k_book;
  const std::int64_t v_tokens = cache.counts.n_in_v_book;
  if (k_tokens > 0) {
    kept.k_entries_per_token =
        static_cast<double>(cache.k_book.n_filled) / static_cast<double>(k_tokens);
  }
  if (v_tokens > 0) {
    kept.v_entries_per_token =
        static_cast<double>(cache.v_book.n_filled) / static_cast<double>(v_tokens);
  }
  return kept;
}

}  // namespace spindle::kvstore
