#!/usr/bin/env python3
"""Every way to stop a cluster: gently, at once, idle, and with a request running."""
import signal
import time
import unittest

from cluster import Cluster, golden, mpirun_forwards, wait_until


class StopTest(unittest.TestCase):
    def assert_stops(self, cluster, seconds=10):
        self.assertEqual(cluster.wait_exit(seconds), 0)
        cluster.assert_nothing_left()

    def test_idle(self):
        ways = {
            "spindle drain": lambda cluster: cluster.spindle("drain"),
            "SIGUSR2 to mpirun": lambda cluster: cluster.signal_mpirun(signal.SIGUSR2),
            "SIGUSR1 to rank 0": lambda cluster: cluster.signal_rank(0, signal.SIGUSR1),
            "SIGTERM to rank 0": lambda cluster: cluster.signal_rank(0, signal.SIGTERM),
            "SIGINT to rank 0": lambda cluster: cluster.signal_rank(0, signal.SIGINT),
        }
        for name, stop in ways.items():
            with self.subTest(name), Cluster(ranks=2) as cluster:
                cluster.wait_ready()
                stop(cluster)
                self.assert_stops(cluster)

    def test_sigusr1_to_mpirun(self):
        if not mpirun_forwards(signal.SIGUSR1):
            self.skipTest("this mpirun keeps SIGUSR1 to itself")
        with Cluster(ranks=2) as cluster:
            cluster.wait_ready()
            cluster.signal_mpirun(signal.SIGUSR1)
            self.assert_stops(cluster)

    def test_sigterm_to_mpirun(self):
        # mpirun passes it on, kills what is left after odls_base_sigkill_timeout (1 s), and ends
        # with 1 whatever the ranks returned.
        with Cluster(ranks=2) as cluster:
            cluster.wait_ready()
            cluster.signal_mpirun(signal.SIGTERM)
            cluster.wait_exit(10)
            cluster.assert_nothing_left()

    def test_a_drain_finishes_the_running_request_and_takes_no_new_one(self):
        with Cluster(ranks=2) as cluster:
            cluster.wait_ready()
            response = cluster.stream(max_tokens=300)
            cluster.signal_mpirun(signal.SIGUSR2)
            wait_until(lambda: cluster.get("/ready").status == 503, 5, "/ready answers 503")
            self.assertEqual(cluster.get("/live").status, 200)
            refused = cluster.post("/v1/completions", {"model": "spindle-mini", "prompt": "a", "max_tokens": 1})
            self.assertEqual(refused.status, 503)
            self.assertIsNotNone(refused.headers["Retry-After"])
            rest = response.read()
            self.assertIn(b'"finish_reason":"length"', rest.replace(b": ", b":"))
            self.assertIn(b"data: [DONE]", rest)
            self.assert_stops(cluster)

    def test_the_second_signal_aborts(self):
        with Cluster(ranks=2) as cluster:
            cluster.wait_ready()
            cluster.stream(max_tokens=8000)
            cluster.signal_rank(0, signal.SIGTERM)
            wait_until(lambda: cluster.get("/ready").status == 503, 5, "/ready answers 503")
            start = time.monotonic()
            cluster.signal_rank(0, signal.SIGTERM)
            self.assertNotEqual(cluster.wait_exit(5), 0)
            self.assertLess(time.monotonic() - start, 5)
            cluster.assert_nothing_left()

    def test_a_drain_has_a_deadline(self):
        with Cluster(ranks=2, arguments=["--set", "api.drain_timeout_ms=500"]) as cluster:
            cluster.wait_ready()
            cluster.stream(max_tokens=8000)
            cluster.signal_mpirun(signal.SIGUSR2)
            self.assert_stops(cluster)

    def test_a_client_that_leaves_frees_its_kv(self):
        with Cluster(ranks=2) as cluster:
            cluster.wait_ready()
            cluster.stream(max_tokens=8000).leave()

            def idle():
                state = cluster.get("/v1/spindle/state").json()
                return all(stage["kv_used_bytes"] == 0 for stage in state["stages"])
            wait_until(idle, 10, "KV of the cancelled request is free")
            cluster.complete(golden("prose64")["prompt_ids"], 2)
            cluster.spindle("drain")
            self.assert_stops(cluster)


if __name__ == "__main__":
    unittest.main()
