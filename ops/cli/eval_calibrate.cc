#include "ops/cli/eval_calibrate.h"

#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cstdlib>

#include "ops/cli/eval_score.h"

namespace spindle::cli {
namespace {

struct Option {
  std::string name;
  std::string codec;        // or
  std::int64_t window = 0;  // STREAM
};

std::vector<Option> all_options() {
  std::vector<Option> options;
  for (int bits = 1; bits <= 4; ++bits) {
    const std::string n = std::to_string(bits);
    options.push_back({.name = "k" + n, .codec = "lloyd" + n + "/raw"});
  }
  for (int bits = 1; bits <= 4; ++bits) {
    const std::string n = std::to_string(bits);
    options.push_back({.name = "v" + n, .codec = "raw/lloyd" + n});
  }
  options.push_back({.name = "int4", .codec = "int4"});
  options.push_back({.name = "codebook", .codec = "codebook"});
  for (const std::int64_t window : {64, 256}) {
    options.push_back({.name = "window" + std::to_string(window), .codec = "", .window = window});
  }
  return options;
}

std::string key_of(int layer, int kv_head, const std::string& option) {
  return std::to_string(layer) + "." + std::to_string(kv_head) + "/" + option;
}

// As many digits as a calibration can mean.
double rounded(double value) { return std::strtod(number_text(value).c_str(), nullptr); }

// All results of one cell.
Result<std::vector<const CellResult*>> results_of(const std::string& cell,
                                                  const std::vector<std::string>& items,
                                                  const Results& results) {
  std::vector<const CellResult*> out;
  for (const std::string& item : items) {
    const auto it = results.find({item, cell});
    if (it == results.end()) return not_found("no result of " + item + " in " + cell);
    if (!it->second.refused.empty()) {
      return invalid_argument("the server refused " + cell + ": " + it->second.refused);
    }
    // An override that the server does not know would pass for one without any error.
    if (it->second.compressed_tokens == 0) {
      return invalid_argument("the server compressed nothing for " + cell + " of " + item +
                              ": it does not take overrides, or the document is too short");
    }
    out.push_back(&it->second);
  }
  return out;
}

double error_of(const std::vector<const CellResult*>& results) {
  std::vector<double> means;
  for (const CellResult* result : results) means.push_back(mean(result->kl));
  return rounded((mean(means) + percentile(means, 100)) / 2);
}

// Entries per token, at most 1; 1 where the server did not use a codebook.
double entries_of(const std::vector<const CellResult*>& results, double CellResult::*field) {
  std::vector<double> values;
  for (const CellResult* result : results) {
    values.push_back(result->*field > 0 ? std::min(result->*field, 1.0) : 1.0);
  }
  return rounded(mean(values));
}

Status fill_head(const std::vector<std::string>& items, const Results& results,
                 profile::Head& head) {
  for (const Option& option : all_options()) {
    const auto of = results_of(key_of(head.layer(), head.kv_head(), option.name), items, results);
    if (!of.ok()) return of.status();
    const double error = error_of(*of);
    if (option.name[0] == 'k') {
      head.add_k_bits(error);
    } else if (option.name[0] == 'v') {
      head.add_v_bits(error);
    } else if (option.name == "int4") {
      head.set_int4(error);
    } else if (option.name == "codebook") {
      head.set_codebook(error);
      head.set_codebook_k_entries(entries_of(*of, &CellResult::k_entries));
      head.set_codebook_v_entries(entries_of(*of, &CellResult::v_entries));
    } else if (option.window == 64) {
      head.set_window64(error);
    } else {
      head.set_window256(error);
    }
  }
  return ok_status();
}

}  // namespace

std::vector<Cell> calibration_cells(int n_layers, int n_kv_heads) {
  std::vector<Cell> cells;
  for (int layer = 0; layer < n_layers; ++layer) {
    for (int kv_head = 0; kv_head < n_kv_heads; ++kv_head) {
      for (const Option& option : all_options()) {
        Cell cell = full_cell();
        cell.key = key_of(layer, kv_head, option.name);
        api::v1::KvOverride& change = *cell.policy.add_overrides();
        change.set_first_layer(layer);
        change.set_kv_head(kv_head);
        if (option.window > 0) {
          change.set_mode("stream");
          change.set_window(option.window);
        } else {
          change.set_codec(option.codec);
        }
        cells.push_back(std::move(cell));
      }
    }
  }
  return cells;
}

Result<profile::Profile> calibration_table(const std::string& model, int n_layers, int n_kv_heads,
                                           const std::vector<std::string>& items,
                                           const Results& results) {
  if (items.empty()) return invalid_argument("nothing to calibrate on");
  profile::Profile table;
  table.set_model(model);
  table.set_n_layers(n_layers);
  table.set_n_kv_heads(n_kv_heads);
  for (int layer = 0; layer < n_layers; ++layer) {
    for (int kv_head = 0; kv_head < n_kv_heads; ++kv_head) {
      profile::Head& head = *table.add_head();
      head.set_layer(layer);
      head.set_kv_head(kv_head);
      if (Status status = fill_head(items, results, head); !status.ok()) return status;
    }
  }
  return table;
}

std::string table_text(const profile::Profile& table, const std::string& origin) {
  google::protobuf::TextFormat::Printer printer;
  printer.SetUseShortRepeatedPrimitives(true);
  std::string text;
  printer.PrintToString(table, &text);
  return "# Calibrated errors of this model's heads (proto/profile.proto), in nats. Written by\n"
         "# `spindle eval --calibrate`; calibrate again when the weights change.\n# " +
         origin + "\n" + text;
}

}  // namespace spindle::cli
