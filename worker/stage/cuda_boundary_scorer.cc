#include "worker/stage/cuda_boundary_scorer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/core/check.h"

namespace spindle::worker {
namespace {

using kvstore::KvSelector;

// Sequences whose window queries stay on the device at a time; more wait on the host.
constexpr int kQuerySlots = 8;
// Boundaries in flight whose scores stay on the device, of sequences of max_model_len tokens.
constexpr std::uint64_t kScoreSlots = 2;

std::uint64_t as_bytes(std::int64_t a, std::int64_t b, std::uint64_t element) {
  return static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b) * element;
}

std::int64_t rounded_tokens(std::int64_t n) { return (n + 31) / 32 * 32; }

bool reads_window(KvSelector selector) {
  return selector != KvSelector::kNone && selector != KvSelector::kKeyDiff;
}

}  // namespace

CudaBoundaryScorer::Layout CudaBoundaryScorer::layout_of(const LlamaStageConfig& config,
                                                         const kernels::AttentionShape& shape) {
  const std::int64_t n_layers = config.layers.count;
  const std::int64_t n_tokens = rounded_tokens(std::max<std::int64_t>(config.max_model_len, 1));
  Layout layout;
  const auto place = [&](std::uint64_t n_bytes) {
    const std::uint64_t at = layout.n_bytes;
    layout.n_bytes += (n_bytes + 255) / 256 * 256;
    return at;
  };
  layout.p_bytes = as_bytes(std::max(std::int64_t{shape.n_heads} * kvstore::kObservationWindow,
                                     n_layers * shape.n_kv_heads),
                            n_tokens, sizeof(float));
  layout.p = place(layout.p_bytes);
  layout.means = place(as_bytes(shape.n_heads, n_tokens, sizeof(float)));
  layout.norms = place(as_bytes(shape.n_kv_heads, n_tokens, sizeof(float)));
  layout.work_bytes = std::max<std::uint64_t>(
      {kernels::window_probabilities_workspace_bytes(shape, kvstore::kObservationWindow),
       kernels::keydiff_workspace_bytes(shape),
       kernels::value_output_norms_workspace_bytes(shape, config.model.hidden_size),
       kernels::defensive_workspace_bytes(shape, kvstore::kObservationWindow)});
  layout.work = place(layout.work_bytes);
  layout.lazy = place(as_bytes(n_layers, shape.n_heads, sizeof(float)));
  layout.tables = place(256 + as_bytes(n_layers, shape.n_kv_heads, sizeof(std::int64_t)) +
                        as_bytes(n_layers, shape.n_heads, sizeof(kernels::DeviceSelect)));
  layout.boost = place(as_bytes(n_layers, shape.n_kv_heads, sizeof(kernels::DeviceBoostHead)));
  layout.window_mass =
      place(as_bytes(n_layers * kvstore::kObservationWindow, shape.n_heads, sizeof(float)));
  layout.best = place(as_bytes(n_layers, 1, sizeof(float)));
  layout.scores_bytes =
      kScoreSlots * as_bytes(n_layers * shape.n_kv_heads, n_tokens, sizeof(float));
  layout.scores = place(layout.scores_bytes);
  layout.staged_queries = place(as_bytes(
      kvstore::kObservationWindow, std::int64_t{shape.n_heads} * shape.head_dim, sizeof(F16)));
  layout.queries = place(as_bytes(n_layers * kvstore::kObservationWindow * kQuerySlots,
                                  std::int64_t{shape.n_heads} * shape.head_dim, sizeof(F16)));
  return layout;
}

std::uint64_t CudaBoundaryScorer::scratch_bytes(const LlamaStageConfig& config,
                                                const kernels::AttentionShape& shape) {
  return layout_of(config, shape).n_bytes;
}

Result<std::unique_ptr<CudaBoundaryScorer>> CudaBoundaryScorer::create(
    const CudaContext& context, const LlamaStageConfig& config,
    const kernels::AttentionShape& shape) {
  std::unique_ptr<CudaBoundaryScorer> scorer(new CudaBoundaryScorer(context, config, shape));
  auto scratch = context.allocate(scorer->layout_.n_bytes, "scores of KV boundaries");
  if (!scratch.ok()) return scratch.status();
  scorer->scratch_ = std::move(*scratch);
  auto staging = context.allocate_pinned(kStagingBytes, "results of KV boundaries");
  if (!staging.ok()) return staging.status();
  scorer->staging_ = std::move(*staging);
  return scorer;
}

