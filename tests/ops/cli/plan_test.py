"""Runs `spindle plan`: exit codes, JSON, and the examples of docs/sizing.md, which are its output.

usage: plan_test.py SPINDLE SOURCE_FOLDER [--update | unittest arguments]

--update writes the present output into docs/sizing.md.
"""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import unittest

SPINDLE = ""
ROOT = pathlib.Path()
TIMEOUT_S = 60
EIGHT = ["--model", "models/shapes/llama-3-8b"]
# A fenced block that begins with a command.
EXAMPLE = re.compile(r"^```\n\$ (spindle plan [^\n\\]*(?:\\\n[^\n\\]*)*)\n(.*?)^```$", re.M | re.S)


def plan(*args):
    return subprocess.run([SPINDLE, "plan", *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=TIMEOUT_S, check=False)


def output_of(command):
    words = shlex.split(command.replace("\\\n", " "))
    result = plan(*words[2:])
    return result.stdout + result.stderr


def sizing_page():
    return ROOT / "docs" / "sizing.md"


def updated(text):
    return EXAMPLE.sub(lambda m: f"```\n$ {m.group(1)}\n{output_of(m.group(1))}```", text)


class PlanTest(unittest.TestCase):
    def test_examples_of_the_page_are_what_it_prints(self):
        text = sizing_page().read_text()
        examples = EXAMPLE.findall(text)
        self.assertGreaterEqual(len(examples), 3)
        for command, shown in examples:
            with self.subTest(command=command):
                self.assertEqual(shown, output_of(command),
                                 "run plan_test.py with --update to renew docs/sizing.md")

    def test_json(self):
        result = plan(*EIGHT, "--device-memory", "24GiB,24GiB,16GiB", "--context", "8192",
                      "--profile", "spindle", "--ratio", "0.1", "--json", "--concurrency", "5")
        self.assertEqual(result.returncode, 0, result.stderr)
        answer = json.loads(result.stdout)
        self.assertEqual(len(answer["stages"]), 3)
        self.assertEqual(sum(stage["n_layers"] for stage in answer["stages"]), 32)
        self.assertEqual(answer["concurrency"], {"wanted": 5, "fits": True})
        self.assertEqual(answer["requests"]["boundaries"][1]["tokens"], 8192 + 64)
        for stage in answer["stages"]:
            total = sum(stage[key] for key in ("weight_bytes", "workspace_bytes", "scratch_bytes",
                                               "kv_pool_bytes"))
            self.assertLessEqual(total, stage["memory_bytes"])
        self.assertGreater(answer["requests"]["concurrency"], answer["full"]["concurrency"])

    def test_what_it_names_does_fit(self):
        question = [*EIGHT, "--gpus", "2", "--gpu-memory", "24GiB", "--context", "32768",
                    "--profile", "spindle", "--ratio", "0.25", "--max-num-seqs", "100", "--json"]
        result = plan(*question, "--concurrency", "40")
        self.assertEqual(result.returncode, 1)
        would = json.loads(result.stdout)["concurrency"]["would_fit"]
        memory = str(would["device_memory_bytes"][0])
        question[5] = memory
        self.assertEqual(plan(*question, "--concurrency", "40").returncode, 0)
        question[5] = "24GiB"
        question[3] = str(would["n_devices"])
        self.assertEqual(plan(*question, "--concurrency", "40").returncode, 0)
        question[3] = "2"
        question[11] = str(would["ratio"])
        self.assertEqual(plan(*question, "--concurrency", "40").returncode, 0)

    def test_an_impossible_plan(self):
        question = [*EIGHT, "--gpus", "1", "--gpu-memory", "16GiB", "--context", "4096"]
        result = plan(*question)
        self.assertEqual(result.returncode, 1)
        self.assertEqual(result.stdout, "")
        self.assertRegex(result.stderr, r"lacks \d+ bytes")
        self.assertRegex(result.stderr, r"--gpu-memory \d+MiB")
        result = plan(*question, "--json")
        self.assertEqual(result.returncode, 1)
        self.assertIn("n_devices", json.loads(result.stdout)["would_start"])

    def test_wrong_usage(self):
        result = plan(*EIGHT, "--gpus", "1", "--gpu-memory", "80", "--context", "x")
        self.assertEqual(result.returncode, 2)
        self.assertIn("--context", result.stderr)
        result = plan(*EIGHT, "--gpus", "1", "--gpu-memory", "80GiB", "--context", "70000")
        self.assertEqual(result.returncode, 2)
        self.assertIn("longer than max_model_len, 65536", result.stderr)


if __name__ == "__main__":
    SPINDLE, ROOT = sys.argv[1], pathlib.Path(sys.argv[2])
    if sys.argv[3:] == ["--update"]:
        sizing_page().write_text(updated(sizing_page().read_text()))
    else:
        unittest.main(argv=[sys.argv[0], *sys.argv[3:]])
