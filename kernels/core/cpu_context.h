#pragma once
// CpuContext: where CPU kernels run. It fixes the instruction set and the number of threads once,
// and owns the worker threads and their scratch memory. A rank creates one and passes it to every
// operation; nothing about it is global, so several ranks fit in one process.
//
// Invariants: n_threads == 1 never starts a thread. The items of a parallel_for are split into
// contiguous ranges; no operation's result may depend on how (kernels/README.md).
//
// Thread-safety: one thread at a time may call operations with a given context, because they share
// its workers and scratch. Different contexts are independent. Destroy it from outside any
// parallel_for; the destructor joins the workers.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/core/status.h"

namespace spindle {

enum class CpuIsa : std::uint8_t {
  kPortable,  // any x86-64
  kAvx2,      // AVX2 + FMA + F16C
  kAvx512,    // AVX-512 F, BW, DQ and VL as well
};

std::string_view cpu_isa_name(CpuIsa isa);
// What this host (CPU and operating system) can run, ascending; kPortable is always first.
std::vector<CpuIsa> supported_cpu_isas();

struct CpuOptions {
  int n_threads = 1;
  // Above the best supported one is lowered to it; tests and comparisons ask for less.
  CpuIsa isa = CpuIsa::kAvx512;
};

class CpuContext {
 public:
  static constexpr int kMaxThreads = 256;

  // kInvalidArgument for a bad thread count, kResourceExhausted when a thread cannot be started.
  static Result<std::unique_ptr<CpuContext>> create(const CpuOptions& options);
  ~CpuContext();
  CpuContext(const CpuContext&) = delete;
  CpuContext& operator=(const CpuContext&) = delete;

  int n_threads() const { return n_threads_; }
  CpuIsa isa() const { return isa_; }

  // Calls fn(begin, end, thread) on disjoint contiguous ranges that cover [0, n_items) and returns
  // when all are done. `thread` is in [0, n_threads) and no two concurrent calls share one. A range
  // has at least `min_items_per_thread` items unless it is the only one, so small work runs inline
  // and wakes nobody. `fn` must not throw and must not call parallel_for on the same context.
  template <typename Fn>
  void parallel_for(std::int64_t n_items, std::int64_t min_items_per_thread, Fn&& fn) const {
    using Body = std::remove_reference_t<Fn>;
    const RangeFunction call = [](const void* body, std::int64_t begin, std::int64_t end,
                                  int thread) {
      (*const_cast<Body*>(static_cast<const Body*>(body)))(begin, end, thread);
    };
    run_ranges(n_items, min_items_per_thread, call, &fn);
  }

  // At least `bytes` of memory, aligned to 64, for `thread` inside the current operation. The next
  // call for that thread may move it and loses the content.
  std::byte* scratch(int thread, std::size_t bytes) const;

 private:
  using RangeFunction = void (*)(const void* body, std::int64_t begin, std::int64_t end,
                                 int thread);
  class Pool;

  CpuContext(int n_threads, CpuIsa isa);
  void run_ranges(std::int64_t n_items, std::int64_t min_items_per_thread, RangeFunction call,
                  const void* body) const;

  int n_threads_;
  CpuIsa isa_;
  std::unique_ptr<Pool> pool_;
};

}  // namespace spindle
