#include "kvstore/plan/kv_projection.h"

#include <algorithm>

namespace spindle::kvstore {
namespace {

using kernels::KvFormat;
using kernels::KvSide;
constexpr std::int64_t kBlock = kernels::kKvBlockTokens;

bool is_raw(const HeadPlan& plan) { return plan.codec == kernels::KvCodec{}; }
bool is_kivi(KvFormat format) { return format == KvFormat::kKivi4 || format == KvFormat::kKivi2; }

// What a piece takes of its page when only pieces of its size lie there.
std::uint64_t packed_bytes(std::uint64_t bytes, std::uint64_t page_bytes) {
  if (bytes == 0) return 0;
  const std::uint64_t per_page = page_bytes / arena_bytes(bytes);
  return (page_bytes + per_page - 1) / per_page;
}

// The longest that a head's tail can be after a later boundary, counted from its first page.
std::int64_t tail_behind(const HeadPlan& plan, const TailState& tail, const Ahead& ahead) {
  const bool streams = plan.mode == KvMode::kStream;
  const std::int64_t kept = is_raw(plan)                       ? plan.window
                            : plan.codec.k == KvFormat::kToken ? 0
                                                               : ahead.recent;
  if (kept == 0) return 0;
  const bool is_regular = ahead.only_generates() && streams == is_raw(plan);
  const std::int64_t over = ahead.n_tokens - kept - tail.origin;
  return kept + (is_regular ? (over % kBlock + kBlock) % kBlock : kBlock - 1);
}

}  // namespace

std::int64_t tail_begin(std::int64_t tail_origin, std::int64_t tail_first, int recent,
                        std::int64_t n_tokens) {
  if (recent == 0) return n_tokens;
  const std::int64_t room = std::max<std::int64_t>(n_tokens - recent - tail_origin, 0);
  return std::max(tail_origin + room / kBlock * kBlock, tail_first);
}

bool wants_mean(const HeadPlan& plan, KvFormat format) {
  return kernels::is_lloyd(format == KvFormat::kCodebook ? plan.fallback : format);
}

bool tail_only_grows(const HeadPlan& plan, const Ahead& ahead) {
  const bool selects_again = plan.mode == KvMode::kEvict && ahead.boundaries_left > 0;
  return is_raw(plan) && plan.mode != KvMode::kStream && !selects_again;
}

std::int64_t future_tail_pages(const KvShape& shape, const HeadPlan& plan, const TailState& tail,
                               const Ahead& ahead) {
  const std::int64_t left = ahead.granted_tokens - ahead.n_tokens;
  const std::int64_t length = ahead.n_tokens - tail.origin;
  if (tail_only_grows(plan, ahead)) {
    return pages_for_tokens(length + left, shape.page_tokens) - tail.n_pages;
  }
  const std::int64_t own = ahead.forks ? 0 : tail.n_own_pages;
  // The longest tail: what stays behind a boundary, up to the next one; a prompt segment first.
  std::int64_t longest = length + left;
  if (!is_raw(plan) || plan.mode == KvMode::kStream) {
    std::int64_t behind = tail_behind(plan, tail, ahead);
    // A stream begins once it is longer than its window.
    if (plan.mode == KvMode::kStream && tail.first == 0) {
      behind = std::max(behind, ahead.sinks + plan.window + 1);
    }
    const std::int64_t rolling = std::max(length + ahead.prompt_left, behind) + kGeneratedBoundary;
    longest = std::min(longest, rolling);
  }
  // What it takes until the forks is shared as well.
  const std::int64_t drawn =
      pages_for_tokens(length + ahead.prompt_left, shape.page_tokens) - tail.n_pages;
  return pages_for_tokens(longest, shape.page_tokens) - own + (ahead.forks ? drawn : 0);
}

std::uint64_t future_piece_bytes(const PieceFormat& format, const HeadPlan& plan,
                                 const TailState& tail, const Ahead& ahead) {
  const KvShape& shape = format.shape;
  const bool selects_again = plan.mode == KvMode::kEvict && ahead.boundaries_left > 0;
  const std::uint64_t page = shape.page_bytes();
  const auto block_bytes = [&](kernels::KvCodec codec) {
    std::uint64_t bytes = 0;
    for (const KvSide side : {KvSide::kKey, KvSide::kValue}) {
      const auto pieces =
          kernels::kv_side_bytes(side == KvSide::kKey ? codec.k : codec.v, side, shape.head_dim,
                                 shape.dtype, kernels::kKvBlockTokens, format.wide_ids);
      bytes += packed_bytes(pieces.codes, page) + packed_bytes(pieces.scales, page);
    }
    if (selects_again) bytes += format.wide_positions ? 128 : 64;
    return bytes;
  };
  const std::uint64_t raw_bytes = block_bytes({});
  std::uint64_t bytes = 0;
  if (tail.first == 0 && plan.mode != KvMode::kFull) {
    bytes += raw_bytes * static_cast<std::uint64_t>((ahead.sinks + kBlock - 1) / kBlock);
  }
  // The last block of each selection may be partly filled.
  auto n_partial = static_cast<std::uint64_t>(ahead.boundaries_left + 1);
  if (is_raw(plan)) return bytes + (selects_again ? raw_bytes * n_partial : 0);
  kernels::KvCodec codec = plan.codec;
  if (codec.k == KvFormat::kCodebook) codec.k = plan.fallback;
  if (codec.v == KvFormat::kCodebook) codec.v = plan.fallback;
  const int recent = codec.k == KvFormat::kToken ? 0 : ahead.recent;
  if (tail.by_id) codec = {};  // what its tokens may fall back to
  std::int64_t end = ahead.granted_tokens - recent;
  if (ahead.only_generates() && plan.mode != KvMode::kStream && tail.first > 0) {
    const std::int64_t left = ahead.granted_tokens - ahead.n_tokens;
    const std::int64_t last = ahead.n_tokens + left / kGeneratedBoundary * kGeneratedBoundary;
    end = tail_begin(tail.origin, tail.first, recent, last);
    n_partial = 0;
  }
  const std::int64_t n_tokens = std::max<std::int64_t>(end - tail.first, 0);
  if (n_tokens == 0) return bytes;
  const auto n_blocks = static_cast<std::uint64_t>((n_tokens + kBlock - 1) / kBlock);
  const bool has_kivi = is_kivi(codec.k) || is_kivi(codec.v);
  // A window's blocks need not be full, and those of KIVI are raw then: one in two at most.
  const std::uint64_t n_raw =
      has_kivi ? n_partial + (plan.mode == KvMode::kStream ? n_blocks / 2 : 0) : 0;
  bytes += raw_bytes * n_raw + block_bytes(codec) * (n_blocks + (has_kivi ? 0 : n_partial));
  const std::uint64_t mean = packed_bytes(2ULL * static_cast<std::uint64_t>(shape.head_dim), page);
  if (wants_mean(plan, codec.k) && !tail.has_k_mean) bytes += mean;
  if (wants_mean(plan, codec.v) && !tail.has_v_mean) bytes += mean;
  return bytes;
}

}  // namespace spindle::kvstore
