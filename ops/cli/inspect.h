#pragma once
// `spindle inspect`: what the cluster keeps of one prompt, layer by layer.

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <string>

#include "cluster/api/tcp_client.h"
#include "ops/cli/options.h"

namespace spindle::cli {

struct InspectOptions {
  ConnectionOptions connection;
  KvOptions kv;
  std::string prompt;  // empty: from `file`, else from standard input
  std::string file;    // or a text, when there is no such file
  bool chat = false;
  bool heads = false;
  bool json = false;
};

void add_inspect_options(CLI::App& app, InspectOptions& options);
// Returns the exit code.
int run_inspect(const InspectOptions& options);

// The table for people: for each boundary a line per layer, or per head.
std::string inspect_table(const api::v1::Usage& usage, bool heads);
// {"prompt_tokens", "boundaries": [{"position", "full_bytes", ..., "heads": [...]}]}
boost::json::object inspect_json(const api::v1::Usage& usage);

}  // namespace spindle::cli
