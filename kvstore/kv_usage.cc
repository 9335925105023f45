#include "kvstore/kv_usage.h"

#include <algorithm>

namespace spindle::kvstore {
namespace {

// Of what a head keeps as it is.
KvForm raw_form(const HeadCache& cache) {
  return cache.plan.mode == KvMode::kStream ? KvForm::kWindow : KvForm::kRaw;
}

}  // namespace

// Sums are unsigned: taking away is adding the complement.
void KvUsage::count(std::size_t layer, const HeadCache& cache, std::uint64_t tail_bytes, int sign) {
  const std::uint64_t factor = sign > 0 ? 1 : ~std::uint64_t{0};
  const std::uint64_t bytes = factor * (tail_bytes + cache.piece_bytes);
  Layer& sums = layers_[layer];
  sums.used_bytes += bytes;
  sums.before_tail += sign * (cache.n_block_tokens() - cache.tail_first);
  sums.kind_bytes[static_cast<std::size_t>(plan_kind(cache.plan))] += bytes;
  form_bytes_[static_cast<std::size_t>(raw_form(cache))] +=
      factor * (tail_bytes + cache.form_bytes[0]);
  for (std::size_t form = 1; form < kKvForms; ++form) {
    form_bytes_[form] += factor * cache.form_bytes[form];
  }
}

void KvUsage::add_tail(std::size_t layer, const HeadCache& cache, std::uint64_t n_bytes) {
  layers_[layer].used_bytes += n_bytes;
  layers_[layer].kind_bytes[static_cast<std::size_t>(plan_kind(cache.plan))] += n_bytes;
  form_bytes_[static_cast<std::size_t>(raw_form(cache))] += n_bytes;
}

KvUse KvUsage::report() const {
  KvUse use;
  use.logical_tokens = n_tokens_;
  use.form_bytes = form_bytes_;
  use.layers.reserve(layers_.size());
  for (const Layer& sums : layers_) {
    KvUse::Layer& layer = use.layers.emplace_back();
    layer.used_bytes = sums.used_bytes;
    layer.retained_tokens = n_tokens_ + (sums.before_tail - n_heads_ / 2) / n_heads_;
    const auto most = std::max_element(sums.kind_bytes.begin(), sums.kind_bytes.end());
    if (*most > 0) layer.plan_kind = static_cast<int>(most - sums.kind_bytes.begin());
  }
  return use;
}

}  // namespace spindle::kvstore
