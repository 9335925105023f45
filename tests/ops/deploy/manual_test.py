#!/usr/bin/env python3
"""Manual pages and shell completions of a build: complete, and clean for the programs that read them.

usage: manual_test.py SOURCE BUILD [unittest options]
"""
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

SOURCE, BUILD = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
sys.path.insert(0, str(SOURCE / "ops/man"))
import cli_tree  # noqa: E402
import config_schema  # noqa: E402
import make_completions  # noqa: E402
import outcome  # noqa: E402
import roff  # noqa: E402

MAN, COMPLETIONS = BUILD / "man", BUILD / "completions"
PAGES = ("spindle.1", "spindled.8", "spindle.pbtxt.5")
PROGRAMS = ("spindle", "spindled")
SECONDS = 30


def run(*command, cwd=None):
    return subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=SECONDS, check=False, cwd=cwd,
                          env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "100"})


def needs(program):
    return unittest.skipIf(shutil.which(program) is None, f"{program} is not installed")


class RoffTest(unittest.TestCase):
    def test_text_cannot_be_a_request_or_an_escape(self):
        self.assertEqual(roff.text(".SH x"), "\\&.SH x")
        self.assertEqual(roff.text("'x"), "\\(aqx")
        self.assertEqual(roff.text("a\\fB"), "a\\efB")
        self.assertEqual(roff.text("--json"), "\\-\\-json")
        self.assertEqual(roff.text("é"), "\\[u00E9]")


class SchemaTest(unittest.TestCase):
    def test_comments_defaults_and_enums(self):
        keys, groups = config_schema.parse("""
            message Config {
              optional Part part = 1;
            }
            // A part.
            message Part {
              enum Kind {
                A = 0;  // the first
                B = 1;
              }
              // What it is. On
              // two lines.
              optional Kind kind = 1 [default = B];
              repeated int32 sizes = 2;  // behind it
            }""")
        self.assertEqual(groups, {"part": "A part."})
        self.assertEqual([key.path for key in keys], ["part.kind", "part.sizes"])
        self.assertEqual(keys[0].comment, "What it is. On two lines.")
        self.assertEqual(keys[0].enum, [("A", "the first"), ("B", "")])
        self.assertEqual(keys[0].default, "B")
        self.assertEqual((keys[1].repeated, keys[1].comment), (True, "behind it"))


class ManualTest(unittest.TestCase):
    def test_every_command_and_option_is_there(self):
        for program, page in zip(PROGRAMS, PAGES):
            text = (MAN / page).read_text()
            for path, command in cli_tree.commands(cli_tree.load(BUILD / "bin" / program)):
                if path:
                    self.assertIn(f'.SS {roff.quoted(" ".join((program, *path)))}', text)
                for option in command["options"]:
                    for name in option["names"]:
                        if name not in ("-h", "--help"):
                            self.assertIn(roff.bold(name), text, f"{program} {path}")

    def test_every_configuration_key_is_there(self):
        text = (MAN / "spindle.pbtxt.5").read_text()
        keys, _ = config_schema.load(SOURCE / "proto/config.proto")
        self.assertGreater(len(keys), 50)
        entries = dict(re.findall(r"^\.TP\n\\fB([\w.]+)\\fR: .*\n([^.][\s\S]*?)(?=^\.|\Z)", text, re.M))
        for key in keys:
            self.assertIn(f"{roff.bold(key.path)}: ", text)
            if not key.enum:  # whose values can say enough
                said = re.sub(r"Default: \S+$", "", entries[key.path].strip())
                self.assertTrue(said.strip(), f"proto/config.proto says nothing about {key.path}")
            if key.default is not None:
                self.assertIn(roff.text(f"Default: {key.default}."), text.replace("\n", " "))

    @needs("groff")
    def test_groff_has_no_warnings(self):
        for page in PAGES:
            done = run("groff", "-man", "-ww", "-z", "-Tutf8", MAN / page)
            self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""), page)

    @needs("mandoc")
    def test_mandoc_has_nothing_to_say(self):
        for page in PAGES:
            done = run("mandoc", "-Tlint", MAN / page)
            self.assertEqual((done.returncode, done.stdout), (0, ""), page)

    @needs("man")
    def test_man_shows_them(self):
        for page in PAGES:
            done = run("man", "--warnings=w", "--local-file", MAN / f"{page}.gz")
            self.assertEqual((done.returncode, done.stderr), (0, ""), page)
            self.assertRegex(done.stdout, r"NAME\s+spindle")


