"""Fine-tune Qwen2-VL on typed questions about medical images: answers located by sentinels, constrained when decoded.

A data row, one line of DATA/train.jsonl (also val.jsonl, test.jsonl; image paths are relative to DATA):

    {"image": "images/cl8k2u.jpg", "question": "What color is the polyp?", "answer": "pink", "question_type": "color"}

The type and the allowed answers are inferred where a row does not say. The model reads, in its own chat template:

    system      Answer the question about the medical image with the answer alone.
    user        [image] Question type: color
                Question: What color is the polyp?
    assistant   <ANS>pink</ANS>          learned: "pink" and the end of the turn; the sentinels never reach the model

    make demo SCRIPT=qwen2vl_sentinel                                        # on a CPU, from nothing; or by hand:
    python demo.py qwen2vl_sentinel && python train_qwen2vl_sentinel.py --model runs/demo/qwen2vl_sentinel/model \\
        --data runs/demo/qwen2vl_sentinel/data --out runs/demo/qwen2vl_sentinel/run --tune full --lr 1e-3 --epochs 4 \\
        --pack-tokens 1024
    python train_qwen2vl_sentinel.py --model FOLDER_OR_HUB_ID --data DATA --out RUN --check            # the proof
    python train_qwen2vl_sentinel.py --model FOLDER_OR_HUB_ID --data DATA --out RUN                    # one GPU
    torchrun --standalone --nproc-per-node 4 train_qwen2vl_sentinel.py --model FOLDER_OR_HUB_ID --data DATA --out RUN
    python train_qwen2vl_sentinel.py --enrich DATA/train.jsonl DATA/train.jsonl     # types and candidates, in place
    bash slurm/qwen2vl_pipeline.sh                              # a cluster: check, overfit, train, evaluate

What the demo must reach, and what each figure means, is in README.md.
"""

import functools
import json
import math
import random
import shutil
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import common
import runtime
from common import IGNORE, Prompt
from report import audit_scorer, data_gate, print_audit, print_gate, write_report
from runtime import Problem

# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------

MODELS = {"qwen2_vl": Qwen2VLForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}
SYSTEM = "Answer the question about the medical image with the answer alone."
# every projection of the language model
LORA_PATTERN = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# with --lora-vision also those of the vision tower and of the merger, which projects to the language model's width
VISION_PATTERN = r"model\.visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.\w+)|merger\.mlp\.[02])"
OWN_SETTINGS = ["lora_vision", "min_pixels", "max_pixels"]  # flags of this script alone that a checkpoint is bound to
# the most tokens of a free answer, by question type; of any other, --max-answer-tokens
MAX_ANSWER_TOKENS = {"yes_no": 8, "color": 32, "size_numeric": 32, "count_numeric": 16, "mcq": 32}


def parse_arguments(argv):
    parser = runtime.shared_flags(__doc__, decode="trie")
    add = parser.add_argument_group("Qwen2-VL").add_argument
    add("--min-pixels", type=runtime.positive, help="smaller images are enlarged (default: the checkpoint's own)")
    add("--max-pixels", type=runtime.positive, help="larger images are reduced (default: the checkpoint's own)")
    add("--lora-vision", action="store_true", help="adapters in the vision tower and its merger, too")
    add("--enrich", nargs=2, metavar=("IN.jsonl", "OUT.jsonl"), help="write question types and candidates into rows")
    args = parser.parse_args(argv)
    if args.lora_vision and args.tune == "full":
        parser.error("--lora-vision: with --tune full the vision tower trains whole")
    return args if args.enrich else runtime.parse_flags(parser, argv)


# ------------------------------------------------------------------------------------------------------------
# Data: files -> rows
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    where: str  # "train.jsonl:17"
    split: str
    id: str
    image: str
    question: str
    answer: str
    question_type: str
    candidates: list[str] | None
    inferred: bool  # the candidates are not the row's own
    group: str  # patient, video or procedure; the image where nothing else is known

    @property
    def media(self) -> list[str]:
        return [self.image]


IMAGE_FIELDS = ("image", "image_filename", "image_id", "img_id")
FIELDS = {*IMAGE_FIELDS, "id", "question", "answer", "question_type", "answer_candidates", "group"}


def read_data(data: Path, args) -> tuple[list[Row], list[Problem]]:
    """All rows of the folder with their allowed answers, and the rows that cannot be used."""
    read = [row for split, path in runtime.data_files(data).items() for row in read_file(data, path, split)]
    allow_training_answers([row for row in read if isinstance(row, Row)])  # of all, before --limit chooses
    return runtime.choose_rows(read, args)


def read_file(data: Path, path: Path, split: str | None):
    """Rows of a JSON-lines file, canonical or Kvasir-VQA."""
    if path.suffix != ".jsonl":
        yield Problem(path.name, None, "not JSON lines; write an object a line into a .jsonl file")
        return
    entries, problems = runtime.read_jsonl(path)
    yield from problems
    for where, entry in entries:
        try:
            yield make_row(data, where, entry, split)
        except ValueError as error:
            yield Problem(where, entry.get("id"), str(error))


def make_row(data: Path, where: str, entry: dict, split: str | None) -> Row:
    wrong = runtime.misspelt(entry, FIELDS)
    if wrong:
        raise ValueError(wrong)
    name = next((str(entry[f]) for f in IMAGE_FIELDS if entry.get(f) not in (None, "")), None)
    if name is None:
        raise ValueError(f"no image; give one of {', '.join(IMAGE_FIELDS)}")
    image = runtime.find_image(data, name)
    if split is None:
        runtime.inside(data, image)  # a path that is only guessed could fall into another split
    group = str(image if entry.get("group") in (None, "") else entry["group"])
    # the tokenizer composes accents (NFC): what is learned must equal what is asked for
    composed = {k: unicodedata.normalize("NFC", v) if isinstance(v, str) else v for k, v in entry.items()}
    return Row(
        where=where,
        split=split or runtime.split_of(group),
        id=str(where if entry.get("id") in (None, "") else entry["id"]),
        image=image,
        inferred=entry.get("answer_candidates") is None,
        group=group,
        **common.question_fields(composed),
    )


