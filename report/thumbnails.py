"""Pictures, slices of volumes and sounds, small enough that those of many records fit into one page."""

import base64
import io
import re
from collections import Counter
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from inputs import video_files, videos, volumes
from inputs.files import inside

KINDS = dict.fromkeys((".jpg", ".jpeg", ".png"), "frame")  # several of them in a row are a clip
KINDS |= dict.fromkeys((".gif", ".webp", ".apng"), "pictures") | {".wav": "sound"}
KINDS |= dict.fromkeys((".nii", ".gz", ".img", ".npy", ".npz"), "volume")
HEIGHT, FRAME_HEIGHT, SLICE_HEIGHT, WIDEST, GAP = 336, 168, 112, 448, 2  # pixels
MOST_FRAMES, MOST_DECODED = 4, 1000  # frames of a clip that are shown; of an animation that are looked at
MOST_PIXELS, MOST_VOXELS = 50_000_000, 2**27
MOST_SOUND = 400_000  # bytes, 12 seconds of 16 kHz
PICTURES_SHARE = 0.75  # of the budget, where there is sound, too: it is heavy


def thumbnails(folder: Path | None, records: list[dict], budget: int) -> tuple[list[dict], list[list[int]], list[str]]:
    """What the records show, small: media (kind, src, name), for each record the indices into them, and faults.

    Wrong predictions come first, then right ones spread evenly over the records; when the budget (characters of all
    data URIs) is full, nothing more is opened. Pictures come before sound. What cannot be shown is left out; the
    faults say how many files nobody tried, then name each that was tried.
    """
    named = {name for record in records for name in record["media"]}
    if folder is None or not folder.is_dir():  # a run folder may be a stranger's
        why = f"the data folder {folder} is not here" if folder else "no path that a run folder names is opened"
        return [], [[] for _ in records], [f"{why}; give --media-root, the folder of the media"] if named else []
    jobs = [(i, thing) for i, record in enumerate(records) for thing in things(record["media"])]
    # the bits of the index reversed: 0, n/2, n/4, 3n/4 … are even
    jobs.sort(key=lambda job: (job[1][0] == "sound", records[job[0]]["correct"], int(f"{job[0]:040b}"[::-1], 2)))
    with_sound = any(kind == "sound" for _, (kind, _) in jobs)
    room = {False: budget * (PICTURES_SHARE if with_sound else 1), True: budget}  # of pictures; of all
    made, media, of, faults, used = {}, [], [[] for _ in records], [], 0  # made: the index of each thing, or None
    for i, thing in jobs:
        sound = thing[0] == "sound"
        if thing not in made and room[sound]:
            try:
                entry = thumbnail(folder, *thing)
            except Exception as error:  # damaged files make a decoder raise anything
                made[thing] = None
                faults.append(fault(folder, thing[1], error))
                continue
            if used + len(entry["src"]) > room[sound]:
                room[sound] = 0
                continue
            made[thing] = len(media)
            media.append(entry)
            used += len(entry["src"])
        of[i] += [made[thing]] if made.get(thing) is not None else []
    unknown = sum(kind_of(name) is None for name in named)
    counts = [f"{unknown:,} {'file' if unknown == 1 else 'files'} of no known kind"] if unknown else []
    left = Counter(kind for kind, _ in {thing for _, thing in jobs} - made.keys())
    return media, of, counts + [f"no room left: {n:,} × {kind}" for kind, n in sorted(left.items())] + faults


def kind_of(name: str) -> str | None:
    return "frame" if video_files.is_frame(name) else KINDS.get(Path(name).suffix.lower())


