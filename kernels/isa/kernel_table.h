#pragma once
// The seam between operations and the instruction set they run on. Each per-ISA translation unit
// (avx512.cc, avx2.cc, portable.cc) compiles the same *_body.h sources with its own flags and fills
// one table of function pointers. Pointers and plain structs only: nothing with inline or template
// code may cross into those units, or the linker could keep a copy compiled for a wider ISA than
// the host has (README.md, "ISA dispatch").

#include <cstddef>
#include <cstdint>

#include "kernels/kv_block.h"

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

// Columns [32 p, 32 p + 32) of all k form panel p: [n_panels][panel_depth][32]. A job over a range
// of k points `panels` at its first row and has n_in < panel_depth.
struct LinearJob {
  const void* panels;
  ElementFormat format;
  std::int64_t panel_depth;  // rows of k from one panel to the next
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

// What rotates keys that are stored before RoPE: rows of RopeTable, the angles of 0..31, and those
// of 0, 32 .. 992.
struct AttentionRope {
  const float* cos = nullptr;  // [max_positions][half_dim]
  const float* sin = nullptr;
  const float* step_cos = nullptr;  // [half_dim][32]
  const float* step_sin = nullptr;
  const float* stride_cos = nullptr;  // [half_dim][32]
  const float* stride_sin = nullptr;
  std::int64_t half_dim = 0;
  std::int64_t max_positions = 0;
};

// Floats from one unpacked query to the next in the scratch memory: the largest head_dim.
inline constexpr std::int64_t kQueryStride = 256;

// The query rows (query, head of the group) that one call takes through one kv head's cache: its
// blocks, which every query sees, then the pages of its tail.
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
  std::int64_t tail_origin;  // position of the first slot of pages[0]
  std::int64_t tail_first;   // first visible position of the tail
  const KvBlock* blocks;
  std::int64_t n_blocks;
  const KvHeadContext* context;
  AttentionRope rope;
  const float* lloyd_levels;  // [4 bit widths][16]
  float scale;
  float* scratch;  // attention_scratch_floats()
  std::int64_t scratch_floats;
};

struct KernelTable {
  const char* name;

  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t n, float* out);
  void (*add)(const float* x, std::int64_t n, float* y);
  void (*swiglu)(const float* gate, const float* up, std::int64_t n, float* out);
  void (*rope)(float* head, const float* cos, const float* sin, std::int64_t half);
  // n elements of the format (not kBF16Paired) to floats.
  void (*widen)(ElementFormat format, const void* x, std::int64_t n, float* out);
  float (*max)(const float* x, std::int64_t n);
  // out[i] = exp((x[i] - shift) * scale)
  void (*exp_shifted)(const float* x, std::int64_t n, float shift, float scale, float* out);
  // sum of exp(x[i] - shift)
  double (*sum_exp)(const float* x, std::int64_t n, float shift);

  // Token scores (score_body.h). Maxima leave NaN out.
  float (*dot)(const float* a, const float* b, std::int64_t n);
  float (*sum_abs)(const float* x, std::int64_t n);
  double (*sum)(const float* x, std::int64_t n);
  void (*scale)(float factor, std::int64_t n, float* x);
  // sums[i] += x[i] * factor
  void (*add_scaled)(const float* x, double factor, std::int64_t n, double* sums);
  void (*max_into)(const float* x, std::int64_t n, float* best);
  // best[i - begin] >= factor * (x[i - 2] + .. + x[i + 2]) for i in [begin, end); zeros outside
  // x[0, n).
  void (*pooled_max_into)(const float* x, std::int64_t n, std::int64_t begin, std::int64_t end,
                          float factor, float* best);

  // Rows and panels [begin, end) of the job; `scratch` holds linear_scratch_floats().
  void (*linear)(const LinearJob& job, std::int64_t row_begin, std::int64_t row_end,
                 std::int64_t panel_begin, std::int64_t panel_end, float* scratch);
  void (*attention)(const AttentionTile& tile);
  // q . k * scale of every visible slot in order, [n_queries * group] rows `out_stride` apart; rows
  // are (query, head). Not causal.
  void (*attention_logits)(const AttentionTile& tile, float* out, std::int64_t out_stride);
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
std::size_t attention_scratch_floats(std::int64_t n_rows, int head_dim, bool with_blocks);

const KernelTable& portable_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();

}  // namespace spindle::kernels
