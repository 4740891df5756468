"""Scans of NIfTI and FreeSurfer: damaged files, headers that contradict themselves, sizes, and kinds of files."""

import gzip
import io
import struct
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from inputs import volumes

LEFT, RIGHT, EMPTY = np.diag([-1.0, 1, 1, 1]), np.eye(4), np.zeros((4, 4))  # which way x runs
BEHIND = np.diag([-1.0, -1, 1, 1])  # as LEFT, and y backwards: the hand is RIGHT's


def anatomy() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1000, (8, 9, 10)).astype(np.int16)


def nifti(sform=None, qform=None, **fields) -> bytes:
    """The anatomy as a NIfTI file of these forms and fields of the header."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(anatomy().shape)
    header.set_data_dtype(anatomy().dtype)
    header.set_sform(sform, int(sform is not None))
    header.set_qform(qform, int(qform is not None))
    for name, value in {"scl_slope": 1, "scl_inter": 0, "vox_offset": 352, **fields}.items():
        header[name] = value
    return header.binaryblock + bytes(4) + anatomy().tobytes(order="F")


def read(folder: Path, name: str, content: bytes) -> np.ndarray:
    (folder / name).write_bytes(content)
    return volumes.read_file(folder, name)


def refused(folder: Path, name: str, content: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be read: {why}"):
        read(folder, name, content)


@pytest.mark.parametrize("suffix", ["nii.gz", "mgz", "npz"])
def test_wherever_a_bit_of_a_packed_file_is_flipped_no_wrong_voxel_is_read(tmp_path, suffix):
    image = nibabel.Nifti1Image(anatomy(), RIGHT)
    if suffix == "npz":
        np.savez_compressed(tmp_path / "a.npz", anatomy())
    else:
        nibabel.save(image if suffix == "nii.gz" else nibabel.MGHImage(anatomy(), RIGHT), tmp_path / f"a.{suffix}")
    good, accepted = (tmp_path / f"a.{suffix}").read_bytes(), 0
    places = [*range(30), *range(30, len(good), 11), *range(len(good) - 8, len(good))]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        try:
            assert np.array_equal(read(tmp_path, f"b.{suffix}", bytes(bad)), anatomy())
            accepted += 1  # a time, a name: nothing that voxels depend on
        except ValueError as error:
            assert str(error).startswith(f"b.{suffix} cannot be read: ")
    assert accepted < 40


def test_a_file_ends_where_its_header_says(tmp_path):
    good = nifti(RIGHT)
    assert np.array_equal(read(tmp_path, "a.nii", good), anatomy())
    more, less = r"its header says 1,792 bytes, and there are more", "its header says 1,792 bytes, and there are 1,79"
    for content, why in ((good + b"x", more), (good[:-1], less)):
        refused(tmp_path, "b.nii", content, why)
        refused(tmp_path, "b.nii.gz", gzip.compress(content), why)
    refused(tmp_path, "b.nii.gz", gzip.compress(good) + gzip.compress(b"x"), more)
    refused(tmp_path, "b.nii.gz", gzip.compress(good) + b"x", r"damaged \(Not a gzipped file.*copy it again")
    refused(tmp_path, "b.nii.gz", gzip.compress(good)[:-3], "damaged .*end-of-stream")
    assert np.array_equal(read(tmp_path, "a.nii.gz", gzip.compress(good) + bytes(512)), anatomy())  # as tapes pad
    image = nibabel.Nifti1Image(anatomy(), RIGHT)  # what the header says between itself and the voxels
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"a scan"))
    nibabel.save(image, tmp_path / "extended.nii.gz")
    assert np.array_equal(volumes.read_file(tmp_path, "extended.nii.gz"), anatomy())


@pytest.mark.parametrize(
    ("sform", "qform"),
    [(LEFT, None), (None, LEFT), (LEFT, LEFT), (EMPTY, LEFT)],
    ids=["sform", "qform", "both", "an empty sform"],
)
def test_the_orientation_is_the_sform_s_or_where_that_says_nothing_the_qform_s(tmp_path, sform, qform):
    assert np.array_equal(read(tmp_path, "a.nii", nifti(sform, qform)), anatomy()[::-1])


def test_a_header_that_contradicts_itself_is_refused(tmp_path):
    disagree = "its sform and qform disagree: left and right could be swapped; correct one of them, or set its code"
    for sform, qform in ((RIGHT, LEFT), (LEFT, RIGHT), (RIGHT, BEHIND)):
        refused(tmp_path, "a.nii", nifti(sform, qform), disagree)
    near = np.array([[0.9, -0.2, 0, 5], [0.2, 0.9, 0, 5], [0, 0, 1.1, 5], [0, 0, 0, 1]])  # as after a registration
    assert np.array_equal(read(tmp_path, "a.nii", nifti(near, RIGHT)), anatomy())
    assert np.array_equal(read(tmp_path, "a.nii", nifti(RIGHT, LEFT, qform_code=0)), anatomy())
    for sform, qform in ((EMPTY, None), (None, None)):
        refused(tmp_path, "a.nii", nifti(sform, qform), r"its header says no orientation \(sform and qform code 0\)")
    for sform in (np.diag([1.0, 0, 1, 1]), np.diag([np.nan, 1, 1, 1]), np.diag([np.inf, 1, 1, 1])):
        refused(tmp_path, "a.nii", nifti(sform, RIGHT), "its sform or qform has no inverse; correct its header")


def test_a_scale_that_is_infinite_is_refused(tmp_path):
    for slope in (np.inf, -np.inf):
        refused(tmp_path, "a.nii", nifti(RIGHT, scl_slope=slope), "its scale is infinite; correct scl_slope")
    for shift in (np.inf, np.nan):
        refused(tmp_path, "a.nii", nifti(RIGHT, scl_inter=shift), "Valid slope but invalid intercept")
    for slope in (0, np.nan):  # unscaled
        assert np.array_equal(read(tmp_path, "a.nii", nifti(RIGHT, scl_slope=slope, scl_inter=np.nan)), anatomy())
    assert np.array_equal(read(tmp_path, "a.nii", nifti(RIGHT, scl_slope=2, scl_inter=-3)), anatomy() * 2.0 - 3)


def test_names_in_capitals_pairs_and_freesurfer_s_files_are_read(tmp_path):
    assert np.array_equal(read(tmp_path, "A.NII", nifti(LEFT)), anatomy()[::-1])
    assert np.array_equal(read(tmp_path, "A.NII.GZ", gzip.compress(nifti(LEFT))), anatomy()[::-1])
    nibabel.save(nibabel.Nifti1Pair(anatomy(), LEFT), tmp_path / "pair.img")
    nibabel.save(nibabel.Nifti2Image(anatomy(), LEFT), tmp_path / "two.nii")
    for suffix in ("mgh", "mgz"):
        nibabel.save(nibabel.MGHImage(anatomy(), LEFT), tmp_path / f"free.{suffix}")
    for name in ("pair.img", "two.nii", "free.mgh", "free.mgz"):
        assert np.array_equal(volumes.read_file(tmp_path, name), anatomy()[::-1])
    free = (tmp_path / "free.mgh").read_bytes()
    assert np.array_equal(read(tmp_path, "history.mgz", gzip.compress(free + b"mri_convert a b")), anatomy()[::-1])
    refused(tmp_path, "long.mgz", gzip.compress(free + bytes(2**21)), "its header says 1,724 bytes, and there are more")
    refused(tmp_path, "free.mgz", gzip.compress(free[:1000]), "its header says 1,724 bytes, and there are 1,000")
    nowhere = free[:28] + bytes(2) + free[30:]
    refused(tmp_path, "free.mgh", nowhere, r"its header says no orientation \(goodRASFlag 0\): left and right")
    nibabel.save(nibabel.AnalyzeImage(anatomy(), LEFT), tmp_path / "old.img")
    refused(tmp_path, "old.img", (tmp_path / "old.img").read_bytes(), "no NIfTI but .*, with no orientation: left and")


def header_of(shape: tuple, kind: str) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_sizes_are_known_before_anything_is_loaded(tmp_path):
    """Each of these would take gigabytes."""
    huge, says = (1024, 1024, 1024), "its header says {} bytes, and there are"
    for sizes, why in (((3, *huge), says.format("2,147,484,000")), ((4, *huge, 2), "2147483648 voxels of int16")):
        content = bytearray(nifti(RIGHT))
        struct.pack_into(f"<{len(sizes)}h", content, 40, *sizes)
        refused(tmp_path, "a.nii", bytes(content), why)
        refused(tmp_path, "a.nii.gz", gzip.compress(content), why)
    far = gzip.compress(nifti(RIGHT, vox_offset=2.0**40))
    refused(tmp_path, "a.nii.gz", far, says.format("1,099,511,629,216"))
    refused(tmp_path, "a.npy", header_of(huge, "<f4"), says.format("4,294,967,424") + " 128; copy it")
    refused(tmp_path, "a.npy", header_of((2, 2, 2), "|O") + bytes(64), "it holds pickled objects; save numbers alone")
    refused(tmp_path, "a.npy", header_of((2, 2, 2), "|u1") + bytes(9), says.format("136") + " 137")
    with (tmp_path / "a.npy").open("wb") as file:  # it is as long as it says, on a disk that keeps no zeros
        file.write(header_of(huge, "<f8"))
        file.truncate(128 + 8 * 1024**3)
    with pytest.raises(ValueError, match="1073741824 voxels of float64, more than 1073741824 of 32 bits; resample it"):
        volumes.read_file(tmp_path, "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", header_of(huge, "<f4") + bytes(2**20))
    with pytest.raises(ValueError, match=f"a.npz cannot be read: {says.format('4,294,967,424')}"):
        volumes.read_file(tmp_path, "a.npz")
