#!/usr/bin/env python3
"""What refuses to start says why, quickly, and leaves nothing behind; what starts listens only where
it was told to."""
import os
import pathlib
import re
import socket
import subprocess
import tempfile
import unittest

from cluster import CONFIG, Cluster, binary, golden


def run_spindled(*arguments):
    return subprocess.run([binary("spindled"), *arguments], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=30, check=False)


def listeners(pid):
    """[(address, port)] of the sockets on which a process listens, from /proc."""
    inodes = set()
    for descriptor in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        path = pathlib.Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                raw, port = fields[1].split(":")
                # Words of 4 bytes in the host's byte order.
                address = b"".join(bytes.fromhex(raw[i:i + 8])[::-1] for i in range(0, len(raw), 8))
                found.append((socket.inet_ntop(family, address), int(port, 16)))
    return sorted(found)


class CommandLineTest(unittest.TestCase):
    def test_help_version_and_print_config_need_no_cluster(self):
        self.assertIn("--config", run_spindled("--help").stdout)
        self.assertRegex(run_spindled("--version").stdout,
                         r"^spindled \d+\.\d+\.\d+\n(commit [0-9a-f]{12,}\n)?CUDA (yes|no)\nprotocol \d+\.\d+\n$")
        printed = run_spindled("--config", str(CONFIG), "--print-config", "--api-key", "sk-secret")
        self.assertEqual(printed.returncode, 0, printed.stderr)
        self.assertIn("port: 8000", printed.stdout)
        self.assertNotIn("sk-secret", printed.stdout + printed.stderr)

    def test_a_printed_configuration_reads_back(self):
        printed = run_spindled("--config", str(CONFIG), "--print-config").stdout
        with tempfile.NamedTemporaryFile("w", suffix=".pbtxt") as file:
            file.write(printed)
            file.flush()
            again = run_spindled("--config", file.name, "--print-config")
        self.assertEqual((again.returncode, again.stdout), (0, printed))


