"""Endoscopy frames, drawn: a scene is a plain dictionary; moving its numbers makes the frames of a video."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

FRAME = 224  # width and height of a drawn frame, in pixels
GRID = 8  # image tokens along each side of it: 64 in all
BAR = FRAME // GRID  # of a wide frame, black on the left and on the right: one column of tokens each
RADIUS = 104  # of the endoscope's round field of view
TEXT_BLOCK, GREEN_BOX = (0, 0, 80, 44), (4, 184, 40, 220)  # left, top, right, bottom
COLORS = {
    "pink": (246, 150, 190),
    "red": (186, 14, 30),
    "white": (242, 238, 230),
    "yellow": (232, 200, 50),
    "brown": (92, 52, 26),
}
COLOR_SHARES = [0.45, 0.20, 0.13, 0.12, 0.10]  # one colour dominates, as in the real data
# Radii in pixels leave a gap between the classes, so that no polyp lies on a border between two answers.
SIZES = {"<5mm": (10, 11.5), "5-10mm": (15, 17.5), "11-20mm": (23.5, 26.5), ">20mm": (34, 38)}
SIZE_SHARES = [0.18, 0.27, 0.37, 0.18]
SIZE_WORDS = {"<5mm": "tiny", "5-10mm": "small", "11-20mm": "medium-sized", ">20mm": "large"}
PLACES = {"upper-left": (-1, -1), "upper-right": (1, -1), "lower-left": (-1, 1), "lower-right": (1, 1)}
# Degrees from the right-hand side, clockwise, because y grows downwards.
SIDES = {"left": 180, "right": 0, "top": 270, "bottom": 90}
MUCOSA = {"colonoscopy": (226, 150, 128), "gastroscopy": (186, 88, 52)}


def random_polyp(rng, place, color, largest):
    """A polyp that lies wholly inside its quadrant; its size class is at most number `largest`."""
    size_class = list(SIZES)[largest]
    radius = rng.uniform(*SIZES[size_class])
    nearest = max(radius + 2, 30)  # from the two midlines, along which instruments lie
    farthest = max(nearest, (RADIUS - 8 - radius) / math.sqrt(2))  # the corner still lies inside the field
    dx, dy = (rng.uniform(nearest, farthest, 2) * PLACES[place]).tolist()
    return {
        "x": FRAME / 2 + dx,
        "y": FRAME / 2 + dy,
        "radius": radius,
        "aspect": rng.uniform(0.88, 1.14),
        "angle": rng.uniform(0, math.pi),
        "place": str(place),
        "size": size_class,
        "color": str(color),
    }


def random_patient(rng, number):
    """What all frames of one examination share."""
    procedure = str(rng.choice(list(MUCOSA), p=[0.55, 0.45]))
    return {
        "group": f"patient_{number:04d}",
        "procedure": procedure,
        "mucosa": (np.array(MUCOSA[procedure]) + rng.uniform(-8, 8, 3)).tolist(),
        "code": f"ID {rng.integers(1000, 9999)}",
        "wide": number % 3 == 2,  # what its recorder would save: see recorded_frame
    }


def random_scene(rng, patient):
    color = rng.choice(list(COLORS), p=COLOR_SHARES)  # one per frame, so that its question has one answer
    places = rng.permutation(list(PLACES))[: rng.choice(4, p=[0.3, 0.46, 0.14, 0.1])]
    sizes = sorted(rng.choice(4, p=SIZE_SHARES, size=len(places)), reverse=True)  # the largest comes first
    kinds = rng.permutation(["biopsy forceps", "snare"])[: rng.choice(3, p=[0.38, 0.45, 0.17])]
    sides = rng.permutation(list(SIDES))[: len(kinds)]
    folds = rng.uniform(30, 48) + 36 * np.arange(rng.choice([0, 2, 3], p=[0.44, 0.28, 0.28]))
    time = f"{rng.integers(7, 18):02d}:{rng.integers(60):02d}:{rng.integers(60):02d}"
    return {
        **patient,
        "texture": int(rng.integers(2**31)),
        "light": (rng.uniform(0.38, 0.62, 2) * FRAME).tolist(),
        "center": (rng.uniform(0.35, 0.65, 2) * FRAME).tolist(),
        "folds": [{"radius": radius, "angle": rng.uniform(-math.pi, math.pi)} for radius in folds.tolist()],
        "polyps": [random_polyp(rng, place, color, size) for place, size in zip(places, sizes, strict=True)],
        "instruments": [
            {
                "kind": str(kind),
                "side": str(side),
                "angle": SIDES[side] + rng.uniform(-7, 7),
                "tip": rng.uniform(60, 74),  # pixels from the centre to the shaft's end
            }
            for kind, side in zip(kinds, sides, strict=True)
        ],
        "text": f"{time}\n{patient['code']}" if rng.random() < 0.62 else None,
        "box": bool(rng.random() < 0.45),  # the green box in which the endoscope's position is shown
    }


Y, X = np.mgrid[:FRAME, :FRAME].astype(np.float32)  # pixel coordinates


def smooth_noise(rng, cells):
    """Noise of about +-1 whose spots are FRAME / cells pixels wide."""
    noise = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((FRAME, FRAME), Image.Resampling.BICUBIC))


def draw_fold(light, center, fold):
    """An arc around the centre: a bright ridge, a sharp crease, and a shadow that fades outwards."""
    angle = np.arctan2(Y - center[1], X - center[0])
    across = np.hypot(X - center[0], Y - center[1]) + 3 * np.sin(3 * angle + fold["angle"]) - fold["radius"]
    along = np.clip(0.9 + 1.6 * np.cos(angle - fold["angle"]), 0, 1)  # the arc fades at its ends
    shadow = np.exp(-np.where(across < 0, (across / 2) ** 2, across / 9))
    ridge = np.exp(-(((across + 6) / 4) ** 2))
    light *= 1 - along * (0.62 * shadow - 0.2 * ridge)


def draw_polyp(pixels, light, polyp):
    """A shaded ellipse with a dark rim and a highlight."""
    radius = polyp["radius"]
    reach = int(radius) + 14  # only this window changes
    left, top = max(int(polyp["x"]) - reach, 0), max(int(polyp["y"]) - reach, 0)
    window = np.s_[top : top + 2 * reach, left : left + 2 * reach]
    dx, dy = (X[window] - polyp["x"]) / radius, (Y[window] - polyp["y"]) / radius
    cos, sin = math.cos(polyp["angle"]), math.sin(polyp["angle"])
    u, v = (cos * dx + sin * dy) / polyp["aspect"], (cos * dy - sin * dx) * polyp["aspect"]
    distance = np.hypot(u, v)  # 1 on the outline

    facing = np.sqrt(np.clip(1 - distance**2, 0, 1)) - 0.2 * (dx + dy)  # the light comes from the upper left
    body = np.array(COLORS[polyp["color"]]) * ((0.7 + 0.34 * facing) * (0.5 + 0.5 * light[window]))[..., None]
    shine = 0.7 * np.exp(-((dx + 0.3) ** 2 + (dy + 0.36) ** 2) / 0.02)[..., None]
    body += (255 - body) * shine
    rim = 0.5 * np.exp(-(((distance - 1.04) * radius / 4) ** 2))[..., None]
    inside = np.clip((1 - distance) * radius / 2 + 0.5, 0, 1)[..., None]
    pixels[window] = pixels[window] * (1 - rim) * (1 - inside) + body * inside


def draw_instrument(pixels, instrument):
    """A shaft from the border towards the centre; forceps end in two jaws, a snare in a wire loop."""
    scale = 2  # drawn twice as large and reduced, for smooth edges
    layer = Image.new("RGBA", (FRAME * scale, FRAME * scale))
    draw = ImageDraw.Draw(layer)
    angle = math.radians(instrument["angle"])

    def at(along, across):
        """A point `along` pixels from the centre towards the border and `across` pixels beside the shaft."""
        x = FRAME / 2 + along * math.cos(angle) - across * math.sin(angle)
        y = FRAME / 2 + along * math.sin(angle) + across * math.cos(angle)
        return x * scale, y * scale

    tip, border = instrument["tip"], RADIUS + 10
    snare = instrument["kind"] == "snare"
    # Strips from dark to bright and back make a flat band look like a metal tube; a snare's sheath is bluish.
    for low, high, grey in [(-7, 7, 70), (-5, 5, 125), (-4, 2, 175), (-2.5, 0, 225)]:
        color = (grey * 5 // 8, grey * 6 // 8, grey) if snare else (grey, grey, grey)
        draw.polygon([at(tip, low), at(tip, high), at(border, high), at(border, low)], fill=color)
    if snare:
        turn = np.linspace(-math.pi, math.pi, 40)
        loop = [at(tip - 15 + 16 * math.cos(t), 12 * math.sin(t)) for t in turn]
        draw.line(loop, fill=(40, 40, 48), width=9, joint="curve")
        draw.line(loop, fill=(232, 234, 240), width=5, joint="curve")
    else:
        for side in (-1, 1):
            jaw = [at(tip + a, side * b) for a, b in [(0, 0), (0, 7), (-14, 15), (-25, 11), (-13, 7)]]
            draw.polygon(jaw, fill=(198, 202, 208), outline=(48, 48, 52), width=2)
        draw.circle(at(tip, 0), 5, fill=(80, 80, 84))
    layer = np.asarray(layer.resize((FRAME, FRAME), Image.Resampling.BOX), dtype=np.float32)
    alpha = layer[..., 3:] / 255
    pixels *= 1 - alpha
    pixels += layer[..., :3] * alpha


def draw_frame(scene):
    """An RGB image of the scene. The same scene always gives the same pixels."""
    rng = np.random.default_rng(scene["texture"])
    x, y = scene["light"]
    light = 1.16 - 0.5 * ((X - x) ** 2 + (Y - y) ** 2) / RADIUS**2
    folded = light + 0.05 * smooth_noise(rng, 7) + 0.03 * smooth_noise(rng, 28)
    for fold in scene["folds"]:
        draw_fold(folded, scene["center"], fold)
    pixels = np.array(scene["mucosa"], dtype=np.float32) * folded[..., None]  # (FRAME, FRAME, 3)
    pixels[..., 1:] += 5 * smooth_noise(rng, 5)[..., None]  # redder and paler patches

    # Wet mucosa glistens: seven bright spots, smaller than any polyp.
    for x, y, width in rng.uniform((40, 40, 1), (FRAME - 40, FRAME - 40, 1.9), (7, 3)).tolist():
        pixels += 120 * np.exp(-(((X - x) / 1.6) ** 2 + (Y - y) ** 2) / width**2)[..., None]
    for polyp in scene["polyps"]:
        draw_polyp(pixels, light, polyp)
    for instrument in scene["instruments"]:
        draw_instrument(pixels, instrument)

    dx, dy = X - FRAME / 2, Y - FRAME / 2
    edge = np.hypot(dx, dy)
    if scene["procedure"] == "gastroscopy":  # an octagonal field instead of a round one
        edge = np.maximum(np.maximum(abs(dx), abs(dy)), (abs(dx) + abs(dy)) / math.sqrt(2)) * 1.02
    pixels *= np.clip((RADIUS - edge) / 3, 0.02, 1)[..., None]  # not quite black outside, as from a camera
    pixels += rng.standard_normal((FRAME, FRAME, 1), dtype=np.float32)  # sensor noise
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    draw = ImageDraw.Draw(image)
    if scene["text"]:
        draw.rectangle(TEXT_BLOCK, fill=(0, 0, 0))
        font = ImageFont.load_default(16)
        draw.multiline_text((4, 3), scene["text"], fill=(255, 255, 255), font=font, spacing=3)
    if scene["box"]:
        draw.rectangle(GREEN_BOX, fill=(20, 120, 70), outline=(150, 220, 180), width=2)
        draw.arc([12, 192, 32, 214], 30, 320, fill=(230, 240, 120), width=3)
    return image


def recorded_frame(scene):
    """The frame as its recorder saves it: a third of the patients have wide ones, with black bars at both sides."""
    frame = draw_frame(scene)
    return ImageOps.expand(frame, (BAR, 0)) if scene["wide"] else frame
