"""A browser page for tests: starts browser.mjs and talks to it. Every answer has a deadline."""
import json
import os
import pathlib
import select
import subprocess
import time

HERE = pathlib.Path(__file__).resolve().parent
SKIPPED = 77


class NoBrowser(Exception):
    """There is no browser, or no driver for it, and why."""


class Browser:
    def __init__(self):
        self._pending = b""
        try:
            self._process = subprocess.Popen(["node", str(HERE / "browser.mjs")], stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except FileNotFoundError:
            raise NoBrowser("there is no node") from None
        try:
            self.name = self._answer(30)["ready"]
        except EOFError:
            errors = self._process.stderr.read().decode(errors="replace").strip()
            if self._process.wait(5) == SKIPPED:
                raise NoBrowser(errors) from None
            raise AssertionError(f"the browser's driver ended: {errors}") from None

    def close(self):
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process.stdout.close()
        self._process.stderr.close()

    def __call__(self, command, patience=30, **options):
        self._process.stdin.write(json.dumps({"command": command, **options}).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer(patience)
        if "error" in answer:
            raise AssertionError(f"{command} {options}: {answer['error']}")
        return answer["value"]

    def eval(self, expression):
        return self("eval", expression=expression)

    def wait(self, expression, seconds=20):
        """Until the JavaScript expression is true."""
        self("wait", patience=seconds + 10, expression=expression, seconds=seconds)

    def text(self, selector):
        return self.eval(f"document.querySelector({json.dumps(selector)}).textContent")

    def _answer(self, seconds):
        deadline = time.monotonic() + seconds
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise AssertionError(f"the browser gave no answer within {seconds} s")
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                raise EOFError
            self._pending += more
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)
