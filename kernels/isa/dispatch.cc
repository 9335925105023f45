#include "kernels/isa/dispatch.h"

#include <algorithm>

#include "kernels/core/check.h"

namespace spindle::kernels {
namespace {

constexpr std::size_t kColumns = kPanelColumns;
constexpr std::size_t kDirectRows = kLinearDirectTiles * kTallestTile;
constexpr std::size_t kDepthBlock = kLinearDepthBlock;

}  // namespace

const KernelTable& kernels_for(const CpuContext& context) {
  switch (context.isa()) {
    case CpuIsa::kPortable:
      return portable_kernels();
    case CpuIsa::kAvx2:
      return avx2_kernels();
    case CpuIsa::kAvx512:
      return avx512_kernels();
  }
  CHECK(false, "unknown instruction set");
  return portable_kernels();
}

std::size_t linear_scratch_floats(std::int64_t n_rows, std::int64_t n_in) {
  const auto rows = static_cast<std::size_t>(std::min(n_rows, kLinearRowBlock));
  const std::size_t direct = std::min(rows, kDirectRows) * static_cast<std::size_t>(n_in);
  const std::size_t blocked = kDepthBlock * (kColumns + rows);
  return std::max(direct, blocked);
}

std::size_t attention_scratch_floats(std::int64_t n_rows, int head_dim) {
  const auto rows = static_cast<std::size_t>(n_rows);
  const auto dim = static_cast<std::size_t>(head_dim);
  const std::size_t value_stride = (dim + kColumns - 1) / kColumns * kColumns;
  const std::size_t per_row = dim + kColumns + 1 + 16 + value_stride;
  return rows * per_row + 16 + kColumns * (dim + value_stride);
}

}  // namespace spindle::kernels