def allow_training_answers(rows: list[Row]) -> None:
    """Complete inferred candidates from the training rows, in place.

    A color may be any that training answers. A yes_no question or an mcq may also be answered by what training answers
    to its very words: to "Have all polyps been removed?" that may be "not relevant". Training's spelling of an answer,
    such as "Yes", takes the place of ours: it is what the model has learned.
    """
    normalise = functools.cache(common.normalise)  # the same few answers over and over
    training = [row for row in rows if row.split == "train"]
    colors = dict.fromkeys(row.answer for row in training if row.question_type == "color")
    answers, spellings = defaultdict(dict), defaultdict(Counter)
    for row in training:
        answers[row.question.lower()][row.answer] = None
        spellings[row.question_type, normalise(row.answer)][row.answer] += 1
    for row in rows:
        if row.inferred and row.question_type in ("yes_no", "color", "mcq"):
            known = colors if row.question_type == "color" else answers[row.question.lower()]
            allowed = {}  # normalised -> as training spells it most often, or as it is
            for answer in [*(row.candidates or []), *known]:
                short = normalise(answer)
                spelled = spellings.get((row.question_type, short), Counter([answer]))
                allowed.setdefault(short, spelled.most_common(1)[0][0])
            if row.candidates or row.question_type == "color":  # an mcq whose options cannot be told stays free
                row.candidates = list(allowed.values()) or None
    if not training:
        print("no training rows: color questions are answered freely, others by yes, no or their options alone")


def enrich(source: Path, target: Path) -> None:
    """Write the rows of a file again, each with its question_type and, where there are some, its answer_candidates.

    What training answers is read from the file itself, or for val.jsonl and test.jsonl from train.jsonl beside it,
    never from the rows that are to be answered. A row with a fault is left as it is, for --check to report.
    """
    split = source.stem if source.stem in ("train", "val", "test") else None
    files = [source, source.with_name("train.jsonl")] if split in ("val", "test") else [source]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise SystemExit(f"--enrich {source}: {' and '.join(missing)} missing; colors are those that training answers")
    entries, problems = runtime.read_jsonl(source)
    if problems:
        raise SystemExit("\n".join([*map(str, problems), "nothing was written"]))
    rows = list(read_file(source.parent, source, split))
    known = [row for path in files[1:] for row in read_file(source.parent, path, "train")]
    allow_training_answers([row for row in rows + known if isinstance(row, Row)])
    written = []
    for (_, entry), row in zip(entries, rows, strict=True):
        found = {}
        if isinstance(row, Problem):
            print(f"left as it is: {row}")
        else:
            found = {"question_type": row.question_type, "answer_candidates": row.candidates}
        written.append({**entry, **{name: value for name, value in found.items() if value and not entry.get(name)}})
    runtime.write_jsonl(target, written)
    counts = Counter(row.question_type for row in rows if isinstance(row, Row))
    print(f"{target}: {len(written)} rows; " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))


# ------------------------------------------------------------------------------------------------------------
# Data: rows -> prompt trees
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """What turns a row into tokens: read from the checkpoint's folder, no weights needed."""

    tokenizer: object
    processor: object  # of images
    image_id: int | None  # None where config.json has it wrong
    rope_index: object  # the model's own function: tokens and image grids -> M-RoPE positions
    keep_sentinels: bool
    report: dict  # for check.json: what was found in the checkpoint's files
    measured: dict = field(default_factory=dict)  # image -> (width, height), once all are opened
    branches: dict = field(default_factory=dict)  # what candidate_branches has encoded

    @property
    def media_ids(self) -> list[int]:
        return [self.image_id]

    def grid(self, image: str) -> tuple[int, int, int]:
        """(1, rows, columns) of an image's patches: its size between min_pixels and max_pixels, in whole tokens."""
        width, height = self.measured[image]
        patch, size = self.processor.patch_size, self.processor.size
        token = patch * self.processor.merge_size  # pixels along a side: 14 * 2 = 28
        high, wide = smart_resize(height, width, token, size["shortest_edge"], size["longest_edge"])
        return 1, high // patch, wide // patch

    def features(self, image: str) -> int:
        """Tokens of an image: its patches are merged 2 x 2."""
        return math.prod(self.grid(image)) // self.processor.merge_size**2

    def positions(self, prefix: list[int], image: str) -> torch.Tensor:
        """M-RoPE positions (3, P) of a prefix: text counts on in all three, an image in time, height and width."""
        input_ids = torch.tensor([prefix])
        is_image = (input_ids == self.image_id).int()
        grids = torch.tensor([self.grid(image)])
        return self.rope_index(input_ids, mm_token_type_ids=is_image, image_grid_thw=grids)[0][:, 0]


def load_text(folder: Path, args) -> tuple[Text, list[Problem]]:
    """Tokenizer, image processor and position function, and the faults of the checkpoint's own files."""
    vlm = meta_model(folder)
    tokenizer = runtime.tokenizer(folder)
    problems, image_id = [], None
    try:
        image_id = find_image_token(tokenizer, vlm.config)
    except ValueError as error:
        problems.append(Problem("config.json", None, f"{error}; copy image_token_id from the original config.json"))
    try:
        pad_line = f"{folder / 'tokenizer_config.json'}: {common.separate_pad_from_eos(tokenizer)}"
    except ValueError as error:
        raise SystemExit(f"--model {folder}: {error}") from None
    print(pad_line)

    vision = vlm.config.vision_config
    processor = runtime.image_processor(folder, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
    args.min_pixels = args.min_pixels or processor.size["shortest_edge"]
    args.max_pixels = args.max_pixels or processor.size["longest_edge"]
    token = (processor.patch_size * processor.merge_size) ** 2
    if not token <= args.min_pixels <= args.max_pixels:
        text = (
            f"--min-pixels {args.min_pixels} and --max-pixels {args.max_pixels} (where not given, the checkpoint's own)"
        )
        raise SystemExit(f"{text}: the first must be at least {token}, a token's, and at most the second")
    processor.size["shortest_edge"], processor.size["longest_edge"] = args.min_pixels, args.max_pixels
    report = {"image_token": image_id, "pixels": [args.min_pixels, args.max_pixels], "pad": pad_line}
    keep = args.sentinels == "keep"
    return Text(tokenizer, processor, image_id, vlm.model.get_rope_index, keep, report), problems


def find_image_token(tokenizer, config) -> int:
    """The configuration's image token, which must be the one that the chat template writes for an image."""
    image_id = common.image_token_id(config)
    token = tokenizer.convert_ids_to_tokens(image_id)
    try:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    except Exception as error:  # there is none, or it is made for text alone: a template raises what it likes
        text = f"no chat template that writes images ({error}); copy chat_template.jinja from the original checkpoint"
        raise SystemExit(f"--model {tokenizer.name_or_path}: {text}") from None
    if not token or tokenizer.encode(rendered, add_special_tokens=False).count(image_id) != 1:
        raise ValueError(f"the chat template does not write token {image_id} ({token!r}) for an image but {rendered!r}")
    return image_id


def render(row: Row, text: Text) -> str:
    """The conversation as text, in the checkpoint's own chat template, the answer between sentinels."""
    opening, closing = common.SENTINELS
    question = f"Question type: {row.question_type}\nQuestion: {row.question}"
    messages = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": opening + row.answer + closing}]},
    ]
    before, _, after = text.tokenizer.apply_chat_template(messages, tokenize=False).partition(opening)
    return before + opening + after.partition(closing)[0] + closing + text.tokenizer.eos_token


