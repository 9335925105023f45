// A step's tables and launches; the rest of the class is in cuda_stage.cc.

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/activation.h"
#include "kernels/embedding.h"
#include "kernels/norm.h"
#include "worker/stage/cuda_stage.h"
#include "worker/stage/step_rows.h"

namespace spindle::worker {
namespace {

// Recorded steps of all buckets and combinations of formats.
constexpr std::size_t kMaxGraphs = 512;

// Rows of the recorded steps: every size where a product's work jumps, then multiples.
std::vector<std::int64_t> decode_buckets(std::int64_t most) {
  std::vector<std::int64_t> buckets;
  for (std::int64_t n = 1; n < most;) {
    buckets.push_back(n);
    n = n < 8 ? 2 * n : n < 64 ? n + 8 : n < 256 ? n + 16 : n + 64;
  }
  buckets.push_back(most);
  return buckets;
}

}  // namespace

Status CudaStage::record_graphs() {
  const std::int64_t most =
      std::min<std::int64_t>(config_.max_num_seqs, config_.max_batched_tokens);
  buckets_ = decode_buckets(most);
  for (const std::int64_t n_rows : buckets_) {
    Step step;
    decode_upload_->begin();
    fill_decode(step, {}, {}, n_rows);
    decode_upload_->flush();
    // Once for real, so that every kernel is loaded before it is recorded.
    run_step(step);
    record(step);
  }
  context_.synchronize();
  return ok_status();
}

void CudaStage::record(const Step& step) {
  // Requests choose their own policies, so combinations are bounded only by this.
  if (decode_graphs_.size() >= kMaxGraphs) decode_graphs_.clear();
  decode_graphs_.emplace(GraphKey{step.n_rows, step.formats},
                         CudaGraph::record(context_, [&] { run_step(step); }));
}

Status CudaStage::forward(std::span<const StageRun> runs, std::span<const std::int32_t> tokens) {
  CHECK(store_ != nullptr, "a stage has its store before the first step");
  if (runs.size() > static_cast<std::size_t>(config_.max_num_seqs)) {
    return invalid_argument("a step of " + std::to_string(runs.size()) + " runs, at most " +
                            std::to_string(config_.max_num_seqs) + " are allowed");
  }
  const auto n_rows = static_cast<std::int64_t>(tokens.size());
  Status status = extend_for_step(config_, *store_, runs, tokens, n_rows, positions_);
  if (!status.ok()) return status;
  store_->flush_tables();
  const bool decodes = std::all_of(runs.begin(), runs.end(), [&](const StageRun& run) {
    return run.n_tokens == 1 &&
           !scorer_->wants_queries(run.sequence, run.first_position, run.n_tokens);
  });
  const auto bucket = std::lower_bound(buckets_.begin(), buckets_.end(), n_rows);
  Step step;
  if (decodes && bucket != buckets_.end()) {
    decode_upload_->begin();
    fill_decode(step, runs, tokens, *bucket);
    decode_upload_->flush();
    const auto graph = decode_graphs_.find({step.n_rows, step.formats});
    if (graph != decode_graphs_.end()) {
      graph->second.replay(context_);
    } else {
      run_step(step);
      record(step);
    }
  } else {
    mixed_upload_->begin();
    fill_mixed(step, runs, tokens);
    mixed_upload_->flush();
    run_step(step);
  }
  return ok_status();
}

const std::vector<std::uint32_t>& CudaStage::formats_of(kvstore::SequenceId sequence) {
  const auto found = formats_.find(sequence);
  if (found != formats_.end()) return found->second;
  std::vector<std::uint32_t> formats(static_cast<std::size_t>(config_.layers.count));
  for (int layer = 0; layer < config_.layers.count; ++layer) {
    for (int head = 0; head < config_.model.n_kv_heads; ++head) {
      formats[static_cast<std::size_t>(layer)] |=
          store_->head_cache(sequence, layer, head).counts.format_mask();
    }
  }
  return formats_.emplace(sequence, std::move(formats)).first->second;
}

void CudaStage::set_formats(Step& step, std::span<const StageRun> decode_runs) {
  std::vector<std::uint32_t> all(static_cast<std::size_t>(config_.layers.count));
  for (const StageRun& run : decode_runs) {
    const std::vector<std::uint32_t>& own = formats_of(run.sequence);
    for (std::size_t layer = 0; layer < all.size(); ++layer) all[layer] |= own[layer];
  }
  for (const std::uint32_t mask : all) step.formats.push_back(kernels::decode_formats(mask));
}

// Arrays of a bucket have the same places every time. Every row has logits; those that nobody wants
// are not looked at.
void CudaStage::fill_decode(Step& step, std::span<const StageRun> runs,
                            std::span<const std::int32_t> tokens, std::int64_t n_rows) {
  const auto n = static_cast<std::size_t>(n_rows);
  step.n_rows = n_rows;
  step.n_logits = config_.is_last ? n_rows : 0;
  step.n_decode = static_cast<int>(n_rows);
  set_formats(step, runs);
  const auto sequences = decode_upload_->reserve(n, &step.sequences);
  const auto ids = decode_upload_->reserve(n, &step.tokens);
  const auto positions = decode_upload_->reserve(n, &step.positions);
  const auto row_sequence = decode_upload_->reserve(n, &step.row_sequence);
  const auto logits_rows = decode_upload_->reserve(n, &step.logits_rows);
  logits_row_of_.clear();
  for (std::size_t i = 0; i < n; ++i) {
    sequences[i] = {};
    ids[i] = 0;
    positions[i] = 0;
    row_sequence[i] = -1;
    logits_rows[i] = static_cast<std::int32_t>(i);
    if (i >= runs.size()) continue;
    const StageRun& run = runs[i];
    sequences[i].query_begin = static_cast<std::int32_t>(i);
    sequences[i].n_queries = 1;
    sequences[i].n_context = run.first_position + 1;
    sequences[i].heads = store_->device_heads(run.sequence);
    ids[i] = tokens[i];
    positions[i] = run.first_position;
    row_sequence[i] = static_cast<std::int32_t>(i);
    if (run.wants_logits) logits_row_of_.push_back(static_cast<std::int32_t>(i));
  }
}

CudaStage::ExpandedRun CudaStage::plan_expansion(kvstore::SequenceId sequence,
                                                 std::int32_t n_queries) {
  ExpandedRun run;
  run.n_queries = n_queries;
  const auto n_heads = static_cast<std::size_t>(config_.model.n_kv_heads);
  const auto n_layers = static_cast<std::size_t>(config_.layers.count);
  const auto first_page = mixed_upload_->reserve(n_layers * n_heads, &run.first_page);
  const auto capacity = static_cast<std::int64_t>(expanded_pages_.n_bytes() / pool_.page_bytes());
  for (std::size_t layer = 0; layer < n_layers; ++layer) {
    std::int64_t n_pages = 0;
    std::int32_t max_blocks = 0;
    for (std::size_t head = 0; head < n_heads; ++head) {
      const auto n = static_cast<std::int32_t>(
          store_->head_cache(sequence, static_cast<int>(layer), static_cast<int>(head))
              .blocks.size());
      first_page[layer * n_heads + head] = n_pages;
      n_pages += n;
      max_blocks = std::max(max_blocks, n);
    }
    CHECK(n_pages <= capacity, "the blocks of a sequence fit the pages they are expanded to");
    run.max_blocks.push_back(max_blocks);
  }
  return run;
}

void CudaStage::fill_mixed(Step& step, std::span<const StageRun> runs,
                           std::span<const std::int32_t> tokens) {
  step.n_rows = static_cast<std::int64_t>(tokens.size());
  step.runs = runs;
  step.tokens = mixed_upload_->add(tokens);
  step.positions = mixed_upload_->add(std::span<const std::int32_t>(positions_));
  const auto row_sequence = mixed_upload_->reserve(tokens.size(), &step.row_sequence);
  const auto sequences = mixed_upload_->reserve(runs.size(), &step.sequences);
  const auto logits_rows = mixed_upload_->reserve(runs.size(), &step.logits_rows);
  // Decode runs, then prefills without blocks, then those with.
  std::vector<std::size_t> order[3];
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const bool prefills = runs[i].n_tokens > 1;
    const std::vector<std::uint32_t>& formats = formats_of(runs[i].sequence);
    const bool has_blocks =
        std::any_of(formats.begin(), formats.end(), [](std::uint32_t mask) { return mask != 0; });
    order[!prefills ? 0 : has_blocks ? 2 : 1].push_back(i);
  }
  step.n_decode = static_cast<int>(order[0].size());
  std::vector<StageRun> decode_runs;
  for (const std::size_t i : order[0]) decode_runs.push_back(runs[i]);
  set_formats(step, decode_runs);
  std::vector<std::int32_t> first_rows;
  std::int32_t row = 0;
  logits_row_of_.clear();
  for (const StageRun& run : runs) {
    first_rows.push_back(row);
    row += run.n_tokens;
    if (!run.wants_logits || !config_.is_last) continue;
    logits_row_of_.push_back(static_cast<std::int32_t>(step.n_logits));
    logits_rows[static_cast<std::size_t>(step.n_logits++)] = row - 1;
  }
  n_queries_.clear();
  expanded_runs_.clear();
  std::size_t at = 0;
  for (int kind = 0; kind < 3; ++kind) {
    for (const std::size_t i : order[kind]) {
      const StageRun& run = runs[i];
      sequences[at] = {};
      sequences[at].query_begin = first_rows[i];
      sequences[at].n_queries = run.n_tokens;
      sequences[at].n_context = run.first_position + run.n_tokens;
      sequences[at].heads = store_->device_heads(run.sequence);
      for (std::int32_t j = 0; j < run.n_tokens; ++j) {
        row_sequence[static_cast<std::size_t>(first_rows[i] + j)] = static_cast<std::int32_t>(at);
      }
      if (kind == 1) n_queries_.push_back(run.n_tokens);
      if (kind == 2) expanded_runs_.push_back(plan_expansion(run.sequence, run.n_tokens));
      ++at;
    }
  }
  step.n_queries = n_queries_;
}

