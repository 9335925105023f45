#include "kernels/attention.h"

#include <algorithm>
#include <array>

#include "kernels/core/check.h"
#include "kernels/isa/dispatch.h"
#include "kernels/kv_quant.h"

namespace spindle::kernels {
namespace {

// Query rows (query, head) that share one widened copy of a page.
constexpr std::int64_t kTileRows = 48;
// Row-page steps worth a second thread, about 10 us.
constexpr std::int64_t kMinStepsPerThread = 64;
constexpr std::int64_t kMinElementsPerThread = 1 << 14;

void check_layout(const KvPageLayout& layout) {
  CHECK(layout.page_tokens == kKvPageTokens, "pages hold kKvPageTokens tokens");
  CHECK(layout.head_dim > 0 && layout.head_dim <= kMaxHeadDim && layout.head_dim % 16 == 0,
        "head_dim must be a multiple of 16");
}

AttentionRope rope_of(const RopeTable* table) {
  if (table == nullptr) return {};
  return {.cos = table->cos(0),
          .sin = table->sin(0),
          .step_cos = table->step_cos(),
          .step_sin = table->step_sin(),
          .stride_cos = table->stride_cos(),
          .stride_sin = table->stride_sin(),
          .half_dim = table->rotary_dim() / 2,
          .max_positions = table->max_positions()};
}

// Levels of each bit width in a row of 16, for the in-register lookup.
const std::array<float, 64>& padded_lloyd_levels() {
  static const std::array<float, 64> kLevels = [] {
    std::array<float, 64> padded{};
    for (int bits = 1; bits <= 4; ++bits) {
      const std::span<const float> levels = lloyd_levels(bits);
      std::copy(levels.begin(), levels.end(), padded.begin() + 16 * (bits - 1));
    }
    return padded;
  }();
  return kLevels;
}

void check_block(const KvBlock& block, const KvHeadContext& context, const KvPageLayout& layout,
                 const RopeTable* rope) {
  const auto [k, v] = block.codec;
  CHECK(block.first < block.end && block.end <= block.capacity && block.capacity <= kKvBlockTokens,
        "visible tokens of a block");
  if (block.codec == KvCodec{}) return;
  CHECK(layout.head_dim % kKvBlockTokens == 0, "coded blocks need head_dim % 32 == 0");
  CHECK((k == KvFormat::kToken) == (v == KvFormat::kToken), "token ids are for both sides");
  CHECK(k != KvFormat::kToken || (context.k_tokens != nullptr && context.v_tokens != nullptr),
        "token ids need the table");
  CHECK(k != KvFormat::kCodebook || context.k_entries != nullptr, "codebook of K");
  CHECK(v != KvFormat::kCodebook || context.v_entries != nullptr, "codebook of V");
  CHECK(!is_lloyd(k) || context.k_mean != nullptr, "mean of K");
  CHECK(!is_lloyd(v) || context.v_mean != nullptr, "mean of V");
  if (!is_pre_rope(k)) return;
  CHECK(rope != nullptr, "keys before RoPE need its table");
  CHECK(block.positions != nullptr || (block.first_position >= 0 &&
                                       block.first_position + block.end <= rope->max_positions()),
        "positions inside the rope table");
}

void check_head(const KvHeadPages& head, const KvPageLayout& layout, const RopeTable* rope) {
  CHECK(head.tail_first >= head.tail_origin, "the visible tail begins inside the tail");
  CHECK(rope == nullptr || rope->rotary_dim() <= layout.head_dim, "rotary dimension");
  if (head.n_blocks == 0) return;
  CHECK(head.context != nullptr, "blocks need their head's context");
  for (std::int64_t i = 0; i < head.n_blocks; ++i) {
    check_block(head.blocks[i], *head.context, layout, rope);
  }
}

void set_cache(const KvHeadPages& head, AttentionTile& tile) {
  tile.pages = head.pages;
  tile.tail_origin = head.tail_origin;
  tile.tail_first = head.tail_first;
  tile.blocks = head.blocks;
  tile.n_blocks = head.n_blocks;
  tile.context = head.context;
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
          const KvHeadPages& cache = sequence.heads[head];
          const std::int64_t seen = sequence.n_context - sequence.n_queries + query + n;
          const std::int64_t n_pages =
              (seen - cache.tail_first + kKvPageTokens - 1) / kKvPageTokens + cache.n_blocks;
          visit(sequence, head, query, n, n_pages * n * group);
        }
      }
    }
  }
};

}  // namespace

