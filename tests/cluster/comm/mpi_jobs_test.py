#!/usr/bin/env python3
"""Starts comm_mpi_test_main through mpirun, breaks the job on purpose, and checks how it ends.

    mpi_jobs_test.py --program PATH CASE -- mpirun and its flags

Whatever happens to one process, the job must end with a non-zero code within a few seconds, say
why, and leave no process behind.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid

READY_TIMEOUT_S = 20
LOST_PEER = 71
MISSED_DEADLINE = 72
REFUSED = 73


class Job:
    """One mpirun with its output; its processes carry a unique argument to be found by."""

    def __init__(self, launcher, program, n_ranks, mode):
        self.token = "job-" + uuid.uuid4().hex
        self.n_ranks = n_ranks
        # Files of a launcher that is killed would otherwise stay behind.
        self.scratch = tempfile.mkdtemp(prefix="mpi-job-")
        env = dict(os.environ, OMPI_MCA_orte_tmpdir_base=self.scratch,
                   OMPI_MCA_btl_vader_backing_directory=self.scratch)
        self.process = subprocess.Popen(
            launcher + ["-n", str(n_ranks), program, mode, self.token],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
            start_new_session=True)
        self.lines = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def output(self):
        return "".join(self.lines)

    def wait_ready(self):
        """The process id of each rank."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            found = dict(re.findall(r"ready rank (\d+) pid (\d+)", self.output()))
            if len(found) == self.n_ranks:
                return {int(rank): int(pid) for rank, pid in found.items()}
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError("the job did not become ready")

    def wait_end(self, limit_s):
        """Exit code and seconds until every process of the job was gone."""
        start = time.monotonic()
        code = self.process.wait(timeout=limit_s)
        while self.ranks_alive():
            if time.monotonic() - start > limit_s:
                raise AssertionError(f"processes left behind: {self.ranks_alive()}")
            time.sleep(0.02)
        self.reader.join(timeout=5)
        return code, time.monotonic() - start

    def ranks_alive(self):
        pids = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    if self.token.encode() in file.read():
                        pids.append(int(entry))
            except OSError:
                pass
        return pids

    def clean_up(self):
        for pid in self.ranks_alive() + ([self.process.pid] if self.process.poll() is None else []):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


def expect(condition, what):
    if not condition:
        raise AssertionError(what)


def break_and_expect(start_job, n_ranks, victim, signal_number, code, text, limit_s):
    job = start_job(n_ranks, "serve")
    try:
        pids = job.wait_ready()
        target = job.process.pid if victim == "launcher" else pids[victim]
        os.kill(target, signal_number)
        ended_with, seconds = job.wait_end(limit_s)
        print(f"{signal.Signals(signal_number).name} to {victim}: ended with {ended_with} "
              f"after {seconds:.2f} s")
        expect(ended_with != 0, "the job claims success")
        expect(code is None or ended_with == code, f"exit code {ended_with}, expected {code}")
        expect(text in job.output(), f"no {text!r} in the output")
    finally:
        if sys.exc_info()[0]:
            print(job.output())
        job.clean_up()


def run_and_expect(start_job, n_ranks, mode, code, text, limit_s):
    job = start_job(n_ranks, mode)
    try:
        ended_with, seconds = job.wait_end(limit_s)
        print(f"{mode}: ended with {ended_with} after {seconds:.2f} s")
        expect(ended_with == code, f"exit code {ended_with}, expected {code}")
        expect(text in job.output(), f"no {text!r} in the output")
    finally:
        if sys.exc_info()[0]:
            print(job.output())
        job.clean_up()


CASES = {
    "kill-rank-1": lambda start: break_and_expect(
        start, 2, 1, signal.SIGKILL, None, "", 5),
    "kill-rank-0": lambda start: break_and_expect(
        start, 4, 0, signal.SIGKILL, None, "", 5),
    "stop-rank-1": lambda start: break_and_expect(
        start, 2, 1, signal.SIGSTOP, LOST_PEER,
        "spindle: rank 0 ends the job: rank 1 is lost: no heartbeat for 2", 5),
    "stop-rank-0": lambda start: break_and_expect(
        start, 2, 0, signal.SIGSTOP, LOST_PEER,
        "spindle: rank 1 ends the job: rank 0 is lost: no heartbeat for 2", 5),
    "kill-launcher": lambda start: break_and_expect(
        start, 2, "launcher", signal.SIGKILL, None, "", 5),
    "deadline": lambda start: run_and_expect(
        start, 2, "deadline", MISSED_DEADLINE,
        "spindle: rank 0 ends the job: step 17: rank 0 got no result message from rank 1", 10),
    "hang-at-end": lambda start: run_and_expect(
        start, 2, "hang-at-end", 70,
        "spindle: rank 0 exits without the others: the other ranks do not end", 10),
    "disagree": lambda start: run_and_expect(
        start, 2, "disagree", 1,
        "rank 1 differs from rank 0 in the configuration: line 2 is \"port: 1\" on rank 0", 10),
    "oversize": lambda start: run_and_expect(
        start, 2, "oversize", REFUSED, "spindle: rank 1 ends the job: a frame of 67109", 15),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("launcher", nargs="+")
    args = parser.parse_args()
    try:
        CASES[args.case](lambda n_ranks, mode: Job(args.launcher, args.program, n_ranks, mode))
    except (AssertionError, subprocess.TimeoutExpired) as error:
        print(f"FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