CudaBoundaryScorer::CudaBoundaryScorer(const CudaContext& context, const LlamaStageConfig& config,
                                       const kernels::AttentionShape& shape)
    : context_(context),
      shape_(shape),
      n_layers_(config.layers.count),
      layout_(layout_of(config, shape)) {
  for (int slot = kQuerySlots - 1; slot >= 0; --slot) free_query_slots_.push_back(slot);
}

std::int64_t CudaBoundaryScorer::n_tables() const {
  return std::int64_t{n_layers_} * shape_.n_kv_heads;
}

void CudaBoundaryScorer::open(kvstore::SequenceId sequence, const ScoringNeeds& needs,
                              std::vector<std::int32_t> boundaries) {
  free(sequence);
  sequences_[sequence].windows = BoundaryWindows(needs, std::move(boundaries));
}

void CudaBoundaryScorer::free(kvstore::SequenceId id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;
  drop_queries(found->second);
  drop_scores(found->second);
  sequences_.erase(found);
}

bool CudaBoundaryScorer::is_boundary(kvstore::SequenceId id, std::int64_t n_tokens) const {
  const auto found = sequences_.find(id);
  return found != sequences_.end() && found->second.windows.is_boundary(n_tokens);
}

// ---- Queries.

void CudaBoundaryScorer::take_query_slot(Sequence& sequence) {
  if (free_query_slots_.empty()) {
    sequence.host_queries.resize(static_cast<std::size_t>(n_layers_) *
                                 static_cast<std::size_t>(sequence.windows.n_queries()) *
                                 static_cast<std::size_t>(q_width()));
    return;
  }
  sequence.query_slot = free_query_slots_.back();
  free_query_slots_.pop_back();
}

void CudaBoundaryScorer::drop_queries(Sequence& sequence) {
  if (sequence.query_slot >= 0) free_query_slots_.push_back(sequence.query_slot);
  sequence.query_slot = -1;
  std::vector<F16>().swap(sequence.host_queries);
}

bool CudaBoundaryScorer::wants_queries(kvstore::SequenceId id, std::int64_t first_position,
                                       std::int64_t n_tokens) const {
  const auto found = sequences_.find(id);
  return found != sequences_.end() &&
         !found->second.windows.wanted(first_position, n_tokens).empty();
}

void CudaBoundaryScorer::take_queries(kvstore::SequenceId id, int layer,
                                      std::int64_t first_position, ConstF16Rows q) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;
  Sequence& sequence = found->second;
  const PositionRange wanted = sequence.windows.wanted(first_position, q.n_rows);
  if (wanted.empty()) return;
  CHECK(q.width == q_width() && layer >= 0 && layer < n_layers_, "queries of a layer");
  if (!sequence.windows.has_queries()) {
    sequence.windows.keep_from(wanted.begin);
    take_query_slot(sequence);
  }
  const bool on_host = sequence.query_slot < 0;
  const std::int64_t row =
      layer * sequence.windows.n_queries() + wanted.begin - sequence.windows.first_query();
  F16* target = on_host ? sequence.host_queries.data()
                        : at<F16>(layout_.queries) + sequence.query_slot * std::int64_t{n_layers_} *
                                                         kvstore::kObservationWindow * q_width();
  target += row * q_width();
  const F16* source = q.row(wanted.begin - first_position);
  const auto row_bytes = static_cast<std::size_t>(q.width) * sizeof(F16);
  // One copy when the rows lie together.
  const std::int64_t n_copies = q.stride == q.width ? 1 : wanted.size();
  const std::size_t n_bytes =
      row_bytes * static_cast<std::size_t>(n_copies == 1 ? wanted.size() : 1);
  for (std::int64_t i = 0; i < n_copies; ++i) {
    if (on_host) {
      context_.to_host(target + i * q.width, source + i * q.stride, n_bytes);
    } else {
      context_.copy(target + i * q.width, source + i * q.stride, n_bytes);
    }
  }
}

