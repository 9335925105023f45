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

bool is_raw(const HeadPlan& plan) { return plan.codec == kernels::KvCodec{}; }
bool is_kivi(KvFormat format) { return format == KvFormat::kKivi4 || format == KvFormat::kKivi2; }

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

// What a piece takes of its page when only pieces of its size lie there.
std::uint64_t packed_bytes(std::uint64_t bytes, std::uint64_t page_bytes) {
  if (bytes == 0) return 0;
  const std::uint64_t per_page = page_bytes / arena_bytes(bytes);
  return (page_bytes + per_page - 1) / per_page;
}

// Whether all that comes are the boundaries of generated tokens, kGeneratedBoundary from this one
// and from each other: tails then have the same length after each, and only whole blocks leave
// them.
bool only_generates(const StageBoundary& boundary) {
  return boundary.prompt_left == 0 && boundary.boundaries_left == 0;
}

// The longest that a head's tail can be after a later boundary, counted from its first page.
std::int64_t tail_behind(const HeadCache& cache, const StageBoundary& boundary,
                         const HeadPlan& plan, std::int64_t n_tokens) {
  const bool streams = plan.mode == KvMode::kStream;
  const std::int64_t kept = is_raw(plan)                       ? plan.window
                            : plan.codec.k == KvFormat::kToken ? 0
                                                               : boundary.recent;
  if (kept == 0) return 0;
  const bool is_regular = only_generates(boundary) && streams == is_raw(plan);
  const std::int64_t over = n_tokens - kept - cache.tail_origin;
  return kept + (is_regular ? (over % kBlock + kBlock) % kBlock : kBlock - 1);
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
  std::int64_t n_pages = 0;
  std::uint64_t bytes = 0;
  for (std::size_t table = 0; table < n_tables(); ++table) {
    const HeadCache& cache = sequence.caches[table];
    n_pages += future_tail_pages(sequence, boundary, table);
    bytes += future_piece_bytes(sequence, boundary, boundary.heads[table], cache);
  }
  if (bytes > 0) {
    const std::uint64_t page = pool_->page_bytes();
    n_pages += static_cast<std::int64_t>((bytes + page - 1) / page) + kPackingPages;
  }
  return n_pages;
}

std::int64_t KvStore::future_tail_pages(const Sequence& sequence, const StageBoundary& boundary,
                                        std::size_t table) const {
  const HeadCache& cache = sequence.caches[table];
  const HeadPlan& plan = boundary.heads[table];
  const std::int64_t left = sequence.granted_tokens - sequence.n_tokens;
  const std::int64_t tail = sequence.n_tokens - cache.tail_origin;
  const int page_tokens = config_.shape.page_tokens;
  const bool selects_again = plan.mode == KvMode::kEvict && boundary.boundaries_left > 0;
  if (is_raw(plan) && plan.mode != KvMode::kStream && !selects_again) {
    return pages_for_tokens(tail + left, page_tokens) -
           static_cast<std::int64_t>(cache.tail_pages.size());
  }
  const std::int64_t own = boundary.forks ? 0 : own_tail_pages(cache, cache.tail_pages.size());
  // The longest tail: what stays behind a boundary, up to the next one; a prompt segment first.
  std::int64_t longest = tail + left;
  if (!is_raw(plan) || plan.mode == KvMode::kStream) {
    std::int64_t behind = tail_behind(cache, boundary, plan, sequence.n_tokens);
    // A stream begins once it is longer than its window.
    if (plan.mode == KvMode::kStream && cache.tail_first == 0) {
      behind = std::max(behind, boundary.sinks + plan.window + 1);
    }
    const std::int64_t rolling = std::max(tail + boundary.prompt_left, behind) + kGeneratedBoundary;
    longest = std::min(longest, rolling);
  }
  // What it takes until the forks is shared as well.
  const std::int64_t drawn = pages_for_tokens(tail + boundary.prompt_left, page_tokens) -
                             static_cast<std::int64_t>(cache.tail_pages.size());
  return pages_for_tokens(longest, page_tokens) - own + (boundary.forks ? drawn : 0);
}

