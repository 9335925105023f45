#!/usr/bin/env python3
"""Prometheus' own promtool on our configuration, rules, their unit tests, and the dashboard's queries."""
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

import monitoring_files as files

README = files.PROMETHEUS / "README.md"


def promtool(*arguments):
    return subprocess.run(["promtool", *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=60, check=False)


class RulesTest(unittest.TestCase):
    def check(self, *arguments):
        result = promtool(*arguments)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        return result.stdout

    def test_the_configuration_names_the_rules_and_is_valid(self):
        self.assertIn(f"{len(files.RULES)} rule files found", self.check("check", "config", files.CONFIG))

    def test_rules_are_valid(self):
        self.check("check", "rules", *files.RULES)

    def test_a_wrong_rule_would_be_found(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "wrong.yml"
            path.write_text(files.RULES[1].read_text().replace("== 0", "=="))
            self.assertNotEqual(promtool("check", "rules", path).returncode, 0)

    def test_the_examples_in_comments_are_valid(self):
        """Each block of commented YAML in turn takes the place of the static target. Debian builds
        Prometheus without discovery in Kubernetes, so that of its block only the relabelling is read."""
        text = files.CONFIG.read_text()
        static = re.search(r"    static_configs:\n(?:      .*\n)+", text).group()
        blocks = re.findall(r"(?:^  #  .*\n)+", text, re.MULTILINE)
        self.assertEqual([block.split()[1] for block in blocks], ["file_sd_configs:", "kubernetes_sd_configs:"])
        alerting = re.search(r"(?:^# .*\n)+(?=\nscrape_configs)", text, re.MULTILINE).group()
        for block in blocks:
            uncommented = block.replace("\n  #  ", "\n    ").replace("  #  ", "    ", 1)
            uncommented = uncommented.replace("kubernetes_sd_configs:\n      - role: pod\n",
                                              'file_sd_configs:\n      - files: ["pods.json"]\n')
            changed = text.replace(static, uncommented).replace(alerting, alerting.replace("# ", ""))
            with self.subTest(block.split()[1]), tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "prometheus.yml"
                path.write_text(changed)
                for rules in files.RULES:
                    shutil.copy(rules, folder)
                self.check("check", "config", path)

    def test_unit_tests_pass(self):
        self.assertTrue(files.UNIT_TESTS)
        self.check("test", "rules", *files.UNIT_TESTS)

    def test_every_alert_is_seen_firing_and_silent(self):
        fires, silent = set(), set()
        for path in files.UNIT_TESTS:
            for case in re.split(r"(?=- eval_time:)", path.read_text()):
                name = re.search(r"alertname: (\w+)", case)
                if name:
                    (fires if "exp_alerts:" in case else silent).add(name.group(1))
        alerts = files.declared("alert")
        self.assertEqual(len(alerts), len(set(alerts)))
        self.assertEqual(fires, set(alerts))
        self.assertEqual(silent, set(alerts))

    def test_every_recorded_series_has_an_expected_value(self):
        tested = set()
        for path in files.UNIT_TESTS:
            for case in re.split(r"(?=- expr:)", path.read_text()):
                if case.startswith("- expr:") and "exp_samples:" in case:
                    tested |= files.names_in(case.splitlines()[0])
        records = files.declared("record")
        self.assertEqual(len(records), len(set(records)))
        self.assertEqual(set(records) - tested, set())

    def test_every_alert_is_explained(self):
        """Severity, summary, description with a figure, and a section with three paragraphs."""
        readme = README.read_text()
        rules = files.RULES[1].read_text()
        for block in re.split(r"(?=- alert:)", rules)[1:]:
            name = block.split()[2]
            with self.subTest(name):
                self.assertRegex(block, r"severity: (critical|warning|info)\n")
                self.assertRegex(block, r'summary: ".+"\n')
                self.assertRegex(block, r'description: ".*\{\{ \$(value|labels\.instance)\b.*"\n')
                self.assertIn(f'runbook: "ops/prometheus/README.md#{name.lower()}"\n', block)
                section = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", readme, re.MULTILINE | re.DOTALL)
                self.assertIsNotNone(section, "no section in the README")
                for part in ("Means:", "Look at:", "Do:"):
                    self.assertIn(part, section.group(1))

    def test_the_readme_names_only_what_exists(self):
        known = set(files.declared("record"))
        for path in (README, files.ROOT / "docs" / "monitoring.md"):
            recorded = {name for name in files.names_in(path.read_text()) if ":" in name}
            self.assertEqual(recorded - known, set(), path)
        alerts = set(re.findall(r"\bSpindle[A-Z][A-Za-z]+\b", README.read_text()))
        self.assertEqual(alerts - set(files.declared("alert")), set())
        keys = set(re.findall(r"`((?:api|cluster|compute|kv|model|scheduler)\.[a-z0-9_.]+)`", README.read_text()))
        table = (files.ROOT / "configs" / "README.md").read_text()
        self.assertEqual({key for key in keys if f"| `{key}` |" not in table}, set())
        panels = {panel["title"] for panel in files.panels_of(files.read_dashboard())}
        quoted = set(re.findall(r'"([A-Z][^"]+)"', README.read_text().replace("\n", " ")))
        self.assertEqual(quoted - panels - {"Running"}, set(), "panels that the README names")

    def test_every_query_of_the_dashboard_parses(self):
        rules = [{"record": f"query:{index}", "expr": files.expand(expression)}
                 for index, (_, expression) in enumerate(files.expressions_of(files.read_dashboard()))]
        self.assertGreater(len(rules), 0)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "queries.yml"  # JSON is YAML
            path.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
            self.check("check", "rules", path)


if __name__ == "__main__":
    if shutil.which("promtool") is None:
        print("promtool is not installed (Debian, Ubuntu: prometheus)")
        sys.exit(77)
    unittest.main()
