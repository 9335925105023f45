// The kernel table for AVX-512 F, BW, DQ, VL; kernel_table.h says what may be included here.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/isa/kernel_table.h"

namespace spindle::kernels {
namespace {

#include "kernels/isa/vec_avx512_body.h"
// The primitives come first.
#include "kernels/isa/gemm_body.h"
#include "kernels/isa/math_body.h"
// The micro-tiles come before what is built of them.
#include "kernels/isa/attention_body.h"
#include "kernels/isa/linear_body.h"
// Last: the table that names them all.
#include "kernels/isa/table_body.h"

}  // namespace

const KernelTable& avx512_kernels() {
  static constexpr KernelTable kTable = make_table("avx512");
  return kTable;
}

}  // namespace spindle::kernels
