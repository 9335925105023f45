#include "kvstore/head_encoder.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/codebook.h"
#include "kernels/core/check.h"
#include "kernels/kv_compact.h"
#include "kernels/kv_quant.h"
#include "kvstore/token_book.h"

namespace spindle::kvstore {
namespace {

using kernels::KvFormat;
using kernels::KvSide;
constexpr std::int64_t kBlock = kernels::kKvBlockTokens;

// Rows of the tokens that leave the tail, in the forms that the formats want.
struct Rows32 {
  std::vector<float> post;  // K after RoPE [n, d]
  std::vector<float> pre;   // K before RoPE, when a format wants it
  std::vector<float> v;
};

class HeadEncoder {
 public:
  HeadEncoder(const CpuContext& context, const HeadCache& head, const kernels::KvPageLayout& layout,
              const kernels::RopeTable* rope, const HeadTask& task, HostScratch& scratch)
      : context_(context),
        head_(head),
        layout_(layout),
        rope_(rope),
        task_(task),
        scratch_(scratch) {}

  EncodedHead run(HeadMove move) {
    out_.move = std::move(move);
    if (out_.move.tokens.empty()) return std::move(out_);
    const std::vector<std::int32_t> tokens = out_.move.tokens.to_vector();
    if (task_.by_id) {
      encode_by_id(tokens);
      return std::move(out_);
    }
    encode(tokens);
    out_.k_entries = new_entries(k_book_, head_.k_book);
    out_.v_entries = new_entries(v_book_, head_.v_book);
    return std::move(out_);
  }

 private:
  void encode(const std::vector<std::int32_t>& tokens) {
    if (task_.plan.codec.k != KvFormat::kToken) {
      gather(tokens, kernels::is_pre_rope(task_.plan.codec.k));
    }
    const std::size_t begin = out_.move.n_sinks;
    for (std::size_t b = 0; b < begin; b += kBlock) {
      add_block(tokens, b, std::min(b + kBlock, begin), {}, false);
    }
    if (begin == tokens.size()) return;
    make_means();
    const std::size_t tile = static_cast<std::size_t>(kernels::kCodebookTileTokens);
    for (std::size_t first = begin; first < tokens.size(); first += tile) {
      const std::size_t end = std::min(first + tile, tokens.size());
      const kernels::KvCodec codec = match_codebooks(first, end);
      for (std::size_t b = first; b < end; b += kBlock) {
        add_block(tokens, b, std::min(b + kBlock, end), codec, out_.move.with_positions);
      }
    }
  }

  // Nothing but the rows of new ids is read when the table pays.
  void encode_by_id(const std::vector<std::int32_t>& tokens) {
    TokenMatch match = match_token_ids(head_, task_, tokens, layout_);
    kernels::KvCodec codec;
    if (match.pays) {
      codec = task_.plan.codec;
      gather(match.new_tokens, true);
      out_.k_entries = entries_of(rows_.pre);
      out_.v_entries = entries_of(rows_.v);
      out_.entry_ids = std::move(match.new_ids);
      k_refs_.magnitude.assign(match.refs.size(), f32_to_f16(1.0F));
      k_refs_.entry = std::move(match.refs);
    } else {
      gather(tokens, false);
    }
    for (std::size_t b = 0; b < tokens.size(); b += kBlock) {
      add_block(tokens, b, std::min(b + kBlock, tokens.size()), codec, out_.move.with_positions);
    }
  }

  EncodedEntries entries_of(const std::vector<float>& values) {
    EncodedEntries entries;
    const auto row_size = static_cast<std::size_t>(layout_.head_dim);
    entries.n_filled = static_cast<std::int64_t>(values.size() / row_size);
    if (entries.n_filled == 0) return entries;
    const std::span<std::byte> chunks = allocate_chunks(entries.n_filled);
    std::transform(values.begin(), values.end(), reinterpret_cast<std::uint16_t*>(chunks.data()),
                   f32_to_f16);
    entries.chunks = chunks;
    return entries;
  }

  void gather(const std::vector<std::int32_t>& tokens, bool before_rope) {
    const auto n = static_cast<std::int64_t>(tokens.size());
    const auto size = static_cast<std::size_t>(n * layout_.head_dim);
    rows_.post.resize(size);
    rows_.v.resize(size);
    kernels::kv_gather(context_, head_.tail_data.data(), head_.tail_origin, tokens, layout_,
                       Rows(rows_.post.data(), n, layout_.head_dim),
                       Rows(rows_.v.data(), n, layout_.head_dim));
    if (!before_rope) return;
    CHECK(rope_ != nullptr, "keys before RoPE need its table");
    rows_.pre = rows_.post;
    kernels::kv_unrotate(*rope_, tokens, Rows(rows_.pre.data(), n, layout_.head_dim));
  }

