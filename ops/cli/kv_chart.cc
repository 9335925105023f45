#include "ops/cli/kv_chart.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "ops/cli/output.h"

namespace spindle::cli {
namespace {

constexpr int kBarCells = 20;

struct Row {
  std::string name;
  std::uint64_t full = 0;
  std::uint64_t kept = 0;

  double share() const {
    return full == 0 ? 0.0 : static_cast<double>(kept) / static_cast<double>(full);
  }
};

std::string pad_left(const std::string& text, std::size_t width) {
  return std::string(width - std::min(width, text.size()), ' ') + text;
}

// Cells of eighths; anything above nothing shows. Padded to kBarCells.
std::string utf8_bar(double share) {
  static constexpr std::array<const char*, 8> kPart{"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  int eighths = static_cast<int>(std::lround(share * kBarCells * 8));
  if (share > 0) eighths = std::max(eighths, 1);
  std::string bar;
  for (int i = 0; i < eighths / 8; ++i) bar += "█";
  bar += kPart[static_cast<std::size_t>(eighths % 8)];
  const int cells = (eighths + 7) / 8;
  return bar + std::string(static_cast<std::size_t>(kBarCells - cells), ' ');
}

std::string ascii_bar(double share) {
  const auto cells = static_cast<std::size_t>(std::lround(share * kBarCells));
  std::string bar(cells, '#');
  if (share > 0 && cells == 0) bar = "-";
  bar.resize(kBarCells, ' ');
  return bar;
}

std::string percent(double share) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%5.1f %%", 100 * share);
  return text.data();
}

std::vector<Row> rows_of(const api::v1::Usage& usage) {
  std::vector<const api::v1::LayerKvUse*> layers;
  for (const api::v1::StageKv& stage : usage.kv()) {
    for (const api::v1::LayerKvUse& layer : stage.layers()) layers.push_back(&layer);
  }
  std::stable_sort(layers.begin(), layers.end(),
                   [](const auto* a, const auto* b) { return a->layer() < b->layer(); });
  std::vector<Row> rows;
  Row total{.name = "all"};
  std::size_t digits = 1;
  for (const api::v1::LayerKvUse* layer : layers) {
    digits = std::max(digits, std::to_string(layer->layer()).size());
  }
  for (const api::v1::LayerKvUse* layer : layers) {
    rows.push_back({.name = "layer " + pad_left(std::to_string(layer->layer()), digits),
                    .full = layer->full_bytes(),
                    .kept = layer->kept_bytes()});
    total.full += layer->full_bytes();
    total.kept += layer->kept_bytes();
  }
  if (!rows.empty()) rows.push_back(total);
  return rows;
}

}  // namespace

std::string kv_chart(const api::v1::Usage& usage, const Style& style, bool utf8) {
  const std::vector<Row> rows = rows_of(usage);
  if (rows.empty()) return "the server did not report the KV of the layers\n";
  std::size_t name_width = 0;
  std::size_t kept_width = 0;
  for (const Row& row : rows) {
    name_width = std::max(name_width, row.name.size());
    kept_width = std::max(kept_width, format_bytes(row.kept).size());
  }
  std::string out;
  for (const Row& row : rows) {
    // Pages may hold a little more than the tokens alone take.
    const double share = std::min(row.share(), 1.0);
    out += row.name + std::string(name_width - row.name.size() + 2, ' ') +
           style.green(utf8 ? utf8_bar(share) : ascii_bar(share)) + "  " + percent(row.share()) +
           "   " + pad_left(format_bytes(row.kept), kept_width) + " of " + format_bytes(row.full) +
           "\n";
  }
  return out;
}

}  // namespace spindle::cli