const F16* CudaBoundaryScorer::layer_queries(const Sequence& sequence, int layer) {
  const std::int64_t n = sequence.windows.n_queries();
  if (sequence.query_slot >= 0) {
    return at<F16>(layout_.queries) +
           (sequence.query_slot * std::int64_t{n_layers_} * kvstore::kObservationWindow +
            layer * n) *
               q_width();
  }
  F16* staged = at<F16>(layout_.staged_queries);
  context_.to_device(staged, sequence.host_queries.data() + layer * n * q_width(),
                     static_cast<std::size_t>(n * q_width()) * sizeof(F16));
  return staged;
}

// ---- Scores.

// First fit among the pieces that are taken.
void CudaBoundaryScorer::take_scores(Sequence& sequence) {
  const std::uint64_t n_bytes =
      as_bytes(n_tables() * sequence.rows_per_head, sequence.stride, sizeof(float));
  std::uint64_t begin = 0;
  for (const auto& [taken, size] : arena_) {
    if (taken - begin >= n_bytes) break;
    begin = taken + size;
  }
  if (begin + n_bytes <= layout_.scores_bytes) {
    arena_[begin] = n_bytes;
    sequence.scores_at = begin;
  } else {
    sequence.host_scores.resize(n_bytes / sizeof(float));
  }
}

void CudaBoundaryScorer::drop_scores(Sequence& sequence) {
  if (sequence.scores_at.has_value()) arena_.erase(*sequence.scores_at);
  sequence.scores_at.reset();
  std::vector<float>().swap(sequence.host_scores);
  std::vector<HeadScores>().swap(sequence.heads);
}

const float* CudaBoundaryScorer::scores_of(const Sequence& sequence, std::int64_t row) const {
  const float* base = sequence.scores_at.has_value()
                          ? at<float>(layout_.scores + *sequence.scores_at)
                          : sequence.host_scores.data();
  const HeadScores& head = sequence.heads[static_cast<std::size_t>(row / sequence.rows_per_head)];
  return base + row * sequence.stride + head.column;
}

CudaBoundaryScorer::Tables CudaBoundaryScorer::tables_of(kvstore::SequenceId id,
                                                         const kvstore::KvStore& store,
                                                         bool tails_only) const {
  Tables tables;
  const std::int64_t n_tokens = store.length(id);
  for (int layer = 0; layer < n_layers_; ++layer) {
    std::int64_t page = 0;
    std::int32_t most = 0;
    for (int h = 0; h < shape_.n_kv_heads; ++h) {
      const kvstore::HeadCache& cache = store.head_cache(id, layer, h);
      tables.n_slots.push_back(n_tokens - cache.tail_first +
                               (tails_only ? 0 : cache.n_block_tokens()));
      tables.tail_first.push_back(cache.tail_first);
      tables.first_page.push_back(page);
      const auto n_blocks = static_cast<std::int32_t>(cache.blocks.size());
      page += n_blocks;
      most = std::max(most, n_blocks);
    }
    tables.max_blocks.push_back(tails_only ? 0 : most);
    tables.n_pages.push_back(page);
  }
  return tables;
}

