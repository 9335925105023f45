"""Tests proto/clients/client.py against a scripted server.

usage: client_test.py PROTOC SCRIPTED_SERVER [unittest arguments]

Exits with 77 (a skip for ctest) when python3-protobuf is not installed.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True  # the client is imported from the source tree
ROOT = pathlib.Path(__file__).resolve().parents[3]
SERVER = ""
MODULES = ""


class ClientTest(unittest.TestCase):
    def setUp(self):
        self.server = subprocess.Popen([SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True)
        self.port = int(self.server.stdout.readline())
        self.client = client.Client(port=self.port, timeout=20)

    def tearDown(self):
        self.client.close()
        self.server.stdin.close()
        self.server.wait(20)
        self.server.stdout.close()

    def test_welcome(self):
        self.assertEqual(self.client.welcome.model, "scripted")
        self.assertEqual(self.client.welcome.max_model_len, 4096)

    def test_generate(self):
        request = client.api.GenerateRequest(text="one two three")
        request.sampling.max_tokens = 2
        deltas = []
        stream = self.client.generate(request)
        while True:
            try:
                deltas.append(next(stream))
            except StopIteration as end:
                usage = end.value
                break
        self.assertEqual("".join(d.text for d in deltas), "one two ")
        self.assertEqual(deltas[-1].finish_reason, client.api.LENGTH)
        self.assertEqual(usage.completion_tokens, 2)

    def test_chat(self):
        request = client.api.GenerateRequest()
        request.chat.messages.add(role="user", content="hello")
        self.assertEqual("".join(d.text for d in self.client.generate(request)), "1: hello")

    def test_kv_fields_and_scores(self):
        request = client.api.GenerateRequest(text="policy", session_id="s", keep_session=True)
        request.kv_policy.profile = "int4"
        request.kv_policy.ratio = 0.5
        request.prompt_scores.first = 1
        request.prompt_scores.end = 41
        request.prompt_scores.dense = True
        text = "".join(d.text for d in self.client.generate(request))
        self.assertEqual(text, "int4 0.5 0 s keep")
        self.assertEqual([s.position for s in self.client.scores], list(range(1, 41)))
        self.assertEqual(len(self.client.scores[39].dense), 4096)

    def test_errors(self):
        with self.assertRaises(client.ServerError) as caught:
            list(self.client.generate(client.api.GenerateRequest(text="refuse")))
        self.assertEqual(caught.exception.error.code, client.api.RESOURCE_EXHAUSTED)
        self.assertEqual(caught.exception.error.retry_after_ms, 250)

    def test_leaving_early_cancels(self):
        for delta in self.client.generate(client.api.GenerateRequest(text="slow")):
            self.assertEqual(delta.text, "word ")
            break
        texts = [d.text for d in self.client.generate(client.api.GenerateRequest(text="next"))]
        self.assertEqual("".join(texts), "next")
        self.assertEqual(self.client.stats().requests_cancelled, 1)

    def test_program(self):
        done = subprocess.run(
            [sys.executable, ROOT / "proto/clients/client.py", "a b c", "--port", str(self.port)],
            env={**os.environ, "PYTHONPATH": MODULES}, capture_output=True, text=True, timeout=20)
        self.assertEqual((done.returncode, done.stdout), (0, "a b c\n"), done.stderr)
        done = subprocess.run(
            [sys.executable, ROOT / "proto/clients/client.py", "policy", "--port", str(self.port),
             "--kv-policy", "int4", "--kv-ratio", "0.25"],
            env={**os.environ, "PYTHONPATH": MODULES}, capture_output=True, text=True, timeout=20)
        self.assertEqual((done.returncode, done.stdout), (0, "int4 0.25 0 \n"), done.stderr)

    def test_the_frame_in_the_readme(self):
        """The hex bytes that proto/README.md shows are the frame that it says they are."""
        text = (ROOT / "proto/README.md").read_text()
        block = re.search(r"```hex\n(.*?)```", text, re.DOTALL).group(1)
        shown = b"".join(bytes.fromhex(line.split("  ")[0]) for line in block.splitlines() if line)
        frame = client.api.Frame(id=1)
        frame.generate.text = "Hi"
        frame.generate.sampling.max_tokens = 5
        body = frame.SerializeToString()
        self.assertEqual(shown, len(body).to_bytes(4, "little") + body)
        self.client.socket.sendall(shown)
        self.assertEqual(self.client._receive(1).accepted.prompt_tokens, 1)


if __name__ == "__main__":
    try:
        import google.protobuf  # noqa: F401
    except ImportError:
        print("SKIPPED: python3-protobuf is not installed for", sys.executable)
        sys.exit(77)
    with tempfile.TemporaryDirectory() as folder:
        MODULES, SERVER = folder, sys.argv[2]
        subprocess.run([sys.argv[1], f"--proto_path={ROOT}", f"--python_out={folder}",
                        "proto/api.proto"], check=True)
        sys.path[:0] = [folder, str(ROOT / "proto/clients")]
        import client
        unittest.main(argv=sys.argv[:1] + sys.argv[3:])
