#!/usr/bin/env python3
"""Writes spindle.1, spindled.8 and spindle.pbtxt.5 from what the programs say of their own command
lines and from the comments of the configuration's schema.

Each page is written as it is and compressed (PAGE.gz).

usage: make_pages.py --spindle FILE --spindled FILE --schema config.proto --date YYYY-MM-DD --out FOLDER
"""
import argparse
import gzip
import pathlib
import re

import cli_tree
import config_schema
import roff

MANUAL = "Spindle Manual"
SEE_ALSO = [("mpirun", 1), ("spindle", 1), ("spindle.pbtxt", 5), ("spindled", 8)]
SHARED = "Options of several commands"


def option_tag(option):
    if option["positional"]:
        return roff.italic(option["positional"].upper())
    tag = ", ".join(roff.bold(name) for name in option["names"])
    value = cli_tree.value_name(option)
    if value:
        tag += " " + roff.italic(value)
        if option["many"]:
            tag += " ..."
    return tag


def option_text(option):
    """The help, and what else the parser checks."""
    parts = [option["help"]]
    if cli_tree.choices(option):
        parts.append("One of " + ", ".join(cli_tree.choices(option)) + ".")
    if cli_tree.value_range(option):
        parts.append(f"From {cli_tree.value_range(option).replace(' - ', ' to ')}.")
    if option["default"]:
        parts.append(f"Default: {option['default'].strip('[]')}.")
    if option["environment"]:
        parts.append(f"Environment: {option['environment']}.")
    if option["required"] and not option["positional"]:
        parts.append("Required.")
    if option["needs"]:
        parts.append(f"Only with {', '.join(option['needs'])}.")
    if option["excludes"]:
        parts.append(f"Not with {', '.join(option['excludes'])}.")
    text = parts[0]
    for part in parts[1:]:
        text += ("" if text.endswith((".", ":", "?")) else ".") + " " + part
    return text


def groups_of(command):
    """{group: its options}, without --help, in the program's order."""
    groups = {}
    for option in command["options"]:
        if "--help" not in option["names"]:
            groups.setdefault(option["group"], []).append(option)
    return groups


def shared_groups(tree):
    """[(group, options, names of the commands)] of groups that several commands have alike."""
    users = {}
    for path, command in cli_tree.commands(tree)[1:]:
        for group, options in groups_of(command).items():
            if group != "Options":
                key = (group, repr(options))
                users.setdefault(key, (options, []))[1].append(" ".join(path))
    return [(group, options, names) for (group, _), (options, names) in users.items() if len(names) > 1]


def write_options(page, options):
    for option in options:
        page.tagged(option_tag(option), option_text(option))


def synopsis(page, name, command):
    page.raw(".B " + roff.text(name))
    if command["commands"]:
        page.raw(".I COMMAND")
    if any(not option["positional"] for option in command["options"]):
        page.raw(r"[\fIOPTIONS\fR]")
    for option in command["options"]:
        if option["positional"]:
            tag = roff.italic(option["positional"].upper())
            page.raw(tag if option["required"] else f"[{tag}]")


def version_of(tree):
    return tree["version"].splitlines()[0]


def spindle_page(tree, date):
    page = roff.Page("spindle", 1, date, version_of(tree), MANUAL)
    page.section("name")
    page.raw(r"spindle \- client of a Spindle cluster")
    page.section("synopsis")
    synopsis(page, "spindle", tree)
    page.section("description")
    page.paragraph("Talks to a running cluster (spindled) over its TCP API: asks the model, shows what "
                   "the KV cache of every layer holds, puts a load on the cluster and measures it, "
                   "measures quality, and stops the cluster. Answers go to standard output and "
                   "nothing else does; errors and figures go to standard error.")
    page.section("options")
    write_options(page, [o for options in groups_of(tree).values() for o in options])
    shared = shared_groups(tree)
    page.section("commands")
    page.paragraph("Every command explains its options with --help.")
    for path, command in cli_tree.commands(tree)[1:]:
        page.subsection("spindle " + " ".join(path))
        synopsis(page, "spindle " + " ".join(path), command)
        page.paragraph(command["description"] + ".")
        elsewhere = []
        for group, options in groups_of(command).items():
            if any(group == g and options == o for g, o, _ in shared):
                elsewhere.append(group)
            else:
                write_options(page, options)
        if elsewhere:
            page.paragraph(f"Further options, described under {SHARED.upper()}: {', '.join(elsewhere)}.")
    if shared:
        page.section(SHARED)
        for group, options, names in shared:
            page.subsection(f"{group} ({', '.join(names)})")
            write_options(page, options)
    page.section("exit status")
    for code, meaning in re.findall(r"(\d+) ([^,.]+)", cli_tree.footer(tree, "Exit codes")):
        page.tagged(roff.bold(code), meaning)
    page.section("environment")
    page.paragraph(cli_tree.footer(tree, "Environment"))
    page.section("examples")
    page.example(["spindle chat --file report.txt --message 'Who signed it?'",
                  "spindle complete 'Once upon a time' --max-tokens 64",
                  "spindle stats --layers", "spindle drain --wait"])
    page.see_also([other for other in SEE_ALSO if other[0] != "spindle"])
    return page


