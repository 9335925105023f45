#include "kvstore/kv_store.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <unordered_set>
#include <utility>

#include "kvstore/host_memory.h"

namespace spindle::kvstore {

Result<std::unique_ptr<KvStore>> KvStore::create(const KvStoreConfig& config) {
  auto memory = HostMemory::create(config.budget_bytes);
  if (!memory.ok()) return memory.status();
  return create(config, std::move(*memory));
}

Result<std::unique_ptr<KvStore>> KvStore::create(const KvStoreConfig& config,
                                                 std::unique_ptr<KvMemory> memory) {
  CHECK(config.n_layers > 0 && config.shape.n_kv_heads > 0 && config.shape.head_dim > 0 &&
            config.shape.page_tokens > 0,
        "the KV shape comes from a validated model");
  auto pool = PagePool::create(memory->base(), memory->n_bytes(), config.shape.page_bytes());
  if (!pool.ok()) return pool.status();
  return std::unique_ptr<KvStore>(new KvStore(config, std::move(memory), std::move(*pool)));
}

KvStore::KvStore(const KvStoreConfig& config, std::unique_ptr<KvMemory> memory,
                 std::unique_ptr<PagePool> pool)
    : config_(config),
      memory_(std::move(memory)),
      pool_(std::move(pool)),
      usage_(config.n_layers, config.shape.n_kv_heads) {}

void KvStore::set_token_table(const std::uint16_t* k, const std::uint16_t* v) {
  token_k_ = k;
  token_v_ = v;
}

std::size_t KvStore::n_tables() const {
  return static_cast<std::size_t>(config_.n_layers) *
         static_cast<std::size_t>(config_.shape.n_kv_heads);
}

KvStore::Sequence KvStore::make_sequence(std::int64_t max_tokens) const {
  Sequence sequence(*pool_);
  sequence.max_tokens = max_tokens;
  sequence.granted_tokens = max_tokens;
  sequence.caches.resize(n_tables());
  sequence.heads.resize(n_tables());
  sequence.writable_heads.resize(n_tables());
  const std::int64_t stride =
      static_cast<std::int64_t>(config_.shape.n_kv_heads) * config_.shape.head_dim;
  for (std::size_t table = 0; table < n_tables(); ++table) {
    kernels::KvHeadContext& context = sequence.caches[table].context;
    context.wide_positions = config_.wide_positions;
    context.wide_ids = config_.wide_ids;
    if (token_k_ == nullptr || table >= static_cast<std::size_t>(config_.shape.n_kv_heads)) {
      continue;
    }
    const std::size_t offset = table * static_cast<std::size_t>(config_.shape.head_dim);
    context.k_tokens = token_k_ + offset;
    context.v_tokens = token_v_ + offset;
    context.token_stride = stride;
  }
  return sequence;
}

std::vector<TableRoom> KvStore::table_room(const Sequence& sequence) {
  std::vector<TableRoom> room;
  for (const HeadCache& cache : sequence.caches) {
    room.push_back(
        {static_cast<std::int64_t>(cache.blocks.size()),
         static_cast<std::int64_t>(cache.k_book.chunks.size() + cache.v_book.chunks.size())});
  }
  return room;
}

void KvStore::refresh_heads(Sequence& sequence) {
  sequence.tail_ends.resize(n_tables());
  for (std::size_t i = 0; i < n_tables(); ++i) {
    HeadCache& cache = sequence.caches[i];
    cache.context.k_entries = cache.k_book.chunks.data();
    cache.context.v_entries = cache.v_book.chunks.data();
    kernels::KvHeadPages& head = sequence.heads[i];
    head.tail_origin = cache.tail_origin;
    head.tail_first = cache.tail_first;
    head.blocks = cache.blocks.data();
    head.n_blocks = static_cast<std::int64_t>(cache.blocks.size());
    head.context = &cache.context;
    refresh_pages(sequence, i);
  }
  refresh_covered(sequence);
}

void KvStore::refresh_pages(Sequence& sequence, std::size_t table) {
  HeadCache& cache = sequence.caches[table];
  sequence.heads[table].pages = cache.tail_data.data();
  sequence.writable_heads[table] = {cache.tail_data.data(), cache.tail_origin};
  const auto n_pages = static_cast<std::int64_t>(cache.tail_pages.size());
  sequence.tail_ends[table] = cache.tail_origin + n_pages * config_.shape.page_tokens;
}

void KvStore::refresh_covered(Sequence& sequence) {
  sequence.covered_tokens = sequence.max_tokens;
  for (const std::int64_t end : sequence.tail_ends) {
    sequence.covered_tokens = std::min(sequence.covered_tokens, end);
  }
}

Status KvStore::open(SequenceId sequence, std::int64_t max_tokens, std::int64_t reserve_pages,
                     std::int64_t granted_tokens) {
  if (max_tokens <= 0) return invalid_argument("a sequence must hold at least one token");
  if (granted_tokens < 0 || granted_tokens > max_tokens) {
    return invalid_argument("a sequence of up to " + std::to_string(max_tokens) +
                            " tokens cannot be granted " + std::to_string(granted_tokens));
  }
  if (reserve_pages < 0) return invalid_argument("a negative reservation");
  if (sequences_.contains(sequence)) {
    return invalid_argument("sequence " + std::to_string(sequence) + " is open already");
  }
  if (Status status = pool_->reserve(reserve_pages); !status.ok()) return status;
  Sequence opened = make_sequence(max_tokens);
  opened.reserved_pages = reserve_pages;
  if (granted_tokens > 0) opened.granted_tokens = granted_tokens;
  if (Status status = memory_->open_tables(sequence, opened.caches, max_tokens, {}); !status.ok()) {
    pool_->unreserve(reserve_pages);
    return status;
  }
  refresh_heads(sequences_.emplace(sequence, std::move(opened)).first->second);
  return ok_status();
}

void KvStore::add_tail_page(Sequence& sequence, HeadCache& cache) {
  const PageId page = pool_->allocate();
  --sequence.reserved_pages;
  cache.tail_pages.push_back(page);
  cache.tail_data.push_back(pool_->address(page));
}

Status KvStore::fork(SequenceId parent, SequenceId child, std::int64_t n_tokens,
                     std::int64_t max_tokens, std::int64_t reserve_pages) {
  const auto found = sequences_.find(parent);
  if (found == sequences_.end()) {
    return invalid_argument("sequence " + std::to_string(parent) + " to fork is not open");
  }
  if (sequences_.contains(child)) {
    return invalid_argument("sequence " + std::to_string(child) + " is open already");
  }
  Sequence& from = found->second;
  if (n_tokens < compressed_length(parent) || n_tokens > from.n_tokens || max_tokens < n_tokens ||
      max_tokens <= 0) {
    return invalid_argument("a fork at token " + std::to_string(n_tokens) + " of " +
                            std::to_string(from.n_tokens) + " (compressed up to " +
                            std::to_string(compressed_length(parent)) + ") for at most " +
                            std::to_string(max_tokens));
  }
  const std::int64_t page_tokens = config_.shape.page_tokens;
  std::int64_t n_partial = 0;
  for (const HeadCache& cache : from.caches) {
    n_partial += (n_tokens - cache.tail_origin) % page_tokens != 0 ? 1 : 0;
  }
  if (reserve_pages < n_partial) return invalid_argument("a fork's reservation is too small");
  if (Status status = pool_->reserve(reserve_pages); !status.ok()) return status;

  Sequence forked = make_sequence(max_tokens);
  if (Status status = memory_->open_tables(child, forked.caches, max_tokens, table_room(from));
      !status.ok()) {
    pool_->unreserve(reserve_pages);
    return status;
  }
  forked.reserved_pages = reserve_pages;
  forked.n_tokens = n_tokens;
  forked.arena = from.arena.fork();
  forked.token_ids_begin = from.token_ids_begin;
  if (config_.keeps_token_ids) {
    forked.token_ids.assign(from.token_ids.begin(),
                            from.token_ids.begin() + (n_tokens - from.token_ids_begin));
  }
  std::vector<KvCopy> copies;
  for (std::size_t table = 0; table < n_tables(); ++table) {
    const HeadCache& source = from.caches[table];
    HeadCache& cache = forked.caches[table];
    cache = source;
    cache.tail_pages.clear();
    cache.tail_data.clear();
    const std::int64_t n_tail = n_tokens - source.tail_origin;
    const auto n_full = static_cast<std::size_t>(n_tail / page_tokens);
    for (std::size_t i = 0; i < n_full; ++i) {
      pool_->add_reference(source.tail_pages[i]);
      cache.tail_pages.push_back(source.tail_pages[i]);
      cache.tail_data.push_back(source.tail_data[i]);
    }
    if (n_tail % page_tokens != 0) {
      add_tail_page(forked, cache);
      copies.push_back({source.tail_data[n_full], cache.tail_data.back(), pool_->page_bytes()});
    }
  }
  memory_->copy(copies);
  memory_->tables_changed(child, TableChange::kAll);
  usage_.add_tokens(n_tokens);
  count_use(forked, 1);
  refresh_heads(sequences_.emplace(child, std::move(forked)).first->second);
  return ok_status();
}

Result<SequencePages> KvStore::grow(SequenceId sequence, std::int64_t granted_tokens,
                                    std::int64_t more_pages, int sinks, int recent) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    return invalid_argument("sequence " + std::to_string(sequence) + " to grow is not open");
  }
  Sequence& grown = found->second;
  if (granted_tokens < grown.granted_tokens || granted_tokens > grown.max_tokens ||
      more_pages < 0) {
    return invalid_argument("sequence " + std::to_string(sequence) + " of " +
                            std::to_string(grown.granted_tokens) + " granted tokens, at most " +
                            std::to_string(grown.max_tokens) + ", cannot grow to " +
                            std::to_string(granted_tokens));
  }
  std::vector<HeadPlan> heads;
  for (const HeadCache& cache : grown.caches) heads.push_back(cache.plan);
  StageBoundary boundary;
  boundary.sinks = sinks;
  boundary.recent = recent;
  boundary.heads = heads;
  const std::int64_t before = std::exchange(grown.granted_tokens, granted_tokens);
  const std::int64_t wanted =
      std::min(grown.reserved_pages + more_pages, future_pages(grown, boundary));
  if (wanted > grown.reserved_pages) {
    if (Status status = pool_->reserve(wanted - grown.reserved_pages); !status.ok()) {
      grown.granted_tokens = before;
      return status;
    }
    grown.reserved_pages = wanted;
  }
  return pages_of(grown);
}

