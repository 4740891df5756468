"""Scans as scanners' tools write them, NIfTI and FreeSurfer's: read to their end, and turned so that left is left."""

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np


def refuse_kind(kind: np.dtype, size: int, largest: int) -> None:
    """Raise ValueError where voxels are no real numbers, or too many."""
    if kind.kind not in "biuf":
        raise ValueError(f"its voxels are no real numbers but {kind}")
    if size * max(kind.itemsize, 4) > 4 * largest:  # the memory that it takes
        raise ValueError(f"{size} voxels of {kind}, more than {largest} of 32 bits; resample it, or cut it")


def read_scan(path: Path, largest: int) -> np.ndarray:
    """The voxels of a file, float32, in the order RAS. Raises where its header does not say which way they lie."""
    try:
        import nibabel
    except ImportError:
        raise ValueError("NIfTI needs nibabel: pip install nibabel, or convert the volumes to .npy (RAS)") from None
    image = nibabel.load(path)  # its header alone
    freesurfer = isinstance(image, nibabel.MGHImage)
    if not freesurfer and not isinstance(image, nibabel.Nifti1Pair):
        raise ValueError(f"no NIfTI but {type(image).__name__}, with no orientation: left and right could be swapped")
    kind, size = image.get_data_dtype(), math.prod(map(int, image.shape))
    refuse_kind(kind, size, largest)
    # FreeSurfer writes behind the voxels how they were made
    content = unpack(path, image.dataobj.offset + size * kind.itemsize, 2**20 if freesurfer else 0)
    files = image.file_map | {"image": nibabel.FileHolder(fileobj=io.BytesIO(content))}
    affine = image.affine
    if not freesurfer:
        with files.get("header", files["image"]).get_prepare_fileobj("rb") as file:
            affine = orientation(image.header_class.from_fileobj(file))  # image.header has lost the scale
    elif int.from_bytes(content[28:30], "big", signed=True) < 1:  # goodRASFlag; nibabel would make an affine up
        raise ValueError("its header says no orientation (goodRASFlag 0): left and right could be swapped")
    voxels = type(image).from_file_map(files).get_fdata("unchanged", np.float32)
    return nibabel.apply_orientation(voxels, nibabel.io_orientation(affine))


def unpack(path: Path, end: int, more: int) -> bytes:
    """The bytes of a file that ends at `end`, or up to `more` later. Raises ValueError where it is damaged."""
    packed = path.suffix.lower() in (".gz", ".mgz")
    most = path.stat().st_size * (1032 if packed else 1)  # gzip packs no tighter
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            content = file.read(min(end + more, most) + 1)  # to the end, where its checksum is
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged ({error}); copy it again") from None
    if not end <= len(content) <= end + more:
        there = f"{len(content):,}" if len(content) < end else "more"
        raise ValueError(f"its header says {end:,} bytes, and there are {there}; copy it again")
    return content


def orientation(header) -> np.ndarray:
    """The affine of a NIfTI header: its sform, or where that says nothing its qform. Raises ValueError on nonsense."""
    if np.isinf(header["scl_slope"]):  # nibabel takes it for none; NaN is none by custom
        raise ValueError("its scale is infinite; correct scl_slope of its header")
    forms = [form for form, _ in (header.get_sform(coded=True), header.get_qform(coded=True)) if form is not None]
    forms = [form for form in forms if form[:3, :3].any()]
    if not forms:
        raise ValueError("its header says no orientation (sform and qform code 0): left and right could be swapped")
    if not all(np.isfinite(form).all() and np.linalg.det(form) for form in forms):
        raise ValueError("its sform or qform has no inverse; correct its header")
    turn = np.linalg.inv(forms[0][:3, :3]) @ forms[-1][:3, :3]
    if np.linalg.det(turn) < 0 or (turn.diagonal() < 0.1).any():  # mirrored, or an axis lies across or the other way
        text = "its sform and qform disagree: left and right could be swapped"
        raise ValueError(f"{text}; correct one of them, or set its code to 0")
    return forms[0]
