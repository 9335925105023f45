#include "cluster/coordinator/kv_ledger.h"

#include <algorithm>
#include <utility>

#include "kernels/core/check.h"

namespace spindle::coordinator {

KvLedger::KvLedger(const kvstore::KvShape& shape, std::vector<StageCapacity> stages)
    : shape_(shape), stages_(std::move(stages)), committed_(stages_.size()) {}

std::int64_t KvLedger::reserve_pages(const KvDemand& demand, std::size_t stage,
                                     bool is_fork) const {
  return kvstore::reserve_pages(shape_, stages_[stage].n_layers, demand, is_fork);
}

std::int64_t KvLedger::total_pages(const KvDemand& demand, std::size_t stage) const {
  return reserve_pages(demand, stage, false) +
         (demand.n_choices - 1) * reserve_pages(demand, stage, true);
}

bool KvLedger::fits_alone(const KvDemand& demand) const {
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    if (total_pages(demand, s) > stages_[s].n_pages) return false;
  }
  return true;
}

std::vector<std::int64_t> KvLedger::total_pages(const KvDemand& demand) const {
  std::vector<std::int64_t> pages;
  for (std::size_t s = 0; s < stages_.size(); ++s) pages.push_back(total_pages(demand, s));
  return pages;
}

bool KvLedger::fits(const KvDemand& demand, const std::vector<std::int64_t>& given_back) const {
  return fits(total_pages(demand), given_back);
}

bool KvLedger::fits(const std::vector<std::int64_t>& pages,
                    const std::vector<std::int64_t>& given_back) const {
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    const std::int64_t back = given_back.empty() ? 0 : given_back[s];
    if (committed_[s] - back + pages[s] > stages_[s].n_pages) return false;
  }
  return true;
}

std::uint64_t KvLedger::total_bytes(const KvDemand& demand) const {
  std::uint64_t bytes = 0;
  for (const std::int64_t pages : total_pages(demand)) {
    bytes += static_cast<std::uint64_t>(pages) * shape_.page_bytes();
  }
  return bytes;
}

void KvLedger::add(std::size_t stage, std::int64_t pages) {
  committed_[stage] += pages;
  CHECK(committed_[stage] >= 0, "committed pages cannot be negative");
}

bool KvLedger::try_commit(std::uint64_t request, const KvDemand& demand, std::uint64_t continued) {
  CHECK(!commitments_.contains(request), "a request commits once");
  if (!fits(demand)) return false;
  Commitment commitment;
  commitment.choices_left = demand.n_choices;
  commitment.continued = continued;
  commitment.own.resize(static_cast<std::size_t>(demand.n_choices));
  const std::vector<std::int64_t> base = kept_pages(continued);
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    const int n_layers = stages_[s].n_layers;
    const std::int64_t first = reserve_pages(demand, s, false);
    // Choices share the prompt's full pages; where tokens leave the tails, all that the first one
    // has when they fork, and what it draws until then is not told apart from the rest.
    std::int64_t shared = demand.n_choices > 1 ? first : 0;
    if (!demand.compresses) {
      shared = kvstore::shared_stage_pages(shape_, n_layers, demand.prompt_tokens) -
               kvstore::shared_stage_pages(shape_, n_layers, demand.cached_tokens);
    }
    commitment.shared.push_back(shared);
    commitment.own[0].push_back(first - shared);
    for (std::size_t c = 1; c < commitment.own.size(); ++c) {
      commitment.own[c].push_back(reserve_pages(demand, s, true));
    }
    commitment.first.push_back(demand.compresses
                                   ? first + (base.empty() ? 0 : base[s])
                                   : kvstore::stage_pages(shape_, n_layers, demand.max_tokens));
    add(s, total_pages(demand, s));
  }
  commitments_.emplace(request, std::move(commitment));
  if (continued != 0) {
    const auto kept = kept_.find(continued);
    CHECK(kept != kept_.end() && !kept->second.is_released, "a kept sequence is continued");
    ++kept->second.n_users;
  }
  return true;
}

