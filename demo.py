"""Writes a tiny checkpoint and a small data set, in the real on-disk formats, to try a script on a laptop.

    python demo.py llava_med                       # -> runs/demo/llava_med/model and .../data
    python demo.py qwen2vl_sentinel                # -> runs/demo/qwen2vl_sentinel/model and .../data
    python demo.py surg_video_vqa                  # -> runs/demo/surg_video_vqa/model, .../whisper and .../data
    python demo.py umbrella_mri                    # -> runs/demo/umbrella_mri/model and .../data
    python demo.py video_plain_lm                  # -> runs/demo/video_plain_lm/model, .../vision and .../data
    python demo.py llava_med --out runs/demo/other --images 300 --seed 1

The language model is random and knows nothing; the towers have learned to see and to hear, as pretrained ones have.
Only umbrella_mri's language model, tower and projector have learned to answer as well: that script trains nothing but a
new embedding of volumes, which can say nothing through a language model that knows nothing.
video_plain_lm's folder of the language model holds no weights at all: that script starts from its configuration.
Frames and heads are drawn and recordings made of tones, so that every answer is there to be seen and every spoken
question to be heard, and a script that learns can be told from one that does not. Same seed, same versions: same bytes.
"""

import argparse
import copy
import functools
import gzip
import json
import math
import string
import wave
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# ----------------------------------------------------------------------------------------------------------
# Sizes
# ----------------------------------------------------------------------------------------------------------

# The usual 0.02 is meant for widths in the thousands; here it would mute every layer.
INITIALIZER_RANGE = 0.1
TEXT = {  # the language model, of all
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}
CLIP = {
    "hidden_size": 96,
    "num_hidden_layers": 3,  # features are read after the second last, as in every LLaVA
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 72,
    "patch_size": 9,  # 72 / 9 = GRID
}
QWEN2VL_VISION = {
    "depth": 3,
    "embed_dim": 64,
    "num_heads": 4,
    "mlp_ratio": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,  # 224 / (14 * 2) = GRID
    "temporal_patch_size": 2,
}
GPT2 = {
    "n_embd": 128,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
DINOV2 = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 112,
    "patch_size": 7,
    "initializer_range": 0.15,
}

FRAME = 224  # width and height of a drawn frame, in pixels
GRID = 8  # image tokens along each side of it: 64 in all
CLIP_FRAME = 112  # width and height of a clip's frame: drawn larger and reduced
CLIP_GRID = 4  # image tokens along each side of that, 112 / (14 * 2): 16 in all
BAR = FRAME // GRID  # of a wide frame, black on the left and on the right: one column of tokens each
RADIUS = 104  # of the endoscope's round field of view
TEXT_BLOCK, GREEN_BOX = (0, 0, 80, 44), (4, 184, 40, 220)  # left, top, right, bottom

# ----------------------------------------------------------------------------------------------------------
# Scenes: what a frame shows. A scene is a plain dictionary; moving its numbers makes the frames of a video.
# ----------------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------------
# Frames
# ----------------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------------
# Questions about single frames, worded after Kvasir-VQA
# ----------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "polyp": ("yes_no", ["Are there any polyps in the image?", "Does this image contain a polyp?"]),
    "instrument": ("yes_no", ["Are there any instruments in the image?", "Is an instrument visible?"]),
    "text": ("yes_no", ["Is there text in the image?", "Is there any text?"]),
    "fold": ("yes_no", ["Does the image show a fold?", "Are there any folds in the image?"]),
    "box": ("yes_no", ["Is there a green box artefact?", "Does the image show a green box?"]),
    "color": ("color", ["What color is the polyp?", "What color is the abnormality?"]),
    "size": ("size_numeric", ["What is the size of the polyp?", "How large is the largest polyp?"]),
    "polyps": ("count_numeric", ["How many polyps are in the image?", "How many findings are present?"]),
    "instruments": ("count_numeric", ["How many instruments are in the image?"]),
    "place": ("mcq", ["Where is the polyp? (a) upper-left (b) upper-right (c) lower-left (d) lower-right"]),
    "side": ("mcq", ["From which side does the instrument enter? (a) left (b) right (c) top (d) bottom"]),
    "procedure": ("open_ended", ["What type of procedure is the image taken from?"]),
    "finding": ("open_ended", ["Describe the main finding.", "What is the main finding in the image?"]),
    "kind": ("open_ended", ["Which instrument is visible?", "What instrument is used?"]),
}
CANDIDATES = {"color": list(COLORS), "place": list(PLACES), "side": list(SIDES)}


def answers(scene):
    """Every answer that the frame decides; colour, size, place and side only where there is one to tell."""
    polyps, instruments = scene["polyps"], scene["instruments"]
    seen = {
        "polyp": polyps,
        "instrument": instruments,
        "text": scene["text"],
        "fold": scene["folds"],
        "box": scene["box"],
    }
    found = {key: "yes" if what else "no" for key, what in seen.items()}
    found["polyps"] = str(len(polyps))
    found["instruments"] = str(len(instruments))
    found["procedure"] = scene["procedure"]
    found["finding"] = "normal mucosa"
    found["kind"] = " and ".join(sorted(tool["kind"] for tool in instruments)) or "none"
    if polyps:
        found["color"] = polyps[0]["color"]
        found["size"] = polyps[0]["size"]  # the first is the largest
        found["finding"] = f"several {found['color']} polyps"
    if len(polyps) == 1:
        found["place"] = polyps[0]["place"]
        found["finding"] = f"a {SIZE_WORDS[found['size']]} {found['color']} polyp"
    if len(instruments) == 1:
        found["side"] = instruments[0]["side"]
    return found


def question_rows(rng, scene, index):
    found = answers(scene)
    keys = [key for key in QUESTIONS if key in found]
    count = rng.integers(7, 12)  # 7 to 11; Kvasir-VQA has 9.05 an image
    rows = []
    for number, key in enumerate(rng.permutation(keys)[:count].tolist()):
        question_type, wordings = QUESTIONS[key]
        row = {
            "id": f"demo_{index:05d}_q{number}",
            "image": f"images/{index:05d}.jpg",
            "question": str(rng.choice(wordings)),
            "question_type": question_type,
            "answer": found[key],
            "group": scene["group"],
        }
        if key in CANDIDATES:
            row["answer_candidates"] = CANDIDATES[key]
        rows.append(row)
    return rows


