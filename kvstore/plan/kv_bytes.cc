#include <algorithm>
#include <cmath>

#include "kvstore/plan/kv_plan.h"

namespace spindle::kvstore {
namespace {

using kernels::KvFormat;
using kernels::KvSide;

constexpr std::int64_t kBlock = kernels::kKvBlockTokens;

std::uint64_t unsigned_count(std::int64_t n) {
  return static_cast<std::uint64_t>(std::max<std::int64_t>(n, 0));
}
std::int64_t blocks_of(std::int64_t n) {
  return (std::max<std::int64_t>(n, 0) + kBlock - 1) / kBlock;
}

std::uint64_t raw_token_bytes(const KvModel& model) {  // K and V
  return 2 * static_cast<std::uint64_t>(model.head_dim) * dtype_bytes(model.dtype);
}
// Of one side.
std::uint64_t mean_bytes(const KvModel& model) {
  return 2 * static_cast<std::uint64_t>(model.head_dim);
}
// A positions piece of a block.
std::uint64_t positions_bytes(const KvModel& model) {
  return static_cast<std::uint64_t>(kBlock) * (model.wide_positions() ? 4 : 2);
}

// Raw blocks: the last one is only as large as its tokens, in steps of four.
std::uint64_t raw_blocks_bytes(const KvModel& model, std::int64_t n) {
  return unsigned_count((n + 3) / 4 * 4) * raw_token_bytes(model);
}

std::uint64_t side_blocks_bytes(KvFormat format, KvSide side, const KvModel& model,
                                std::int64_t n) {
  return unsigned_count(blocks_of(n)) * kernels::kv_side_bytes(format, side, model.head_dim,
                                                               model.dtype, kernels::kKvBlockTokens,
                                                               model.wide_ids())
                                            .total();
}

// References, magnitudes and whole chunks of entries; what the fallback would cost bounds it.
std::uint64_t codebook_bytes(KvSide side, const KvModel& model, KvFormat fallback_format,
                             std::int64_t n, const HeadErrors* errors) {
  const std::uint64_t fallback = side_blocks_bytes(fallback_format, side, model, n) +
                                 (kernels::is_lloyd(fallback_format) ? mean_bytes(model) : 0);
  double per_token = 1.0;
  if (errors != nullptr) {
    const double measured =
        side == KvSide::kKey ? errors->codebook_k_entries : errors->codebook_v_entries;
    if (measured >= 0.0 && measured <= 1.0) per_token = measured;  // not NaN either
  }
  const auto chunk = static_cast<double>(kernels::kCodebookChunkEntries);
  const auto chunks =
      static_cast<std::uint64_t>(std::ceil(static_cast<double>(n) * per_token / chunk));
  const std::uint64_t entries = chunks * kernels::kCodebookChunkEntries * mean_bytes(model);
  return std::min(fallback, side_blocks_bytes(KvFormat::kCodebook, side, model, n) + entries);
}

// A request's own table of token ids, or raw blocks where that would not be smaller
// (kvstore/token_book.h).
std::uint64_t token_book_bytes(const KvModel& model, std::int64_t n, std::int64_t n_ids) {
  const std::uint64_t raw = raw_blocks_bytes(model, n);
  constexpr std::int64_t kChunk = kernels::kCodebookChunkEntries;
  if (n_ids < 0 || n_ids > kMaxTokenEntries) return raw;
  const std::int64_t n_entries = (std::min(n_ids, n) + kChunk - 1) / kChunk * kChunk;
  const std::uint64_t side = side_blocks_bytes(KvFormat::kCodebook, KvSide::kKey, model, n) +
                             unsigned_count(n_entries) * mean_bytes(model);
  return std::min(raw, 2 * side);
}

bool is_raw(const kernels::KvCodec& codec) {
  return codec.k == KvFormat::kRaw && codec.v == KvFormat::kRaw;
}
bool is_token(const kernels::KvCodec& codec) { return codec.k == KvFormat::kToken; }

}  // namespace

std::uint64_t full_bytes(const KvModel& model, std::int64_t n_tokens) {
  return 4ULL * unsigned_count(model.n_kv_heads) * unsigned_count(model.head_dim) *
         unsigned_count(model.n_layers) * unsigned_count(n_tokens);
}

std::uint64_t page_bytes(const KvModel& model) {
  return static_cast<std::uint64_t>(kBlock) * raw_token_bytes(model);
}

std::int64_t tail_length(int recent, std::int64_t n_tokens) {
  if (recent <= 0) return 0;
  const std::int64_t begin = std::max<std::int64_t>(n_tokens - recent, 0) / kBlock * kBlock;
  return n_tokens - begin;
}

HeadTokens head_tokens(const HeadPlan& plan, const KvModel& model, int sinks, std::int64_t n_tokens,
                       std::int64_t tail_tokens) {
  if (is_token(plan.codec)) return {n_tokens, 0};
  const std::int64_t tail_begin = n_tokens - tail_tokens;
  const std::int64_t kept_sinks = std::min<std::int64_t>(sinks, tail_begin);
  switch (plan.mode) {
    case KvMode::kFull:
      if (is_raw(plan.codec)) return {0, n_tokens};
      return {tail_begin, tail_tokens};
    case KvMode::kStream: {
      const std::int64_t first = std::max<std::int64_t>(n_tokens - plan.window, 0);
      if (is_raw(plan.codec)) {
        const std::int64_t begin = std::min(first / kBlock * kBlock, tail_begin);
        return {std::min<std::int64_t>(sinks, begin), n_tokens - begin};
      }
      const std::int64_t encoded =
          std::max<std::int64_t>(tail_begin - std::max<std::int64_t>(first, sinks), 0);
      return {kept_sinks + encoded, tail_tokens};
    }
    case KvMode::kEvict: {
      const std::int64_t window_begin =
          std::max<std::int64_t>(n_tokens - kObservationWindow, sinks);
      const std::int64_t candidates =
          std::max<std::int64_t>(std::min(tail_begin, window_begin) - sinks, 0);
      const std::int64_t group =
          plan.selector == KvSelector::kSpindleKv ? model.n_heads / model.n_kv_heads : 1;
      const std::int64_t kept = std::min(plan.n_keep * group, candidates);
      const std::int64_t window = std::max<std::int64_t>(tail_begin - window_begin, 0);
      return {kept_sinks + kept + window, tail_tokens};
    }
  }
  return {};
}

std::uint64_t head_block_bytes(const HeadPlan& plan, const KvModel& model, std::int64_t n,
                               const HeadErrors* errors, std::int64_t n_ids) {
  if (n <= 0) return 0;
  std::uint64_t bytes = 0;
  if (is_raw(plan.codec)) {
    bytes = raw_blocks_bytes(model, n);
  } else if (is_token(plan.codec) && !model.token_table) {
    bytes = token_book_bytes(model, n, n_ids);
  } else {
    for (const KvSide side : {KvSide::kKey, KvSide::kValue}) {
      const KvFormat format = side == KvSide::kKey ? plan.codec.k : plan.codec.v;
      bytes += format == KvFormat::kCodebook ? codebook_bytes(side, model, plan.fallback, n, errors)
                                             : side_blocks_bytes(format, side, model, n);
    }
  }
  if (plan.mode == KvMode::kEvict) bytes += unsigned_count(blocks_of(n)) * positions_bytes(model);
  return bytes;
}

std::uint64_t head_body_bytes(const HeadPlan& plan, const KvModel& model, int sinks,
                              std::int64_t n_kept, const HeadErrors* errors, std::int64_t n_ids) {
  if (n_kept <= 0) return 0;
  // Sinks in raw blocks are blocks like the others; token ids are exact.
  if (is_raw(plan.codec) || is_token(plan.codec)) {
    return head_block_bytes(plan, model, n_kept, errors, n_ids);
  }
  const std::int64_t kept_sinks = std::min<std::int64_t>(sinks, n_kept);
  std::uint64_t bytes = raw_blocks_bytes(model, kept_sinks) +
                        head_block_bytes(plan, model, n_kept - kept_sinks, errors);
  for (const KvFormat format : {plan.codec.k, plan.codec.v}) {
    if (kernels::is_lloyd(format)) bytes += mean_bytes(model);
  }
  return bytes;
}

std::uint64_t head_bytes(const HeadPlan& plan, const KvModel& model, int sinks,
                         std::int64_t n_tokens, std::int64_t tail_tokens, const HeadErrors* errors,
                         std::int64_t n_ids) {
  const HeadTokens tokens = head_tokens(plan, model, sinks, n_tokens, tail_tokens);
  return head_body_bytes(plan, model, sinks, tokens.body, errors, n_ids) +
         unsigned_count(blocks_of(tokens.tail)) * page_bytes(model);
}

std::uint64_t plan_bytes(const SequencePlan& plan, const KvModel& model, std::int64_t n_tokens,
                         std::int64_t tail_tokens, const ProfileTable* table, std::int64_t n_ids) {
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < plan.heads.size(); ++i) {
    bytes += head_bytes(plan.heads[i], model, plan.sinks, n_tokens, tail_tokens,
                        table == nullptr ? nullptr : &table->heads[i], n_ids);
  }
  return bytes;
}

}  // namespace spindle::kvstore
