#include "ops/cli/eval_work.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>
#include <utility>

#include "ops/cli/progress.h"

namespace spindle::cli {
namespace {

constexpr std::chrono::seconds kConnectWait{10};
constexpr int kMostTries = 300;  // of a request that the server has no room for
constexpr std::chrono::milliseconds kLeastRetryWait{100};
constexpr std::chrono::milliseconds kMostRetryWait{2000};

class Work {
 public:
  Work(const std::vector<EvalTask>& tasks, const WorkOptions& options, EvalJournal& journal)
      : tasks_(tasks),
        options_(options),
        journal_(journal),
        results_(journal.earlier()),
        progress_(n_cells(), n_done(), "cells") {}

  Result<Results> run() {
    const auto n_workers =
        std::min(static_cast<std::size_t>(std::max(options_.concurrency, 1)), tasks_.size());
    std::vector<std::thread> workers;
    for (std::size_t worker = 0; worker < n_workers; ++worker) {
      workers.emplace_back([this, worker] {
        if (Status status = work(worker); !status.ok()) fail(std::move(status));
      });
    }
    for (std::thread& worker : workers) worker.join();
    if (!status_.ok()) return status_;
    return std::move(results_);
  }

 private:
  std::size_t n_cells() const {
    std::size_t n = 0;
    for (const EvalTask& task : tasks_) n += task.cells.size();
    return n;
  }

  std::size_t n_done() const {
    std::size_t n = n_cells();
    for (const EvalTask& task : tasks_) n -= missing_cells(task, results_).size();
    return n;
  }

  void fail(Status status) {
    const std::lock_guard lock(mutex_);
    if (status_.ok()) status_ = std::move(status);
    stop_ = true;
  }

  Status work(std::size_t worker) {
    auto client = api::TcpClient::connect(options_.client, Deadline::after(kConnectWait));
    if (!client.ok()) return client.status();
    RunnerOptions runner;
    runner.max_scores = options_.max_scores;
    if (options_.sessions) {
      runner.session = "eval-" + std::to_string(::getpid()) + "-" + std::to_string(worker);
    }
    const Ask ask = [&](const api::v1::GenerateRequest& request) {
      return send(**client, request);
    };
    for (;;) {
      const std::size_t next = next_++;
      if (next >= tasks_.size() || stop_) return ok_status();
      const EvalTask& task = tasks_[next];
      // Only this worker adds to this task's results, but others add to the map.
      const std::vector<Cell> cells = [&] {
        const std::lock_guard lock(mutex_);
        return missing_cells(task, results_);
      }();
      Status status = run_probe(task.probe, cells, runner, ask,
                                [&](const Cell& cell, const CellResult& result) {
                                  return take({task.item.key, cell.key}, result);
                                });
      if (!status.ok()) return status.with_context(task.item.key);
    }
  }

  Status take(const ResultKey& key, const CellResult& result) {
    if (Status status = journal_.add(key, result); !status.ok()) return status;
    {
      const std::lock_guard lock(mutex_);
      results_[key] = result;
    }
    progress_.step();
    return stop_ ? cancelled("another worker failed") : ok_status();
  }

  api::GenerateOutcome send(api::TcpClient& client, const api::v1::GenerateRequest& request) {
    for (int tries = 1;; ++tries) {
      api::GenerateOutcome outcome = client.generate(
          request, {}, {.progress_timeout = options_.timeout, .cancel_fd = options_.cancel_fd});
      const bool full = outcome.status.code() == StatusCode::kResourceExhausted;
      if (!full || tries == kMostTries || stop_) return outcome;
      const auto wait = std::clamp(std::chrono::milliseconds(outcome.retry_after_ms),
                                   kLeastRetryWait, kMostRetryWait);
      pollfd interrupt{.fd = options_.cancel_fd, .events = POLLIN, .revents = 0};
      ::poll(&interrupt, 1, static_cast<int>(wait.count()));
    }
  }

  const std::vector<EvalTask>& tasks_;
  const WorkOptions& options_;
  EvalJournal& journal_;
  std::mutex mutex_;  // results_, status_
  Results results_;
  Status status_;
  std::atomic<std::size_t> next_ = 0;
  std::atomic<bool> stop_ = false;
  Progress progress_;
};

}  // namespace

std::vector<Cell> missing_cells(const EvalTask& task, const Results& results) {
  std::vector<Cell> missing;
  for (const Cell& cell : task.cells) {
    if (!results.contains({task.item.key, cell.key})) missing.push_back(cell);
  }
  return missing;
}

Result<Results> run_tasks(const std::vector<EvalTask>& tasks, const WorkOptions& options,
                          EvalJournal& journal) {
  return Work(tasks, options, journal).run();
}

}  // namespace spindle::cli