def write_questions(folder, images, seed, draw, rows_of):
    """Patients have one to five images, all in the same split. The scenes and questions depend on the seed alone.

    draw(scene) gives the image, rows_of(rng, scene, index) its rows in the columns of the data set imitated.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 0])
    index = patients = 0
    for split, end in [("train", round(0.7 * images)), ("val", round(0.85 * images)), ("test", images)]:
        rows = []
        while index < end:
            patient = random_patient(rng, patients)
            patients += 1
            for _ in range(min(end - index, rng.integers(1, 6))):
                scene = random_scene(rng, patient)
                draw(scene).save(folder / "images" / f"{index:05d}.jpg", quality=90)
                rows += rows_of(rng, scene, index)
                index += 1
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / split}.jsonl: {len(rows)} questions")


def texts_asked_and_answered():
    """What the tokenizers learn their word pieces from."""
    texts = [wording for _, wordings in QUESTIONS.values() for wording in wordings]
    texts += [*COLORS, *SIZES, *SIZE_WORDS.values(), *PLACES, *SIDES, *MUCOSA, "yes", "no", "none"]
    return [*texts, "a large pink polyp", "several red polyps", "normal mucosa", "biopsy forceps and snare"]


# ----------------------------------------------------------------------------------------------------------
# Clips: a scene whose numbers move from frame to frame, and what is asked about it, worded after SurgViVQA
# ----------------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------------
# Motions: one coloured shape moves over a still background, and an Italian caption says which, where to, how fast
# ----------------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------------
# Recordings: a question is spoken as three tones
# ----------------------------------------------------------------------------------------------------------

TONES = [400, 700, 1200, 2000]  # Hz
SPOKEN = dict(  # question type -> its tones; each tone of one is heard in others too, elsewhere
    zip(CLIP_QUESTIONS, [(0, 1, 2), (0, 2, 1), (1, 0, 3), (1, 3, 0), (2, 3, 1), (3, 2, 0)], strict=True)
)
WHISPER = {  # the real one: 128 mel bins, 1,500 positions of 20 ms, width 1280, 32 layers
    "num_mel_bins": 40,
    "max_source_positions": 50,
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    **{f"{name}_token_id": index for index, name in enumerate(["pad", "bos", "eos", "decoder_start"])},
}


def speak(rng, tones, rate):
    """(samples,) float of about 0.8 s, and (positions of 20 ms,) which tone is heard there, 0 for none."""
    parts, heard = [], []
    for tone in tones:
        for length, number in [(rng.uniform(0.02, 0.06), 0), (rng.uniform(0.16, 0.24), tone + 1)]:
            time = np.arange(round(length * rate)) / rate
            sound = np.sin(2 * np.pi * TONES[number - 1] * rng.uniform(0.98, 1.02) * time) if number else 0 * time
            parts.append(rng.uniform(0.2, 0.6) * sound * np.minimum(1, 100 * np.minimum(time, length - time)))
            heard.append(np.full(len(time), number))
    samples = np.concatenate(parts)
    samples = samples + rng.uniform(0.001, 0.01) * rng.standard_normal(len(samples))
    return samples, np.concatenate(heard)[rate // 100 :: rate // 50]


def write_wav(path, samples, rate, channels):
    """16-bit PCM; of two channels the second is quieter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    louder = np.stack([samples, 0.7 * samples][:channels], axis=1)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes((louder * 32767).astype("<i2").tobytes())


# ----------------------------------------------------------------------------------------------------------
# Heads: drawn MRI volumes in RAS (x grows to the subject's right, y to the front, z upwards), and conversations
# ----------------------------------------------------------------------------------------------------------

SCANS = {  # modality -> voxels along x, y, z (and time), their sizes in mm, and the patch that becomes one token
    "T1": {"shape": (32, 32, 32), "voxel": (5, 6, 5), "patch": (8, 8, 8)},  # 64 tokens
    "rsfMRI": {"shape": (24, 24, 24, 4), "voxel": (7, 8, 7), "patch": (8, 8, 8, 2)},  # 54 tokens
}
VENTRICLES = {"normal": 0.9, "enlarged": 1.5}  # how wide; they vary by a tenth, which leaves a gap
# How axes run on disk, from scanner to scanner: only a reader that turns them to RAS can tell left from right.
AXIS_CODES = ["RAS", "LAS", "LPS", "PSR", "RPI", "ASL"]

# task -> (labels, questions, answers with one label word each)
MRI_TASKS = {
    "ventricle_size": (
        ["normal", "enlarged"],
        ["Are the ventricles normal or enlarged?", "What is the size of the ventricles?"],
        ["The ventricles are {}.", "They are {}."],
    ),
    "lesion_side": (
        ["left", "right", "none"],
        ["On which side is the lesion?", "Is there a lesion, and on which side?"],
        ["Side of the lesion: {}.", "Lesion: {}."],
    ),
    "comparison": (
        ["larger", "smaller", "unchanged"],
        ["How have the ventricles changed?", "Are the ventricles larger, smaller or unchanged?"],
        ["The ventricles are {}.", "They are {} now."],
    ),
    "active_hemisphere": (
        ["left", "right"],
        ["Which hemisphere is active?", "In which hemisphere does the signal change?"],
        ["The {} hemisphere is active.", "It is the {} one."],
    ),
}
REFERENCE = "This is the reference scan.", "I see it."  # what is said before the second scan of a comparison


def random_head(rng):
    lesion = str(rng.choice(["left", "right", "none"], p=[0.42, 0.33, 0.25]))
    return {
        "radii": (rng.uniform(0.95, 1.05, 3) * (72, 88, 72)).tolist(),  # mm
        "center": rng.uniform(-4, 4, 3).tolist(),
        "bumps": rng.uniform(-0.02, 0.02, (4, 3)).tolist(),
        "ventricle_size": str(rng.choice(list(VENTRICLES), p=[0.54, 0.46])),
        "ventricles": rng.uniform(0.9, 1.1),
        "lesion_side": lesion,
        "lesion": (rng.uniform((24, -28, -15), (34, 28, 22)) * (-1 if lesion == "left" else 1, 1, 1)).tolist(),
        "lesion_radius": rng.uniform(14, 18),
        "active_hemisphere": str(rng.choice(["left", "right"], p=[0.54, 0.46])),
    }


