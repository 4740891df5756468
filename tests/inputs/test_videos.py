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
    files, count, _ = videos.find(tmp_path / "data", name, fast=3, slow=2)
    if kind == "folder":
        assert (files, count) == (["v/frame_0.png", "v/frame_10.png", "v/frame_20.png"], 5)
        found = [frame for file in files for frame in videos.read_frames(tmp_path / "data", file)]
    else:
        assert (files, count) == ([name], None)
        assert videos.measure(tmp_path / "data", name)[0]["frames"] == 5
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
        ("mp4", "v.mp4 cannot be read: Invalid data found"),
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
    measured, _ = videos.measure(tmp_path / "data", name)
    media = videos.Media([name], *videos.choose(measured["frames"], 3, 2))
    assert len(videos.read(tmp_path / "data", media, [measured["sha256"]])) == 3
    with pytest.raises(ValueError, match=r"v.gif has changed since it was checked; start again"):
        videos.read(tmp_path / "data", media, ["0" * 64])
    drawn(3)[0].save(tmp_path / "data/v.gif", save_all=True, append_images=drawn(3)[1:])
    with pytest.raises(ValueError, match=r"v.gif cannot be read"):  # there is no fifth frame
        videos.read(tmp_path / "data", media)
    (tmp_path / "data/v.gif").unlink()
    for contents in (None, [measured["sha256"]]):
        with pytest.raises(ValueError, match=r"v.gif is missing"):
            videos.read(tmp_path / "data", media, contents)


def test_colours_that_are_not_rgb_and_huge_frames_are_refused_by_name(tmp_path):
    Image.new("CMYK", (8, 6)).save(tmp_path / "print.jpg")
    with pytest.raises(ValueError, match=r"print.jpg cannot be read: colour mode CMYK; convert it"):
        list(videos.read_frames(tmp_path, "print.jpg"))
    Image.new("RGB", (8, 6)).save(tmp_path / "v.gif")
    with pytest.raises(
        ValueError, match=r"v.gif cannot be read: 8 x 6 pixels, more than 47, or than 12,000 a side; scale"
    ):
        list(videos.read_frames(tmp_path, "v.gif", largest=47))


@pytest.mark.parametrize("name", ["v.gif", "v.png", "v.webp"])
def test_an_animation_that_would_take_long_to_decode_is_refused_before_that(tmp_path, name):
    frames = [Image.new("L", (100, 100), 5 * i) for i in range(41)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert videos.measure(tmp_path, name)[0]["frames"] == 41
    text = f"{name} cannot be read: 41 frames of 100 x 100 pixels, more than 400,000 together; scale them down"
    with pytest.raises(ValueError, match=text):
        next(videos.read_frames(tmp_path, name, largest=10_000))


@pytest.mark.parametrize("kind", ["GIF", "WebP", "APNG"])
def test_every_frame_of_a_transparent_animation_is_laid_over_white(tmp_path, kind):
    frames = []
    for i in range(3):
        frame = np.zeros((8, 12, 4), np.uint8)
        frame[2:6, 2 + 3 * i : 4 + 3 * i] = (200, 0, 0, 255)
        frames.append(Image.fromarray(frame))
    name = {"GIF": "v.gif", "WebP": "v.webp", "APNG": "v.png"}[kind]
    settings = {"GIF": {"disposal": 2}, "WebP": {"lossless": True}, "APNG": {"disposal": 1}}[kind]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, **settings)
    for i, frame in enumerate(videos.read_frames(tmp_path, name)):
        found = np.asarray(frame)
        assert (found == 255).all(-1).sum() == 88 and (found[2:6, 2 + 3 * i : 4 + 3 * i] == (200, 0, 0)).all()
    assert videos.measure(tmp_path, name)[0].items() >= {"size": (12, 8), "over_white": True, "frames": 3}.items()


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    exif, turned = Image.Exif(), Image.new("RGB", (6, 4))
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "a.jpg", exif=exif)
    assert [frame.size for frame in videos.read_frames(tmp_path, "a.jpg")] == [(4, 6)]


# ---- frames that are numbered ----


