#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "kernels/attention.h"
#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/decode_launch.h"

namespace spindle::kernels {
namespace {

constexpr float kLog2E = 1.44269504F;

int group_of(const AttentionShape& shape) { return shape.n_heads / shape.n_kv_heads; }
// Entries of one sequence in one layer.
int entries_per_sequence(const AttentionShape& shape) {
  return shape.n_kv_heads * std::max(1, group_of(shape) / kDecodeTileHeads);
}

DecodeKernels kernels_of(const CudaContext& context, DecodeFormats formats) {
  switch (formats) {
    case DecodeFormats::kRaw:
      return decode_raw_kernels();
    case DecodeFormats::kInt4:
      return decode_int4_kernels();
    case DecodeFormats::kLloyd:
      return context.compute_capability() == 90 ? decode_lloyd_table_kernels()
                                                : decode_lloyd_kernels();
    case DecodeFormats::kKivi:
      return decode_kivi_kernels();
    case DecodeFormats::kRows:
      return decode_rows_kernels();
    case DecodeFormats::kAll:
      break;
  }
  return decode_all_kernels();
}

void check_shape(const AttentionShape& shape) {
  CHECK(shape.head_dim == 64 || shape.head_dim == 128, "head_dim of decode attention");
  CHECK(shape.n_kv_heads > 0 && shape.n_heads > 0 && shape.n_heads % shape.n_kv_heads == 0 &&
            (group_of(shape) <= kDecodeTileHeads || group_of(shape) % kDecodeTileHeads == 0),
        "group of query heads of decode attention");
}

}  // namespace

struct DecodeWorkspace::Body {
  AttentionShape shape;
  DecodePlan plan;
  DeviceBuffer entries;
  DeviceBuffer shares;
  DeviceBuffer partials;
  DeviceBuffer arrivals;
};

class DecodeWorkspaceAccess {
 public:
  static const DecodeWorkspace::Body& body(const DecodeWorkspace& workspace) {
    return *workspace.body_;
  }
};

DecodeWorkspace::DecodeWorkspace(std::unique_ptr<Body> body) : body_(std::move(body)) {}
DecodeWorkspace::DecodeWorkspace(DecodeWorkspace&&) noexcept = default;
DecodeWorkspace& DecodeWorkspace::operator=(DecodeWorkspace&&) noexcept = default;
DecodeWorkspace::~DecodeWorkspace() = default;

Result<DecodeWorkspace> DecodeWorkspace::create(const CudaContext& context, int max_sequences,
                                                int n_layers, const AttentionShape& shape) {
  check_shape(shape);
  CHECK(max_sequences > 0 && n_layers > 0, "size of a decode workspace");
  auto body = std::make_unique<Body>();
  body->shape = shape;
  DecodePlan& plan = body->plan;
  plan.max_entries = max_sequences * entries_per_sequence(shape);
  plan.n_layers = n_layers;
  int per_multiprocessor = 1 << 10;
  for (const DecodeFormats formats :
       {DecodeFormats::kRaw, DecodeFormats::kInt4, DecodeFormats::kLloyd, DecodeFormats::kKivi,
        DecodeFormats::kRows, DecodeFormats::kAll}) {
    per_multiprocessor = std::min(
        per_multiprocessor, kernels_of(context, formats).teams_per_multiprocessor(shape.head_dim));
  }
  plan.n_teams = per_multiprocessor * context.n_multiprocessors();
  CHECK(plan.n_teams > 0, "the decode kernel fits the device");
  const auto layers = static_cast<std::size_t>(n_layers);
  const auto entries = static_cast<std::size_t>(plan.max_entries);
  const auto teams = static_cast<std::size_t>(plan.n_teams);
  const auto allocate = [&](DeviceBuffer& buffer, std::size_t n_bytes) {
    auto memory = context.allocate(n_bytes, "the workspace of decode attention");
    if (!memory.ok()) return memory.status();
    buffer = std::move(*memory);
    return Status();
  };
  for (const auto& [buffer, n_bytes] :
       {std::pair<DeviceBuffer*, std::size_t>{&body->entries,
                                              layers * entries * sizeof(DecodeEntry)},
        {&body->shares, layers * teams * sizeof(DecodeShare)},
        {&body->partials, teams * 2 * decode_partial_floats(shape.head_dim) * sizeof(float)},
        {&body->arrivals, entries * sizeof(std::uint32_t)}}) {
    if (Status status = allocate(*buffer, n_bytes); !status.ok()) return status;
  }
  plan.entries = body->entries.as<DecodeEntry>();
  plan.shares = body->shares.as<DecodeShare>();
  plan.partials = body->partials.as<float>();
  plan.arrivals = body->arrivals.as<std::uint32_t>();
  context.fill(body->shares.data(), 0, body->shares.n_bytes());
  context.fill(body->arrivals.data(), 0, body->arrivals.n_bytes());
  return DecodeWorkspace(std::move(body));
}

void plan_decode(const CudaContext& context, const DeviceSequence* sequences, int n_sequences,
                 int n_layers, const AttentionShape& shape, DecodeWorkspace& workspace) {
  const auto& body = DecodeWorkspaceAccess::body(workspace);
  CHECK(shape.n_heads == body.shape.n_heads && shape.n_kv_heads == body.shape.n_kv_heads &&
            shape.head_dim == body.shape.head_dim,
        "shape of the decode workspace");
  CHECK(n_sequences >= 0 && n_sequences * entries_per_sequence(shape) <= body.plan.max_entries &&
            n_layers >= 0 && n_layers <= body.plan.n_layers,
        "size of the decode workspace");
  if (n_sequences == 0 || n_layers == 0) return;
  launch_plan_decode(context.stream(), body.plan, sequences, n_sequences, n_layers,
                     shape.n_kv_heads, group_of(shape));
}

void attention_decode(const CudaContext& context, ConstF16Rows q, const DeviceSequence* sequences,
                      int n_sequences, int layer, const AttentionShape& shape,
                      const DeviceKvPool& pool, float scale, const DeviceRope& rope,
                      DecodeFormats formats, DecodeWorkspace& workspace, Bf16Rows out) {
  static_cast<void>(sequences);  // the plan has what is needed of them
  const auto& body = DecodeWorkspaceAccess::body(workspace);
  const std::int64_t width = std::int64_t{shape.n_heads} * shape.head_dim;
  CHECK(shape.n_heads == body.shape.n_heads && shape.n_kv_heads == body.shape.n_kv_heads &&
            shape.head_dim == body.shape.head_dim && layer >= 0 && layer < body.plan.n_layers &&
            n_sequences * entries_per_sequence(shape) <= body.plan.max_entries,
        "the decode workspace of another shape");
  CHECK(pool.layout.head_dim == shape.head_dim && pool.layout.page_tokens == kKvPageTokens &&
            pool.layout.dtype != DType::kF32,
        "pages of decode attention");
  CHECK(q.width == width && out.width == width, "rows of decode attention");
  CHECK(q.stride % 8 == 0 && out.stride % 4 == 0, "rows of decode attention are aligned");
  CHECK(rope.cos == nullptr || rope.rotary_dim == shape.head_dim,
        "keys before RoPE are rotated over the whole head");
  if (n_sequences == 0) return;
  const DecodeCall call{.pool = pool.base,
                        .page_bytes = pool.page_bytes(),
                        .q = q.data,
                        .q_stride = q.stride,
                        .out = out.data,
                        .out_stride = out.stride,
                        .rope_cos = rope.cos,
                        .rope_sin = rope.sin,
                        .max_positions = rope.max_positions,
                        .rope_scale = rope.attention_scale,
                        .scale = scale * kLog2E,
                        .n_entries = n_sequences * entries_per_sequence(shape),
                        .layer = layer,
                        .head_dim = shape.head_dim,
                        .dtype = pool.layout.dtype};
  kernels_of(context, formats).launch(context, body.plan, call);
}

}  // namespace spindle::kernels