def draw_head(rng, head, modality):
    """The voxels as int16, in RAS: zero outside the head, and as bright as the scanner likes."""
    scan = SCANS[modality]
    sides = zip(scan["shape"], scan["voxel"], head["center"], strict=False)  # of a series without its time
    mm = [size * (np.arange(n) - (n - 1) / 2) - center for n, size, center in sides]
    x, y, z = np.ix_(*(axis.astype(np.float32) for axis in mm))  # from the head's centre
    bumpy = 1 + 0.02 * sum(np.sin(a * x + b * y + c * z) for a, b, c in head["bumps"])  # no head is an ellipsoid

    def inside(radii, center=(0, 0, 0)):
        """1 within the ellipsoid, 0 outside, and something between where its surface cuts a voxel."""
        distance = np.sqrt(sum(((axis - c) / r) ** 2 for axis, c, r in zip((x, y, z), center, radii, strict=True)))
        return np.clip((bumpy - distance) * (radii[0] / scan["voxel"][0]) + 0.5, 0, 1)

    skull, brain, white = (inside([share * radius for radius in head["radii"]]) for share in (0.92, 0.84, 0.6))
    voxels = 0.6 * inside(head["radii"]) - 0.4 * skull  # skin and fat, and the dark bone below
    size = VENTRICLES[head["ventricle_size"]] * head["ventricles"]
    ventricles = sum(inside((7 * size, 20 * size, 10 * size), (side * (2 + 7 * size), -5, 8)) for side in (-1, 1))
    if modality == "T1":
        voxels += 0.5 * brain + 0.2 * white
        voxels += (0.2 - voxels) * np.clip(ventricles, 0, 1)
        if head["lesion_side"] != "none":
            voxels += (2.5 - voxels) * inside(3 * [head["lesion_radius"]], head["lesion"])
    else:
        active = brain * np.clip((-x if head["active_hemisphere"] == "left" else x) / 10, 0, 1)
        course = np.array([-1, 1, -1, 1])  # on average it is as bright as the other one
        voxels = (voxels + 0.4 * brain + 0.2 * ventricles)[..., None] + 0.12 * active[..., None] * course
    voxels += 0.02 * rng.standard_normal(voxels.shape, dtype=np.float32) * (voxels > 0)
    return np.clip(voxels * rng.uniform(300, 3000), 0, None).astype(np.int16)


