#!/usr/bin/env python3
"""Many requests of mixed lengths in a KV pool for a part of what they want: nothing fails, and every
output is the one that a roomy pool gives.

Starts build/bin/spindled by mpirun with the bundled model, once with a pool that is large enough for
all that run and once with a part of what that took, and prints one JSON object;
docs/cpu-performance.md says what was measured. Ends with 1 when a request failed or an output
differs. Only Python's standard library.
"""
import argparse
import http.client
import json
import os
import pathlib
import random
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from kv_bench import ROOT, cluster, completion, request  # noqa: E402

PROFILES = [None, None, {"profile": "full"}, {"profile": "int4"}, {"profile": "snapkv", "ratio": 0.3},
            {"profile": "streaming", "ratio": 0.3}]

MOST_PROMPT = 2048
MOST_OUTPUT = 320


def make_requests(n, seed):
    """(prompt tokens, answer tokens, policy) of each; prompts are log-uniform, and short ones have no
    room for sinks and a window in three tenths."""
    generator = random.Random(seed)
    requests = []
    for _ in range(n):
        n_prompt = int(MOST_PROMPT / 2 ** (generator.random() * 5))
        policy = generator.choice(PROFILES)
        requests.append((n_prompt, generator.randrange(8, MOST_OUTPUT),
                         policy if n_prompt >= 512 else None))
    return requests


def serve_all(options, requests, pool_bytes):
    """(report, outputs) of one run of all requests."""
    outputs = [None] * len(requests)
    failures = []
    left = iter(range(len(requests)))
    lock = threading.Lock()

    def client(port):
        while True:
            with lock:
                i = next(left, None)
            if i is None:
                return
            n_prompt, n_output, policy = requests[i]
            try:
                status, body = request(port, "POST", "/v1/completions",
                                       completion(n_prompt, n_output, i, policy), 3600)
            except (OSError, http.client.HTTPException) as error:
                status, body = 0, str(error).encode()
            if status == 200:
                outputs[i] = json.loads(body)["choices"][0]["text"]
            else:
                failures.append((i, status, body.decode(errors="replace")[:200]))

    threads_per_rank = max(1, len(os.sched_getaffinity(0)) // options.stages)
    settings = {"kv.memory_bytes": pool_bytes,
                "model.max_model_len": MOST_PROMPT + MOST_OUTPUT, "scheduler.max_num_seqs": options.concurrency,
                "scheduler.max_num_queued_reqs": len(requests),
                "scheduler.max_num_queued_tokens": 1 << 30, "scheduler.max_queued_kv_bytes": 1 << 50,
                # Budgets that are balanced compress harder under pressure, which changes outputs.
                "kv.balance.enabled": "false", "api.limits.max_connections": 4096, "compute.threads_per_rank": threads_per_rank}
    with cluster(options.build, options.stages, settings) as port:
        began = time.monotonic()
        clients = [threading.Thread(target=client, args=(port,))
                   for _ in range(min(2 * options.concurrency, len(requests)))]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        seconds = time.monotonic() - began
        state = json.loads(request(port, "GET", "/v1/spindle/state")[1])
        metrics = dict(line.rsplit(" ", 1) for line in
                       request(port, "GET", "/metrics")[1].decode().splitlines()
                       if line and not line.startswith("#"))

    def counter(name):
        return int(float(next(v for k, v in metrics.items() if k.startswith(name))))

    counts = state["requests"]
    report = {"seconds": round(seconds, 1), "failed": len(failures), "first_failures": failures[:3],
              "counts": {key: counts[key] for key in ("accepted", "finished", "failed", "cancelled",
                                                      "running", "waiting")},
              "pool_bytes": [stage["kv_capacity_bytes"] for stage in state["stages"]],
              "peak_bytes": [stage["kv_peak_bytes"] for stage in state["stages"]],
              "used_bytes_at_the_end": [stage["kv_used_bytes"] for stage in state["stages"]],
              "preemptions": counter("spindle_num_preemptions_total"),
              "recomputed_tokens": counter("spindle_recomputed_tokens_total")}
    return report, outputs


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=256, help="that may run at once")
    parser.add_argument("--pool-share", type=float, default=0.2, help="of what the roomy run took")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    requests = make_requests(options.requests, options.seed)
    roomy, expected = serve_all(options, requests, 8 << 30)
    print("roomy", roomy, file=sys.stderr, flush=True)
    tight, outputs = serve_all(options, requests,
                               int(options.pool_share * max(roomy["peak_bytes"])))
    n_different = sum(a != b for a, b in zip(expected, outputs))
    print(json.dumps({"requests": options.requests, "stages": options.stages,
                      "seed": options.seed, "roomy": roomy, "tight": tight,
                      "outputs_that_differ": n_different}, indent=1))
    if roomy["failed"] or tight["failed"] or n_different:
        sys.exit(1)


if __name__ == "__main__":
    main()
