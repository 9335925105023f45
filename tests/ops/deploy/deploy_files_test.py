#!/usr/bin/env python3
"""What ops/deploy holds, checked against the programs: every path, port, flag and configuration key in
it exists. Exit code 77, with the reason, where a Python package is missing.

usage: deploy_files_test.py SOURCE BUILD [unittest options]
"""
import copy
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

try:
    import jsonschema
    import yaml
except ImportError as error:
    print(f"skipped: {error} (Debian: python3-yaml python3-jsonschema)")
    sys.exit(77)

SOURCE, BUILD = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
sys.path[:0] = [str(SOURCE / "ops/man"), str(SOURCE / "tests/system")]
import cli_tree  # noqa: E402
import config_schema  # noqa: E402
import outcome  # noqa: E402
from cluster import free_ports, wait_until  # noqa: E402

DEPLOY = SOURCE / "ops/deploy"
LAUNCH = DEPLOY / "systemd/launch.sh"
SPINDLE, SPINDLED = BUILD / "bin/spindle", BUILD / "bin/spindled"
KEYS = {key.path: key for key in config_schema.load(SOURCE / "proto/config.proto")[0]}
SECONDS = 30


def run(*command, environment=None, check=True, seconds=SECONDS):
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=seconds, check=False, env={**os.environ, **(environment or {})})
    if check and done.returncode != 0:
        raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def mca_parameters():
    """The parameters that this Open MPI knows."""
    return set(re.findall(r'parameter "(\w+)"', run("ompi_info", "--all").stdout))


def check_flags(test, program, words):
    """Every option in a command line of `program` exists."""
    command, words = cli_tree.load(program), list(words)
    while words and words[0] in [c["name"] for c in command["commands"]]:
        name = words.pop(0)
        command = next(c for c in command["commands"] if c["name"] == name)
    known = {name for option in command["options"] for name in option["names"]}
    for word in words:
        if word.startswith("--"):
            test.assertIn(word.split("=")[0], known)


def effective(text):
    """What --print-config makes of a configuration."""
    with tempfile.NamedTemporaryFile("w", suffix=".pbtxt") as file:
        file.write(text)
        file.flush()
        return run(SPINDLED, "--config", file.name, "--print-config").stdout


class KubernetesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        text = (DEPLOY / "kubernetes/spindle.yaml").read_text()
        cls.documents = list(yaml.safe_load_all(text))
        cls.schema = json.loads((pathlib.Path(__file__).parent / "schemas/kubernetes.json").read_text())
        cls.kinds = {document["kind"]: document for document in cls.documents}
        replicas = cls.kinds["MPIJob"]["spec"]["mpiReplicaSpecs"]
        cls.templates = {name: replicas[name]["template"] for name in ("Launcher", "Worker")}
        cls.pods = {name: template["spec"] for name, template in cls.templates.items()}
        cls.containers = {name: pod["containers"][0] for name, pod in cls.pods.items()}
        cls.environment = {entry["name"]: entry.get("value") for entry in cls.containers["Launcher"]["env"]}
        cls.config = cls.kinds["ConfigMap"]["data"]["spindle.pbtxt"]

    def test_schema(self):
        jsonschema.Draft7Validator.check_schema(self.schema)
        for document in self.documents:
            jsonschema.validate(document, self.schema)
        self.assertEqual(len(self.documents), 5)

    def test_the_schema_refuses_mistakes(self):
        job = self.kinds["MPIJob"]

        def pod(document):
            return document["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]

        mistakes = {
            "a misspelt field": lambda d: d["spec"].update(slotsPerWorkers=1),
            "a field of v1": lambda d: d["spec"].update(cleanPodPolicy="Running"),
            "two launchers": lambda d: d["spec"]["mpiReplicaSpecs"]["Launcher"].update(replicas=2),
            "a restart policy of pods": lambda d: d["spec"]["mpiReplicaSpecs"]["Worker"].update(restartPolicy="Always"),
            "an image without a tag": lambda d: pod(d)["containers"][0].update(image="spindle"),
            "a probe of nothing": lambda d: pod(d)["containers"][0].update(livenessProbe={"periodSeconds": 1}),
            "a relative path": lambda d: pod(d)["containers"][0]["volumeMounts"][0].update(mountPath="dev/shm"),
            "a number as environment": lambda d: pod(d)["containers"][0]["env"][0].update(value=2),
            "no resources": lambda d: pod(d)["containers"][0].pop("resources"),
        }
        for what, change in mistakes.items():
            with self.subTest(what):
                wrong = copy.deepcopy(job)
                change(wrong)
                with self.assertRaises(jsonschema.ValidationError):
                    jsonschema.validate(wrong, self.schema)

    def test_names_refer_to_something(self):
        secret = self.kinds["Secret"]
        key = next(e for e in self.containers["Launcher"]["env"] if e["name"] == "SPINDLE_API_KEY")
        reference = key["valueFrom"]["secretKeyRef"]
        self.assertEqual(reference["name"], secret["metadata"]["name"])
        self.assertIn(reference["key"], secret["stringData"])
        for name, pod in self.pods.items():
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            self.assertEqual(volumes["config"]["configMap"]["name"], self.kinds["ConfigMap"]["metadata"]["name"])
            for mount in self.containers[name]["volumeMounts"]:
                self.assertIn(mount["name"], volumes)
        labels = self.templates["Launcher"]["metadata"]["labels"]
        service = self.kinds["Service"]
        selector = service["spec"]["selector"]
        self.assertEqual(selector, {name: labels.get(name) for name in selector})
        self.assertNotEqual(selector, {name: self.templates["Worker"]["metadata"]["labels"].get(name)
                                       for name in selector}, "rank 0 alone answers")
        monitor = self.kinds["ServiceMonitor"]["spec"]
        wanted = monitor["selector"]["matchLabels"]
        self.assertEqual(wanted, {name: service["metadata"]["labels"].get(name) for name in wanted})
        ports = [port["name"] for port in service["spec"]["ports"]]
        for endpoint in monitor["endpoints"]:
            self.assertIn(endpoint["port"], ports)

    def test_configuration_ports_and_probes(self):
        printed = effective(self.config)
        http = int(re.search(r"http \{[^}]*port: (\d+)", printed).group(1))
        ports = {p["name"]: p["containerPort"] for p in self.containers["Launcher"]["ports"]}
        self.assertEqual(ports["http"], http)
        self.assertRegex(printed, r'http \{[^}]*host: "0\.0\.0\.0"')
        self.assertEqual(self.kinds["Service"]["spec"]["ports"][0]["targetPort"], "http")
        annotations = self.templates["Launcher"]["metadata"]["annotations"]
        self.assertEqual(annotations["prometheus.io/port"], str(http))
        # The paths, and that they need no key.
        routes = dict(re.findall(r'RouteEntry\{"(/[\w/]+)", "GET", Route::\w+, (true|false)\}',
                                 (SOURCE / "cluster/api/http_router.cc").read_text()))
        paths = [self.containers["Launcher"][probe]["httpGet"]["path"]
                 for probe in ("startupProbe", "livenessProbe", "readinessProbe")]
        self.assertEqual(paths, ["/live", "/live", "/ready"])
        paths += [annotations["prometheus.io/path"],
                  *(e["path"] for e in self.kinds["ServiceMonitor"]["spec"]["endpoints"])]
        for path in paths:
            self.assertEqual(routes.get(path), "true", path)
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            self.assertIn(self.containers["Launcher"][probe]["httpGet"]["port"], ports)

    def test_times_fit_into_each_other(self):
        stop = self.containers["Launcher"]["lifecycle"]["preStop"]["exec"]["command"]
        self.assertEqual(stop[:2], ["spindle", "drain"])
        check_flags(self, SPINDLE, stop[1:])
        wait = int(stop[stop.index("--timeout") + 1])
        drain = int(re.search(r"drain_timeout_ms: (\d+)", effective(self.config)).group(1)) / 1000
        grace = self.pods["Launcher"]["terminationGracePeriodSeconds"]
        self.assertLess(drain, wait)
        self.assertLess(wait, grace)
        startup = self.containers["Launcher"]["startupProbe"]
        self.assertGreaterEqual(startup["periodSeconds"] * startup["failureThreshold"] * 1000,
                                int(re.search(r"startup_timeout_ms: (\d+)", effective(self.config)).group(1)))

    def test_what_the_launcher_runs(self):
        stages = self.kinds["MPIJob"]["spec"]["slotsPerWorker"] * (
            1 + self.kinds["MPIJob"]["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"])
        self.assertEqual(self.environment["SPINDLE_STAGES"], str(stages))
        self.assertEqual(self.containers["Launcher"]["command"], ["/usr/libexec/spindle/launch"])
        mount = next(m for m in self.containers["Launcher"]["volumeMounts"] if m["name"] == "config")
        self.assertEqual(self.environment["SPINDLE_CONFIG"], f"{mount['mountPath']}/spindle.pbtxt")
        with tempfile.TemporaryDirectory() as folder:
            config, hosts = pathlib.Path(folder, "c.pbtxt"), pathlib.Path(folder, "hostfile")
            config.write_text(self.config)
            hosts.write_text("spindle-launcher slots=1\nspindle-worker-0 slots=1\n")
            variables = {name: value for name, value in self.environment.items() if value is not None}
            variables.update(SPINDLE_CONFIG=str(config), SPINDLE_HOSTFILE=str(hosts), SPINDLED=str(SPINDLED),
                             SPINDLE_API_KEY="secret")
            words = shlex.split(run(LAUNCH, "--print", environment=variables).stdout)
            self.assertNotIn("secret", words)
            at = words.index(str(SPINDLED))
            run(*words[at:], "--print-config")
        known = mca_parameters()
        for i, word in enumerate(words[:at]):
            if word == "--mca":
                self.assertIn(words[i + 1], known)
        self.assertEqual(words[words.index("plm_rsh_args") + 1], "-F/etc/spindle/ssh_config")

    def test_image_and_user(self):
        version = run(SPINDLED, "--version").stdout.split()[1]
        dockerfile = (DEPLOY / "container/Dockerfile").read_text()
        uid, gid = re.search(r"--uid (\d+) --gid (\d+)", dockerfile).groups()
        sshd = (DEPLOY / "container/sshd_config").read_text()
        for name, pod in self.pods.items():
            self.assertEqual(self.containers[name]["image"], f"spindle:{version}")
            security = pod["securityContext"]
            self.assertEqual((security["runAsUser"], security["runAsGroup"]), (int(uid), int(gid)))
            self.assertTrue(security["runAsNonRoot"])
        worker = self.containers["Worker"]
        self.assertEqual(worker["command"][-1], "/etc/spindle/sshd_config")
        self.assertIn(f"Port {worker['ports'][0]['containerPort']}\n", sshd)
        self.assertIn(f"HostKey {self.kinds['MPIJob']['spec']['sshAuthMountPath']}/", sshd)

    def test_ssh_client_settings(self):
        settings = run("ssh", "-G", "-F", DEPLOY / "container/ssh_config", "spindle-worker-0").stdout
        for line in ("user spindle", "port 2222", "identityfile /var/lib/spindle/.ssh/id_rsa",
                     "connectionattempts 10"):
            self.assertIn(line + "\n", settings)


class ContainerTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        text = (DEPLOY / "container/Dockerfile").read_text()
        joined = re.sub(r"\\\n\s*", " ", "\n".join(l for l in text.splitlines() if not l.startswith("#")))
        cls.steps = [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]

    def values(self, name):
        return [value for instruction, value in self.steps if instruction == name]

    def test_stages(self):
        known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "STOPSIGNAL",
                 "HEALTHCHECK", "ENTRYPOINT"}
        self.assertEqual({instruction for instruction, _ in self.steps} - known, set())
        self.assertEqual([value.split(" AS ")[1] for value in self.values("FROM")], ["build", "run"])
        for base in self.values("ARG"):
            self.assertRegex(base, r"^\w+=debian:bookworm(-slim)?$")
        # Nothing is downloaded but packages.
        for command in self.values("RUN"):
            self.assertNotRegex(command, r"\b(curl|wget|pip|git clone)\b")

    def test_it_copies_and_runs_what_exists(self):
        for value in self.values("COPY"):
            words = value.split()
            if words[0].startswith("--from="):
                self.assertEqual(words[0], "--from=build")
                continue
            for source in words[:-1]:
                self.assertTrue((SOURCE / source).exists(), source)
        commands = " && ".join(self.values("RUN"))
        options = set(re.findall(r"ops/setup\.sh (--[\w-]+)", commands))
        help_text = run(SOURCE / "ops/setup.sh", "--help").stdout
        self.assertEqual(options, {"--packages-only", "--no-packages"})
        for option in options:
            self.assertIn(option, help_text)
        # What build_package.sh needs beside a compiler.
        packages = run(SOURCE / "ops/setup.sh", "--list-packages").stdout.split()
        self.assertLessEqual({"dpkg-dev", "file", "python3"}, set(packages))
        # The package as its own test builds and installs it.
        own_test = (pathlib.Path(__file__).parent / "package_test.py").read_text()
        self.assertIn("ops/deploy/build_package.sh", commands)
        self.assertIn("ops/deploy/build_package.sh", own_test)
        self.assertRegex(commands, r"apt-get install -y --no-install-recommends\s+/out/spindle_\*\.deb")

    def test_it_runs_without_root_and_says_how_it_is(self):
        names = [instruction for instruction, _ in self.steps]
        self.assertEqual(self.values("USER"), ["spindle"])
        self.assertLess(names.index("USER"), names.index("ENTRYPOINT"))
        self.assertEqual(json.loads(self.values("ENTRYPOINT")[0]), ["/usr/libexec/spindle/launch"])
        self.assertEqual(self.values("STOPSIGNAL"), ["SIGUSR2"])
        self.assertEqual(self.values("EXPOSE"), [KEYS["api.http.port"].default])
        health = self.values("HEALTHCHECK")[0]
        words = json.loads(health[health.index("CMD ") + 4:])
        self.assertEqual(words[0], "spindle")
        check_flags(self, SPINDLE, words[1:])
        limit = int(words[words.index("--timeout") + 1]) + int(words[words.index("--connect-timeout") + 1])
        self.assertLess(limit, int(re.search(r"--timeout=(\d+)s", health).group(1)))

    def test_environment_is_what_the_launcher_reads(self):
        environment = dict(word.split("=", 1) for word in shlex.split(self.values("ENV")[0]))
        text = LAUNCH.read_text()
        for name in environment:
            if name.startswith("SPINDLE"):
                self.assertIn(f"${{{name}", text)
        check_flags(self, SPINDLED, environment["SPINDLE_OPTIONS"].split())

    def test_what_is_ignored_is_not_needed(self):
        ignored = (DEPLOY / "container/Dockerfile.dockerignore").read_text().split()
        for source in (word for value in self.values("COPY") for word in value.split()[:-1]):
            self.assertNotIn(source.rstrip("/"), ignored)


