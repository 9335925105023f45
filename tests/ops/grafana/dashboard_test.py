#!/usr/bin/env python3
"""The Grafana files are well formed, as far as that can be said without Grafana: tests/ops/prometheus
has the queries parsed and answered."""
import pathlib
import re
import subprocess
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "prometheus"))
import monitoring_files as files  # noqa: E402

# Units that Grafana knows and that we use; "suffix: x" writes x behind the figure.
UNITS = {"none", "short", "s", "bytes", "percentunit", "reqps", "ops", "cps", "sci", "suffix: tok/s"}
KINDS = {"timeseries", "stat", "heatmap", "table", "row"}
COLUMNS = 24
ROWS = ["Overview", "Latency", "Throughput", "Queue and admission", "KV of the stages",
        "Policies of the layers", "Balance", "Pipeline", "Process"]
BUILT_IN = {"__rate_interval", "__interval", "__range"}


def variables_in(value):
    """Names of the variables in all strings of a JSON value."""
    if isinstance(value, dict):
        return set().union(*map(variables_in, value.values())) if value else set()
    if isinstance(value, list):
        return set().union(*map(variables_in, value)) if value else set()
    if isinstance(value, str):
        # "$__all" is a value and not a variable.
        return set(re.findall(r"\$\{?(\w+)", value)) - {"__all"}
    return set()


class DashboardTest(unittest.TestCase):
    def setUp(self):
        self.dashboard = files.read_dashboard()
        self.panels = list(files.panels_of(self.dashboard))

    def test_the_file_is_what_the_generator_writes(self):
        result = subprocess.run([sys.executable, "-B", files.GRAFANA / "dashboard.py", "--check"],
                                capture_output=True, text=True, timeout=60, check=False)
        self.assertEqual(result.returncode, 0, result.stderr)

    def test_the_frame(self):
        self.assertGreaterEqual(self.dashboard["schemaVersion"], 39)
        self.assertEqual(self.dashboard["uid"], "spindle")
        self.assertIsNone(self.dashboard["id"], "Grafana gives the id")
        titles = [panel["title"] for panel in self.dashboard["panels"] if panel["type"] == "row"]
        self.assertEqual(titles, ROWS)
        for name in ("datasource", "model_name", "stage"):
            self.assertIn(name, [variable["name"] for variable in self.dashboard["templating"]["list"]])

    def test_ids_are_unique(self):
        ids = [panel["id"] for panel in [*self.panels, *self.dashboard["panels"]] if panel["type"] != "row"]
        rows = [panel["id"] for panel in self.dashboard["panels"] if panel["type"] == "row"]
        used = set(ids) | set(rows)
        self.assertEqual(len(used), len(self.panels) + len(rows))
        self.assertTrue(all(isinstance(number, int) and number > 0 for number in used))

    def test_panels_lie_side_by_side_within_the_grid(self):
        taken = {}
        for panel in self.dashboard["panels"]:
            place = panel["gridPos"]
            self.assertGreaterEqual(place["x"], 0)
            self.assertLessEqual(place["x"] + place["w"], COLUMNS, panel["title"])
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    self.assertNotIn((x, y), taken, f"{panel['title']} lies on {taken.get((x, y))}")
                    taken[x, y] = panel["title"]
        lowest = max(y for _, y in taken)
        empty = [y for y in range(lowest) if not any((x, y) in taken for x in range(COLUMNS))]
        self.assertEqual(empty, [], "lines of the grid with nothing in them")

    def test_every_panel_says_what_it_shows(self):
        titles = [panel["title"] for panel in self.panels]
        for panel in self.panels:
            with self.subTest(panel["title"]):
                self.assertIn(panel["type"], KINDS)
                self.assertGreater(len(panel["description"]), 10)
                self.assertEqual(panel["datasource"], {"type": "prometheus", "uid": "${datasource}"})
                self.assertIn(panel["fieldConfig"]["defaults"]["unit"], UNITS)
                if panel["type"] == "heatmap":
                    self.assertIn(panel["options"]["yAxis"]["unit"], UNITS)
        self.assertEqual(len(titles), len(set(titles)), "two panels have one title")

    def test_every_query_is_complete(self):
        for panel in self.panels:
            with self.subTest(panel["title"]):
                self.assertTrue(panel["targets"])
                letters = [target["refId"] for target in panel["targets"]]
                self.assertEqual(len(letters), len(set(letters)))
                for target in panel["targets"]:
                    self.assertTrue(target["expr"].strip() and target["refId"])
                    self.assertEqual(target["datasource"], panel["datasource"])
                    # A range that is shorter than two scrapes is empty; Grafana knows how long it must be.
                    for span in re.findall(r"\[([^\]]+)\]", target["expr"]):
                        self.assertIn(span, ("$__rate_interval", "5m"))
                legends = [target["legendFormat"] for target in panel["targets"]]
                self.assertEqual(len(legends), len(set(legends)), "two queries with one legend")

    def test_legends_name_labels_that_the_query_keeps(self):
        for panel in self.panels:
            for target in panel["targets"]:
                by = re.match(r"(?:\w+\()?(?:[\d.]+, )?(?:sum|avg|max|min) by \(([^)]*)\)", target["expr"])
                if by:
                    labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                    self.assertLessEqual(labels, set(re.split(r",\s*", by.group(1))), panel["title"])

    def test_variables_are_defined(self):
        defined = {variable["name"] for variable in self.dashboard["templating"]["list"]}
        self.assertLessEqual(variables_in(self.dashboard), defined | BUILT_IN)
        self.assertLessEqual(defined, variables_in(self.dashboard), "defined and not used")

    def test_the_same_matchers_everywhere(self):
        """Whoever chooses a cluster sees no other one's figures."""
        for where, expression in files.expressions_of(self.dashboard):
            for metric, matchers in re.findall(r"(?<!\w)(spindle_\w+|up|scrape_\w+)(\{[^}]*\})?", expression):
                if f":{metric}" in expression:  # a recorded bound, the same for all
                    continue
                self.assertIn('instance=~"$instance"', matchers, f"{where}: {metric}")

    def test_provisioning_points_to_the_dashboard(self):
        source = (files.GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text()
        provider = (files.GRAFANA / "provisioning" / "dashboards" / "spindle.yaml").read_text()
        for text in (source, provider):
            self.assertRegex(text, r"(?m)^apiVersion: 1$")
        self.assertRegex(source, r"(?m)^    type: prometheus$")
        self.assertRegex(provider, r"(?m)^      path: /etc/grafana/dashboards/spindle$")
        self.assertRegex(provider, r"(?m)^    type: file$")


if __name__ == "__main__":
    unittest.main()
