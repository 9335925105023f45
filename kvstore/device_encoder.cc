#include "kvstore/device_encoder.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/codebook.h"
#include "kernels/core/check.h"

namespace spindle::kvstore {
namespace {

using kernels::KvFormat;
using kernels::KvSide;
constexpr std::int64_t kBlock = kernels::kKvBlockTokens;
constexpr std::int64_t kTile = kernels::kCodebookTileTokens;
constexpr std::int64_t kChunk = kernels::kCodebookChunkEntries;
constexpr std::int64_t kMaxEntries = 65536;  // references are 16 bits
constexpr std::size_t kAlignment = 256;

std::size_t aligned(std::size_t n_bytes) {
  return (n_bytes + kAlignment - 1) / kAlignment * kAlignment;
}
std::int64_t rounded_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// The formulas of the header.
struct Bounds {
  explicit Bounds(const DeviceEncoderConfig& config) {
    heads = static_cast<std::size_t>(config.shape.n_kv_heads);
    head_dim = static_cast<std::size_t>(config.shape.head_dim);
    tokens = static_cast<std::size_t>(
        std::min(config.shape.n_kv_heads * config.max_model_len, config.n_pages * kBlock));
    blocks = tokens / kBlock + 2 * heads;
    entries = static_cast<std::size_t>(std::min(kMaxEntries, config.max_model_len + kTile));
    tiles = static_cast<std::size_t>((config.max_model_len + kTile - 1) / kTile);
  }
  // Of heads without codebooks.
  Bounds(const EncodeSize& size, int dim)
      : heads(size.n_heads),
        head_dim(static_cast<std::size_t>(dim)),
        tokens(static_cast<std::size_t>(size.n_tokens)),
        blocks(tokens / kBlock + 2 * heads) {}

  std::size_t scratch_bytes() const {
    const std::size_t rows = 3 * (tokens * head_dim * sizeof(F16) + heads * kAlignment);
    const std::size_t pieces = 2 * blocks * (kBlock * head_dim * sizeof(F16) + 2 * kAlignment);
    const std::size_t references = 4 * (blocks * 64 + heads * kAlignment);
    const std::size_t books = 2 * heads * aligned((entries + kChunk) * head_dim * sizeof(F16));
    const std::size_t means = 2 * heads * aligned(head_dim * sizeof(std::uint16_t));
    return rows + pieces + references + books + means;
  }
  std::size_t workspace_bytes() const {
    return 2 * heads * kernels::codebook_workspace_bytes(static_cast<int>(head_dim));
  }
  std::size_t staging_bytes() const {
    constexpr std::size_t kLine = DeviceStaging::kAlignment;
    const std::size_t positions = tokens * sizeof(std::int32_t) + heads * kLine;
    const std::size_t lists = blocks * 4 * kLine;
    const std::size_t chunks = 2 * heads * (entries / kChunk + 1);
    const std::size_t tables =
        DeviceStaging::bytes_of<kernels::DeviceGather>(heads) +
        DeviceStaging::bytes_of<kernels::DeviceMean>(2 * heads) +
        DeviceStaging::bytes_of<kernels::DeviceCopy>(chunks + 4 * heads) +
        DeviceStaging::bytes_of<kernels::DeviceCopy>(2 * heads) +
        DeviceStaging::bytes_of<kernels::DeviceEncode>(2 * blocks) +
        tiles * (DeviceStaging::bytes_of<kernels::DeviceCodebookTile>(2 * heads) +
                 DeviceStaging::bytes_of<std::int32_t>(2 * heads));
    return positions + lists + tables;
  }

