#pragma once
// One store on the host and one on a device that go through the same life: they must decide, place
// and account for everything alike, and hold the same content up to what rounding does to a code.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/attention.h"
#include "kvstore/device_memory.h"
#include "kvstore/kv_store.h"
#include "tests/gpu/gpu_fixture.h"
#include "tests/kvstore/fake_kv.h"
#include "tests/kvstore/test_store.h"

namespace spindle::kvstore::testing {

inline constexpr std::int64_t kMaxModelLen = 4096;
inline constexpr std::int64_t kPageTokens = kernels::kKvPageTokens;

// Elements of a raw page or block of `capacity` tokens (kernels/cuda/kv_device.h).
inline std::size_t k_element(std::int64_t capacity, std::int64_t token, std::int64_t channel) {
  return static_cast<std::size_t>((channel / 32 * capacity + token) * 32 + channel % 32);
}
inline std::size_t v_element(std::int64_t capacity, std::int64_t token, std::int64_t channel) {
  return static_cast<std::size_t>(channel * capacity + token);
}

class Twins {
 public:
  struct Options {
    int n_layers = 2;
    int n_kv_heads = 2;
    int head_dim = 64;
    int vocab = 60;
    bool wide = false;
    bool token_table = true;
    std::int64_t n_pages = 400;
    unsigned seed = 1;
  };
  Twins(const CudaContext& gpu, const Options& options)
      : gpu_(gpu),
        options_(options),
        model_(options.n_layers, options.n_kv_heads, options.head_dim, options.vocab, kMaxModelLen,
               options.seed),
        random_(options.seed),
        cos_(gpu, rope_values(true)),
        sin_(gpu, rope_values(false)),
        k_tokens_(gpu, token_values(model_.k_tokens())),
        v_tokens_(gpu, token_values(model_.v_tokens())) {
    DeviceMemoryConfig config;
    config.store.shape = {options.n_kv_heads, options.head_dim, DType::kF16, 32};
    config.store.n_layers = options.n_layers;
    config.store.budget_bytes =
        static_cast<std::uint64_t>(options.n_pages) * config.store.shape.page_bytes();
    config.store.wide_positions = options.wide;
    config.store.wide_ids = options.wide;
    config.store.keeps_token_ids = true;
    config.max_model_len = kMaxModelLen;
    config.rope = rope();
    host_ = *KvStore::create(config.store);
    device_ = *KvStore::create(config.store, *DeviceMemory::create(gpu, config));
    if (!options.token_table) return;
    host_->set_token_table(model_.k_tokens(), model_.v_tokens());
    device_->set_token_table(k_tokens_.data(), v_tokens_.data());
  }

  KvStore& host() { return *host_; }
  KvStore& device() { return *device_; }
  std::mt19937& random() { return random_; }
  std::size_t n_tables() const {
    return static_cast<std::size_t>(options_.n_layers * options_.n_kv_heads);
  }
  std::int64_t length(SequenceId id) const { return host_->length(id); }

