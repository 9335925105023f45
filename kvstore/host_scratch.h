#pragma once
// Where encoded pieces wait on the host until they are placed: memory that grows in large chunks
// and is used again after reset().
//
// Thread-safety: none.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

namespace spindle::kvstore {

class HostScratch {
 public:
  // Aligned to 64 bytes; the content is unspecified. Valid until reset().
  std::span<std::byte> allocate(std::size_t n_bytes) {
    const std::size_t size = (n_bytes + kAlignment - 1) / kAlignment * kAlignment;
    while (current_ < chunks_.size() && chunks_[current_].n_bytes - used_ < size) {
      ++current_;
      used_ = 0;
    }
    if (current_ == chunks_.size()) {
      const std::size_t n = std::max(size, kChunkBytes);
      chunks_.push_back({std::make_unique_for_overwrite<Line[]>(n / kAlignment), n});
    }
    std::byte* data = chunks_[current_].lines[0].bytes + used_;
    used_ += size;
    return {data, n_bytes};
  }
  std::span<std::byte> allocate_zeroed(std::size_t n_bytes) {
    const std::span<std::byte> memory = allocate(n_bytes);
    std::fill(memory.begin(), memory.end(), std::byte{0});
    return memory;
  }
  void reset() {
    current_ = 0;
    used_ = 0;
  }

 private:
  static constexpr std::size_t kAlignment = 64;
  static constexpr std::size_t kChunkBytes = std::size_t{1} << 20;
  struct alignas(kAlignment) Line {
    std::byte bytes[kAlignment];
  };
  struct Chunk {
    std::unique_ptr<Line[]> lines;
    std::size_t n_bytes = 0;
  };

  std::vector<Chunk> chunks_;
  std::size_t current_ = 0;  // index in chunks_
  std::size_t used_ = 0;     // of the current chunk
};

}  // namespace spindle::kvstore
