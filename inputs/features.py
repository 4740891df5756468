"""The features of a frozen tower on disk: each video passes the tower once, whatever epoch or answer asks for it."""

import hashlib
import json
import random
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from inputs import videos
from inputs.videos import Media


@dataclass
class Video:
    """A video of a packed sequence: its pixels, or the features that the tower has already found in them."""

    fast: list[int]  # which of its frames are on the fast path
    slow: list[int]
    pixels: torch.Tensor | None  # (frames, 3, height, width)
    features: torch.Tensor | None  # (frames, patches, width of the tower)
    cached_as: Path | None = None  # where its features belong

    @property
    def frames(self) -> int:
        return len(self.features if self.pixels is None else self.pixels)

    def keep(self, features: torch.Tensor) -> None:
        """Into the cache, where there is one."""
        if self.cached_as:
            write_features(self.cached_as, features)


class Cache:
    """Reads videos; with a folder the features that a tower has found in them before, where it has them, not pixels."""

    def __init__(self, folder: str | None, processor):
        self.folder, self.processor, self.tower = folder, processor, ""

    def belongs_to(self, tower: nn.Module) -> None:
        """The tower whose features these are, known by a digest; before it is put on a device, and workers start."""
        if self.folder and not next(tower.parameters()).is_meta:
            self.tower = tower_digest(tower)

    def read(self, data: Path, media: Media, measured: dict) -> Video:
        """Raises ValueError where the video is no longer what was measured of it."""
        contents, path = [measured[name]["sha256"] for name in media.files], None
        if self.folder:
            path = self.path(contents, media.frames)
            found = read_features(path)
            if found is not None:
                return Video(media.fast, media.slow, None, found, path)
        pictures = videos.read(data, media, contents if self.folder else None)
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"]
        return Video(media.fast, media.slow, pixels, None, path)

    def path(self, contents: list[str], frames: list[int]) -> Path:
        """The file of a video's features, named by all that they depend on: what has changed is looked for elsewhere.

        That is the tower, the image processor, the bytes of the video, and which of its frames are read.
        """
        key = json.dumps([self.tower, self.processor.to_dict(), contents, frames])
        key = hashlib.sha256(key.encode()).hexdigest()
        return Path(self.folder) / key[:2] / f"{key}.safetensors"


def tower_digest(tower: nn.Module) -> str:
    """A digest of the tower's configuration and of every weight, in the format that it computes with."""
    config = {name: value for name, value in tower.config.to_dict().items() if name != "transformers_version"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_features(path: Path) -> torch.Tensor | None:
    """(frames, patches, width of the tower), or None where the file is missing or damaged: it is then written anew."""
    with suppress(OSError, SafetensorError):
        return load_file(path)["features"]
    return None


def write_features(path: Path, features: torch.Tensor) -> None:
    """Beside its name, then renamed: several ranks and runs may use one folder. Ends where it cannot be written."""
    temporary = path.with_suffix(f".{random.SystemRandom().getrandbits(64):016x}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": features.cpu().contiguous()}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"--cache-features: {path} cannot be written: {error}; make room, or name another") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