def mri_conversation(rng, subject, task, label, modality, paths):
    """A conversation in UMBRELLA's form. A turn's scan comes first, so all about one scan begin alike."""
    labels, questions, answers = MRI_TASKS[task]
    said = [str(rng.choice(questions)), str(rng.choice(answers)).format(label)]
    turns = []
    for number, text in enumerate([*REFERENCE, *said] if len(paths) == 2 else said):
        scan = [{"type": "image", "modality": modality, "image_path": paths[number // 2]}] if number % 2 == 0 else []
        turns.append({"role": ["user", "assistant"][number % 2], "content": [*scan, {"type": "text", "text": text}]})
    return {
        "task_id": f"{subject}_{task}",
        "task_type": task,
        "subject_ids": [subject],
        "modalities": [modality for _ in paths],
        "images": [{"path": path, "token": "<image>", "modality": modality} for path in paths],
        "conversations": turns,
        "answer_candidates": labels,
        "metadata": {"label": label},
    }


def random_subject(rng, number):
    """{path: (voxels, modality)} and conversations. Of three subjects one has a second T1, one a series."""
    subject, head = f"sub-{number + 1:04d}", random_head(rng)
    first, later, series = (f"volumes/{subject}_{name}.nii.gz" for name in ("T1w", "ses-02_T1w", "task-rest_bold"))
    volumes = {first: (draw_head(rng, head, "T1"), "T1")}
    asked = [(task, head[task], "T1", [first]) for task in ("ventricle_size", "lesion_side")]
    if number % 3 == 0:
        before, after = head["ventricle_size"], str(rng.choice(list(VENTRICLES)))
        change = "unchanged" if after == before else "larger" if after == "enlarged" else "smaller"
        volumes[later] = draw_head(rng, head | {"ventricle_size": after}, "T1"), "T1"
        asked.append(("comparison", change, "T1", [first, later]))
    if number % 3 == 1:
        volumes[series] = draw_head(rng, head, "rsfMRI"), "rsfMRI"
        asked.append(("active_hemisphere", head["active_hemisphere"], "rsfMRI", [series]))
    return volumes, [mri_conversation(rng, subject, *about) for about in asked]


# ----------------------------------------------------------------------------------------------------------
# Vision towers that have learned to see
# ----------------------------------------------------------------------------------------------------------

# What a patch shows, largest part first come: the words that a tower learns before a language model sees it.
SHOWN = ["mucosa", "fold", *(f"{c} {s}" for c in COLORS for s in SIZES), "biopsy forceps", "snare", "text", "box"]
SHOWN_SHAPES, SHOWN_COLORS = ["ground", "grigio", *SHAPES], ["ground", "grigio", *PAINTS]


def largest_part(layer, grid, things):
    """The index in each of the grid x grid patches of a drawing of indices: whatever covers a tenth of it and most."""
    side = FRAME // grid
    blocks = np.asarray(layer).reshape(grid, side, grid, side).transpose(0, 2, 1, 3).reshape(grid**2, side**2)
    counts = np.stack([(blocks == i).sum(1) for i in range(things)], axis=1)  # (patches, things)
    counts[:, 0] = side**2 // 10
    return counts.argmax(1)


def patch_labels(scene, grid):
    """What each of the grid x grid patches shows, as an index into SHOWN."""
    layer = Image.new("L", (FRAME, FRAME))  # 0 is mucosa
    draw = ImageDraw.Draw(layer)
    for fold in scene["folds"]:
        (x, y), radius, angle = scene["center"], fold["radius"], math.degrees(fold["angle"])
        draw.arc([x - radius, y - radius, x + radius, y + radius], angle - 70, angle + 70, SHOWN.index("fold"), 8)
    for polyp in scene["polyps"]:
        draw.circle((polyp["x"], polyp["y"]), polyp["radius"], SHOWN.index(f"{polyp['color']} {polyp['size']}"))
    for instrument in scene["instruments"]:
        cos, sin = math.cos(math.radians(instrument["angle"])), math.sin(math.radians(instrument["angle"]))
        ends = [(FRAME / 2 + d * cos, FRAME / 2 + d * sin) for d in (instrument["tip"] - 20, RADIUS)]
        draw.line(ends, SHOWN.index(instrument["kind"]), 18)
    if scene["text"]:
        draw.rectangle(TEXT_BLOCK, SHOWN.index("text"))
    if scene["box"]:
        draw.rectangle(GREEN_BOX, SHOWN.index("box"))
    return largest_part(layer, grid, len(SHOWN))


def image_labels(scene, image, grid):
    """(2, cells): what each cell of the image shows and where it lies in the frame; a bar's cells lie nowhere in it."""
    cell = image.height // grid
    bars = (0, 0), ((image.width - image.height) // (2 * cell),) * 2
    shown = np.pad(patch_labels(scene, grid).reshape(grid, grid), bars)  # black is taken for mucosa, as in corners
    place = np.pad(np.arange(grid**2).reshape(grid, grid), bars, constant_values=-100)  # -100: nothing to learn
    return torch.from_numpy(np.stack([shown.flatten(), place.flatten()]))


def motion_labels(scene, image, grid):
    """(3, patches): the shape that each patch shows, where it lies, and the colour. What is grey has no other shape."""
    layer = Image.new("L", (FRAME, FRAME))  # 0 is background
    for number, thing in enumerate(scene["things"], start=1):
        ImageDraw.Draw(layer).polygon(outline(thing), number)
    shown = largest_part(layer, grid, len(scene["things"]) + 1)
    colors = ["ground", *(thing["color"] for thing in scene["things"])]
    shapes = ["ground", *(t["color"] if t["color"] == "grigio" else t["shape"] for t in scene["things"])]
    colors = np.array([SHOWN_COLORS.index(color) for color in colors])
    shapes = np.array([SHOWN_SHAPES.index(shape) for shape in shapes])
    return torch.from_numpy(np.stack([shapes[shown], np.arange(grid**2), colors[shown]]))


def clip_processor():
    side = CLIP["image_size"]
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def clip_features(tower, pixel_values):
    """What a LLaVA reads: the patches of the second last layer, without the class token."""
    return tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)


def qwen2vl_processor():
    return Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)  # as Qwen2-VL-2B-Instruct's


def qwen2vl_features(tower, pixel_values, image_grid_thw):
    """What a Qwen2-VL reads: the merger's output, of the images one behind the other."""
    return tower(pixel_values, grid_thw=image_grid_thw).pooler_output


def dinov2_processor():
    """As the real one's, which resizes to 256 and cuts 224 out; here nothing is cut off, so that no way leaves it."""
    side = DINOV2["image_size"]
    return BitImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def dinov2_features(tower, pixel_values):
    """The patches of the last layer, without the class token."""
    return tower(pixel_values).last_hidden_state[:, 1:].flatten(0, 1)


def look_at_alike(tower):
    """Keys as queries: a patch at first attends to patches like it, those of its own colour.

    From them it learns its shape: in one comparison 74 % of the shapes were right after the same lesson, 60 % without.
    """
    weights = dict(tower.named_parameters())
    for name, weight in weights.items():
        key = name.replace("q_proj", "k_proj").replace("query", "key")  # of newer and older transformers
        if key != name:
            weights[key].data.copy_(weight.data)


def any_scene(rng, number):
    return random_scene(rng, random_patient(rng, number))


# How each script's tower is taught. Qwen2-VL reads four times as many patches, so it sees fewer frames.
# `kinds` are the labels of a patch, what it shows first: how many there are, and how much a kind counts.
LESSONS = {
    "llava_med": {
        "scene": any_scene,
        "draw": draw_frame,
        "labels": image_labels,
        "kinds": [(len(SHOWN), 1), (GRID**2, 1)],
        "grid": GRID,
        "processor": clip_processor,
        "features": clip_features,
        "steps": 300,
        "batch": 32,
        "rate": 2e-3,
    },
    "qwen2vl_sentinel": {
        "scene": any_scene,
        "draw": recorded_frame,
        "labels": image_labels,
        "kinds": [(len(SHOWN), 1), (GRID**2, 1)],
        "grid": GRID,
        "processor": qwen2vl_processor,
        "features": qwen2vl_features,
        "steps": 400,
        "batch": 8,
        "rate": 6e-3,
    },
    "surg_video_vqa": {
        "scene": any_clip_frame,
        "draw": clip_frame,
        "labels": image_labels,
        "kinds": [(len(SHOWN), 1), (CLIP_GRID**2, 1)],
        "grid": CLIP_GRID,
        "processor": qwen2vl_processor,
        "features": qwen2vl_features,
        "steps": 400,
        "batch": 24,
        "rate": 6e-3,
    },
    "video_plain_lm": {
        "scene": any_still,
        "draw": motion_frame,
        "labels": motion_labels,
        "kinds": [(len(SHOWN_SHAPES), 1), (MOTION_GRID**2, 0.2), (len(SHOWN_COLORS), 0.3)],  # shapes are the hardest
        "grid": MOTION_GRID,
        "processor": dinov2_processor,
        "features": dinov2_features,
        "steps": 900,
        "batch": 8,
        "rate": 4e-3,
    },
}


def pretrain_tower(tower, seed, lesson, frames=800):
    """Teach the vision tower what each patch shows and where it is, on frames that the data set does not hold.

    A real one starts from a tower that has seen hundreds of millions of images. From a random one, some thousand
    questions are too few to find a polyp with. The language model stays random: it knows neither words nor answers.
    """
    lesson = LESSONS[lesson]
    steps, batch, features, grid = lesson["steps"], lesson["batch"], lesson["features"], lesson["grid"]
    sizes = [size for size, _ in lesson["kinds"]]
    rng = np.random.default_rng([seed, 1])  # the data set draws from [seed, 0]
    scenes = [lesson["scene"](rng, number) for number in range(frames)]
    images = [lesson["draw"](scene) for scene in scenes]
    labels = [lesson["labels"](scene, image, grid) for scene, image in zip(scenes, images, strict=True)]
    processor = lesson["processor"]()
    inputs = [processor(image, return_tensors="pt") for image in images]

    shown = torch.cat(labels, dim=1)[0]
    weight = (len(shown) / torch.bincount(shown, minlength=sizes[0]).clamp(min=1)).sqrt()
    head = torch.nn.Linear(features(tower, **inputs[0]).shape[1], sum(sizes))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()])
    named = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lesson["rate"] * min(1, (step + 1) / 20) * (1 - step / steps)
        chosen = rng.choice(frames, batch, replace=False)
        together = {name: torch.cat([inputs[i][name] for i in chosen]) for name in inputs[0]}
        logits = head(features(tower, **together)).split(sizes, dim=1)
        asked = torch.cat([labels[i] for i in chosen], dim=1)
        loss = cross_entropy(logits[0], asked[0], weight=weight)
        for (_, share), guessed, label in zip(lesson["kinds"][1:], logits[1:], asked[1:], strict=True):
            loss = loss + share * cross_entropy(guessed, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        named.append((logits[0].argmax(1) == asked[0]).float().mean())
    right = torch.stack(named[-20:]).mean()
    print(f"vision tower: {right:.1%} of the last patches named, after {steps} steps on {frames} frames of its own")


# ----------------------------------------------------------------------------------------------------------
# llava_med: a LLaVA as converted from LLaVA-Med v1.5 Mistral
# ----------------------------------------------------------------------------------------------------------

# 3 special + 256 bytes + 95 characters + 246 merges. <image> is ID 600, past them, as Mistral's is 32000.
VOCABULARY = 600

# Mistral's instruction format, as LLaVA-NeXT-Mistral renders it: the system text and the images come first in
# the user turn. <s> is missing on purpose: the tokenizer adds it.
MISTRAL_CHAT_TEMPLATE = """\
{%- set ns = namespace(system="") -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set images, text = "", message.content -%}
{%- else -%}
{%- set images = "<image>\\n" * (message.content | selectattr("type", "equalto", "image") | list | length) -%}
{%- set text = message.content | selectattr("type", "equalto", "text") | map(attribute="text") | join -%}
{%- endif -%}
{%- if message.role == "system" -%}
{%- set ns.system = text + "\\n\\n" -%}
{%- elif message.role == "user" -%}
{{- "[INST] " + ns.system + images + text + " [/INST]" -}}
{%- set ns.system = "" -%}
{%- else -%}
{{- " " + text + "</s>" -}}
{%- endif -%}
{%- endfor -%}
"""


def build_mistral_tokenizer(texts):
    """Like Mistral's: SentencePiece BPE that falls back to bytes, with <unk>, <s>, </s> and no pad token."""
    special = ["<unk>", "<s>", "</s>"]
    # Trained with word boundaries, so that no piece spans two words, and without merging digits.
    trainee = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    trainee.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), digits])
    characters = [*string.digits, *string.ascii_letters, *string.punctuation, "▁"]
    size = VOCABULARY - len(special) - 256
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=characters, show_progress=False)
    trainee.train_from_iterator(texts, trainer)
    learnt = json.loads(trainee.to_str())["model"]

    # The byte pieces are added afterwards: as the trainer's special tokens, decoding would drop them.
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in learnt["merges"]]
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template=MISTRAL_CHAT_TEMPLATE,
    )


