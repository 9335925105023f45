#pragma once
// Host side of the layouts of kv_device.h for tests: codes between the order of kv_block.h and the
// device's, tail pages, a RoPE table on the device, and a pool that is filled on the host.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "kernels/core/dtype.h"
#include "kernels/cuda/kv_device.h"
#include "kernels/kv_block.h"
#include "kernels/rope.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::testing {

inline int code_bits(kernels::KvFormat format) {
  using kernels::KvFormat;
  if (kernels::is_lloyd(format)) return kernels::lloyd_bits(format);
  return format == KvFormat::kKivi2 ? 2 : 4;
}
inline bool is_kivi(kernels::KvFormat format) {
  return format == kernels::KvFormat::kKivi4 || format == kernels::KvFormat::kKivi2;
}

// One plane: `bits` bits of every code, at `byte` of the side's codes.
struct Plane {
  int bits = 0;
  std::size_t byte = 0;
};
inline std::vector<Plane> planes_of(int bits, int dim) {
  if (bits == 3) return {{2, 0}, {1, static_cast<std::size_t>(8 * dim)}};
  return {{bits, 0}};
}

// Where kv_block.h has the element's bits: byte of the plane, and shift inside it.
struct HostBits {
  std::size_t byte = 0;
  int shift = 0;
};
inline HostBits host_bits(kernels::KvSide side, int bits, int dim, int token, int channel) {
  const bool key = side == kernels::KvSide::kKey;
  const int group = key ? channel : token * (dim / 32) + channel / 32;
  const int j = key ? token : channel % 32;
  switch (bits) {
    case 4:
      return {static_cast<std::size_t>(group * 16 + j % 16), 4 * (j / 16)};
    case 2:
      return {static_cast<std::size_t>(group * 8 + j % 8), 2 * (j / 8)};
    default:
      return {static_cast<std::size_t>(group * 4 + j / 8), j % 8};
  }
}

// Calls visit(byte of the host's order, its shift, 32-bit word of the device's, its shift, bits).
template <typename Visit>
void for_each_code(kernels::KvSide side, int bits, int dim, Visit&& visit) {
  for (const Plane& plane : planes_of(bits, dim)) {
    for (int word = 0; word < dim * plane.bits; ++word) {
      for (int index = 0; index < 32 / plane.bits; ++index) {
        const kernels::KvElement e = kernels::kv_code_element(side, plane.bits, dim, word, index);
        const HostBits host = host_bits(side, plane.bits, dim, e.token, e.channel);
        visit(plane.byte + host.byte, host.shift, plane.byte / 4 + static_cast<std::size_t>(word),
              index * plane.bits, plane.bits);
      }
    }
  }
}

inline std::vector<std::byte> to_device_order(kernels::KvSide side, int bits, int dim,
                                              std::span<const std::byte> codes) {
  std::vector<std::uint32_t> words(codes.size() / 4);
  for_each_code(side, bits, dim, [&](std::size_t byte, int shift, std::size_t word, int at, int n) {
    const unsigned code = (std::to_integer<unsigned>(codes[byte]) >> shift) & ((1U << n) - 1U);
    words[word] |= code << at;
  });
  std::vector<std::byte> out(codes.size());
  std::memcpy(out.data(), words.data(), out.size());
  return out;
}
inline std::vector<std::byte> to_host_order(kernels::KvSide side, int bits, int dim,
                                            std::span<const std::byte> codes) {
  std::vector<std::uint32_t> words(codes.size() / 4);
  std::memcpy(words.data(), codes.data(), codes.size());
  std::vector<std::byte> out(codes.size());
  for_each_code(side, bits, dim, [&](std::size_t byte, int shift, std::size_t word, int at, int n) {
    const unsigned code = (words[word] >> at) & ((1U << n) - 1U);
    out[byte] |= static_cast<std::byte>(code << shift);
  });
  return out;
}

// Elements of a page or of a raw block of `capacity` tokens: K, then V.
inline std::size_t k_at(int token, int channel, int capacity = 32) {
  return static_cast<std::size_t>((channel / 32 * capacity + token) * 32 + channel % 32);
}
inline std::size_t v_at(int token, int channel, int capacity = 32) {
  return static_cast<std::size_t>(channel * capacity + token);
}

inline std::uint16_t narrow(DType dtype, float value) {
  return dtype == DType::kBF16 ? f32_to_bf16(value) : f32_to_f16(value);
}
inline float widen(DType dtype, std::uint16_t bits) {
  return dtype == DType::kBF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

// A pool's content, built on the host piece by piece.
class HostPool {
 public:
  template <typename T>
  std::uint32_t add(std::span<const T> piece) {
    const std::size_t place = bytes_.size() / kernels::kKvPlaceBytes;
    const std::size_t n_places =
        (piece.size_bytes() + kernels::kKvPlaceBytes - 1) / kernels::kKvPlaceBytes;
    bytes_.resize((place + n_places) * kernels::kKvPlaceBytes);
    std::memcpy(bytes_.data() + place * kernels::kKvPlaceBytes, piece.data(), piece.size_bytes());
    return static_cast<std::uint32_t>(place);
  }
  template <typename T>
  std::uint32_t add(const std::vector<T>& piece) {
    return add(std::span<const T>(piece));
  }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

// The frequencies of Llama for a rotary dimension.
inline kernels::RopeTable make_rope(int rotary_dim, std::int64_t max_positions,
                                    float attention_scale = 1.0F) {
  std::vector<float> frequencies;
  for (int i = 0; i < rotary_dim; i += 2) {
    frequencies.push_back(
        std::pow(10000.0F, -static_cast<float>(i) / static_cast<float>(rotary_dim)));
  }
  auto table = kernels::RopeTable::create(frequencies, max_positions, attention_scale);
  return std::move(*table);
}

class RopeOnDevice {
 public:
  RopeOnDevice(const CudaContext& context, const kernels::RopeTable& table)
      : table_(&table),
        cos_(context, std::span<const float>(table.cos(0), n(table))),
        sin_(context, std::span<const float>(table.sin(0), n(table))) {}

  kernels::DeviceRope view() const {
    return {cos_.data(), sin_.data(), table_->max_positions(), table_->rotary_dim(),
            table_->attention_scale()};
  }

 private:
  static std::size_t n(const kernels::RopeTable& table) {
    return static_cast<std::size_t>(table.max_positions() * table.rotary_dim() / 2);
  }
  const kernels::RopeTable* table_;
  DeviceVector<float> cos_;
  DeviceVector<float> sin_;
};

}  // namespace spindle::testing
