#!/usr/bin/env python3
"""What compression buys a running cluster: how many long requests fit one KV pool, and how fast
tokens come at a long context.

Starts build/bin/spindled by mpirun with the bundled model, once for each measurement, and prints one
JSON object; docs/kv-performance.md says what was measured. Only Python's standard library.
"""
import argparse
import contextlib
import http.client
import json
import os
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKEN_BYTES = 12 * 2 * 64 * 2 * 2  # the bundled model's 16-bit KV of one token
READY_S = 60
REQUEST_S = 1800


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def cluster(build, stages, settings):
    """Yields the HTTP port of a cluster that is stopped at the end."""
    port = free_port()
    command = ["mpirun", "--oversubscribe", "--bind-to", "none", "--mca", "btl", "self,vader",
               "-n", str(stages), str(build / "bin/spindled"),
               "--config", str(ROOT / "configs/mini-cpu.pbtxt"), "--port", str(port),
               "--set", "api.tcp.enabled=false"]
    if os.geteuid() == 0:
        command.insert(1, "--allow-run-as-root")
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + READY_S
            while True:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if request(port, "GET", "/ready")[0] == 200:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"the cluster did not start:\n{log.read().decode()}")
                time.sleep(0.1)
            yield port
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def request(port, method, path, body=None, timeout=30):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None,
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def prompt_ids(n_tokens, seed):
    # Ordinary words of the vocabulary; special tokens are below 16.
    generator = random.Random(seed)
    return [generator.randrange(300, 4000) for _ in range(n_tokens)]


def completion(n_prompt, n_output, seed, policy):
    return {"model": "spindle-mini", "prompt": prompt_ids(n_prompt, seed), "max_tokens": n_output,
            "temperature": 0, "ignore_eos": True, "kv_policy": policy}


def concurrency(build, stages, policy, pool_requests, n_prompt, n_output, n_requests):
    """Most requests that held KV at the same time in a pool for `pool_requests` uncompressed ones."""
    pool = pool_requests * (n_prompt + n_output + 32) * TOKEN_BYTES // stages
    settings = {"kv.memory_bytes": pool, "scheduler.max_num_seqs": 1024,
                "scheduler.max_num_queued_reqs": 4096,
                "scheduler.max_num_queued_tokens": 1 << 30, "cluster.layers_per_stage":
                ",".join(str(12 // stages) for _ in range(stages))}
    failures = []

    def one(port, seed):
        status, body = request(port, "POST", "/v1/completions",
                               completion(n_prompt, n_output, seed, policy), REQUEST_S)
        if status != 200:
            failures.append(body.decode(errors="replace"))

    with cluster(build, stages, settings) as port:
        threads = [threading.Thread(target=one, args=(port, seed)) for seed in range(n_requests)]
        for thread in threads:
            thread.start()
        most, used = 0, 0
        while any(thread.is_alive() for thread in threads):
            state = json.loads(request(port, "GET", "/v1/spindle/state")[1])
            most = max(most, state["requests"]["running"])
            used = max(used, max(stage["kv_used_bytes"] / stage["kv_capacity_bytes"]
                                 for stage in state["stages"]))
            time.sleep(0.02)
    if failures:
        sys.exit(f"{len(failures)} requests failed: {failures[0]}")
    return {"concurrency": most, "pool_used": round(used, 3)}


def decode(build, policy, n_prompt, n_output):
    """Milliseconds from token to token at the end of a long prompt, on one stage with one thread."""
    with cluster(build, 1, {}) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_S)
        body = completion(n_prompt, n_output, 1, policy) | {
            "stream": True, "stream_options": {"include_usage": True}}
        start = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(body),
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        times, usage = [], {}
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                usage = event["usage"]
            if event.get("choices"):
                times.append(time.monotonic() - start)
    steps = [(b - a) * 1e3 for a, b in zip(times[2:], times[3:])]
    kv = usage.get("spindle_kv", {})
    return {"first_token_ms": round(times[0] * 1e3, 1),
            "boundary_ms": round((times[1] - times[0]) * 1e3, 1),
            "token_ms": round(statistics.median(steps), 3), "kv_ratio": kv.get("ratio")}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--prompt", type=int, default=7000)
    parser.add_argument("--pool", type=int, default=16, help="uncompressed requests that fit")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--only", choices=["concurrency", "decode"])
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    report = {"prompt_tokens": options.prompt}
    policies = {"full": {"profile": "full"}, "int4": {"profile": "int4"},
                "streaming 15 %": {"profile": "streaming", "ratio": 0.15},
                "spindle 25 %": {"profile": "spindle", "ratio": 0.25},
                "spindle 10 %": {"profile": "spindle", "ratio": 0.10}}
    if options.only != "concurrency":
        report["decode"] = {name: decode(options.build, policy, 7800, 200)
                            for name, policy in policies.items()}
    if options.only != "decode":
        report["pool_requests"] = options.pool
        report["concurrency"] = {}
        for name, ratio in (("full", 1.0), ("spindle 25 %", 0.25), ("spindle 15 %", 0.15)):
            wanted = int(options.pool / ratio * 1.1) + 2
            result = concurrency(options.build, options.stages, policies.get(name) or
                                 {"profile": "spindle", "ratio": ratio}, options.pool,
                                 options.prompt, 32, wanted)
            result["times_bytes_ratio"] = round(result["concurrency"] * ratio / options.pool, 3)
            report["concurrency"][name] = result
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
