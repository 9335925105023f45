#pragma once
// `spindle complete`: one prompt, one answer, streamed.

#include <CLI/CLI.hpp>
#include <string>

#include "ops/cli/options.h"

namespace spindle::cli {

struct CompleteOptions {
  ConnectionOptions connection;
  SamplingOptions sampling;
  KvOptions kv;
  UrgencyOptions urgency;
  OutputOptions output;
  std::string prompt;  // empty: from `file`, else from standard input
  std::string file;
  std::string model;
  std::string request_id;
};

void add_complete_options(CLI::App& app, CompleteOptions& options);
// Returns the exit code.
int run_complete(const CompleteOptions& options);

// One request on a connection of its own, with Ctrl-C as its cancel: streams the text of a single
// choice, and prints several one after the other when all are finished. Shared with `chat`.
api::GenerateOutcome run_request(api::TcpClient& client, api::v1::GenerateRequest request,
                                 int cancel_fd, const ConnectionOptions& connection,
                                 const OutputOptions& output);

}  // namespace spindle::cli
