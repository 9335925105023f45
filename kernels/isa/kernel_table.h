#pragma once
// The seam between operations and the instruction set they run on. Each per-ISA translation unit
// (avx512.cc, avx2.cc, portable.cc) compiles the same *_body.h sources with its own flags and fills
// one table of function pointers. Pointers and plain structs only: nothing with inline or template
// code may cross into those units, or the linker could keep a copy compiled for a wider ISA than
// the host has (README.md, "ISA dispatch").

#include <cstddef>
#include <cstdint>

namespace spindle::kernels {

// Columns of one weight panel and tokens of one KV page: two vectors of the widest ISA.
inline constexpr int kPanelColumns = 32;

// How the elements of a weight panel or KV page are stored.
enum class ElementFormat : std::uint8_t {
  kF32,
  kF16,
  kBF16,
  // bf16 with column i beside column i + 16: one 32-bit lane holds both, and each is widened to
  // fp32 by a single shift or mask.
  kBF16Paired,
};

// Columns [32 p, 32 p + 32) of all k form panel p: [n_panels][k][32].
struct LinearJob {
  const void* panels;
  ElementFormat format;
  std::int64_t n_in;
  std::int64_t n_out;
  const float* bias;  // [n_out] or null
  bool round_x_to_bf16;
  const float* x;  // [n_rows, n_in], rows x_stride apart
  std::int64_t x_stride;
  std::int64_t n_rows;
  float* y;  // [n_rows, n_out], rows y_stride apart
  std::int64_t y_stride;
};

// The query rows (query, head of the group) that one call takes through all pages of one kv head.
struct AttentionTile {
  const float* q;  // first query, first head of the group
  std::int64_t q_stride;
  float* out;
  std::int64_t out_stride;
  std::int64_t n_queries;
  std::int64_t position_begin;  // of the first query
  int group;                    // query heads per kv head
  int head_dim;
  ElementFormat format;  // kF32, kF16 or kBF16
  const std::byte* const* pages;
  float scale;
  float* scratch;  // attention_scratch_floats()
};

struct KernelTable {
  const char* name;

  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t n, float* out);
  void (*add)(const float* x, std::int64_t n, float* y);
  void (*swiglu)(const float* gate, const float* up, std::int64_t n, float* out);
  void (*rope)(float* head, const float* cos, const float* sin, std::int64_t half);
  float (*max)(const float* x, std::int64_t n);
  // out[i] = exp((x[i] - shift) * scale)
  void (*exp_shifted)(const float* x, std::int64_t n, float shift, float scale, float* out);
  // sum of exp(x[i] - shift)
  double (*sum_exp)(const float* x, std::int64_t n, float shift);

  // Rows and panels [begin, end) of the job; `scratch` holds linear_scratch_floats().
  void (*linear)(const LinearJob& job, std::int64_t row_begin, std::int64_t row_end,
                 std::int64_t panel_begin, std::int64_t panel_end, float* scratch);
  void (*attention)(const AttentionTile& tile);
};

// Blocking of the linear operation. These are constants of cost only: no result depends on them.
//
// Rows that share one widening of a panel block.
inline constexpr std::int64_t kLinearRowBlock = 192;
// Rows of a panel (steps of k) that are widened at once: the widened block stays in the L2 cache,
// one packed tile of x in the L1 cache, and y is passed over once per block.
inline constexpr std::int64_t kLinearDepthBlock = 512;
// Up to this many tiles of rows, widening weights in registers beats writing them out.
inline constexpr std::int64_t kLinearDirectTiles = 2;
// Rows of the tallest micro-tile of any instruction set.
inline constexpr std::int64_t kTallestTile = 12;

std::size_t linear_scratch_floats(std::int64_t n_rows, std::int64_t n_in);
std::size_t attention_scratch_floats(std::int64_t n_rows, int head_dim);

const KernelTable& portable_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();

}  // namespace spindle::kernels
