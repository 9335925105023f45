// A TCP API server whose answers are scripted by the prompt (tests/cluster/api). Prints its port,
// serves until its standard input ends, and stops when it is drained and no request runs.
//
// scripted_server [--api-key KEY]

#include <CLI/CLI.hpp>
#include <array>
#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>
#include <functional>
#include <iostream>
#include <thread>

#include "cluster/api/tcp_server.h"
#include "tests/cluster/api/tcp_scripted_service.h"

int main(int argc, char** argv) {
  using namespace spindle;
  api::TcpServerOptions options;
  options.port = 0;
  options.server_version = "9.9.9";
  options.model = "scripted";
  options.max_model_len = 4096;
  options.n_stages = 2;
  options.vocab_size = 1000;
  std::string key;
  CLI::App app("scripted TCP API server");
  app.add_option("--api-key", key);
  CLI11_PARSE(app, argc, argv);
  if (!key.empty()) options.api_keys.push_back(key);

  api::ScriptedService service;
  boost::asio::io_context io;
  Result<std::unique_ptr<api::TcpServer>> server =
      api::TcpServer::listen(io, std::move(options), service.hooks());
  if (!server.ok()) {
    std::cerr << server.status().to_string() << "\n";
    return 1;
  }
  std::cout << (*server)->port() << std::endl;

  boost::asio::posix::stream_descriptor input(io, 0);
  std::array<char, 256> bytes;
  std::function<void()> read_input = [&] {
    input.async_read_some(boost::asio::buffer(bytes), [&](const auto& error, std::size_t) {
      error ? io.stop() : read_input();
    });
  };
  read_input();
  boost::asio::steady_timer poll(io);
  std::function<void()> watch_drain = [&] {
    const engine::EngineStats stats = service.stats();
    if (stats.draining && stats.running == 0) (*server)->stop();
    poll.expires_after(std::chrono::milliseconds(20));
    poll.async_wait([&](const auto& error) {
      if (!error) watch_drain();
    });
  };
  watch_drain();
  io.run();
  server->reset();
  return 0;
}