def refuse_tokens(row: Row, text: Text) -> None:
    """Raise ValueError where a text holds what the tokenizer would take for a token such as <|image_pad|>."""
    for part in (row.question, row.answer, row.question_type, *(row.candidates or [])):
        for token in (*common.SENTINELS, *text.tokenizer.get_added_vocab()):
            if token in part:
                raise ValueError(f"the text contains {token!r}, which the model would read as a token; reword {part!r}")


def encode_row(row: Row, text: Text) -> tuple[list[int], list[int], list[int]]:
    """(prefix, input_ids, labels): everything up to the image's last placeholder, then the question and its answer.

    The tokenizer splits at the placeholder anyway, so the prefix is the same for every question of the image.
    """
    input_ids, labels = common.encode_supervised(text.tokenizer, render(row, text), keep_sentinels=text.keep_sentinels)
    cut = input_ids.index(text.image_id) + 1
    prefix = common.expand_placeholder(input_ids[:cut], text.image_id, [text.features(row.image)])
    return prefix, input_ids[cut:], labels[cut:]


def prove_row(row: Row, text: Text, prefix: list[int], input_ids: list[int], labels: list[int]) -> None:
    """Raise ValueError unless exactly answer + EOS is learned and the placeholders equal the image's features."""
    learned = [label for label in labels if label != IGNORE]
    decoded = text.tokenizer.decode(learned, clean_up_tokenization_spaces=False)
    if decoded != row.answer + text.tokenizer.eos_token:
        raise ValueError(f"learned would be {decoded!r}, not {row.answer + text.tokenizer.eos_token!r}")
    if text.image_id in input_ids:
        raise ValueError("an image placeholder after the image's own")
    common.check_placeholders(prefix, text.image_id, text.features(row.image))


def build_prompts(rows: list[Row], text: Text, args) -> tuple[list[Prompt], list[Problem]]:
    """A tree for each image with all its questions (or for each question), in order of appearance."""
    trees: dict[str, Prompt] = {}
    problems = []
    for row in rows:
        try:
            refuse_tokens(row, text)
            if text.image_id is None:  # the checkpoint's fault, already listed
                continue
            prefix, input_ids, labels = encode_row(row, text)
            prove_row(row, text, prefix, input_ids, labels)
            if len(prefix) + len(input_ids) > args.pack_tokens:
                raise ValueError(
                    f"{len(prefix) + len(input_ids)} tokens, {text.features(row.image)} of them its image's: more than "
                    f"--pack-tokens {args.pack_tokens}; lower --max-pixels or raise --pack-tokens"
                )
        except ValueError as error:
            problems.append(Problem(row.where, row.id, str(error)))
            continue
        name = row.image if args.share_prefix else row.id
        if name not in trees:
            trees[name] = Prompt(prefix, [], [], row.image, text.positions(prefix, row.image))
        assert trees[name].prefix == prefix, f"{row.where}: the questions of {row.image} begin differently"
        trees[name].branches.append((input_ids, labels))
        trees[name].ids.append(row.id)
    return list(trees.values()), problems


# ------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------