std::int64_t KvStore::pages_to_extend(const Sequence& sequence, std::int64_t n_tokens) const {
  const std::int64_t page_tokens = config_.shape.page_tokens;
  std::int64_t n_pages = 0;
  for (const std::int64_t end : sequence.tail_ends) {
    // Rounded up also where a tail has more than it needs.
    const std::int64_t n_more = n_tokens - end;
    n_pages += (n_more > 0 ? n_more + page_tokens - 1 : n_more) / page_tokens;
  }
  return n_pages;
}

Status KvStore::extend(SequenceId sequence, std::span<const std::int32_t> tokens) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    return invalid_argument("sequence " + std::to_string(sequence) + " is not open");
  }
  Sequence& extended = found->second;
  const auto n_new = static_cast<std::int64_t>(tokens.size());
  if (n_new > extended.granted_tokens - extended.n_tokens) {
    return invalid_argument("sequence " + std::to_string(sequence) + " holds " +
                            std::to_string(extended.n_tokens) + " tokens and at most " +
                            std::to_string(extended.granted_tokens) + ", " + std::to_string(n_new) +
                            " more were asked for");
  }
  const std::int64_t n_tokens = extended.n_tokens + n_new;
  const bool needs_pages = n_tokens > extended.covered_tokens;
  const std::int64_t n_pages = needs_pages ? pages_to_extend(extended, n_tokens) : 0;
  if (n_pages > extended.reserved_pages) {
    return resource_exhausted("sequence " + std::to_string(sequence) + " needs " +
                              std::to_string(n_pages) + " KV pages for " + std::to_string(n_new) +
                              " more tokens and has " + std::to_string(extended.reserved_pages) +
                              " reserved");
  }
  extended.n_tokens = n_tokens;
  usage_.add_tokens(n_new);
  if (config_.keeps_token_ids) {
    extended.token_ids.insert(extended.token_ids.end(), tokens.begin(), tokens.end());
  }
  if (!needs_pages) return ok_status();
  const auto n_heads = static_cast<std::size_t>(config_.shape.n_kv_heads);
  for (std::size_t table = 0; table < n_tables(); ++table) {
    std::uint64_t n_added = 0;
    for (std::int64_t end = extended.tail_ends[table]; end < n_tokens;
         end += config_.shape.page_tokens) {
      add_tail_page(extended, extended.caches[table]);
      ++n_added;
    }
    if (n_added == 0) continue;
    refresh_pages(extended, table);
    usage_.add_tail(table / n_heads, extended.caches[table], n_added * pool_->page_bytes());
  }
  refresh_covered(extended);
  memory_->tables_changed(sequence, TableChange::kPages);
  return ok_status();
}

