// The profile "spindle": calibrated errors decide which heads are guarded and how precisely, one
// global threshold decides what the others keep.

#include <algorithm>
#include <array>
#include <numeric>

#include "kvstore/plan/knapsack.h"
#include "kvstore/plan/plan_frame.h"

namespace spindle::kvstore {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;

// A head that loses more than this by a window of 64 tokens keeps every token.
constexpr double kGuardError = 0.01;
// What guarded heads may take of the budget; the larger share when the ratio is below kTightRatio.
constexpr double kGuardShare = 0.5;
constexpr double kTightGuardShare = 0.75;
constexpr double kTightRatio = 0.10;
// The other heads get fewer bits when less than this share of their tokens fits at four.
constexpr double kFewTokens = 0.12;

constexpr std::array<KvFormat, 5> kFormats = {KvFormat::kLloyd1, KvFormat::kLloyd2,
                                              KvFormat::kLloyd3, KvFormat::kLloyd4, KvFormat::kRaw};
constexpr std::span<const KvFormat> kLloydFormats = std::span(kFormats).first<4>();

double side_error(const double (&by_bits)[4], KvFormat format) {
  return kernels::is_lloyd(format) ? by_bits[kernels::lloyd_bits(format) - 1] : 0.0;
}
// Of lloyd and raw sides; the calibrated errors are of one side each, and add up.
double codec_error(const HeadErrors& errors, KvCodec codec) {
  return side_error(errors.k_bits, codec.k) + side_error(errors.v_bits, codec.v);
}

std::vector<KvCodec> codecs_of(std::span<const KvFormat> k, std::span<const KvFormat> v) {
  std::vector<KvCodec> codecs;
  for (const KvFormat k_format : k) {
    for (const KvFormat v_format : v) codecs.push_back({k_format, v_format});
  }
  return codecs;
}

class SpindlePlan {
 public:
  // `tokens`: the heads of layer 0 that hold token ids.
  SpindlePlan(const PlanFrame& frame, std::uint64_t budget, const std::vector<std::size_t>& tokens)
      : frame_(frame), budget_(budget) {
    plan_.resize(static_cast<std::size_t>(frame.model.n_tables()));
    for (std::size_t i = 0; i < plan_.size(); ++i) {
      if (std::find(tokens.begin(), tokens.end(), i) != tokens.end()) {
        plan_[i].codec = kTokenCodec;
        spent_ += frame.cost(i, plan_[i]);
      } else {
        rest_.push_back(i);
      }
    }
  }

  std::vector<HeadPlan> run() && {
    if (frame_.table == nullptr) {
      fill(kLloyd44);
      return std::move(plan_);
    }
    guard_heads();
    fill(kLloyd44);
    if (kept_share() < kFewTokens) fill(kLloyd32);
    if (std::all_of(rest_.begin(), rest_.end(),
                    [&](std::size_t i) { return plan_[i].mode == KvMode::kFull; })) {
      spend_surplus();
    } else {
      use_codebooks();
      use_windows();
    }
    return std::move(plan_);
  }

 private:
  const HeadErrors& errors(std::size_t head) const { return *frame_.errors(head); }
  std::uint64_t left() const { return budget_ > spent_ ? budget_ - spent_ : 0; }

  std::uint64_t least_bytes_of_rest() const {
    std::uint64_t bytes = 0;
    for (const std::size_t i : rest_) bytes += frame_.cost(i, frame_.evict(kLloyd32, 0));
    return bytes;
  }

  // Where even the coarsest codecs leave too little for the others, the least sensitive guarded
  // heads join them.
  void guard_heads() {
    std::vector<std::size_t> guards;
    std::copy_if(rest_.begin(), rest_.end(), std::back_inserter(guards),
                 [&](std::size_t i) { return errors(i).window64 > kGuardError; });
    std::stable_sort(guards.begin(), guards.end(), [&](std::size_t a, std::size_t b) {
      return errors(a).window64 > errors(b).window64;
    });
    std::erase_if(rest_, [&](std::size_t i) { return errors(i).window64 > kGuardError; });
    const auto coarsest = [&] {
      std::uint64_t bytes = 0;
      for (const std::size_t i : guards) {
        bytes += frame_.cost(i, {.codec = {KvFormat::kLloyd1, KvFormat::kLloyd1}});
      }
      return bytes;
    };
    while (!guards.empty() && spent_ + coarsest() + least_bytes_of_rest() > budget_) {
      rest_.insert(std::upper_bound(rest_.begin(), rest_.end(), guards.back()), guards.back());
      guards.pop_back();
    }
    if (guards.empty()) return;
    const double share = frame_.ratio < kTightRatio ? kTightGuardShare : kGuardShare;
    const std::uint64_t limit =
        std::min(static_cast<std::uint64_t>(share * static_cast<double>(budget_)),
                 left() - least_bytes_of_rest());
    choose_codecs(guards, std::vector(guards.size(), codecs_of(kLloydFormats, kLloydFormats)),
                  limit);
    // Raw keys for the most sensitive one come last: what was measured spends on them only what the
    // other guarded heads leave.
    std::uint64_t others = 0;
    for (const std::size_t i : std::span(guards).subspan(1)) others += frame_.cost(i, plan_[i]);
    std::vector<KvCodec> finest = codecs_of(std::span(kFormats).last<1>(), kLloydFormats);
    finest.push_back(plan_[guards.front()].codec);
    choose_codecs(std::span(guards).first(1), {std::move(finest)}, limit - std::min(limit, others));
    for (const std::size_t i : guards) spent_ += frame_.cost(i, plan_[i]);
  }