  std::size_t heads = 0;
  std::size_t head_dim = 0;
  std::size_t tokens = 0;
  std::size_t blocks = 0;
  std::size_t entries = 0;
  std::size_t tiles = 0;
};

// Blocks that may hold K after RoPE.
bool wants_rotated_keys(const HeadPlan& plan, std::int64_t n_sinks) {
  if (n_sinks > 0 || !kernels::is_pre_rope(plan.codec.k)) return true;
  return plan.codec.k == KvFormat::kCodebook && !kernels::is_pre_rope(plan.fallback);
}

}  // namespace

std::uint64_t DeviceEncoder::device_bytes(const DeviceEncoderConfig& config) {
  const Bounds bounds(config);
  return bounds.scratch_bytes() + bounds.workspace_bytes() + bounds.staging_bytes();
}

DeviceEncoder::DeviceEncoder(const CudaContext& context, const std::byte* pool,
                             const DeviceEncoderConfig& config)
    : context_(context), pool_(pool), config_(config) {
  layout_.head_dim = config.shape.head_dim;
  layout_.page_tokens = config.shape.page_tokens;
  layout_.dtype = config.shape.dtype;
}

Result<std::unique_ptr<DeviceEncoder>> DeviceEncoder::create(const CudaContext& context,
                                                             const std::byte* pool,
                                                             const DeviceEncoderConfig& config) {
  const Bounds bounds(config);
  std::unique_ptr<DeviceEncoder> encoder(new DeviceEncoder(context, pool, config));
  auto scratch = context.allocate(bounds.scratch_bytes(), "the scratch of KV compression");
  if (!scratch.ok()) return scratch.status();
  encoder->scratch_ = std::move(*scratch);
  auto workspace = context.allocate(bounds.workspace_bytes(), "the workspace of KV codebooks");
  if (!workspace.ok()) return workspace.status();
  encoder->workspace_ = std::move(*workspace);
  auto staging =
      DeviceStaging::create(context, bounds.staging_bytes(), "what KV compression uploads");
  if (!staging.ok()) return staging.status();
  encoder->staging_ = std::move(*staging);
  auto counts =
      context.allocate_pinned(2 * bounds.heads * sizeof(std::int32_t), "entries of KV codebooks");
  if (!counts.ok()) return counts.status();
  encoder->counts_ = std::move(*counts);
  return encoder;
}

std::byte* DeviceEncoder::allocate(std::size_t n_bytes) {
  std::byte* memory = scratch_.data() + used_;
  used_ += aligned(n_bytes);
  CHECK(used_ <= scratch_.n_bytes(), "the scratch is sized for the largest boundary");
  return memory;
}

bool DeviceEncoder::fits_together(const EncodeSize& size) const {
  if (size.has_books) return false;
  const Bounds bounds(size, layout_.head_dim);
  return bounds.scratch_bytes() <= scratch_.n_bytes() &&
         bounds.staging_bytes() <= staging_->n_bytes();
}

std::vector<EncodedHead> DeviceEncoder::encode(const EncodeTask& task, const DeviceTables& tables) {
  used_ = 0;
  max_tokens_ = 0;
  gathers_.clear();
  means_.clear();
  copies_.clear();
  encodes_.clear();
  heads_.assign(task.heads.size(), {});
  staging_->begin();
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    Head& head = heads_[h];
    head.cache = &task.heads[h];
    head.task = &task.tasks[h];
    head.out.move = std::move(task.moves[h]);
    if (head.n_tokens() == 0) continue;
    prepare(head, tables.pages(task.sequence, task.first_table + h));
  }
  gather();
  match_tiles();
  for (Head& head : heads_) {
    if (head.n_tokens() > 0) add_blocks(head);
  }
  const Staged<kernels::DeviceEncode> encodes = staging_->add(encodes_);
  staging_->send();
  kernels::kv_encode(context_, layout_.head_dim, layout_.dtype, encodes.device, encodes.n);
  std::vector<EncodedHead> encoded;
  encoded.reserve(heads_.size());
  for (Head& head : heads_) encoded.push_back(std::move(head.out));
  return encoded;
}

void DeviceEncoder::prepare(Head& head, const std::uint32_t* pages) {
  const HeadPlan& plan = head.task->plan;
  const std::int64_t n = head.n_tokens();
  const auto n_tiles = static_cast<std::size_t>((head.n_coded() + kTile - 1) / kTile);
  head.tile_codecs.assign(n_tiles, plan.codec);
  if (plan.codec.k == KvFormat::kToken) return;
  if (head.task->by_id) {
    prepare_ids(head, pages);
    return;
  }
  const std::int64_t d = layout_.head_dim;
  if (wants_rotated_keys(plan, head.n_sinks())) head.k = allocate<F16>(n * d);
  if (kernels::is_pre_rope(plan.codec.k)) {
    CHECK(config_.rope.cos != nullptr, "keys before RoPE need its table");
    head.k_pre = allocate<F16>(n * d);
  }
  head.v = allocate<F16>(n * d);
  add_gather(head, pages, gather_moved(head));
  if (head.n_coded() == 0) return;
  prepare_mean(head, KvSide::kKey);
  prepare_mean(head, KvSide::kValue);
  prepare_book(head, KvSide::kKey);
  prepare_book(head, KvSide::kValue);
}

