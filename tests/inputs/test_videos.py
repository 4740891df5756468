"""Videos of every kind: which frames are shown, and that the same come out of each."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from drawn_videos import drawn, save_as
from PIL import Image

from inputs import videos


@pytest.mark.parametrize(
    ("count", "n", "expected"),
    [
        (8, 4, [0, 2, 5, 7]),
        (8, 6, [0, 1, 3, 4, 6, 7]),
        (8, 8, list(range(8))),
        (8, 20, list(range(8))),
        (100, 4, [0, 33, 66, 99]),
        (5, 4, [0, 1, 3, 4]),
        (3, 4, [0, 1, 2]),
        (9, 1, [0]),
        (9, 2, [0, 8]),
    ],
)
def test_frames_are_chosen_evenly_with_the_first_and_the_last(count, n, expected):
    assert videos.evenly(count, n) == expected


def test_frames_are_chosen_evenly_in_order_and_the_first_is_always_in():
    """And only a true half is rounded as one: 7 * (29 / 14) in floating point may be a little more than 14.5."""
    for count in range(1, 40):
        for n in range(1, 40):
            chosen = videos.evenly(count, n)
            assert len(chosen) == min(count, n) and chosen == sorted(set(chosen)) and chosen[0] == 0
            assert n == 1 or chosen[-1] == count - 1
            gaps = np.diff(chosen)
            assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
            assert n == 1 or count <= n or chosen == [round(Fraction(i * (count - 1), n - 1)) for i in range(n)]


def test_both_paths_choose_their_own_frames_and_each_is_read_once():
    assert videos.choose(9, fast=5, slow=2) == ([0, 2, 4, 6, 8], [0, 1, 2, 3, 4], [0, 4])


@pytest.mark.parametrize("kind", ["folder", "npy", "gif", "webp", "apng", "apng poster"])
def test_the_same_frames_come_out_of_every_kind_of_video(tmp_path, kind):
    frames = drawn()
    name = save_as(kind, tmp_path / "data", frames)
    files, count = videos.find(tmp_path / "data", name, fast=3, slow=2)
    if kind == "folder":
        assert (files, count) == (["v/frame_0.png", "v/frame_10.png", "v/frame_20.png"], 5)
        found = [frame for file in files for frame in videos.read_frames(tmp_path / "data", file)]
    else:
        assert (files, count) == ([name], None)
        assert videos.measure(tmp_path / "data", name)[0] == 5
        found = list(videos.read_frames(tmp_path / "data", name, [0, 2, 4]))
    apart = np.array([[np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() for b in frames] for a in found])
    assert apart.argmin(1).tolist() == [0, 2, 4]
    assert kind == "gif" or apart.min(1).max() == 0  # 256 colours for 480 pixels are near


def break_video(kind: str, data: Path) -> str:
    """A video of which something is wrong; its name."""
    if kind == "missing":
        return "videos/none.gif"
    if kind == "outside":
        np.save(data.parent / "out.npy", np.zeros((2, 8, 8, 3), np.uint8))
        return "../out.npy"
    if kind == "empty folder":
        (data / "empty").mkdir()
        return "empty"
    if kind == "no frame":
        (data / "odd").mkdir()
        (data / "odd/thumbs.db").write_text("")
        return "odd"
    if kind == "mp4":
        (data / "v.mp4").write_bytes(b"\0" * 100)
        return "v.mp4"
    if kind == "cut off":
        save_as("gif", data / "cut", drawn())
        path = data / "cut/v.gif"
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        return "cut/v.gif"
    array = np.zeros((2, 8, 8, 3), np.uint8)
    if kind == "floats":
        array = array.astype(np.float32)
    if kind == "grey":
        array = array[..., 0]
    if kind == "pickled":
        array = np.array([{"a": 1}], dtype=object)
    np.save(data / "v.npy", array)
    if kind == "cut array":
        path = data / "v.npy"
        path.write_bytes(path.read_bytes()[:-10])
    return "v.npy"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "videos/none.gif is missing"),
        ("outside", "outside the data folder"),
        ("empty folder", "empty, an empty folder, is none of .jpg"),
        ("no frame", "odd/thumbs.db is none of"),
        ("mp4", "v.mp4 is none of"),
        ("cut off", "cut/v.gif cannot be read"),
        ("floats", "float32 of shape (2, 8, 8, 3), not uint8"),
        ("grey", "not uint8 (frames, height, width, 3)"),
        ("pickled", "v.npy cannot be read"),
        ("cut array", "v.npy cannot be read"),
    ],
)
def test_videos_that_cannot_be_used_are_refused_by_name(tmp_path, kind, words):
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(ValueError, match=re.escape(words)):
        for name in videos.find(data, break_video(kind, data), fast=2, slow=2)[0]:
            videos.measure(data, name)


def test_a_video_of_another_length_or_content_than_when_it_was_checked_is_refused(tmp_path):
    name = save_as("gif", tmp_path / "data", drawn())
    frames, content = videos.measure(tmp_path / "data", name)
    media = videos.Media([name], *videos.choose(frames, 3, 2))
    assert len(videos.read(tmp_path / "data", media, [content])) == 3
    with pytest.raises(ValueError, match=r"v.gif has changed since it was checked; start again"):
        videos.read(tmp_path / "data", media, ["0" * 64])
    drawn(3)[0].save(tmp_path / "data/v.gif", save_all=True, append_images=drawn(3)[1:])
    with pytest.raises(ValueError, match=r"v.gif cannot be read"):  # there is no fifth frame
        videos.read(tmp_path / "data", media)
    (tmp_path / "data/v.gif").unlink()
    for contents in (None, [content]):
        with pytest.raises(ValueError, match=r"v.gif is missing"):
            videos.read(tmp_path / "data", media, contents)


def test_colours_that_are_not_rgb_and_huge_frames_are_refused_by_name(tmp_path):
    Image.new("CMYK", (8, 6)).save(tmp_path / "print.jpg")
    with pytest.raises(ValueError, match=r"print.jpg cannot be read: colour mode CMYK; convert it"):
        list(videos.read_frames(tmp_path, "print.jpg"))
    Image.new("RGB", (8, 6)).save(tmp_path / "v.gif")
    with pytest.raises(ValueError, match=r"v.gif cannot be read: 8 x 6 pixels, more than 47; scale it down"):
        list(videos.read_frames(tmp_path, "v.gif", largest=47))


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    exif, turned = Image.Exif(), Image.new("RGB", (6, 4))
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "a.jpg", exif=exif)
    assert [frame.size for frame in videos.read_frames(tmp_path, "a.jpg")] == [(4, 6)]
