#include "ops/cli/eval_cells.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <utility>

#include "ops/cli/input.h"

namespace spindle::cli {

std::string regime_name(Regime regime) {
  switch (regime) {
    case Regime::kQa:
      return "qa";
    case Regime::kQw:
      return "qw";
    case Regime::kProse:
      return "prose";
  }
  return "";
}

Result<Regime> parse_regime(const std::string& name) {
  for (const Regime regime : {Regime::kQa, Regime::kQw}) {
    if (regime_name(regime) == name) return regime;
  }
  return invalid_argument("--regime must be qa or qw, got \"" + name + "\"");
}

std::string number_text(double value) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.6g", value);
  return text.data();
}

Cell full_cell() {
  Cell cell{.key = "full", .profile = "full", .bytes_target = 100, .policy = {}};
  cell.policy.set_profile("full");
  return cell;
}

Result<std::vector<Cell>> make_cells(const std::vector<std::string>& profiles,
                                     const std::vector<double>& bytes) {
  for (const double target : bytes) {
    if (!(target > 0 && target <= 100)) {
      return invalid_argument("--bytes must be percentages above 0 and at most 100, got " +
                              number_text(target));
    }
  }
  std::vector<Cell> cells{full_cell()};
  const auto add = [&](Cell cell) {
    if (std::find(cells.begin(), cells.end(), cell) != cells.end()) {
      return invalid_argument("--profiles or --bytes asks for " + cell.key + " twice");
    }
    cells.push_back(std::move(cell));
    return ok_status();
  };
  for (const std::string& profile : profiles) {
    if (profile == "full") continue;
    if (profile.empty()) return invalid_argument("--profiles names an empty profile");
    if (Status status = check_utf8(profile, "--profiles"); !status.ok()) return status;
    if (profile == "server") {
      Cell cell{.key = profile, .profile = profile, .bytes_target = std::nullopt, .policy = {}};
      if (Status status = add(std::move(cell)); !status.ok()) return status;
      continue;
    }
    for (const double target : bytes) {
      Cell cell{.key = profile + "/" + number_text(target),
                .profile = profile,
                .bytes_target = target,
                .policy = {}};
      cell.policy.set_profile(profile);
      cell.policy.set_ratio(target / 100);
      if (Status status = add(std::move(cell)); !status.ok()) return status;
    }
  }
  return cells;
}

}  // namespace spindle::cli
