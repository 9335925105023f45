#include "kernels/cuda/cuda_graph.h"

#include <cuda_runtime.h>

#include <cstdio>

#include "kernels/core/cuda_check.h"

namespace spindle {

CudaGraph CudaGraph::record(const CudaContext& context, const std::function<void()>& launch) {
  cuda_check(cudaStreamBeginCapture(context.stream(), cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    launch();
  } catch (...) {
    // The stream must leave its recording state before anybody uses it again.
    static_cast<void>(cudaStreamEndCapture(context.stream(), &graph));
    if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
    throw;
  }
  cuda_check(cudaStreamEndCapture(context.stream(), &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cuda_check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  cuda_check(error, "cudaGraphInstantiate");
  return CudaGraph(executable);
}

CudaGraph::~CudaGraph() {
  if (executable_ == nullptr) return;
  if (const cudaError_t error = cudaGraphExecDestroy(executable_); error != cudaSuccess) {
    std::fprintf(stderr, "cudaGraphExecDestroy: %s\n", cudaGetErrorString(error));
  }
}

void CudaGraph::replay(const CudaContext& context) const {
  cuda_check(cudaGraphLaunch(executable_, context.stream()), "cudaGraphLaunch");
}

}  // namespace spindle
