#!/usr/bin/env python3
"""A cluster over two hosts: two network namespaces with their own addresses, host names and temporary
folders, joined by two networks of which one is for the cluster.

mpirun starts the daemon of the other host through an agent that enters its namespace, in ssh's place.
All traffic stays in the namespaces, which are gone in the end. What was used is printed.
ops/deploy/README.md says how the same is done on real machines. Exit code 77, with the reason, where
it cannot run.
"""
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import uuid

SOURCE = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(SOURCE / "tests" / "system"))
import outcome  # noqa: E402
from cluster import CONFIG, binary, golden, wait_until  # noqa: E402

MARK = "SPINDLE_TEST_TWO_HOSTS"
CLUSTER_NETWORK, OTHER_NETWORK = "192.0.2", "198.51.100"  # reserved for documentation
READY_SECONDS = 40
ANSWER_SECONDS = 120
CUT_SECONDS = 30
END_SECONDS = 12  # peer_timeout_ms is 2 s; then mpirun ends what is left
OOB_PORT, BTL_PORT, N_BTL_PORTS = 31000, 31100, 10
AGENT = """#!/bin/sh
# In ssh's place: enter.sh HOST COMMAND...
namespace=$(sed -n "s/^$1 //p" '{folder}/hosts')
shift
exec ip netns exec "$namespace" unshare --uts sh -c \
  "hostname $namespace; TMPDIR='{folder}/$namespace'; export TMPDIR; $*"
"""


