#pragma once
// A cluster on this machine for as long as a measurement takes.

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "cluster/api/tcp_client.h"
#include "kernels/core/status.h"

namespace spindle::cli {

struct OwnClusterOptions {
  std::string config;  // path
  int stages = 1;
  std::string log;  // path; what the processes print
  // More dense scores for one request save prompts that are computed twice.
  int max_dense_scores = 1024;
  api::TcpClientOptions client;  // of whoever asks it; start() chooses the address
};

// mpirun and its arguments; `spindled` is the program's path.
std::vector<std::string> launch_command(const OwnClusterOptions& options,
                                        const std::string& spindled, bool as_root);

// Owns the processes: the destructor ends them. They listen on a free port of this machine alone,
// whatever the configuration says, so that two measurements do not ask each other's cluster.
// Thread-safety: none. Create it while the process has one thread.
class OwnCluster {
 public:
  // Starts it and waits until it answers. UNAVAILABLE names the log when it ended before.
  static Result<std::unique_ptr<OwnCluster>> start(OwnClusterOptions options, int cancel_fd);
  ~OwnCluster();
  OwnCluster(const OwnCluster&) = delete;
  OwnCluster& operator=(const OwnCluster&) = delete;

  // With the address where it listens.
  const api::TcpClientOptions& client() const { return options_.client; }
  // Drains it and waits for its end.
  Status stop();

 private:
  OwnCluster(OwnClusterOptions options, pid_t pid) : options_(std::move(options)), pid_(pid) {}
  Status wait_ready(int cancel_fd);
  // Whether it ended within the deadline; its exit status goes to `status`.
  bool wait_end(Deadline deadline, int& status);

  OwnClusterOptions options_;
  pid_t pid_;  // leads a process group; 0: ended
};

}  // namespace spindle::cli
