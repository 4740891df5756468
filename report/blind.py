"""Blind runs."""
import copy
import random
from collections import Counter, defaultdict
from dataclasses import replace

import common
from _old import runtime as _old


def prepare(asked, prompts, task, run):
    """What is needed to answer without seeing, into RUN/blind: nothing in the media, or those of another group."""
    mode = run.args.blind
    run = replace(run, folder=run.folder / "blind" / mode)
    if mode == "blank":
        blanked = copy.copy(task)
        blanked.read_media = lambda data, trees: task.blank(task.read_media(data, trees))
        return asked, prompts, blanked, run
    asked = exchange(asked, task)
    prompts, faults = common.build_trees(asked, task)
    if faults:
        raise SystemExit("\n".join(f"{where}: {text}" for where, text in faults.items()))
    return asked, prompts, task, run


def exchange(examples, task):
    """Each example with the media of another group (today's `exchange`, asking the task for kind and show)."""
    kinds, other = defaultdict(dict), {}
    for example in examples:
        if _old.shown(example):
            kinds[task.kind(example)].setdefault(tuple(_old.shown(example)), example)
    for by_media in kinds.values():
        owners = list(by_media.values())
        if len(owners) == 1:
            print(f"--blind shuffled: questions about {owners[0].media[0]} are left out, the only one of its kind")
            continue
        sizes = Counter(example.group for example in owners)
        order = random.Random(0).sample(list(sizes), len(sizes))
        owners.sort(key=lambda example: order.index(example.group))
        places = max(sizes.values()) % len(owners) or len(owners) // 2
        moved = owners[places:] + owners[:places]
        other |= {tuple(_old.shown(e)): new for e, new in zip(owners, moved, strict=True)}
    if not other:
        raise SystemExit("--blind shuffled: there are no two media to exchange")
    kept = [e for e in examples if not _old.shown(e) or tuple(_old.shown(e)) in other]
    return [task.show(e, other[tuple(_old.shown(e))]) if _old.shown(e) else e for e in kept]
