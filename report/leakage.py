"""The leakage check: what two splits share, and answers that contradict each other, before any figure is believed.

Found are files, patients and pictures of one split that an earlier split has too, questions asked twice about the same
media, and answers that say nothing. Files are compared by what is decoded of them (inputs/content.py), still pictures
also by how they look (near_duplicates.py); pictures without structure by their pixels alone: "flat" counts these.
"""

from collections import Counter, defaultdict
from contextlib import suppress
from itertools import islice
from pathlib import Path

from inputs import sound, turns, video_files, videos, volumes
from inputs.files import SPLITS, file_sha256
from inputs.show import shorten
from inputs.videos import FRAMES
from report.near_duplicates import OF_BITS, closest, small_picture, structured
from report.scoring import forms, normalise, says_nothing, score_answer
from runtime.files import in_threads

KINDS = ("same content", "near duplicate", "shared frames", "shared group", "conflict", "same question", "empty answer")

# what is decoded of a file: by its ending, (what its tokens are counted from, its content)
MEASURES = [(sound.FILES, sound.measure), (videos.FILES, videos.measure), (turns.VOLUMES, volumes.measure)]


def check(data: Path, examples: list, contents: dict[str, str] | None = None) -> dict:
    """What makes a test figure worthless, JSON-like: findings, counts of each kind, splits.

    Media are named relative to `data`; `contents` are those of files that the caller has decoded. A file that cannot be
    decoded is compared by its bytes, a missing one by its name. "not looked at" counts missing files and pictures that
    cannot be looked at.
    """
    names = list(dict.fromkeys(name for example in examples for name in example.media))
    pictures = {name for example in examples for name in example.shown}
    pictures = {name for name in pictures if name.lower().endswith(FRAMES) or video_files.is_frame(name)}
    known = contents or {}

    def look(name: str) -> tuple:
        found = name
        with suppress(ValueError):  # whoever reads it for training says what is wrong with it
            found = known.get(name) or content_of(data, name)
            return found, small_picture(data, name) if name in pictures else None, True
        return found, None, False

    looked = in_threads(look, names, desc="leakage check")
    content = {name: found for name, (found, _, _) in looked.items()}
    small = {content[name]: picture for name, (_, picture, _) in looked.items() if picture is not None}
    seen = {key: picture for key, picture in small.items() if structured(picture)}
    files = first_of_each_split(examples, lambda example: [(name, content[name]) for name in example.shown])
    # patients, videos, procedures; what is just a file's or example's own name is no group
    groups = first_of_each_split(examples, lambda e: [(g, g) for g in e.groups if g not in (*e.media, e.id)])
    findings = [*same_content(files), *similar_pictures(files, seen), *shared_frames(examples, content)]
    findings += repeated_questions(examples, content)
    for (example, name), (first, _), _ in repeated(groups):
        what = "video file" if videos.in_file(name) else "group"
        text = f"{what} {name} of {example.split} is also in {first.split} ({first.where})"
        findings.append({"kind": "shared group", "where": example.where, "text": text})
    empty = [(e.where, f"the answer of {e.id} is {e.answer!r}") for e in examples if says_nothing(e.answer)]
    findings += [{"kind": "empty answer", "where": where, "text": text} for where, text in empty]
    findings.sort(key=lambda finding: KINDS.index(finding["kind"]))
    counts = dict.fromkeys(KINDS, 0) | Counter(finding["kind"] for finding in findings)
    counts |= {"not looked at": sum(not found for _, _, found in looked.values()), "flat": len(small) - len(seen)}
    parts = {split: [example for example in examples if example.split == split] for split in SPLITS}
    splits = {split: describe_split(part) for split, part in parts.items() if part}
    return {"findings": findings, "counts": counts, "splits": splits}


def content_of(data: Path, name: str) -> str:
    """What is decoded of a file that the caller has not measured, or else its bytes. Raises ValueError."""
    for endings, measure in MEASURES:
        with suppress(ValueError):
            if name.lower().endswith(endings) or (measure is videos.measure and video_files.is_frame(name)):
                return measure(data, name)[1]
    return file_sha256(data, name)


# ---- what is looked for: each gives findings {"kind", "where", "text"} --------------------------------------


def same_content(files: list[dict]):
    """The same content (of files that are not there the same name) shown in a split and in an earlier one."""
    for (example, name), (first, other), key in repeated(files):
        text = f"{name} of {example.split} " + ("is also in" if name == other else f"shows the same as {other} of")
        text += f" {first.split} ({first.where})" + ", by its name; the file is not here" * (key == name)
        yield {"kind": "same content", "where": example.where, "text": text}


def similar_pictures(files: list[dict], pictures: dict):
    """Each picture of a split that looks like one of an earlier split, and which; not those with the same content."""
    earlier = {}  # content -> (example, name)
    for found in files:
        later = {key: shown for key, shown in found.items() if key in pictures and key not in earlier}
        for key, other, bits, turned in closest(list(earlier), list(later), pictures):
            (example, name), (first, first_name) = later[key], earlier[other]
            text = f"{name} of {example.split} looks like {first_name} of {first.split} ({first.where})"
            text += f", {turned}" * bool(turned) + f": {bits} of {OF_BITS} bits differ"
            yield {"kind": "near duplicate", "where": example.where, "text": text}
        earlier |= later


