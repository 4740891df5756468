"""Videos: folders of frames, animations, arrays; and the features of a frozen tower on disk."""
from pathlib import Path
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch

from _old import plain as _plain
from _old import runtime as _old
from _old import surg as _surg

evenly = _surg.choose_frames  # (names, count)
measure = _plain.measure


def frames(entry):
    return _surg.find_frames(None, entry, published=False)


def find(data, video, fast, slow):
    """([its file], None), or of a folder (the frames that are read, how many it holds): frame_2 before frame_10."""
    return _plain.find_video(data, video, SimpleNamespace(fast_frames=fast, slow_frames=slow))


def read_frames(data, files, wanted, contents=None):
    """The `wanted` frames of a video, RGB. Raises ValueError where it is not what it was (sha256 `contents`)."""
    if contents:
        try:
            now = [_old.file_sha256(_old.inside(data, name)) for name in files]
        except OSError as error:
            raise ValueError(f"{files[0]} cannot be read: {error}") from None
        changed = [name for name, old, new in zip(files, contents, now, strict=True) if old != new]
        if changed:
            raise ValueError(f"{changed[0]} has changed since it was checked; start again")
    if len(files) == 1:
        frames = list(_plain.read_frames(data, files[0], wanted))
    else:
        frames = [frame for name in files for frame in _plain.read_frames(data, name)]
    if len(frames) != len(wanted):
        raise ValueError(f"{files[0]} has other frames than when it was checked; start again")
    return frames


class Media(NamedTuple):
    """What a prompt tree shows: files, which frames of them are read, and which of these are on either path."""

    files: list[str]
    frames: list[int]
    fast: list[int]
    slow: list[int]


@dataclass
class Video:
    """A video of a packed sequence: its pixels, or the features that the tower has already found in them."""

    fast: list[int]  # which of its frames are on the fast path
    slow: list[int]
    pixels: torch.Tensor | None  # (frames, 3, height, width)
    features: torch.Tensor | None  # (frames, patches, width of the tower)
    cached_as: Path | None  # where its features belong

    @property
    def frames(self):
        return len(self.features if self.pixels is None else self.pixels)

    def keep(self, features):
        """Into the cache, beside the name, then renamed: several ranks and runs may use one folder."""
        if self.cached_as:
            _plain.write_features(self.cached_as, features)


def choose(count, fast, slow):
    """Which of `count` frames are read, and which of these are on the fast and on the slow path."""
    return _plain.choose_frames(count, SimpleNamespace(fast_frames=fast, slow_frames=slow))


def count(files, of_folder, measured):
    """The frames of a video. Raises ValueError where a frame of a folder is itself an animation."""
    several = [name for name in files if measured[name][0] != 1]
    if of_folder and several:
        raise ValueError(f"{several[0]} holds {measured[several[0]][0]} frames; in a folder each file is one")
    return of_folder or measured[files[0]][0]


class Cache:
    """Reads videos; with a folder, the features that a frozen tower has found in them before, instead of pixels."""

    def __init__(self, folder, processor):
        self.folder, self.processor, self.tower = folder, processor, ""

    def belongs_to(self, tower):
        """The tower whose features these are, before it is put on a device: known by a digest of its weights."""
        if self.folder and not next(tower.parameters()).is_meta:
            self.tower = _plain.tower_digest(tower)

    def read(self, data, media, measured):
        contents, path = [measured[name][1] for name in media.files], None
        if self.folder:  # the name says all that features depend on: tower, processor, the video's bytes, its frames
            key = _old.fingerprint([self.tower, self.processor.to_dict(), contents, media.frames])
            path = Path(self.folder) / key[:2] / f"{key}.safetensors"
            features = _plain.read_features(path)
            if features is not None:
                return Video(media.fast, media.slow, None, features, path)
        pictures = read_frames(data, media.files, media.frames, contents if self.folder else None)
        return Video(media.fast, media.slow, self.processor(pictures, return_tensors="pt")["pixel_values"], None, path)
