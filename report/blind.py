"""Blind runs: the same questions with nothing to see, or with the media of another group."""

import copy
import random
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial

import common


def prepare(asked: list, trees: list, task, run) -> tuple:
    """What is needed to answer without seeing, into RUN/blind/blank or RUN/blind/shuffled: (asked, trees, task, run).

    blank: the same questions, and nothing to see in their media (`task.blank`). shuffled: see `exchange`. Ends where
    an example with another's media can be no prompt.
    """
    run = replace(run, folder=run.folder / "blind" / run.args.blind)
    if run.args.blind == "blank":
        blanked = copy.copy(task)
        blanked.read_media = partial(nothing_to_see, task)  # no lambda: a worker may get it pickled
        return asked, trees, blanked, run
    asked = exchange(asked, task)
    trees, faults = common.build_trees(asked, task)
    if faults:
        raise SystemExit("\n".join(f"{where}: {text}" for where, text in faults.items()))
    return asked, trees, task, run


def nothing_to_see(task, data, trees: list) -> dict:
    return task.blank(task.read_media(data, trees))


def exchange(examples: list, task) -> list:
    """Each example with the media of another: of another group, unless one group has more than half of them.

    Within each kind (`task.kind`) media are put in order of their groups and passed on by as many places as the
    largest group has. Examples that share theirs get the same others: an image is still read once for all its
    questions. Where a kind has one only, its examples are left out; a text alone stays as it is.
    """
    kinds = defaultdict(dict)  # kind -> media -> an example that shows them
    for example in examples:
        if example.shown:
            kinds[task.kind(example)].setdefault(tuple(example.shown), example)
    other = {}
    for by_media in kinds.values():
        owners = list(by_media.values())
        if len(owners) == 1:  # nothing else of its kind could be shown
            print(f"--blind shuffled: questions about {owners[0].media[0]} are left out, the only one of its kind")
            continue
        sizes = Counter(example.group for example in owners)
        order = random.Random(0).sample(list(sizes), len(sizes))
        owners.sort(key=lambda example: order.index(example.group))
        places = max(sizes.values()) % len(owners) or len(owners) // 2
        moved = owners[places:] + owners[:places]
        other |= {tuple(example.shown): new for example, new in zip(owners, moved, strict=True)}
    if not other:
        raise SystemExit("--blind shuffled: there are no two media to exchange")
    kept = [example for example in examples if not example.shown or tuple(example.shown) in other]
    return [task.show(example, other[tuple(example.shown)]) if example.shown else example for example in kept]
