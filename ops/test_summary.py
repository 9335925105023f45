#!/usr/bin/env python3
"""Counts a ctest results file: test_summary.py RESULTS.xml CTEST_EXIT_CODE

Prints what failed and what was skipped, then `N passed, N failed[, N skipped]` as the last line.
Exits with 0 only when at least one test passed and none failed.

ctest's own attribute "skipped" also counts tests whose program is missing; here those have failed.
"""
import sys
import xml.etree.ElementTree as ElementTree


def outcome(case):
    """Returns ("passed" | "failed" | "skipped", why)."""
    status = case.get("status")
    if status == "run":
        return "passed", ""
    if status == "disabled":
        return "skipped", "disabled"
    if status == "notrun":
        skipped = case.find("skipped")
        why = skipped.get("message", "") if skipped is not None else ""
        # Only a test that ran can ask to be skipped.
        if why.startswith("SKIP_"):
            return "skipped", skip_reason(case.findtext("system-out", ""))
        return "failed", why or "not run"
    return "failed", ""


def skip_reason(output):
    """The text a GoogleTest case gives GTEST_SKIP, or the last line of a script that skips."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for before, line in zip(lines, lines[1:]):
        if before.endswith(": Skipped"):
            return line
    return lines[-1] if lines else ""


def summarize(path, ctest_code, out=print):
    """Prints the summary and returns the exit code."""
    groups = {"passed": [], "failed": [], "skipped": []}
    try:
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            kind, why = outcome(case)
            groups[kind].append((case.get("name", "?"), why))
    except (OSError, ElementTree.ParseError) as error:
        out(f"no usable results in {path}: {error}")
        out("0 passed, 1 failed")
        return 1
    if ctest_code != 0 and not groups["failed"]:
        groups["failed"].append(("ctest", f"ended with {ctest_code}"))
    for kind in ("skipped", "failed"):
        for name, why in groups[kind]:
            out(f"{kind}: {name}{': ' + why if why else ''}")
    if not groups["passed"] and not groups["failed"]:
        out("no test ran")
    line = f"{len(groups['passed'])} passed, {len(groups['failed'])} failed"
    if groups["skipped"]:
        line += f", {len(groups['skipped'])} skipped"
    out(line)
    return 0 if groups["passed"] and not groups["failed"] else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(summarize(sys.argv[1], int(sys.argv[2])))