std::int64_t KvStore::length(SequenceId sequence) const {
  const auto found = sequences_.find(sequence);
  return found == sequences_.end() ? 0 : found->second.n_tokens;
}

std::int64_t KvStore::compressed_length(SequenceId sequence) const {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) return 0;
  std::int64_t length = 0;
  for (const HeadCache& cache : found->second.caches) length = std::max(length, cache.tail_first);
  return length;
}

const KvStore::Sequence& KvStore::find_open(SequenceId sequence, int layer) const {
  const auto found = sequences_.find(sequence);
  CHECK(found != sequences_.end(), "page tables of a sequence that is not open");
  CHECK(layer >= 0 && layer < config_.n_layers, "page tables of a layer of another stage");
  return found->second;
}

std::span<const kernels::KvHeadPages> KvStore::heads(SequenceId sequence, int layer) const {
  const auto n_heads = static_cast<std::size_t>(config_.shape.n_kv_heads);
  return std::span(find_open(sequence, layer).heads)
      .subspan(static_cast<std::size_t>(layer) * n_heads, n_heads);
}

std::span<const kernels::KvWritableHeadPages> KvStore::writable_heads(SequenceId sequence,
                                                                      int layer) const {
  const auto n_heads = static_cast<std::size_t>(config_.shape.n_kv_heads);
  return std::span(find_open(sequence, layer).writable_heads)
      .subspan(static_cast<std::size_t>(layer) * n_heads, n_heads);
}

