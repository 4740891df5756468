"""Conversations as they are published: LLaVA's turns and UMBRELLA's, taken apart into an entry for each answer."""

import difflib
import re
from pathlib import Path

from inputs import files
from inputs.task import named, split_of
from inputs.volumes import Volume

VOLUMES = (".nii", ".nii.gz", ".npy", ".npz")


def refuse_misspelt(entry: dict, known: set[str]) -> None:
    """Raise ValueError on an unknown field that is spelt like a known one, which would be ignored silently."""
    for name in entry.keys() - known:
        close = difflib.get_close_matches(name, known - entry.keys(), n=1, cutoff=0.8)
        if close:
            raise ValueError(f"unknown field {name!r}; did you mean {close[0]!r}?")


# --- LLaVA: "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A polyp."}]


def llava(where: str, split: str | None, entry: dict, mark: str, field: str | None):
    """(where, split, entry) for each answer, with the turns before it as its `history`. Raises ValueError.

    An entry without conversations stays as it is. The first turn must hold `mark` once; with `field`, where the entry
    has that, and not otherwise. Wherever the mark stands, the media go first, as in LLaVA's own training. Of several
    answers IDs are numbered.
    """
    if "conversations" not in entry:
        refuse_history(entry)
        yield where, split, entry
        return
    turns = entry["conversations"] if isinstance(entry["conversations"], list) else [entry["conversations"]]
    roles = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if not turns or roles != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"turns must alternate human, gpt; there are {roles}")
    texts = ["" if turn.get("value") is None else turn["value"] for turn in turns]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a turn's value must be a text: {next(t for t in texts if not isinstance(t, str))!r}")
    refuse_misspelt(entry, {field} if field else set())
    if texts[0].count(mark) != (named(entry, field, None) is not None if field else 1):
        due = f" where the entry names a {field}, and not otherwise" if field else ""
        raise ValueError(f"the first turn must hold {mark} once{due}")
    texts = [text.replace(mark, "") if i == 0 else text for i, text in enumerate(texts)]
    history, several = [], len(texts) > 2
    for number, (question, answer) in enumerate(zip(texts[::2], texts[1::2], strict=True)):
        found = {key: value for key, value in entry.items() if key != "conversations"}
        found |= {"question": question, "answer": answer, "history": list(history)}
        if several:
            name = named(entry, "id", where)
            found["id"] = f"{name}.{number}"
        if several and field:  # in one group, because later turns repeat what earlier ones have answered
            found["group"] = named(entry, "group", named(entry, field, name))
        yield (f"{where} turn {number}" if several else where), split, found
        history.append((question.strip(), answer.strip()))


def refuse_history(entry: dict) -> None:
    """Raise ValueError unless an entry's `history`, where it has one, is a list of questions with their answers."""
    history = entry.get("history") or []
    turns = history if isinstance(history, list) else [history]
    if not all(isinstance(turn, list | tuple) and [type(text) for text in turn] == [str, str] for turn in turns):
        raise ValueError(f"history must be a list of [question, answer]: {history!r}")


# --- UMBRELLA: "images": [{"path", "modality"}], "conversations": [{"role": "user", "content": [{"type": "image"}, …]}]

FIELDS = {"id", "volume", "modality", "images", "question", "answer", "question_type", "answer_candidates", "group"}
FIELDS |= {"task_id", "task_type", "subject_ids", "modalities", "conversations", "metadata"}  # UMBRELLA's


def umbrella(data: Path, where: str, split: str | None, entry: dict, supervise: str):
    """(where, split, entry) of a conversation's last answer; of training with supervise="all", of each.

    An entry has id, groups, volumes, turns (what comes before the answer, as a chat template reads it), question (the
    last of it), answer, question_type, answer_candidates, metadata. Raises ValueError.
    """
    refuse_misspelt(entry, FIELDS)
    groups = subjects(entry)
    split = split or split_of(groups[0])
    turns, volumes = read_turns(data, entry)
    task, last = entry.get("task_type") or entry.get("question_type"), len(turns) - 1
    name = named(entry, "id", where)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant" or (i < last and (split != "train" or supervise == "last")):
            continue
        before = turns[:i]
        shown = [part for turn in before for part in turn["content"] if part["type"] == "image"]
        if not shown and i < last:  # a greeting
            continue
        if not shown:
            raise ValueError(f"nothing is shown before the answer of turn {i}")
        found = {
            "id": name,
            "groups": groups,
            "volumes": volumes[: len(shown)],
            "turns": before,
            "question": " ".join(part["text"] for part in before[-1]["content"] if part["type"] == "text"),
            "answer": " ".join(part["text"] for part in turn["content"]),
            "question_type": task,
            "answer_candidates": entry.get("answer_candidates"),
            "metadata": entry.get("metadata"),
        }
        if i < last:  # an acknowledgement, say: a task of its own, without labels
            found |= {"id": f"{name} turn {i}", "question_type": f"{task or 'conversation'} turn {i}"}
            found |= {"answer_candidates": None, "metadata": None}
        yield (where if i == last else f"{where} turn {i}"), split, found


