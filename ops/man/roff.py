"""Text to man(7), the few macros that the pages need."""
import textwrap

LINE = 76  # of the source; roff fills paragraphs itself


def text(words):
    """Plain text that roff cannot take for requests or escapes."""
    escaped = words.replace("\\", "\\e")
    escaped = escaped.replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    escaped = escaped.replace("^", "\\(ha").replace("~", "\\(ti")
    escaped = "".join(c if ord(c) < 128 else f"\\[u{ord(c):04X}]" for c in escaped)
    return "\n".join("\\&" + line if line.startswith(".") else line for line in escaped.split("\n"))


def bold(words):
    return f"\\fB{text(words)}\\fR"


def italic(words):
    return f"\\fI{text(words)}\\fR"


def quoted(words):
    """An argument of a request."""
    return '"' + text(words).replace('"', "\\(dq") + '"'


def filled(words):
    """A paragraph's text in lines of the usual length."""
    return text(textwrap.fill(words, LINE, break_long_words=False, break_on_hyphens=False))


class Page:
    def __init__(self, name, section, date, source, manual):
        """date: YYYY-MM-DD."""
        self._lines = [f'.TH {name.upper()} {section} "{date}" {quoted(source)} {quoted(manual)}']

    def section(self, title):
        self._lines.append(f".SH {quoted(title.upper())}")

    def subsection(self, title):
        self._lines.append(f".SS {quoted(title)}")

    def raw(self, line):
        self._lines.append(line)

    def paragraph(self, words):
        # A paragraph right below a heading has no macro: mandoc calls it superfluous.
        if not self._lines[-1].startswith((".SH", ".SS")):
            self._lines.append(".PP")
        self._lines.append(filled(words))

    def tagged(self, tag, words):
        """A tag, which is roff already, and its text below it."""
        self._lines += [".TP", tag, filled(words) if words else "\\&"]

    def example(self, lines):
        if not self._lines[-1].startswith((".SH", ".SS")):
            self._lines.append(".PP")
        self._lines += [".nf", *("    " + text(line) for line in lines), ".fi"]

    def see_also(self, pages):
        self.section("see also")
        self._lines += [f".BR {text(name)} ({section}){',' if i < len(pages) - 1 else ''}"
                        for i, (name, section) in enumerate(pages)]

    def __str__(self):
        return "\n".join(self._lines) + "\n"
