"""Pictures, slices of volumes and sounds, small enough that those of many records fit into one page."""

import base64
import io
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from inputs import videos
from inputs.files import inside

PICTURES = {".jpg", ".jpeg", ".png"}  # several of them in a row are the frames of a clip
ANIMATIONS = {".gif", ".webp", ".apng"}
VOLUMES = {".nii", ".gz", ".npy", ".npz"}
KNOWN = PICTURES | ANIMATIONS | VOLUMES | {".wav"}
HEIGHT, STRIP_HEIGHT, WIDEST = 112, 84, 448  # pixels
MOST_FRAMES = 4
MOST_PIXELS, MOST_MOVING_PIXELS, MOST_VOXELS = 50_000_000, 1_000_000_000, 2**27
MOST_ALIKE = 5  # faults of one kind that are named
MOST_SOUND = 400_000  # bytes, 12 seconds of 16 kHz
NO_NIBABEL = "NIfTI needs nibabel: pip install nibabel"  # a fault that is no file's
PICTURES_SHARE = 0.75  # of the budget, where there is sound, too: it is heavy


def thumbnails(folder: Path | None, records: list[dict], budget: int) -> tuple[list[dict], list[list[int]], list[str]]:
    """What the records show, small: media (kind, src, name), for each record the indices into them, and faults.

    Wrong predictions come first, then right ones spread evenly over the records; when the budget (characters of all
    data URIs) is full, nothing more is opened. Pictures come before sound. What cannot be shown is left out; the
    faults name some files of each kind of fault, and count the others.
    """
    named = {name for record in records for name in record["media"]}
    if folder is None or not named:
        return [], [[] for _ in records], []
    if not folder.is_dir():
        where = "start python -m report in the folder where the run was started"
        return [], [[] for _ in records], [f"the data folder {folder} is not here: {where}"]
    jobs = [(i, thing) for i, record in enumerate(records) for thing in things(record["media"])]
    jobs.sort(key=lambda job: urgency(*job, records))
    made, media, faults = make(folder, jobs, budget)
    of = [[] for _ in records]
    for i, thing in jobs:
        if made.get(thing) is not None:
            of[i].append(made[thing])
    left = Counter(kind for kind, _ in {thing for _, thing in jobs} - made.keys())
    missing = few_of_each(faults)
    unknown = sum(Path(name).suffix.lower() not in KNOWN for name in named)
    missing += [f"{unknown:,} {'file' if unknown == 1 else 'files'} of no known kind"] if unknown else []
    missing += [f"no room left: {n:,} × {kind}" for kind, n in sorted(left.items())]
    return media, of, missing