void CudaStage::run_step(const Step& step) {
  const Rows hidden(hidden_.as<float>(), step.n_rows, config_.model.hidden_size);
  if (config_.is_first) kernels::embedding(context_, weights_.embedding, step.tokens, hidden);
  if (step.n_decode > 0) {
    kernels::plan_decode(context_, step.sequences, step.n_decode, config_.layers.count, shape(),
                         *decode_workspace_);
  }
  for (int layer = 0; layer < config_.layers.count; ++layer) run_layer(layer, step);
  if (step.n_logits > 0) project_logits(step);
}

void CudaStage::run_layer(int layer, const Step& step) {
  const model::ModelConfig& m = config_.model;
  const CudaLayer& weights = weights_.layers[static_cast<std::size_t>(layer)];
  const std::int64_t n = step.n_rows;
  const std::int64_t q_width = std::int64_t{m.n_heads} * m.head_dim;
  const Rows hidden(hidden_.as<float>(), n, m.hidden_size);
  const Bf16Rows normed(normed_.as<Bf16>(), n, m.hidden_size);
  const Rows qkv(qkv_.as<float>(), n, q_width + 2LL * m.n_kv_heads * m.head_dim);
  kernels::rms_norm(context_, hidden, weights.input_norm.as<float>(), m.rms_norm_eps, normed);
  kernels::linear(context_, weights.qkv, normed, qkv);
  kernels::rope_append(context_, weights_.rope, qkv, step.row_sequence, step.positions,
                       step.sequences, layer, shape(), pool_, F16Rows(q_.as<F16>(), n, q_width));
  take_queries(layer, step);
  attend(layer, step);
  kernels::linear_add(context_, weights.output, ConstBf16Rows(attended_.as<Bf16>(), n, q_width),
                      hidden);
  const Bf16Rows activated(activated_.as<Bf16>(), n, m.intermediate_size);
  kernels::rms_norm(context_, hidden, weights.post_attention_norm.as<float>(), m.rms_norm_eps,
                    normed);
  kernels::linear_swiglu(context_, weights.gate_up, normed,
                         Rows(gate_up_.as<float>(), n, 2LL * m.intermediate_size), activated);
  kernels::linear_add(context_, weights.down, activated, hidden);
}

