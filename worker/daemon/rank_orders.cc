#include "worker/daemon/rank_orders.h"

#include <chrono>
#include <string>

#include "worker/logging/logging.h"

namespace spindle::worker {
namespace {

constexpr std::int64_t kOrderMs = 5000;

}  // namespace

OrderHandler rank_order_handler() {
  return [](const control::Order& order) {
    control::OrderReply reply;
    if (order.what_case() == control::Order::kLogLevel) {
      reply.set_error(set_log_level(order.log_level()).message());
    }
    return reply;
  };
}

Status RankAdmin::set_log_level(std::string_view level) {
  // Before any rank has followed.
  if (const auto known = parse_log_level(level); !known.ok()) return known.status();
  control::Order order;
  order.set_log_level(std::string(level));
  return client_.ask_all(order, Deadline::after_ms(kOrderMs));
}

Result<api::ClusterAdmin::Pieces> RankAdmin::trace(const api::TraceRequest&,
                                                   const std::stop_token&) {
  return unimplemented("recording");
}

}  // namespace spindle::worker
