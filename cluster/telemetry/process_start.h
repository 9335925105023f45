#pragma once
// When this process began.

namespace spindle::telemetry {

// Unix time in seconds, by the kernel's account of it; where that cannot be read, the time of the
// call. Thread-safety: any thread.
double process_start_seconds();

}  // namespace spindle::telemetry
