#!/usr/bin/env python3
"""Tests ops/test_summary.py: its last line decides whether a change is good."""
import pathlib
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "ops"))
import test_summary  # noqa: E402

PASSED = '<testcase name="a" status="run"/>'
FAILED = '<testcase name="b" status="fail"><failure message=""/></testcase>'
SKIPPED = ('<testcase name="c" status="notrun"><skipped message="SKIP_REGULAR_EXPRESSION_MATCHED"/>'
           "<system-out>[ RUN ] c\nc_test.cc:7: Skipped\nno GPU\n[ SKIPPED ] c</system-out></testcase>")
DISABLED = '<testcase name="d" status="disabled"/>'
MISSING = '<testcase name="e" status="notrun"><skipped message="Unable to find executable"/></testcase>'


class SummaryTest(unittest.TestCase):
    def summarize(self, *cases, ctest_code=0, text=None):
        lines = []
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "results.xml"
            path.write_text(f"<testsuite>{''.join(cases)}</testsuite>" if text is None else text)
            code = test_summary.summarize(path, ctest_code, lines.append)
        return code, lines

    def test_all_passed(self):
        self.assertEqual(self.summarize(PASSED, PASSED), (0, ["2 passed, 0 failed"]))

    def test_a_failure(self):
        code, lines = self.summarize(PASSED, FAILED, ctest_code=8)
        self.assertEqual((code, lines[-1]), (1, "1 passed, 1 failed"))
        self.assertIn("failed: b", lines)

    def test_skips_are_counted_with_their_reason(self):
        code, lines = self.summarize(PASSED, SKIPPED, DISABLED)
        self.assertEqual((code, lines[-1]), (0, "1 passed, 0 failed, 2 skipped"))
        self.assertIn("skipped: c: no GPU", lines)

    def test_a_missing_program_is_a_failure(self):
        code, lines = self.summarize(PASSED, MISSING, ctest_code=8)
        self.assertEqual((code, lines[-1]), (1, "1 passed, 1 failed"))
        self.assertIn("failed: e: Unable to find executable", lines)

    def test_no_test_ran(self):
        self.assertEqual(self.summarize(), (1, ["no test ran", "0 passed, 0 failed"]))
        self.assertEqual(self.summarize(SKIPPED)[0], 1)

    def test_ctest_failed_although_no_test_did(self):
        code, lines = self.summarize(PASSED, ctest_code=1)
        self.assertEqual((code, lines[-1]), (1, "1 passed, 1 failed"))

    def test_unusable_results(self):
        code, lines = self.summarize(text="<testsuite>")
        self.assertEqual((code, lines[-1]), (1, "0 passed, 1 failed"))
        lines = []
        self.assertEqual(test_summary.summarize("/no/such/file", 0, lines.append), 1)
        self.assertEqual(lines[-1], "0 passed, 1 failed")


if __name__ == "__main__":
    unittest.main()
