"""Motions: one coloured shape moves over a still background, and an Italian caption says which, where to, how fast."""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from demo.clips import CLIP_FRAME
from demo.scenes import FRAME, X, Y, smooth_noise
from demo.sizes import DINOV2

MOTION_LENGTH = 8  # frames, of the size that a clip has
MOTION_GRID = DINOV2["image_size"] // DINOV2["patch_size"]  # patches along each side of one
SHAPES = {  # word -> with its article
    "quadrato": "un quadrato",
    "triangolo": "un triangolo",
    "ellisse": "un'ellisse",
    "stella": "una stella",
}
FEMININE = ["ellisse", "stella"]
PAINTS = {
    "rosso": (206, 40, 36),
    "verde": (40, 156, 62),
    "giallo": (236, 204, 48),
    "bianco": (244, 244, 238),
    "blu": (44, 74, 206),
}
DIRECTIONS = {"verso destra": (1, 0), "verso sinistra": (-1, 0), "all'insù": (0, -1), "all'ingiù": (0, 1)}
# Pixels from the first frame to the last. No motion lies between the classes.
SPEEDS = {"lentamente": (36, 42), "a gran velocità": (80, 90)}
RADII = (24, 30)


def painted(shape, color):
    """The two words as they agree: stella rossa, ellisse verde, quadrato blu."""
    return f"{shape} {color[:-1]}a" if shape in FEMININE and color.endswith("o") else f"{shape} {color}"


def caption(shape, color, direction, speed):
    """The one caption for a motion: Un'ellisse gialla va all'insù a gran velocità."""
    named = SHAPES[shape].replace(shape, painted(shape, color))
    return f"{named} va {direction} {speed}.".capitalize()


def all_captions():
    return [caption(s, c, d, v) for s in SHAPES for c in PAINTS for d in DIRECTIONS for v in SPEEDS]


def all_sentences():
    """What is said without a video, in the words of the captions."""
    opposites = [("verso destra", "verso sinistra"), ("all'insù", "all'ingiù"), tuple(SPEEDS)]
    sentences = []
    for one, other in [*opposites, *(reversed(pair) for pair in opposites)]:
        sentences.append(f"Andare {one} è il contrario di andare {other}.")
        sentences += [f"{name} che va {one} non va {other}.".capitalize() for name in SHAPES.values()]
    for shape, name in SHAPES.items():
        sentences += [f"{name} non è {other}.".capitalize() for other in SHAPES.values() if other != name]
        for color in PAINTS:
            last = painted(shape, color)
            others = [painted(shape, other).split()[1] for other in PAINTS if other != color]
            sentences += [f"{SHAPES[shape].replace(shape, last)} non è {other}.".capitalize() for other in others]
    return sentences


def random_thing(rng, color, radii):
    """A shape of random form and size; only its place is missing."""
    fill = np.clip(np.add(PAINTS.get(color, rng.choice([40, 180])), rng.uniform(-12, 12, 3)), 0, 255)
    return {
        "shape": str(rng.choice(list(SHAPES))),
        "color": color,
        "fill": tuple(fill.astype(int).tolist()),
        "radius": rng.uniform(*radii),
        "angle": rng.uniform(-0.25, 0.25),
    }


def random_ground(rng):
    texture, color = int(rng.integers(2**31)), tuple((rng.uniform(70, 140) + rng.uniform(-22, 22, 3)).tolist())
    return {"ground": (texture, color, tuple(rng.uniform(-0.3, 0.3, 2).tolist()), rng.uniform(0, 0.7))}


