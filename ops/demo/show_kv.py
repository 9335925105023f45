#!/usr/bin/env python3
"""Prints KV bytes per stage from `spindle stats --json` on standard input. Fails unless every stage
has held KV."""
import json
import sys


def mib(count):
    return f"{count / 2**20:.1f} MiB"


def main():
    stages = json.load(sys.stdin)["stages"]
    print(f"  {'stage':<7}{'layers':<9}{'weights':>10}{'KV now':>11}{'KV peak':>11}{'KV pool':>12}")
    for stage in stages:
        last = stage["first_layer"] + stage["n_layers"] - 1
        print(f"  {stage['stage']:<7}{stage['first_layer']}-{last:<7}{mib(stage['weight_bytes']):>10}"
              f"{mib(stage['kv_used_bytes']):>11}{mib(stage['kv_peak_bytes']):>11}"
              f"{mib(stage['kv_capacity_bytes']):>12}")
    if not stages or any(stage["kv_peak_bytes"] == 0 for stage in stages):
        sys.exit("a stage has held no KV")


if __name__ == "__main__":
    main()
