"""Volumes: modalities and their shapes, NIfTI and array files, orientation, time, resampling, normalising."""

import gzip
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

from inputs import turns, volumes
from inputs.volumes import Modality, Volume

# ---- files ------------------------------------------------------------------------------------------------------


def anatomy(shape=(6, 7, 8)) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1000, shape).astype(np.int16)


def write_nifti(path: Path, voxels: np.ndarray, codes: str, zooms=(2.0, 3.0, 4.0)) -> None:
    """The anatomy, given in RAS, as a file whose axes run as `codes` say."""
    image = nibabel.Nifti1Image(voxels, np.diag([*zooms, 1.0]))
    wanted = nibabel.orientations.axcodes2ornt(codes)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), wanted))
    assert "".join(nibabel.aff2axcodes(image.affine)) == codes
    nibabel.save(image, path)


CODES = ["".join(c) for axes in itertools.permutations(["RL", "AP", "SI"]) for c in itertools.product(*axes)]


def test_whatever_way_the_axes_run_left_stays_left(tmp_path):
    assert len(CODES) == 48
    for codes in CODES:
        write_nifti(tmp_path / f"{codes}.nii", anatomy(), codes)
        assert np.array_equal(volumes.read_file(tmp_path, f"{codes}.nii"), anatomy())
    series = np.stack([anatomy(), 2 * anatomy()], axis=3)
    write_nifti(tmp_path / "series.nii.gz", series, "PSL")
    assert np.array_equal(volumes.read_file(tmp_path, "series.nii.gz"), series)


def test_scaled_integers_are_read_as_their_header_says(tmp_path):
    image = nibabel.Nifti1Image(anatomy(), np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, tmp_path / "a.nii")
    expected = nibabel.load(tmp_path / "a.nii").get_fdata()
    np.testing.assert_allclose(volumes.read_file(tmp_path, "a.nii"), expected, rtol=1e-6)


