// Memory, start and sampling; a step's launches are in cuda_stage_step.cc.

#include "worker/stage/cuda_stage.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>

#include "kernels/core/cuda_check.h"
#include "kernels/norm.h"
#include "kvstore/plan/device_layout.h"
#include "kvstore/plan/kv_shape.h"

namespace spindle::worker {
namespace {

// Rows of prompt_logits(): what StageWorker asks for at a time.
constexpr std::int64_t kPromptRows = 16;
// Sampled rows of one call beyond one for each sequence: choices that fork later.
constexpr std::size_t kMinSampleRows = 64;
// Ids with a penalty, bias or ban, of all rows of one call.
constexpr std::size_t kMaxAdjusts = std::size_t{1} << 18;

std::size_t bytes_of(std::int64_t rows, std::int64_t width, std::size_t element_bytes) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(width) * element_bytes;
}

// The ids whose logits change, each once. Ids outside the vocabulary are left out.
std::vector<kernels::DeviceSampleAdjust> adjusts_of(const SampleRequest& request, int n_vocab) {
  std::unordered_map<std::int32_t, kernels::DeviceSampleAdjust> by_id;
  const auto at = [&](std::int32_t id) -> kernels::DeviceSampleAdjust& {
    kernels::DeviceSampleAdjust& adjust = by_id[id];
    adjust.id = id;
    return adjust;
  };
  for (const std::int32_t id : request.prompt_ids) at(id).seen = 1;
  for (const std::int32_t id : request.output_ids) {
    kernels::DeviceSampleAdjust& adjust = at(id);
    adjust.seen = 1;
    ++adjust.n_output;
  }
  for (const kernels::LogitBias& bias : request.bias) at(bias.id).bias += bias.bias;
  for (const std::int32_t id : request.banned) at(id).banned = 1;
  std::vector<kernels::DeviceSampleAdjust> adjusts;
  for (const auto& [id, adjust] : by_id) {
    if (id >= 0 && id < n_vocab) adjusts.push_back(adjust);
  }
  std::sort(adjusts.begin(), adjusts.end(),
            [](const auto& a, const auto& b) { return a.id < b.id; });
  return adjusts;
}

}  // namespace

CudaStage::CudaStage(const LlamaStageConfig& config, const CudaContext& context,
                     CudaWeights weights)
    : config_(config), context_(context), weights_(std::move(weights)), clock_(context) {}

Result<std::unique_ptr<CudaStage>> CudaStage::create(const LlamaStageConfig& config,
                                                     model::LlamaStageWeights weights,
                                                     const CudaContext& context) {
  const model::ModelConfig& m = config.model;
  const kvstore::KvShape kv{m.n_kv_heads, m.head_dim};
  Status known = kvstore::check_device_layout(kv);
  if (known.ok()) known = kvstore::check_device_heads(kv, m.n_heads);
  if (!known.ok()) return known;
  auto uploaded = CudaWeights::upload(context, config, std::move(weights));
  if (!uploaded.ok()) return uploaded.status();
  std::unique_ptr<CudaStage> stage(new CudaStage(config, context, std::move(*uploaded)));
  if (Status status = stage->allocate(); !status.ok()) return status;
  return stage;
}

CudaStage::~CudaStage() {
  if (sampling_.drawn != nullptr) static_cast<void>(cudaEventDestroy(sampling_.drawn));
}

kernels::AttentionShape CudaStage::shape() const {
  return {config_.model.n_heads, config_.model.n_kv_heads, config_.model.head_dim};
}

float CudaStage::scale() const {
  return 1.0F / std::sqrt(static_cast<float>(config_.model.head_dim));
}

