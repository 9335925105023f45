#include "worker/daemon/logging.h"

#include <spdlog/formatter.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <boost/json.hpp>
#include <memory>
#include <string>
#include <utility>

namespace spindle::worker {
namespace {

class JsonFormatter final : public spdlog::formatter {
 public:
  explicit JsonFormatter(int rank)
      : rank_(rank), time_("%Y-%m-%dT%H:%M:%S.%eZ", spdlog::pattern_time_type::utc, "") {}

  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    spdlog::memory_buf_t time;
    time_.format(message, time);
    const auto level = spdlog::level::to_string_view(message.level);
    boost::json::object line;
    line["time"] = boost::json::string_view(time.data(), time.size());
    line["level"] = boost::json::string_view(level.data(), level.size());
    line["rank"] = rank_;
    line["message"] = boost::json::string_view(message.payload.data(), message.payload.size());
    const std::string text = boost::json::serialize(line);
    out.append(text.data(), text.data() + text.size());
    out.push_back('\n');
  }

  std::unique_ptr<spdlog::formatter> clone() const override {
    return std::make_unique<JsonFormatter>(rank_);
  }

 private:
  int rank_;
  spdlog::pattern_formatter time_;
};

spdlog::level::level_enum level_of(config::Log::Level level) {
  switch (level) {
    case config::Log::DEBUG:
      return spdlog::level::debug;
    case config::Log::INFO:
      return spdlog::level::info;
    case config::Log::WARNING:
      return spdlog::level::warn;
    case config::Log::ERROR:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

}  // namespace

void start_logging(const config::Log& log, int rank) {
  auto logger = std::make_shared<spdlog::logger>(
      "spindled", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  if (log.format() == config::Log::JSON) {
    logger->set_formatter(std::make_unique<JsonFormatter>(rank));
  } else {
    logger->set_pattern("%H:%M:%S.%e rank " + std::to_string(rank) + " %^%l%$ %v");
  }
  logger->set_level(level_of(log.level()));
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace spindle::worker
