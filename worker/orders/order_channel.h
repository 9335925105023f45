#pragma once
// Orders of rank 0 to the other ranks beside the steps: the level of the log, recordings, clocks. A
// stage thread may be busy with a step for a long time, so a thread of its own answers them.

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

#include "cluster/comm/host_group.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"
#include "proto/control.pb.h"

namespace spindle::worker {

// Carries an order out and returns the reply, without its id. Called on the server's thread, or by
// rank 0 for itself.
using OrderHandler = std::function<control::OrderReply(const control::Order&)>;

// The thread of a rank other than 0 that waits for orders, carries them out one by one and replies.
// A message that is no order is dropped. Does not own the group, which outlives it.
// Thread-safety: made and destroyed by one thread. The destructor waits for the order under way.
class OrderServer {
 public:
  OrderServer(comm::HostGroup& host, OrderHandler handler);
  ~OrderServer();
  OrderServer(const OrderServer&) = delete;
  OrderServer& operator=(const OrderServer&) = delete;

 private:
  void run();

  comm::HostGroup& host_;
  const OrderHandler handler_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

// Rank 0's side. Does not own the group, which outlives it.
// Thread-safety: ask() from any thread; one order is under way at a time.
class OrderClient {
 public:
  // `own` carries out the orders to rank 0 itself, on the caller's thread.
  OrderClient(comm::HostGroup& host, OrderHandler own);

  int n_ranks() const { return host_.size(); }
  // The rank's reply. INTERNAL with what it says when it could not carry the order out,
  // DEADLINE_EXCEEDED when none came.
  Result<control::OrderReply> ask(int rank, control::Order order, Deadline deadline);
  // The same to every rank, rank 0 last; the first failure ends it.
  Status ask_all(const control::Order& order, Deadline deadline);

 private:
  comm::HostGroup& host_;
  const OrderHandler own_;
  std::mutex mutex_;
  std::uint64_t last_id_ = 0;  // guarded by mutex_
};

}  // namespace spindle::worker
