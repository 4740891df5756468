"""Images: found in the data folder, decoded completely, and prepared by the checkpoint's own image processor.

`QwenImages` is what Qwen2-VL adds: images of any size, and positions in time, height and width.
"""

import math
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from inputs.files import first_existing, inside, read_json

FIELDS = ("image", "image_filename", "image_id", "img_id")  # the usual names of an example's image
MAX_PIXELS = 50_000_000  # an image with more is refused before it is decoded
MODES = ("RGB", "RGBA", "L", "LA", "P", "1")  # colour modes that become RGB without a choice of ours


def named(data: Path, entry: dict) -> str:
    """The file of an entry's image, by whichever of its usual names. Raises ValueError where there is none."""
    name = next((str(entry[field]) for field in FIELDS if entry.get(field) not in (None, "")), None)
    if name is None:
        raise ValueError(f"no image; give one of {', '.join(FIELDS)}")
    return find(data, name)


def find(data: Path, name: str) -> str:
    """Kvasir-VQA names an image by path, by file name or by ID alone; the path is then images/ID.jpg."""
    return first_existing(data, [name, f"images/{name}", *(f"images/{name}.{e}" for e in ("jpg", "jpeg", "png"))])


def open_image(data: Path, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a JPEG or PNG of the data folder completely, as RGB. Raises ValueError that names the file and fault."""
    path = inside(data, name)
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would warn first, and have another message
    try:
        with Image.open(path, formats=["JPEG", "PNG"]) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {max_pixels:,}; scale it down")
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{image.n_frames} frames; an example's image needs one")
            if image.mode not in MODES:
                raise ValueError(f"colour mode {image.mode}; convert it to RGB")
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # damaged files make a decoder raise anything
        what = "neither JPEG nor PNG" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name} cannot be read: {what}") from None


# ---- the checkpoint's image processor ----


def processor(folder: Path, **expected):
    """The checkpoint's image processor, always through Pillow: the same pixels whether torchvision is there or not.

    `expected` are its attributes that must be the vision tower's own. Ends where they are not, or there is none.
    """
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        config = read_json(path) if path.is_file() else {}
        kind = config.get("image_processor", config).get("image_processor_type")
        if kind:
            break
    else:
        raise SystemExit(f"--model {folder}: no preprocessor_config.json that names an image_processor_type")
    kind = kind.removesuffix("Fast").removesuffix("Pil") + "Pil"
    found = getattr(transformers, kind, None)
    if found is None:
        raise SystemExit(f"--model {folder}: transformers has no {kind} ({path.name}: image_processor_type)")
    found = found.from_pretrained(folder)
    for key, value in expected.items():
        if getattr(found, key) != value:
            text = f"{key} {getattr(found, key)}, the vision tower has {value} (config.json)"
            raise SystemExit(f"--model {folder}: preprocessor_config.json has {text}; copy the checkpoint's own")
    return found


def size_of(processor) -> tuple[int, int]:
    """(height, width) in pixels of what the vision tower sees, the same of every image. Ends where they differ."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    if None in (size.get("height"), size.get("width")):
        raise SystemExit("preprocessor_config.json: images would differ in size; give it a crop, or a height and width")
    return size["height"], size["width"]


def seen(processor, width: int, height: int) -> float:
    """The share of an image of these proportions that is left after the crop: DINOv2's, of 16:9, is 43 %."""
    if not getattr(processor, "do_center_crop", False):
        return 1.0
    resized = processor.size.get("height"), processor.size.get("width")
    if None in resized:
        scale = processor.size["shortest_edge"] / min(width, height)
        resized = scale * height, scale * width
    return math.prod(min(1.0, crop / side) for crop, side in zip(size_of(processor), resized, strict=True))


def patches(processor, patch: int) -> tuple[int, int]:
    """(rows, columns) of an image's patches, printed with what is cropped away. Ends where a patch would be cut."""
    height, width = size_of(processor)
    if height % patch or width % patch:
        raise SystemExit(
            f"preprocessor_config.json: {height} x {width} pixels are not divisible into {patch} px patches"
        )
    rows, columns = height // patch, width // patch
    unseen = " and ".join(f"{1 - seen(processor, w, h):.0%} of {w}:{h}" for w, h in ((1, 1), (16, 9)))
    print(f"a frame is {height} x {width} pixels, {rows} x {columns} patches; cropped away: {unseen}")
    return rows, columns


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
        self.processor = processor(folder, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
        self.longest, self.rope_index, size = longest, vlm.model.get_rope_index, self.processor.size
        least, most = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
        token = (self.processor.patch_size * self.processor.merge_size) ** 2  # 28 x 28 = 784 pixels
        if not token <= least <= most:
            text = f"--min-pixels {least} and --max-pixels {most} (where not given, the checkpoint's own)"
            raise SystemExit(f"{text}: the first must be at least {token}, a token's, and at most the second")
        size["shortest_edge"], size["longest_edge"] = least, most
        self.pixels = [least, most]

    def measure(self, data: Path, name: str) -> tuple[int, int]:
        """(width, height) of an image, decoded completely. Raises ValueError where one side is 200 times the other."""
        image = open_image(data, name)
        if max(image.size) > 200 * min(image.size):  # which smart_resize refuses
            size = f"{image.width} x {image.height} pixels"
            raise ValueError(f"{name}: {size}, one side over 200 times the other; crop it")
        return image.size

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
        input_ids = torch.tensor([prefix])  # (1, P)
        grids = torch.tensor([self.grid(size) for size in sizes])  # (images, 3)
        is_image = (input_ids == image_id).int()
        return self.rope_index(input_ids, mm_token_type_ids=is_image, image_grid_thw=grids)[0][:, 0]

    def read(self, data: Path, names: list[str], sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """pixel_values (patches of all images, channels * 2 frames * patch * patch), image_grid_thw (images, 3).

        Raises ValueError where an image no longer has the size that it had when it was measured.
        """
        pictures = [open_image(data, name) for name in names]
        if self.longest:
            pictures = [p.resize(reduced(p.size, self.longest), Image.Resampling.BICUBIC) for p in pictures]
        read = self.processor(pictures, return_tensors="pt")
        for name, size, grid in zip(names, sizes, read["image_grid_thw"].tolist(), strict=True):
            if tuple(grid) != self.grid(size):
                raise ValueError(f"{name} has another size than when it was checked; start again")
        return {"pixel_values": read["pixel_values"], "image_grid_thw": read["image_grid_thw"]}
