#include "worker/stage/llama_stage.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/embedding.h"
#include "kernels/norm.h"
#include "worker/stage/step_rows.h"

namespace spindle::worker {
namespace {

kernels::WeightSource source_of(const model::HostTensor& tensor) {
  return {tensor.data.bytes().data(), tensor.dtype, tensor.shape.front()};
}

std::vector<float> widened(const model::HostTensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.n_elements()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = tensor.at(static_cast<std::int64_t>(i));
  }
  return values;
}

std::size_t elements(std::int64_t rows, std::int64_t width) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(width);
}

}  // namespace

Result<std::unique_ptr<LlamaStage>> LlamaStage::create(const LlamaStageConfig& config,
                                                       model::LlamaStageWeights weights,
                                                       const CpuContext& context,
                                                       kvstore::KvStore& store) {
  const model::ModelConfig& m = config.model;
  if (m.head_dim % 16 != 0 || m.head_dim > kernels::kMaxHeadDim) {
    return unimplemented("head_dim " + std::to_string(m.head_dim) +
                         ": the attention kernels take multiples of 16 up to " +
                         std::to_string(kernels::kMaxHeadDim));
  }
  const std::vector<float> inv_freq = model::rope_inv_freq(m);
  auto rope = kernels::RopeTable::create(inv_freq, config.max_model_len);
  if (!rope.ok()) return rope.status();
  std::unique_ptr<LlamaStage> stage(new LlamaStage(config, context, store, std::move(*rope)));
  if (Status status = stage->pack(std::move(weights)); !status.ok()) return status;
  return stage;
}

LlamaStage::LlamaStage(const LlamaStageConfig& config, const CpuContext& context,
                       kvstore::KvStore& store, kernels::RopeTable rope)
    : config_(config),
      context_(context),
      store_(store),
      rope_(std::move(rope)),
      scorer_({config.layers.count, config.model.n_heads, config.model.n_kv_heads,
               config.model.head_dim}) {
  const model::ModelConfig& m = config_.model;
  const std::int64_t n = config_.max_batched_tokens;
  hidden_.resize(elements(n, m.hidden_size));
  normed_.resize(elements(n, m.hidden_size));
  qkv_.resize(elements(n, (m.n_heads + 2 * m.n_kv_heads) * m.head_dim));
  attention_.resize(elements(n, m.n_heads * m.head_dim));
  gate_up_.resize(elements(n, 2LL * m.intermediate_size));
  activated_.resize(elements(n, m.intermediate_size));
  delta_.resize(elements(n, m.hidden_size));
}

Status LlamaStage::pack(model::LlamaStageWeights weights) {
  if (config_.is_first) {
    embedding_ = weights.embedding;
    weight_bytes_ += embedding_->data.bytes().size();
  }
  for (model::LlamaLayerWeights& layer : weights.layers) {
    if (Status status = pack_layer(layer); !status.ok()) return status;
    layer = {};  // one layer's unpacked copy at a time
  }
  if (config_.layers.first == 0 &&
      TokenTable::bytes_for(config_.model) <= config_.token_table_bytes) {
    const kernels::EmbeddingTable table{embedding_->data.bytes().data(), embedding_->dtype,
                                        config_.model.vocab_size, config_.model.hidden_size};
    token_table_ = build_token_table(context_, config_.model, table, layers_.front().input_norm,
                                     layers_.front().qkv);
    store_.set_token_table(token_table_.k.data(), token_table_.v.data());
    weight_bytes_ += TokenTable::bytes_for(config_.model);
  }
  if (config_.is_last) {
    final_norm_ = widened(*weights.final_norm);
    const kernels::WeightSource head[] = {source_of(*weights.lm_head)};
    auto packed =
        kernels::PackedLinear::pack(context_, head, config_.model.hidden_size, config_.linear_math);
    if (!packed.ok()) return packed.status().with_context("lm_head");
    lm_head_ = std::make_unique<kernels::PackedLinear>(std::move(*packed));
    weight_bytes_ += lm_head_->bytes() + final_norm_.size() * sizeof(float);
  }
  return ok_status();
}

