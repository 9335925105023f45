#include "tests/cluster/comm/group_checks.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <span>
#include <thread>

#include "cluster/comm/agreement.h"

namespace spindle::comm::testing {
namespace {

constexpr std::size_t kKiB = 1024;
constexpr std::size_t kMiB = 1024 * kKiB;

Deadline soon() { return Deadline::after_ms(20'000); }

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}
std::span<std::byte> bytes_of(std::string& text) { return std::as_writable_bytes(std::span(text)); }

// One thread's ends of the groups and what it expects of them.
struct Check {
  HostGroup& host;
  DeviceGroup& device;
  std::uint64_t seed;
  CheckLog& log;

  int rank() const { return host.rank(); }
  int size() const { return host.size(); }
  int next() const { return (rank() + 1) % size(); }
  int previous() const { return (rank() + size() - 1) % size(); }
};

void message_sizes(Check& c) {
  std::uint64_t index = 0;
  for (const std::size_t n_bytes : {std::size_t{0}, std::size_t{1}, 64 * kKiB, 20 * kMiB}) {
    ++index;
    c.log.expect_ok(
        c.host.send(c.next(), Channel::kPlan, pattern(c.seed, c.rank(), index, n_bytes), soon()));
    Result<Message> got = c.host.recv(c.previous(), Channel::kPlan, soon());
    c.log.expect_ok(got.status());
    if (!got.ok()) return;
    c.log.expect(got->source == c.previous(), "wrong source");
    c.log.expect(got->bytes == pattern(c.seed, c.previous(), index, n_bytes),
                 "wrong content of " + std::to_string(n_bytes) + " bytes");
  }
}

// Small and large ones mixed, so that a large one on its way is not overtaken.
void message_order(Check& c) {
  constexpr std::uint64_t kPerPeer = 40;
  const auto size_of = [](std::uint64_t i) { return i % 10 == 3 ? 100 * kKiB : 8 + i; };
  for (std::uint64_t i = 0; i < kPerPeer; ++i) {
    for (int dest = 0; dest < c.size(); ++dest) {
      c.log.expect_ok(
          c.host.send(dest, Channel::kResult, pattern(c.seed, c.rank(), i, size_of(i)), soon()));
    }
  }
  std::vector<std::uint64_t> n_from(static_cast<std::size_t>(c.size()), 0);
  for (std::uint64_t n = 0; n < kPerPeer * static_cast<std::uint64_t>(c.size()); ++n) {
    Result<Message> got = c.host.recv(kAnySource, Channel::kResult, soon());
    c.log.expect_ok(got.status());
    if (!got.ok()) return;
    const std::uint64_t i = n_from.at(static_cast<std::size_t>(got->source))++;
    c.log.expect(got->bytes == pattern(c.seed, got->source, i, size_of(i)),
                 "message " + std::to_string(i) + " out of order");
  }
}

void channels_are_apart(Check& c) {
  c.log.expect_ok(c.host.send(c.next(), Channel::kBootstrap, "bootstrap", soon()));
  c.log.expect_ok(c.host.barrier(soon()));
  auto nothing = c.host.try_recv(kAnySource, Channel::kPlan);
  c.log.expect(nothing.ok() && !nothing->has_value(), "a message crossed channels");
  const Deadline deadline = soon();
  for (;;) {
    auto got = c.host.try_recv(c.previous(), Channel::kBootstrap);
    c.log.expect_ok(got.status());
    if (!got.ok()) return;
    if (got->has_value()) {
      c.log.expect((*got)->bytes == "bootstrap", "wrong content");
      return;
    }
    if (deadline.passed()) {
      c.log.expect(false, "try_recv never saw the message");
      return;
    }
  }
}

// The best of a few tries: other programs may hold the cores for a while.
template <typename Wait>
void expect_prompt_deadline(Check& c, std::string_view what, Wait wait) {
  constexpr std::int64_t kWaitMs = 100;
  std::int64_t best_ms = 1'000'000;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const auto start = std::chrono::steady_clock::now();
    c.log.expect_code(wait(Deadline::after_ms(kWaitMs)), StatusCode::kDeadlineExceeded);
    const auto taken = std::chrono::duration_cast<std::chrono::milliseconds>(
        std::chrono::steady_clock::now() - start);
    c.log.expect(taken.count() >= kWaitMs, std::string(what) + " gave up early");
    best_ms = std::min<std::int64_t>(best_ms, taken.count());
    if (best_ms <= kWaitMs + 50) break;
  }
  c.log.expect(best_ms <= kWaitMs + 50,
               std::string(what) + " returned after " + std::to_string(best_ms) + " ms");
}

void deadlines(Check& c) {
  expect_prompt_deadline(c, "recv", [&](Deadline deadline) {
    return c.host.recv(c.previous(), Channel::kPlan, deadline).status();
  });
  expect_prompt_deadline(c, "recv from any", [&](Deadline deadline) {
    return c.host.recv(kAnySource, Channel::kResult, deadline).status();
  });
  if (c.size() == 1) return;
  std::string out(64, '\0');
  expect_prompt_deadline(c, "tensor recv", [&](Deadline deadline) {
    return c.device.recv(c.previous(), bytes_of(out), deadline);
  });
}

void bad_arguments(Check& c) {
  const auto code = StatusCode::kInvalidArgument;
  c.log.expect_code(c.host.send(c.size(), Channel::kPlan, "x", soon()), code);
  c.log.expect_code(c.host.send(-1, Channel::kPlan, "x", soon()), code);
  c.log.expect_code(c.host.recv(c.size(), Channel::kPlan, soon()).status(), code);
  c.log.expect_code(c.host.recv(-2, Channel::kPlan, soon()).status(), code);
  c.log.expect_code(c.host.try_recv(c.size(), Channel::kPlan).status(), code);
  const std::string too_big(kMaxMessageBytes + 1, 'x');
  c.log.expect_code(c.host.send(c.next(), Channel::kPlan, too_big, soon()), StatusCode::kTooLarge);
  c.log.expect_code(c.host.all_gather(too_big, soon()).status(), StatusCode::kTooLarge);
  std::string tensor(8, 'x');
  c.log.expect_code(c.device.send(c.size(), bytes_of(tensor), soon()), code);
  c.log.expect_code(c.device.send(c.rank(), bytes_of(tensor), soon()), code);
  c.log.expect_code(c.device.recv(-1, bytes_of(tensor), soon()), code);
  c.log.expect_code(c.device.broadcast(bytes_of(tensor), c.size(), soon()), code);
  std::string short_by_one(8 * static_cast<std::size_t>(c.size()) - 1, 'x');
  c.log.expect_code(c.device.all_gather(bytes_of(tensor), bytes_of(short_by_one), soon()), code);
  // Nothing was sent: the next wait must find nothing.
  auto nothing = c.host.try_recv(kAnySource, Channel::kPlan);
  c.log.expect(nothing.ok() && !nothing->has_value(), "a refused message arrived");
}

void host_collectives(Check& c) {
  for (int root = 0; root < c.size(); ++root) {
    std::string bytes = c.rank() == root ? pattern(c.seed, root, 7, 70 * kKiB) : "stale";
    c.log.expect_ok(c.host.broadcast(bytes, root, soon()));
    c.log.expect(bytes == pattern(c.seed, root, 7, 70 * kKiB), "broadcast content");
  }
  const auto bytes_of_rank = [](int rank) { return static_cast<std::size_t>(rank) * 9000; };
  auto all = c.host.all_gather(pattern(c.seed, c.rank(), 8, bytes_of_rank(c.rank())), soon());
  c.log.expect_ok(all.status());
  if (!all.ok()) return;
  c.log.expect(all->size() == static_cast<std::size_t>(c.size()), "all_gather rows");
  for (int rank = 0; rank < c.size(); ++rank) {
    c.log.expect(
        (*all)[static_cast<std::size_t>(rank)] == pattern(c.seed, rank, 8, bytes_of_rank(rank)),
        "all_gather content");
  }
  c.log.expect_ok(c.host.barrier(soon()));
}

void agreement(Check& c) {
  c.log.expect_ok(verify_same_on_all_ranks(c.host, "config", "a: 1\nb: 2\n", soon()));
  if (c.size() == 1) return;
  const std::string mine = c.rank() == 1 ? "a: 1\nb: 3\n" : "a: 1\nb: 2\n";
  const Status s = verify_same_on_all_ranks(c.host, "config", mine, soon());
  c.log.expect_code(s, StatusCode::kInvalidArgument);
  c.log.expect(s.message() ==
                   "rank 1 differs from rank 0 in config: line 2 is \"b: 2\" on rank 0 and "
                   "\"b: 3\" on rank 1",
               s.message());
}

// Several tensors are sent before the first is received.
void tensors(Check& c) {
  if (c.size() == 1) return;
  const std::vector<std::size_t> sizes = {0,          4,    kKiB,         256 * kKiB - 24,
                                          256 * kKiB, kMiB, 20 * kMiB + 3};
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    std::string data = pattern(c.seed, c.rank(), i, sizes[i]);
    c.log.expect_ok(c.device.send(c.next(), bytes_of(data), soon()));
    std::fill(data.begin(), data.end(), 'x');  // ours again as soon as send() returned
  }
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    std::string out(sizes[i], '\0');
    c.log.expect_ok(c.device.recv(c.previous(), bytes_of(out), soon()));
    c.log.expect(out == pattern(c.seed, c.previous(), i, sizes[i]),
                 "tensor of " + std::to_string(sizes[i]) + " bytes");
  }
  c.log.expect_ok(c.device.flush(soon()));
}

