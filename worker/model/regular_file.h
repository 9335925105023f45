#pragma once
// Reading of model files: an owned descriptor, pread only, regular files only.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "kernels/core/status.h"

namespace spindle::model {

// An open regular file. Owns the descriptor and closes it when destroyed.
// Opening never waits: a FIFO, a device, a socket or a directory is refused.
// Symbolic links are followed (download caches are made of them).
//
// Thread-safety: read_at may be called by many threads at once (pread keeps no position).
// Invariant: size_bytes() is the size when opened; a file that shrinks later makes read_at fail.
class RegularFile {
 public:
  static Result<RegularFile> open(const std::filesystem::path& path);

  RegularFile(RegularFile&& other) noexcept;
  RegularFile& operator=(RegularFile&& other) noexcept;
  RegularFile(const RegularFile&) = delete;
  RegularFile& operator=(const RegularFile&) = delete;
  ~RegularFile();

  std::uint64_t size_bytes() const { return size_bytes_; }
  // Fills all of `out` from `offset`, or fails.
  Status read_at(std::uint64_t offset, std::span<std::byte> out) const;

 private:
  RegularFile(int fd, std::uint64_t size_bytes) : fd_(fd), size_bytes_(size_bytes) {}

  int fd_ = -1;
  std::uint64_t size_bytes_ = 0;
};

// The whole file as text; kTooLarge when it is longer than `max_bytes`, kNotFound when missing.
Result<std::string> read_text_file(const std::filesystem::path& path, std::uint64_t max_bytes);

}  // namespace spindle::model
