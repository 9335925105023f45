#include "kernels/activation.h"

#include <algorithm>

#include "kernels/core/check.h"
#include "kernels/isa/dispatch.h"

namespace spindle::kernels {
namespace {

constexpr std::int64_t kMinElementsPerThread = 1 << 14;

}  // namespace

void swiglu(const CpuContext& context, ConstRows gate_up, Rows out) {
  CHECK(gate_up.n_rows == out.n_rows && gate_up.width == 2 * out.width, "swiglu shapes");
  const KernelTable& kernels = kernels_for(context);
  const std::int64_t inter = out.width;
  const std::int64_t grain = kMinElementsPerThread / std::max<std::int64_t>(inter, 1) + 1;
  context.parallel_for(out.n_rows, grain, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float* gate = gate_up.row(i);
      kernels.swiglu(gate, gate + inter, inter, out.row(i));
    }
  });
}

}  // namespace spindle::kernels
