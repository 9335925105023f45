#!/usr/bin/env python3
"""A recording of a live cluster of three stages under load, by `spindle trace`."""
import collections
import json
import pathlib
import select
import tempfile
import threading
import unittest

from cluster import Cluster, golden, wait_until

RANKS = 3
KEY = {"SPINDLE_API_KEY": "a-key"}
THREADS = {"compute", "transfer", "compression", "bubble"}


class Load:
    """Requests one after another, some at a time, while the block lasts."""

    def __init__(self, cluster, count=3):
        self.cluster = cluster
        self.stopping = threading.Event()
        self.failures = []
        self.threads = [threading.Thread(target=self.run) for _ in range(count)]

    def run(self):
        body = {"model": "spindle-mini", "prompt": golden("prose64")["prompt_ids"], "max_tokens": 24,
                "temperature": 0, "ignore_eos": True}
        while not self.stopping.is_set():
            answer = self.cluster.post("/v1/completions", body, headers=AUTHORIZATION)
            if answer.status != 200:
                self.failures.append(answer.body)
                return

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join(60)


AUTHORIZATION = {"Authorization": "Bearer a-key"}


class Trace:
    """A parsed trace: slices by (rank, thread name), in the file's order."""

    def __init__(self, text):
        document = json.loads(text)
        self.other = document["otherData"]
        self.events = document["traceEvents"]
        names = {(event["pid"], event["tid"]): event["args"]["name"] for event in self.events
                 if event["ph"] == "M" and event["name"] == "thread_name"}
        self.threads = collections.defaultdict(list)
        for event in self.events:
            if event["ph"] == "X":
                self.threads[event["pid"], names[event["pid"], event["tid"]]].append(event)

    def by_step(self, rank, thread, word):
        return {event["args"]["step"]: event for event in self.threads[rank, thread]
                if event["name"].startswith(word)}


class TraceTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(ranks=RANKS, environment=KEY)
        cls.addClassCleanup(cls.cluster.__exit__, None, None, None)
        cls.cluster.__enter__()
        cls.cluster.wait_ready()
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)

    def record(self, *arguments, check=True):
        path = pathlib.Path(self.folder.name) / "trace.json"
        result = self.cluster.spindle("trace", "--output", str(path), *arguments, check=check,
                                      port=self.cluster.http_port)
        return Trace(path.read_text()) if check else result

    def test_a_recording_under_load(self):
        with Load(self.cluster) as load:
            trace = self.record("--seconds", "2")
        self.assertEqual(load.failures, [])
        self.assert_complete(trace)
        for rank in range(RANKS):
            self.assert_slices_fill_the_time(trace, rank)
        for rank in range(RANKS - 1):
            self.assert_clocks_agree(trace, rank)
        self.assert_scheduler(trace)

    def assert_complete(self, trace):
        ranks = trace.other["ranks"]
        self.assertEqual([rank["rank"] for rank in ranks], list(range(RANKS)))
        self.assertEqual(sum(rank["n_layers"] for rank in ranks), 12)
        self.assertEqual(trace.other["dropped_events"], 0)
        self.assertEqual(ranks[0]["clock_error_us"], 0)
        for rank in ranks[1:]:
            self.assertGreater(rank["clock_error_us"], 0)
        self.assertLess(trace.other["clock_error_us"], 50_000)
        self.assertEqual({event["pid"] for event in trace.events}, set(range(RANKS)))
        for rank in range(RANKS):
            self.assertGreater(len(trace.threads[rank, "compute"]), 10)
            self.assertGreater(len(trace.threads[rank, "bubble"]), 10)

    def assert_slices_fill_the_time(self, trace, rank):
        covered = 0
        for thread in THREADS:
            last_end = 0
            for event in trace.threads[rank, thread]:
                self.assertGreaterEqual(event["ts"], last_end - 0.002, (rank, thread, event))
                last_end = event["ts"] + event["dur"]
                covered += event["dur"]
        whole = trace.other["ranks"][rank]
        window = whole["end_us"] - whole["begin_us"]
        self.assertAlmostEqual(window, 2e6, delta=1e4)
        self.assertLess(covered, 1.001 * window)
        # What was under way at the end is not in it: one step, or a short wait.
        self.assertGreater(covered, 0.8 * window, rank)

    def assert_clocks_agree(self, trace, rank):
        sends = trace.by_step(rank, "transfer", "send")
        receives = trace.by_step(rank + 1, "transfer", "receive")
        both = sends.keys() & receives.keys()
        self.assertGreater(len(both), 10)
        error = sum(trace.other["ranks"][r]["clock_error_us"] for r in (rank, rank + 1))
        for step in both:
            send, receive = sends[step], receives[step]
            self.assertEqual(send["args"]["bytes"], receive["args"]["bytes"])
            self.assertGreater(send["args"]["bytes"], 0)
            self.assertGreaterEqual(send["dur"], 0)
            received = receive["ts"] + receive["dur"]
            self.assertGreaterEqual(received, send["ts"] - error, (step, send, receive))

    def assert_scheduler(self, trace):
        plans = [event for event in trace.events
                 if event["ph"] == "i" and event["name"].startswith("plan")]
        self.assertGreater(len(plans), 10)
        self.assertTrue(all(event["pid"] == 0 for event in plans))
        tokens = sum(event["args"]["prefill_tokens"] + event["args"]["decode_tokens"]
                     for event in plans)
        self.assertGreater(tokens, 64)
        counters = [event for event in trace.events if event["ph"] == "C"]
        self.assertGreater(max(event["args"]["running"] for event in counters
                               if event["name"] == "requests"), 0)
        self.assertEqual({event["pid"] for event in counters if event["name"] == "KV used"},
                         set(range(RANKS)))

    def test_a_ring_that_is_too_small_says_so(self):
        with Load(self.cluster):
            trace = self.record("--seconds", "0.7", "--max-events", "16")
        for rank in trace.other["ranks"]:
            self.assertEqual(rank["events"], 16, rank)
            self.assertGreater(rank["dropped_events"], 0, rank)
        self.assertEqual(trace.other["dropped_events"],
                         sum(rank["dropped_events"] for rank in trace.other["ranks"]))

    def test_an_idle_cluster_is_one_bubble(self):
        trace = self.record("--seconds", "0.5")
        for rank in range(RANKS):
            idle = sum(event["dur"] for event in trace.threads[rank, "bubble"])
            self.assertGreater(idle, 0.8 * 0.5e6)
            self.assertEqual(trace.threads[rank, "compute"], [])

    def test_one_recording_at_a_time_and_a_client_that_leaves_ends_its_own(self):
        def begin():
            started = self.cluster.connection()
            started.request("POST", "/v1/spindle/trace", json.dumps({"seconds": 60}),
                            {"Content-Type": "application/json", **AUTHORIZATION})
            return started
        connection = begin()
        is_answered = False

        def long_one_was_refused():
            # The server may have taken up a short one first.
            nonlocal is_answered
            if is_answered or not select.select([connection.sock], [], [], 0)[0]:
                return False
            is_answered = connection.getresponse().status != 409
            return not is_answered

        def refused():
            answer = self.cluster.post("/v1/spindle/trace", {"seconds": 0.01}, headers=AUTHORIZATION)
            return answer.status == 409

        def second_is_refused():
            nonlocal connection
            if long_one_was_refused():
                connection.close()
                connection = begin()
            return refused()
        wait_until(second_is_refused, 10, "a second recording is refused")
        result = self.record("--seconds", "0.1", check=False)
        self.assertEqual(result.returncode, 1)
        self.assertIn("under way", result.stderr)
        connection.close()
        wait_until(lambda: not refused(), 10, "a recording is possible again")

    def test_it_needs_the_key(self):
        for body in ({"seconds": 0.1}, {}):
            self.assertEqual(self.cluster.post("/v1/spindle/trace", body).status, 401)


if __name__ == "__main__":
    unittest.main()