// All tokens.
kernels::DeviceGather DeviceEncoder::gather_moved(const Head& head) {
  const MovedTokens& tokens = head.out.move.tokens;
  kernels::DeviceGather gather;
  gather.n_tokens = static_cast<std::int32_t>(tokens.size());
  gather.first_position = tokens[0];
  if (tokens.is_consecutive()) return gather;
  const auto staged = staging_->add<std::int32_t>(tokens.size());
  tokens.copy(0, tokens.size(), staged.host);
  gather.positions = staged.device;
  return gather;
}

// Of the rows that the head has memory for.
void DeviceEncoder::add_gather(const Head& head, const std::uint32_t* pages,
                               kernels::DeviceGather gather) {
  gather.pages = pages;
  gather.tail_origin = static_cast<std::int32_t>(head.cache->tail_origin);
  gather.k = head.k;
  gather.k_pre = head.k_pre;
  gather.v = head.v;
  gathers_.push_back(gather);
  max_tokens_ = std::max(max_tokens_, gather.n_tokens);
}

// The rows of new ids are the entries; nothing else is read when the table pays.
void DeviceEncoder::prepare_ids(Head& head, const std::uint32_t* pages) {
  const std::int64_t d = layout_.head_dim;
  head.ids = match_token_ids(*head.cache, *head.task, head.out.move.tokens.to_vector(), layout_);
  if (!head.ids.pays) {
    std::fill(head.tile_codecs.begin(), head.tile_codecs.end(), kernels::KvCodec{});
    head.k = allocate<F16>(head.n_tokens() * d);
    head.v = allocate<F16>(head.n_tokens() * d);
    add_gather(head, pages, gather_moved(head));
    return;
  }
  const auto n_new = static_cast<std::int64_t>(head.ids.new_ids.size());
  if (n_new == 0) return;
  CHECK(config_.rope.cos != nullptr, "keys before RoPE need its table");
  head.k_pre = allocate<F16>(rounded_up(n_new, kChunk) * d);
  head.v = allocate<F16>(rounded_up(n_new, kChunk) * d);
  kernels::DeviceGather gather;
  gather.n_tokens = static_cast<std::int32_t>(n_new);
  gather.positions = staging_->add(head.ids.new_tokens).device;
  add_gather(head, pages, gather);
  head.out.k_entries = entries_of(head.k_pre, n_new);
  head.out.v_entries = entries_of(head.v, n_new);
  head.out.entry_ids = head.ids.new_ids;
}

// Whole chunks, which there is memory for behind the rows.
EncodedEntries DeviceEncoder::entries_of(F16* rows, std::int64_t n) {
  const auto row_bytes = static_cast<std::uint64_t>(layout_.head_dim) * sizeof(F16);
  const std::uint64_t n_bytes = static_cast<std::uint64_t>(n) * row_bytes;
  auto* first = reinterpret_cast<std::byte*>(rows);
  EncodedEntries entries;
  entries.n_filled = n;
  entries.chunks = {first, static_cast<std::uint64_t>(rounded_up(n, kChunk)) * row_bytes};
  if (entries.chunks.size() > n_bytes) {
    copies_.push_back({nullptr, first + n_bytes, entries.chunks.size() - n_bytes});
  }
  return entries;
}

// Frozen at the first boundary that encodes.
void DeviceEncoder::prepare_mean(Head& head, KvSide side) {
  const bool is_key = side == KvSide::kKey;
  const HeadPlan& plan = head.task->plan;
  const kernels::KvHeadContext& kept = head.cache->context;
  if (!wants_mean(plan, is_key ? plan.codec.k : plan.codec.v) ||
      (is_key ? kept.k_mean : kept.v_mean) != nullptr) {
    return;
  }
  const auto n_bytes = static_cast<std::size_t>(layout_.head_dim) * sizeof(std::uint16_t);
  std::byte* mean = allocate(n_bytes);
  (is_key ? head.out.k_mean : head.out.v_mean) = {mean, n_bytes};
  means_.push_back({is_key ? head.k_pre : head.v, static_cast<std::int32_t>(head.n_tokens()),
                    reinterpret_cast<std::uint16_t*>(mean)});
}

