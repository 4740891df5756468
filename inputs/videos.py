"""The frames of clips (listed frames, or a video file) and videos (also a folder, animation, array or one picture)."""

import math
import operator
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from inputs import content, numbered, video_files
from inputs.files import array_header, file_sha256, inside, listed
from inputs.images import MAX_PIXELS, open_image, open_images, refuse_unreadable, to_rgb
from inputs.task import named

FRAMES = (".jpg", ".jpeg", ".png")
FILES = (".gif", ".webp", ".apng", ".png", ".jpg", ".jpeg", ".npy")

# ---- which frames ----


def evenly(count: int, n: int) -> list[int]:
    """n of `count` frames, the first and (of two or more) the last among them; all where there are no more than n.

    One division, so that only a true half is rounded as one: 8 frames, 4 chosen, 7 / 3 apart, are 0 2 5 7.
    """
    if count <= n:
        return list(range(count))
    return [round(i * (count - 1) / max(1, n - 1)) for i in range(n)]


def clip(data: Path, entry: dict, most: int) -> tuple[list[str], str | None]:
    """(frames, whether some seem to be missing): those that an entry lists, or `most` of its video file's."""
    video, where = named(entry, "video", ""), part(entry)
    if entry.get("frames") and (in_file(video) or (video and (data / video).exists())):
        raise ValueError(f"frames beside video {video}, of which one would not be shown; keep one")
    if not in_file(video):
        return frames(entry), numbered.uneven(tuple(entry["frames"]))
    times = video_files.times(data, video, *where)
    return [video_files.frame_at(video, times[i]) for i in evenly(len(times), most)], None


def in_file(video: str | None) -> bool:
    """Is a video in a file that PyAV decodes?"""
    return bool(video) and video.lower().endswith(video_files.FILES)


def part(entry: dict) -> tuple[float, float]:
    """(start, end) in seconds of what is shown of an entry's video file. Raises ValueError where they are not."""
    given = {name: entry[name] for name in ("start", "end") if entry.get(name) not in (None, "")}
    if given and not in_file(named(entry, "video", None)):
        raise ValueError(f"start and end are of a video file ({', '.join(video_files.FILES)}), and video names none")
    try:
        start, end = float(given.get("start", 0)), float(given.get("end", math.inf))
    except (TypeError, ValueError):
        start = end = math.nan
    if not 0 <= start < end:
        raise ValueError(f"start and end must be seconds, 0 <= start < end: {given}")
    return start, end


def groups(entry: dict, *groups: str) -> list[str]:
    """What a clip belongs to: its groups, and its video file, of which another clip may show another part."""
    video = str(entry.get("video"))
    return list(dict.fromkeys([*groups, video] if in_file(video) else groups))


def frames(entry: dict) -> list[str]:
    """The files of a clip's frames, in the order of time. Raises ValueError where they are not, or no pictures."""
    names, numbers = entry.get("frames"), entry.get("frame_numbers")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"frames must be a list of files, in the order of time, or video a video file: {names!r}")
    if numbers is not None and (not isinstance(numbers, list) or [type(n) for n in numbers] != [int] * len(names)):
        raise ValueError(f"frame_numbers must be an integer for each of the {len(names)} frames: {numbers!r}")
    if numbers is not None and numbers != sorted(numbers):
        raise ValueError(f"frame_numbers {numbers} are not in the order of time: motion would be wrong")
    own = numbered.numbers(names)  # of each frame those in its name
    if own != sorted(own):
        i = next(i for i, (one, other) in enumerate(pairwise(own)) if one > other)
        raise ValueError(f"frames name {names[i]} before {names[i + 1]}: motion would be wrong; put them in order")
    same = max((sum(map(operator.eq, column, numbers or [])) for column in zip(*own, strict=True)), default=0)
    if len(names) > same > len(names) / 2:  # frames may be named by another count, but then hardly any agrees
        raise ValueError(f"frame_numbers {numbers} are not those of {names}; correct them, or leave them out")
    if not all(name.lower().endswith(FRAMES) for name in names):
        raise ValueError(f"frames must be files ending in {', '.join(FRAMES)}: {names}")
    return names


def find(data: Path, video: str, fast: int, slow: int, where=(0, math.inf)) -> tuple[list[str], int | None, str | None]:
    """([its file], None, None); of a folder the frames that are read, how many it holds, and whether some are missing.

    Frames are in the order of their numbers, frame_2 before frame_10. A video file is as a folder, `where` its part.
    """
    files = listed(data, video)  # a folder of frames may be named like the file that they come from
    if in_file(video) and (files is None or where != (0, math.inf)):
        times = video_files.times(data, video, *where)
        return [video_files.frame_at(video, times[i]) for i in choose(len(times), fast, slow)[0]], len(times), None
    known = (*FILES, *video_files.FILES) if files is None else FRAMES
    wrong = [name for name in ([video] if files is None else files) if not name.lower().endswith(known)]
    if wrong or files == []:
        raise ValueError(f"{wrong[0] if wrong else video + ', an empty folder,'} is none of {', '.join(known)}")
    if files is None:
        return [video], None, None
    bare = [name for name in files if not re.search(r"\d", name.rpartition("/")[2])]
    if 0 < len(bare) < len(files):
        raise ValueError(f"{bare[0]} has no number, as the frames beside it have; move what is no frame elsewhere")
    return [files[i] for i in choose(len(files), fast, slow)[0]], len(files), numbered.uneven(tuple(files))