def things(names: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """What a record's files are: pictures together, of which at most four are shown; others one by one."""
    frames = [name for name in names if kind_of(name) == "frame"]
    found = [("pictures", tuple(frames[i] for i in videos.evenly(len(frames), MOST_FRAMES)))] if frames else []
    return found + [(kind_of(name), (name,)) for name in names if kind_of(name) not in ("frame", None)]


def fault(folder: Path, names: tuple[str, ...], error: Exception) -> str:
    """The error with the name of a file, but not with where on this machine it lies, nor with a training's advice."""
    text = (str(error) or type(error).__name__).replace(f"{folder}/", "")
    text = re.sub(r"; [^;]*--skip-bad[^;]*$", "", text)
    return text if any(name in text for name in names) else f"{', '.join(names)}: {text}"


def thumbnail(folder: Path, kind: str, names: tuple[str, ...]) -> dict:
    """{kind: image, strip, slices or sound; src: a data URI; name}. Of a damaged file a reader raises anything."""
    path = inside(folder, names[0])
    if kind == "sound":
        with path.open("rb") as file:
            content = file.read(MOST_SOUND + 1)
        if len(content) > MOST_SOUND or not content.startswith(b"RIFF"):
            raise ValueError(f"no WAV file of at most {MOST_SOUND:,} bytes")
        source = f"data:audio/wav;base64,{base64.b64encode(content).decode()}"
        return {"kind": "sound", "src": source, "name": names[0]}
    if kind == "volume":
        with suppress(ValueError):  # an array may hold frames, and no volume
            return thumbnail(folder, "pictures", names)
        return {"kind": "slices", "src": jpeg(slices(*open_volume(path))), "name": names[0]}
    read = (videos.read_frames(folder, name, largest=MOST_PIXELS) for name in names)
    if len(names) > 1:
        frames = [next(frames) for frames in read]
    else:
        frames = [ImageOps.contain(frame, (WIDEST, HEIGHT)) for frame in islice(next(read), MOST_DECODED)]
        frames = [frames[i] for i in videos.evenly(len(frames), MOST_FRAMES)]
    several = len(frames) > 1
    picture = side_by_side(frames, FRAME_HEIGHT if several else HEIGHT)
    return {"kind": "strip" if several else "image", "src": jpeg(picture), "name": ", ".join(names)}


def side_by_side(pictures: list[Image.Image], height: int) -> Image.Image:
    pictures = [ImageOps.contain(picture, (WIDEST, height)) for picture in pictures]
    strip = Image.new("RGB", (sum(p.width + GAP for p in pictures) - GAP, height), (128, 128, 128))
    for i, picture in enumerate(pictures):
        strip.paste(picture, (sum(p.width + GAP for p in pictures[:i]), 0))
    return strip


def open_volume(path: Path) -> tuple[np.ndarray, tuple]:
    """The array and the distances of its voxels; of NIfTI files the first time point, x to the right, z up."""
    if path.suffix.lower() in (".npy", ".npz"):
        return volumes.read_array(path, MOST_VOXELS), (1, 1, 1)
    try:
        import nibabel
    except ImportError:
        raise ValueError("NIfTI needs nibabel: pip install nibabel") from None
    image = nibabel.load(path)
    if not any(int(image.header.get(code, 0)) for code in ("qform_code", "sform_code")):
        raise ValueError("no orientation: left and right are not known")  # nibabel would guess them
    while image.ndim > 3:
        image = image.slicer[..., 0]  # the others are not read
    if np.prod(image.shape) > MOST_VOXELS:
        raise ValueError(f"{np.prod(image.shape):,} voxels: too large for a thumbnail")
    image = nibabel.as_closest_canonical(image)
    return np.asarray(image.dataobj), image.header.get_zooms()[:3]


def slices(voxels: np.ndarray, spacing: tuple) -> Image.Image:
    """Through the middle, as radiologists see them: from the feet, the front, the side; the patient's right is left."""
    while voxels.ndim > 3:
        voxels = voxels[..., 0]  # the first time point, the first channel
    if voxels.ndim < 3:
        raise ValueError(f"an array of {voxels.ndim} axes is no volume")
    x, y, z = (size // 2 for size in voxels.shape)
    planes = [(voxels[:, :, z], 0, 1), (voxels[:, y], 0, 2), (voxels[x], 1, 2)]  # slice, its axis to the left, up
    planes = [(np.nan_to_num(plane.astype(np.float32), posinf=0, neginf=0), a, b) for plane, a, b in planes]
    low, high = np.percentile(np.concatenate([plane.ravel() for plane, _, _ in planes]), [1, 99])
    pictures = []
    for plane, left, up in planes:
        grey = (255 * np.clip((plane - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)
        picture = Image.fromarray(np.ascontiguousarray(grey.T[::-1, ::-1]))
        width = round(SLICE_HEIGHT * picture.width * spacing[left] / (picture.height * spacing[up]))
        pictures.append(picture.resize((max(1, width), SLICE_HEIGHT)))
    return side_by_side(pictures, SLICE_HEIGHT)


def jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
