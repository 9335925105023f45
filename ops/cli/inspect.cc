#include "ops/cli/inspect.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "ops/cli/exit_codes.h"
#include "ops/cli/input.h"
#include "ops/cli/output.h"
#include "ops/cli/terminal.h"

namespace spindle::cli {
namespace {

namespace json = boost::json;
using Row = std::vector<std::string>;
using Heads = std::vector<const api::v1::KvHeadKept*>;

Result<std::string> read_prompt(const InspectOptions& options) {
  if (!options.file.empty()) {
    std::error_code error;
    if (std::filesystem::is_regular_file(options.file, error)) return read_text_file(options.file);
    if (Status status = check_utf8(options.file, "the prompt"); !status.ok()) return status;
    return options.file;
  }
  if (!options.prompt.empty() && options.prompt != "-") {
    if (Status status = check_utf8(options.prompt, "the prompt"); !status.ok()) return status;
    return options.prompt;
  }
  if (options.prompt.empty() && is_terminal(STDIN_FILENO)) {
    return invalid_argument("no prompt: give it as an argument, with --file, or on standard input");
  }
  return read_standard_input();
}

std::string format(const char* pattern, std::optional<double> value) {
  if (!value) return "-";
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), pattern, *value);
  return text.data();
}

std::string percent(std::uint64_t part, std::uint64_t whole) {
  if (whole == 0) return "-";
  return format("%.1f%%", 100.0 * static_cast<double>(part) / static_cast<double>(whole));
}

// Mean of a figure over the heads that have it.
template <typename Has, typename Get>
std::optional<double> mean_of(const Heads& heads, Has has, Get get) {
  double sum = 0;
  int n = 0;
  for (const api::v1::KvHeadKept* head : heads) {
    if (!(head->*has)()) continue;
    sum += (head->*get)();
    ++n;
  }
  return n == 0 ? std::nullopt : std::optional<double>(sum / n);
}

// "EVICT lloyd4/lloyd4" for all heads, or each different plan with its heads: "0: FULL raw/raw, 1:
// EVICT int4/int4".
std::string plans_of(const Heads& heads) {
  const bool same = std::all_of(heads.begin(), heads.end(),
                                [&](const auto* head) { return head->plan() == heads[0]->plan(); });
  if (same) return heads[0]->plan();
  std::vector<std::pair<std::string, std::string>> plans;  // plan, heads
  for (const api::v1::KvHeadKept* head : heads) {
    const auto it = std::find_if(plans.begin(), plans.end(),
                                 [&](const auto& plan) { return plan.first == head->plan(); });
    const std::string name = std::to_string(head->kv_head());
    it == plans.end() ? void(plans.emplace_back(head->plan(), name))
                      : void(it->second += "," + name);
  }
  std::string text;
  for (const auto& [plan, names] : plans) {
    text += (text.empty() ? "" : "; ") + names + ": " + plan;
  }
  return text;
}

std::string kept_of(const Heads& heads) {
  const auto [least, most] = std::minmax_element(
      heads.begin(), heads.end(),
      [](const auto* a, const auto* b) { return a->kept_tokens() < b->kept_tokens(); });
  const std::string low = std::to_string((*least)->kept_tokens());
  const std::string high = std::to_string((*most)->kept_tokens());
  return low == high ? low : low + "-" + high;
}

Row row_of(const std::string& name, const Heads& heads, std::uint64_t full_bytes) {
  using Head = api::v1::KvHeadKept;
  std::uint64_t bytes = 0;
  for (const Head* head : heads) bytes += head->bytes();
  return {
      name,
      format("%.3f", mean_of(heads, &Head::has_lazy_mass, &Head::lazy_mass)),
      format("%.3f", mean_of(heads, &Head::has_k_entries_per_token, &Head::k_entries_per_token)),
      format("%.3f", mean_of(heads, &Head::has_v_entries_per_token, &Head::v_entries_per_token)),
      kept_of(heads),
      format_bytes(bytes),
      percent(bytes, full_bytes),
      plans_of(heads)};
}

// Columns as wide as they need to be: the first and the last to the left, figures to the right.
std::string align(const std::vector<Row>& rows) {
  std::vector<std::size_t> widths(rows[0].size(), 0);
  for (const Row& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string out;
  for (const Row& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string room(widths[i] - row[i].size(), ' ');
      const bool left = i == 0 || i + 1 == row.size();
      line += (i == 0 ? "" : "  ") + (left ? row[i] + room : room + row[i]);
    }
    out += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  return out;
}

std::string boundary_table(const api::v1::KvBoundary& boundary, bool by_head) {
  std::string out = "after " + std::to_string(boundary.position()) +
                    " tokens: " + format_bytes(boundary.kept_bytes()) + " of " +
                    format_bytes(boundary.full_bytes()) + " kept (" +
                    percent(boundary.kept_bytes(), boundary.full_bytes()) + "), compressed in " +
                    format("%.1f", boundary.compress_ms()) + " ms\n\n";
  std::map<std::pair<int, int>, Heads> groups;  // by layer, and head when asked for
  for (const api::v1::KvHeadKept& head : boundary.heads()) {
    groups[{head.layer(), by_head ? head.kv_head() : 0}].push_back(&head);
  }
  if (groups.empty()) return out + "The server sent no figures of single heads.\n";
  // The uncompressed bytes are the same for every layer and head.
  const std::uint64_t full = boundary.full_bytes() / groups.size();
  std::vector<Row> rows{{by_head ? "head" : "layer", "lazy mass", "K entries", "V entries",
                         "tokens kept", "bytes", "of full",
                         by_head ? "plan" : "plan (by KV head)"}};
  for (const auto& [key, heads] : groups) {
    std::string name = std::to_string(key.first);
    if (by_head) name += "." + std::to_string(key.second);
    rows.push_back(row_of(name, heads, full));
  }
  return out + align(rows);
}

}  // namespace