class Qwen2VL(nn.Module):
    """Qwen2-VL whose forward takes a packed row and returns (loss sum, learned tokens)."""

    def __init__(self, vlm: Qwen2VLForConditionalGeneration, dtype: torch.dtype):
        super().__init__()
        self.vlm = vlm
        self.dtype = dtype
        self.image_id = common.image_token_id(vlm.config)

    def image_features(self, media: dict) -> torch.Tensor:
        """All images of a row, of whatever sizes -> (tokens, width of the language model)."""
        with self.autocast(), torch.set_grad_enabled(torch.is_grad_enabled() and self.tower_trains):
            found = self.vlm.model.get_image_features(media["pixel_values"], media["image_grid_thw"])
            return torch.cat(found.pooler_output)

    def autocast(self):
        """With bf16, trained parameters stay float32 and are cast where they are used."""
        device = next(self.vlm.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @property
    def decoder(self) -> nn.Module:
        return self.vlm.model.language_model

    @torch.no_grad()
    def idle(self) -> None:
        """A pass without a question, for a rank that has none left while others have (runtime.equal_passes)."""
        with self.autocast():
            device, width = self.vlm.lm_head.weight.device, self.vlm.config.text_config.hidden_size
            self.decoder(inputs_embeds=torch.zeros(1, 1, width, device=device, dtype=self.dtype), use_cache=False)

    @property
    def tower_trains(self) -> bool:
        """Whole or by adapters; a frozen tower keeps no activations."""
        return any(p.requires_grad for p in self.vlm.model.visual.parameters())

    def hidden(self, input_ids, position_ids, mask, cache=None, media: dict | None = None) -> torch.Tensor:
        """Last hidden states (1, T, width) of tokens (1, T) at positions (3, 1, T) under a mask (1, 1, T, keys)."""
        with self.autocast():
            embeds = self.vlm.get_input_embeddings()(input_ids)  # (1, T, width)
            if media is not None:
                features = self.image_features(media)
                common.check_placeholders(input_ids, self.image_id, len(features))
                places = (input_ids == self.image_id).unsqueeze(-1)
                embeds = embeds.masked_scatter(places, features.to(embeds.dtype))
            return self.decoder(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.vlm.lm_head(hidden)

    def forward(self, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
        mask = common.visible(row["document"], row["branch"])
        hidden = self.hidden(row["input_ids"], row["position_ids"], mask, None, media=row)
        return common.supervised_loss(hidden, self.lm_head, row["labels"])

    def train(self, mode: bool = True):
        super().train(mode)
        self.vlm.model.visual.train(mode and self.tower_trains)  # no dropout in a frozen tower
        return self


def prepare(vlm: Qwen2VLForConditionalGeneration, args) -> None:
    """Choose what is trained; whatever is, is float32, because bfloat16 loses small updates."""
    if args.tune == "full":
        common.train_only(vlm, r".*")
    else:
        vlm.requires_grad_(False)
        for pattern in [LORA_PATTERN, VISION_PATTERN] if args.lora_vision else [LORA_PATTERN]:  # each must match
            common.add_lora(vlm, pattern, args.lora_r, args.lora_alpha, args.lora_dropout, args.rslora)
    for parameter in vlm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.grad_checkpoint:  # not reentrant: the inputs of a frozen base need no gradient
        vlm.gradient_checkpointing_enable({"use_reentrant": False})


def meta_model(folder: Path) -> Qwen2VLForConditionalGeneration:
    """The model from its configuration alone, without weights."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in MODELS:
        raise SystemExit(f"--model {folder}: model_type {kind!r}, not one of {', '.join(MODELS)}")
    with torch.device("meta"):
        return MODELS[kind](AutoConfig.from_pretrained(folder))


def load_model(folder: Path, args, text: Text, dtype) -> Qwen2VL:
    """The model with what is trained chosen, still on the CPU: runtime.place puts it on the device."""
    config = AutoConfig.from_pretrained(folder)
    vlm = runtime.open_model(MODELS[config.model_type], folder, config, dtype)  # a missing weight is refused
    window = vlm.config.text_config.sliding_window  # None where the configuration does not use it
    if window is not None and window < args.pack_tokens:
        raise SystemExit(f"--pack-tokens {args.pack_tokens} is longer than the model's sliding window {window}")
    common.separate_pad_from_eos(text.tokenizer, vlm)
    prepare(vlm, args)
    if args.compile:
        vlm.model.language_model.compile(dynamic=True)
    return Qwen2VL(vlm, dtype)


@torch.no_grad()
def verify_first_batch(model: Qwen2VL, trees: list[Prompt], run) -> None:
    """Before step 0: the placeholders of the real first batch against the features of the real model."""
    counts = []
    for row in packed_rows(trees, run):
        common.check_placeholders(row["input_ids"], model.image_id, len(model.image_features(row)))
        counts += [tree.prefix.count(model.image_id) for tree in row["prompts"]]
    print(f"image tokens: {min(counts)} to {max(counts)} per image, ID {model.image_id} — verified")


def measure(data: Path, name: str) -> tuple[int, int]:
    """(width, height) of an image, decoded completely."""
    image = runtime.open_image(data, name)
    if max(image.size) > 200 * min(image.size):
        raise ValueError(f"{name}: {image.width} x {image.height} pixels, longer than 200 times its width; crop it")
    return image.size


def score(prediction: str | None, row: Row) -> dict[str, bool]:
    """{"exact", "tolerant"}"""
    return common.score_answer(prediction, row.answer, row.question_type)


def answer_limit(row: Row, args) -> int:
    """The most tokens of a free answer."""
    return min(args.max_answer_tokens, MAX_ANSWER_TOKENS.get(row.question_type, args.max_answer_tokens))


def own_figures(model, prompts: list[Prompt], records: list[dict], run) -> dict:
    """Figures of this script alone, for results.json: none."""
    return {}


def media_kind(row: Row) -> tuple:
    """Rows that agree in this can be asked about each other's media."""
    return ()


def show(row: Row, other: Row) -> Row:
    """The row, asked about the other's media."""
    return replace(row, image=other.image)


def blank(media: dict) -> dict:
    """What read_images gives, with nothing to see in it: all pixels 0, which is the processor's mean colour."""
    return {**media, "pixel_values": torch.zeros_like(media["pixel_values"])}


def read_images(data: Path, text: Text, prompts: list[Prompt]) -> dict:
    """The images of prompt trees in the order of the row, of different sizes.

    pixel_values is flat, (patches of all images, channels * 2 frames * patch * patch); image_grid_thw (images, 3).
    """
    images = [runtime.open_image(data, prompt.media) for prompt in prompts]
    read = text.processor(images, return_tensors="pt")
    for prompt, grid in zip(prompts, read["image_grid_thw"].tolist(), strict=True):
        if tuple(grid) != text.grid(prompt.media):
            raise ValueError(f"{prompt.media} has another size than when it was checked; start again")
    return {"pixel_values": read["pixel_values"], "image_grid_thw": read["image_grid_thw"]}


# ------------------------------------------------------------------------------------------------------------
# Training loop: the same text in every script (BEGIN)
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What stays the same from the first step to the last answer."""

    args: object
    folder: Path
    device: torch.device
    stop: runtime.StopSignal
    text: object  # the script's own: tokenizer and what belongs to it
    read_media: object  # prompt trees of a row -> {"pixel_values": …}


class Steps(Dataset):
    """An item is this rank's part of an optimizer step: its packed rows, each with its media.

    Where a file can no longer be read, the item is the ValueError that says so: the loop saves before it stops.
    """

    def __init__(self, plan: list[list[Prompt]], pack_tokens: int, read_media, rank: int = 0, ranks: int = 1):
        self.plan, self.pack_tokens, self.read_media = plan, pack_tokens, read_media
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[dict] | ValueError:
        rows = common.pack(self.plan[index], self.pack_tokens, self.ranks)[self.rank :: self.ranks]
        try:
            return [{**row, **self.read_media(row["prompts"])} for row in rows]
        except ValueError as error:
            return error


def start_loader(steps: Steps, workers: int) -> DataLoader:
    return DataLoader(steps, None, num_workers=workers, worker_init_fn=runtime.ignore_signals)


def make_plan(prompts: list[Prompt], args) -> list[list[Prompt]]:
    """The optimizer steps of the whole run; a function of the seed alone, so that any step can be gone back to."""
    plan = []
    for epoch in range(args.epochs):
        plan += common.plan_steps(prompts, args.questions_per_step, args.seed, epoch)
        if args.max_steps and len(plan) >= args.max_steps:
            return plan[: args.max_steps]
    return plan


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up, then half a cosine towards zero; step counts from 1."""
    warmup = max(1, round(args.warmup * steps))
    if step <= warmup:
        return args.lr * step / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def to_device(row: dict, device: torch.device) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in row.items()}


def train(model, optimizer, plan, start: int, validate, save, run: Run) -> float:
    """Steps start+1 … len(plan); returns the last step's loss. validate() gives a loss, save(step) a checkpoint."""
    args, device, rank = run.args, run.device, runtime.rank()
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = Steps(plan[start:], args.pack_tokens, run.read_media, rank, runtime.ranks())
    metrics = runtime.Metrics(run.folder, start, len(plan), args)
    if validate and metrics.validated < start and (start == len(plan) or start % args.eval_every == 0):
        metrics.write(step=start, val_loss=validate())  # the run was stopped before it came to that
    model.train()
    run.stop.wait()
    loss, bad, saved, begun = math.nan, 0, start, time.monotonic()
    for step, rows in enumerate(start_loader(steps, args.workers), start=start + 1):
        # ---- one optimizer step: trees are those of all ranks, rows are this rank's ----
        if runtime.any_rank(isinstance(rows, ValueError)):
            faults = [fault for fault in runtime.gather(str(rows) if isinstance(rows, ValueError) else "") if fault]
            if saved < step - 1:
                save(step - 1)
            raise SystemExit(f"step {step}: {'; '.join(faults)}. The steps before are saved: mend it and start again")
        trees = plan[step - 1]
        learned = sum(tree.learned() for tree in trees)
        # dropout draws from (seed, step, rank): a step that is taken again after a stop draws the same
        torch.manual_seed(random.Random(f"{args.seed} {step} {rank}").getrandbits(63))
        loss_sum = torch.zeros((), device=device)
        for row in rows:
            row_loss, _ = model(to_device(row, device))
            (row_loss / learned).backward()  # the mean over the whole step's tokens, not a mean of means
            loss_sum += row_loss.detach()
        runtime.sum_gradients(parameters)
        loss = float(runtime.sum_over_ranks(loss_sum)) / learned
        grad_norm = runtime.clip_gradients(parameters, args.clip)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:  # or the step changes nothing, neither parameters nor the optimizer's moments
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(plan), args)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ---- what it was like ----
        ids = [name for tree in trees for name in tree.ids]
        tokens = sum(len(tree) for tree in trees)
        seconds, begun = time.monotonic() - begun, time.monotonic()
        if finite:
            metrics.write(
                step=step,
                epoch=round(step / len(plan) * args.epochs, 3),
                loss=loss,
                grad_norm=grad_norm,
                lr=optimizer.param_groups[0]["lr"],
                trees=len(trees),
                questions=len(ids),
                tokens=tokens,
                tokens_per_s=tokens / seconds,
                questions_per_s=len(ids) / seconds,
                peak_memory_mb=runtime.peak_memory_mb(device),
                ids=ids,
            )
        else:
            metrics.write_bad(step, loss, grad_norm, ids)
        bad = 0 if finite else bad + 1
        if bad == 3:
            metrics.say(f"three such steps in a row: stopped; replay them with --only-ids {metrics.bad_steps}")
            metrics.close()
            runtime.end_ranks()
            raise SystemExit(runtime.EXIT_NOT_FINITE)
        # ---- save first, then evaluate: a crash there must not cost the steps ----
        stopped = runtime.any_rank(run.stop.received is not None)
        last = step == len(plan)
        due = validate and (last or step % args.eval_every == 0)
        if last or due or stopped or step % args.save_every == 0:
            save(step)
            saved, begun = step, time.monotonic()
        if stopped:
            signalled = run.stop.received or "a signal to another rank"
            again = "the same command" if args.resume == "auto" else "the same command with --resume auto"
            metrics.say(f"stopped by {signalled} after step {step}; {again} goes on from there")
            metrics.close()
            runtime.end_ranks()
            raise SystemExit(runtime.EXIT_STOPPED)
        if due:
            run.stop.act()
            metrics.write(step=step, val_loss=validate())
            run.stop.wait()
            model.train()
            begun = time.monotonic()
    run.stop.act()
    metrics.close()
    return loss


# ------------------------------------------------------------------------------------------------------------
# Training loop: the same text in every script (END)
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# Checking, answering and scoring: the same text in every script (BEGIN)
# ------------------------------------------------------------------------------------------------------------


def check_data(data: Path, args, text, fatal: list[Problem]):
    """The proof that stands before every run: each row built and decoded again, each file opened.

    Returns the rows and the trees by split. Faults end the program, listed all at once, before weights are read.
    """
    if args.sentinels == "keep" and args.decode != "free":
        raise SystemExit("--sentinels keep: where an answer ends is not learned there; only --decode free is possible")
    # ---- the files, and the scorer on the data's own answers ----
    rows, faults = read_data(data, args)
    found, text.measured, digests = runtime.check_media(data, rows, measure)
    faults += found
    shared = runtime.overlaps(rows, digests)
    runtime.print_overlaps(shared)
    scorer = runtime.on_first_rank(lambda: audit_scorer(lambda said, row: score(said, row)["exact"], rows))
    print_audit(scorer)
    fatal = fatal + [Problem("scorer", None, f"{failure}; mend `score`") for failure in scorer["failures"]]
    # ---- the rows ----
    splits, trees, counts = {}, {}, {}
    for split in ("train", "val", "test"):
        bad = {p.where for p in faults}
        part = [row for row in rows if row.split == split and row.where not in bad]
        trees[split], found = build_prompts(part, text, args)
        faults += found
        bad = {p.where for p in found}
        splits[split] = [row for row in part if row.where not in bad]
        counts[split] = {
            "questions": len(splits[split]),
            "files": len({name for row in splits[split] for name in row.media}),
            "tokens": sum(len(tree) for tree in trees[split]),
            "learned_tokens": sum(tree.learned() for tree in trees[split]),
            "question_types": dict(Counter(row.question_type for row in splits[split])),
            "not_among_candidates": sum(not common.answerable(vars(row)) for row in splits[split]),
            "longer_than_limit": longer_than_limit(splits[split], trees[split], args),
        }
        print(f"{split}: " + ", ".join(f"{n} {name}" for name, n in counts[split].items() if isinstance(n, int)))
    for tree in (trees["train"] or trees[args.eval_split])[:5]:
        runtime.print_learned(text.tokenizer, tree.ids[0], tree.prefix, *tree.branches[0])
    # ---- check.json: what was found, what the splits share, how the first row is learned ----
    proof = {"splits": counts, "shared_with_earlier_splits": shared, **text.report}
    first = next((tree for part in trees.values() for tree in part), None)
    if first:
        tokens = runtime.row_tokens(text.tokenizer, first.prefix, *first.branches[0], text.media_ids)
        proof |= {"row": {"id": first.ids[0], "tokens": tokens}}
    proof |= {"scorer": scorer, "gate": runtime.on_first_rank(lambda: data_gate(data, rows, digests))}
    print_gate(proof["gate"])
    place = Path(args.out, "blind", args.blind) if args.blind else Path(args.out)
    runtime.report_check(place / "check.json", proof, fatal, faults, args.skip_bad)
    if not (splits["train"] or args.eval_only or args.check):
        raise SystemExit(f"--data {data}: no training rows")
    if args.check:
        if not first:
            raise SystemExit("no row is left")
        runtime.print_row(**proof["row"])
        print("check passed")
    return splits, trees


def longer_than_limit(rows: list[Row], prompts: list[Prompt], args) -> int:
    """How many answers are too long for answer_limit, EOS not counted: given freely they cannot be right."""
    learned = {
        name: sum(label != IGNORE for label in b[1]) for t in prompts for name, b in zip(t.ids, t.branches, strict=True)
    }
    return sum(learned[row.id] - 1 > answer_limit(row, args) for row in rows if row.id in learned)


def write_model(source: Path, checkpoint: Path, target: Path, args, text, dtype) -> None:
    """A plain model folder that from_pretrained opens: merged weights beside the checkpoint's own small files."""
    vlm = load_model(source, args, text, dtype).vlm
    common.load_trained(vlm, checkpoint)
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".model", ".txt") and ".safetensors" not in path.name:
            shutil.copy(path, target)
    common.merge_lora(vlm).to(dtype).save_pretrained(target)
    text.tokenizer.save_pretrained(target)
    if text.processor is not None:  # volumes have none
        runtime.save_image_processor(text.processor, target)


