"""Video files: the frames that are read are PyAV's own, of a part too, and of a long file few are decoded."""

import builtins
import hashlib
import re
import struct
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
from encoded_videos import all_frames, encode, moving, names_of
from PIL import Image

from inputs import files, images, video_files, videos
from report.examples import media_of
from report.near_duplicates import small_picture

KINDS = {  # name -> how it is encoded
    "long_gop.mp4": {"sound": 2.4},
    "short_gop.mp4": {"g": 12, "bf": 3},
    "open_gop.mov": {"x264-params": "open-gop=1:keyint=12:bframes=3"},
    "refresh.mp4": {"x264-params": "intra-refresh=1:keyint=12"},
    "ten_bits.mp4": {"pixels": "yuv420p10le"},
    "interlaced.mp4": {"flags": "+ildct+ilme"},
    "xvid.avi": {"bf": 2},
    "plain.avi": {"sound": 0},
    "motion_jpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "vp9.webm": {"g": 20, "sound": 3.4},
    "vp8.webm": {"codec": "libvpx", "g": 20},
    "other.mkv": {"codec": "libx264"},
    "upper.MP4": {"g": 12},
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_that_pyav_decodes_in_their_order(tmp_path, name):
    """Each alone, all in one pass, and some, which are decoded from the keyframes before them."""
    if name.startswith("vp8"):
        pytest.importorskip("av")
        if "libvpx" not in av.codecs_available:
            pytest.skip("this build of PyAV encodes no VP8")
    path = encode(tmp_path / name.lower(), moving(60), **KINDS[name]).rename(tmp_path / name)
    times, expected = all_frames(path)
    names = names_of(tmp_path, name)
    assert len(names) == len(expected) == 60
    assert np.abs(np.array(times) - [float(found.partition("=")[2]) for found in names]).max() < 0.001
    for wanted in ([name] for name in names), [names], [names[i::7] for i in range(7)], [names[::-1]]:
        for some in wanted:
            found = video_files.read(tmp_path, some)
            assert found.keys() == set(some)
            assert all(found[one].tobytes() == expected[names.index(one)].tobytes() for one in some)
    assert images.measure(tmp_path, names[1])[0] == {"size": (64, 48), "over_white": False}


@pytest.mark.parametrize("ending", ["mp4", "webm"])
def test_of_a_variable_rate_frames_are_those_shown_nearest_to_even_times(tmp_path, ending):
    times = [40 * i for i in range(20)] + [800 + 390 * i for i in range(10)]
    path = encode(tmp_path / f"v.{ending}", moving(30), times=times)
    at, expected = all_frames(path)
    assert np.allclose(at, np.array(times) / 1000)
    names = names_of(tmp_path, path.name)
    wanted = [float(name.partition("=")[2]) for name in names]
    assert (wanted[0], wanted[-1]) == (0, 4.31) and np.ptp(np.diff(wanted)) < 0.0021
    for name, time in zip(names, wanted, strict=True):
        nearest = min(at, key=lambda shown: abs(round(shown - time, 4)))
        assert video_files.read(tmp_path, [name])[name].tobytes() == expected[at.index(nearest)].tobytes()


def test_a_part_is_cut_out_by_its_seconds(tmp_path):
    encode(tmp_path / "v.mp4", moving(50), rate=10)
    names = names_of(tmp_path, "v.mp4", 1.2, 2)
    assert names == [f"v.mp4#t={time}00" for time in (1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9)]
    assert videos.find(tmp_path, "v.mp4", 2, 3, (1.2, 2)) == ([names[0], names[4], names[7]], 8, None)
    assert videos.clip(tmp_path, {"video": "v.mp4", "start": "1.2", "end": 2}, 2)[0] == [names[0], names[7]]
    assert names_of(tmp_path, "v.mp4", 0, 5) == names_of(tmp_path, "v.mp4")
    assert len(names_of(tmp_path, "v.mp4", 4.5)) == 5
    expected = all_frames(tmp_path / "v.mp4")[1]
    assert video_files.read(tmp_path, list(names))[names[3]].tobytes() == expected[15].tobytes()


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"video": "v.mp4", "start": -1}, "start and end must be seconds, 0 <= start < end: {'start': -1}"),
        ({"video": "v.mp4", "start": 2, "end": 1}, "must be seconds, 0 <= start < end"),
        ({"video": "v.mp4", "start": "a"}, "must be seconds"),
        ({"video": "v.mp4", "end": [1]}, "must be seconds"),
        ({"video": "v.mp4", "end": float("nan")}, "must be seconds"),
        ({"video": "v.mp4", "end": 2.5}, "v.mp4 lasts 2.000 s, and start 0, end 2.5 must lie within"),
        ({"video": "v.mp4", "start": 2}, "v.mp4 lasts 2.000 s, and start 2 must lie within; correct it"),
        (
            {"video": "v.mp4", "start": 1.01, "end": 1.05},
            "no frame within start 1.01, end 1.05, one lasts 0.100 s; lengthen the part",
        ),
        (
            {"video": "v.gif", "end": 1},
            "start and end are of a video file (.mp4, .mov, .avi, .webm, .mkv), and video na",
        ),
        ({"frames": ["1.jpg"], "end": 1}, "start and end are of a video file"),
        (
            {"frames": ["1.jpg"], "video": "v.mp4"},
            "frames beside video v.mp4, of which one would not be shown; keep one",
        ),
        ({"video": "w.mp4"}, "w.mp4 is missing"),
    ],
)
def test_parts_that_are_none_are_refused(tmp_path, entry, why):
    encode(tmp_path / "v.mp4", moving(20), rate=10)
    with pytest.raises(ValueError, match=re.escape(why)):
        videos.clip(tmp_path, entry, 8)


