#include "worker/stage/boundary_scorer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/attention.h"
#include "kernels/core/check.h"
#include "kernels/kv_compact.h"
#include "kernels/kv_score.h"

namespace spindle::worker {

using kvstore::KvSelector;

// One layer of one boundary.
struct BoundaryScorer::LayerWork {
  Sequence& sequence;
  const kvstore::KvStore& store;
  const kernels::RopeTable& rope;
  const kernels::PackedLinear& output;
  std::span<const kernels::KvHeadPages> heads;
  int layer;
  std::int64_t n_tokens;
  ConstRows queries;  // [window, n_heads * head_dim]
  int group;
  std::int64_t window_begin;
  std::vector<float> values;  // [n common tail tokens, n_kv_heads * head_dim]
  std::vector<float> norms;   // [n_kv_heads][n common tail tokens]
  std::int64_t first_value = 0;
  // Per KV head.
  std::vector<std::vector<float>> score;
  std::vector<std::vector<float>> mean;
  std::vector<kernels::DefensiveHead> defensive;
  std::vector<std::int64_t> first_column;  // of the head's first candidate
  double lazy_mass = 0;
};

void BoundaryScorer::open(kvstore::SequenceId sequence, const ScoringNeeds& needs,
                          std::vector<std::int32_t> boundaries) {
  Sequence& opened = sequences_[sequence];
  opened = {};
  opened.windows = BoundaryWindows(needs, std::move(boundaries));
}

void BoundaryScorer::take_queries(kvstore::SequenceId id, int layer, std::int64_t first_position,
                                  ConstRows q) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;
  Sequence& sequence = found->second;
  const PositionRange wanted = sequence.windows.wanted(first_position, q.n_rows);
  if (wanted.empty()) return;
  if (!sequence.windows.has_queries()) sequence.windows.keep_from(wanted.begin);
  const std::int64_t n_window = sequence.windows.n_queries();
  sequence.queries.resize(static_cast<std::size_t>(shape_.n_layers) *
                          static_cast<std::size_t>(n_window * q.width));
  for (std::int64_t p = wanted.begin; p < wanted.end; ++p) {
    const std::int64_t row = layer * n_window + p - sequence.windows.first_query();
    std::copy_n(q.row(p - first_position), q.width, sequence.queries.data() + row * q.width);
  }
}

bool BoundaryScorer::is_boundary(kvstore::SequenceId id, std::int64_t n_tokens) const {
  const auto found = sequences_.find(id);
  return found != sequences_.end() && found->second.windows.is_boundary(n_tokens);
}

BoundarySummary BoundaryScorer::score(const CpuContext& context, kvstore::SequenceId id,
                                      const kvstore::KvStore& store, const kernels::RopeTable& rope,
                                      std::span<const kernels::PackedLinear* const> outputs) {
  Sequence& sequence = sequences_.at(id);
  const std::int64_t n_tokens = store.length(id);
  CHECK(is_boundary(id, n_tokens), "a boundary that was announced");
  const kvstore::BoundaryNeeds& needs = sequence.windows.needs().boundary;
  BoundarySummary summary;
  sequence.scores.assign(
      static_cast<std::size_t>(shape_.n_layers) * static_cast<std::size_t>(shape_.n_kv_heads), {});
  const std::int64_t width = std::int64_t{shape_.n_heads} * shape_.head_dim;
  const PositionRange window = sequence.windows.window();
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    LayerWork work{.sequence = sequence,
                   .store = store,
                   .rope = rope,
                   .output = *outputs[static_cast<std::size_t>(layer)],
                   .heads = store.heads(id, layer),
                   .layer = layer,
                   .n_tokens = n_tokens,
                   .queries = {},
                   .group = shape_.n_heads / shape_.n_kv_heads,
                   .window_begin = window.begin,
                   .values = {},
                   .norms = {},
                   .score = {},
                   .mean = {},
                   .defensive = {},
                   .first_column = {}};
    if (sequence.windows.has_queries()) {
      work.queries =
          ConstRows(sequence.queries.data() + layer * window.size() * width, window.size(), width);
    }
    score_layer(context, work);
    if (needs.lazy_mass) summary.lazy_mass.push_back(work.lazy_mass);
    for (int h = 0; h < shape_.n_kv_heads; ++h) {
      const HeadScores& scores =
          sequence.scores[static_cast<std::size_t>(layer * shape_.n_kv_heads + h)];
      summary.n_candidates =
          std::max(summary.n_candidates, work.window_begin - scores.first_candidate);
      if (needs.histograms) summary.histograms.push_back(kernels::score_histogram(scores.scores));
    }
  }
  std::vector<float>().swap(sequence.queries);
  sequence.windows.pass();
  return summary;
}