def test_arrays_need_no_nibabel_and_nifti_names_what_it_needs(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", anatomy())
    np.savez_compressed(tmp_path / "a.npz", volume=anatomy())
    write_nifti(tmp_path / "a.nii.gz", anatomy(), "RAS")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    for name in ("a.npy", "a.npz"):
        found = volumes.read_file(tmp_path, name)
        assert found.dtype == np.float32 and np.array_equal(found, anatomy())
    with pytest.raises(ValueError, match=r"a.nii.gz cannot be read: NIfTI needs nibabel: pip install nibabel, or"):
        volumes.read_file(tmp_path, "a.nii.gz")


def test_volumes_that_cannot_be_used_are_refused_by_name(tmp_path):
    nan, infinite = anatomy().astype(np.float32), anatomy().astype(np.float32)
    nan[2, 3, 4], infinite[0, 0, :3] = np.nan, np.inf
    arrays = {
        "nan": (nan, r"1 of its 336 voxels are NaN or infinite"),
        "inf": (infinite, r"3 of its 336 voxels are NaN or infinite"),
        "zeros": (np.zeros((4, 4, 4), np.float32), "it is empty"),
        "mask": ((anatomy() > 500).astype(np.int16), "all its voxels that are not zero are the same"),
        "none": (np.zeros((0, 4, 4), np.float32), "it is empty"),
        "flat": (anatomy()[..., 0], r"2 axes \(6, 7\), not three to five"),
        "complex": (anatomy().astype(np.complex64), "its voxels are no real numbers but complex64"),
    }
    for name, (voxels, why) in arrays.items():
        np.save(tmp_path / f"{name}.npy", voxels)
        with pytest.raises(ValueError, match=f"{name}.npy cannot be read: .*{why}"):
            volumes.read_file(tmp_path, f"{name}.npy")
        if name not in ("none", "flat"):  # which NIfTI cannot say
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}.nii.gz")
            with pytest.raises(ValueError, match=f"{name}.nii.gz cannot be read: .*{why}"):
                volumes.read_file(tmp_path, f"{name}.nii.gz")

    write_nifti(tmp_path / "complete.nii", anatomy(), "LAS")
    write_nifti(tmp_path / "complete.nii.gz", anatomy(), "LAS")
    complete, zipped = (tmp_path / "complete.nii").read_bytes(), (tmp_path / "complete.nii.gz").read_bytes()
    nowhere = nibabel.Nifti1Image(anatomy(), None)
    nowhere.header["pixdim"][1:4] = 1
    nibabel.save(nowhere, tmp_path / "nowhere.nii")
    np.savez(tmp_path / "two.npz", a=anatomy(), b=anatomy())
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    files = {
        "cut.nii": complete[:-40],
        "cut.nii.gz": zipped[: len(zipped) // 2],
        "text.nii": b"no volume at all",
        "text.nii.gz": gzip.compress(b"no volume at all"),
        "plain.nii.gz": b"no gzip at all",
        "empty.nii": b"",
        "empty.npy": b"",
        "cut.npy": (tmp_path / "nan.npy").read_bytes()[:-10],
        "text.npz": b"no arrays",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in [*files, "object.npy", "two.npz"]:
        with pytest.raises(ValueError, match=f"{name} cannot be read: "):
            volumes.read_file(tmp_path, name)
    with pytest.raises(ValueError, match=r"nowhere.nii cannot be read: its header says no orientation .* swapped"):
        volumes.read_file(tmp_path, "nowhere.nii")
    with pytest.raises(ValueError, match=r"missing.nii is missing"):
        volumes.read_file(tmp_path, "missing.nii")
    with pytest.raises(ValueError, match="leads outside the data folder"):
        volumes.read_file(tmp_path / "demo", "../complete.nii")
    with pytest.raises(ValueError, match="336 voxels of int16, more than 100 of 32 bits; resample it, or cut it"):
        volumes.read_file(tmp_path, "complete.nii", largest=100)


def test_axes_of_length_one_are_dropped(tmp_path):
    vectors = np.random.default_rng(0).integers(1, 9, (4, 4, 4, 1, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(vectors, np.eye(4)), tmp_path / "vectors.nii")  # as NIfTI writes directions
    nibabel.save(nibabel.Nifti1Image(vectors[..., :1], np.eye(4)), tmp_path / "scan.nii")
    assert np.array_equal(volumes.read_file(tmp_path, "vectors.nii"), vectors[:, :, :, 0])
    assert np.array_equal(volumes.read_file(tmp_path, "scan.nii"), vectors[:, :, :, 0, 0])


def test_a_volume_is_normalised_over_its_tissue_and_the_background_stays_zero():
    torch.manual_seed(0)
    volume = torch.rand(2, 8, 8, 8, 3) * 500 + 100
    volume[:, :2] = 0
    found = volumes.normalise(volume)
    assert (found[:, :2] == 0).all()
    for channel, raw in zip(found, volume, strict=True):
        tissue = channel[2:]
        assert float(tissue.mean()) == pytest.approx(0, abs=1e-5)
        assert float(tissue.std(correction=0)) == pytest.approx(1, rel=1e-5)
        expected = (raw[2:].numpy() - raw[2:].numpy().mean()) / raw[2:].numpy().std()
        np.testing.assert_allclose(tissue.numpy(), expected, atol=1e-4)
    torch.testing.assert_close(volumes.normalise(volume * 7), found, rtol=0, atol=1e-4)  # whatever the scanner's scale


def share(old: int, new: int) -> np.ndarray:
    """(new, old): of what a new voxel covers the share that each old one has, counted in pieces that fit into both."""
    found = np.zeros((new, old))
    for piece in range(old * new):
        found[piece // old, piece // new] += 1 / old
    return found


def between(old: int, new: int) -> np.ndarray:
    """(new, old): the weights of the two neighbours of each new voxel's centre."""
    found = np.zeros((new, old))
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    for row, low in enumerate(np.floor(at).astype(int)):
        found[row, low] += 1 - (at[row] - low)
        found[row, min(low + 1, old - 1)] += at[row] - low
    return found


def test_axes_that_shrink_are_averaged_and_others_trilinear_and_time_and_channels_stay_apart():
    torch.manual_seed(0)
    volume = torch.rand(2, 5, 6, 7, 3)
    found = volumes.resample(volume, (8, 4, 7))
    expected = np.einsum("cxyzt,ax,by->cabzt", volume.numpy().astype(np.float64), between(5, 8), share(6, 4))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert torch.equal(volumes.resample(volume, (5, 6, 7)), volume)
    even = torch.nn.functional.adaptive_avg_pool3d(volume[..., 0], (5, 3, 7))  # the same where sizes divide
    torch.testing.assert_close(volumes.resample(volume, (5, 3, 7))[..., 0], even)


def test_a_lesion_of_one_voxel_leaves_a_trace_wherever_it_is_and_the_mean_stays():
    """256 -> 96, as UMBRELLA's scans: of trilinear samples 58 % of the voxels would be read by none."""
    planes = torch.eye(256).reshape(256, 256, 1, 1)  # channel i is bright in plane i alone
    found = volumes.resample(planes, (96, 1, 1))
    assert found.amax((1, 2, 3)).min() > 1 / 8
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.full((256,), 1 / 256))
    np.testing.assert_allclose(found[..., 0, 0].T.numpy(), share(256, 96), atol=1e-6)


def frames_of(folder: Path, series: np.ndarray) -> None:
    folder.mkdir()
    for t in range(series.shape[3]):
        np.save(folder / f"frame_{t}.npy", series[..., t])  # frame_10 sorts before frame_2


@pytest.fixture
def series(tmp_path) -> np.ndarray:
    """Twelve frames, as a file and as a folder of frames."""
    frames = np.random.default_rng(1).integers(1, 900, (8, 8, 8, 12)).astype(np.float32)
    np.save(tmp_path / "series.npy", frames)
    frames_of(tmp_path / "frames", frames)
    return frames


def files_of(folder: Path, path: str) -> tuple[str, ...]:
    """The files of a conversation's image."""
    return turns.volume(folder, {"path": path, "modality": "v"}).files


def loaded(folder: Path, files, text: str, **settings) -> torch.Tensor:
    args = SimpleNamespace(resample=False, fit_time=False, normalise=False, **settings)
    volume, modality = Volume("v", tuple(files)), Modality.read(text)
    measured = {name: volumes.measure(folder, name)[0] for name in files}
    volumes.check_shape(volume, modality, measured, args)
    return volumes.read(folder, volume, modality, args)


def test_a_folder_of_frames_is_the_series_and_time_is_fitted_only_when_asked(tmp_path, series):
    files = files_of(tmp_path, "frames")
    assert [name.split("_")[1] for name in files] == [f"{t}.npy" for t in range(12)]
    complete = loaded(tmp_path, ["series.npy"], "v:8x8x8x12:4x4x4x3")
    assert torch.equal(complete, torch.from_numpy(series)[None])
    assert torch.equal(loaded(tmp_path, files, "v:8x8x8x12:4x4x4x3"), complete)
    for text in ("v:8x8x8x10:4x4x4x5", "v:8x8x8x14:4x4x4x7"):
        for names in (["series.npy"], files):
            with pytest.raises(ValueError, match=r"has 12 frames, v 1[04]; --fit-time takes the first, or adds empty"):
                loaded(tmp_path, names, text)
    args = SimpleNamespace(resample=False, fit_time=True, normalise=False)
    for count in (10, 14):
        modality = Modality.read(f"v:8x8x8x{count}:4x4x4x2")
        found = volumes.read(tmp_path, Volume("v", files), modality, args)
        assert found.shape == (1, 8, 8, 8, count)
        assert torch.equal(found[..., :12], complete[..., :count]) and not found[..., 12:].any()


def test_a_shape_that_is_not_the_modality_s_is_refused_by_name(tmp_path, series):
    cases = {
        "v:8x8x9:4x4x3": (["frames/frame_0.npy"], r"frame_0.npy is \(8, 8, 8\) voxels, v \(8, 8, 9\); --resample"),
        "v:8x8x8:4x4x4": (["series.npy"], r"series.npy is \(8, 8, 8, 12\), v \(8, 8, 8\); is it of another modality"),
        "v:8x8x8:4x4x4:11": (["series.npy"], r"series.npy is \(8, 8, 8, 12\), v \(8, 8, 8, 11\)"),
        "v:8x8x8:4x4x4:2": (["frames/frame_0.npy", "frames/frame_1.npy"], "but a v is no series; join them into one"),
        "v:8x8x8x2:4x4x4x1": (["frames/frame_0.npy", "small.npy"], r"small.npy \(4, 8, 8\); frames must be alike"),
    }
    np.save(tmp_path / "small.npy", series[:4, ..., 0])
    for text, (files, why) in cases.items():
        with pytest.raises(ValueError, match=why):
            loaded(tmp_path, files, text)
    # the twelve are directions of a diffusion scan: channels, last in the file, first in the model
    found = loaded(tmp_path, ["series.npy"], "v:8x8x8:4x4x4:12")
    assert torch.equal(found, torch.from_numpy(series).movedim(-1, 0))


def test_empty_folders_and_other_files_are_no_volumes(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "some").mkdir()
    (tmp_path / "some/notes.txt").write_text("")
    for name, why in {"none": "none, an empty folder, is none of", "some": "some/notes.txt is none of"}.items():
        with pytest.raises(ValueError, match=why):
            files_of(tmp_path, name)
    for name in ("scan.dcm", "scan.hdr", "scan.nii.bz2"):
        with pytest.raises(ValueError, match=rf"{name} is none of .nii, .nii.gz, .img, .mgz, .mgh, .npy, .npz$"):
            files_of(tmp_path, name)
    with pytest.raises(ValueError, match=r"f/frame_0.pt is none of .*; write the tensor as .npy: np.save\(name, torch"):
        files_of(tmp_path, frames_named(tmp_path / "f", "frame_0.pt", "frame_1.pt", "global_stats.pt"))


def frames_named(folder: Path, *names: str) -> str:
    """A folder of empty files; its name."""
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder.name


@pytest.mark.parametrize(
    "names",
    [
        [f"frame_{i}.npy" for i in range(12)],
        ["v0.nii.gz", "v5.nii.gz", "v10.nii.gz"],
        ["0.25.npy", "0.5.npy", "0.75.npy", "1.0.npy"],
        ["0.333.npy", "0.667.npy", "1.0.npy"],
        ["-1.npy", "0.npy", "1.npy"],
        ["run_1_frame_8.NII", "run_1_frame_9.NII", "run_1_frame_10.NII"],
        ["bold.nii.gz"],
    ],
)
def test_a_series_is_read_in_the_order_of_its_numbers_at_whatever_even_steps(tmp_path, names):
    assert files_of(tmp_path, frames_named(tmp_path / "f", *names)) == tuple(f"f/{name}" for name in names)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["frame_0.npy", "frame_1.npy", "frame_3.npy"], "missing between f/frame_1.npy and f/frame_3.npy; restore"),
        (["0.25.npy", "0.5.npy", "1.0.npy"], "missing between f/0.5.npy and f/1.0.npy"),
        (["5.npy", "10.npy", "20.npy", "35.npy"], "missing between f/10.npy and f/20.npy"),
        (["f_0.npy", "f_1.npy", "global_stats.npy"], "f/f_0.npy and f/global_stats.npy are not alike but for a number"),
        (["f_0.npy", "f_0_mean.npy", "f_1.npy"], "f/f_0.npy and f/f_0_mean.npy are not alike but for a number"),
        (["early.npy", "late.npy"], "f/early.npy and f/late.npy are not alike but for a number"),
    ],
)
def test_a_series_with_a_frame_missing_or_another_file_in_it_is_refused(tmp_path, names, why):
    with pytest.raises(ValueError, match=why):
        files_of(tmp_path, frames_named(tmp_path / "f", *names))


@pytest.mark.parametrize("name", ["keys", "forward", "training"])
def test_a_modality_has_no_name_that_modules_use_themselves(name):
    """Its embedding is found in an nn.ModuleDict by that name."""
    with pytest.raises(ValueError, match=f"'{name}:8x8x8:4x4x4' is no NAME:SIZE:PATCH"):
        Modality.read(f"{name}:8x8x8:4x4x4")