// Every token that may yet leave the tail, at what its format takes of pages.
std::uint64_t KvStore::future_piece_bytes(const Sequence& sequence, const StageBoundary& boundary,
                                          const HeadPlan& plan, const HeadCache& cache) const {
  const kvstore::KvShape& shape = config_.shape;
  const bool selects_again = plan.mode == KvMode::kEvict && boundary.boundaries_left > 0;
  const std::uint64_t page = pool_->page_bytes();
  const auto block_bytes = [&](kernels::KvCodec codec) {
    std::uint64_t bytes = 0;
    for (const KvSide side : {KvSide::kKey, KvSide::kValue}) {
      const auto pieces =
          kernels::kv_side_bytes(side == KvSide::kKey ? codec.k : codec.v, side, shape.head_dim,
                                 shape.dtype, kBlock, config_.wide_ids);
      bytes += packed_bytes(pieces.codes, page) + packed_bytes(pieces.scales, page);
    }
    if (selects_again) bytes += config_.wide_positions ? 128 : 64;
    return bytes;
  };
  const std::uint64_t raw_bytes = block_bytes({});
  std::uint64_t bytes = 0;
  if (cache.tail_first == 0 && plan.mode != KvMode::kFull) {
    bytes += raw_bytes * static_cast<std::uint64_t>((boundary.sinks + kBlock - 1) / kBlock);
  }
  // The last block of each selection may be partly filled.
  auto n_partial = static_cast<std::uint64_t>(boundary.boundaries_left + 1);
  if (is_raw(plan)) return bytes + (selects_again ? raw_bytes * n_partial : 0);
  kernels::KvCodec codec = plan.codec;
  if (codec.k == KvFormat::kCodebook) codec.k = plan.fallback;
  if (codec.v == KvFormat::kCodebook) codec.v = plan.fallback;
  const int recent = codec.k == KvFormat::kToken ? 0 : boundary.recent;
  if (is_by_id(cache, plan)) codec = {};  // what its tokens may fall back to
  std::int64_t end = sequence.granted_tokens - recent;
  if (only_generates(boundary) && plan.mode != KvMode::kStream && cache.tail_first > 0) {
    const std::int64_t left = sequence.granted_tokens - sequence.n_tokens;
    const std::int64_t last = sequence.n_tokens + left / kGeneratedBoundary * kGeneratedBoundary;
    end = tail_begin(cache.tail_origin, cache.tail_first, recent, last);
    n_partial = 0;
  }
  const std::int64_t n_tokens = std::max<std::int64_t>(end - cache.tail_first, 0);
  if (n_tokens == 0) return bytes;
  const auto n_blocks = static_cast<std::uint64_t>((n_tokens + kBlock - 1) / kBlock);
  const bool has_kivi = is_kivi(codec.k) || is_kivi(codec.v);
  // A window's blocks need not be full, and those of KIVI are raw then: one in two at most.
  const std::uint64_t n_raw =
      has_kivi ? n_partial + (plan.mode == KvMode::kStream ? n_blocks / 2 : 0) : 0;
  bytes += raw_bytes * n_raw + block_bytes(codec) * (n_blocks + (has_kivi ? 0 : n_partial));
  if (wants_mean(plan, codec.k) && cache.context.k_mean == nullptr) {
    bytes += packed_bytes(2ULL * static_cast<std::uint64_t>(shape.head_dim), page);
  }
  if (wants_mean(plan, codec.v) && cache.context.v_mean == nullptr) {
    bytes += packed_bytes(2ULL * static_cast<std::uint64_t>(shape.head_dim), page);
  }
  return bytes;
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
  const std::int64_t k_tokens = cache.block_tokens.n_in_k_book;
  const std::int64_t v_tokens = cache.block_tokens.n_in_v_book;
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
