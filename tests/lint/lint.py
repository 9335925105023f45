#!/usr/bin/env python3
"""Checks what compilers do not: lint.py ROOT prints `FILE[:LINE]: RULE: what` and exits with 1.

README.md beside this file explains each rule; lint_test.py shows that each can fail.
"""
import os
import pathlib
import posixpath
import re
import sys

ROOMS = ("proto", "kernels", "kvstore", "cluster", "worker", "ops", "tests")
# Who may include whom: a file under the key may include what begins with one of the values. The
# longest matching key counts.
ARROWS = {
    "proto": ("proto/",),
    "kernels": ("kernels/",),
    "kernels/core": ("kernels/core/",),
    "kvstore": ("kvstore/", "kernels/"),
    # The planner names formats and counts histograms: both headers are plain host code.
    "kvstore/plan": ("kvstore/plan/", "kernels/core/", "kernels/kv_block.h", "kernels/kv_select.h"),
    "cluster": ("cluster/", "proto/", "kernels/core/", "kvstore/plan/"),
    "worker": ("worker/", "cluster/", "kvstore/", "kernels/", "proto/"),
    # cluster/text: `spindle eval` says at which token a document ends. `spindle plan` asks the pure
    # functions that the daemon plans and admits with: sizing, the configuration, a model's shape.
    "ops": ("ops/", "proto/", "kernels/core/", "cluster/api/tcp_client.h", "cluster/api/framing.h",
            "cluster/text/", "cluster/coordinator/sizing", "kvstore/plan/", "worker/config/",
            "worker/model/model_config.h", "worker/model/model_shape.h"),
    "tests": tuple(room + "/" for room in ROOMS),
}
MPI_FOLDERS = ("cluster/comm/", "tests/cluster/comm/")
# One file of each program.
ENVIRONMENT_FILES = ("worker/config/options.cc", "ops/cli/terminal.cc")
MAX_LINES = 600
# Files, or folders with a slash, without a C++ test, and the test that covers each.
TESTED_THROUGH = {
    "kernels/bench/cuda/": "tests/gpu/run.sh",
    "ops/cli/bench.cc": "tests/ops/cli/cli_test.py",
    "ops/cli/bench_run.cc": "tests/ops/cli/cli_test.py",
    "ops/cli/chat.cc": "tests/ops/cli/cli_test.py",
    "ops/cli/complete.cc": "tests/ops/cli/cli_test.py",
    "ops/cli/eval.cc": "tests/ops/cli/eval_test.py",
    "ops/cli/http_request.cc": "tests/ops/cli/trace_test.py",
    "ops/cli/trace.cc": "tests/ops/cli/trace_test.py",
    "worker/bench/": "tests/gpu/run.sh",
}
# Paths of somebody's machine. Written in pieces, so that this file does not contain them.
FORBIDDEN = ("/wo" + "rk/", "/tmp/" + "b-")

CPP = (".h", ".cc", ".cu", ".cuh")
CODE = CPP + (".py", ".sh", ".mjs", ".js", ".proto", ".cmake")
SKIPPED_FOLDERS = re.compile(r"^(\.git|build|build-.*|node_modules|__pycache__|\.deps|\.cache)$")
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]')
ROOM_PREFIXES = tuple(room + "/" for room in ROOMS)


class Tree:
    """The project's files, read once. Paths are relative to the root, with slashes."""

    def __init__(self, root):
        self.root = pathlib.Path(root)
        self.paths = []
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(f for f in folders if not SKIPPED_FOLDERS.match(f))
            for name in sorted(files):
                self.paths.append((pathlib.Path(folder) / name).relative_to(self.root).as_posix())
        self.known = set(self.paths)
        self.texts = {}

    def text(self, path):
        """The file's text, or "" for a binary file."""
        if path not in self.texts:
            raw = (self.root / path).read_bytes()
            self.texts[path] = "" if b"\0" in raw[:8192] else raw.decode("utf-8", "replace")
        return self.texts[path]

    def lines(self, path):
        return enumerate(self.text(path).splitlines(), start=1)

    def ending(self, *suffixes):
        return [path for path in self.paths if path.endswith(suffixes)]

    def includes(self, path):
        """(line number, '"' or '<', included path) of every #include."""
        for number, line in self.lines(path):
            match = INCLUDE.match(line)
            if match:
                yield number, match.group(1), match.group(2)


def in_rooms(path):
    return path.startswith(ROOM_PREFIXES)