def missing():
    if os.geteuid() != 0:
        return "needs root"
    for program in ("ip", "ss", "unshare", "mpirun"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    probe = f"spindle-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=10, check=False)
    if done.returncode != 0:
        return f"no network namespaces here: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], timeout=10, check=False)
    return ""


def remove_leftovers():
    """What a run that was killed has left: namespaces carry the number of their test's process."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10, check=True).stdout
    for name, pid in re.findall(r"^(spindle-[ab]-(\d+))\b", listed, re.M):
        if not pathlib.Path("/proc", pid).exists():
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=10,
                                    check=False).stdout
            for process in inside.split():
                try:
                    os.kill(int(process), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            ip("netns", "delete", name)


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10, check=False)
    if done.returncode != 0:
        raise AssertionError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Host:
    """A namespace. `address` is on the cluster's network, `other_address` on the other one."""

    def __init__(self, letter, number, tag):
        self.name = f"spindle-{letter}-{tag}"
        self.address = f"{CLUSTER_NETWORK}.{number}"
        self.other_address = f"{OTHER_NETWORK}.{number}"

    def command(self, *command):
        return ["ip", "netns", "exec", self.name, *command]

    def run(self, *command, seconds=20, check=True):
        done = subprocess.run(self.command(*command), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=seconds, check=False)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def sent_bytes(self, interface):
        return int(self.run("cat", f"/sys/class/net/{interface}/statistics/tx_bytes").stdout)

    def sockets(self, *options):
        """[(program, local address, local port, peer address)] of TCP sockets."""
        found = []
        for line in self.run("ss", "-tnpH", *options).stdout.splitlines():
            fields = line.split()
            local, peer = fields[3].rsplit(":", 1), fields[4].rsplit(":", 1)
            program = re.search(r'\(\("([^"]+)"', line)
            found.append((program.group(1) if program else "?", local[0].strip("[]"), int(local[1]),
                          peer[0].strip("[]")))
        return found


class TwoHosts:
    """Both hosts and their networks; the cluster on them. Leaving the `with` block removes all."""

    def __init__(self):
        self.a, self.b = Host("a", 1, os.getpid()), Host("b", 2, os.getpid())
        self._mark = uuid.uuid4().hex
        self._folder = tempfile.TemporaryDirectory(prefix="spindle-hosts-")
        self.folder = pathlib.Path(self._folder.name)
        self.process = None

    def __enter__(self):
        try:
            remove_leftovers()
            self._make_networks()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind, value, traceback):
        if kind is not None:
            print(f"--- log of the cluster\n{self.log()}---")
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if self.process is not None:
            self.process.wait(10)
        for host in (self.a, self.b):  # and with them their interfaces
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, timeout=10, check=False)
        self._folder.cleanup()

    def _make_networks(self):
        for host in (self.a, self.b):
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
            (self.folder / host.name).mkdir()
        for interface, attribute in (("cluster0", "address"), ("other0", "other_address")):
            ip("link", "add", interface, "netns", self.a.name, "type", "veth", "peer", "name", interface,
               "netns", self.b.name)
            for host in (self.a, self.b):
                ip("-n", host.name, "address", "add", f"{getattr(host, attribute)}/30", "dev", interface)
                ip("-n", host.name, "link", "set", interface, "up")
        (self.folder / "hosts").write_text("".join(f"{h.address} {h.name}\n" for h in (self.a, self.b)))
        (self.folder / "hostfile").write_text("".join(f"{h.address} slots=1\n" for h in (self.a, self.b)))
        (self.folder / "enter.sh").write_text(AGENT.format(folder=self.folder))
        (self.folder / "enter.sh").chmod(0o755)

    def start(self):
        """The command that the service runs, with a hostfile."""
        mpirun = ["--allow-run-as-root", "--mca", "plm_rsh_agent", str(self.folder / "enter.sh"),
                  "--mca", "btl", "self,tcp",
                  # Without these they are ports of the system's choice.
                  "--mca", "oob_tcp_dynamic_ipv4_ports", str(OOB_PORT),
                  "--mca", "oob_tcp_dynamic_ipv6_ports", str(OOB_PORT),
                  "--mca", "btl_tcp_port_min_v4", str(BTL_PORT), "--mca", "btl_tcp_port_range_v4", str(N_BTL_PORTS),
                  "--mca", "btl_tcp_port_min_v6", str(BTL_PORT), "--mca", "btl_tcp_port_range_v6", str(N_BTL_PORTS),
                  "-x", MARK]
        self.environment = {
            **os.environ, MARK: self._mark, "TMPDIR": str(self.folder / self.a.name),
            "SPINDLE_STAGES": "2", "SPINDLE_CONFIG": str(CONFIG), "SPINDLED": binary("spindled"),
            "SPINDLE_HOSTFILE": str(self.folder / "hostfile"), "SPINDLE_NETWORK": f"{CLUSTER_NETWORK}.0/30",
            "SPINDLE_MPIRUN_OPTIONS": " ".join(mpirun)}
        launch = str(SOURCE / "ops/deploy/systemd/launch.sh")
        printed = subprocess.run([launch, "--print"], env=self.environment, capture_output=True, text=True,
                                 timeout=10, check=True).stdout
        print(f"on {self.a.name}: {printed.strip()}")
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                self.a.command("unshare", "--uts", "sh", "-c", f'hostname {self.a.name}; exec "$1"', "sh", launch),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self.environment,
                start_new_session=True)

        def ready():
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode} before it was ready\n{self.log()}")
            return self.a.run(binary("spindle"), "stats", check=False).returncode == 0
        wait_until(ready, READY_SECONDS, "the cluster answers")

    def log(self):
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def pids(self):
        """{pid: environment} of every process of the cluster, on both hosts."""
        found = {}
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                raw = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            # The daemon of the other host has no such variable, but its folder.
            mine = (f"{MARK}={self._mark}".encode() in raw or
                    f"TMPDIR={self.folder / self.b.name}".encode() in raw)
            if mine and state != "Z":
                pairs = (item.partition(b"=") for item in raw)
                found[int(entry.name)] = {k.decode(): v.decode(errors="replace") for k, _, v in pairs}
        return found

    def rank_pid(self, rank):
        return next(pid for pid, environment in self.pids().items()
                    if environment.get("OMPI_COMM_WORLD_RANK") == str(rank))

    def wait_end(self, seconds):
        """mpirun's exit code, when no process is left on either host."""
        started = time.monotonic()
        code = self.process.wait(seconds)
        wait_until(lambda: not self.pids(), max(0.1, seconds - (time.monotonic() - started)),
                   f"no process is left, but {list(self.pids())}")
        return code


