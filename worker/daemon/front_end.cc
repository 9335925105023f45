#include "worker/daemon/front_end.h"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/thread_pool.hpp>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cluster/api/completion_service.h"
#include "cluster/api/http_server.h"
#include "cluster/api/tcp_server.h"
#include "cluster/telemetry/metrics.h"
#include "cluster/text/chat_template.h"
#include "cluster/text/tokenizer.h"
#include "worker/config/kv_policy.h"
#include "worker/config/options.h"
#include "worker/daemon/dashboard_pages.h"
#include "worker/logging/logging.h"
#include "worker/logging/one_line.h"

namespace spindle::worker {
namespace {

telemetry::MetricsOptions metrics_options(const config::Config& config,
                                          const engine::EngineLimits& limits) {
  telemetry::MetricsOptions options;
  options.model_name = config.model().served_model_name();
  options.version = config::spindle_version();
  options.max_model_len = limits.max_model_len;
  options.vllm_names = config.api().http().metrics_compat() == config::Http::VLLM;
  const config::KvPolicy& policy = config.kv().policy();
  options.cache_config = {{"cache_dtype", config::Kv::DType_Name(config.kv().dtype())},
                          {"policy", policy.profile()},
                          {"ratio", std::to_string(policy.ratio())},
                          {"sinks", std::to_string(policy.sinks())},
                          {"recent", std::to_string(policy.recent())},
                          {"balance", config.kv().balance().enabled() ? "true" : "false"},
                          {"max_sessions", std::to_string(config.kv().max_sessions())}};
  return options;
}

}  // namespace

struct FrontEnd::State {
  State(FrontEndOptions front_end_options, const engine::EngineLimits& limits)
      : options(std::move(front_end_options)),
        metrics(metrics_options(options.config, limits)),
        tokenizer_pool(static_cast<std::size_t>(options.config.api().tokenizer_threads())) {}

  FrontEndOptions options;
  telemetry::Metrics metrics;
  std::unique_ptr<text::Tokenizer> tokenizer;
  boost::asio::thread_pool tokenizer_pool;
  // One order may take a minute; the other thread can still refuse a second one like it.
  boost::asio::thread_pool admin_pool{2};
  // Declared after what its handlers use, so that it goes first.
  boost::asio::io_context io;
  std::unique_ptr<api::CompletionService> service;
  std::unique_ptr<api::HttpServer> http;
  std::unique_ptr<api::TcpServer> tcp;
  std::optional<boost::asio::executor_work_guard<boost::asio::io_context::executor_type>> work;
  std::vector<std::thread> threads;
  bool stopped = false;

