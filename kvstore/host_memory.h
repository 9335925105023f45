#pragma once
// KvMemory of the host: address space that the operating system commits page by page when first
// written, copies by memcpy, head_encoder.h for the bytes. Kernels of the host read the store's own
// tables (KvStore::heads), so there are no others.
//
// Thread-safety: none; the store's thread.

#include <memory>

#include "kvstore/host_scratch.h"
#include "kvstore/kv_memory.h"

namespace spindle::kvstore {

class HostMemory final : public KvMemory {
 public:
  // RESOURCE_EXHAUSTED when the system refuses the address space.
  static Result<std::unique_ptr<HostMemory>> create(std::uint64_t n_bytes);
  ~HostMemory() override;

  void copy(std::span<const KvCopy> copies) override;
  bool has_rope(const HostEncoding& host) const override { return host.rope != nullptr; }
  bool encodes_together(const EncodeSize&) const override { return false; }
  std::vector<EncodedHead> encode(const HostEncoding& host, const kernels::KvPageLayout& layout,
                                  const EncodeTask& task) override;

  Status open_tables(SequenceId, std::span<const HeadCache>, std::int64_t,
                     std::span<const TableRoom>) override {
    return ok_status();
  }
  Status grow_tables(SequenceId, std::span<const TableRoom>) override { return ok_status(); }
  void tables_changed(SequenceId, TableChange) override {}
  void close_tables(SequenceId) override {}
  void flush_tables() override {}
  const kernels::DeviceKvHead* device_heads(SequenceId) const override { return nullptr; }

 private:
  HostMemory(std::byte* base, std::uint64_t n_bytes) { set_memory(base, n_bytes); }

  HostScratch scratch_;
};

}  // namespace spindle::kvstore