Status LlamaStage::pack_layer(model::LlamaLayerWeights& w) {
  const model::ModelConfig& m = config_.model;
  const auto pack = [&](std::span<const kernels::WeightSource> sources, std::int64_t n_in) {
    return kernels::PackedLinear::pack(context_, sources, n_in, config_.linear_math);
  };
  const kernels::WeightSource qkv[] = {source_of(w.q_proj), source_of(w.k_proj),
                                       source_of(w.v_proj)};
  const kernels::WeightSource output[] = {source_of(w.o_proj)};
  const kernels::WeightSource gate_up[] = {source_of(w.gate_proj), source_of(w.up_proj)};
  const kernels::WeightSource down[] = {source_of(w.down_proj)};
  auto packed_qkv = pack(qkv, m.hidden_size);
  auto packed_output = pack(output, static_cast<std::int64_t>(m.n_heads) * m.head_dim);
  auto packed_gate_up = pack(gate_up, m.hidden_size);
  auto packed_down = pack(down, m.intermediate_size);
  for (const auto* packed : {&packed_qkv, &packed_output, &packed_gate_up, &packed_down}) {
    if (!packed->ok()) {
      return packed->status().with_context(
          "layer " + std::to_string(config_.layers.first + static_cast<int>(layers_.size())));
    }
    weight_bytes_ += (*packed)->bytes();
  }
  layers_.push_back({widened(w.input_norm), widened(w.post_attention_norm), std::move(*packed_qkv),
                     std::move(*packed_output), std::move(*packed_gate_up),
                     std::move(*packed_down)});
  weight_bytes_ += 2ULL * static_cast<std::uint64_t>(m.hidden_size) * sizeof(float);
  return ok_status();
}

std::span<std::byte> LlamaStage::activations(std::int64_t n_tokens) {
  CHECK(n_tokens >= 0 && n_tokens <= config_.max_batched_tokens, "rows of a step");
  return std::as_writable_bytes(
      std::span(hidden_).first(elements(n_tokens, config_.model.hidden_size)));
}

Status LlamaStage::forward(std::span<const StageRun> runs, std::span<const std::int32_t> tokens) {
  const auto n_tokens = static_cast<std::int64_t>(tokens.size());
  if (n_tokens > config_.max_batched_tokens) {
    return extend_for_step(config_, store_, runs, tokens, n_tokens, positions_);
  }
  const std::int64_t n_logits =
      config_.is_last ? std::count_if(runs.begin(), runs.end(),
                                      [](const StageRun& run) { return run.wants_logits; })
                      : 0;
  logits_.resize(std::max(logits_.size(), elements(n_logits, config_.model.vocab_size)));
  return forward(runs, tokens, Rows(hidden_.data(), n_tokens, config_.model.hidden_size),
                 Rows(logits_.data(), n_logits, config_.model.vocab_size));
}

Status LlamaStage::sample(std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                          const std::function<bool()>& /*meanwhile*/) {
  CHECK(requests.size() == tokens.size(), "a token for each request");
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const SampleRequest& request = requests[i];
    const auto row = logits(request.row);
    if (!row.ok()) return row.status();
    const kernels::SampleHistory history{request.prompt_ids, request.output_ids, request.bias,
                                         request.banned};
    tokens[i] =
        kernels::sample(context_, *row, request.params, history, request.key, sample_workspace_);
  }
  return ok_status();
}

Result<std::span<const float>> LlamaStage::logits(std::int64_t row) {
  const std::size_t width = elements(1, config_.model.vocab_size);
  CHECK(row >= 0 && elements(row + 1, config_.model.vocab_size) <= logits_.size(),
        "a row of the step's logits");
  return std::span<const float>(logits_).subspan(static_cast<std::size_t>(row) * width, width);
}

Status LlamaStage::prompt_logits(std::int64_t first_row, Rows logits) {
  logits_of(ConstRows(hidden_.data() + elements(first_row, config_.model.hidden_size),
                      logits.n_rows, config_.model.hidden_size),
            logits);
  return ok_status();
}

Status LlamaStage::forward(std::span<const StageRun> runs, std::span<const std::int32_t> tokens,
                           Rows hidden, Rows logits) {
  Status status = extend_for_step(config_, store_, runs, tokens, hidden.n_rows, positions_);
  if (!status.ok()) return status;
  if (config_.is_first) {
    const model::ModelConfig& m = config_.model;
    const kernels::EmbeddingTable table{embedding_->data.bytes().data(), embedding_->dtype,
                                        m.vocab_size, m.hidden_size};
    kernels::embedding(context_, table, tokens, hidden);
  }
  for (int layer = 0; layer < config_.layers.count; ++layer) forward_layer(layer, runs, hidden);
  if (config_.is_last) project_logits(runs, hidden, logits);
  return ok_status();
}

