#include "ops/cli/chat.h"

#include <unistd.h>

#include <iostream>
#include <utility>

#include "ops/cli/complete.h"
#include "ops/cli/exit_codes.h"
#include "ops/cli/input.h"
#include "ops/cli/output.h"
#include "ops/cli/terminal.h"

namespace spindle::cli {
namespace {

constexpr const char* kHelp =
    "/reset  forget the conversation\n"
    "/quit   leave (or Ctrl-D)\n"
    "Ctrl-C  stop the running answer";

// The messages so far, and the request that sends them.
class Conversation {
 public:
  // `request` holds everything but the messages.
  Conversation(const ChatOptions& options, api::v1::GenerateRequest request, std::string document)
      : options_(options), request_(std::move(request)), document_(std::move(document)) {
    reset();
  }

  void reset() {
    chat_.Clear();
    if (!options_.system.empty()) {
      add("system", options_.system);
    }
    document_pending_ = !document_.empty();
  }

  api::v1::GenerateRequest ask(const std::string& message) {
    add("user", document_pending_ ? document_ + "\n\n" + message : message);
    api::v1::GenerateRequest request = request_;
    *request.mutable_chat() = chat_;
    return request;
  }

  // Keeps what the user saw of the answer; without an answer the question is forgotten too.
  void answered(const api::GenerateOutcome& outcome) {
    if (outcome.choices.empty() || outcome.choices[0].text.empty()) {
      if (!outcome.status.ok()) {
        chat_.mutable_messages()->RemoveLast();
        return;
      }
      add("assistant", "");
    } else {
      add("assistant", outcome.choices[0].text);
    }
    document_pending_ = false;
  }

 private:
  void add(const char* role, const std::string& content) {
    api::v1::ChatMessage& message = *chat_.add_messages();
    message.set_role(role);
    message.set_content(content);
  }

  const ChatOptions& options_;
  const api::v1::GenerateRequest request_;
  const std::string document_;
  api::v1::ChatPrompt chat_;
  bool document_pending_ = false;
};

int run_one_shot(const ChatOptions& options, Conversation& conversation) {
  Result<std::unique_ptr<api::TcpClient>> client = connect(options.connection);
  if (!client.ok()) {
    return report_connect_error(client.status(), options.connection);
  }
  const InterruptSignal interrupt;
  const api::GenerateOutcome outcome =
      run_request(**client, conversation.ask(options.message), interrupt.fd(), options.connection,
                  options.output);
  return report_outcome(outcome, (*client)->welcome().model(), options.output);
}

// Every message has a connection of its own, so that a user may think for as long as he likes and
// a server may restart in between.
void answer(const ChatOptions& options, Conversation& conversation,
            const InterruptSignal& interrupt, const std::string& message) {
  Result<std::unique_ptr<api::TcpClient>> client = connect(options.connection);
  if (!client.ok()) {
    report_connect_error(client.status(), options.connection);
    return;
  }
  interrupt.take();
  const api::GenerateOutcome outcome = run_request(
      **client, conversation.ask(message), interrupt.fd(), options.connection, options.output);
  interrupt.take();
  conversation.answered(outcome);
  report_outcome(outcome, (*client)->welcome().model(), options.output);
  if (!is_terminal(STDOUT_FILENO)) {
    std::cout << std::endl;  // in a pipe, answers are separated by the end of a line
  }
}

int run_interactive(const ChatOptions& options, Conversation& conversation) {
  const Style style(STDOUT_FILENO);
  const bool terminal = is_terminal(STDIN_FILENO) && is_terminal(STDOUT_FILENO);
  {
    const Result<std::unique_ptr<api::TcpClient>> client = connect(options.connection);
    if (!client.ok()) {
      return report_connect_error(client.status(), options.connection);
    }
    if (terminal) {
      std::cout << style.dim(printable((*client)->welcome().model()) + ", /help for help") << "\n";
    }
  }
  const InterruptSignal interrupt;
  LineReader reader(STDIN_FILENO, kMaxInputBytes);
  for (;;) {
    if (terminal) {
      std::cout << style.green("> ") << std::flush;
    }
    std::string line;
    switch (reader.read(interrupt, line)) {
      case LineReader::Outcome::kLine:
        break;
      case LineReader::Outcome::kInterrupted:
        std::cerr << "\n/quit or Ctrl-D to leave\n";
        continue;
      case LineReader::Outcome::kTooLong:
        return report_usage_error(
            too_large("a message may have " + std::to_string(kMaxInputBytes) + " bytes"));
      case LineReader::Outcome::kEnd:
        if (terminal) {
          std::cout << "\n";
        }
        return kExitOk;
    }
    if (line == "/quit") {
      return kExitOk;
    }
    if (line == "/reset") {
      conversation.reset();
      std::cerr << style.dim("(new conversation)") << "\n";
    } else if (line == "/help") {
      std::cerr << kHelp << "\n";
    } else if (line.starts_with('/')) {
      print_error("unknown command " + line + "; /help lists them");
    } else if (const Status status = check_utf8(line, "the message"); !status.ok()) {
      print_error(status.message());
    } else if (line.find_first_not_of(" \t\r") != std::string::npos) {
      answer(options, conversation, interrupt, line);
    }
  }
}

}  // namespace

void add_chat_options(CLI::App& app, ChatOptions& options) {
  app.add_option("--message", options.message, "Send one message, print the answer and leave");
  app.add_option("--file", options.file, "A document to put in front of the first message")
      ->type_name("FILE");
  app.add_option("--system", options.system, "System message");
  app.add_option("--model", options.model, "Model id; default: the served model");
  add_output_options(app, options.output);
  add_sampling_options(app, options.sampling);
  add_kv_options(app, options.kv);
  add_urgency_options(app, options.urgency);
  add_connection_options(app, options.connection);
}

int run_chat(const ChatOptions& options) {
  const bool interactive = options.message.empty();
  if (interactive && options.output.json) {
    return report_usage_error(invalid_argument("--json needs --message"));
  }
  if (interactive && options.sampling.n.value_or(1) != 1) {
    return report_usage_error(invalid_argument("--n needs --message: a conversation has one line"));
  }
  if (interactive && options.file == "-") {
    return report_usage_error(invalid_argument("--file - needs --message"));
  }
  Result<api::v1::SamplingParams> sampling = to_sampling_params(options.sampling, options.output);
  if (!sampling.ok()) {
    return report_usage_error(sampling.status());
  }
  for (const auto& [text, name] :
       {std::pair(options.system, "--system"), std::pair(options.message, "--message")}) {
    if (const Status status = check_utf8(text, name); !status.ok()) {
      return report_usage_error(status);
    }
  }
  api::v1::GenerateRequest request;
  request.set_model(options.model);
  *request.mutable_sampling() = std::move(*sampling);
  if (const Status status = set_kv_fields(options.kv, request); !status.ok()) {
    return report_usage_error(status);
  }
  set_urgency_fields(options.urgency, request);
  std::string document;
  if (!options.file.empty()) {
    Result<std::string> text = read_text_file(options.file);
    if (!text.ok()) {
      return report_usage_error(text.status());
    }
    document = std::move(*text);
  }
  Conversation conversation(options, std::move(request), std::move(document));
  return interactive ? run_interactive(options, conversation) : run_one_shot(options, conversation);
}

}  // namespace spindle::cli
