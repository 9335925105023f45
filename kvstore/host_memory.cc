#include "kvstore/host_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "kernels/core/check.h"
#include "kvstore/head_encoder.h"

namespace spindle::kvstore {

Result<std::unique_ptr<HostMemory>> HostMemory::create(std::uint64_t n_bytes) {
  if (n_bytes == 0) return invalid_argument("a KV pool of 0 bytes");
  void* memory = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    return resource_exhausted("cannot map " + std::to_string(n_bytes) +
                              " bytes for the KV pool: " + std::strerror(errno));
  }
  return std::unique_ptr<HostMemory>(new HostMemory(static_cast<std::byte*>(memory), n_bytes));
}

HostMemory::~HostMemory() { munmap(base(), n_bytes()); }

void HostMemory::copy(std::span<const KvCopy> copies) {
  for (const KvCopy& copy : copies) std::memcpy(copy.target, copy.source, copy.n_bytes);
}

std::vector<EncodedHead> HostMemory::encode(const HostEncoding& host,
                                            const kernels::KvPageLayout& layout,
                                            const EncodeTask& task) {
  CHECK(host.context != nullptr, "encoding on the host needs a context");
  scratch_.reset();
  std::vector<EncodedHead> encoded;
  encoded.reserve(task.heads.size());
  for (std::size_t h = 0; h < task.heads.size(); ++h) {
    encoded.push_back(encode_head(*host.context, task.heads[h], layout, host.rope, task.tasks[h],
                                  std::move(task.moves[h]), scratch_));
  }
  return encoded;
}

}  // namespace spindle::kvstore
