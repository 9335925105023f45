"""A root file system of this distribution, made by debootstrap, to install a package into.

    with Root.create(cache, packages, folder) as root:      # extracted from a cached tarball
        root.run("apt-get", "install", "-y", "/tmp/x.deb")

The processes of a root live in namespaces of their own (processes, mounts, network with nothing but
loopback) and end with the `with` block. Two kinds: `start()` holds the namespaces with a sleeping
process; `boot()` starts systemd in them by systemd-nspawn. Needs root. Every wait has a deadline.
"""
import hashlib
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "system"))
from cluster import wait_until  # noqa: E402

BOOTSTRAP_SECONDS = 300
COMMAND_SECONDS = 120
BOOT_SECONDS = 90
# Not part of what a package leaves behind: what runs, logs, and the package manager's own books.
VOLATILE = ("proc", "sys", "dev", "run", "tmp", "var/tmp", "var/log", "var/cache", "var/lib/apt",
            "var/lib/dpkg", "var/lib/systemd", "etc/machine-id")
# adduser keeps the last version of each.
BACKUPS = ("etc/passwd-", "etc/group-", "etc/shadow-", "etc/gshadow-", "etc/subuid-", "etc/subgid-")


def missing():
    """Why no root can be made here, or ""."""
    if os.geteuid() != 0:
        return "needs root"
    for program in ("debootstrap", "apt-get", "dpkg-deb", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    probe = subprocess.run(["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "true"],
                           capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode != 0 else ""


class CannotBoot(Exception):
    """systemd does not run as process 1 here; says why."""


def apt_sources():
    """(suite, [lines of a sources.list]) of the distribution's own archives that apt uses here."""
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"],
        capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True).stdout.splitlines()
    found = [line.split() for line in targets if len(line.split()) == 3]
    own = [line for line in found if line[1].split("-")[0] == suite]
    return suite, [f"deb {uri} {codename} {component}" for uri, codename, component in own]


def proxy_options():
    """apt's proxy settings as configuration lines, so that the root reaches what this system reaches."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, timeout=COMMAND_SECONDS,
                          check=True).stdout
    return [line for line in dump.splitlines() if "::Proxy " in line]


def build_tarball(cache, packages):
    """The tarball of a minimal system with `packages` and what they depend on; made once."""
    suite, sources = apt_sources()
    if not sources:
        raise AssertionError(f"apt has no archive of {suite} configured")
    key = hashlib.sha256("\n".join([*sorted(packages), *sources]).encode()).hexdigest()[:16]
    tarball = cache / f"{suite}-{key}.tar"
    if tarball.exists():
        return tarball
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        path = pathlib.Path(folder) / "root"
        mirror = next(line.split()[1] for line in sources if line.split()[2] == suite)
        components = ",".join(dict.fromkeys(line.split()[3] for line in sources if line.split()[2] == suite))
        command = ["debootstrap", "--variant=minbase", f"--components={components}", suite, str(path), mirror]
        subprocess.run(command, stdout=subprocess.DEVNULL, timeout=BOOTSTRAP_SECONDS, check=True)
        (path / "etc/apt/sources.list").write_text("\n".join(sources) + "\n")
        (path / "etc/apt/apt.conf.d/99test").write_text(
            "\n".join(['APT::Install-Recommends "false";', 'DPkg::Use-Pty "0";', *proxy_options()]) + "\n")
        # No service starts while packages are installed.
        (path / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
        (path / "usr/sbin/policy-rc.d").chmod(0o755)
        with Root(path) as root:
            root.start(network=True)
            root.run("apt-get", "-q", "update")
            root.run("apt-get", "-q", "install", "-y", *packages, seconds=BOOTSTRAP_SECONDS)
            root.run("apt-get", "clean")
        (path / "usr/sbin/policy-rc.d").unlink()
        partial = cache / "partial.tar"
        subprocess.run(["tar", "-C", str(path), "-cf", str(partial), "."], timeout=BOOTSTRAP_SECONDS, check=True)
        partial.rename(tarball)
    return tarball


class Root:
    def __init__(self, path):
        self.path = pathlib.Path(path)
        self._holder = None
        self._init = 0  # process 1 of the root, as this system counts

    @staticmethod
    def create(cache, packages, folder):
        """A fresh root in `folder`/root."""
        path = pathlib.Path(folder) / "root"
        path.mkdir()
        tarball = build_tarball(cache, packages)
        subprocess.run(["tar", "-C", str(path), "-xf", str(tarball)], timeout=BOOTSTRAP_SECONDS, check=True)
        return Root(path)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()

    def start(self, network=False):
        """Namespaces without systemd. network: that of this system, to reach the package archives."""
        if network:
            shutil.copy("/etc/resolv.conf", self.path / "etc/resolv.conf")
            shutil.copy("/etc/hosts", self.path / "etc/hosts")
        script = ('mount -t proc proc "$1/proc" && mount -t sysfs sysfs "$1/sys" && '
                  'mount -t tmpfs tmpfs "$1/tmp" && chmod 1777 "$1/tmp" && '
                  'mkdir -p "$1/dev/shm" && mount -t tmpfs tmpfs "$1/dev/shm" && chmod 1777 "$1/dev/shm" && '
                  'mkdir -p "$1/dev/pts" && mount -t devpts devpts "$1/dev/pts" && '
                  '{ [ "$2" = host ] || ip link set lo up; } && '
                  'exec chroot "$1" /bin/sleep 600')
        own = ["--mount", "--pid", "--ipc", "--uts"] + ([] if network else ["--net"])
        self._hold(["unshare", *own, "--fork", "--kill-child", "sh", "-c", script, "sh", str(self.path),
                    "host" if network else "own"])
        wait_until(lambda: os.readlink(f"/proc/{self._init}/root") == str(self.path.resolve()),
                   10, "the root is mounted")

    def boot(self):
        """systemd as process 1, by systemd-nspawn; returns when it has started its units. CannotBoot."""
        if shutil.which("systemd-nspawn") is None:
            raise CannotBoot("systemd-nspawn is not installed")
        try:
            self._boot()
        except AssertionError as error:
            raise CannotBoot(f"systemd does not boot: {error}") from error

    def _boot(self):
        # timeout: for a test that was killed.
        self._hold(["timeout", "--kill-after=10", "900", "systemd-nspawn", "--quiet", "--register=no",
                    "--keep-unit", "--private-network", "--link-journal=no", "--resolv-conf=off",
                    "--timezone=off", f"--machine=spindle-{os.getpid()}", f"--directory={self.path}", "--boot"])
        wait_until(lambda: self.run("systemctl", "is-system-running", check=False).stdout.strip() in
                   ("running", "degraded"), BOOT_SECONDS, "systemd has started")

    def _hold(self, command):
        # Not a pipe that nobody reads.
        self._log = tempfile.TemporaryFile()
        self._holder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log,
                                        stderr=subprocess.STDOUT, start_new_session=True)

        def first_process():
            if self._holder.poll() is not None:
                self._log.seek(0)
                raise AssertionError(f"{command[0]} ended with {self._holder.returncode}: "
                                     f"{self._log.read()[-2000:].decode(errors='replace')}")
            return next((pid for pid in descendants(self._holder.pid) if inner_pid(pid) == 1), 0)

        self._init = wait_until(first_process, 20, "the root's first process")

    def run(self, *command, seconds=COMMAND_SECONDS, check=True, environment=None):
        """A command in the root, as its root user."""
        variables = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
                     "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **(environment or {})}
        done = subprocess.run(self.enter_command() + list(command), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=seconds, env=variables, check=False)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-3000:]}\n"
                                 f"{done.stderr[-3000:]}")
        return done

    def processes(self, name):
        """The pids, as the root counts, of its processes of this name."""
        listed = self.run("sh", "-c", "for f in /proc/[0-9]*/comm; do echo $f $(cat $f 2>/dev/null); done").stdout
        return [int(row.split("/")[2]) for row in listed.splitlines() if row.split()[1:] == [name]]

    def enter_command(self):
        return ["nsenter", f"--target={self._init}", "--mount", "--pid", "--ipc", "--uts", "--net", "--root",
                "--wd", "--"]

    def place(self, path):
        """The path of a file of the running root, from here."""
        return pathlib.Path(f"/proc/{self._init}/root") / str(path).lstrip("/")

    def snapshot(self):
        """{path: what it is} of everything that should be the same when a package has come and gone."""
        found = {}
        top = self.place("/")
        for folder, folders, files in os.walk(top):
            relative = os.path.relpath(folder, top)
            prefix = "" if relative == "." else relative + "/"
            folders[:] = [name for name in folders if prefix + name not in VOLATILE]
            for name in folders + files:
                path = prefix + name
                if path in VOLATILE or path in BACKUPS:
                    continue
                full = os.path.join(folder, name)
                status = os.lstat(full)
                kind = f"{status.st_mode:o} {status.st_uid}:{status.st_gid}"
                if path.startswith("etc/") and os.path.isfile(full) and not os.path.islink(full):
                    with open(full, "rb") as file:
                        kind += " " + hashlib.sha256(file.read()).hexdigest()
                found[path] = kind
        return found

    def stop(self):
        if self._holder is None:
            return
        for pid in (self._init, self._holder.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        self._holder.wait(20)
        self._log.close()
        self._holder = None


def descendants(pid):
    found, queue = [], [pid]
    while queue:
        pid = queue.pop()
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                    children = [int(child) for child in file.read().split()]
                found += children
                queue += children
        except OSError:
            continue
    return found


def inner_pid(pid):
    """The process's number in its own namespace, 0 when it is gone or has no namespace of its own."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            numbers = next(line for line in file if line.startswith("NSpid:")).split()[1:]
    except (OSError, StopIteration):
        return 0
    return int(numbers[-1]) if len(numbers) > len(own_numbers()) else 0


def own_numbers():
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(line for line in file if line.startswith("NSpid:")).split()[1:]