  // FULL with one of its `codecs` for each of the heads.
  void choose_codecs(std::span<const std::size_t> heads,
                     const std::vector<std::vector<KvCodec>>& codecs, std::uint64_t limit) {
    std::vector<std::vector<KnapsackOption>> options(heads.size());
    for (std::size_t g = 0; g < heads.size(); ++g) {
      for (const KvCodec codec : codecs[g]) {
        options[g].push_back(
            {frame_.cost(heads[g], {.codec = codec}), codec_error(errors(heads[g]), codec)});
      }
    }
    const std::vector<std::size_t> chosen = choose_options(options, limit);
    for (std::size_t g = 0; g < heads.size(); ++g) {
      plan_[heads[g]] = {.codec = codecs[g][chosen[g]]};
    }
  }

  void fill(KvCodec codec) {
    for (const std::size_t i : rest_) plan_[i] = frame_.evict(codec, 0);
    refill();
  }
  // Again with the codecs that the heads have.
  void refill() { fill_global(frame_, rest_, left(), plan_); }

  double kept_share() const {
    if (rest_.empty()) return 1.0;
    double kept = 0;
    for (const std::size_t i : rest_) {
      kept += static_cast<double>(plan_[i].mode == KvMode::kFull ? frame_.n_candidates()
                                                                 : plan_[i].n_keep);
    }
    return kept / static_cast<double>(rest_.size()) / static_cast<double>(frame_.n_candidates());
  }

  void use_codebooks() {
    bool changed = false;
    for (const std::size_t i : rest_) {
      if (errors(i).codebook > codec_error(errors(i), plan_[i].codec)) continue;
      HeadPlan coded = plan_[i];
      coded.codec = kCodebookCodec;
      if (frame_.cost(i, coded) >= frame_.cost(i, plan_[i])) continue;
      plan_[i] = coded;
      changed = true;
    }
    if (changed) refill();
  }

  // A window in full precision where calibration says that it loses no more than the head's codec.
  void use_windows() {
    std::vector<std::size_t> kept;
    for (const std::size_t i : rest_) {
      const double error = plan_[i].codec == kCodebookCodec
                               ? errors(i).codebook
                               : codec_error(errors(i), plan_[i].codec);
      HeadPlan best = plan_[i];
      for (const auto& [window, window_error] :
           {std::pair<std::int64_t, double>{64, errors(i).window64}, {256, errors(i).window256}}) {
        const HeadPlan stream{.mode = KvMode::kStream, .codec = kRawCodec, .window = window};
        if (window_error <= error && frame_.cost(i, stream) < frame_.cost(i, best)) best = stream;
      }
      if (best.mode == KvMode::kStream) {
        plan_[i] = best;
        spent_ += frame_.cost(i, best);
      } else {
        kept.push_back(i);
      }
    }
    if (kept.size() == rest_.size()) return;
    rest_ = std::move(kept);
    refill();
  }

  // When every token of the other heads is kept, what is left buys precision.
  void spend_surplus() {
    std::vector<std::size_t> heads;
    std::uint64_t tokens = 0;
    for (std::size_t i = 0; i < plan_.size(); ++i) {
      if (plan_[i].codec == kTokenCodec) {
        tokens += frame_.cost(i, plan_[i]);
      } else {
        heads.push_back(i);
      }
    }
    std::vector<std::vector<KvCodec>> codecs;
    for (const std::size_t i : heads) {
      codecs.push_back({plan_[i].codec});
      const std::uint64_t now = frame_.cost(i, plan_[i]);
      for (const KvCodec codec : codecs_of(kFormats, kFormats)) {
        if (frame_.cost(i, {.codec = codec}) > now) codecs.back().push_back(codec);
      }
    }
    choose_codecs(heads, codecs, budget_ - tokens);
  }

  const PlanFrame& frame_;
  std::uint64_t budget_;
  std::uint64_t spent_ = 0;  // on heads that are not in rest_
  std::vector<std::size_t> rest_;
  std::vector<HeadPlan> plan_;
};

}  // namespace

// With the table of the whole vocabulary, layer 0 as token ids is next to nothing. A request's own
// table costs an entry for each of its ids: a head of layer 0 gets it where that takes no more
// bytes than what the head would get otherwise, which cannot lose less, since the table is exact.
// What it saves goes to the other heads.
std::vector<HeadPlan> plan_spindle(const PlanFrame& frame, std::uint64_t budget) {
  std::vector<std::size_t> tokens(static_cast<std::size_t>(frame.model.n_kv_heads));
  std::iota(tokens.begin(), tokens.end(), std::size_t{0});
  if (frame.model.token_table) return SpindlePlan(frame, budget, tokens).run();
  std::vector<HeadPlan> plan = SpindlePlan(frame, budget, {}).run();
  std::erase_if(tokens, [&](std::size_t i) {
    return frame.cost(i, {.codec = kTokenCodec}) > frame.cost(i, plan[i]);
  });
  return tokens.empty() ? plan : SpindlePlan(frame, budget, tokens).run();
}

}  // namespace spindle::kvstore
