#pragma once
// The endpoints that give orders to the whole cluster: /v1/spindle/log_level and /v1/spindle/trace.

#include <stop_token>

#include "cluster/api/cluster_admin.h"
#include "cluster/api/http_message.h"

namespace spindle::api {

struct AdminAnswer {
  HttpResponse response;
  ClusterAdmin::Pieces pieces = {};  // when set, the body of the response
};

constexpr bool is_admin(Route route) { return route == Route::kLogLevel || route == Route::kTrace; }

// Reads the body and carries the order out; waits for it. A recording under way is 409.
AdminAnswer administer(ClusterAdmin& admin, const HttpRequest& request,
                       const std::stop_token& stop);

}  // namespace spindle::api