class TwoHostsTest(unittest.TestCase):
    def namespace_of(self, pid):
        return subprocess.run(["ip", "netns", "identify", str(pid)], capture_output=True, text=True, timeout=10,
                              check=True).stdout.strip()

    def ask(self, hosts):
        subprocess.run([str(SOURCE / "ops/demo/make_document.py"), str(hosts.folder)], timeout=60, check=True)
        answer = hosts.a.run(binary("spindle"), "chat", "--file", str(hosts.folder / "document.txt"), "--message",
                             (hosts.folder / "question.txt").read_text(), "--max-tokens", "16", "--temperature",
                             "0", "--show-usage", seconds=ANSWER_SECONDS)
        self.assertEqual(answer.stdout.strip(), (hosts.folder / "answer.txt").read_text().strip())
        print(f"the demo's question on {hosts.a.name}: {answer.stdout.strip()}; {answer.stderr.splitlines()[0]}")
        record = golden("prose64")
        text = hosts.a.run(binary("spindle"), "complete", record["prompt"], "--max-tokens",
                           str(len(record["greedy_ids"])), "--temperature", "0", "--kv-policy", "full",
                           seconds=ANSWER_SECONDS).stdout
        self.assertEqual(text.rstrip("\n"), record["greedy_text"].rstrip("\n"))
        return int(re.search(r"prompt (\d+) tokens", answer.stderr).group(1))

    def check_sockets(self, hosts):
        """Connections are on the cluster's network; who listens, and where."""
        for host in (hosts.a, hosts.b):
            for program, local, port, peer in host.sockets():
                print(f"{host.name}: {program} {local}:{port} with {peer}")
                self.assertIn(local, (host.address, "127.0.0.1"))
                if local != "127.0.0.1":
                    self.assertEqual(peer, (hosts.b if host is hosts.a else hosts.a).address)
            listening = host.sockets("-l")
            for program, local, port, _ in listening:
                print(f"{host.name}: {program} listens on {local}:{port}")
            for program, local, port, _ in listening:
                if local == "127.0.0.1":  # the API; mpirun for the ranks that it started
                    self.assertTrue(program == "spindled" and port in (8000, 8001) and host is hosts.a or
                                    program in ("mpirun", "orted"), (program, local, port))
                else:
                    # Open MPI 4.1 binds to every address; the ports are what a firewall can hold on to.
                    ports = {"spindled": range(BTL_PORT, BTL_PORT + N_BTL_PORTS)}
                    self.assertIn(port, ports.get(program, [OOB_PORT]), (program, local, port))
        between = [s for s in hosts.a.sockets() if s[0] == "spindled" and s[1] == hosts.a.address]
        self.assertTrue(between, "rank 0 has no connection to rank 1")

    def test_a_cluster_over_two_hosts(self):
        with TwoHosts() as hosts:
            hosts.start()
            self.assertEqual([self.namespace_of(hosts.rank_pid(rank)) for rank in (0, 1)],
                             [hosts.a.name, hosts.b.name])
            stats = hosts.a.run(binary("spindle"), "stats", "--json").stdout
            for host in (hosts.a, hosts.b):
                self.assertRegex(hosts.log(), rf"stage \d: layers \d+-\d+ on {host.name}")
            self.assertIn('"stages"', stats)

            before = {name: hosts.a.sent_bytes(name) for name in ("cluster0", "other0")}
            n_tokens = self.ask(hosts)
            sent = {name: hosts.a.sent_bytes(name) - before[name] for name in before}
            # Each token's activations once, 256 fp32 numbers.
            activations = n_tokens * 256 * 4
            print(f"sent by {hosts.a.name}: {sent['cluster0'] / 1e6:.2f} MB on cluster0, {sent['other0']} bytes on "
                  f"other0; activations of {n_tokens} tokens are {activations / 1e6:.2f} MB")
            self.assertGreater(sent["cluster0"], activations)
            self.assertLess(sent["other0"], 10000)  # neighbour discovery
            self.check_sockets(hosts)

            hosts.a.run(binary("spindle"), "drain")
            self.assertEqual(hosts.wait_end(END_SECONDS), 0)

    def test_a_rank_of_the_other_host_is_killed(self):
        with TwoHosts() as hosts:
            hosts.start()
            started = time.monotonic()
            os.kill(hosts.rank_pid(1), signal.SIGKILL)
            self.assertNotEqual(hosts.wait_end(END_SECONDS), 0)
            print(f"rank 1 killed: ended after {time.monotonic() - started:.1f} s")
            self.assertRegex(hosts.log(), r"rank 1\b")
            self.assertRegex(hosts.log(), rf"(?s)rank 1 .*{hosts.b.name}|{hosts.b.name}.*rank 1")

    def test_the_network_between_the_hosts_breaks(self):
        with TwoHosts() as hosts:
            hosts.start()
            # What mpirun sends to a daemon that is out of reach is repeated tcp_retries2 times, 15 minutes
            # by default, and mpirun waits for that.
            for host in (hosts.a, hosts.b):
                host.run("sh", "-c", "echo 3 >/proc/sys/net/ipv4/tcp_retries2")
            started = time.monotonic()
            ip("-n", hosts.b.name, "link", "set", "cluster0", "down")
            self.assertNotEqual(hosts.wait_end(CUT_SECONDS), 0)
            print(f"network cut: ended after {time.monotonic() - started:.1f} s")
            self.assertRegex(hosts.log(), r"rank 1\b.*(lost|not been heard|silent|no sign)")


if __name__ == "__main__":
    reason = missing()
    if reason:
        print(f"skipped: {reason}")
        sys.exit(outcome.SKIPPED)
    # So that the with blocks are left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    outcome.main(sys.argv[1:])
