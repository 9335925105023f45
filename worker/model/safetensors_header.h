#pragma once
// The JSON header of a safetensors file: names, types, shapes and byte ranges of its tensors.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/dtype.h"
#include "kernels/core/status.h"

namespace spindle::model {

inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
inline constexpr std::size_t kMaxTensorsPerFile = 65'536;
inline constexpr std::size_t kMaxTensorNameBytes = 512;
inline constexpr std::size_t kMaxTensorRank = 8;
inline constexpr std::size_t kMaxHeaderDepth = 4;

// Every element type that the format defines. Only those with a DType can be read as weights.
enum class FileDType : std::uint8_t {
  kBool,
  kF4,
  kF6E2M3,
  kF6E3M2,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kF8E8M0,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kC64,
  kF64,
  kI64,
  kU64
};

std::string_view file_dtype_name(FileDType dtype);  // as in the header: "BF16"
unsigned file_dtype_bits(FileDType dtype);
std::optional<FileDType> file_dtype_from_name(std::string_view name);
std::optional<DType> weight_dtype(FileDType dtype);

// One tensor, row-major. Invariant: end - begin is the size that dtype and shape give.
struct TensorInfo {
  std::string name;
  FileDType dtype = FileDType::kU8;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;  // offsets in bytes from the end of the header
  std::uint64_t end = 0;

  std::uint64_t n_bytes() const { return end - begin; }
};

// "[4096, 256]"
std::string shape_text(const std::vector<std::int64_t>& shape);

// Parses a header that is fed in chunks. finish() checks that names are unique and that the byte
// ranges fill [0, data_bytes) exactly, without gap or overlap, and returns the tensors in the order
// of their bytes.
//
// Thread-safety: one thread at a time.
class SafetensorsHeaderParser {
 public:
  SafetensorsHeaderParser();
  ~SafetensorsHeaderParser();
  SafetensorsHeaderParser(const SafetensorsHeaderParser&) = delete;
  SafetensorsHeaderParser& operator=(const SafetensorsHeaderParser&) = delete;

  Status feed(std::string_view chunk);
  Result<std::vector<TensorInfo>> finish(std::uint64_t data_bytes);

 private:
  class Sink;
  struct State;
  std::unique_ptr<State> state_;
};

// Indices of `tensors` in the order of their names; kInvalidArgument if a name occurs twice.
Result<std::vector<std::uint32_t>> sort_by_name(const std::vector<TensorInfo>& tensors);

}  // namespace spindle::model
