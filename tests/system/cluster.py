"""Starts real clusters for tests: mpirun with n ranks of spindled on free loopback ports.

    with Cluster(ranks=2) as cluster:
        cluster.wait_ready()
        cluster.spindle("drain")
        assert cluster.wait_exit(30) == 0

Every process of a cluster carries a variable of its own in its environment, so that leaving the
`with` block can kill, and report, whatever is left, even if its parent is gone. Every wait has a
deadline. Standard library only.
"""
import http.client
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import tempfile
import time
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[2]
# tests/gpu/run.sh runs the same tests with the configuration for GPUs.
CONFIG = pathlib.Path(os.environ.get("SPINDLE_TEST_CONFIG", ROOT / "configs" / "mini-cpu.pbtxt"))
GOLDEN = ROOT / "tests" / "golden" / "golden.json"
MODEL = "spindle-mini"
READY_SECONDS = 60
MARK = "SPINDLE_TEST_CLUSTER"

# All ranks are on this host: shared memory instead of TCP, so that no rank listens for others.
MPI_OPTIONS = ["--oversubscribe", "--bind-to", "none", "--mca", "btl", "self,vader",
               "--mca", "oob_tcp_if_include", "lo"]
if os.geteuid() == 0:
    MPI_OPTIONS = ["--allow-run-as-root"] + MPI_OPTIONS


def binary(name):
    """build/bin/NAME of the build under test."""
    return str(pathlib.Path(os.environ.get("SPINDLE_BINARY_DIR", ROOT / "build")) / "bin" / name)


