"""Small data folders in every layout that a script reads, and mutations of them, for inputs/test_fuzz.py."""

import csv
import json
import os
import random
import wave
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

import train_llava_med
import train_qwen2vl_sentinel
import train_surg_video_vqa
import train_umbrella_mri
import train_video_plain_lm

SPLITS = {"train": 2, "val": 1, "test": 1}  # how many patients, videos or subjects of each
QUESTIONS = {"Is there a polyp?": ("yes", "no"), "What color is it, à peu près?": ("red", "blue")}
VOLUME = (16, 16, 16)  # of modality T1 in patches of 8


# ---- data folders ---------------------------------------------------------------------------------------------------


def each(data: Path, medium):
    """(split, name, what medium(file without suffix) wrote, question, answer) of two questions for each patient."""
    for split, count in SPLITS.items():
        for i in range(count):
            (data / "media").mkdir(exist_ok=True)
            shown = medium(data / "media" / f"{split}{i}")
            for k, (question, answers) in enumerate(QUESTIONS.items()):
                yield split, f"{split}{i}", f"{split}{i}q{k}", shown, question, answers[(i + len(split)) % 2]


def draw(path: Path, shape=(40, 56, 3)) -> np.ndarray:
    return np.random.default_rng(list(str(path.name).encode())).integers(0, 255, shape, dtype=np.uint8)


def picture(path: Path, suffix=".png") -> str:
    path = path.with_name(path.name + suffix)
    Image.fromarray(draw(path)).save(path)
    return f"media/{path.name}"


