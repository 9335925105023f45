#pragma once
// A recorded series of launches that is replayed as one.
//
// Thread-safety: as CudaContext.

#include <functional>

#include "kernels/core/cuda_context.h"

struct CUgraphExec_st;

namespace spindle {

// Move-only. Everything the launches refer to must stay where it was when they were recorded.
class CudaGraph {
 public:
  // Runs `launch` with the context's stream recording; nothing is executed. `launch` must not
  // allocate or synchronise.
  static CudaGraph record(const CudaContext& context, const std::function<void()>& launch);

  CudaGraph(CudaGraph&& other) noexcept : executable_(std::exchange(other.executable_, nullptr)) {}
  CudaGraph& operator=(CudaGraph&& other) noexcept {
    std::swap(executable_, other.executable_);
    return *this;
  }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;
  ~CudaGraph();

  void replay(const CudaContext& context) const;

 private:
  explicit CudaGraph(CUgraphExec_st* executable) : executable_(executable) {}

  CUgraphExec_st* executable_ = nullptr;
};

}  // namespace spindle
