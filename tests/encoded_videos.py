"""Video files, encoded with PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from inputs import video_files

CODECS = {".webm": "libvpx-vp9", ".avi": "mpeg4"}  # of others H.264


def moving(count: int, width: int = 64, height: int = 48, seed: int = 0) -> list[np.ndarray]:
    """Frames of which no two are alike: a pattern that moves, and a corner that blinks."""
    rng = np.random.default_rng(seed)
    pattern = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    frames = [np.roll(pattern, 3 * i, 1) for i in range(count)]
    for i, frame in enumerate(frames):
        frame[:8, :8] = (37 * i % 256, 91 * i % 256, i % 256)
    return frames


def encode(
    path: Path, frames, rate: int = 25, times=None, codec=None, pixels="yuv420p", sound=0, rotation=0, **options
) -> Path:
    """A file of frames; `times` are their milliseconds where the rate is none, `sound` seconds of silence beside."""
    base = Fraction(1, 1000) if times else Fraction(1, rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}) as file:
        stream = file.add_stream(codec or CODECS.get(path.suffix, "libx264"), rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], pixels
        stream.time_base = stream.codec_context.time_base = base
        stream.options = {name: str(value) for name, value in options.items()}
        if rotation:
            stream.set_display_rotation(rotation)
        heard = file.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48_000) if sound else None
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = times[i] if times else i, base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        for start in range(0, int(48_000 * sound), 960):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts, silence.time_base = 48_000, start, Fraction(1, 48_000)
            file.mux(heard.encode(silence))
        if heard:
            file.mux(heard.encode())
    return path


def all_frames(path: Path) -> tuple[list[float], list[Image.Image]]:
    """When each frame is shown, and what: the complete file decoded by PyAV from its first frame to its last."""
    with av.open(str(path)) as file:
        found = [(frame.time - file.start_time / 1_000_000, frame.to_image()) for frame in file.decode(video=0)]
    return [time for time, _ in found], [picture for _, picture in found]


def names_of(data: Path, name: str, *part) -> list[str]:
    """All frames of a file, or of a part of it."""
    return [video_files.frame_at(name, time) for time in video_files.times(data, name, *part)]