def shared_frames(examples: list, content: dict[str, str]):
    """How many clips of val and test show frames of earlier splits: some, or nothing else."""
    for split, found in overlaps(examples, content).items():
        clips = [example for example in examples if example.split == split and len(example.shown) > 1]
        if clips and found["shared"]:
            text = f"{found['shared']} of {found['shown']} frames of {split} are in earlier splits too, in "
            text += f"{found['questions_touched']} of {found['questions']} questions, "
            text += f"{found['questions_contained']} of which show nothing else"
            yield {"kind": "shared frames", "where": clips[0].where.partition(":")[0], "text": text}


def first_of_each_split(examples: list, keys) -> list[dict]:
    """Of each split {key: (the first example that has it, its name there)}; keys(example): (name, key)s."""
    splits = {split: {} for split in SPLITS}
    for example in examples:
        for name, key in keys(example):
            splits[example.split].setdefault(key, (example, name))
    return list(splits.values())


def repeated(splits: list[dict]):
    """((example, name), the first (example, name), key) of each key that an earlier split has, too."""
    first = {}
    for found in splits:
        yield from ((found[key], first[key], key) for key in found if key in first)
        first = found | first


def repeated_questions(examples: list, content: dict[str, str]):
    """The same question asked of the same media after the same turns: a second time, or with another answer.

    Not of a text alone, where a greeting has many right replies; captions (no question) may differ, as descriptions do.
    """
    asked = defaultdict(list)  # what is asked -> the first example with each answer
    for example in examples:
        shown = tuple(content[name] for name in example.shown)
        if not shown or says_nothing(example.answer):
            continue
        question = normalise(example.question)
        answers = asked[question, shown, repr([*example.history])]
        same = next((other for other in answers if agree(other, example)), None)
        if same or (answers and question):
            other, mine = same or answers[0], shorten(example.answer, 80)
            text = f"{shorten(example.question, 80)!r} of {example.shown[0]}" + (" …" if len(shown) > 1 else "")
            otherwise = f" is answered {mine!r}, but {shorten(other.answer, 80)!r} at {other.where}"
            text += f" is asked at {other.where}, too, with the same answer {mine!r}" if same else otherwise
            yield {"kind": "same question" if same else "conflict", "where": example.where, "text": text}
        if not same:
            answers.append(example)


def agree(one, other) -> bool:
    """Has the answer of one example a form that is right for the other?"""
    mine, theirs = ([form for form in forms(example) if not says_nothing(form)] for example in (one, other))
    pairs = [pair for a in mine for b in theirs for pair in ((a, b), (b, a))]
    # both ways: "(a) red" is answered rightly by "red", but not the other way round
    return any(score_answer(*pair, one.question_type)["exact"] for pair in pairs)


def overlaps(examples: list, contents: dict[str, str]) -> dict[str, dict]:
    """For val and test: how many files, by their content, are in earlier splits too, and whose questions these are.

    `questions_touched` show at least one such file, `questions_contained` nothing else.
    """
    found, earlier = {}, set()
    for split in SPLITS:
        part = [{contents.get(name) for name in example.shown} for example in examples if example.split == split]
        files = set().union(*part) - {None}
        if split != "train" and part:
            shared = files & earlier
            touched = sum(bool(p & shared) for p in part)
            contained = sum(bool(p) and p <= shared for p in part)  # a text alone shows nothing
            found[split] = {"shown": len(files), "shared": len(shared), "questions": len(part)}
            found[split] |= {"questions_touched": touched, "questions_contained": contained}
        earlier |= files
    return found


def describe_split(examples: list) -> dict:
    """How many questions, files, questions of each type, and which answers; single_class: types that have one only."""
    types, by_type = Counter(example.question_type for example in examples), defaultdict(set)
    for example in examples:
        by_type[example.question_type].add(normalise(str(example.answer)))
    return {
        "questions": len(examples),
        "files": len({name for example in examples for name in example.media}),
        "question_types": dict(sorted(types.items())),
        "answers": dict(Counter(shorten(example.answer, 80) for example in examples).most_common(10)),
        "distinct_answers": len(set().union(*by_type.values())),
        "single_class": sorted(kind for kind, found in by_type.items() if len(found) == 1 and types[kind] > 1),
    }


def print_result(result: dict) -> None:
    """A line a split, a line a finding (of each kind the first ten), and whether there are any."""
    for split, found in result["splits"].items():
        n, answers = found["questions"], islice(found["answers"].items(), 3)
        often = ", ".join(f"{shorten(answer, 16)!r} {count / n:.0%}" for answer, count in answers)
        text = f"{n} questions of {len(found['question_types'])} types, {found['files']} files, "
        text += f"{found['distinct_answers']} different answers, most often {often}"
        if found["single_class"]:
            text += f"; always the same answer to {shorten(', '.join(found['single_class']), 40)}"
        print(f"{split}: {text}")
    counts = {kind: result["counts"][kind] for kind in KINDS if result["counts"][kind]}
    for kind, n in counts.items():
        for finding in islice((f for f in result["findings"] if f["kind"] == kind), 10):
            print(shorten(f"{kind}: {finding['where']}: {finding['text']}"))
        if n > 10:
            print(f"{kind}: … and {n - 10} more")
    if result["counts"]["not looked at"]:
        print(f"{result['counts']['not looked at']} files could not be opened: compared by name or bytes only")
    if result["counts"]["flat"]:
        print(f"{result['counts']['flat']} pictures are black, white or of one shade: compared by their pixels only")
    total, listed = sum(counts.values()), ", ".join(f"{n} {kind}" for kind, n in counts.items())
    found = f"{total} finding{'s' if total > 1 else ''} ({listed})" if total else "no findings"
    print(f"leakage check: {found}")
