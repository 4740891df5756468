"""Blind runs: the same questions with nothing to see, or with the media of another group."""

import copy
import random
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial

from inputs.building import build_trees


def prepare(asked: list, trees: list, task, run) -> tuple:
    """What is needed to answer without seeing, into RUN/blind/blank or RUN/blind/shuffled: (asked, trees, task, run).

    blank: the media show nothing (`task.blank`). shuffled: see `exchange`. Ends where that makes a faulty prompt.
    """
    run = replace(run, folder=run.folder / "blind" / run.args.blind)
    if run.args.blind == "blank":
        blanked = copy.copy(task)
        blanked.read_media = partial(nothing_to_see, task)  # no lambda: a worker may get it pickled
        return asked, trees, blanked, run
    asked = exchange(asked, task)
    trees, faults = build_trees(asked, task)
    if faults:
        raise SystemExit("\n".join(f"{where}: {text}" for where, text in faults.items()))
    return asked, trees, task, run


def nothing_to_see(task, data, trees: list) -> dict:
    return task.blank(task.read_media(data, trees))


def exchange(examples: list, task) -> list:
    """Each example with the media of another: of another group, unless one group has more than half of them.

    Within each kind (`task.kind`), media are ordered by group and passed on by as many places as the largest group has.
    Examples that share media get the same others: an image is still read once for all its questions. No example gets a
    medium that it shows itself: where its kind has no other media, it is left out. A text alone stays as it is.
    """
    kinds = defaultdict(dict)  # kind -> media -> an example that shows them
    for example in examples:
        if example.shown:
            kinds[task.kind(example)].setdefault(tuple(example.shown), example)
    other = {}
    for by_media in kinds.values():
        owners = list(by_media.values())
        sizes = Counter(example.group for example in owners)
        order = random.Random(0).sample(list(sizes), len(sizes))
        owners.sort(key=lambda example: order.index(example.group))
        places = max(sizes.values()) % len(owners) or len(owners) // 2
        for i, owner in enumerate(owners):
            passed = (owners[(i + places + more) % len(owners)] for more in range(len(owners)))
            new = next((new for new in passed if not set(new.shown) & set(owner.shown)), None)
            if new is None:
                text = "are left out: nothing else of its kind, or all of it shows the same"
                print(f"--blind shuffled: questions about {owner.media[0]} {text}")
            else:
                other[tuple(owner.shown)] = new
    if not other:
        raise SystemExit("--blind shuffled: there are no two media to exchange")
    kept = [example for example in examples if not example.shown or tuple(example.shown) in other]
    return [task.show(example, other[tuple(example.shown)]) if example.shown else example for example in kept]
