#pragma once
// The real tokenizer, service and HTTP server over a FakeEngine, on an ephemeral port.

#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/thread_pool.hpp>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cluster/api/completion_service.h"
#include "cluster/api/http_server.h"
#include "cluster/telemetry/metrics.h"
#include "cluster/text/tokenizer.h"
#include "tests/cluster/api/fake_engine.h"

namespace spindle::api {

struct ApiTestOptions {
  config::Limits limits;
  std::vector<std::string> api_keys;
  std::int32_t max_model_len = 512;
  std::int32_t io_threads = 2;
  std::uint16_t port = 0;
  std::int64_t ping_interval_ms = 15000;
  std::int64_t state_interval_ms = 1000;
  std::size_t max_state_streams = 32;
  FakeEngine::ScriptFor script_for;          // default: kText, then the end
  std::chrono::microseconds token_delay{0};  // of the default script
  GenerationDefaults defaults;
  kvstore::KvPolicy kv_policy;
  ClusterAdmin* admin = nullptr;
  // Replaces the bundled model's chat template.
  std::string chat_template;
};

// Everything a server needs, destroyed in the right order.
class ApiTestServer {
 public:
  static constexpr const char* kModel = "spindle-mini";
  static constexpr const char* kText = " The quick brown fox jumps over the lazy dog.";

  explicit ApiTestServer(ApiTestOptions options = {});
  ~ApiTestServer();
  ApiTestServer(const ApiTestServer&) = delete;
  ApiTestServer& operator=(const ApiTestServer&) = delete;

  std::uint16_t port() const { return server_->port(); }
  FakeEngine& engine() { return *engine_; }
  CompletionService& service() { return *service_; }
  telemetry::Metrics& metrics() { return metrics_; }
  HttpServer& server() { return *server_; }
  boost::asio::io_context& io() { return io_; }
  const text::Tokenizer& tokenizer() const { return *tokenizer_; }
  std::vector<std::int32_t> ids_of(const std::string& text) const;
  int n_drains() const { return n_drains_.load(); }

 private:
  std::unique_ptr<text::Tokenizer> tokenizer_;
  boost::asio::io_context io_;
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_;
  boost::asio::thread_pool pool_{1};
  boost::asio::thread_pool admin_pool_{2};
  telemetry::Metrics metrics_{kModel};
  std::atomic<int> n_drains_{0};
  std::unique_ptr<FakeEngine> engine_;
  std::unique_ptr<CompletionService> service_;
  std::unique_ptr<HttpServer> server_;
  std::vector<std::thread> threads_;
};

}  // namespace spindle::api
