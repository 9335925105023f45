#include "kvstore/kv_store.h"

#include <cstring>
#include <string>
#include <utility>

namespace spindle::kvstore {

Result<std::unique_ptr<KvStore>> KvStore::create(const KvStoreConfig& config) {
  CHECK(config.n_layers > 0 && config.shape.n_kv_heads > 0 && config.shape.head_dim > 0 &&
            config.shape.page_tokens > 0,
        "the KV shape comes from a validated model");
  auto pool = PagePool::create(config.budget_bytes, config.shape.page_bytes());
  if (!pool.ok()) return pool.status();
  return std::unique_ptr<KvStore>(new KvStore(config, std::move(*pool)));
}

KvStore::KvStore(const KvStoreConfig& config, std::unique_ptr<PagePool> pool)
    : config_(config),
      pool_(std::move(pool)),
      layer_pages_(static_cast<std::size_t>(config.n_layers)) {}

std::size_t KvStore::n_tables() const {
  return static_cast<std::size_t>(config_.n_layers) *
         static_cast<std::size_t>(config_.shape.n_kv_heads);
}

KvStore::Sequence KvStore::make_sequence(std::int64_t max_tokens) const {
  Sequence sequence;
  sequence.max_tokens = max_tokens;
  sequence.pages.resize(n_tables());
  sequence.page_data.resize(n_tables());
  sequence.heads.resize(n_tables());
  sequence.writable_heads.resize(n_tables());
  return sequence;
}

void KvStore::append_page(Sequence& sequence, std::size_t table, PageId page) {
  sequence.pages[table].push_back(page);
  sequence.page_data[table].push_back(pool_->data(page));
}

void KvStore::refresh_heads(Sequence& sequence) {
  for (std::size_t i = 0; i < n_tables(); ++i) {
    sequence.heads[i].pages = sequence.page_data[i].data();
    sequence.writable_heads[i].pages = sequence.page_data[i].data();
  }
}

Status KvStore::open(SequenceId sequence, std::int64_t max_tokens) {
  if (max_tokens <= 0) return invalid_argument("a sequence must hold at least one token");
  if (sequences_.contains(sequence)) {
    return invalid_argument("sequence " + std::to_string(sequence) + " is open already");
  }
  const std::int64_t n_pages = stage_pages(config_.shape, config_.n_layers, max_tokens);
  if (Status status = pool_->reserve(n_pages); !status.ok()) return status;
  Sequence opened = make_sequence(max_tokens);
  opened.reserved_pages = n_pages;
  sequences_.emplace(sequence, std::move(opened));
  return ok_status();
}

Status KvStore::fork(SequenceId parent, SequenceId child, std::int64_t n_tokens,
                     std::int64_t max_tokens) {
  const auto found = sequences_.find(parent);
  if (found == sequences_.end()) {
    return invalid_argument("sequence " + std::to_string(parent) + " to fork is not open");
  }
  if (sequences_.contains(child)) {
    return invalid_argument("sequence " + std::to_string(child) + " is open already");
  }
  if (n_tokens < 0 || n_tokens > found->second.n_tokens || max_tokens < n_tokens ||
      max_tokens <= 0) {
    return invalid_argument("a fork at token " + std::to_string(n_tokens) + " of " +
                            std::to_string(found->second.n_tokens) + " for at most " +
                            std::to_string(max_tokens));
  }
  const std::int64_t reserve = stage_pages(config_.shape, config_.n_layers, max_tokens) -
                               shared_stage_pages(config_.shape, config_.n_layers, n_tokens);
  if (Status status = pool_->reserve(reserve); !status.ok()) return status;

  Sequence forked = make_sequence(max_tokens);
  forked.reserved_pages = reserve;
  forked.n_tokens = n_tokens;
  const auto n_full = static_cast<std::size_t>(n_tokens / config_.shape.page_tokens);
  const bool has_partial = n_tokens % config_.shape.page_tokens != 0;
  for (std::size_t table = 0; table < n_tables(); ++table) {
    const std::vector<PageId>& from = found->second.pages[table];
    for (std::size_t i = 0; i < n_full; ++i) {
      pool_->add_reference(from[i]);
      append_page(forked, table, from[i]);
    }
    if (has_partial) {
      const PageId page = pool_->allocate();
      --forked.reserved_pages;
      ++layer_pages_[table / static_cast<std::size_t>(config_.shape.n_kv_heads)];
      std::memcpy(pool_->data(page), pool_->data(from[n_full]), pool_->page_bytes());
      append_page(forked, table, page);
    }
  }
  refresh_heads(forked);
  sequences_.emplace(child, std::move(forked));
  return ok_status();
}

Status KvStore::extend(SequenceId sequence, std::int64_t n_new) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    return invalid_argument("sequence " + std::to_string(sequence) + " is not open");
  }
  Sequence& extended = found->second;
  if (n_new < 0 || n_new > extended.max_tokens - extended.n_tokens) {
    return invalid_argument("sequence " + std::to_string(sequence) + " holds " +
                            std::to_string(extended.n_tokens) + " tokens and at most " +
                            std::to_string(extended.max_tokens) + ", " + std::to_string(n_new) +
                            " more were asked for");
  }
  extended.n_tokens += n_new;
  const auto n_pages =
      static_cast<std::size_t>(pages_for_tokens(extended.n_tokens, config_.shape.page_tokens));
  for (std::size_t table = 0; table < n_tables(); ++table) {
    while (extended.pages[table].size() < n_pages) {
      append_page(extended, table, pool_->allocate());
      --extended.reserved_pages;
      ++layer_pages_[table / static_cast<std::size_t>(config_.shape.n_kv_heads)];
    }
  }
  refresh_heads(extended);
  return ok_status();
}