void DeviceEncoder::prepare_book(Head& head, KvSide side) {
  const bool is_key = side == KvSide::kKey;
  const HeadPlan& plan = head.task->plan;
  if ((is_key ? plan.codec.k : plan.codec.v) != KvFormat::kCodebook) return;
  const std::int64_t d = layout_.head_dim;
  const HeadBook& stored = is_key ? head.cache->k_book : head.cache->v_book;
  Book& book = is_key ? head.k_book : head.v_book;
  book.side = side;
  book.n_stored = stored.n_entries();
  book.n_entries = book.n_stored;
  // A tile adds fewer entries than it has tokens, or it falls back.
  book.capacity =
      std::min(static_cast<std::int64_t>(Bounds(config_).entries), book.n_stored + head.n_coded());
  book.matches = book.n_stored <= book.capacity;
  if (!book.matches) return;
  book.rows = (is_key ? head.k_pre : head.v) + head.n_sinks() * d;
  book.entries = allocate<F16>(rounded_up(book.capacity, kChunk) * d);
  const std::uint64_t chunk_bytes = codebook_chunk_bytes(layout_.head_dim);
  auto* entries = reinterpret_cast<std::byte*>(book.entries);
  for (std::size_t c = 0; c < stored.chunks.size(); ++c) {
    copies_.push_back({stored.chunks[c], entries + c * chunk_bytes, chunk_bytes});
  }
  // Slots past the last token of a block are zeros.
  const std::int64_t n_refs = rounded_up(head.n_coded(), kBlock);
  book.refs = allocate<std::uint16_t>(n_refs);
  book.magnitudes = allocate<std::uint16_t>(n_refs);
  for (std::uint16_t* refs : {book.refs, book.magnitudes}) {
    copies_.push_back({nullptr, reinterpret_cast<std::byte*>(refs),
                       static_cast<std::uint64_t>(n_refs) * sizeof(std::uint16_t)});
  }
}

void DeviceEncoder::gather() {
  const Staged<kernels::DeviceGather> gathers = staging_->add(gathers_);
  const Staged<kernels::DeviceMean> means = staging_->add(means_);
  copy_now();
  if (gathers.n > 0) {
    kernels::kv_gather(context_, pool_, layout_.dtype, layout_.head_dim, config_.rope,
                       gathers.device, gathers.n, max_tokens_);
  }
  if (means.n > 0) kernels::kv_mean(context_, layout_.head_dim, means.device, means.n);
}

// Sends what is staged, and copies.
void DeviceEncoder::copy_now() {
  const Staged<kernels::DeviceCopy> copies = staging_->add(copies_);
  staging_->send();
  kernels::kv_copy(context_, copies.device, copies.n);
  copies_.clear();
}

void DeviceEncoder::match_tiles() {
  std::size_t n_tiles = 0;
  for (const Head& head : heads_) {
    const kernels::KvCodec codec = head.task->plan.codec;
    if (head.task->by_id) continue;
    if (codec.k == KvFormat::kCodebook || codec.v == KvFormat::kCodebook) {
      n_tiles = std::max(n_tiles, head.tile_codecs.size());
    }
  }
  for (std::size_t tile = 0; tile < n_tiles; ++tile) match_tile(tile);
  for (Head& head : heads_) {
    if (head.task->by_id) continue;
    finish_book(head.k_book, head.out.k_entries);
    finish_book(head.v_book, head.out.v_entries);
  }
  if (!copies_.empty()) copy_now();
}

