#include "cluster/api/http_admin.h"

#include <fmt/format.h>

#include <boost/json.hpp>
#include <utility>

#include "cluster/api/json_fields.h"

namespace spindle::api {
namespace json = boost::json;

namespace {

// The body's object; an empty body is an empty one.
std::optional<HttpResponse> parse_body(const std::string& body, json::object& out) {
  if (body.empty()) return std::nullopt;
  auto value = parse_json(body);
  if (!value.ok()) return error_response({value.status()});
  if (!value->is_object()) {
    return error_response({invalid_argument("the body must be a JSON object")});
  }
  out = std::move(value->get_object());
  return std::nullopt;
}

// A misspelt order must not become another one.
void refuse_others(const json::object& object, std::initializer_list<std::string_view> known,
                   FieldReader& fields) {
  for (const auto& entry : object) {
    const std::string_view name(entry.key().data(), entry.key().size());
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      fields.fail(name, fmt::format("there is no field `{}` here", name));
    }
  }
}

HttpResponse set_log_level(ClusterAdmin& admin, const json::object& object) {
  FieldReader fields(object);
  const auto level = fields.string("level");
  refuse_others(object, {"level"}, fields);
  if (fields.ok() && !level) fields.fail("level", "level is missing");
  if (!fields.ok()) return error_response(*fields.error());
  if (const Status status = admin.set_log_level(*level); !status.ok()) {
    return error_response({status, status.code() == StatusCode::kInvalidArgument ? "level" : ""});
  }
  return json_response(json::serialize(json::object{{"level", *level}}));
}

AdminAnswer trace(ClusterAdmin& admin, const json::object& object, const std::stop_token& stop) {
  FieldReader fields(object);
  TraceRequest request;
  request.seconds = fields.number("seconds").value_or(request.seconds);
  request.max_events = fields.integer("max_events").value_or(request.max_events);
  refuse_others(object, {"seconds", "max_events"}, fields);
  if (!(request.seconds > 0 && request.seconds <= kMaxTraceSeconds)) {
    fields.fail("seconds",
                fmt::format("seconds must be above 0 and at most {:.0f}", kMaxTraceSeconds));
  }
  if (request.max_events < kMinTraceEvents || request.max_events > kMaxTraceEvents) {
    fields.fail("max_events",
                fmt::format("max_events must be from {} to {}", kMinTraceEvents, kMaxTraceEvents));
  }
  if (!fields.ok()) return {error_response(*fields.error())};
  auto pieces = admin.trace(request, stop);
  if (pieces.ok()) return {json_response(""), std::move(*pieces)};
  if (pieces.status().code() == StatusCode::kResourceExhausted) {
    return {http_error_response(409, pieces.status().message(), "trace_under_way")};
  }
  return {error_response({pieces.status()})};
}

}  // namespace

AdminAnswer administer(ClusterAdmin& admin, const HttpRequest& request,
                       const std::stop_token& stop) {
  json::object object;
  if (auto response = parse_body(request.body, object)) return {std::move(*response)};
  if (request.match.route == Route::kLogLevel) return {set_log_level(admin, object)};
  return trace(admin, object, stop);
}

}  // namespace spindle::api
