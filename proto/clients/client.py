#!/usr/bin/env python3
"""A complete client of Spindle's TCP API: Python's standard library and python3-protobuf.

Make the message classes once, from the root of the repository, then run it:

    protoc --python_out=. proto/api.proto
    PYTHONPATH=. python3 proto/clients/client.py "Once upon a time"
"""

import argparse
import os
import socket
import struct
import sys

from proto import api_pb2 as api


class ServerError(Exception):
    """An Error frame. `error` holds code, message, param and retry_after_ms."""

    def __init__(self, error):
        super().__init__(f"{api.ErrorCode.Name(error.code)}: {error.message}")
        self.error = error


class Client:
    """One connection with one request at a time. Every wait ends after `timeout` seconds."""

    def __init__(self, host="127.0.0.1", port=8001, api_key="", timeout=60.0):
        self.socket = socket.create_connection((host, port), timeout)
        self.last_id = 0
        self.scores = []  # PromptScore messages of the last request
        hello = api.Frame()
        hello.hello.version.major = 1
        hello.hello.version.minor = 1
        hello.hello.api_key = api_key
        hello.hello.client_name = "client.py"
        self._send(hello)
        self.welcome = self._receive().welcome

    def close(self):
        self.socket.close()

    def generate(self, request):
        """Yields the Delta messages of a GenerateRequest; returns its Usage.

        Scores of the prompt, if asked for, come before the first Delta and are collected in
        self.scores. Leaving the loop early cancels the request on the server.
        """
        self.scores = []
        frame = self._new_frame()
        frame.generate.CopyFrom(request)
        self._send(frame)
        finished = False
        try:
            while True:
                reply = self._receive(frame.id)
                if reply.HasField("delta"):
                    yield reply.delta
                elif reply.HasField("scores"):
                    self.scores.extend(reply.scores.scores)
                elif reply.HasField("done"):
                    finished = True
                    return reply.done.usage
        except ServerError:
            finished = True
            raise
        finally:
            if not finished:
                cancel = api.Frame(id=frame.id)
                cancel.cancel.SetInParent()
                self._send(cancel)

    def stats(self):
        frame = self._new_frame()
        frame.stats_request.SetInParent()
        self._send(frame)
        return self._receive(frame.id).stats

    def _new_frame(self):
        self.last_id += 1
        return api.Frame(id=self.last_id)

    def _send(self, frame):
        body = frame.SerializeToString()
        self.socket.sendall(struct.pack("<I", len(body)) + body)

    def _receive(self, request_id=0):
        """The next frame about this request or about the connection (id 0)."""
        while True:
            (length,) = struct.unpack("<I", self._read(4))
            frame = api.Frame.FromString(self._read(length))
            if frame.id in (0, request_id):
                if frame.HasField("error"):
                    raise ServerError(frame.error)
                return frame

    def _read(self, n_bytes):
        data = bytearray()
        while len(data) < n_bytes:
            piece = self.socket.recv(n_bytes - len(data))
            if not piece:
                raise ConnectionError("the server closed the connection")
            data += piece
        return bytes(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--kv-policy", default="", help="profile; default: the server's policy")
    parser.add_argument("--kv-ratio", type=float, help="KV bytes kept, of the uncompressed ones")
    options = parser.parse_args()
    client = Client(options.host, options.port, os.environ.get("SPINDLE_API_KEY", ""))
    request = api.GenerateRequest(text=options.prompt)
    request.sampling.max_tokens = options.max_tokens
    if options.kv_policy:
        request.kv_policy.profile = options.kv_policy
    if options.kv_ratio is not None:
        request.kv_policy.ratio = options.kv_ratio
    for delta in client.generate(request):
        print(delta.text, end="", flush=True)
    print()
    client.close()


if __name__ == "__main__":
    try:
        main()
    except (OSError, ServerError) as error:
        sys.exit(f"client.py: {error}")
