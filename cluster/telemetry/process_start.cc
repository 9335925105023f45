#include "cluster/telemetry/process_start.h"

#include <unistd.h>

#include <chrono>
#include <ctime>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>

namespace spindle::telemetry {

double process_start_seconds() {
  const double now =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  std::ifstream file("/proc/self/stat");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  // The second field is a name in brackets that may hold anything; the start is the 22nd, in clock
  // ticks after the host's.
  const std::size_t bracket = text.rfind(')');
  if (bracket == std::string::npos) return now;
  std::istringstream fields(text.substr(bracket + 1));
  std::string skipped;
  for (int field = 3; field < 22; ++field) fields >> skipped;
  double ticks = 0;
  timespec since_boot{};
  const auto ticks_per_second = static_cast<double>(sysconf(_SC_CLK_TCK));
  if (!(fields >> ticks) || ticks_per_second <= 0 ||
      clock_gettime(CLOCK_BOOTTIME, &since_boot) != 0) {
    return now;
  }
  const double uptime =
      static_cast<double>(since_boot.tv_sec) + static_cast<double>(since_boot.tv_nsec) * 1e-9;
  return now - (uptime - ticks / ticks_per_second);
}

}  // namespace spindle::telemetry
