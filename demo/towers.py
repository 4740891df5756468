"""Vision towers that have learned to see: what is shown in each patch, as pretrained ones have."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import cross_entropy
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from demo.clips import CLIP_GRID, any_clip_frame, clip_frame
from demo.motions import MOTION_GRID, PAINTS, SHAPES, any_still, motion_frame, outline
from demo.scenes import (
    COLORS,
    FRAME,
    GREEN_BOX,
    GRID,
    RADIUS,
    SIZES,
    TEXT_BLOCK,
    draw_frame,
    random_patient,
    random_scene,
    recorded_frame,
)
from demo.sizes import CLIP, DINOV2

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
