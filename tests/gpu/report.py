#!/usr/bin/env python3
"""Writes docs/performance.md from the results of tests/gpu/run.sh.

report.py RESULTS_FOLDER OUT.md : reads bench.jsonl, torch.jsonl and pipeline*.json of the folder and
notes.md beside the report's source (what limits a figure that misses its bar), if they are there.
"""
import json
import pathlib
import sys

# In the order of the report: title, prefixes of benchmark names, what the section says first.
SECTIONS = [
    ("Decode attention", ("attention_decode",),
     "32 query heads, 8 KV heads, head_dim 128, f16 pages of 32 tokens. Bytes: K and V once, or the "
     "blocks' codes and scales."),
    ("Prefill attention", ("attention_prefill",),
     "Causal; operations counted where a query sees a key."),
    ("Products", ("linear",), "The 8B shape's weights in bf16; the algorithm is the one that was "
     "fastest when it was timed at load."),
    ("Append, codecs, codebooks", ("rope_append", "boundary", "kv_", "codebook"), ""),
    ("Scores and selection", ("score_", "select_"), ""),
    ("Sampling", ("sample",), ""),
]


def load(path):
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            line = line.strip()
            if line.startswith("{"):
                rows.append(json.loads(line))
    return rows


def parameters_text(row):
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in row["parameters"].items())


def rate_text(row):
    seconds = row["median_us"] * 1e-6
    if row["yardstick"] == "gemm" or not row["bytes"]:
        return f"{row['flops'] / seconds * 1e-12:.0f} TFLOP/s"
    return f"{row['bytes'] / seconds * 1e-12:.2f} TB/s"


def bench_table(rows, torch):
    out = ["| benchmark | size | µs | rate | share of yardstick | bar | note |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        share = f"{row['share']:.2f} of {row['yardstick']}" if row["yardstick"] else ""
        bar = ""
        if row["bar"]:
            met = row["share"] >= row["bar"]
            bar = f"{row['bar']:.2f}" + ("" if met else " **missed**")
        note = row.get("note", "")
        p = row["parameters"]
        if row["name"] == "attention_decode_dense":
            other = torch.get(("torch_decode_attention", p.get("batch"), p.get("tokens")))
            if other:
                note = (f"PyTorch's best ({other['backend']}) {other['median_us']:.0f} µs: "
                        f"{other['median_us'] / row['median_us']:.2f}x")
        out.append(f"| {row['name']} | {parameters_text(row)} | {row['median_us']:.1f} | "
                   f"{rate_text(row)} | {share} | {bar} | {note} |")
    return out


def pipeline_tables(results, torch_rows):
    out = []
    for report in results:
        model = pathlib.Path(report["model"]).name
        policy = report["kv_policy"]
        if report["kv_ratio"]:
            policy += f" at {report['kv_ratio']:g}"
        out += [f"**{model}, {report['ranks']} rank(s), {report['device']}, KV {policy}**", "",
                "| phase | batch | tokens | tokens/s | ms a round | share | stages busy |",
                "|---|---|---|---|---|---|---|"]
        for row in report["rows"]:
            busy = ", ".join(f"{share:.1%}" for share in row.get("busy_shares", []))
            if row["phase"] == "prefill":
                out.append(f"| prefill | {row['batch']} | {row['tokens']} | "
                           f"{row['tokens_per_s']:.0f} | | {row['share_of_gemm']:.2f} of gemm | |")
            elif row["phase"] == "decode":
                share = f"{row['share_of_read']:.2f} of copy" if report["kv_policy"] == "full" else ""
                out.append(f"| decode | {row['batch']} | {row['context']:.0f} | "
                           f"{row['tokens_per_s']:.1f} | {row['ms_per_round']:.3f} | {share} | "
                           f"{busy} |")
            elif row["phase"] == "mixed":
                out.append(f"| prompts beside decoding | {row['batch']} | {row['tokens']} | "
                           f"{row['prompt_tokens_per_s']:.0f} of prompts, "
                           f"{row['tokens_per_s']:.0f} generated | | | {busy} |")
        out.append("")
    for row in torch_rows:
        if row["name"] == "torch_model_decode":
            out.append(f"PyTorch, plain transformers Llama of the 8B shape, batch "
                       f"{row['parameters']['batch']} at 128 tokens: {row['tokens_per_s']:.1f} "
                       "tokens/s.")
    return out + [""]


def main():
    folder, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    bench = load(folder / "bench.jsonl")
    torch_rows = load(folder / "torch.jsonl")
    run = next((row for row in bench if row["name"] == "run"), {})
    yardsticks = [row for row in bench if row["name"] == "yardsticks"]
    torch = {(row["name"], row["parameters"]["batch"], row["parameters"].get("tokens")): row
             for row in torch_rows if "median_us" in row}
    out = ["# Performance on GPUs", "",
           "Written by `tests/gpu/report.py` from the results of `tests/gpu/run.sh`; do not edit.", "",
           f"- GPU: {run.get('gpu', 'unknown')}", f"- commit: {run.get('commit', 'unknown')}"]
    if yardsticks:
        copies = [row["copy_bytes_per_second"] * 1e-12 for row in yardsticks]
        gemms = [row["gemm_flops_per_second"] * 1e-12 for row in yardsticks]
        out.append(f"- yardsticks, measured by every benchmark program: device-to-device copy "
                   f"{min(copies):.2f} to {max(copies):.2f} TB/s (read plus written), cuBLASLt bf16 "
                   f"8192³ on random data {min(gemms):.0f} to {max(gemms):.0f} TFLOP/s")
    out += ["- figures: medians between events; inputs are random and rotate beyond the cache; a share "
            "of copy above 1 is possible, because kernels that only read are faster than a copy", ""]
    for title, prefixes, text in SECTIONS:
        rows = [row for row in bench if "median_us" in row and row["name"].startswith(prefixes)]
        if not rows:
            continue
        out += [f"## {title}", ""]
        if text:
            out += [text, ""]
        out += bench_table(rows, torch) + [""]
        if title == "Prefill attention":
            for row in torch_rows:
                if row["name"] == "torch_prefill_attention":
                    out.append(f"- PyTorch's best at {row['parameters']['tokens']} tokens "
                               f"({row['backend']}): {row['median_us']:.0f} µs")
            out.append("")
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("pipeline*.json"))]
    if reports:
        out += ["## Whole model through the engine", "",
                "Random weights, greedy; prefill and decode through the scheduler, without sockets and "
                "text. The share of a decode round is the bytes of weights and uncompressed KV over "
                "the copy yardstick.", ""]
        out += pipeline_tables(reports, torch_rows)
    notes = pathlib.Path(__file__).with_name("performance-notes.md")
    if notes.exists():
        out += notes.read_text().splitlines()
    target.write_text("\n".join(out).rstrip() + "\n")


if __name__ == "__main__":
    main()