void device_collectives(Check& c) {
  for (const std::size_t n_bytes : {std::size_t{0}, std::size_t{48}, 300 * kKiB}) {
    const std::string mine = pattern(c.seed, c.rank(), 20, n_bytes);
    std::string all(n_bytes * static_cast<std::size_t>(c.size()), '\0');
    c.log.expect_ok(c.device.all_gather(bytes_of(mine), bytes_of(all), soon()));
    std::string expected;
    for (int rank = 0; rank < c.size(); ++rank) expected += pattern(c.seed, rank, 20, n_bytes);
    c.log.expect(all == expected, "device all_gather");
    const int root = c.size() - 1;
    std::string data =
        c.rank() == root ? pattern(c.seed, root, 21, n_bytes) : std::string(n_bytes, '\0');
    c.log.expect_ok(c.device.broadcast(bytes_of(data), root, soon()));
    c.log.expect(data == pattern(c.seed, root, 21, n_bytes), "device broadcast");
  }
}

// Rank 0's engine: keeps two steps in flight and checks the results of every rank.
void run_engine(Check& c, int n_steps) {
  int n_planned = 0;
  const auto plan_next = [&] {
    for (int dest = 0; dest < c.size(); ++dest) {
      c.log.expect_ok(c.host.send(dest, Channel::kPlan, std::to_string(n_planned), soon()));
    }
    ++n_planned;
  };
  plan_next();
  for (int step = 0; step < n_steps; ++step) {
    if (n_planned < n_steps) plan_next();
    for (int source = 0; source < c.size(); ++source) {
      Result<Message> result = c.host.recv(source, Channel::kResult, soon());
      c.log.expect_ok(result.status());
      if (!result.ok()) return;
      c.log.expect(result->bytes == std::to_string(step), "result out of step");
    }
  }
}

