"""Images: found in the data folder, and decoded completely. How they are prepared is in processors.py.

Pictures of every kind, the frames of videos among them, become RGB by `to_rgb` alone. `QwenImages` is what Qwen2-VL
adds: images of any size, and positions in time, height and width.
"""

import functools
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from inputs import content, processors, video_files
from inputs.files import first_existing, inside
from inputs.task import MARK, as_text

# usual names of an image; several are listed in `images`
FIELDS = ("image", "image_path", "image_file", "image_filename", "image_name", "img_name", "image_id", "img_id")
# an image with more is refused before it is decoded, or padded to a square
MAX_PIXELS, MAX_SIDE = 50_000_000, 12_000
MAX_RATIO = 200  # of its sides: Qwen2-VL's own limit, and a centre crop would show 1/200 of a longer strip
# <image 1>, <img>, <ImageHere>: as other programs mark an image
OTHER_MARK = re.compile(rf"(?!{MARK})<(?i:image|img)[ _]?\w*>")
LEAD = re.compile(rf"(?:\s*{MARK})*\s*")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1")  # colour modes that become RGB without a choice of ours


def named(data: Path, entry: dict, needed: bool = True) -> list[str]:
    """The files of an entry's images in their order: of `images`, or the one that it gives by any of the usual names.

    Raises ValueError where these differ, or where some are `needed` and the entry does not say "images": [].
    """
    given = {field: find(data, as_text(entry[field], field)) for field in FIELDS if entry.get(field) not in (None, "")}
    if (listed := entry.get("images")) is not None:
        if not isinstance(listed, list) or "" in listed:
            raise ValueError(f"images must be a list of names, none empty: {listed!r}")
        names = [name.get("path") if isinstance(name, dict) else name for name in listed]
        names = [find(data, as_text(name, "each of images")) for name in names]
        if other := next((name for name in given.values() if name not in names), None):
            raise ValueError(f"{other} beside images, which lists {len(names)} others; keep one of the two fields")
        return names
    if not given and needed:
        raise ValueError(f'no image; give one of {", ".join(FIELDS)}, or "images": [] where nothing is shown')
    first = next(iter(given.values()), None)
    for field, name in [pair for pair in given.items() if pair[1] != first]:  # an ID may be a number of its own
        if (Path(name).name != Path(first).name and not field.endswith("_id")) or (data / name).is_file():
            raise ValueError(f"two images, {first} and {name}, of which one would not be shown; keep one")
    return [first] if given else []


def placed(data: Path, entry: dict) -> dict:
    """The entry with all its `images`, and where each is shown: at a MARK in `question` or `history`; without, first.

    Marks are as many as images, or none; only a conversation without may name no image at all. Its answers have the
    images up to their own turns, and one `group` where none is known: its first image, or its place. Raises ValueError.
    """
    before = entry.get("history") or []
    asked = [*(question for question, _ in before), as_text(entry.get("question") or "", "question")]
    if other := OTHER_MARK.search(" ".join(asked)):
        raise ValueError(f"{other[0]} shows nothing; write {MARK} where an image is shown, and list it in images")
    asked = ["".join(lead(text)) for text in asked]  # without white space between marks, or before
    shown = sum(text.count(MARK) for text in asked)
    total, place = entry.get("of_conversation") or (shown, None)
    names = named(data, entry, needed=total > 0 or place is None)
    if total not in (0, len(names)):
        raise ValueError(f"{total} {MARK} in what is asked, but {len(names)} images; write one for each, or none")
    first, rest = lead(asked[0])
    if first == MARK * shown:  # where they are without a mark, too
        asked[0] = rest
    history = [(text, answer) for text, (_, answer) in zip(asked, before, strict=False)] or ()
    group, names = entry.get("group") or next(iter(names), place), names[:shown] if total else names
    return {**entry, "images": names, "question": asked[-1], "history": history, "group": group}


def lead(question: str) -> tuple[str, str]:
    """(the marks that a question begins with, the question behind them)"""
    found = LEAD.match(question)[0]
    return MARK * found.count(MARK), question[len(found) :]


def messages(turns: list[tuple], images: int, system: str) -> list[dict]:
    """The turns, (question, answer), up to the last question as a chat template reads them.

    Images stand where marks do, of which a new line is a part; without marks they come first.
    """
    if not any(MARK in question for question, _ in turns):
        turns = [(MARK * images + turns[0][0], turns[0][1]), *turns[1:]]
    found = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for question, answer in turns:
        pieces = [piece for piece in re.split(f"({MARK})\n?", question) if piece] or [""]
        parts = [{"type": "image"} if piece == MARK else {"type": "text", "text": piece} for piece in pieces]
        found.append({"role": "user", "content": parts})
        found.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return found[:-1]