def write_llava_med_model(folder, seed):
    """A LLaVA checkpoint: all files that a real one has."""
    tokenizer = build_mistral_tokenizer([*texts_asked_and_answered(), "[INST] [/INST]"])
    tokenizer.save_pretrained(folder)

    clip_processor().save_pretrained(folder)

    # The image token is the first ID past the tokenizer's end. The embedding is padded to a multiple of 64
    # beyond it (32000 pieces -> 32064 rows), with room for two more tokens, such as a pad token.
    image_token = len(tokenizer)
    rows = math.ceil((image_token + 3) / 64) * 64
    config = transformers.LlavaConfig(
        text_config=transformers.MistralConfig(**TEXT, vocab_size=rows, initializer_range=INITIALIZER_RANGE),
        vision_config=transformers.CLIPVisionConfig(**CLIP, initializer_range=INITIALIZER_RANGE),
        image_token_index=image_token,
        image_seq_length=GRID**2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config)
    pretrain_tower(model.model.vision_tower, seed, "llava_med")
    model.save_pretrained(folder)
    print(f"{folder}: LLaVA, {model.num_parameters():,} parameters, {len(tokenizer)} word pieces")


def write_llava_med_data(folder, images, seed):
    write_questions(folder, images, seed, draw_frame, question_rows)


# ----------------------------------------------------------------------------------------------------------
# qwen2vl_sentinel: a Qwen2-VL as Qwen2-VL-2B-Instruct, and Kvasir-VQA in the columns that its recipe reads
# ----------------------------------------------------------------------------------------------------------

# Right behind the BPE vocabulary, in this order, as 151643 to 151656.
QWEN2VL_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2VL_SPECIAL += [f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
QWEN2VL_SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]

# The real vocabulary has learned them from markup and code. Because of them, <ANS>Pink</ANS> has no piece
# that says where the answer begins: <, ANS, >P, ink, </, ANS, >.
MARKUP_MERGES = [*((">", letter) for letter in string.ascii_letters), (">", "("), ("<", "/"), ("]", "</")]
MARKUP_MERGES += [("N", "S"), ("A", "NS")]

# Qwen2-VL's, over several lines. add_vision_id and add_generation_prompt are arguments of apply_chat_template.
QWEN2VL_CHAT_TEMPLATE = """\
{%- set count = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
{%- if loop.first and message.role != "system" -%}
{{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" -}}
{%- endif -%}
{{- "<|im_start|>" + message.role + "\\n" -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" or "image" in part or "image_url" in part -%}
{%- set count.images = count.images + 1 -%}
{{- "Picture " ~ count.images ~ ": " if add_vision_id else "" -}}
{{- "<|vision_start|><|image_pad|><|vision_end|>" -}}
{%- elif part.type == "video" or "video" in part -%}
{%- set count.videos = count.videos + 1 -%}
{{- "Video " ~ count.videos ~ ": " if add_vision_id else "" -}}
{{- "<|vision_start|><|video_pad|><|vision_end|>" -}}
{%- elif "text" in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- endfor -%}
{{- "<|im_start|>assistant\\n" if add_generation_prompt else "" -}}
"""


def build_qwen2_tokenizer(texts, special=QWEN2VL_SPECIAL, chat_template=QWEN2VL_CHAT_TEMPLATE):
    """Like Qwen2's: byte-level BPE, split by its regular expression, with PAD <|endoftext|>, EOS <|im_end|>, no BOS."""
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes
    trainee.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    learnt = json.loads(trainee.to_str())["model"]

    markup = [first + second for first, second in MARKUP_MERGES]
    pieces = dict.fromkeys([*list(learnt["vocab"])[:256], *markup, *list(learnt["vocab"])[256:]])
    merges = dict.fromkeys([*MARKUP_MERGES, *map(tuple, learnt["merges"])])
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=list(merges),
        unk_token=None,
        add_prefix_space=False,
        padding_side="left",
        model_max_length=TEXT["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.eos_token = "<|im_end|>"  # only now, because the constructor gives EOS the first ID
    return tokenizer


def write_qwen2vl_sentinel_model(folder, seed):
    prompts = ["Question type: \nQuestion:", "Answer the question about the medical image with the answer alone."]
    prompts = [*(kind for kind, _ in QUESTIONS.values()), *prompts]
    write_qwen2vl(folder, seed, [*texts_asked_and_answered(), *AROUND, *prompts], "qwen2vl_sentinel")


# What stands around questions: the real one has pieces for these words, as for all common ones.
AROUND = ["You are a helpful assistant.", "system\nuser\nassistant"]


def write_qwen2vl(folder, seed, texts, lesson):
    """A Qwen2-VL checkpoint: all files that a script reads of a real one, config.json flat as in the real one."""
    tokenizer = build_qwen2_tokenizer(texts)
    tokenizer.save_pretrained(folder)

    qwen2vl_processor().save_pretrained(folder)

    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    config = {
        **TEXT,
        "vocab_size": math.ceil((len(tokenizer) + 4) / 64) * 64,  # room for a pad token and three for sound
        "initializer_range": INITIALIZER_RANGE,
        # of the 16 frequencies of a head, how many turn with time, height and width: 16, 24, 24 in the real one
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": pad,  # never used: the tokenizer has no BOS
        "eos_token_id": eos,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()},
        "vision_config": {
            **QWEN2VL_VISION,
            "hidden_size": TEXT["hidden_size"],
            "initializer_range": INITIALIZER_RANGE,
        },
    }
    torch.manual_seed(seed)
    model = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(**copy.deepcopy(config)))
    # A real one samples unless told otherwise, and ends at either of two tokens.
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=pad,
        pad_token_id=pad,
        eos_token_id=[eos, pad],
        do_sample=True,
        temperature=0.01,
        top_k=1,
        top_p=0.001,
    )
    pretrain_tower(model.model.visual, seed, lesson)
    model.save_pretrained(folder)
    named = {"architectures": [type(model).__name__], "model_type": "qwen2_vl", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(named | config, indent=2) + "\n")
    print(f"{folder}: Qwen2-VL, {model.num_parameters():,} parameters, {len(tokenizer)} word pieces")