def test_a_folder_of_frames_may_be_named_like_a_video_file(tmp_path):
    (tmp_path / "v.mp4").mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"v.mp4/{i}.png")
    assert videos.find(tmp_path, "v.mp4", 2, 1) == (["v.mp4/0.png", "v.mp4/2.png"], 3, None)
    assert len(media_of(tmp_path, {"video": "v.mp4"})) == 3
    with pytest.raises(ValueError, match=r"v.mp4 cannot be opened: it is a folder"):
        videos.find(tmp_path, "v.mp4", 2, 1, (0, 1))


def test_a_label_beside_frames_is_no_video(tmp_path):
    assert videos.clip(tmp_path, {"frames": ["1.jpg"], "video": "VID01"}, 8) == (["1.jpg"], None)


def test_of_twenty_minutes_few_frames_are_decoded(tmp_path, monkeypatch):
    encode(tmp_path / "v.mp4", moving(40) * 150, rate=5, g=25, preset="ultrafast")
    decoded, original = [], video_files.Video.frames

    def counting(self, time):
        for frame in original(self, time):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_files.Video, "frames", counting)
    names, count, _ = videos.find(tmp_path, "v.mp4", 8, 4)
    assert count == 6000 and len(names) == 8 + 2 and names[-1] == "v.mp4#t=1199.800"
    found = images.open_images(tmp_path, names, [None] * len(names))
    assert len(found) == 10 and len(decoded) < 10 * 30
    decoded.clear()
    near = [f"v.mp4#t={600 + i / 5:.3f}" for i in range(20)]
    video_files.read(tmp_path, near)
    assert len(decoded) < 30  # one pass