// The same tile of all heads: a codebook that would cost more than the fallback gives way to it.
void DeviceEncoder::match_tile(std::size_t tile) {
  struct Match {
    Head* head;
    Book* book;
    std::int64_t n_rows;
  };
  std::vector<Match> matches;
  for (Head& head : heads_) {
    if (head.task->by_id || tile >= head.tile_codecs.size()) continue;
    const std::int64_t n =
        std::min(kTile, head.n_coded() - static_cast<std::int64_t>(tile) * kTile);
    for (Book* book : {&head.k_book, &head.v_book}) {
      KvFormat& format = book == &head.k_book ? head.tile_codecs[tile].k : head.tile_codecs[tile].v;
      if (format != KvFormat::kCodebook) continue;
      if (book->matches) {
        matches.push_back({&head, book, n});
      } else {
        format = head.task->plan.fallback;
      }
    }
  }
  if (matches.empty()) return;
  const auto tiles = staging_->add<kernels::DeviceCodebookTile>(matches.size());
  const auto counts = staging_->add<std::int32_t>(matches.size());
  const std::int64_t first = static_cast<std::int64_t>(tile) * kTile;
  for (std::size_t i = 0; i < matches.size(); ++i) {
    const Book& book = *matches[i].book;
    kernels::DeviceCodebookTile& out = tiles.host[i];
    out = {};
    out.rows = book.rows + first * layout_.head_dim;
    out.n_rows = static_cast<std::int32_t>(matches[i].n_rows);
    out.theta = book.side == KvSide::kKey ? kCodebookThetaK : kCodebookThetaV;
    out.entries = book.entries;
    out.max_entries = static_cast<std::int32_t>(book.capacity);
    out.n_entries = counts.device + i;
    out.refs = book.refs + first;
    out.magnitudes = book.magnitudes + first;
    counts.host[i] = static_cast<std::int32_t>(book.n_entries);
  }
  staging_->send();
  kernels::codebook_match(context_, layout_.head_dim, tiles.device, tiles.n, workspace_.data());
  context_.to_host(counts_.data(), counts.device, matches.size() * sizeof(std::int32_t));
  context_.synchronize();
  for (std::size_t i = 0; i < matches.size(); ++i) {
    Book& book = *matches[i].book;
    Head& head = *matches[i].head;
    const std::int64_t n_after = counts_.as<std::int32_t>()[i];
    if (n_after <= book.capacity &&
        codebook_pays(head.task->plan.fallback, book.side, layout_, matches[i].n_rows,
                      book.n_stored, book.n_entries, n_after)) {
      book.n_entries = n_after;
      continue;
    }
    (book.side == KvSide::kKey ? head.tile_codecs[tile].k : head.tile_codecs[tile].v) =
        head.task->plan.fallback;
  }
}

void DeviceEncoder::finish_book(const Book& book, EncodedEntries& out) {
  out.n_filled = book.n_entries - book.n_stored;
  if (out.n_filled == 0) return;
  const auto row_bytes = static_cast<std::uint64_t>(layout_.head_dim) * sizeof(F16);
  auto* entries = reinterpret_cast<std::byte*>(book.entries);
  const auto at = [&](std::int64_t entry) {
    return entries + static_cast<std::uint64_t>(entry) * row_bytes;
  };
  const std::int64_t end = rounded_up(book.n_entries, kChunk);
  out.chunks = {at(book.n_stored), at(end)};
  if (end == book.n_entries) return;
  copies_.push_back(
      {nullptr, at(book.n_entries), static_cast<std::uint64_t>(end - book.n_entries) * row_bytes});
}

void DeviceEncoder::add_blocks(Head& head) {
  const std::int64_t n_sinks = head.n_sinks();
  head.out.blocks.reserve(static_cast<std::size_t>(head.n_tokens() / kBlock + 2));
  for (std::int64_t b = 0; b < n_sinks; b += kBlock) {
    add_block(head, b, std::min(b + kBlock, n_sinks), {}, false);
  }
  for (std::int64_t b = n_sinks; b < head.n_tokens(); b += kBlock) {
    const auto tile = static_cast<std::size_t>((b - n_sinks) / kTile);
    add_block(head, b, std::min(b + kBlock, head.n_tokens()), head.tile_codecs[tile],
              head.out.move.with_positions);
  }
}