  ConstRows rows(const std::vector<float>& values, std::size_t begin, std::size_t end) const {
    return ConstRows(values.data() + begin * static_cast<std::size_t>(layout_.head_dim),
                     static_cast<std::int64_t>(end - begin), layout_.head_dim);
  }
  ConstRows all_rows(const std::vector<float>& values) const {
    return rows(values, 0, values.size() / static_cast<std::size_t>(layout_.head_dim));
  }

  // Frozen at the first boundary that encodes.
  void make_means() {
    if (wants_mean(task_.plan, task_.plan.codec.k) && head_.context.k_mean == nullptr) {
      out_.k_mean = mean_of(rows_.pre);
    }
    if (wants_mean(task_.plan, task_.plan.codec.v) && head_.context.v_mean == nullptr) {
      out_.v_mean = mean_of(rows_.v);
    }
  }
  Piece mean_of(const std::vector<float>& values) {
    const auto d = static_cast<std::size_t>(layout_.head_dim);
    const std::span<std::byte> bytes = scratch_.allocate(d * sizeof(std::uint16_t));
    kernels::kv_mean(all_rows(values), {reinterpret_cast<std::uint16_t*>(bytes.data()), d});
    return bytes;
  }
  std::span<const std::uint16_t> mean(KvSide side) const {
    const bool is_key = side == KvSide::kKey;
    const Piece fresh = is_key ? out_.k_mean : out_.v_mean;
    const std::uint16_t* values = fresh.empty()
                                      ? (is_key ? head_.context.k_mean : head_.context.v_mean)
                                      : reinterpret_cast<const std::uint16_t*>(fresh.data());
    return values == nullptr ? std::span<const std::uint16_t>()
                             : std::span(values, static_cast<std::size_t>(layout_.head_dim));
  }

  // The codec of one tile: a codebook that would cost more than the next codec gives way to it.
  kernels::KvCodec match_codebooks(std::size_t begin, std::size_t end) {
    kernels::KvCodec codec = task_.plan.codec;
    if (codec.k == KvFormat::kCodebook) {
      codec.k =
          match_side(rows(rows_.pre, begin, end), KvSide::kKey, head_.k_book, k_book_, k_refs_);
    }
    if (codec.v == KvFormat::kCodebook) {
      codec.v =
          match_side(rows(rows_.v, begin, end), KvSide::kValue, head_.v_book, v_book_, v_refs_);
    }
    tile_begin_ = begin;
    return codec;
  }

  KvFormat match_side(ConstRows x, KvSide side, const HeadBook& stored, kernels::Codebook& book,
                      kernels::CodebookRefs& refs) {
    const std::int64_t d = layout_.head_dim;
    if (book.head_dim == 0) {
      book.head_dim = layout_.head_dim;
      for (std::int64_t e = 0; e < stored.n_entries(); ++e) {
        const auto* row =
            reinterpret_cast<const std::uint16_t*>(
                stored.chunks[static_cast<std::size_t>(e / kernels::kCodebookChunkEntries)]) +
            e % kernels::kCodebookChunkEntries * d;
        book.entries.insert(book.entries.end(), row, row + d);
      }
    }
    const std::int64_t n_before = book.n_entries();
    const std::int64_t n_rows_before = book.n_rows_seen;
    const float theta = side == KvSide::kKey ? kCodebookThetaK : kCodebookThetaV;
    kernels::CodebookMatch match = kernels::codebook_match(context_, book, x, theta, 65536);
    if (!match.complete || !codebook_pays(task_.plan.fallback, side, layout_, x.n_rows,
                                          stored.n_entries(), n_before, book.n_entries())) {
      book.undo_to(n_before, n_rows_before);
      return task_.plan.fallback;
    }
    refs = std::move(match.refs);
    return KvFormat::kCodebook;
  }

  EncodedEntries new_entries(const kernels::Codebook& book, const HeadBook& stored) {
    EncodedEntries entries;
    entries.n_filled = book.n_entries() == 0 ? 0 : book.n_entries() - stored.n_entries();
    if (entries.n_filled == 0) return entries;
    const std::span<std::byte> chunks = allocate_chunks(entries.n_filled);
    const auto first = static_cast<std::size_t>(stored.n_entries() * layout_.head_dim);
    std::memcpy(chunks.data(), book.entries.data() + first,
                (book.entries.size() - first) * sizeof(std::uint16_t));
    entries.chunks = chunks;
    return entries;
  }

  std::span<std::byte> allocate_chunks(std::int64_t n_entries) {
    const std::int64_t n_chunks =
        (n_entries + kernels::kCodebookChunkEntries - 1) / kernels::kCodebookChunkEntries;
    return scratch_.allocate_zeroed(static_cast<std::size_t>(n_chunks) *
                                    codebook_chunk_bytes(layout_.head_dim));
  }

