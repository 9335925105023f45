"""Runs the `spindle` program against a scripted server.

usage: cli_test.py SPINDLE SCRIPTED_SERVER [unittest arguments]
"""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

SPINDLE = ""
SERVER = ""
TIMEOUT_S = 30


class Server:
    def __init__(self, *args):
        self.process = subprocess.Popen(
            [SERVER, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(TIMEOUT_S)
        finally:
            self.process.stdout.close()


def clean_environment(**extra):
    environment = {k: v for k, v in os.environ.items() if k not in ("SPINDLE_API_KEY", "NO_COLOR")}
    environment["TERM"] = "xterm"
    environment.update(extra)
    return environment


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class CliTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server()

    @classmethod
    def tearDownClass(cls):
        cls.server.close()

    def spindle(self, *args, stdin="", port=None, env=None):
        return subprocess.run(
            [SPINDLE, *args, "--port", str(port or self.server.port)], input=stdin,
            capture_output=True, text=not isinstance(stdin, bytes), timeout=TIMEOUT_S,
            env=env or clean_environment())

    # ---- bench

    def test_bench_measures_every_request(self):
        done = self.spindle("bench", "--num-prompts", "150", "--random-input-len", "12",
                            "--random-output-len", "5", "--num-warmups", "3", "--json",
                            "--goodput", "ttft:10000", "--percentile-metrics", "ttft,e2el",
                            "--metric-percentiles", "50,99.9")
        self.assertEqual(done.returncode, 0, done.stderr)
        result = json.loads(done.stdout)
        self.assertEqual((result["completed"], result["failed"]), (150, 0))
        self.assertEqual(result["model_id"], "scripted")
        self.assertEqual(result["request_rate"], "inf")
        self.assertEqual(result["total_output_tokens"], 150 * 5)
        self.assertGreater(result["total_input_tokens"], 0)
        self.assertGreater(result["mean_ttft_ms"], 0)
        self.assertLessEqual(result["p50_e2el_ms"], result["p99.9_e2el_ms"])
        self.assertNotIn("mean_itl_ms", result)
        self.assertAlmostEqual(result["request_goodput"], result["request_throughput"])

    def test_bench_keeps_the_concurrency_and_the_rate(self):
        done = self.spindle("bench", "--num-prompts", "12", "--random-output-len", "4",
                            "--max-concurrency", "2", "--request-rate", "40", "--json")
        result = json.loads(done.stdout)
        self.assertEqual(result["completed"], 12)
        self.assertLessEqual(result["max_concurrent_requests"], 2)
        self.assertEqual((result["request_rate"], result["max_concurrency"]), (40, 2))
        self.assertGreater(result["duration"], 0.02)

    def test_bench_counts_streams_that_end_in_an_error_as_failed(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "prompts.jsonl")
            with open(path, "w") as file:
                for prompt in ("fail now", "refuse", "one two three"):
                    file.write(json.dumps({"prompt": prompt, "output_len": 2}) + "\n")
            done = self.spindle("bench", "--dataset-name", "custom", "--dataset-path", path,
                                "--num-prompts", "3", "--save-detailed", "--result-dir",
                                os.path.join(folder, "new"), "--result-filename", "out.json")
            self.assertEqual(done.returncode, 1)
            self.assertIn("Failed requests:                         2\n", done.stdout)
            with open(os.path.join(folder, "new", "out.json")) as file:
                result = json.load(file)
        self.assertEqual((result["completed"], result["failed"]), (1, 2))
        self.assertEqual(result["errors"][2], "")
        self.assertNotEqual(result["errors"][0], "")
        self.assertEqual(result["generated_texts"][2], "one two ")
        self.assertEqual(result["output_lens"][2], 2)

    def test_bench_stops_at_ctrl_c_and_reports_what_it_has(self):
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.write(json.dumps({"prompt": "slow", "output_len": 100000}) + "\n")
            file.flush()
            process = subprocess.Popen(
                [SPINDLE, "bench", "--dataset-name", "custom", "--dataset-path", file.name,
                 "--num-prompts", "4", "--port", str(self.server.port)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment())
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=TIMEOUT_S)
        self.assertEqual(process.returncode, 130)
        self.assertIn("Failed requests:                         4\n", out)

    def test_bench_refuses_what_it_cannot_do(self):
        for options, text in (
                (["--request-rate", "fast"], "--request-rate"),
                (["--goodput", "itl:3"], "--goodput"),
                (["--dataset-name", "custom"], "--dataset-path"),
                (["--percentile-metrics", "speed"], "no metric is called 'speed'"),
                (["--ramp-up-strategy", "linear"], "--ramp-up-start-rps"),
                (["--ramp-up-end-rps", "3"], "need --ramp-up-strategy"),
                (["--dataset-path", "a"], "takes no --dataset-path"),
                (["--num-prompts", "10000000"], "4 GiB"),
                (["--max-concurrency", "5000"], "--max-concurrency"),
                (["--session", "a"], "a session belongs to one conversation")):
            done = self.spindle("bench", *options)
            self.assertEqual(done.returncode, 2, options)
            self.assertIn(text, done.stderr)
        self.assertEqual(self.spindle("bench", port=free_port()).returncode, 3)

    # ---- complete

    def test_complete_prints_exactly_the_text(self):
        done = self.spindle("complete", "one two  three")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "one two  three", ""))

    def test_prompt_from_standard_input_and_file(self):
        self.assertEqual(self.spindle("complete", stdin="from a pipe\n").stdout, "from a pipe\n")
        self.assertEqual(self.spindle("complete", "-", stdin="dash").stdout, "dash")
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("from a file")
            file.flush()
            self.assertEqual(self.spindle("complete", "--file", file.name).stdout, "from a file")

    def test_sampling_options_reach_the_server(self):
        done = self.spindle("complete", "a b c d", "--max-tokens", "2", "--temperature", "0.5",
                            "--top-k", "3", "--top-p", "0.9", "--min-p", "0.1", "--seed", "7",
                            "--stop", "x", "--stop", "y", "--presence-penalty", "-0.5",
                            "--logit-bias", "5:-1.5", "--stop-token-id", "9", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        choice = json.loads(done.stdout)["choices"][0]
        self.assertEqual(choice["text"], "a b ")
        self.assertEqual(choice["finish_reason"], "length")

    def test_json(self):
        done = self.spindle("complete", "a b", "--json", "--n", "2", "--logprobs", "1",
                            "--request-id", "mine")
        self.assertEqual(done.returncode, 0, done.stderr)
        answer = json.loads(done.stdout)
        self.assertEqual(answer["request_id"], "mine")
        self.assertEqual(answer["model"], "scripted")
        self.assertEqual([c["text"] for c in answer["choices"]], ["a b", "a b"])
        self.assertEqual(answer["choices"][1]["finish_reason"], "stop")
        self.assertEqual(answer["choices"][0]["token_ids"], [0, 1])
        self.assertEqual(answer["choices"][0]["logprobs"][0]["bytes"], [97, 32])
        self.assertEqual(answer["choices"][0]["logprobs"][0]["logprob"], -0.5)
        self.assertEqual(answer["usage"]["completion_tokens"], 4)
        self.assertEqual(answer["usage"]["kv"][1], {
            "stage": 1, "full_bytes": 4096, "kept_bytes": 1024,
            "layers": [{"layer": 2, "full_bytes": 4096, "kept_bytes": 1024}]})
        self.assertEqual(answer["usage"]["cached_tokens"], 0)
        self.assertEqual(answer["usage"]["boundaries"], [])

    def test_several_choices_are_told_apart(self):
        self.assertEqual(self.spindle("complete", "a b", "--n", "2").stdout, "[1] a b\n[2] a b\n")

    def test_usage_goes_to_standard_error(self):
        done = self.spindle("complete", "a b c", "--show-usage")
        self.assertEqual(done.stdout, "a b c")
        self.assertEqual(done.stderr, "prompt 3 tokens, output 3 tokens, first token after 20 ms, "
                                      "20.0 tokens/s, KV kept 2.0 KiB of 8.0 KiB (25%)\n")

    def test_kv_options_reach_the_server(self):
        done = self.spindle("complete", "policy", "--kv-policy", "int4", "--kv-ratio", "0.5",
                            "--session", "name", "--keep-session", "--json")
        answer = json.loads(done.stdout)
        self.assertEqual(answer["choices"][0]["text"], "int4 0.5 0 name keep")
        self.assertEqual(answer["usage"]["cached_tokens"], 1)
        done = self.spindle("complete", "policy", "--kv-max-bytes", "4096")
        self.assertEqual(done.stdout, " 0 4096 ")
        for args in (["--kv-ratio", "0.5", "--kv-max-bytes", "9"], ["--keep-session"],
                     ["--kv-ratio", "many"]):
            self.assertEqual(self.spindle("complete", "x", *args).returncode, 2, args)
            self.assertEqual(self.spindle("chat", "--message", "x", *args).returncode, 2, args)

    def test_urgency_reaches_the_server(self):
        for command in (["complete", "urgency"], ["chat", "--message", "urgency"]):
            self.assertIn("0 0", self.spindle(*command).stdout)
            done = self.spindle(*command, "--priority", "-7", "--timeout-ms", "2500")
            self.assertIn("-7 2500", done.stdout)
            done = self.spindle(*command, "--priority", "high")
            self.assertEqual(done.returncode, 2)

    def test_kv_chart(self):
        for command in (["complete", "a b"], ["chat", "--message", "a b"]):
            done = self.spindle(*command, "--show-kv", env=clean_environment(LC_ALL="C.UTF-8"))
            self.assertEqual(done.stderr.splitlines(), [
                "layer 0  █████████▉             49.6 %    1016 B of 2.0 KiB",
                "layer 1  ▏                       0.4 %       8 B of 2.0 KiB",
                "layer 2  █████                  25.0 %   1.0 KiB of 4.0 KiB",
                "all      █████                  25.0 %   2.0 KiB of 8.0 KiB"])
        done = self.spindle("complete", "a b", "--show-kv", env=clean_environment(LC_ALL="C"))
        self.assertEqual(done.stdout, "a b")
        self.assertEqual(done.stderr.splitlines()[1],
                         "layer 1  -                       0.4 %       8 B of 2.0 KiB")
        # An empty variable says nothing; the next one does.
        done = self.spindle("complete", "a b", "--show-kv",
                            env=clean_environment(LC_ALL="", LC_CTYPE="", LANG="de_DE.utf8"))
        self.assertIn("▏", done.stderr)

    # ---- errors

    def test_nobody_listens(self):
        port = free_port()
        for command in (["complete", "hi"], ["chat", "--message", "hi"], ["chat"], ["stats"],
                        ["drain"]):
            done = self.spindle(*command, port=port)
            self.assertEqual(done.returncode, 3, command)
            self.assertEqual(done.stderr, f"spindle: cannot reach 127.0.0.1:{port}: connection "
                                          "refused. Is spindled running?\n")

    def test_something_else_listens(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            port = listener.getsockname()[1]
            done = self.spindle("stats", "--connect-timeout", "0.2", port=port)
            self.assertEqual(done.returncode, 3)
            self.assertIn("did not answer in time", done.stderr)

    def test_refused_requests(self):
        done = self.spindle("complete", "invalid")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertEqual(done.stderr,
                         "spindle: top_p must be in (0, 1], got 2 (sampling.top_p)\n")
        done = self.spindle("complete", "refuse")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr, "spindle: the queue is full; try again in 0.2 s\n")
        done = self.spindle("complete", "refuse", "--json")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(json.loads(done.stdout)["error"],
                         {"code": "RESOURCE_EXHAUSTED", "message": "the queue is full",
                          "retry_after_ms": 250})

    def test_failure_after_some_output(self):
        done = self.spindle("complete", "fail")
        self.assertEqual((done.returncode, done.stdout), (1, "partial "))
        self.assertEqual(done.stderr, "spindle: a stage failed\n")

    def test_timeout(self):
        done = self.spindle("complete", "silent", "--timeout", "0.2")
        self.assertEqual(done.returncode, 1)
        self.assertIn("in time", done.stderr)

    def test_wrong_usage(self):
        for args in (["complete", "x", "--nonsense"], ["complete", "x", "--max-tokens", "many"],
                     ["nonsense"], [], ["complete", "x", "--file", "y"],
                     ["complete", "x", "--logprobs", "2"],
                     ["complete", "x", "--logit-bias", "5"],
                     ["complete", "--file", "/does/not/exist"],
                     ["chat", "--json"], ["chat", "--n", "2"]):
            done = subprocess.run([SPINDLE, *args], stdin=subprocess.DEVNULL, capture_output=True,
                                  text=True, timeout=TIMEOUT_S, env=clean_environment())
            self.assertEqual(done.returncode, 2, (args, done.stderr))
            self.assertNotEqual(done.stderr + done.stdout, "")

    def test_input_that_cannot_be_sent(self):
        done = self.spindle("complete", stdin=b"good \xff bad")
        self.assertEqual(done.returncode, 2)
        self.assertIn(b"not UTF-8 text (at byte 5)", done.stderr)
        done = self.spindle("complete", stdin="x" * (16 << 20))
        self.assertEqual(done.returncode, 2)
        self.assertIn("standard input is too large", done.stderr)

    def test_api_key(self):
        server = Server("--api-key", "secret")
        try:
            done = self.spindle("complete", "hi", port=server.port)
            self.assertEqual(done.returncode, 3)
            self.assertEqual(done.stderr, "spindle: an API key is needed. Set --api-key or the "
                                          "variable SPINDLE_API_KEY.\n")
            done = self.spindle("complete", "hi", port=server.port,
                                env=clean_environment(SPINDLE_API_KEY="secret"))
            self.assertEqual((done.returncode, done.stdout), (0, "hi"))
            done = self.spindle("complete", "hi", "--api-key", "secret", port=server.port)
            self.assertEqual(done.returncode, 0)
            done = self.spindle("complete", "hi", "--api-key", "wrong", port=server.port)
            self.assertEqual(done.returncode, 3)
        finally:
            server.close()

    # ---- help

    def test_version_and_help(self):
        done = subprocess.run([SPINDLE, "--version"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, r"^spindle \d+\.\d+\.\d+\n(commit [0-9a-f]{12,}\n)?"
                                      r"CUDA (yes|no)\nprotocol \d+\.\d+\n$")
        done = subprocess.run([SPINDLE, "--help"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0)
        for word in ("chat", "complete", "stats", "drain", "Exit codes"):
            self.assertIn(word, done.stdout)
        done = subprocess.run([SPINDLE, "chat", "--help"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0)
        self.assertIn("--temperature", done.stdout)

    # ---- chat

    def test_chat_message(self):
        self.assertEqual(self.spindle("chat", "--message", "hello").stdout, "1: hello")
        self.assertEqual(self.spindle("chat", "--message", "hello", "--system", "s").stdout,
                         "2: hello")
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("document")
            file.flush()
            done = self.spindle("chat", "--message", "question?", "--file", file.name, "--json")
            self.assertEqual(json.loads(done.stdout)["choices"][0]["text"],
                             "1: document\n\nquestion?")

    def test_conversation_through_a_pipe(self):
        done = self.spindle("chat", stdin="hello\n\nand you\n/reset\nagain\n/nope\n/quit\nignored\n")
        self.assertEqual(done.returncode, 0)
        self.assertEqual(done.stdout, "1: hello\n3: and you\n1: again\n")
        self.assertIn("unknown command /nope", done.stderr)

    def test_failed_question_is_not_kept(self):
        done = self.spindle("chat", stdin="hello\nrefuse\nnext\nlast line without newline")
        self.assertEqual(done.returncode, 0)
        self.assertEqual(done.stdout.splitlines(),
                         ["1: hello", "", "3: next", "5: last line without newline"])
        self.assertIn("the queue is full", done.stderr)
        # What the user saw of an answer stays in the conversation.
        done = self.spindle("chat", stdin="fail\nnext\n")
        self.assertEqual(done.returncode, 0)
        self.assertEqual(done.stdout, "partial \n3: next\n")

    def test_interrupt_stops_the_answer_and_not_the_chat(self):
        process = subprocess.Popen(
            [SPINDLE, "chat", "--port", str(self.server.port)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(), bufsize=0)
        try:
            process.stdin.write(b"slow please\n")
            self.assertIn(b"word", self.read_until(process.stdout.fileno(), b"word word"))
            process.send_signal(signal.SIGINT)
            process.stdin.write(b"next\n")
            self.read_until(process.stdout.fileno(), b"3: next\n")
            process.stdin.close()
            self.assertEqual(process.wait(TIMEOUT_S), 0)
            self.assertEqual(process.stderr.read(), b"spindle: cancelled\n")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()

    def test_interrupt_ends_complete(self):
        process = subprocess.Popen(
            [SPINDLE, "complete", "slow", "--port", str(self.server.port)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(), bufsize=0)
        try:
            self.read_until(process.stdout.fileno(), b"word")
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(TIMEOUT_S), 130)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()

    # ---- terminal

    def read_until(self, fd, wanted):
        data = b""
        end = time.monotonic() + TIMEOUT_S
        while wanted not in data:
            ready, _, _ = select.select([fd], [], [], max(0, end - time.monotonic()))
            self.assertTrue(ready, f"no {wanted!r} in {data!r}")
            try:
                piece = os.read(fd, 65536)
            except OSError:  # how Linux ends a pseudo-terminal
                piece = b""
            self.assertTrue(piece, f"no {wanted!r} in {data!r}")
            data += piece
        return data

    def on_terminal(self, args, env, keys=b"", wanted=b""):
        """Output of the program on a pseudo-terminal."""
        pid, fd = pty.fork()
        if pid == 0:
            os.execve(SPINDLE, [SPINDLE, *args, "--port", str(self.server.port)], env)
        try:
            data = b""
            if keys:
                data += self.read_until(fd, b"> ")
                os.write(fd, keys)
            if wanted:
                data += self.read_until(fd, wanted)
            end = time.monotonic() + TIMEOUT_S
            while time.monotonic() < end:
                try:
                    piece = os.read(fd, 65536)
                except OSError:
                    break
                if not piece:
                    break
                data += piece
            return data, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finally:
            os.close(fd)

    def test_colours_on_a_terminal_only(self):
        args = ["complete", "a b", "--show-usage"]
        data, code = self.on_terminal(args, clean_environment())
        self.assertEqual(code, 0)
        self.assertIn(b"\x1b[2mprompt 2 tokens", data)
        self.assertTrue(data.startswith(b"a b\r\n"))  # the line is ended on a terminal
        data, _ = self.on_terminal(args, clean_environment(NO_COLOR="1"))
        self.assertNotIn(b"\x1b", data)
        data, _ = self.on_terminal(args, clean_environment(TERM="dumb"))
        self.assertNotIn(b"\x1b", data)
        done = self.spindle(*args)
        self.assertNotIn("\x1b", done.stdout + done.stderr)

    def test_model_output_cannot_control_the_terminal(self):
        data, _ = self.on_terminal(["complete", "escape"], clean_environment())
        self.assertEqual(data, b"[31mred 31m end\r\n")
        self.assertIn("\x1b[31m", self.spindle("complete", "escape").stdout)  # a pipe gets it all

    def test_conversation_on_a_terminal(self):
        data, code = self.on_terminal(["chat"], clean_environment(NO_COLOR="1"),
                                      keys=b"hello\n/quit\n", wanted=b"1: hello")
        self.assertEqual(code, 0)
        self.assertIn(b"scripted, /help for help", data)

    # ---- stats and drain

    def test_stats(self):
        done = self.spindle("stats", "--layers")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, r"model +scripted \(server 9\.9\.9, up ")
        self.assertRegex(done.stdout, r"(?m)^stage +host +device +layers +weights +KV used +"
                                      r"KV capacity +used +KV peak +steps +busy$")
        self.assertRegex(done.stdout, r"(?m)^1 +node +cpu +2-3 +3\.0 MiB +16\.0 MiB +64\.0 MiB +"
                                      r"25% +32\.0 MiB +10 +0\.5 s$")
        self.assertRegex(done.stdout, r"(?m)^3 +1 +4\.0 MiB$")
        stats = json.loads(self.spindle("stats", "--json").stdout)
        self.assertEqual(stats["stages"][1]["kv_capacity_bytes"], 64 << 20)
        self.assertEqual(stats["stages"][1]["layers"][1], {"layer": 3, "used_bytes": 4 << 20})
        self.assertFalse(stats["draining"])

    def test_drain(self):
        server = Server()
        try:
            slow = subprocess.Popen(
                [SPINDLE, "complete", "slow", "--max-tokens", "30", "--port", str(server.port)],
                stdout=subprocess.PIPE)
            self.read_until(slow.stdout.fileno(), b"word")
            done = self.spindle("drain", "--wait", port=server.port)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stdout, "draining, 1 requests running\nstopped\n")
            self.assertEqual(slow.wait(TIMEOUT_S), 0)  # the running request was finished
            slow.stdout.close()
            self.assertEqual(self.spindle("stats", port=server.port).returncode, 3)
        finally:
            server.close()


if __name__ == "__main__":
    SPINDLE, SERVER = sys.argv[1:3]
    unittest.main(argv=sys.argv[:1] + sys.argv[3:])
