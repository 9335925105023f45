#pragma once
// The bf16 matrix product behind LinearMath::kBF16, kept apart so that one of two translation units
// provides it: linear_bf16_onednn.cc, or linear_bf16_absent.cc in builds without oneDNN.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "kernels/core/cpu_context.h"
#include "kernels/core/status.h"
#include "kernels/core/tensor_view.h"

namespace spindle::kernels {

// Thread-safety: apply() is serialised inside.
class Bf16Matmul {
 public:
  // `weights` [n_out, n_in] is read only here. kUnimplemented when there is no such backend.
  static Result<std::unique_ptr<Bf16Matmul>> create(const CpuContext& context,
                                                    std::span<const std::uint16_t> weights,
                                                    std::int64_t n_in, std::int64_t n_out);
  virtual ~Bf16Matmul() = default;

  // y = bf16(x) weights^T in fp32.
  virtual Status apply(const CpuContext& context, ConstRows x, Rows y) = 0;
  virtual std::size_t bytes() const = 0;

 protected:
  Bf16Matmul() = default;
};

}  // namespace spindle::kernels
