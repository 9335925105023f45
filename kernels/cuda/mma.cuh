#pragma once
// Warp-level tensor core instructions, asynchronous copies to shared memory and conversions, as
// thin wrappers. Fragment layouts are those of the PTX manual: lane = 4 g + q.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace spindle::kernels::device {

// C += A B, 16 x 8 x 16, f32 accumulators. A: (row g, k 2q), (row g + 8, k 2q), (row g, k 2q + 8),
// (row g + 8, k 2q + 8); B: (k 2q, column g), (k 2q + 8, column g); C: row g columns 2q, 2q + 1,
// then row g + 8.
__device__ inline void mma_f16(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                               std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ inline void mma_bf16(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// A B with f16 results: (row g, columns 2q), (row g + 8, columns 2q).
__device__ inline void mma_f16_to_f16(std::uint32_t& c0, std::uint32_t& c1, std::uint32_t a0,
                                      std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                                      std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, "
      "{%8,%8};"
      : "=r"(c0), "=r"(c1)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
}
template <bool kBf16>
__device__ inline void mma(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                           std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  if constexpr (kBf16) {
    mma_bf16(c, a0, a1, a2, a3, b0, b1);
  } else {
    mma_f16(c, a0, a1, a2, a3, b0, b1);
  }
}

// Transposes an 8 x 8 matrix of 16-bit values; lane 4 g + q holds row g, columns 2q and 2q + 1.
__device__ inline std::uint32_t transpose_8x8(std::uint32_t x) {
  std::uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// Four transposed 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_transposed(std::uint32_t (&x)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
__device__ inline uint4 load_shared(std::uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ inline void store_shared(std::uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
__device__ inline uint2 load_shared_8(std::uint32_t address) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ inline std::uint32_t load_shared_4(std::uint32_t address) {
  std::uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
// Of shared memory that no thread writes any more.
__device__ inline std::uint32_t load_constant(std::uint32_t address) {
  std::uint32_t x;
  asm("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}
__device__ inline std::uint32_t load_shared_2(std::uint32_t address) {
  std::uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
  return x;
}

// Four words that are indexed.
struct Words4 {
  std::uint32_t x[4];
};
__device__ inline Words4 words(const uint4& v) { return {{v.x, v.y, v.z, v.w}}; }
__device__ inline uint4 joined(const Words4& w) { return {w.x[0], w.x[1], w.x[2], w.x[3]}; }

// Asynchronous copies of 16, 8 or 4 bytes; `valid` false writes zeros and reads nothing.
__device__ inline void copy_16(std::uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy_16(std::uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
// The same as one instruction that is or is not executed: no branch.
__device__ inline void copy_16_if(bool wanted, std::uint32_t to, const void* from) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(
          to),
      "l"(from), "r"(wanted ? 1 : 0)
      : "memory");
}
__device__ inline void copy_8_if(bool wanted, std::uint32_t to, const void* from) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.ca.shared.global [%0], [%1], 8; }" ::"r"(
          to),
      "l"(from), "r"(wanted ? 1 : 0)
      : "memory");
}
__device__ inline void copy_8(std::uint32_t to, const void* from, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 8 : 0)
               : "memory");
}
__device__ inline void copy_4(std::uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of the thread's groups are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats to a pair of 16-bit values, `low` in the low half.
template <bool kBf16>
__device__ inline std::uint32_t pack(float low, float high) {
  std::uint32_t x;
  if constexpr (kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  }
  return x;
}
__device__ inline float2 unpack_f16(std::uint32_t x) {
  __half2 h;
  *reinterpret_cast<std::uint32_t*>(&h) = x;
  return __half22float2(h);
}
__device__ inline float half_bits_to_float(std::uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
__device__ inline std::uint32_t add_f16(std::uint32_t a, std::uint32_t b) {
  std::uint32_t c;
  asm("add.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ inline std::uint32_t sub_f16(std::uint32_t a, std::uint32_t b) {
  std::uint32_t c;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ inline std::uint32_t mul_f16(std::uint32_t a, std::uint32_t b) {
  std::uint32_t c;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ inline std::uint32_t fma_f16(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ inline std::uint32_t min_f16(std::uint32_t a, std::uint32_t b) {
  std::uint32_t c;
  asm("min.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ inline std::uint32_t negate_f16(std::uint32_t a) {
  std::uint32_t b;
  asm("neg.f16x2 %0, %1;" : "=r"(b) : "r"(a));
  return b;
}
// Byte i of the result is the byte of (a, b) that bits 4 i .. 4 i + 2 of the selector name; with
// bit 4 i + 3 that byte's sign, eight times.
__device__ inline std::uint32_t byte_permute(std::uint32_t a, std::uint32_t b,
                                             std::uint32_t selector) {
  std::uint32_t c;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(c) : "r"(a), "r"(b), "r"(selector));
  return c;
}

}  // namespace spindle::kernels::device
