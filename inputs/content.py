"""What a file shows, as a SHA-256 of what was decoded: the same whatever its name, container and compression."""

import hashlib

import numpy as np
from PIL import Image


def of_picture(picture: Image.Image) -> str:
    """The content of an RGB picture: its size and its pixels."""
    return hashlib.sha256(f"{picture.width} x {picture.height} ".encode() + picture.tobytes()).hexdigest()


def of_frames(contents: list[str]) -> str:
    """The content of a video, from that of each frame; of one frame it is that of the picture."""
    return contents[0] if len(contents) == 1 else hashlib.sha256("".join(contents).encode()).hexdigest()


def of_samples(samples: np.ndarray) -> str:
    """The content of a recording: its length, and of each tenth of a second that is heard the level and strongest tone.

    Not the samples themselves: soundfile writes the same floats as WAV and as FLAC a step of 16 bits apart.
    """
    blocks = np.pad(samples, (0, -len(samples) % 1601)).reshape(-1, 1601)  # 9.994 Hz: a tone is seldom between two
    strength = np.abs(np.fft.rfft(blocks))[:, 1:]  # without the mean
    power = (strength**2).sum(axis=1)
    heard = power > power.max() / 10_000  # below it is noise
    found = [np.rint(20 * np.log10(power[heard])), strength[heard].argmax(axis=1)]  # in half decibels
    return hashlib.sha256(f"{len(samples)} ".encode() + np.int32(found).tobytes()).hexdigest()


def of_voxels(voxels: np.ndarray) -> str:
    """The content of a volume (x, y, z, …), float32, however it lies: mirrored, turned, or its axes in another order.

    An array may be in any order, and a header may be wrong. So it is what the planes across each axis add up to, read
    from either end and in no order of the axes; frames of a series keep theirs.
    """
    bits = (voxels + np.float32(0)).view(np.uint32)  # -0 becomes 0; integers add up to the same in any order
    others = [tuple(a for a in range(bits.ndim) if a != axis) for axis in range(bits.ndim)]
    sums = [bits.sum(axis=axes, dtype=np.uint64).tolist() for axes in others]
    found = sorted(min(planes, planes[::-1]) for planes in sums[:3]), sums[3:]
    return hashlib.sha256(str(found).encode()).hexdigest()