def check_arrows(tree):
    for path in filter(in_rooms, tree.ending(*CPP)):
        room = max((r for r in ARROWS if path.startswith(r + "/")), key=len)
        for number, quote, included in tree.includes(path):
            if quote == "<":
                if included.startswith(ROOM_PREFIXES):
                    yield f"{path}:{number}", f'write "{included}" with quotes'
            elif not included.startswith(ROOM_PREFIXES):
                yield f"{path}:{number}", f'"{included}" is not a path from the project root'
            elif not included.startswith(ARROWS[room]):
                yield f"{path}:{number}", f"{room} may not include {included}"
    for path in tree.ending(".proto"):
        for number, line in tree.lines(path):
            match = re.match(r'\s*import\s+(?:public\s+)?"([^"]+)"', line)
            if match and not match.group(1).startswith(("proto/", "google/protobuf/")):
                yield f"{path}:{number}", f"proto may not import {match.group(1)}"


def check_mpi(tree):
    for path in tree.ending(*CPP):
        for number, _, included in tree.includes(path):
            if included == "mpi.h" and not path.startswith(MPI_FOLDERS):
                yield f"{path}:{number}", f"mpi.h belongs in {MPI_FOLDERS[0]}"


def check_environment(tree):
    for path in tree.ending(*CPP):
        if path.startswith("tests/") or path in ENVIRONMENT_FILES:
            continue
        for number, line in tree.lines(path):
            if re.search(r"\bgetenv\s*\(|\benviron\b(?=\s*[\[;,)=])", line.split("//")[0]):
                yield f"{path}:{number}", f"the environment is read in {' and '.join(ENVIRONMENT_FILES)} only"


def check_macros(tree):
    for path in tree.ending(*CPP):
        for number, line in tree.lines(path):
            match = re.match(r"\s*#\s*define\s+(\w+)\(", line)
            if match:
                yield f"{path}:{number}", f"{match.group(1)} is a function-like macro; write a function"


def bodies_by_header(tree):
    """{header: its .cc and .cu files}: x.cc, x_cpu.cc, x_cuda.cu, x_absent.cc, and parts that include
    x.h first."""
    bodies = {}
    for path in tree.ending(".cc", ".cu"):
        header = re.sub(r"(_cpu|_cuda|_absent)?\.\w+$", ".h", path)
        if header not in tree.known:
            header = next((inc for _, quote, inc in tree.includes(path) if quote == '"'), None)
        bodies.setdefault(header, []).append(path)
    return bodies


def reachable(tree, starts, bodies):
    """All files that `starts` include, with the bodies of headers and what these include."""
    seen, queue = set(), list(starts)
    while queue:
        path = queue.pop()
        if path in seen or path not in tree.known:
            continue
        seen.add(path)
        queue += [inc for _, quote, inc in tree.includes(path) if quote == '"']
        queue += bodies.get(path, [])
    return seen


def check_mirror_tests(tree):
    bodies = bodies_by_header(tree)
    tests = [path for path in tree.ending("_test.cc") if path.startswith("tests/")]
    reached = {}
    for path in tree.ending(".cc"):
        if not path.startswith(("kernels/", "kvstore/", "cluster/", "worker/", "ops/")):
            continue
        if path.endswith(("/main.cc", "_bench.cc")):
            continue
        folder = path.rpartition("/")[0]
        through = next((TESTED_THROUGH[f] for f in (path, folder + "/") if f in TESTED_THROUGH), None)
        if through is not None:
            if through not in tree.known:
                yield path, f"is said to be tested by {through}, which does not exist"
            continue
        if folder not in reached:
            # tests/a/b and, for a folder within a room, tests/a.
            mirrors = {f"tests/{folder}", f"tests/{folder.rpartition('/')[0] or folder}"}
            starts = [t for t in tests if t.rpartition("/")[0] in mirrors]
            reached[folder] = reachable(tree, starts, bodies)
        if path not in reached[folder]:
            yield path, f"is reached by no test in tests/{folder}"


def check_length(tree):
    for path in tree.ending(*CODE):
        count = tree.text(path).count("\n")
        if count > MAX_LINES:
            yield path, f"{count} lines, at most {MAX_LINES}"


def check_forbidden_words(tree):
    for path in tree.paths:
        for number, line in tree.lines(path):
            for word in FORBIDDEN:
                if word in line:
                    yield f"{path}:{number}", f"contains {word}"
    for path in tree.ending("package-lock.json"):
        for number, line in tree.lines(path):
            if re.search(r'"resolved":\s*"', line):
                yield f"{path}:{number}", "names a download address; write it without \"resolved\""


