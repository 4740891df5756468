"""Videos drawn at random, of every kind that can be read."""

from pathlib import Path

import numpy as np
from PIL import Image


def drawn(count: int = 5) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


def save_as(kind: str, data: Path, frames: list[Image.Image]) -> str:
    if kind == "folder":
        (data / "v").mkdir(parents=True)
        for i, frame in enumerate(frames):
            frame.save(data / f"v/frame_{i * 5}.png")  # frame_10 comes after frame_5
        return "v"
    data.mkdir(parents=True)
    if kind == "npy":
        np.save(data / "v.npy", np.stack([np.asarray(frame) for frame in frames]))
        return "v.npy"
    settings = {"webp": {"lossless": True}, "apng poster": {"default_image": True}}.get(kind, {})
    first = [Image.new("RGB", frames[0].size)] if kind == "apng poster" else []  # shown where it cannot be played
    name = "v.png" if kind.startswith("apng") else f"v.{kind}"
    head, *rest = [*first, *frames]
    head.save(data / name, save_all=True, append_images=rest, duration=40, **settings)
    return name