class LaunchTest(unittest.TestCase):
    def launch(self, *arguments, **variables):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SPINDLE")}
        return subprocess.run([str(LAUNCH), *arguments], env={**clean, **variables}, capture_output=True,
                              text=True, timeout=SECONDS, check=False)

    def printed(self, **variables):
        done = self.launch("--print", SPINDLED=str(SPINDLED), **variables)
        self.assertEqual(done.returncode, 0, done.stderr)
        return shlex.split(done.stdout)

    def test_wrong_settings_end_with_2_and_a_reason(self):
        config = str(SOURCE / "configs/mini-cpu.pbtxt")
        for variables, reason in (
                ({}, "SPINDLE_CONFIG is not set"),
                ({"SPINDLE_CONFIG": "/no/such.pbtxt"}, "cannot read the configuration /no/such.pbtxt"),
                ({"SPINDLE_CONFIG": config, "SPINDLE_STAGES": "0"}, "SPINDLE_STAGES must be"),
                ({"SPINDLE_CONFIG": config, "SPINDLE_STAGES": "2; reboot"}, "SPINDLE_STAGES must be"),
                ({"SPINDLE_CONFIG": config, "SPINDLED": "/no/spindled"}, "there is no /no/spindled"),
                ({"SPINDLE_CONFIG": config, "SPINDLED": str(SPINDLED), "SPINDLE_HOSTFILE": "/no/hosts"},
                 "cannot read the hostfile /no/hosts"),
                ({"SPINDLE_CONFIG": config, "SPINDLED": str(SPINDLED), "SPINDLE_NETWORK": "eth0"},
                 "SPINDLE_NETWORK needs SPINDLE_HOSTFILE")):
            with self.subTest(reason):
                done = self.launch(**variables)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertIn(reason, done.stderr)

    def test_one_host_stays_on_the_host(self):
        words = self.printed(SPINDLE_CONFIG=str(SOURCE / "configs/mini-cpu.pbtxt"), SPINDLE_STAGES="3",
                             SPINDLE_OPTIONS="--max-num-seqs 4 --set api.tcp.port=9001",
                             SPINDLE_MPIRUN_OPTIONS="--report-bindings")
        self.assertEqual(words[:3], ["mpirun", "-n", "3"])
        self.assertEqual(words[words.index("btl") + 1], "self,vader")
        self.assertIn("--report-bindings", words[:words.index(str(SPINDLED))])
        printed = run(*words[words.index(str(SPINDLED)):], "--print-config").stdout
        self.assertIn("max_num_seqs: 4", printed)
        self.assertIn("port: 9001", printed)

    def test_several_hosts_get_network_and_key(self):
        with tempfile.NamedTemporaryFile("w") as hosts:
            words = self.printed(SPINDLE_CONFIG=str(SOURCE / "configs/mini-cpu.pbtxt"), SPINDLE_STAGES="2",
                                 SPINDLE_HOSTFILE=hosts.name, SPINDLE_NETWORK="10.1.0.0/16",
                                 SPINDLE_API_KEY="sk-1")
            for name in ("btl_tcp_if_include", "oob_tcp_if_include"):
                self.assertEqual(words[words.index(name) + 1], "10.1.0.0/16")
            self.assertEqual(words[words.index("-x") + 1], "SPINDLE_API_KEY")
            self.assertNotIn("sk-1", words)
            self.assertNotIn("self,vader", words)


