#include "kernels/bench/yardsticks.h"

#include <algorithm>
#include <cstring>
#include <ctime>
#include <vector>

namespace spindle::kernels {
namespace {

// CPU time of this thread: time slices given to others do not count.
double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

double best_seconds(const std::function<void()>& call) {
  call();
  double best = 1e30;
  double total = 0.0;
  for (int i = 0; i < 3 || total < 0.3; ++i) {
    const double start = thread_seconds();
    call();
    const double seconds = thread_seconds() - start;
    best = std::min(best, seconds);
    total += seconds;
  }
  return best;
}

double read_bandwidth(std::size_t bytes) {
  const std::vector<char> data(bytes, 1);
  volatile bool found = false;
  const double seconds =
      best_seconds([&] { found = std::memchr(data.data(), 2, data.size()) != nullptr; });
  return static_cast<double>(bytes) / seconds * 1e-9;
}

}  // namespace spindle::kernels
