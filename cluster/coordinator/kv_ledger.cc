#include "cluster/coordinator/kv_ledger.h"

#include <utility>

#include "kernels/core/check.h"

namespace spindle::coordinator {

KvLedger::KvLedger(const kvstore::KvShape& shape, std::vector<StageCapacity> stages)
    : shape_(shape), stages_(std::move(stages)), committed_(stages_.size()) {}

std::int64_t KvLedger::prompt_pages(const KvDemand& demand, std::size_t stage) const {
  return kvstore::shared_stage_pages(shape_, stages_[stage].n_layers, demand.prompt_tokens);
}

std::int64_t KvLedger::choice_pages(const KvDemand& demand, std::size_t stage) const {
  return kvstore::stage_pages(shape_, stages_[stage].n_layers, demand.max_tokens) -
         prompt_pages(demand, stage);
}

std::int64_t KvLedger::total_pages(const KvDemand& demand, std::size_t stage) const {
  return prompt_pages(demand, stage) + demand.n_choices * choice_pages(demand, stage);
}

bool KvLedger::fits_alone(const KvDemand& demand) const {
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    if (total_pages(demand, s) > stages_[s].n_pages) return false;
  }
  return true;
}

bool KvLedger::try_commit(std::uint64_t request, const KvDemand& demand) {
  CHECK(!commitments_.contains(request), "a request commits once");
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    if (committed_[s] + total_pages(demand, s) > stages_[s].n_pages) return false;
  }
  for (std::size_t s = 0; s < stages_.size(); ++s) committed_[s] += total_pages(demand, s);
  commitments_.emplace(request, Commitment{demand, demand.n_choices});
  return true;
}

void KvLedger::release_choice(std::uint64_t request) {
  const auto found = commitments_.find(request);
  CHECK(found != commitments_.end(), "a release without a commitment");
  const KvDemand& demand = found->second.demand;
  const bool is_last = --found->second.choices_left == 0;
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    committed_[s] -= choice_pages(demand, s) + (is_last ? prompt_pages(demand, s) : 0);
    CHECK(committed_[s] >= 0, "committed pages cannot be negative");
  }
  if (is_last) commitments_.erase(found);
}

}  // namespace spindle::coordinator
