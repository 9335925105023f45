// The kernel table for any x86-64; kernel_table.h says what may be included here.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/isa/kernel_table.h"

namespace spindle::kernels {
namespace {

#include "kernels/isa/vec_portable_body.h"
// The primitives come first.
#include "kernels/isa/gemm_body.h"
#include "kernels/isa/math_body.h"
#include "kernels/isa/score_body.h"
// How angles of listed positions are found differs.
#include "kernels/isa/angles_table_body.h"
// The micro-tiles come before what is built of them.
#include "kernels/isa/block_body.h"
#include "kernels/isa/softmax_body.h"
// Attention is built of both.
#include "kernels/isa/value_codes_body.h"
// How codes are multiplied differs.
#include "kernels/isa/codes_float_body.h"
// The steps that choose among these.
#include "kernels/isa/block_step_body.h"
// Its steps come before the whole pass.
#include "kernels/isa/attention_body.h"
#include "kernels/isa/linear_body.h"
// Last: the table that names them all.
#include "kernels/isa/table_body.h"

}  // namespace

const KernelTable& portable_kernels() {
  static constexpr KernelTable kTable = make_table("portable");
  return kTable;
}

}  // namespace spindle::kernels