void attention(const CpuContext& context, ConstRows q, std::span<const AttentionSequence> sequences,
               const AttentionShape& shape, const KvPageLayout& layout, float scale, Rows out,
               const RopeTable* rope) {
  check_layout(layout);
  CHECK(layout.head_dim == shape.head_dim && shape.n_kv_heads > 0 && shape.n_heads > 0 &&
            shape.n_heads % shape.n_kv_heads == 0,
        "attention shape");
  const std::int64_t width = std::int64_t{shape.n_heads} * shape.head_dim;
  CHECK(q.width == width && out.width == width && q.n_rows == out.n_rows, "attention rows");
  bool with_blocks = false;
  for (const AttentionSequence& s : sequences) {
    CHECK(s.query_begin >= 0 && s.n_queries >= 0 && s.query_begin + s.n_queries <= q.n_rows &&
              s.n_context >= s.n_queries,
          "attention sequence");
    for (int head = 0; head < shape.n_kv_heads; ++head) {
      check_head(s.heads[head], layout, rope);
      CHECK(s.n_queries == 0 || s.n_context - s.n_queries >= s.heads[head].tail_first,
            "queries see themselves");
      with_blocks |= s.heads[head].n_blocks > 0;
    }
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
  const std::size_t scratch_floats =
      attention_scratch_floats(work.queries_per_tile * group, shape.head_dim, with_blocks);
  context.parallel_for(n_ranges, 1, [&](std::int64_t begin, std::int64_t end, int thread) {
    AttentionTile tile{};
    tile.q_stride = q.stride;
    tile.out_stride = out.stride;
    tile.group = static_cast<int>(group);
    tile.head_dim = shape.head_dim;
    tile.format = page_format(layout.dtype);
    tile.scale = scale;
    tile.rope = rope_of(rope);
    tile.lloyd_levels = padded_lloyd_levels().data();
    tile.scratch =
        reinterpret_cast<float*>(context.scratch(thread, scratch_floats * sizeof(float)));
    tile.scratch_floats = static_cast<std::int64_t>(scratch_floats);
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
      set_cache(sequence.heads[head], tile);
      kernels.attention(tile);
    });
  });
}

std::int64_t visible_slots(const KvHeadPages& head, std::int64_t n_context) {
  std::int64_t n = n_context - head.tail_first;
  for (std::int64_t i = 0; i < head.n_blocks; ++i) n += head.blocks[i].end - head.blocks[i].first;
  return n;
}

void attention_logits(const CpuContext& context, ConstRows q, std::int64_t n_context,
                      const KvHeadPages& head, int group, const KvPageLayout& layout, float scale,
                      const RopeTable* rope, Rows logits) {
  check_layout(layout);
  check_head(head, layout, rope);
  CHECK(q.width == std::int64_t{group} * layout.head_dim && logits.n_rows == q.n_rows * group &&
            logits.width == visible_slots(head, n_context),
        "attention_logits shapes");
  if (q.n_rows == 0) return;
  AttentionTile tile{};
  tile.q = q.data;
  tile.q_stride = q.stride;
  tile.n_queries = q.n_rows;
  tile.position_begin = n_context - q.n_rows;
  tile.group = group;
  tile.head_dim = layout.head_dim;
  tile.format = page_format(layout.dtype);
  set_cache(head, tile);
  tile.rope = rope_of(rope);
  tile.lloyd_levels = padded_lloyd_levels().data();
  tile.scale = scale;
  const std::size_t floats = attention_scratch_floats(q.n_rows * group, layout.head_dim, true);
  tile.scratch = reinterpret_cast<float*>(context.scratch(0, floats * sizeof(float)));
  tile.scratch_floats = static_cast<std::int64_t>(floats);
  kernels_for(context).attention_logits(tile, logits.data, logits.stride);
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
          const std::int64_t position = s.position_begin + i - s.heads[head].tail_origin;
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