Status CudaStage::allocate() {
  const model::ModelConfig& m = config_.model;
  const std::int64_t n = config_.max_batched_tokens;
  const std::int64_t q_width = std::int64_t{m.n_heads} * m.head_dim;
  const std::int64_t kv_width = std::int64_t{m.n_kv_heads} * m.head_dim;
  const std::int64_t n_sampled = std::max<std::int64_t>(config_.max_num_seqs, kPromptRows);
  struct Wanted {
    DeviceBuffer* buffer;
    std::size_t n_bytes;
    bool last_only;
  };
  sampling_.capacity = std::max(kMinSampleRows, static_cast<std::size_t>(config_.max_num_seqs));
  const Wanted wanted[] = {
      {&hidden_, bytes_of(n, m.hidden_size, 4), false},
      {&normed_, bytes_of(n, m.hidden_size, 2), false},
      {&qkv_, bytes_of(n, q_width + 2 * kv_width, 4), false},
      {&q_, bytes_of(n, q_width, 2), false},
      {&attended_, bytes_of(n, q_width, 2), false},
      {&gate_up_, bytes_of(n, 2LL * m.intermediate_size, 4), false},
      {&activated_, bytes_of(n, m.intermediate_size, 2), false},
      {&sampled_hidden_, bytes_of(n_sampled, m.hidden_size, 4), true},
      {&sampled_normed_, bytes_of(n_sampled, m.hidden_size, 2), true},
      {&logits_, bytes_of(config_.max_num_seqs, m.vocab_size, 4), true},
      {&prompt_logits_, bytes_of(kPromptRows, m.vocab_size, 4), true},
      {&sampling_.device, sampling_.capacity * sizeof(kernels::DeviceSampled), true},
      {&sampling_.workspace,
       kernels::sample_workspace_bytes(static_cast<int>(sampling_.capacity), m.vocab_size), true},
  };
  for (const Wanted& want : wanted) {
    if (want.last_only && !config_.is_last) continue;
    auto buffer = context_.allocate(want.n_bytes, "activations");
    if (!buffer.ok()) return buffer.status();
    *want.buffer = std::move(*buffer);
  }
  if (config_.is_last) {
    auto row = context_.allocate_pinned(bytes_of(1, m.vocab_size, 4), "a row of logits");
    if (!row.ok()) return row.status();
    host_logits_ = std::move(*row);
    auto sampled = context_.allocate_pinned(sampling_.capacity * sizeof(kernels::DeviceSampled),
                                            "sampled tokens");
    if (!sampled.ok()) return sampled.status();
    sampling_.sampled = std::move(*sampled);
    cuda_check(cudaEventCreateWithFlags(&sampling_.drawn, cudaEventDisableTiming),
               "cudaEventCreate");
    auto upload =
        StepUpload::create(context_, sampling_.capacity * sizeof(kernels::DeviceSampleRow) +
                                         kMaxAdjusts * sizeof(kernels::DeviceSampleAdjust) + 256);
    if (!upload.ok()) return upload.status();
    sample_upload_.emplace(std::move(*upload));
  }
  const auto seqs = static_cast<std::size_t>(config_.max_num_seqs);
  const std::size_t per_sequence = sizeof(kernels::DeviceSequence) + 4 * sizeof(std::int32_t);
  auto decode_upload = StepUpload::create(context_, seqs * per_sequence + 8 * 64);
  if (!decode_upload.ok()) return decode_upload.status();
  decode_upload_.emplace(std::move(*decode_upload));
  const std::size_t per_expansion = static_cast<std::size_t>(config_.layers.count) *
                                    static_cast<std::size_t>(m.n_kv_heads) * sizeof(std::int64_t);
  auto mixed_upload =
      StepUpload::create(context_, static_cast<std::size_t>(n) * 3 * sizeof(std::int32_t) +
                                       seqs * (per_sequence + per_expansion + 64) + 8 * 64);
  if (!mixed_upload.ok()) return mixed_upload.status();
  mixed_upload_.emplace(std::move(*mixed_upload));
  auto decode = kernels::DecodeWorkspace::create(context_, config_.max_num_seqs,
                                                 config_.layers.count, shape());
  if (!decode.ok()) return decode.status();
  decode_workspace_.emplace(std::move(*decode));
  return ok_status();
}

std::uint64_t CudaStage::reserved_bytes() const {
  // Blocks of 32 tokens, a few of them partly filled (sinks, the ends of segments).
  const std::int64_t blocks = config_.max_model_len / kernels::kKvBlockTokens + 64;
  const kernels::KvPageLayout layout{config_.model.head_dim, kernels::kKvPageTokens, DType::kF16};
  const std::uint64_t expanded =
      static_cast<std::uint64_t>(blocks * config_.model.n_kv_heads) * layout.page_bytes();
  return expanded + CudaBoundaryScorer::scratch_bytes(config_, shape());
}

Status CudaStage::use_store(kvstore::KvStore& store) {
  store_ = &store;
  pool_ = {store.memory().base(), store.page_layout()};
  if (weights_.token_k.data() != nullptr) {
    store.set_token_table(weights_.token_k.as<std::uint16_t>(),
                          weights_.token_v.as<std::uint16_t>());
  }
  const std::int64_t blocks = config_.max_model_len / kernels::kKvBlockTokens + 64;
  auto expanded = context_.allocate(
      static_cast<std::size_t>(blocks * config_.model.n_kv_heads) * pool_.page_bytes(),
      "expanded blocks of a prefill");
  if (!expanded.ok()) return expanded.status();
  expanded_pages_ = std::move(*expanded);
  auto scorer = CudaBoundaryScorer::create(context_, config_, shape());
  if (!scorer.ok()) return scorer.status();
  scorer_ = std::move(*scorer);
  return record_graphs();
}

void CudaStage::bind_thread() { cuda_check(cudaSetDevice(context_.device()), "cudaSetDevice"); }

std::span<std::byte> CudaStage::activations(std::int64_t n_tokens) {
  CHECK(n_tokens >= 0 && n_tokens <= config_.max_batched_tokens, "rows of a step");
  return {hidden_.data(), bytes_of(n_tokens, config_.model.hidden_size, sizeof(float))};
}

