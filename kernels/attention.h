#pragma once
// Causal attention over a paged KV cache, for batches that mix prefill chunks and decode tokens.
//
// A page is a fixed-size block of bytes with kKvPageTokens consecutive positions of ONE kv head of
// ONE layer: first K, d-major [head_dim, page_tokens], then V, token-major [page_tokens, head_dim].
// Scores of a page are then page_tokens independent fma chains over d, and the weighted sum of V
// runs along contiguous rows.
//
// Every output row is reduced in one fixed order (kernels/README.md): scores over d ascending,
// pages in ascending order with one online-softmax step each, tokens ascending inside a page. It
// therefore does not depend on the batch, on the chunk the query came in, or on the number of
// threads.

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/core/cpu_context.h"
#include "kernels/core/dtype.h"
#include "kernels/core/tensor_view.h"
#include "kernels/cuda/kv_device.h"
#include "kernels/kv_block.h"
#include "kernels/rope.h"

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

inline constexpr int kKvPageTokens = 32;
inline constexpr int kMaxHeadDim = 256;

// head_dim must be a multiple of 16 up to kMaxHeadDim, page_tokens must be kKvPageTokens.
struct KvPageLayout {
  int head_dim = 0;
  int page_tokens = kKvPageTokens;
  DType dtype = DType::kF16;

  constexpr std::size_t k_bytes() const {
    return static_cast<std::size_t>(head_dim) * static_cast<std::size_t>(page_tokens) *
           dtype_bytes(dtype);
  }
  constexpr std::size_t page_bytes() const { return 2 * k_bytes(); }
};

struct AttentionShape {
  int n_heads = 0;  // a multiple of n_kv_heads; query head i reads kv head i / (n_heads/n_kv_heads)
  int n_kv_heads = 0;
  int head_dim = 0;
};

// The cache of one kv head of one sequence: compressed blocks, all of whose tokens precede the
// tail, then the tail in full precision. pages[i] holds the positions
// [tail_origin + i * page_tokens, tail_origin + (i + 1) * page_tokens), of which those below
// tail_first are not visible. Pages are aligned to 64 bytes; so are the pieces of blocks.
struct KvHeadPages {
  const std::byte* const* pages = nullptr;
  std::int64_t tail_origin = 0;
  std::int64_t tail_first = 0;  // >= tail_origin
  const KvBlock* blocks = nullptr;
  std::int64_t n_blocks = 0;
  const KvHeadContext* context = nullptr;  // needed with blocks
};

struct KvWritableHeadPages {
  std::byte* const* pages = nullptr;
  std::int64_t tail_origin = 0;
};

struct AttentionSequence {
  std::int64_t query_begin = 0;  // first row in q and out
  std::int64_t n_queries = 0;
  std::int64_t n_context = 0;          // positions in the cache, the queries' own included
  const KvHeadPages* heads = nullptr;  // [n_kv_heads]
};

// Query j of a sequence is at position n_context - n_queries + j and sees positions up to its own.
// Bytes of a page beyond n_context are never used. Rows of `out` that belong to no sequence are
// left alone. `out` must not overlap `q`. Queries are in the visible tail, after every block's
// tokens.
//
// One pass reads all kinds of segments: each block is one step of the same online softmax. Keys
// stored before RoPE are rotated with `rope`, which may be null when no sequence has such blocks.
// Formats in the Hadamard basis are scored with rotated queries, and their values are summed in
// that basis and rotated back once.
void attention(const CpuContext& context,
               ConstRows q,  // [n_tokens, n_heads * head_dim], rotated by RoPE
               std::span<const AttentionSequence> sequences, const AttentionShape& shape,
               const KvPageLayout& layout, float scale,
               Rows out,  // [n_tokens, n_heads * head_dim]
               const RopeTable* rope = nullptr);

// q . k * scale for every visible slot of one kv head in ascending order of position, the n_slots
// tail included up to n_context: rows are (query, head of the group). Not causal.
void attention_logits(const CpuContext& context,
                      ConstRows q,  // [n_queries, group * head_dim]
                      std::int64_t n_context, const KvHeadPages& head, int group,
                      const KvPageLayout& layout, float scale, const RopeTable* rope,
                      Rows logits);  // [n_queries * group, n_slots]
// Visible slots of a head with n_context positions in its cache.
std::int64_t visible_slots(const KvHeadPages& head, std::int64_t n_context);

struct KvAppendSequence {
  std::int64_t row_begin = 0;  // first row in k and v
  std::int64_t n_tokens = 0;
  std::int64_t position_begin = 0;
  const KvWritableHeadPages* heads = nullptr;  // [n_kv_heads]
};

// Writes rows of K (after RoPE) and V into pages, rounded to the layout's type to nearest even.
// Sequences must not share pages.
void kv_append(const CpuContext& context,
               ConstRows k,  // [n_tokens, n_kv_heads * head_dim]
               ConstRows v,  // [n_tokens, n_kv_heads * head_dim]
               std::span<const KvAppendSequence> sequences, int n_kv_heads,
               const KvPageLayout& layout);

