"""The fields of an entry as a file has it: which are read, under which names, and what becomes of all others.

Fields that are not read are listed with their counts. One that would change what is asked or shown is a fault.
"""

import difflib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from inputs import sound, turns, videos
from inputs.files import SPLIT_NAMES

# what an example belongs to, by whichever of these names, the coarsest first: a patient may not be in two splits
GROUPS = ("patient", "mrn", "subject", "case", "study", "exam", "procedure")
GROUPS = [name + end for name in GROUPS for end in ("id", "ids", "uid", "instanceuid", "name", "s", "")] + ["videoid"]
# what is read of a turn, and of a part of one
TURN = ("from", "value", "role", "content", "type", "text", "image_path", "modality", "token")
SPLITS = ("split", "subset", "partition", "set", "phase")
# ref_image, audio_path, video; of the second kind only what has a file's ending, or is there
MEDIUM = r"(?:\w+_)?(?:{})s?(?:_(?:path|file|filename|name|list|dir|folder)s?)?"
MEDIUM = re.compile(MEDIUM.format("image|img|picture|photo|video|vid|clip|audio|wav|speech|recording|media"))
HEARD = re.compile("audio|wav|speech|recording|sound")
NO_NAME = re.compile(r"(?i)yes|no|true|false|[\d.]*|(?s:.*[\s:].*)")
PATH = re.compile(r"(?:\w+_)?(?:frame|sound|volume|scan|nifti|path|file|filename|folder|dir|url|src|visual)s?")
SEGMENT = r"(?:(?:clip|frame|t|time|video)_)?(?:start|end|begin|stop)(?:_(?:time|frame|sec|seconds|s|idx|index))?"
SEGMENT = re.compile(rf"{SEGMENT}|segments?|time_range|timestamps")
CHANGES = re.compile(r"system|system_(?:prompt|text|message)|history|conversations\.loss")
OPTIONS = re.compile(r"(?!(?:is|has|num|n)_|multiple_choice$)(?:.*[_ ])?(?:option|choice)s?(?:[_ ].*)?|[a-e]")
OTHER_MEDIA = (".bmp", ".tif", ".tiff", ".webp", ".mp4", ".avi", ".mov", ".webm", ".mkv", ".dcm", ".ogg", ".m4a", ".pt")
MEDIA = (*videos.FILES, *sound.FILES, *turns.VOLUMES, *OTHER_MEDIA)


def read(data: Path, split: str | None, entry: dict, known: set[str] | None) -> tuple[str | None, dict]:
    """(split, entry): its split, and the entry with its `group`, by whichever of their usual names.

    entry["unread"] lists fields outside `known` that are not read; entry["grouped"] names the field of the group, and
    entry["second_group"] is another. Raises ValueError for a field that is misspelt or must be read, unless known=None.
    """
    others = {name: value for name, value in flat(entry, known or ()) if value not in (None, "", [], {})}
    named = others if entry.get("video_id") in (None, "") else {"video_id": entry["video_id"], **others}
    groups = [name for name, value in named.items() if is_group(name, value) and (known or type(value) is not list)]
    grouped = min(groups, key=lambda name: GROUPS.index(plain(name)), default=None)
    names = {name: parts(name)[-1] for name in others}
    splits = [name for name in names if names[name] == "split" or (names[name] in SPLITS and named_split(others[name]))]
    unread = [name for name in others if name not in ("group", grouped, *splits)]
    for name in splits:
        split = split_of(name, others[name], split)
    for name in unread if known is not None else []:
        refuse(data, name, others[name], frozenset(known), entry)
    found = one_name(grouped, named[grouped]) if grouped else None
    if entry.get("group") not in (None, ""):
        second = {"second_group": f"{grouped} {found}"} if grouped and plain(grouped) != "videoid" else {}
        grouped, found = "group", one_name("group", entry["group"])
        entry = {**entry, **second}
    return split, {**entry, "group": found, "unread": unread, "grouped": grouped}


def is_group(name: str, value) -> bool:
    """Does a field say what an example belongs to? A `subject` "Radiology" or a `study` "ADNI" has no number in it."""
    loose = plain(name) in ("subject", "case", "study", "exam", "procedure")
    return plain(name) in GROUPS and not isinstance(value, bool) and not (loose and not re.search(r"\d", str(value)))


