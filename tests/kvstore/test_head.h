#pragma once
// One KV head outside a store: pages and pieces lie in memory of their own, so that what a boundary
// does to a head is seen without the store's bookkeeping.

#include <deque>
#include <utility>
#include <vector>

#include "kvstore/head_encoder.h"
#include "tests/kvstore/fake_kv.h"

namespace spindle::kvstore::testing {

inline constexpr int kTestDim = 32;

class TestHead {
 public:
  struct Options {
    int vocab = 2000;
    bool wide = false;  // positions and ids of 32 bits
    bool token_table = true;
    unsigned seed = 1;
  };
  explicit TestHead(const Options& options)
      : model_(1, 1, kTestDim, options.vocab, 4096, options.seed), random_(options.seed) {
    layout_.head_dim = kTestDim;
    head_.context.wide_positions = options.wide;
    head_.context.wide_ids = options.wide;
    if (!options.token_table) return;
    head_.context.k_tokens = model_.k_tokens();
    head_.context.v_tokens = model_.v_tokens();
    head_.context.token_stride = kTestDim;
  }

  void append(std::int64_t n) {
    const auto added = random_tokens(n, model_.vocab(), random_);
    const std::int64_t first = n_tokens();
    tokens_.insert(tokens_.end(), added.begin(), added.end());
    while (head_.tail_origin + 32 * static_cast<std::int64_t>(head_.tail_data.size()) <
           n_tokens()) {
      head_.tail_data.push_back(new_memory(layout_.page_bytes()));
    }
    const kernels::KvWritableHeadPages pages{head_.tail_data.data(), head_.tail_origin};
    model_.append(0, added, first, {&pages, 1}, layout_);
  }

  // Carries out a boundary; `kept` makes it one with a selection.
  EncodedHead boundary(const HeadPlan& plan, int sinks, int recent,
                       const std::vector<std::int32_t>* kept = nullptr) {
    HeadTask task;
    task.set_plan(head_, plan);
    task.sinks = sinks;
    task.recent = recent;
    task.n_tokens = n_tokens();
    task.has_selection = kept != nullptr;
    if (kept != nullptr) task.kept = *kept;
    task.token_ids = std::span(tokens_).subspan(static_cast<std::size_t>(head_.tail_origin));
    scratch_.reset();
    EncodedHead encoded =
        encode_head(cpu(), head_, layout_, &model_.rope(), task, move_head(head_, task), scratch_);
    sizes_.clear();
    append_piece_sizes(head_, task, encoded.move, layout_, sizes_);
    apply(encoded);
    return encoded;
  }

  std::vector<StoredToken> read() const { return read_head(head_, n_tokens(), layout_); }
  void expect_everything_right() const { expect_content(read(), tokens_, model_, 0, 0); }

  std::int64_t n_tokens() const { return static_cast<std::int64_t>(tokens_.size()); }
  HeadCache& head() { return head_; }
  const FakeKv& model() const { return model_; }
  const std::vector<std::int32_t>& tokens() const { return tokens_; }
  // What the last boundary was said to place, at most, and what it placed.
  std::uint64_t foretold_bytes() const {
    std::uint64_t bytes = 0;
    for (const auto& [size, n] : sizes_) bytes += size * static_cast<std::uint64_t>(n);
    return bytes;
  }
  std::uint64_t placed_bytes() const { return placed_bytes_; }

 private:
  std::byte* new_memory(std::size_t bytes) {
    memory_.emplace_back(bytes + 64);
    auto address = reinterpret_cast<std::uintptr_t>(memory_.back().data());
    return reinterpret_cast<std::byte*>((address + 63) / 64 * 64);
  }
  const std::byte* place(Piece bytes) {
    if (bytes.empty()) return nullptr;
    std::byte* piece = new_memory(bytes.size());
    std::memcpy(piece, bytes.data(), bytes.size());
    placed_bytes_ += bytes.size();
    return piece;
  }

  void apply(const EncodedHead& encoded) {
    placed_bytes_ = 0;
    const HeadMove& move = encoded.move;
    if (!move.changes) return;
    const auto expired =
        head_.blocks.begin() + static_cast<std::ptrdiff_t>(move.first_expired_block);
    head_.blocks.erase(expired, expired + static_cast<std::ptrdiff_t>(move.n_expired_blocks));
    if (move.first_of_next_block > 0) {
      head_.blocks[move.first_expired_block].first =
          static_cast<std::uint8_t>(move.first_of_next_block);
    }
    const std::size_t n_freed =
        std::min(static_cast<std::size_t>((move.tail_origin - head_.tail_origin + 31) / 32),
                 head_.tail_data.size());
    // Freed pages are scribbled over: nothing may still read them.
    for (std::size_t i = 0; i < n_freed; ++i) {
      std::memset(head_.tail_data[i], 0xff, layout_.page_bytes());
    }
    head_.tail_data.erase(head_.tail_data.begin(),
                          head_.tail_data.begin() + static_cast<std::ptrdiff_t>(n_freed));
    head_.tail_origin = move.tail_origin;
    head_.tail_first = move.tail_first;
    if (!encoded.k_mean.empty()) {
      head_.context.k_mean = reinterpret_cast<const std::uint16_t*>(place(encoded.k_mean));
    }
    if (!encoded.v_mean.empty()) {
      head_.context.v_mean = reinterpret_cast<const std::uint16_t*>(place(encoded.v_mean));
    }
    auto entry = static_cast<std::uint16_t>(head_.k_book.n_entries());
    for (const std::int32_t id : encoded.entry_ids) head_.token_entries.emplace(id, entry++);
    add_entries(head_.k_book, encoded.k_entries);
    add_entries(head_.v_book, encoded.v_entries);
    head_.context.k_entries = head_.k_book.chunks.data();
    head_.context.v_entries = head_.v_book.chunks.data();
    for (const EncodedBlock& block : encoded.blocks) {
      kernels::KvBlock view = block.view;
      view.k = {place(block.k.codes), place(block.k.scales)};
      view.v = {place(block.v.codes), place(block.v.scales)};
      view.positions = place(block.positions);
      head_.blocks.push_back(view);
    }
  }

  void add_entries(HeadBook& book, const EncodedEntries& entries) {
    const std::size_t chunk = codebook_chunk_bytes(kTestDim);
    ASSERT_EQ(entries.chunks.size() % chunk, 0u);
    for (std::size_t first = 0; first < entries.chunks.size(); first += chunk) {
      book.chunks.push_back(place(entries.chunks.subspan(first, chunk)));
    }
    book.n_filled += entries.n_filled;
  }

  FakeKv model_;
  std::mt19937 random_;
  kernels::KvPageLayout layout_;
  HeadCache head_;
  std::vector<std::int32_t> tokens_;
  HostScratch scratch_;
  std::deque<std::vector<std::byte>> memory_;
  PieceSizes sizes_;
  std::uint64_t placed_bytes_ = 0;
};

}  // namespace spindle::kvstore::testing
