#pragma once
// Barriers in shared memory that count arrivals and the bytes of the copy engine, and its plain
// copies: compute capability 9.0. Addresses are of shared memory.

#include <cstdint>

namespace spindle::kernels::device {

// Writes to shared memory by this thread come before reads and writes of the tensor cores and the
// copy engine that are ordered behind it by a barrier.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_init(std::uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes initialised barriers known to other threads and the copy engine, before a __syncthreads.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_async_proxy();
}
__device__ inline void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and expects that many bytes from the copy engine.
__device__ inline void barrier_expect(std::uint32_t barrier, int n_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n_bytes)
               : "memory");
}
__device__ inline bool barrier_passed(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
      "selp.b32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// Until the phase of that parity is over.
__device__ inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  for (int i = 0; i < (1 << 26); ++i) {
    if (barrier_passed(barrier, parity)) return;
  }
  __trap();  // the copy engine or the other warps are dead
}
// The same without taking issue slots from the others.
__device__ inline void barrier_sleep(std::uint32_t barrier, std::uint32_t parity) {
  for (int i = 0; i < (1 << 26); ++i) {
    if (barrier_passed(barrier, parity)) return;
    __nanosleep(256);
  }
  __trap();
}

// A copy by the copy engine; sizes and both addresses are multiples of 16.
__device__ inline void copy_bulk(std::uint32_t to, const void* from, int n_bytes,
                                 std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(n_bytes), "r"(barrier)
      : "memory");
}

}  // namespace spindle::kernels::device