class SystemdTest(unittest.TestCase):
    def test_the_defaults_are_what_the_launcher_reads(self):
        read = set(re.findall(r"\$\{?(SPINDLED?(?:_[A-Z_]+)?)\b", LAUNCH.read_text()))
        offered = set(re.findall(r"^#?(SPINDLE_\w+)=", (DEPLOY / "systemd/spindle.default.in").read_text(), re.M))
        self.assertEqual(offered, read - {"SPINDLED"})

    def test_the_stop_leaves_time_to_drain(self):
        unit = (DEPLOY / "systemd/spindled.service.in").read_text()
        self.assertIn("KillSignal=SIGUSR2\n", unit)
        limit = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.M).group(1))
        self.assertGreater(limit * 1000, int(KEYS["api.drain_timeout_ms"].default) + 10000)

    def test_maintainer_scripts(self):
        scripts = [DEPLOY / "debian" / name for name in ("postinst", "prerm", "postrm")]
        if shutil.which("shellcheck") is None:
            self.skipTest("shellcheck is not installed")
        run("shellcheck", *scripts)

    def test_installed_below_another_prefix(self):
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            prefix = pathlib.Path(folder) / "prefix"
            run("cmake", "--install", BUILD, "--prefix", prefix, seconds=120)
            config = prefix / "etc/spindle/spindle.pbtxt"
            printed = run(prefix / "bin/spindled", "--config", config, "--print-config").stdout
            model = re.search(r'path: "([^"]+)"', printed).group(1)
            self.assertEqual(model, str(prefix / "share/spindle/models/spindle-mini"))
            self.assertTrue(pathlib.Path(model, "config.json").exists())
            unit = (prefix / "lib/systemd/system/spindled.service").read_text()
            for path in re.findall(rf"{prefix}[\w./-]*\w", unit):
                self.assertTrue(pathlib.Path(path).exists(), path)
            # An administrator's own configuration stays.
            config.write_text("# mine\n")
            run("cmake", "--install", BUILD, "--prefix", prefix, seconds=120)
            self.assertEqual(config.read_text(), "# mine\n")


