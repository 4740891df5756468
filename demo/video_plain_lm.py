"""A tiny GPT-2 without weights, a tiny DINOv2, and drawn motions with Italian captions in LLaVA's files."""

import json

import numpy as np
import torch
import transformers
from PIL import Image

from demo.motions import MOTION_LENGTH, all_captions, all_sentences, caption, motion_frame, motion_scene, random_motion
from demo.sizes import DINOV2, GPT2, INITIALIZER_RANGE
from demo.tokenizers import build_gpt2_tokenizer
from demo.towers import dinov2_processor, look_at_alike, pretrain_tower


def write_model(folder, seed):
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


def write_data(folder, videos, seed):
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