def kvasir_rows(rng, scene, index):
    """The same questions in Kvasir-VQA's columns. Every other row is enriched: it states its type."""
    rows = []
    for number, row in enumerate(question_rows(rng, scene, index)):
        kept = {key: row[key] for key in ("question", "answer", "group")}
        rows.append({"image_id": f"{index:05d}", "image_filename": f"{index:05d}.jpg", **kept})
        if (index + number) % 2:
            rows[-1]["question_type"] = row["question_type"]
    return rows


def write_qwen2vl_sentinel_data(folder, images, seed):
    write_questions(folder, images, seed, recorded_frame, kvasir_rows)


# ----------------------------------------------------------------------------------------------------------
# surg_video_vqa: the same Qwen2-VL, a Whisper, and clips with spoken questions in SurgViVQA's files
# ----------------------------------------------------------------------------------------------------------


def pretrain_listener(encoder, extractor, seed, steps=200, batch=16):
    """Teach Whisper's encoder which tone is heard when, in recordings that the data set does not hold.

    A real one starts from one that has learned to write down speech. It stays frozen wherever adapters are trained.
    """
    rng = np.random.default_rng([seed, 2])
    head = torch.nn.Linear(WHISPER["d_model"], len(TONES) + 1)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, *head.parameters()])
    named = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        spoken = [speak(rng, rng.integers(0, len(TONES), 3), 16_000) for _ in range(batch)]
        labels = torch.full((batch, WHISPER["max_source_positions"]), 0)
        for row, (_, heard) in zip(labels, spoken, strict=True):
            row[: len(heard)] = torch.from_numpy(heard[: len(row)])
        sounds = [samples.astype(np.float32) for samples, _ in spoken]
        features = extractor(sounds, sampling_rate=16_000, return_tensors="pt").input_features
        logits = head(encoder(features).last_hidden_state)  # (batch, positions, tones + 1)
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        named.append((logits.argmax(-1) == labels).float().mean())
    print(f"audio tower: {torch.stack(named[-20:]).mean():.1%} of the last positions named, after {steps} steps")


def write_whisper(folder, seed):
    """A Whisper checkpoint: configuration, weights of encoder and decoder, feature extractor."""
    window = WHISPER["max_source_positions"] // 50  # seconds
    extractor = transformers.WhisperFeatureExtractor(WHISPER["num_mel_bins"], chunk_length=window)
    extractor.save_pretrained(folder)
    torch.manual_seed(seed)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER))
    pretrain_listener(model.model.encoder, extractor, seed)
    model.save_pretrained(folder)
    print(f"{folder}: Whisper, {model.num_parameters():,} parameters")


def write_surg_video_vqa_model(folder, seed):
    texts = [form for _, _, values in CLIP_QUESTIONS.values() for answer in values.values() for form in answer]
    texts += [question for question, _, _ in CLIP_QUESTIONS.values()]
    prompts = ["Answer the question about the surgical clip with the answer alone.", "Answer the spoken question."]
    write_qwen2vl(folder, seed, [*texts, *AROUND, *prompts, "Question: "], "surg_video_vqa")
    write_whisper(folder.with_name("whisper"), seed)


def clip_row(clip, kind, video, numbers, index):
    question, depends_on, values = CLIP_QUESTIONS[kind]
    answer, short = values[clip[depends_on]]
    return {
        "id": f"qa_{index:06d}",
        "video_id": video,
        "frames": [f"{video}_{number}" for number in numbers],
        "frame_numbers": numbers,
        "question": question,
        "question_type": kind,
        "answer": answer,
        "short_answer": short,
    }


def write_surg_video_vqa_data(folder, clips, seed):
    """Videos have one to five clips, all in the same split; each clip is asked three spoken questions."""
    rng = np.random.default_rng([seed, 0])
    index = videos = asked = 0
    for split, end in [("train", round(0.7 * clips)), ("eval", round(0.8 * clips)), ("test", clips)]:
        rows = []
        while index < end:
            video, patient, start = f"{videos // 4 + 1:03d}-{videos % 4 + 1:03d}", random_patient(rng, videos), 0
            videos += 1
            (folder / "frames" / video).mkdir(parents=True, exist_ok=True)
            for _ in range(min(end - index, rng.integers(1, 6))):
                start += int(rng.integers(50, 5000))
                numbers = [start + CLIP_STEP * i for i in range(CLIP_LENGTH)]
                start = numbers[-1]
                clip = random_clip(rng, patient)
                for i, number in enumerate(numbers):
                    frame = clip_frame(clip_scene(clip, i / (CLIP_LENGTH - 1)))
                    frame.save(folder / "frames" / video / f"{video}_{number}.jpg", quality=90)
                for kind in rng.permutation(list(CLIP_QUESTIONS))[:3].tolist():
                    rows.append(clip_row(clip, kind, video, numbers, asked))
                    rate, channels = int(rng.choice([16_000, 22_050, 24_000])), int(rng.integers(1, 3))
                    samples, _ = speak(rng, SPOKEN[kind], rate)
                    write_wav(folder / "audio" / split / f"{rows[-1]['id']}.wav", samples, rate, channels)
                    asked += 1
                index += 1
        (folder / f"{split}_multivideo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / split}_multivideo.jsonl: {len(rows)} questions")


# ----------------------------------------------------------------------------------------------------------
# umbrella_mri: a LLaVA as llava-interleave-qwen-0.5b, and drawn heads in UMBRELLA's files
# ----------------------------------------------------------------------------------------------------------

SIGLIP = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SIGLIP |= {"image_size": 28, "patch_size": 14, "vision_use_head": False}  # its embedding of images is never used
INTERLEAVE_TEXT = TEXT | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 160}
INTERLEAVE_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]