void DeviceEncoder::add_block(Head& head, std::int64_t begin, std::int64_t end,
                              kernels::KvCodec codec, bool with_positions) {
  const std::int64_t n = end - begin;
  const BlockForm form = block_form(codec, n);
  const MovedTokens& moved = head.out.move.tokens;
  std::int32_t tokens[kBlock];
  if (with_positions || form.codec.k == KvFormat::kToken) {
    moved.copy(static_cast<std::size_t>(begin), static_cast<std::size_t>(end), tokens);
  }
  EncodedBlock block;
  block.view.codec = form.codec;
  block.view.end = static_cast<std::uint8_t>(n);
  block.view.capacity = static_cast<std::uint8_t>(form.capacity);
  block.view.first_position = moved[static_cast<std::size_t>(begin)];
  if (with_positions) block.positions = add_list(config_.wide_positions, tokens, n);
  if (form.codec.k == KvFormat::kToken) {
    std::int32_t ids[kBlock];
    for (std::int64_t i = 0; i < n; ++i) {
      ids[i] = head.task->token_ids[static_cast<std::size_t>(tokens[i] - head.cache->tail_origin)];
    }
    block.k.codes = add_list(config_.wide_ids, ids, n);
  } else if (head.ids.pays) {
    block.k = add_references(head, begin, n);
    block.v = block.k;
  } else {
    block.k = add_side(head, KvSide::kKey, form.codec.k, form.capacity, begin, end);
    block.v = add_side(head, KvSide::kValue, form.codec.v, form.capacity, begin, end);
  }
  head.out.blocks.push_back(block);
}

// Both sides of a block have the same.
EncodedSide DeviceEncoder::add_references(const Head& head, std::int64_t begin, std::int64_t n) {
  std::int32_t refs[kBlock];
  std::int32_t ones[kBlock];
  std::copy_n(head.ids.refs.begin() + begin, n, refs);
  std::fill_n(ones, n, std::int32_t{f32_to_f16(1.0F)});
  return {add_list(false, refs, n), add_list(false, ones, n)};
}

EncodedSide DeviceEncoder::add_side(Head& head, KvSide side, KvFormat format, int capacity,
                                    std::int64_t begin, std::int64_t end) {
  const bool is_key = side == KvSide::kKey;
  const kernels::KvSideBytes bytes =
      kernels::kv_side_bytes(format, side, layout_.head_dim, layout_.dtype, capacity);
  if (format == KvFormat::kCodebook) {
    const Book& book = is_key ? head.k_book : head.v_book;
    const std::int64_t at = begin - head.n_sinks();
    return {{reinterpret_cast<const std::byte*>(book.refs + at), bytes.codes},
            {reinterpret_cast<const std::byte*>(book.magnitudes + at), bytes.scales}};
  }
  std::byte* codes = allocate(bytes.codes);
  std::byte* scales = bytes.scales == 0 ? nullptr : allocate(bytes.scales);
  const F16* rows = head.v;
  if (is_key) rows = kernels::is_pre_rope(format) ? head.k_pre : head.k;
  const Piece fresh = is_key ? head.out.k_mean : head.out.v_mean;
  const kernels::KvHeadContext& kept = head.cache->context;
  kernels::DeviceEncode encode;
  encode.rows = rows + begin * layout_.head_dim;
  if (kernels::is_lloyd(format)) {
    encode.mean = fresh.empty() ? (is_key ? kept.k_mean : kept.v_mean)
                                : reinterpret_cast<const std::uint16_t*>(fresh.data());
  }
  encode.codes = codes;
  encode.scales = scales;
  encode.format = format;
  encode.side = side;
  encode.n = static_cast<std::uint8_t>(end - begin);
  encode.capacity = static_cast<std::uint8_t>(capacity);
  encodes_.push_back(encode);
  return {{codes, bytes.codes}, {scales, bytes.scales}};
}

// 32 values, zeros past the n-th: they are staged, and wait there like any piece.
Piece DeviceEncoder::add_list(bool wide, const std::int32_t* values, std::int64_t n) {
  const auto fill = [&]<typename Value>(const Staged<Value>& list) -> Piece {
    std::fill_n(list.host, kBlock, Value{0});
    std::transform(values, values + n, list.host,
                   [](std::int32_t value) { return static_cast<Value>(value); });
    return {reinterpret_cast<const std::byte*>(list.device), kBlock * sizeof(Value)};
  };
  return wide ? fill(staging_->add<std::uint32_t>(kBlock))
              : fill(staging_->add<std::uint16_t>(kBlock));
}

}  // namespace spindle::kvstore
