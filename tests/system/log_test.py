#!/usr/bin/env python3
"""The log of a live cluster: fields, levels that change on all ranks, sums, and no user's text."""
import json
import unittest

from cluster import Cluster, wait_until

SECRET = "xylophonist"
PROMPT = f"The {SECRET} said:\nonce upon a time there was"


def settings(**values):
    arguments = []
    for name, value in values.items():
        arguments += ["--set", f"log.{name}={value}"]
    return arguments


class LogTest(unittest.TestCase):
    def log_level(self, cluster, level):
        cluster.spindle("log-level", level, port=cluster.http_port)

    def lines(self, cluster):
        """The objects of a log in JSON; every line of it must be one."""
        return [json.loads(line) for line in cluster.log().splitlines()]

    def about(self, cluster, request_id):
        return [line for line in self.lines(cluster) if line.get("request_id") == request_id]

    def complete(self, cluster, request_id, **fields):
        body = {"model": "spindle-mini", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields}
        answer = cluster.post("/v1/completions", body, headers={"X-Request-Id": request_id})
        self.assertIn(answer.status, (200, 400, 504), answer.body)
        return answer

    def test_json_lines(self):
        with Cluster(ranks=2, arguments=settings(format="JSON", summary_interval_ms=200)) as cluster:
            cluster.wait_ready()
            self.complete(cluster, "quiet-1")
            self.assertEqual(self.about(cluster, "quiet-1"), [])
            self.log_level(cluster, "debug")
            text = self.complete(cluster, "loud-1").json()["choices"][0]["text"]
            self.complete(cluster, "late-1", max_tokens=4000, ignore_eos=True, timeout_ms=50)
            self.complete(cluster, "wrong-1", max_tokens=-1)

            told = wait_until(lambda: self.about(cluster, "loud-1")[1:], 10, "both lines are there")
            told = self.about(cluster, "loud-1")
            self.assertEqual([line["message"].split(":")[0] for line in told],
                             ["accepted", "finished"])
            for line in told:
                self.assertEqual((line["level"], line["rank"], line["stage"]), ("debug", 0, 0))
            late = wait_until(lambda: self.about(cluster, "late-1")[1:], 10, "the failure is told")
            self.assertEqual(late[0]["level"], "warning")
            self.assertIn("DEADLINE_EXCEEDED", late[0]["message"])

            changes = [line for line in self.lines(cluster)
                       if line["message"] == "log level debug, was info"]
            self.assertEqual(sorted(line["rank"] for line in changes), [0, 1])
            self.assertEqual({line["stage"] for line in changes}, {0, 1})

            pattern = (r"prompt \d+\.\d tokens/s, generation \d+\.\d tokens/s, running \d+, waiting "
                       r"\d+, KV \d+\.\d % of stage \d")
            sums = wait_until(lambda: [line for line in self.lines(cluster)
                                       if line["message"].startswith("prompt ")],
                              10, "a line of sums")
            for line in sums:
                self.assertRegex(line["message"], pattern)
                self.assertEqual((line["rank"], line["level"]), (0, "info"))

            self.log_level(cluster, "error")
            self.complete(cluster, "silent-1")
            cluster.spindle("drain")
            self.assertEqual(cluster.wait_exit(30), 0)
            self.assertEqual(self.about(cluster, "silent-1"), [])
            # Neither what a user asked nor what he was answered.
            self.assertNotIn(SECRET, cluster.log())
            self.assertNotIn(text.strip(), cluster.log())

    def test_prompts_are_there_when_they_are_asked_for(self):
        arguments = settings(level="DEBUG", log_prompts="true", max_prompt_bytes=30)
        with Cluster(ranks=1, arguments=arguments) as cluster:
            cluster.wait_ready()
            self.complete(cluster, "shown-1")
            wait_until(lambda: "finished: " in cluster.log(), 10, "the request is told of")
            shown = [line for line in cluster.log().splitlines() if "] prompt: " in line]
            self.assertEqual(len(shown), 1)
            self.assertRegex(shown[0], r" rank 0 stage 0 debug \[req shown-1\] prompt: .*The "
                             + SECRET + r" said:\\non.*\.\.\.$")
            self.assertNotIn("once upon", shown[0])

    def test_levels_need_the_key(self):
        with Cluster(ranks=1, environment={"SPINDLE_API_KEY": "a-key"}) as cluster:
            cluster.wait_ready()
            self.assertEqual(cluster.post("/v1/spindle/log_level", {"level": "debug"}).status, 401)
            self.log_level(cluster, "debug")  # the client has the key
            self.assertIn("log level debug, was info", cluster.log())
            wrong = cluster.post("/v1/spindle/log_level", {"level": "loud"},
                                 headers={"Authorization": "Bearer a-key"})
            self.assertEqual(wrong.status, 400)


if __name__ == "__main__":
    unittest.main()
