#include "ops/cli/output.h"

#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <string_view>

#include "ops/cli/exit_codes.h"
#include "ops/cli/kv_chart.h"
#include "ops/cli/terminal.h"

namespace spindle::cli {
namespace {

std::string with_decimals(double value, int decimals) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%.*f", decimals, value);
  return text.data();
}

const char* finish_name(api::v1::FinishReason reason) {
  switch (reason) {
    case api::v1::STOP:
      return "stop";
    case api::v1::LENGTH:
      return "length";
    case api::v1::CANCELLED:
      return "cancelled";
    case api::v1::FAILED:
      return "failed";
    default:
      return nullptr;
  }
}

boost::json::object to_json(const api::v1::TokenLogprob& token) {
  // Bytes, because a token can be a part of a character.
  boost::json::array bytes;
  for (const char c : token.text()) {
    bytes.emplace_back(static_cast<unsigned char>(c));
  }
  return {{"id", token.id()}, {"bytes", std::move(bytes)}, {"logprob", token.logprob()}};
}

boost::json::object to_json(const api::ChoiceOutput& choice, std::size_t index) {
  boost::json::object object{{"index", index}, {"text", choice.text}};
  const char* finish = finish_name(choice.finish_reason);
  object["finish_reason"] = finish == nullptr ? boost::json::value() : boost::json::value(finish);
  if (!choice.stop_reason.empty()) {
    object["stop_reason"] = choice.stop_reason;
  }
  object["token_ids"] = boost::json::array(choice.token_ids.begin(), choice.token_ids.end());
  if (!choice.logprobs.empty()) {
    boost::json::array infos;
    for (const api::v1::TokenInfo& info : choice.logprobs) {
      boost::json::object token = to_json(info.chosen());
      boost::json::array top;
      for (const api::v1::TokenLogprob& other : info.top()) {
        top.emplace_back(to_json(other));
      }
      token["top"] = std::move(top);
      infos.emplace_back(std::move(token));
    }
    object["logprobs"] = std::move(infos);
  }
  return object;
}

boost::json::object to_json(const api::v1::KvBoundary& boundary) {
  boost::json::array heads;
  for (const api::v1::KvHeadKept& head : boundary.heads()) {
    boost::json::object object{{"layer", head.layer()},
                               {"kv_head", head.kv_head()},
                               {"plan", head.plan()},
                               {"kept_tokens", head.kept_tokens()},
                               {"bytes", head.bytes()}};
    if (head.has_lazy_mass()) {
      object["lazy_mass"] = head.lazy_mass();
    }
    if (head.has_k_entries_per_token()) {
      object["k_entries_per_token"] = head.k_entries_per_token();
    }
    if (head.has_v_entries_per_token()) {
      object["v_entries_per_token"] = head.v_entries_per_token();
    }
    heads.emplace_back(std::move(object));
  }
  return {{"position", boundary.position()},
          {"full_bytes", boundary.full_bytes()},
          {"kept_bytes", boundary.kept_bytes()},
          {"compress_ms", boundary.compress_ms()},
          {"heads", std::move(heads)}};
}

boost::json::object to_json(const api::v1::Usage& usage) {
  boost::json::array kv;
  for (const api::v1::StageKv& stage : usage.kv()) {
    boost::json::array layers;
    for (const api::v1::LayerKvUse& layer : stage.layers()) {
      layers.emplace_back(boost::json::object{{"layer", layer.layer()},
                                              {"full_bytes", layer.full_bytes()},
                                              {"kept_bytes", layer.kept_bytes()}});
    }
    kv.emplace_back(boost::json::object{{"stage", stage.stage()},
                                        {"full_bytes", stage.full_bytes()},
                                        {"kept_bytes", stage.kept_bytes()},
                                        {"layers", std::move(layers)}});
  }
  boost::json::array boundaries;
  for (const api::v1::KvBoundary& boundary : usage.boundaries()) {
    boundaries.emplace_back(to_json(boundary));
  }
  return {{"prompt_tokens", usage.prompt_tokens()},
          {"completion_tokens", usage.completion_tokens()},
          {"queue_ms", usage.queue_ms()},
          {"time_to_first_token_ms", usage.time_to_first_token_ms()},
          {"total_ms", usage.total_ms()},
          {"cached_tokens", usage.cached_tokens()},
          {"kv", std::move(kv)},
          {"boundaries", std::move(boundaries)}};
}

}  // namespace

std::string format_bytes(std::uint64_t n_bytes) {
  constexpr std::array<const char*, 5> kUnits{"KiB", "MiB", "GiB", "TiB", "PiB"};
  if (n_bytes < 1024) {
    return std::to_string(n_bytes) + " B";
  }
  double value = static_cast<double>(n_bytes) / 1024;
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return with_decimals(value, 1) + " " + kUnits[unit];
}

