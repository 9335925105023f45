#include "ops/cli/eval_plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>

#include "ops/cli/eval_cells.h"

namespace spindle::cli {
namespace {

constexpr double kWidth = 720;
constexpr double kHeight = 400;
constexpr double kLeft = 64;
constexpr double kRight = 150;  // the legend
constexpr double kTop = 44;
constexpr double kBottom = 52;
constexpr const char* kInk = "#333";
constexpr const char* kGrid = "#e4e4e4";
// Told apart by people who do not see all colours (Okabe and Ito), and by their markers' dashes.
constexpr std::array kColours{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
                              "#56b4e9", "#000000", "#8a6d00", "#7f3fbf", "#999999"};
constexpr std::array kDashes{"", "6 3", "2 2"};

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        if (static_cast<unsigned char>(c) >= 0x20) out += c;
    }
  }
  return out;
}

std::string fixed(double value) {
  std::array<char, 64> text;
  std::snprintf(text.data(), text.size(), "%.1f", value);
  return text.data();
}

std::string text_at(double x, double y, const std::string& anchor, const std::string& content,
                    const std::string& more = "") {
  return "<text x=\"" + fixed(x) + "\" y=\"" + fixed(y) + "\" text-anchor=\"" + anchor + "\"" +
         more + ">" + escaped(content) + "</text>\n";
}

std::string line_at(double x1, double y1, double x2, double y2, const std::string& colour,
                    const std::string& more = "") {
  return "<line x1=\"" + fixed(x1) + "\" y1=\"" + fixed(y1) + "\" x2=\"" + fixed(x2) + "\" y2=\"" +
         fixed(y2) + "\" stroke=\"" + colour + "\"" + more + "/>\n";
}

std::string begin_chart(const ChartLabels& labels) {
  return "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 720 400\" width=\"720\" "
         "height=\"400\" font-family=\"sans-serif\" font-size=\"12\" fill=\"" +
         std::string(kInk) + "\">\n<title>" + escaped(labels.title) +
         "</title>\n<rect width=\"720\" height=\"400\" fill=\"#fff\"/>\n" +
         text_at(kLeft, 24, "start", labels.title, " font-size=\"15\" font-weight=\"bold\"") +
         text_at(
             16, kTop + (kHeight - kTop - kBottom) / 2, "middle", labels.y,
             " transform=\"rotate(-90 16 " + fixed(kTop + (kHeight - kTop - kBottom) / 2) + ")\"");
}

// Values to pixels.
struct Axis {
  double low = 0;
  double high = 1;
  double from = 0;
  double to = 1;
  bool log = false;
  double at(double value) const {
    const double share =
        log ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
    return from + share * (to - from);
  }
};

std::string y_grid(const std::vector<double>& ticks, const Axis& y) {
  std::string out;
  for (const double tick : ticks) {
    out += line_at(kLeft, y.at(tick), kWidth - kRight, y.at(tick), kGrid);
    out += text_at(kLeft - 6, y.at(tick) + 4, "end", number_text(tick));
  }
  return out;
}

Axis y_axis(const std::vector<double>& ticks) {
  return {.low = ticks.front(), .high = ticks.back(), .from = kHeight - kBottom, .to = kTop};
}

// The range of what will be drawn.
struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
  void add(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
};

bool drawable(const std::pair<double, double>& point) {
  return std::isfinite(point.first) && point.first > 0 && std::isfinite(point.second);
}

std::string x_grid(const Axis& x) {
  std::string out;
  double last = -100;
  for (const double tick :
       {1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 15.0, 20.0, 25.0, 35.0, 50.0, 70.0, 100.0}) {
    if (tick < x.low || tick > x.high) continue;
    out += line_at(x.at(tick), kTop, x.at(tick), kHeight - kBottom, kGrid);
    if (x.at(tick) - last < 26) continue;  // numbers would touch
    out += text_at(x.at(tick), kHeight - kBottom + 18, "middle", number_text(tick));
    last = x.at(tick);
  }
  return out + text_at((x.from + x.to) / 2, kHeight - 12, "middle",
                       "KV bytes, % of the uncompressed 16-bit bytes");
}