namespace {

// Tokens of all heads' tails, from the first that all of them have.
std::int64_t common_tail(std::span<const kernels::KvHeadPages> heads) {
  std::int64_t first = 0;
  for (const kernels::KvHeadPages& head : heads) first = std::max(first, head.tail_first);
  return first;
}

}  // namespace

void BoundaryScorer::score_layer(const CpuContext& context, LayerWork& work) {
  const KvSelector selector = work.sequence.windows.needs().boundary.selector;
  const auto n_heads = static_cast<std::size_t>(shape_.n_kv_heads);
  work.score.resize(n_heads);
  work.mean.resize(n_heads);
  work.defensive.resize(n_heads);
  work.first_column.resize(n_heads);
  if (selector == KvSelector::kDefensive) {
    work.first_value = common_tail(work.heads);
    const std::int64_t n = work.n_tokens - work.first_value;
    const std::int64_t width = std::int64_t{shape_.n_kv_heads} * shape_.head_dim;
    work.values.resize(static_cast<std::size_t>(n * width));
    work.norms.resize(static_cast<std::size_t>(n) * n_heads);
    const Rows values(work.values.data(), n, width);
    std::vector<float> keys(static_cast<std::size_t>(n * shape_.head_dim));
    std::vector<std::int32_t> positions(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
      positions[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(work.first_value + i);
    }
    for (int h = 0; h < shape_.n_kv_heads; ++h) {
      const kernels::KvHeadPages& head = work.heads[static_cast<std::size_t>(h)];
      kernels::kv_gather(context, head.pages, head.tail_origin, positions, work.store.page_layout(),
                         Rows(keys.data(), n, shape_.head_dim),
                         values.columns(std::int64_t{h} * shape_.head_dim, shape_.head_dim));
    }
    const Rows norms(work.norms.data(), shape_.n_kv_heads, n);
    kernels::value_output_norms(context, work.output, values, shape_.n_heads, shape_.n_kv_heads,
                                norms);
    kernels::normalize_value_norms(norms);
  }
  for (int h = 0; h < shape_.n_kv_heads; ++h) score_head(context, work, h);
  work.lazy_mass /= shape_.n_heads;
  if (selector == KvSelector::kDefensive) {
    kernels::defensive_boost(work.defensive, work.sequence.windows.max_boosted());
  }
  for (int h = 0; h < shape_.n_kv_heads; ++h) {
    const auto head = static_cast<std::size_t>(h);
    HeadScores& out = work.sequence.scores[static_cast<std::size_t>(work.layer) * n_heads + head];
    const std::int64_t first = work.heads[head].tail_first;
    const PositionRange candidates =
        head_candidates(first, work.sequence.windows.needs().sinks, work.window_begin);
    out.first_candidate = candidates.begin;
    if (work.score[head].empty()) continue;
    const std::int64_t n = candidates.size();
    const std::int64_t column = work.first_column[head] + out.first_candidate - first;
    const auto n_rows = selector == KvSelector::kSpindleKv ? std::int64_t{work.group} : 1;
    const auto stride = static_cast<std::int64_t>(work.score[head].size()) / n_rows;
    for (std::int64_t row = 0; row < n_rows; ++row) {
      const float* from = work.score[head].data() + row * stride + column;
      out.scores.insert(out.scores.end(), from, from + n);
    }
  }
}

void BoundaryScorer::score_head(const CpuContext& context, LayerWork& work, int h) {
  const auto index = static_cast<std::size_t>(h);
  const kernels::KvHeadPages& head = work.heads[index];
  const kvstore::BoundaryNeeds& needs = work.sequence.windows.needs().boundary;
  const kernels::KvPageLayout layout = work.store.page_layout();
  const std::int64_t n_slots = kernels::visible_slots(head, work.n_tokens);
  work.first_column[index] = n_slots - (work.n_tokens - head.tail_first);
  if (needs.selector == KvSelector::kKeyDiff) {
    // Keys of the tail alone: it needs no queries and never looks at what was kept before.
    const std::int64_t n = work.n_tokens - head.tail_first;
    std::vector<float> keys(static_cast<std::size_t>(n * shape_.head_dim));
    std::vector<float> values(keys.size());
    std::vector<std::int32_t> positions(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
      positions[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(head.tail_first + i);
    }
    const Rows key_rows(keys.data(), n, shape_.head_dim);
    kernels::kv_gather(context, head.pages, head.tail_origin, positions, layout, key_rows,
                       Rows(values.data(), n, shape_.head_dim));
    work.score[index].resize(static_cast<std::size_t>(n));
    kernels::keydiff_scores(context, key_rows, work.score[index]);
    work.first_column[index] = 0;
    return;
  }
  if (work.queries.n_rows == 0) return;
  const std::int64_t window = work.queries.n_rows;
  const std::int64_t group = work.group;
  std::vector<float> probabilities(static_cast<std::size_t>(window * group * n_slots));
  const Rows p(probabilities.data(), window * group, n_slots);
  const float scale = 1.0F / std::sqrt(static_cast<float>(shape_.head_dim));
  kernels::attention_logits(
      context,
      work.queries.columns(std::int64_t{h} * group * shape_.head_dim, group * shape_.head_dim),
      work.n_tokens, head, work.group, layout, scale, &work.rope, p);
  std::vector<float> means(static_cast<std::size_t>(group * n_slots));
  for (std::int64_t g = 0; g < group; ++g) {
    // Rows are (query, head of the group).
    const Rows rows(p.data + g * n_slots, window, n_slots, group * n_slots);
    kernels::window_softmax(context, rows);
    if (needs.lazy_mass) {
      work.lazy_mass += work.sequence.windows.needs().lazy_test == kvstore::LazyTest::kDecode
                            ? kernels::lazy_mass_decode(rows, work.sequence.windows.needs().sinks,
                                                        needs.lazy_window)
                            : kernels::lazy_mass_prefill(rows, work.sequence.windows.needs().sinks,
                                                         needs.lazy_window);
    }
    kernels::window_mean(context, rows,
                         std::span(means).subspan(static_cast<std::size_t>(g * n_slots),
                                                  static_cast<std::size_t>(n_slots)));
  }
  const ConstRows mean_rows(means.data(), group, n_slots);
  const auto n_scores = static_cast<std::size_t>(n_slots - window);
  switch (needs.selector) {
    case KvSelector::kSnapKvMean:
    case KvSelector::kSnapKvMax:
      work.score[index].resize(n_scores);
      kernels::snapkv_scores(mean_rows, static_cast<int>(window),
                             needs.selector == KvSelector::kSnapKvMean ? kernels::GroupReduce::kMean
                                                                       : kernels::GroupReduce::kMax,
                             work.score[index]);
      return;
    case KvSelector::kSpindleKv:
      work.score[index] = std::move(means);
      return;
    case KvSelector::kDefensive: {
      work.score[index].resize(n_scores);
      work.mean[index].resize(n_scores);
      work.defensive[index].score = work.score[index];
      work.defensive[index].mean = work.mean[index];
      std::vector<float> norms(static_cast<std::size_t>(n_slots));
      const std::int64_t n_values = work.n_tokens - work.first_value;
      std::copy_n(work.norms.data() + h * n_values, n_values, norms.data() + n_slots - n_values);
      kernels::defensive_scores(context, p, work.group, static_cast<int>(window), norms,
                                work.defensive[index]);
      return;
    }
    default:
      return;
  }
}

std::vector<std::vector<std::int32_t>> BoundaryScorer::select(
    kvstore::SequenceId id, const kvstore::KvStore& store, int recent,
    std::span<const kvstore::HeadPlan> heads) {
  std::vector<std::vector<std::int32_t>> kept(heads.size());
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return kept;
  Sequence& sequence = found->second;
  for (std::size_t table = 0; table < heads.size() && table < sequence.scores.size(); ++table) {
    const kvstore::HeadPlan& plan = heads[table];
    const HeadScores& scores = sequence.scores[table];
    if (plan.mode != kvstore::KvMode::kEvict || scores.scores.empty()) continue;
    const std::int64_t group =
        plan.selector == KvSelector::kSpindleKv ? shape_.n_heads / shape_.n_kv_heads : 1;
    const auto n_scores = static_cast<std::int64_t>(scores.scores.size()) / group;
    const auto n_kv_heads = static_cast<std::size_t>(shape_.n_kv_heads);
    const kvstore::HeadCache& cache = store.head_cache(id, static_cast<int>(table / n_kv_heads),
                                                       static_cast<int>(table % n_kv_heads));
    const std::int64_t n =
        n_selectable(cache, recent, store.length(id), scores.first_candidate, n_scores);
    if (plan.selector == KvSelector::kSpindleKv) {
      kept[table] =
          kernels::select_union(ConstRows(scores.scores.data(), group, n, n_scores), plan.n_keep);
    } else {
      kept[table] = kernels::select_top_k(
          std::span(scores.scores).first(static_cast<std::size_t>(n)), plan.n_keep);
    }
    for (std::int32_t& index : kept[table]) {
      index += static_cast<std::int32_t>(scores.first_candidate);
    }
  }
  std::vector<HeadScores>().swap(sequence.scores);
  return kept;
}

const BoundaryScorer::HeadScores& BoundaryScorer::head_scores(kvstore::SequenceId id, int layer,
                                                              int kv_head) const {
  return sequences_.at(id).scores[static_cast<std::size_t>(layer * shape_.n_kv_heads + kv_head)];
}

}  // namespace spindle::worker
