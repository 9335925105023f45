#!/usr/bin/python3
"""Renders templates with Jinja2, set up as transformers does, and compares with Spindle.

usage: jinja2_oracle.py DRIVER [SEED [COUNT]]
DRIVER is the text_oracle_driver binary. Every template in templates/ is rendered for every
conversation, every line of expressions.json as an expression, and every snippet of snippets.json;
then COUNT random templates follow. Spindle must give the same text, or fail where Jinja2 fails.
"""

import datetime
import json
import pathlib
import random
import subprocess
import sys
import warnings

try:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
except ImportError as error:  # ctest counts 77 as a skip
    print(f"skipped: {error} (Debian: python3-jinja2)")
    sys.exit(77)

import random_templates

HERE = pathlib.Path(__file__).resolve().parent
NOW = 1_700_000_000

# Deliberate differences, each explained in cluster/text/jinja/README.md.
KNOWN_DIFFERENCES = set(json.loads((HERE / "known_differences.json").read_text()))


class Generation(jinja2.ext.Extension):
    """transformers' {% generation %}: renders its body in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(
            self.call_method("_render"), [], [], body
        ).set_lineno(line)

    def _render(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def strftime_now(format):
    return datetime.datetime.fromtimestamp(NOW).strftime(format)


def make_environment():
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def requests(seed, count):
    conversations = json.loads((HERE / "conversations.json").read_text())
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    for path in sorted((HERE / "templates").glob("*.jinja")):
        for index, conversation in enumerate(conversations):
            yield f"{path.name} #{index}", path.read_text(), {**tokens, **conversation}
    for expression in json.loads((HERE / "expressions.json").read_text()):
        yield expression, "{{ " + expression + " }}", conversations[1]
    for snippet in json.loads((HERE / "snippets.json").read_text()):
        yield snippet, snippet, conversations[1]
    generator = random_templates.Generator(seed)
    for index in range(count):
        template = generator.template()
        yield f"random #{index}: {template!r}", template, conversations[index % 6]


def main():
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # of the random templates
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(2**32)
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 500
    print(f"seed {seed}")
    environment = make_environment()
    driver = subprocess.Popen(
        [sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    n_same = n_known = 0
    failures = []
    for name, source, context in requests(seed, count):
        try:
            expected = environment.from_string(source).render(**context)
            expected.encode("utf-8")
        except Exception as error:  # any failure counts as one
            expected, reason = None, f"{type(error).__name__}: {error}"
        request = {"op": "render", "template": source, "context": context, "now": NOW}
        driver.stdin.write(json.dumps(request) + "\n")
        driver.stdin.flush()
        reply = json.loads(driver.stdout.readline())
        actual = reply.get("text")
        if "<generator object" in (expected or "") or " at 0x" in (expected or ""):
            continue  # an address, different in every run
        if actual == expected:
            n_same += 1
        elif name in KNOWN_DIFFERENCES or (
            # Jinja2 gives undefined where it folds constants, and the error everywhere else.
            name.startswith("random") and "cannot be sliced" in reply.get("error", "")
        ):
            n_known += 1
        else:
            jinja = repr(expected) if expected is not None else reason
            ours = repr(actual) if actual is not None else reply["error"]
            failures.append(f"{name}\n  jinja2:  {jinja}\n  spindle: {ours}")
    driver.stdin.close()
    driver.wait(timeout=10)
    print(*failures, sep="\n")
    print(f"{n_same} the same, {n_known} known differences, {len(failures)} failures")
    return 1 if failures or n_same == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