def clip(*numbers, **fields) -> dict:
    return {"frames": [f"frames/v1/v1_{number}.jpg" for number in numbers], **fields}


@pytest.mark.parametrize(
    "entry",
    [
        clip(8, 9, 10),
        clip(8, 9, 10, frame_numbers=[8, 9, 10]),
        clip(0, 1, 2, 3, frame_numbers=[0, 5, 10, 15]),  # named by another count
        clip(1, 2, 3, frame_numbers=[8217, 8221, 8225]),
        clip("0.25", "0.5", "1.0"),
        clip(3, 4, 4, 4),  # the last one again, up to a length
        {"frames": ["b7f.jpg", "a91.jpg", "c02.jpg"]},  # names without an order
        {"frames": ["v2/9.jpg", "v1/1.jpg"]},
    ],
)
def test_a_list_of_frames_in_the_order_of_its_numbers_is_taken(entry):
    assert videos.frames(entry) == entry["frames"]


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (clip(10, 9, 8), "frames name frames/v1/v1_10.jpg before frames/v1/v1_9.jpg: motion would be wrong; put them"),
        (clip(8, 10, 9), "name frames/v1/v1_10.jpg before frames/v1/v1_9.jpg"),
        (clip("0.5", "0.25"), "name frames/v1/v1_0.5.jpg before frames/v1/v1_0.25.jpg"),
        (clip(30, 20, 10, frame_numbers=[10, 20, 30]), "name frames/v1/v1_30.jpg before frames/v1/v1_20.jpg"),
        (clip(10, 20, 30, frame_numbers=[10, 20, 40]), r"frame_numbers \[10, 20, 40\] are not those of .*leave them"),
        (clip(10, 20, 30, frame_numbers=[30, 20, 10]), "are not in the order of time"),
    ],
)
def test_a_list_of_frames_that_contradicts_its_numbers_is_refused(entry, why):
    with pytest.raises(ValueError, match=why):
        videos.frames(entry)


@pytest.mark.parametrize(
    ("numbers", "gap"),
    [
        ([0, 1, 2, 3], None),
        ([0, 5, 10, 15], None),
        (["0.25", "0.5", "0.75", "1.0"], None),
        ([7], None),
        ([3, 17, 18, 40, 95], (3, 17)),  # chosen frames
        (["095958_1", "095959_2", "100000_3"], None),  # times, but counted as well
        ([0, 1, 2, 4, 5], (2, 4)),
        ([0, 5, 10, 20], (10, 20)),
        (["0.25", "0.5", "1.0"], ("0.5", "1.0")),
    ],
)
def test_frames_that_seem_to_be_missing_are_said_and_strides_are_complete(tmp_path, numbers, gap):
    (tmp_path / "v").mkdir()
    for number in numbers:
        (tmp_path / f"v/f_{number}.jpg").touch()
    files, count, notice = videos.find(tmp_path, "v", 9, 9)
    assert (files, count) == ([f"v/f_{number}.jpg" for number in numbers], len(numbers))
    text = "numbered at uneven steps, as if frames were missing between v/f_{}.jpg and v/f_{}.jpg"
    assert notice == (text.format(*gap) if gap else None)


def test_a_picture_without_a_number_is_no_frame_of_a_video(tmp_path):
    (tmp_path / "v").mkdir()
    for name in ("1.jpg", "2.jpg", "poster.jpg"):
        (tmp_path / "v" / name).touch()
    with pytest.raises(ValueError, match=r"v/poster.jpg has no number, as the frames beside it have; move what is no"):
        videos.find(tmp_path, "v", 9, 9)


def test_an_array_s_size_is_known_before_it_is_read(tmp_path):
    with (tmp_path / "v.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (3_000, 1080, 1920, 3)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(
        ValueError, match=r"v.npy cannot be read: its header says 18,662,400,128 bytes, and there are 128"
    ):
        videos.measure(tmp_path, "v.npy")
    with (tmp_path / "v.npy").open("ab") as file:  # now as long as it says, on a disk that keeps no zeros
        file.truncate(18_662_400_128)
    assert next(videos.read_frames(tmp_path, "v.npy", [2_999])).size == (1920, 1080)
