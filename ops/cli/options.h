#pragma once
// Options that the subcommands share, and what they become.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cluster/api/tcp_client.h"

namespace spindle::cli {

struct ConnectionOptions {
  std::string host = "127.0.0.1";
  std::uint16_t port = 8001;
  std::string api_key = {};
  double connect_timeout_s = 5;
  double timeout_s = 300;

  Deadline deadline() const;  // for one answer, from now
  std::chrono::milliseconds timeout() const;
};

// Unset: the model's generation_config.json, then the server's defaults.
struct SamplingOptions {
  std::optional<std::int32_t> max_tokens;
  std::optional<std::int32_t> min_tokens;
  std::optional<float> temperature;
  std::optional<std::int32_t> top_k;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<float> presence_penalty;
  std::optional<float> frequency_penalty;
  std::vector<std::string> logit_bias;  // "TOKEN_ID:VALUE"
  std::optional<std::uint64_t> seed;
  std::vector<std::string> stop;
  std::vector<std::int32_t> stop_token_ids;
  bool include_stop = false;
  bool ignore_eos = false;
  bool keep_special_tokens = false;
  std::optional<std::int32_t> logprobs;
  std::optional<std::int32_t> n;
};

// Unset: the server's default policy; no session.
struct KvOptions {
  std::string profile;
  std::optional<double> ratio;
  std::optional<std::uint64_t> max_bytes;
  std::string session;
  bool keep_session = false;
};

// Unset: no urgency, no limit.
struct UrgencyOptions {
  std::optional<std::int32_t> priority;
  std::optional<std::int64_t> timeout_ms;
};

struct OutputOptions {
  bool json = false;
  bool show_usage = false;
  bool show_kv = false;
};

// `port_help` says which of the server's ports --port is.
void add_connection_options(CLI::App& app, ConnectionOptions& options,
                            const char* port_help = "Server's TCP API port");
void add_sampling_options(CLI::App& app, SamplingOptions& options);
void add_kv_options(CLI::App& app, KvOptions& options);
void add_urgency_options(CLI::App& app, UrgencyOptions& options);
void add_output_options(CLI::App& app, OutputOptions& options);

// INVALID_ARGUMENT for what cannot be sent: a malformed --logit-bias, log-probabilities that nobody
// would see. Ranges are the server's to judge.
Result<api::v1::SamplingParams> to_sampling_params(const SamplingOptions& options,
                                                   const OutputOptions& output);

// INVALID_ARGUMENT for names that are no text. What a policy can be is the server's to judge.
Status set_kv_fields(const KvOptions& options, api::v1::GenerateRequest& request);

// What they can be is the server's to judge.
void set_urgency_fields(const UrgencyOptions& options, api::v1::GenerateRequest& request);

Result<std::unique_ptr<api::TcpClient>> connect(const ConnectionOptions& options);

}  // namespace spindle::cli
