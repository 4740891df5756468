import math

import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from _old import plain as _plain
from _old import runtime as _old
from _old import surg as _surg

find, open_image, processor = _old.find_image, _old.open_image, _old.image_processor


FIELDS = ("image", "image_filename", "image_id", "img_id")  # the usual names of an example's image


def named(data, entry):
    """The file of an entry's image, by whichever of its usual names. Raises ValueError where there is none."""
    name = next((str(entry[field]) for field in FIELDS if entry.get(field) not in (None, "")), None)
    if name is None:
        raise ValueError(f"no image; give one of {', '.join(FIELDS)}")
    return find(data, name)


def size_of(processor):
    return _plain.frame_size(processor)


def patches(processor, patch):
    """Rows and columns of a frame's patches, printed, with what is cropped away; ends where they are not whole."""
    height, width = size_of(processor)
    if height % patch or width % patch:
        raise SystemExit(f"preprocessor_config.json: {height} x {width} pixels are no whole number of {patch} px patches")
    unseen = " and ".join(f"{1 - _plain.seen(processor, w, h):.0%} of {w}:{h}" for w, h in ((1, 1), (16, 9)))
    print(f"a frame is {height} x {width} pixels, {height // patch} x {width // patch} patches; cropped away: {unseen}")
    return height // patch, width // patch


class QwenImages:
    """Images of any size as Qwen2-VL reads them: patches of 14 x 14 pixels, merged 2 x 2 into tokens.

    An image is first reduced so that its longer side has at most `longest` pixels, where given; then its size is put
    between min_pixels and max_pixels, in whole tokens, by the checkpoint's own rule.
    """

    def __init__(self, folder, vlm, min_pixels=None, max_pixels=None, longest=None):
        vision = vlm.config.vision_config
        self.processor = processor(folder, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
        self.longest, self.rope_index, size = longest, vlm.model.get_rope_index, self.processor.size
        least, most = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
        token = (self.processor.patch_size * self.processor.merge_size) ** 2
        if not token <= least <= most:
            text = f"--min-pixels {least} and --max-pixels {most} (where not given, the checkpoint's own)"
            raise SystemExit(f"{text}: the first must be at least {token}, a token's, and at most the second")
        size["shortest_edge"], size["longest_edge"] = least, most
        self.pixels = [least, most]

    def measure(self, data, name):
        """(width, height) of an image, decoded completely. Raises ValueError where one side is 200 times the other."""
        image = open_image(data, name)
        if max(image.size) > 200 * min(image.size):
            raise ValueError(f"{name}: {image.width} x {image.height} pixels, longer than 200 times its width; crop it")
        return image.size

    def grid(self, size):
        """(1, rows, columns) of the patches of an image of (width, height)."""
        size = self.reduced(size)
        patch, limits = self.processor.patch_size, self.processor.size
        token = patch * self.processor.merge_size
        high, wide = smart_resize(size[1], size[0], token, limits["shortest_edge"], limits["longest_edge"])
        return 1, high // patch, wide // patch

    def reduced(self, size):
        return size if self.longest is None else _surg.reduced(size, self.longest)

    def tokens(self, size):
        return math.prod(self.grid(size)) // self.processor.merge_size**2

    def positions(self, prefix, image_id, sizes):
        """M-RoPE positions (3, P) of a prefix: text counts on in all three, an image in time, height and width."""
        input_ids = torch.tensor([prefix])
        grids = torch.tensor([self.grid(size) for size in sizes])
        is_image = (input_ids == image_id).int()
        return self.rope_index(input_ids, mm_token_type_ids=is_image, image_grid_thw=grids)[0][:, 0]

    def read(self, data, names, sizes):
        """pixel_values (patches of all images, channels * 2 frames * patch * patch), image_grid_thw (images, 3).

        Raises ValueError where an image has no longer the size that it had when it was measured.
        """
        pictures = [open_image(data, name) for name in names]
        if self.longest:
            pictures = [p.resize(self.reduced(p.size), Image.Resampling.BICUBIC) for p in pictures]
        read = self.processor(pictures, return_tensors="pt")
        for name, size, grid in zip(names, sizes, read["image_grid_thw"].tolist(), strict=True):
            if tuple(grid) != self.grid(size):
                raise ValueError(f"{name} has another size than when it was checked; start again")
        return {"pixel_values": read["pixel_values"], "image_grid_thw": read["image_grid_thw"]}
