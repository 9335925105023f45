#!/usr/bin/env python3
"""Shows that every rule of lint.py finds what it is for, and nothing in a tree without fault."""
import pathlib
import tempfile
import unittest

import lint

SCHEMA = """syntax = "proto2";
message Config {
  optional Api api = 1;
}
message Api {
  enum Kind {
    A = 0;
  }
  optional int32 port = 1 [default = 8000];  // a comment with [default = 9]
  optional string host = 2 [default = "127.0.0.1"];
  optional Kind kind = 3 [default = A];
  repeated string key = 4;
  optional int64 bytes = 5;
}
"""
TABLE = """| key | unit | default | meaning |
|---|---|---|---|
| `api.port` | port | 8000 | listener |
| `api.host` | address | `127.0.0.1` | listener |
| `api.kind` | `A` | `A` (the first) | kind |
| `api.key` | text | none: open | keys |
| `api.bytes` | bytes | at start: all | pool |
"""
CLEAN = {
    "proto/config.proto": SCHEMA,
    "configs/README.md": TABLE,
    "kernels/core/status.h": "#include <string>\n",
    "kernels/norm.h": '#include "kernels/core/status.h"\n',
    "kernels/norm_cpu.cc": '#include "kernels/norm.h"\n',
    "tests/kernels/norm_test.cc": '#include "kernels/norm.h"\n',
    "tests/kernels/CMakeLists.txt": "spindle_test(NAME norm_test SRCS norm_test.cc)\n",
}