def free_ports(count):
    """Ports nobody listens on, below the range from which the system takes outgoing ones."""
    found = []
    while len(found) < count:
        port = random.SystemRandom().randint(20000, 29999)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def wait_until(condition, seconds, what):
    """Polls until condition() is true and returns its value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


def mpirun_forwards(number):
    """Whether mpirun passes the signal to what it runs."""
    waiting = f"trap 'exit 3' {int(number)}; echo waits; for i in $(seq 100); do sleep 0.1; done"
    with subprocess.Popen(["mpirun", *MPI_OPTIONS, "-n", "1", "bash", "-c", waiting],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as job:
        job.stdout.readline()
        job.send_signal(number)
        return job.wait(30) == 3


def golden(name):
    """One greedy record: prompt_ids, prompt, greedy_ids, greedy_text."""
    records = json.loads(GOLDEN.read_text())["greedy"]
    return next(record for record in records if record["name"] == name)


class Response:
    """An HTTP answer, read to its end."""

    def __init__(self, status, headers, body):
        self.status = status
        self.headers = headers
        self.body = body

    def json(self):
        return json.loads(self.body)


class Cluster:
    def __init__(self, ranks=2, arguments=(), *, config=CONFIG, mpi_options=(), per_rank_arguments=None,
                 environment=None):
        """per_rank_arguments: a list of extra arguments for each rank, when ranks shall differ."""
        self.ranks = ranks
        self.http_port, self.tcp_port = free_ports(2)
        self._mark = uuid.uuid4().hex
        self._folder = tempfile.TemporaryDirectory(prefix="spindle-system-")
        self._log_path = pathlib.Path(self._folder.name) / "log"
        self._arguments = ["--config", str(config), "--port", str(self.http_port),
                           "--set", f"api.tcp.port={self.tcp_port}", *arguments]
        self._mpi_options = MPI_OPTIONS + list(mpi_options)
        self._per_rank_arguments = per_rank_arguments
        self._environment = environment or {}
        self._streams = []  # connections close when nobody holds them
        self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, kind, value, traceback):
        try:
            leftovers = self._kill_all()
            if kind is not None:
                print(f"--- log of the cluster\n{self.log()}---")
            elif leftovers:
                raise AssertionError(f"processes were left: {leftovers}\n{self.log()}")
        finally:
            for stream in self._streams:
                stream.close()
            self._folder.cleanup()

    # Processes.

    def start(self):
        command = ["mpirun", *self._mpi_options]
        if self._per_rank_arguments is None:
            command += ["-n", str(self.ranks), binary("spindled"), *self._arguments]
        else:
            for rank, extra in enumerate(self._per_rank_arguments):
                command += [":"] if rank > 0 else []
                command += ["-n", "1", binary("spindled"), *self._arguments, *extra]
        environment = {**os.environ, **self._environment, MARK: self._mark}
        with open(self._log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, env=environment,
                                            start_new_session=True, cwd=self._folder.name)

    def pids(self):
        """{pid: environment} of every process of this cluster that has not ended."""
        found = {}
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                raw = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if f"{MARK}={self._mark}".encode() in raw.split(b"\0") and state != "Z":
                pairs = (item.partition(b"=") for item in raw.split(b"\0"))
                found[int(entry.name)] = {k.decode(): v.decode(errors="replace") for k, _, v in pairs}
        return found

    def rank_pid(self, rank):
        def find():
            return next((pid for pid, env in self.pids().items()
                         if env.get("OMPI_COMM_WORLD_RANK") == str(rank)), None)
        return wait_until(find, 20, f"rank {rank} exists")

    def signal_rank(self, rank, number):
        os.kill(self.rank_pid(rank), number)

    def signal_mpirun(self, number):
        self.process.send_signal(number)

    def wait_exit(self, seconds):
        """mpirun's exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"mpirun has not ended within {seconds} s") from None

    def assert_nothing_left(self, seconds=2):
        def closed(port):
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) != 0

        deadline = time.monotonic() + seconds
        wait_until(lambda: not self.pids(), seconds, f"no process is left, but {list(self.pids())}")
        # A process that is ending has lost its environment, by which pids() knows it, before its
        # sockets: the ports get what is left of the time.
        for port in (self.http_port, self.tcp_port):
            wait_until(lambda port=port: closed(port), max(0.1, deadline - time.monotonic()),
                       f"port {port} is closed")

    def _kill_all(self):
        """Kills what is left and returns it; a cluster that was never stopped is not a leftover."""
        if self.process is not None and self.process.poll() is None:
            for pid in [self.process.pid, *self.pids()]:
                self._kill(pid)
            self.process.wait(10)
            wait_until(lambda: not self.pids(), 10, "killed processes end")
            return []
        # mpirun reaps its children before it ends; give the kernel a moment all the same.
        time.sleep(0.1)
        left = list(self.pids())
        for pid in left:
            self._kill(pid)
        return left

    @staticmethod
    def _kill(pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    # What it says and answers.

    def log(self):
        return self._log_path.read_text(errors="replace")

    def wait_ready(self, seconds=READY_SECONDS):
        def ready():
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode} before it was ready")
            try:
                return self.get("/ready").status == 200
            except OSError:
                return False
        wait_until(ready, seconds, "/ready answers 200")

    def connection(self, seconds=60):
        return http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=seconds)

    def request(self, method, path, body=None, headers=None, seconds=60):
        connection = self.connection(seconds)
        try:
            payload = None if body is None else json.dumps(body)
            all_headers = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, payload, all_headers)
            response = connection.getresponse()
            return Response(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, body, **options):
        return self.request("POST", path, body, **options)

    def complete(self, prompt, max_tokens, **fields):
        """/v1/completions, greedy; returns the parsed answer."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
        answer = self.post("/v1/completions", body)
        assert answer.status == 200, f"{answer.status}: {answer.body!r}"
        return answer.json()

    def stream(self, max_tokens=2000):
        """Starts a long streamed completion; returns the response after its first event. Its leave()
        closes the socket."""
        connection = self.connection()
        body = {"model": MODEL, "prompt": golden("prose64")["prompt_ids"], "max_tokens": max_tokens,
                "temperature": 0, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, f"{response.status}: {response.read()!r}"
        self._streams += [response, connection]
        # http.client keeps the socket of a response that was not read to its end.
        response.leave = lambda: (response.close(), connection.close())
        first = response.readline()
        assert first.startswith(b"data: "), first
        return response

    def spindle(self, command, *arguments, seconds=60, check=True, port=None):
        """Runs the client program against this cluster (`port`: its TCP API's) and returns what it
        printed."""
        result = subprocess.run([binary("spindle"), command, "--port", str(port or self.tcp_port),
                                 *arguments],
                                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds,
                                env={**os.environ, **self._environment}, check=False)
        if check:
            assert result.returncode == 0, f"spindle {command}: {result.returncode}\n{result.stderr}"
        return result
