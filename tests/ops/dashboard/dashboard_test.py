#!/usr/bin/env python3
"""The dashboard in a browser, on a real cluster of three stages under load.

Screenshots are left in the build folder's dashboard/.
"""
import http.client
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import threading
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "system"))

from browser import SKIPPED, Browser, NoBrowser  # noqa: E402
from cluster import MODEL, ROOT, Cluster, golden, wait_until  # noqa: E402

KEY = "sk-dashboard-test"
STAGES = 3
MAX_STREAMS = 32
SHOTS = pathlib.Path(os.environ.get("SPINDLE_BINARY_DIR", ROOT / "build")) / "dashboard"
# A stated bar: one second from a state's arrival to the frame that shows it.
BIG_STAGES, BIG_LAYERS, BIG_SECONDS = 64, 128, 1.0
browser = None


class Load:
    """Clients that keep a cluster busy until the block is left."""

    def __init__(self, cluster, clients=4, **fields):
        self.cluster = cluster
        self.fields = {"max_tokens": 60, "ignore_eos": True, **fields}
        self.errors = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(30)
        if self.errors:
            raise AssertionError(f"requests failed: {self.errors[:3]}")

    def _run(self, number):
        prompt = golden("prose64")["prompt_ids"] * (2 + 2 * number)
        while not self.stop.is_set():
            answer = post(self.cluster, {"prompt": prompt, **self.fields})
            if answer.status != 200:
                self.errors.append(answer.body)
                return


def post(cluster, body):
    return cluster.post("/v1/completions", {"model": MODEL, "temperature": 0, **body},
                        headers={"Authorization": f"Bearer {KEY}"})