  Status open(SequenceId id, std::int64_t max_tokens, std::int64_t pages) {
    const Status status =
        both(host_->open(id, max_tokens, pages), device_->open(id, max_tokens, pages));
    if (status.ok()) tokens_[id];
    return status;
  }
  Status fork(SequenceId parent, SequenceId child, std::int64_t n, std::int64_t max_tokens,
              std::int64_t pages) {
    const Status status = both(host_->fork(parent, child, n, max_tokens, pages),
                               device_->fork(parent, child, n, max_tokens, pages));
    if (status.ok()) tokens_[child].assign(tokens_[parent].begin(), tokens_[parent].begin() + n);
    return status;
  }
  Status extend(SequenceId id, std::int64_t n) {
    const auto added = random_tokens(n, options_.vocab, random_);
    const std::int64_t first = host_->length(id);
    const Status status = both(host_->extend(id, added), device_->extend(id, added));
    if (!status.ok()) return status;
    tokens_[id].insert(tokens_[id].end(), added.begin(), added.end());
    for (int layer = 0; layer < options_.n_layers; ++layer) {
      model_.append(layer, added, first, host_->writable_heads(id, layer), host_->page_layout());
      for (int head = 0; head < options_.n_kv_heads; ++head) append(id, layer, head, added, first);
    }
    return status;
  }
  Result<BoundaryKept> compress(SequenceId id, const TestBoundary& wanted) {
    std::vector<std::vector<std::int32_t>> kept(wanted.selects ? n_tables() : 0);
    for (auto& positions : kept) {
      for (std::int32_t p = 0; p < length(id); ++p) {
        if (random_() % 1000 < wanted.keep_share * 1000) positions.push_back(p);
      }
    }
    StageBoundary boundary;
    boundary.sinks = wanted.sinks;
    boundary.recent = wanted.recent;
    boundary.heads = wanted.heads;
    boundary.kept = kept;
    boundary.prompt_left = wanted.prompt_left;
    boundary.boundaries_left = wanted.boundaries_left;
    boundary.forks = wanted.forks;
    auto on_host = host_->compress(cpu(), &model_.rope(), id, boundary);
    auto on_device = device_->compress(id, boundary);
    EXPECT_EQ(on_host.status().code(), on_device.status().code()) << on_device.status().to_string();
    if (on_host.ok() && on_device.ok()) expect_same(*on_host, *on_device);
    expect_same_pools();
    return on_host;
  }
  void free(SequenceId id) {
    const auto on_host = host_->free(id);
    const auto on_device = device_->free(id);
    ASSERT_TRUE(on_host.ok() && on_device.ok());
    EXPECT_EQ(on_host->full_bytes, on_device->full_bytes);
    EXPECT_EQ(on_host->kept_bytes, on_device->kept_bytes);
    EXPECT_EQ(on_host->layer_kept_bytes, on_device->layer_kept_bytes);
    tokens_.erase(id);
    expect_same_pools();
  }

