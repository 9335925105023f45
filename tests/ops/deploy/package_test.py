#!/usr/bin/env python3
"""The Debian package: built, checked by lintian, installed into a clean system, its service started,
asked the demo's question, upgraded, purged; nothing is left.

Once with systemd (systemd-nspawn boots the system), once without: then the unit's ExecStart is run as
the unit says. Exit code 77, with the reason, where a part of it cannot run.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

import clean_root
import outcome
from clean_root import Root
from cluster import wait_until

SOURCE = pathlib.Path(__file__).resolve().parents[3]
BUILD = pathlib.Path(os.environ.get("SPINDLE_BINARY_DIR", SOURCE / "build")).resolve()
CACHE = BUILD / "package-root"
UNIT = "usr/lib/systemd/system/spindled.service"
STAGES = 2
READY_SECONDS = 60
ANSWER_SECONDS = 120
DRAIN_SECONDS = 30

INSTALLED = (
    "/etc/default/spindle", "/etc/spindle/spindle.pbtxt", "/usr/bin/spindle", "/usr/bin/spindled",
    "/usr/libexec/spindle/launch", "/" + UNIT, "/usr/share/spindle/configs/mini-cpu.pbtxt",
    "/usr/share/spindle/configs/profiles/spindle-mini.pbtxt",
    "/usr/share/spindle/models/spindle-mini/model.safetensors.index.json", "/usr/share/spindle/proto/api.proto",
    "/usr/share/man/man1/spindle.1.gz", "/usr/share/man/man5/spindle.pbtxt.5.gz",
    "/usr/share/man/man8/spindled.8.gz", "/usr/share/bash-completion/completions/spindle",
    "/usr/share/bash-completion/completions/spindled", "/usr/share/zsh/vendor-completions/_spindle",
    "/usr/share/fish/vendor_completions.d/spindle.fish", "/usr/share/doc/spindle/copyright",
    "/usr/share/doc/spindle/changelog.gz", "/usr/share/doc/spindle/deploy.md")


def field(package, name):
    return subprocess.run(["dpkg-deb", "--field", str(package), name], capture_output=True, text=True,
                          timeout=60, check=True).stdout.strip()


def cuda_libraries(program):
    """Those of the toolkit that it is linked with, by the name that it asks for."""
    listing = subprocess.run(["ldd", str(program)], capture_output=True, text=True, timeout=60, check=True).stdout
    return [pathlib.Path(path) for path in re.findall(r"=> (\S*/cuda\S*)", listing)]


def unit_settings(text):
    """{key: [values]} of the [Service] section."""
    settings = {}
    for line in text.partition("[Service]")[2].partition("\n[")[0].splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            settings.setdefault(key, []).append(value)
    return settings


class PackageTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(prefix="package-test-", dir=BUILD)
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        started = time.monotonic()
        subprocess.run([str(SOURCE / "ops/deploy/build_package.sh"), str(BUILD), str(cls.folder / "out")],
                       timeout=240, check=True, stdout=subprocess.DEVNULL)
        cls.package = next((cls.folder / "out").glob("spindle_*.deb"))
        print(f"{cls.package.name}: {cls.package.stat().st_size / 1e6:.1f} MB, "
              f"{time.monotonic() - started:.1f} s")
        subprocess.run([str(SOURCE / "ops/demo/make_document.py"), str(cls.folder)], timeout=60, check=True)
        cls.question = (cls.folder / "question.txt").read_text()
        cls.answer = (cls.folder / "answer.txt").read_text()

    def root(self):
        """A clean system with what the package depends on, and systemd."""
        names = [re.split(r"[ |(]", entry.strip())[0] for entry in field(self.package, "Depends").split(",")]
        folder = tempfile.TemporaryDirectory(prefix="root-", dir=self.folder)
        self.addCleanup(folder.cleanup)
        root = Root.create(CACHE, [*names, "systemd-sysv", "dbus"], folder.name)
        self.addCleanup(root.stop)
        # Of a build with CUDA, what NVIDIA's packages bring, which this system may not have as packages.
        for library in cuda_libraries(BUILD / "bin/spindled"):
            place = root.path / "usr/local/lib" / library.name
            try:
                os.link(library.resolve(), place)
            except OSError:
                shutil.copy(library, place)
        subprocess.run(["ldconfig", "-r", str(root.path)], timeout=60, check=True)
        return root

    def install(self, root):
        shutil.copy(self.package, root.place("/tmp/spindle.deb"))
        # Everything it needs is there, and there is no network.
        done = root.run("apt-get", "-q", "install", "-y", "/tmp/spindle.deb")
        self.assertRegex(done.stdout, r"0 upgraded, 1 newly installed, 0 to remove")
        shutil.copy(self.folder / "document.txt", root.place("/tmp/document.txt"))
        defaults = root.place("/etc/default/spindle")
        defaults.write_text(defaults.read_text().replace("SPINDLE_STAGES=1", f"SPINDLE_STAGES={STAGES}"))

    def wait_ready(self, root, alive=lambda: True):
        def ready():
            self.assertTrue(alive(), "the service has ended")
            return root.run("spindle", "stats", check=False).returncode == 0
        wait_until(ready, READY_SECONDS, "the service answers")

    def check_stages(self, root):
        stats = root.run("spindle", "stats").stdout
        self.assertEqual(len(re.findall(r"^\d+ .* \d+-\d+ ", stats, re.M)), STAGES, stats)

    def ask(self, root):
        done = root.run("spindle", "chat", "--file", "/tmp/document.txt", "--message", self.question,
                        "--max-tokens", "16", "--temperature", "0", "--show-usage", seconds=ANSWER_SECONDS)
        self.assertEqual(done.stdout.strip(), self.answer.strip(), done.stderr)
        print(f"answer {done.stdout.strip()}; {done.stderr.splitlines()[0]}")
        self.check_stages(root)

    def purge(self, root, before):
        root.run("apt-get", "-q", "purge", "-y", "spindle")
        after = root.snapshot()
        left = sorted(path for path in after if after[path] != before.get(path))
        self.assertEqual(left, [], "new or changed after the purge")
        self.assertEqual(sorted(set(before) - set(after)), [], "gone after the purge")

    # ---- without a system

    def test_lintian_finds_no_error(self):
        if shutil.which("lintian") is None:
            self.skipTest("lintian is not installed")
        done = subprocess.run(["lintian", "--allow-root", "--fail-on", "error", str(self.package)],
                              capture_output=True, text=True, timeout=180, check=False)
        print(done.stdout.strip() or "lintian: nothing")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_dependencies(self):
        depends = field(self.package, "Depends")
        for name in ("adduser", "openmpi-bin", "libopenmpi", "libssl", "libc6", "libprotobuf"):
            self.assertIn(name, depends)
        has_cuda = "CUDA yes" in subprocess.run([BUILD / "bin/spindled", "--version"], capture_output=True,
                                                text=True, timeout=30, check=True).stdout
        everything = depends + field(self.package, "Recommends") + field(self.package, "Suggests")
        self.assertEqual(bool(re.search("cuda|nccl|cublas|nvidia", everything)), has_cuda, everything)

    def test_files(self):
        listing = subprocess.run(["dpkg-deb", "--contents", str(self.package)], capture_output=True, text=True,
                                 timeout=60, check=True).stdout
        files = {line.split()[5][1:]: line.split()[0] for line in listing.splitlines()}
        for path in INSTALLED:
            self.assertIn(path, files)
        tops = {path.split("/")[1] for path in files if path != "/"}
        self.assertEqual(tops, {"etc", "usr"})
        self.assertEqual(files["/etc/default/spindle"], "-rw-r-----", "it may hold the API key")
        # Nothing of this machine.
        for path in ("/etc/spindle/spindle.pbtxt", "/" + UNIT, "/etc/default/spindle"):
            text = subprocess.run(f"dpkg-deb --fsys-tarfile '{self.package}' | tar -xO .{path}", shell=True,
                                  capture_output=True, text=True, timeout=60, check=True).stdout
            self.assertNotIn(str(SOURCE), text)
            self.assertNotRegex(text, "@[A-Z]+@")

    # ---- in a clean system

    def test_with_systemd(self):
        root = self.root()
        try:
            root.boot()
        except clean_root.CannotBoot as error:
            self.skipTest(str(error))
        before = root.snapshot()
        self.install(root)
        for program in ("spindle", "spindled"):
            self.assertRegex(root.run(program, "--version").stdout, rf"^{program} \d+\.\d+\.\d+\n")
        self.assertEqual(root.run("systemd-analyze", "verify", "--man=no", "spindled.service").stderr, "")
        self.assertEqual(root.run("systemctl", "is-active", "spindled", check=False).stdout.strip(), "inactive")

        root.run("systemctl", "enable", "--now", "spindled")

        def active():
            return root.run("systemctl", "is-active", "spindled", check=False).returncode == 0
        try:
            self.wait_ready(root, active)
        except AssertionError:
            print(root.run("journalctl", "--unit=spindled", "--no-pager").stdout)
            raise
        self.ask(root)
        exposure = root.run("systemd-analyze", "security", "--no-pager", "spindled.service").stdout
        exposure = float(re.search(r"exposure level for spindled.service: ([\d.]+)", exposure).group(1))
        print(f"systemd-analyze security: {exposure}")
        self.assertLess(exposure, 4.0)

        with self.subTest("an upgrade restarts what runs"):
            process = root.run("systemctl", "show", "--property=MainPID", "spindled").stdout
            root.run("apt-get", "-q", "install", "-y", "--reinstall", "/tmp/spindle.deb")
            self.wait_ready(root, active)
            self.assertNotEqual(root.run("systemctl", "show", "--property=MainPID", "spindled").stdout, process)
            self.check_stages(root)  # what the administrator set is kept

        with self.subTest("a stop drains"):
            running = subprocess.Popen(
                [*root.enter_command(), "spindle", "complete", "It was a stormy evening", "--max-tokens", "300",
                 "--ignore-eos", "--show-usage"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            first = running.stdout.read(1)
            started = time.monotonic()
            root.run("systemctl", "stop", "spindled", seconds=DRAIN_SECONDS)
            print(f"systemctl stop: {time.monotonic() - started:.1f} s")
            text, usage = running.communicate(timeout=DRAIN_SECONDS)
            self.assertEqual(running.returncode, 0, usage)
            self.assertGreater(len(first + text), 300)
            self.assertIn("output 300 tokens", usage)
            state = root.run("systemctl", "show", "--property=Result,ExecMainStatus,ExecMainCode", "spindled").stdout
            self.assertEqual(sorted(state.split()), ["ExecMainCode=1", "ExecMainStatus=0", "Result=success"])
            log = root.run("journalctl", "--unit=spindled", "--no-pager").stdout
            self.assertIn("stopping: SIGUSR2", log)

        with self.subTest("a wrong configuration is not tried again"):
            config = root.place("/etc/spindle/spindle.pbtxt")
            good = config.read_text()
            config.write_text("no_such_key: 1\n")
            root.run("systemctl", "start", "spindled", check=False)
            wait_until(lambda: "failed" in root.run("systemctl", "is-active", "spindled", check=False).stdout,
                       20, "the service has failed")
            state = root.run("systemctl", "show", "--property=ExecMainStatus,NRestarts", "spindled").stdout
            self.assertEqual(sorted(state.split()), ["ExecMainStatus=2", "NRestarts=0"])
            config.write_text(good)
            root.run("systemctl", "reset-failed", "spindled")

        # A running service is stopped before its files go.
        root.run("systemctl", "start", "spindled")
        self.wait_ready(root, active)
        self.purge(root, before)
        self.assertEqual(root.processes("spindled"), [])

    def test_without_systemd(self):
        root = self.root()
        root.start()
        before = root.snapshot()
        self.install(root)
        settings = unit_settings(root.place(UNIT).read_text())
        process = self.start_as_the_unit(root, settings)
        try:
            self.wait_ready(root, lambda: process.poll() is None)
            self.ask(root)
            for pid in root.processes("mpirun"):
                root.run("sh", "-c", f"kill -s {settings['KillSignal'][0].removeprefix('SIG')} {pid}")
            self.assertEqual(process.wait(DRAIN_SECONDS), 0)
        except BaseException:
            process.kill()
            process.wait()
            print((self.folder / "service.log").read_text())
            raise
        self.assertIn("stopping: SIGUSR2", (self.folder / "service.log").read_text())
        self.purge(root, before)

    def start_as_the_unit(self, root, settings):
        """ExecStart with the unit's user, environment, folders and limits."""
        variables = dict(assignment.split("=", 1) for assignment in settings["Environment"])
        for line in root.place("/etc/default/spindle").read_text().splitlines():
            if re.match(r"[A-Z_]+=", line):
                name, _, value = line.partition("=")
                variables[name] = value.strip('"')
        user = settings["User"][0]
        state = f"/var/lib/{settings['StateDirectory'][0]}"
        root.run("install", "-d", "-o", user, "-g", user, "-m", "0755", state)
        # Like systemd, go without a limit that this system does not let root set.
        limits = []
        for name in ("memlock", "nofile", "core"):
            limit = f"--{name}={settings[f'Limit{name.upper()}'][0].replace('infinity', 'unlimited')}"
            if root.run("prlimit", limit, "true", check=False).returncode == 0:
                limits.append(limit)
            else:
                print(f"not allowed here: {limit}")
        command = [*root.enter_command(), "prlimit", *limits,
                   "setpriv", f"--reuid={user}", f"--regid={settings['Group'][0]}", "--clear-groups",
                   "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "sh", "-c",
                   f"umask {settings['UMask'][0]}; cd {settings['WorkingDirectory'][0]} && exec $1", "sh",
                   settings["ExecStart"][0]]
        with open(self.folder / "service.log", "wb") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                    env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **variables})


if __name__ == "__main__":
    reason = clean_root.missing()
    if reason:
        print(f"skipped: {reason}")
        sys.exit(outcome.SKIPPED)
    outcome.main(sys.argv[1:])
