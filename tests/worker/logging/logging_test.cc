#include "worker/logging/logging.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/formatter.h>
#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>

#include <boost/json.hpp>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace spindle::worker {
namespace {

using testing::ElementsAre;
using testing::MatchesRegex;

// The default logger, as start_logging makes it, into a string; the old one comes back.
class Logging : public testing::Test {
 protected:
  void use(config::Log::Format format, spdlog::level::level_enum level, int stage = 2) {
    auto logger = std::make_shared<spdlog::logger>(
        "", std::make_shared<spdlog::sinks::ostream_sink_mt>(out_));
    logger->set_formatter(make_log_formatter(format, 1, stage));
    logger->set_level(level);
    spdlog::set_default_logger(std::move(logger));
  }
  void TearDown() override { spdlog::set_default_logger(before_); }

  std::vector<std::string> lines() const {
    std::vector<std::string> lines;
    std::istringstream in(out_.str());
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    return lines;
  }

  std::ostringstream out_;
  std::shared_ptr<spdlog::logger> before_ = spdlog::default_logger();
};

TEST_F(Logging, TextLinesNameRankStageAndRequest) {
  use(config::Log::TEXT, spdlog::level::debug);
  spdlog::info("ready: {}", 7);
  log_request(spdlog::level::warn, "chat-7", "failed");
  log_request(spdlog::level::debug, "", "no id");
  const std::string time = "[0-9]+:[0-9]+:[0-9]+\\.[0-9]+";
  EXPECT_THAT(lines(),
              ElementsAre(MatchesRegex(time + " rank 1 stage 2 info ready: 7"),
                          MatchesRegex(time + " rank 1 stage 2 warning .req chat-7. failed"),
                          MatchesRegex(time + " rank 1 stage 2 debug no id")));
}

TEST_F(Logging, BeforeTheStageIsKnownALineNamesTheRankAlone) {
  use(config::Log::TEXT, spdlog::level::debug, -1);
  spdlog::error("no");
  use(config::Log::JSON, spdlog::level::debug, -1);
  spdlog::error("no");
  const auto written = lines();
  ASSERT_EQ(written.size(), 2U);
  EXPECT_THAT(written[0], MatchesRegex(".* rank 1 error no"));
  EXPECT_FALSE(boost::json::parse(written[1]).as_object().contains("stage"));
}

TEST_F(Logging, JsonLinesHaveTheFields) {
  use(config::Log::JSON, spdlog::level::debug);
  log_request(spdlog::level::debug, "chat-7", "finished");
  spdlog::info("ready");
  const auto written = lines();
  ASSERT_EQ(written.size(), 2U);
  const auto about_request = boost::json::parse(written[0]).as_object();
  EXPECT_EQ(about_request.at("rank").as_int64(), 1);
  EXPECT_EQ(about_request.at("stage").as_int64(), 2);
  EXPECT_EQ(about_request.at("request_id").as_string(), "chat-7");
  EXPECT_EQ(about_request.at("level").as_string(), "debug");
  EXPECT_EQ(about_request.at("message").as_string(), "finished");
  EXPECT_THAT(std::string(about_request.at("time").as_string()),
              MatchesRegex("[0-9]+-[0-9]+-[0-9]+T[0-9]+:[0-9]+:[0-9]+\\.[0-9]+Z"));
  EXPECT_FALSE(boost::json::parse(written[1]).as_object().contains("request_id"));
}

TEST_F(Logging, AMessageOfAnyBytesIsOneLineThatParses) {
  const auto seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  constexpr std::size_t kMessages = 200;
  for (const auto format : {config::Log::JSON, config::Log::TEXT}) {
    out_.str("");
    use(format, spdlog::level::debug);
    for (std::size_t i = 0; i < kMessages; ++i) {
      std::string bytes(1 + random() % 60, '\0');
      for (char& byte : bytes) byte = static_cast<char>(random() % 256);
      log_request(spdlog::level::info, bytes, "begin " + bytes + "\n\r\nend");
    }
    const auto written = lines();
    ASSERT_EQ(written.size(), kMessages);
    for (const std::string& line : written) {
      EXPECT_EQ(line.find('\r'), std::string::npos);
      if (format == config::Log::TEXT) continue;
      boost::json::error_code error;
      const auto value = boost::json::parse(line, error);
      ASSERT_FALSE(error) << line;
      EXPECT_TRUE(value.as_object().at("message").as_string().starts_with("begin "));
    }
  }
}

TEST_F(Logging, ALevelChangesWhileItRuns) {
  use(config::Log::TEXT, spdlog::level::info);
  EXPECT_FALSE(logs(spdlog::level::debug));
  log_request(spdlog::level::debug, "r", "not yet");
  EXPECT_TRUE(set_log_level("debug").ok());
  EXPECT_TRUE(logs(spdlog::level::debug));
  log_request(spdlog::level::debug, "r", "now");
  EXPECT_TRUE(set_log_level("ERROR").ok());
  spdlog::warn("silent");
  EXPECT_EQ(set_log_level("loud").code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(logs(spdlog::level::err));
  EXPECT_THAT(lines(), ElementsAre(MatchesRegex(".*info log level debug, was info"),
                                   MatchesRegex(".*req r. now"),
                                   MatchesRegex(".*info log level error, was debug")));
}

TEST_F(Logging, LevelsHaveTheConfigurationsNames) {
  EXPECT_EQ(*parse_log_level("warning"), spdlog::level::warn);
  EXPECT_EQ(*parse_log_level("Info"), spdlog::level::info);
  EXPECT_EQ(*parse_log_level("error"), spdlog::level::err);
  for (const char* name : {"", "warn", "trace", "off", "debug "}) {
    EXPECT_FALSE(parse_log_level(name).ok()) << name;
  }
}

}  // namespace
}  // namespace spindle::worker
