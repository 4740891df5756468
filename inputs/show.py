"""What the data check prints: an example token by token, what is supervised of it, and faults, each cause once."""

import re
import sys
import textwrap
from collections import defaultdict
from itertools import groupby

from inputs.task import Example, Problem
from report import scoring

WIDTH = 160  # characters of a line of tokens
COLOURS = {"supervised": 32, "masked": 90, "media": 34}  # a terminal's green, grey, blue
LONGEST = 200  # characters of any line; check.json holds the complete text


def tokens(tokenizer, prefix: list[int], input_ids: list[int], labels: list[int], media: list) -> list[tuple]:
    """An example as the model sees it: (text, "media", "masked" or "supervised", how many tokens).

    Media are the placeholders, whose IDs are in `media`; of the prefix, all that stands between them is one text.
    """
    found = []
    for placeholder, run in groupby(prefix, lambda token: token if token in media else None):
        part = list(run)
        name = tokenizer.decode(part) if placeholder is None else tokenizer.convert_ids_to_tokens(placeholder)
        found.append((name, "masked" if placeholder is None else "media", len(part)))
    pieces = zip(tokenizer.convert_ids_to_tokens(input_ids), labels, strict=True)
    return found + [(piece, "masked" if label < 0 else "supervised", 1) for piece, label in pieces]


def print_tokens(id: str, tokens: list[tuple]) -> None:
    """What `tokens` gives; supervised tokens stand between « and ». On a terminal it is coloured."""
    print(f"example {shorten(id, 80)}: supervised green, between « and »; masked grey; media blue")
    for kind, run in groupby(tokens, lambda token: token[1]):
        text = " ".join(f"[{n} x {text}]" if kind == "media" else repr(text)[1:-1] for text, _, n in run)
        for line in textwrap.wrap(f"«{text}»" if kind == "supervised" else text, WIDTH):
            print(f"\033[{COLOURS[kind]}m{line}\033[0m" if sys.stdout.isatty() else line)


def print_supervised(tokenizer, tree) -> None:
    """Where the labels of a tree's first example stand, what they say, and how much of it is masked."""
    input_ids, labels = tree.branches[0]
    places = [len(tree.prefix) + i for i, label in enumerate(labels) if label >= 0]
    text, length = tokenizer.decode([label for label in labels if label >= 0]), len(tree.prefix) + len(input_ids)
    where = f"{places[0]}–{places[-1]}, {shorten(repr(text), 60)}"
    name = shorten(tree.ids[0], 60)
    print(f"example {name}: {length} tokens, supervised {where}; masked {1 - len(places) / length:.1%}")


def print_unanswerable(examples: list[Example]) -> None:
    """A line where more than a twentieth of the answers to questions with candidates are none of these."""
    limited = [example for example in examples if example.candidates]
    wrong = [example for example in limited if not scoring.answerable(example)]
    if 20 * len(wrong) > len(limited):
        first, text = wrong[0], f"{len(wrong)} of {len(limited)} answers are none of their allowed ones"
        text += f"; give or correct answer_candidates: {first.answer!r} ({first.where}, {first.question_type})"
        print(shorten(f"{text} is none of {', '.join(first.candidates)}"))


def print_faults(problems: list[Problem], word: str = "fault") -> None:
    """A line a cause: its first example, how many there are, and where two more stand; check.json lists them all."""
    causes = defaultdict(list)
    for problem in problems:
        causes[cause(problem.text)].append(problem)
    for part in causes.values():
        first, others = part[0], [problem.where for problem in part[1:3]]
        more = f"{word} ({len(part)} such, also {' and '.join(others)}): " if others else f"{word}: "
        print(shorten(f"{more}{first}"))


def cause(text: str) -> str:
    """A fault's text without what differs from example to example: what is quoted, numbers, names of files."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\S*[\d/]\S*|\S+\.\w+", "…", text)


def shorten(text, longest: int = LONGEST) -> str:
    """The text in one line; where it is too long, without its end."""
    text = " ".join(str(text).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