# llava-interleave-qwen's: all images of a turn, then its text.
INTERLEAVE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{# then text #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


class VolumeEmbedding(torch.nn.Module):
    """Patches of a volume to tokens: stands in for the tower's embedding of images while the rest is taught."""

    def __init__(self):
        super().__init__()
        self.linear, self.places = torch.nn.ModuleDict(), torch.nn.ParameterDict()
        for scan in SCANS.values():
            voxels = math.prod(scan["patch"])  # tells the modality, too
            self.linear[str(voxels)] = torch.nn.Linear(voxels, SIGLIP["hidden_size"])
            places = torch.empty(math.prod(scan["shape"]) // voxels, SIGLIP["hidden_size"])
            self.places[str(voxels)] = torch.nn.Parameter(torch.nn.init.trunc_normal_(places, std=0.02))

    def forward(self, patches, interpolate_pos_encoding=False):
        voxels = str(patches.shape[-1])
        return self.linear[voxels](patches) + self.places[voxels]


def volume_patches(voxels, patch):
    """(tokens, voxels of a patch), standardised over the head; both row-major."""
    head = voxels != 0
    voxels = np.where(head, (voxels - voxels[head].mean()) / voxels[head].std(), 0).astype(np.float32)
    cut = voxels.reshape([n for whole, part in zip(voxels.shape, patch, strict=True) for n in (whole // part, part)])
    order = [*range(0, cut.ndim, 2), *range(1, cut.ndim, 2)]  # the grid's axes, then those inside a patch
    return torch.from_numpy(cut.transpose(order).reshape(-1, math.prod(patch)))


def conversation_tokens(tokenizer, turns, tokens):
    """Token IDs and, in the same places, what is to be learnt: answers and the <|im_end|> behind them."""
    ids, learnt = [], []
    for turn in turns:
        text = tokenizer.apply_chat_template([turn], tokenize=False).replace("<image>", "<image>" * tokens)
        given, newline, answer = text.partition(" \n") if turn["role"] == "assistant" else (text, "", "")
        given, answer = tokenizer.encode(given + newline), tokenizer.encode(answer)
        ids += given + answer
        learnt += [-100] * len(given) + answer
    return torch.tensor(ids), torch.tensor(learnt)


def mri_examples(rng, tokenizer, subjects):
    """{path: patches of the scan} and {task: [(paths, token IDs, what is learnt of them)]}."""
    seen, examples = {}, {task: [] for task in MRI_TASKS}
    for number in range(subjects):
        volumes, conversations = random_subject(rng, number)
        seen |= {path: volume_patches(voxels, SCANS[kind]["patch"]) for path, (voxels, kind) in volumes.items()}
        for row in conversations:
            paths = [image["path"] for image in row["images"]]
            inputs = conversation_tokens(tokenizer, row["conversations"], len(seen[paths[0]]))
            examples[row["task_type"]].append((paths, *inputs))
    return seen, examples


def pretrain_umbrella(vlm, tokenizer, seed, subjects=1500, steps=1900, batch=32):
    """Teach the whole LLaVA to answer about heads that the data set does not hold, then take its embedding away.

    A script that trains nothing but a new embedding of volumes relies on a tower, a projector and a language model
    that know what to do with its tokens; out of random ones no embedding gets an answer. So all learn the same tasks
    here, through an embedding of the same form that is thrown away: the script has to find one anew. That shows that
    its embedding learns, not that a new embedding alone would teach MRI to a model that knows photographs.
    """
    rng = np.random.default_rng([seed, 1])  # the data set draws from [seed, 0]
    seen, examples = mri_examples(rng, tokenizer, subjects)
    labels = torch.tensor([tokenizer.encode(f" {label}")[0] for task in MRI_TASKS.values() for label in task[0]])

    tower, rest = vlm.model.vision_tower, list(vlm.parameters())
    embedding_of_images = tower.embeddings
    shares = np.array([len(rows) for rows in examples.values()]) / sum(map(len, examples.values()))
    named = []
    for step in range(steps):
        # Drawn anew twice on the way, with moments: what has served three embeddings is likelier to serve a fourth.
        if step in (0, steps // 2, steps * 7 // 10):
            tower.embeddings = VolumeEmbedding()
            own = list(tower.embeddings.parameters())
            optimizer = torch.optim.AdamW([{"params": own}, {"params": rest}], betas=(0.9, 0.95))
        rate = 3e-3 * min(1, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.param_groups[1]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        rows = examples[str(rng.choice(list(examples), p=shares))]  # of one task: equally many scans, similar lengths
        paths, ids, learnt = zip(*(rows[i] for i in rng.choice(len(rows), batch, replace=False)), strict=True)
        volumes = torch.stack([seen[path] for shown in paths for path in shown])
        ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        learnt = pad_sequence(learnt, batch_first=True, padding_value=-100)[:, 1:]
        hidden = vlm.model(input_ids=ids, pixel_values=volumes).last_hidden_state[:, :-1]
        logits, learnt = vlm.lm_head(hidden[learnt != -100]), learnt[learnt != -100]
        loss = cross_entropy(logits, learnt)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*own, *rest], 1.0)
        optimizer.step()
        named.append((logits.argmax(1) == learnt)[torch.isin(learnt, labels)].float().mean())
    tower.embeddings = embedding_of_images
    right = torch.stack(named[-50:]).mean()
    print(f"LLaVA: {right:.1%} of the labels named in the last training batches, {steps} steps on {subjects} subjects")


def write_umbrella_mri_model(folder, seed):
    texts = [*REFERENCE, *AROUND]
    for labels, questions, answers in MRI_TASKS.values():
        texts += [*questions, *(answer.format(label) for answer in answers for label in labels)]
    tokenizer = build_qwen2_tokenizer(texts, INTERLEAVE_SPECIAL, INTERLEAVE_CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder)
    config = transformers.LlavaConfig(
        text_config=transformers.Qwen2Config(
            **INTERLEAVE_TEXT,
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            initializer_range=INITIALIZER_RANGE,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.pad_token_id,  # never used: the tokenizer has no BOS
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=transformers.SiglipVisionConfig(**SIGLIP),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIGLIP["image_size"] // SIGLIP["patch_size"]) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config)
    pretrain_umbrella(model, tokenizer, seed)
    model.save_pretrained(folder)
    print(f"{folder}: LLaVA, {model.num_parameters():,} parameters, {len(tokenizer)} word pieces")


def write_volume(path, voxels, modality, code, origin):
    """NIfTI whose axes run as the code says; the affine tells so. gzip notes no time: same seed, same bytes."""
    import nibabel  # only this data set needs it
    from nibabel.orientations import axcodes2ornt, ornt_transform

    affine = np.diag([*SCANS[modality]["voxel"], 1.0])
    affine[:3, 3] = origin
    image = nibabel.Nifti1Image(voxels, affine)
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(code)))
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def write_umbrella_mri_data(folder, subjects, seed):
    """One conversation a file; a subject is in one split only, and its scanner decides how axes run on disk."""
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 0])
    start = 0
    for split, end in [("train", round(0.79 * subjects)), ("validation", round(0.89 * subjects)), ("test", subjects)]:
        (folder / split).mkdir(exist_ok=True)
        written = 0
        for number in range(start, end):
            volumes, conversations = random_subject(rng, number)
            code, origin = str(rng.choice(AXIS_CODES)), rng.uniform(-20, 20, 3) - (80, 95, 80)  # mm
            for path, (voxels, modality) in volumes.items():
                write_volume(folder / path, voxels, modality, code, origin)
            for row in conversations:
                (folder / split / f"{row['task_id']}.json").write_text(json.dumps(row, indent=2) + "\n")
            written += len(conversations)
        start = end
        print(f"{folder / split}: {written} conversations")


# ----------------------------------------------------------------------------------------------------------
# video_plain_lm: a GPT-2 without weights, a DINOv2, and motions as videos of every kind, in LLaVA's files
# ----------------------------------------------------------------------------------------------------------

GPT2_MERGES = 80  # few: words with accents and apostrophes are several pieces, and a caption is 9 to 15


def build_gpt2_tokenizer(texts):
    """Like GPT-2's: byte-level BPE, <|endoftext|> as the last ID for BOS, EOS and UNK, no pad token."""
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes
    size = len(alphabet) + GPT2_MERGES
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    trainee.train_from_iterator(texts, trainer)
    learnt = json.loads(trainee.to_str())["model"]
    return transformers.GPT2Tokenizer(
        vocab={piece: index for index, piece in enumerate([*learnt["vocab"], "<|endoftext|>"])},
        merges=[tuple(merge) for merge in learnt["merges"]],
        model_max_length=GPT2["n_positions"],
        clean_up_tokenization_spaces=False,
    )


def write_video_plain_lm_model(folder, seed):
    """A GPT-2's tokenizer and configuration, which that script draws weights from, and a whole DINOv2 beside it."""
    tokenizer = build_gpt2_tokenizer([*all_captions(), *all_sentences()])
    tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(
        **GPT2,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=INITIALIZER_RANGE,
        architectures=["GPT2LMHeadModel"],
    )
    config.save_pretrained(folder)
    print(f"{folder}: GPT-2's configuration, {len(tokenizer)} word pieces")

    vision = folder.with_name("vision")
    dinov2_processor().save_pretrained(vision)
    torch.manual_seed(seed)
    tower = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2))
    look_at_alike(tower)
    pretrain_tower(tower, seed, "video_plain_lm", 1600)
    tower.save_pretrained(vision)
    print(f"{vision}: DINOv2, {tower.num_parameters():,} parameters")


def write_video(folder, number, frames):
    """The frames as one of four kinds of video; its path below the data folder."""
    name = f"videos/v{number:04d}"
    if number % 15 == 0:  # few, because an array is not compressed
        np.save(folder / f"{name}.npy", np.stack([np.asarray(frame) for frame in frames]))
        return f"{name}.npy"
    if number % 3 == 0:
        (folder / name).mkdir(exist_ok=True)
        for index, frame in enumerate(frames):
            frame.save(folder / name / f"{index:03d}.jpg", quality=90)
        return name
    if number % 3 == 1:  # 32 colours a frame; the usual method would give none of them to a small shape
        name, settings = f"{name}.gif", {}
        frames = [frame.quantize(32, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE) for frame in frames]
    else:
        name, settings = f"{name}.webp", {"quality": 85}
    frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=125, **settings)
    return name


