"""Clips: a scene whose numbers move from frame to frame, and what is asked about it, worded after SurgViVQA."""

import copy

import numpy as np
from PIL import Image

from demo.scenes import (
    COLOR_SHARES,
    COLORS,
    FRAME,
    PLACES,
    SIDES,
    SIZES,
    draw_frame,
    random_patient,
    random_polyp,
    random_scene,
)

CLIP_FRAME = 112  # width and height of a clip's frame: drawn larger and reduced
CLIP_GRID = 4  # image tokens along each side of that, 112 / (14 * 2): 16 in all
CLIP_LENGTH, CLIP_STEP = 8, 4  # frames of a clip, each the fourth of its video, as published
FAR = 0.4  # how large a thing looks at the far end of the scope's way; 1 at the near end
SIZE_LIMITS = [13, 20, 30]  # radii in pixels that lie between the size classes
OUTSIDE, INSIDE = 100, 20  # where an instrument's tip begins and ends, in pixels from the centre
# question type -> (question, what it depends on, {value: (answer, short answer)})
CLIP_QUESTIONS = {
    "lighting_mode": (
        "What lighting modality illuminates this sequence?",
        "light_mode",
        {"NBI": ("NBI light is on in this sequence.", "NBI"), "WL": ("White light is on in this sequence.", "WL")},
    ),
    "nbi_status": (
        "Is narrow band imaging switched on?",
        "light_mode",
        {"NBI": ("Yes, NBI light is on in these frames.", "yes"), "WL": ("No, WL light is on instead.", "no")},
    ),
    "scope_motion_type": (
        "What is the primary motion of the scope?",
        "scope",
        {
            "advancing": ("The scope is primarily advancing.", "advancing"),
            "withdrawing": ("The scope is primarily withdrawing.", "withdrawing"),
        },
    ),
    "scope_forward_motion": (
        "When motion occurs, is the scope pushing forward?",
        "scope",
        {"advancing": ("Yes, the scope is advancing.", "yes"), "withdrawing": ("No, the scope is withdrawing.", "no")},
    ),
    "tool_motion": (
        "Does the instrument enter or leave?",
        "tool",
        {
            "entering": ("The instrument is entering.", "entering"),
            "leaving": ("The instrument is leaving.", "leaving"),
            "absent": ("There is no instrument.", "absent"),
        },
    ),
    "lesion_screen_position": (
        "In which quadrant of the screen does the lesion appear?",
        "lesion",
        {place: (f"The lesion appears in the {place} quadrant.", place) for place in PLACES},
    ),
}


def random_clip(rng, patient):
    """A scene with a lesion and at most one instrument, and how light, scope and instrument behave in it."""
    scene = random_scene(rng, patient)
    place = str(rng.choice(list(PLACES)))
    scene["polyps"] = [random_polyp(rng, place, rng.choice(list(COLORS), p=COLOR_SHARES), int(rng.integers(1, 4)))]
    tool = str(rng.choice(["entering", "leaving", "absent"]))
    side = str(rng.choice(list(SIDES)))
    kind = str(rng.choice(["biopsy forceps", "snare"]))
    scene["instruments"] = [{"kind": kind, "side": side, "angle": SIDES[side] + rng.uniform(-7, 7)}]
    scope = str(rng.choice(["advancing", "withdrawing"]))
    return scene | {"light_mode": str(rng.choice(["NBI", "WL"])), "scope": scope, "tool": tool, "lesion": place}


def clip_scene(clip, t):
    """The clip at a time t between 0 and 1: everything grows about the centre as the scope advances."""
    zoom = FAR + (1 - FAR) * (t if clip["scope"] == "advancing" else 1 - t)
    scene = copy.deepcopy(clip)
    for polyp in scene["polyps"]:
        polyp |= {axis: FRAME / 2 + zoom * (polyp[axis] - FRAME / 2) for axis in ("x", "y")}
        polyp["radius"] *= zoom
        polyp["size"] = list(SIZES)[int(np.searchsorted(SIZE_LIMITS, polyp["radius"]))]
    for fold in scene["folds"]:
        fold["radius"] *= zoom
    way = t if clip["tool"] == "entering" else 1 - t
    for tool in scene["instruments"]:
        tool["tip"] = OUTSIDE + way * (INSIDE - OUTSIDE)
    if clip["tool"] == "absent":
        scene["instruments"] = []
    return scene


def any_clip_frame(rng, number):
    return clip_scene(random_clip(rng, random_patient(rng, number)), rng.uniform())


def clip_frame(scene):
    """A frame of the size that a clip has. Narrow-band light is blue and green: red mucosa looks dark and bluish."""
    frame = draw_frame(scene).resize((CLIP_FRAME, CLIP_FRAME), Image.Resampling.BOX)
    if scene["light_mode"] == "NBI":
        red, green, blue = np.moveaxis(np.asarray(frame, dtype=np.float32), -1, 0)
        narrow = np.stack([0.35 * red + 0.2 * green, 0.2 * red + 0.7 * green, 0.5 * green + 0.5 * blue], axis=-1)
        frame = Image.fromarray(narrow.astype(np.uint8))
    return frame