  std::int32_t drain(engine::Engine& engine) const {
    const engine::EngineStats stats = engine.stats();
    options.on_drain();
    return stats.running + stats.waiting;
  }
};

namespace {

Result<api::ServiceConfig> service_config(const FrontEndOptions& options) {
  api::ServiceConfig config;
  auto policy = config::to_kv_policy(options.config.kv().policy());
  if (!policy.ok()) return policy.status();
  config.kv_policy = std::move(*policy);
  config.served_model_name = options.config.model().served_model_name();
  config.limits = options.config.api().limits();
  const config::Log& log = options.config.log();
  if (log.log_prompts()) {
    config.max_seen_bytes = log.max_prompt_bytes();
    config.see_prompt = [n = static_cast<std::size_t>(log.max_prompt_bytes())](
                            std::string_view request_id, std::string_view text) {
      log_request(spdlog::level::debug, request_id, "prompt: " + cut_text(text, n));
    };
  }
  config.max_queued_prompts =
      options.config.scheduler().max_num_queued_reqs() + options.config.scheduler().max_num_seqs();
  if (options.config.model().use_generation_config()) {
    const model::GenerationConfig& generation = options.generation;
    config.defaults = {generation.temperature, generation.top_k, generation.top_p, generation.min_p,
                       generation.repetition_penalty};
  }
  return config;
}

Status load_text(const FrontEndOptions& options, const engine::EngineLimits& limits,
                 std::unique_ptr<text::Tokenizer>& tokenizer,
                 std::optional<text::ModelChatTemplate>& chat_template) {
  const std::string& folder = options.config.model().path();
  auto loaded = text::Tokenizer::load(folder);
  if (!loaded.ok()) return loaded.status();
  tokenizer = std::move(*loaded);
  if (tokenizer->vocab_size() > static_cast<std::size_t>(limits.vocab_size)) {
    return invalid_argument("the tokenizer in " + folder + " has " +
                            std::to_string(tokenizer->vocab_size()) + " tokens, the model " +
                            std::to_string(limits.vocab_size));
  }
  auto parsed = text::load_chat_template(folder);
  if (parsed.ok()) {
    chat_template = std::move(*parsed);
  } else if (parsed.status().code() != StatusCode::kNotFound) {
    return parsed.status();  // a model without a template serves completions only
  }
  return ok_status();
}

}  // namespace

FrontEnd::FrontEnd(std::unique_ptr<State> state) : state_(std::move(state)) {}

Result<std::unique_ptr<FrontEnd>> FrontEnd::start(engine::Engine& engine, FrontEndOptions options) {
  std::unique_ptr<FrontEnd> front_end(
      new FrontEnd(std::make_unique<State>(std::move(options), engine.limits())));
  State& state = *front_end->state_;
  const config::Api& api = state.options.config.api();

  std::optional<text::ModelChatTemplate> chat_template;
  Status status = load_text(state.options, engine.limits(), state.tokenizer, chat_template);
  if (!status.ok()) return status;
  auto config = service_config(state.options);
  if (!config.ok()) return config.status();
  state.service = std::make_unique<api::CompletionService>(
      engine, *state.tokenizer, std::move(chat_template), std::move(*config), state.metrics,
      state.tokenizer_pool);

  const auto drain = [&state, &engine] { return state.drain(engine); };
  if (api.http().enabled()) {
    api::HttpOptions http;
    http.host = api.http().host();
    http.port = static_cast<std::uint16_t>(api.http().port());
    http.api_keys.assign(api.api_key().begin(), api.api_key().end());
    http.server_version = config::spindle_version();
    http.drain = drain;
    http.admin = state.options.admin;
    http.admin_pool = &state.admin_pool;
    http.pages = dashboard_pages();
    auto server = api::HttpServer::listen(state.io, *state.service, std::move(http));
    if (!server.ok()) return server.status().with_context("api.http");
    state.http = std::move(*server);
  }
  if (api.tcp().enabled()) {
    api::TcpServerOptions tcp;
    tcp.host = api.tcp().host();
    tcp.port = static_cast<std::uint16_t>(api.tcp().port());
    tcp.api_keys.assign(api.api_key().begin(), api.api_key().end());
    tcp.limits = api.limits();
    tcp.server_version = config::spindle_version();
    tcp.model = state.options.config.model().served_model_name();
    tcp.max_model_len = engine.limits().max_model_len;
    tcp.n_stages = state.options.n_stages;
    tcp.vocab_size = static_cast<std::int32_t>(state.tokenizer->vocab_size());
    api::TcpServerHooks hooks;
    hooks.start = [&state](api::GenerateRequest request, boost::asio::any_io_executor executor,
                           std::shared_ptr<api::OutputSink> sink) {
      return state.service->start(std::move(request), std::move(executor), std::move(sink));
    };
    hooks.stats = [&engine] { return engine.stats(); };
    hooks.drain = drain;
    auto server = api::TcpServer::listen(state.io, std::move(tcp), std::move(hooks));
    if (!server.ok()) return server.status().with_context("api.tcp");
    state.tcp = std::move(*server);
  }
  state.work.emplace(state.io.get_executor());
  for (int i = 0; i < api.io_threads(); ++i) {
    state.threads.emplace_back([&state] { state.io.run(); });
  }
  return front_end;
}

FrontEnd::~FrontEnd() { stop(Deadline::after_ms(0)); }

void FrontEnd::stop(Deadline deadline) {
  State& state = *state_;
  if (std::exchange(state.stopped, true)) return;
  if (state.http) state.http->stop_gently();
  if (state.tcp) state.tcp->stop();
  if (!state.threads.empty()) {
    if (state.http && !state.http->wait_stopped(deadline)) state.http->stop_now();
    if (state.tcp) state.tcp->wait_stopped(deadline);
  }
  // Queued work holds sockets of `io`; it is short, because the queue is bounded.
  state.tokenizer_pool.join();
  // An order under way ends early when its session has been stopped.
  state.admin_pool.join();
  state.work.reset();
  state.io.stop();
  for (std::thread& thread : state.threads) thread.join();
}

std::uint64_t FrontEnd::n_refused() const { return state_->metrics.n_refused(); }

std::uint16_t FrontEnd::http_port() const { return state_->http ? state_->http->port() : 0; }
std::uint16_t FrontEnd::tcp_port() const { return state_->tcp ? state_->tcp->port() : 0; }

}  // namespace spindle::worker
