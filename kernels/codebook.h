#pragma once
// SpindleKV's replacement codebook (arXiv 2507.06517, section 3): tokens whose K (before RoPE) or V
// point the same way share one unit vector and keep only their magnitude. Greedy cover of the
// similarity graph; the order, the strict threshold and the ties are ours where the paper is open.
//
// Thread-safety: plain values and pure functions.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/core/cpu_context.h"
#include "kernels/core/dtype.h"
#include "kernels/core/tensor_view.h"

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

inline constexpr std::int64_t kCodebookTileTokens = 1024;

// One side of one KV head. Entries are appended and never change, so tokens may refer to them for
// as long as the book lives.
struct Codebook {
  int head_dim = 0;
  std::vector<std::uint16_t> entries;    // f16 unit vectors [n_entries, head_dim]
  std::vector<std::int32_t> entry_rows;  // row of all rows ever matched that became entry e
  std::int64_t n_rows_seen = 0;
  // The entries once more, as the CPU body's products read them; it fills them up when it needs
  // them.
  std::vector<std::uint16_t> panels;  // [n / 32][head_dim][32]
  std::int64_t n_in_panels = 0;

  std::int64_t n_entries() const {
    return head_dim == 0 ? 0 : static_cast<std::int64_t>(entries.size()) / head_dim;
  }
  // Back to what it was when it had n entries and had seen n_rows.
  void undo_to(std::int64_t n, std::int64_t n_rows);
};

struct CodebookRefs {
  std::vector<std::uint16_t> entry;      // [n]
  std::vector<std::uint16_t> magnitude;  // f16 [n]
};

// Matches x [n, head_dim] in tiles of at most kCodebookTileTokens rows: first to the nearest entry
// of earlier tiles where cos > theta (strict), then by greedy cover among the rest, which adds
// entries. The cosine to an earlier entry is the product with its stored fp16 vector. A zero vector
// has cos 0 to everything but itself. Magnitudes beyond fp16 saturate. Stops, with `complete` false
// and the book as it was before the call and no refs, when the book would exceed max_entries
// (<= 65536).
struct CodebookMatch {
  CodebookRefs refs;
  bool complete = true;
};
CodebookMatch codebook_match(const CpuContext& context, Codebook& book, ConstRows x, float theta,
                             std::int64_t max_entries);

// The oracle: entry * magnitude in fp32.
void codebook_decode(const Codebook& book, const CodebookRefs& refs, Rows out);

// CUDA body: one side of one KV head and ONE tile of at most kCodebookTileTokens rows, all device
// memory. The same cover as the CPU body wherever no cosine is within rounding of theta (2e-6).
// Tiles of one call are of different books: the tiles of a book follow each other call by call.
struct DeviceCodebookTile {
  const F16* rows = nullptr;  // [n_rows][head_dim], 16-byte aligned
  std::int32_t n_rows = 0;
  float theta = 0;
  F16* entries = nullptr;  // [max_entries][head_dim]: n_entries[0] are there, new ones are appended
  std::int32_t max_entries = 0;
  std::int32_t* n_entries = nullptr;  // in: before; out: after, or max_entries + 1 when there would
                                      // be more than max_entries (then nothing else is valid,
                                      // and it stays so in later calls)
  std::uint16_t* refs = nullptr;      // [n_rows]
  std::uint16_t* magnitudes = nullptr;  // f16 [n_rows]
};
// `workspace` has codebook_workspace_bytes() for each tile.
std::size_t codebook_workspace_bytes(int head_dim);
void codebook_match(const CudaContext& context, int head_dim, const DeviceCodebookTile* tiles,
                    int n_tiles, std::byte* workspace);

}  // namespace spindle::kernels