BoundarySummary CudaBoundaryScorer::score(kvstore::SequenceId id, const kvstore::KvStore& store,
                                          const Inputs& inputs) {
  Sequence& sequence = sequences_.at(id);
  const std::int64_t n_tokens = store.length(id);
  CHECK(is_boundary(id, n_tokens), "a boundary that was announced");
  const ScoringNeeds& needs = sequence.windows.needs();
  const KvSelector selector = needs.boundary.selector;
  const bool key_diff = selector == KvSelector::kKeyDiff;
  const bool reads = sequence.windows.has_queries() && !key_diff &&
                     (reads_window(selector) || needs.boundary.lazy_mass);
  const bool has_scores = key_diff || (reads && reads_window(selector));
  const PositionRange window = sequence.windows.window();

  drop_scores(sequence);
  const Tables tables = tables_of(id, store, key_diff);
  BoundarySummary summary;
  for (std::size_t table = 0; table < tables.tail_first.size(); ++table) {
    const std::int64_t tail_first = tables.tail_first[table];
    HeadScores head;
    head.candidates = head_candidates(tail_first, needs.sinks, window.begin);
    head.column =
        tables.n_slots[table] - (n_tokens - tail_first) + head.candidates.begin - tail_first;
    summary.n_candidates = std::max(summary.n_candidates, head.candidates.size());
    sequence.heads.push_back(head);
  }
  sequence.rows_per_head = selector == KvSelector::kSpindleKv ? group() : 1;
  sequence.stride = kernels::score_stride(tables.n_slots);
  if (has_scores) take_scores(sequence);

  // Tables: the sequence, then every layer's first pages.
  kernels::DeviceSequence device_sequence;
  device_sequence.n_queries = static_cast<std::int32_t>(window.size());
  device_sequence.n_context = static_cast<std::int32_t>(n_tokens);
  device_sequence.heads = store.device_heads(id);
  auto* first_pages = at<std::int64_t>(layout_.tables + 256);
  context_.to_device(at<std::byte>(layout_.tables), &device_sequence, sizeof(device_sequence));
  context_.to_device(first_pages, tables.first_page.data(),
                     tables.first_page.size() * sizeof(std::int64_t));

  kernels::DeviceScoreLayer layer_input;
  layer_input.sequence = at<kernels::DeviceSequence>(layout_.tables);
  layer_input.shape = shape_;
  layer_input.pool = inputs.pool;
  layer_input.n_tokens = n_tokens;
  const auto n_kv_heads = static_cast<std::size_t>(shape_.n_kv_heads);
  for (int layer = 0; layer < n_layers_ && (reads || has_scores); ++layer) {
    const std::size_t table = static_cast<std::size_t>(layer) * n_kv_heads;
    layer_input.layer = layer;
    layer_input.n_slots = std::span(tables.n_slots).subspan(table, n_kv_heads);
    layer_input.tail_first = std::span(tables.tail_first).subspan(table, n_kv_heads);
    layer_input.expanded = {};
    if (reads) {
      layer_input.n_queries = static_cast<int>(sequence.windows.n_queries());
      layer_input.q = layer_queries(sequence, layer);
    }
    const std::int32_t max_blocks = tables.max_blocks[static_cast<std::size_t>(layer)];
    if (max_blocks > 0) {
      const auto n_pages =
          static_cast<std::size_t>(tables.n_pages[static_cast<std::size_t>(layer)]);
      CHECK(n_pages * inputs.pool.page_bytes() <= inputs.expanded_bytes,
            "expanded blocks fit their pages");
      layer_input.expanded = {inputs.expanded_pages, first_pages + table};
      kernels::kv_expand(context_, layer_input.sequence, 1, layer, shape_, inputs.pool, inputs.rope,
                         max_blocks, layer_input.expanded);
    }
    const std::int64_t n_rows = std::int64_t{shape_.n_kv_heads} * sequence.rows_per_head;
    Rows scores;
    if (sequence.scores_at.has_value()) {
      scores =
          Rows(at<float>(layout_.scores + *sequence.scores_at) + layer * n_rows * sequence.stride,
               n_rows, sequence.stride);
    } else if (has_scores) {
      scores = Rows(at<float>(layer_scores_place(selector)), n_rows, sequence.stride);
    }
    score_layer(sequence, layer, layer_input, inputs, scores);
    // The next layer's probabilities would take the means' place.
    if (!sequence.host_scores.empty() || needs.boundary.lazy_mass) boost(sequence);
    if (!sequence.host_scores.empty()) {
      context_.to_host(sequence.host_scores.data() + layer * n_rows * sequence.stride, scores.data,
                       as_bytes(n_rows, sequence.stride, sizeof(float)));
    }
  }
  boost(sequence);
  summarize(sequence, summary);
  drop_queries(sequence);
  sequence.windows.pass();
  return summary;
}

// Scores on their way to the host lie where the selector has nothing of its own.
std::uint64_t CudaBoundaryScorer::layer_scores_place(KvSelector selector) const {
  const bool in_means = selector == KvSelector::kDefensive || selector == KvSelector::kSpindleKv;
  return in_means ? layout_.means : layout_.norms;
}

