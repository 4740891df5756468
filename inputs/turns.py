"""Conversations as they are published: LLaVA's turns and UMBRELLA's, taken apart into an entry for each answer."""

from pathlib import Path

from inputs import files, numbered
from inputs.task import as_text, named, split_of
from inputs.volumes import Volume

VOLUMES = (".nii", ".nii.gz", ".img", ".mgz", ".mgh", ".npy", ".npz")


# --- "messages": [{"role": "user", "content": "<image>\nWhat?" or [{"type": "image"}, …]}, …], "images": ["a.jpg"]


def messages(entry: dict) -> dict:
    """The entry, its "messages" as LLaVA's conversations, with the media that their parts name. Raises ValueError.

    A list in `image`, as LLaVA-Interleave has it, becomes `images`.
    """
    if isinstance(entry.get("image"), list) and entry.get("images") is None:
        entry = {**entry, "images": entry["image"], "image": None}
    if not entry.get("messages"):
        return entry
    entry, turns, said = dict(entry), [], {"image": [], "video": []}
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    for turn in entry.pop("messages"):
        content, value = turn["content"], ""
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            kind = part.get("type")
            if kind not in ("text", *(said if turn["role"] == "user" else ())):
                text = f"a part of the kind {kind!r} of the {turn['role']} changes what is asked, but is not read"
                raise ValueError(f"{text}; remove it, or write it otherwise")
            if name := part.pop(kind, None) if kind in said else None:
                said[kind].append(name)
            value += f"<{kind}>" if kind in said else as_text(part["text"], "a turn's text")
        turns.append({**turn, "from": roles.get(turn["role"]), "value": value})
    asked = [turn for turn in turns if turn["from"] == "human"]
    for kind, own in said.items():
        names = entry.pop(f"{kind}s", None) or own or ([entry[kind]] if entry.get(kind) else [])
        if not isinstance(names, list):
            raise ValueError(f"{kind}s must be a list of names, none empty: {names!r}")
        if own not in ([], names):
            raise ValueError(f"{kind}s lists {names}, but the conversation names {own}; keep one of the two")
        names = [name["path"] if isinstance(name, dict) else name for name in names]
        if len(names) == 1 and entry.get(kind) in (None, "", names[0]):
            entry[kind] = names[0]
        elif names:
            entry[f"{kind}s"] = names
        if asked and not any(f"<{kind}>" in turn["value"] for turn in asked):  # shown first
            asked[0]["value"] = f"<{kind}>" * len(names) + asked[0]["value"]
    return entry | {"conversations": turns}


# --- LLaVA: "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A polyp."}]


def llava(where: str, split: str | None, entry: dict, mark: str, field: str | None):
    """(where, split, entry) for each answer, with the turns before it as its `history`. Raises ValueError.

    An entry without conversations stays as it is. With `field` the first turn must hold `mark` once if the entry has
    that field, and otherwise not at all. A single mark in the first turn moves to its start, as in LLaVA's training;
    others stay (see images.placed). Several answers get numbered IDs. LLaVA-ST's pictures are videos of one frame.
    """
    if field and named(entry, "image", None) and not named(entry, field, None):
        entry, mark = {**entry, field: entry["image"]}, "<image>"
    if entry.get("conversations") is None:
        yield where, split, with_history(entry)
        return
    if any(entry.get(name) not in (None, "", []) for name in ("question", "answer", "history")):
        raise ValueError("question, answer or history beside conversations, of which one would not be read; keep one")
    turns = entry["conversations"]
    if turns and isinstance(turns[0], dict) and turns[0].get("from") == "system":
        if field or entry.get("system"):
            text = "is not read" if field else "stands beside the field system"
            raise ValueError(f"a system text changes what is asked, but {text}; remove it, or write it otherwise")
        entry, turns = {**entry, "system": turns[0].get("value")}, turns[1:]
    roles = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if not turns or roles != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"turns must alternate human, gpt; there are {roles}")
    said = {"human": "the question's value", "gpt": "the answer's value"}
    texts = ["" if turn.get("value") is None else as_text(turn["value"], said[turn["from"]]) for turn in turns]
    marks = [text.count(mark) for text in texts[::2]]
    if field and marks[0] != (named(entry, field, None) is not None):
        raise ValueError(f"the first turn must hold {mark} once where the entry names a {field}, and not otherwise")
    if field or marks[0] == sum(marks) == 1:
        texts[0] = ("" if field else mark) + texts[0].replace(mark, "")
    history, several = [], len(texts) > 2
    if several and entry.get("answer_candidates"):
        text = "answer_candidates are those of one question, but there are several"
        raise ValueError(f"{text}: write an entry for each, with the turns before it as its history")
    if not all(text.strip() for text in texts[2::2]):
        raise ValueError("a later question is empty; write it, or leave the turns from there on out")
    for number, (question, answer) in enumerate(zip(texts[::2], texts[1::2], strict=True)):
        found = {key: value for key, value in entry.items() if key != "conversations"}
        found |= {"question": question, "answer": answer, "history": list(history)}
        if several:
            found["id"] = f"{named(entry, 'id', where)}.{number}"
        if not field:
            found["of_conversation"] = sum(marks), where
        elif several:  # in one group, because later turns repeat what earlier ones have answered
            found["group"] = named(entry, "group", named(entry, field, where))
        yield (f"{where} turn {number}" if several else where), split, found
        history.append((question.strip(), answer.strip()))


