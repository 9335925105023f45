#!/usr/bin/env python3
"""The `openai` npm package, unmodified, against a real cluster."""
import subprocess
import unittest

from cluster import MODEL, ROOT, Cluster

KEY = "sk-system-test"


class OpenAiClientTest(unittest.TestCase):
    def test_openai_npm_package(self):
        folder = ROOT / "tests" / "npm"
        with Cluster(ranks=2, environment={"SPINDLE_API_KEY": KEY}) as cluster:
            cluster.wait_ready()
            result = subprocess.run(
                ["node", "openai_client_test.mjs", "--url", f"http://127.0.0.1:{cluster.http_port}/v1",
                 "--model", MODEL, "--api-key", KEY],
                cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
            print(result.stdout, result.stderr)
            self.assertEqual(result.returncode, 0, result.stderr)
            cluster.spindle("drain")
            self.assertEqual(cluster.wait_exit(30), 0)
            cluster.assert_nothing_left()


if __name__ == "__main__":
    unittest.main()
