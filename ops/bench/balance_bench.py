#!/usr/bin/env python3
"""What the KV balancer buys a pipeline whose stages have unequal memory: requests that run together,
tokens a second and right answers, with balancing off and on, in turns.

Starts build/bin/spindled by mpirun with the bundled model and asks the questions of the evaluation
set; every client sends its next request when the last one ended, so that requests always wait. With
--eval, `spindle eval` then measures what requests without a policy get, under the same load and at the
sizes that the balancer has chosen. Prints one JSON object; docs/kv-performance.md says what was
measured. Only Python's standard library.
"""
import argparse
import contextlib
import gzip
import http.client
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from kv_bench import ROOT, cluster, free_port, request  # noqa: E402

EVAL_S = 3600  # `spindle eval` at most


def questions(path, longest):
    """(task, document with one question, answer): every question of every record that is short enough."""
    asked = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["tokens"] > longest:
                continue
            messages = record["messages"]
            document, first = messages[0]["content"].rsplit("\n\n", 1)
            for i in range(0, len(messages) - 1, 2):
                text = first if i == 0 else messages[i]["content"]
                asked.append((record["task"], document + "\n\n" + text, messages[i + 1]["content"]))
    # A fixed order that mixes tasks and lengths.
    return [asked[(i * 7919) % len(asked)] for i in range(len(asked))]


