#include "worker/logging/logging.h"

#include <spdlog/formatter.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <boost/json.hpp>
#include <cctype>
#include <string>
#include <utility>

#include "cluster/text/utf8.h"
#include "worker/logging/one_line.h"

namespace spindle::worker {
namespace {

using spdlog::level::level_enum;

std::string_view view(spdlog::string_view_t text) { return {text.data(), text.size()}; }

// JSON is UTF-8, and escapes what would end a line itself.
std::string valid_utf8(spdlog::string_view_t bytes) {
  text::LossyUtf8Decoder decoder;
  std::string out;
  decoder.feed(view(bytes), out);
  decoder.finish(out);
  return out;
}

// As the configuration and the API name them.
std::string_view level_name(level_enum level) {
  return level == spdlog::level::warn  ? "warning"
         : level == spdlog::level::err ? "error"
                                       : view(spdlog::level::to_string_view(level));
}

void append(spdlog::memory_buf_t& out, std::string_view text) {
  out.append(text.data(), text.data() + text.size());
}

class JsonFormatter final : public spdlog::formatter {
 public:
  JsonFormatter(int rank, int stage)
      : rank_(rank),
        stage_(stage),
        time_("%Y-%m-%dT%H:%M:%S.%eZ", spdlog::pattern_time_type::utc, "") {}

  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    spdlog::memory_buf_t time;
    time_.format(message, time);
    boost::json::object line;
    line["time"] = boost::json::string_view(time.data(), time.size());
    line["level"] = boost::json::string_view(level_name(message.level));
    line["rank"] = rank_;
    if (stage_ >= 0) line["stage"] = stage_;
    if (message.logger_name.size() > 0) line["request_id"] = valid_utf8(message.logger_name);
    line["message"] = valid_utf8(message.payload);
    append(out, boost::json::serialize(line) + "\n");
  }

  std::unique_ptr<spdlog::formatter> clone() const override {
    return std::make_unique<JsonFormatter>(rank_, stage_);
  }

 private:
  int rank_;
  int stage_;
  spdlog::pattern_formatter time_;
};

class TextFormatter final : public spdlog::formatter {
 public:
  TextFormatter(int rank, int stage)
      : rank_(rank),
        stage_(stage),
        time_("%H:%M:%S.%e", spdlog::pattern_time_type::local, ""),
        place_(" rank " + std::to_string(rank) +
               (stage < 0 ? "" : " stage " + std::to_string(stage)) + " ") {}

  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    time_.format(message, out);
    append(out, place_);
    message.color_range_start = out.size();
    append(out, level_name(message.level));
    message.color_range_end = out.size();
    append(out, " ");
    if (message.logger_name.size() > 0) {
      append(out, "[req " + one_line(view(message.logger_name)) + "] ");
    }
    append(out, one_line(view(message.payload)) + "\n");
  }

  std::unique_ptr<spdlog::formatter> clone() const override {
    return std::make_unique<TextFormatter>(rank_, stage_);
  }

 private:
  int rank_;
  int stage_;
  spdlog::pattern_formatter time_;
  std::string place_;
};

level_enum level_of(config::Log::Level level) {
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

std::unique_ptr<spdlog::formatter> make_log_formatter(config::Log::Format format, int rank,
                                                      int stage) {
  if (format == config::Log::JSON) return std::make_unique<JsonFormatter>(rank, stage);
  return std::make_unique<TextFormatter>(rank, stage);
}

void start_logging(const config::Log& log, int rank) {
  // Without a name: a name would be a request's.
  auto logger =
      std::make_shared<spdlog::logger>("", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  logger->set_formatter(make_log_formatter(log.format(), rank, -1));
  logger->set_level(level_of(log.level()));
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
}

void set_log_stage(const config::Log& log, int rank, int stage) {
  spdlog::default_logger_raw()->set_formatter(make_log_formatter(log.format(), rank, stage));
}

Result<level_enum> parse_log_level(std::string_view name) {
  static constexpr std::array kLevels{spdlog::level::debug, spdlog::level::info,
                                      spdlog::level::warn, spdlog::level::err};
  for (const level_enum level : kLevels) {
    const std::string_view known = level_name(level);
    if (std::equal(name.begin(), name.end(), known.begin(), known.end(), [](char a, char b) {
          return std::tolower(static_cast<unsigned char>(a)) == b;
        })) {
      return level;
    }
  }
  return invalid_argument("the level must be debug, info, warning or error");
}

Status set_log_level(std::string_view name) {
  const auto level = parse_log_level(name);
  if (!level.ok()) return level.status();
  spdlog::logger& logger = *spdlog::default_logger_raw();
  const level_enum before = logger.level();
  // Under the more talkative of the two, so that a log shows where it becomes silent.
  logger.set_level(std::min(before, *level));
  if (before != *level) {
    logger.log(std::max(logger.level(), spdlog::level::info), "log level {}, was {}",
               level_name(*level), level_name(before));
  }
  logger.set_level(*level);
  return ok_status();
}

bool logs(level_enum level) { return spdlog::default_logger_raw()->should_log(level); }

void log_request(level_enum level, std::string_view request_id, std::string_view message) {
  spdlog::logger& logger = *spdlog::default_logger_raw();
  if (!logger.should_log(level)) return;
  const spdlog::details::log_msg line(spdlog::string_view_t(request_id.data(), request_id.size()),
                                      level, spdlog::string_view_t(message.data(), message.size()));
  for (const auto& sink : logger.sinks()) {
    if (!sink->should_log(level)) continue;
    sink->log(line);
    if (level >= logger.flush_level()) sink->flush();
  }
}

}  // namespace spindle::worker
