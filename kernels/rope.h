#pragma once
// Rotary position embedding, half-split as in Hugging Face's Llama: element i of a head is rotated
// with element i + rotary_dim/2. Elements beyond rotary_dim are left alone.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/core/cpu_context.h"
#include "kernels/core/status.h"
#include "kernels/core/tensor_view.h"

namespace spindle::kernels {

// cos and sin for every position below max_positions, computed as Hugging Face does in fp32:
// angle = float(position) * inv_freq[i]. Scaled variants (llama3, yarn, linear) differ only in
// inv_freq and attention_scale, which the model code derives.
//
// Thread-safety: immutable after create.
class RopeTable {
 public:
  static constexpr std::int64_t kMaxBytes = std::int64_t{1} << 30;

  // kInvalidArgument when empty, not finite, or larger than kMaxBytes.
  static Result<RopeTable> create(std::span<const float> inv_freq,  // [rotary_dim / 2]
                                  std::int64_t max_positions, float attention_scale = 1.0F);

  int rotary_dim() const { return 2 * half_dim_; }
  std::int64_t max_positions() const { return max_positions_; }
  const float* cos(std::int64_t position) const { return cos_.data() + position * half_dim_; }
  const float* sin(std::int64_t position) const { return sin_.data() + position * half_dim_; }
  // Angles of the steps 0..31 without attention_scale, [rotary_dim / 2][32], and of 0, 32 .. 992.
  const float* step_cos() const { return step_cos_.data(); }
  const float* step_sin() const { return step_sin_.data(); }
  const float* stride_cos() const { return stride_cos_.data(); }
  const float* stride_sin() const { return stride_sin_.data(); }
  float attention_scale() const { return attention_scale_; }

 private:
  RopeTable() = default;

  int half_dim_ = 0;
  std::int64_t max_positions_ = 0;
  std::vector<float> cos_;  // [max_positions, rotary_dim / 2]
  std::vector<float> sin_;  // [max_positions, rotary_dim / 2]
  std::vector<float> step_cos_;
  std::vector<float> step_sin_;
  std::vector<float> stride_cos_;
  std::vector<float> stride_sin_;
  float attention_scale_ = 1.0F;
};

// In place. Products are rounded before they are added, as in the reference, so every instruction
// set gives the same bits. Positions must be in [0, max_positions).
void rope(const CpuContext& context, const RopeTable& table,
          std::span<const std::int32_t> positions,  // [n_tokens]
          int head_dim,
          Rows q,   // [n_tokens, n_heads * head_dim]
          Rows k);  // [n_tokens, n_kv_heads * head_dim]; width 0 rotates q only

// A RopeTable's cos and sin on a device, f32 [max_positions, rotary_dim / 2] each. Borrowed view.
struct DeviceRope {
  const float* cos = nullptr;
  const float* sin = nullptr;
  std::int64_t max_positions = 0;
  int rotary_dim = 0;
  float attention_scale = 1.0F;  // already in cos and sin
};

}  // namespace spindle::kernels