std::string inspect_table(const api::v1::Usage& usage, bool heads) {
  if (usage.boundaries().empty()) {
    return "Nothing was compressed: the policy is \"full\", or the prompt of " +
           std::to_string(usage.prompt_tokens()) + " tokens is too short.\n";
  }
  std::string out;
  for (const api::v1::KvBoundary& boundary : usage.boundaries()) {
    out += (out.empty() ? "" : "\n") + boundary_table(boundary, heads);
  }
  return out;
}

json::object inspect_json(const api::v1::Usage& usage) {
  json::array boundaries;
  for (const api::v1::KvBoundary& boundary : usage.boundaries()) {
    json::array heads;
    for (const api::v1::KvHeadKept& head : boundary.heads()) {
      json::object entry{{"layer", head.layer()},
                         {"kv_head", head.kv_head()},
                         {"plan", head.plan()},
                         {"kept_tokens", head.kept_tokens()},
                         {"bytes", head.bytes()}};
      if (head.has_lazy_mass()) entry["lazy_mass"] = head.lazy_mass();
      if (head.has_k_entries_per_token()) entry["k_entries_per_token"] = head.k_entries_per_token();
      if (head.has_v_entries_per_token()) entry["v_entries_per_token"] = head.v_entries_per_token();
      heads.push_back(std::move(entry));
    }
    boundaries.push_back(json::object{{"position", boundary.position()},
                                      {"full_bytes", boundary.full_bytes()},
                                      {"kept_bytes", boundary.kept_bytes()},
                                      {"compress_ms", boundary.compress_ms()},
                                      {"heads", std::move(heads)}});
  }
  return {{"prompt_tokens", usage.prompt_tokens()}, {"boundaries", std::move(boundaries)}};
}

void add_inspect_options(CLI::App& app, InspectOptions& options) {
  auto* prompt = app.add_option("text", options.prompt, "The text; - or nothing: standard input");
  app.add_option("--prompt", options.file, "A file with the text, or the text itself")
      ->type_name("FILE|TEXT")
      ->excludes(prompt);
  app.add_flag("--chat", options.chat, "The text is a user's message");
  app.add_flag("--heads", options.heads, "One line per KV head instead of one per layer");
  app.add_flag("--json", options.json, "One JSON object, sizes in bytes");
  add_kv_options(app, options.kv);
  add_connection_options(app, options.connection);
}

int run_inspect(const InspectOptions& options) {
  Result<std::string> prompt = read_prompt(options);
  if (!prompt.ok()) return report_usage_error(prompt.status());
  api::v1::GenerateRequest request;
  if (options.chat) {
    api::v1::ChatMessage& message = *request.mutable_chat()->add_messages();
    message.set_role("user");
    message.set_content(*std::move(prompt));
  } else {
    request.set_text(*std::move(prompt));
  }
  // A request that ends with the prompt's first token has no use for a compressed prompt.
  request.mutable_sampling()->set_max_tokens(2);
  request.mutable_sampling()->set_ignore_eos(true);
  if (const Status status = set_kv_fields(options.kv, request); !status.ok()) {
    return report_usage_error(status);
  }
  Result<std::unique_ptr<api::TcpClient>> client = connect(options.connection);
  if (!client.ok()) return report_connect_error(client.status(), options.connection);
  const InterruptSignal interrupt;
  const api::GenerateOutcome outcome = (*client)->generate(
      std::move(request), {},
      {.progress_timeout = options.connection.timeout(), .cancel_fd = interrupt.fd()});
  if (outcome.status.code() == StatusCode::kCancelled) return kExitInterrupted;
  if (!outcome.status.ok()) {
    print_error(error_text(outcome));
    return kExitRequestFailed;
  }
  if (options.json) {
    std::cout << inspect_json(outcome.usage) << std::endl;
  } else {
    const std::string table = inspect_table(outcome.usage, options.heads);
    std::cout << (is_terminal(STDOUT_FILENO) ? printable(table) : table) << std::flush;
  }
  return kExitOk;
}

}  // namespace spindle::cli
