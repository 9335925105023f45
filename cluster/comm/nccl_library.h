#pragma once
// NCCL, loaded when the first communicator is made: a server with one GPU needs none, and a host
// without it gets an error that says so. Internal to spindle_comm_nccl (includes nccl.h).

#include <nccl.h>

#include <memory>

#include "kernels/core/status.h"

namespace spindle::comm {

// The functions used. Immutable after load(); may be called from any thread.
struct NcclLibrary {
  decltype(&::ncclGetVersion) get_version = nullptr;
  decltype(&::ncclGetUniqueId) get_unique_id = nullptr;
  decltype(&::ncclCommInitRankConfig) comm_init_rank_config = nullptr;
  decltype(&::ncclCommGetAsyncError) comm_get_async_error = nullptr;
  decltype(&::ncclCommAbort) comm_abort = nullptr;
  decltype(&::ncclGetErrorString) get_error_string = nullptr;
  decltype(&::ncclSend) send = nullptr;
  decltype(&::ncclRecv) recv = nullptr;
  decltype(&::ncclAllGather) all_gather = nullptr;
  decltype(&::ncclBroadcast) broadcast = nullptr;

  // UNAVAILABLE when libnccl.so.2 cannot be loaded, is older than 2.18, or lacks a function.
  static Result<std::shared_ptr<const NcclLibrary>> load();

  ~NcclLibrary();
  NcclLibrary(const NcclLibrary&) = delete;
  NcclLibrary& operator=(const NcclLibrary&) = delete;

 private:
  NcclLibrary() = default;
  Status find_functions();

  void* handle_ = nullptr;
};

}  // namespace spindle::comm
