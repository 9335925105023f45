"""The keys of a configuration with their comments, from proto/config.proto."""
import collections
import re

# enum: names of the values; comment: one paragraph.
Key = collections.namedtuple("Key", "path type repeated default enum comment")

FIELD = re.compile(r"(optional|repeated)\s+([\w.]+)\s+(\w+)\s*=\s*\d+\s*"
                   r"(?:\[default = ([^\]]+)\])?\s*;\s*(?://\s*(.*))?$")


def parse(text):
    """([Key of every field that can be set], {"kv.balance": comment of the group})."""
    messages, comments, enums = {}, {}, {}
    stack, pending = [], []
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("//"):
            pending.append(line[2:].strip())
            continue
        opened = re.match(r"(message|enum)\s+(\w+)\s*\{", line)
        field = FIELD.match(line)
        value = re.match(r"(\w+)\s*=\s*-?\d+\s*;\s*(?://\s*(.*))?$", line)
        if opened:
            kind, name = opened.groups()
            outer = stack[-1][1] + "." if stack else ""
            stack.append((kind, outer + name))
            (messages if kind == "message" else enums)[outer + name] = []
            comments[outer + name] = " ".join(pending)
        elif line.startswith("}"):
            stack.pop()
        elif field and stack:
            word, kind, name, default, trailing = field.groups()
            comment = " ".join(pending + ([trailing] if trailing else []))
            messages[stack[-1][1]].append((word == "repeated", kind, name, default, comment))
        elif value and stack and stack[-1][0] == "enum":
            enums[stack[-1][1]].append((value.group(1), value.group(2) or ""))
        pending = []

    keys, groups = [], {}

    def walk(message, prefix):
        for repeated, kind, name, default, comment in messages[message]:
            if kind in messages:
                groups[prefix + name] = comment or comments[kind]
                walk(kind, prefix + name + ".")
            else:
                values = enums.get(f"{message}.{kind}", enums.get(kind, []))
                keys.append(Key(prefix + name, kind, repeated, default and default.strip('"'), values,
                                comment))

    walk("Config", "")
    return keys, groups


def load(path):
    with open(path, encoding="utf-8") as file:
        return parse(file.read())
