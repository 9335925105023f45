#pragma once
// Failures of CUDA calls. They mean a broken device, driver or program, not bad input: CudaError is
// thrown and caught at the top of the rank (worker/pipeline), which ends the job with its message.
// Running out of device memory is a Status instead (CudaContext::allocate).
//
// For CUDA translation units only.

#include <cuda_runtime.h>

#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>

namespace spindle {

class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws with the error's name, its text and the place.
[[noreturn]] void throw_cuda_error(cudaError_t error, std::string_view what,
                                   const std::source_location& where);

inline void cuda_check(cudaError_t error, std::string_view what = "CUDA call",
                       const std::source_location& where = std::source_location::current()) {
  if (error != cudaSuccess) [[unlikely]] {
    throw_cuda_error(error, what, where);
  }
}

// Whether the device has come to a recorded event. That it has not is no error, and check_launch()
// must not meet it as one.
inline bool event_reached(cudaEvent_t event,
                          const std::source_location& where = std::source_location::current()) {
  const cudaError_t state = cudaEventQuery(event);
  if (state == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  cuda_check(state, "cudaEventQuery", where);
  return true;
}

// After every <<<>>>: what the launch itself reports. Errors inside kernels show at the next
// synchronisation.
inline void check_launch(std::string_view kernel,
                         const std::source_location& where = std::source_location::current()) {
  cuda_check(cudaGetLastError(), kernel, where);
}

}  // namespace spindle
