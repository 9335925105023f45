#include "worker/stage/cuda_weights.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>

#include "kernels/convert.h"
#include "kernels/norm.h"
#include "worker/stage/token_table.h"

namespace spindle::worker {
namespace {

using kernels::DeviceLinear;
using kernels::WeightSource;

// Ids whose activations are held at a time while layer 0's table is built.
constexpr std::int64_t kTableRows = 256;

WeightSource source_of(const model::HostTensor& tensor) {
  return {tensor.data.bytes().data(), tensor.dtype, tensor.shape.front()};
}

// One at a time: host memory holds one tensor's widened copy.
class Uploader {
 public:
  Uploader(const CudaContext& context, const LlamaStageConfig& config, CudaWeights& out)
      : context_(context), config_(config), out_(out) {}

  Status run(model::LlamaStageWeights weights) {
    for (std::size_t i = 0; i < weights.layers.size(); ++i) {
      if (Status status = add_layer(weights.layers[i]); !status.ok()) {
        return status.with_context("layer " +
                                   std::to_string(config_.layers.first + static_cast<int>(i)));
      }
      weights.layers[i] = {};
    }
    if (config_.is_last) {
      if (Status status = add_head(weights); !status.ok()) return status;
    }
    if (config_.is_first) {
      if (Status status = add_embedding(weights); !status.ok()) return status;
    }
    if (Status status = add_rope(); !status.ok()) return status;
    return config_.layers.first == 0 ? build_token_table() : ok_status();
  }

 private:
  Result<DeviceBuffer> copy(const void* data, std::size_t n_bytes, std::string_view what) {
    auto buffer = context_.allocate(n_bytes, what);
    if (!buffer.ok()) return buffer;
    context_.to_device(buffer->data(), data, n_bytes);
    context_.synchronize();  // `data` may go away
    out_.n_bytes += n_bytes;
    return buffer;
  }

  Result<DeviceBuffer> copy_widened(const model::HostTensor& tensor, std::string_view what) {
    std::vector<float> values(static_cast<std::size_t>(tensor.n_elements()));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = tensor.at(static_cast<std::int64_t>(i));
    }
    return copy(values.data(), values.size() * sizeof(float), what);
  }

  // The algorithms are timed for the first weight of a shape and copied to the others.
  Result<DeviceLinear> product(std::span<const WeightSource> sources, std::int64_t n_in,
                               const DeviceLinear* same_shape, std::int64_t max_rows,
                               kernels::LinearForms forms) {
    auto linear = DeviceLinear::upload(context_, sources, n_in);
    if (!linear.ok()) return linear;
    out_.n_bytes += linear->bytes();
    if (same_shape != nullptr) {
      linear->copy_tuning(*same_shape);
    } else if (Status status = kernels::tune_linear(context_, *linear, max_rows, forms);
               !status.ok()) {
      return status;
    }
    return linear;
  }

  Status add_layer(const model::LlamaLayerWeights& w) {
    const model::ModelConfig& m = config_.model;
    const CudaLayer* first = out_.layers.empty() ? nullptr : &out_.layers.front();
    const std::int64_t n = config_.max_batched_tokens;
    const WeightSource qkv[] = {source_of(w.q_proj), source_of(w.k_proj), source_of(w.v_proj)};
    const WeightSource output[] = {source_of(w.o_proj)};
    const WeightSource gate_up[] = {source_of(w.gate_proj), source_of(w.up_proj)};
    const WeightSource down[] = {source_of(w.down_proj)};
    auto input_norm = copy_widened(w.input_norm, "a norm");
    if (!input_norm.ok()) return input_norm.status();
    auto post_norm = copy_widened(w.post_attention_norm, "a norm");
    if (!post_norm.ok()) return post_norm.status();
    auto to_qkv =
        product(qkv, m.hidden_size, first ? &first->qkv : nullptr, n, kernels::kLinearF32);
    if (!to_qkv.ok()) return to_qkv.status().with_context("q, k and v projection");
    auto to_output = product(output, std::int64_t{m.n_heads} * m.head_dim,
                             first ? &first->output : nullptr, n, kernels::kLinearAdd);
    if (!to_output.ok()) return to_output.status().with_context("output projection");
    auto to_gate_up = product(gate_up, m.hidden_size, first ? &first->gate_up : nullptr, n,
                              kernels::kLinearSwiglu);
    if (!to_gate_up.ok()) return to_gate_up.status().with_context("gate and up projection");
    auto to_down =
        product(down, m.intermediate_size, first ? &first->down : nullptr, n, kernels::kLinearAdd);
    if (!to_down.ok()) return to_down.status().with_context("down projection");
    out_.layers.push_back({std::move(*input_norm), std::move(*post_norm), std::move(*to_qkv),
                           std::move(*to_output), std::move(*to_gate_up), std::move(*to_down)});
    return ok_status();
  }

  Status add_head(const model::LlamaStageWeights& weights) {
    auto norm = copy_widened(*weights.final_norm, "the final norm");
    if (!norm.ok()) return norm.status();
    out_.final_norm = std::move(*norm);
    const WeightSource head[] = {source_of(*weights.lm_head)};
    // Rows that are sampled, not all that are run.
    auto linear = product(head, config_.model.hidden_size, nullptr,
                          std::max<std::int64_t>(config_.max_num_seqs, 16), kernels::kLinearF32);
    if (!linear.ok()) return linear.status().with_context("lm_head");
    out_.lm_head = std::make_unique<DeviceLinear>(std::move(*linear));
    return ok_status();
  }

