"""Images are prepared as the checkpoint's own processor says, whatever is installed, or as --image-fit does."""

import json
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil

from inputs import processors

CLIP = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}


@pytest.mark.parametrize("place", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"])
def test_images_are_prepared_through_pillow_whatever_the_file_names(tmp_path, place, kind):
    """Through torchvision pixels would differ: a model would see other images where that is installed."""
    size = {"height": 72, "width": 72}
    config = {"image_processor_type": kind, "crop_size": size, "size": size}
    nested = {"image_processor": config} if place == "processor_config.json" else config
    (tmp_path / place).write_text(json.dumps(nested))
    assert type(processors.load(tmp_path)).__name__ == "CLIPImageProcessorPil"
    assert processors.size_of(processors.load(tmp_path)) == (72, 72)


def test_a_processor_that_is_not_there_or_not_known_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"no preprocessor_config\.json that names an image_processor_type"):
        processors.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "OwnImageProcessor"}')
    with pytest.raises(SystemExit, match="transformers has no OwnImageProcessorPil"):
        processors.load(tmp_path)


def test_images_of_differing_sizes_are_refused_where_the_tower_needs_one():
    assert processors.size_of(SimpleNamespace(size={"height": 30, "width": 40})) == (30, 40)
    for size in ({"shortest_edge": 30}, {"height": 30}):
        with pytest.raises(SystemExit, match="images would differ in size"):
            processors.size_of(SimpleNamespace(size=size))


# --- --image-fit ----------------------------------------------------------------------------------------------------


def checkpoint(folder, **changes):
    CLIPImageProcessorPil(**{**CLIP, **changes}).save_pretrained(folder)
    return folder


def two_coloured() -> Image.Image:
    """A picture of 96 x 48 whose middle is red, and its ends blue."""
    picture = Image.new("RGB", (96, 48), (0, 0, 255))
    picture.paste((255, 0, 0), (24, 0, 72, 48))
    return picture


def pixels(processor, picture: Image.Image) -> np.ndarray:
    """What the tower sees, as bytes again: (rows, columns, 3)."""
    found = processor([picture], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    return np.rint(255 * (found * processor.image_std + processor.image_mean)).astype(int)


MEAN = (122, 116, 104)  # CLIP's, of 255


@pytest.mark.parametrize(
    ("fit", "middle", "left", "corner"),
    [
        ("crop", (255, 0, 0), (255, 0, 0), (255, 0, 0)),
        ("squash", (255, 0, 0), (0, 0, 255), (0, 0, 255)),
        ("pad", (255, 0, 0), (0, 0, 255), MEAN),
    ],
)
@pytest.mark.parametrize("own", [{}, {"do_center_crop": False}, {"do_center_crop": False, "size": CLIP["crop_size"]}])
def test_an_image_is_cropped_squashed_or_padded_and_transformers_does_the_same_with_what_is_saved(
    tmp_path, fit, middle, left, corner, own
):
    args = Namespace(image_fit=fit)
    processor = processors.fitted(checkpoint(tmp_path / "own", **own), args)
    seen = pixels(processor, wide := two_coloured())
    assert seen.shape == (48, 48, 3) and processors.size_of(processor) == (48, 48)
    assert tuple(seen[24, 24]) == middle and tuple(seen[24, 1]) == left and tuple(seen[1, 1]) == corner
    processor.save_pretrained(tmp_path / "merged")
    again = AutoImageProcessor.from_pretrained(tmp_path / "merged")  # as whoever uses the merged model opens it
    assert np.array_equal(pixels(again, wide), seen)
    for given in (None, fit):  # and as the script opens it: its own is now what it was trained with
        args = Namespace(image_fit=given)
        assert processors.fitted(tmp_path / "merged", args).to_dict() == processor.to_dict()
        assert args.image_fit == fit


@pytest.mark.parametrize(
    ("own", "fit"),
    [
        ({}, "crop"),
        ({"do_center_crop": False, "size": CLIP["crop_size"]}, "squash"),
        ({"do_center_crop": False}, None),
        ({"do_center_crop": False, "size": CLIP["crop_size"], "do_resize": False}, None),
    ],
)
def test_without_the_flag_images_are_prepared_as_the_checkpoint_says(tmp_path, own, fit):
    args = Namespace(image_fit=None)
    processor = processors.fitted(checkpoint(tmp_path, **own), args)
    assert processor.to_dict() == CLIPImageProcessorPil(**{**CLIP, **own}).to_dict() and args.image_fit == fit
    if fit is None:  # images of several sizes would not fit into one batch
        with pytest.raises(SystemExit, match=r"images would differ in size; .* or choose --image-fit"):
            processors.size_of(processor)


def test_a_fit_that_a_processor_cannot_do_is_refused(tmp_path):
    transformers.ConvNextImageProcessorPil().save_pretrained(tmp_path / "a")  # which crops by a share of its own
    with pytest.raises(SystemExit, match="--image-fit pad: ConvNextImageProcessorPil has ways of its own"):
        processors.fitted(tmp_path / "a", Namespace(image_fit="pad"))
    checkpoint(tmp_path / "b", crop_size={"height": 48, "width": 64})
    with pytest.raises(SystemExit, match="--image-fit pad: CLIPImageProcessorPil has ways of its own"):
        processors.fitted(tmp_path / "b", Namespace(image_fit="pad"))


# --- what is cropped away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "size", "left"),
    [
        ({"size": {"shortest_edge": 256}}, (100, 100), 224**2 / 256**2),  # DINOv2's
        ({"size": {"shortest_edge": 256}}, (160, 90), 224**2 / (256 * 256 * 16 / 9)),
        ({"size": {"height": 256, "width": 256}}, (160, 90), 224**2 / 256**2),
        ({"size": {"shortest_edge": 224}}, (1280, 1024), 0.8),
        ({"size": {"shortest_edge": 224}}, (1072, 1920), 0.5583),
        ({"size": {"shortest_edge": 224}, "do_resize": False}, (448, 112), 0.5),
    ],
)
def test_the_share_of_an_image_that_is_cropped_away(settings, size, left):
    processor = SimpleNamespace(crop_size={"height": 224, "width": 224}, **settings)
    assert processors.cropped_away(processor, *size) == pytest.approx(1 - left, abs=1e-4)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (144, 96), (96, 97)])
def test_what_is_counted_as_cropped_away_is_not_seen(tmp_path, size):
    """Of a picture whose pixels count up from left to right and from top to bottom."""
    processor, (width, height) = processors.load(checkpoint(tmp_path, size={"shortest_edge": 60})), size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    seen = pixels(processor, Image.fromarray(ramp))
    left = np.prod([(np.ptp(seen[..., axis]) + 1) / 256 for axis in (0, 1)])
    assert processors.cropped_away(processor, *size) == pytest.approx(1 - left, abs=0.08)
