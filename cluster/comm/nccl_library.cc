#include "cluster/comm/nccl_library.h"

#include <dlfcn.h>

#include <string>

namespace spindle::comm {
namespace {

constexpr const char* kLibraryName = "libnccl.so.2";
constexpr int kMinVersion = 21800;  // non-blocking communicators with a configuration

}  // namespace

NcclLibrary::~NcclLibrary() {
  // Not unloaded: its threads may still run.
}

Status NcclLibrary::find_functions() {
  Status status;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle_, name));
    if (function == nullptr && status.ok()) {
      status = unavailable(std::string(kLibraryName) + " has no function " + name);
    }
  };
  find(get_version, "ncclGetVersion");
  find(get_unique_id, "ncclGetUniqueId");
  find(comm_init_rank_config, "ncclCommInitRankConfig");
  find(comm_get_async_error, "ncclCommGetAsyncError");
  find(comm_abort, "ncclCommAbort");
  find(get_error_string, "ncclGetErrorString");
  find(send, "ncclSend");
  find(recv, "ncclRecv");
  find(all_gather, "ncclAllGather");
  find(broadcast, "ncclBroadcast");
  return status;
}

Result<std::shared_ptr<const NcclLibrary>> NcclLibrary::load() {
  std::shared_ptr<NcclLibrary> library(new NcclLibrary());
  library->handle_ = dlopen(kLibraryName, RTLD_NOW | RTLD_LOCAL);
  if (library->handle_ == nullptr) {
    return unavailable(std::string("stages on several GPUs need NCCL: ") + dlerror());
  }
  if (Status status = library->find_functions(); !status.ok()) return status;
  int version = 0;
  if (library->get_version(&version) != ncclSuccess || version < kMinVersion) {
    return unavailable(std::string(kLibraryName) + " has version " + std::to_string(version) +
                       ", at least " + std::to_string(kMinVersion) + " is needed");
  }
  return std::shared_ptr<const NcclLibrary>(std::move(library));
}

}  // namespace spindle::comm
