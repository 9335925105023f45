#include "ops/cli/eval_cluster.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

namespace spindle::cli {
namespace {

constexpr std::chrono::minutes kReadyWait{10};  // weights of a large model are read from a disk
constexpr std::chrono::seconds kConnectWait{5};
constexpr std::chrono::milliseconds kPoll{100};
constexpr std::chrono::seconds kStopWait{60};
constexpr std::chrono::seconds kTermWait{10};

// In the child, after fork: only what is safe there.
[[noreturn]] void become(char* const* arguments, int log) {
  ::setpgid(0, 0);  // Ctrl-C is for this program, which then drains
  ::prctl(PR_SET_PDEATHSIG, SIGTERM);
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  const int nothing = ::open("/dev/null", O_RDONLY);
  ::dup2(nothing, STDIN_FILENO);
  ::dup2(log, STDOUT_FILENO);
  ::dup2(log, STDERR_FILENO);
  ::execvp(arguments[0], arguments);
  ::_exit(127);
}

constexpr const char* kLoopback = "127.0.0.1";

// One that nobody listens on at the moment.
Result<std::uint16_t> free_port() {
  const auto failed = [] {
    return unavailable(std::string("cannot find a free port: ") + std::strerror(errno));
  };
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (socket < 0) return failed();
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  const bool ok =
      ::bind(socket, generic, length) == 0 && ::getsockname(socket, generic, &length) == 0;
  const Status status = ok ? ok_status() : failed();
  ::close(socket);
  if (!status.ok()) return status;
  return ntohs(address.sin_port);
}

}  // namespace

std::vector<std::string> launch_command(const OwnClusterOptions& options,
                                        const std::string& spindled, bool as_root) {
  std::vector<std::string> command{"mpirun"};
  if (as_root) command.emplace_back("--allow-run-as-root");
  for (const char* argument :
       {"--oversubscribe", "--bind-to", "none", "--mca", "btl", "self,vader", "-n"}) {
    command.emplace_back(argument);
  }
  command.push_back(std::to_string(options.stages));
  command.push_back(spindled);
  for (const std::string& argument :
       {std::string("--config"), options.config, std::string("--set"),
        std::string("api.http.enabled=false"), std::string("--set"),
        std::string("api.tcp.enabled=true"), std::string("--set"),
        "api.tcp.host=" + options.client.host, std::string("--set"),
        "api.tcp.port=" + std::to_string(options.client.port), std::string("--set"),
        "api.limits.max_dense_scores=" + std::to_string(options.max_dense_scores)}) {
    command.push_back(argument);
  }
  return command;
}

Result<std::unique_ptr<OwnCluster>> OwnCluster::start(OwnClusterOptions options, int cancel_fd) {
  std::error_code error;
  const auto self = std::filesystem::read_symlink("/proc/self/exe", error);
  const auto spindled = self.parent_path() / "spindled";
  if (error || !std::filesystem::exists(spindled, error)) {
    return not_found("there is no spindled beside this program to start; give --server");
  }
  const Result<std::uint16_t> port = free_port();
  if (!port.ok()) return port.status();
  options.client.host = kLoopback;
  options.client.port = *port;
  std::vector<std::string> command = launch_command(options, spindled.string(), ::geteuid() == 0);
  std::vector<char*> arguments;
  for (std::string& argument : command) arguments.push_back(argument.data());
  arguments.push_back(nullptr);
  const int log = ::open(options.log.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (log < 0) {
    return invalid_argument("cannot write " + options.log + ": " + std::strerror(errno));
  }
  const pid_t pid = ::fork();
  if (pid == 0) become(arguments.data(), log);
  ::close(log);
  if (pid < 0) return unavailable(std::string("cannot start mpirun: ") + std::strerror(errno));
  ::setpgid(pid, pid);  // as the child does; whoever comes first
  std::unique_ptr<OwnCluster> cluster(new OwnCluster(std::move(options), pid));
  if (Status status = cluster->wait_ready(cancel_fd); !status.ok()) return status;
  return cluster;
}

Status OwnCluster::wait_ready(int cancel_fd) {
  const Deadline deadline = Deadline::after(kReadyWait);
  for (;;) {
    int status = 0;
    if (wait_end(Deadline::after(std::chrono::seconds(0)), status)) {
      return unavailable("the cluster ended before it was ready; see " + options_.log);
    }
    const auto client = api::TcpClient::connect(options_.client, Deadline::after(kConnectWait));
    if (client.ok()) return ok_status();
    if (client.status().code() != StatusCode::kUnavailable &&
        client.status().code() != StatusCode::kDeadlineExceeded) {
      return client.status();
    }
    if (deadline.passed()) {
      return deadline_exceeded("the cluster was not ready in time; see " + options_.log);
    }
    pollfd interrupt{.fd = cancel_fd, .events = POLLIN, .revents = 0};
    if (::poll(&interrupt, 1, static_cast<int>(kPoll.count())) > 0) return cancelled("interrupted");
  }
}

bool OwnCluster::wait_end(Deadline deadline, int& status) {
  for (;;) {
    if (pid_ == 0) return true;
    const pid_t ended = ::waitpid(pid_, &status, WNOHANG);
    if (ended == pid_ || (ended < 0 && errno == ECHILD)) {
      pid_ = 0;
      return true;
    }
    if (deadline.passed()) return false;
    ::poll(nullptr, 0, static_cast<int>(kPoll.count()));
  }
}

Status OwnCluster::stop() {
  auto client = api::TcpClient::connect(options_.client, Deadline::after(kConnectWait));
  if (!client.ok()) return client.status();
  if (auto reply = (*client)->drain(Deadline::after(kConnectWait)); !reply.ok()) {
    return reply.status();
  }
  int status = 0;
  if (!wait_end(Deadline::after(kStopWait), status)) {
    return deadline_exceeded("the cluster did not stop in time; see " + options_.log);
  }
  if (status != 0) return unavailable("the cluster ended with an error; see " + options_.log);
  return ok_status();
}

OwnCluster::~OwnCluster() {
  int status = 0;
  if (pid_ == 0) return;
  ::kill(-pid_, SIGTERM);
  if (wait_end(Deadline::after(kTermWait), status)) return;
  ::kill(-pid_, SIGKILL);
  wait_end(Deadline::after(kTermWait), status);
}

}  // namespace spindle::cli
