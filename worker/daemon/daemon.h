#pragma once
// One rank's life from agreed start to orderly end.

#include "cluster/comm/mpi_world.h"
#include "proto/config.pb.h"

namespace spindle::worker {

// Exit codes of spindled.
inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;       // the cluster failed while serving
inline constexpr int kExitUsage = 2;        // command line or configuration
inline constexpr int kExitCannotStart = 3;  // model, memory, address, differing ranks
inline constexpr int kExitAborted = 130;    // a second signal

// Serves until told to stop. `config` is complete and valid. Called on every rank; returns the
// process's exit code. A failure while serving ends the whole job by abort and does not return.
int run_daemon(comm::MpiWorld& world, const config::Config& config);

}  // namespace spindle::worker
