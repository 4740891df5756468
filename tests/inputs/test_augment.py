"""--augment: what is drawn, and that what a picture or a volume is asked about stays as it was."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from inputs.images import augmented, open_image
from inputs.task import LIGHT, SCALE, TURN, Task
from inputs.volumes import turned

SAME = (0.0, 1.0, 1.0, 1.0)  # degrees, scale, contrast, brightness
MOST = [(d, s, c, b) for d in (-TURN, TURN) for s in (0.95, 1.05) for c in (0.9, 1.1) for b in (0.9, 1.1)]


def drawn(step: int | None, seed: int = 0, name: str = "q1", augment: bool = True) -> tuple | None:
    task = Task(SimpleNamespace(augment=augment, seed=seed), None)
    task.step = step
    return task.change(SimpleNamespace(ids=[name, "q2"]))


def many(count: int = 200) -> list[tuple]:
    return [drawn(step) for step in range(1, count + 1)]


def scene(width: int, height: int, **spots) -> Image.Image:
    """Grey, with a disc of each colour: its centre as shares of width and height, its radius as one of the height."""
    y, x = np.mgrid[:height, :width]
    pixels = np.full((height, width, 3), 90, np.uint8)
    for colour, (across, down, radius) in spots.items():
        inside = np.hypot(x - across * width, y - down * height) < radius * height
        pixels[inside] = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    return Image.fromarray(pixels)


SPOTS = {"red": (0.3, 0.3, 0.1), "lime": (0.75, 0.25, 0.08), "blue": (0.7, 0.75, 0.12)}


def spots(image: Image.Image) -> dict[str, list[tuple]]:
    """Of each colour what is mostly it: (centre as shares of width and height, pixels) of every connected region."""
    pixels, found = np.asarray(image).astype(int), {}
    for i, colour in enumerate(("red", "lime", "blue")):
        others = np.delete(pixels, i, axis=2).max(2)
        regions, count = ndimage.label(pixels[..., i] - others > 127)
        indices = range(1, count + 1)
        centres = ndimage.center_of_mass(np.ones_like(regions), regions, indices)
        sizes = ndimage.sum_labels(np.ones_like(regions), regions, indices)
        found[colour] = [((x / image.width, y / image.height), n) for (y, x), n in zip(centres, sizes, strict=True)]
    return found


# --- what is drawn -----------------------------------------------------------------------------------------------


def test_it_is_drawn_from_seed_step_and_example_alone():
    assert drawn(3) == drawn(3)
    assert len({drawn(3), drawn(4), drawn(3, seed=1), drawn(3, name="q9")}) == 4
    random.seed(7)
    assert drawn(3) == drawn(3)


def test_nothing_is_drawn_without_the_flag_or_where_nothing_is_trained():
    assert drawn(3, augment=False) is None and drawn(None) is None
    image, volume = scene(40, 30), torch.ones(1, 4, 4, 4)
    assert augmented(image, None) is image and turned(volume, None) is volume


def test_amounts_are_bounded_and_go_either_way():
    columns = list(zip(*many(), strict=True))
    for values, middle, most in zip(columns, (0, 1, 1, 1), (TURN, SCALE, LIGHT, LIGHT), strict=True):
        assert all(abs(value - middle) <= most for value in values)
        assert min(values) < middle - 0.9 * most and max(values) > middle + 0.9 * most
        assert abs(np.mean(values) - middle) < most / 5
    assert abs(np.corrcoef(columns)[np.triu_indices(4, 1)]).max() < 0.25  # each is a draw of its own
    assert (TURN, SCALE, LIGHT) == (5, 0.05, 0.10)


# --- images ------------------------------------------------------------------------------------------------------


def test_an_image_keeps_its_size_and_without_a_change_its_pixels():
    for size in ((64, 48), (31, 57), (3, 600)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        assert np.array_equal(augmented(image, SAME), image)
        found = augmented(image, MOST[0])
        assert (found.size, found.mode) == (size, "RGB") and not np.array_equal(found, image)


@pytest.mark.parametrize("degrees", [-5.0, 3.0])
def test_an_image_is_turned_as_pillow_turns_it_also_where_it_is_no_square(degrees):
    image = scene(120, 80, **SPOTS)
    expected = image.rotate(-degrees * 80 / 120, Image.Resampling.BILINEAR)  # which it does counterclockwise
    inside = (slice(12, -12), slice(12, -12))
    found, expected = (np.asarray(each, int)[inside] for each in (augmented(image, (degrees, 1, 1, 1)), expected))
    assert abs(found - expected).mean() < 0.2 and abs(found - np.asarray(image, int)[inside]).mean() > 1


@pytest.mark.parametrize("scale", [0.95, 1.05])
def test_an_image_is_scaled_about_its_centre(scale):
    image = scene(400, 300, **SPOTS)
    found = spots(augmented(image, (0, scale, 1, 1)))
    for colour, (((x, y), n),) in spots(image).items():
        ((new_x, new_y), new_n), *_ = found[colour]
        assert (new_x - 0.5, new_y - 0.5) == pytest.approx((scale * (x - 0.5), scale * (y - 0.5)), abs=0.003)
        assert new_n / n == pytest.approx(scale**2, rel=0.02)


def test_contrast_is_about_the_mean_and_brightness_a_factor():
    image = scene(64, 48, **SPOTS)
    before = np.asarray(image, float)
    darker, flatter = (np.asarray(augmented(image, (0, 1, *light)), float) for light in ((1, 0.9), (0.9, 1)))
    assert abs(darker - 0.9 * before).max() <= 0.51
    assert flatter.mean() == pytest.approx(before.mean(), abs=0.5)
    assert flatter.std() == pytest.approx(0.9 * before.std(), rel=0.01)


def test_colours_counts_quadrants_and_sizes_stay():
    image = scene(320, 240, **SPOTS)
    before = spots(image)
    for change in [*many(60), *MOST]:
        found = spots(augmented(image, change))
        for colour, ((centre, n),) in before.items():
            ((new, new_n),) = found[colour]  # as many as before: one
            assert [share > 0.5 for share in new] == [share > 0.5 for share in centre]
            assert math.dist(new, centre) < 0.05
            assert math.sqrt(new_n / n) == pytest.approx(1, abs=0.06)


def test_what_is_further_than_7_percent_from_an_edge_stays_in_sight_also_of_a_long_strip():
    margin = 0.07
    for width, height in ((100, 100), (160, 90), (400, 40)):
        places = [(x, y) for x in (margin, 0.5, 1 - margin) for y in (margin, 0.5, 1 - margin)]
        for x, y in places:
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[round(y * (height - 1)), round(x * (width - 1))] = 255
            for change in MOST[::4]:
                assert np.asarray(augmented(Image.fromarray(pixels), change)).max() > 30


def test_an_image_is_never_mirrored():
    image = scene(96, 72, **SPOTS)
    mirrors = [image.transpose(getattr(Image.Transpose, f"FLIP_{way}")) for way in ("LEFT_RIGHT", "TOP_BOTTOM")]

    def likeness(a, b) -> float:
        return np.corrcoef(np.asarray(a, float).ravel(), np.asarray(b, float).ravel())[0, 1]

    for change in many(100):
        found = augmented(image, change)
        assert likeness(found, image) > max(0.7, *(likeness(found, mirror) + 0.3 for mirror in mirrors))


def test_where_nothing_was_its_edge_goes_on():
    """A black corner would be a sight of its own: endoscopes have them."""
    for size in ((60, 40), (40, 60), (400, 3), (1, 50), (1, 1)):
        image = Image.new("RGB", size, (200, 120, 80))
        for change in MOST:
            assert np.array_equal(augmented(image, (*change[:2], 1, 1)), image)
            assert np.asarray(augmented(image, change)).min() > 50  # what is bright does not overflow, either


def test_as_many_threads_as_there_are_change_nothing(tmp_path):
    """A worker has one, the trainer several."""
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    volume, found, before = torch.randn(2, 40, 50, 30), [], torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append((open_image(tmp_path, "a.png", MOST[3]).tobytes(), turned(volume, MOST[3]).numpy().tobytes()))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


# --- volumes -----------------------------------------------------------------------------------------------------


def brain(shape=(40, 48, 32)) -> torch.Tensor:
    """(1, x, y, z): an ellipsoid in zeros, with a lesion on the right, which is where x is large."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    tissue = sum((axis / 0.7) ** 2 for axis in axes) < 1
    lesion = sum((axis - at) ** 2 for axis, at in zip(axes, (0.3, 0.2, 0.1), strict=True)) < 0.04
    return torch.from_numpy((tissue + 3.0 * lesion).astype(np.float32))[None]