def test_what_an_editor_has_cut_away_is_not_shown_and_sound_may_begin_first(tmp_path):
    """An editor writes a list of what is shown, and leaves the rest in the file."""
    file = bytearray(encode(tmp_path / "v.mp4", moving(50), g=12).read_bytes())
    at = file.index(b"elst") + 12  # behind version and count: how long in milliseconds, from where
    long, start = struct.unpack(">Ii", file[at : at + 8])
    assert long == 2000
    file[at : at + 8] = struct.pack(">Ii", 1000, start + 12_800 * 13 // 25)
    (tmp_path / "v.mp4").write_bytes(file)
    encode(tmp_path / "late.mp4", moving(25), times=[1000 + 40 * i for i in range(25)], sound=2)
    for name, first in (("v.mp4", "v.mp4#t=0.000"), ("late.mp4", "late.mp4#t=1.000")):
        expected, names = all_frames(tmp_path / name)[1], names_of(tmp_path, name)
        found = video_files.read(tmp_path, names)
        assert names[0] == first and len(names) == len(expected) == 25
        assert all(found[name].tobytes() == picture.tobytes() for name, picture in zip(names, expected, strict=True))
    with pytest.raises(ValueError, match=r"v.mp4 lasts 1.000 s, and start 1 must lie within; correct it"):
        names_of(tmp_path, "v.mp4", 1)


def test_an_end_may_be_rounded_and_frames_be_a_thousand_a_second(tmp_path):
    encode(tmp_path / "v.mp4", moving(50), rate=30)  # 1.6667 s
    assert names_of(tmp_path, "v.mp4", 0, 1.67) == names_of(tmp_path, "v.mp4")
    encode(tmp_path / "fast.mp4", moving(20), rate=1000)
    found, expected = names_of(tmp_path, "fast.mp4"), all_frames(tmp_path / "fast.mp4")[1]
    assert [picture.tobytes() for picture in video_files.read(tmp_path, found).values()] == [
        picture.tobytes() for picture in expected
    ]


def test_a_file_under_the_ending_of_another_kind_is_read(tmp_path):
    encode(tmp_path / "v.webm", moving(5)).rename(tmp_path / "v.mp4")
    assert len(names_of(tmp_path, "v.mp4")) == 5


def test_a_telephone_s_video_is_turned_as_players_do(tmp_path):
    """The matrix that a telephone held upright writes: turn it clockwise by a quarter."""
    path = encode(tmp_path / "v.mp4", moving(5))
    file = bytearray(path.read_bytes())
    at = file.index(b"tkhd") + 44  # behind version, times, track, length, layer and volume
    assert struct.unpack(">9i", file[at : at + 36])[:5] == (65536, 0, 0, 0, 65536)
    expected = all_frames(path)[1][0]
    file[at : at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(file)
    found = images.open_image(tmp_path, "v.mp4#t=0.000")
    assert found.size == (48, 64) and (np.asarray(found) == np.rot90(expected, -1)).all()


# ---- files that are no good ----


def damaged(kind: str, path):
    """A file of two seconds of which something is wrong."""
    if kind in ("sound alone", "sound with a cover"):
        with av.open(str(path), "w") as file:
            stream = file.add_stream("aac", rate=48_000)
            if kind == "sound with a cover":
                cover = file.add_stream("mjpeg", rate=1)
                cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
                cover.disposition = av.stream.Disposition.attached_pic.value
                file.mux(cover.encode(av.VideoFrame.from_ndarray(moving(1)[0], format="rgb24")))
                file.mux(cover.encode())
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 48_000
            file.mux(stream.encode(silence))
            file.mux(stream.encode())
        return
    if kind == "no frames":
        with av.open(str(path), "w", options={"movflags": "empty_moov"}) as file:
            stream = file.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            file.start_encoding()
        return
    encode(path, moving(50), sound=2)
    file = bytearray(path.read_bytes())
    middle = len(file) // 2
    if kind == "cut off":
        del file[middle:]
    if kind == "garbage":
        file[:] = np.random.default_rng(0).bytes(5000)
    if kind == "empty":
        file.clear()
    if kind == "overwritten":
        file[middle : middle + 300] = bytes(300)
    if kind == "a list of other files":
        encode(path.with_name("another.mp4"), moving(3))  # FFmpeg would play this one
        file[:] = b"ffconcat version 1.0\nfile another.mp4\n"
    path.write_bytes(file)


@pytest.mark.parametrize(
    ("kind", "ending", "why"),
    [
        ("cut off", "mp4", "cannot be read: it should last 2.0.. s, and ends at .* frames: cut off; copy it again"),
        ("cut off", "webm", "cannot be read: it should last 2.0.. s, and ends at .* frames: cut off; copy it again"),
        ("garbage", "mp4", "cannot be read: Invalid data found"),
        ("garbage", "webm", "cannot be read: "),
        ("garbage", "avi", "cannot be read: "),
        ("empty", "mov", "cannot be read: "),
        ("sound alone", "mp4", "cannot be read: it holds no video"),
        ("no frames", "mp4", "cannot be read: it has no frames"),
        ("overwritten", "mp4", r"cannot be read at \d\.\d\d0 s: Invalid data found"),
        ("sound with a cover", "mp4", "cannot be read: it holds no video"),
        ("a list of other files", "mp4", "cannot be read: Invalid argument; copy it again, or write it anew"),
    ],
)
def test_a_file_that_is_damaged_is_refused_with_its_name_and_the_time(tmp_path, kind, ending, why):
    damaged(kind, tmp_path / f"v.{ending}")
    with pytest.raises(ValueError, match=rf"^v\.{ending} {why}"):
        video_files.read(tmp_path, names_of(tmp_path, f"v.{ending}"))


def test_a_frame_that_is_no_longer_there_is_refused(tmp_path):
    encode(tmp_path / "v.mp4", moving(50))
    with pytest.raises(ValueError, match=r"v.mp4 cannot be read at 3.000 s: no frame is there any more"):
        video_files.read(tmp_path, ["v.mp4#t=0.000", "v.mp4#t=3.000"])


def test_times_that_an_avi_cannot_keep_are_refused(tmp_path):
    """AVI has no place for when a frame is shown, so of H.264 that predicts backwards nobody knows."""
    encode(tmp_path / "v.avi", moving(50), codec="libx264")
    with pytest.raises(ValueError, match=r"v.avi cannot be read at .* not in the order of their times; copy it"):
        video_files.read(tmp_path, names_of(tmp_path, "v.avi"))


def test_without_pyav_the_fault_names_the_install(tmp_path, monkeypatch):
    encode(tmp_path / "v.mp4", moving(3))
    original = builtins.__import__

    def missing(name, *rest):
        if name == "av":
            raise ImportError
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"^v.mp4 needs PyAV: pip install av, or write the frames as JPEG files"):
        names_of(tmp_path, "v.mp4")


# ---- a frame among other media ----


def test_a_file_is_hashed_once_for_all_its_frames(tmp_path, monkeypatch):
    encode(tmp_path / "v.mp4", moving(50))
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: hashed.append(args) or digest(*args))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: files.file_sha256(tmp_path, name), names_of(tmp_path, "v.mp4")))
    assert len(hashed) == 1 and len(set(found)) == 50
    assert {one.partition("#")[0] for one in found} == {hashlib.sha256((tmp_path / "v.mp4").read_bytes()).hexdigest()}
    encode(tmp_path / "v.mp4", moving(40))
    assert files.file_sha256(tmp_path, "v.mp4#t=0.000") not in found


def test_a_frame_looks_like_its_picture(tmp_path):
    encode(tmp_path / "v.mp4", moving(5))
    all_frames(tmp_path / "v.mp4")[1][2].save(tmp_path / "2.png")
    assert (small_picture(tmp_path, "v.mp4#t=0.080") == small_picture(tmp_path, "2.png")).all()
    assert images.measure(tmp_path, "v.mp4#t=0.080") == images.measure(tmp_path, "2.png")
    (tmp_path / "a#t=1.000").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a#t=1.000/b#t=2.000.png")
    assert images.open_image(tmp_path, "a#t=1.000/b#t=2.000.png").size == (4, 4)
