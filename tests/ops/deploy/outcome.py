"""Runs a file's unittest cases. A case that was skipped makes the whole run a skip for ctest (exit code
77), with its reason: it must not look as if everything had been tried."""
import sys
import unittest

SKIPPED = 77


def main(arguments):
    program = unittest.main(module="__main__", argv=[sys.argv[0], *arguments], exit=False)
    if not program.result.wasSuccessful():
        sys.exit(1)
    for case, reason in program.result.skipped:
        print(f"skipped: {case}: {reason}")
    if program.result.skipped:
        sys.exit(SKIPPED)
    if program.result.testsRun == 0:
        sys.exit("no test ran")