def things(names: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """What a record's files are: pictures together, of which at most four are shown; others one by one."""
    kinds = [(Path(name).suffix.lower(), name) for name in names]
    frames = [name for suffix, name in kinds if suffix in PICTURES]
    found = [("pictures", tuple(frames[i] for i in videos.evenly(len(frames), MOST_FRAMES)))] if frames else []
    for suffix, name in kinds:
        if suffix in ANIMATIONS:
            found.append(("pictures", (name,)))
        elif suffix in VOLUMES:
            found.append(("volume", (name,)))
        elif suffix == ".wav":
            found.append(("sound", (name,)))
    return found


def urgency(i: int, thing: tuple, records: list[dict]) -> tuple:
    """Pictures before sound, wrong before right; the bits of the index reversed: 0, n/2, n/4, 3n/4 … are even."""
    return thing[0] == "sound", records[i]["correct"], int(f"{i:040b}"[::-1], 2)


def make(folder: Path, jobs: list[tuple], budget: int) -> tuple[dict, list[dict], dict[str, str]]:
    """{thing: its index into media, None where it cannot be made}, media, {fault: its kind}, in the order of jobs."""
    with_sound = any(kind == "sound" for _, (kind, _) in jobs)
    budgets = {False: budget * (PICTURES_SHARE if with_sound else 1), True: budget}  # of pictures; of all
    made, media, faults = {}, [], {}
    used, full = 0, {False: False, True: False}
    for _, thing in jobs:
        sound = thing[0] == "sound"
        if thing in made or full[sound]:
            continue
        try:
            entry = thumbnail(folder, *thing)
        except Exception as error:  # damaged files make a decoder raise anything
            made[thing] = None
            text = fault(folder, thing[1], error)
            faults[text] = kind_of_fault(text, thing[1])
            continue
        full[sound] = used + len(entry["src"]) > budgets[sound]
        if not full[sound]:
            made[thing] = len(media)
            media.append(entry)
            used += len(entry["src"])
    return made, media, faults


# ------------------------------------------------------------------------------------------------------------
# What cannot be shown
# ------------------------------------------------------------------------------------------------------------


def fault(folder: Path, names: tuple[str, ...], error: Exception) -> str:
    """The error with the name of a file, but not with where on this machine it lies, nor with a training's advice."""
    text = (str(error) or type(error).__name__).replace(f"{folder.resolve()}/", "")
    text = re.sub(r"; [^;]*--skip-bad[^;]*$", "", text)
    return text if text == NO_NIBABEL or any(name in text for name in names) else f"{', '.join(names)}: {text}"


def kind_of_fault(text: str, names: tuple[str, ...]) -> str:
    """The text without what differs from file to file: names and numbers."""
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "")
    return re.sub(r"\d[\d,.]*", "0", text)


def few_of_each(faults: dict[str, str]) -> list[str]:
    """The first faults of each kind, and how many more are like them."""
    kinds = {}
    for text, kind in faults.items():
        kinds.setdefault(kind, []).append(text)
    lines = []
    for texts in kinds.values():
        lines += texts[:MOST_ALIKE]
        lines += [f"… and {len(texts) - MOST_ALIKE:,} more like the last"] if len(texts) > MOST_ALIKE else []
    return lines


# ------------------------------------------------------------------------------------------------------------
# One thumbnail
# ------------------------------------------------------------------------------------------------------------


def thumbnail(folder: Path, kind: str, names: tuple[str, ...]) -> dict:
    """{kind: image, strip, slices or sound; src: a data URI; name}. Of a damaged file a reader raises anything."""
    paths = [inside(folder, name) for name in names]
    if kind == "sound":
        return {"kind": "sound", "src": sound(paths[0]), "name": names[0]}
    if kind == "volume":
        voxels, spacing = open_volume(paths[0])
        if voxels.dtype != np.uint8 or voxels.ndim != 4 or voxels.shape[3] != 3:
            return {"kind": "slices", "src": jpeg(slices(voxels, spacing)), "name": names[0]}
        frames = [Image.fromarray(np.array(voxels[i])) for i in videos.evenly(len(voxels), MOST_FRAMES)]  # a video
    elif len(paths) > 1:
        frames = [open_frames(path, 1)[0] for path in paths]
    else:
        frames = open_frames(paths[0], MOST_FRAMES)
    if len(frames) > 1:
        return {"kind": "strip", "src": jpeg(side_by_side(frames)), "name": ", ".join(names)}
    frames[0].thumbnail((WIDEST, HEIGHT))
    return {"kind": "image", "src": jpeg(frames[0]), "name": names[0]}


def open_frames(path: Path, most: int) -> list[Image.Image]:
    """Up to `most` frames of an image or animation, evenly chosen; a JPEG is decoded no larger than it is needed.

    inputs.videos.read_frames decodes every frame completely, as training needs it: of a page's pictures 4 times slower.
    """
    with Image.open(path, formats=["JPEG", "PNG", "GIF", "WEBP"]) as image:
        # an MPO holds one picture twice; an APNG may begin with what is shown where it cannot be played
        single, first = image.format in ("JPEG", "MPO"), int(getattr(image, "default_image", False))
        count = 1 if single else getattr(image, "n_frames", 1) - first
        pixels = image.width * image.height
        if pixels > MOST_PIXELS or pixels * count > MOST_MOVING_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, {count} frames: too large for a thumbnail")
        if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
            raise ValueError(f"colour mode {image.mode}")
        image.draft("RGB", (1, 2 * HEIGHT))
        frames = []
        for i in videos.evenly(count, most):
            image.seek(first + i)
            frames.append(ImageOps.exif_transpose(image).convert("RGB"))
    return frames


