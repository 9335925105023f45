// spindled: one rank of a Spindle cluster. Started by mpirun; a single process without mpirun is a
// cluster of one stage.

#include <google/protobuf/stubs/logging.h>

#include <cstdio>
#include <exception>
#include <memory>
#include <string>

#include "cluster/comm/mpi_world.h"
#include "worker/config/config_text.h"
#include "worker/config/options.h"
#include "worker/daemon/cluster_start.h"
#include "worker/daemon/daemon.h"

namespace spindle::worker {
namespace {

constexpr std::int64_t kAgreeMs = 60000;

int print(const std::string& text) {
  std::fputs(text.c_str(), stdout);
  if (text.empty() || text.back() != '\n') std::fputc('\n', stdout);
  return kExitOk;
}

int run(int argc, char** argv) {
  // What clients send must not write to our stderr; every parse failure is reported where it
  // happens.
  google::protobuf::SetLogHandler(nullptr);
  const auto options = config::parse_command_line(argc, argv);
  if (options.ok() && !options->text.empty()) return print(options->text);
  if (options.ok() && options->print_config) {
    return print(config::effective_config_text(options->config));
  }
  auto world = comm::MpiWorld::init();
  if (!world.ok()) {
    std::fprintf(stderr, "spindled: %s\n", world.status().to_string().c_str());
    return kExitCannotStart;
  }
  // A rank with a bad command line must not leave the others waiting for it.
  const Status agreed =
      agree_on_outcome((*world)->host(), options.status(), Deadline::after_ms(kAgreeMs));
  if (!agreed.ok()) {
    if ((*world)->rank() == 0) std::fprintf(stderr, "spindled: %s\n", agreed.message().c_str());
    return kExitUsage;
  }
  return run_daemon(**world, options->config);
}

}  // namespace
}  // namespace spindle::worker

int main(int argc, char** argv) {
  try {
    return spindle::worker::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "spindled: %s\n", error.what());
    return spindle::worker::kExitFailed;
  }
}