std::string format_seconds(double seconds) {
  if (!(seconds >= 60)) {
    return with_decimals(seconds, 1) + " s";
  }
  const auto whole = static_cast<std::uint64_t>(seconds);
  if (whole < 3600) {
    return std::to_string(whole / 60) + " min " + std::to_string(whole % 60) + " s";
  }
  return std::to_string(whole / 3600) + " h " + std::to_string(whole / 60 % 60) + " min";
}

std::string usage_line(const api::v1::Usage& usage) {
  std::string line = "prompt " + std::to_string(usage.prompt_tokens()) + " tokens";
  if (usage.cached_tokens() > 0) {
    line += " (" + std::to_string(usage.cached_tokens()) + " cached)";
  }
  line += ", output " + std::to_string(usage.completion_tokens()) + " tokens, first token after " +
          with_decimals(usage.time_to_first_token_ms(), 0) + " ms";
  const double decode_ms = usage.total_ms() - usage.time_to_first_token_ms();
  if (usage.completion_tokens() > 1 && decode_ms > 0) {
    line +=
        ", " + with_decimals((usage.completion_tokens() - 1) * 1000.0 / decode_ms, 1) + " tokens/s";
  }
  std::uint64_t full = 0;
  std::uint64_t kept = 0;
  for (const api::v1::StageKv& stage : usage.kv()) {
    full += stage.full_bytes();
    kept += stage.kept_bytes();
  }
  if (full > 0) {
    line += ", KV kept " + format_bytes(kept) + " of " + format_bytes(full) + " (" +
            with_decimals(100.0 * static_cast<double>(kept) / static_cast<double>(full), 0) + "%)";
  }
  return line;
}

boost::json::object to_json(const api::GenerateOutcome& outcome, const std::string& model) {
  boost::json::object object{{"request_id", outcome.request_id}, {"model", model}};
  boost::json::array choices;
  for (std::size_t i = 0; i < outcome.choices.size(); ++i) {
    choices.emplace_back(to_json(outcome.choices[i], i));
  }
  object["choices"] = std::move(choices);
  if (outcome.status.ok()) {
    object["usage"] = to_json(outcome.usage);
  } else {
    boost::json::object error{{"code", status_code_name(outcome.status.code())},
                              {"message", outcome.status.message()}};
    if (!outcome.param.empty()) {
      error["param"] = outcome.param;
    }
    if (outcome.retry_after_ms > 0) {
      error["retry_after_ms"] = outcome.retry_after_ms;
    }
    object["error"] = std::move(error);
  }
  return object;
}

std::string error_text(const api::GenerateOutcome& outcome) {
  std::string text = outcome.status.message();
  if (!outcome.param.empty()) {
    text += " (" + outcome.param + ")";
  }
  if (outcome.retry_after_ms > 0) {
    text += "; try again in " + format_seconds(outcome.retry_after_ms / 1000.0);
  }
  return text;
}

void print_error(const std::string& text) {
  const Style style(STDERR_FILENO);
  const bool terminal = is_terminal(STDERR_FILENO);
  std::cerr << style.red("spindle:") << ' ' << (terminal ? printable(text) : text) << '\n';
}

int report_connect_error(const Status& status, const ConnectionOptions& options) {
  switch (status.code()) {
    case StatusCode::kUnavailable:
      print_error(status.message() + ". Is spindled running?");
      break;
    case StatusCode::kUnauthenticated:
      print_error(status.message() + ". Set --api-key or the variable SPINDLE_API_KEY.");
      break;
    case StatusCode::kInvalidArgument:
    case StatusCode::kTooLarge:
      print_error(options.host + ":" + std::to_string(options.port) +
                  " does not speak Spindle's TCP API: " + status.message());
      break;
    default:
      print_error(status.message());
  }
  return kExitCannotConnect;
}

int report_usage_error(const Status& status) {
  print_error(status.message());
  return kExitUsage;
}

int report_outcome(const api::GenerateOutcome& outcome, const std::string& model,
                   const OutputOptions& options) {
  if (options.json) {
    std::cout << to_json(outcome, model) << std::endl;
  }
  if (outcome.status.ok()) {
    if (options.show_usage) {
      std::cerr << Style(STDERR_FILENO).dim(usage_line(outcome.usage)) << '\n';
    }
    if (options.show_kv) {
      std::cerr << kv_chart(outcome.usage, Style(STDERR_FILENO), locale_is_utf8());
    }
    return kExitOk;
  }
  if (outcome.status.code() == StatusCode::kCancelled) {
    print_error("cancelled");
    return kExitInterrupted;
  }
  print_error(error_text(outcome));
  return kExitRequestFailed;
}

StreamPrinter::StreamPrinter() : terminal_(is_terminal(STDOUT_FILENO)) {}

void StreamPrinter::print(const std::string& text) {
  const std::string shown = terminal_ ? printable(text) : text;
  if (!shown.empty()) {
    std::cout << shown << std::flush;
    line_begun_ = shown.back() != '\n';
  }
}

void StreamPrinter::end_line() {
  if (terminal_ && line_begun_) {
    std::cout << std::endl;
  }
  line_begun_ = false;
}

}  // namespace spindle::cli