// ---- CUDA bodies. All pointers below are device memory unless they say host. head_dim is 64 or
// 128; the group of query heads has at most 8 heads or a multiple of 8.

// The pages a device's tables refer to.
struct DeviceKvPool {
  std::byte* base = nullptr;
  KvPageLayout layout;  // dtype kF16 or kBF16

  std::size_t page_bytes() const { return layout.page_bytes(); }
};

// For every row of a step: rotates q, writes it as f16, and writes k (after RoPE) and v into the
// tail pages of its sequence. rotary_dim is a multiple of 16, rows of qkv and q are 16-byte
// aligned.
void rope_append(const CudaContext& context, const DeviceRope& rope,
                 ConstRows qkv,                     // [n_tokens, (n_heads + 2 n_kv_heads) head_dim]
                 const std::int32_t* row_sequence,  // [n_tokens], index in `sequences`; -1: no row
                 const std::int32_t* positions,     // [n_tokens]
                 const DeviceSequence* sequences, int layer, const AttentionShape& shape,
                 const DeviceKvPool& pool,
                 F16Rows q);  // [n_tokens, n_heads * head_dim]

// Decode attention: every sequence has one query (n_queries 1, or 0 for padding). Split-KV over a
// grid that fills the device once: each block takes an equal share of the layer's work (units of 32
// tokens, weighted by format), so ragged batches and ragged heads cost what their bytes cost.
//
// The plan of a step, made once by plan_decode for all layers from the tables alone, on the device,
// so that the same launches can be replayed in a graph while tables change.
class DecodeWorkspace {
 public:
  // For at most max_sequences sequences and n_layers layers.
  static Result<DecodeWorkspace> create(const CudaContext& context, int max_sequences, int n_layers,
                                        const AttentionShape& shape);
  DecodeWorkspace(DecodeWorkspace&&) noexcept;
  DecodeWorkspace& operator=(DecodeWorkspace&&) noexcept;
  ~DecodeWorkspace();

 private:
  friend class DecodeWorkspaceAccess;
  struct Body;
  explicit DecodeWorkspace(std::unique_ptr<Body> body);
  std::unique_ptr<Body> body_;
};

void plan_decode(const CudaContext& context, const DeviceSequence* sequences, int n_sequences,
                 int n_layers, const AttentionShape& shape, DecodeWorkspace& workspace);

// Reads every kind of segment in one pass: coded blocks are decoded in registers. `rope` is needed
// when any block is pre-RoPE. No block of the layer's heads may have a format outside `formats`
// (decode_formats() of kv_device.h); kAll is always right, and slower.
void attention_decode(const CudaContext& context,
                      ConstF16Rows q,  // [n_rows, n_heads * head_dim], rotated
                      const DeviceSequence* sequences, int n_sequences, int layer,
                      const AttentionShape& shape, const DeviceKvPool& pool, float scale,
                      const DeviceRope& rope, DecodeFormats formats, DecodeWorkspace& workspace,
                      Bf16Rows out);  // [n_rows, n_heads * head_dim]

// Blocks decoded to raw pages for attention_prefill and for scores: block i of (sequence s, kv head
// h) becomes page first_page[s * n_kv_heads + h] + i of `pages`; tokens outside [first, end) of a
// block are zeros.
struct DeviceExpandedBlocks {
  std::byte* pages = nullptr;                // of layout.page_bytes() each
  const std::int64_t* first_page = nullptr;  // [n_sequences * n_kv_heads]
};
// Keys are rotated at their own positions, values have their mean and basis back: K after RoPE and
// V as the attention of the CPU sees them, rounded to the layout's type (f16 saturates). Blocks
// before RoPE need rope.rotary_dim == head_dim; rope.cos may be null when there are none.
void kv_expand(const CudaContext& context, const DeviceSequence* sequences, int n_sequences,
               int layer, const AttentionShape& shape, const DeviceKvPool& pool,
               const DeviceRope& rope,
               std::int32_t max_blocks,  // of any head
               const DeviceExpandedBlocks& out);

// Causal attention of prefill chunks: any number of queries a sequence, over the expanded blocks
// (all visible) and then the tail. The heads of a group are packed with the queries, and short
// chunks over long contexts are split along the context; partial results are kept in the context's
// cuBLASLt workspace, and their sum depends on how many sequences and queries a call has. Scores
// are f32; the weights of the sum over V are rounded to the pages' type, and for bf16 pages the
// queries too. Rows of q and out start at multiples of 16 bytes.
void attention_prefill(const CudaContext& context,
                       ConstF16Rows q,  // [n_rows, n_heads * head_dim], rotated
                       std::span<const std::int32_t> n_queries,  // host, [n_sequences]
                       const DeviceSequence* sequences, int layer, const AttentionShape& shape,
                       const DeviceKvPool& pool, float scale,
                       const DeviceExpandedBlocks& expanded,  // pages null: no head has blocks
                       Bf16Rows out);                         // [n_rows, n_heads * head_dim]

}  // namespace spindle::kernels