Status CudaStage::sample(std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                         const std::function<bool()>& meanwhile) {
  CHECK(config_.is_last && requests.size() == tokens.size(), "a token for each request");
  for (std::size_t first = 0; first < requests.size(); first += sampling_.capacity) {
    const std::size_t n = std::min(sampling_.capacity, requests.size() - first);
    const bool is_last = first + n == requests.size();
    const Status status = sample_batch(requests.subspan(first, n), tokens.subspan(first, n),
                                       is_last ? meanwhile : nullptr);
    if (!status.ok()) return status;
  }
  return ok_status();
}

Status CudaStage::sample_batch(std::span<const SampleRequest> requests,
                               std::span<std::int32_t> tokens,
                               const std::function<bool()>& meanwhile) {
  std::vector<kernels::DeviceSampleRow> rows;
  std::vector<kernels::DeviceSampleAdjust> adjusts;
  for (const SampleRequest& request : requests) {
    kernels::DeviceSampleRow row;
    row.params = request.params;
    row.uniform = kernels::sample_uniform(request.key);
    row.logits_row = logits_row_of_.at(static_cast<std::size_t>(request.row));
    row.first_adjust = static_cast<std::int32_t>(adjusts.size());
    const std::vector<kernels::DeviceSampleAdjust> own =
        adjusts_of(request, config_.model.vocab_size);
    row.n_adjust = static_cast<std::int32_t>(own.size());
    adjusts.insert(adjusts.end(), own.begin(), own.end());
    rows.push_back(row);
  }
  if (adjusts.size() > kMaxAdjusts) {
    // A row has at most as many as there are ids, so halves get there.
    const std::size_t half = requests.size() / 2;
    if (half == 0) return invalid_argument("more penalised ids than one call takes");
    Status status = sample_batch(requests.first(half), tokens.first(half), nullptr);
    if (!status.ok()) return status;
    return sample_batch(requests.subspan(half), tokens.subspan(half), meanwhile);
  }
  sample_upload_->begin();
  const auto* device_rows = sample_upload_->add(std::span<const kernels::DeviceSampleRow>(rows));
  const auto* device_adjusts =
      sample_upload_->add(std::span<const kernels::DeviceSampleAdjust>(adjusts));
  sample_upload_->flush();
  const ConstRows logits(logits_.as<float>(), config_.max_num_seqs, config_.model.vocab_size);
  auto* sampled = sampling_.device.as<kernels::DeviceSampled>();
  kernels::sample(context_, logits, device_rows, static_cast<int>(rows.size()), device_adjusts,
                  sampling_.workspace.data(), sampling_.workspace.n_bytes(), sampled);
  context_.to_host(sampling_.sampled.data(), sampled, rows.size() * sizeof(kernels::DeviceSampled));
  cuda_check(cudaEventRecord(sampling_.drawn, context_.stream()), "cudaEventRecord");
  while (meanwhile && meanwhile() && !event_reached(sampling_.drawn)) std::this_thread::yield();
  cuda_check(cudaEventSynchronize(sampling_.drawn), "waiting for the drawn tokens");
  const auto* host = sampling_.sampled.as<kernels::DeviceSampled>();
  for (std::size_t i = 0; i < rows.size(); ++i) tokens[i] = host[i].token;
  return ok_status();
}

Result<std::span<const float>> CudaStage::logits(std::int64_t row) {
  CHECK(config_.is_last, "logits are made by the last stage");
  const std::int64_t at = logits_row_of_.at(static_cast<std::size_t>(row));
  context_.to_host(host_logits_.data(), logits_.as<float>() + at * config_.model.vocab_size,
                   host_logits_.n_bytes());
  context_.synchronize();
  return std::span<const float>(host_logits_.as<float>(),
                                static_cast<std::size_t>(config_.model.vocab_size));
}

Status CudaStage::prompt_logits(std::int64_t first_row, Rows logits) {
  const model::ModelConfig& m = config_.model;
  CHECK(config_.is_last && first_row >= 0 && logits.width == m.vocab_size &&
            first_row + logits.n_rows <= config_.max_batched_tokens,
        "rows of the step's activations");
  for (std::int64_t first = 0; first < logits.n_rows; first += kPromptRows) {
    const std::int64_t n = std::min(kPromptRows, logits.n_rows - first);
    const Bf16Rows normed(sampled_normed_.as<Bf16>(), n, m.hidden_size);
    kernels::rms_norm(
        context_,
        ConstRows(hidden_.as<float>() + (first_row + first) * m.hidden_size, n, m.hidden_size),
        weights_.final_norm.as<float>(), m.rms_norm_eps, normed);
    kernels::linear(context_, *weights_.lm_head, normed,
                    Rows(prompt_logits_.as<float>(), n, m.vocab_size));
    for (std::int64_t i = 0; i < n; ++i) {
      context_.to_host(logits.row(first + i), prompt_logits_.as<float>() + i * m.vocab_size,
                       bytes_of(1, m.vocab_size, sizeof(float)));
    }
    context_.synchronize();
  }
  return ok_status();
}

}  // namespace spindle::worker
