#pragma once
// The orders of this program: how a rank carries them out, and how rank 0 gives them to all.

#include <condition_variable>
#include <mutex>
#include <stop_token>
#include <utility>

#include "cluster/api/cluster_admin.h"
#include "worker/orders/order_channel.h"
#include "worker/trace/recording.h"

namespace spindle::worker {

// A rank's side, rank 0's included.
OrderHandler rank_order_handler(StepRecorder& recorder);

// What operators ask over HTTP, as orders to all ranks. Does not own the client.
// Thread-safety: every member from any thread.
class RankAdmin final : public api::ClusterAdmin {
 public:
  // `about`: what every trace says of the cluster (ClusterRecorder).
  RankAdmin(OrderClient& client, Trace about)
      : client_(client), recorder_(client, std::move(about)) {}

  Status set_log_level(std::string_view level) override;
  Result<Pieces> trace(const api::TraceRequest& request, const std::stop_token& stop) override;
  // Refuses further orders with UNAVAILABLE, ends those under way and waits for them, while the
  // other ranks are still there to answer.
  void stop();

 private:
  // Counts an order under way, if it may begin.
  class Turn;

  OrderClient& client_;
  ClusterRecorder recorder_;
  std::stop_source stopping_;
  std::mutex mutex_;
  std::condition_variable ended_;
  int n_under_way_ = 0;  // guarded by mutex_
};

}  // namespace spindle::worker
