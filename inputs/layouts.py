"""Published layouts -> (where, split, entry): entries are canonical, whatever the files look like."""
import json
from pathlib import Path  # noqa

from _old import llava as _llava
from _old import mri as _mri
from _old import surg as _surg
from _old import runtime as _old

from .task import Problem

ENDOVIS = _llava.ENDOVIS


def is_endovis(data):
    return any(data.glob("seq_*/vqa"))


def files(data):
    for split, path in _old.data_files(data).items():
        if path.suffix == ".json":
            try:
                listed = json.loads(path.read_text("utf-8"))
                found, problems = [(f"{path.name}[{i}]", dict(entry)) for i, entry in enumerate(listed)], []
            except (ValueError, TypeError) as error:
                yield path.name, split, Problem(path.name, None, f"not a JSON list ({error}); mend the file")
                continue
        else:
            found, problems = _old.read_jsonl(path)
        yield from ((p.where, split, p) for p in problems)
        yield from ((where, split, entry) for where, entry in found)


def conversations(entries, mark, field=None):
    """LLaVA's conversations as an entry for each answer, with its history; anything else as it is.

    The first turn must hold `mark` once; with `field`, where the entry has that, and not otherwise.
    """
    for where, split, entry in entries:
        if isinstance(entry, Problem) or "conversations" not in entry:
            yield where, split, entry
            continue
        try:
            yield from ((where if field and i == 0 else f"{where} turn {i}", split, row) for i, row in turns(where, entry, mark, field))
        except ValueError as error:
            yield where, split, Problem(where, entry.get("id"), str(error))


def turns(where, entry, mark, field):
    turns = entry["conversations"]
    turns = turns if isinstance(turns, list) else [turns]
    roles = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if not turns or roles != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"turns must alternate human, gpt; there are {roles}")
    texts = [turn.get("value") if field else str(turn.get("value") or "") for turn in turns]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a turn's value must be a text: {next(t for t in texts if not isinstance(t, str))!r}")
    if texts[0].count(mark) != (entry.get(field) not in (None, "") if field else 1):
        where_due = f" where the row names a {field}, and not otherwise" if field else ""
        raise ValueError(f"the first turn must hold {mark} once{where_due}")
    texts[0] = texts[0].replace(mark, "")
    history = []
    for i in range(0, len(turns), 2):
        row = {k: v for k, v in entry.items() if k != "conversations"}
        row |= {"question": texts[i], "answer": texts[i + 1], "history": list(history)}
        name = entry.get("id", where) if entry.get("id") not in (None, "") else where
        if not field or len(turns) > 2:  # LLaVA's are numbered always
            row["id"] = f"{name}.{i // 2}"
        if field and len(turns) > 2:  # in one group: later turns tell what was said in the earlier ones
            row["group"] = str(entry.get("group") or entry.get(field) or name)
        yield i // 2 if not field else i, row
        history.append((texts[i].strip(), texts[i + 1].strip()))


def refuse_misspelt(entry, known):
    wrong = _old.misspelt(entry, known)
    if wrong:
        raise ValueError(wrong)


def refuse_kinds(entry, **kinds):
    """Raise ValueError where a field that is there is not of its kind: field=str, or several kinds."""
    for name, kind in kinds.items():
        if entry.get(name) is not None and not isinstance(entry[name], kind):
            raise ValueError(f"{name} must be a text: {entry[name]!r}")


def umbrella(data, supervise):
    """UMBRELLA's folders, or its conversations and plain questions as JSON lines: an entry for each answer learned.

    An entry has id, groups, volumes, turns (what comes before the answer), question, answer, question_type,
    answer_candidates, metadata. With `supervise` "all" a training conversation gives an entry for each answer.
    """
    for where, split, entry in _umbrella_files(Path(data)):
        if isinstance(entry, Problem):
            yield where, split, entry
            continue
        try:
            refuse_misspelt(entry, _mri.FIELDS)
            yield from list(answers(Path(data), where, entry, split, supervise))
        except (TypeError, AttributeError) as error:  # a number for a list, a list for a text, …
            yield where, split, Problem(where, None, f"not as conversations are written ({error}); mend the file")
        except ValueError as error:
            yield where, split, Problem(where, entry.get("id"), str(error))