def write_final(source: Path, checkpoint: Path, run, dtype) -> None:
    """RUN/adapter, or where there are no adapters RUN/model, from the last checkpoint."""
    adapter = list(checkpoint.glob("adapter_*"))
    with runtime.replacing(run.folder / ("adapter" if adapter else "model")) as target:
        if not adapter:
            write_model(source, checkpoint, target, run.args, run.text, dtype)
        for path in adapter:
            shutil.copy(path, target)


@torch.no_grad()
def mean_loss(model, prompts: list[Prompt], run: Run) -> float:
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # loss, learned tokens
    with runtime.equal_passes(model.decoder, model.idle):
        for row in packed_rows(prompts[runtime.rank() :: runtime.ranks()], run):
            sums += torch.stack(model(row)).cpu()
    total, tokens = runtime.sum_over_ranks(sums).tolist()
    return total / tokens


def packed_rows(prompts: list[Prompt], run: Run):
    """Packed rows on the device, a few trees at a time: memory does not grow with the number of questions."""
    # a candidate may be longer than any answer, which all fit
    longest = max((len(tree.prefix) + len(ids) for tree in prompts for ids, _ in tree.branches), default=0)
    size = max(run.args.pack_tokens, longest)
    few = max(1, 2 * size * len(prompts) // max(1, sum(map(len, prompts))))  # trees of about two rows, with their media
    few = Steps([prompts[i : i + few] for i in range(0, len(prompts), few)], size, run.read_media)
    for rows in start_loader(few, run.args.workers):
        if isinstance(rows, ValueError):
            raise SystemExit(f"{rows}. Mend the file and start again")
        yield from (to_device(row, run.device) for row in rows)


@torch.no_grad()
def answer(model, prompts: list[Prompt], rows: dict[str, Row], run: Run) -> dict[str, dict]:
    """{row ID: {"prediction": text, "probabilities": {…} where candidates were scored}}"""
    model.eval()
    mode, tokenizer = run.args.decode, run.text.tokenizer
    scored = score_candidates(model, prompts, rows, run) if mode in ("score", "both") else {}
    found = scored if mode == "score" else {}
    left = [tree.part(i for i, name in enumerate(tree.ids) if name not in found) for tree in prompts]
    left = [common.answering_prompt(tree) for tree in left if tree.ids]
    count = sum(len(tree.ids) for tree in left)
    shown = runtime.progress(total=count, desc="answering", unit="question")
    for packed in packed_rows(left, run):
        ids = [name for tree in packed["prompts"] for name in tree.ids]
        tries = [allowed_answers(rows[name], run.text) if mode == "trie" else None for name in ids]

        def read(input_ids, position_ids, mask, cache, media=packed):
            # media belong to the first reading; afterwards they are in the cache
            return model.hidden(input_ids, position_ids, mask, cache, None if cache.get_seq_length() else media)

        limits = [answer_limit(rows[name], run.args) for name in ids]
        answers = common.decode(read, model.lm_head, packed, tokenizer.eos_token_id, limits, tries)
        for name, tokens in zip(ids, answers, strict=True):
            text, ended = tokenizer.decode(tokens, skip_special_tokens=True), tokens[-1] == tokenizer.eos_token_id
            found[name] = {**scored.get(name, {}), "prediction": text.strip(), "ended": ended}
        shown.update(len(ids))
    shown.close()
    return found


def candidate_branches(row: Row, text: Text) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of the row's branch for each answer that is allowed; none where any text is."""
    if not row.candidates:
        return []
    key = render(replace(row, answer=""), text), *row.candidates  # of many images the same is asked
    if key not in text.branches:
        text.branches[key] = [encode_row(replace(row, answer=candidate), text)[1:] for candidate in row.candidates]
    return text.branches[key]


def allowed_answers(row: Row, text: Text) -> dict | None:
    """The trie of the answers that are allowed, EOS included."""
    learned = [[t for t in labels if t != IGNORE] for _, labels in candidate_branches(row, text)]
    return common.build_trie(learned) or None


def score_candidates(model, prompts: list[Prompt], rows: dict[str, Row], run: Run) -> dict[str, dict]:
    """Every allowed answer as a branch of its own: the exact argmax, with probabilities."""
    trees = []
    for tree in prompts:
        pairs = [(name, candidate) for name in tree.ids for candidate in rows[name].candidates or []]
        branches = [branch for name in tree.ids for branch in candidate_branches(rows[name], run.text)]
        if pairs:
            trees.append(replace(tree, branches=branches, ids=pairs))
    scores = defaultdict(dict)
    for (name, candidate), log_prob in log_probabilities(model, trees, run).items():
        scores[name][candidate] = log_prob
    found = {}
    for name, by_candidate in scores.items():
        chances = torch.tensor(list(by_candidate.values()), dtype=torch.float64).softmax(0).tolist()
        probabilities = dict(zip(by_candidate, chances, strict=True))
        found[name] = {"prediction": max(probabilities, key=probabilities.get), "probabilities": probabilities}
    return found


@torch.no_grad()
def log_probabilities(model, prompts: list[Prompt], run: Run) -> dict:
    """{branch ID: the log-probability of all that is learned in it}"""
    model.eval()
    found = {}
    for packed in packed_rows(prompts, run):
        mask = common.visible(packed["document"], packed["branch"])
        hidden = model.hidden(packed["input_ids"], packed["position_ids"], mask, None, media=packed)
        ids = [name for tree in packed["prompts"] for name in tree.ids]
        found |= dict(zip(ids, common.branch_log_probs(hidden, model.lm_head, packed).tolist(), strict=True))
    return found


def evaluate(model, prompts: list[Prompt], rows: list[Row], train_rows: list[Row], run: Run) -> dict:
    """Answer, score, write predictions.jsonl, results.json and the report, print the table."""
    if run.args.blind:
        prompts, rows, run = blinded(prompts, rows, run)
    begun, found = time.monotonic(), {}
    with runtime.equal_passes(model.decoder, model.idle):
        mine = answer(model, prompts[runtime.rank() :: runtime.ranks()], {row.id: row for row in rows}, run)
    for part in runtime.gather(mine):
        found.update(part)
    seconds = time.monotonic() - begun
    training = [(row.question_type, row.question, [row.answer, *other_forms(row)]) for row in train_rows]
    blind = common.blind_answers(training, [(row.question_type, row.question) for row in rows])
    records = []
    for row, said in zip(rows, blind, strict=True):  # every row, answered or not
        answered = found.get(row.id, {"prediction": None})
        scored = score(answered["prediction"], row)
        known = {"id": row.id, "group": row.group, "media": row.media, "question_type": row.question_type}
        known |= {"question": row.question, "answer": row.answer, **answered}
        known |= {"candidates": row.candidates} if row.candidates else {}
        known |= {"also_right": other_forms(row)} if other_forms(row) else {}
        floors = {name: score(text, row)["exact"] for name, text in said.items()}
        records.append({**known, "correct": scored["exact"], "tolerant": scored["tolerant"], "floors": floors})
    results = common.summarise(records)
    cut = sum(not record.get("ended", True) for record in records)  # by --max-answer-tokens, before EOS
    results |= {"split": run.args.eval_split, "decode": run.args.decode, "cut_off": cut, **run.text.report}
    results |= {"data": str(run.args.data), "max_answer_tokens": run.args.max_answer_tokens, "limit": run.args.limit}
    results |= {"questions_per_s": len(rows) / seconds}
    runtime.write_jsonl(run.folder / "predictions.jsonl", records)
    print(common.results_table(results))
    if not run.args.blind:
        results |= own_figures(model, prompts, records, run)
    runtime.write_json(run.folder / "results.json", results)
    print(
        f"answered {len(rows)} questions in {seconds:.1f} s, {cut} cut off before EOS, listed in "
        f"{run.folder / 'predictions.jsonl'}"
    )
    if run.args.report and not run.args.blind:
        runtime.on_first_rank(lambda: write_report(run.folder))
    return results


def blinded(prompts: list[Prompt], rows: list[Row], run: Run):
    """What `evaluate` needs to answer without seeing, for a folder of its own: RUN/blind/blank or RUN/blind/shuffled.

    blank: the same questions, and nothing to see in their media. shuffled: each with the media of another group.
    """
    mode = run.args.blind
    run = replace(run, folder=run.folder / "blind" / mode)
    if mode == "blank":
        return prompts, rows, replace(run, read_media=lambda trees: blank(run.read_media(trees)))
    rows = exchange(rows)
    prompts, problems = build_prompts(rows, run.text, run.args)
    if problems:
        raise SystemExit("\n".join(map(str, problems)))
    return prompts, rows, run


def exchange(rows: list[Row]) -> list[Row]:
    """Each row with the media of another: of another group, unless one group has more than half of them.

    Within each kind (`media_kind`) media are put in order of their groups and passed on by as many places as the
    largest group has. Rows that share theirs get the same others: an image is still read once for all its questions.
    Where a kind has one only, its rows are left out.
    """
    kinds = defaultdict(dict)  # kind -> media -> a row that shows them
    for row in rows:
        if runtime.shown(row):  # a text alone stays one
            kinds[media_kind(row)].setdefault(tuple(runtime.shown(row)), row)
    other = {}
    for by_media in kinds.values():
        owners = list(by_media.values())
        if len(owners) == 1:  # nothing else of its kind could be shown
            print(f"--blind shuffled: questions about {owners[0].media[0]} are left out, the only one of its kind")
            continue
        sizes = Counter(row.group for row in owners)
        order = random.Random(0).sample(list(sizes), len(sizes))
        owners.sort(key=lambda row: order.index(row.group))
        places = max(sizes.values()) % len(owners) or len(owners) // 2
        moved = owners[places:] + owners[:places]
        other |= {tuple(runtime.shown(row)): new for row, new in zip(owners, moved, strict=True)}
    kept = [row for row in rows if not runtime.shown(row) or tuple(runtime.shown(row)) in other]
    if not other:
        raise SystemExit("--blind shuffled: there are no two media to exchange")
    return [show(row, other[tuple(runtime.shown(row))]) if runtime.shown(row) else row for row in kept]


def other_forms(row: Row) -> list[str]:
    """Of the answer, which are right, too, in a script whose rows have them."""
    return getattr(row, "also_right", [])


def train_and_answer(folder: Path, splits: dict, trees: dict, dtype, argv, run: Run) -> None:
    args, text = run.args, run.text
    if args.overfit:
        splits = dict.fromkeys(splits, splits["train"][: args.overfit])
        trees = {s: build_prompts(rows, text, args)[0] for s, rows in splits.items()}
        runtime.on_first_rank(lambda: shutil.rmtree(run.folder / "checkpoints", ignore_errors=True))

    # ---- the plan, and the place to go on from ----
    plan = make_plan(trees["train"], args)
    same = {name: getattr(args, name) for name in runtime.SAME_SETTINGS}  # or it would be another run
    same |= {name: getattr(args, name) for name in OWN_SETTINGS}
    same |= {"dtype": str(dtype), "steps": len(plan), "model": runtime.model_fingerprint(folder)}
    same |= {"rows": runtime.fingerprint((t.ids, t.media, t.branches) for t in trees["train"])}
    checkpoint = runtime.find_checkpoint(run.folder, args.resume)
    if args.only_ids and args.resume != "auto":  # a replay in a folder of its own, with the weights of a checkpoint
        runtime.find_checkpoint(run.folder, "none")
        start = 0
    else:
        start = runtime.first_step(checkpoint, same, args.resume_anyway)
    runtime.go_back(run.folder, start)

    # ---- model and optimizer ----
    torch.manual_seed(args.seed)
    model = load_model(folder, args, text, dtype)
    if checkpoint:
        common.load_trained(model.vlm, checkpoint)
    runtime.place(model, model.decoder, run.device, dtype, args.parallel)
    trained = {n: p for n, p in model.vlm.named_parameters() if p.requires_grad}
    number, everything = sum(p.numel() for p in trained.values()), sum(p.numel() for p in model.parameters())
    runtime.print_trained(model.vlm)
    print(f"{run.device.type}, {dtype}; {number:,} parameters trained ({number / everything:.2%})")
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=args.weight_decay)
    if start:
        runtime.load_optimizer(checkpoint / "optimizer.safetensors", optimizer, trained)
    if not start or args.resume_anyway:
        runtime.write_json(run.folder / "config.json", {**runtime.describe_run(__file__, args, argv), "same": same})

    def save(step):
        weights = {} if common.lora_layers(model.vlm) else runtime.whole(trained)  # adapters are whole on every rank
        moments = runtime.whole(runtime.optimizer_tensors(optimizer, trained))

        def write(target):
            common.save_trained(model.vlm, target, weights)
            save_file(moments, target / "optimizer.safetensors")

        runtime.save_checkpoint(run.folder, step, write, {"step": step, "same": same}, args.keep)

    def validate():
        return mean_loss(model, trees["val"], run)

    # ---- train ----
    print(f"{len(plan)} steps of at most {args.questions_per_step} questions, from step {start}")
    verify_first_batch(model, plan[0], run)
    if start == 0 and trees["val"]:  # a broken evaluation fails now, not after an epoch
        print(f"loss before training: {mean_loss(model, trees['val'][:2], run):.4f}")
    loss = train(model, optimizer, plan, start, validate if trees["val"] else None, save, run)
    newest = runtime.checkpoint_folder(run.folder, len(plan))
    runtime.on_first_rank(lambda: write_final(folder, newest, run, dtype))

    # ---- answer ----
    if splits[args.eval_split]:
        results = evaluate(model, trees[args.eval_split], splits[args.eval_split], splits["train"], run)
    if args.overfit:
        wrong = round((1 - results["all"]["exact"]) * results["all"]["n"])
        print(f"overfit: loss {loss:.4f} (must be below {args.overfit_loss}), {wrong} answers wrong (must be none)")
        if wrong or not loss < args.overfit_loss:
            raise SystemExit(1)


