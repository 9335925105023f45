#include "worker/daemon/rank_orders.h"

#include <chrono>
#include <cmath>
#include <memory>
#include <string>

#include "worker/logging/logging.h"

namespace spindle::worker {
namespace {

constexpr std::int64_t kOrderMs = 5000;
// An order that is ended only has to tell the ranks so.
constexpr std::chrono::milliseconds kStopLimit{5000};

}  // namespace

OrderHandler rank_order_handler(StepRecorder& recorder) {
  return [&recorder](const control::Order& order) {
    control::OrderReply reply;
    if (carry_out(order, recorder, reply)) return reply;
    if (order.what_case() == control::Order::kLogLevel) {
      reply.set_error(set_log_level(order.log_level()).message());
    } else {
      reply.set_error("an order that it does not know");
    }
    return reply;
  };
}

class RankAdmin::Turn {
 public:
  explicit Turn(RankAdmin& admin) : admin_(admin) {
    const std::lock_guard lock(admin_.mutex_);
    taken_ = !admin_.stopping_.stop_requested();
    if (taken_) ++admin_.n_under_way_;
  }
  ~Turn() {
    if (!taken_) return;
    const std::lock_guard lock(admin_.mutex_);
    --admin_.n_under_way_;
    admin_.ended_.notify_all();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  Status status() const { return taken_ ? ok_status() : unavailable("the server is stopping"); }

 private:
  RankAdmin& admin_;
  bool taken_ = false;
};

void RankAdmin::stop() {
  std::unique_lock lock(mutex_);
  stopping_.request_stop();
  ended_.wait_for(lock, kStopLimit, [this] { return n_under_way_ == 0; });
}

Status RankAdmin::set_log_level(std::string_view level) {
  // Before any rank has followed.
  if (const auto known = parse_log_level(level); !known.ok()) return known.status();
  const Turn turn(*this);
  if (!turn.status().ok()) return turn.status();
  control::Order order;
  order.set_log_level(std::string(level));
  return client_.ask_all(order, Deadline::after_ms(kOrderMs));
}

Result<api::ClusterAdmin::Pieces> RankAdmin::trace(const api::TraceRequest& request,
                                                   const std::stop_token& stop) {
  const Turn turn(*this);
  if (!turn.status().ok()) return turn.status();
  std::stop_source either;
  const auto end = [&either] { either.request_stop(); };
  const std::stop_callback client_left(stop, end);
  const std::stop_callback server_stops(stopping_.get_token(), end);
  RecordingOptions options;
  options.duration = std::chrono::milliseconds(std::llround(std::ceil(request.seconds * 1000)));
  options.max_records = static_cast<std::size_t>(request.max_events);
  auto trace = recorder_.record(options, either.get_token());
  if (!trace.ok()) return trace.status();
  const auto writer = std::make_shared<TraceWriter>(std::move(*trace));
  return Pieces([writer](std::string& piece) { return writer->next(piece); });
}

}  // namespace spindle::worker
