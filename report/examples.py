"""Examples of any data folder or file, without a script: for the leakage check and answers of other programs."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from inputs import files, images, layouts
from inputs.questions import question_type
from inputs.task import Example, Problem, collect, named, split_of
from report.scoring import says_nothing


@dataclass(kw_only=True)
class AnyExample(Example):
    """An example of whatever layout. Its `answer` is as it was read, also where that is no text or says nothing."""

    heard: str | None = None  # the recording of a question, which may be asked in two splits

    @property
    def shown(self) -> list[str]:
        return [name for name in self.media if name != self.heard] or self.media


def read(path: Path, split=None, endovis=None, media: Path | None = None) -> tuple[list[AnyExample], list[Problem]]:
    """The examples of a data folder, whichever script it is for, or of one file; and what is no example.

    `split` is that of a file's examples; `endovis` one of layouts.ENDOVIS, for that data set; `media` where its media
    are, if not beside.
    """
    media = media or (path if path.is_dir() else path.parent)
    found = layouts.entries(path, media, endovis)
    return collect(((w, s or split, e) for w, s, e in found), partial(make_example, media))


def make_example(data: Path, where: str, split: str | None, entry: dict) -> AnyExample:
    try:
        media, name, heard = media_of(data, entry), named(entry, "id", where), named(entry, "audio", None)
        shown = [file for file in media if file != heard] or media
        alone = [entry[key] for key in ("group", "video_id", "video") if entry.get(key) not in (None, "")]
        groups = [str(group) for group in entry.get("groups") or [*alone, *shown, name][:1]]
        answers = [entry[key] for key in ("short_answer", "answer") if not says_nothing(entry.get(key))]
        # without the marks of what is shown, which may stand before it or after
        question = re.sub(r"<(?:image|video)>", " ", str(entry.get("question") or "")).strip()
        kind = question_type(question) if question else "caption" if shown else "text"
        return AnyExample(
            where=where,
            split=split or split_of(groups[0]),
            id=name,
            group=groups[0],
            groups=groups,
            media=media,
            heard=heard,
            question=question,
            answer=answers[0] if answers else entry.get("answer"),
            also_right=[str(form) for form in answers[1:]],
            question_type=named(entry, "question_type", kind),
            candidates=None,
            history=list(entry.get("history") or (entry.get("turns") or [])[:-1]),
        )
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"not as examples are written ({error}); fix it") from None


def media_of(data: Path, entry: dict) -> list[str]:
    """The files that an entry names, in the order in which they are shown; a folder stands for the files in it."""
    found = [images.find(data, str(entry[field])) for field in images.FIELDS if entry.get(field)][:1]
    frames = entry.get("frames") or []
    found += map(str, frames if isinstance(frames, list) else [frames])
    found += [name for volume in entry.get("volumes") or [] for name in volume.files]
    if entry.get("video"):
        found += files.listed(data, str(entry["video"])) or [str(entry["video"])]
    return found + ([str(entry["audio"])] if entry.get("audio") else [])
