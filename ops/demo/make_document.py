#!/usr/bin/env python3
"""Writes a long document with one fact hidden in it, for demo.sh and for tests.

    make_document.py FOLDER [--words N] [--seed N] [--depth SHARE]

FOLDER gets document.txt, question.txt and answer.txt. The document is the beginning of prose.txt
with one sentence put between two of its sentences; the seed chooses the fact. The same arguments
give the same bytes.

prose.txt: from G. A. Henty, "Orange and Green: A Tale of the Boyne and Limerick" (1888), in the
public domain.
"""
import argparse
import pathlib
import random
import re

PROSE = pathlib.Path(__file__).resolve().with_name("prose.txt")
FACT = "Remember this well: the secret code of the {key} is {code}."
QUESTION = "What is the secret code of the {key}?"
ADJECTIVES = ["amber", "brave", "copper", "distant", "gentle", "golden", "hidden", "hollow", "quiet", "silver"]
NOUNS = ["bridge", "castle", "falcon", "fountain", "garden", "harbor", "lantern", "mill", "raven", "tower"]


def make_document(words, seed, depth):
    """Returns (document, question, answer)."""
    rng = random.Random(seed)
    key = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    code = str(rng.randint(1000000, 9999999))
    prose = PROSE.read_text(encoding="utf-8").strip()
    ends = [match.end() for match in re.finditer(r"\S+", prose)]
    if not 1 <= words <= len(ends):
        raise ValueError(f"prose.txt has {len(ends)} words, {words} were asked for")
    prose = prose[:ends[words - 1]]
    places = [match.start() for match in re.finditer(r"(?<=[a-z][.]) (?=[A-Z])", prose)]
    if not places:
        raise ValueError(f"no sentence ends within {words} words")
    place = places[min(int(len(places) * depth), len(places) - 1)]
    document = f"{prose[:place]} {FACT.format(key=key, code=code)}{prose[place:]}"
    return document, QUESTION.format(key=key), code


def main():
    parser = argparse.ArgumentParser(description="Writes a long document with a hidden fact.")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--words", type=int, default=4800, help="length (default 4800)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the fact (default 1)")
    parser.add_argument("--depth", type=float, default=0.35, help="where the fact stands, 0 to 1")
    arguments = parser.parse_args()
    try:
        document, question, answer = make_document(arguments.words, arguments.seed, arguments.depth)
    except ValueError as error:
        parser.error(str(error))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("document", document), ("question", question), ("answer", answer)):
        (arguments.folder / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
