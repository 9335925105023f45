#include "kernels/isa/dispatch.h"

#include <algorithm>

#include "kernels/attention.h"
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

ElementFormat page_format(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return ElementFormat::kF32;
    case DType::kF16:
      return ElementFormat::kF16;
    case DType::kBF16:
      return ElementFormat::kBF16;
  }
  CHECK(false, "unknown element type");
  return ElementFormat::kF32;
}

std::size_t linear_scratch_floats(std::int64_t n_rows, std::int64_t n_in) {
  const auto rows = static_cast<std::size_t>(std::min(n_rows, kLinearRowBlock));
  const std::size_t direct = std::min(rows, kDirectRows) * static_cast<std::size_t>(n_in);
  const std::size_t blocked = kDepthBlock * (kColumns + rows);
  return std::max(direct, blocked);
}

std::size_t attention_scratch_floats(std::int64_t n_rows, int head_dim, bool with_blocks) {
  const auto rows = static_cast<std::size_t>(n_rows);
  const auto dim = static_cast<std::size_t>(head_dim);
  const std::size_t value_stride = (dim + kColumns - 1) / kColumns * kColumns;
  // Every piece begins at a multiple of 16.
  constexpr std::size_t kRounding = std::size_t{16} * 16;
  constexpr std::size_t kLanes = 16;
  // Queries, scores, maximum, mass, values; one block of K and V.
  const std::size_t plain = rows * (dim + kColumns + 1 + kLanes + value_stride) +
                            kColumns * (dim + value_stride) + kRounding;
  if (!with_blocks) return plain;
  // Rotated, plain and (twice) turned queries, a sum and a scale, weights, scores of the next
  // block, rotated values and the sums beside them; rows, angles, steps, a mean and codes of one
  // block.
  static_assert(kQueryStride == kMaxHeadDim);
  constexpr std::size_t kQueries = kQueryStride;
  const std::size_t sums = (value_stride / kColumns + 2) * kLanes;
  return plain + rows * (dim + 3 * kQueries + 2 + 2 * kColumns + value_stride + sums) +
         3 * kColumns * dim + dim + 4 * dim + kRounding;
}

}  // namespace spindle::kernels
