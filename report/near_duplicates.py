"""Pictures that look alike: a hash of 255 bits finds candidates, two small pictures decide.

Only still pictures (JPEG, PNG, also the frames of a clip) are compared. A copy that is re-encoded, scaled, brighter,
mirrored or turned upside down is found; one that is cropped by some per cent, coloured otherwise or grey is not.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from inputs import video_files
from inputs.files import inside
from inputs.images import MAX_PIXELS, MODES, open_image, to_rgb

# Two pictures are one where both hold. Of the demo's frames, which share their background, copies (JPEG down to q30,
# half the size, brighter, mirrored) differ by at most 18 bits and 7 levels; different ones within 24 bits by 21 levels
BITS, OF_BITS = 24, 255
LEVELS = 10  # of 255, on average over a 64th of the picture, once brightness and contrast are the same
FLAT = 4  # levels: a picture whose greys deviate less (black, white) has a hash that is noise
TURNED = {  # how a copy may lie: what is done with its rows and columns
    "": (slice(None), slice(None)),
    "mirrored left to right": (slice(None), slice(None, None, -1)),
    "mirrored top to bottom": (slice(None, None, -1), slice(None)),
    "turned upside down": (slice(None, None, -1), slice(None, None, -1)),
}


def small_picture(data: Path, name: str) -> np.ndarray | None:
    """A JPEG or PNG as (32, 32, 3) bytes; None of an animation, or of more than 8 bits. Raises ValueError."""
    try:
        if video_files.is_frame(name):
            picture = open_image(data, name)
        else:
            with Image.open(inside(data, name), formats=["JPEG", "PNG"]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError("too large to be opened")
                if getattr(image, "n_frames", 1) > 1 or image.mode not in (*MODES, "CMYK"):
                    return None
                image.draft("RGB", (128, 128))  # a JPEG is decoded small, 1350 x 1080 in 4 ms instead of 16
                picture = to_rgb(image)
        # by an antialiasing filter that is symmetric: BOX is not, and a mirrored copy would differ
        return np.asarray(picture.resize((32, 32), Image.Resampling.HAMMING))
    except Exception as error:  # damaged files make a decoder raise anything
        raise ValueError(f"{name}: {error}") from None


def structured(picture: np.ndarray) -> bool:
    """Is there anything to be seen in it?"""
    return grey(picture).std() >= FLAT


def grey(pictures: np.ndarray) -> np.ndarray:
    return pictures @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def closest(earlier: list[str], later: list[str], pictures: dict[str, np.ndarray]):
    """(later, earlier, differing bits, how it is turned) of each later picture that is an earlier one again."""
    if not earlier:
        return
    old = hashes([pictures[key] for key in earlier]).T.copy()  # (4 words, old)
    for key in later:
        turns = [pictures[key][way] for way in TURNED.values()]
        new = hashes(turns)  # (4 ways, 4 words)
        # (4 ways, old), a byte each: 255 is the most
        bits = sum(np.bitwise_count(new[:, i, None] ^ old[i]) for i in range(4))
        turned, found = np.nonzero(bits <= BITS)
        order = np.argsort(bits[turned, found], kind="stable")[:256]  # of a still video there may be thousands
        for t, i in zip(turned[order], found[order], strict=True):
            if largest_difference(turns[t], pictures[earlier[i]]) <= LEVELS:
                yield key, earlier[i], int(bits[t, i]), list(TURNED)[t]
                break


def hashes(pictures: list[np.ndarray]) -> np.ndarray:
    """(n, 4) uint64 of (32, 32, 3): which of the 255 slowest waves of the grey picture are above their median."""
    k, x = np.arange(16)[:, None], np.arange(32)[None]
    waves, found = np.cos(np.pi * (2 * x + 1) * k / 64).astype(np.float32), []  # of a cosine transform (16, 32)
    for start in range(0, len(pictures), 1000):
        strength = (waves @ grey(np.stack(pictures[start : start + 1000])) @ waves.T).reshape(-1, 256)
        above = strength > np.median(strength[:, 1:], axis=1, keepdims=True)
        above[:, 0] = False  # the mean says how bright it is, not what is to be seen
        found.append(np.packbits(above, axis=1).view(np.uint64))
    return np.concatenate(found)


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """How much the 64ths of two small pictures differ at most, in levels of any colour: a polyp is enough.

    Brightness and contrast are made the same first. The flatter is stretched, and cut at white, as a brighter copy is.
    """
    one, other = sorted((one.astype(np.float32), other.astype(np.float32)), key=np.std)
    inner = (np.minimum(one, other) > 4) & (np.maximum(one, other) < 250)  # what is cut says nothing about contrast
    if inner.sum() > 100:
        gain = np.clip(other[inner].std() / max(one[inner].std(), 1), 0.8, 1.5)
        one = np.clip(gain * (one - one[inner].mean()) + other[inner].mean(), 0, 255)
    return float(np.abs((one - other).reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))).max())
