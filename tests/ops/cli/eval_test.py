"""Runs `spindle eval` and `spindle inspect` against a scripted server, whose scores are the same for
every policy and never the right token's.

usage: eval_test.py SPINDLE SCRIPTED_SERVER SOURCE_DIR [unittest arguments]
"""

import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

SPINDLE = ""
SERVER = ""
SOURCE = pathlib.Path()
TIMEOUT_S = 60


class EvalTest(unittest.TestCase):
    def setUp(self):
        self.server = subprocess.Popen([SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True)
        self.port = int(self.server.stdout.readline())
        self.folder = tempfile.TemporaryDirectory()
        self.root = pathlib.Path(self.folder.name)
        model = SOURCE / "models" / "spindle-mini"
        self.config = self.root / "config.pbtxt"
        self.config.write_text(f'model {{ path: "{model}" }}\n')

    def tearDown(self):
        self.server.stdin.close()
        self.server.wait(TIMEOUT_S)
        self.server.stdout.close()
        self.folder.cleanup()

    def spindle(self, *args):
        return subprocess.run([SPINDLE, *map(str, args)], capture_output=True, text=True,
                              timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)

    def eval(self, *args, data="public", out="out.json"):
        return self.spindle("eval", "--config", self.config, "--server", f"127.0.0.1:{self.port}",
                            "--data", SOURCE / "eval" / f"{data}.jsonl.gz",
                            "--json", self.root / out, *args)

    def test_measures_and_reports(self):
        done = self.eval("--profiles", "full,spindle", "--bytes", "50,25", "--regime", "qa,qw",
                         "--limit", "10", "--concurrency", "3",
                         "--prose", SOURCE / "eval" / "heldout-prose.txt.gz",
                         "--prose-prefixes", "500", "--prose-windows", "2",
                         "--report", self.root / "docs" / "quality.md",
                         "--plots", self.root / "docs" / "plots")
        self.assertEqual(done.returncode, 0, done.stderr)
        rows = json.loads((self.root / "out.json").read_text())
        self.assertEqual([(r["profile"], r["regime"], r["bytes_target"]) for r in rows],
                         [("full", "qa", 100), ("spindle", "qa", 50), ("spindle", "qa", 25),
                          ("full", "qw", 100), ("spindle", "qw", 50), ("spindle", "qw", 25)])
        for row in rows:
            self.assertEqual(row["kl_mean"], 0)
            self.assertIsNone(row["macro"])  # the reference is never right, so no group counts
            self.assertEqual(row["macro_all"], 0)
            self.assertAlmostEqual(row["ppl"], 2.71828, 4)
            self.assertEqual(row["prose"]["500"]["windows"], 2)
            self.assertEqual(row["model"], "scripted")
        # The scripted server's context is 4,096 tokens.
        self.assertIn("are left out: longer than the server's context", done.stderr)
        report = (self.root / "docs" / "quality.md").read_text()
        self.assertIn("# Quality over KV bytes", report)
        self.assertFalse(list(self.root.glob("*.partial.jsonl")))
        again = self.spindle("eval", "--report-only", self.root / "out.json",
                             "--report", self.root / "docs" / "again.md",
                             "--plots", self.root / "docs" / "plots")
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertEqual((self.root / "docs" / "again.md").read_text(), report)

    def test_the_servers_own_policy_has_no_size(self):
        done = self.eval("--profiles", "server", "--bytes", "50,25", "--limit", "4",
                         "--report", self.root / "quality.md", "--plots", self.root / "plots")
        self.assertEqual(done.returncode, 0, done.stderr)
        rows = json.loads((self.root / "out.json").read_text())
        self.assertEqual([(r["profile"], r.get("bytes_target")) for r in rows],
                         [("full", 100), ("server", None)])
        self.assertIn("| server | - |", (self.root / "quality.md").read_text())

    def test_order_and_sessions_do_not_matter(self):
        args = ("--limit", "5", "--bytes", "25")
        self.assertEqual(self.eval(*args, "--concurrency", "4", out="a.json").returncode, 0)
        self.assertEqual(self.eval(*args, "--concurrency", "1", "--no-sessions",
                                   out="b.json").returncode, 0)
        self.assertEqual((self.root / "a.json").read_text(), (self.root / "b.json").read_text())

    def test_resume(self):
        args = ("--limit", "5", "--bytes", "25")
        done = self.eval(*args, "--keep-journal")
        self.assertEqual(done.returncode, 0, done.stderr)
        expected = (self.root / "out.json").read_text()
        journal = self.root / "out.json.partial.jsonl"
        lines = journal.read_text().splitlines(keepends=True)
        # What a killed run leaves: some lines, the last one cut.
        journal.write_text("".join(lines[:3]) + lines[3][:20])
        refused = self.eval(*args)
        self.assertEqual(refused.returncode, 1, refused.stderr)
        self.assertIn("--resume", refused.stderr)
        resumed = self.eval(*args, "--resume")
        self.assertEqual(resumed.returncode, 0, resumed.stderr)
        self.assertEqual((self.root / "out.json").read_text(), expected)
        self.assertFalse(journal.exists())
        journal.write_text(lines[0])
        other = self.eval(*args, "--resume", data="calibration")
        self.assertEqual(other.returncode, 1)
        self.assertIn("other settings", other.stderr)

    def test_calibrate(self):
        table = self.root / "table.pbtxt"
        done = self.eval("--calibrate", "--table", table, "--limit", "2", "--concurrency", "2",
                         data="calibration")
        # Everything is measured, and then found to be without meaning.
        self.assertEqual(done.returncode, 1)
        self.assertIn("576/576 cells", done.stderr)
        self.assertIn("does not take overrides", done.stderr)
        self.assertFalse(table.exists())

    def test_interrupt(self):
        process = subprocess.Popen(
            [SPINDLE, "eval", "--config", str(self.config), "--server", f"127.0.0.1:{self.port}",
             "--data", str(SOURCE / "eval" / "public.jsonl.gz"), "--json",
             str(self.root / "out.json")],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        journal = self.root / "out.json.partial.jsonl"
        deadline = time.monotonic() + TIMEOUT_S
        while not (journal.exists() and journal.read_text().count("\n") > 2):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=TIMEOUT_S)
        self.assertEqual(process.returncode, 130, error)
        self.assertIn("--resume continues", error)

    def test_wrong_use(self):
        self.assertEqual(self.spindle("eval").returncode, 2)
        self.assertEqual(self.eval("--regime", "qx").returncode, 2)
        self.assertEqual(self.eval("--bytes", "0").returncode, 2)
        self.assertEqual(self.eval("--server", "nowhere").returncode, 2)
        self.assertEqual(self.eval("--calibrate", "--report-only", "x").returncode, 2)
        data = self.root / "data.jsonl.gz"
        with gzip.open(data, "wt") as file:
            file.write("{}\n")
        done = self.spindle("eval", "--config", self.config, "--data", data, "--json", "x")
        self.assertEqual(done.returncode, 2)
        self.assertIn("line 1", done.stderr)
        self.assertEqual(self.spindle("eval", "--report-only", self.config).returncode, 2)

    def test_nobody_listens(self):
        done = self.spindle("eval", "--config", self.config, "--server", "127.0.0.1:1", "--data",
                            SOURCE / "eval" / "calibration.jsonl.gz", "--json", "x")
        self.assertEqual(done.returncode, 3, done.stderr)

    def test_inspect(self):
        done = self.spindle("inspect", "--prompt", "some text", "--kv-policy", "spindle",
                            "--port", self.port)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("Nothing was compressed", done.stdout)
        done = self.spindle("inspect", "--prompt", self.config, "--json", "--port", self.port)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads(done.stdout)["boundaries"], [])
        done = self.spindle("inspect", "invalid", "--port", self.port)
        self.assertEqual(done.returncode, 1)


if __name__ == "__main__":
    SPINDLE, SERVER = sys.argv[1:3]
    SOURCE = pathlib.Path(sys.argv[3])
    os.environ.pop("SPINDLE_API_KEY", None)
    unittest.main(argv=[sys.argv[0]] + sys.argv[4:], verbosity=2)
