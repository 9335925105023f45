#include "kernels/attention.h"

#include <algorithm>

#include "kernels/core/check.h"
#include "kernels/isa/dispatch.h"

namespace spindle::kernels {
namespace {

// Query rows (query, head) that share one widened copy of a page.
constexpr std::int64_t kTileRows = 48;
// Row-page steps worth a second thread, about 10 us.
constexpr std::int64_t kMinStepsPerThread = 64;
constexpr std::int64_t kMinElementsPerThread = 1 << 14;

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

void check_layout(const KvPageLayout& layout) {
  CHECK(layout.page_tokens == kKvPageTokens, "pages hold kKvPageTokens tokens");
  CHECK(layout.head_dim > 0 && layout.head_dim <= kMaxHeadDim && layout.head_dim % 16 == 0,
        "head_dim must be a multiple of 16");
}

// The work of a call is a list of (sequence, kv head, query tile), cut into ranges of about equal
// cost. Each item computes its rows alone, so the cut does not matter to the result.
struct Work {
  std::span<const AttentionSequence> sequences;
  std::int64_t queries_per_tile;
  std::int64_t n_kv_heads;
  std::int64_t group;

  // Calls visit(sequence, head, first query, n_queries, cost) for every item.
  template <typename Visit>
  void for_each(Visit&& visit) const {
    for (const AttentionSequence& sequence : sequences) {
      for (std::int64_t head = 0; head < n_kv_heads; ++head) {
        for (std::int64_t query = 0; query < sequence.n_queries; query += queries_per_tile) {
          const std::int64_t n = std::min(queries_per_tile, sequence.n_queries - query);
          const std::int64_t seen = sequence.n_context - sequence.n_queries + query + n;
          const std::int64_t n_pages = (seen + kKvPageTokens - 1) / kKvPageTokens;
          visit(sequence, head, query, n, n_pages * n * group);
        }
      }
    }
  }
};

}  // namespace

void attention(const CpuContext& context, ConstRows q, std::span<const AttentionSequence> sequences,
               const AttentionShape& shape, const KvPageLayout& layout, float scale, Rows out) {
  check_layout(layout);
  CHECK(layout.head_dim == shape.head_dim && shape.n_kv_heads > 0 && shape.n_heads > 0 &&
            shape.n_heads % shape.n_kv_heads == 0,
        "attention shape");
  const std::int64_t width = std::int64_t{shape.n_heads} * shape.head_dim;
  CHECK(q.width == width && out.width == width && q.n_rows == out.n_rows, "attention rows");
  for (const AttentionSequence& s : sequences) {
    CHECK(s.query_begin >= 0 && s.n_queries >= 0 && s.query_begin + s.n_queries <= q.n_rows &&
              s.n_context >= s.n_queries,
          "attention sequence");
  }

  const std::int64_t group = shape.n_heads / shape.n_kv_heads;
  const Work work{sequences, std::max<std::int64_t>(1, kTileRows / group), shape.n_kv_heads, group};
  std::int64_t total = 0;
  work.for_each([&](const AttentionSequence&, std::int64_t, std::int64_t, std::int64_t,
                    std::int64_t cost) { total += cost; });
  if (total == 0) return;
  const std::int64_t n_ranges =
      std::clamp<std::int64_t>(total / kMinStepsPerThread, 1, context.n_threads());

  const KernelTable& kernels = kernels_for(context);
  const std::size_t scratch_bytes =
      sizeof(float) * attention_scratch_floats(work.queries_per_tile * group, shape.head_dim);
  context.parallel_for(n_ranges, 1, [&](std::int64_t begin, std::int64_t end, int thread) {
    AttentionTile tile{};
    tile.q_stride = q.stride;
    tile.out_stride = out.stride;
    tile.group = static_cast<int>(group);
    tile.head_dim = shape.head_dim;
    tile.format = page_format(layout.dtype);
    tile.scale = scale;
    tile.scratch = reinterpret_cast<float*>(context.scratch(thread, scratch_bytes));
    std::int64_t before = 0;
    work.for_each([&](const AttentionSequence& sequence, std::int64_t head, std::int64_t query,
                      std::int64_t n_queries, std::int64_t cost) {
      const std::int64_t range = before * n_ranges / total;
      before += cost;
      if (range < begin || range >= end) return;
      const std::int64_t row = sequence.query_begin + query;
      const std::int64_t column = head * group * shape.head_dim;
      tile.q = q.row(row) + column;
      tile.out = out.row(row) + column;
      tile.n_queries = n_queries;
      tile.position_begin = sequence.n_context - sequence.n_queries + query;
      tile.pages = sequence.heads[head].pages;
      kernels.attention(tile);
    });
  });
}

namespace {

struct TokenSlot {
  std::byte* page;
  std::int64_t slot;  // token's index in the page
};

template <typename Element, typename Round>
void write_token(const KvPageLayout& layout, const TokenSlot& where, const float* k, const float* v,
                 Round round) {
  auto* k_page = reinterpret_cast<Element*>(where.page);
  auto* v_row =
      reinterpret_cast<Element*>(where.page + layout.k_bytes()) + where.slot * layout.head_dim;
  for (int d = 0; d < layout.head_dim; ++d) {
    k_page[d * layout.page_tokens + where.slot] = round(k[d]);
    v_row[d] = round(v[d]);
  }
}

void append_token(const KvPageLayout& layout, const TokenSlot& where, const float* k,
                  const float* v) {
  switch (layout.dtype) {
    case DType::kF32:
      write_token<float>(layout, where, k, v, [](float x) { return x; });
      break;
    case DType::kF16:
      write_token<std::uint16_t>(layout, where, k, v, f32_to_f16);
      break;
    case DType::kBF16:
      write_token<std::uint16_t>(layout, where, k, v, f32_to_bf16);
      break;
  }
}

}  // namespace

void kv_append(const CpuContext& context, ConstRows k, ConstRows v,
               std::span<const KvAppendSequence> sequences, int n_kv_heads,
               const KvPageLayout& layout) {
  check_layout(layout);
  const std::int64_t width = std::int64_t{n_kv_heads} * layout.head_dim;
  CHECK(n_kv_heads > 0 && k.width == width && v.width == width && k.n_rows == v.n_rows,
        "kv_append rows");
  std::int64_t n_tokens = 0;
  for (const KvAppendSequence& s : sequences) {
    CHECK(s.row_begin >= 0 && s.n_tokens >= 0 && s.row_begin + s.n_tokens <= k.n_rows &&
              s.position_begin >= 0,
          "kv_append sequence");
    n_tokens += s.n_tokens;
  }
  // Threads take whole heads of all sequences, so that no two write to one page.
  const std::int64_t head_elements = std::max<std::int64_t>(n_tokens * layout.head_dim * 2, 1);
  const std::int64_t grain = kMinElementsPerThread / head_elements + 1;
  context.parallel_for(n_kv_heads, grain, [&](std::int64_t begin, std::int64_t end, int) {
    for (const KvAppendSequence& s : sequences) {
      for (std::int64_t head = begin; head < end; ++head) {
        for (std::int64_t i = 0; i < s.n_tokens; ++i) {
          const std::int64_t position = s.position_begin + i;
          const TokenSlot where{s.heads[head].pages[position / layout.page_tokens],
                                position % layout.page_tokens};
          append_token(layout, where, k.row(s.row_begin + i) + head * layout.head_dim,
                       v.row(s.row_begin + i) + head * layout.head_dim);
        }
      }
    }
  });
}

}  // namespace spindle::kernels
