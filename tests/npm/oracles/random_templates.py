"""Random templates over the supported language, for comparing two engines."""

import random

ATOMS = [
    "1", "0", "-3", "2.5", "true", "false", "none", "'a'", "'Bc d'", "''", "'é🙂x'", "'12'",
    "[1, 2, 3]", "[]", "['b', 'A']", "(1, 'x')", "{'k': 1, 'z': 'y'}", "{}", "missing", "v", "w",
    "messages", "messages[1]", "messages[0].content",
]
BINARY = ["+", "-", "*", "/", "//", "~", "==", "!=", "<", ">=", "in", "not in", "and", "or"]
FILTERS = [
    "upper", "lower", "title", "capitalize", "trim", "length", "list", "first", "last", "string",
    "int", "float", "tojson", "tojson(indent=2)", "join(',')", "reverse | list", "sort", "unique | list",
    "default('d')", "default('d', true)", "abs", "round(1)", "sum", "replace('a', 'ZZ')", "indent(2)",
    "map('string') | list", "select | list", "reject('none') | list", "map(attribute='role') | list",
    "selectattr('role') | list", "items | list", "dictsort", "min", "max",
]
TESTS = [
    "defined", "undefined", "none", "string", "number", "integer", "mapping", "iterable",
    "sequence", "boolean", "odd", "true", "in [1, 'a']", "equalto 1", "not string", "lower",
]
METHODS = [
    ".strip()", ".split()", ".split('c')", ".upper()", ".items() | list", ".keys() | list",
    ".get('k')", ".get('q', 3)", ".startswith('a')", ".replace('c', '')", ".k", ".role",
    "[0]", "[-1]", "['k']", "[1:]", "[:-1]", "[::-1]", "[::2]", "[0:2]",
]


class Generator:
    def __init__(self, seed):
        self.random = random.Random(seed)

    def expression(self, depth=3):
        pick = self.random.random()
        if depth == 0 or pick < 0.2:
            return self.random.choice(ATOMS)
        inner = self.expression(depth - 1)
        if pick < 0.45:
            op = self.random.choice(BINARY)
            return f"({inner} {op} {self.expression(depth - 1)})"
        if pick < 0.62:
            return f"({inner}) | {self.random.choice(FILTERS)}"
        if pick < 0.75:
            return f"({inner}){self.random.choice(METHODS)}"
        if pick < 0.85:
            return f"(({inner}) is {self.random.choice(TESTS)})"
        if pick < 0.92:
            return f"({inner} if {self.expression(depth - 1)} else {self.expression(depth - 1)})"
        return f"[{inner}, {self.expression(depth - 1)}]"

    def space(self):
        return self.random.choice(["", " ", "\n", "\n\n", "  \n  ", "\t", " text ", "\n  text"])

    def tag(self, inside):
        left = self.random.choice(["", "", "-", "+"])
        right = self.random.choice(["", "", "-"])
        return "{%" + left + " " + inside + " " + right + "%}"

    def body(self, depth):
        return "".join(self.space() + self.statement(depth) for _ in range(self.random.randint(1, 3)))

    def statement(self, depth):
        pick = self.random.random()
        if depth == 0 or pick < 0.35:
            left, right = self.random.choice([("", ""), ("-", ""), ("", "-"), ("-", "-")])
            return "{{" + left + " " + self.expression(2) + " " + right + "}}"
        if pick < 0.5:
            return self.tag(f"set {self.random.choice('vw')} = {self.expression(2)}")
        if pick < 0.7:
            middle = self.tag("else") + self.body(depth - 1) if self.random.random() < 0.5 else ""
            return (
                self.tag(f"if {self.expression(2)}") + self.body(depth - 1) + middle
                + self.space() + self.tag("endif")
            )
        if pick < 0.9:
            extra = self.random.choice(["", "", "{% break %}", "{{ loop.index }}{{ loop.last }}"])
            test = self.random.choice(["", "", f" if {self.expression(1)}"])
            return (
                self.tag(f"for v in {self.expression(2)}{test}") + self.body(depth - 1) + extra
                + self.space() + self.tag("endfor")
            )
        if pick < 0.95:
            return self.tag("set w") + self.body(depth - 1) + self.tag("endset") + "{{ w }}"
        return (
            self.tag("macro m(v, w=1)") + self.body(depth - 1) + self.tag("endmacro")
            + "{{ m(" + self.expression(1) + ") }}"
        )

    def template(self):
        return self.body(3) + self.space()