std::int64_t KvStore::length(SequenceId sequence) const {
  const auto found = sequences_.find(sequence);
  return found == sequences_.end() ? 0 : found->second.n_tokens;
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

Result<FreedBytes> KvStore::free(SequenceId sequence) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    return not_found("sequence " + std::to_string(sequence) + " is not open");
  }
  Sequence& freed = found->second;
  FreedBytes bytes;
  bytes.full_bytes = full_bytes(config_.shape, config_.n_layers, freed.n_tokens);
  for (std::size_t table = 0; table < n_tables(); ++table) {
    bytes.kept_bytes += freed.pages[table].size() * pool_->page_bytes();
    for (const PageId page : freed.pages[table]) {
      if (pool_->release(page)) {
        --layer_pages_[table / static_cast<std::size_t>(config_.shape.n_kv_heads)];
      }
    }
  }
  pool_->unreserve(freed.reserved_pages);
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
  for (const std::int64_t pages : layer_pages_) {
    stats.layer_used_bytes.push_back(static_cast<std::uint64_t>(pages) * page_bytes);
  }
  return stats;
}

void KvStore::check_invariants() const {
  pool_->check_invariants();
  std::unordered_map<PageId, std::size_t> layer_of;  // every distinct page, and its layer
  std::int64_t reserved = 0;
  for (const auto& [id, sequence] : sequences_) {
    reserved += sequence.reserved_pages;
    const auto n_pages =
        static_cast<std::size_t>(pages_for_tokens(sequence.n_tokens, config_.shape.page_tokens));
    for (std::size_t table = 0; table < n_tables(); ++table) {
      CHECK(sequence.pages[table].size() == n_pages, "pages = ceil(tokens / page_tokens)");
      for (const PageId page : sequence.pages[table]) {
        layer_of.emplace(page, table / static_cast<std::size_t>(config_.shape.n_kv_heads));
      }
    }
  }
  CHECK(reserved == pool_->n_reserved(), "reservations of sequences = reserved pages");
  CHECK(static_cast<std::int64_t>(layer_of.size()) == pool_->n_used(), "pages in tables = used");
  std::vector<std::int64_t> per_layer(layer_pages_.size());
  for (const auto& [page, layer] : layer_of) ++per_layer[layer];
  CHECK(per_layer == layer_pages_, "pages per layer");
}

}  // namespace spindle::kvstore
