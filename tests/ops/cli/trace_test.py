"""`spindle trace` and `spindle log-level` against an HTTP server of this test's own.

usage: trace_test.py SPINDLE [unittest arguments]
"""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import unittest

SPINDLE = ""
TIMEOUT_S = 30
TRACE = b'{"traceEvents":[]}' + b" " * 300_000


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def error(self, status, message):
        self.answer(status, json.dumps({"error": {"message": message}}).encode())

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.seen.append((self.path, json.loads(body), self.headers.get("Authorization")))
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.error(401, "the API key is not valid")
        elif server.status != 200:
            self.error(server.status, server.message)
        elif self.path == "/v1/spindle/trace":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for at in range(0, len(TRACE), 100_000):
                piece = TRACE[at:at + 100_000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                if server.breaks:
                    self.close_connection = True
                    return
            if not server.hangs:
                self.wfile.write(b"0\r\n\r\n")
                return
            self.wfile.flush()
            server.hanging.set()
            server.release.wait(TIMEOUT_S)
            self.close_connection = True
        else:
            self.answer(200, body)


class TraceTest(unittest.TestCase):
    def setUp(self):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.seen = []
        self.server.key = ""
        self.server.status, self.server.message = 200, ""
        self.server.breaks = self.server.hangs = False
        self.server.hanging, self.server.release = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.folder = tempfile.TemporaryDirectory()
        self.output = os.path.join(self.folder.name, "trace.json")

    def tearDown(self):
        self.server.release.set()
        self.server.shutdown()
        self.thread.join(TIMEOUT_S)
        self.server.server_close()
        self.folder.cleanup()

    def environment(self, **extra):
        environment = {k: v for k, v in os.environ.items() if k != "SPINDLE_API_KEY"}
        return {**environment, **extra}

    def spindle(self, *arguments, port=None, **environment):
        return subprocess.run(
            [SPINDLE, *arguments, "--port", str(port or self.server.server_address[1])],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S,
            env=self.environment(**environment), check=False)

    def test_writes_what_the_server_sends(self):
        done = self.spindle("trace", "--seconds", "0.5", "--max-events", "99", "--output", self.output)
        self.assertEqual(done.returncode, 0, done.stderr)
        with open(self.output, "rb") as file:
            self.assertEqual(file.read(), TRACE)
        self.assertIn(b"wrote " + self.output.encode(), done.stdout)
        self.assertEqual(self.server.seen,
                         [("/v1/spindle/trace", {"seconds": 0.5, "max_events": 99}, None)])
        done = self.spindle("trace", "--output", "-")
        self.assertEqual((done.returncode, done.stdout), (0, TRACE))
        self.assertEqual(self.server.seen[-1][1], {"seconds": 5, "max_events": 65536})

    def test_sends_the_key(self):
        self.server.key = "secret"
        done = self.spindle("log-level", "debug")
        self.assertEqual(done.returncode, 3)
        self.assertIn(b"Set --api-key or the variable SPINDLE_API_KEY", done.stderr)
        self.assertEqual(self.spindle("log-level", "debug", SPINDLE_API_KEY="secret").returncode, 0)
        self.assertEqual(self.spindle("log-level", "debug", "--api-key", "secret").returncode, 0)

    def test_changes_the_level(self):
        done = self.spindle("log-level", "debug")
        self.assertEqual((done.returncode, done.stdout), (0, b"log level debug\n"))
        self.assertEqual(self.server.seen, [("/v1/spindle/log_level", {"level": "debug"}, None)])

    def test_says_why_it_was_refused(self):
        for status, code in ((400, 2), (409, 1), (500, 1)):
            self.server.status, self.server.message = status, f"because of {status}"
            done = self.spindle("trace", "--output", self.output)
            self.assertEqual((done.returncode, done.stderr),
                             (code, f"spindle: because of {status}\n".encode()))
            self.assertFalse(os.path.exists(self.output))
        self.server.status = 404
        self.assertIn(b"is it Spindle's HTTP port?", self.spindle("log-level", "debug").stderr)

    def test_nobody_listens(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for command in (["trace", "--output", self.output], ["log-level", "info"]):
            done = self.spindle(*command, port=port)
            self.assertEqual(done.returncode, 3)
            self.assertIn(b"Is spindled running?", done.stderr)
        self.assertFalse(os.path.exists(self.output))

    def test_a_trace_that_breaks_off_leaves_no_file(self):
        self.server.breaks = True
        done = self.spindle("trace", "--output", self.output)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"the connection broke", done.stderr)
        self.assertFalse(os.path.exists(self.output))

    def test_a_server_that_says_nothing_more_is_left(self):
        self.server.hangs = True
        done = self.spindle("trace", "--seconds", "0.1", "--timeout", "0.3", "--output", self.output)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"did not answer in time", done.stderr)
        self.assertFalse(os.path.exists(self.output))

    def test_ctrl_c_gives_up(self):
        self.server.hangs = True
        process = subprocess.Popen(
            [SPINDLE, "trace", "--output", self.output, "--port",
             str(self.server.server_address[1])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.environment())
        self.assertTrue(self.server.hanging.wait(TIMEOUT_S))
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
        self.assertEqual(process.returncode, 130, stderr)
        self.assertFalse(os.path.exists(self.output))

    def test_an_output_that_cannot_be_written(self):
        done = self.spindle("trace", "--output", os.path.join(self.folder.name, "no", "file"))
        self.assertEqual(done.returncode, 2)
        self.assertIn(b"cannot write", done.stderr)
        self.assertEqual(self.server.seen, [])

    def test_help_says_what_it_does(self):
        for command, words in (("trace", (b"perfetto", b"clock_error_us", b"--max-events")),
                               ("log-level", (b"debug", b"log.log_prompts"))):
            done = subprocess.run([SPINDLE, command, "--help"], capture_output=True,
                                  timeout=TIMEOUT_S, check=True)
            for word in words:
                self.assertIn(word, done.stdout)


if __name__ == "__main__":
    SPINDLE = sys.argv[1]
    unittest.main(argv=sys.argv[:1] + sys.argv[2:])