class SlurmTest(unittest.TestCase):
    SCRIPT = DEPLOY / "slurm/spindle.sbatch"
    # The options of sbatch that make sense here, and their values.
    DIRECTIVES = {"job-name": r"[\w-]+", "nodes": r"\d+", "ntasks-per-node": r"\d+", "gpus-per-node": r"\d+",
                  "cpus-per-task": r"\d+", "mem": r"\d+[KMGT]?", "exclusive": None, "time": r"(\d+-)?\d+:\d\d:\d\d",
                  "signal": r"B:USR2@\d+", "output": r"[\w%.-]+", "open-mode": r"append|truncate"}

    def test_script(self):
        run("bash", "-n", self.SCRIPT)
        if shutil.which("shellcheck"):
            run("shellcheck", self.SCRIPT)
        lines = self.SCRIPT.read_text().splitlines()
        directives = {}
        for number, line in enumerate(lines):
            match = re.match(r"#SBATCH --([\w-]+)(?:=(\S+))?$", line)
            self.assertTrue(match or not line.startswith("#SBATCH"), line)
            if match:
                name, value = match.groups()
                self.assertIn(name, self.DIRECTIVES)
                self.assertNotIn(name, directives, "given twice")
                pattern = self.DIRECTIVES[name]
                self.assertTrue(value is None if pattern is None else re.fullmatch(pattern, value), line)
                # sbatch reads directives up to the first command.
                self.assertTrue(all(before.startswith("#") or not before for before in lines[:number]), line)
                directives[name] = value
        self.assertEqual(directives["ntasks-per-node"], directives["gpus-per-node"], "one stage per GPU")
        drain = int(KEYS["api.drain_timeout_ms"].default) / 1000
        self.assertGreater(int(directives["signal"].rpartition("@")[2]), 2 * drain)

    def test_the_job_serves_and_drains_on_usr1(self):
        http, tcp = free_ports(2)
        with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+", encoding="utf-8") as log:
            environment = {**os.environ, "SLURM_NTASKS": "1", "SPINDLED": str(SPINDLED),
                           "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                           "OMPI_MCA_btl": "self,vader", "OMPI_MCA_oob_tcp_if_include": "lo"}
            job = subprocess.Popen(["bash", str(self.SCRIPT), str(SOURCE / "configs/mini-cpu.pbtxt"), "--port",
                                    str(http), "--set", f"api.tcp.port={tcp}"], cwd=folder, env=environment,
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
            try:
                def ready():
                    self.assertIsNone(job.poll(), "the job has ended")
                    return run(SPINDLE, "stats", "--port", tcp, check=False).returncode == 0
                wait_until(ready, 60, "the job answers")
                job.send_signal(signal.SIGUSR2)
                self.assertEqual(job.wait(20), 0)
            except BaseException:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait(10)
                log.seek(0)
                print(log.read())
                raise
            log.seek(0)
            self.assertIn("stopping: SIGUSR2", log.read())

    def test_a_missing_configuration(self):
        done = run("bash", self.SCRIPT, "/no/such.pbtxt", environment={"SLURM_NTASKS": "1"}, check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn("cannot read the configuration /no/such.pbtxt", done.stderr)


class GuideTest(unittest.TestCase):
    """README.md: what it names exists."""

    @classmethod
    def setUpClass(cls):
        cls.text = (DEPLOY / "README.md").read_text()

    def test_mca_parameters(self):
        named = set(re.findall(r"\b((?:btl|oob|odls|plm|orte|pml)_\w+)", self.text))
        self.assertGreater(len(named), 6)
        self.assertEqual(named - mca_parameters(), set())

    def test_keys_flags_and_variables(self):
        groups = {path.rpartition(".")[0] for path in KEYS}
        for key in re.findall(r"`((?:api|kv|cluster|compute|model|scheduler|log)\.[a-z0-9_.]+)`", self.text):
            self.assertTrue(key in KEYS or key in groups or (SOURCE / "proto" / key).exists(), key)
        read = LAUNCH.read_text()
        for name in set(re.findall(r"\bSPINDLE_[A-Z_]+\b", self.text)):
            self.assertIn(name, read)
        for line in re.findall(r"^    (?:.*\s)?(spindle (?:chat|complete|stats|drain|bench)[^#|]*)", self.text, re.M):
            check_flags(self, SPINDLE, shlex.split(line)[1:])

    def test_files(self):
        for link in re.findall(r"\]\(([^)#]+)", self.text):
            self.assertTrue((DEPLOY / link).exists(), link)
        listed = set(re.findall(r"^\| `([\w./-]+)`", self.text, re.M))
        ours = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*")
                if path.is_file() and path.name not in ("README.md", "CMakeLists.txt")}
        for path in ours:
            self.assertTrue(any(path == name or path.startswith(name) for name in listed),
                            f"{path} is not in the table of README.md")


if __name__ == "__main__":
    outcome.main(sys.argv[3:])