const HeadCache& KvStore::head_cache(SequenceId sequence, int layer, int kv_head) const {
  return find_open(sequence, layer)
      .caches[static_cast<std::size_t>(layer * config_.shape.n_kv_heads + kv_head)];
}

Result<FreedBytes> KvStore::free(SequenceId sequence) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    return not_found("sequence " + std::to_string(sequence) + " is not open");
  }
  Sequence& freed = found->second;
  FreedBytes bytes;
  bytes.full_bytes = full_bytes(config_.shape, config_.n_layers, freed.n_tokens);
  bytes.layer_kept_bytes.resize(static_cast<std::size_t>(config_.n_layers));
  std::uint64_t n_pages = static_cast<std::uint64_t>(freed.arena.n_pages());
  for (std::size_t table = 0; table < n_tables(); ++table) {
    const HeadCache& cache = freed.caches[table];
    n_pages += cache.tail_pages.size();
    bytes.layer_kept_bytes[table / static_cast<std::size_t>(config_.shape.n_kv_heads)] +=
        head_bytes(cache);
    for (const PageId page : cache.tail_pages) pool_->release(page);
  }
  count_use(freed, -1);
  usage_.add_tokens(-freed.n_tokens);
  bytes.kept_bytes = n_pages * pool_->page_bytes();
  freed.arena.clear();
  pool_->unreserve(freed.reserved_pages);
  memory_->close_tables(sequence);
  sequences_.erase(found);
  CHECK(pool_->n_free() + pool_->n_used() == pool_->n_pages(), "free + used = total");
  return bytes;
}

