#pragma once
// One safetensors file: 8 bytes little-endian header length, the JSON header, the tensors' bytes.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/core/status.h"
#include "worker/model/regular_file.h"
#include "worker/model/safetensors_header.h"

namespace spindle::model {

// An open file with its checked header. Owns the descriptor; opening reads the header only.
// Every limit of safetensors_header.h holds for an open file; a file that breaks one is refused
// whole. Memory stays within the tensors' names and shapes, whatever the header's length.
//
// Thread-safety: const methods may be called by many threads at once.
// Invariant: the byte ranges of tensors() fill the file after the header exactly.
class SafetensorsFile {
 public:
  static Result<SafetensorsFile> open(const std::filesystem::path& path);

  // In the order of their bytes in the file.
  std::span<const TensorInfo> tensors() const { return tensors_; }
  // Null when the file has no such tensor. Valid as long as this object.
  const TensorInfo* find(std::string_view name) const;

  // `out` must have exactly n_bytes(). `tensor` must be one of tensors().
  Status read(const TensorInfo& tensor, std::span<std::byte> out) const;
  // out.size() bytes from `offset_bytes` within the tensor.
  Status read_range(const TensorInfo& tensor, std::uint64_t offset_bytes,
                    std::span<std::byte> out) const;
  // Rows [first_row, first_row + n_rows) of the first dimension; `out` must fit them exactly.
  Status read_rows(const TensorInfo& tensor, std::int64_t first_row, std::int64_t n_rows,
                   std::span<std::byte> out) const;

 private:
  SafetensorsFile(RegularFile file, std::uint64_t data_offset, std::vector<TensorInfo> tensors,
                  std::vector<std::uint32_t> by_name)
      : file_(std::move(file)),
        data_offset_(data_offset),
        tensors_(std::move(tensors)),
        by_name_(std::move(by_name)) {}

  RegularFile file_;
  std::uint64_t data_offset_ = 0;
  std::vector<TensorInfo> tensors_;
  std::vector<std::uint32_t> by_name_;  // indices of tensors_, sorted by name
};

}  // namespace spindle::model