class Stream:
    """A long completion whose output is read and thrown away; ends when it is told or cancelled.

    again: asked for anew whenever it ends by itself, so that a slow page does not outlast it."""

    def __init__(self, cluster, again=False, **fields):
        self.connection = cluster.connection(60)
        self.body = {"model": MODEL, "prompt": golden("prose64")["prompt_ids"], "max_tokens": 7000, "temperature": 0,
                     "stream": True, "ignore_eos": True, **fields}
        self.again = again
        self._ask()
        self.rest = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _ask(self):
        self.connection.request("POST", "/v1/completions", json.dumps(self.body),
                                {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"})
        self.response = self.connection.getresponse()
        if self.response.status != 200:
            raise AssertionError(self.response.read())

    def _read(self):
        try:
            while True:
                for line in self.response:
                    self.rest = (self.rest + [line])[-8:]
                if not self.again:
                    return
                self._ask()
        except (OSError, ValueError, http.client.HTTPException):
            pass

    def ended(self):
        return not self.thread.is_alive()

    def leave(self):
        self.again = False
        self.connection.sock and self.connection.sock.shutdown(2)
        self.thread.join(10)
        self.response.close()
        self.connection.close()


def metrics(cluster):
    """{"name" or "name{stage}": value} of /metrics."""
    found = {}
    for line in cluster.get("/metrics").body.decode().splitlines():
        match = re.match(r"(\w+)(?:\{([^}]*)\})? (\S+)$", line)
        if not match or line.startswith("#"):
            continue
        stage = re.search(r'stage="(\d+)"', match.group(2) or "")
        found[match.group(1) + (f"{{{stage.group(1)}}}" if stage else "")] = float(match.group(3))
    return found


def table(panel):
    """The rows of the table behind a panel's picture, opened for the look and closed again."""
    browser("click", selector=f"#{panel} .panel-tools button")
    rows = browser.eval(f"[...document.querySelectorAll('#{panel} .table-behind tbody tr')]"
                        ".map((row) => [...row.children].map((cell) => cell.textContent))")
    browser("click", selector=f"#{panel} .panel-tools button")
    return rows


def counter(name):
    """A number of the line below the requests."""
    return int(re.search(rf"{name} ([\d,]+)", browser.text("#counters")).group(1).replace(",", ""))


def figure(label):
    return browser.eval("[...document.querySelectorAll('#figures > div')].find((one) => "
                        f"one.children[0].textContent === {json.dumps(label)}).children[1].firstChild.textContent")


class LiveClusterTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(ranks=STAGES, environment={"SPINDLE_API_KEY": KEY})
        cls.cluster.start()
        cls.addClassCleanup(cls.cluster.__exit__, None, None, None)
        cls.cluster.wait_ready()
        cls.url = f"http://127.0.0.1:{cls.cluster.http_port}/dashboard"

    def setUp(self):
        browser("open", url=self.url)
        browser.wait("document.querySelector('#link').dataset.state === 'live'")
        browser.wait("!document.body.classList.contains('blank')")

    def tearDown(self):
        self.assertEqual(browser("problems"), [])

    def test_figures_agree_with_metrics(self):
        with Load(self.cluster):
            browser.wait("document.querySelectorAll('#requests tbody tr').length >= 3", 15)
            before, start = metrics(self.cluster), time.monotonic()
            wait_until(lambda: time.monotonic() - start > 6, 8, "a while of load")
            shown = float(figure("Generated").replace(",", ""))
            after, seconds = metrics(self.cluster), time.monotonic() - start
            real = (after["spindle_generation_tokens_total"] - before["spindle_generation_tokens_total"]) / seconds
            print(f"tokens per second: page {shown}, metrics {real:.1f}")
            self.assertGreater(shown, real / 2)
            self.assertLess(shown, real * 2)
            self.assertRegex(figure("First token p95"), r"^[\d.]+ m?s$")
            self.assertRegex(figure("Between tokens p95"), r"^[\d.]+ (µs|ms|s)$")
            SHOTS.mkdir(parents=True, exist_ok=True)
            browser("shot", file=str(SHOTS / "desktop-light.png"))
            browser("theme", scheme="dark")
            browser("shot", file=str(SHOTS / "desktop-dark.png"))
            browser("theme", scheme="light")

        # Nothing changes any more: the numbers must be the same, digit for digit.
        wait_until(lambda: metrics(self.cluster)["spindle_num_requests_running"] == 0, 20, "the load has ended")
        real = metrics(self.cluster)
        browser.wait(f"document.querySelector('#counters').textContent.includes("
                     f"'Finished {real['spindle_requests_finished_total']:,.0f} ')")
        self.assertEqual(figure("Running"), "0")
        self.assertEqual(counter("Cancelled"), real["spindle_requests_cancelled_total"])
        self.assertIn(f"{real['spindle_generation_tokens_total']:,.0f} in all", browser.text("#figures"))
        self.assertIn(f"{real['spindle_prompt_tokens_total']:,.0f} in all", browser.text("#figures"))
        rows = table("pipeline")
        self.assertEqual(len(rows), STAGES)
        for i, row in enumerate(rows):
            self.assertEqual(float(row[-1]), real[f"spindle_stage_steps_total{{{i}}}"])
            self.assertIn(f"{real[f'spindle_kv_capacity_bytes{{{i}}}'] / 2**20:.0f} MiB", row[-2])

    def test_the_heat_map_follows_the_policy(self):
        seen = {}
        for profile in ("full", "int4"):
            stream = Stream(self.cluster, again=True, prompt=golden("prose64")["prompt_ids"] * 12, max_tokens=4000,
                            kv_policy={"profile": profile})
            try:
                # Its prompt is compressed and it generates: what it holds stays in this form.
                browser.wait("[...document.querySelectorAll('#requests .tag')].some((tag) => tag.textContent === 'decode')"
                             " && document.querySelector('#layers .panel-note').textContent.includes('kept of')"
                             " && !document.querySelector('.heat-legend').textContent.includes('nothing held')")
                self.wait_two_pictures()
                # The page may be a second behind, and a layer may hold nothing between two requests.
                def shown_and_true():
                    shown = {row[2] for row in table("layers")}
                    state = self.cluster.get("/v1/spindle/state").json()
                    true = {layer["plan"] for stage in state["stages"] for layer in stage["layers"]}
                    return shown if shown == true and all(true) else None
                plans = wait_until(shown_and_true, 20, "the table says what the state says")
                seen[profile] = (plans, browser.eval("document.querySelector('#layers canvas').toDataURL()"))
            finally:
                stream.leave()
            browser.wait("document.querySelector('#layers .panel-note').textContent.includes('nothing')", 15)
        print("plans:", {profile: plans for profile, (plans, _) in seen.items()})
        self.assertNotEqual(seen["full"][0], seen["int4"][0])
        self.assertNotEqual(seen["full"][1], seen["int4"][1])

    def wait_two_pictures(self):
        seen = browser.eval("window.renderTimes.length")
        browser.wait(f"window.renderTimes.length >= {seen + 2}")

    def test_a_request_is_cancelled_through_the_page(self):
        before = metrics(self.cluster)["spindle_requests_cancelled_total"]
        stream = Stream(self.cluster)
        self.addCleanup(stream.leave)
        button = "#requests tbody button"
        browser.wait(f"document.querySelector('{button}')")
        browser("click", selector=button)
        self.assertIn(browser.text(button), ("Really?", "Cancel"))  # it asks for a few seconds only

        def press_again():
            browser.eval(f"document.querySelector('{button}').click()")
            return browser.eval("document.querySelector('#key-dialog').open")
        wait_until(press_again, 20, "the page asks for the key")
        for key, says in (("sk-wrong", "does not know"), (KEY, None)):
            browser("fill", selector="#key-dialog input", text=key)
            browser("press", selector="#key-dialog input", key="Enter")
            if says:
                browser.wait(f"document.querySelector('.dialog-message').textContent.includes('{says}') && "
                             "document.querySelector('#key-dialog').open")
        wait_until(stream.ended, 20, "the stream has ended")
        self.assertEqual(metrics(self.cluster)["spindle_requests_cancelled_total"], before + 1)
        browser.wait(f"document.querySelector('#counters').textContent.includes('Cancelled {before + 1:.0f} ')")
        self.assertEqual(browser.eval("sessionStorage.getItem('spindle-api-key')"), KEY)
        self.assertFalse(browser.eval("Object.values(localStorage).join().includes('sk-')"))

    def test_phone_and_accessibility(self):
        with Load(self.cluster, clients=3):
            browser.wait("document.querySelectorAll('#requests tbody tr').length >= 2", 15)
            browser("theme", scheme="dark")
            self.assert_accessible()
            browser("open", url=self.url, width=390, height=844, scale=2)
            browser.wait("document.querySelectorAll('#requests tbody tr').length >= 2", 15)
            browser.wait("document.querySelector('#throughput canvas').clientWidth > 100")
            self.assertLessEqual(browser.eval("document.documentElement.scrollWidth"), 390)
            browser("shot", file=str(SHOTS / "phone.png"))
            self.assert_accessible()

    def assert_accessible(self):
        serious = [one for one in browser("axe") if one["impact"] in ("serious", "critical")]
        self.assertEqual(serious, [], json.dumps(serious, indent=1))

    def test_more_pages_than_streams(self):
        """The page asks now and then when the server has no stream left, and follows again when it has."""
        browser("open", url=self.url.replace("/dashboard", "/live"))  # gives the stream of setUp back
        taken = []
        try:
            while True:
                connection = self.cluster.connection(10)
                connection.request("GET", "/v1/spindle/events")
                response = connection.getresponse()
                taken.append((response, connection))
                if response.status != 200:
                    break
                self.assertLessEqual(len(taken), MAX_STREAMS)
            self.assertEqual(response.status, 503)
            browser("open", url=self.url)
            browser.wait("document.querySelector('#link').dataset.state === 'polling'")
            browser.wait("document.querySelectorAll('.stage').length === 3")
            self.assertIn("Slow updates", browser.text("#conditions"))
        finally:
            for response, connection in taken:
                response.close()
                connection.close()
        browser.wait("document.querySelector('#link').dataset.state === 'live'", 15)

    def test_z_recovers_when_the_cluster_comes_back(self):
        """The last one: it stops the cluster that the others use."""
        self.cluster.spindle("drain")
        self.assertEqual(self.cluster.wait_exit(30), 0)
        browser.wait("document.querySelector('#link').dataset.state === 'lost'", 20)
        self.assertIn("Disconnected", browser.text("#conditions"))
        self.cluster.start()
        self.cluster.wait_ready()
        post(self.cluster, {"prompt": golden("prose64")["prompt_ids"], "max_tokens": 8})
        browser.wait("document.querySelector('#link').dataset.state === 'live'", 20)
        browser.wait("document.querySelector('#counters').textContent.includes('Finished 1 ')")
        self.assertEqual(browser.text("#conditions"), "")
        browser.wait("/^[\\d.,]+$/.test(document.querySelectorAll('#figures dd b')[2].textContent)")
        self.assertGreaterEqual(float(figure("Generated").replace(",", "")), 0)
        self.cluster.spindle("drain")
        self.assertEqual(self.cluster.wait_exit(30), 0)


class ManyStagesTest(unittest.TestCase):
    def test_a_large_cluster_is_drawn_in_time(self):
        server = subprocess.Popen(["node", str(HERE / "fake_server.mjs"), "--stages", str(BIG_STAGES),
                                   "--layers", str(BIG_LAYERS), "--past", "20"],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            port = int(server.stdout.readline().split()[1])
            browser("open", url=f"http://127.0.0.1:{port}/dashboard", width=1920, height=1080, scheme="dark")
            browser.wait("window.renderTimes.length >= 6", 30)
            times = [round(time / 1000, 3) for time in browser.eval("window.renderTimes")]
            print(f"{BIG_STAGES} stages of {BIG_LAYERS} layers, from state to frame: {times} s")
            self.assertLess(statistics.median(times), BIG_SECONDS)
            self.assertEqual(browser.eval("document.querySelectorAll('.stage').length"), BIG_STAGES)
            self.assertLessEqual(browser.eval("document.documentElement.scrollWidth"), 1920)
            browser("shot", file=str(SHOTS / "wall-64x128.png"))
            self.assertEqual(browser("problems"), [])
        finally:
            server.stdin.close()
            server.stdout.close()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(10)


if __name__ == "__main__":
    SHOTS.mkdir(parents=True, exist_ok=True)
    try:
        browser = Browser()
    except NoBrowser as reason:
        print(reason)
        sys.exit(SKIPPED)
    try:
        program = unittest.main(exit=False)
    finally:
        browser.close()
    sys.exit(not program.result.wasSuccessful())
