#pragma once
// The endpoints that answer at once: everything but generating and the event stream.

#include <boost/asio/thread_pool.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/api/api_keys.h"
#include "cluster/api/cluster_admin.h"
#include "cluster/api/completion_service.h"
#include "cluster/api/http_message.h"
#include "cluster/api/http_pages.h"

namespace spindle::api {

// What the HTTP sessions need to know; shared by all of them.
struct HttpOptions {
  std::string host = "127.0.0.1";  // an address or a name; never "all interfaces" by default
  std::uint16_t port = 8000;       // 0: any free port, see HttpServer::port()
  std::vector<std::string> api_keys;
  std::string server_version;
  // Begins to drain and returns the number of requests that still run. Called on an I/O thread.
  std::function<std::int32_t()> drain;
  // Orders to the whole cluster, carried out on the pool; both outlive the sessions. Null: refused.
  ClusterAdmin* admin = nullptr;
  boost::asio::thread_pool* admin_pool = nullptr;
  HttpPages::Map pages;  // served without a key
  // The event stream of the state: how often, and to how many at a time.
  std::int64_t state_interval_ms = 1000;
  std::size_t max_state_streams = 32;
  // Between comments that keep proxies from closing a stream without output.
  std::int64_t ping_interval_ms = 15000;
};

// Thread-safety: every member may be called from any thread.
class HttpHandlers {
 public:
  HttpHandlers(CompletionService& service, HttpOptions options);

  // The route of a request, static pages included.
  RouteMatch match(std::string_view method, std::string_view target) const;
  // Nothing, or the refusal of a request by its head alone: key, path, method, content type.
  std::optional<HttpResponse> refuse(const HttpRequest& request) const;
  // Who the sessions of an accepted request belong to: ApiKeys::owner_of.
  std::uint64_t owner(const HttpRequest& request) const {
    return keys_.owner_of_authorization(request.authorization);
  }
  // Routes other than the two that generate. Work in proportion to the body: see is_heavy.
  HttpResponse handle(const HttpRequest& request) const;
  // Must be handled on the tokenizer pool.
  static bool is_heavy(Route route) {
    return route == Route::kTokenize || route == Route::kDetokenize;
  }

  // The body of /v1/spindle/state, as it is now, on one line.
  std::string state_json() const;

  CompletionService& service() const { return service_; }
  const HttpOptions& options() const { return options_; }

 private:
  HttpResponse models() const;
  HttpResponse model(const std::string& id) const;
  HttpResponse tokenize(const std::string& body) const;
  HttpResponse detokenize(const std::string& body) const;
  HttpResponse health() const;
  HttpResponse ready() const;
  HttpResponse cancel_request(const std::string& id) const;
  HttpResponse drain() const;
  boost::json::object model_object() const;

  CompletionService& service_;
  HttpOptions options_;
  ApiKeys keys_;
  HttpPages pages_;
  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  const std::int64_t created_;  // Unix time
};

}  // namespace spindle::api