def subjects(entry: dict) -> list[str]:
    """The subjects that a conversation shows, each once."""
    groups = entry.get("subject_ids") or [entry.get("group")]
    if groups == [None]:
        raise ValueError("no subject_ids and no group: the scans of one subject must not be in two splits, so name it")
    if not isinstance(groups, list) or not all(type(group) in (str, int) and group != "" for group in groups):
        raise ValueError(f"subject_ids must be a list of names (or group one name): {groups!r}")
    return list(dict.fromkeys(map(str, groups)))


def read_turns(data: Path, entry: dict) -> tuple[list[dict], list[Volume]]:
    """The turns as the chat template reads them, and what each of their images is. Raises ValueError."""
    images, turns = entry.get("images", []), entry.get("conversations")
    if turns is None:  # a question with its volume or volumes
        images = [entry] if "volume" in entry else images
        asked = [*({"type": "image"} for _ in images), {"type": "text", "text": entry.get("question")}]
        answered = [{"type": "text", "text": "" if entry.get("answer") is None else str(entry["answer"])}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise ValueError(f"images must be a list of objects with path and modality: {images!r}")
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
    first = 1 if roles[:1] == ["system"] else 0
    if len(roles) == first or roles[first:] != ["user", "assistant"] * ((len(roles) - first) // 2):
        raise ValueError(f"turns must alternate user, assistant, after a system turn if any; there are {roles}")
    parts = [read_parts(role, turn.get("content")) for role, turn in zip(roles, turns, strict=True)]
    shown = [(p.get("image_path"), p.get("modality")) for turn in parts for p in turn if p["type"] == "image"]
    listed = [(image.get("path", image.get("volume")), image.get("modality")) for image in images]
    pairs = [pair for one, other in zip(shown, listed, strict=False) for pair in zip(one, other, strict=True)]
    if len(shown) != len(listed) or any(one not in (None, other) for one, other in pairs):
        raise ValueError(f"the conversation shows {shown}, but images names {listed}")
    plain = [[{key: part[key] for key in ("type", "text") if key in part} for part in turn] for turn in parts]
    found = [{"role": role, "content": content} for role, content in zip(roles, plain, strict=True)]
    return found, [volume(data, image) for image in images]


def read_parts(role: str, content) -> list[dict]:
    """The parts of a turn, texts stripped. Raises ValueError where it holds anything but text and a user's images."""
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content or []]
    if not kinds or not set(kinds) <= {"text", "image"} or (role != "user" and "image" in kinds):
        raise ValueError(f"the {role}'s turn holds {kinds}, not text (or of the user, images)")
    texts = [part.get("text") for part in content if part["type"] == "text"]
    if not all(isinstance(text, str) and text.strip() for text in texts) or (role == "user" and not texts):
        raise ValueError(f"the {role}'s text is empty: {texts}")
    "".join(texts).encode()  # or it holds half a character, of which a tokenizer would make nothing
    return [part | ({"text": part["text"].strip()} if "text" in part else {}) for part in content]


def volume(data: Path, image: dict) -> Volume:
    """The volume that an image of a conversation is: a file, or the frames of a folder in their order."""
    path, modality = image.get("path", image.get("volume")), image.get("modality")
    if not isinstance(path, str) or not path or not isinstance(modality, str):
        raise ValueError(f"a volume needs a path and a modality: {path!r}, {modality!r}")
    frames = files.listed(data, path)
    frames = [path] if frames is None else frames
    wrong = [name for name in frames if not name.endswith(VOLUMES)]
    if wrong or not frames:
        raise ValueError(f"{wrong[0] if wrong else path + ', an empty folder,'} is none of {', '.join(VOLUMES)}")
    numbers = [[int(n) for n in re.findall(r"\d+", Path(name).name)] for name in frames]
    counting = [set(column) for column in zip(*numbers, strict=False) if len(set(column)) == len(frames)]
    if len(frames) > 1 and any(max(column) - min(column) >= len(frames) for column in counting):
        raise ValueError(f"{path}: of its {len(frames)} frames some are missing, {frames[0]} to {frames[-1]}")
    return Volume(modality, tuple(frames))
