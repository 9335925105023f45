// The event stream of an HTTP connection: the server's state, as it changes.
#include <boost/asio/steady_timer.hpp>
#include <string>

#include "cluster/api/http_session.h"

namespace spindle::api {
namespace {

// How long a browser shall wait before it connects again.
constexpr std::string_view kReconnectHint = "retry: 10000\n\n";

}  // namespace

HttpSession::Task<bool> HttpSession::stream_state(const HttpRequest& request) {
  const std::optional<StateFeed::Place> place = context_->state_feed.join();
  if (!place) {
    ApiError error{resource_exhausted("the server has too many event streams")};
    error.retry_after_ms = 10000;
    co_return co_await write_response(request, error_response(error));
  }
  count(request, 200);
  bool writable = co_await write_all(stream_head(request, kEventStream));
  if (request.method == "HEAD") co_return writable;
  streaming_state_ = true;
  watch_client();
  writable = writable && co_await write_chunk(request, kReconnectHint);
  while (writable && !gone() && !stop_gently_) {
    const StateFeed::Picture picture = context_->state_feed.latest(StateFeed::Clock::now());
    writable = co_await write_chunk(request, *picture.event);
    // A stop in the meantime is seen by the condition: nothing else runs on the strand between the
    // two.
    if (writable && !gone() && !stop_gently_) co_await wait_for_change(picture.next);
  }
  // Without chunks the end of the connection ends the body.
  const bool ended = writable && !gone() && !request.http_1_0 && co_await write_all("0\r\n\r\n");
  streaming_state_ = false;
  co_await end_watch();
  co_return ended;
}

}  // namespace spindle::api
