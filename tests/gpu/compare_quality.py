#!/usr/bin/env python3
"""Compares `spindle eval` on a GPU with the CPU's figures.

compare_quality.py CPU.json GPU.json : for every cell (profile, regime, bytes) that both files have,
the macro accuracy in percent. Exit code 1 when one differs by more than 0.5 points.
"""
import json
import sys

BAR = 0.5


def cells(path):
    with open(path, encoding="utf-8") as file:
        return {(row["profile"], row["regime"], row["bytes_target"]): row for row in json.load(file)
                if row.get("macro_all") is not None}


def main():
    cpu, gpu = cells(sys.argv[1]), cells(sys.argv[2])
    common = [key for key in gpu if key in cpu]
    if not common:
        print("no cell is in both files")
        return 1
    worst = 0.0
    print("| profile | regime | bytes | CPU, all groups | GPU | difference | GPU, answers |")
    print("|---|---|---|---|---|---|---|")
    for key in common:
        mine, theirs = gpu[key], cpu[key]
        difference = mine["macro_all"] - theirs["macro_all"]
        worst = max(worst, abs(difference))
        print(f"| {key[0]} | {key[1]} | {key[2]:g} % | {theirs['macro_all']:.2f} | "
              f"{mine['macro_all']:.2f} | {difference:+.2f} | {mine['n_all']} |")
    print(f"\n{len(common)} cells, largest difference {worst:.2f} points (bar {BAR})")
    return 0 if worst <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