  void add_block(const std::vector<std::int32_t>& tokens, std::size_t begin, std::size_t end,
                 kernels::KvCodec codec, bool with_positions) {
    const auto n = static_cast<std::int64_t>(end - begin);
    const BlockForm form = block_form(codec, n);
    codec = form.codec;
    EncodedBlock block;
    block.view.codec = codec;
    block.view.end = static_cast<std::uint8_t>(n);
    block.view.capacity = static_cast<std::uint8_t>(form.capacity);
    block.view.first_position = tokens[begin];
    if (with_positions) block.positions = position_list(tokens, begin, end);
    if (codec.k == KvFormat::kToken) {
      block.k.codes = id_list(tokens, begin, end);
    } else if (task_.by_id && codec.k == KvFormat::kCodebook) {
      block.k = references(k_refs_, begin, end);
      block.v = block.k;
    } else {
      const auto& keys = kernels::is_pre_rope(codec.k) ? rows_.pre : rows_.post;
      block.k =
          side(KvSide::kKey, codec.k, rows(keys, begin, end), block.view.capacity, begin, k_refs_);
      block.v = side(KvSide::kValue, codec.v, rows(rows_.v, begin, end), block.view.capacity, begin,
                     v_refs_);
    }
    out_.blocks.push_back(std::move(block));
  }

  EncodedSide side(KvSide which, KvFormat format, ConstRows x, int capacity, std::size_t begin,
                   const kernels::CodebookRefs& refs) {
    const kernels::KvSideBytes bytes =
        kernels::kv_side_bytes(format, which, layout_.head_dim, layout_.dtype, capacity);
    if (format == KvFormat::kCodebook) {
      const std::size_t first = begin - tile_begin_;
      return references(refs, first, first + static_cast<std::size_t>(x.n_rows));
    }
    const std::span<std::byte> codes = scratch_.allocate(bytes.codes);
    const std::span<std::byte> scales = scratch_.allocate(bytes.scales);
    if (format == KvFormat::kRaw) {
      kernels::kv_write_raw(which, x, capacity, layout_, codes.data());
    } else {
      kernels::kv_encode(format, which, x, mean(which), codes.data(), scales.data());
    }
    return {codes, scales};
  }

  EncodedSide references(const kernels::CodebookRefs& refs, std::size_t begin, std::size_t end) {
    return {
        list<std::uint16_t>(end - begin, [&](std::size_t i) { return refs.entry[begin + i]; }),
        list<std::uint16_t>(end - begin, [&](std::size_t i) { return refs.magnitude[begin + i]; })};
  }

  template <typename Value>
  Piece list(std::size_t n, const auto& value_at) {
    const std::span<std::byte> bytes = scratch_.allocate_zeroed(kBlock * sizeof(Value));
    for (std::size_t i = 0; i < n; ++i) {
      const auto value = static_cast<Value>(value_at(i));
      std::memcpy(bytes.data() + i * sizeof(Value), &value, sizeof(Value));
    }
    return bytes;
  }
  Piece position_list(const std::vector<std::int32_t>& tokens, std::size_t begin, std::size_t end) {
    const auto at = [&](std::size_t i) { return tokens[begin + i]; };
    return head_.context.wide_positions ? list<std::uint32_t>(end - begin, at)
                                        : list<std::uint16_t>(end - begin, at);
  }
  Piece id_list(const std::vector<std::int32_t>& tokens, std::size_t begin, std::size_t end) {
    const auto at = [&](std::size_t i) {
      return task_.token_ids[static_cast<std::size_t>(tokens[begin + i] - head_.tail_origin)];
    };
    return head_.context.wide_ids ? list<std::uint32_t>(end - begin, at)
                                  : list<std::uint16_t>(end - begin, at);
  }

  const CpuContext& context_;
  const HeadCache& head_;
  const kernels::KvPageLayout& layout_;
  const kernels::RopeTable* rope_;
  const HeadTask& task_;
  HostScratch& scratch_;
  Rows32 rows_;
  kernels::Codebook k_book_;
  kernels::Codebook v_book_;
  kernels::CodebookRefs k_refs_;
  kernels::CodebookRefs v_refs_;
  std::size_t tile_begin_ = 0;
  EncodedHead out_;
};

}  // namespace

EncodedHead encode_head(const CpuContext& context, const HeadCache& head,
                        const kernels::KvPageLayout& layout, const kernels::RopeTable* rope,
                        const HeadTask& task, HeadMove move, HostScratch& scratch) {
  return HeadEncoder(context, head, layout, rope, task, scratch).run(std::move(move));
}

}  // namespace spindle::kvstore