void run_stage(Check& c, int n_steps) {
  // Around the eager limits and the chunk size, so that all protocols alternate.
  const std::size_t sizes[] = {256, 3000, 5000, 70'000, 300'000, 1'100'000};
  for (int step = 0; step < n_steps; ++step) {
    Result<Message> plan = c.host.recv(0, Channel::kPlan, soon());
    c.log.expect_ok(plan.status());
    if (!plan.ok()) return;
    c.log.expect(plan->bytes == std::to_string(step), "plan out of step");
    const auto index = static_cast<std::uint64_t>(step);
    const std::size_t n_bytes = sizes[index % std::size(sizes)];
    if (c.rank() > 0) {
      std::string in(n_bytes, '\0');
      c.log.expect_ok(c.device.recv(c.rank() - 1, bytes_of(in), soon()));
      c.log.expect(in == pattern(c.seed, c.rank() - 1, index, n_bytes), "activations");
    }
    if (c.rank() + 1 < c.size()) {
      const std::string out = pattern(c.seed, c.rank(), index, n_bytes);
      c.log.expect_ok(c.device.send(c.rank() + 1, bytes_of(out), soon()));
    }
    if (step % 8 == 0) {
      std::string all(8 * static_cast<std::size_t>(c.size()), '\0');
      const std::string report = pattern(c.seed, c.rank(), index, 8);
      c.log.expect_ok(c.device.all_gather(bytes_of(report), bytes_of(all), soon()));
    }
    c.log.expect_ok(c.host.send(0, Channel::kResult, plan->bytes, soon()));
  }
}