def choose(count: int, fast: int, slow: int) -> tuple[list[int], list[int], list[int]]:
    """Which of `count` frames are read, and which of these are on the fast and on the slow path."""
    fast, slow = evenly(count, fast), evenly(count, slow)
    read = sorted({*fast, *slow})
    return read, [read.index(i) for i in fast], [read.index(i) for i in slow]


class Media(NamedTuple):
    """What a prompt tree shows: files, which frames of the video are read, and which of these are on either path."""

    files: list[str]
    frames: list[int]
    fast: list[int]
    slow: list[int]


# ---- reading them ----


def measure(data: Path, name: str) -> tuple[dict, str]:
    """A file, each frame decoded: what is measured of it, and its content."""
    frames, over_white = [], False
    for frame in read_frames(data, name):
        frames.append(content.of_picture(frame))
        over_white |= frame.info.get("over_white", False)
    found = {"size": frame.size, "over_white": over_white, "frames": len(frames), "sha256": file_sha256(data, name)}
    return found, content.of_frames(frames)


def count(files: list[str], of_folder: int | None, measured: dict) -> int:
    """The frames of a video. Raises ValueError where a frame of a folder is itself an animation."""
    several = [name for name in files if measured[name]["frames"] != 1]
    if of_folder and several:
        held = measured[several[0]]["frames"]
        raise ValueError(f"{several[0]} holds {held} frames; in a folder each file is one")
    return of_folder or measured[files[0]]["frames"]


def read(data: Path, media: Media, contents: list[str] | None = None) -> list[Image.Image]:
    """The frames of a video that are read, RGB. Raises ValueError where it has changed since it was measured.

    A change is found by the number of frames, and with `contents`, a sha256 for each file, in all.
    """
    if contents:
        changed = [name for name, known in zip(media.files, contents, strict=True) if file_sha256(data, name) != known]
        if changed:
            raise ValueError(f"{changed[0]} has changed since it was checked; start again")
    if len(media.files) == 1:
        found = list(read_frames(data, media.files[0], media.frames))
    elif video_files.is_frame(media.files[0]):
        found = open_images(data, media.files, [None] * len(media.files))
    else:
        found = [frame for name in media.files for frame in read_frames(data, name)]
    if len(found) != len(media.frames):
        raise ValueError(f"{media.files[0]} has other frames than when it was checked; start again")
    return found


def read_frames(data: Path, name: str, wanted=None, largest: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The `wanted` frames of a file, or all, one by one, RGB; a JPEG has one. Raises ValueError naming the file."""
    if video_files.is_frame(name):
        yield open_image(data, name)
        return
    path = inside(data, name)
    try:
        yield from read_array(path, wanted) if path.suffix.lower() == ".npy" else read_animation(path, wanted, largest)
    except Exception as error:  # damaged files make a decoder raise anything
        raise ValueError(f"{name} cannot be read: {error or type(error).__name__}") from None


def read_array(path: Path, wanted) -> Iterator[Image.Image]:
    with path.open("rb") as file:
        shape, kind = array_header(file, path.stat().st_size)
    if len(shape) != 4 or shape[3] != 3 or kind != np.uint8 or 0 in shape:
        raise ValueError(f"{kind} of shape {shape}, not uint8 (frames, height, width, 3)")
    frames = np.load(path, mmap_mode="r", allow_pickle=False)
    for i in range(len(frames)) if wanted is None else wanted:
        yield Image.fromarray(np.array(frames[i]))


def read_animation(path: Path, wanted, largest: int) -> Iterator[Image.Image]:
    with Image.open(path, formats=["GIF", "WEBP", "PNG", "JPEG"]) as image:
        refuse_unreadable(image, largest)
        # an MPO holds one picture twice; an APNG may begin with what is shown where it cannot be played
        single, first = image.format in ("JPEG", "MPO"), int(getattr(image, "default_image", False))
        count = 1 if single else getattr(image, "n_frames", 1) - first
        if count * image.width * image.height > 40 * largest:  # decoded in some twenty seconds
            text = f"{count} frames of {image.width} x {image.height} pixels, more than {40 * largest:,} together"
            raise ValueError(f"{text}; scale them down, or leave some out")
        for i in range(count) if wanted is None else wanted:
            image.seek(first + i)
            image.load()
            yield to_rgb(image)
