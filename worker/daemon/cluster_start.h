#pragma once
// What the ranks agree on before they serve, as collectives over the host group.

#include <string>
#include <vector>

#include "cluster/comm/backoff.h"
#include "cluster/comm/host_group.h"
#include "cluster/coordinator/kv_ledger.h"
#include "cluster/coordinator/scheduler.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"
#include "kvstore/plan/kv_shape.h"
#include "proto/control.pb.h"
#include "worker/daemon/rank_settings.h"
#include "worker/model/model_config.h"

namespace spindle::worker {

// Every rank brings its own outcome so far; each gets OK when all are, else one error that names
// every rank that failed and why. Without this a rank that cannot start would leave the others
// waiting.
Status agree_on_outcome(comm::HostGroup& host, const Status& mine, Deadline deadline);

// Stage i's info is element i.
Result<std::vector<control::StageInfo>> gather_stages(comm::HostGroup& host,
                                                      const control::StageInfo& mine,
                                                      Deadline deadline);

// How this rank's threads should wait, by the cores of the host and what its ranks take of them.
comm::Waiting choose_waiting(const RankSettings& settings);

// The ledger of a cluster whose stages have said what they hold.
coordinator::KvLedger make_ledger(const kvstore::KvShape& shape,
                                  const std::vector<control::StageInfo>& stages);

// The whole model's KV as the planner sees it.
kvstore::KvModel make_kv_model(const model::ModelConfig& model, DType kv_dtype,
                               std::int64_t max_model_len,
                               const std::vector<control::StageInfo>& stages);

}  // namespace spindle::worker
