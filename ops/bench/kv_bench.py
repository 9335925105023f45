#!/usr/bin/env python3
"""What compression buys a running cluster: how many long requests decode at once in one KV pool, and
how fast tokens come at a long context.

Starts build/bin/spindled by mpirun with the bundled model and prints one JSON object;
docs/kv-performance.md says what was measured. Only Python's standard library.
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
PAGE_TOKENS = 32
READY_S = 60
REQUEST_S = 7200


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
               "--set", "api.tcp.enabled=false",
               # A busy host is not a lost rank.
               "--set", "cluster.peer_timeout_ms=60000", "--set", "cluster.step_timeout_ms=3600000"]
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
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace")[-3000:], file=sys.stderr)
            raise
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
    """With `policy` None the server's own is in force."""
    body = {"model": "spindle-mini", "prompt": prompt_ids(n_prompt, seed), "max_tokens": n_output,
            "temperature": 0, "ignore_eos": True}
    return body | ({"kv_policy": policy} if policy else {})


def pool_bytes(n_requests, n_prompt, n_output):
    """A pool that n_requests uncompressed ones fill: whole pages, and the last token is never run."""
    pages = (n_prompt + n_output - 1 + PAGE_TOKENS - 1) // PAGE_TOKENS
    return n_requests * pages * PAGE_TOKENS * TOKEN_BYTES