def with_history(entry: dict) -> dict:
    """The entry, the questions and answers of its `history`, where it has one, as texts. Raises ValueError."""
    history = entry.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise ValueError(f"history must be a list of [question, answer]: {history!r}")
    turns = [tuple(as_text(text, "each text of history").strip() for text in turn) for turn in history]
    return {**entry, "history": turns} if turns else entry


# --- UMBRELLA: "images": [{"path", "modality"}], "conversations": [{"role": "user", "content": [{"type": "image"}, …]}]

FIELDS = {"id", "volume", "modality", "images", "question", "answer", "question_type", "answer_candidates", "group"}
FIELDS |= {"task_id", "task_type", "subject_ids", "modalities", "conversations", "metadata"}  # UMBRELLA's


def umbrella(data: Path, where: str, split: str | None, entry: dict, supervise: str):
    """(where, split, entry) of a conversation's last answer; of training with supervise="all", of each.

    An entry has id, groups, volumes, turns (what comes before the answer, as a chat template reads it), question (the
    last of it), answer, question_type, answer_candidates, metadata. Raises ValueError.
    """
    groups = subjects(entry)
    split = split or split_of(groups[0])
    turns, volumes = read_turns(data, entry)
    task, last = entry.get("task_type") or entry.get("question_type"), len(turns) - 1
    if entry.get("task_type") and entry.get("question_type") == "number":
        task = f"{task}:number"  # a type of its own: nobody averages ages with scores
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
            "unread": entry.get("unread", []),
        }
        if i < last:  # an acknowledgement, say: a task of its own, without labels
            found |= {"id": f"{name} turn {i}", "question_type": f"{task or 'conversation'} turn {i}"}
            found |= {"answer_candidates": None, "metadata": None}
        yield (where if i == last else f"{where} turn {i}"), split, found


def subjects(entry: dict) -> list[str]:
    """The subjects that a conversation shows, each once."""
    groups = entry.get("subject_ids") or []
    if isinstance(groups, list) and entry.get("group") and not (groups and entry.get("grouped") == "group"):
        groups = [*groups, entry["group"]]  # also a patient_id; but beside subjects "group" is a diagnosis or a site
    if isinstance(groups, list) and entry.get("second_group"):
        groups = [*groups, entry["second_group"]]
    if groups == []:
        raise ValueError("no subject_ids and no group: the scans of one subject must not be in two splits, so name it")
    if not isinstance(groups, list) or not all(type(group) in (str, int) and group != "" for group in groups):
        raise ValueError(f"subject_ids must be a list of names (or group one name): {groups!r}")
    return list(dict.fromkeys(map(str, groups)))


def read_turns(data: Path, entry: dict) -> tuple[list[dict], list[Volume]]:
    """The turns as the chat template reads them, and what each of their images is. Raises ValueError."""
    images, turns = entry.get("images", []), entry.get("conversations")
    if turns is None:  # a question with its volume or volumes
        images = [entry] if "volume" in entry else images
        asked = [*({"type": "image"} for _ in images), {"type": "text", "text": named(entry, "question", "")}]
        answered = [{"type": "text", "text": named(entry, "answer", "")}]
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
    content = [{"type": "text", "text": content}] if isinstance(content, str | int | float) else content
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content or []]
    if not kinds or not set(kinds) <= {"text", "image"} or (role != "user" and "image" in kinds):
        raise ValueError(f"the {role}'s turn holds {kinds}, not text (or of the user, images)")
    said = f"the {'answer' if role == 'assistant' else role}'s text"
    content = [
        part | ({"text": as_text(part.get("text"), said).strip()} if part["type"] == "text" else {}) for part in content
    ]
    texts = [part["text"] for part in content if part["type"] == "text"]
    if not all(texts) or (role == "user" and not texts):
        raise ValueError(f"the {role}'s text is empty: {texts}")
    return content


def volume(data: Path, image: dict) -> Volume:
    """The volume that an image of a conversation is: a file, or the frames of a folder in their order."""
    path, modality = image.get("path", image.get("volume")), image.get("modality")
    if not isinstance(path, str) or not path or not isinstance(modality, str):
        raise ValueError(f"a volume needs a path and a modality: {path!r}, {modality!r}")
    found = files.listed(data, path)
    frames = [path] if found is None else [name for name in found if not name.lower().endswith(".hdr")]  # with its .img
    empty = None if frames else f"{path}, an empty folder,"
    wrong = next((name for name in frames if not name.lower().endswith(VOLUMES)), empty)
    if wrong:
        text = "; write the tensor as .npy: np.save(name, torch.load(file, weights_only=True).float().numpy())"
        raise ValueError(f"{wrong} is none of {', '.join(VOLUMES)}{text if wrong.endswith('.pt') else ''}")
    other = next((name for name in frames[1:] if not numbered.numbers([frames[0], name])), None)
    if other:
        raise ValueError(f"{frames[0]} and {other} are not alike but for a number; move what is no frame elsewhere")
    if gap := numbered.uneven(tuple(frames)):
        raise ValueError(f"{gap}; restore them, or number those that are there anew")
    return Volume(modality, tuple(frames))
