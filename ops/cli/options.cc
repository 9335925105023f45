#include "ops/cli/options.h"

#include <charconv>
#include <cmath>

#include "ops/cli/input.h"

namespace spindle::cli {
namespace {

std::chrono::milliseconds to_ms(double seconds) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(std::ceil(seconds * 1000)));
}

template <typename T>
bool parse(std::string_view text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

}  // namespace

Deadline ConnectionOptions::deadline() const { return Deadline::after(timeout()); }
std::chrono::milliseconds ConnectionOptions::timeout() const { return to_ms(timeout_s); }

void add_connection_options(CLI::App& app, ConnectionOptions& options, const char* port_help) {
  const CLI::Range seconds(0.01, 86400.0);
  app.add_option("--host", options.host, "Server's address or name")
      ->capture_default_str()
      ->group("Connection");
  app.add_option("--port", options.port, port_help)
      ->capture_default_str()
      ->check(CLI::Range(1, 65535))
      ->group("Connection");
  app.add_option("--api-key", options.api_key, "API key; better given in the environment")
      ->envname("SPINDLE_API_KEY")
      ->group("Connection");
  app.add_option("--connect-timeout", options.connect_timeout_s, "Longest wait to connect, seconds")
      ->capture_default_str()
      ->check(seconds)
      ->group("Connection");
  app.add_option("--timeout", options.timeout_s,
                 "Longest wait for an answer, or for its next piece, seconds")
      ->capture_default_str()
      ->check(seconds)
      ->group("Connection");
}

void add_sampling_options(CLI::App& app, SamplingOptions& options) {
  const auto add = [&app](const char* name, auto& value, const char* description) {
    return app.add_option(name, value, description)->group("Sampling");
  };
  const auto add_flag = [&app](const char* name, bool& value, const char* description) {
    app.add_flag(name, value, description)->group("Sampling");
  };
  add("--max-tokens", options.max_tokens, "Longest output, in tokens");
  add("--min-tokens", options.min_tokens, "No stop before this many tokens");
  add("--temperature", options.temperature, "0: always the most likely token");
  add("--top-k", options.top_k, "Only the k most likely tokens; 0: off");
  add("--top-p", options.top_p, "Only the most likely tokens up to this probability");
  add("--min-p", options.min_p, "Only tokens this likely relative to the most likely one");
  add("--repetition-penalty", options.repetition_penalty, "1: off");
  add("--presence-penalty", options.presence_penalty, "0: off");
  add("--frequency-penalty", options.frequency_penalty, "0: off");
  add("--logit-bias", options.logit_bias, "TOKEN_ID:VALUE, added to the token's logit; repeatable")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  add("--seed", options.seed, "The same seed gives the same output");
  add("--stop", options.stop, "Stop before this text; repeatable")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  add("--stop-token-id", options.stop_token_ids, "Stop at this token; repeatable")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  add_flag("--include-stop", options.include_stop, "Keep the stop text in the output");
  add_flag("--ignore-eos", options.ignore_eos, "Do not stop at the model's end-of-text token");
  add_flag("--keep-special-tokens", options.keep_special_tokens, "Show the model's special tokens");
  add("--logprobs", options.logprobs, "Log-probabilities of this many tokens; with --json");
  add("--n", options.n, "Number of independent outputs");
}

void add_kv_options(CLI::App& app, KvOptions& options) {
  app.add_option("--kv-policy", options.profile,
                 "How the request's KV is compressed: full, spindle, ...")
      ->group("KV");
  auto* ratio = app.add_option("--kv-ratio", options.ratio,
                               "KV bytes kept, as a share of the uncompressed ones");
  ratio->group("KV");
  app.add_option("--kv-max-bytes", options.max_bytes, "KV bytes kept, as a figure")
      ->check(CLI::PositiveNumber)
      ->excludes(ratio)
      ->group("KV");
  auto* session = app.add_option("--session", options.session,
                                 "Continue the kept sequence of this name where the prompt repeats "
                                 "it");
  session->group("KV");
  app.add_flag("--keep-session", options.keep_session, "Keep the sequence for a later request")
      ->needs(session)
      ->group("KV");
}