void CudaStage::take_queries(int layer, const Step& step) {
  const std::int64_t q_width = std::int64_t{config_.model.n_heads} * config_.model.head_dim;
  std::int64_t row = 0;
  for (const StageRun& run : step.runs) {
    scorer_->take_queries(run.sequence, layer, run.first_position,
                          ConstF16Rows(q_.as<F16>() + row * q_width, run.n_tokens, q_width));
    row += run.n_tokens;
  }
}

void CudaStage::attend(int layer, const Step& step) {
  const model::ModelConfig& m = config_.model;
  const std::int64_t q_width = std::int64_t{m.n_heads} * m.head_dim;
  const ConstF16Rows q(q_.as<F16>(), step.n_rows, q_width);
  const Bf16Rows out(attended_.as<Bf16>(), step.n_rows, q_width);
  if (step.n_decode > 0) {
    kernels::attention_decode(context_, q, step.sequences, step.n_decode, layer, shape(), pool_,
                              scale(), weights_.rope, step.formats[static_cast<std::size_t>(layer)],
                              *decode_workspace_, out);
  }
  const kernels::DeviceSequence* sequences = step.sequences + step.n_decode;
  if (!step.n_queries.empty()) {
    kernels::attention_prefill(context_, q, step.n_queries, sequences, layer, shape(), pool_,
                               scale(), {}, out);
    sequences += step.n_queries.size();
  }
  if (step.runs.empty()) return;
  for (const ExpandedRun& run : expanded_runs_) {
    const kernels::DeviceExpandedBlocks expanded{
        expanded_pages_.data(), run.first_page + std::int64_t{layer} * m.n_kv_heads};
    kernels::kv_expand(context_, sequences, 1, layer, shape(), pool_, weights_.rope,
                       run.max_blocks[static_cast<std::size_t>(layer)], expanded);
    kernels::attention_prefill(context_, q, std::span(&run.n_queries, 1), sequences, layer, shape(),
                               pool_, scale(), expanded, out);
    ++sequences;
  }
}