def concurrency(options, policy, n_requests):
    """How many requests decode at once in a pool for `pool_requests` uncompressed ones.

    Answers are long enough that none ends before the pool is full, and steps take whole prompts, so
    that those who wait for a prompt do not decode far meanwhile. What counts is the server's state
    while requests wait, none has ended and no prompt token was computed since the state before:
    everything that runs decodes, and the pool admits no more. The figures are those of the sample
    nearest to the middle of the answers.

    A prompt's KV is uncompressed until it ends, so that one prompt's room is never filled: of k
    requests' room, at most k - 1 + ratio holds compressed ones. With several stages the fullest
    limits all, and `spindle` keeps less in the one with layer 0: the server levels that out for
    requests that bring no policy (--server-policy), a request's own size is its own.
    """
    build, stages, n_prompt, n_output = (options.build, options.stages, options.prompt,
                                         options.output)
    settings = {"kv.memory_bytes": pool_bytes(options.pool, n_prompt, n_output) // stages,
                "scheduler.max_num_seqs": 1024, "scheduler.max_num_batched_tokens": 8192,
                "scheduler.max_num_queued_reqs": 4096,
                "scheduler.max_num_queued_tokens": 1 << 30, "cluster.layers_per_stage":
                ",".join(str(12 // stages) for _ in range(stages)),
                "compute.device": options.device.upper(),
                "compute.threads_per_rank": max(1, len(os.sched_getaffinity(0)) // stages)}
    if options.server_policy:
        settings |= {f"kv.policy.{key}": value for key, value in policy.items()}
        # The run may be short.
        settings |= {"kv.balance.warmup_ms": 100, "kv.balance.cooldown_ms": 200,
                     "kv.balance.typical_tokens": n_prompt}
        policy = None
    failures = []
    stopped = threading.Event()

    def one(port, seed):
        try:
            status, body = request(port, "POST", "/v1/completions",
                                   completion(n_prompt, n_output, seed, policy), REQUEST_S)
        except (OSError, http.client.HTTPException) as error:
            status, body = 0, str(error).encode()
        if status != 200 and not stopped.is_set():
            failures.append(body.decode(errors="replace"))
        return json.loads(body) if status == 200 else {}

    started = time.monotonic()
    with cluster(build, stages, settings) as port:
        alone = one(port, 0)
        first = json.loads(request(port, "GET", "/v1/spindle/state")[1])
        threads = [threading.Thread(target=one, args=(port, seed), daemon=True)
                   for seed in range(1, n_requests + 1)]
        for thread in threads:
            thread.start()
        best = watch_decoding(port, first, n_prompt, n_output, failures)
        stopped.set()
        if failures:
            sys.exit(f"{len(failures)} requests failed: {failures[0]}")
        if best is None:
            sys.exit("no state counts: the first request ended before the pool was full (longer "
                     "answers are needed), or nobody waited")
    return best | {"ratio_at_end": round(alone["usage"]["spindle_kv"]["ratio"], 4),
                   "seconds": round(time.monotonic() - started)}


def watch_decoding(port, first, n_prompt, n_output, failures):
    """The state nearest to the middle of the answers, see concurrency(); `first` came before."""
    best, before = None, first
    while not failures:
        time.sleep(0.05)
        state = json.loads(request(port, "GET", "/v1/spindle/state", timeout=REQUEST_S)[1])
        counts = state["requests"]
        if counts["finished"] > first["requests"]["finished"]:
            return best
        decoding = (counts["waiting"] > 0 and state["prompt_tokens"] == before["prompt_tokens"] and
                    state["generation_tokens"] > before["generation_tokens"])
        before = state
        if not decoding:
            continue
        n_generated = state["generation_tokens"] - first["generation_tokens"]
        generated = n_generated / counts["running"]
        used = sum(stage["kv_used_bytes"] for stage in state["stages"])
        capacity = sum(stage["kv_capacity_bytes"] for stage in state["stages"])
        fullest = max(stage["kv_used_bytes"] / stage["kv_capacity_bytes"]
                      for stage in state["stages"])
        n_tokens = counts["running"] * n_prompt + n_generated
        if best is None or (abs(generated - n_output / 2) <
                            abs(best["generated_tokens"] - n_output / 2)):
            best = {"concurrency": counts["running"], "generated_tokens": round(generated, 1),
                    "bytes_ratio": round(used / (n_tokens * TOKEN_BYTES), 4),
                    "pool_used": round(used / capacity, 3), "fullest_stage": round(fullest, 3),
                    "levels": [round(stage["kv_level_ratio"], 3) for stage in state["stages"]],
                    "pool_bytes": capacity}
        if generated > n_output / 2:
            return best
    return best


def decode_once(port, policy, n_prompt, n_output):
    """Milliseconds from token to token at the end of a long prompt."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_S)
    body = completion(n_prompt, n_output, 1, policy) | {
        "stream": True, "stream_options": {"include_usage": True}}
    start = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(body),
                       {"Content-Type": "application/json"})
    times, usage = [], {}
    for line in connection.getresponse():
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        if event.get("usage"):
            usage = event["usage"]
        if event.get("choices"):
            times.append(time.monotonic() - start)
    connection.close()
    steps = [(b - a) * 1e3 for a, b in zip(times[2:], times[3:])]
    return {"first_token_ms": round(times[0] * 1e3, 1),
            "boundary_ms": round((times[1] - times[0]) * 1e3, 1),
            "boundary_share": round((times[1] - times[0]) / times[0], 4),
            "token_ms": round(statistics.median(steps), 3),
            # Steps that other load on the host left alone.
            "fast_token_ms": round(sorted(steps)[len(steps) // 10], 3),
            "kv_ratio": usage.get("spindle_kv", {}).get("ratio")}


def decode(build, policies, n_prompt, n_output, n_rounds):
    """Medians over rounds of all policies one after the other, on one stage with one thread."""
    rounds = []
    with cluster(build, 1, {}) as port:
        for _ in range(n_rounds):
            rounds.append({name: decode_once(port, policy, n_prompt, n_output)
                           for name, policy in policies.items()})
    report = {}
    for name in policies:
        one = {key: statistics.median(of[name][key] for of in rounds) for key in rounds[0][name]}
        for key, ratio in (("token_ms", "to_full"), ("fast_token_ms", "fast_to_full")):
            one[ratio] = round(statistics.median(of[name][key] / of["full"][key]
                                                 for of in rounds), 3)
        report[name] = one
    return report


def measure_concurrency(options, policies):
    report = {}
    for name, policy in policies.items():
        # More than could fit, so that some wait; who decides sizes may go below the policy's.
        ratio = policy.get("ratio", {"full": 1.0, "int4": 0.28}.get(name, 1.0))
        spare = 2.2 if options.server_policy and ratio < 1 else 1.3
        result = concurrency(options, policy, int(spare * options.pool / ratio) + 4)
        if "full" in report:
            growth = result["concurrency"] / report["full"]["concurrency"]
            result["growth"] = round(growth, 2)
            result["growth_times_bytes_ratio"] = round(growth * result["bytes_ratio"], 3)
        report[name] = result
        print(name, result, file=sys.stderr, flush=True)
    return report


POLICIES = {"full": {"profile": "full"}, "int4": {"profile": "int4"},
            "streaming 15 %": {"profile": "streaming", "ratio": 0.15},
            "streaming 10 %": {"profile": "streaming", "ratio": 0.10},
            "spindlekv 50 %": {"profile": "spindlekv", "ratio": 0.5},
            "spindle 25 %": {"profile": "spindle", "ratio": 0.25},
            "spindle 15 %": {"profile": "spindle", "ratio": 0.15},
            "spindle 10 %": {"profile": "spindle", "ratio": 0.10}}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--policies", default=",".join(POLICIES), help="names, 'full' first")
    parser.add_argument("--only", choices=["concurrency", "decode"])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--prompt", type=int, default=7000, help="of a request that shares a pool")
    parser.add_argument("--output", type=int, default=256, help="its answer")
    parser.add_argument("--pool", type=int, default=16, help="uncompressed requests that fit")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu",
                        help="that a shared pool is on")
    parser.add_argument("--server-policy", action="store_true",
                        help="the policy is the server's, not the requests'")
    parser.add_argument("--decode-prompt", type=int, default=7800)
    parser.add_argument("--rounds", type=int, default=3, help="of decoding")
    options = parser.parse_args()
    policies = {name: POLICIES[name] for name in options.policies.split(",")}
    report = {}
    if options.only != "concurrency":
        report["decode"] = decode(options.build, policies, options.decode_prompt, 200,
                                  options.rounds)
    if options.only != "decode":
        report["pool"] = {"requests": options.pool, "prompt_tokens": options.prompt,
                          "output_tokens": options.output, "stages": options.stages,
                          "device": options.device, "server_policy": options.server_policy}
        report["concurrency"] = measure_concurrency(options, policies)
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
