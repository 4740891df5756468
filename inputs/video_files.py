"""Frames of video files, which PyAV decodes: each is a medium of its own, named by its time, "clips/q7.mp4#t=3.250".

It is the frame whose time is nearest, in seconds as players count them, turned as the file says. Decoding begins at the
keyframe before it. Nothing stays open and no thread is left behind, because the processes that read media are forked.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path

import numpy as np
from PIL import Image

from inputs.files import FRAME, inside

FILES = (".mp4", ".mov", ".avi", ".webm", ".mkv")
FORMATS = "mov,avi,matroska"  # FFmpeg's names, whatever the ending says; others may lead to files elsewhere
ROUNDING = 0.001  # seconds: names have three digits


def is_frame(name: str) -> bool:
    return FRAME.fullmatch(name) is not None


def frame_at(file: str, time: float) -> str:
    return f"{file}#t={time:.3f}"


def times(data: Path, name: str, start: float = 0, end: float = math.inf) -> np.ndarray:
    """When the frames of a file are shown, from `start` to before `end`. Raises ValueError where there are none.

    Where frames do not follow each other evenly these are as many times that do.
    """
    first, step, count, duration = span(data, name)
    part = f"start {start:g}, end {end:g}".removesuffix(", end inf")
    if start >= duration or duration + step < end < math.inf:
        raise ValueError(f"{name} lasts {duration:.3f} s, and {part} must lie within; correct it")
    found = first + step * np.arange(count)
    found = found[(found >= start - ROUNDING) & (found < end - ROUNDING)]
    if not len(found):
        raise ValueError(f"{name} has no frame within {part}, one lasts {step:.3f} s; lengthen the part")
    return found


@lru_cache(10_000)  # a file may have many clips
def span(data: Path, name: str) -> tuple[float, float, int, float]:
    """(time of the first frame, from one to the next, how many, duration) of a file, of which one frame is decoded.

    Raises ValueError where the file ends before its header says so.
    """
    with opened(data, name) as video:
        frame = next(video.container.decode(video.stream), None)
        first = max(0.0, video.seconds(frame and frame.pts))
        rate = float(video.stream.average_rate or 1)
        due = (video.container.duration or 0) / 1_000_000
        for _ in video.seek(due or 1_000_000):  # the last keyframe that is shown: an editor may have cut it away
            packets = [found for found in video.container.demux() if found.pts is not None and not found.is_discard]
            shown = [video.seconds(packet.pts) for packet in packets if packet.stream is video.stream]
            if shown:
                break
        last = max([first, *shown])
        ends = [video.seconds(packet.pts + (packet.duration or 0), packet.time_base) for packet in packets]
        end, count = max([last + 1 / rate, *ends]), round((last - first) * rate) + 1
        if any(packet.is_corrupt for packet in packets) or end + 0.2 < due or count > 10_000_000:  # four days
            raise ValueError(f"it should last {due:.3f} s, and ends at {end:.3f} s after {count:,} frames: cut off")
    return first, (last - first) / (count - 1) if count > 1 else 1 / rate, count, max(due, end)


def read(data: Path, names: list[str]) -> dict[str, Image.Image]:
    """{frame: its picture}, turned as the file says. Raises ValueError that names file and time."""
    files, found = defaultdict(dict), {}
    for name in names:
        file, time = FRAME.fullmatch(name).groups()
        files[file][float(time)] = name
    for file, wanted in files.items():
        with opened(data, file) as video:
            for _, near in groupby(sorted(wanted), key=video.keyframe):  # those from one keyframe in one pass
                for time, frame in video.decode(list(near)):
                    found[wanted[time]] = frame.to_image().rotate(frame.rotation, expand=True)
    return found


@contextmanager
def opened(data: Path, name: str) -> Iterator["Video"]:
    """An open video file; whatever fails meanwhile is a ValueError that names it, and the time where it did."""
    path, video = inside(data, name), None
    try:
        import av

        with av.open(f"file:{path}", options={"format_whitelist": FORMATS}) as container:
            video = Video(container)
            yield video
    except ImportError:
        raise ValueError(f"{name} needs PyAV: pip install av, or write the frames as JPEG files") from None
    except Exception as error:  # damaged files make a decoder raise anything
        at = "" if video is None or video.at is None else f" at {video.at:.3f} s"
        text = f"{getattr(error, 'strerror', None) or error}; copy it again, or write it anew (ffmpeg -i IN OUT.mp4)"
        raise ValueError(f"{name} cannot be read{at}: {text}") from None


class Video:
    """The video of an open file; `at` is the time that is wanted of it."""

    def __init__(self, container):
        self.container, self.stream, self.at = container, container.streams.best("video"), None
        # a recording may have the picture of a cover
        if self.stream is None or self.stream.disposition & type(self.stream.disposition).attached_pic:
            raise ValueError("it holds no video")
        self.stream.thread_type = "NONE"
        self.start = (container.start_time or 0) / 1_000_000  # players count from here

    def seconds(self, pts: int | None, base=None) -> float:
        """When something is shown whose time the file gives as `pts`."""
        if pts is None:
            raise ValueError("it has no frames, or they have no times")
        return float(pts * (base or self.stream.time_base)) - self.start

    def seek(self, time: float) -> Iterator[None]:
        """To the keyframe at a time or before; whenever asked again, further back, at last to the first."""
        for back in (0, 1, 10, 60, math.inf):
            at = max(0, time - back) + self.start + ROUNDING
            self.container.seek(int(at / self.stream.time_base), stream=self.stream)
            yield

    def keyframe(self, time: float) -> int | None:
        """The keyframe from which a time is decoded."""
        self.at = time
        next(self.seek(time))
        return next(self.container.demux(self.stream)).pts

    def frames(self, time: float) -> Iterator:
        """The frames in order, from one that is shown at a time or before: not every seek finds it at once."""
        self.at, before = time, -math.inf
        for _ in self.seek(time):
            found = self.container.decode(self.stream)
            first = next(found, None)
            if first is not None and self.seconds(first.pts) <= time + ROUNDING:
                break
        for frame in chain([first] if first else [], found):
            if frame.is_corrupt or self.seconds(frame.pts) <= before:
                raise ValueError("a frame is damaged, or frames are not in the order of their times")
            before = self.seconds(frame.pts)
            yield frame

    def decode(self, times: list[float]) -> Iterator[tuple]:
        """(time, the frame nearest to it) of times in their order. Raises ValueError where there is none any more."""
        found = self.frames(times[0])
        shown, after = next(found, None), next(found, None)
        for self.at in times:
            while after is not None and self.seconds(shown.pts) + self.seconds(after.pts) < 2 * self.at:
                shown, after = after, next(found, None)
            if shown is None or (after is None and self.seconds(shown.pts) < self.at - ROUNDING):
                raise ValueError("no frame is there any more")
            yield self.at, shown
