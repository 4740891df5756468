"""The features of a frozen tower on disk: each video passes the tower once, whatever epoch or answer asks for it."""

import hashlib
import json
import random
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from inputs import images, videos
from inputs.videos import Media


@dataclass
class Video:
    """A video of a packed sequence: its pixels, or the features that the tower has already found in them."""

    fast: list[int]  # which of its frames are on the fast path
    slow: list[int]
    pixels: torch.Tensor | None  # (frames, 3, height, width)
    features: torch.Tensor | None  # (frames, patches, width of the tower)
    cached_as: Path | None = None  # where its features belong
    damaged: bool = False  # what is there are others, or none that can be read

    @property
    def frames(self) -> int:
        return len(self.features if self.pixels is None else self.pixels)


class Cache:
    """Reads videos; with a folder the features that a tower has found in them before, where it has them, not pixels."""

    def __init__(self, folder: str | None, processor):
        self.folder, self.processor, self.tower, self.rewritten = folder, processor, "", set()

    def belongs_to(self, tower: nn.Module) -> None:
        """Identify the tower by its configuration, weights and their dtype. Call it before .to() and the workers."""
        if self.folder and not next(tower.parameters()).is_meta:
            config = {name: value for name, value in tower.config.to_dict().items() if name != "transformers_version"}
            self.tower = digest_of(json.dumps(config, sort_keys=True), tower.state_dict())

    def read(self, data: Path, media: Media, measured: dict, change: tuple | None) -> Video:
        """Raises ValueError where the video is no longer what was measured of it."""
        contents, path, damaged = [measured[name]["sha256"] for name in media.files], None, False
        if self.folder:
            path = self.path(contents, media.frames)
            found, damaged = read_features(path)
            if found is not None:
                return Video(media.fast, media.slow, None, found, path)
        pictures = [images.augmented(p, change) for p in videos.read(data, media, contents if self.folder else None)]
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"]
        return Video(media.fast, media.slow, pixels, None, path, damaged)

    def keep(self, video: Video, features: torch.Tensor) -> torch.Tensor:
        """What the tower has found in a video, which is put into the folder, where there is one."""
        if video.cached_as:
            write_features(video.cached_as, features)
            self.rewritten |= {video.cached_as} if video.damaged else set()
        return features

    def close(self) -> None:
        """Say how many entries were no good; every rank of those that it has written anew."""
        if self.rewritten:
            text = f"{len(self.rewritten)} entries were damaged and are written anew"
            print(f"--cache-features {self.folder}: {text}, such as {min(self.rewritten)}", file=sys.stderr)

    def path(self, contents: list[str], frames: list[int]) -> Path:
        """The file of a video's features, named by the tower, the image processor, the video's bytes and its frames."""
        key = json.dumps([self.tower, self.processor.to_dict(), contents, frames])
        key = hashlib.sha256(key.encode()).hexdigest()
        return Path(self.folder) / key[:2] / f"{key}.safetensors"


def digest_of(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """A digest of a text and of tensors with their names, types and shapes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_features(path: Path) -> tuple[torch.Tensor | None, bool]:
    """(frames, patches, width of the tower), or None: then with whether there is a file, but not as it was written."""
    try:
        with safe_open(path, "pt") as file:
            found, carried = file.get_tensor("features"), (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        return None, False
    except (OSError, SafetensorError):
        return None, True
    return (found, False) if digest_of(path.name, {"features": found}) == carried else (None, True)


def write_features(path: Path, features: torch.Tensor) -> None:
    """Beside its name, then renamed: several ranks and runs may use one folder. Ends where it cannot be written."""
    temporary = path.with_suffix(f".{random.SystemRandom().getrandbits(64):016x}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"features": features.cpu().contiguous()}
        # as any file: save_file's would be readable to one user alone
        temporary.write_bytes(save(tensors, {"sha256": digest_of(path.name, tensors)}))
        temporary.replace(path)
    except OSError as error:
        raise SystemExit(f"--cache-features: {path} cannot be written: {error}; make room, or name another") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
