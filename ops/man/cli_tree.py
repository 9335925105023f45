"""A program's command line as data: what `PROGRAM --cli-tree` prints (kernels/core/cli_tree.h)."""
import json
import re
import subprocess

RUN_SECONDS = 30


def load(program):
    """The tree of an executable."""
    done = subprocess.run([program, "--cli-tree"], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=RUN_SECONDS, check=True)
    return json.loads(done.stdout)


def commands(tree, path=()):
    """[((), tree), (("chat",), ...), ...]: the program and all its sub-commands, outermost first."""
    found = [(path, tree)]
    for command in tree["commands"]:
        found += commands(command, (*path, command["name"]))
    return found


def value_name(option):
    """What stands for the value in a synopsis, without the validators behind it; "" for a flag."""
    return option["type"].split(":")[0]


def choices(option):
    """The only values that the option takes, or []."""
    match = re.search(r":\{([^}]*)\}", option["type"])
    return match.group(1).split(",") if match else []


def value_range(option):
    """"1 - 256", or ""."""
    match = re.search(r" in \[([^\]]*)\]", option["type"])
    return match.group(1) if match else ""


def footer(tree, word):
    """The text behind "WORD: " in the footer, or ""."""
    for line in tree["footer"].splitlines():
        if line.startswith(word + ": "):
            return line[len(word) + 2:]
    return ""
