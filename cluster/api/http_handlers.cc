#include "cluster/api/http_handlers.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/json.hpp>
#include <charconv>
#include <utility>

#include "cluster/api/http_admin.h"
#include "cluster/api/json_fields.h"
#include "cluster/api/openai_request.h"
#include "cluster/api/state_json.h"

namespace spindle::api {
namespace json = boost::json;

namespace {

// "application/json", whatever its case and parameters.
bool is_json_type(std::string_view content_type) {
  const std::string_view media = content_type.substr(0, content_type.find_first_of("; \t"));
  static constexpr std::string_view kJson = "application/json";
  return media.size() == kJson.size() &&
         std::equal(media.begin(), media.end(), kJson.begin(), [](char got, char expected) {
           return static_cast<char>(std::tolower(static_cast<unsigned char>(got))) == expected;
         });
}

bool takes_json(Route route) {
  return route == Route::kChatCompletions || route == Route::kCompletions ||
         route == Route::kTokenize || route == Route::kDetokenize || is_admin(route);
}

// A JSON object from a body, or the response that says why there is none.
std::optional<HttpResponse> parse_object(const std::string& body, json::object& out) {
  auto value = parse_json(body);
  if (!value.ok()) return error_response({value.status()});
  if (!value->is_object()) {
    return error_response({invalid_argument("the body must be a JSON object")});
  }
  out = std::move(value->get_object());
  return std::nullopt;
}

}  // namespace

HttpResponse error_response(const ApiError& error) {
  HttpResponse response =
      json_response(error_body(error), http_error_class(error.status.code()).http_status);
  if (const std::int64_t wait = retry_after_seconds(error); wait > 0) {
    response.headers.emplace_back("Retry-After", std::to_string(wait));
  }
  if (error.status.code() == StatusCode::kUnauthenticated) {
    response.headers.emplace_back("WWW-Authenticate", "Bearer");
  }
  return response;
}

HttpResponse http_error_response(int status, std::string_view message, std::string_view code) {
  return json_response(error_body(message, "invalid_request_error", code), status);
}

HttpHandlers::HttpHandlers(CompletionService& service, HttpOptions options)
    : service_(service),
      options_(std::move(options)),
      keys_(options_.api_keys),
      pages_(std::move(options_.pages)),
      created_(std::chrono::duration_cast<std::chrono::seconds>(
                   std::chrono::system_clock::now().time_since_epoch())
                   .count()) {}

RouteMatch HttpHandlers::match(std::string_view method, std::string_view target) const {
  RouteMatch found = match_route(method, target);
  if (found.route != Route::kNotFound) return found;
  const std::string_view page = pages_.find(target_path(target));
  return page.empty() ? found : match_page(method, page);
}

std::optional<HttpResponse> HttpHandlers::refuse(const HttpRequest& request) const {
  const RouteMatch& match = request.match;
  if (match.needs_key && !keys_.accepts_authorization(request.authorization)) {
    const bool missing = request.authorization.empty();
    return error_response({{StatusCode::kUnauthenticated,
                            missing ? "this server needs an API key: Authorization: Bearer KEY"
                                    : "the API key is not valid"}});
  }
  if (match.route == Route::kNotFound) {
    return http_error_response(404, "there is no such path", "not_found");
  }
  if (match.route == Route::kMethodNotAllowed) {
    HttpResponse response = http_error_response(405, fmt::format("this path takes {}", match.allow),
                                                "method_not_allowed");
    response.headers.emplace_back("Allow", match.allow);
    return response;
  }
  if (match.route == Route::kOptions) {
    HttpResponse response{.status = 204};
    response.headers.emplace_back("Allow", match.allow);
    return response;
  }
  if (takes_json(match.route) && !request.content_type.empty() &&
      !is_json_type(request.content_type)) {
    return http_error_response(415, "the Content-Type must be application/json",
                               "unsupported_media_type");
  }
  return std::nullopt;
}

HttpResponse HttpHandlers::handle(const HttpRequest& request) const {
  switch (request.match.route) {
    case Route::kModels:
      return models();
    case Route::kModel:
      return model(request.match.argument);
    case Route::kTokenize:
      return tokenize(request.body);
    case Route::kDetokenize:
      return detokenize(request.body);
    case Route::kHealth:
      return health();
    case Route::kLive:
      return json_response(R"({"status":"ok"})");
    case Route::kReady:
      return ready();
    case Route::kVersion:
      return json_response(json::serialize(json::object{{"version", options_.server_version}}));
    case Route::kMetrics:
      return {.content_type = std::string(telemetry::Metrics::kContentType),
              .body = service_.metrics().render(service_.engine().stats())};
    case Route::kState:
      return json_response(state_json());
    case Route::kCancelRequest:
      return cancel_request(request.match.argument);
    case Route::kDrain:
      return drain();
    case Route::kPage:
      return pages_.respond(target_path(request.target), request.if_none_match);
    case Route::kNotFound:
    case Route::kMethodNotAllowed:
    case Route::kOptions:
    case Route::kChatCompletions:
    case Route::kCompletions:
    case Route::kLogLevel:
    case Route::kTrace:
    case Route::kEvents:
      break;
  }
  return error_response({internal_error("a route without a handler")});
}

json::object HttpHandlers::model_object() const {
  return {{"id", service_.config().served_model_name},
          {"object", "model"},
          {"created", created_},
          {"owned_by", "spindle"},
          {"root", service_.config().served_model_name},
          {"parent", nullptr},
          {"max_model_len", service_.engine().limits().max_model_len}};
}

HttpResponse HttpHandlers::models() const {
  return json_response(
      json::serialize(json::object{{"object", "list"}, {"data", json::array{model_object()}}}));
}

HttpResponse HttpHandlers::model(const std::string& id) const {
  if (auto error = service_.check_model(id)) return error_response(*error);
  return json_response(json::serialize(model_object()));
}

HttpResponse HttpHandlers::tokenize(const std::string& body) const {
  json::object object;
  if (auto response = parse_object(body, object)) return *response;
  TokenizeRequest request;
  if (auto error = parse_tokenize_request(object, request)) return error_response(*error);
  if (auto error = service_.check_model(request.request.model)) return error_response(*error);
  std::vector<std::int32_t> ids;
  // The body bounds the number of tokens: one byte makes at most one.
  if (auto error = service_.encode(request.request.prompt, request.request.add_special_tokens,
                                   text::Tokenizer::kMaxTextBytes, ids)) {
    return error_response(*error);
  }
  json::object out{{"count", ids.size()},
                   {"max_model_len", service_.engine().limits().max_model_len},
                   {"tokens", json::array(ids.begin(), ids.end())},
                   {"token_strs", nullptr}};
  if (request.return_token_strs) {
    json::array strings;
    for (const std::int32_t id : ids) {
      const std::string_view content = service_.tokenizer().token_content(id);
      strings.emplace_back(json::string_view(content.data(), content.size()));
    }
    out["token_strs"] = std::move(strings);
  }
  return json_response(json::serialize(out));
}

HttpResponse HttpHandlers::detokenize(const std::string& body) const {
  json::object object;
  if (auto response = parse_object(body, object)) return *response;
  DetokenizeRequest request;
  if (auto error = parse_detokenize_request(object, request)) return error_response(*error);
  if (auto error = service_.check_model(request.model)) return error_response(*error);
  auto text = service_.decode(request.tokens);
  if (!text.ok()) return error_response({text.status(), "tokens"});
  return json_response(json::serialize(json::object{{"prompt", *text}}));
}

HttpResponse HttpHandlers::health() const {
  const Status status = service_.engine().admission();
  const bool dead =
      status.code() == StatusCode::kUnavailable && !service_.engine().stats().draining;
  return dead ? error_response({status}) : json_response(R"({"status":"ok"})");
}

HttpResponse HttpHandlers::ready() const {
  // A full queue is no reason to leave a load balancer's rotation; draining is.
  const auto refusal = service_.admission();
  if (refusal && refusal->status.code() == StatusCode::kUnavailable)
    return error_response(*refusal);
  return json_response(R"({"status":"ready"})");
}

std::string HttpHandlers::state_json() const {
  const std::chrono::duration<double> uptime = std::chrono::steady_clock::now() - started_;
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return api::state_json(
      {.model = service_.config().served_model_name,
       .version = options_.server_version,
       .max_model_len = service_.engine().limits().max_model_len,
       .uptime_seconds = uptime.count(),
       .unix_ms = std::chrono::duration_cast<std::chrono::milliseconds>(now).count()},
      service_.engine().snapshot(), service_.metrics().latencies());
}

HttpResponse HttpHandlers::cancel_request(const std::string& id) const {
  engine::RequestHandle handle = 0;
  const auto [end, error] = std::from_chars(id.data(), id.data() + id.size(), handle);
  const bool is_handle = error == std::errc() && end == id.data() + id.size();
  if (!is_handle || !service_.engine().cancel(handle)) {
    return http_error_response(404, "no such request runs or waits", "not_found");
  }
  return json_response(R"({"cancelled":true})", 202);
}

HttpResponse HttpHandlers::drain() const {
  if (!options_.drain) {
    return error_response({unimplemented("this server cannot be drained over HTTP")});
  }
  const std::int32_t running = options_.drain();
  return json_response(
      json::serialize(json::object{{"draining", true}, {"running_requests", running}}), 202);
}

}  // namespace spindle::api
