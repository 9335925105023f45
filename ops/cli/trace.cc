#include "ops/cli/trace.h"

#include <boost/json.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <memory>

#include "ops/cli/exit_codes.h"
#include "ops/cli/output.h"
#include "ops/cli/terminal.h"

namespace spindle::cli {
namespace {

constexpr const char* kTraceFooter =
    "Every rank records what its stage thread does, step by step, and the answer comes when the "
    "time\n"
    "is over: a file in Chrome trace event format, for https://ui.perfetto.dev or "
    "chrome://tracing.\n"
    "A rank is a process; its threads are compute, transfer, compression and bubble, and on rank "
    "0\n"
    "scheduler. All times are on rank 0's clock; otherData.clock_error_us says how far the others "
    "may\n"
    "be off. A rank keeps its newest --max-events events; otherData.dropped_events counts the "
    "rest.\n"
    "One recording at a time. Ctrl-C gives up and stops it.\n"
    "\n"
    "  spindle trace --seconds 5 --output trace.json\n"
    "  spindle trace --seconds 0.5 --output - | jq .otherData";

constexpr const char* kLogLevelFooter =
    "Takes effect on all ranks at once and lasts until the cluster stops or it is changed again.\n"
    "debug shows every request's way: accepted, preempted, finished, cancelled. No level shows "
    "the\n"
    "text of a request unless the server was started with log.log_prompts.\n"
    "\n"
    "  spindle log-level debug\n"
    "  spindle log-level info";

// A file that is gone again when it was not finished, or standard output.
class Output {
 public:
  explicit Output(const std::string& path) : path_(path) {
    if (to_stdout()) return;
    file_.reset(std::fopen(path.c_str(), "wbe"));
    if (!file_) error_ = std::strerror(errno);
  }
  ~Output() {
    if (!file_) return;
    file_.reset();
    std::remove(path_.c_str());
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  const std::string& error() const { return error_; }
  bool to_stdout() const { return path_ == "-"; }

  bool write(std::string_view data) {
    std::FILE* file = to_stdout() ? stdout : file_.get();
    if (std::fwrite(data.data(), 1, data.size(), file) == data.size()) {
      n_bytes_ += data.size();
      return true;
    }
    error_ = std::strerror(errno);
    return false;
  }
  bool finish() {
    if (to_stdout()) return std::fflush(stdout) == 0;
    const bool closed = std::fclose(file_.release()) == 0;
    if (!closed) {
      error_ = std::strerror(errno);
      std::remove(path_.c_str());
    }
    return closed;
  }
  std::uint64_t n_bytes() const { return n_bytes_; }

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  const std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
  std::string error_;
  std::uint64_t n_bytes_ = 0;
};

}  // namespace

void add_trace_options(CLI::App& app, TraceOptions& options) {
  app.add_option("--seconds", options.seconds, "How long to record, at most 60")
      ->capture_default_str();
  app.add_option("-o,--output", options.output, "File to write; - : standard output")
      ->capture_default_str();
  app.add_option("--max-events", options.max_events,
                 "Events that each rank keeps, the newest ones, at most 1048576")
      ->capture_default_str();
  add_connection_options(app, options.connection, kHttpPortHelp);
  app.footer(kTraceFooter);
}

void add_log_level_options(CLI::App& app, LogLevelOptions& options) {
  app.add_option("level", options.level, "debug, info, warning or error")->required();
  add_connection_options(app, options.connection, kHttpPortHelp);
  app.footer(kLogLevelFooter);
}

int run_trace(const TraceOptions& options) {
  const InterruptSignal interrupt;
  Output output(options.output);
  if (!output.error().empty()) {
    return report_usage_error(
        invalid_argument("cannot write " + options.output + ": " + output.error()));
  }
  const std::string body = boost::json::serialize(
      boost::json::object{{"seconds", options.seconds}, {"max_events", options.max_events}});
  const auto quiet =
      std::chrono::milliseconds(static_cast<std::int64_t>(std::min(options.seconds, 60.0) * 1000));
  const HttpAnswer answer =
      http_post(options.connection, "/v1/spindle/trace", body, quiet, interrupt.fd(),
                [&output](std::string_view data) { return output.write(data); });
  if (!output.error().empty()) {
    print_error("cannot write " + options.output + ": " + output.error());
    return kExitRequestFailed;
  }
  if (answer.status != 200) return report_http_failure(answer, options.connection);
  if (!output.finish()) {
    print_error("cannot write " + options.output + ": " + output.error());
    return kExitRequestFailed;
  }
  if (!output.to_stdout()) {
    std::cout << "wrote " << options.output << ", " << format_bytes(output.n_bytes())
              << "; open it at https://ui.perfetto.dev" << std::endl;
  }
  return kExitOk;
}

int run_log_level(const LogLevelOptions& options) {
  const InterruptSignal interrupt;
  const std::string body = boost::json::serialize(boost::json::object{{"level", options.level}});
  const HttpAnswer answer =
      http_post(options.connection, "/v1/spindle/log_level", body, std::chrono::milliseconds(0),
                interrupt.fd(), [](std::string_view) { return true; });
  if (answer.status != 200) return report_http_failure(answer, options.connection);
  std::cout << "log level " << options.level << std::endl;
  return kExitOk;
}

}  // namespace spindle::cli
