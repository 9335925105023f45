#!/usr/bin/env python3
"""A real Prometheus with our configuration and rules, and a real cluster of three stages under load.

Everything that is written about metrics must be true of them: rules, alerts, the Grafana dashboard
and the tables in the documents name only what /metrics has, and each has data. Free ports; a
Prometheus that runs on this machine is left alone.
"""
import ctypes
import json
import math
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
import urllib.request

import monitoring_files as files

sys.path.insert(0, str(files.ROOT / "tests" / "system"))
from cluster import MODEL, Cluster, free_ports, golden, wait_until  # noqa: E402

METRICS_DOC = files.ROOT / "cluster" / "telemetry" / "README.md"
DOCS = (METRICS_DOC, files.PROMETHEUS / "README.md", files.GRAFANA / "README.md",
        files.ROOT / "docs" / "monitoring.md")
NAME_IN_DOCUMENT = re.compile(r"`((?:\w+:)?spindle_\w*[a-z0-9](?::\w+)*)[`{]")  # not a prefix like spindle_
GROUPS = {"spindle_slo"}  # of rules; named in documents like a metric
RATE_INTERVAL = "5s"  # five scrapes
LOAD_SAMPLES = 12  # scrapes while there is load; one a second unless the machine is starved

# Queries that have no data before something happened that this load does not cause, and why.
WITHOUT_DATA = {
    "annotation Drain": "nothing drains",
    "annotation Start": "the process does not start twice",
    "annotation Alert": "no alert has fired for as long as it must",
}


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Prometheus:
    """Our configuration with another target and a scrape every second, in a temporary folder."""

    def __init__(self, target):
        self._folder = tempfile.TemporaryDirectory(prefix="spindle-prometheus-")
        folder = pathlib.Path(self._folder.name)
        text = files.CONFIG.read_text()
        for old, new in (("scrape_interval: 15s", "scrape_interval: 1s"),
                         ("scrape_timeout: 10s", "scrape_timeout: 1s"),
                         ("evaluation_interval: 15s", "evaluation_interval: 1s"),
                         ('"127.0.0.1:8000"', f'"{target}"')):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / "prometheus.yml").write_text(text)
        for path in files.RULES:
            shutil.copy(path, folder)
        port = free_ports(1)[0]
        self.address = f"http://127.0.0.1:{port}"
        self._log_path = folder / "log"
        with open(self._log_path, "wb") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                 f"--web.listen-address=127.0.0.1:{port}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)

    def log(self):
        return self._log_path.read_text(errors="replace")

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self._folder.cleanup()

    def wait_ready(self, seconds=20):
        def ready():
            assert self.process.poll() is None, f"prometheus ended\n{self.log()}"
            try:
                return urllib.request.urlopen(f"{self.address}/-/ready", timeout=5).status == 200
            except OSError:
                return False
        wait_until(ready, seconds, "prometheus is ready")

    def api(self, path, **parameters):
        url = f"{self.address}/api/v1/{path}"
        data = urllib.parse.urlencode(parameters).encode() if parameters else None
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data), timeout=20) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from None

    def query(self, expression):
        return self.api("query", query=expression)["result"]

    def finite(self, expression, begin, end):
        """Number of values, not NaN and not infinite, that the expression had from begin to end."""
        series = self.api("query_range", query=expression, start=begin, end=end, step=1)["result"]
        return sum(math.isfinite(float(value)) for one in series for _, value in one["values"])