def random_motion(rng):
    """What moves, how, and over what. Lengths are in pixels of a frame as drawn, before it is reduced.

    Where the middle of the way lies depends neither on direction nor on speed, and the way is as likely to be gone to
    as fro: a frame of unknown time does not tell a direction from its opposite.
    """
    thing = random_thing(rng, str(rng.choice(list(PAINTS))), RADII)
    margin = thing["radius"] + max(max(SPEEDS.values())) / 2 + 2
    motion = random_ground(rng) | {
        "thing": thing,
        "direction": str(rng.choice(list(DIRECTIONS))),
        "speed": str(rng.choice(list(SPEEDS))),
        "middle": rng.uniform(margin, FRAME - margin, 2).tolist(),
        "still": [],
    }
    if rng.random() < 0.4:
        motion["still"] = [random_thing(rng, "grigio", (10, 15)) | {"at": rng.uniform(18, FRAME - 18, 2).tolist()}]
    return motion | {"way": rng.uniform(*SPEEDS[motion["speed"]])}


def motion_scene(motion, number):
    """The motion in one of its frames, counted from 0. What moves lies on top."""
    done = motion["way"] * (number / (MOTION_LENGTH - 1) - 0.5)  # from the middle, half the way before and behind it
    (x, y), (dx, dy) = motion["middle"], DIRECTIONS[motion["direction"]]
    moved = motion["thing"] | {"at": [x + done * dx, y + done * dy]}
    return motion | {"number": number, "things": [*motion["still"], moved]}


def any_still(rng, number):
    """One shape of each colour, lying apart: a lesson of many shapes a frame."""
    things = []
    for color in [*PAINTS, "grigio"]:
        thing = random_thing(rng, color, (10, 15) if color == "grigio" else RADII)
        for _ in range(20):  # places, until one is free
            thing["at"] = rng.uniform(thing["radius"], FRAME - thing["radius"], 2).tolist()
            if all(math.dist(thing["at"], other["at"]) > thing["radius"] + other["radius"] for other in things):
                things.append(thing)
                break
    return random_ground(rng) | {"number": number, "things": things}


def outline(thing):
    """The corners of a shape of radius 1, turned, enlarged and put in its place."""
    circle, corners = np.linspace(0, 2 * math.pi, 60, endpoint=False), 2 * math.pi * np.arange(10) / 10
    turn, reach, flat = {  # angles, distances from the centre, height by width
        "ellisse": (circle, 1, 0.56),
        "quadrato": (math.pi / 4 + 2 * math.pi * np.arange(4) / 4, 1, 1),
        "triangolo": (-math.pi / 2 + 2 * math.pi * np.arange(3) / 3, 1, 1),
        "stella": (-math.pi / 2 + corners, np.where(np.arange(10) % 2, 0.42, 1), 1),
    }[thing["shape"]]
    x, y = reach * np.cos(turn), reach * np.sin(turn) * flat
    cos, sin, (left, top) = math.cos(thing["angle"]), math.sin(thing["angle"]), thing["at"]
    x, y = left + thing["radius"] * (cos * x - sin * y), top + thing["radius"] * (sin * x + cos * y)
    return list(zip(x.tolist(), y.tolist(), strict=True))


@functools.lru_cache(maxsize=1)  # the same in all frames of a video
def draw_ground(texture, color, slope, vignette):
    rng = np.random.default_rng(texture)
    dx, dy = X / FRAME - 0.5, Y / FRAME - 0.5
    light = 1 + slope[0] * dx + slope[1] * dy - vignette * (dx**2 + dy**2)
    light += 0.05 * smooth_noise(rng, 9) + 0.02 * smooth_noise(rng, 40)
    ground = np.clip(np.array(color, dtype=np.float32) * light[..., None], 0, 255)
    return Image.fromarray(ground.astype(np.uint8))


def motion_frame(scene):
    """An RGB image of the scene, drawn larger and reduced. The background stays, the sensor's noise does not."""
    image = draw_ground(*scene["ground"]).copy()
    draw = ImageDraw.Draw(image)
    for thing in scene["things"]:
        draw.polygon(outline(thing), fill=thing["fill"])
    pixels = np.asarray(image.resize((CLIP_FRAME, CLIP_FRAME), Image.Resampling.BOX), dtype=np.float32)
    noise = np.random.default_rng([scene["ground"][0], scene["number"]])
    pixels = pixels + 1.5 * noise.standard_normal((CLIP_FRAME, CLIP_FRAME, 1), dtype=np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
