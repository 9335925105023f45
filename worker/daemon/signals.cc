#include "worker/daemon/signals.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <csignal>
#include <thread>
#include <utility>

namespace spindle::worker {
namespace {

const char* name_of(int signal) {
  switch (signal) {
    case SIGTERM:
      return "SIGTERM";
    case SIGINT:
      return "SIGINT";
    case SIGUSR1:
      return "SIGUSR1";
    case SIGUSR2:
      return "SIGUSR2";
    default:
      return "a signal";
  }
}

}  // namespace

struct SignalWatcher::State {
  Callback on_first;
  Callback on_more;
  int n_seen = 0;
  boost::asio::io_context io{1};
  boost::asio::signal_set signals{io, SIGTERM, SIGINT, SIGUSR1};
  std::thread thread;

  State() { signals.add(SIGUSR2); }
  void wait() {
    signals.async_wait([this](const boost::system::error_code& error, int signal) {
      if (error) return;
      (n_seen++ == 0 ? on_first : on_more)(name_of(signal));
      wait();
    });
  }
};

SignalWatcher::SignalWatcher(Callback on_first, Callback on_more)
    : state_(std::make_unique<State>()) {
  state_->on_first = std::move(on_first);
  state_->on_more = std::move(on_more);
  state_->wait();
  state_->thread = std::thread([state = state_.get()] { state->io.run(); });
}

SignalWatcher::~SignalWatcher() {
  state_->io.stop();
  state_->thread.join();
}

}  // namespace spindle::worker
