// The part of a session that waits for an order to the whole cluster.

#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "cluster/api/http_admin.h"
#include "cluster/api/http_session.h"

namespace spindle::api {
namespace asio = boost::asio;

namespace {

// An order under way on the pool; on the session's strand but for `stop`.
struct AdminJob {
  AdminAnswer answer;
  bool done = false;
  std::stop_source stop;
};

}  // namespace

HttpSession::Task<bool> HttpSession::administer(HttpRequest& request) {
  const HttpOptions& options = context_->handlers.options();
  if (options.admin == nullptr || options.admin_pool == nullptr) {
    const HttpResponse refusal =
        error_response({unimplemented("this server takes no orders over HTTP")});
    co_return co_await write_response(request, refusal);
  }
  const auto job = std::make_shared<AdminJob>();
  asio::post(*options.admin_pool, [self = shared_from_this(), job, request] {
    AdminAnswer answer =
        api::administer(*self->context_->handlers.options().admin, request, job->stop.get_token());
    asio::post(self->socket_.get_executor(), [self, job, answer = std::move(answer)]() mutable {
      job->answer = std::move(answer);
      job->done = true;
      self->change_.cancel();
    });
  });
  administering_ = true;
  watch_client();
  while (!job->done && !gone()) {
    co_await wait_for_change(std::chrono::steady_clock::time_point::max());
  }
  job->stop.request_stop();
  bool keep = false;
  if (job->done && !gone()) {
    keep = job->answer.pieces ? co_await write_pieces(request, job->answer)
                              : co_await write_response(request, job->answer.response);
  }
  administering_ = false;
  co_await end_watch();
  co_return keep;
}

HttpSession::Task<bool> HttpSession::write_pieces(const HttpRequest& request,
                                                  const AdminAnswer& answer) {
  count(request, answer.response.status);
  bool writable = co_await write_all(stream_head(request, answer.response.content_type));
  std::string piece;
  while (writable && !gone() && answer.pieces(piece)) {
    // An empty chunk would end the body.
    if (!piece.empty()) writable = co_await write_chunk(request, piece);
  }
  if (!writable || gone() || request.http_1_0) co_return false;
  co_return co_await write_all("0\r\n\r\n") && request.keep_alive && !stop_gently_;
}

}  // namespace spindle::api
