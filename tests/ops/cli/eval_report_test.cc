// From results to rows, from rows to a report and plots; and the tables of `spindle inspect`.

#include "ops/cli/eval_report.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stack>

#include "ops/cli/eval_plot.h"
#include "ops/cli/eval_summary.h"
#include "ops/cli/inspect.h"

namespace spindle::cli {
namespace {

namespace json = boost::json;

// Tags are closed in order and quotes match: enough to find a chart that no browser shows.
bool well_formed(const std::string& svg) {
  std::stack<std::string> open;
  for (std::size_t i = svg.find('<'); i != std::string::npos; i = svg.find('<', i + 1)) {
    const std::size_t end = svg.find('>', i);
    if (end == std::string::npos) return false;
    const std::string tag = svg.substr(i + 1, end - i - 1);
    if (tag.find('<') != std::string::npos || std::count(tag.begin(), tag.end(), '"') % 2 != 0) {
      return false;
    }
    const std::string name = tag.substr(0, tag.find_first_of(" /"));
    if (tag[0] == '/') {
      if (open.empty() || open.top() != tag.substr(1)) return false;
      open.pop();
    } else if (tag.back() != '/') {
      open.push(name);
    }
  }
  return open.empty() && svg.starts_with("<svg ") && svg.find("nan") == std::string::npos &&
         svg.find("inf") == std::string::npos;
}

TEST(EvalPlot, WellFormedIsAbleToFail) {
  EXPECT_TRUE(well_formed("<svg a=\"1\"><g/></svg>\n"));
  EXPECT_FALSE(well_formed("<svg a=\"1\"><g></svg>"));
  EXPECT_FALSE(well_formed("<svg a=\"1><g/></svg>"));
  EXPECT_FALSE(well_formed("<svg a=\"1\">"));
}

TEST(EvalPlot, Ticks) {
  EXPECT_EQ(axis_ticks(0, 100), (std::vector<double>{0, 20, 40, 60, 80, 100}));
  EXPECT_EQ(axis_ticks(0, 93), (std::vector<double>{0, 20, 40, 60, 80, 100}));
  EXPECT_EQ(axis_ticks(-3, 4).front(), -4);
  EXPECT_EQ(axis_ticks(5, 5).size(), 6U);
}

TEST(EvalPlot, Charts) {
  const std::vector<Series> series{{"a<&\">\n", {{6, 90}, {25, 92.5}}},
                                   {"b", {{6, std::nan("")}, {0, 1}, {50, 10}}},
                                   {"empty", {}}};
  const std::string chart = line_chart(series, {.title = "T & t", .y = "y", .level = 93.0});
  EXPECT_TRUE(well_formed(chart)) << chart;
  EXPECT_NE(chart.find("a&lt;&amp;&quot;&gt;"), std::string::npos);
  EXPECT_NE(chart.find("uncompressed"), std::string::npos);
  EXPECT_EQ(std::string::npos,
            line_chart(series, {.title = "", .y = ""}).find("dasharray=\"4 4\""));
  EXPECT_TRUE(well_formed(line_chart({}, {.title = "", .y = ""})));
  EXPECT_TRUE(well_formed(
      bar_chart({1, 50, std::numeric_limits<double>::infinity()}, {.title = "bars", .y = "%"})));
  EXPECT_TRUE(well_formed(bar_chart({}, {.title = "", .y = ""})));
  EXPECT_TRUE(well_formed(bar_chart(std::vector<double>(80, 1.0), {.title = "", .y = ""})));
}

CellResult answers(const std::vector<int>& right, double kl, std::uint64_t kept) {
  CellResult result;
  result.right = right;
  result.kl.assign(right.size(), kl);
  result.n_tokens = 10;
  result.nll = 20;
  result.full_bytes = 1000;
  result.kept_bytes = kept;
  result.compress_ms = 3;
  result.compressed_tokens = 2000;
  result.layer_bytes = {kept / 2, kept - kept / 2};
  return result;
}

// Two tasks at 2k, of which full answers only half of `hard`; `easy` also at 4k.
json::array example_rows() {
  const std::vector<EvalItem> items{
      {.key = "qa:0", .regime = Regime::kQa, .task = "easy", .length = "2k"},
      {.key = "qa:1", .regime = Regime::kQa, .task = "easy", .length = "4k"},
      {.key = "qa:2", .regime = Regime::kQa, .task = "hard", .length = "2k"},
      {.key = "qa:3", .regime = Regime::kQa, .task = "hard", .length = "4k"},
      {.key = "prose-100:0", .regime = Regime::kProse, .task = "prose", .length = "100"}};
  const auto cells = make_cells({"some", "never"}, {25}).value();
  Results results;
  const auto put = [&results](const std::string& item, const std::string& cell, CellResult result) {
    results[{item, cell}] = std::move(result);
  };
  put("qa:0", "full", answers({1, 1}, 0, 1000));
  put("qa:1", "full", answers({1}, 0, 1000));
  put("qa:2", "full", answers({1, 0}, 0, 1000));
  put("qa:3", "full", answers({1, 1}, 0, 1000));
  put("prose-100:0", "full", answers({0}, 0, 1000));
  put("qa:0", "some/25", answers({1, 0}, 0.1, 250));
  put("qa:1", "some/25", answers({0}, 0.2, 250));
  put("qa:2", "some/25", answers({0, 0}, 0.3, 250));
  put("qa:3", "some/25", answers({1, 1}, 0.4, 250));
  CellResult prose = answers({0}, 0.1, 250);
  prose.nll = 21;
  put("prose-100:0", "some/25", prose);
  CellResult refused;
  refused.refused = "ratio | below\nits floor";
  for (const char* item : {"qa:0", "qa:1", "qa:2", "qa:3"}) put(item, "never/25", refused);
  return summarise(items, cells, results, {{"model", "mini"}, {"data", "x.jsonl"}});
}

TEST(EvalSummary, Figures) {
  const json::array rows = example_rows();
  ASSERT_EQ(rows.size(), 3U);
  const json::object& full = rows[0].as_object();
  EXPECT_EQ(full.at("profile"), "full");
  EXPECT_EQ(full.at("macro").as_double(), 100);
  EXPECT_EQ(full.at("macro_all").as_double(), (100 + 75) / 2.0);
  EXPECT_EQ(full.at("worst_task_all").as_double(), 75);
  EXPECT_EQ(full.at("ppl_change").as_double(), 0);
  const json::object& some = rows[1].as_object();
  EXPECT_EQ(some.at("regime"), "qa");
  EXPECT_EQ(some.at("bytes_target").as_double(), 25);
  EXPECT_EQ(some.at("bytes_real").as_double(), 25);
  // hard at 2k does not count: easy 1 of 3, hard 2 of 2.
  EXPECT_NEAR(some.at("macro").as_double(), (100 / 3.0 + 100) / 2, 1e-9);
  EXPECT_NEAR(some.at("worst_task").as_double(), 100 / 3.0, 1e-9);
  EXPECT_EQ(some.at("n"), 5);
  EXPECT_EQ(some.at("n_all"), 7);
  EXPECT_NEAR(some.at("macro_all").as_double(), (100 / 3.0 + 50) / 2, 1e-9);
  ASSERT_EQ(some.at("excluded").as_array().size(), 1U);
  EXPECT_EQ(some.at("excluded").at(0).at("full").as_double(), 50);
  EXPECT_EQ(some.at("excluded").at(0).at("accuracy").as_double(), 0);
  EXPECT_NEAR(some.at("kl_mean").as_double(), (0.2 + 0.2 + 0.6 + 0.8) / 7, 1e-9);
  EXPECT_NEAR(some.at("kl_p95").as_double(), 0.4, 1e-9);
  EXPECT_EQ(some.at("compress_ms_per_1k").as_double(), 1.5);
  EXPECT_EQ(some.at("layer_bytes").at(1).as_double(), 25);
  EXPECT_EQ(some.at("lengths").at("2k").at("tasks").at("easy").as_double(), 50);
  EXPECT_NEAR(some.at("ppl_change").as_double(), 100 * (std::exp(0.1) - 1), 1e-9);
  EXPECT_EQ(some.at("prose").at("100").at("windows"), 1);
  EXPECT_EQ(some.at("model"), "mini");
  const json::object& never = rows[2].as_object();
  EXPECT_TRUE(never.contains("refused"));
  EXPECT_EQ(never.at("n_refused"), 4);
  EXPECT_FALSE(never.contains("macro"));
}

TEST(EvalSummary, NothingCountsWhereFullFails) {
  const std::vector<EvalItem> items{
      {.key = "qa:0", .regime = Regime::kQa, .task = "t", .length = "2k"}};
  const auto rows =
      summarise(items, {full_cell()}, {{{"qa:0", "full"}, answers({0, 1}, 0, 1000)}}, {});
  EXPECT_TRUE(rows[0].at("macro").is_null());
  EXPECT_EQ(rows[0].at("macro_all").as_double(), 50);
  EXPECT_EQ(rows[0].at("n"), 0);
}

TEST(EvalReport, TextAndBack) {
  const std::string text = rows_text(example_rows());
  EXPECT_NE(text.find("\"macro\": 66.6667,"), std::string::npos) << text;
  const auto rows = parse_rows(text);
  ASSERT_TRUE(rows.ok()) << text;
  EXPECT_EQ(rows_text(*rows), text);
  for (const char* wrong : {"", "{}", "[1]", "[{}]", "[{\"profile\":\"a\",\"regime\":1}]"}) {
    EXPECT_FALSE(parse_rows(wrong).ok()) << wrong;
  }
  EXPECT_EQ(rows_text({}), "[\n]\n");
}

TEST(EvalReport, Markdown) {
  auto rows = parse_rows(rows_text(example_rows())).value();
  rows[0].as_object()["bytes_real"] = 98.5;
  const std::string report = report_text(rows, {"plots/quality-qa.svg"});
  EXPECT_NE(report.find("| some | 25 | 25.00 | 66.7 | 33.3 | 0.257 | 0.4 | +10.52 | 1.50 | 41.7 | "
                        "5 |"),
            std::string::npos)
      << report;
  EXPECT_NE(report.find("| full | 100 | 98.50 * |"), std::string::npos) << report;
  EXPECT_NE(report.find("refused: ratio \\| below its floor"), std::string::npos) << report;
  EXPECT_NE(report.find("| hard | 2k | 50.0 | 2 |"), std::string::npos) << report;
  EXPECT_NE(report.find("| some | 25 | 25.0 | 50.0 |"), std::string::npos) << report;  // lengths
  EXPECT_NE(report.find("![quality-qa](plots/quality-qa.svg)"), std::string::npos) << report;
  EXPECT_EQ(report.find("QW"), std::string::npos);
  // Every line of a table has as many cells as its header.
  EXPECT_FALSE(report_text({}, {}).empty());
}

TEST(EvalReport, Plots) {
  const auto plots = report_plots(parse_rows(rows_text(example_rows())).value());
  std::vector<std::string> names;
  for (const auto& [name, svg] : plots) {
    names.push_back(name);
    EXPECT_TRUE(well_formed(svg)) << name << svg;
  }
  EXPECT_EQ(names, (std::vector<std::string>{"quality-qa.svg", "kl-qa.svg", "prose.svg",
                                             "layers-some-25.svg"}));
  EXPECT_TRUE(report_plots({}).empty());
}

api::v1::Usage example_usage() {
  api::v1::Usage usage;
  api::v1::KvBoundary& boundary = *usage.add_boundaries();
  boundary.set_position(1000);
  boundary.set_full_bytes(4096);
  boundary.set_kept_bytes(1024);
  boundary.set_compress_ms(2.5);
  for (int i = 0; i < 4; ++i) {
    api::v1::KvHeadKept& head = *boundary.add_heads();
    head.set_layer(i / 2);
    head.set_kv_head(i % 2);
    head.set_plan(i == 2 ? "FULL raw/raw" : "EVICT int4/int4");
    head.set_kept_tokens(i == 2 ? 1000 : 200);
    head.set_bytes(256);
    if (i < 2) head.set_lazy_mass(0.25);
    if (i == 0) head.set_k_entries_per_token(0.5);
  }
  return usage;
}

TEST(Inspect, Layers) {
  EXPECT_EQ(inspect_table(example_usage(), false),
            "after 1000 tokens: 1.0 KiB of 4.0 KiB kept (25.0%), compressed in 2.5 ms\n\n"
            "layer  lazy mass  K entries  V entries  tokens kept  bytes  of full  "
            "plan (by KV head)\n"
            "0          0.250      0.500          -          200  512 B    25.0%  "
            "EVICT int4/int4\n"
            "1              -          -          -     200-1000  512 B    25.0%  "
            "0: FULL raw/raw; 1: EVICT int4/int4\n");
}

TEST(Inspect, HeadsAndJson) {
  const std::string table = inspect_table(example_usage(), true);
  EXPECT_NE(table.find("\n1.0           -          -          -         1000  256 B    25.0%  "
                       "FULL raw/raw\n"),
            std::string::npos)
      << table;
  const json::object object = inspect_json(example_usage());
  const json::value& heads = object.at("boundaries").at(0).at("heads");
  EXPECT_EQ(heads.at(0).at("k_entries_per_token").as_double(), 0.5);
  EXPECT_FALSE(heads.at(1).as_object().contains("k_entries_per_token"));
  EXPECT_NE(inspect_table({}, false).find("Nothing was compressed"), std::string::npos);
}

}  // namespace
}  // namespace spindle::cli