  Status add_embedding(const model::LlamaStageWeights& weights) {
    const model::HostTensor& rows = *weights.embedding;
    const model::ModelConfig& m = config_.model;
    // Tied embeddings of a stage with both ends are on the device already.
    if (config_.is_last && weights.embedding == weights.lm_head && rows.dtype == DType::kBF16) {
      out_.embedding = {out_.lm_head->data(), DType::kBF16, m.vocab_size, m.hidden_size};
      return ok_status();
    }
    auto buffer = copy(rows.data.bytes().data(), rows.data.bytes().size(), "the embedding table");
    if (!buffer.ok()) return buffer.status();
    out_.embedding_rows = std::move(*buffer);
    out_.embedding = {out_.embedding_rows.data(), rows.dtype, m.vocab_size, m.hidden_size};
    return ok_status();
  }

  Status add_rope() {
    const std::vector<float> inv_freq = model::rope_inv_freq(config_.model);
    auto table = kernels::RopeTable::create(inv_freq, config_.max_model_len);
    if (!table.ok()) return table.status();
    const auto n_bytes =
        static_cast<std::size_t>(config_.max_model_len) * inv_freq.size() * sizeof(float);
    auto cos = copy(table->cos(0), n_bytes, "the table of RoPE");
    if (!cos.ok()) return cos.status();
    auto sin = copy(table->sin(0), n_bytes, "the table of RoPE");
    if (!sin.ok()) return sin.status();
    out_.rope_cos = std::move(*cos);
    out_.rope_sin = std::move(*sin);
    out_.rope = {out_.rope_cos.as<float>(), out_.rope_sin.as<float>(), config_.max_model_len,
                 table->rotary_dim(), table->attention_scale()};
    return ok_status();
  }

  Status build_token_table() {
    const model::ModelConfig& m = config_.model;
    const std::uint64_t table_bytes = TokenTable::bytes_for(m);
    if (table_bytes > config_.token_table_bytes) return ok_status();
    const std::int64_t q_width = std::int64_t{m.n_heads} * m.head_dim;
    const std::int64_t kv_width = std::int64_t{m.n_kv_heads} * m.head_dim;
    const std::int64_t width = q_width + 2 * kv_width;
    const auto f32 = [](std::int64_t n) { return static_cast<std::size_t>(n) * sizeof(float); };
    auto k = context_.allocate(table_bytes / 2, "layer 0's token table");
    auto v = context_.allocate(table_bytes / 2, "layer 0's token table");
    auto ids = context_.allocate(kTableRows * sizeof(std::int32_t), "token ids");
    auto hidden = context_.allocate(f32(kTableRows * m.hidden_size), "activations");
    auto normed = context_.allocate(f32(kTableRows * m.hidden_size) / 2, "activations");
    auto projected = context_.allocate(f32(kTableRows * width), "activations");
    for (const auto* buffer : {&k, &v, &ids, &hidden, &normed, &projected}) {
      if (!buffer->ok()) return buffer->status();
    }
    std::vector<std::int32_t> batch(static_cast<std::size_t>(kTableRows));
    for (std::int64_t first = 0; first < m.vocab_size; first += kTableRows) {
      const std::int64_t n = std::min<std::int64_t>(kTableRows, m.vocab_size - first);
      std::iota(batch.begin(), batch.end(), static_cast<std::int32_t>(first));
      context_.to_device(ids->data(), batch.data(),
                         static_cast<std::size_t>(n) * sizeof(std::int32_t));
      const Rows rows(hidden->as<float>(), n, m.hidden_size);
      const Bf16Rows rounded(normed->as<Bf16>(), n, m.hidden_size);
      const Rows out(projected->as<float>(), n, width);
      kernels::embedding(context_, out_.embedding, ids->as<std::int32_t>(), rows);
      kernels::rms_norm(context_, rows, out_.layers.front().input_norm.as<float>(), m.rms_norm_eps,
                        rounded);
      kernels::linear(context_, out_.layers.front().qkv, rounded, out);
      kernels::convert(context_, out.columns(q_width, kv_width),
                       F16Rows(k->as<F16>() + first * kv_width, n, kv_width));
      kernels::convert(context_, out.columns(q_width + kv_width, kv_width),
                       F16Rows(v->as<F16>() + first * kv_width, n, kv_width));
    }
    context_.synchronize();
    out_.token_k = std::move(*k);
    out_.token_v = std::move(*v);
    out_.n_bytes += table_bytes;
    return ok_status();
  }

  const CudaContext& context_;
  const LlamaStageConfig& config_;
  CudaWeights& out_;
};

}  // namespace

Result<CudaWeights> CudaWeights::upload(const CudaContext& context, const LlamaStageConfig& config,
                                        model::LlamaStageWeights weights) {
  CudaWeights out;
  Status status = Uploader(context, config, out).run(std::move(weights));
  if (!status.ok()) return status;
  return out;
}

}  // namespace spindle::worker