// Beats to the next rank and from the previous one, as the monitor does.
void run_beats(Check& c, int n_beats) {
  for (int i = 0; i < n_beats; ++i) {
    c.log.expect_ok(c.host.send(c.next(), Channel::kHeartbeat, std::to_string(i), soon()));
    Result<Message> beat = c.host.recv(kAnySource, Channel::kHeartbeat, soon());
    c.log.expect_ok(beat.status());
    if (!beat.ok()) return;
    c.log.expect(beat->bytes == std::to_string(i), "beat out of order");
  }
}

// Waiting for the other side is not part of the time that a tensor takes.
void tensor_times(const Check& c) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kPause(50);
  const TensorTimes before = c.device.tensor_times();
  if (!before.in_calls || c.host.size() == 1 || c.rank() > 1) return;
  std::string tensor(std::size_t{3} << 20, 'x');
  const Clock::time_point began = Clock::now();
  if (c.rank() == 0) {
    c.log.expect_ok(c.host.recv(1, Channel::kBootstrap, soon()).status());
    std::this_thread::sleep_for(kPause);
    c.log.expect_ok(c.device.send(1, bytes_of(tensor), soon()));
  } else {
    c.log.expect_ok(c.host.send(0, Channel::kBootstrap, "ready", soon()));
    c.log.expect_ok(c.device.recv(0, bytes_of(tensor), soon()));
  }
  const auto passed = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - began);
  const TensorTimes after = c.device.tensor_times();
  const std::uint64_t send_us = after.send_us - before.send_us;
  const std::uint64_t receive_us = after.receive_us - before.receive_us;
  const auto most =
      static_cast<std::uint64_t>((passed - std::chrono::microseconds(kPause)).count()) + 1;
  c.log.expect((c.rank() == 0 ? send_us : receive_us) > 0, "moving three megabytes takes time");
  c.log.expect((c.rank() == 0 ? receive_us : send_us) == 0, "nothing went the other way");
  c.log.expect(send_us + receive_us <= most, "a wait was counted as moving");
}

}  // namespace

void CheckLog::expect(bool condition, std::string_view what, const std::source_location& where) {
  if (condition) return;
  const std::lock_guard lock(mutex_);
  text_ += "line " + std::to_string(where.line()) + ": " + std::string(what) + "\n";
}

void CheckLog::expect_ok(const Status& status, const std::source_location& where) {
  expect(status.ok(), status.to_string(), where);
}

void CheckLog::expect_code(const Status& status, StatusCode code,
                           const std::source_location& where) {
  expect(status.code() == code,
         "expected " + std::string(status_code_name(code)) + ", got " + status.to_string(), where);
}

std::string CheckLog::text() const {
  const std::lock_guard lock(mutex_);
  return text_;
}

