#include "ops/cli/eval_report.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <map>
#include <optional>
#include <set>

#include "ops/cli/eval_cells.h"
#include "ops/cli/eval_plot.h"

namespace spindle::cli {
namespace {

namespace json = boost::json;

// Bytes further than this from the target, in percent of the uncompressed ones, are marked: figures
// are compared at equal bytes only.
constexpr double kEqualBytes = 1.0;

std::optional<double> number(const json::object& row, std::string_view name) {
  const json::value* value = row.if_contains(name);
  if (value == nullptr || !value->is_number()) return std::nullopt;
  return value->to_number<double>();
}

std::string text(const json::object& row, std::string_view name) {
  const json::value* value = row.if_contains(name);
  return value != nullptr && value->is_string() ? std::string(value->as_string()) : "";
}

std::string format(const char* pattern, std::optional<double> value) {
  if (!value) return "-";
  std::array<char, 64> out;
  std::snprintf(out.data(), out.size(), pattern, *value);
  return out.data();
}

// Three significant digits, so that small divergences are seen.
std::string divergence(std::optional<double> value) { return format("%.3g", value); }

// A cell of a Markdown table.
std::string cell(std::string value) {
  std::string out;
  for (const char c : value) {
    if (c == '|') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out;
}

std::string line(const std::vector<std::string>& cells) {
  std::string out = "|";
  for (const std::string& value : cells) out += " " + cell(value) + " |";
  return out + "\n";
}

std::string header(const std::vector<std::string>& names) {
  std::string out = line(names) + "|---|";
  for (std::size_t i = 1; i < names.size(); ++i) out += "---:|";
  return out + "\n";
}

std::vector<const json::object*> of_regime(const json::array& rows, std::string_view regime) {
  std::vector<const json::object*> out;
  for (const json::value& row : rows) {
    if (text(row.as_object(), "regime") == regime) out.push_back(&row.as_object());
  }
  return out;
}

bool far_from_target(const json::object& row) {
  const auto real = number(row, "bytes_real");
  const auto target = number(row, "bytes_target");
  return real && target && std::abs(*real - *target) > kEqualBytes;
}

std::string main_table(const std::vector<const json::object*>& rows) {
  std::string out =
      header({"profile", "bytes asked %", "bytes real %", "macro %", "worst task %", "KL mean",
              "KL p95", "ppl change %", "ms per 1k tokens", "macro, all %", "answers"});
  for (const json::object* row : rows) {
    const std::string target = format("%.4g", number(*row, "bytes_target"));
    if (row->contains("refused") && !row->contains("macro")) {
      out += line({text(*row, "profile"), target, "refused: " + text(*row, "refused"), "", "", "",
                   "", "", "", "", ""});
      continue;
    }
    std::string name = text(*row, "profile");
    if (const auto refused = number(*row, "n_refused")) {
      name += " (" + number_text(*refused) + " records refused)";
    }
    out += line({name, target,
                 format("%.2f", number(*row, "bytes_real")) + (far_from_target(*row) ? " *" : ""),
                 format("%.1f", number(*row, "macro")), format("%.1f", number(*row, "worst_task")),
                 divergence(number(*row, "kl_mean")), divergence(number(*row, "kl_p95")),
                 format("%+.2f", number(*row, "ppl_change")),
                 format("%.2f", number(*row, "compress_ms_per_1k")),
                 format("%.1f", number(*row, "macro_all")), format("%.0f", number(*row, "n"))});
  }
  return out;
}

// Plain macro accuracy of each length.
std::string length_table(const std::vector<const json::object*>& rows) {
  std::set<std::string> lengths;
  for (const json::object* row : rows) {
    const json::value* by_length = row->if_contains("lengths");
    if (by_length == nullptr || !by_length->is_object()) continue;
    for (const auto& [length, value] : by_length->as_object()) lengths.insert(length);
  }
  if (lengths.size() < 2) return "";
  std::vector<std::string> names{"profile", "bytes asked %"};
  for (const std::string& length : lengths) names.push_back(length + " %");
  std::string out = "Macro accuracy over all tasks, by document length:\n\n" + header(names);
  for (const json::object* row : rows) {
    const json::value* by_length = row->if_contains("lengths");
    if (by_length == nullptr || !by_length->is_object()) continue;
    std::vector<std::string> cells{text(*row, "profile"),
                                   format("%.4g", number(*row, "bytes_target"))};
    for (const std::string& length : lengths) {
      const json::value* of_length = by_length->as_object().if_contains(length);
      cells.push_back(of_length != nullptr && of_length->is_object()
                          ? format("%.1f", number(of_length->as_object(), "macro"))
                          : "-");
    }
    out += line(cells);
  }
  return out + "\n";
}

// The groups are the same for every row; what each method answers there is in the JSON.
std::string excluded_table(const std::vector<const json::object*>& rows) {
  for (const json::object* row : rows) {
    const json::value* apart = row->if_contains("excluded");
    if (apart == nullptr || !apart->is_array() || apart->as_array().empty()) continue;
    std::string out =
        "Left out of the macro, because the uncompressed cache itself answers less than 95 % "
        "(`macro, all` has them):\n\n" +
        header({"task", "length", "uncompressed %", "answers"});
    for (const json::value& value : apart->as_array()) {
      if (!value.is_object()) continue;
      const json::object& group = value.as_object();
      out += line({text(group, "task"), text(group, "length"),
                   format("%.1f", number(group, "full")), format("%.0f", number(group, "n"))});
    }
    return out + "\n";
  }
  return "";
}

std::string prose_table(const json::array& rows) {
  std::string out;
  std::set<std::string> seen;
  for (const json::value& value : rows) {
    const json::object& row = value.as_object();
    const json::value* prose = row.if_contains("prose");
    const std::string name = text(row, "profile");
    const std::string target = format("%.4g", number(row, "bytes_target"));
    if (prose == nullptr || !prose->is_object() || !seen.insert(name + "/" + target).second) {
      continue;
    }
    for (const auto& [prefix, window] : prose->as_object()) {
      if (!window.is_object()) continue;
      out += line({name, target, std::string(prefix),
                   format("%.3f", number(window.as_object(), "ppl")),
                   format("%+.2f", number(window.as_object(), "ppl_change")),
                   format("%.0f", number(window.as_object(), "windows"))});
    }
  }
  if (out.empty()) return "";
  return "## Held-out prose\n\nPerplexity of the tokens after a compressed prefix, and its change "
         "against the uncompressed one.\n\n" +
         header({"profile", "bytes asked %", "prefix", "perplexity", "change %", "windows"}) + out +
         "\n";
}

std::string regime_title(const std::string& regime) {
  return regime == "qa" ? "QA: the document is compressed before any question is seen"
                        : "QW: document and question are compressed, the first answer is scored";
}

Series& series_of(std::vector<Series>& all, const std::string& name) {
  const auto it =
      std::find_if(all.begin(), all.end(), [&](const Series& s) { return s.name == name; });
  if (it != all.end()) return *it;
  all.push_back({.name = name, .points = {}});
  return all.back();
}

// A figure over the real bytes for each profile; the uncompressed cache is a level, not a line.
std::optional<std::string> chart(const std::vector<const json::object*>& rows, const char* field,
                                 ChartLabels labels) {
  std::vector<Series> all;
  for (const json::object* row : rows) {
    const auto value = number(*row, field);
    const auto bytes = number(*row, "bytes_real");
    if (!value || !bytes || *bytes <= 0) continue;
    if (text(*row, "profile") == "full") {
      labels.level = *value;
      continue;
    }
    series_of(all, text(*row, "profile")).points.emplace_back(*bytes, *value);
  }
  if (all.empty()) return std::nullopt;
  for (Series& series : all) std::sort(series.points.begin(), series.points.end());
  return line_chart(all, labels);
}

}  // namespace

Result<json::array> parse_rows(std::string_view content) {
  boost::system::error_code error;
  json::value value = json::parse({content.data(), content.size()}, error);
  if (error || !value.is_array()) return invalid_argument("not a list that spindle eval wrote");
  for (const json::value& row : value.as_array()) {
    if (!row.is_object() || text(row.as_object(), "profile").empty() ||
        text(row.as_object(), "regime").empty()) {
      return invalid_argument("not a list that spindle eval wrote");
    }
  }
  return std::move(value.as_array());
}

std::vector<Plot> report_plots(const json::array& rows) {
  std::vector<Plot> plots;
  const auto add = [&plots](const std::string& name, std::optional<std::string> svg) {
    if (svg) plots.emplace_back(name, *std::move(svg));
  };
  for (const std::string regime : {"qa", "qw"}) {
    const auto of = of_regime(rows, regime);
    std::string upper = regime == "qa" ? "QA" : "QW";
    add("quality-" + regime + ".svg", chart(of, "macro",
                                            {.title = upper + ": macro accuracy over KV bytes",
                                             .y = "macro accuracy, %",
                                             .y_from_zero = true}));
    add("kl-" + regime + ".svg", chart(of, "kl_mean",
                                       {.title = upper + ": divergence from the uncompressed cache",
                                        .y = "mean KL, nats",
                                        .y_from_zero = true}));
  }
  const auto qa = of_regime(rows, "qa");
  add("prose.svg", chart(qa.empty() ? of_regime(rows, "qw") : qa, "ppl_change",
                         {.title = "Held-out prose: perplexity over KV bytes",
                          .y = "change of perplexity, %",
                          .y_from_zero = false}));
  std::map<std::string, std::vector<double>> layers;
  for (const json::object* row : qa.empty() ? of_regime(rows, "qw") : qa) {
    const json::value* bytes = row->if_contains("layer_bytes");
    if (bytes == nullptr || !bytes->is_array() || text(*row, "profile") == "full") continue;
    std::vector<double> values;
    for (const json::value& value : bytes->as_array()) {
      values.push_back(value.is_number() ? value.to_number<double>() : 0);
    }
    if (values.empty()) continue;
    const auto target = number(*row, "bytes_target");
    const std::string profile = text(*row, "profile");
    const std::string name = target ? profile + "-" + format("%.4g", target) : profile;
    plots.emplace_back(
        "layers-" + name + ".svg",
        bar_chart(values, {.title = "KV bytes of each layer, " + name + (target ? " %" : ""),
                           .y = "% of the layer's uncompressed bytes",
                           .y_from_zero = true}));
  }
  return plots;
}

std::string report_text(const json::array& rows, const std::vector<std::string>& plots) {
  std::string out = "# Quality over KV bytes\n\n";
  if (!rows.empty()) {
    const json::object& row = rows[0].as_object();
    out += "Written by `spindle eval` from its JSON. Model " + text(row, "model") + ", server " +
           text(row, "server_version") + " on " + text(row, "device") + ", data " +
           text(row, "data") + ", " + format("%.0f", number(row, "n_records")) + " records.\n\n";
  }
  out +=
      "Macro is the mean over tasks of the share of right answers (every token of the answer and "
      "its end of turn is the most likely one, teacher-forced), over the groups of one task and "
      "length that the uncompressed cache answers to at least 95 %. KL is against the uncompressed "
      "cache, per answer token, in nats. Bytes are those held right after the compression, in "
      "percent of the uncompressed 16-bit ones. `*`: more than 1 point away from what was asked, "
      "so not to be compared at this target.\n\n";
  for (const std::string regime : {"qa", "qw"}) {
    const auto of = of_regime(rows, regime);
    if (of.empty()) continue;
    out += "## " + regime_title(regime) + "\n\n" + main_table(of) + "\n";
    out += length_table(of) + excluded_table(of);
  }
  out += prose_table(rows);
  if (!plots.empty()) out += "## Plots\n\n";
  for (const std::string& plot : plots) {
    const std::string name = plot.substr(plot.rfind('/') + 1);
    out += "![" + name.substr(0, name.rfind('.')) + "](" + plot + ")\n";
  }
  return out;
}

}  // namespace spindle::cli
