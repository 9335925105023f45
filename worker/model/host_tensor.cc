#include "worker/model/host_tensor.h"

#include <cstring>
#include <functional>
#include <new>
#include <numeric>
#include <string>
#include <utility>

namespace spindle::model {

void AlignedBuffer::Free::operator()(std::byte* memory) const {
  ::operator delete[](memory, std::align_val_t{kAlignmentBytes});
}

Result<AlignedBuffer> AlignedBuffer::allocate(std::size_t n_bytes) {
  AlignedBuffer buffer;
  if (n_bytes == 0) return buffer;
  void* memory = ::operator new[](n_bytes, std::align_val_t{kAlignmentBytes}, std::nothrow);
  if (memory == nullptr) {
    return resource_exhausted("cannot allocate " + std::to_string(n_bytes) +
                              " bytes of host memory");
  }
  buffer.memory_.reset(static_cast<std::byte*>(memory));
  buffer.n_bytes_ = n_bytes;
  return buffer;
}

std::int64_t HostTensor::n_elements() const {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

float HostTensor::at(std::int64_t i) const {
  const std::byte* element = data.bytes().data() + static_cast<std::size_t>(i) * dtype_bytes(dtype);
  if (dtype == DType::kF32) {
    float value = 0;
    std::memcpy(&value, element, sizeof(value));
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, element, sizeof(bits));
  return dtype == DType::kBF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

Result<HostTensor> make_host_tensor(DType dtype, std::vector<std::int64_t> shape) {
  std::size_t n_bytes = dtype_bytes(dtype);
  for (const std::int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(n_bytes, static_cast<std::size_t>(size), &n_bytes)) {
      return invalid_argument("a tensor's size overflows");
    }
  }
  Result<AlignedBuffer> buffer = AlignedBuffer::allocate(n_bytes);
  if (!buffer.ok()) return buffer.status();
  return HostTensor{dtype, std::move(shape), *std::move(buffer)};
}

}  // namespace spindle::model