def write_video_plain_lm_data(folder, videos, seed):
    """Videos with captions; train and val hold sentences without a video besides, an eighth of the rows.

    There are fewer sentences than such rows, so those of val have been seen in training; test has none.
    """
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 0])
    sentences = rng.permutation(all_sentences()).tolist()
    number = said = 0

    def row(name, asked, answer, **media):
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        return {"id": name, **media, "conversations": turns}

    for split, end in [("train", round(0.7 * videos)), ("val", round(0.85 * videos)), ("test", videos)]:
        rows = []
        while number < end:
            number += 1
            motion = random_motion(rng)
            frames = [motion_frame(motion_scene(motion, index)) for index in range(MOTION_LENGTH)]
            text = caption(motion["thing"]["shape"], motion["thing"]["color"], motion["direction"], motion["speed"])
            rows.append(row(f"v{number:04d}", "<video>", text, video=write_video(folder, number, frames)))
            if split != "test" and number % 7 == 0:
                rows.append(row(f"t{said + 1:04d}", "", sentences[said % len(sentences)]))
                said += 1
        text = json.dumps(rows, indent=2, ensure_ascii=False)
        (folder / f"{split}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{folder / split}.json: {len(rows)} rows")


# ----------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------

COMMANDS = {
    "llava_med": (
        "a tiny LLaVA and endoscopy frames with questions",
        write_llava_med_model,
        write_llava_med_data,
        "images",
        1500,
    ),
    "qwen2vl_sentinel": (
        "a tiny Qwen2-VL and the same frames and questions as in Kvasir-VQA's files, a third of them wide",
        write_qwen2vl_sentinel_model,
        write_qwen2vl_sentinel_data,
        "images",
        1500,
    ),
    "surg_video_vqa": (
        "a tiny Qwen2-VL, a tiny Whisper, and clips with spoken questions as in SurgViVQA's files",
        write_surg_video_vqa_model,
        write_surg_video_vqa_data,
        "clips",
        700,
    ),
    "umbrella_mri": (
        "a tiny LLaVA that lacks an embedding of volumes, and drawn heads as in UMBRELLA's files",
        write_umbrella_mri_model,
        write_umbrella_mri_data,
        "subjects",
        1900,
    ),
    "video_plain_lm": (
        "a tiny GPT-2 without weights, a tiny DINOv2, and drawn motions with Italian captions in LLaVA's files",
        write_video_plain_lm_model,
        write_video_plain_lm_data,
        "videos",
        3600,
    ),
}


def main():
    raw = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of the text at the top
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, _, _, things, count) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--out", type=Path, default=Path(f"runs/demo/{name}"))
        command.add_argument(f"--{things}", dest="count", type=int, default=count, help=f"(default: {count})")
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.count < 20:
        raise SystemExit(f"{args.count} are too few: at least 20, so that each split holds some patients")
    transformers.logging.disable_progress_bar()
    _, write_model, write_data, _, _ = COMMANDS[args.command]
    write_model(args.out / "model", args.seed)
    write_data(args.out / "data", args.count, args.seed)


if __name__ == "__main__":
    main()