def _umbrella_files(data):
    folders = {split: data / name for split, name in _mri.SPLITS.items() if (data / name).is_dir()}
    published = any(_mri.is_json(path) for folder in folders.values() for path in folder.rglob("*"))
    lines = [f"{split}.jsonl" for split in _mri.SPLITS if (data / f"{split}.jsonl").is_file()]
    if published and lines:
        raise SystemExit(f"--data {data}: {', '.join(lines)} beside UMBRELLA's folders; keep one of the two")
    if published and (data / "val").is_dir():
        raise SystemExit(f"--data {data}: val/ would not be read; UMBRELLA calls it validation, rename it")
    if not published:
        yield from files(data)
        return
    for split, folder in folders.items():
        paths = sorted(path for path in folder.rglob("*") if _mri.is_json(path))
        if not paths:
            yield folder.name, split, Problem(folder.name, None, "the folder holds no .json files")
        for path in paths:
            where = str(path.relative_to(data))
            try:
                entry = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(entry, dict):
                    raise ValueError("a list or a value, not an object")
            except (OSError, ValueError) as error:
                yield where, split, Problem(where, None, f"not a JSON object ({error}); mend the file")
                continue
            yield where, split, {"id": where[: -len(".json")], **entry}


def answers(data, where, entry, split, supervise):
    groups = _mri.subjects_of(entry)
    split = split or _old.split_of(groups[0])
    turns, volumes = _mri.read_turns(data, entry)
    task, last = entry.get("task_type") or entry.get("question_type"), len(turns) - 1
    name = str(where if entry.get("id") in (None, "") else entry["id"])
    for i in range(len(turns)):
        if turns[i]["role"] != "assistant" or (i < last and (split != "train" or supervise == "last")):
            continue
        before = turns[:i]
        shown = [part for turn in before for part in turn["content"] if part["type"] == "image"]
        if not shown and i < last:  # a greeting
            continue
        if not shown:
            raise ValueError(f"nothing is shown before the answer of turn {i}")
        found = {
            "question": " ".join(part["text"] for part in before[-1]["content"] if part["type"] == "text"),
            "answer": " ".join(part["text"] for part in turns[i]["content"]),
            "groups": groups, "volumes": volumes[: len(shown)], "turns": before,
            # an acknowledgement, say: a task of its own, without labels
            "question_type": task if i == last else f"{task or 'conversation'} turn {i}",
            "answer_candidates": entry.get("answer_candidates") if i == last else None,
            "metadata": entry.get("metadata") if i == last else None,
            "id": name if i == last else f"{name} turn {i}",
        }  # fmt: skip
        yield (where if i == last else f"{where} turn {i}"), split, found


# ---- SurgViVQA: {train,eval,test}_multivideo.jsonl, frames/VIDEO/NAME.jpg, audio/SPLIT/ID.wav ----


def _published(data):
    files = {split: data / f"{name}_multivideo.jsonl" for split, name in _surg.PUBLISHED.items()}
    return {split: path for split, path in files.items() if path.is_file()}


def is_surgvivqa(data):
    """Has the folder SurgViVQA's own files? Ends where there are others beside them."""
    found = _published(data)
    other = [f"{split}.jsonl" for split in _surg.PUBLISHED if (data / f"{split}.jsonl").is_file()]
    if found and other:
        raise SystemExit(f"--data {data}: {', '.join(other)} beside SurgViVQA's own files; keep one of the two")
    return bool(found)


def surgvivqa(data):
    """Entries with IDs that are unique, frames as files, and the recording that belongs to each question."""
    for split, path in _published(data).items():
        found, problems = _old.read_jsonl(path)
        yield from ((p.where, split, p) for p in problems)
        for where, entry in found:
            try:
                yield where, split, surgvivqa_entry(data, where, entry)
            except ValueError as error:
                yield where, split, Problem(where, entry.get("id"), str(error))


def surgvivqa_entry(data, where, entry):
    refuse_misspelt(entry, _surg.FIELDS)
    if any(entry.get(key) in (None, "") for key in ("id", "video_id")):
        raise ValueError("no id or no video_id, by which SurgViVQA's files name recordings and frames")
    audio = entry["audio"] if entry.get("audio") else _surg.find_recording(data, where, entry, "both")
    names = _surg.find_frames(data, entry, published=True)
    return {**entry, "id": f"{entry['video_id']}/{entry['id']}", "frames": names, "audio": audio}

