#include "kernels/linear_bf16.h"

namespace spindle::kernels {

Result<std::unique_ptr<Bf16Matmul>> Bf16Matmul::create(const CpuContext&,
                                                       std::span<const std::uint16_t>, std::int64_t,
                                                       std::int64_t) {
  return unimplemented("bf16 linear math needs a build with oneDNN");
}

}  // namespace spindle::kernels
