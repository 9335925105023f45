#include "worker/orders/order_channel.h"

#include <string>
#include <utility>

namespace spindle::worker {
namespace {

// Long waits are cut into short ones, so that a stop ends them.
constexpr std::int64_t kOrderWaitMs = 100;
constexpr std::int64_t kReplyMs = 5000;

}  // namespace

OrderServer::OrderServer(comm::HostGroup& host, OrderHandler handler)
    : host_(host), handler_(std::move(handler)), thread_([this] { run(); }) {}

OrderServer::~OrderServer() {
  stopping_.store(true, std::memory_order_relaxed);
  thread_.join();
}

void OrderServer::run() {
  while (!stopping_.load(std::memory_order_relaxed)) {
    const auto message = host_.recv(0, comm::Channel::kOrder, Deadline::after_ms(kOrderWaitMs));
    if (!message.ok()) {
      if (message.status().code() == StatusCode::kDeadlineExceeded) continue;
      return;  // the group was shut down or has failed, which its other users report
    }
    control::Order order;
    if (!order.ParseFromString(message->bytes)) continue;
    control::OrderReply reply = handler_(order);
    reply.set_id(order.id());
    // Rank 0 notices a reply that does not come.
    static_cast<void>(host_.send(0, comm::Channel::kOrder, reply.SerializeAsString(),
                                 Deadline::after_ms(kReplyMs)));
  }
}

OrderClient::OrderClient(comm::HostGroup& host, OrderHandler own)
    : host_(host), own_(std::move(own)) {}

Result<control::OrderReply> OrderClient::ask(int rank, control::Order order, Deadline deadline) {
  const std::lock_guard lock(mutex_);
  const std::string who = "rank " + std::to_string(rank);
  order.set_id(++last_id_);
  control::OrderReply reply;
  if (rank == host_.rank()) {
    reply = own_(order);
  } else {
    const Status sent =
        host_.send(rank, comm::Channel::kOrder, order.SerializeAsString(), deadline);
    if (!sent.ok()) return sent.with_context("an order to " + who);
    do {  // replies to orders that were given up come first
      const auto message = host_.recv(rank, comm::Channel::kOrder, deadline);
      if (!message.ok()) return message.status().with_context("an order to " + who);
      if (!reply.ParseFromString(message->bytes)) {
        return internal_error("a reply of " + who + " cannot be understood");
      }
    } while (reply.id() != order.id());
  }
  if (!reply.error().empty()) return internal_error(who + ": " + reply.error());
  return reply;
}

Status OrderClient::ask_all(const control::Order& order, Deadline deadline) {
  for (int i = 1; i <= n_ranks(); ++i) {
    const auto reply = ask(i % n_ranks(), order, deadline);
    if (!reply.ok()) return reply.status();
  }
  return ok_status();
}

}  // namespace spindle::worker
