#pragma once
// KvMemory of a CUDA device: the pool, the scratch of compression and the tables of all sequences
// in its memory. Everything runs on the context's stream and only compression with codebooks waits
// for it.
//
// Pages and pieces have the layout of kernels/cuda/kv_device.h. What the store calls an address is
// one of the device; the host follows none.
//
// Thread-safety: none; the store's thread, which is the context's.

#include <cstdint>
#include <memory>

#include "kernels/core/cuda_context.h"
#include "kernels/rope.h"
#include "kvstore/device_encoder.h"
#include "kvstore/device_staging.h"
#include "kvstore/device_tables.h"
#include "kvstore/kv_memory.h"
#include "kvstore/kv_store.h"

namespace spindle::kvstore {

struct DeviceMemoryConfig {
  KvStoreConfig store;             // budget_bytes: the pool
  std::int64_t max_model_len = 0;  // of any sequence
  // Needed by plans with keys before RoPE; outlives the memory.
  kernels::DeviceRope rope;
};

class DeviceMemory final : public KvMemory {
 public:
  // What it takes of the device beside the pool and the tables of sequences (device_encoder.h,
  // device_tables.h).
  static std::uint64_t scratch_bytes(const DeviceMemoryConfig& config);
  // RESOURCE_EXHAUSTED when it does not fit; UNIMPLEMENTED for a layout that the CUDA bodies do not
  // know; INVALID_ARGUMENT for a pool beyond 256 GiB. The context outlives it.
  static Result<std::unique_ptr<DeviceMemory>> create(const CudaContext& context,
                                                      const DeviceMemoryConfig& config);

  void copy(std::span<const KvCopy> copies) override;
  bool has_rope(const HostEncoding&) const override { return config_.rope.cos != nullptr; }
  bool encodes_together(const EncodeSize& size) const override {
    return encoder_->fits_together(size);
  }
  std::vector<EncodedHead> encode(const HostEncoding&, const kernels::KvPageLayout&,
                                  const EncodeTask& task) override {
    return encoder_->encode(task, *tables_);
  }

  Status open_tables(SequenceId sequence, std::span<const HeadCache> caches,
                     std::int64_t max_tokens, std::span<const TableRoom> room) override;
  Status grow_tables(SequenceId sequence, std::span<const TableRoom> room) override {
    return tables_->grow(sequence, room);
  }
  void tables_changed(SequenceId sequence, TableChange change) override {
    tables_->changed(sequence, change);
  }
  void close_tables(SequenceId sequence) override { tables_->close(sequence); }
  void flush_tables() override { tables_->flush(); }
  const kernels::DeviceKvHead* device_heads(SequenceId sequence) const override {
    return tables_->heads(sequence);
  }

 private:
  DeviceMemory(const CudaContext& context, const DeviceMemoryConfig& config, DeviceBuffer pool);

  const CudaContext& context_;
  DeviceMemoryConfig config_;
  DeviceBuffer pool_;
  std::unique_ptr<DeviceTables> tables_;
  std::unique_ptr<DeviceEncoder> encoder_;
  std::unique_ptr<DeviceStaging> copy_staging_;
};

}  // namespace spindle::kvstore