void add_urgency_options(CLI::App& app, UrgencyOptions& options) {
  app.add_option("--priority", options.priority,
                 "-100 to 100, lower goes first; waiting makes up for it")
      ->group("Urgency");
  app.add_option("--timeout-ms", options.timeout_ms,
                 "The server gives the request up after this long, milliseconds")
      ->group("Urgency");
}

void add_output_options(CLI::App& app, OutputOptions& options) {
  app.add_flag("--json", options.json, "One JSON object when finished, instead of streamed text")
      ->group("Output");
  app.add_flag("--show-usage", options.show_usage, "Tokens, times and KV bytes on standard error")
      ->group("Output");
  app.add_flag("--show-kv", options.show_kv, "KV kept of each layer as a chart on standard error")
      ->group("Output");
}

Result<api::v1::SamplingParams> to_sampling_params(const SamplingOptions& options,
                                                   const OutputOptions& output) {
  if (options.logprobs && !output.json) {
    return invalid_argument("--logprobs needs --json");
  }
  api::v1::SamplingParams params;
  if (options.max_tokens) params.set_max_tokens(*options.max_tokens);
  if (options.min_tokens) params.set_min_tokens(*options.min_tokens);
  if (options.temperature) params.set_temperature(*options.temperature);
  if (options.top_k) params.set_top_k(*options.top_k);
  if (options.top_p) params.set_top_p(*options.top_p);
  if (options.min_p) params.set_min_p(*options.min_p);
  if (options.repetition_penalty) params.set_repetition_penalty(*options.repetition_penalty);
  if (options.presence_penalty) params.set_presence_penalty(*options.presence_penalty);
  if (options.frequency_penalty) params.set_frequency_penalty(*options.frequency_penalty);
  if (options.seed) params.set_seed(*options.seed);
  if (options.include_stop) params.set_include_stop_str_in_output(true);
  if (options.ignore_eos) params.set_ignore_eos(true);
  if (options.keep_special_tokens) params.set_skip_special_tokens(false);
  if (options.logprobs) params.set_logprobs(*options.logprobs);
  if (options.n) params.set_n(*options.n);
  for (const std::string& stop : options.stop) {
    if (Status status = check_utf8(stop, "--stop"); !status.ok()) {
      return status;
    }
    params.add_stop(stop);
  }
  for (const std::int32_t id : options.stop_token_ids) {
    params.add_stop_token_ids(id);
  }
  for (const std::string& entry : options.logit_bias) {
    const std::size_t colon = entry.find(':');
    std::int32_t token = 0;
    float bias = 0;
    if (colon == std::string::npos || !parse(std::string_view(entry).substr(0, colon), token) ||
        !parse(std::string_view(entry).substr(colon + 1), bias)) {
      return invalid_argument("--logit-bias must be TOKEN_ID:VALUE, got \"" + entry + "\"");
    }
    (*params.mutable_logit_bias())[token] = bias;
  }
  return params;
}

Status set_kv_fields(const KvOptions& options, api::v1::GenerateRequest& request) {
  if (Status status = check_utf8(options.profile, "--kv-policy"); !status.ok()) {
    return status;
  }
  if (Status status = check_utf8(options.session, "--session"); !status.ok()) {
    return status;
  }
  if (!options.profile.empty()) request.mutable_kv_policy()->set_profile(options.profile);
  if (options.ratio) request.mutable_kv_policy()->set_ratio(*options.ratio);
  if (options.max_bytes) request.mutable_kv_policy()->set_max_bytes(*options.max_bytes);
  request.set_session_id(options.session);
  request.set_keep_session(options.keep_session);
  return ok_status();
}

void set_urgency_fields(const UrgencyOptions& options, api::v1::GenerateRequest& request) {
  if (options.priority) request.set_priority(*options.priority);
  if (options.timeout_ms) request.set_timeout_ms(*options.timeout_ms);
}

Result<std::unique_ptr<api::TcpClient>> connect(const ConnectionOptions& options) {
  // Protobuf strings are UTF-8, and a server refuses others with an error about bytes.
  if (Status status = check_utf8(options.api_key, "the API key"); !status.ok()) {
    return status;
  }
  return api::TcpClient::connect(
      {.host = options.host, .port = options.port, .api_key = options.api_key},
      Deadline::after(to_ms(options.connect_timeout_s)));
}

}  // namespace spindle::cli
