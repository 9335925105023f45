#pragma once
// head_encoder.h on a CUDA device, for all KV heads of a layer together: the host decides which
// tokens move (head_move.h) and where every piece waits; kernels gather the tokens' rows, average
// them, match codebooks and encode. A layer takes two uploads and three launches, and two more and
// a synchronisation for every tile of 1,024 tokens when some head uses a codebook. Layers without
// codebooks share all that while the scratch lasts: the few generated tokens of a boundary are
// encoded at once.
//
// Scratch, with h KV heads of d channels (16 bit), N = min(h max_model_len, pages of the pool * 32)
// tokens that a layer can encode at once, in at most B = N / 32 + 2 h blocks, and E = min(65,536,
// max_model_len + 1,024) codebook entries of one side of a head:
//   rows      6 N d           K after RoPE, K before it, V
//   pieces    128 B d         raw, the largest form of a block
//   books     256 B + 4 h E d references; entries of both sides of all heads
//   staging   4 N + 336 B + 48 h (E / 16) and some, three times: once here, twice page-locked
// and the workspace of codebook_match for 2 h tiles. Llama 3 8B's 8 heads of 128 channels with
// 8,192 positions: 0.12 GB.
//
// Thread-safety: none; the store's thread.

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/core/cuda_context.h"
#include "kernels/cuda/kv_device.h"
#include "kernels/kv_compact.h"
#include "kernels/kv_quant.h"
#include "kernels/rope.h"
#include "kvstore/device_staging.h"
#include "kvstore/device_tables.h"
#include "kvstore/kv_memory.h"
#include "kvstore/plan/kv_shape.h"
#include "kvstore/token_book.h"

namespace spindle::kvstore {

struct DeviceEncoderConfig {
  KvShape shape;  // head_dim 64 or 128, kF16 or kBF16
  std::int64_t n_pages = 0;
  std::int64_t max_model_len = 0;
  kernels::DeviceRope rope;
  bool wide_positions = false;
  bool wide_ids = false;
};

class DeviceEncoder {
 public:
  static std::uint64_t device_bytes(const DeviceEncoderConfig& config);
  // RESOURCE_EXHAUSTED when the scratch does not fit.
  static Result<std::unique_ptr<DeviceEncoder>> create(const CudaContext& context,
                                                       const std::byte* pool,
                                                       const DeviceEncoderConfig& config);

  // As KvMemory::encodes_together and encode. The device's tables hold the tails as they are.
  bool fits_together(const EncodeSize& size) const;
  std::vector<EncodedHead> encode(const EncodeTask& task, const DeviceTables& tables);

 private:
  // One side of one head that is matched with a codebook.
  struct Book {
    bool matches = false;
    kernels::KvSide side = kernels::KvSide::kKey;
    const F16* rows = nullptr;  // of the tokens behind the sinks
    F16* entries = nullptr;
    std::int64_t capacity = 0;
    std::int64_t n_stored = 0;
    std::int64_t n_entries = 0;
    std::uint16_t* refs = nullptr;
    std::uint16_t* magnitudes = nullptr;
  };
  struct Head {
    const HeadCache* cache = nullptr;
    const HeadTask* task = nullptr;
    EncodedHead out;
    F16* k = nullptr;  // [n tokens][head_dim]
    F16* k_pre = nullptr;
    F16* v = nullptr;
    Book k_book;
    Book v_book;
    TokenMatch ids;  // of a table of token ids, which is matched on the host
    std::vector<kernels::KvCodec> tile_codecs;  // of the tokens behind the sinks

    std::int64_t n_tokens() const { return static_cast<std::int64_t>(out.move.tokens.size()); }
    std::int64_t n_sinks() const { return static_cast<std::int64_t>(out.move.n_sinks); }
    std::int64_t n_coded() const { return n_tokens() - n_sinks(); }
  };

  DeviceEncoder(const CudaContext& context, const std::byte* pool,
                const DeviceEncoderConfig& config);
  std::byte* allocate(std::size_t n_bytes);
  template <typename T>
  T* allocate(std::int64_t n) {
    return reinterpret_cast<T*>(allocate(static_cast<std::size_t>(n) * sizeof(T)));
  }
  void prepare(Head& head, const std::uint32_t* pages);
  void prepare_ids(Head& head, const std::uint32_t* pages);
  EncodedEntries entries_of(F16* rows, std::int64_t n);
  kernels::DeviceGather gather_moved(const Head& head);
  // `gather` has the tokens.
  void add_gather(const Head& head, const std::uint32_t* pages, kernels::DeviceGather gather);
  void prepare_mean(Head& head, kernels::KvSide side);
  void prepare_book(Head& head, kernels::KvSide side);
  void gather();
  void match_tiles();
  void match_tile(std::size_t tile);
  void finish_book(const Book& book, EncodedEntries& out);
  void copy_now();
  void add_blocks(Head& head);
  void add_block(Head& head, std::int64_t begin, std::int64_t end, kernels::KvCodec codec,
                 bool with_positions);
  EncodedSide add_references(const Head& head, std::int64_t begin, std::int64_t n);
  EncodedSide add_side(Head& head, kernels::KvSide side, kernels::KvFormat format, int capacity,
                       std::int64_t begin, std::int64_t end);
  Piece add_list(bool wide, const std::int32_t* values, std::int64_t n);

  const CudaContext& context_;
  const std::byte* pool_;
  DeviceEncoderConfig config_;
  kernels::KvPageLayout layout_;
  DeviceBuffer scratch_;
  std::size_t used_ = 0;
  DeviceBuffer workspace_;  // of codebook_match
  std::unique_ptr<DeviceStaging> staging_;
  PinnedBuffer counts_;  // of entries after a tile

  // Of the task at hand.
  std::vector<Head> heads_;
  std::int32_t max_tokens_ = 0;
  std::vector<kernels::DeviceGather> gathers_;
  std::vector<kernels::DeviceMean> means_;
  std::vector<kernels::DeviceCopy> copies_;
  std::vector<kernels::DeviceEncode> encodes_;
};

}  // namespace spindle::kvstore