class LintTest(unittest.TestCase):
    def found(self, changes, executable=()):
        """{rule: [place, ...]} for the clean tree with `changes` (None removes a file)."""
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for path, text in {**CLEAN, **changes}.items():
                if text is None:
                    continue
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(text)
                (root / path).chmod(0o755 if path in executable else 0o644)
            result = {}
            for rule, place, _ in lint.findings(root):
                result.setdefault(rule, []).append(place)
            return result

    def expect(self, rule, changes, *places, **options):
        self.assertEqual(self.found(changes, **options), {rule: list(places)})

    def test_a_tree_without_fault(self):
        self.assertEqual(self.found({}), {})

    def test_every_rule_is_tested_here(self):
        tested = {name.split("__")[1].replace("_", "-") for name in dir(self) if "__" in name[2:-2]}
        self.assertEqual(tested, set(lint.RULES))

    def test__arrows__upwards(self):
        for path, included in (("kernels/norm.h", "kvstore/plan/plan.h"),
                               ("kernels/core/status.h", "kernels/norm.h"),
                               ("kvstore/plan/plan.h", "kernels/norm.h"),
                               ("kvstore/pool.h", "proto/api.pb.h"),
                               ("cluster/api/a.h", "worker/model/m.h"),
                               ("cluster/api/a.h", "kernels/norm.h"),
                               ("cluster/api/a.h", "kvstore/pool.h"),
                               ("worker/w.h", "ops/cli/o.h"),
                               ("ops/cli/o.h", "worker/w.h"),
                               ("ops/cli/o.h", "cluster/api/tcp_server.h")):
            with self.subTest(path=path, included=included):
                self.expect("arrows", {path: f'\n#include "{included}"\n'}, f"{path}:2")

    def test__arrows__allowed(self):
        for path, included in (("kvstore/pool.h", "kernels/norm.h"),
                               ("cluster/api/a.h", "kvstore/plan/plan.h"),
                               ("cluster/api/a.h", "kernels/core/status.h"),
                               ("worker/w.h", "cluster/api/a.h"),
                               ("ops/cli/o.h", "cluster/api/tcp_client.h")):
            with self.subTest(path=path, included=included):
                self.assertEqual(self.found({path: f'#include "{included}"\n'}), {})

    def test__arrows__relative_angle_and_proto(self):
        self.expect("arrows", {"kernels/norm.h": '#include "norm.h"\n'}, "kernels/norm.h:1")
        self.expect("arrows", {"worker/w.h": "#include <kernels/norm.h>\n"}, "worker/w.h:1")
        self.expect("arrows", {"proto/a.proto": 'import "kernels/x.proto";\n'}, "proto/a.proto:1")

    def test__mpi(self):
        self.expect("mpi", {"worker/w.h": "#include <mpi.h>\n"}, "worker/w.h:1")
        self.assertEqual(self.found({"cluster/comm/g.h": "#include <mpi.h>\n"}), {})

    def test__environment(self):
        self.expect("environment", {"worker/w.h": 'const char* a = std::getenv("A");\n'}, "worker/w.h:1")
        self.assertEqual(self.found({"worker/w.h": '// getenv("A") is elsewhere\n'}), {})
        self.assertEqual(self.found({"worker/config/options.h": "", "tests/w.h": 'getenv("A");\n'}), {})

    def test__macros(self):
        self.expect("macros", {"kernels/norm.h": "#define SQUARE(x) ((x) * (x))\n"}, "kernels/norm.h:1")
        self.assertEqual(self.found({"kernels/norm.h": "#define SPINDLE_ON 1\n"}), {})

    def test__mirror_tests__missing(self):
        self.expect("mirror-tests", {"kvstore/pool.h": "", "kvstore/pool.cc": '#include "kvstore/pool.h"\n'},
                    "kvstore/pool.cc")
        # A test in another folder is not its test.
        self.expect("mirror-tests",
                    {"kvstore/pool.h": "", "kvstore/pool.cc": '#include "kvstore/pool.h"\n',
                     "tests/kernels/norm_test.cc": '#include "kernels/norm.h"\n#include "kvstore/pool.h"\n'},
                    "kvstore/pool.cc")

    def test__mirror_tests__part_and_helper(self):
        self.assertEqual(self.found({
            "kernels/norm_cpu.cc": '#include "kernels/norm.h"\n#include "kernels/isa/lanes.h"\n',
            "kernels/norm_rows.cc": '#include "kernels/norm.h"\n',
            "kernels/isa/lanes.h": "", "kernels/isa/lanes.cc": '#include "kernels/isa/lanes.h"\n'}), {})

    def test__mirror_tests__tested_through(self):
        path = "ops/cli/chat.cc"
        self.assertIn(path, lint.TESTED_THROUGH)
        tree = {"ops/cli/chat.h": "", path: '#include "ops/cli/chat.h"\n'}
        self.expect("mirror-tests", tree, path)
        test = lint.TESTED_THROUGH[path]
        declaration = {test.rpartition("/")[0] + "/CMakeLists.txt": test.rpartition("/")[2]}
        self.assertEqual(self.found({**tree, test: "", **declaration}), {})

    def test__length(self):
        self.assertEqual(self.found({"kernels/norm.h": "\n" * 600}), {})
        self.expect("length", {"kernels/norm.h": "\n" * 601}, "kernels/norm.h")

    def test__forbidden_words(self):
        for word in lint.FORBIDDEN:
            self.expect("forbidden-words", {"docs/a.md": f"see {word}main\n"}, "docs/a.md:1")

    def test__forbidden_words__download_address(self):
        path = "tests/npm/package-lock.json"
        self.assertIn("forbidden-words",
                      self.found({path: '"resolved": "https://example.org/openai-1.tgz",\n'}))
        self.assertEqual(self.found({path: '"integrity": "sha512-abc",\n'}), {})

    def test__executable(self):
        path = "ops/run.sh"
        self.expect("executable", {path: "#!/bin/sh\n"}, path)
        self.assertEqual(self.found({path: "#!/bin/sh\n"}, executable=(path,)), {})
        self.expect("executable", {path: "true\n"}, path, executable=(path,))
        self.expect("executable", {".ci/run": "#!/bin/sh\n"}, ".ci/run")

    def test__registered(self):
        self.expect("registered", {"tests/kernels/CMakeLists.txt": "# norm_test.cc\n"},
                    "tests/kernels/norm_test.cc")
        self.expect("registered", {"tests/kernels/CMakeLists.txt": "SRCS rms_norm_test.cc\n"},
                    "tests/kernels/norm_test.cc")
        self.expect("registered", {"tests/system/drain_test.py": ""}, "tests/system/drain_test.py")
        # The same name in another folder is another test.
        self.expect("registered", {"tests/worker/norm_test.cc": ""}, "tests/worker/norm_test.cc")

    def test__registered__from_elsewhere(self):
        self.assertEqual(self.found({
            "tests/system/drain_test.py": "", "tests/npm/client_test.mjs": "", "tests/ops/cli/cli_test.cc": "",
            "tests/system/CMakeLists.txt": "add_test(NAME x COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/drain_test.py)\n"
                                           "add_test(NAME y COMMAND ${PROJECT_SOURCE_DIR}/tests/npm/client_test.mjs)\n",
            "tests/ops/CMakeLists.txt": "spindle_test(NAME cli_test SRCS cli/cli_test.cc)\n"}), {})

    def test__config_table(self):
        table = "configs/README.md"
        self.expect("config-table", {table: None}, table)
        self.expect("config-table", {table: TABLE.replace("| `api.port` | port | 8000 | listener |\n", "")},
                    "proto/config.proto")
        self.expect("config-table", {table: TABLE.replace("8000", "8080")}, f"{table}:3")
        self.expect("config-table", {table: TABLE.replace("| port |", "| |")}, f"{table}:3")
        self.expect("config-table", {table: TABLE.replace("at start: all", "7")}, f"{table}:7")
        self.expect("config-table", {table: TABLE + "| `api.gone` | ms | 1 | old |\n"}, f"{table}:8")


if __name__ == "__main__":
    unittest.main()
