// One rank of an MPI test job; mpi_jobs_test.py starts it through mpirun and kills parts of it.
//   comm_mpi_test_main MODE [option]
// Exit code 0 if every check of the mode held on this rank. A rank that gives up ends the job with
// one of the codes below. Modes are described beside their functions.

#include <mpi.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cluster/comm/agreement.h"
#include "cluster/comm/mpi_device_group.h"
#include "cluster/comm/mpi_host_group.h"
#include "cluster/comm/mpi_progress.h"
#include "cluster/comm/mpi_world.h"
#include "cluster/comm/peer_monitor.h"
#include "tests/cluster/comm/group_checks.h"

namespace spindle::comm {
namespace {

using testing::CheckLog;
using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kSeed = 20240612;
constexpr int kLostPeer = 71;
constexpr int kMissedDeadline = 72;
constexpr int kRefused = 73;

Deadline soon() { return Deadline::after_ms(20'000); }

void say(const std::string& line) {
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

int report(MpiWorld& world, const CheckLog& log) {
  if (log.text().empty()) return 0;
  std::fprintf(stderr, "rank %d, seed %llu:\n%s", world.rank(),
               static_cast<unsigned long long>(kSeed), log.text().c_str());
  return 1;
}

// checks: the contract of the groups, as in local_group_test.
int run_checks(MpiWorld& world) {
  CheckLog log;
  testing::check_groups(world.host(), world.device(), kSeed, log);
  testing::check_pipeline(world.host(), world.device(), kSeed, 120, log);
  log.expect(world.local_size() == world.size(), "all ranks are on this machine");
  log.expect(world.local_rank() == world.rank(), "local rank");
  testing::check_size_mismatch(world.host(), world.device(), log);
  testing::check_shutdown(world.host(), world.device(), log);
  return report(world, log);
}

// A second set of groups on communicators that the test also uses directly, to play a foreign or
// faulty sender.
struct RawGroups {
  RawGroups() {
    for (MPI_Comm& comm : channels) MPI_Comm_dup(MPI_COMM_WORLD, &comm);
    for (MPI_Comm& comm : lanes) MPI_Comm_dup(MPI_COMM_WORLD, &comm);
    host = std::make_unique<MpiHostGroup>(channels, 9, progress);
    device = std::make_unique<MpiDeviceGroup>(lanes, progress);
  }
  ~RawGroups() {
    for (MPI_Comm& comm : channels) MPI_Comm_free(&comm);
    for (MPI_Comm& comm : lanes) MPI_Comm_free(&comm);
  }
  MPI_Comm comm(Channel channel) const { return channels[channel_index(channel)]; }

  ChannelComms channels{};
  MpiDeviceGroup::LaneComms lanes{};
  MpiProgress progress;
  std::unique_ptr<MpiHostGroup> host;
  std::unique_ptr<MpiDeviceGroup> device;
};

void raw_send(const std::string& bytes, int dest, MPI_Comm comm) {
  MPI_Send(bytes.data(), static_cast<int>(bytes.size()), MPI_BYTE, dest, 0, comm);
}

void send_raw_messages(RawGroups& raw) {
  raw_send("GET / HTTP/1.1\r\nHost: somebody else entirely\r\n\r\n", 1, raw.comm(Channel::kPlan));
  raw_send(encode_frame({.channel = Channel::kPlan, .epoch = 8, .source = 0}, {}, "old"), 1,
           raw.comm(Channel::kPlan));
  raw_send(encode_frame({.channel = Channel::kPlan, .epoch = 9, .source = 0}, {}, "good"), 1,
           raw.comm(Channel::kPlan));
  // The first chunk of a tensor whose rest never comes.
  struct {
    std::uint32_t magic = 0x54445053;
    std::uint32_t reserved = 0;
    std::uint64_t sequence = 0;
    std::uint64_t n_bytes = 1 << 20;
  } header;
  std::string chunk(1000, 't');
  std::memcpy(chunk.data(), &header, sizeof header);
  raw_send(chunk, 1, raw.lanes[0]);
}

void receive_raw_messages(RawGroups& raw, CheckLog& log) {
  const auto next = [&] { return raw.host->recv(0, Channel::kPlan, soon()); };
  Status s = next().status();
  log.expect(s.message() == "bad frame from rank 0: not a Spindle frame", s.to_string());
  s = next().status();
  log.expect(s.message() == "bad frame from rank 0: epoch 8, this is 9", s.to_string());
  Result<Message> good = next();
  log.expect(good.ok() && good->bytes == "good", good.status().to_string());

  std::string out(1 << 20, '-');
  const auto span = std::as_writable_bytes(std::span(out));
  s = raw.device->recv(0, span, Deadline::after_ms(200));
  log.expect_code(s, StatusCode::kDeadlineExceeded);
  log.expect(s.message().find("only a part of a tensor") != std::string::npos, s.message());
  s = raw.device->recv(0, span, soon());
  log.expect_code(s, StatusCode::kDeadlineExceeded);
  log.expect(s.message().find("is broken") != std::string::npos, s.message());
}

// A receive whose deadline passes in the middle of a large message must not lose it.
void interrupted_receive(MpiWorld& world, CheckLog& log) {
  constexpr std::size_t kBytes = std::size_t{60} << 20;
  if (world.rank() == 0) {
    const std::string bytes = testing::pattern(kSeed, 0, 1, kBytes);
    log.expect_ok(world.host().send(1, Channel::kBootstrap, bytes, soon()));
    log.expect_ok(world.host().send(1, Channel::kBootstrap, "after", soon()));
  }
  if (world.rank() == 1) {
    int n_interrupted = 0;
    Result<Message> got = Status(StatusCode::kInternal, "no receive yet");
    const Deadline give_up = soon();
    do {
      got = world.host().recv(0, Channel::kBootstrap, Deadline::after_ms(0));
      ++n_interrupted;
    } while (got.status().code() == StatusCode::kDeadlineExceeded && !give_up.passed());
    log.expect_ok(got.status());
    log.expect(got.ok() && got->bytes == testing::pattern(kSeed, 0, 1, kBytes),
               "an interrupted receive lost data");
    say("receive interrupted " + std::to_string(n_interrupted) + " times");
    Result<Message> after = world.host().recv(0, Channel::kBootstrap, soon());
    log.expect(after.ok() && after->bytes == "after", "the message behind an interrupted one");
  }
}

// raw: faulty senders, and deadlines in the middle of a transfer.
int run_raw(MpiWorld& world) {
  CheckLog log;
  {
    RawGroups raw;
    if (world.rank() == 0) send_raw_messages(raw);
    if (world.rank() == 1) receive_raw_messages(raw, log);
  }
  interrupted_receive(world, log);
  log.expect_ok(world.host().barrier(soon()));
  return report(world, log);
}

// oversize: rank 0 sends a frame that is too large, rank 1 refuses it and ends the job.
int run_oversize(MpiWorld& world) {
  RawGroups raw;
  const std::string frame(kMaxFrameBytes + 1000, 'x');
  if (world.rank() == 0) raw_send(frame, 1, raw.comm(Channel::kPlan));
  if (world.rank() != 1) return 1;
  const Status s = raw.host->recv(0, Channel::kPlan, soon()).status();
  if (s.code() == StatusCode::kTooLarge) raw.host->abort(kRefused, s.message());
  std::fprintf(stderr, "%s\n", s.to_string().c_str());
  return 1;
}

// unread: messages of all sizes that nobody ever receives must not keep the job from ending.
int run_unread(MpiWorld& world) {
  CheckLog log;
  const int next = (world.rank() + 1) % world.size();
  for (const std::size_t n_bytes : {std::size_t{0}, std::size_t{100'000}, std::size_t{30} << 20}) {
    const std::string bytes(n_bytes, 'u');
    log.expect_ok(world.host().send(next, Channel::kPlan, bytes, soon()));
    log.expect_ok(world.device().send(next, std::as_bytes(std::span(bytes)), soon()));
  }
  return report(world, log);
}

// large: a tensor of 8192 x 8192 floats.
int run_large(MpiWorld& world) {
  CheckLog log;
  constexpr std::size_t kBytes = std::size_t{8192} * 8192 * 4;
  std::string tensor = testing::pattern(kSeed, 0, 0, kBytes);
  std::string out(world.rank() == 1 ? kBytes : 0, '\0');
  log.expect_ok(world.host().barrier(soon()));
  const auto start = Clock::now();
  if (world.rank() == 0) {
    log.expect_ok(world.device().send(1, std::as_bytes(std::span(tensor)), soon()));
    log.expect_ok(world.device().flush(soon()));
  }
  if (world.rank() == 1) {
    log.expect_ok(world.device().recv(0, std::as_writable_bytes(std::span(out)), soon()));
  }
  const std::chrono::duration<double> taken = Clock::now() - start;
  if (world.rank() < 2) {
    say("rank " + std::to_string(world.rank()) + ": 256 MiB in " +
        std::to_string(taken.count() * 1e3) + " ms");
  }
  log.expect(world.rank() != 1 || out == tensor, "content of the large tensor");
  return report(world, log);
}

double median_us(std::vector<double>& samples) {
  const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
  std::nth_element(samples.begin(), middle, samples.end());
  return *middle;
}

// Half the round trip between ranks 0 and 1, with `pause` before each, during which rank 1 waits.
template <typename Exchange>
void measure(MpiWorld& world, const std::string& name, int n_rounds,
             std::chrono::microseconds pause, Exchange exchange) {
  std::vector<double> samples;
  for (int i = 0; i < n_rounds + 5; ++i) {
    if (world.rank() == 0) std::this_thread::sleep_for(pause);
    const auto start = Clock::now();
    exchange(world.rank());
    const std::chrono::duration<double, std::micro> taken = Clock::now() - start;
    if (i >= 5) samples.push_back(taken.count() / 2);
  }
  if (world.rank() != 0) return;
  std::vector<double> sorted = samples;
  std::sort(sorted.begin(), sorted.end());
  char line[200];
  std::snprintf(line, sizeof line, "%-44s median %7.1f us  p95 %7.1f us", name.c_str(),
                median_us(samples), sorted[sorted.size() * 95 / 100]);
  say(line);
}

// latency: prints half round trips.
int run_latency(MpiWorld& world) {
  CheckLog log;
  const auto host_hop = [&](int rank) {
    const Channel to = rank == 0 ? Channel::kPlan : Channel::kResult;
    const Channel from = rank == 0 ? Channel::kResult : Channel::kPlan;
    if (rank == 0) log.expect_ok(world.host().send(1, to, "0123456789abcdef", soon()));
    log.expect_ok(world.host().recv(1 - rank, from, soon()).status());
    if (rank == 1) log.expect_ok(world.host().send(0, to, "0123456789abcdef", soon()));
  };
  std::string data;
  const auto device_hop = [&](int rank) {
    const auto span = std::as_writable_bytes(std::span(data));
    if (rank == 0) log.expect_ok(world.device().send(1, span, soon()));
    log.expect_ok(world.device().recv(1 - rank, span, soon()));
    if (rank == 1) log.expect_ok(world.device().send(0, span, soon()));
  };
  if (world.rank() < 2) {
    using std::chrono::microseconds;
    measure(world, "host 16 B", 2000, microseconds(0), host_hop);
    measure(world, "host 16 B after a pause of 5 ms", 200, microseconds(5000), host_hop);
    measure(world, "host 16 B after a pause of 200 ms", 20, microseconds(200'000), host_hop);
    data.resize(1024);
    measure(world, "device 1 KiB", 2000, microseconds(0), device_hop);
    measure(world, "device 1 KiB after a pause of 5 ms", 200, microseconds(5000), device_hop);
    data.resize(1 << 20);
    measure(world, "device 1 MiB", 500, microseconds(0), device_hop);
    measure(world, "device 1 MiB after a pause of 5 ms", 100, microseconds(5000), device_hop);
  }
  log.expect_ok(world.host().barrier(soon()));
  return report(world, log);
}

double cpu_seconds() {
  rusage usage;
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// A monitor that ends the job when a peer is lost, as the daemon's does.
std::unique_ptr<PeerMonitor> start_monitor(MpiWorld& world) {
  auto monitor = std::make_unique<PeerMonitor>(
      world.host(), PeerMonitorOptions{.watch_parent = true},
      [&world](int, const std::string& message) { world.host().abort(kLostPeer, message); });
  monitor->report(1, RankState::kServing);
  monitor->start();
  return monitor;
}

// The waits of an idle rank: its stage waits for a plan, rank 0's engine for a result, and all the
// time the monitor runs.
class IdleRank {
 public:
  explicit IdleRank(MpiWorld& world) : monitor_(start_monitor(world)) {
    wait_on(world, Channel::kPlan);
    if (world.rank() == 0) wait_on(world, Channel::kResult);
  }
  void stop(MpiWorld& world) {
    monitor_->stop();
    world.host().shutdown("the test ends");
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  void wait_on(MpiWorld& world, Channel channel) {
    threads_.emplace_back([&world, channel] {
      while (world.host().recv(kAnySource, channel, Deadline::after_ms(60'000)).status().code() !=
             StatusCode::kUnavailable) {
      }
    });
  }

  std::unique_ptr<PeerMonitor> monitor_;
  std::vector<std::thread> threads_;
};

// idle: CPU time of a rank with nothing to do.
int run_idle(MpiWorld& world) {
  CheckLog log;
  IdleRank idle(world);
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  const double cpu_before = cpu_seconds();
  const auto start = Clock::now();
  std::this_thread::sleep_for(std::chrono::milliseconds(1000));
  const std::chrono::duration<double> wall = Clock::now() - start;
  const double share = 100 * (cpu_seconds() - cpu_before) / wall.count();
  say("rank " + std::to_string(world.rank()) + ": idle CPU " + std::to_string(share) + " %");
  log.expect(share < 20, "an idle rank used " + std::to_string(share) + " % CPU");
  idle.stop(world);
  return report(world, log);
}

// idle-tensor: CPU time of a rank that waits for activations.
int run_idle_tensor(MpiWorld& world) {
  CheckLog log;
  std::string out(64, '\0');
  const double cpu_before = cpu_seconds();
  log.expect_code(
      world.device().recv((world.rank() + 1) % world.size(), std::as_writable_bytes(std::span(out)),
                          Deadline::after_ms(1000)),
      StatusCode::kDeadlineExceeded);
  const double share = 100 * (cpu_seconds() - cpu_before);
  say("rank " + std::to_string(world.rank()) + ": waiting CPU " + std::to_string(share) + " %");
  log.expect(share < 20, "a waiting rank used " + std::to_string(share) + " % CPU");
  log.expect_ok(world.host().barrier(soon()));
  return report(world, log);
}

// serve: an idle cluster until the script kills something.
int run_serve(MpiWorld& world) {
  IdleRank idle(world);
  static_cast<void>(world.host().barrier(soon()));
  // Two beats, so that every monitor has heard its peers.
  std::this_thread::sleep_for(std::chrono::milliseconds(600));
  say("ready rank " + std::to_string(world.rank()) + " pid " + std::to_string(::getpid()));
  std::this_thread::sleep_for(std::chrono::seconds(30));
  idle.stop(world);
  return 0;
}

// deadline: rank 1 never answers.
int run_deadline(MpiWorld& world) {
  if (world.rank() == 1) std::this_thread::sleep_for(std::chrono::seconds(30));
  if (world.rank() != 0) return 0;
  const Status s = world.host().recv(1, Channel::kResult, Deadline::after_ms(1000)).status();
  world.host().abort(kMissedDeadline, "step 17: " + s.message());
  return 1;  // not reached
}

// hang-at-end: rank 1 never reaches the end of the job, all others do.
int run_hang_at_end(MpiWorld& world) {
  if (world.rank() == 1) std::this_thread::sleep_for(std::chrono::seconds(30));
  return 0;
}

// disagree: rank 1 was started with another configuration.
int run_disagree(MpiWorld& world) {
  const std::string config =
      world.rank() == 1 ? "model: \"a\"\nport: 2\n" : "model: \"a\"\nport: 1\n";
  const Status s = verify_same_on_all_ranks(world.host(), "the configuration", config, soon());
  std::fprintf(stderr, "rank %d: %s\n", world.rank(), s.to_string().c_str());
  return s.ok() ? 0 : 1;
}

int run(const std::string& mode) {
  using Run = int (*)(MpiWorld&);
  const std::map<std::string, Run> modes = {
      {"checks", run_checks},
      {"raw", run_raw},
      {"oversize", run_oversize},
      {"unread", run_unread},
      {"large", run_large},
      {"latency", run_latency},
      {"idle", run_idle},
      {"idle-tensor", run_idle_tensor},
      {"serve", run_serve},
      {"deadline", run_deadline},
      {"hang-at-end", run_hang_at_end},
      {"disagree", run_disagree},
  };
  const auto found = modes.find(mode);
  if (found == modes.end()) {
    std::fprintf(stderr, "unknown mode %s\n", mode.c_str());
    return 2;
  }
  MpiWorldOptions options;
  if (mode == "hang-at-end") options.finalize_timeout = std::chrono::milliseconds(1500);
  auto world = MpiWorld::init(options);
  if (!world.ok()) {
    std::fprintf(stderr, "%s\n", world.status().to_string().c_str());
    return 3;
  }
  // Each rank waits in another way, whatever it does.
  constexpr std::array kWays{Waiting::kEager, Waiting::kSpinning, Waiting::kSparing};
  (*world)->set_waiting(kWays[static_cast<std::size_t>((*world)->rank()) % kWays.size()]);
  return found->second(**world);
}

}  // namespace
}  // namespace spindle::comm

int main(int argc, char** argv) { return spindle::comm::run(argc > 1 ? argv[1] : "checks"); }
