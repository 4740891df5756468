"""Images are found by their usual names, and decoded as what they show; Qwen2-VL's are as many tokens as counted."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, CLIPImageProcessorPil, Qwen2VLForConditionalGeneration

from inputs import images, videos
from report import near_duplicates


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


@pytest.fixture
def drawing():
    """(8, 12) bytes of transparency: 255 where something is drawn."""
    found = np.zeros((8, 12), np.uint8)
    found[2:6, 3:7] = 255
    return found


def transparent(kind: str, path: Path, ink: int, drawing) -> str:
    """A drawing of one grey on nothing, in each way that a PNG or GIF can say so; the file's name."""
    grey = np.full_like(drawing, ink)
    if kind in ("LA", "RGBA"):
        bands = [grey] * (len(kind) - 1) + [drawing]
        picture, settings = Image.merge(kind, [Image.fromarray(band) for band in bands]), {}
    elif kind in ("L", "RGB"):  # one colour is the transparent one
        picture = Image.fromarray(np.where(drawing, ink, 77).astype(np.uint8)).convert(kind)
        settings = {"transparency": (77, 77, 77) if kind == "RGB" else 77}
    else:  # a palette
        picture = Image.fromarray(drawing // 255, "P")
        picture.putpalette([0, 0, 0, ink, ink, ink])
        settings = {"transparency": bytes([0, 255]) if kind == "P, a byte for each colour" else 0}
    name = f"a.{'gif' if kind == 'GIF' else 'png'}"
    picture.save(path / name, **settings)
    return name


TRANSPARENT = ["RGBA", "LA", "L", "RGB", "P", "P, a byte for each colour"]


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_a_dark_drawing_on_transparency_is_laid_over_white_wherever_it_is_opened(tmp_path, drawing, kind):
    name = transparent(kind, tmp_path, 40, drawing)
    expected = np.where(drawing, 40, 255)[..., None].repeat(3, 2)
    opened = images.open_image(tmp_path, name)
    assert np.array_equal(opened, expected) and opened.info["over_white"]
    assert np.array_equal(next(videos.read_frames(tmp_path, name)), expected)
    for measure in (images.measure, videos.measure):
        assert measure(tmp_path, name)[0].items() >= {"size": (12, 8), "over_white": True}.items()
    small = near_duplicates.small_picture(tmp_path, name)
    assert small[0, 0].tolist() == [255] * 3 and small.min() == 40


@pytest.mark.parametrize("kind", [*TRANSPARENT, "GIF"])
@pytest.mark.parametrize("shown", ["a white drawing", "nothing"])
def test_where_white_leaves_nothing_to_see_the_picture_is_refused(tmp_path, drawing, kind, shown):
    name = transparent(kind, tmp_path, 255 if shown == "a white drawing" else 40, drawing * (shown != "nothing"))
    text = f"{name} cannot be read: transparent, and over white nothing of it would be seen; lay it over the back"
    for read in (images.open_image, videos.measure) if kind != "GIF" else (videos.measure,):
        with pytest.raises(ValueError, match=text):
            read(tmp_path, name)


def test_an_alpha_channel_that_hides_nothing_is_no_transparency(tmp_path):
    for name, colour in (("a.png", (9, 9, 9, 255)), ("b.png", (255, 255, 255, 255))):
        Image.new("RGBA", (4, 2), colour).save(tmp_path / name)
        image = images.open_image(tmp_path, name)  # one colour alone, and a picture all the same
        assert image.getpixel((0, 0)) == colour[:3] and not image.info["over_white"]


@pytest.mark.parametrize("colour", ["grey", "RGB", "RGBA"])
def test_sixteen_bits_are_refused_with_advice_that_keeps_what_they_show(tmp_path, colour):
    """Of colours Pillow would take the upper byte: of 12 bits in 16 nothing would be left."""
    bands = {"grey": 1, "RGB": 3, "RGBA": 4}[colour]
    (tmp_path / "deep.png").write_bytes(sixteen_bits(np.full((4, 4, bands), 4095, ">u2")))
    for read in (images.open_image, videos.measure):
        with pytest.raises(ValueError, match=r"more than 8 bits a value; choose a window \(level and width\), scale"):
            read(tmp_path, "deep.png")


def sixteen_bits(values: np.ndarray) -> bytes:
    """A PNG file; Pillow writes none of 16 bits in colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, bands = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("size", "why"),
    [((4000, 4), "one side over 200 times the other; crop"), ((13_000, 100), "more than .* 12,000 a side; scale it")],
)
def test_a_strip_is_refused_before_a_processor_makes_it_a_thousand_times_larger(tmp_path, size, why):
    """Resized, or padded to a square."""
    Image.new("RGB", size).save(tmp_path / "strip.png")
    for read in (images.open_image, videos.measure):
        with pytest.raises(ValueError, match=rf"strip\.png cannot be read: .* {why}"):
            read(tmp_path, "strip.png")


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
    assert images.named(data, {"image": "", "img_id": "a.jpg", "image_id": "a"}) == ["images/a.jpg"]
    with pytest.raises(ValueError, match=r"two images, images/a\.jpg and images/b\.png, of which one"):
        images.named(data, {"image": "a", "img_id": "b"})
    assert images.named(data, {"img_id": 7}) == ["7"]
    with pytest.raises(ValueError, match="no image; give one of image, image_path, image_file"):
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


# --- counted -------------------------------------------------------------------------------------------------------


def test_the_data_s_own_images_are_counted(capsys):
    crop = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    sizes = {"a.png": ((48, 48), False), "b.png": ((96, 48), True), "v.gif": ((48, 64), False)}
    measured = {name: {"size": size, "over_white": over_white} for name, (size, over_white) in sizes.items()}
    others = {"broken.png": None, "x.wav": (16_000, -20.0), "t1.nii": [96, 96, 96]}
    lost = {"mean": 0.25, "most": 0.5, "file": "b.png"}
    assert images.summary(measured | others, crop) == {"pictures": {"files": 3, "over_white": 1, "cropped_away": lost}}
    printed = capsys.readouterr().out
    assert "transparent, laid over white: 1 of 3 pictures, such as b.png" in printed
    assert "of 3 pictures, on average 25% of the pixels are cropped away, at most 50% (b.png)" in printed
    squash = CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False)
    square = {"a.png": measured["a.png"]}
    assert images.summary(square, squash) == {"pictures": {"files": 1, "over_white": 0}}
    assert images.summary(square, crop)["pictures"]["cropped_away"]["most"] == 0
    assert images.summary(others, None) == {} and capsys.readouterr().out == ""


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
    sizes = [images.measure(data, name)[0]["size"] for name in names]
    read = qwen.read(data, names, sizes, [None, (5.0, 0.95, 1.1, 0.9)])
    assert read["image_grid_thw"].tolist() == [list(qwen.grid(size)) for size in sizes]
    assert len(read["pixel_values"]) == 4 * sum(map(qwen.tokens, sizes))
    assert all(1 <= qwen.tokens(size) <= 10 for size in sizes)
    with pytest.raises(ValueError, match=r"images/d\.png has another size than when it was checked"):
        qwen.read(data, names, [sizes[0], (1000, 20)], [None, None])


def test_limits_are_the_given_ones_and_otherwise_the_checkpoint_s(qwen_folder, vlm):
    own = images.QwenImages(qwen_folder / "model", vlm).pixels
    assert images.QwenImages(qwen_folder / "model", vlm, min_pixels=784).pixels == [784, own[1]]
    assert images.QwenImages(qwen_folder / "model", vlm, max_pixels=own[0]).pixels == [own[0], own[0]]
    for least, most in ((783, None), (None, own[0] - 1)):
        with pytest.raises(SystemExit, match="the first must be at least 784, a token's, and at most the second"):
            images.QwenImages(qwen_folder / "model", vlm, least, most)
