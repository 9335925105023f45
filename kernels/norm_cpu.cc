#include "kernels/norm.h"

#include <algorithm>

#include "kernels/core/check.h"
#include "kernels/isa/dispatch.h"

namespace spindle::kernels {
namespace {

constexpr std::int64_t kMinElementsPerThread = 1 << 16;

std::int64_t row_grain(std::int64_t width) {
  return kMinElementsPerThread / std::max<std::int64_t>(width, 1) + 1;
}

void check_same_shape(ConstRows a, ConstRows b) {
  CHECK(a.n_rows == b.n_rows && a.width == b.width, "row shapes differ");
}

}  // namespace

void rms_norm(const CpuContext& context, ConstRows x, std::span<const float> weight, float eps,
              Rows out) {
  check_same_shape(x, out);
  CHECK(static_cast<std::int64_t>(weight.size()) == x.width, "norm weight size");
  const KernelTable& kernels = kernels_for(context);
  context.parallel_for(x.n_rows, row_grain(x.width),
                       [&](std::int64_t begin, std::int64_t end, int) {
                         for (std::int64_t i = begin; i < end; ++i) {
                           kernels.rms_norm(x.row(i), weight.data(), eps, x.width, out.row(i));
                         }
                       });
}

void add_rms_norm(const CpuContext& context, ConstRows x, Rows residual,
                  std::span<const float> weight, float eps, Rows out) {
  check_same_shape(x, residual);
  check_same_shape(x, out);
  CHECK(static_cast<std::int64_t>(weight.size()) == x.width, "norm weight size");
  CHECK(out.data != residual.data || x.n_rows == 0, "out overlaps residual");
  const KernelTable& kernels = kernels_for(context);
  context.parallel_for(
      x.n_rows, row_grain(x.width), [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
          kernels.add(x.row(i), x.width, residual.row(i));
          kernels.rms_norm(residual.row(i), weight.data(), eps, x.width, out.row(i));
        }
      });
}

void residual_add(const CpuContext& context, ConstRows x, Rows residual) {
  check_same_shape(x, residual);
  const KernelTable& kernels = kernels_for(context);
  context.parallel_for(x.n_rows, row_grain(x.width),
                       [&](std::int64_t begin, std::int64_t end, int) {
                         for (std::int64_t i = begin; i < end; ++i) {
                           kernels.add(x.row(i), x.width, residual.row(i));
                         }
                       });
}

}  // namespace spindle::kernels
