#include "ops/cli/bench_run.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "ops/cli/output.h"

namespace spindle::cli {
namespace {

using Clock = std::chrono::steady_clock;

// Half of what a server allows on a connection by default.
constexpr std::size_t kRequestsPerConnection = 64;
constexpr std::chrono::milliseconds kLongestWait{100};
constexpr std::chrono::seconds kCancelWait{5};

// The requests that are still to be sent, in order; one clock for all connections.
class Queue {
 public:
  explicit Queue(const std::vector<double>& times) : times_(times) {}

  double now() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
  // The next request if it is due.
  std::optional<std::size_t> take() {
    const std::lock_guard lock(mutex_);
    if (next_ == times_.size() || times_[next_] > now()) return std::nullopt;
    return next_++;
  }
  bool is_empty() const {
    const std::lock_guard lock(mutex_);
    return next_ == times_.size();
  }
  // Until the next one is due, at most `longest`.
  Clock::duration wait(Clock::duration longest) const {
    const std::lock_guard lock(mutex_);
    if (next_ == times_.size()) return longest;
    const auto due = std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double>(std::max(0.0, times_[next_] - now())));
    return std::min(longest, due);
  }

 private:
  const std::vector<double>& times_;
  const Clock::time_point start_ = Clock::now();
  mutable std::mutex mutex_;
  std::size_t next_ = 0;
};

// One connection and its requests, on a thread of its own.
class Lane {
 public:
  Lane(std::unique_ptr<api::TcpClient> client, std::size_t max_open, const BenchRunOptions& options,
       const std::vector<BenchPrompt>& prompts, Queue& queue, BenchRun& run,
       const std::function<void()>& on_end)
      : client_(std::move(client)),
        max_open_(max_open),
        options_(options),
        prompts_(prompts),
        queue_(queue),
        run_(run),
        on_end_(on_end) {}

  void run(const std::atomic<bool>& stop) {
    while (!stop) {
      send_due();
      if (!client_->connection_status().ok()) break;
      if (open_.empty()) {
        if (queue_.is_empty()) return;
        std::this_thread::sleep_for(queue_.wait(kLongestWait));
        continue;
      }
      // With all places taken the next arrival is no reason to wake up.
      const bool has_place = open_.size() < max_open_;
      const auto wait = has_place ? queue_.wait(kLongestWait) : Clock::duration(kLongestWait);
      static_cast<void>(client_->run(Deadline::after(wait)));
      take_finished();
      cancel_silent();
    }
    end_open();
  }

 private:
  struct Open {
    std::size_t index;
    Clock::time_point heard;  // when something came last
  };

  void send_due() {
    while (open_.size() < max_open_) {
      const std::optional<std::size_t> index = queue_.take();
      if (!index) return;
      send(*index);
    }
  }

  void send(std::size_t index) {
    const BenchPrompt& prompt = prompts_[index];
    BenchRecord& record = run_.records[index];
    api::v1::GenerateRequest request = options_.request;
    if (prompt.tokens.empty()) {
      request.set_text(prompt.text);
    } else {
      request.mutable_tokens()->mutable_ids()->Assign(prompt.tokens.begin(), prompt.tokens.end());
    }
    request.mutable_sampling()->set_max_tokens(prompt.output_tokens);
    record.sent = queue_.now();
    const auto open = std::make_shared<Open>(Open{index, Clock::now()});
    const Result<std::uint64_t> id =
        client_->submit(std::move(request), [this, &record, open](const api::v1::Delta& delta) {
          open->heard = Clock::now();
          if (delta.token_ids().empty() && delta.text().empty()) return;
          record.outputs.push_back({queue_.now(), std::max(1, delta.token_ids_size())});
          if (options_.keep_text) record.text += delta.text();
        });
    if (!id.ok()) {
      end(record, id.status().to_string());
      return;
    }
    open_.emplace(*id, open);
  }

  void take_finished() {
    for (auto it = open_.begin(); it != open_.end();) {
      if (!client_->finished(it->first)) {
        ++it;
        continue;
      }
      const api::GenerateOutcome outcome = client_->take(it->first);
      BenchRecord& record = run_.records[it->second->index];
      record.prompt_tokens = outcome.prompt_tokens;
      record.output_tokens = outcome.usage.completion_tokens();
      std::string error;
      if (!outcome.status.ok()) error = error_text(outcome);
      if (error.empty() && record.outputs.empty()) error = "the answer has no output";
      end(record, std::move(error));
      it = open_.erase(it);
    }
  }

  // No server may keep the benchmark waiting for ever.
  void cancel_silent() {
    for (const auto& [id, open] : open_) {
      if (Clock::now() - open->heard > options_.connection.timeout()) {
        client_->cancel(id);
        open->heard = Clock::now();
      }
    }
  }

  void end_open() {
    for (const auto& [id, open] : open_) client_->cancel(id);
    const Deadline deadline = Deadline::after(kCancelWait);
    while (!open_.empty() && !deadline.passed() && client_->connection_status().ok()) {
      static_cast<void>(client_->run(deadline));
      take_finished();
    }
    take_finished();
    for (const auto& [id, open] : open_) end(run_.records[open->index], "cancelled");
    open_.clear();
  }

  void end(BenchRecord& record, std::string error) {
    record.ended = queue_.now();
    record.error = std::move(error);
    on_end_();
  }

  std::unique_ptr<api::TcpClient> client_;
  const std::size_t max_open_;
  const BenchRunOptions& options_;
  const std::vector<BenchPrompt>& prompts_;
  Queue& queue_;
  BenchRun& run_;
  const std::function<void()>& on_end_;
  std::map<std::uint64_t, std::shared_ptr<Open>> open_;
};

}  // namespace

Result<BenchRun> run_load(const BenchRunOptions& options, const std::vector<BenchPrompt>& prompts,
                          const std::vector<double>& times, const std::atomic<bool>& stop,
                          const std::function<void()>& on_end) {
  BenchRun run;
  run.records.resize(prompts.size());
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    run.records[i].due = times[i];
    run.records[i].error = "not sent";
  }
  if (prompts.empty()) return run;
  std::size_t most = std::min(prompts.size(), kMostConcurrency);
  if (options.max_concurrency > 0) most = std::min(most, options.max_concurrency);
  const std::size_t n_lanes = (most + kRequestsPerConnection - 1) / kRequestsPerConnection;
  std::vector<std::unique_ptr<api::TcpClient>> clients;
  for (std::size_t i = 0; i < n_lanes; ++i) {
    Result<std::unique_ptr<api::TcpClient>> client = connect(options.connection);
    if (!client.ok()) return client.status();
    clients.push_back(*std::move(client));
  }
  Queue queue(times);
  std::vector<std::unique_ptr<Lane>> lanes;
  for (std::size_t i = 0; i < n_lanes; ++i) {
    const std::size_t max_open = most / n_lanes + (i < most % n_lanes ? 1 : 0);
    lanes.push_back(std::make_unique<Lane>(std::move(clients[i]), max_open, options, prompts, queue,
                                           run, on_end));
  }
  {
    std::vector<std::jthread> threads;
    for (const auto& lane : lanes) threads.emplace_back([&lane, &stop] { lane->run(stop); });
  }
  for (const BenchRecord& record : run.records) run.duration = std::max(run.duration, record.ended);
  return run;
}

}  // namespace spindle::cli
