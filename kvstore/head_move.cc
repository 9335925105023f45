#include "kvstore/head_move.h"

#include <algorithm>

namespace spindle::kvstore {
namespace {

using kernels::KvFormat;
using kernels::KvSide;
constexpr std::int64_t kBlock = kernels::kKvBlockTokens;

bool is_raw(const kernels::KvCodec& codec) { return codec == kernels::KvCodec{}; }

// Token ids are exact, so nothing of them stays in full precision.
std::int64_t tail_cut(const HeadCache& head, const HeadTask& task) {
  const int recent = task.holds_ids() ? 0 : task.recent;
  return tail_begin(head.tail_origin, head.tail_first, recent, task.n_tokens);
}

void set_tail(const HeadCache& head, const HeadTask& task, std::int64_t first, HeadMove& move) {
  move.changes = true;
  move.tail_first = first;
  move.tail_origin = first == task.n_tokens
                         ? first
                         : head.tail_origin + (first - head.tail_origin) / kBlock * kBlock;
}

void leave_tail(const HeadCache& head, const HeadTask& task, HeadMove& move) {
  // Uncompressed tokens that all stay are best where they are.
  if (is_raw(task.plan.codec) && !task.has_selection) return;
  const std::int64_t cut = tail_cut(head, task);
  if (cut == head.tail_first) return;
  const bool selects = task.has_selection && task.plan.mode == KvMode::kEvict;
  const std::int64_t first_window = task.n_tokens - kObservationWindow;
  // Sinks, what was selected behind them, the window.
  const std::int64_t selected =
      selects ? std::clamp<std::int64_t>(task.sinks, head.tail_first, cut) : cut;
  const std::int64_t window = std::clamp(first_window, selected, cut);
  const auto first = std::lower_bound(task.kept.begin(), task.kept.end(), selected);
  const auto end = std::lower_bound(first, task.kept.end(), window);
  move.tokens = {head.tail_first, selected, std::span(first, end), window, cut};
  move.with_positions = selects;
  set_tail(head, task, cut, move);
}

// Blocks hold the sinks first; those after them that lie before the window go.
void expire_blocks(const HeadCache& head, const HeadTask& task, std::int64_t begin,
                   HeadMove& move) {
  const auto& blocks = head.blocks;
  while (move.first_expired_block < blocks.size() &&
         blocks[move.first_expired_block].first_position < task.sinks) {
    ++move.first_expired_block;
  }
  for (std::size_t i = move.first_expired_block; i < blocks.size(); ++i) {
    const std::int64_t expired = begin - blocks[i].first_position;
    if (expired < blocks[i].end) {
      move.first_of_next_block = static_cast<int>(std::max<std::int64_t>(expired, 0));
      return;
    }
    ++move.n_expired_blocks;
  }
}

void stream(const HeadCache& head, const HeadTask& task, HeadMove& move) {
  const std::int64_t begin = task.n_tokens - task.plan.window;
  if (begin <= task.sinks + 1) return;
  expire_blocks(head, task, begin, move);
  const std::int64_t n_first = head.blocks.empty() && head.tail_first == 0 ? task.sinks : 0;
  const std::int64_t from = std::max(begin, head.tail_first);
  const std::int64_t cut = is_raw(task.plan.codec) ? from : std::max(tail_cut(head, task), from);
  move.tokens = {0, n_first, {}, from, cut};
  set_tail(head, task, cut, move);
}

}  // namespace

bool is_by_id(const HeadCache& head, const HeadPlan& plan) {
  return plan.codec.k == KvFormat::kToken && head.context.k_tokens == nullptr;
}

void HeadTask::set_plan(const HeadCache& head, const HeadPlan& wanted) {
  plan = wanted;
  by_id = is_by_id(head, wanted);
  if (!by_id) return;
  plan.codec = {KvFormat::kCodebook, KvFormat::kCodebook};
  plan.fallback = KvFormat::kRaw;
}

HeadMove move_head(const HeadCache& head, const HeadTask& task) {
  HeadMove move;
  move.tail_origin = head.tail_origin;
  move.tail_first = head.tail_first;
  if (task.plan.mode == KvMode::kStream) {
    stream(head, task, move);
  } else if (task.plan.mode == KvMode::kEvict || !is_raw(task.plan.codec)) {
    leave_tail(head, task, move);
  }
  // Sinks stay in full precision; token ids are exact and raw blocks take them like any other.
  if (task.holds_ids() || is_raw(task.plan.codec)) return move;
  while (move.n_sinks < move.tokens.size() && move.tokens[move.n_sinks] < task.sinks) {
    ++move.n_sinks;
  }
  return move;
}

BlockForm block_form(kernels::KvCodec codec, std::int64_t n) {
  const auto is_kivi = [](KvFormat f) { return f == KvFormat::kKivi4 || f == KvFormat::kKivi2; };
  if (n < kBlock && is_kivi(codec.k)) codec.k = KvFormat::kRaw;
  if (n < kBlock && is_kivi(codec.v)) codec.v = KvFormat::kRaw;
  BlockForm form{codec};
  if (is_raw(codec)) form.capacity = static_cast<int>((n + 3) / 4 * 4);
  return form;
}

bool codebook_pays(KvFormat fallback, KvSide side, const kernels::KvPageLayout& layout,
                   std::int64_t n_rows, std::int64_t n_stored, std::int64_t n_before,
                   std::int64_t n_after) {
  const auto bytes_of = [&](KvFormat format) {
    return kernels::kv_side_bytes(format, side, layout.head_dim, layout.dtype).total() *
           static_cast<std::uint64_t>((n_rows + kBlock - 1) / kBlock);
  };
  const auto chunks_of = [&](std::int64_t n_entries) {
    return static_cast<std::uint64_t>((n_entries - n_stored + kernels::kCodebookChunkEntries - 1) /
                                      kernels::kCodebookChunkEntries);
  };
  const std::uint64_t cost =
      bytes_of(KvFormat::kCodebook) +
      (chunks_of(n_after) - chunks_of(n_before)) * codebook_chunk_bytes(layout.head_dim);
  return cost < bytes_of(fallback);
}

void append_piece_sizes(const HeadCache& head, const HeadTask& task, const HeadMove& move,
                        const kernels::KvPageLayout& layout, PieceSizes& sizes) {
  const kernels::KvCodec planned = task.plan.codec;
  // One side may find its codebook and the other fall back to raw: that block has all 32 slots.
  const bool has_codebook = planned.k == KvFormat::kCodebook || planned.v == KvFormat::kCodebook;
  // n_blocks of n tokens each.
  const auto add = [&](kernels::KvCodec codec, std::int64_t n_blocks, std::int64_t n,
                       bool with_positions) {
    if (n_blocks == 0 || n == 0) return;
    BlockForm form = block_form(codec, n);
    if (has_codebook) form.capacity = kernels::kKvBlockTokens;
    for (const KvSide side : {KvSide::kKey, KvSide::kValue}) {
      const kernels::KvSideBytes bytes = kernels::kv_side_bytes(
          side == KvSide::kKey ? form.codec.k : form.codec.v, side, layout.head_dim, layout.dtype,
          form.capacity, head.context.wide_ids);
      if (bytes.codes > 0) sizes[bytes.codes] += n_blocks;
      if (bytes.scales > 0) sizes[bytes.scales] += n_blocks;
    }
    if (with_positions) sizes[head.context.wide_positions ? 128 : 64] += n_blocks;
  };
  const auto add_blocks = [&](kernels::KvCodec codec, std::int64_t n_tokens, bool with_positions) {
    add(codec, n_tokens / kBlock, kBlock, with_positions);
    add(codec, 1, n_tokens % kBlock, with_positions);
  };
  const auto n_sinks = static_cast<std::int64_t>(move.n_sinks);
  const auto n_tokens = static_cast<std::int64_t>(move.tokens.size());
  add_blocks({}, n_sinks, false);
  if (n_sinks == n_tokens) return;
  kernels::KvCodec codec = planned;
  const auto mean_bytes = 2 * static_cast<std::uint64_t>(layout.head_dim);
  if (wants_mean(task.plan, codec.k) && head.context.k_mean == nullptr) ++sizes[mean_bytes];
  if (wants_mean(task.plan, codec.v) && head.context.v_mean == nullptr) ++sizes[mean_bytes];
  if (codec.k == KvFormat::kCodebook) codec.k = task.plan.fallback;
  if (codec.v == KvFormat::kCodebook) codec.v = task.plan.fallback;
  add_blocks(codec, n_tokens - n_sinks, move.with_positions);
}

}  // namespace spindle::kvstore