  // Caches, tables and content of both stores.
  void expect_same_sequence(SequenceId id) {
    ASSERT_EQ(host_->length(id), device_->length(id));
    device_->flush_tables();
    const auto heads = download(device_->device_heads(id), n_tables());
    for (std::size_t table = 0; table < n_tables(); ++table) {
      const int layer = static_cast<int>(table) / options_.n_kv_heads;
      const int head = static_cast<int>(table) % options_.n_kv_heads;
      SCOPED_TRACE("head " + std::to_string(layer) + "." + std::to_string(head));
      const HeadCache& expected = host_->head_cache(id, layer, head);
      const HeadCache& actual = device_->head_cache(id, layer, head);
      expect_same_cache(expected, actual);
      expect_table(heads[table], actual);
      if (::testing::Test::HasFatalFailure()) return;
    }
    for (int layer = 0; layer < options_.n_layers; ++layer) {
      expect_same_content(id, layer);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
  void expect_same_sequences() {
    for (const auto& [id, tokens] : tokens_) {
      expect_same_sequence(id);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }

 private:
  kernels::DeviceRope rope() const {
    return {cos_.data(), sin_.data(), kMaxModelLen, options_.head_dim, 1.0F};
  }
  std::vector<float> rope_values(bool cosines) const {
    std::vector<float> values;
    for (std::int64_t p = 0; p < kMaxModelLen; ++p) {
      const float* row = cosines ? model_.rope().cos(p) : model_.rope().sin(p);
      values.insert(values.end(), row, row + options_.head_dim / 2);
    }
    return values;
  }
  std::vector<std::uint16_t> token_values(const std::uint16_t* first) const {
    return {first, first + options_.vocab * options_.n_kv_heads * options_.head_dim};
  }

  Status both(const Status& on_host, const Status& on_device) {
    EXPECT_EQ(on_host.code(), on_device.code()) << on_device.to_string();
    expect_same_pools();
    return on_host;
  }

  void expect_same_pools() {
    host_->check_invariants();
    device_->check_invariants();
    EXPECT_EQ(host_->pool().n_used(), device_->pool().n_used());
    EXPECT_EQ(host_->pool().n_reserved(), device_->pool().n_reserved());
    EXPECT_EQ(host_->stats().layer_used_bytes, device_->stats().layer_used_bytes);
  }

  void expect_same(const BoundaryKept& expected, const BoundaryKept& actual) {
    EXPECT_EQ(expected.pages.used, actual.pages.used);
    EXPECT_EQ(expected.pages.reserved, actual.pages.reserved);
    EXPECT_EQ(expected.full_bytes, actual.full_bytes);
    ASSERT_EQ(expected.heads.size(), actual.heads.size());
    for (std::size_t i = 0; i < expected.heads.size(); ++i) {
      EXPECT_EQ(expected.heads[i].n_tokens, actual.heads[i].n_tokens);
      EXPECT_EQ(expected.heads[i].bytes, actual.heads[i].bytes);
      EXPECT_EQ(expected.heads[i].k_entries_per_token, actual.heads[i].k_entries_per_token);
      EXPECT_EQ(expected.heads[i].v_entries_per_token, actual.heads[i].v_entries_per_token);
    }
  }

  // Where an address lies in its store's pool.
  static std::int64_t place(const KvStore& store, const void* address) {
    return address == nullptr ? -1 : static_cast<const std::byte*>(address) - store.memory().base();
  }
  void expect_same_cache(const HeadCache& expected, const HeadCache& actual) {
    ASSERT_EQ(expected.tail_pages, actual.tail_pages);
    ASSERT_EQ(expected.tail_origin, actual.tail_origin);
    ASSERT_EQ(expected.tail_first, actual.tail_first);
    ASSERT_EQ(expected.piece_bytes, actual.piece_bytes);
    ASSERT_EQ(expected.blocks.size(), actual.blocks.size());
    const auto same = [&](const void* a, const void* b) {
      return place(*host_, a) == place(*device_, b);
    };
    for (std::size_t i = 0; i < expected.blocks.size(); ++i) {
      const kernels::KvBlock& a = expected.blocks[i];
      const kernels::KvBlock& b = actual.blocks[i];
      ASSERT_EQ(a.codec, b.codec) << "block " << i;
      ASSERT_EQ(a.capacity, b.capacity);
      ASSERT_EQ(a.first, b.first);
      ASSERT_EQ(a.end, b.end);
      ASSERT_EQ(a.first_position, b.first_position);
      ASSERT_TRUE(same(a.positions, b.positions) && same(a.k.codes, b.k.codes) &&
                  same(a.k.scales, b.k.scales) && same(a.v.codes, b.v.codes) &&
                  same(a.v.scales, b.v.scales))
          << "block " << i;
    }
    ASSERT_TRUE(same(expected.context.k_mean, actual.context.k_mean));
    ASSERT_TRUE(same(expected.context.v_mean, actual.context.v_mean));
    ASSERT_EQ(expected.token_entries, actual.token_entries);
    ASSERT_EQ(expected.k_book.n_filled, actual.k_book.n_filled);
    ASSERT_EQ(expected.v_book.n_filled, actual.v_book.n_filled);
    ASSERT_EQ(expected.k_book.chunks.size(), actual.k_book.chunks.size());
    ASSERT_EQ(expected.v_book.chunks.size(), actual.v_book.chunks.size());
  }

  template <typename T>
  std::vector<T> download(const T* values, std::size_t n) const {
    std::vector<T> out(n);
    if (n == 0) return out;
    gpu_.to_host(out.data(), values, n * sizeof(T));
    gpu_.synchronize();
    return out;
  }

  std::uint32_t device_place(const void* address) const {
    return address == nullptr
               ? kernels::kNoPlace
               : static_cast<std::uint32_t>(place(*device_, address) / kernels::kKvPlaceBytes);
  }
  void expect_table(const kernels::DeviceKvHead& head, const HeadCache& cache) {
    ASSERT_EQ(download(head.pages, cache.tail_pages.size()), cache.tail_pages);
    ASSERT_EQ(head.tail_origin, cache.tail_origin);
    ASSERT_EQ(head.tail_first, cache.tail_first);
    ASSERT_EQ(head.k_mean, device_place(cache.context.k_mean));
    ASSERT_EQ(head.v_mean, device_place(cache.context.v_mean));
    ASSERT_EQ(head.wide_positions != 0, options_.wide);
    ASSERT_EQ(head.wide_ids != 0, options_.wide);
    ASSERT_EQ(head.k_tokens, cache.context.k_tokens);
    ASSERT_EQ(head.v_tokens, cache.context.v_tokens);
    ASSERT_EQ(head.token_stride, cache.context.token_stride);
    ASSERT_EQ(head.n_blocks, static_cast<std::int32_t>(cache.blocks.size()));
    const auto blocks = download(head.blocks, cache.blocks.size());
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const kernels::KvBlock& block = cache.blocks[i];
      ASSERT_EQ(blocks[i].k_codes, device_place(block.k.codes)) << "block " << i;
      ASSERT_EQ(blocks[i].k_scales, device_place(block.k.scales));
      ASSERT_EQ(blocks[i].v_codes, device_place(block.v.codes));
      ASSERT_EQ(blocks[i].v_scales, device_place(block.v.scales));
      ASSERT_EQ(blocks[i].positions, device_place(block.positions));
      ASSERT_EQ(blocks[i].first_position, block.first_position);
      ASSERT_EQ(blocks[i].k_format, block.codec.k);
      ASSERT_EQ(blocks[i].v_format, block.codec.v);
      ASSERT_EQ(blocks[i].first, block.first);
      ASSERT_EQ(blocks[i].end, block.end);
      ASSERT_EQ(blocks[i].capacity, block.capacity);
    }
    expect_chunks(head.k_entries, cache.k_book);
    expect_chunks(head.v_entries, cache.v_book);
  }
  void expect_chunks(const std::uint32_t* entries, const HeadBook& book) {
    const auto places = download(entries, book.chunks.size());
    for (std::size_t c = 0; c < places.size(); ++c) {
      ASSERT_EQ(places[c], device_place(book.chunks[c])) << "chunk " << c;
    }
  }

  // What rope_append would write, straight into the pages.
  void append(SequenceId id, int layer, int head, const std::vector<std::int32_t>& added,
              std::int64_t first) {
    const kernels::KvWritableHeadPages pages =
        device_->writable_heads(id, layer)[static_cast<std::size_t>(head)];
    const std::int64_t d = options_.head_dim;
    const std::size_t page_values = device_->page_layout().page_bytes() / sizeof(std::uint16_t);
    std::vector<std::uint16_t> page;
    std::int64_t open_page = -1;
    const auto write = [&] {
      if (open_page < 0) return;
      gpu_.to_device(pages.pages[open_page], page.data(), page_values * sizeof(std::uint16_t));
      gpu_.synchronize();
    };
    for (std::size_t i = 0; i < added.size(); ++i) {
      const auto position = static_cast<std::int32_t>(first + static_cast<std::int64_t>(i));
      const std::int64_t offset = position - pages.tail_origin;
      if (offset / kPageTokens != open_page) {
        write();
        open_page = offset / kPageTokens;
        page =
            download(reinterpret_cast<const std::uint16_t*>(pages.pages[open_page]), page_values);
      }
      const std::vector<float> k = model_.k(layer, head, added[i], position);
      const std::vector<float> v = model_.v(layer, head, added[i]);
      const std::int64_t slot = offset % kPageTokens;
      for (std::int64_t c = 0; c < d; ++c) {
        const auto channel = static_cast<std::size_t>(c);
        page[k_element(kPageTokens, slot, c)] = f32_to_f16(k[channel]);
        page[page_values / 2 + v_element(kPageTokens, slot, c)] = f32_to_f16(v[channel]);
      }
    }
    write();
  }

  // A token's K and V from a page in host memory.
  void read_page(const std::vector<std::uint16_t>& pages, std::int64_t page, std::int64_t slot,
                 StoredToken& token) const {
    const std::size_t page_values = device_->page_layout().page_bytes() / sizeof(std::uint16_t);
    const std::uint16_t* k = pages.data() + static_cast<std::size_t>(page) * page_values;
    for (std::int64_t c = 0; c < options_.head_dim; ++c) {
      token.k.push_back(f16_to_f32(k[k_element(kPageTokens, slot, c)]));
      token.v.push_back(f16_to_f32(k[page_values / 2 + v_element(kPageTokens, slot, c)]));
    }
  }

  // All heads of a layer as kernels see them: expanded blocks, then the tail. K after RoPE.
  std::vector<std::vector<StoredToken>> read_device(SequenceId id, int layer) {
    const kernels::KvPageLayout layout = device_->page_layout();
    const std::size_t page_values = layout.page_bytes() / sizeof(std::uint16_t);
    std::vector<std::int64_t> first_page;
    std::int64_t n_pages = 0;
    std::size_t max_blocks = 0;
    for (int head = 0; head < options_.n_kv_heads; ++head) {
      const std::size_t n_blocks = device_->head_cache(id, layer, head).blocks.size();
      first_page.push_back(n_pages);
      n_pages += static_cast<std::int64_t>(n_blocks);
      max_blocks = std::max(max_blocks, n_blocks);
    }
    std::vector<std::uint16_t> expanded;
    if (n_pages > 0) {
      const ::spindle::testing::DeviceVector<std::uint16_t> pages(
          gpu_, static_cast<std::size_t>(n_pages) * page_values);
      const ::spindle::testing::DeviceVector<std::int64_t> first(gpu_, first_page);
      kernels::DeviceSequence sequence;
      sequence.n_queries = 1;
      sequence.n_context = static_cast<std::int32_t>(device_->length(id));
      sequence.heads = device_->device_heads(id);
      const ::spindle::testing::DeviceVector<kernels::DeviceSequence> sequences(
          gpu_, std::vector<kernels::DeviceSequence>{sequence});
      kernels::kv_expand(gpu_, sequences.data(), 1, layer,
                         {options_.n_kv_heads, options_.n_kv_heads, options_.head_dim},
                         {device_->memory().base(), layout}, rope(),
                         static_cast<std::int32_t>(max_blocks),
                         {reinterpret_cast<std::byte*>(pages.data()), first.data()});
      expanded = pages.to_host();
    }
    std::vector<std::vector<StoredToken>> heads;
    for (int head = 0; head < options_.n_kv_heads; ++head) {
      heads.push_back(
          read_head(id, layer, head, expanded, first_page[static_cast<std::size_t>(head)]));
    }
    return heads;
  }
  std::vector<StoredToken> read_head(SequenceId id, int layer, int head,
                                     const std::vector<std::uint16_t>& expanded,
                                     std::int64_t first_page) {
    const HeadCache& cache = device_->head_cache(id, layer, head);
    const std::size_t page_values = device_->page_layout().page_bytes() / sizeof(std::uint16_t);
    std::vector<StoredToken> tokens;
    for (std::size_t i = 0; i < cache.blocks.size(); ++i) {
      const kernels::KvBlock& block = cache.blocks[i];
      const std::size_t width = options_.wide ? 4 : 2;
      std::vector<std::byte> positions;
      if (block.positions != nullptr) positions = download(block.positions, 32 * width);
      for (int t = block.first; t < block.end; ++t) {
        StoredToken token{block.first_position + t, false, block.codec, {}, {}};
        if (!positions.empty()) {
          std::uint32_t position = 0;
          std::memcpy(&position, positions.data() + static_cast<std::size_t>(t) * width, width);
          token.position = position;
        }
        read_page(expanded, first_page + static_cast<std::int64_t>(i), t, token);
        tokens.push_back(std::move(token));
      }
    }
    std::vector<std::uint16_t> page;
    std::int64_t open_page = -1;
    for (std::int64_t p = cache.tail_first; p < device_->length(id); ++p) {
      const std::int64_t offset = p - cache.tail_origin;
      if (offset / kPageTokens != open_page) {
        open_page = offset / kPageTokens;
        page = download(reinterpret_cast<const std::uint16_t*>(
                            cache.tail_data[static_cast<std::size_t>(open_page)]),
                        page_values);
      }
      StoredToken token{p, true, {}, {}, {}};
      read_page(page, 0, offset % kPageTokens, token);
      tokens.push_back(std::move(token));
    }
    return tokens;
  }

  void rotate(StoredToken& token) const {
    const std::int32_t positions[] = {static_cast<std::int32_t>(token.position)};
    kernels::rope(cpu(), model_.rope(), positions, options_.head_dim,
                  Rows(token.k.data(), 1, options_.head_dim), Rows(nullptr, 1, 0));
  }

  void expect_same_content(SequenceId id, int layer) {
    const auto on_device = read_device(id, layer);
    for (int head = 0; head < options_.n_kv_heads; ++head) {
      const auto& actual = on_device[static_cast<std::size_t>(head)];
      auto expected = ::spindle::kvstore::testing::read_head(
          host_->head_cache(id, layer, head), host_->length(id), host_->page_layout());
      ASSERT_EQ(actual.size(), expected.size());
      double sum = 0;
      int n = 0;
      for (std::size_t t = 0; t < expected.size(); ++t) {
        StoredToken& token = expected[t];
        ASSERT_EQ(actual[t].position, token.position);
        ASSERT_EQ(actual[t].codec, token.codec);
        if (!token.in_tail && kernels::is_pre_rope(token.codec.k)) rotate(token);
        const double k_error = relative_error(actual[t].k, token.k);
        const double v_error = relative_error(actual[t].v, token.v);
        const std::string where = "token " + std::to_string(token.position) + " of head " +
                                  std::to_string(layer) + "." + std::to_string(head) + " in " +
                                  std::string(format_name(token.codec.k)) + "/" +
                                  std::string(format_name(token.codec.v));
        ASSERT_LE(k_error, limit(token.in_tail, token.codec.k)) << where;
        ASSERT_LE(v_error, limit(token.in_tail, token.codec.v)) << where;
        sum += k_error + v_error;
        n += 2;
      }
      // Codes on an edge are rare.
      if (n > 64) {
        ASSERT_LE(sum / n, 0.01) << "head " << layer << "." << head;
      }
    }
  }
  // Pages and raw blocks are the same bits. Others are rounded to 16 bits by kv_expand, 2^-11 of
  // each element. Keys before RoPE may differ in their last bit of 16 before they are encoded,
  // their means with them, and sums of the Hadamard transform in the last of 32: an element on the
  // edge between two codes then moves by one step. That is at most 1.6 standard deviations in
  // lloyd1 and a third in int4, of one in 64 elements: 0.2 and 0.04, and a token may have several.
  static double limit(bool in_tail, kernels::KvFormat format) {
    if (in_tail || format == kernels::KvFormat::kRaw) return 0;
    if (kernels::is_lloyd(format)) return 0.45;
    return kernels::is_rotated(format) ? 0.1 : 2e-3;
  }

  const CudaContext& gpu_;
  Options options_;
  FakeKv model_;
  std::mt19937 random_;
  ::spindle::testing::DeviceVector<float> cos_;
  ::spindle::testing::DeviceVector<float> sin_;
  ::spindle::testing::DeviceVector<std::uint16_t> k_tokens_;
  ::spindle::testing::DeviceVector<std::uint16_t> v_tokens_;
  std::unique_ptr<KvStore> host_;
  std::unique_ptr<KvStore> device_;
  std::map<SequenceId, std::vector<std::int32_t>> tokens_;
};

}  // namespace spindle::kvstore::testing