void CudaStage::project_logits(const Step& step) {
  const model::ModelConfig& m = config_.model;
  const Rows rows(sampled_hidden_.as<float>(), step.n_logits, m.hidden_size);
  const Bf16Rows normed(sampled_normed_.as<Bf16>(), step.n_logits, m.hidden_size);
  kernels::gather_rows(context_, ConstRows(hidden_.as<float>(), step.n_rows, m.hidden_size),
                       step.logits_rows, rows);
  kernels::rms_norm(context_, rows, weights_.final_norm.as<float>(), m.rms_norm_eps, normed);
  kernels::linear(context_, *weights_.lm_head, normed,
                  Rows(logits_.as<float>(), step.n_logits, m.vocab_size));
}

void CudaStage::open_boundaries(kvstore::SequenceId sequence, const ScoringNeeds& needs,
                                std::vector<std::int32_t> boundaries) {
  scorer_->open(sequence, needs, std::move(boundaries));
}

bool CudaStage::is_boundary(kvstore::SequenceId sequence) const {
  return scorer_->is_boundary(sequence, store_->length(sequence));
}

BoundarySummary CudaStage::score_boundary(kvstore::SequenceId sequence) {
  std::vector<const kernels::DeviceLinear*> outputs;
  for (const CudaLayer& layer : weights_.layers) outputs.push_back(&layer.output);
  store_->flush_tables();
  return scorer_->score(
      sequence, *store_,
      {pool_, weights_.rope, outputs, expanded_pages_.data(), expanded_pages_.n_bytes()});
}

Result<kvstore::BoundaryKept> CudaStage::compress(kvstore::SequenceId sequence,
                                                  kvstore::StageBoundary boundary, bool selects) {
  std::vector<std::vector<std::int32_t>> kept;
  if (selects) {
    kept = scorer_->select(sequence, *store_, boundary.recent, boundary.heads);
    boundary.kept = kept;
  }
  formats_.erase(sequence);
  return store_->compress(sequence, boundary);
}

void CudaStage::close_boundaries(kvstore::SequenceId sequence) {
  scorer_->free(sequence);
  formats_.erase(sequence);
}

}  // namespace spindle::worker
