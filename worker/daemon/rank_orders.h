#pragma once
// The orders of this program: how a rank carries them out, and how rank 0 gives them to all.

#include "cluster/api/cluster_admin.h"
#include "worker/orders/order_channel.h"

namespace spindle::worker {

// A rank's side, rank 0's included.
OrderHandler rank_order_handler();

// What operators ask over HTTP, as orders to all ranks. Does not own the client.
class RankAdmin final : public api::ClusterAdmin {
 public:
  explicit RankAdmin(OrderClient& client) : client_(client) {}

  Status set_log_level(std::string_view level) override;
  Result<Pieces> trace(const api::TraceRequest& request, const std::stop_token& stop) override;

 private:
  OrderClient& client_;
};

}  // namespace spindle::worker
