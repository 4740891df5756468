"""Mutations of valid data folders end in a fault that names the file and the row, or in the same examples as before.

Here a few, from a fixed seed; by hand as many as wanted, with a table:

    python tests/inputs/test_fuzz.py --count 2000 --seed 1
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import fuzzed
import pytest
import torch
from fuzzed import LAYOUTS
from helpers import task_class

from inputs import data_check

COUNT = 12  # mutations of each layout
LONGEST = 10  # seconds of a reading
FIXTURES = {"train_llava_med": "demo_folder", "train_qwen2vl_sentinel": "qwen_folder"}
FIXTURES |= {"train_surg_video_vqa": "video_folder", "train_umbrella_mri": "mri_folder"}
FIXTURES |= {"train_video_plain_lm": "plain_folder"}
TOWERS = {"train_surg_video_vqa": ("--audio-model", "whisper"), "train_video_plain_lm": ("--vision-model", "vision")}


class TooLong(BaseException):
    pass


class Reader:
    """What a script makes of a data folder: its own reading and the data check, in this process."""

    def __init__(self, layout: str, demo: Path, folder: Path):
        self.script, flags, self.write = LAYOUTS[layout]
        self.folder, self.data = folder, folder / "data"
        flags = ["--model", demo / "model", "--data", self.data, "--out", folder / "out", "--check", *flags]
        name = self.script.__name__
        flags += [TOWERS[name][0], demo / TOWERS[name][1]] if name in TOWERS else []
        self.args = self.script.parse_arguments([str(flag) for flag in flags])
        with contextlib.redirect_stdout(io.StringIO()):
            self.task = task_class(self.script)(demo / "model", copy.deepcopy(self.args))

    def fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.data.mkdir(parents=True)
        self.write(self.data)

    def read(self) -> SimpleNamespace:
        """how: "read", "fault", "hang" or "traceback"; text: all that was printed; found: {(split, id): content}"""
        args, shown = copy.deepcopy(self.args), io.StringIO()
        task = copy.copy(self.task)
        task.args, task.faults, task.report = args, list(task.faults), dict(task.report)
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        how, found = "read", {}
        before = signal.signal(signal.SIGALRM, self.too_long)
        signal.setitimer(signal.ITIMER_REAL, LONGEST, 1)
        try:
            with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
                found = self.content(args, task)
        except SystemExit as error:
            how = "fault"
            shown.write(f"\n{error.code}")
        except TooLong:
            how = "hang"
        except Exception:
            how = "traceback"
            shown.write(f"\n{traceback.format_exc()}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        path = self.folder / "out" / "check.json"
        check = json.loads(path.read_text()) if path.is_file() else {}
        return SimpleNamespace(how=how, found=found, text=shown.getvalue(), check=check)

    def too_long(self, *_):
        for path in self.data.rglob("*"):
            if path.is_fifo():  # whoever waits for its other end waits no longer
                os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        raise TooLong

    def content(self, args, task) -> dict:
        """{(split, id): what the model reads of the example}; `where` and `media` say which row and files it is of."""
        (self.folder / "out").mkdir(parents=True, exist_ok=True)
        examples, problems = self.script.read_examples(self.data, args)
        splits, trees = data_check.check(examples, problems, task, SimpleNamespace(args=args, same={}, own=[]))
        by_id = {(split, example.id): example for split, part in splits.items() for example in part}
        found = {}
        for split, tree in ((split, tree) for split, part in trees.items() for tree in part):
            tensors = task.read_media(Path(args.media_root), [tree]) if tree.media else {}
            digest = hashlib.sha256(repr(list(leaves(tensors))).encode()).hexdigest()
            for id, (input_ids, labels) in zip(tree.ids, tree.branches, strict=True):
                example = by_id[split, id]
                texts = [example.question, example.answer, example.history, example.also_right]
                read = SimpleNamespace(texts=texts, type=example.question_type, groups=example.groups)
                read.tokens, read.content, read.candidates = (
                    (tree.prefix, input_ids, labels),
                    digest,
                    example.candidates,
                )
                read.where, read.media, read.split, read.id = example.where, example.media, split, id
                found[split, id] = read
        assert found.keys() == by_id.keys()
        return found


def leaves(value):
    if isinstance(value, torch.Tensor):
        yield hashlib.sha256(value.numpy().tobytes()).hexdigest()
    elif isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    elif hasattr(value, "__dict__"):
        yield from leaves(vars(value))
    else:
        yield str(value)


def same(one: SimpleNamespace, other: SimpleNamespace, *but: str) -> bool:
    left_out = {"where", "media", *but}
    return all(value == getattr(other, name) for name, value in vars(one).items() if name not in left_out)


def verdict(valid: SimpleNamespace, now: SimpleNamespace, mutation: fuzzed.Mutation) -> tuple[str, str]:
    """("fault", "same", "differs" or "WRONG", why)."""
    if now.how in ("hang", "traceback"):
        return "WRONG", now.how
    if now.how == "fault":
        if mutation.exact:
            return "WRONG", "refused, though nothing has changed"
        said = now.text + json.dumps(now.check.get("failures", []))
        names = {part for name in mutation.files for part in (Path(name).name, str(Path(name).parent) + "/")} - {"./"}
        lines = [re.sub(r"(.*):(\d+)$", r"\1.*line \2\\b", row) for row in mutation.rows]
        lines += [rf"{name}.*\bbyte \d" for name in mutation.files]  # or where in the file it is
        if mutation.rows and not any(row in said or re.search(line, said) for row in mutation.rows for line in lines):
            return "WRONG", "the fault does not name the row"
        return ("fault", "") if any(name in said for name in names) else ("WRONG", "the fault does not name the file")
    old, new = valid.found, now.found
    gone, more = old.keys() - new.keys(), new.keys() - old.keys()
    changed = {key for key in old.keys() & new.keys() if not same(old[key], new[key])}
    listed = any(f'"{mutation.new}"' in json.dumps(now.check[name]) for name in now.check if "unread" in name)
    listed |= mutation.new == "patient_id" and bool(gone or more or changed)  # it is the group then
    if not (gone or more or changed):
        if mutation.new and "added" in mutation.text and not listed:
            return "WRONG", "a new field is neither read nor listed as unread"
        return "same", ""
    if mutation.exact and sorted(map(values, old.values())) == sorted(map(values, new.values())):
        return "same", ""
    if mutation.exact:
        return "WRONG", "other examples, though nothing has changed"
    if (
        mutation.lost
        and mutation.said in now.text
        and not more
        and not changed
        and all(file_of(old[key]) in mutation.files for key in gone)
    ):
        return "differs", "the file's examples are gone"
    if len(new) == len(old) + 1 and repeated(now.check) > repeated(valid.check):
        return "differs", "the leakage check says that a question is asked twice"  # it has no ID
    if len(old) != len(new):
        return "WRONG", f"{len(new)} examples instead of {len(old)}"
    if not mutation.differs or mutation.said not in now.text:
        return "WRONG", "damage passes as other content"
    mine = {key for key in old if concerned(old[key], mutation)} | {key for key in new if concerned(new[key], mutation)}
    others = {key for key in changed - mine if not same(old[key], new[key], "candidates")}
    if others or (gone | more) - mine:
        return "WRONG", "other examples than those of the row or file have changed"
    if mutation.new and not listed and "->" in mutation.text:
        return "WRONG", "a renamed field is neither read nor listed as unread"
    for key in changed | more:
        if ".csv" not in new[key].where and any(
            str(text).startswith(("[", "{")) or text in ("True", "False", "None") for text in flat(new[key])
        ):
            return "WRONG", "a text as Python writes a list, an object, a boolean"
    lost = sum(not read.media for read in new.values()) - sum(not read.media for read in old.values())
    renamed = mutation.new and mutation.new != "patient_id"  # a path may be a patient's name
    if lost and (renamed or nothing_shown(now.check) - nothing_shown(valid.check) != lost):
        return "WRONG", "an example shows nothing any more"
    return "differs", ""


def repeated(check: dict) -> int:
    return check["leakage"]["counts"]["same question"]


def nothing_shown(check: dict) -> int:
    return sum(split["showing_nothing"] for split in check["splits"].values())


def values(read: SimpleNamespace) -> str:
    return repr([read.split, read.texts, read.type, read.groups, read.tokens, read.content, read.candidates])


def flat(read: SimpleNamespace) -> list:
    question, answer, history, right = read.texts
    return [
        question,
        answer,
        read.id,
        *read.groups,
        *right,
        *(text for turn in history for text in turn if isinstance(turn, tuple)),
    ]


def file_of(read: SimpleNamespace) -> str:
    return read.where.partition(":")[0].partition("[")[0].partition(" turn")[0]


def concerned(read: SimpleNamespace, mutation: fuzzed.Mutation) -> bool:
    """Is an example of the mutated row, or does it show the mutated file?"""
    if mutation.rows:
        return any(read.where == row or read.where.startswith(f"{row} ") for row in mutation.rows)
    return file_of(read) in mutation.files or bool(set(read.media) & set(mutation.files))


def outcomes(layout: str, demo: Path, folder: Path, count: int, seed: int):
    """(kind of mutation, verdict, why, mutation, what was read) of each."""
    reader = Reader(layout, demo, folder)
    reader.fresh()
    valid = reader.read()
    assert valid.how == "read" and len(valid.found) >= 4, f"{layout}: the valid folder is not read: {valid.text}"
    for i in range(count):
        reader.fresh()
        kind, mutation = fuzzed.mutate(reader.data, f"{seed} {layout} {i}")
        now = reader.read()
        yield kind, *verdict(valid, now, mutation), mutation, now


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mutated_folder_is_refused_by_file_and_row_or_read_as_before(layout, request, tmp_path):
    demo = request.getfixturevalue(FIXTURES[LAYOUTS[layout][0].__name__])
    for i, (_, what, why, mutation, now) in enumerate(outcomes(layout, demo, tmp_path / "f", COUNT, seed=0)):
        assert what != "WRONG", f"{layout}, seed 0, {i}: {mutation.text}: {why}\n{now.text}"


def main() -> None:
    from conftest import demo_of

    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--kind", choices=fuzzed.MUTATIONS)
    parser.add_argument("--log", type=Path, help="every outcome, a line of JSON each")
    args = parser.parse_args()
    if args.kind:
        fuzzed.MUTATIONS = {args.kind: fuzzed.MUTATIONS[args.kind]}
    table, wrong, demos = Counter(), Counter(), {}
    log = args.log.open("w") if args.log else io.StringIO()
    with tempfile.TemporaryDirectory() as scratch:
        layouts = args.layout or list(LAYOUTS)
        for layout in layouts:
            name = LAYOUTS[layout][0].__name__.removeprefix("train_")
            if name not in demos:
                with contextlib.redirect_stdout(io.StringIO()):
                    demos[name] = demo_of(name, Path(scratch, name), 40)
            per = -(-args.count // len(layouts))
            for i, (kind, what, why, mutation, now) in enumerate(
                outcomes(layout, demos[name], Path(scratch, "f"), per, args.seed)
            ):
                table[layout, what] += 1
                table[kind, what] += 1
                row = {"layout": layout, "i": i, "kind": kind, "what": what, "why": why, "did": mutation.text}
                log.write(json.dumps(row | {"text": now.text[-1500:]}) + "\n")
                if what == "WRONG":
                    wrong[why] += 1
                    print(f"{layout} {i}: {mutation.text}: {why}")
    whats = ("fault", "same", "differs", "WRONG")
    for name in (*layouts, *fuzzed.MUTATIONS):
        print(f"{name:20}", *(f"{table[name, what]:6} {what}" for what in whats))
    print(sum(wrong.values()), "wrong:", dict(wrong.most_common()))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
