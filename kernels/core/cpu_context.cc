#include "kernels/core/cpu_context.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>

namespace spindle {
namespace {

// About 20 us of polling on current cores: the gap between two operations of a forward pass is
// shorter, and two ranks that share a core lose little by it.
constexpr int kSpinPauses = 400;
constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kScratchAlignment = 4096;

bool host_has(CpuIsa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  switch (isa) {
    case CpuIsa::kPortable:
      return true;
    case CpuIsa::kAvx2:
      return avx2;
    case CpuIsa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
}

// One-shot signal between two threads: the waiter polls for a while, then sleeps. Setting and
// sleeping use sequentially consistent order so that one of the two sees the other.
class Flag {
 public:
  std::uint32_t value() const { return value_.load(std::memory_order_acquire); }

  void set(std::uint32_t value) {
    value_.store(value, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst)) {
      const std::lock_guard lock(mutex_);
      wake_.notify_one();
    }
  }

  // Returns the first value seen that is not `old`. There is no deadline: the other side is a
  // thread of this process that always answers, and an idle worker waits as long as the context
  // lives.
  std::uint32_t wait_while(std::uint32_t old) {
    for (int i = 0; i < kSpinPauses; ++i) {
      const std::uint32_t now = value();
      if (now != old) return now;
      _mm_pause();
    }
    std::unique_lock lock(mutex_);
    sleeping_.store(true, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != old; });
    sleeping_.store(false, std::memory_order_relaxed);
    return value();
  }

 private:
  std::atomic<std::uint32_t> value_{0};
  std::atomic<bool> sleeping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

struct Scratch {
  std::byte* data = nullptr;
  std::size_t capacity = 0;

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  void release() {
    if (data != nullptr) ::operator delete (data, std::align_val_t{kScratchAlignment});
    data = nullptr;
    capacity = 0;
  }
};

}  // namespace

std::string_view cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kPortable:
      return "portable";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
  }
  return "?";
}

std::vector<CpuIsa> supported_cpu_isas() {
  std::vector<CpuIsa> supported;
  for (const CpuIsa isa : {CpuIsa::kPortable, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (host_has(isa)) supported.push_back(isa);
  }
  return supported;
}

// Worker t serves range t + 1; range 0 runs on the calling thread.
class CpuContext::Pool {
 public:
  explicit Pool(int n_threads) : scratch_(static_cast<std::size_t>(n_threads)) {}

  ~Pool() {
    for (auto& worker : workers_) worker->start.set(kStop);
    for (auto& worker : workers_) worker->thread.join();
  }

  Status start(int n_workers) {
    try {
      for (int i = 0; i < n_workers; ++i) {
        auto worker = std::make_unique<Worker>();
        Worker* self = worker.get();
        worker->thread = std::thread([self] { serve(*self); });
        workers_.push_back(std::move(worker));
      }
    } catch (const std::system_error& error) {
      return resource_exhausted(std::string("cannot start a kernel thread: ") + error.what());
    }
    return ok_status();
  }

  void run(std::int64_t n_items, int n_ranges, RangeFunction call, const void* body) {
    CHECK(!busy_, "parallel_for inside parallel_for, or from two threads at once");
    busy_ = true;
    for (int range = 1; range < n_ranges; ++range) {
      Worker& worker = *workers_[static_cast<std::size_t>(range - 1)];
      worker.call = call;
      worker.body = body;
      worker.begin = n_items * range / n_ranges;
      worker.end = n_items * (range + 1) / n_ranges;
      worker.index = range;
      worker.done.set(kIdle);
      worker.start.set(kWork);
    }
    call(body, 0, n_items / n_ranges, 0);
    for (int range = 1; range < n_ranges; ++range) {
      workers_[static_cast<std::size_t>(range - 1)]->done.wait_while(kIdle);
    }
    busy_ = false;
  }

  std::byte* scratch(int thread, std::size_t bytes) {
    Scratch& own = scratch_[static_cast<std::size_t>(thread)];
    if (bytes > own.capacity) {
      const std::size_t capacity =
          (std::max(bytes, own.capacity + own.capacity / 2) + 4095) & ~4095UL;
      own.release();
      own.data =
          static_cast<std::byte*>(::operator new (capacity, std::align_val_t{kScratchAlignment}));
      own.capacity = capacity;
    }
    return own.data;
  }

 private:
  static constexpr std::uint32_t kIdle = 0;
  static constexpr std::uint32_t kWork = 1;
  static constexpr std::uint32_t kStop = 2;

  struct alignas(kCacheLine) Worker {
    Flag start;
    Flag done;
    RangeFunction call = nullptr;
    const void* body = nullptr;
    std::int64_t begin = 0;
    std::int64_t end = 0;
    int index = 0;
    std::thread thread;
  };

  static void serve(Worker& self) {
    while (self.start.wait_while(kIdle) == kWork) {
      self.call(self.body, self.begin, self.end, self.index);
      self.start.set(kIdle);
      self.done.set(kWork);
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<Scratch> scratch_;
  bool busy_ = false;
};

Result<std::unique_ptr<CpuContext>> CpuContext::create(const CpuOptions& options) {
  if (options.n_threads < 1 || options.n_threads > kMaxThreads) {
    return invalid_argument("n_threads must be in [1, " + std::to_string(kMaxThreads) + "], got " +
                            std::to_string(options.n_threads));
  }
  const CpuIsa isa = std::min(options.isa, supported_cpu_isas().back());
  std::unique_ptr<CpuContext> context(new CpuContext(options.n_threads, isa));
  if (Status status = context->pool_->start(options.n_threads - 1); !status.ok()) return status;
  return context;
}

CpuContext::CpuContext(int n_threads, CpuIsa isa)
    : n_threads_(n_threads), isa_(isa), pool_(std::make_unique<Pool>(n_threads)) {}

CpuContext::~CpuContext() = default;

void CpuContext::run_ranges(std::int64_t n_items, std::int64_t min_items_per_thread,
                            RangeFunction call, const void* body) const {
  if (n_items <= 0) return;
  const std::int64_t grain = std::max<std::int64_t>(min_items_per_thread, 1);
  const std::int64_t n_ranges = std::clamp<std::int64_t>(n_items / grain, 1, n_threads_);
  if (n_ranges == 1) {
    call(body, 0, n_items, 0);
    return;
  }
  pool_->run(n_items, static_cast<int>(n_ranges), call, body);
}

std::byte* CpuContext::scratch(int thread, std::size_t bytes) const {
  CHECK(thread >= 0 && thread < n_threads_, "no such thread");
  return pool_->scratch(thread, bytes);
}

}  // namespace spindle