void CudaBoundaryScorer::score_layer(const Sequence& sequence, int layer,
                                     const kernels::DeviceScoreLayer& input, const Inputs& inputs,
                                     Rows scores) {
  const ScoringNeeds& needs = sequence.windows.needs();
  const KvSelector selector = needs.boundary.selector;
  std::byte* work = at<std::byte>(layout_.work);
  if (selector == KvSelector::kKeyDiff) {
    kernels::keydiff_scores(context_, input, work, layout_.work_bytes, scores);
    return;
  }
  const Rows p(at<float>(layout_.p), std::int64_t{shape_.n_heads} * input.n_queries,
               sequence.stride);
  const float scale = 1.0F / std::sqrt(static_cast<float>(shape_.head_dim));
  if (needs.boundary.lazy_mass || selector != KvSelector::kDefensive) {
    kernels::window_probabilities(context_, input, scale, work, layout_.work_bytes, p);
  }
  if (needs.boundary.lazy_mass) {
    kernels::lazy_mass(context_, input, p, needs.sinks, needs.boundary.lazy_window,
                       needs.lazy_test == kvstore::LazyTest::kDecode,
                       at<float>(layout_.lazy) + std::int64_t{layer} * shape_.n_heads);
  }
  const Rows means(at<float>(layout_.means), shape_.n_heads, sequence.stride);
  switch (selector) {
    case KvSelector::kSnapKvMean:
    case KvSelector::kSnapKvMax:
      kernels::window_mean(context_, input, p, means);
      kernels::snapkv_scores(context_, input, means,
                             selector == KvSelector::kSnapKvMean ? kernels::GroupReduce::kMean
                                                                 : kernels::GroupReduce::kMax,
                             scores);
      return;
    case KvSelector::kSpindleKv:
      kernels::window_mean(context_, input, p, scores);
      return;
    case KvSelector::kDefensive: {
      // Values of the tokens that are in every head's tail.
      const std::int64_t first =
          *std::max_element(input.tail_first.begin(), input.tail_first.end());
      const Rows norms(at<float>(layout_.norms), shape_.n_kv_heads, sequence.stride);
      kernels::value_output_norms(context_, input, *inputs.outputs[static_cast<std::size_t>(layer)],
                                  first, work, layout_.work_bytes, norms);
      const std::int64_t n_rows = std::int64_t{shape_.n_heads} * input.n_queries;
      kernels::DeviceDefensive out;
      out.scores = scores;
      out.means = Rows(at<float>(layout_.p) + layer * shape_.n_kv_heads * sequence.stride,
                       shape_.n_kv_heads, sequence.stride);
      out.window_mass = at<float>(layout_.window_mass) + layer * n_rows;
      out.best = at<float>(layout_.best) + layer;
      kernels::defensive_scores(context_, input, scale, norms, first, work, layout_.work_bytes,
                                out);
      for (int h = 0; h < shape_.n_kv_heads; ++h) {
        kernels::DeviceBoostHead head;
        head.scores = out.scores.row(h);
        head.means = out.means.row(h);
        head.window_mass = out.window_mass;
        head.best = out.best;
        head.n =
            static_cast<std::int32_t>(input.n_slots[static_cast<std::size_t>(h)] - input.n_queries);
        head.n_window_rows = static_cast<std::int32_t>(n_rows);
        boost_heads_.push_back(head);
      }
      return;
    }
    default:
      return;
  }
}

// Of all layers in one launch where their means can wait.
void CudaBoundaryScorer::boost(const Sequence& sequence) {
  if (boost_heads_.empty()) return;
  auto* heads = at<kernels::DeviceBoostHead>(layout_.boost);
  context_.to_device(heads, boost_heads_.data(),
                     boost_heads_.size() * sizeof(kernels::DeviceBoostHead));
  kernels::defensive_boost(context_, heads, static_cast<int>(boost_heads_.size()),
                           sequence.windows.max_boosted());
  boost_heads_.clear();
}

}  // namespace spindle::worker
