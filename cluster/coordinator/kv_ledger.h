#pragma once
// Rank 0's book of the KV pages that every stage has promised. A request is admitted only when its
// longest form fits on every stage, by the same arithmetic the stages reserve with (kvstore/plan),
// so an admitted request cannot run out of KV.
//
// Thread-safety: none; owned by the scheduler.

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "kvstore/plan/kv_shape.h"

namespace spindle::coordinator {

struct StageCapacity {
  int n_layers = 0;
  std::int64_t n_pages = 0;
};

struct KvDemand {
  std::int64_t prompt_tokens = 0;
  std::int64_t max_tokens = 0;  // of one choice's cache, prompt included
  int n_choices = 1;            // all but the first share the prompt's full pages
};

class KvLedger {
 public:
  KvLedger(const kvstore::KvShape& shape, std::vector<StageCapacity> stages);

  // Whether the request would fit if it were alone.
  bool fits_alone(const KvDemand& demand) const;
  // Commits the request's pages on every stage, or changes nothing and returns false.
  bool try_commit(std::uint64_t request, const KvDemand& demand);
  // One of the request's choices ended; the last one also gives back the shared prompt.
  void release_choice(std::uint64_t request);

  std::int64_t committed_pages(std::size_t stage) const { return committed_[stage]; }
  const std::vector<StageCapacity>& stages() const { return stages_; }

 private:
  struct Commitment {
    KvDemand demand;
    int choices_left = 0;
  };

  // Pages of one choice alone, and of the full prompt pages that all choices share.
  std::int64_t choice_pages(const KvDemand& demand, std::size_t stage) const;
  std::int64_t prompt_pages(const KvDemand& demand, std::size_t stage) const;
  std::int64_t total_pages(const KvDemand& demand, std::size_t stage) const;

  kvstore::KvShape shape_;
  std::vector<StageCapacity> stages_;
  std::vector<std::int64_t> committed_;  // [n_stages]
  std::unordered_map<std::uint64_t, Commitment> commitments_;
};

}  // namespace spindle::coordinator