class RefusedStartTest(unittest.TestCase):
    def refused(self, *, seconds=20, **options):
        """Starts, expects failure, returns the log."""
        with Cluster(ranks=2, **options) as cluster:
            self.assertNotEqual(cluster.wait_exit(seconds), 0)
            cluster.assert_nothing_left()
            return cluster.log()

    def test_an_unknown_field(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "bad.pbtxt"
            path.write_text("model {\n  path: \"m\"\n  pahts: \"n\"\n}\n")
            log = self.refused(config=path)
        self.assertIn(f"{path}:3:3: ", log)
        self.assertIn('"pahts"', log)

    def test_a_value_out_of_range(self):
        self.assertIn("scheduler.max_num_seqs must be from",
                      self.refused(arguments=["--set", "scheduler.max_num_seqs=0"]))

    def test_ranks_that_disagree(self):
        log = self.refused(per_rank_arguments=[[], ["--set", "kv.dtype=F32"]])
        self.assertIn('"kv.dtype = AUTO" on rank 0 and "kv.dtype = F32" on rank 1', log)

    def test_ranks_with_different_keys(self):
        log = self.refused(per_rank_arguments=[["--api-key", "sk-one"], ["--api-key", "sk-two"]])
        self.assertIn("api.api_key = ", log)
        self.assertNotIn("sk-", log)

    def test_a_model_that_is_not_there(self):
        self.assertIn("/no/such/model", self.refused(arguments=["--model", "/no/such/model"]))

    def test_more_ranks_than_layers(self):
        with Cluster(ranks=13, arguments=["--set", "kv.memory_bytes=8388608"]) as cluster:
            self.assertNotEqual(cluster.wait_exit(30), 0)
            self.assertIn("12 layers", cluster.log())

    def test_memory_for_another_number_of_ranks(self):
        log = self.refused(arguments=["--set", "cluster.device_memory_bytes=90000000,90000000,90000000"])
        self.assertIn("cluster.device_memory_bytes has 3 entries for 2 ranks", log)
        log = self.refused(arguments=["--set", "kv.memory_bytes=90000000,90000000,90000000"])
        self.assertIn("kv.memory_bytes has 3 entries for 2 ranks", log)

    def test_memory_that_holds_no_sequence(self):
        log = self.refused(arguments=["--set", "cluster.device_memory_bytes=120000000,5000000",
                                      "--device", "cpu"])
        self.assertRegex(log, r"stage 1 with layers \d+-11 lacks \d+ bytes")
        self.assertIn("change cluster.device_memory_bytes", log)

    def test_memory_that_no_host_has(self):
        log = self.refused(arguments=["--set", "cluster.device_memory_bytes=1000000000000000"])
        self.assertRegex(log, "ranks 0, 1 share a device|rank 0 is given")

    def test_a_port_that_is_taken(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with Cluster(ranks=2, arguments=["--set", f"api.http.port={port}"]) as cluster:
                self.assertNotEqual(cluster.wait_exit(20), 0)
                self.assertIn(str(port), cluster.log())


class UnequalMemoryTest(unittest.TestCase):
    def test_the_larger_device_gets_more_layers_and_answers_are_the_same(self):
        for memory, larger in ((["120000000", "70000000"], 0), (["70000000", "120000000"], 1)):
            with self.subTest(memory=memory), \
                    Cluster(ranks=2, arguments=["--set", "cluster.device_memory_bytes=" + ",".join(memory),
                                                "--device", "cpu"]) as cluster:
                cluster.wait_ready()
                plan = re.findall(r"plan: stage \d: layers (\d+)-(\d+), ([\d.]+) % of the time", cluster.log())
                counts = [int(last) - int(first) + 1 for first, last, _ in plan]
                self.assertEqual(sum(counts), 12)
                self.assertGreater(counts[larger], counts[1 - larger])
                self.assertAlmostEqual(sum(float(share) for _, _, share in plan), 100, delta=0.2)
                self.assertEqual(cluster.log().count("; the tightest"), 1)
                # What was planned is what is there.
                planned = re.findall(r"plan: stage .* = (\d+) tokens", cluster.log())
                pools = re.findall(r"KV pool [\d.]+ MB = (\d+) tokens", cluster.log())
                self.assertEqual(len(pools), 2)
                for predicted, held in zip(planned, pools):
                    self.assertLessEqual(int(held), int(predicted))
                record = golden("prose64")
                answer = cluster.complete(record["prompt_ids"], len(record["greedy_ids"]),
                                          kv_policy={"profile": "full"})
                self.assertEqual(answer["choices"][0]["text"], record["greedy_text"])

    def test_a_pool_for_each_rank(self):
        with Cluster(ranks=2, arguments=["--set", "kv.memory_bytes=24000000,8000000",
                                         "--max-model-len", "1024"]) as cluster:
            cluster.wait_ready()
            self.assertIn("layers 0-8 on", cluster.log())
            self.assertIn("KV pool 24.0 MB", cluster.log())
            self.assertIn("KV pool 8.0 MB", cluster.log())


class ListenersTest(unittest.TestCase):
    def test_only_declared_listeners_are_open(self):
        with Cluster(ranks=2) as cluster:
            cluster.wait_ready()
            declared = sorted([("127.0.0.1", cluster.http_port), ("127.0.0.1", cluster.tcp_port)])
            self.assertEqual(listeners(cluster.rank_pid(0)), declared)
            self.assertEqual(listeners(cluster.rank_pid(1)), [])

    def test_a_listener_that_is_switched_off(self):
        with Cluster(ranks=1, arguments=["--set", "api.tcp.enabled=false"]) as cluster:
            cluster.wait_ready()
            self.assertEqual(listeners(cluster.rank_pid(0)), [("127.0.0.1", cluster.http_port)])


class ApiKeyTest(unittest.TestCase):
    def test_key_from_the_environment(self):
        with Cluster(ranks=2, environment={"SPINDLE_API_KEY": "sk-env"}) as cluster:
            cluster.wait_ready()
            self.assertEqual(cluster.get("/v1/models").status, 401)
            self.assertEqual(cluster.get("/v1/models", headers={"Authorization": "Bearer sk-env"}).status, 200)
            self.assertNotIn("sk-env", cluster.log())


if __name__ == "__main__":
    unittest.main()