# ------------------------------------------------------------------------------------------------------------
# Checking, answering and scoring: the same text in every script (END)
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.enrich:
        enrich(*map(Path, args.enrich))
        return
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    if args.count_params:
        with torch.device("meta"):
            vlm = meta_model(runtime.model_folder(args.model, weights=False))
            prepare(vlm, args)
        runtime.print_parameters(vlm)
        return
    with runtime.program(args, own=not (args.check or args.merge)) as (device, dtype, stop):
        checkpoint = None
        replay = args.only_ids and args.resume not in ("auto", "none")
        if args.eval_only or args.merge or replay:
            checkpoint = runtime.find_checkpoint(Path(args.out or ""), args.resume)
            if checkpoint is None:
                raise SystemExit(
                    "no checkpoint to answer with or to merge: give its run with --out, or --resume FOLDER"
                )
            runtime.adopt_settings(checkpoint, args, OWN_SETTINGS)

        # ---- the data is proved before any weights are read ----
        folder = Path(runtime.on_first_rank(lambda: str(runtime.model_folder(args.model, weights=not args.check))))
        text, faults = load_text(folder, args)
        if args.merge:
            if faults:
                raise SystemExit("\n".join(map(str, faults)))
            if runtime.rank() == 0:
                with runtime.writing(Path(args.merge)):
                    write_model(folder, checkpoint, Path(args.merge), args, text, dtype)
            print(f"wrote {args.merge}")
            return
        splits, trees = check_data(Path(args.data), args, text, faults)
        if args.check:
            return
        run = Run(args, Path(args.out), device, stop, text, partial(read_images, Path(args.data), text))
        if args.eval_only:
            if not splits[args.eval_split]:
                raise SystemExit(f"--eval-split {args.eval_split}: the data has no such rows")
            model = load_model(folder, args, text, dtype)
            common.load_trained(model.vlm, checkpoint)
            runtime.place(model, model.decoder, device, dtype, args.parallel)
            evaluate(model, trees[args.eval_split], splits[args.eval_split], splits["train"], run)
        else:
            train_and_answer(folder, splits, trees, dtype, argv, run)


if __name__ == "__main__":
    main()