def side_by_side(pictures: list[Image.Image], height: int = STRIP_HEIGHT, gap: int = 2) -> Image.Image:
    widths = [min(WIDEST, max(1, round(height * p.width / p.height))) for p in pictures]
    strip = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), height), (128, 128, 128))
    for i, (picture, width) in enumerate(zip(pictures, widths, strict=True)):
        strip.paste(picture.resize((width, height)), (sum(widths[:i]) + gap * i, 0))
    return strip


def open_volume(path: Path) -> tuple[np.ndarray, tuple]:
    """The array and the distances of its voxels; of NIfTI files the first time point, x to the right, z up."""
    if path.name.lower().endswith((".nii", ".nii.gz")):
        try:
            import nibabel
        except ImportError:
            raise ImportError(NO_NIBABEL) from None
        image = nibabel.load(path)
        refuse_large(image.shape[:3])
        if not any(int(image.header.get(code, 0)) for code in ("qform_code", "sform_code")):
            raise ValueError("no orientation: left and right are not known")  # nibabel would guess them
        while image.ndim > 3:
            image = image.slicer[..., 0]
        image = nibabel.as_closest_canonical(image)
        return np.asarray(image.dataobj), image.header.get_zooms()[:3]
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            refuse_large((archive.zip.getinfo(f"{archive.files[0]}.npy").file_size // 4,))
            return archive[archive.files[0]], (1, 1, 1)
    return np.load(path, mmap_mode="r", allow_pickle=False), (1, 1, 1)


def refuse_large(shape: tuple) -> None:
    if math.prod(shape) > MOST_VOXELS:
        raise ValueError(f"{math.prod(shape):,} voxels: too large for a thumbnail")


def slices(voxels: np.ndarray, spacing: tuple) -> Image.Image:
    """Through the middle, as radiologists see them: from the feet, the front, the side; the patient's right is left."""
    while voxels.ndim > 3:
        voxels = voxels[..., 0]  # the first time point, the first channel
    if voxels.ndim < 3:
        raise ValueError(f"an array of {voxels.ndim} axes is no volume")
    refuse_large(voxels.shape)
    x, y, z = (size // 2 for size in voxels.shape)
    planes = [(voxels[:, :, z], 0, 1), (voxels[:, y], 0, 2), (voxels[x], 1, 2)]  # slice, its axis to the left, up
    planes = [(np.nan_to_num(plane.astype(np.float32), posinf=0, neginf=0), a, b) for plane, a, b in planes]
    low, high = np.percentile(np.concatenate([plane.ravel() for plane, _, _ in planes]), [1, 99])
    pictures = []
    for plane, left, up in planes:
        grey = (255 * np.clip((plane - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)
        picture = Image.fromarray(np.ascontiguousarray(grey.T[::-1, ::-1]))
        width = round(HEIGHT * picture.width * spacing[left] / (picture.height * spacing[up]))
        pictures.append(picture.resize((max(1, min(WIDEST, width)), HEIGHT)))
    return side_by_side(pictures, HEIGHT)


def sound(path: Path) -> str:
    if path.stat().st_size > MOST_SOUND:
        raise ValueError(f"{path.stat().st_size:,} bytes of sound: too large for the page")
    content = path.read_bytes()
    if content[:4] != b"RIFF":
        raise ValueError("no WAV file")
    return f"data:audio/wav;base64,{base64.b64encode(content).decode()}"


def jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
