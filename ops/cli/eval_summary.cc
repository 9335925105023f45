#include "ops/cli/eval_summary.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <utility>

namespace spindle::cli {
namespace {

namespace json = boost::json;

using Group = std::pair<std::string, std::string>;  // task, length

struct Count {
  std::int64_t right = 0;
  std::int64_t all = 0;
  double share() const { return static_cast<double>(right) / static_cast<double>(all); }
  void add(const Count& other) {
    right += other.right;
    all += other.all;
  }
};
using Counts = std::map<Group, Count>;

json::value figure(double value) { return std::isfinite(value) ? json::value(value) : nullptr; }

// Everything that one cell measured in one regime.
struct Pool {
  Counts counts;
  std::map<std::string, std::vector<double>> kl_by_length;
  std::vector<double> kl;
  std::vector<double> ratios;  // kept bytes, percent
  std::vector<double> ms_per_1k;
  std::vector<std::vector<double>> layers;  // [item][layer], percent of a layer's bytes
  std::int64_t n_items = 0;
  std::int64_t n_refused = 0;
  std::string refused;
};

void add(const EvalItem& item, const CellResult& result, Pool& pool) {
  ++pool.n_items;
  if (!result.refused.empty()) {
    ++pool.n_refused;
    if (pool.refused.empty()) pool.refused = result.refused;
    return;
  }
  Count& count = pool.counts[{item.task, item.length}];
  for (const int right : result.right) count.add({.right = right, .all = 1});
  std::vector<double>& of_length = pool.kl_by_length[item.length];
  of_length.insert(of_length.end(), result.kl.begin(), result.kl.end());
  pool.kl.insert(pool.kl.end(), result.kl.begin(), result.kl.end());
  if (result.full_bytes == 0) return;
  const auto full = static_cast<double>(result.full_bytes);
  pool.ratios.push_back(100 * static_cast<double>(result.kept_bytes) / full);
  if (result.compressed_tokens <= 0) return;
  pool.ms_per_1k.push_back(1000 * result.compress_ms /
                           static_cast<double>(result.compressed_tokens));
  std::vector<double> layers;
  for (const std::uint64_t bytes : result.layer_bytes) {
    layers.push_back(100 * static_cast<double>(bytes) *
                     static_cast<double>(result.layer_bytes.size()) / full);
  }
  pool.layers.push_back(std::move(layers));
}

std::map<std::string, Count> by_task(const Counts& counts, const std::set<Group>& excluded) {
  std::map<std::string, Count> tasks;
  for (const auto& [group, count] : counts) {
    if (count.all > 0 && !excluded.contains(group)) tasks[group.first].add(count);
  }
  return tasks;
}

// macro, worst_task, tasks and n, with `suffix` behind each name.
void add_accuracy(const std::map<std::string, Count>& tasks, const std::string& suffix,
                  json::object& row) {
  std::vector<double> shares;
  json::object names;
  std::int64_t n = 0;
  for (const auto& [task, count] : tasks) {
    shares.push_back(100 * count.share());
    names[task] = shares.back();
    n += count.all;
  }
  row["macro" + suffix] = figure(mean(shares));
  row["worst_task" + suffix] = figure(percentile(shares, 0));
  row["tasks" + suffix] = std::move(names);
  row["n" + suffix] = n;
}

json::object lengths_of(const Pool& pool) {
  json::object lengths;
  for (const auto& [length, kl] : pool.kl_by_length) {
    Counts counts;
    for (const auto& [group, count] : pool.counts) {
      if (group.second == length) counts[group] = count;
    }
    json::object row;
    add_accuracy(by_task(counts, {}), "", row);
    row["kl_mean"] = figure(mean(kl));
    lengths[length] = std::move(row);
  }
  return lengths;
}

json::array layers_of(const Pool& pool) {
  json::array out;
  std::size_t n_layers = 0;
  for (const auto& layers : pool.layers) n_layers = std::max(n_layers, layers.size());
  for (std::size_t layer = 0; layer < n_layers; ++layer) {
    std::vector<double> values;
    for (const auto& layers : pool.layers) {
      if (layer < layers.size()) values.push_back(layers[layer]);
    }
    out.push_back(figure(mean(values)));
  }
  return out;
}

std::set<Group> excluded_groups(const Pool& full) {
  std::set<Group> excluded;
  for (const auto& [group, count] : full.counts) {
    if (count.all > 0 && count.share() < kCountsFrom) excluded.insert(group);
  }
  return excluded;
}

const CellResult* find(const Results& results, const EvalItem& item, const Cell& cell) {
  const auto it = results.find({item.key, cell.key});
  return it == results.end() ? nullptr : &it->second;
}

Pool pool_of(const std::vector<EvalItem>& items, Regime regime, const Cell& cell,
             const Results& results) {
  Pool pool;
  for (const EvalItem& item : items) {
    const CellResult* result = item.regime == regime ? find(results, item, cell) : nullptr;
    if (result != nullptr) add(item, *result, pool);
  }
  return pool;
}

struct Perplexity {
  double nll = 0;
  double full_nll = 0;
  std::int64_t n_tokens = 0;
  std::int64_t windows = 0;
  void add(const CellResult& cell, const CellResult& full) {
    nll += cell.nll;
    full_nll += full.nll;
    n_tokens += cell.n_tokens;
    ++windows;
  }
  json::object row() const {
    const auto n = static_cast<double>(n_tokens);
    return {{"ppl", figure(std::exp(nll / n))},
            {"ppl_change", figure(100 * std::expm1((nll - full_nll) / n))},
            {"windows", windows}};
  }
};

// The policy is the same in every regime, so each row of a cell says what it does to prose.
void add_prose(const std::vector<EvalItem>& items, const Cell& cell, const Results& results,
               json::object& row) {
  Perplexity all;
  std::map<std::string, Perplexity> by_prefix;
  for (const EvalItem& item : items) {
    if (item.regime != Regime::kProse) continue;
    const CellResult* result = find(results, item, cell);
    const CellResult* full = find(results, item, full_cell());
    if (result == nullptr || full == nullptr || !result->refused.empty()) continue;
    all.add(*result, *full);
    by_prefix[item.length].add(*result, *full);
  }
  if (all.windows == 0) return;
  json::object prose = all.row();
  row["ppl"] = prose["ppl"];
  row["ppl_change"] = prose["ppl_change"];
  json::object prefixes;
  for (const auto& [prefix, perplexity] : by_prefix) prefixes[prefix] = perplexity.row();
  row["prose"] = std::move(prefixes);
}

json::object row_of(const Pool& pool, const Pool& full, const json::object& common) {
  json::object row;
  const std::set<Group> excluded = excluded_groups(full);
  row["bytes_real"] = figure(mean(pool.ratios));
  add_accuracy(by_task(pool.counts, excluded), "", row);
  row["kl_mean"] = figure(mean(pool.kl));
  row["kl_p95"] = figure(percentile(pool.kl, 95));
  add_accuracy(by_task(pool.counts, {}), "_all", row);
  json::array apart;
  for (const auto& [group, count] : pool.counts) {
    if (!excluded.contains(group)) continue;
    apart.push_back(json::object{{"task", group.first},
                                 {"length", group.second},
                                 {"full", 100 * full.counts.at(group).share()},
                                 {"accuracy", 100 * count.share()},
                                 {"n", count.all}});
  }
  row["excluded"] = std::move(apart);
  row["lengths"] = lengths_of(pool);
  row["compress_ms_per_1k"] = figure(mean(pool.ms_per_1k));
  row["layer_bytes"] = layers_of(pool);
  row["n_records"] = pool.n_items - pool.n_refused;
  for (const auto& [name, value] : common) row[name] = value;
  return row;
}

// Boost's own text of 92.5 is 9.25E1.
std::string value_text(const json::value& value) {
  if (value.is_double()) return number_text(value.as_double());
  std::string text;
  if (value.is_object()) {
    for (const auto& [name, member] : value.as_object()) {
      text += (text.empty() ? "" : ", ") + json::serialize(name) + ": " + value_text(member);
    }
    return "{" + text + "}";
  }
  if (value.is_array()) {
    for (const json::value& member : value.as_array()) {
      text += (text.empty() ? "" : ", ") + value_text(member);
    }
    return "[" + text + "]";
  }
  return json::serialize(value);
}

}  // namespace

json::array summarise(const std::vector<EvalItem>& items, const std::vector<Cell>& cells,
                      const Results& results, const json::object& common) {
  json::array rows;
  for (const Regime regime : {Regime::kQa, Regime::kQw}) {
    const Pool full = pool_of(items, regime, full_cell(), results);
    for (const Cell& cell : cells) {
      const Pool pool = pool_of(items, regime, cell, results);
      if (pool.n_items == 0) continue;
      json::object row{{"profile", cell.profile}, {"regime", regime_name(regime)}};
      if (cell.bytes_target) row["bytes_target"] = *cell.bytes_target;
      if (pool.n_refused > 0) {
        row["refused"] = pool.refused;
        row["n_refused"] = pool.n_refused;
      }
      if (pool.n_refused < pool.n_items) {
        for (auto& [name, value] : row_of(pool, full, common)) row[name] = std::move(value);
        add_prose(items, cell, results, row);
      }
      rows.push_back(std::move(row));
    }
  }
  return rows;
}

std::string rows_text(const json::array& rows) {
  std::string text = "[";
  for (const json::value& row : rows) {
    text += text.size() > 1 ? ",\n  {" : "\n  {";
    std::string members;
    for (const auto& [name, value] : row.as_object()) {
      members += (members.empty() ? "\n    " : ",\n    ") + json::serialize(name) + ": " +
                 value_text(value);
    }
    text += members + "\n  }";
  }
  return text + "\n]\n";
}

}  // namespace spindle::cli
