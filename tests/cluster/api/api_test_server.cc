#include "tests/cluster/api/api_test_server.h"

#include <utility>

#include "cluster/text/chat_template.h"
#include "kernels/core/check.h"
#include "tests/source_dir.h"

namespace spindle::api {
namespace {

const std::string kModelFolder = source_dir() + "/models/spindle-mini";

std::unique_ptr<text::Tokenizer> load_tokenizer() {
  auto tokenizer = text::Tokenizer::load(kModelFolder);
  CHECK(tokenizer.ok(), "the bundled tokenizer must load: " + tokenizer.status().to_string());
  return std::move(*tokenizer);
}

std::optional<text::ModelChatTemplate> load_template(const std::string& source) {
  auto loaded = text::load_chat_template(kModelFolder);
  CHECK(loaded.ok(), "the bundled chat template must load: " + loaded.status().to_string());
  if (!source.empty()) {
    auto parsed = text::ChatTemplate::parse(source);
    CHECK(parsed.ok(), parsed.status().to_string());
    loaded->chat_template = std::move(*parsed);
  }
  return std::move(*loaded);
}

}  // namespace

ApiTestServer::ApiTestServer(ApiTestOptions options)
    : tokenizer_(load_tokenizer()), work_(io_.get_executor()) {
  engine::EngineLimits limits;
  limits.vocab_size = static_cast<std::int32_t>(tokenizer_->vocab_size());
  limits.max_model_len = options.max_model_len;
  if (!options.script_for) {
    options.script_for = [ids = ids_of(kText),
                          delay = options.token_delay](const engine::EngineRequest&) {
      return FakeScript{.tokens = ids, .token_delay = delay, .failure = {}, .summary = {}};
    };
  }
  engine_ = std::make_unique<FakeEngine>(limits, options.script_for);
  ServiceConfig config;
  config.served_model_name = kModel;
  config.limits = options.limits;
  config.defaults = options.defaults;
  config.kv_policy = options.kv_policy;
  service_ = std::make_unique<CompletionService>(
      *engine_, *tokenizer_, load_template(options.chat_template), config, metrics_, pool_);
  HttpOptions http;
  http.port = options.port;
  http.api_keys = options.api_keys;
  http.server_version = "1.2.3";
  http.ping_interval_ms = options.ping_interval_ms;
  http.admin = options.admin;
  http.admin_pool = &admin_pool_;
  http.state_interval_ms = options.state_interval_ms;
  http.max_state_streams = options.max_state_streams;
  http.pages.emplace("/page",
                     HttpPage{.content_type = "text/html; charset=utf-8", .body = "<p>a page</p>"});
  http.drain = [this] {
    ++n_drains_;
    engine_->set_draining(true);
    return engine_->stats().running;
  };
  auto server = HttpServer::listen(io_, *service_, std::move(http));
  CHECK(server.ok(), server.status().to_string());
  server_ = std::move(*server);
  for (std::int32_t i = 0; i < options.io_threads; ++i) {
    threads_.emplace_back([this] { io_.run(); });
  }
}

ApiTestServer::~ApiTestServer() {
  server_->stop_now();
  CHECK(server_->wait_stopped(Deadline::after_ms(20000)), "sessions did not end");
  pool_.join();
  admin_pool_.join();
  work_.reset();
  for (std::thread& thread : threads_) thread.join();
  // What it still posts is never run.
  engine_.reset();
}

std::vector<std::int32_t> ApiTestServer::ids_of(const std::string& text) const {
  auto ids = tokenizer_->encode(text);
  CHECK(ids.ok(), ids.status().to_string());
  return *ids;
}

}  // namespace spindle::api
