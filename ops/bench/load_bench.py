#!/usr/bin/env python3
"""What a loaded cluster does: goodput and refusals at ten times its capacity, and the first tokens of
short requests beside a stream of long prompts.

Starts build/bin/spindled by mpirun with the bundled model and prints one JSON object;
docs/cpu-performance.md says what was measured. Only Python's standard library.
"""
import argparse
import http.client
import json
import os
import pathlib
import statistics
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from kv_bench import ROOT, cluster, completion, request  # noqa: E402


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def resident_mib():
    """Of all spindled processes."""
    total = 0
    for status in pathlib.Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if text.startswith("Name:\tspindled"):
            total += int(text.split("VmRSS:")[1].split()[0])
    return total / 1024


class Clock:
    """Calls `send` at a fixed rate, each call on a thread of its own."""

    def __init__(self, rate, seconds, send):
        self.threads = []
        began = time.monotonic()
        for i in range(int(rate * seconds)):
            wait = began + i / rate - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            thread = threading.Thread(target=send, args=(i,), daemon=True)
            thread.start()
            self.threads.append(thread)
        self.late = time.monotonic() - began - seconds

    def join(self):
        for thread in self.threads:
            thread.join()


def closed_loop(port, clients, seconds, n_prompt, n_output):
    """Finished requests a second with `clients` that each have one under way."""
    until = time.monotonic() + seconds
    finished = []

    def client(seed):
        while time.monotonic() < until:
            status, _ = request(port, "POST", "/v1/completions",
                                completion(n_prompt, n_output, seed, None), 600)
            if status == 200 and time.monotonic() < until:
                finished.append(1)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(finished) / seconds


def overload(port, rate, seconds, n_prompt, n_output):
    refused, finished, other, retry_after = [], [], [], []
    began = time.monotonic()

    def send(i):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        try:
            connection.connect()
            start = time.monotonic()
            connection.request("POST", "/v1/completions",
                               json.dumps(completion(n_prompt, n_output, i, None)),
                               {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            took = time.monotonic() - start
            if response.status == 503:
                refused.append(took)
                retry_after.append(response.getheader("Retry-After"))
            elif response.status == 200:
                finished.append(time.monotonic() - began)
            else:
                other.append(response.status)
        except (OSError, http.client.HTTPException) as error:
            other.append(str(error))
        finally:
            connection.close()

    before = resident_mib()
    clock = Clock(rate, seconds, send)
    during = resident_mib()
    clock.join()
    in_time = sum(1 for t in finished if t <= seconds)
    return {"offered_per_s": rate, "sender_late_s": round(clock.late, 2),
            "finished_per_s": in_time / seconds, "refused": len(refused),
            "refused_ms_p50": percentile([t * 1e3 for t in refused], 0.5),
            "refused_ms_p99": percentile([t * 1e3 for t in refused], 0.99),
            "all_say_retry_after": all(retry_after), "other_answers": other[:5],
            "resident_mib_before": round(before, 1), "resident_mib_at_the_end": round(during, 1)}


def first_token_ms(port, seed, n_prompt):
    """Of a streamed request."""
    body = completion(n_prompt, 8, seed, None)
    body["stream"] = True
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        start = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(body),
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.readline()
        took = (time.monotonic() - start) * 1e3
        response.read()
        return took if response.status == 200 else None
    finally:
        connection.close()


def short_beside_long(port, seconds, short_rate, long_every):
    """First tokens of short requests, alone and while a 7,000-token prompt comes every so often."""
    def shorts():
        times = []

        def send(i):
            took = first_token_ms(port, i, 100)
            if took is not None:
                times.append(took)

        Clock(short_rate, seconds, send).join()
        return times

    alone = shorts()
    stop = threading.Event()
    n_long = []

    def long_prompts():
        seed = 10**6
        pending = []
        while not stop.is_set():
            thread = threading.Thread(target=first_token_ms, args=(port, seed, 7000), daemon=True)
            thread.start()
            pending.append(thread)
            n_long.append(1)
            seed += 1
            stop.wait(long_every)
        for thread in pending:
            thread.join()

    stream = threading.Thread(target=long_prompts)
    stream.start()
    time.sleep(min(2.0, seconds))
    beside = shorts()
    stop.set()
    stream.join()
    return {"alone_ms_p50": statistics.median(alone), "alone_ms_p95": percentile(alone, 0.95),
            "beside_ms_p50": statistics.median(beside), "beside_ms_p95": percentile(beside, 0.95),
            "p95_ratio": percentile(beside, 0.95) / percentile(alone, 0.95),
            "n": [len(alone), len(beside)], "n_long": len(n_long)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--only", choices=["overload", "short"])
    parser.add_argument("--batched-tokens", type=int, default=128)
    parser.add_argument("--threads-per-rank", type=int,
                        help="default: the cores there are, shared by the ranks")
    parser.add_argument("--short-rate", type=float, default=2, help="short requests a second")
    parser.add_argument("--long-every", type=float, default=12, help="seconds")
    options = parser.parse_args()
    threads = options.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // options.stages)
    settings = {"scheduler.max_num_seqs": 32, "scheduler.max_num_queued_reqs": 32,
                "scheduler.max_num_batched_tokens": options.batched_tokens,
                "api.limits.max_connections": 4096, "compute.threads_per_rank": threads}
    report = {"stages": options.stages, "threads_per_rank": threads,
              "batched_tokens": options.batched_tokens, "seconds": options.seconds}
    with cluster(options.build, options.stages, settings) as port:
        closed_loop(port, 8, 3, 64, 32)
        if options.only != "short":
            capacity = closed_loop(port, 48, options.seconds, 64, 32)
            loaded = overload(port, 10 * capacity, options.seconds, 64, 32)
            report |= {"capacity_per_s": capacity, "overload": loaded,
                       "goodput_to_capacity": loaded["finished_per_s"] / capacity}
        if options.only != "overload":
            report["short_beside_long"] = short_beside_long(
                port, options.seconds, options.short_rate, options.long_every)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
