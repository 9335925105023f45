#include "worker/daemon/cluster_start.h"

#include "cluster/coordinator/cluster_settings.h"
#include "worker/daemon/host_resources.h"
#include "worker/model/model_shape.h"

namespace spindle::worker {

Status agree_on_outcome(comm::HostGroup& host, const Status& mine, Deadline deadline) {
  auto outcomes = host.all_gather(mine.ok() ? "" : mine.message(), deadline);
  if (!outcomes.ok()) return outcomes.status();
  std::string failures;
  for (std::size_t rank = 0; rank < outcomes->size(); ++rank) {
    const std::string& outcome = (*outcomes)[rank];
    if (outcome.empty()) continue;
    // The same mistake seen by every rank is said once.
    if (failures.find(outcome) != std::string::npos) continue;
    failures += (failures.empty() ? "" : "; ") + ("rank " + std::to_string(rank) + ": " + outcome);
  }
  if (failures.empty()) return ok_status();
  return {mine.ok() ? StatusCode::kUnavailable : mine.code(), failures};
}

Result<std::vector<control::StageInfo>> gather_stages(comm::HostGroup& host,
                                                      const control::StageInfo& mine,
                                                      Deadline deadline) {
  auto messages = host.all_gather(mine.SerializeAsString(), deadline);
  if (!messages.ok()) return messages.status();
  std::vector<control::StageInfo> stages;
  for (const std::string& message : *messages) {
    control::StageInfo info;
    if (!info.ParseFromString(message) || info.stage() != static_cast<int>(stages.size())) {
      return internal_error("rank " + std::to_string(stages.size()) +
                            " describes itself in a way that cannot be understood");
    }
    stages.push_back(std::move(info));
  }
  return stages;
}

comm::Waiting choose_waiting(const RankSettings& settings) {
  return choose_waiting(read_host_resources().n_cores, settings.ranks_on_host, settings.n_threads,
                        settings.device == ComputeDevice::kCuda);
}

coordinator::KvLedger make_ledger(const kvstore::KvShape& shape,
                                  const std::vector<control::StageInfo>& stages) {
  std::vector<coordinator::StageCapacity> capacities;
  for (const control::StageInfo& stage : stages) {
    CHECK(stage.kv_page_bytes() == shape.page_bytes(), "the stages agree on the page size");
    capacities.push_back({stage.n_layers(), static_cast<std::int64_t>(stage.kv_capacity_bytes() /
                                                                      stage.kv_page_bytes())});
  }
  return {shape, std::move(capacities)};
}

kvstore::KvModel make_kv_model(const model::ModelConfig& model, DType kv_dtype,
                               std::int64_t max_model_len,
                               const std::vector<control::StageInfo>& stages) {
  return coordinator::make_kv_model(model::model_shape(model, false), kv_dtype, max_model_len,
                                    !stages.empty() && stages.front().has_token_table());
}

}  // namespace spindle::worker
