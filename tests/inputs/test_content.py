"""What files show is compared by what is decoded: the same under other names, in other formats, however a scan lies."""

from itertools import permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from inputs import content, data_check, images, sound, videos, volumes

RNG = np.random.default_rng(0)
SCAN = RNG.integers(1, 1000, (6, 5, 4)).astype(np.float32)


def checked(folder, measure, examples: list) -> list[str]:
    """The faults of the data check's first part."""
    given = [SimpleNamespace(where=f"{e.split}.jsonl:{i}", id=str(i), **vars(e)) for i, e in enumerate(examples, 1)]
    return [str(problem) for problem in data_check.check_media(given, data_check.open_media(folder, given, measure))[0]]


def shows(split: str, name: str, question="Is it?", recording=None) -> SimpleNamespace:
    """An example about a file; with a recording that asks it."""
    media = [name, recording] if recording else [name]
    return SimpleNamespace(split=split, groups=[name], grouped=None, media=media, shown=[name], question=question)


def nifti(path, voxels, affine=None):
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)


def test_a_scan_is_the_same_in_whatever_container_header_and_direction(tmp_path):
    np.save(tmp_path / "a.npy", SCAN)
    np.savez(tmp_path / "double.npz", SCAN.astype(np.float64))
    np.save(tmp_path / "columns.npy", np.asfortranarray(SCAN.astype(np.int16)))
    nifti(tmp_path / "b.nii.gz", SCAN)
    nifti(tmp_path / "left.nii", SCAN[::-1].astype(np.int16), np.diag([-2.0, 2, 2, 1]))
    nifti(tmp_path / "mirrored.nii.gz", SCAN[::-1])
    nifti(tmp_path / "time.nii", SCAN[..., None])
    np.save(tmp_path / "turned.npy", SCAN.transpose(2, 0, 1)[:, ::-1])  # sagittal, its header lost
    other = SCAN.copy()
    other[2, 3, 1] += 1
    np.save(tmp_path / "other.npy", other)
    names = sorted(path.name for path in tmp_path.iterdir())
    found = checked(tmp_path, volumes.measure, [shows("train", "a.npy"), *(shows("test", name) for name in names)])
    assert len(found) == len(names) - 1 and not any("other.npy" in fault for fault in found)
    assert "file b.nii.gz of test shows the same as a.npy of train (train.jsonl:1); keep it in one split" in found[1]
    assert "file a.npy of test is also in train (train.jsonl:1); keep it in one split" in found[0]


def test_every_way_a_volume_may_lie_is_one_and_its_frames_keep_their_order():
    series = RNG.integers(0, 9, (4, 5, 3, 2)).astype(np.float32)
    found = {
        content.of_voxels(series[::x, ::y, ::z].transpose(*axes, 3))
        for axes in permutations(range(3))
        for x, y, z in product((1, -1), repeat=3)
    }
    assert found == {content.of_voxels(np.asfortranarray(series))}
    assert content.of_voxels(series[..., ::-1]) not in found


def test_a_symmetric_volume_and_one_with_a_negative_zero_are_known_again():
    """Whose planes add up to the same in either direction, and along two axes."""
    ring = np.zeros((4, 4, 4), np.float32)
    ring[[0, 3, 1, 2], [1, 2, 0, 3], 1] = [1, 1, 2, 2]
    for other in (ring[::-1], ring.transpose(1, 0, 2), ring * np.where(ring, 1, -1).astype(np.float32)):
        assert content.of_voxels(other) == content.of_voxels(ring)


def test_a_picture_is_its_pixels(tmp_path):
    noise = Image.fromarray(RNG.integers(0, 255, (8, 6, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.png")
    noise.save(tmp_path / "b.png", compress_level=0, pnginfo=None, dpi=(72, 72))
    noise.convert("RGBA").save(tmp_path / "c.png")
    Image.fromarray(np.asarray(noise).reshape(6, 8, 3)).save(tmp_path / "other.png")  # the same bytes in another shape
    np.save(tmp_path / "a.npy", np.asarray(noise)[None])
    noise.save(tmp_path / "a.webp", lossless=True)
    contents = {path.name: videos.measure(tmp_path, path.name)[1] for path in tmp_path.iterdir()}
    assert contents.pop("other.png") not in contents.values() and len(set(contents.values())) == 1
    assert content.of_picture(images.open_image(tmp_path, "c.png")) in contents.values()


def test_a_recording_asks_one_question_under_whatever_name(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    tone = 0.3 * np.sin(np.arange(8_000) / 20)
    soundfile.write(tmp_path / "a.wav", tone, 16_000)
    soundfile.write(tmp_path / "b.flac", tone, 16_000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone, tone], axis=1), 16_000)
    soundfile.write(tmp_path / "c.wav", tone**3, 16_000)
    asked = [("a.wav", "Is it on?"), ("b.flac", "is it on"), ("c.wav", "Where?"), ("c.wav", "Where?")]
    examples = [shows("train", f"{i}.jpg", question, name) for i, (name, question) in enumerate(asked)]

    def measure(data, name):
        return (1, name) if name.endswith("jpg") else sound.measure(data, name)

    for i in (0, 1, 2, 3, 9):
        (tmp_path / f"{i}.jpg").touch()
    assert checked(tmp_path, measure, examples) == []
    found = checked(tmp_path, measure, [*examples, shows("test", "9.jpg", "Where?", "stereo.wav")])
    assert [fault.partition(" ")[0] for fault in found] == ["train.jsonl:1", "train.jsonl:2", "test.jsonl:5"]
    assert found[2].endswith(
        "stereo.wav is the same as a.wav, the recording of another question, 'Is it on?' (train.jsonl:1); "
        "record each, and name it in the example's audio"
    )
    found = checked(tmp_path, measure, [*examples[:2], shows("train", "9.jpg", "Why?", "a.wav")])
    assert "a.wav is also the recording of another question, 'Is it on?' (train.jsonl:1)" in found[2]