def one_name(name: str, value) -> str:
    """What an example belongs to; 7.0, as pandas writes 7 where others are missing, is 7. Raises ValueError."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(value) not in (str, int):
        raise ValueError(f"{name} must be one name: {value!r}")
    return str(value)


def refuse(data: Path, name: str, value, known: frozenset[str], entry: dict) -> None:
    """Raise ValueError where a field that is not known may not be left out."""
    meant = next((f for f in alike(name, known) if f not in entry and not SEGMENT.fullmatch(f)), None)  # state, start
    if meant:
        raise ValueError(f"unknown field {name!r}; did you mean {meant!r}?")
    last, said = parts(name)[-1], list(texts(value))
    if (OPTIONS.fullmatch(parts(name)[0]) and said) or CHANGES.fullmatch(name.lower()):
        raise ValueError(f"{name!r} changes what is asked, but is not read: write it into the question, or remove it")
    if SEGMENT.fullmatch(last) and (not said or re.fullmatch(r"[\d:.]+", said[0])):  # "rectum" is no part of a clip
        raise ValueError(f"{name!r} cuts out a part, but is not read: cut it into a clip of its own, or remove it")
    if any(is_medium(data, last, text, known, entry) for text in said):
        ours = ", ".join(media_fields(known))
        raise ValueError(f"{name!r} names a medium that would not be shown: rename it ({ours} is read), or remove it")


def flat(entry: dict, known) -> Iterator[tuple]:
    """(name, value) of each field that is not known; of a dict, "meta.split", and of turns for each of their own."""
    for name, value in entry.items():
        inner = [value] if isinstance(value, dict) and name not in known else []
        if name == "conversations" and isinstance(value, list):
            inner = [turn for turn in value if isinstance(turn, dict)]
            contents = [turn["content"] for turn in inner if isinstance(turn.get("content"), list)]
            inner += [part for content in contents for part in content if isinstance(part, dict)]
        yield from ((f"{name}.{key}", one[key]) for one in inner for key in one if key not in TURN)
        if name == "metadata" and isinstance(value, dict) and name in known and value.get("split"):
            yield f"{name}.split", value["split"]
        if name not in known and not inner:
            yield name, value


@functools.lru_cache(10_000)
def parts(name: str) -> list[str]:
    """["meta", "image_path"] of "meta.imagePath" """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split(".")


@functools.lru_cache(10_000)
def plain(name: str) -> str:
    """How a group is looked up: "patientid" for "meta.PatientID" and "patient_id"."""
    return parts(name)[-1].replace("_", "")


@functools.lru_cache(10_000)
def alike(name: str, known: frozenset[str]) -> list[str]:
    """The known fields that an unknown one is spelt like; of short ones (qid is not id) and inner ones none."""
    found = [] if len(name) < 4 or "." in name else difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.8)
    last = parts(name)[0].rpartition("_")[2]  # image_width is not image_id
    return [field for field in found if difflib.get_close_matches(last, [field.rpartition("_")[2]])]


@functools.lru_cache
def media_fields(known: frozenset[str]) -> list[str]:
    return sorted(field for field in known if MEDIUM.fullmatch(field) or field in ("frames", "volume"))


def named_split(value) -> str | None:
    """The split that a value names, by any of its usual names."""
    return SPLIT_NAMES.get(str(value).strip().lower())


def split_of(name: str, value, of_file: str | None) -> str:
    """The split that a field names. Raises ValueError where it names none, or another than the file."""
    found = named_split(value)
    if found is None:
        text = f"{name} {value!r} is none of {', '.join(SPLIT_NAMES)}; correct it"
        raise ValueError(f"{text}, or where it cuts out a part, cut that into a clip of its own")
    if of_file not in (None, found):
        raise ValueError(f"{name} {value!r}, but its file is the one of {of_file}; move it, or correct the field")
    return found


def is_medium(data: Path, name: str, text: str, known: frozenset[str], entry: dict) -> bool:
    """Does a field of this name say by this text which file should be shown, and is not?

    A `video` "VID01" beside the image from it names none, and one where nothing else is shown may.
    """
    named, suffixed = MEDIUM.fullmatch(name), text.lower().endswith(MEDIA)
    if not (named or suffixed or PATH.fullmatch(name)) or NO_NAME.fullmatch(text):
        return False
    ours = [field for field in media_fields(known) if bool(HEARD.search(field)) == bool(HEARD.search(name))]
    shown = [form for field in ours for form in texts(entry.get(field))]
    if text in shown or text in map(os.path.basename, shown):
        return False
    return bool(named and (suffixed or not shown)) or os.path.exists(data / text)


def texts(value) -> Iterator[str]:
    """Every text in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)
