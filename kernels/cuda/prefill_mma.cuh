#pragma once
// The instructions that the kernels of prefill attention are made of.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace spindle::kernels::prefill {

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void store_shared(std::uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ inline uint4 load_shared(std::uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ inline void copy_async(std::uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
__device__ inline void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void wait_async() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lane i has the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

template <typename T>
__device__ inline void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                           std::uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two values as the page's type, the first in the low half.
template <typename T>
__device__ inline std::uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
}

// Eight f16 values as the page's type.
template <typename T>
__device__ inline uint4 as_page_type(uint4 value) {
  if constexpr (!std::is_same_v<T, __half>) {
    std::uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (std::uint32_t& word : words) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
      word = pack<T>(pair.x, pair.y);
    }
    value = make_uint4(words[0], words[1], words[2], words[3]);
  }
  return value;
}

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over the four lanes that hold a row of an accumulator.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffU, x, 1);
  return x + __shfl_xor_sync(0xffffffffU, x, 2);
}

// Lane q of four gets what the four have in words[q], in their order.
__device__ inline void quad_transpose(std::uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1U;
  const bool high = threadIdx.x & 2U;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const std::uint32_t other = __shfl_xor_sync(0xffffffffU, odd ? words[k] : words[k + 1], 1);
    (odd ? words[k] : words[k + 1]) = other;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const std::uint32_t other = __shfl_xor_sync(0xffffffffU, high ? words[k] : words[k + 2], 2);
    (high ? words[k] : words[k + 2]) = other;
  }
}

// Writes zeros to the hidden tokens of one channel of V: 64 bytes at `address`, whose 16-byte
// chunks are permuted by bits 1 and 2 of the row.
__device__ inline void clear_hidden_row(std::uint32_t address, int row, std::uint32_t visible) {
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) {
    const std::uint32_t seen = (visible >> (8 * chunk)) & 0xffU;
    if (seen == 0xffU) continue;
    const std::uint32_t at = address + ((chunk ^ ((row >> 1) & 3)) << 4);
    uint4 value = make_uint4(0, 0, 0, 0);
    if (seen != 0) {
      value = load_shared(at);
      std::uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t low = (seen >> (2 * i)) & 1U ? 0x0000ffffU : 0U;
        const std::uint32_t high = (seen >> (2 * i + 1)) & 1U ? 0xffff0000U : 0U;
        words[i] &= low | high;
      }
      value = make_uint4(words[0], words[1], words[2], words[3]);
    }
    store_shared(at, value);
  }
}

}  // namespace spindle::kernels::prefill
