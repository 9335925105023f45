#include "kernels/rope.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/core/check.h"
#include "kernels/isa/dispatch.h"

namespace spindle::kernels {
namespace {

constexpr std::int64_t kMinElementsPerThread = 1 << 16;

}  // namespace

Result<RopeTable> RopeTable::create(std::span<const float> inv_freq, std::int64_t max_positions,
                                    float attention_scale) {
  if (inv_freq.empty() || inv_freq.size() > 4096) {
    return invalid_argument("rotary dimension must be in [2, 8192], got " +
                            std::to_string(2 * inv_freq.size()));
  }
  const auto half = static_cast<std::int64_t>(inv_freq.size());
  const std::int64_t row_bytes = 2 * half * static_cast<std::int64_t>(sizeof(float));
  if (max_positions < 1 || max_positions > kMaxBytes / row_bytes) {
    return invalid_argument("max_positions must be in [1, " +
                            std::to_string(kMaxBytes / row_bytes) + "], got " +
                            std::to_string(max_positions));
  }
  if (!std::isfinite(attention_scale) ||
      !std::all_of(inv_freq.begin(), inv_freq.end(), [](float f) { return std::isfinite(f); })) {
    return invalid_argument("rotary frequencies must be finite");
  }
  RopeTable table;
  table.half_dim_ = static_cast<int>(half);
  table.max_positions_ = max_positions;
  table.cos_.reserve(static_cast<std::size_t>(half * max_positions));
  table.sin_.reserve(static_cast<std::size_t>(half * max_positions));
  for (std::int64_t position = 0; position < max_positions; ++position) {
    for (const float frequency : inv_freq) {
      const float angle = static_cast<float>(position) * frequency;
      table.cos_.push_back(std::cos(angle) * attention_scale);
      table.sin_.push_back(std::sin(angle) * attention_scale);
    }
  }
  table.attention_scale_ = attention_scale;
  for (const float frequency : inv_freq) {
    for (int step = 0; step < 32; ++step) {
      const float angle = static_cast<float>(step) * frequency;
      table.step_cos_.push_back(std::cos(angle));
      table.step_sin_.push_back(std::sin(angle));
      const float stride_angle = static_cast<float>(32 * step) * frequency;
      table.stride_cos_.push_back(std::cos(stride_angle));
      table.stride_sin_.push_back(std::sin(stride_angle));
    }
  }
  return table;
}

void rope(const CpuContext& context, const RopeTable& table,
          std::span<const std::int32_t> positions, int head_dim, Rows q, Rows k) {
  const auto n_tokens = static_cast<std::int64_t>(positions.size());
  CHECK(head_dim > 0 && table.rotary_dim() <= head_dim, "rotary dimension larger than the head");
  CHECK(q.n_rows == n_tokens && q.width % head_dim == 0, "rope q shape");
  CHECK(k.width == 0 || (k.n_rows == n_tokens && k.width % head_dim == 0), "rope k shape");
  const KernelTable& kernels = kernels_for(context);
  const std::int64_t half = table.rotary_dim() / 2;
  const std::int64_t grain = kMinElementsPerThread / std::max<std::int64_t>(q.width, 1) + 1;
  context.parallel_for(n_tokens, grain, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int32_t position = positions[static_cast<std::size_t>(i)];
      CHECK(position >= 0 && position < table.max_positions(), "position outside the rope table");
      const float* cos = table.cos(position);
      const float* sin = table.sin(position);
      for (const Rows& rows : {q, k}) {
        for (std::int64_t column = 0; column < rows.width; column += head_dim) {
          kernels.rope(rows.row(i) + column, cos, sin, half);
        }
      }
    }
  });
}

}  // namespace spindle::kernels