@pytest.mark.parametrize("change", [(5.0, 1.0), (-4.0, 1.05), (3.0, 0.95)])
def test_a_volume_is_turned_in_its_axial_plane_as_scipy_turns_it(change):
    """In voxels without a shear, although its sides differ; slices are not mixed, whose distance is seldom the same."""
    volume = brain()
    angle, centre = math.radians(change[0]) * 40 / 48, (np.array(volume.shape[1:3]) - 1) / 2
    matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / change[1]
    slices = volume[0].numpy().transpose(2, 0, 1)
    options = {"offset": centre - matrix @ centre, "order": 1, "mode": "nearest"}
    expected = np.stack([ndimage.affine_transform(each, matrix, **options) for each in slices], axis=2)
    found = turned(volume, change)[0].numpy()
    assert abs(found - expected).max() < 1e-3 and abs(found - volume[0].numpy()).max() > 0.5


def test_background_stays_background_and_left_stays_left():
    volume = brain()
    middle = volume.shape[1] / 2
    mask = volume[0].numpy() > 0
    far = ~ndimage.binary_dilation(mask, iterations=5)
    for change in [*many(60), *MOST]:
        found = turned(volume, change)[0].numpy()
        assert found.shape == mask.shape and not found[far].any()
        assert ndimage.center_of_mass(found > 2)[0] > middle + 3  # the lesion
        likeness = [np.corrcoef(found.ravel(), volume[0].numpy()[::way].ravel())[0, 1] for way in (1, -1)]
        assert likeness[0] > 0.85 and likeness[0] > likeness[1] + 0.1


def test_times_and_channels_of_a_volume_are_changed_alike():
    series = torch.stack([brain() * factor for factor in (1, 2, 0)], dim=-1)  # the last is empty: --fit-time
    channels = torch.cat([brain(), brain().flip(1)])
    for change in many(5):
        found = turned(series, change)
        assert torch.equal(found[..., 0], turned(brain(), change)) and torch.equal(found[..., 1], 2 * found[..., 0])
        assert not found[..., 2].any()
        assert torch.equal(turned(channels, change)[1:], turned(brain().flip(1), change))