def quality(build, tcp_port, options):
    """The rows of `spindle eval` against the running cluster, for documents that it serves."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = pathlib.Path(folder) / "data.jsonl", pathlib.Path(folder) / "out.json"
        with gzip.open(ROOT / "eval/public.jsonl.gz", "rt", encoding="utf-8") as lines:
            data.write_text("".join(line for line in lines
                                    if json.loads(line)["tokens"] <= options.longest))
        subprocess.run([build / "bin/spindle", "eval", "--config", ROOT / "configs/mini-cpu.pbtxt",
                        "--server", f"127.0.0.1:{tcp_port}", "--data", data, "--profiles",
                        "full,server", "--regime", "qa", "--limit", str(options.eval),
                        "--no-sessions", "--concurrency", "16", "--timeout", "600", "--json", out],
                       check=True, stdout=sys.stderr, timeout=EVAL_S)
        wanted = ("profile", "macro", "worst_task", "n", "macro_all", "n_all", "bytes_real",
                  "kl_mean", "kl_p95")
        return [{key: row.get(key) for key in wanted} for row in json.loads(out.read_text())]


def metrics(port):
    text = request(port, "GET", "/metrics")[1].decode()
    values = {}
    for line in text.splitlines():
        found = re.match(r'(\w+)(?:\{(.*)\})? ([-+0-9.eE]+)$', line)
        if not found:
            continue
        stage = re.search(r'stage="(\d+)"', found.group(2) or "")
        key = (found.group(1), int(stage.group(1))) if stage else found.group(1)
        values.setdefault(key, float(found.group(3)))
    return values


class Load:
    """Clients that each have one request under way, until `seconds` of the measured time are over."""

    def __init__(self, port, asked, options):
        self.port, self.asked, self.options = port, asked, options
        self.lock = threading.Lock()
        self.next = 0
        self.lengths = random.Random(1)
        self.stop = threading.Event()
        self.right, self.failures = {}, []
        self.measuring = threading.Event()

    def client(self):
        while not self.stop.is_set():
            with self.lock:
                task, text, answer = self.asked[self.next % len(self.asked)]
                self.next += 1
                n_tokens = round(self.options.output *
                                 self.lengths.uniform(1 - self.options.spread, 1 + self.options.spread))
            body = {"model": "spindle-mini", "messages": [{"role": "user", "content": text}],
                    "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True,
                    "skip_special_tokens": False}
            measured = self.measuring.is_set()
            try:
                status, reply = request(self.port, "POST", "/v1/chat/completions", body, 3600)
            except (OSError, http.client.HTTPException) as error:
                status, reply = 0, str(error).encode()
            if self.stop.is_set():
                return
            if status != 200:
                self.failures.append(reply.decode(errors="replace")[:300])
                time.sleep(0.5)
                continue
            said = re.split(r"<\|", json.loads(reply)["choices"][0]["message"]["content"])[0]
            if measured:
                with self.lock:
                    self.right.setdefault(task, []).append(said.strip() == answer.strip())


def one_run(build, options, balanced):
    stages = len(options.memory)
    tcp_port = free_port()
    settings = {
        "api.tcp.enabled": "true", "api.tcp.port": tcp_port,
        "kv.memory_bytes": ",".join(str(int(m * 2**20)) for m in options.memory),
        "cluster.layers_per_stage": ",".join(str(12 // stages) for _ in range(stages)),
        "kv.policy.profile": "spindle", "kv.policy.ratio": options.ratio,
        "kv.profile_table": ROOT / "configs/profiles/spindle-mini.pbtxt",
        "kv.balance.enabled": str(balanced).lower(), "kv.balance.lighter_levels": "true",
        "kv.balance.level_step": options.level_step, "kv.balance.n_lighter": 32,
        "kv.balance.n_stronger": 57,
        "kv.balance.relief_margin": options.margin,
        "kv.balance.typical_tokens": options.longest * 3 // 4, "kv.balance.warmup_ms": 2000,
        "kv.balance.cooldown_ms": 2000, "kv.balance.relief_hold_ms": 4000,
        "scheduler.max_num_seqs": 512, "scheduler.max_num_batched_tokens": 1024,
        "model.max_model_len": options.longest + round(options.output * (1 + options.spread)) + 64,
        "compute.device": options.device.upper(), "compute.threads_per_rank":
        max(1, len(os.sched_getaffinity(0)) // stages)}
    asked = questions(ROOT / "eval/public.jsonl.gz", options.longest)
    samples = []
    with cluster(build, stages, settings) as port:
        load = Load(port, asked, options)
        threads = [threading.Thread(target=load.client, daemon=True)
                   for _ in range(options.clients)]
        for thread in threads:
            thread.start()
        time.sleep(options.settle)
        load.measuring.set()
        before, started = metrics(port), time.monotonic()
        while time.monotonic() - started < options.seconds:
            time.sleep(0.5)
            samples.append(metrics(port))
        after, ended = metrics(port), time.monotonic()
        rows = quality(build, tcp_port, options) if options.eval else []
        of_eval = metrics(port)
        # Those that were under way when the measured time ended count for the answers.
        time.sleep(options.drain)
        load.stop.set()
    seconds = ended - started

    def share(sample, name, stage):
        return sample[(name, stage)] / sample[("spindle_kv_capacity_bytes", stage)]

    full = [s for s in samples if max(share(s, "spindle_kv_committed_bytes", i)
                                      for i in range(stages)) >= 0.9]
    # What the fullest stage leaves unused on the others: of all their KV, and stage by stage.
    unused, by_stage = [], [[] for _ in range(stages)]
    for sample in full:
        shares = [share(sample, "spindle_kv_committed_bytes", i) for i in range(stages)]
        others = set(range(stages)) - {shares.index(max(shares))}
        free = {i: (1 - shares[i]) * options.memory[i] for i in others}
        unused.append(sum(free.values()) / sum(options.memory[i] for i in others))
        for i in others:
            by_stage[i].append(1 - shares[i])

    def rate(name):
        return (after[name] - before[name]) / seconds

    answers = {task: statistics.mean(right) for task, right in sorted(load.right.items())}
    return {"balanced": balanced, "seconds": round(seconds, 1),
            "running_mean": round(statistics.mean(s["spindle_num_requests_running"]
                                                  for s in samples), 2),
            "running_max": max(s["spindle_num_requests_running"] for s in samples),
            "waiting_min": min(s["spindle_num_requests_waiting"] for s in samples),
            "generated_tokens_per_s": round(rate("spindle_generation_tokens_total"), 1),
            "prompt_tokens_per_s": round(rate("spindle_prompt_tokens_total"), 1),
            "recomputed_tokens_per_s": round(rate("spindle_recomputed_tokens_total"), 1),
            "preemptions": after["spindle_num_preemptions_total"] -
            before["spindle_num_preemptions_total"],
            "requests_per_s": round(rate("spindle_requests_finished_total"), 3),
            "n_full_samples": len(full), "n_samples": len(samples),
            "unused_of_others": round(statistics.mean(unused), 3) if unused else None,
            "unused_when_another_is_fullest": [round(statistics.mean(u), 3) if u else None
                                               for u in by_stage],
            "level_ratios": [after[("spindle_kv_level_ratio", i)] for i in range(stages)],
            "budget_plans": after["spindle_kv_budget_plans_total"],
            "wanted": after["spindle_kv_balancer_wanted_requests"],
            "fitting": after["spindle_kv_balancer_fitting_requests"],
            "macro_accuracy": round(statistics.mean(answers.values()), 4) if answers else None,
            "answers": {task: round(value, 4) for task, value in answers.items()},
            "n_answers": sum(len(r) for r in load.right.values()),
            "eval": rows,
            "level_ratios_after_eval": [of_eval[("spindle_kv_level_ratio", i)]
                                        for i in range(stages)],
            "failures": load.failures[:3], "n_failures": len(load.failures)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--memory", type=float, nargs="+", default=[48, 16, 48],
                        help="KV pool of each stage in MiB")
    parser.add_argument("--ratio", type=float, default=0.25, help="of the default policy")
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--output", type=int, default=192, help="tokens of each answer")
    parser.add_argument("--spread", type=float, default=0,
                        help="answers are longer or shorter by up to this share of --output")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--margin", type=float, default=0.03, help="kv.balance.relief_margin")
    parser.add_argument("--level-step", type=float, default=0.97, help="kv.balance.level_step")
    parser.add_argument("--settle", type=float, default=60, help="seconds before the measured time")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--drain", type=float, default=20)
    parser.add_argument("--eval", type=int, default=0, metavar="N",
                        help="also `spindle eval` on N records, under the same load")
    parser.add_argument("--rounds", type=int, default=1, help="of one run each, off then on")
    options = parser.parse_args()
    runs = [one_run(options.build, options, balanced)
            for _ in range(options.rounds) for balanced in (False, True)]
    off = [r for r in runs if not r["balanced"]]
    on = [r for r in runs if r["balanced"]]

    def ratio(name):
        return round(statistics.mean(r[name] for r in on) /
                     max(statistics.mean(r[name] for r in off), 1e-9), 3)

    print(json.dumps({"memory_mib": options.memory, "device": options.device, "ratio": options.ratio, "runs": runs,
                      "running_on_to_off": ratio("running_mean"),
                      "generated_on_to_off": ratio("generated_tokens_per_s"),
                      "requests_on_to_off": ratio("requests_per_s")}, indent=1))
    return 1 if any(r["n_failures"] for r in runs) else 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