std::string pattern(std::uint64_t seed, int rank, std::uint64_t index, std::size_t n_bytes) {
  std::string bytes(n_bytes, '\0');
  std::uint64_t state =
      seed * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(rank) * 0xbf58476d1ce4e5b9u + index;
  for (std::size_t i = 0; i < n_bytes; i += 8) {
    state += 0x9e3779b97f4a7c15u;
    std::uint64_t word = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
    word ^= word >> 27;
    std::memcpy(bytes.data() + i, &word, std::min<std::size_t>(8, n_bytes - i));
  }
  return bytes;
}

void check_groups(HostGroup& host, DeviceGroup& device, std::uint64_t seed, CheckLog& log) {
  Check c{host, device, seed, log};
  message_sizes(c);
  message_order(c);
  channels_are_apart(c);
  log.expect_ok(host.barrier(soon()));
  deadlines(c);
  log.expect_ok(host.barrier(soon()));
  bad_arguments(c);
  log.expect_ok(host.barrier(soon()));
  host_collectives(c);
  agreement(c);
  tensors(c);
  device_collectives(c);
  log.expect_ok(host.barrier(soon()));
  tensor_times(c);
  log.expect_ok(host.barrier(soon()));
}

void check_pipeline(HostGroup& host, DeviceGroup& device, std::uint64_t seed, int n_steps,
                    CheckLog& log) {
  Check c{host, device, seed, log};
  std::thread stage([&] { run_stage(c, n_steps); });
  std::thread beats([&] { run_beats(c, n_steps); });
  if (c.rank() == 0) run_engine(c, n_steps);
  stage.join();
  beats.join();
  log.expect_ok(host.barrier(soon()));
}

void check_size_mismatch(HostGroup& host, DeviceGroup& device, CheckLog& log) {
  std::string tensor(96, 'x');
  if (host.rank() == 0 && host.size() > 1) {
    log.expect_ok(device.send(1, bytes_of(tensor), soon()));
    log.expect_ok(device.send(1, bytes_of(tensor), soon()));
  }
  if (host.rank() == 1) {
    std::string out(95, '-');
    const Status s = device.recv(0, bytes_of(out), soon());
    log.expect_code(s, StatusCode::kInternal);
    log.expect(s.message() == "rank 0 sent a tensor of 96 bytes, but 95 were expected",
               s.message());
    log.expect(out == std::string(95, '-'), "a refused tensor was written");
    // The right size comes too late: what follows in the stream cannot be trusted.
    const Status again = device.recv(0, bytes_of(tensor), soon());
    log.expect_code(again, StatusCode::kInternal);
    log.expect(again.message().find("is broken") != std::string::npos, again.message());
  }
  log.expect_ok(host.barrier(soon()));
}

void check_shutdown(HostGroup& host, DeviceGroup& device, CheckLog& log) {
  std::thread plan([&] {
    const Status s = host.recv(0, Channel::kPlan, soon()).status();
    log.expect_code(s, StatusCode::kUnavailable);
    log.expect(s.message().find("closing time") != std::string::npos, s.message());
  });
  std::thread tensor([&] {
    if (host.size() == 1) return;
    std::string out(8, '\0');
    const Status s = host.rank() == 0 ? device.recv(host.size() - 1, bytes_of(out), soon())
                                      : device.broadcast(bytes_of(out), 0, soon());
    log.expect_code(s, StatusCode::kUnavailable);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const auto start = std::chrono::steady_clock::now();
  host.shutdown("closing time");
  device.abort("closing time");
  plan.join();
  tensor.join();
  log.expect(std::chrono::steady_clock::now() - start < std::chrono::seconds(2),
             "shutdown woke its waiters too late");
  log.expect_code(host.recv(0, Channel::kPlan, soon()).status(), StatusCode::kUnavailable);
  log.expect_code(host.send(host.rank(), Channel::kPlan, "x", soon()), StatusCode::kUnavailable);
}

}  // namespace spindle::comm::testing
