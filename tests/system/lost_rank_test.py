#!/usr/bin/env python3
"""A rank that dies or hangs ends the job within seconds, with a message, and hangs no client."""
import http.client
import signal
import time
import unittest

from cluster import Cluster

LIMIT_SECONDS = 5


class LostRankTest(unittest.TestCase):
    def lose(self, rank, number, *, while_streaming=False):
        with Cluster(ranks=2) as cluster:
            cluster.wait_ready()
            response = cluster.stream() if while_streaming else None
            start = time.monotonic()
            cluster.signal_rank(rank, number)
            code = cluster.wait_exit(LIMIT_SECONDS)
            self.assertNotEqual(code, 0)
            if response is not None:
                self.assert_stream_ends(response, start)
            cluster.assert_nothing_left()
            return cluster.log()

    def assert_stream_ends(self, response, start):
        try:
            rest = response.read()
        except (http.client.HTTPException, OSError):
            rest = b""
        self.assertLess(time.monotonic() - start, LIMIT_SECONDS + 1)
        self.assertNotIn(b'"finish_reason":"stop"', rest)
        self.assertNotIn(b'"finish_reason":"length"', rest)

    def test_rank_1_is_killed(self):
        self.assertIn("rank 1", self.lose(1, signal.SIGKILL))

    def test_rank_1_is_killed_while_a_request_runs(self):
        self.assertIn("rank 1", self.lose(1, signal.SIGKILL, while_streaming=True))

    def test_rank_0_is_killed(self):
        self.assertIn("rank 0", self.lose(0, signal.SIGKILL))

    def test_rank_1_hangs(self):
        # Nothing but silence tells the others: the message is theirs.
        self.assertRegex(self.lose(1, signal.SIGSTOP), r"rank 1\b.*(lost|not been heard|silent|no sign)")

    def test_rank_1_hangs_while_a_request_runs(self):
        self.assertIn("rank 1", self.lose(1, signal.SIGSTOP, while_streaming=True))

    def test_mpirun_is_killed(self):
        # Nobody forwards this: the ranks must notice that their parent is gone.
        with Cluster(ranks=2) as cluster:
            cluster.wait_ready()
            cluster.signal_mpirun(signal.SIGKILL)
            cluster.wait_exit(LIMIT_SECONDS)
            cluster.assert_nothing_left(LIMIT_SECONDS)


if __name__ == "__main__":
    unittest.main()