void LlamaStage::forward_layer(int layer, std::span<const StageRun> runs, Rows hidden) {
  const model::ModelConfig& m = config_.model;
  const Layer& weights = layers_[static_cast<std::size_t>(layer)];
  const std::int64_t n = hidden.n_rows;
  const Rows normed(normed_.data(), n, m.hidden_size);
  const Rows qkv(qkv_.data(), n,
                 static_cast<std::int64_t>(m.n_heads + 2 * m.n_kv_heads) * m.head_dim);
  const Rows attended(attention_.data(), n, static_cast<std::int64_t>(m.n_heads) * m.head_dim);
  const Rows gate_up(gate_up_.data(), n, 2LL * m.intermediate_size);
  const Rows activated(activated_.data(), n, m.intermediate_size);
  const Rows delta(delta_.data(), n, m.hidden_size);

  kernels::rms_norm(context_, hidden, weights.input_norm, m.rms_norm_eps, normed);
  kernels::linear(context_, weights.qkv, normed, qkv);
  attend(layer, runs, qkv, attended);
  kernels::linear(context_, weights.output, attended, delta);
  kernels::add_rms_norm(context_, delta, hidden, weights.post_attention_norm, m.rms_norm_eps,
                        normed);
  kernels::linear(context_, weights.gate_up, normed, gate_up);
  kernels::swiglu(context_, gate_up, activated);
  kernels::linear(context_, weights.down, activated, delta);
  kernels::residual_add(context_, delta, hidden);
}

void LlamaStage::attend(int layer, std::span<const StageRun> runs, Rows qkv, Rows out) {
  const model::ModelConfig& m = config_.model;
  const std::int64_t q_width = static_cast<std::int64_t>(m.n_heads) * m.head_dim;
  const std::int64_t kv_width = static_cast<std::int64_t>(m.n_kv_heads) * m.head_dim;
  const Rows q = qkv.columns(0, q_width);
  const Rows k = qkv.columns(q_width, kv_width);
  const Rows v = qkv.columns(q_width + kv_width, kv_width);
  kernels::rope(context_, rope_, positions_, m.head_dim, q, k);

  attention_sequences_.clear();
  append_sequences_.clear();
  std::int64_t row = 0;
  for (const StageRun& run : runs) {
    append_sequences_.push_back(
        {row, run.n_tokens, run.first_position, store_.writable_heads(run.sequence, layer).data()});
    attention_sequences_.push_back({row, run.n_tokens, run.first_position + run.n_tokens,
                                    store_.heads(run.sequence, layer).data()});
    scorer_.take_queries(run.sequence, layer, run.first_position, q.rows(row, run.n_tokens));
    row += run.n_tokens;
  }
  kernels::kv_append(context_, k, v, append_sequences_, m.n_kv_heads, store_.page_layout());
  const float scale = 1.0F / std::sqrt(static_cast<float>(m.head_dim));
  kernels::attention(context_, q, attention_sequences_, {m.n_heads, m.n_kv_heads, m.head_dim},
                     store_.page_layout(), scale, out, &rope_);
}

void LlamaStage::project_logits(std::span<const StageRun> runs, ConstRows hidden, Rows logits) {
  const model::ModelConfig& m = config_.model;
  // Only rows that are sampled pass the head: gather them first.
  std::int64_t row = 0;
  std::int64_t n_wanted = 0;
  for (const StageRun& run : runs) {
    row += run.n_tokens;
    if (!run.wants_logits) continue;
    std::copy_n(hidden.row(row - 1), m.hidden_size, delta_.data() + n_wanted * m.hidden_size);
    ++n_wanted;
  }
  CHECK(logits.n_rows == n_wanted, "one row of logits for each run that wants them");
  if (n_wanted == 0) return;
  logits_of(Rows(delta_.data(), n_wanted, m.hidden_size), logits);
}

void LlamaStage::logits_of(ConstRows hidden, Rows logits) {
  CHECK(config_.is_last && hidden.n_rows <= config_.max_batched_tokens &&
            logits.n_rows == hidden.n_rows,
        "logits are made by the last stage");
  const Rows normed(normed_.data(), hidden.n_rows, config_.model.hidden_size);
  kernels::rms_norm(context_, hidden, final_norm_, config_.model.rms_norm_eps, normed);
  kernels::linear(context_, *lm_head_, normed, logits);
}

BoundarySummary LlamaStage::score_boundary(kvstore::SequenceId sequence) {
  std::vector<const kernels::PackedLinear*> outputs;
  for (const Layer& layer : layers_) outputs.push_back(&layer.output);
  return scorer_.score(context_, sequence, store_, rope_, outputs);
}

Result<kvstore::BoundaryKept> LlamaStage::compress(kvstore::SequenceId sequence,
                                                   kvstore::StageBoundary boundary, bool selects) {
  std::vector<std::vector<std::int32_t>> kept;
  if (selects) {
    kept = scorer_.select(sequence, store_, boundary.recent, boundary.heads);
    boundary.kept = kept;
  }
  return store_.compress(context_, &rope_, sequence, boundary);
}

}  // namespace spindle::worker