kernels::KvPageLayout KvStore::page_layout() const {
  kernels::KvPageLayout layout;
  layout.head_dim = config_.shape.head_dim;
  layout.page_tokens = config_.shape.page_tokens;
  layout.dtype = config_.shape.dtype;
  return layout;
}

KvStats KvStore::stats() const {
  const std::uint64_t page_bytes = pool_->page_bytes();
  KvStats stats;
  stats.capacity_bytes = static_cast<std::uint64_t>(pool_->n_pages()) * page_bytes;
  stats.used_bytes = static_cast<std::uint64_t>(pool_->n_used()) * page_bytes;
  stats.peak_bytes = static_cast<std::uint64_t>(pool_->peak_used()) * page_bytes;
  for (std::size_t layer = 0; layer < static_cast<std::size_t>(config_.n_layers); ++layer) {
    stats.layer_used_bytes.push_back(usage_.used_bytes(layer));
  }
  return stats;
}

KvUse KvStore::use() const {
  KvUse use = usage_.report();
  use.layer_full_bytes = full_bytes(config_.shape, 1, use.logical_tokens);
  return use;
}

void KvStore::check_invariants() const {
  pool_->check_invariants();
  std::unordered_set<PageId> pages;
  std::int64_t reserved = 0;
  KvUsage usage(config_.n_layers, config_.shape.n_kv_heads);
  for (const auto& [id, sequence] : sequences_) {
    reserved += sequence.reserved_pages;
    CHECK(pages_to_extend(sequence, sequence.n_tokens) == 0, "pages of a tail = its tokens' pages");
    CHECK(pages_to_extend(sequence, std::max(sequence.n_tokens, sequence.covered_tokens)) == 0,
          "every tail has pages for the covered tokens");
    for (std::size_t table = 0; table < n_tables(); ++table) {
      const HeadCache& cache = sequence.caches[table];
      const auto n_tail_pages = static_cast<std::int64_t>(cache.tail_pages.size());
      CHECK(
          sequence.tail_ends[table] == cache.tail_origin + n_tail_pages * config_.shape.page_tokens,
          "a tail ends where its pages do");
    }
    std::uint64_t live_bytes = 0;
    for (const HeadCache& cache : sequence.caches) {
      pages.insert(cache.tail_pages.begin(), cache.tail_pages.end());
      live_bytes += cache.piece_bytes;
      const FormBytes forms = form_bytes(cache);
      CHECK(cache.form_bytes == forms, "forms of a head's pieces");
      CHECK(cache.piece_bytes == std::accumulate(forms.begin(), forms.end(), std::uint64_t{0}),
            "bytes of a head's pieces");
      BlockCounts counts;
      for (const kernels::KvBlock& block : cache.blocks) counts.count(block, 1);
      CHECK(cache.counts == counts, "counts of a head's blocks");
    }
    for (std::size_t table = 0; table < n_tables(); ++table) {
      const HeadCache& cache = sequence.caches[table];
      usage.add(table / static_cast<std::size_t>(config_.shape.n_kv_heads), cache,
                tail_bytes(cache));
    }
    usage.add_tokens(sequence.n_tokens);
    CHECK(live_bytes == sequence.arena.live_bytes(), "pieces of the heads = bytes in the arena");
    std::vector<PageId> arena_pages;
    sequence.arena.append_pages(arena_pages);
    pages.insert(arena_pages.begin(), arena_pages.end());
  }
  CHECK(usage == usage_, "sums of the layers = those of their heads");
  CHECK(reserved == pool_->n_reserved(), "reservations of sequences = reserved pages");
  CHECK(static_cast<std::int64_t>(pages.size()) == pool_->n_used(), "pages in tables = used");
}

}  // namespace spindle::kvstore