@functools.lru_cache(2**12)  # once for all questions of an image
def find(data: Path, name: str) -> str:
    """Kvasir-VQA names an image by path, by file name or by ID alone; the path is then images/ID.jpg."""
    return first_existing(data, [name, f"images/{name}", *(f"images/{name}.{e}" for e in ("jpg", "jpeg", "png"))])


def refuse_unreadable(image: Image.Image, largest: int) -> None:
    """Raises ValueError where a picture, opened and not yet decoded, is too large, or would not survive as RGB."""
    size = f"{image.width} x {image.height} pixels"
    if image.width * image.height > largest or max(image.size) > MAX_SIDE:
        raise ValueError(f"{size}, more than {largest:,}, or than {MAX_SIDE:,} a side; scale it down")
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ValueError(f"{size}, one side over {MAX_RATIO} times the other; crop it")
    if image.mode in ("I", "F") or ";16" in f"{image.mode} {image.tile}":  # of colours Pillow keeps the upper 8 bits
        text = "choose a window (level and width), scale that to 8 bits and save it as PNG"
        raise ValueError(f"colour mode {image.mode}, more than 8 bits a value; {text}")
    if image.mode not in MODES:
        raise ValueError(f"colour mode {image.mode}; convert it to RGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture, turned as its EXIF says, as RGB; over white where it is transparent: info["over_white"].

    Raises ValueError where nothing would be left to see: of a white drawing, or one that is transparent all over.
    """
    image = ImageOps.exif_transpose(image)
    clear = image.convert("RGBA") if image.has_transparency_data else None
    over_white = clear is not None and clear.getchannel("A").getextrema()[0] < 255
    if over_white:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear)
    image = image.convert("RGB")
    image.info = {"over_white": over_white}
    if over_white and all(high - low < 8 for low, high in image.getextrema()):  # levels of 255, of each colour
        text = "over white nothing of it would be seen; lay it over the background that it was drawn for"
        raise ValueError(f"transparent, and {text}")
    return image


def open_image(data: Path, name: str, change: tuple | None = None) -> Image.Image:
    """Decode a JPEG or PNG completely, as RGB, and `augmented`. Raises ValueError that names the file and fault."""
    if video_files.is_frame(name):
        return open_images(data, [name], [change])[0]
    path = inside(data, name)
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would warn first, and have another message
    try:
        with Image.open(path, formats=["JPEG", "PNG"]) as image:
            refuse_unreadable(image, MAX_PIXELS)
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{image.n_frames} frames; an example's image needs one")
            image.load()
            return augmented(to_rgb(image), change)
    except Exception as error:  # damaged files make a decoder raise anything
        what = "neither JPEG nor PNG" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name} cannot be read: {what}") from None


def open_images(data: Path, names: list[str], changes: list) -> list[Image.Image]:
    """Several of them; of a video file those that are near each other are decoded together."""
    found = video_files.read(data, [name for name in names if video_files.is_frame(name)])
    return [
        augmented(to_rgb(found[name]), change) if name in found else open_image(data, name, change)
        for name, change in zip(names, changes, strict=True)
    ]


def measure(data: Path, name: str) -> tuple[dict, str]:
    """({"size": (width, height), "over_white": is it transparent?}, content) of an image, decoded completely."""
    image = open_image(data, name)
    return {"size": image.size, "over_white": image.info["over_white"]}, content.of_picture(image)


def summary(measured: dict, processor) -> dict:
    """{"pictures": …} for check.json, printed: how many are laid over white, and what the processor crops away."""
    seen = {name: found for name, found in measured.items() if isinstance(found, dict)}
    over_white = [name for name, found in seen.items() if found["over_white"]]
    if over_white:
        print(f"transparent, laid over white: {len(over_white):,} of {len(seen):,} pictures, such as {over_white[0]}")
    result = {"files": len(seen), "over_white": len(over_white)}
    if seen and processor is not None and processors.fit_of(processor) == "crop":
        lost = {name: processors.cropped_away(processor, *found["size"]) for name, found in seen.items()}
        mean, most = sum(lost.values()) / len(lost), max(lost, key=lost.get)
        result["cropped_away"] = {"mean": round(mean, 4), "most": round(lost[most], 4), "file": most}
        if lost[most] >= 0.005:
            text = f"on average {mean:.0%} of the pixels are cropped away, at most {lost[most]:.0%} ({most})"
            print(f"of {len(seen):,} pictures, {text}; --image-fit pad or squash shows all")
    return {"pictures": result} if seen else {}


def augmented(image: Image.Image, change: tuple | None) -> Image.Image:
    """A picture as Task.change says: turned and scaled, then with its contrast, about its mean, and its brightness."""
    if change is None:
        return image
    (degrees, scale, contrast, brightness), (width, height), mean = change, image.size, float(np.mean(image))
    angle = math.radians(degrees * min(image.size) / max(image.size))  # the ends of a long strip would leave it
    a, b, x, y = math.cos(angle) / scale, math.sin(angle) / scale, width / 2, height / 2
    # where nothing was its edge goes on: a black corner would be a sight of its own
    left, top = width // 10 + 1, height // 10 + 1
    wide = Image.fromarray(np.pad(image, ((top, top), (left, left), (0, 0)), "edge"))
    matrix = (a, b, left + x - a * x - b * y, -b, a, top + y + b * x - a * y)  # a place of the new one -> one of `wide`
    image = wide.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return image.point([round(brightness * (mean + contrast * (value - mean))) for value in range(256)] * 3)


# ---- Qwen2-VL ----


def reduced(size: tuple[int, int], longest: int | None) -> tuple[int, int]:
    """(width, height) of an image whose longer side has at most `longest` pixels; a small one is not enlarged."""
    scale = min(1.0, longest / max(size)) if longest else 1.0
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


class QwenImages:
    """Images of any size as Qwen2-VL reads them: patches of 14 x 14 pixels, merged 2 x 2 into tokens.

    An image is first reduced so that its longer side has at most `longest` pixels, where given; then its size is put
    between min_pixels and max_pixels, in full tokens, by the checkpoint's own rule. `vlm` is the model, with or
    without weights, for its rule of positions; `pixels` are the two limits as settled. Ends where no token fits them.
    """

    def __init__(self, folder: Path, vlm, min_pixels=None, max_pixels=None, longest: int | None = None):
        vision = vlm.config.vision_config
        self.processor = processors.load(folder, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
        self.longest, self.rope_index, size = longest, vlm.model.get_rope_index, self.processor.size
        least, most = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
        token = (self.processor.patch_size * self.processor.merge_size) ** 2  # 28 x 28 = 784 pixels
        if not token <= least <= most:
            text = f"--min-pixels {least} and --max-pixels {most} (where not given, the checkpoint's own)"
            raise SystemExit(f"{text}: the first must be at least {token}, a token's, and at most the second")
        size["shortest_edge"], size["longest_edge"] = least, most
        self.pixels = [least, most]

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(1, rows, columns) of the patches of an image of (width, height)."""
        width, height = reduced(size, self.longest)
        patch, limits = self.processor.patch_size, self.processor.size
        token = patch * self.processor.merge_size
        height, width = smart_resize(height, width, token, limits["shortest_edge"], limits["longest_edge"])
        return 1, height // patch, width // patch

    def tokens(self, size: tuple[int, int]) -> int:
        """How many tokens an image of (width, height) stands for."""
        return math.prod(self.grid(size)) // self.processor.merge_size**2

    def positions(self, prefix: list[int], image_id: int, sizes: list[tuple[int, int]]) -> torch.Tensor:
        """M-RoPE positions (3, P) of a prefix: text counts on in all three, an image in time, height and width."""
        if not prefix:  # of a text alone
            return torch.zeros(3, 0, dtype=torch.int64)
        input_ids = torch.tensor([prefix])  # (1, P)
        grids = torch.tensor([self.grid(size) for size in sizes])  # (images, 3)
        is_image = (input_ids == image_id).int()
        return self.rope_index(input_ids, mm_token_type_ids=is_image, image_grid_thw=grids)[0][:, 0]

    def read(self, data: Path, names: list[str], sizes: list[tuple], changes: list) -> dict[str, torch.Tensor]:
        """pixel_values (patches of all images, channels * 2 frames * patch * patch), image_grid_thw (images, 3).

        Raises ValueError where an image no longer has the size that it had when it was measured.
        """
        pictures = open_images(data, names, changes)
        if not pictures:
            return {}
        if self.longest:
            pictures = [p.resize(reduced(p.size, self.longest), Image.Resampling.BICUBIC) for p in pictures]
        read = self.processor(pictures, return_tensors="pt")
        for name, size, grid in zip(names, sizes, read["image_grid_thw"].tolist(), strict=True):
            if tuple(grid) != self.grid(size):
                raise ValueError(f"{name} has another size than when it was checked; start again")
        return {"pixel_values": read["pixel_values"], "image_grid_thw": read["image_grid_thw"]}
