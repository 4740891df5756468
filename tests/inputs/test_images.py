"""Images are found by their usual names, and prepared as the checkpoint's own processor says, whatever is installed."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from inputs import images


@pytest.fixture
def data(tmp_path):
    (tmp_path / "images").mkdir()
    for name, size in (("images/a.jpg", (30, 20)), ("images/b.png", (20, 30)), ("c.jpeg", (8, 8))):
        Image.new("RGB", size).save(tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def vlm(qwen_folder):
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(qwen_folder / "model"))


# --- read ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_image_is_read_with_its_own_colours(tmp_path, mode):
    colour = {"RGB": (200, 90, 30), "RGBA": (200, 90, 30, 255), "L": 90}[mode]
    Image.new(mode, (4, 2), colour).save(tmp_path / "a.png")
    image = images.open_image(tmp_path, "a.png")
    assert (image.mode, image.size) == ("RGB", (4, 2))
    assert image.getpixel((3, 1)) == ((90, 90, 90) if mode == "L" else (200, 90, 30))


# --- found ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("images/a.jpg", "images/a.jpg"),  # a path
        ("a.jpg", "images/a.jpg"),  # a file of images/
        ("a", "images/a.jpg"),  # an ID
        ("b", "images/b.png"),
        ("c.jpeg", "c.jpeg"),
        ("nowhere", "nowhere"),  # reported as missing when it is opened
        ("x" * 300, "x" * 300),  # too long for any file
    ],
)
def test_an_image_is_named_by_path_file_or_id(data, name, found):
    assert images.find(data, name) == found


def test_the_first_of_the_usual_names_that_is_not_empty_counts(data):
    assert images.named(data, {"image": "", "img_id": "b", "image_id": "a"}) == "images/a.jpg"
    assert images.named(data, {"img_id": 7}) == "7"
    with pytest.raises(ValueError, match="no image; give one of image, image_filename, image_id, img_id"):
        images.named(data, {"picture": "a.jpg"})


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/hostname", "missing.jpg"])
def test_nothing_outside_the_data_folder_is_opened(data, name):
    Image.new("RGB", (8, 8)).save(data.parent / "outside.jpg")
    with pytest.raises(ValueError, match=r"leads outside the data folder|is missing"):
        images.open_image(data, name)


@pytest.mark.parametrize(
    ("name", "text"), [("moving.png", "3 frames"), ("cmyk.jpg", "colour mode CMYK"), ("a.gif", "neither JPEG nor PNG")]
)
def test_what_is_no_single_rgb_image_is_refused(data, name, text):
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)]
    frames[0].save(data / "moving.png", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (8, 8)).save(data / "cmyk.jpg")
    frames[0].save(data / "a.gif")
    with pytest.raises(ValueError, match=rf"{name} cannot be read: {text}"):
        images.open_image(data, name)


# --- the processor -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"])
def test_images_are_prepared_through_pillow_whatever_the_file_names(tmp_path, place, kind):
    """Through torchvision pixels would differ: a model would see other images where that is installed."""
    size = {"height": 72, "width": 72}
    config = {"image_processor_type": kind, "crop_size": size, "size": size}
    nested = {"image_processor": config} if place == "processor_config.json" else config
    (tmp_path / place).write_text(json.dumps(nested))
    assert type(images.processor(tmp_path)).__name__ == "CLIPImageProcessorPil"
    assert images.size_of(images.processor(tmp_path)) == (72, 72)


def test_a_processor_that_is_not_there_or_not_known_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"no preprocessor_config\.json that names an image_processor_type"):
        images.processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "OwnImageProcessor"}')
    with pytest.raises(SystemExit, match="transformers has no OwnImageProcessorPil"):
        images.processor(tmp_path)


def test_images_of_differing_sizes_are_refused_where_the_tower_needs_one():
    assert images.size_of(SimpleNamespace(size={"height": 30, "width": 40})) == (30, 40)
    for size in ({"shortest_edge": 30}, {"height": 30}):
        with pytest.raises(SystemExit, match="images would differ in size"):
            images.size_of(SimpleNamespace(size=size))


# --- Qwen2-VL ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((800, 400), 384, (384, 192)),
        ((400, 800), 384, (192, 384)),
        ((300, 200), 384, (300, 200)),  # a small one is not enlarged
        ((5000, 2), 384, (384, 1)),  # no side vanishes
        ((800, 400), None, (800, 400)),
    ],
)
def test_the_longer_side_is_reduced_and_the_proportions_stay(size, longest, expected):
    assert images.reduced(size, longest) == expected


@pytest.mark.parametrize("longest", [None, 100])
def test_an_image_is_read_as_it_was_counted(qwen_folder, vlm, data, longest):
    qwen = images.QwenImages(qwen_folder / "model", vlm, 28 * 28, 10 * 28 * 28, longest)
    Image.new("RGB", (313, 177)).save(data / "images/d.png")
    names = ["images/a.jpg", "images/d.png"]
    sizes = [qwen.measure(data, name) for name in names]
    read = qwen.read(data, names, sizes)
    assert read["image_grid_thw"].tolist() == [list(qwen.grid(size)) for size in sizes]
    assert len(read["pixel_values"]) == 4 * sum(map(qwen.tokens, sizes))
    assert all(1 <= qwen.tokens(size) <= 10 for size in sizes)
    with pytest.raises(ValueError, match=r"images/d\.png has another size than when it was checked"):
        qwen.read(data, names, [sizes[0], (1000, 20)])


def test_limits_are_the_given_ones_and_otherwise_the_checkpoint_s(qwen_folder, vlm):
    own = images.QwenImages(qwen_folder / "model", vlm).pixels
    assert images.QwenImages(qwen_folder / "model", vlm, min_pixels=784).pixels == [784, own[1]]
    assert images.QwenImages(qwen_folder / "model", vlm, max_pixels=own[0]).pixels == [own[0], own[0]]
    for least, most in ((783, None), (None, own[0] - 1)):
        with pytest.raises(SystemExit, match="the first must be at least 784, a token's, and at most the second"):
            images.QwenImages(qwen_folder / "model", vlm, least, most)


def test_an_image_too_long_for_the_model_s_own_rule_is_refused_by_name(qwen_folder, vlm, data):
    Image.new("RGB", (1000, 4)).save(data / "long.png")
    qwen = images.QwenImages(qwen_folder / "model", vlm)
    with pytest.raises(ValueError, match=r"long\.png: 1000 x 4 pixels, one side over 200 times the other; crop it"):
        qwen.measure(data, "long.png")
