// Boundaries: tokens leave the tails, their pages are freed and the encoded pieces are placed; the
// rest of the class is in kv_store.cc and kv_store_bytes.cc.

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/core/check.h"
#include "kvstore/kv_store.h"

namespace spindle::kvstore {
namespace {

using kernels::KvFormat;
using kernels::KvSide;

// Room for n more values, whose addresses then stay; when it is made, a quarter more than that: a
// boundary comes every few dozen tokens and must not move what all earlier ones have left.
void reserve_more(std::vector<kernels::KvBlock>& blocks, std::size_t n) {
  const std::size_t size = blocks.size() + n;
  if (size > blocks.capacity()) blocks.reserve(size + size / 4);
}

}  // namespace

Status KvStore::check_boundary(const Sequence& sequence, const HostEncoding& host,
                               const StageBoundary& boundary) const {
  if (boundary.heads.size() != n_tables()) {
    return invalid_argument("a plan of " + std::to_string(boundary.heads.size()) +
                            " heads for a stage of " + std::to_string(n_tables()));
  }
  if (!boundary.kept.empty() && boundary.kept.size() != n_tables()) {
    return invalid_argument("a selection that does not cover the stage's heads");
  }
  if (boundary.sinks < 0 || boundary.recent < 0 || boundary.prompt_left < 0 ||
      boundary.boundaries_left < 0) {
    return invalid_argument("negative sinks, recent, prompt length or boundaries");
  }
  for (std::size_t table = 0; table < n_tables(); ++table) {
    const HeadPlan& plan = boundary.heads[table];
    const bool is_raw = plan.codec == kernels::KvCodec{};
    if (!is_raw && config_.shape.head_dim % kernels::kKvBlockTokens != 0) {
      return invalid_argument("coded KV needs a head_dim that 32 divides");
    }
    if (kernels::is_pre_rope(plan.codec.k) && plan.codec.k != KvFormat::kToken &&
        !memory_->has_rope(host)) {
      return invalid_argument("keys before RoPE need its table");
    }
    const HeadCache& cache = sequence.caches[table];
    const bool k_token = plan.codec.k == KvFormat::kToken;
    if (k_token != (plan.codec.v == KvFormat::kToken)) {
      return invalid_argument("the token codec is for K and V together");
    }
    const auto n_kv_heads = static_cast<std::size_t>(config_.shape.n_kv_heads);
    if (k_token && (table >= n_kv_heads || !config_.keeps_token_ids)) {
      return invalid_argument("the token codec is for layer 0");
    }
    if (is_by_id(cache, plan) && !memory_->has_rope(host)) {
      return invalid_argument("keys before RoPE need its table");
    }
    const bool of_ids = !cache.token_entries.empty();
    const bool wants_directions =
        plan.codec.k == KvFormat::kCodebook || plan.codec.v == KvFormat::kCodebook;
    const bool has_directions = !of_ids && (cache.k_book.n_filled > 0 || cache.v_book.n_filled > 0);
    if ((of_ids && wants_directions) || (has_directions && is_by_id(cache, plan))) {
      return invalid_argument("the entries of a head's codebook are ids or directions, not both");
    }
    if (plan.fallback == KvFormat::kCodebook || plan.fallback == KvFormat::kToken) {
      return invalid_argument("a codebook that falls back to no codec");
    }
    if (plan.mode == KvMode::kStream && plan.window < 1) {
      return invalid_argument("a stream without a window");
    }
  }
  return ok_status();
}

HeadTask KvStore::head_task(const Sequence& sequence, const StageBoundary& boundary,
                            std::size_t table) const {
  HeadTask task;
  task.set_plan(sequence.caches[table], boundary.heads[table]);
  task.sinks = boundary.sinks;
  task.recent = boundary.recent;
  task.n_tokens = sequence.n_tokens;
  task.has_selection = !boundary.kept.empty();
  if (task.has_selection) task.kept = boundary.kept[table];
  if (task.holds_ids()) {
    const std::int64_t offset = sequence.caches[table].tail_origin - sequence.token_ids_begin;
    CHECK(offset >= 0, "token ids of the tail are kept");
    task.token_ids = std::span(sequence.token_ids).subspan(static_cast<std::size_t>(offset));
  }
  return task;
}

std::size_t KvStore::n_tail_pages_freed(const HeadCache& cache, std::int64_t tail_origin) const {
  return std::min(static_cast<std::size_t>(
                      pages_for_tokens(tail_origin - cache.tail_origin, config_.shape.page_tokens)),
                  cache.tail_pages.size());
}

void KvStore::free_tail(Sequence& sequence, HeadCache& cache, std::int64_t tail_origin) {
  const auto n_pages = static_cast<std::ptrdiff_t>(n_tail_pages_freed(cache, tail_origin));
  for (std::ptrdiff_t i = 0; i < n_pages; ++i) {
    if (!pool_->release(cache.tail_pages[static_cast<std::size_t>(i)])) continue;
    // What this sequence freed it may take again, until the boundary is over.
    CHECK(pool_->reserve(1).ok(), "a page was just freed");
    ++sequence.reserved_pages;
  }
  cache.tail_pages.erase(cache.tail_pages.begin(), cache.tail_pages.begin() + n_pages);
  cache.tail_data.erase(cache.tail_data.begin(), cache.tail_data.begin() + n_pages);
  cache.tail_origin = tail_origin;
}

void KvStore::expire_blocks(Sequence& sequence, HeadCache& cache, const HeadMove& move) {
  const auto release = [&](const std::byte* piece, std::uint64_t bytes, KvFormat format) {
    if (piece == nullptr || bytes == 0) return;
    cache.piece_bytes -= arena_bytes(bytes);
    cache.form_bytes[static_cast<std::size_t>(form_of(format))] -= arena_bytes(bytes);
    const std::int64_t n_free = sequence.arena.release(piece, bytes);
    CHECK(pool_->reserve(n_free).ok(), "pages were just freed");
    sequence.reserved_pages += n_free;
  };
  const int d = config_.shape.head_dim;
  const auto first = cache.blocks.begin() + static_cast<std::ptrdiff_t>(move.first_expired_block);
  const auto end = first + static_cast<std::ptrdiff_t>(move.n_expired_blocks);
  for (auto block = first; block != end; ++block) {
    const auto k = kernels::kv_side_bytes(block->codec.k, KvSide::kKey, d, config_.shape.dtype,
                                          block->capacity, config_.wide_ids);
    const auto v = kernels::kv_side_bytes(block->codec.v, KvSide::kValue, d, config_.shape.dtype,
                                          block->capacity, config_.wide_ids);
    release(block->k.codes, k.codes, block->codec.k);
    release(block->k.scales, k.scales, block->codec.k);
    release(block->v.codes, v.codes, block->codec.v);
    release(block->v.scales, v.scales, block->codec.v);
    release(block->positions, config_.wide_positions ? 128 : 64, block->codec.k);
    cache.counts.count(*block, -1);
  }
  cache.blocks.erase(first, end);
  if (move.first_of_next_block > 0) {
    kernels::KvBlock& next = cache.blocks[move.first_expired_block];
    cache.counts.count(next, -1);
    next.first = static_cast<std::uint8_t>(move.first_of_next_block);
    cache.counts.count(next, 1);
  }
}

Status KvStore::place_layer(Sequence& sequence, std::size_t first_table,
                            std::span<EncodedHead> encoded) {
  HeadCache* owner = nullptr;
  const auto add = [&](Piece piece, const std::byte** place, KvForm form) {
    owner->piece_bytes += arena_bytes(piece.size());
    owner->form_bytes[static_cast<std::size_t>(form)] += arena_bytes(piece.size());
    placer_.add(piece, place);
  };
  const std::uint64_t chunk_bytes = codebook_chunk_bytes(config_.shape.head_dim);
  const auto add_entries = [&](HeadBook& book, const EncodedEntries& entries, KvForm form) {
    const std::size_t n_chunks = entries.chunks.size() / chunk_bytes;
    const std::size_t n_old = book.chunks.size();
    book.chunks.resize(n_old + n_chunks);
    book.n_filled += entries.n_filled;
    for (std::size_t c = 0; c < n_chunks; ++c) {
      add(entries.chunks.subspan(c * chunk_bytes, chunk_bytes), &book.chunks[n_old + c], form);
    }
  };
  std::vector<const std::byte*> means(2 * encoded.size());
  for (std::size_t h = 0; h < encoded.size(); ++h) {
    HeadCache& cache = sequence.caches[first_table + h];
    owner = &cache;
    reserve_more(cache.blocks, encoded[h].blocks.size());
    for (EncodedBlock& block : encoded[h].blocks) {
      cache.blocks.push_back(block.view);
      cache.counts.count(block.view, 1);
      kernels::KvBlock& placed = cache.blocks.back();
      const KvForm k_form = form_of(placed.codec.k);
      const KvForm v_form = form_of(placed.codec.v);
      add(block.k.codes, &placed.k.codes, k_form);
      add(block.k.scales, &placed.k.scales, k_form);
      add(block.v.codes, &placed.v.codes, v_form);
      add(block.v.scales, &placed.v.scales, v_form);
      add(block.positions, &placed.positions, k_form);
    }
    auto entry = static_cast<std::uint16_t>(cache.k_book.n_entries());
    for (const std::int32_t id : encoded[h].entry_ids) cache.token_entries.emplace(id, entry++);
    add(encoded[h].k_mean, &means[2 * h], KvForm::kLloyd);
    add(encoded[h].v_mean, &means[2 * h + 1], KvForm::kLloyd);
    const KvForm book_form = cache.token_entries.empty() ? KvForm::kCodebook : KvForm::kToken;
    add_entries(cache.k_book, encoded[h].k_entries, book_form);
    add_entries(cache.v_book, encoded[h].v_entries, book_form);
  }
  if (!placer_.place(sequence.arena, *pool_, &sequence.reserved_pages, copies_)) {
    return resource_exhausted("compressed KV does not fit the sequence's reservation");
  }
  for (std::size_t h = 0; h < encoded.size(); ++h) {
    kernels::KvHeadContext& context = sequence.caches[first_table + h].context;
    if (means[2 * h] != nullptr) {
      context.k_mean = reinterpret_cast<const std::uint16_t*>(means[2 * h]);
    }
    if (means[2 * h + 1] != nullptr) {
      context.v_mean = reinterpret_cast<const std::uint16_t*>(means[2 * h + 1]);
    }
  }
  return ok_status();
}

std::size_t KvStore::end_of_encode(const Sequence& sequence, const StageBoundary& boundary,
                                   std::span<const HeadMove> moves, std::size_t first) const {
  const auto n_heads = static_cast<std::size_t>(config_.shape.n_kv_heads);
  EncodeSize size;
  for (std::size_t end = first; end < n_tables(); end += n_heads) {
    for (std::size_t table = end; table < end + n_heads; ++table) {
      const HeadPlan& plan = boundary.heads[table];
      ++size.n_heads;
      size.n_tokens += static_cast<std::int64_t>(moves[table].tokens.size());
      size.has_books = size.has_books || plan.codec.k == KvFormat::kCodebook ||
                       plan.codec.v == KvFormat::kCodebook ||
                       is_by_id(sequence.caches[table], plan);
    }
    if (end > first && !memory_->encodes_together(size)) return end;
  }
  return n_tables();
}

Status KvStore::compress_tables(const HostEncoding& host, SequenceId id, Sequence& sequence,
                                const StageBoundary& boundary, std::span<HeadMove> moves,
                                std::size_t first, std::size_t end) {
  const auto n_heads = static_cast<std::size_t>(config_.shape.n_kv_heads);
  const std::span<HeadCache> caches = std::span(sequence.caches).subspan(first, end - first);
  for (std::size_t i = 0; i < caches.size(); ++i) {
    usage_.remove((first + i) / n_heads, caches[i], tail_bytes(caches[i]));
  }
  std::vector<HeadTask> tasks;
  for (std::size_t table = first; table < end; ++table) {
    tasks.push_back(head_task(sequence, boundary, table));
  }
  std::vector<EncodedHead> encoded = memory_->encode(
      host, page_layout(), {id, first, caches, tasks, moves.subspan(first, end - first)});
  Status status;
  // Pages that a tail gives back may be taken at once: what was in them is encoded by now.
  copies_.clear();
  for (std::size_t layer = 0; layer < caches.size() && status.ok(); layer += n_heads) {
    for (std::size_t i = layer; i < layer + n_heads; ++i) {
      caches[i].plan = boundary.heads[first + i];
      const HeadMove& move = encoded[i].move;
      if (!move.changes) continue;
      expire_blocks(sequence, caches[i], move);
      free_tail(sequence, caches[i], move.tail_origin);
      caches[i].tail_first = move.tail_first;
    }
    status = place_layer(sequence, first + layer, std::span(encoded).subspan(layer, n_heads));
  }
  memory_->copy(copies_);
  for (std::size_t i = 0; i < caches.size(); ++i) {
    usage_.add((first + i) / n_heads, caches[i], tail_bytes(caches[i]));
  }
  return status;
}

void KvStore::forget_token_ids(Sequence& sequence) const {
  if (!config_.keeps_token_ids) return;
  std::int64_t begin = sequence.n_tokens;
  for (std::size_t h = 0; h < static_cast<std::size_t>(config_.shape.n_kv_heads); ++h) {
    begin = std::min(begin, sequence.caches[h].tail_origin);
  }
  sequence.token_ids.erase(sequence.token_ids.begin(),
                           sequence.token_ids.begin() + (begin - sequence.token_ids_begin));
  sequence.token_ids_begin = begin;
}

Result<BoundaryKept> KvStore::compress(const HostEncoding& host, SequenceId sequence,
                                       const StageBoundary& boundary) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    return invalid_argument("sequence " + std::to_string(sequence) + " is not open");
  }
  Sequence& compressed = found->second;
  if (Status status = check_boundary(compressed, host, boundary); !status.ok()) return status;
  auto work = check_room(compressed, boundary);
  if (!work.ok()) return work.status();
  if (Status status = memory_->grow_tables(sequence, work->room); !status.ok()) return status;
  // Encoding reads the tails by them.
  memory_->flush_tables();
  Status status;
  for (std::size_t first = 0; first < n_tables() && status.ok();) {
    const std::size_t end = end_of_encode(compressed, boundary, work->moves, first);
    status = compress_tables(host, sequence, compressed, boundary, work->moves, first, end);
    first = end;
  }
  memory_->tables_changed(sequence, TableChange::kAll);
  refresh_heads(compressed);
  if (!status.ok()) return status;
  forget_token_ids(compressed);
  // What is still uncompressed may be under any plan after the next boundary; later ones keep it.
  const bool is_open = boundary.boundaries_left > 0 &&
                       std::all_of(boundary.heads.begin(), boundary.heads.end(),
                                   [](const HeadPlan& head) { return head == HeadPlan{}; });
  if (!is_open) shrink_reservation(compressed, future_pages(compressed, boundary));

  BoundaryKept kept;
  kept.full_bytes = full_bytes(config_.shape, config_.n_layers, compressed.n_tokens);
  kept.pages = pages_of(compressed);
  for (const HeadCache& cache : compressed.caches) {
    kept.heads.push_back(head_kept(cache, compressed.n_tokens));
  }
  return kept;
}

}  // namespace spindle::kvstore
