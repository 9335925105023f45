#pragma once
// Rank 0's book of the KV pages that every stage has promised. A request is admitted only when what
// it may take fits on every stage; the figures shrink to what the stages report at boundaries. A
// sequence that is admitted therefore never runs out of KV.
//
// Invariant: what is committed on a stage is at least what the stage's sequences hold and have
// reserved, whenever a plan has been carried out.
// Thread-safety: none; owned by the scheduler.

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "kvstore/plan/kv_demand.h"

namespace spindle::coordinator {

using kvstore::KvDemand;

struct StageCapacity {
  int n_layers = 0;
  std::int64_t n_pages = 0;
};

class KvLedger {
 public:
  KvLedger(const kvstore::KvShape& shape, std::vector<StageCapacity> stages);

  // Whether the request would fit if it were alone.
  bool fits_alone(const KvDemand& demand) const;
  // Whether it fits now, once `given_back` pages (by stage, or empty) are.
  bool fits(const KvDemand& demand, const std::vector<std::int64_t>& given_back = {}) const;
  // The same for pages [n_stages].
  bool fits(const std::vector<std::int64_t>& pages,
            const std::vector<std::int64_t>& given_back) const;
  std::vector<std::int64_t> total_pages(const KvDemand& demand) const;
  // Commits the pages of the request's first choice and, for the others, what they add. The kept
  // sequence that it continues (0: none) stays committed until the request ends, even when it is
  // released before. Answers false and changes nothing when a stage has too few.
  bool try_commit(std::uint64_t request, const KvDemand& demand, std::uint64_t continued = 0);
  // What the request takes when it is admitted, over all stages.
  std::uint64_t total_bytes(const KvDemand& demand) const;
  // What a choice may take on a stage, for its reservation there: the first choice's pages, or a
  // fork's beyond those it shares.
  std::int64_t reserve_pages(const KvDemand& demand, std::size_t stage, bool is_fork) const;

  // Adds pages [n_stages] to the only choice of a request. Answers false and changes nothing when a
  // stage has too few.
  bool try_grow(std::uint64_t request, const std::vector<std::int64_t>& pages);
  // What a request that was admitted has on each stage, a kept sequence that it continues excluded.
  std::vector<std::int64_t> pages_of(std::uint64_t request) const;

  // A stage reported, at a boundary, what the request's choice holds and may still take.
  void update_choice(std::uint64_t request, std::int32_t choice, std::size_t stage,
                     std::int64_t pages, bool in_prompt);
  // One of the request's choices ended; the last one also gives back what all share.
  void release_choice(std::uint64_t request, std::int32_t choice);

  // The request's first choice, the last of them to end, becomes a kept sequence of that id.
  void keep(std::uint64_t request, std::uint64_t sequence);
  std::vector<std::int64_t> kept_pages(std::uint64_t sequence) const;
  // What release_kept would give back at once: nothing while a running request continues it.
  std::vector<std::int64_t> releasable_pages(std::uint64_t sequence) const;
  void release_kept(std::uint64_t sequence);

  std::int64_t committed_pages(std::size_t stage) const { return committed_[stage]; }
  const std::vector<StageCapacity>& stages() const { return stages_; }
  const kvstore::KvShape& shape() const { return shape_; }

 private:
  struct Commitment {
    std::vector<std::int64_t> shared;            // [n_stages], until the last choice ends
    std::vector<std::vector<std::int64_t>> own;  // [n_choices][n_stages]
    // [n_stages]: what the first choice holds and may take, pages that others share included.
    std::vector<std::int64_t> first;
    int choices_left = 0;
    std::uint64_t continued = 0;
  };
  struct Kept {
    std::vector<std::int64_t> pages;  // [n_stages]
    int n_users = 0;                  // requests that continue it
    bool is_released = false;
  };

  std::int64_t total_pages(const KvDemand& demand, std::size_t stage) const;
  void add(std::size_t stage, std::int64_t pages);
  void leave_continued(std::uint64_t sequence);

  kvstore::KvShape shape_;
  std::vector<StageCapacity> stages_;
  std::vector<std::int64_t> committed_;  // [n_stages]
  std::unordered_map<std::uint64_t, Commitment> commitments_;
  std::unordered_map<std::uint64_t, Kept> kept_;
};

}  // namespace spindle::coordinator
