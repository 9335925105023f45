#pragma once
// A rank of a benchmark under mpirun: what the daemon starts, without sockets and text.

#include <memory>
#include <vector>

#include "cluster/comm/host_group.h"
#include "cluster/comm/mpi_world.h"
#include "worker/daemon/rank_runtime.h"

namespace spindle::worker {

struct BenchRank {
  std::unique_ptr<RankRuntime> runtime;
  std::vector<control::StageInfo> stages;
};

// Collective. Fills in what `settings` cannot know: the host's name and the local rank.
Result<BenchRank> start_bench_rank(comm::MpiWorld& world, RankSettings settings);

}  // namespace spindle::worker