def spindled_page(tree, date):
    page = roff.Page("spindled", 8, date, version_of(tree), MANUAL)
    page.section("name")
    page.raw(r"spindled \- serves a large language model over the ranks of an MPI job")
    page.section("synopsis")
    page.raw(r".B mpirun \-n \fISTAGES\fB spindled")
    page.raw(r"[\fB\-\-config\fR \fIFILE\fR] [\fIOPTIONS\fR]")
    page.section("description")
    page.paragraph(tree["description"] + " Rank 0 also schedules the requests and listens for clients: "
                   "an OpenAI-compatible HTTP API and a protobuf TCP API. A single process without "
                   "mpirun is a cluster of one stage.")
    page.paragraph("A flag beats the environment, that beats the configuration file, and that the "
                   "default. The key that each flag sets is in brackets.")
    page.section("options")
    write_options(page, [o for options in groups_of(tree).values() for o in options])
    page.section("signals")
    page.tagged(roff.bold("SIGTERM, SIGINT, SIGUSR1, SIGUSR2"),
                "Sent to rank 0: refuses new requests, finishes the running ones within "
                "api.drain_timeout_ms, ends with 0. A second one aborts. mpirun passes SIGUSR2 on and "
                "waits; SIGTERM to mpirun itself kills the ranks after odls_base_sigkill_timeout.")
    page.section("exit status")
    for code, meaning in (("0", "stopped in order"), ("1", "failed while serving, or lost a rank"),
                          ("2", "wrong command line or configuration file"), ("3", "cannot start"),
                          ("130", "second signal")):
        page.tagged(roff.bold(code), meaning)
    page.section("environment")
    page.tagged(roff.bold("SPINDLE_API_KEY"),
                "The key that clients must send, kept out of the process list. On several hosts: mpirun "
                "-x SPINDLE_API_KEY.")
    page.section("files")
    page.tagged(roff.italic("/etc/spindle/spindle.pbtxt"), "Configuration of the service spindled.")
    page.tagged(roff.italic("/etc/default/spindle"),
                "What the service passes to mpirun: number of stages, hosts, further options.")
    page.tagged(roff.italic("/usr/share/spindle/configs"), "Ready-to-run configurations.")
    page.section("examples")
    page.example(["mpirun -n 2 --bind-to none spindled --config /usr/share/spindle/configs/mini-cpu.pbtxt",
                  "systemctl enable --now spindled"])
    page.see_also([other for other in SEE_ALSO if other[0] != "spindled"])
    return page


def type_text(key):
    if key.enum:
        return " | ".join(name for name, _ in key.enum)
    names = {"int32": "integer", "int64": "integer", "uint64": "integer", "bool": "true | false",
             "string": "text", "double": "number"}
    return names.get(key.type, key.type)


def key_text(key, before):
    """`before`: the key before it, whose comment is about this one too when this one has none."""
    text = key.comment
    if not text and before is not None and not any(meaning for _, meaning in key.enum):
        text = f"See {before.path}."
    if text and not text.endswith("."):
        text += "."
    text = text[:1].upper() + text[1:]
    for name, meaning in key.enum:
        if meaning:
            text += f" {name}: {meaning}."
    if key.repeated:
        text += " May be repeated."
    if key.default is not None:
        text += f" Default: {key.default}."
    return text.strip()


def config_page(schema, source, date):
    keys, groups = config_schema.load(schema)
    page = roff.Page("spindle.pbtxt", 5, date, source, MANUAL)
    page.section("name")
    page.raw(r"spindle.pbtxt \- configuration of spindled")
    page.section("description")
    page.paragraph("Protobuf text format: \"key: value\" and \"group { ... }\"; # starts a comment. "
                   "Every rank reads the same file. A key that is not below, a wrong type or a value out "
                   "of range is an error that names file, line and column. Keys are written here with "
                   "their groups: api.http.port is \"api { http { port: 8000 } }\", and the same as "
                   "--set api.http.port=8000 on the command line.")
    page.paragraph("Sizes are in bytes and times in milliseconds, as the names say. spindled "
                   "--print-config shows what would be used.")
    for top in dict.fromkeys(key.path.split(".")[0] for key in keys):
        page.section(top)
        members = {}
        for key in keys:
            if key.path.startswith(top + "."):
                members.setdefault(key.path.rpartition(".")[0], []).append(key)
        # A group's own keys first: a subsection has no end but the next one.
        for group in sorted(members, key=lambda group: group != top):
            if group != top:
                page.subsection(group)
            if groups.get(group):
                page.paragraph(groups[group])
            before = None
            for key in members[group]:
                page.tagged(f"{roff.bold(key.path)}: {roff.italic(type_text(key))}", key_text(key, before))
                # A comment may be about several keys below it.
                before = key if key.comment else before
    page.section("example")
    page.example(['model { path: "/srv/models/llama-3.1-8b" }',
                  "compute { device: CUDA }",
                  'kv { policy { profile: "spindle" ratio: 0.25 } }',
                  'api { http { host: "0.0.0.0" port: 8000 } }'])
    page.see_also([other for other in SEE_ALSO if other[0] != "spindle.pbtxt"])
    return page


def main():
    parser = argparse.ArgumentParser()
    for name in ("spindle", "spindled", "schema", "date", "out"):
        parser.add_argument("--" + name, required=True)
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    spindle, spindled = cli_tree.load(arguments.spindle), cli_tree.load(arguments.spindled)
    pages = {"spindle.1": spindle_page(spindle, arguments.date),
             "spindled.8": spindled_page(spindled, arguments.date),
             "spindle.pbtxt.5": config_page(arguments.schema, version_of(spindled), arguments.date)}
    for name, page in pages.items():
        text = str(page).encode("ascii")
        (out / name).write_bytes(text)
        # Without a time and a name in it, so that the same page gives the same bytes.
        (out / f"{name}.gz").write_bytes(gzip.compress(text, mtime=0))


if __name__ == "__main__":
    main()