std::string draw_series(const Series& series, std::size_t number, const Axis& x, const Axis& y) {
  const std::string colour = kColours[number % kColours.size()];
  const std::string dash = kDashes[number / kColours.size() % kDashes.size()];
  std::string points;
  std::string markers;
  for (const auto& point : series.points) {
    if (!drawable(point)) continue;
    const std::string px = fixed(x.at(point.first));
    const std::string py = fixed(y.at(point.second));
    points += (points.empty() ? "" : " ") + px + "," + py;
    markers += "<circle cx=\"" + px + "\" cy=\"" + py + "\" r=\"3\" fill=\"" + colour + "\"/>\n";
  }
  const std::string more =
      " stroke-width=\"2\"" + (dash.empty() ? "" : " stroke-dasharray=\"" + dash + "\"");
  const double legend = kTop + 10 + 18 * static_cast<double>(number);
  return "<polyline points=\"" + points + "\" fill=\"none\" stroke=\"" + colour + "\"" + more +
         "/>\n" + markers +
         line_at(kWidth - kRight + 10, legend, kWidth - kRight + 30, legend, colour, more) +
         text_at(kWidth - kRight + 36, legend + 4, "start", series.name);
}

}  // namespace

std::vector<double> axis_ticks(double low, double high) {
  if (!(high > low)) high = low + 1;
  const double raw = (high - low) / 5;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  double step = 10 * power;
  for (const double nice : {1.0, 2.0, 5.0}) {
    if (nice * power >= raw) {
      step = nice * power;
      break;
    }
  }
  std::vector<double> ticks;
  const double first = std::floor(low / step);
  const double last = std::ceil(high / step);
  for (double k = first; k <= last; ++k) ticks.push_back(k * step);
  return ticks;
}

std::string line_chart(const std::vector<Series>& series, const ChartLabels& labels) {
  Range bytes;
  Range values;
  if (labels.y_from_zero) values.add(0);
  if (labels.level) values.add(*labels.level);
  for (const Series& one : series) {
    for (const auto& point : one.points) {
      if (!drawable(point)) continue;
      bytes.add(point.first);
      values.add(point.second);
    }
  }
  if (bytes.low > bytes.high) bytes = {.low = 1, .high = 100};
  if (values.low > values.high) values = {.low = 0, .high = 1};
  const std::vector<double> ticks = axis_ticks(values.low, values.high);
  const Axis y = y_axis(ticks);
  const Axis x{.low = bytes.low / 1.15,
               .high = bytes.high * 1.15,
               .from = kLeft,
               .to = kWidth - kRight,
               .log = true};
  std::string out = begin_chart(labels) + y_grid(ticks, y) + x_grid(x);
  if (labels.level) {
    out += line_at(kLeft, y.at(*labels.level), kWidth - kRight, y.at(*labels.level), "#888",
                   " stroke-dasharray=\"4 4\"");
    out += text_at(kWidth - kRight - 4, y.at(*labels.level) - 5, "end", "uncompressed",
                   " fill=\"#666\"");
  }
  for (std::size_t i = 0; i < series.size(); ++i) out += draw_series(series[i], i, x, y);
  return out + "</svg>\n";
}

std::string bar_chart(const std::vector<double>& values, const ChartLabels& labels) {
  Range range;
  range.add(0);
  for (const double value : values) {
    if (std::isfinite(value)) range.add(value);
  }
  const std::vector<double> ticks = axis_ticks(range.low, range.high);
  const Axis y = y_axis(ticks);
  std::string out = begin_chart(labels) + y_grid(ticks, y);
  const double room =
      (kWidth - kRight - kLeft) / static_cast<double>(std::max<std::size_t>(values.size(), 1));
  // A number below every bar, or below every second one and so on.
  const auto every = static_cast<std::size_t>(std::max(1.0, std::ceil(24 / room)));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double left = kLeft + room * static_cast<double>(i);
    if (std::isfinite(values[i])) {
      out += "<rect x=\"" + fixed(left + 0.1 * room) + "\" y=\"" + fixed(y.at(values[i])) +
             "\" width=\"" + fixed(0.8 * room) + "\" height=\"" + fixed(y.at(0) - y.at(values[i])) +
             "\" fill=\"" + kColours[0] + "\"/>\n";
    }
    if (i % every == 0) {
      out += text_at(left + room / 2, kHeight - kBottom + 18, "middle", std::to_string(i));
    }
  }
  out += text_at(kLeft + (kWidth - kRight - kLeft) / 2, kHeight - 12, "middle", "layer");
  return out + "</svg>\n";
}

}  // namespace spindle::cli