class CompletionTest(unittest.TestCase):
    """(words so far, what must be offered, what must not)."""

    CASES = (
        (["ch"], {"chat"}, {"complete"}),
        (["bench", "--dataset-name", ""], {"random", "custom", "document"}, {"--dataset-name"}),
        (["bench", "--dataset-na"], {"--dataset-name"}, {"chat"}),
        (["drain", "--w"], {"--wait"}, {"--layers"}),
        (["chat", "--file", "rep"], {"report.txt"}, {"chat"}),
    )

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        pathlib.Path(self.folder, "report.txt").touch()

    def check(self, complete):
        for words, wanted, unwanted in self.CASES:
            with self.subTest(" ".join(words)):
                offered = complete("spindle", words)
                self.assertTrue(wanted <= offered, offered)
                self.assertFalse(unwanted & offered, offered)

    def test_bash(self):
        def complete(program, words):
            quoted = " ".join(f"'{word}'" for word in [program, *words])
            done = run("bash", "-c", f"source '{COMPLETIONS / program}.bash'; COMP_WORDS=({quoted}); "
                       f"COMP_CWORD={len(words)}; _{program}; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
                       cwd=self.folder)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            return set(done.stdout.split())

        self.check(complete)
        # "--name=value" is three words for bash.
        self.assertEqual(complete("spindle", ["bench", "--dataset-name", "=", "r"]), {"random"})
        self.assertIn("api.http.port=", complete("spindled", ["--set", "api.http."]))
        for program in PROGRAMS:
            if shutil.which("shellcheck"):
                done = run("shellcheck", "--shell=bash", COMPLETIONS / f"{program}.bash")
                self.assertEqual(done.stdout, "")

    def test_commands_in_commands(self):
        def tree(name, *commands, options=()):
            return {"name": name, "description": name, "commands": list(commands),
                    "options": [{"names": [o], "positional": "", "help": "h", "type": "", "many": False}
                                for o in options]}

        tool = tree("tool", tree("trace", tree("show", options=["--all"]), tree("clear")), options=["--help"])
        script = pathlib.Path(self.folder, "tool.bash")
        script.write_text(make_completions.bash(tool, []))
        for words, wanted in ((["tr"], "trace"), (["trace", "s"], "show"), (["trace", "show", "--"], "--all")):
            done = run("bash", "-c", f"source '{script}'; COMP_WORDS=(tool {' '.join(words)}); "
                       f"COMP_CWORD={len(words)}; _tool; echo \"${{COMPREPLY[@]}}\"")
            self.assertEqual((done.stdout.strip(), done.stderr), (wanted, ""))
        self.assertIn("_tool_trace_show() {", make_completions.zsh(tool, []))
        self.assertIn("'__fish_seen_subcommand_from trace; and __fish_seen_subcommand_from show' -l all",
                      make_completions.fish(tool, []))

    @needs("fish")
    def test_fish(self):
        def complete(program, words):
            line = " ".join([program, *words])
            done = run("fish", "--no-config", "-c", f"source '{COMPLETIONS / program}.fish'; complete -C '{line}'",
                       cwd=self.folder)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            return {row.split("\t")[0] for row in done.stdout.splitlines()}

        self.check(complete)
        self.assertIn("api.http.port=", complete("spindled", ["--set", "api.http."]))

    @needs("zsh")
    def test_zsh(self):
        for program in PROGRAMS:
            self.assertEqual(run("zsh", "-n", COMPLETIONS / f"_{program}").stderr, "")
        # zsh completes in an interactive shell only: each line is typed with a tab, and read back.
        for typed, wanted in (("spindle ch", "spindle chat "), ("spindle bench --dataset-name ran", "random "),
                              ("spindle drain --wai", "--wait "), ("spindle chat --file rep", "report.txt "),
                              ("spindled --kv-cache-dt", "--kv-cache-dtype")):
            with self.subTest(typed):
                self.assertIn(wanted, self.zsh_line(typed))

    def zsh_line(self, typed):
        """The line of an interactive zsh after `typed` and a tab."""
        setup = (f"PS1=; unsetopt zle_bracketed_paste prompt_cr prompt_sp; fpath=({COMPLETIONS} $fpath); "
                 "autoload -Uz compinit; compinit -u -D; show() { print -r -- \"<<$BUFFER>>\"; }; zle -N show; "
                 "bindkey '^X' show; print READY\n")
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.folder)
            os.environ.update(TERM="dumb", LC_ALL="C.UTF-8")
            os.execvp("zsh", ["zsh", "-f", "-i"])
        seen = ""

        def read_until(pattern, sent):
            nonlocal seen
            seen = ""
            os.write(terminal, sent.encode())
            deadline = time.monotonic() + SECONDS
            while not re.search(pattern, seen):
                self.assertGreater(deadline, time.monotonic(), f"{pattern} not in {seen!r}")
                if select.select([terminal], [], [], 0.5)[0]:
                    seen += os.read(terminal, 65536).decode(errors="replace")

        try:
            read_until(r"(?m)^READY", setup)
            read_until(r"<<[^$].*>>", typed + "\t\x18")
            return re.search(r"<<([^$].*)>>", seen).group(1)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(terminal)


if __name__ == "__main__":
    outcome.main(sys.argv[3:])