def check_executable(tree):
    for path in tree.paths:
        is_script = path.endswith(".sh") or tree.text(path).startswith("#!")
        if is_script and not os.access(tree.root / path, os.X_OK):
            yield path, "is a script and not executable"
        if path.endswith(".sh") and not tree.text(path).startswith("#!"):
            yield path, "has no #! line"


def declared_files(tree):
    """Paths from the root of every file that a CMakeLists.txt or .cmake names."""
    declared = set()
    for place in tree.ending("CMakeLists.txt", ".cmake"):
        folder = posixpath.dirname(place)
        for name in re.findall(r"[^\s()\"]+\.\w+", uncommented(tree, place)):
            name = name.replace("${CMAKE_CURRENT_SOURCE_DIR}/", "./")
            from_root = name.startswith("${PROJECT_SOURCE_DIR}/")
            name = name.replace("${PROJECT_SOURCE_DIR}/", "")
            declared.add(posixpath.normpath(posixpath.join("" if from_root else folder, name)))
    return declared


def check_registered(tree):
    declared = declared_files(tree)
    for path in tree.ending("_test.cc", "_test.py", "_test.mjs"):
        if path not in declared:
            yield path, "is named by no CMakeLists.txt: it never runs"


def uncommented(tree, path):
    return "\n".join(line.split("#")[0] for line in tree.text(path).splitlines())


def schema_fields(text):
    """{"api.http.port": "8000" or None} of every field that can be set in a configuration."""
    messages, name = {}, None
    depth = 0
    for line in text.splitlines():
        line = line.split("//")[0]
        opened = re.match(r"\s*(message|enum)\s+(\w+)\s*\{", line)
        if opened:
            depth += 1
            if opened.group(1) == "message":
                name = opened.group(2)
                messages[name] = []
                message_depth = depth
            continue
        field = re.match(r"\s*(?:optional|repeated)\s+([\w.]+)\s+(\w+)\s*=\s*\d+\s*"
                         r"(?:\[default = ([^\]]+)\])?", line)
        if field and name and depth == message_depth:
            messages[name].append(field.groups())
        if "}" in line:
            depth -= 1

    def walk(message, prefix):
        for kind, field_name, default in messages.get(message, ()):
            if kind in messages:
                yield from walk(kind, f"{prefix}{field_name}.")
            else:
                yield prefix + field_name, default.strip('"') if default else None

    return dict(walk("Config", ""))


def check_config_table(tree):
    schema, table = "proto/config.proto", "configs/README.md"
    if schema not in tree.known:
        return
    fields = schema_fields(tree.text(schema))
    if not fields:
        yield schema, "no field of Config was found"
    if table not in tree.known:
        yield table, "does not exist"
        return
    rows = {}
    for number, line in tree.lines(table):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"`[a-z0-9_]+(\.[a-z0-9_]+)+`", cells[0]):
            rows[cells[0].strip("`")] = (number, cells[1], cells[2])
    for path, default in fields.items():
        if path not in rows:
            yield schema, f"{path} has no row in {table}"
            continue
        number, unit, shown = rows[path]
        if not unit:
            yield f"{table}:{number}", f"{path} has no unit"
        first = shown.replace("`", "").split(" ")[0].rstrip(":,")
        if default is not None and first != default:
            yield f"{table}:{number}", f"{path}: the default is {default}, the table says {shown}"
        if default is None and not shown.startswith(("at start", "none", "last part")):
            yield f"{table}:{number}", f"{path} has no default in the schema, the table says {shown}"
    for path, (number, _, _) in rows.items():
        if path not in fields:
            yield f"{table}:{number}", f"{path} is not in {schema}"


RULES = {
    "arrows": check_arrows,
    "mpi": check_mpi,
    "environment": check_environment,
    "macros": check_macros,
    "mirror-tests": check_mirror_tests,
    "length": check_length,
    "forbidden-words": check_forbidden_words,
    "executable": check_executable,
    "registered": check_registered,
    "config-table": check_config_table,
}


def findings(root):
    tree = Tree(root)
    return [(rule, place, what) for rule, check in RULES.items() for place, what in check(tree)]


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: lint.py ROOT")
    found = findings(sys.argv[1])
    for rule, place, what in found:
        print(f"{place}: {rule}: {what}")
    print(f"{len(RULES)} rules, {len(found)} findings")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
