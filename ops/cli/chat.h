#pragma once
// `spindle chat`: a conversation, or one message of it.

#include <CLI/CLI.hpp>
#include <string>

#include "ops/cli/options.h"

namespace spindle::cli {

struct ChatOptions {
  ConnectionOptions connection;
  SamplingOptions sampling;
  KvOptions kv;
  UrgencyOptions urgency;
  OutputOptions output;
  std::string system;
  std::string message;  // empty: interactive
  std::string file;     // a document in front of the (first) message
  std::string model;
};

void add_chat_options(CLI::App& app, ChatOptions& options);
// Returns the exit code. An interactive conversation ends with kExitOk whatever happened in it,
// except that a server that cannot be reached at its start is kExitCannotConnect.
int run_chat(const ChatOptions& options);

}  // namespace spindle::cli
