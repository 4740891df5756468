"""Files that are numbered: their order, and whether some of them seem to be missing."""

import re
from collections.abc import Iterable
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise

SIGN = r"(?:(?<![^/_=])-)?"
POWER = r"(?<![^\W_])\d(?:\.\d+)?[eE][+-]\d{1,3}(?![^\W_])"
POINT = r"(?<!\d)(?<!\d\.)\d+\.\d+(?!\.?\d)"


def parts(names: Iterable[str]) -> list[list[str]]:
    """Each name as text, number, text, … by which names are compared.

    A point is part of a number between two groups of digits (0.25), unless there is a third (1.2.3) or the names count
    behind it (1.9, 1.10). A minus is one at the beginning, after _ and after = (-3, t_-0.5); in frame-2 and 2024-01-02
    it separates. An exponent has a sign, and one digit before the point, as programs write it (1e-05, 1.5e+2).
    """
    behind = [number.partition(".")[2] for name in names for number in re.findall(POINT, name)]
    counted = len(set(map(len, behind))) > 1 and any(len(digits) > 1 and digits[-1] == "0" for digits in behind)
    number = re.compile(f"({SIGN}(?:{POWER}|{'' if counted else POINT + '|'}\\d+))")
    return [number.split(name) for name in names]


@lru_cache(4)  # a folder has thousands of frames, and many questions
def in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names sorted by the numbers in them, frame_2 before frame_10, then by the names themselves."""
    keys = [[Decimal(part) if i % 2 else part for i, part in enumerate(found)] for found in parts(names)]
    return tuple(name for _, name in sorted(zip(keys, names, strict=True)))


def numbers(names: Iterable[str]) -> list[tuple[Decimal, ...]]:
    """The numbers in the name of each file, where these lie in one folder and are alike but for numbers; else none."""
    found = parts([name.rpartition("/")[2] for name in names])
    alike = len({(name.rpartition("/")[0], *part[::2]) for name, part in zip(names, found, strict=True)}) == 1
    return [tuple(map(Decimal, part[1::2])) for part in found] if alike else []


@lru_cache(4)
def uneven(names: tuple[str, ...]) -> str | None:
    """Between which of a folder's files, in their order, some seem to be missing; None where a number is even.

    Numbers at even steps (0, 5, 10) are complete. Uneven ones may be what somebody has kept, or times as HHMMSS.
    """
    columns = [[after - before for before, after in pairwise(column)] for column in zip(*numbers(names), strict=True)]
    counting = [steps for steps in columns if min(steps, default=0) > 0]
    wide = [[2 * step >= 3 * min(steps) for step in steps] for steps in counting]  # 0.333, 0.667, 1.0 are even
    if not all(map(any, wide)) or not wide:
        return None
    i = wide[0].index(True)
    return f"numbered at uneven steps, as if frames were missing between {names[i]} and {names[i + 1]}"