class Load:
    """Requests of every kind over both APIs until it is stopped."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.errors = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._repeat, args=(work,))
                         for work in (self._completions, self._completions, self._chats, self._oddities, self._bench)]
        for thread in self._threads:
            thread.start()

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "the load does not end"
        assert not self.errors, self.errors

    def _repeat(self, work):
        while not self._stop.is_set():
            try:
                work()
            except Exception as error:  # pylint: disable=broad-except
                self.errors.append(f"{work.__name__}: {error!r}")
                return

    def _completions(self):
        prompt = golden("kv_lines_700")["prompt_ids"]
        self.cluster.complete(prompt, 60, ignore_eos=True)
        self.cluster.complete(prompt, 40, ignore_eos=True, kv_policy={"profile": "full"})
        self.cluster.complete(golden("prose64")["prompt_ids"], 30, n=2, temperature=1, seed=1)

    def _chats(self):
        for stream in (False, True):
            answer = self.cluster.post("/v1/chat/completions", {
                "messages": [{"role": "user", "content": "What is the secret code of the quiet mill?"}],
                "max_tokens": 20, "stream": stream})
            assert answer.status == 200, answer.body

    def _oddities(self):
        """What is refused, what is not found, what a client leaves."""
        assert self.cluster.post("/v1/completions", {"prompt": "x", "max_tokens": -1}).status == 400
        assert self.cluster.get("/nothing").status == 404
        self.cluster.stream(1000).leave()
        self._stop.wait(0.5)

    def _bench(self):
        """Twice as many requests at once as the cluster runs, so that some wait at every moment."""
        self.cluster.spindle("bench", "--num-prompts", "40", "--random-input-len", "150",
                             "--random-output-len", "24", "--max-concurrency", "8", "--ignore-eos")


def families(text):
    """{name: type} of a text of metrics."""
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))


def family_of(name, known):
    """The family of a series: histograms have three."""
    if name in known:
        return name
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    return base if known.get(base) == "histogram" else None


def documented(text):
    """Metrics named in the first cells of a table: `spindle_a_b_total`, `_c_total` stands for
    spindle_a_c_total."""
    found = set()
    for line in text.splitlines():
        if not line.startswith("| `spindle_"):
            continue
        full = None
        for name in re.findall(r"`([a-z0-9_]+)`", line.split("|")[1]):
            if name.startswith("_"):
                words = name.count("_")
                name = full.rsplit("_", words)[0] + name
            full = name
            found.add(name)
    return found


class LiveTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(ranks=3, arguments=["--max-num-seqs", "4", "--metrics-compat", "vllm"]).__enter__()
        cls.addClassCleanup(cls.cluster.__exit__, None, None, None)
        cls.prometheus = Prometheus(f"127.0.0.1:{cls.cluster.http_port}")
        cls.addClassCleanup(cls.prometheus.close)
        cls.prometheus.wait_ready()
        cls.cluster.wait_ready()
        cls.begin = time.time()
        load = Load(cls.cluster)
        try:
            wait_until(lambda: cls.samples_since_begin() >= LOAD_SAMPLES or load.errors, 60, "samples of the load")
            cls.loaded_until = time.time()
            cls.metrics = cls.cluster.get("/metrics").body.decode()
        finally:
            load.stop()
        cls.end = time.time()
        # vLLM's names have a colon, which is right there and nowhere else.
        blocks = re.split(r"(?=^# HELP )", cls.metrics, flags=re.MULTILINE)
        cls.metrics = "".join(block for block in blocks if not block.startswith("# HELP vllm:"))
        cls.families = families(cls.metrics)

    @classmethod
    def samples_since_begin(cls):
        """How often Prometheus has read the metrics since the load began."""
        return sum(float(moment) > cls.begin for one in cls.prometheus.query("spindle_requests_accepted_total[10m]")
                   for moment, _ in one["values"])

    def assert_has_data(self, cases):
        """cases: (what, expression) each."""
        missing = [f"{what}: {expression}" for what, expression in cases
                   if self.prometheus.finite(expression, self.begin, self.end) == 0]
        self.assertEqual(missing, [], "no data:\n" + "\n".join(missing))

    def test_the_target_is_up(self):
        up = self.prometheus.query('up{job="spindle"}')
        self.assertEqual([sample["value"][1] for sample in up], ["1"])

    def test_the_text_of_metrics_is_well_formed(self):
        result = subprocess.run(["promtool", "check", "metrics"], input=self.metrics, capture_output=True,
                                text=True, timeout=60, check=False)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def test_documents_name_every_metric_and_no_other(self):
        self.assertEqual(documented(METRICS_DOC.read_text()), set(self.families))

    def test_what_rules_dashboard_and_documents_name_exists_and_has_data(self):
        places = {"dashboard": set(), "rules": set()}
        for _, expression in files.expressions_of(files.read_dashboard()):
            places["dashboard"] |= files.names_in(expression)
        for group in self.prometheus.api("rules")["groups"]:
            for rule in group["rules"]:
                places["rules"] |= files.names_in(rule["query"])
        for path in DOCS:
            places[str(path.relative_to(files.ROOT))] = set(NAME_IN_DOCUMENT.findall(path.read_text()))
        self.assertGreater(len(places["dashboard"]), 50)
        self.assertGreater(len(places["rules"]), 30)
        recorded = set(files.declared("record"))
        cases = []
        for place, names in places.items():
            for name in sorted(names - GROUPS):
                known = name in recorded or family_of(name, self.families)
                self.assertTrue(known, f"{place} names {name}, which is neither in /metrics nor recorded")
                histogram = self.families.get(name) == "histogram"
                cases.append((place, f"{name}_count" if histogram else name))
        self.assert_has_data(cases)

    def test_every_metric_has_data(self):
        self.assert_has_data([(kind, f"{name}_count" if kind == "histogram" else name)
                              for name, kind in self.families.items()])

    def test_every_panel_has_data(self):
        cases = [(where, files.expand(expression, RATE_INTERVAL))
                 for where, expression in files.expressions_of(files.read_dashboard())
                 if where not in WITHOUT_DATA]
        self.assertGreater(len(cases), 50)
        self.assert_has_data(cases)

    def test_dashboards_for_vllm_have_data(self):
        """What the panels of vLLM's own dashboard ask for, with --metrics-compat vllm."""
        select = f'model_name="{MODEL}"'
        cases = []
        for name in ("e2e_request_latency_seconds", "inter_token_latency_seconds", "time_to_first_token_seconds"):
            rates = f"sum by (le) (rate(vllm:{name}_bucket{{{select}}}[5s]))"
            cases += [(f"vLLM {name}", f"histogram_quantile({q}, {rates})") for q in (0.5, 0.9, 0.95, 0.99)]
            cases.append((f"vLLM {name}, mean",
                          f"rate(vllm:{name}_sum{{{select}}}[5s]) / rate(vllm:{name}_count{{{select}}}[5s])"))
        cases += [("vLLM heatmap", f"sum by (le) (increase(vllm:{name}_bucket{{{select}}}[5s]))")
                  for name in ("request_prompt_tokens", "request_generation_tokens",
                               "request_max_num_generation_tokens")]
        cases += [("vLLM gauge", f"vllm:{name}{{{select}}}")
                  for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")]
        cases += [("vLLM rate", f"rate(vllm:{name}{{{select}}}[5s])")
                  for name in ("prompt_tokens_total", "generation_tokens_total", "request_queue_time_seconds_sum",
                               "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum")]
        cases.append(("vLLM finish reason",
                      f"sum by (finished_reason) (increase(vllm:request_success_total{{{select}}}[5s]))"))
        self.assert_has_data(cases)

    def test_variables_have_values(self):
        for variable in files.read_dashboard()["templating"]["list"]:
            if variable["type"] != "query":
                continue
            metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()
            values = {series["metric"].get(label) for series in self.prometheus.query(files.expand(metric))}
            with self.subTest(label):
                self.assertTrue(values and None not in values)
                if label == "stage":
                    self.assertEqual(values, {"0", "1", "2"})

    def test_rules_and_alerts_are_evaluated_without_error(self):
        rules = [rule for group in self.prometheus.api("rules")["groups"] for rule in group["rules"]]
        self.assertEqual({rule["name"] for rule in rules},
                         set(files.declared("alert")) | set(files.declared("record")))
        self.assertEqual([rule for rule in rules if rule["health"] != "ok" or rule.get("lastError")], [])
        self.assertEqual([alert for alert in self.prometheus.api("alerts")["alerts"] if alert["state"] == "firing"], [])

    def test_requests_add_up_at_every_sample(self):
        names = ("requests_accepted_total", "requests_finished_total", "requests_failed_total",
                 "requests_cancelled_total", "num_requests_running", "num_requests_waiting")
        samples = {}
        # One query, so that no scrape comes between.
        for series in self.prometheus.query(f'{{__name__=~"spindle_({"|".join(names)})"}}[10m]'):
            name = series["metric"]["__name__"].removeprefix("spindle_")
            for moment, value in series["values"]:
                samples.setdefault(moment, {})[name] = float(value)
        self.assertGreaterEqual(len(samples), LOAD_SAMPLES)
        for moment, values in samples.items():
            self.assertEqual(set(values), set(names), moment)
            self.assertEqual(values[names[0]], sum(values[name] for name in names[1:]), f"{moment}: {values}")
        # The load made each of them move, but for failures.
        for name in names:
            if "failed" not in name:
                self.assertGreater(max(values[name] for values in samples.values()), 0, name)

    def test_the_time_of_a_stage_adds_up(self):
        """Computing, compressing, moving and waiting are the whole time while there are requests."""
        series = self.prometheus.query('{__name__=~"spindle_stage_(busy|compress|transfer|bubble)_seconds_total"}[10m]')
        sums = {}  # {stage: {moment: seconds}}
        for one in series:
            for moment, value in one["values"]:
                if self.begin < moment < self.loaded_until:
                    stage = sums.setdefault(one["metric"]["stage"], {})
                    stage[moment] = stage.get(moment, 0) + float(value)
        self.assertEqual(set(sums), {"0", "1", "2"})
        for stage, values in sums.items():
            elapsed = max(values) - min(values)
            self.assertGreaterEqual(len(values), LOAD_SAMPLES)
            spent = values[max(values)] - values[min(values)]
            # A step counts when it is over, and a sample may be as much newer than it says as a
            # scrape takes: together at most some seconds on a machine that is starved.
            self.assertTrue(elapsed / 2 < spent < elapsed + 3, f"stage {stage}: {spent:.1f} of {elapsed:.1f} s")

    def test_z_a_cluster_that_ends_is_noticed(self):
        """Last: it ends the cluster."""
        self.cluster.spindle("drain")
        self.assertEqual(self.cluster.wait_exit(30), 0)

        def pending():
            return [alert["labels"]["alertname"] for alert in self.prometheus.api("alerts")["alerts"]
                    if alert["labels"]["alertname"] == "SpindleTargetDown"]
        wait_until(pending, 10, "SpindleTargetDown is pending")


if __name__ == "__main__":
    for program in ("prometheus", "promtool"):
        if shutil.which(program) is None:
            print(f"{program} is not installed (Debian, Ubuntu: prometheus)")
            sys.exit(77)
    unittest.main()