def recording(path: Path, suffix=".wav") -> str:
    samples = draw(path, 3000).astype("<i2") * 90
    with wave.open(f"{path}.wav", "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    if suffix != ".wav":
        import soundfile

        soundfile.write(f"{path}{suffix}", samples, 16000)
        Path(f"{path}.wav").unlink()
    return f"media/{path.name}{suffix}"


def volume(path: Path, suffix=".npy") -> str:
    voxels = draw(path, VOLUME).astype(np.float32)
    if suffix == ".npy":
        np.save(f"{path}.npy", voxels)
    else:
        nibabel.save(nibabel.Nifti1Image(voxels.astype(np.int16), np.eye(4)), f"{path}{suffix}")
    return f"media/{path.name}{suffix}"


def film(path: Path) -> str:
    """In turn a folder of frames, an animation, an array."""
    frames = draw(path, (4, 40, 56, 3))
    kind = list(SPLITS).index(path.name[:-1]) + int(path.name[-1])
    if kind == 0:
        path.mkdir()
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(path / f"{i}.jpg")
        return f"media/{path.name}"
    if kind == 1:
        first, *others = map(Image.fromarray, frames)
        first.save(f"{path}.gif", save_all=True, append_images=others)
        return f"media/{path.name}.gif"
    np.save(f"{path}.npy", frames)
    return f"media/{path.name}.npy"


def write(path: Path, rows: list) -> None:
    """JSON lines, a list, a single object, or a table with a header, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            names = list(dict.fromkeys(key for row in rows for key in row))
            table = csv.DictWriter(file, names, quoting=csv.QUOTE_ALL)
            table.writeheader()
            table.writerows(rows)
        return
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "".join(f"{line}\n" for line in lines) if path.suffix == ".jsonl" else json.dumps(rows, ensure_ascii=False)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def write_splits(data: Path, rows: list[tuple[str, dict]], name="{}.jsonl") -> None:
    for split in SPLITS:
        write(data / name.format(split), [row for of, row in rows if of == split])


def plain(data: Path, field="image", medium=picture, suffix=".jsonl", **more) -> None:
    found = []
    for split, group, id, shown, question, answer in each(data, medium):
        row = {"id": id, **({field: shown} if shown else {}), "question": question, "answer": answer, "group": group}
        row |= more
        found.append((split, row | ({"answer_candidates": ["yes", "no"]} if more and answer in "yesno" else {})))
    write_splits(data, found, f"{{}}{suffix}")


def conversations(data: Path, field="image", mark="<image>", medium=picture, suffix=".json") -> None:
    found = {}
    for split, group, _, shown, question, answer in each(data, medium):
        row = found.setdefault(group, (split, {"id": group, field: shown, "conversations": []}))[1]
        asked = question if row["conversations"] else f"{mark}\n{question}"
        row["conversations"] += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    write_splits(data, list(found.values()), f"{{}}{suffix}")


def endovis(data: Path) -> None:
    for number in (*range(1, 8), *range(9, 13), 14, 15, 16):
        folder = data / f"seq_{number}"
        (folder / "vqa" / "Classification").mkdir(parents=True)
        (folder / "left_fr").mkdir()
        Image.fromarray(draw(folder)).save(folder / "left_fr" / "frame001.png")
        lines = [f"{question}|{answers[number % 2]}\n" for question, answers in QUESTIONS.items()]
        (folder / "vqa" / "Classification" / "frame001_QA.txt").write_text("".join(lines), encoding="utf-8")


def surgvivqa(data: Path) -> None:
    found = []
    for split, video, id, _, question, answer in each(data, lambda path: ""):
        split = "eval" if split == "val" else split
        for folder in (data / "frames" / video, data / "audio" / f"out_{video}"):
            folder.mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.fromarray(draw(Path(f"{video}_{i}"))).save(data / "frames" / video / f"{video}_{i}.jpg")
        recording(data / "audio" / f"out_{video}" / id, ".mp3")
        row = {"id": id, "video_id": video, "frames": [f"{video}_{i}" for i in range(2)], "frame_numbers": [0, 1]}
        row |= {"question": question, "question_type": "any", "answer": f"It is {answer}.", "short_answer": answer}
        found.append((split, row))
    (data / "media").rmdir()
    for split in ("train", "eval", "test"):
        write(data / f"{split}_multivideo.jsonl", [row for of, row in found if of == split])


def clips(data: Path) -> None:
    found = []
    for split, video, id, frame, question, answer in each(data, picture):
        sound = recording(data / "media" / id, ".flac" if id.endswith("1") else ".wav")
        row = {"id": id, "video_id": video, "frames": [frame], "audio": sound, "question": question, "answer": answer}
        found.append((split, row))
    write_splits(data, found)


def umbrella(data: Path, suffix: str, lines: bool = False) -> None:
    found = []
    for split, subject, id, path, question, answer in each(data, partial(volume, suffix=suffix)):
        image = {"type": "image", "modality": "T1", "image_path": path}
        turns = [
            ("user", [image, {"type": "text", "text": question}]),
            ("assistant", [{"type": "text", "text": answer}]),
        ]
        row = {"task_id": id, "task_type": "T1", "subject_ids": [subject], "modalities": ["T1"]}
        row |= {"images": [{"path": path, "token": "<image>", "modality": "T1"}]}
        row |= {"conversations": [{"role": role, "content": content} for role, content in turns]}
        found.append(("validation" if split == "val" else split, row | {"metadata": {"subject_label": answer}}))
    for split, row in found if not lines else []:
        write(data / split / f"{row['task_id']}.json", row)
    for split in ("train", "validation", "test") if lines else []:
        write(data / f"{split}_conversations.jsonl", [row for of, row in found if of == split])


def messages(data: Path) -> None:
    found = []
    for split, group, id, shown, question, answer in each(data, picture):
        content = [{"type": "image", "image": shown}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        found.append((split, {"id": id, "messages": turns, "group": group}))
    write_splits(data, found)


T1 = ["--modality", "T1:16x16x16:8x8x8"]
VIDEO, VOLUMES = train_video_plain_lm, train_umbrella_mri
LAYOUTS = {  # name: (script, flags, how a folder is written)
    "JSON lines": (train_llava_med, [], plain),
    "JSON list": (train_llava_med, [], partial(plain, suffix=".json", medium=partial(picture, suffix=".jpg"))),
    "conversations": (train_llava_med, [], conversations),
    "CSV": (train_llava_med, [], partial(plain, suffix=".csv")),
    "messages": (train_llava_med, [], messages),
    "EndoVis": (train_llava_med, ["--endovis", "paper"], endovis),
    "typed": (train_qwen2vl_sentinel, [], partial(plain, field="image_filename", question_type="any")),
    "SurgViVQA": (train_surg_video_vqa, [], surgvivqa),
    "clips": (train_surg_video_vqa, ["--question", "both"], clips),
    "UMBRELLA .npy": (VOLUMES, T1, partial(umbrella, suffix=".npy")),
    "UMBRELLA .nii.gz": (VOLUMES, T1, partial(umbrella, suffix=".nii.gz")),
    "UMBRELLA lines": (VOLUMES, T1, partial(umbrella, suffix=".npy", lines=True)),
    "volumes": (VOLUMES, T1, partial(plain, field="volume", medium=partial(volume, suffix=".nii"), modality="T1")),
    "videos": (VIDEO, [], partial(conversations, field="video", mark="<video>", medium=film)),
    "video lines": (VIDEO, [], partial(plain, field="video", medium=film)),
    "texts": (VIDEO, [], partial(plain, medium=lambda path: "")),
}


# ---- mutations ------------------------------------------------------------------------------------------------------


@dataclass
class Mutation:
    """What was done to a folder, and what a reading of it may show."""

    text: str
    files: list[str] = field(default_factory=list)  # of the folder: a fault names one of them
    rows: list[str] = field(default_factory=list)  # "train.jsonl:3": a fault names one; only their examples may differ
    exact: bool = False  # nothing else than the same examples will do
    differs: bool = False  # may other content, undetectable, come out?
    new: str | None = None  # a field that must be read or listed as unread
    lost: bool = False  # may the file's examples be gone?
    said: str = ""  # what is printed where other content comes out


def annotations(data: Path) -> list[Path]:
    return sorted(path for path in data.rglob("*") if path.suffix in (".jsonl", ".json", ".txt", ".csv"))


def media(data: Path) -> list[Path]:
    return sorted({path for path in data.rglob("*") if path.is_file()} - set(annotations(data)))


def read(data: Path, path: Path) -> tuple[list[dict], list[str], list[dict] | dict]:
    """(rows, what faults call them, the file's value); the rows stand in the value and can be changed there."""
    text, name = path.read_text(encoding="utf-8"), str(path.relative_to(data))
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.split("\n") if line]
        return rows, [f"{name}:{i}" for i in range(1, len(rows) + 1)], rows
    if path.suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
        return rows, [f"{name}:{i}" for i in range(2, len(rows) + 2)], rows  # the first line is the header
    value = json.loads(text)
    return (
        (value, [f"{name}[{i}]" for i in range(len(value))], value)
        if isinstance(value, list)
        else ([value], [name], value)
    )


def slots(value):
    """(container, key) of everything within a row."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []:
        yield value, key
        yield from slots(value[key])


def in_rows(change):
    """A mutation of a file's rows: change(draw, rows, data) -> (which rows, Mutation), or None where nothing fits."""

    def mutate(draw: random.Random, data: Path):
        path = draw.choice([path for path in annotations(data) if path.suffix != ".txt"] or [None])
        if path is None:
            return None
        rows, names, value = read(data, path)
        found = change(draw, rows, data)
        if found is None:
            return None
        which, mutation = found
        mutation.rows, mutation.files = [names[i] for i in which], [str(path.relative_to(data))]
        write(path, value)
        mutation.text = f"{', '.join(mutation.rows) or path.relative_to(data)}: {mutation.text}"
        return mutation

    return mutate


OTHER_NAMES = (
    "Question",
    "zzz",
    "media",
    "image_path",
    "options",
    "split",
    "patient_id",
    "video_path",
    "frames",
    "ref",
    "text",
)
VALUES = [None, 5, -1, 1.5, True, False, [], {}, "", " ", "\ud800", "a\0b", "../x", "/", ".", "x" * 300, float("nan")]
VALUES += [[["a"]], {"a": "b"}, "<image>", "</s>", "<ANS>", 10**400, "\u2028", "nan"]
ADDED = {"zzz": 5, "options": ["a", "b"], "system": "Be brief.", "patient_id": "p7", "split": "other", "start": 3}


@in_rows
def renamed(draw, rows, data):
    i = draw.randrange(len(rows))
    where, key = draw.choice([slot for slot in slots(rows[i]) if isinstance(slot[0], dict)])
    at = draw.randrange(len(key))
    name = draw.choice([key[:at] + key[at + 1 :], key.upper(), key + "s", *OTHER_NAMES])
    if name in where:
        return None
    new = name if where is rows[i] else None
    items = [(name if other == key else other, value) for other, value in where.items()]
    where.clear()
    where.update(items)
    return [i], Mutation(f"{key} -> {name}", differs=True, new=new)


@in_rows
def removed(draw, rows, data):
    i = draw.randrange(len(rows))
    where, key = draw.choice(list(slots(rows[i])))
    del where[key]
    return [i], Mutation(f"{key} removed", differs=True)


@in_rows
def added(draw, rows, data):
    i, shown = draw.randrange(len(rows)), [str(path.relative_to(data)) for path in media(data)]
    pool = ADDED | ({"ref_image": draw.choice(shown), "zzz": draw.choice([5, draw.choice(shown)])} if shown else {})
    key = draw.choice([key for key in pool if key not in rows[i]])
    rows[i][key] = pool[key]
    return [i], Mutation(f"{key} added: {pool[key]!r}", differs=True, new=key)


@in_rows
def retyped(draw, rows, data):
    i = draw.randrange(len(rows))
    where, key = draw.choice(list(slots(rows[i])))
    old = where[key]
    where[key] = draw.choice([*VALUES, [old], {"a": old}, str(old)])
    return [i], Mutation(f"{key}: {old!r} -> {str(where[key])[:60]!r}", differs=True)


@in_rows
def swapped(draw, rows, data):
    if len(rows) < 2:
        return None
    i, k = draw.sample(range(len(rows)), 2)
    key = draw.choice([key for key in rows[i] if key in rows[k]])
    rows[i][key], rows[k][key] = rows[k][key], rows[i][key]
    return [i, k], Mutation(f"{key} swapped", differs=True)


@in_rows
def duplicated(draw, rows, data):
    if len(rows) < 2:
        return None
    i = draw.randrange(len(rows))
    rows.append(rows[i])
    return [i], Mutation("duplicated")


@in_rows
def reordered(draw, rows, data):
    if len(rows) < 2:
        return None
    rows.reverse()
    return [], Mutation("rows reordered", exact=True)


def bytes_of(change, of=annotations):
    """A mutation of a file's bytes: change(draw, bytes, path) -> (bytes, Mutation), or None where nothing fits."""

    def mutate(draw: random.Random, data: Path):
        path = draw.choice(of(data) or [None])
        found = path and change(draw, path.read_bytes(), path)
        if not found:
            return None
        written, mutation = found
        path.write_bytes(written)
        name = str(path.relative_to(data))
        mutation.files, mutation.text = [name], f"{name}: {mutation.text}"
        return mutation

    return mutate


def cut(draw, old, path):
    at = draw.randrange(1, len(old) - 1)
    if path.suffix in (".jsonl", ".csv", ".txt") and b"\n" in old[at - 1 : at + 1]:
        return None  # a shorter file, and as right as the other
    left = old[:at].rpartition(b"\n")[2]
    if (path.suffix == ".txt" and b"|" in left) or (path.suffix == ".csv" and left.count(b'"') % 2 == 0):
        return None  # what is left of the last row is as right as all of it
    return old[:at], Mutation(f"cut at {at} of {len(old)}")


def flip(draw, old, path):
    at, bit = draw.randrange(len(old)), draw.randrange(8)
    new = bytearray(old)
    new[at] ^= 1 << bit
    return bytes(new), Mutation(f"bit {bit} of byte {at} flipped", differs=not path.name.endswith((".gz", ".png")))


def encoded(draw, old, path):
    kind = draw.choice(["utf-16", "utf-8-sig", "latin-1", "crlf"])
    text = old.decode()
    if kind == "crlf":
        return text.replace("\n", "\r\n").encode(), Mutation("CRLF", exact=True)
    new = text.encode(kind)
    return new, Mutation(kind, exact=kind == "utf-8-sig" or new == old)


def emptied(draw, old, path):
    return b"", Mutation("emptied")


def replaced(draw: random.Random, data: Path):
    """By a link, a folder, a FIFO; or another name; or not there any more."""
    path = draw.choice(annotations(data) + media(data) * 2)
    name, elsewhere = str(path.relative_to(data)), data.parent / "elsewhere"
    how = draw.choice(["link", "link out", "dangling link", "link to itself", "folder", "FIFO", "renamed", "gone"])
    kept = elsewhere if how == "link out" else data / "kept.other" if how == "link" else None
    if how == "renamed":
        new = path.rename(path.with_name("renamed" + path.suffix))
        mutation = Mutation(f"{name}: renamed", [name, str(new.relative_to(data))], differs=True)
        if path.parent == data:  # an annotation, which is read under its own name alone: then somebody must say so
            mutation.lost, mutation.said = True, new.name
        return mutation
    path.rename(kept) if kept else path.unlink()
    if "link" in how:
        path.symlink_to(kept or (path if how == "link to itself" else "nowhere"))
    elif how != "gone":
        path.mkdir() if how == "folder" else os.mkfifo(path)
    is_note = path.suffix in (".jsonl", ".json", ".txt", ".csv")
    mutation = Mutation(f"{name}: {how}", [name], exact=bool(kept), lost=how == "gone" and is_note)
    if how == "gone" and path.parent.parent == data / "media":  # one of the four frames of a folder
        mutation.differs, mutation.said = True, "" if path.stem in "03" else "missing between"
    return mutation


def another_split(draw: random.Random, data: Path):
    """A split's file under another name of its split, or beside one that has the same meaning."""
    found = [path for path in annotations(data) if path.parent == data and path.stem in SPLITS]
    if not found:
        return None
    path = draw.choice(found)
    name = draw.choice([name for name in ("validation", "valid", "dev", "eval") if name != path.stem])
    new = path.with_stem(name)
    if path.stem == "val":
        path.rename(new)
        return Mutation(f"{path.name} -> {new.name}", [path.name, new.name], exact=True)
    path.rename(new)  # beside val
    return Mutation(f"{path.name} -> {new.name}, beside val", [path.name, new.name])


MUTATIONS = {
    "field renamed": renamed,
    "field removed": removed,
    "field added": added,
    "type changed": retyped,
    "values swapped": swapped,
    "row duplicated": duplicated,
    "rows reordered": reordered,
    "annotation cut": bytes_of(cut),
    "annotation bit": bytes_of(flip),
    "encoding": bytes_of(encoded),
    "emptied": bytes_of(emptied, lambda data: annotations(data) + media(data)),
    "medium cut": bytes_of(cut, media),
    "medium bit": bytes_of(flip, media),
    "file replaced": replaced,
    "another split": another_split,
}


def mutate(data: Path, seed: str) -> tuple[str, Mutation]:
    """Changes one thing in a folder, drawn from the seed: (the kind of mutation, what was done)."""
    draw = random.Random(seed)
    while True:
        kind = draw.choice(list(MUTATIONS))
        found = MUTATIONS[kind](draw, data)
        if found:
            return kind, found
