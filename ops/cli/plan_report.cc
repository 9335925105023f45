#include "ops/cli/plan_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "ops/cli/output.h"

namespace spindle::cli {
namespace {

using coordinator::RequestSizing;
using coordinator::RequestUse;
using coordinator::StageSizing;
using Row = std::vector<std::string>;

std::string decimal(double value, int n) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", n, value);
  return text;
}

std::string percent(double share) { return decimal(100 * share, 1) + " %"; }

std::string bytes_text(std::int64_t bytes) {
  return format_bytes(static_cast<std::uint64_t>(std::max<std::int64_t>(bytes, 0)));
}

std::string layers_text(const coordinator::LayerRange& layers) {
  const std::string first = std::to_string(layers.first);
  return layers.count == 1 ? first : first + "-" + std::to_string(layers.first + layers.count - 1);
}

// The first column to the left, the others to the right, two spaces apart.
std::string align(const std::vector<Row>& rows) {
  std::vector<std::size_t> widths;
  for (const Row& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string out;
  for (const Row& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string space(widths[i] - row[i].size(), ' ');
      line += i == 0 ? row[i] + space : "  " + space + row[i];
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

bool on_gpu(const PlanQuestion& question) {
  return question.cluster.settings.device == coordinator::ComputeDevice::kCuda;
}

std::string device_memory_text(const PlanQuestion& question) {
  const auto& stated = question.cluster.settings.device_memory_bytes;
  std::vector<std::uint64_t> memory;
  for (std::size_t i = 0; i < question.cluster.devices.size(); ++i) {
    memory.push_back(stated.empty()
                         ? question.cluster.devices[i].total_bytes
                         : static_cast<std::uint64_t>(stated[stated.size() == 1 ? 0 : i]));
  }
  if (std::all_of(memory.begin(), memory.end(), [](std::uint64_t m) { return m == 0; })) {
    return "memory not stated";
  }
  const bool alike = std::equal(memory.begin() + 1, memory.end(), memory.begin());
  std::string text;
  for (const std::uint64_t bytes : memory) {
    text += (text.empty() ? "" : ", ") + format_bytes(bytes);
    if (alike) break;
  }
  if (alike && memory.size() > 1) text += " each";
  if (on_gpu(question) && stated.empty()) {
    text += ", " + decimal(100 * question.cluster.settings.gpu_memory_utilization, 0) +
            " % of it to be used";
  }
  return text;
}

std::string header_text(const PlanQuestion& question, const PlanAnswer& answer) {
  const coordinator::ModelShape& model = question.cluster.model;
  const coordinator::ClusterSettings& settings = question.cluster.settings;
  const std::size_t n = question.cluster.devices.size();
  std::string text = question.model_name + ": " + std::to_string(model.n_layers) +
                     " layers, hidden " + std::to_string(model.hidden_size) + ", " +
                     std::to_string(model.n_heads) + "/" + std::to_string(model.n_kv_heads) +
                     " heads of " + std::to_string(model.head_dim) + "; " +
                     decimal(static_cast<double>(question.n_weights) / 1e9, 2) +
                     " billion weights, " + format_bytes(question.checkpoint_bytes) + "\n";
  text += std::to_string(n) + (on_gpu(question) ? " GPU" : " CPU rank") + (n == 1 ? "" : "s") +
          ": " + device_memory_text(question) + "\n";
  text += "max_model_len " + std::to_string(answer.cluster.max_model_len) + ", max_num_seqs " +
          std::to_string(settings.max_num_seqs) + ", max_num_batched_tokens " +
          std::to_string(settings.max_num_batched_tokens) + ", KV in " +
          std::string(dtype_name(settings.kv_dtype)) + "\n";
  return text;
}

std::string memory_table(const PlanQuestion& question, const PlanAnswer& answer) {
  const bool gpu = on_gpu(question);
  Row head{"stage", "layers", "time", "memory", "weights", "workspace"};
  if (gpu) head.emplace_back("scratch~");
  head.insert(head.end(), {gpu ? "KV pool~" : "KV pool", "KV per token", "tokens"});
  std::vector<Row> rows{head};
  for (std::size_t i = 0; i < answer.cluster.stages.size(); ++i) {
    const StageSizing& stage = answer.cluster.stages[i];
    const coordinator::StagePrediction& predicted = stage.predicted;
    Row row{std::to_string(i),
            layers_text(predicted.layers),
            percent(predicted.time_share),
            stage.memory_bytes > 0 ? bytes_text(stage.memory_bytes) : "-",
            bytes_text(predicted.weight_bytes),
            bytes_text(stage.workspace_bytes)};
    if (gpu) row.push_back(bytes_text(stage.scratch_bytes));
    row.push_back(format_bytes(stage.kv_pool_bytes));
    row.push_back(format_bytes(stage.kv_bytes_per_token));
    row.push_back(std::to_string(stage.kv_pool_bytes / stage.kv_bytes_per_token));
    rows.push_back(std::move(row));
  }
  return align(rows);
}

// How evenly a step's time is spread; nothing for one stage.
std::string balance_text(const PlanAnswer& answer) {
  const std::size_t n = answer.cluster.stages.size();
  if (n == 1) return "";
  const auto slowest = static_cast<std::size_t>(answer.cluster.slowest);
  return "stage " + std::to_string(slowest) + " is the slowest, with " +
         percent(answer.cluster.stages[slowest].predicted.time_share) +
         " of the time; an equal share is " + percent(1.0 / static_cast<double>(n)) + "\n";
}

double kept_share(const PlanAnswer& answer, const RequestSizing& requests, std::int64_t n_prompt) {
  std::uint64_t bytes = 0;
  for (const RequestUse& use : requests.stages) bytes += use.prompt_bytes;
  return static_cast<double>(bytes) /
         static_cast<double>(kvstore::full_bytes(answer.cluster.kv_model, n_prompt));
}

std::string limit_text(const PlanQuestion& question, const PlanAnswer& answer,
                       const RequestSizing& requests) {
  if (requests.limiting_stage >= 0) {
    if (answer.cluster.stages.size() == 1) return "limited by its KV pool";
    return "limited by the KV pool of stage " + std::to_string(requests.limiting_stage);
  }
  const std::int64_t by_kv = *std::min_element(requests.fitting.begin(), requests.fitting.end());
  return "limited by max_num_seqs " + std::to_string(question.cluster.settings.max_num_seqs) +
         "; the KV pools have room for " + std::to_string(by_kv);
}

std::string profile_text(const PlanQuestion& question) {
  const kvstore::KvPolicy& policy = question.kind.policy;
  std::string text = "profile " + std::string(kvstore::profile_name(policy.profile));
  if (policy.ratio > 0) text += " at " + decimal(100 * policy.ratio, 1) + " %";
  if (policy.max_bytes > 0) text += " of at most " + format_bytes(policy.max_bytes);
  return text;
}

std::string request_table(const PlanQuestion& question, const PlanAnswer& answer,
                          const RequestSizing& requests, const std::string& name) {
  const std::uint64_t page = answer.cluster.shape.page_bytes();
  const auto pages = [page](std::int64_t n) {
    return format_bytes(static_cast<std::uint64_t>(n) * page);
  };
  std::vector<Row> rows{{"stage", "at admission", "prompt", "after prompt", "at the end",
                         "with room to grow", "requests"}};
  for (std::size_t i = 0; i < requests.stages.size(); ++i) {
    const RequestUse& use = requests.stages[i];
    rows.push_back({std::to_string(i), pages(use.admission_pages), pages(use.prefill_pages),
                    format_bytes(use.prompt_bytes), format_bytes(use.final_bytes),
                    pages(use.held_pages), std::to_string(requests.fitting[i])});
  }
  return name + ": " + std::to_string(requests.concurrency) + " at once, " +
         limit_text(question, answer, requests) + "\n" + align(rows);
}

std::string notes_text(const PlanQuestion& question, const PlanAnswer& answer) {
  std::string text;
  const bool estimates = std::any_of(answer.cluster.stages.begin(), answer.cluster.stages.end(),
                                     [](const StageSizing& s) { return s.pool_is_estimate; });
  if (estimates) {
    text += "~ counted; the server measures what is free when weights and workspace are there.\n";
  }
  if (answer.full && question.kind.policy.profile == kvstore::KvProfile::kSpindle &&
      !question.table) {
    text += "No calibrated table (--profile-table): heads are taken as alike.\n";
  }
  if (!on_gpu(question) && answer.cluster.stages.front().memory_bytes == 0 &&
      question.cluster.settings.kv_bytes.empty()) {
    text +=
        "Memory is not stated: pools are what max_num_seqs sequences of full length take; the\n"
        "server takes at most half of what is free on its host.\n";
  }
  return text.empty() ? text : "\n" + text;
}

std::string concurrency_text(const PlanQuestion& question, const PlanAnswer& answer,
                             std::int64_t wanted) {
  const std::string begin = "\n--concurrency " + std::to_string(wanted);
  if (!answer.remedies) return begin + ": fits\n";
  std::string text = begin + ": does not fit";
  const bool by_kv =
      *std::min_element(answer.requests.fitting.begin(), answer.requests.fitting.end()) < wanted;
  const bool by_number = answer.remedies->max_num_seqs.has_value();
  if (by_number) text += "; it needs --max-num-seqs " + std::to_string(wanted);
  if (!by_kv) return text + "\n";
  if (answer.remedies->none()) {
    return text + "; no single change of those that were tried is enough\n";
  }
  text += by_number ? " and any one of these:\n" : "; any one of these is enough:\n";
  return text + remedies_text(question, *answer.remedies);
}

boost::json::array request_stages_json(const PlanAnswer& answer, const RequestSizing& requests) {
  const std::uint64_t page = answer.cluster.shape.page_bytes();
  boost::json::array stages;
  for (std::size_t i = 0; i < requests.stages.size(); ++i) {
    const RequestUse& use = requests.stages[i];
    stages.push_back(boost::json::object{
        {"admission_bytes", static_cast<std::uint64_t>(use.admission_pages) * page},
        {"prefill_peak_bytes", static_cast<std::uint64_t>(use.prefill_pages) * page},
        {"after_prompt_bytes", use.prompt_bytes},
        {"final_bytes", use.final_bytes},
        {"held_bytes", static_cast<std::uint64_t>(use.held_pages) * page},
        {"requests", requests.fitting[i]}});
  }
  return stages;
}

boost::json::object requests_json(const PlanAnswer& answer, const RequestSizing& requests,
                                  coordinator::RequestKind kind) {
  boost::json::object object{
      {"profile", kvstore::profile_name(kind.policy.profile)},
      {"concurrency", requests.concurrency},
      {"limited_by", requests.limiting_stage < 0 ? "max_num_seqs" : "kv_pool"},
      {"kept_share", kept_share(answer, requests, kind.prompt_tokens)},
      {"stages", request_stages_json(answer, requests)}};
  if (kind.policy.ratio > 0) object["ratio"] = kind.policy.ratio;
  if (requests.limiting_stage >= 0) object["limiting_stage"] = requests.limiting_stage;
  boost::json::array boundaries;
  const std::uint64_t page = answer.cluster.shape.page_bytes();
  for (const auto& use : coordinator::boundary_uses(answer.cluster, kind, requests.plan)) {
    boost::json::array bytes;
    boost::json::array held;
    for (std::size_t s = 0; s < use.bytes.size(); ++s) {
      bytes.emplace_back(use.bytes[s]);
      held.emplace_back(static_cast<std::uint64_t>(use.held_pages[s]) * page);
    }
    boundaries.push_back(boost::json::object{
        {"tokens", use.n_tokens}, {"bytes", std::move(bytes)}, {"held_bytes", std::move(held)}});
  }
  object["boundaries"] = std::move(boundaries);
  return object;
}

boost::json::array stages_json(const PlanAnswer& answer) {
  boost::json::array stages;
  for (std::size_t i = 0; i < answer.cluster.stages.size(); ++i) {
    const StageSizing& stage = answer.cluster.stages[i];
    stages.push_back(
        boost::json::object{{"stage", i},
                            {"first_layer", stage.predicted.layers.first},
                            {"n_layers", stage.predicted.layers.count},
                            {"time_share", stage.predicted.time_share},
                            {"memory_bytes", stage.memory_bytes},
                            {"weight_bytes", stage.predicted.weight_bytes},
                            {"workspace_bytes", stage.workspace_bytes},
                            {"scratch_bytes", stage.scratch_bytes},
                            {"kv_pool_bytes", stage.kv_pool_bytes},
                            {"kv_pool_is_estimate", stage.pool_is_estimate},
                            {"kv_bytes_per_token", stage.kv_bytes_per_token},
                            {"kv_tokens", stage.kv_pool_bytes / stage.kv_bytes_per_token}});
  }
  return stages;
}

}  // namespace

std::string plan_text(const PlanQuestion& question, const PlanAnswer& answer,
                      std::optional<std::int64_t> concurrency) {
  std::string text =
      header_text(question, answer) + "\n" + memory_table(question, answer) + balance_text(answer);
  text += "\nKV of one request, " + std::to_string(question.kind.prompt_tokens) +
          " tokens of prompt and " + std::to_string(question.kind.output_tokens) + " of output\n\n";
  std::string name = answer.full ? profile_text(question) : "profile full";
  if (answer.full) {
    name +=
        ", " + percent(kept_share(answer, answer.requests, question.kind.prompt_tokens)) + " kept";
  }
  text += request_table(question, answer, answer.requests, name);
  if (answer.full) text += "\n" + request_table(question, answer, *answer.full, "profile full");
  text += notes_text(question, answer);
  if (concurrency) text += concurrency_text(question, answer, *concurrency);
  return text;
}

boost::json::object plan_json(const PlanQuestion& question, const PlanAnswer& answer,
                              std::optional<std::int64_t> concurrency) {
  const coordinator::ModelShape& model = question.cluster.model;
  const coordinator::ClusterSettings& settings = question.cluster.settings;
  coordinator::RequestKind kind = question.kind;
  kind.table = question.table ? &*question.table : nullptr;
  boost::json::object object{
      {"model", boost::json::object{{"name", question.model_name},
                                    {"n_layers", model.n_layers},
                                    {"n_weights", question.n_weights},
                                    {"checkpoint_bytes", question.checkpoint_bytes}}},
      {"device", on_gpu(question) ? "cuda" : "cpu"},
      {"max_model_len", answer.cluster.max_model_len},
      {"max_num_seqs", settings.max_num_seqs},
      {"max_num_batched_tokens", settings.max_num_batched_tokens},
      {"kv_dtype", dtype_name(settings.kv_dtype)},
      {"prompt_tokens", kind.prompt_tokens},
      {"output_tokens", kind.output_tokens},
      {"slowest_stage", answer.cluster.slowest},
      {"stages", stages_json(answer)},
      {"requests", requests_json(answer, answer.requests, kind)}};
  if (answer.full) {
    kind.policy = {};
    kind.table = nullptr;
    object["full"] = requests_json(answer, *answer.full, kind);
  }
  if (concurrency) {
    boost::json::object wanted{{"wanted", *concurrency}, {"fits", !answer.remedies}};
    if (answer.remedies) wanted["would_fit"] = remedies_json(*answer.remedies);
    object["concurrency"] = std::move(wanted);
  }
  return object;
}

std::string remedies_text(const PlanQuestion& question, const PlanRemedies& remedies) {
  std::string text;
  if (remedies.device_memory) {
    const std::vector<std::uint64_t>& memory = *remedies.device_memory;
    const bool alike = std::equal(memory.begin() + 1, memory.end(), memory.begin());
    text += "  " + std::string(alike && on_gpu(question) ? "--gpu-memory " : "--device-memory ");
    for (std::size_t i = 0; i < memory.size(); ++i) {
      if (i > 0 && alike) break;
      text += (i == 0 ? "" : ",") + std::to_string((memory[i] + (1U << 20U) - 1) >> 20U) + "MiB";
    }
    text += "\n";
  }
  if (remedies.n_devices) {
    text += std::string("  ") + (on_gpu(question) ? "--gpus " : "--ranks ") +
            std::to_string(*remedies.n_devices) + "\n";
  }
  if (remedies.max_model_len) {
    text += "  --max-model-len " + std::to_string(*remedies.max_model_len) + "\n";
  }
  if (remedies.ratio) text += "  --ratio " + decimal(*remedies.ratio, 3) + "\n";
  return text;
}

boost::json::object remedies_json(const PlanRemedies& remedies) {
  boost::json::object object;
  if (remedies.device_memory) {
    boost::json::array memory;
    for (const std::uint64_t bytes : *remedies.device_memory) memory.emplace_back(bytes);
    object["device_memory_bytes"] = std::move(memory);
  }
  if (remedies.n_devices) object["n_devices"] = *remedies.n_devices;
  if (remedies.max_model_len) object["max_model_len"] = *remedies.max_model_len;
  if (remedies.ratio) object["ratio"] = *remedies.ratio;
  if (remedies.max_num_seqs) object["max_num_seqs"] = *remedies.max_num_seqs;
  return object;
}

}  // namespace spindle::cli
