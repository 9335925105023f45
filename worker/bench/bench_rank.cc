#include "worker/bench/bench_rank.h"

#include <utility>

#include "worker/daemon/cluster_start.h"

namespace spindle::worker {

Result<BenchRank> start_bench_rank(comm::MpiWorld& world, RankSettings settings) {
  comm::HostGroup& host = world.host();
  settings.host_name = world.host_name();
  settings.local_rank = world.local_rank();
  const Deadline deadline = Deadline::after_ms(300000);
  const auto topology = agree_on_topology(settings, host, deadline);
  if (!topology.ok()) return topology.status();
  auto runtime = RankRuntime::create(settings, *topology, host, world.device());
  const Status agreed = agree_on_outcome(host, runtime.status(), deadline);
  if (!agreed.ok()) return agreed;
  auto stages = gather_stages(host, (*runtime)->info(), deadline);
  if (!stages.ok()) return stages.status();
  return BenchRank{std::move(*runtime), std::move(*stages)};
}

}  // namespace spindle::worker
