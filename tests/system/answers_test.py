#!/usr/bin/env python3
"""One to four stages give the same tokens, which are the golden ones, over HTTP and over TCP."""
import unittest

from cluster import Cluster, golden

NAMES = ("prose64", "niah_single_700", "kv_lines_700")


def answers(cluster):
    """{name: output text} of the golden prompts."""
    result = {}
    for name in NAMES:
        record = golden(name)
        count = len(record["greedy_ids"])
        choice = cluster.complete(record["prompt_ids"], count)["choices"][0]
        result[name] = choice["text"]
    return result


class AnswersTest(unittest.TestCase):
    def test_any_number_of_ranks_answers_alike(self):
        expected = {name: golden(name)["greedy_text"] for name in NAMES}
        for ranks in (1, 2, 3, 4):
            with self.subTest(ranks=ranks), Cluster(ranks=ranks) as cluster:
                cluster.wait_ready()
                self.assertEqual(answers(cluster), expected)
                self.assertEqual(answers(cluster), expected, "asked again")
                self.stop(cluster)

    def test_http_and_tcp_answer_alike(self):
        prompt = golden("prose64")["prompt"]
        with Cluster(ranks=2) as cluster:
            cluster.wait_ready()
            over_http = cluster.complete(prompt, 12)["choices"][0]["text"]
            over_tcp = cluster.spindle("complete", prompt, "--max-tokens", "12",
                                       "--temperature", "0").stdout
            self.assertEqual(over_tcp.rstrip("\n"), over_http.rstrip("\n"))
            self.stop(cluster)

    def test_every_stage_reports_its_kv(self):
        with Cluster(ranks=2) as cluster:
            cluster.wait_ready()
            cluster.complete(golden("prose64")["prompt_ids"], 4)
            stages = cluster.get("/v1/spindle/state").json()["stages"]
            self.assertEqual([stage["stage"] for stage in stages], [0, 1])
            self.assertEqual(sum(stage["n_layers"] for stage in stages), 12)
            self.assertTrue(all(stage["kv_peak_bytes"] > 0 for stage in stages), stages)
            self.stop(cluster)

    def stop(self, cluster):
        cluster.spindle("drain")
        self.assertEqual(cluster.wait_exit(30), 0)
        cluster.assert_nothing_left()


if __name__ == "__main__":
    unittest.main()
