// One threshold over the histograms of several heads, spent in whole blocks.

#include <algorithm>
#include <numeric>

#include "kvstore/plan/plan_frame.h"

namespace spindle::kvstore {
namespace {

constexpr std::int64_t kBlock = kernels::kKvBlockTokens;

class GlobalFill {
 public:
  GlobalFill(const PlanFrame& frame, std::span<const std::size_t> heads,
             std::vector<HeadPlan>& plan)
      : frame_(frame), heads_(heads), plan_(plan), window_(frame.window_in_body()) {
    for (const std::size_t head : heads) {
      codecs_.push_back(plan[head].codec);
      if (!frame.report.histograms.empty()) {
        histograms_.push_back(&frame.report.histograms[head]);
      }
    }
  }

  void run(std::uint64_t budget) {
    std::vector<std::int64_t> keep(heads_.size(), 0);
    if (!histograms_.empty() && cost(keep) <= budget) {
      const kernels::GlobalCounts ranks(histograms_);
      const auto counts = [&](std::int64_t k) {
        std::vector<std::int64_t> kept = ranks.at(k);
        for (std::int64_t& n : kept) n = std::min(n, frame_.n_candidates());
        return kept;
      };
      const std::int64_t most = static_cast<std::int64_t>(heads_.size()) * frame_.n_candidates();
      // The most tokens whose full blocks fit; 0 does.
      std::int64_t fits = 0;
      std::int64_t too_many = most + 1;
      while (fits + 1 < too_many) {
        const std::int64_t k = std::midpoint(fits, too_many);
        (cost(whole_blocks(counts(k))) <= budget ? fits : too_many) = k;
      }
      const std::vector<std::int64_t> chosen = counts(fits);
      keep = whole_blocks(chosen);
      spend_rest(chosen, budget, keep);
    }
    for (std::size_t i = 0; i < heads_.size(); ++i) plan_[heads_[i]] = planned(i, keep[i]);
  }

 private:
  HeadPlan planned(std::size_t i, std::int64_t n_keep) const {
    return frame_.evict(codecs_[i], n_keep);
  }
  std::uint64_t head_cost(std::size_t i, std::int64_t n_keep) const {
    return frame_.cost(heads_[i], planned(i, n_keep));
  }
  std::uint64_t cost(const std::vector<std::int64_t>& keep) const {
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < keep.size(); ++i) bytes += head_cost(i, keep[i]);
    return bytes;
  }
  // Kept tokens share their blocks with the part of the window that is encoded.
  std::int64_t in_blocks(std::int64_t n_blocks) const {
    return std::clamp<std::int64_t>(n_blocks * kBlock - window_, 0, frame_.n_candidates());
  }
  std::vector<std::int64_t> whole_blocks(std::vector<std::int64_t> kept) const {
    for (std::int64_t& n : kept) {
      if (n < frame_.n_candidates()) n = in_blocks((n + window_) / kBlock);
    }
    return kept;
  }
  // Block by block to the heads that lost most tokens to rounding.
  void spend_rest(const std::vector<std::int64_t>& chosen, std::uint64_t budget,
                  std::vector<std::int64_t>& keep) const {
    std::vector<std::size_t> order(keep.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return chosen[a] - keep[a] > chosen[b] - keep[b];
    });
    std::uint64_t bytes = cost(keep);
    for (bool spent = true; spent;) {
      spent = false;
      for (const std::size_t i : order) {
        const std::int64_t more = in_blocks((keep[i] + window_) / kBlock + 1);
        if (more == keep[i]) continue;
        const std::uint64_t with = bytes - head_cost(i, keep[i]) + head_cost(i, more);
        if (with > budget) continue;
        bytes = with;
        keep[i] = more;
        spent = true;
      }
    }
  }

  const PlanFrame& frame_;
  std::span<const std::size_t> heads_;
  std::vector<HeadPlan>& plan_;
  std::int64_t window_;
  std::vector<kernels::KvCodec> codecs_;
  std::vector<const kernels::ScoreHistogram*> histograms_;  // of `heads`
};

}  // namespace

void fill_global(const PlanFrame& frame, std::span<const std::size_t> heads, std::uint64_t budget,
                 std::vector<HeadPlan>& plan) {
  GlobalFill(frame, heads, plan).run(budget);
}

}  // namespace spindle::kvstore
