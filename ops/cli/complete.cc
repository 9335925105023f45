#include "ops/cli/complete.h"

#include <unistd.h>

#include <utility>

#include "ops/cli/exit_codes.h"
#include "ops/cli/input.h"
#include "ops/cli/output.h"
#include "ops/cli/terminal.h"

namespace spindle::cli {
namespace {

Result<std::string> read_prompt(const CompleteOptions& options) {
  if (!options.file.empty()) {
    return read_text_file(options.file);
  }
  if (!options.prompt.empty() && options.prompt != "-") {
    if (Status status = check_utf8(options.prompt, "the prompt"); !status.ok()) {
      return status;
    }
    return options.prompt;
  }
  if (options.prompt.empty() && is_terminal(STDIN_FILENO)) {
    return invalid_argument("no prompt: give it as an argument, with --file, or on standard input");
  }
  return read_standard_input();
}

}  // namespace

void add_complete_options(CLI::App& app, CompleteOptions& options) {
  auto* prompt = app.add_option("prompt", options.prompt,
                                "The text to continue; - or nothing: standard input");
  app.add_option("--file", options.file, "Read the prompt from a file")
      ->type_name("FILE")
      ->excludes(prompt);
  app.add_option("--model", options.model, "Model id; default: the served model");
  app.add_option("--request-id", options.request_id, "Name of the request in the server's logs");
  add_output_options(app, options.output);
  add_sampling_options(app, options.sampling);
  add_kv_options(app, options.kv);
  add_urgency_options(app, options.urgency);
  add_connection_options(app, options.connection);
}

api::GenerateOutcome run_request(api::TcpClient& client, api::v1::GenerateRequest request,
                                 int cancel_fd, const ConnectionOptions& connection,
                                 const OutputOptions& output) {
  const bool stream = !output.json && request.sampling().n() <= 1;
  StreamPrinter printer;
  api::DeltaCallback on_delta;
  if (stream) {
    on_delta = [&printer](const api::v1::Delta& delta) { printer.print(delta.text()); };
  }
  api::GenerateOutcome outcome =
      client.generate(std::move(request), on_delta,
                      {.progress_timeout = connection.timeout(), .cancel_fd = cancel_fd});
  if (!stream && !output.json) {
    for (std::size_t i = 0; i < outcome.choices.size(); ++i) {
      printer.print("[" + std::to_string(i + 1) + "] " + outcome.choices[i].text + "\n");
    }
  }
  printer.end_line();
  return outcome;
}

int run_complete(const CompleteOptions& options) {
  Result<std::string> prompt = read_prompt(options);
  if (!prompt.ok()) {
    return report_usage_error(prompt.status());
  }
  Result<api::v1::SamplingParams> sampling = to_sampling_params(options.sampling, options.output);
  if (!sampling.ok()) {
    return report_usage_error(sampling.status());
  }
  api::v1::GenerateRequest request;
  request.set_model(options.model);
  request.set_request_id(options.request_id);
  request.set_text(std::move(*prompt));
  *request.mutable_sampling() = std::move(*sampling);
  if (const Status status = set_kv_fields(options.kv, request); !status.ok()) {
    return report_usage_error(status);
  }
  set_urgency_fields(options.urgency, request);

  Result<std::unique_ptr<api::TcpClient>> client = connect(options.connection);
  if (!client.ok()) {
    return report_connect_error(client.status(), options.connection);
  }
  const InterruptSignal interrupt;
  const api::GenerateOutcome outcome =
      run_request(**client, std::move(request), interrupt.fd(), options.connection, options.output);
  return report_outcome(outcome, (*client)->welcome().model(), options.output);
}

}  // namespace spindle::cli
