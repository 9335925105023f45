#pragma once
// What is measured: a cell is a regime, a profile and a byte target; in a calibration, one option
// of one head.

#include <optional>
#include <string>
#include <vector>

#include "kernels/core/status.h"
#include "proto/api.pb.h"

namespace spindle::cli {

enum class Regime {
  kQa,     // the document is compressed before the question is seen
  kQw,     // document and question are compressed
  kProse,  // a prefix of prose is compressed
};
std::string regime_name(Regime regime);  // "qa"
Result<Regime> parse_regime(const std::string& name);

struct Cell {
  std::string key;      // "spindle/25", unique among the cells of a run
  std::string profile;  // "full", ...
  // Percent of the uncompressed bytes; none where the server decides.
  std::optional<double> bytes_target = 100;
  // Without a profile: the server's own policy, whatever its balancer makes of it.
  api::v1::KvPolicy policy;
  bool operator==(const Cell& other) const { return key == other.key; }
};

// Uncompressed: the reference of every other cell.
Cell full_cell();

// "full" first, whether it is named or not, then every profile with every byte target in the order
// given, and "server" without one: what requests that say nothing get. INVALID_ARGUMENT for a
// target outside (0, 100] or something twice.
Result<std::vector<Cell>> make_cells(const std::vector<std::string>& profiles,
                                     const std::vector<double>& bytes);

std::string number_text(double value);  // "25", "7.5"

}  // namespace spindle::cli
