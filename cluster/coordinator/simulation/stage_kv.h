#pragma once
// What a stage's sequences hold, counted in pages: the rules of kvstore/kv_store.h without keys and
// values. Every (layer, KV head) has a tail of pages; at a boundary tokens leave it as the head's
// plan says, and what stays of them is counted in bytes, packed into pages of the sequence's own.
// Sizes are those of kvstore/plan/kv_bytes.cc. Forks share full pages and all compressed ones.
//
// It is stricter than a store: every call that the control protocol rules out is an error.
//
// Invariant (check()): the sequences' distinct pages are the pages used, and their reservations
// sum to those of the book.
// Thread-safety: none.

#include <cstdint>
#include <vector>

#include "cluster/coordinator/simulation/page_book.h"
#include "cluster/coordinator/simulation/sequence_table.h"
#include "kernels/core/status.h"
#include "kvstore/plan/kv_plan.h"
#include "kvstore/plan/kv_shape.h"
#include "proto/control.pb.h"

namespace spindle::coordinator::simulation {

struct StageKvConfig {
  kvstore::KvShape shape;
  kvstore::KvModel model;  // the whole one
  int first_layer = 0;
  int n_layers = 0;
  std::int64_t n_pages = 0;
};

class StageKv {
 public:
  explicit StageKv(const StageKvConfig& config) : config_(config), book_(config.n_pages) {}

  // INVALID_ARGUMENT for an id that is open or unknown, or lengths that make no sense;
  // RESOURCE_EXHAUSTED when pages are missing. Nothing is promised about the state after an error:
  // it ends the run.
  // granted_tokens: how many it may hold until it grows; 0: max_tokens.
  Status open(std::uint64_t sequence, std::int64_t max_tokens, std::int64_t reserve_pages,
              std::int64_t granted_tokens = 0);
  Status fork(std::uint64_t parent, std::uint64_t child, std::int64_t n_tokens,
              std::int64_t max_tokens, std::int64_t reserve_pages);
  // Adds to `n_pages` what the sequence holds afterwards.
  Status extend(std::uint64_t sequence, std::int64_t n_tokens, std::int64_t& n_pages);
  // Grants a sequence more tokens, and reserves what it will need of the pages for them.
  Status grow(const control::GrowSequence& order, std::int64_t more_pages,
              control::GrownSequence& report);
  // Carries out a boundary and fills in the report.
  Status compress(const control::Compress& order, control::CompressedSequence& report);
  Status free(std::uint64_t sequence, control::FreedSequence& report);

  // Pages of an open sequence, shared ones included; 0 for an unknown one.
  std::int64_t n_pages(std::uint64_t sequence) const;
  std::int64_t length(std::uint64_t sequence) const;
  // Where the first token of the oldest tail lies.
  std::int64_t tail_begin(std::uint64_t sequence) const;
  std::size_t n_sequences() const { return sequences_.n_open(); }
  const PageBook& book() const { return book_; }
  const StageKvConfig& config() const { return config_; }
  int n_tables() const { return config_.n_layers * config_.shape.n_kv_heads; }

  // INTERNAL, saying how, when the invariant does not hold. Walks everything.
  Status check() const;
  // For faults: a page that is used and nobody's.
  Status leak_page();

 private:
  struct Head {
    kvstore::HeadPlan plan;
    std::vector<PageNumber> tail;
    std::int64_t tail_origin = 0;  // position of the tail's first token
    std::int64_t n_body = 0;       // tokens outside the tail
    std::int64_t body_bytes = 0;
  };
  struct Sequence {
    std::int64_t n_tokens = 0;
    std::int64_t max_tokens = 0;
    std::int64_t granted_tokens = 0;  // so far
    std::int64_t n_reserved = 0;
    std::int64_t n_pages = 0;  // in all the lists below
    std::int64_t compressed_at = 0;
    std::int64_t covered = 0;        // tokens that every tail has a page for
    std::vector<Head> heads;         // [n_tables]
    std::vector<PageNumber> shared;  // compressed pages of what it forked from
    std::vector<PageNumber> packed;  // and its own
    std::int64_t packed_bytes = 0;
  };
  // What a boundary does to a head.
  struct Move {
    std::int64_t tail_origin = 0;
    std::int64_t n_body = 0;
    std::int64_t body_bytes = 0;
  };

  Status take(Sequence& sequence, std::vector<PageNumber>& pages);
  void give_back(Sequence& sequence, PageNumber page);
  Move move_head(const Head& head, const kvstore::HeadPlan& plan, const Sequence& sequence,
                 const control::Compress& order) const;
  Status pack(Sequence& sequence);
  std::int64_t future_pages(const Sequence& sequence, const control::Compress& order) const;
  std::int64_t future_tail(const Sequence& sequence, const Head& head,
                           const control::Compress& order) const;
  std::int64_t future_bytes(const Sequence& sequence, const Head& head,
                            const control::Compress& order) const;
  std::int64_t pages_for(std::int64_t n_tokens) const {
    return kvstore::pages_for_tokens(n_tokens, config_.shape.page_tokens);
  }
  std::int64_t covered_tokens(const Sequence& sequence) const;

  StageKvConfig config_;
  PageBook book_;
  SequenceTable<Sequence> sequences_;
};

}  // namespace spindle::coordinator::simulation