bool KvLedger::try_grow(std::uint64_t request, const std::vector<std::int64_t>& pages) {
  const auto found = commitments_.find(request);
  CHECK(found != commitments_.end() && found->second.own.size() == 1 &&
            pages.size() == stages_.size(),
        "a request of one choice grows");
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    if (committed_[s] + pages[s] > stages_[s].n_pages) return false;
  }
  Commitment& commitment = found->second;
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    commitment.own[0][s] += pages[s];
    commitment.first[s] += pages[s];
    add(s, pages[s]);
  }
  return true;
}

std::vector<std::int64_t> KvLedger::pages_of(std::uint64_t request) const {
  const auto found = commitments_.find(request);
  CHECK(found != commitments_.end(), "a request that runs is asked for");
  std::vector<std::int64_t> pages = found->second.shared;
  for (const std::vector<std::int64_t>& own : found->second.own) {
    for (std::size_t s = 0; s < own.size(); ++s) pages[s] += own[s];
  }
  return pages;
}

void KvLedger::update_choice(std::uint64_t request, std::int32_t choice, std::size_t stage,
                             std::int64_t pages, bool in_prompt) {
  const auto found = commitments_.find(request);
  if (found == commitments_.end()) return;
  Commitment& commitment = found->second;
  const auto lower = [&](std::int64_t& committed) {
    const std::int64_t lowered = std::min(committed, pages);
    add(stage, lowered - committed);
    committed = lowered;
  };
  if (choice == 0) commitment.first[stage] = std::min(commitment.first[stage], pages);
  // What the others share of the first choice is all in its figure until the prompt ends, and stays
  // when the first choice lets go of it.
  if (choice == 0 && commitment.own.size() > 1) {
    if (in_prompt) lower(commitment.shared[stage]);
    return;
  }
  auto& own = commitment.own[static_cast<std::size_t>(choice)];
  if (!own.empty()) lower(own[stage]);  // else it ended
}

void KvLedger::release_choice(std::uint64_t request, std::int32_t choice) {
  const auto found = commitments_.find(request);
  CHECK(found != commitments_.end(), "a release without a commitment");
  Commitment& commitment = found->second;
  auto& own = commitment.own[static_cast<std::size_t>(choice)];
  CHECK(!own.empty(), "a choice is released once");
  const bool is_last = --commitment.choices_left == 0;
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    add(s, -own[s] - (is_last ? commitment.shared[s] : 0));
  }
  own.clear();
  if (!is_last) return;
  const std::uint64_t continued = commitment.continued;
  commitments_.erase(found);
  leave_continued(continued);
}

void KvLedger::keep(std::uint64_t request, std::uint64_t sequence) {
  const auto found = commitments_.find(request);
  CHECK(found != commitments_.end() && found->second.choices_left == 1 &&
            !found->second.own[0].empty(),
        "the last choice of a request is kept");
  const Commitment& commitment = found->second;
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    add(s, commitment.first[s] - commitment.own[0][s] - commitment.shared[s]);
  }
  const std::uint64_t continued = commitment.continued;
  kept_[sequence].pages = commitment.first;
  commitments_.erase(found);
  leave_continued(continued);
}

std::vector<std::int64_t> KvLedger::kept_pages(std::uint64_t sequence) const {
  const auto found = kept_.find(sequence);
  return found == kept_.end() ? std::vector<std::int64_t>() : found->second.pages;
}

std::vector<std::int64_t> KvLedger::releasable_pages(std::uint64_t sequence) const {
  const auto found = kept_.find(sequence);
  if (found == kept_.end() || found->second.n_users > 0) return {};
  return found->second.pages;
}

void KvLedger::release_kept(std::uint64_t sequence) {
  const auto found = kept_.find(sequence);
  CHECK(found != kept_.end() && !found->second.is_released, "a kept sequence is released once");
  found->second.is_released = true;
  if (found->second.n_users > 0) return;
  for (std::size_t s = 0; s < stages_.size(); ++s) add(s, -found->second.pages[s]);
  kept_.erase(found);
}

void KvLedger::leave_continued(std::uint64_t sequence) {
  const auto found = kept_.find(sequence);
  if (found == kept_.end() || --found->second.n_users > 0 || !found->second.is_released) return;
  for (std::size_t s = 0; s < stages_.size(); ++s) add(s, -found->second.pages[s]);
  kept_.erase(found);
}

}  // namespace spindle::coordinator
