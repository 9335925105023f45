#pragma once
// Small charts as SVG text, for reports: light, legible in both of a page's themes, no
// dependencies.

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace spindle::cli {

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;  // (bytes in percent, value), ascending bytes
};

struct ChartLabels {
  std::string title;
  std::string y;
  bool y_from_zero = true;
  std::optional<double> level = std::nullopt;  // a dashed line: the uncompressed cache
};

// Bytes on a logarithmic axis. Points that are not finite or have no bytes are left out.
std::string line_chart(const std::vector<Series>& series, const ChartLabels& labels);
// One bar for each layer.
std::string bar_chart(const std::vector<double>& values, const ChartLabels& labels);

// Numbers at equal, round distances that cover [low, high].
std::vector<double> axis_ticks(double low, double high);

}  // namespace spindle::cli
