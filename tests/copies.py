"""Scripts copied for other models, and tiny random checkpoints of these models in their real formats."""

import json
import math
import shutil
from pathlib import Path

import torch
import transformers

from demo.questions import texts_asked_and_answered
from demo.sizes import INITIALIZER_RANGE, TEXT
from demo.tokenizers import build_qwen2_tokenizer

HOUSE = Path(__file__).resolve().parents[1]
LANGUAGE_MODEL = {name: value for name, value in TEXT.items() if name != "sliding_window"}
SMOLVLM_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>"]
SMOLVLM_SPECIAL += ["<fake_token_around_image>", "<global-img>", "<image>"]
SMOLVLM_CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}{% for line in message['content'] %}"
    "{{ line['text'] if line['type'] == 'text' else '<image>' }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def write_smolvlm(folder: Path) -> None:
    """A SmolVLM2: 64 x 64 pixels in patches of 8, of which two by two are a token: 16 tokens an image."""
    tokenizer = build_qwen2_tokenizer(texts_asked_and_answered(), SMOLVLM_SPECIAL, SMOLVLM_CHAT_TEMPLATE)
    tokenizer.eos_token = "<end_of_utterance>"
    tokenizer.save_pretrained(folder)
    sizes = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}}
    transformers.SmolVLMImageProcessorPil(**sizes).save_pretrained(folder)
    small = {"initializer_range": INITIALIZER_RANGE, "tie_word_embeddings": False}
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 64, "patch_size": 8, "initializer_range": INITIALIZER_RANGE}
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**LANGUAGE_MODEL, **small, vocab_size=rows(len(tokenizer))),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.SmolVLMForConditionalGeneration(config).save_pretrained(folder)


def rows(pieces: int) -> int:
    """Rows of an embedding: a multiple of 64, with room for a pad token."""
    return math.ceil((pieces + 1) / 64) * 64


def write_qwen3vl(folder: Path, qwen2vl: Path) -> None:
    """A Qwen3-VL with the tokenizer of a Qwen2-VL: DeepStack features of two layers go into the language model."""
    shutil.copytree(qwen2vl, folder, ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
    old = json.loads((qwen2vl / "config.json").read_text())
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6], "mrope_interleaved": True}
    text = LANGUAGE_MODEL | {"head_dim": 32, "vocab_size": old["vocab_size"], "rope_parameters": rope}
    text |= {"initializer_range": INITIALIZER_RANGE, "eos_token_id": old["eos_token_id"]}
    vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "num_position_embeddings": 64}
    vision |= {"out_hidden_size": TEXT["hidden_size"], "deepstack_visual_indexes": [0, 1]}
    vision |= {"initializer_range": INITIALIZER_RANGE}
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, **{name: old[name] for name in tokens}, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_size": 16}))


def changed(script: str, target: Path, *changes: tuple[str, str]) -> Path:
    """A copy of a script with texts replaced, each of which must be there."""
    text = (HOUSE / f"{script}.py").read_text()
    for old, new in changes:
        assert old in text, f"{script}.py has no {old!r}"
        text = text.replace(old, new)
    target.write_text(text)
    return target


def few_images(data: Path, target: Path, **images: int) -> Path:
    """A data folder with the first images of each split alone, and all their questions."""
    (target / "images").mkdir(parents=True)
    for split, number in images.items():
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().split("\n") if line]
        key = "image" if "image" in rows[0] else "image_filename"
        names = list(dict.fromkeys(row[key] for row in rows))[:number]
        kept = [row for row in rows if row[key] in names]
        (target / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        for name in names:
            shutil.copy(data / "images" / Path(name).name, target / "images")
    return target


# ---- examples of several images, and of none ----


def turns(*values):
    return [{"from": ["human", "gpt"][i % 2], "value": value} for i, value in enumerate(values)]


def entries(a: str, b: str, group: str) -> list[dict]:
    """Of each kind one: two images in marked places, first, in later turns; one; none; with a system text."""
    later = turns("Good day?", "yes", "<image>\nIs there a polyp?", "no", "And <image> here?", "yes")
    found = [
        {
            "id": "marked",
            "images": [a, b],
            "question": "Old: <image> New: <image>\nIs it worse?",
            "answer": "yes",
        },
        {"id": "first", "images": [a, b], "question": "Are they alike?", "answer": "no"},
        {"id": "first too", "images": [a, b], "question": "<image><image>\nIs the first red?", "answer": "yes"},
        {"id": "later", "images": [a, b], "conversations": later},
        {"id": "one", "image": b, "question": "Is there a polyp?", "answer": "yes"},
        {"id": "none", "images": [], "question": "Is a polyp an organ?", "answer": "no"},
        {"id": "text", "conversations": turns("Is it late?", "yes", "Is it night?", "no")},
        {"id": "system", "image": a, "question": "Is it so?", "answer": "yes", "system": "You are a doctor."},
    ]
    return [{"group": group, **entry} for entry in found]


def of_every_kind(source: Path, folder: Path) -> Path:
    """A demo's model, whose template writes images where they stand, and examples of every kind in three splits."""
    shutil.copytree(source / "model", folder / "model")
    if "llava" in json.loads((folder / "model/config.json").read_text())["model_type"]:
        (folder / "model/chat_template.jinja").unlink()  # the demo's puts images first; without it is LLaVA-Med's
    (folder / "data/images").mkdir(parents=True)
    names = sorted(path.name for path in (source / "data/images").iterdir())
    for split, pair in {"train": names[:2], "val": names[10:12], "test": names[20:22]}.items():
        for name in pair:
            shutil.copy(source / "data/images" / name, folder / "data/images" / name)
        lines = entries(*(f"images/{name}" for name in pair), split)
        (folder / f"data/{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
