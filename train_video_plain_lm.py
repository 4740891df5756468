"""Train the smallest complete video-language model: a causal language model that reads DINOv2's features.

A data row, one entry of DATA/train.json in LLaVA's layout (also val.json, test.json; paths are relative to DATA), or a
line of DATA/train.jsonl. A video is a folder of JPEG or PNG frames, an animated GIF, WebP or PNG, or a .npy array:

    {"id": "v7", "video": "videos/v7", "conversations": [{"from": "human", "value": "<video>"},
                                                         {"from": "gpt", "value": "Un'ellisse gialla va all'insù."}]}
    {"id": "v7", "video": "videos/v7.gif", "answer": "Un'ellisse gialla va all'insù."}    # "question": optional
    {"id": "t3", "answer": "Il contrario di destra è sinistra."}                          # a text without a video

There is no chat format. The model reads, and learns the text and the end token alone:

    <vid_start> 34 x <vid_patch> <vid_end>               fast path: 4 frames x 3 x 3 =  36 positions
    <slow_vid_start> 322 x <vid_patch> <slow_vid_end>    slow path: 4 frames x 9 x 9 = 324 positions
    <|endoftext|> Un'ellisse gialla va all'insù. <|endoftext|>
                  `------------- learned -------------------´

    frames -> DINOv2 (frozen) -> projector -> token packer, 9 x 9 and 3 x 3 a frame -> in the place of these 360 tokens

    make demo SCRIPT=video_plain_lm                                         # on a CPU, from nothing; or by hand:
    python demo.py video_plain_lm && python train_video_plain_lm.py --model runs/demo/video_plain_lm/model \\
        --vision-model runs/demo/video_plain_lm/vision --data runs/demo/video_plain_lm/data \\
        --out runs/demo/video_plain_lm/run --from-scratch --fast-frames 2 --slow-frames 2 --slow-grid 6 --lr 7e-4 \\
        --epochs 5 --questions-per-step 8 --pack-tokens 512 --cache-features runs/demo/video_plain_lm/features
    python train_video_plain_lm.py --data DATA --out RUN --check                          # the proof: GPT-2, DINOv2
    python train_video_plain_lm.py --data DATA --out RUN --cache-features DIR             # one GPU
    torchrun --standalone --nproc-per-node 4 train_video_plain_lm.py --data DATA --out RUN --cache-features DIR
    python train_video_plain_lm.py --model LM --vision-model DINOV2 --data DATA --out RUN --from-scratch

What the demo must reach, and what each figure means, is in README.md.
"""

import argparse
import hashlib
import json
import math
import random
import re
import shutil
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import common
import runtime
from common import IGNORE, Prompt
from report import audit_scorer, data_gate, print_audit, print_gate, write_report
from runtime import Problem

# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------

VIDEO = "<video>"  # in the data: where the video's tokens go
VID_START, VID_PATCH, VID_END = "<vid_start>", "<vid_patch>", "<vid_end>"
SLOW_START, SLOW_END = "<slow_vid_start>", "<slow_vid_end>"
VIDEO_TOKENS = (VID_START, VID_PATCH, VID_END, SLOW_START, SLOW_END)
OURS = ("vision_tower.", "projector.", "fast_packer.", "slow_packer.")  # what is grafted onto the language model
NEW_PATTERN = r"(projector|fast_packer|slow_packer)\..*"
# the projections as Llama, Mistral and Qwen name them; what is adapted is printed. GPT-2's are no nn.Linear
LORA_PATTERN = r"(?!vision_tower\.).*\.([qkvo]_proj|(gate|up|down)_proj)"
LAYOUT = ["fast_frames", "slow_frames", "fast_grid", "slow_grid", "packer"]  # a model is bound to it
# what a checkpoint is bound to: also to what it was trained for, and a fingerprint of the tower
OWN_SETTINGS = [*LAYOUT, "mask_video", "from_scratch", "vision_weights"]


def parse_arguments(argv):
    tunings = {
        "full": "language model, projector and token packers; the tower never",
        "lora": "adapters in the language model (not GPT-2), projector and packers",
        "projector": "projector and packers alone",
    }
    parser = runtime.shared_flags(__doc__, tunings, model="openai-community/gpt2")
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("model").add_argument
    add("--vision-model", help="DINOv2 folder or hub ID (default: facebook/dinov2-large; a trained --model has one)")
    add("--from-scratch", action=yes_no, default=False, help="draw the language model at random, from its config.json")
    add = parser.add_argument_group("videos").add_argument
    for path, frames, grid in (("fast", 4, 3), ("slow", 4, 9)):
        add(f"--{path}-frames", type=runtime.positive, default=frames, help=f"of the {path} path (default: {frames})")
        add(
            f"--{path}-grid",
            type=runtime.positive,
            default=grid,
            help=f"side of its grid (default: {grid}, {grid} x {grid} positions a frame)",
        )
    add(
        "--packer",
        choices=["attention", "pool"],
        default="attention",
        help="how a frame becomes these positions: each looks at its window of patches, or is its mean",
    )
    add("--cache-features", metavar="DIR", help="keep the tower's features there: each video is read once")
    add(
        "--mask-video",
        action=yes_no,
        default=True,
        help="with --no-mask-video the video's tokens are learned, too: a mistake, to teach with",
    )
    add(
        "--words",
        action="append",
        default=[],
        metavar="NAME=WORD,WORD,…",
        help="report how many captions say those of these words that the true one says; repeat it for each list",
    )
    parser.set_defaults(vision_weights=None)
    args = runtime.parse_flags(parser, argv)
    if args.blind == "blank":
        args.cache_features = None  # there the videos are not blank
    if args.from_scratch and args.tune != "full":
        parser.error(f"--from-scratch with --tune {args.tune}: a random language model would stay random")
    if not args.mask_video and (args.overfit or args.eval_split == "train"):
        parser.error("--no-mask-video: what is answered must be masked; not with --overfit or --eval-split train")
    try:
        lists = [read_words(text) for text in args.words]
        args.word_lists = dict(lists)
        if len(args.word_lists) < len(lists):
            raise ValueError("--words: two lists of one name")
    except ValueError as error:
        parser.error(str(error))
    return args


def read_words(text: str) -> tuple[str, list[str]]:
    """("direction", ["destra", "sinistra"]) of "direction=destra,sinistra", as answers are compared."""
    name, _, words = text.partition("=")
    found = [common.normalise(word) for word in words.split(",")]
    if not name.strip() or "" in found or len(set(found)) < 2:
        raise ValueError(f"--words {text!r} is no NAME=WORD,WORD,… with at least two words")
    return name.strip(), found


# ------------------------------------------------------------------------------------------------------------
# Data: files -> rows
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    where: str  # "train.json[17]"
    split: str
    id: str
    video: str | None  # as the data names it; None of a text alone
    media: list[str]  # its file, or the chosen frames of its folder
    frames: int | None  # of its folder; of a file they are counted when it is opened
    question: str  # what stands before the text and is not learned; mostly nothing
    answer: str
    question_type: str
    candidates: list[str] | None
    group: str  # videos of one procedure or patient, where the data says; else the video


FRAME_FILES, VIDEO_FILES = (".jpg", ".jpeg", ".png"), (".gif", ".webp", ".apng", ".png", ".jpg", ".jpeg", ".npy")
FIELDS = {"id", "video", "conversations", "question", "answer", "question_type", "answer_candidates", "group"}


def read_data(data: Path, args) -> tuple[list[Row], list[Problem]]:
    """All rows of the folder, LLaVA conversations or canonical lines, and those that cannot be used."""
    read = (row for split, path in runtime.data_files(data).items() for row in read_file(data, path, split, args))
    return runtime.choose_rows(read, args)


def read_file(data: Path, path: Path, split: str | None, args):
    if path.suffix == ".json":
        try:
            listed = json.loads(path.read_text("utf-8"))
            entries = [(f"{path.name}[{i}]", dict(entry)) for i, entry in enumerate(listed)]
        except (ValueError, TypeError, OSError) as error:
            yield Problem(path.name, None, f"not a JSON list of conversations ({error}); mend the file")
            return
        problems = [] if entries else [Problem(path.name, None, "the file holds no conversations")]
    else:
        entries, problems = runtime.read_jsonl(path)
    yield from problems
    for where, entry in entries:
        try:
            wrong = runtime.misspelt(entry, FIELDS)
            if wrong:
                raise ValueError(wrong)
            yield from turn_rows(data, where, entry, split, args)
        except ValueError as error:
            yield Problem(where, entry.get("id"), str(error))


def turn_rows(data: Path, where: str, entry: dict, split: str | None, args):
    """A row for each answer of a conversation, with all that was said before it as its question; or the row itself."""
    if "conversations" not in entry:
        yield make_row(data, where, entry, split, args)
        return
    turns = entry["conversations"]
    turns = turns if isinstance(turns, list) else [turns]
    roles = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if not turns or roles != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"turns must alternate human, gpt; there are {roles}")
    texts = [turn.get("value") for turn in turns]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a turn's value must be a text: {next(t for t in texts if not isinstance(t, str))!r}")
    if texts[0].count(VIDEO) != (entry.get("video") not in (None, "")):
        raise ValueError(f"the first turn must hold {VIDEO} once where the row names a video, and not otherwise")
    texts[0] = texts[0].replace(VIDEO, "")  # wherever it stands, the video goes first
    texts = [text.strip() for text in texts]
    for i in range(0, len(turns), 2):
        said = {"question": "\n".join(filter(None, texts[: i + 1])), "answer": texts[i + 1]}
        if len(turns) > 2:  # in one group, because later turns tell what was said in the earlier ones
            name = named(entry, "id", where)
            said |= {"id": f"{name}.{i // 2}", "group": named(entry, "group", named(entry, "video", name))}
        yield make_row(data, where if i == 0 else f"{where} turn {i}", {**entry, **said}, split, args)


def named(entry: dict, field: str, otherwise):
    """A field as text, or `otherwise` where it is missing or empty."""
    return otherwise if entry.get(field) in (None, "") else str(entry[field])


def make_row(data: Path, where: str, entry: dict, split: str | None, args) -> Row:
    for key, kinds in (("video", str), ("question", str), ("answer", (str, int, float))):
        if entry.get(key) is not None and not isinstance(entry[key], kinds):
            raise ValueError(f"{key} must be a text: {entry[key]!r}")
    video, name = named(entry, "video", None), named(entry, "id", where)
    files, frames = find_video(data, video, args) if video else ([], None)
    group = named(entry, "group", video or name)
    # é is one character or two: composed, so that a word has one spelling
    entry = json.loads(unicodedata.normalize("NFC", json.dumps(entry, ensure_ascii=False)))
    json.dumps(entry, ensure_ascii=False).encode()  # raises where half a character, "\ud800", stands in it
    question = (entry.get("question") or "").strip()
    plain = {"question": "none", "question_type": entry.get("question_type") or ("caption" if video else "text")}
    fields = common.question_fields(entry if question else {**entry, **plain}) | {"question": question}
    return Row(
        where=where,
        split=split or runtime.split_of(group),
        id=name,
        video=video,
        media=files,
        frames=frames,
        group=group,
        **fields,
    )


# ------------------------------------------------------------------------------------------------------------
# Data: videos
# ------------------------------------------------------------------------------------------------------------


def find_video(data: Path, video: str, args) -> tuple[list[str], int | None]:
    """(its file, None), or of a folder (the chosen frames, how many it holds): frame_2 before frame_10."""
    files, count = [video], None
    with suppress(OSError):  # a name too long for any file
        if (data / video).is_dir():
            names = [p.name for p in (data / video).iterdir() if not p.name.startswith(".")]
            names.sort(key=lambda name: ([int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)], name))
            files, count = [f"{video}/{name}" for name in names], len(names)
    known = VIDEO_FILES if count is None else FRAME_FILES
    wrong = [name for name in files if not name.lower().endswith(known)]
    if wrong or not files:
        raise ValueError(f"{wrong[0] if wrong else video + ', an empty folder,'} is none of {', '.join(known)}")
    return (files if count is None else [files[i] for i in choose_frames(count, args)[0]]), count


def choose_frames(count: int, args) -> tuple[list[int], list[int], list[int]]:
    """Which of `count` frames are read, and which of these are on the fast and on the slow path."""
    fast, slow = evenly(count, args.fast_frames), evenly(count, args.slow_frames)
    read = sorted({*fast, *slow})
    return read, [read.index(i) for i in fast], [read.index(i) for i in slow]


def evenly(count: int, n: int) -> list[int]:
    """n of `count` frames, the first and (of two or more) the last among them; all where there are no more than n."""
    if count <= n:
        return list(range(count))
    return [round(i * (count - 1) / max(1, n - 1)) for i in range(n)]  # 8 frames, 4 chosen: 7 / 3, so 0 2 5 7


def measure(data: Path, name: str) -> tuple[int, str]:
    """(frames, sha256) of a file, each frame decoded."""
    return sum(1 for _ in read_frames(data, name)), runtime.file_sha256(data / name)


def read_frames(data: Path, name: str, wanted: list[int] | None = None, largest: int = 50_000_000):
    """The `wanted` frames of a file, or all, one by one, RGB; a JPEG has one. Raises ValueError naming the file."""
    path = runtime.inside(data, name)
    try:
        if path.suffix.lower() == ".npy":
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
            if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or frames.size == 0:
                raise ValueError(f"{frames.dtype} of shape {frames.shape}, not uint8 (frames, height, width, 3)")
            for i in range(len(frames)) if wanted is None else wanted:
                yield Image.fromarray(np.array(frames[i]))
            return
        with Image.open(path, formats=["GIF", "WEBP", "PNG", "JPEG"]) as image:
            if image.width * image.height > largest:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {largest:,}; scale it down")
            if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
                raise ValueError(f"colour mode {image.mode}; convert it to RGB")
            # an MPO holds one picture twice; an APNG may begin with what is shown where it cannot be played
            single, first = image.format in ("JPEG", "MPO"), int(getattr(image, "default_image", False))
            count = 1 if single else getattr(image, "n_frames", 1) - first
            for i in range(count) if wanted is None else wanted:
                image.seek(first + i)
                image.load()
                yield ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # damaged files make a decoder raise anything
        raise ValueError(f"{name} cannot be read: {error or type(error).__name__}") from None


# ------------------------------------------------------------------------------------------------------------
# Data: rows -> prompt trees
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """What turns a row into tokens: read from the checkpoint's folder, no weights needed."""

    tokenizer: object
    processor: object  # of frames
    bos: str  # what every text begins with
    ids: dict[str, int]  # of VIDEO and VIDEO_TOKENS
    positions: int | None  # the most that the language model has
    settings: object  # the flags
    keep_sentinels: bool
    report: dict  # for check.json and results.json
    measured: dict = field(default_factory=dict)  # file -> [frames, sha256], once all are opened
    branches: dict = field(default_factory=dict)  # what candidate_branches has encoded
    tower: str = ""  # a digest of the tower's weights and configuration, once it is loaded

    @property
    def media_ids(self) -> list[int]:
        return list(self.ids.values())

    def chosen(self, row: Row) -> tuple[list[int], list[int], list[int]]:
        """See choose_frames. Raises ValueError where a frame of a folder is itself an animation."""
        several = [name for name in row.media if self.measured[name][0] != 1]
        if row.frames and several:
            raise ValueError(f"{several[0]} holds {self.measured[several[0]][0]} frames; in a folder each file is one")
        return choose_frames(row.frames or self.measured[row.media[0]][0], self.settings)

    def layout(self, row: Row) -> list[int]:
        """The tokens that its video stands for, the fast path's first; [] of a text alone."""
        if not row.video:
            return []
        _, fast, slow = self.chosen(row)
        fast_tokens = self.path(VID_START, len(fast) * self.settings.fast_grid**2, VID_END)
        return fast_tokens + self.path(SLOW_START, len(slow) * self.settings.slow_grid**2, SLOW_END)

    def path(self, start: str, count: int, end: str) -> list[int]:
        """`count` positions, all of which carry features: those of the start and the end, too."""
        if count < 2:
            raise ValueError(f"a path of {count} position has no room for {start} and {end}; raise its frames or grid")
        return [self.ids[start], *[self.ids[VID_PATCH]] * (count - 2), self.ids[end]]


def load_text(folder: Path, args) -> tuple[Text, list[Problem]]:
    """Tokenizer and image processor; the layout of a video, printed."""
    config = model_config(folder, args)
    tokenizer = runtime.tokenizer(folder)
    try:
        pad_line = f"{folder / 'tokenizer_config.json'}: {common.separate_pad_from_eos(tokenizer)}"
    except ValueError as error:
        raise SystemExit(f"--model {folder}: {error}") from None
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in (VIDEO, *VIDEO_TOKENS)])
    ids = {token: common.single_token_id(tokenizer, token) for token in (VIDEO, *VIDEO_TOKENS)}
    processor = runtime.image_processor(Path(args.vision_model) if args.vision_model else folder)
    fast, slow = args.fast_frames * args.fast_grid**2, args.slow_frames * args.slow_grid**2
    print(pad_line)
    print(
        f"video tokens: fast path {args.fast_frames} frames x {args.fast_grid} x {args.fast_grid} = {fast}, slow path "
        f"{args.slow_frames} frames x {args.slow_grid} x {args.slow_grid} = {slow}; {fast + slow} positions a video"
    )
    if not args.mask_video:
        text = "That is a mistake; val and test are masked. Of train, learned_tokens and longer_than_limit count them"
        print(f"--no-mask-video: the video's tokens are learned, too. {text}")
    height, width = frame_size(processor)
    patch = config.vision_config["patch_size"]
    if height % patch or width % patch:
        raise SystemExit(
            f"preprocessor_config.json: {height} x {width} pixels are no whole number of {patch} px patches"
        )
    unseen = " and ".join(f"{1 - seen(processor, w, h):.0%} of {w}:{h}" for w, h in ((1, 1), (16, 9)))
    print(f"a frame is {height} x {width} pixels, {height // patch} x {width // patch} patches; cropped away: {unseen}")
    report = {"video_tokens": ids, "pad": pad_line, "positions": {"fast": fast, "slow": slow}}
    report |= {name: getattr(args, name) for name in (*LAYOUT, "mask_video", "from_scratch")}
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    bos, keep = tokenizer.bos_token or tokenizer.eos_token, args.sentinels == "keep"
    return Text(tokenizer, processor, bos, ids, limit, args, keep, report), []


def frame_size(processor) -> tuple[int, int]:
    """(height, width) of what the tower sees."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    if None in (size.get("height"), size.get("width")):
        raise SystemExit("preprocessor_config.json: frames would differ in size; give it a crop, or a height and width")
    return size["height"], size["width"]


def seen(processor, width: int, height: int) -> float:
    """The share of a frame of these proportions that is left after the crop: DINOv2's, of 16:9, is 43 %."""
    if not getattr(processor, "do_center_crop", False):
        return 1.0
    resized = processor.size.get("height"), processor.size.get("width")
    if None in resized:
        scale = processor.size["shortest_edge"] / min(width, height)
        resized = scale * height, scale * width
    return math.prod(min(1.0, c / s) for c, s in zip(frame_size(processor), resized, strict=True))


def render(row: Row, text: Text) -> str:
    """The row as plain text, what is learned between sentinels."""
    opening, closing = common.SENTINELS
    asked = f"{row.question}\n" if row.question else ""
    video = VIDEO if row.video else ""
    return f"{video}{text.bos}{asked}{opening}{row.answer}{closing}{text.tokenizer.eos_token}"


def refuse_tokens(row: Row, text: Text) -> None:
    """Raise ValueError where a text holds what the tokenizer would take for <video>, EOS or a sentinel."""
    special = [token.content for token in text.tokenizer.added_tokens_decoder.values() if token.special]
    for part in (row.question, row.answer, *(row.candidates or [])):
        for token in (*common.SENTINELS, *special):
            if token in part:
                raise ValueError(f"the text contains {token!r}, which the model would read as a token; reword {part!r}")


def encode_row(row: Row, text: Text) -> tuple[list[int], list[int], list[int]]:
    """(prefix, input_ids, labels): the video's tokens; then the text, from BOS on. Of a text alone the prefix is []."""
    input_ids, labels = common.encode_supervised(text.tokenizer, render(row, text), keep_sentinels=text.keep_sentinels)
    cut = input_ids.index(text.ids[VIDEO]) + 1 if row.video else 0
    return text.layout(row), input_ids[cut:], labels[cut:]


def prove_row(row: Row, text: Text, prefix: list[int], input_ids: list[int], labels: list[int]) -> None:
    """Raise ValueError unless exactly answer + EOS is learned, and no video token stands among the text."""
    learned = [label for label in labels if label != IGNORE]
    if not learned:
        raise ValueError("all labels are masked: nothing would be learned from this row")
    decoded = text.tokenizer.decode(learned, clean_up_tokenization_spaces=False)
    if decoded != row.answer + text.tokenizer.eos_token:
        raise ValueError(f"learned would be {decoded!r}, not {row.answer + text.tokenizer.eos_token!r}")
    if set(input_ids) & set(text.ids.values()):
        raise ValueError("a video token stands among the text")
    given = next(i for i, label in enumerate(labels) if label != IGNORE)  # what it is answered from
    possible = [len(branch) for branch, _ in candidate_branches(row, text)]
    longest = len(prefix) + max(len(input_ids), given + text.settings.max_answer_tokens, *possible)
    if text.positions is not None and longest > text.positions:
        raise ValueError(
            f"up to {longest} positions, {len(prefix)} of them its video's; the language model has {text.positions}; "
            "lower --slow-frames, --slow-grid or --max-answer-tokens, or shorten the text"
        )


def video_learned(prefix: list[int], input_ids: list[int], labels: list[int]):
    """The mistake of --no-mask-video: the video's tokens are learned, too. Nearly all of these labels are the same."""
    if not prefix:
        return prefix, input_ids, labels
    return [], prefix + input_ids, [IGNORE, *prefix[1:], *labels]  # nothing stands before the first, to predict it from


def build_prompts(rows: list[Row], text: Text, args) -> tuple[list[Prompt], list[Problem]]:
    """A tree for each video with all its texts (or for each text), in order of appearance."""
    trees: dict[str, Prompt] = {}
    problems = []
    for row in rows:
        try:
            refuse_tokens(row, text)
            prefix, input_ids, labels = encode_row(row, text)
            prove_row(row, text, prefix, input_ids, labels)
            if len(prefix) + len(input_ids) > args.pack_tokens:
                raise ValueError(f"{len(prefix) + len(input_ids)} tokens, more than --pack-tokens {args.pack_tokens}")
        except ValueError as error:
            problems.append(Problem(row.where, row.id, str(error)))
            continue
        media = None
        if row.video:
            media = {"files": row.media, **dict(zip(("frames", "fast", "slow"), text.chosen(row), strict=True))}
        if not args.mask_video and row.split == "train" and not args.eval_only:
            prefix, input_ids, labels = video_learned(prefix, input_ids, labels)
        name = row.video if prefix and args.share_prefix else f"row {row.id}"
        tree = trees.setdefault(name, Prompt(prefix, [], [], media))
        tree.branches.append((input_ids, labels))
        tree.ids.append(row.id)
    return list(trees.values()), problems


# ------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------


class TokenPacker(nn.Module):
    """A frame's patches -> grid x grid positions.

    "pool" takes the mean of each window of patches. "attention" begins with the frame resized to grid x grid; each of
    these points then looks at its window of patches, and what it finds there is added. From 16 x 16 patches to 9 x 9
    windows are 2 or 3 patches wide, to 3 x 3 they are 6, and neighbours overlap where the division has a rest.
    """

    def __init__(self, width: int, patches: tuple[int, int], grid: int, kind: str):
        super().__init__()
        self.grid, self.kind = grid, kind
        if kind == "attention":
            self.heads = math.gcd(width, max(1, width // 64))  # of about 64 numbers each
            self.norm = nn.LayerNorm(width)
            self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
            nn.init.zeros_(self.out.weight)  # training starts from the resized frame
            nn.init.zeros_(self.out.bias)
            rows, columns = (windows(n, grid) for n in patches)  # each (grid, n)
            window = rows[:, None, :, None] & columns[None, :, None, :]  # (grid, grid, rows, columns)
            self.register_buffer("window", window.reshape(grid**2, -1), persistent=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(frames, rows, columns, width) -> (frames, grid * grid, width)"""
        image = patches.movedim(-1, 1)  # (frames, width, rows, columns)
        if self.kind == "pool":
            return F.adaptive_avg_pool2d(image, self.grid).flatten(2).transpose(1, 2)
        points = F.interpolate(image, size=(self.grid, self.grid), mode="bilinear").flatten(2).transpose(1, 2)
        region = self.norm(patches.flatten(1, 2))  # (frames, patches, width)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (frames, heads, …, width / heads)
            for x in (self.query(self.norm(points)), self.key(region), self.value(region))
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=self.window)
        return points + self.out(found.transpose(1, 2).flatten(2))


def windows(patches: int, grid: int) -> torch.Tensor:
    """(grid, patches), True where a patch is in the window of a point: adaptive pooling's windows."""
    index = torch.arange(patches)
    starts = torch.arange(grid) * patches // grid
    ends = -(-(torch.arange(grid) + 1) * patches // grid)  # rounded up
    return (index >= starts[:, None]) & (index < ends[:, None])


@dataclass
class Video:
    """A video of a row: its pixels, or the features that the tower has already found in them."""

    fast: list[int]  # which of its frames are on the fast path
    slow: list[int]
    pixels: torch.Tensor | None  # (frames, 3, height, width)
    features: torch.Tensor | None  # (frames, patches, width of the tower)
    cached_as: Path | None

    @property
    def frames(self) -> int:
        return len(self.features if self.pixels is None else self.pixels)


class VideoPlainLM(nn.Module):
    """A language model with a video tower, whose forward takes a packed row and returns (loss sum, learned tokens)."""

    def __init__(self, vlm: nn.Module, text: Text, dtype: torch.dtype):
        super().__init__()
        self.vlm = vlm
        self.dtype = dtype
        patch = vlm.config.vision_config["patch_size"]
        self.patches = tuple(n // patch for n in frame_size(text.processor))  # rows, columns
        ids = [text.ids[token] for token in VIDEO_TOKENS]
        self.register_buffer("video_ids", torch.tensor(ids), persistent=False)

    def patch_features(self, video: Video) -> torch.Tensor:
        """(frames, patches, width of the tower), from the cache, or by the tower, which then fills it.

        A video at a time: then the values do not depend on what else is in the row, and the cache changes nothing.
        """
        if video.features is not None:
            return video.features.to(self.video_ids.device)
        tower = self.vlm.vision_tower
        with torch.no_grad(), self.autocast():
            weights = next(tower.parameters())
            states = tower(video.pixels.to(weights.device, weights.dtype)).last_hidden_state
        # without the class token (and registers) in front; autocast leaves a norm's result in float32
        features = states[:, -math.prod(self.patches) :].to(self.dtype)
        if video.cached_as:
            write_features(video.cached_as, features)
        return features

    def video_features(self, videos: list[Video]) -> torch.Tensor:
        """All videos of a row -> (positions, width of the language model): of each the fast path, then the slow one."""
        # (frames of all videos, patches, width of the tower)
        features = torch.cat([self.patch_features(video) for video in videos])
        with self.autocast():
            # (frames, rows, columns, width of the language model)
            patches = self.vlm.projector(features).unflatten(1, self.patches)
            fast, slow, before = [], [], 0
            for video in videos:
                fast += [before + i for i in video.fast]
                slow += [before + i for i in video.slow]
                before += video.frames
            fast = self.vlm.fast_packer(patches[fast]).split([len(video.fast) for video in videos])
            slow = self.vlm.slow_packer(patches[slow]).split([len(video.slow) for video in videos])
        return torch.cat([part.flatten(0, 1) for both in zip(fast, slow, strict=True) for part in both])

    def autocast(self):
        """With bf16, trained parameters stay float32 and are cast where they are used."""
        device = self.video_ids.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @property
    def decoder(self) -> nn.Module:
        return self.vlm.base_model

    @torch.no_grad()
    def idle(self) -> None:
        """A pass without a question, for a rank that has none left while others have (runtime.equal_passes)."""
        with self.autocast():
            device, width = self.video_ids.device, self.vlm.get_input_embeddings().weight.shape[1]
            self.decoder(inputs_embeds=torch.zeros(1, 1, width, device=device, dtype=self.dtype), use_cache=False)

    def hidden(self, input_ids, position_ids, mask, cache=None, media: dict | None = None) -> torch.Tensor:
        """Last hidden states (1, T, width) of tokens (1, T) under a mask (1, 1, T, keys); `media` of read_images."""
        with self.autocast():
            embeds = self.vlm.get_input_embeddings()(input_ids)  # (1, T, width)
            if media is not None:
                places = torch.isin(input_ids, self.video_ids)
                features = self.video_features(media["videos"]) if media["videos"] else embeds[0, :0]
                if int(places.sum()) != len(features):
                    raise ValueError(f"{int(places.sum())} video tokens for {len(features)} features")
                embeds = embeds.masked_scatter(places.unsqueeze(-1), features.to(embeds.dtype))
            return self.decoder(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.vlm.get_output_embeddings()(hidden)

    def forward(self, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
        mask = common.visible(row["document"], row["branch"])
        hidden = self.hidden(row["input_ids"], row["position_ids"], mask, None, media=row)
        loss, learned = common.supervised_loss(hidden, self.lm_head, row["labels"])
        if torch.is_grad_enabled() and not loss.requires_grad:  # a text alone with --tune projector
            loss = loss + 0 * self.vlm.projector[0].bias.sum()  # for backward to end at
        return loss, learned

    def train(self, mode: bool = True):
        super().train(mode)
        self.vlm.vision_tower.eval()  # frozen: no dropout in it
        return self


def has_tower(folder: Path) -> bool:
    """Was the model saved by this script? Then it has a tower, and a layout that it is bound to."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "vision_config" in config and "video_layout" not in config:
        kind = config.get("model_type")
        raise SystemExit(f"--model {folder}: {kind!r} is a vision-language model already; give a plain language model")
    return "video_layout" in config


def model_config(folder: Path, args):
    """The language model's configuration, with the tower's as vision_config; a saved model's layout is adopted."""
    config = AutoConfig.from_pretrained(folder)
    saved = has_tower(folder)
    if saved and args.vision_model:
        raise SystemExit(f"--vision-model {args.vision_model}: {folder} already has a tower; leave the flag out")
    if not saved:
        vision = AutoConfig.from_pretrained(args.vision_model)
        if vision.model_type not in ("dinov2", "dinov2_with_registers"):
            raise SystemExit(f"--vision-model {args.vision_model}: model_type {vision.model_type!r}, not 'dinov2'")
        config.vision_config = vision.to_dict()
    for name, value in (config.video_layout if saved else {}).items():
        if getattr(args, name) != value:
            print(f"{name} {value} (from {folder / 'config.json'})")
            setattr(args, name, value)
    return config


def graft(lm: nn.Module, config, tower: nn.Module, text: Text) -> None:
    """Give the language model the tower, a projector to its width, and a packer for each path."""
    args, vision, width = text.settings, config.vision_config, lm.get_input_embeddings().weight.shape[1]
    patches = tuple(n // vision["patch_size"] for n in frame_size(text.processor))
    lm.vision_tower = tower
    lm.projector = nn.Sequential(nn.Linear(vision["hidden_size"], width), nn.GELU(), nn.Linear(width, width))
    lm.fast_packer = TokenPacker(width, patches, args.fast_grid, args.packer)
    lm.slow_packer = TokenPacker(width, patches, args.slow_grid, args.packer)
    lm.config.vision_config = vision
    lm.config.video_layout = {name: getattr(args, name) for name in LAYOUT}


def grow(lm: nn.Module, rows: int) -> None:
    """Room for the new tokens. Their rows are the mean of the others, not drawn: the same whenever it is loaded."""
    old = lm.get_input_embeddings().weight.shape[0]
    if rows > old:  # never fewer: many embeddings are larger than their tokenizer
        lm.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
                module.weight[old:] = module.weight[:old].mean(0)


def prepare(vlm: nn.Module, args) -> None:
    """Choose what is trained; whatever is, is float32, because bfloat16 loses small updates."""
    common.train_only(vlm, r"(?!vision_tower\.).*" if args.tune == "full" else NEW_PATTERN)
    if args.tune == "lora":
        try:
            common.add_lora(vlm, LORA_PATTERN, args.lora_r, args.lora_alpha, args.lora_dropout, args.rslora)
        except ValueError as error:  # GPT-2
            raise SystemExit(f"--tune lora: {error}; choose --tune full or projector") from None
    for parameter in vlm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.grad_checkpoint:  # not reentrant: the inputs of a frozen base need no gradient
        vlm.gradient_checkpointing_enable({"use_reentrant": False})


def meta_model(folder: Path, args, text: Text) -> nn.Module:
    """The model from its configuration alone, without weights."""
    config = model_config(folder, args)
    with torch.device("meta"):
        vlm = AutoModelForCausalLM.from_config(config)
        if len(text.tokenizer) > vlm.get_input_embeddings().weight.shape[0]:
            vlm.resize_token_embeddings(len(text.tokenizer), mean_resizing=False)
        graft(vlm, config, AutoModel.from_config(AutoConfig.for_model(**config.vision_config)), text)
    return vlm


def load_model(folder: Path, args, text: Text, dtype) -> VideoPlainLM:
    """The model with what is trained chosen, still on the CPU: runtime.place puts it on the device."""
    config = model_config(folder, args)
    saved = hasattr(config, "video_layout")
    # what is trained is drawn, and loaded, in float32, as it is trained
    form = torch.float32 if args.tune == "full" else dtype
    try:
        if args.from_scratch:
            vlm = AutoModelForCausalLM.from_config(config, dtype=form, attn_implementation="sdpa")
        else:
            vlm = runtime.open_model(AutoModelForCausalLM, folder, config, form, OURS if saved else ())
    except ValueError as error:  # no causal language model, or none whose attention takes a mask
        raise SystemExit(f"--model {folder}: {error}") from None
    window = getattr(vlm.config.get_text_config(), "sliding_window", None)
    if window is not None and window < args.pack_tokens:
        raise SystemExit(f"--pack-tokens {args.pack_tokens} is longer than the model's sliding window {window}")
    grow(vlm, len(text.tokenizer))
    common.separate_pad_from_eos(text.tokenizer, vlm)
    vision = AutoConfig.for_model(**config.vision_config)
    part = "vision_tower." if saved else ""
    tower = runtime.open_model(AutoModel, folder if saved else Path(args.vision_model), vision, dtype, part=part)
    graft(vlm, config, tower, text)
    for name in ("projector", "fast_packer", "slow_packer") if saved else ():
        runtime.load_part(folder, (f"{name}.",), getattr(vlm, name))
    prepare(vlm, args)
    text.tower = tower_digest(tower)
    if args.compile:
        vlm.base_model.compile(dynamic=True)
    return VideoPlainLM(vlm, text, dtype)


@torch.no_grad()
def verify_first_batch(model: VideoPlainLM, trees: list[Prompt], run) -> None:
    """Before step 0, with the first prompts: video tokens and features, and what is taken for granted of the LM.

    Any causal language model may be given, so each is put to the test: a packed row must be read as each of its texts
    is alone, and the logits must be those of the model's own forward.
    """
    model.eval()
    trees = (trees * 2)[: max(2, min(4, len(trees)))]  # something must stand before and beside a text

    def read(trees: list[Prompt]) -> tuple[dict, torch.Tensor]:
        [row] = common.pack(trees, sum(map(len, trees)))
        try:
            row = to_device({**row, **run.read_media(row["prompts"])}, run.device)
        except ValueError as error:
            raise SystemExit(f"{error}. Mend the file and start again") from None
        mask = common.visible(row["document"], row["branch"])
        return row, model.hidden(row["input_ids"], row["position_ids"], mask, media=row)[0]

    packed, together = read(trees)  # where video tokens and features differ in number, this raises
    apart = 0.0
    for number, tree in enumerate(packed["prompts"], start=1):
        for i in range(len(tree.ids)):
            _, alone = read([tree.part([i])])  # (tokens, width)
            own = (packed["document"] == number) & ((packed["branch"] == 0) | (packed["branch"] == i + 1))
            apart = max(apart, float((together[own[0]] - alone).norm() / alone.norm()))
    if apart > 0.05:  # bfloat16 rounds to 0.004
        text = f"what is packed beside a text changes how it is read (by {apart:.1%})"
        raise SystemExit(f"--model {run.args.model}: {text}: it does not heed attention_mask and position_ids")
    [plain] = common.pack([Prompt([], trees[0].branches[:1], ["a text"])], len(trees[0]))  # without a video
    plain = to_device(plain, run.device)
    mask = common.visible(plain["document"], plain["branch"])
    ours = model.lm_head(model.hidden(plain["input_ids"], plain["position_ids"], mask)).float()
    with model.autocast():
        theirs = model.vlm(input_ids=plain["input_ids"], use_cache=False).logits.float()
    if (ours - theirs).norm() > 0.05 * theirs.norm():
        text = "its logits are more than its output embedding of the last hidden states, scaled or capped"
        raise SystemExit(f"--model {run.args.model}: {text}, which is not supported")
    ids = set(model.video_ids.tolist())
    counts = Counter(sum(token in ids for token in tree.prefix + tree.branches[0][0]) for tree in trees)
    shown = ", ".join(f"{n} in each of {prompts}" for n, prompts in sorted(counts.items()))
    print(f"video tokens: {shown} prompts; packed texts are read as if alone — verified")


def answer_limit(row: Row, args) -> int:
    """The most tokens of a free answer."""
    return args.max_answer_tokens


def score(prediction: str | None, row: Row) -> dict[str, bool]:
    """exact, of a plain text: the same, spaces aside. tolerant: as answers are compared elsewhere, see score_answer.

    That folds case and drops punctuation and English articles: "a" is one, but in Italian a word of its own. Where
    something is asked, both are score_answer's.
    """
    if row.question or row.candidates:
        return common.score_answer(prediction, row.answer, row.question_type)
    tolerant = common.score_answer(prediction, row.answer, row.question_type)["exact"]
    said = unicodedata.normalize("NFC", prediction or "").split()
    return {"exact": said == row.answer.split(), "tolerant": tolerant}


def own_figures(model: VideoPlainLM, prompts: list[Prompt], records: list[dict], run) -> dict:
    """What there is to say of captions: loss, perplexity, retrieval, BLEU, ROUGE-L, and the words of --words."""
    loss = mean_loss(model, prompts, run)
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **retrieval(model, prompts, run)}
    print(f"loss {loss:.4f} a token, perplexity {figures['perplexity']:.3f}")
    if figures["pairs"]:
        share = f"{figures['retrieval']:.1%} of {figures['pairs']}"
        print(f"a text is likelier with its own video than with another's: {share} (chance: 50 %)")
    figures |= overlap([(record["prediction"] or "", record["answer"]) for record in records])
    figures["words"] = {}
    for name, words in run.args.word_lists.items():
        pairs = [(said(r["prediction"], words), said(r["answer"], words)) for r in records]
        right = [found == true for found, true in pairs if true]
        figures["words"][name] = {"n": len(right), "right": sum(right) / max(1, len(right))}
        print(f"{name}: {sum(right)} of {len(right)} texts that name one say the right words")
    return figures


def said(text: str | None, words: list[str]) -> set[str]:
    return {word for word in words if f" {word} " in f" {common.normalise(text)} "}


def retrieval(model: VideoPlainLM, prompts: list[Prompt], run) -> dict:
    """How often a text is likelier with its own video than with another, whose texts differ: what no blind model can.

    The other is the next such one in an order drawn once. Pairwise, so that chance is a half whatever the data.
    """
    trees = [tree for tree in prompts if tree.media]
    random.Random(0).shuffle(trees)
    texts = defaultdict(set)  # video -> what is said of it
    for tree in trees:
        texts[tuple(tree.media["files"])] |= {tuple(x for x in labels if x != IGNORE) for _, labels in tree.branches}
    limit, pairs = run.text.positions or math.inf, []
    for i, tree in enumerate(trees):
        own, longest = texts[tuple(tree.media["files"])], max(len(input_ids) for input_ids, _ in tree.branches)
        # of the next hundred; a tree that none of them suits is left out
        for other in (trees[k % len(trees)] for k in range(i + 1, i + min(100, len(trees)))):
            if not own & texts[tuple(other.media["files"])] and len(other.prefix) + longest <= limit:
                pairs.append((tree, replace(other, branches=tree.branches, ids=tree.ids)))
                break
    mine = pairs[runtime.rank() :: runtime.ranks()]
    with runtime.equal_passes(model.decoder, model.idle):
        own, foreign = (log_probabilities(model, [pair[side] for pair in mine], run) for side in (0, 1))
    right = sum((own[name] > foreign[name]) + (own[name] == foreign[name]) / 2 for name in own)  # a tie is half
    right, n = runtime.sum_over_ranks(torch.tensor([right, len(own)], dtype=torch.float64)).tolist()
    return {"retrieval": right / n if n else None, "pairs": int(n)}


def overlap(pairs: list[tuple[str, str]]) -> dict:
    """BLEU (0 to 100) and ROUGE-L (0 to 1) of (prediction, true text) pairs; None where they are not installed."""
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError:
        print("BLEU and ROUGE-L: not computed; pip install sacrebleu rouge-score")
        return {"bleu": None, "rouge_l": None}

    class Words:  # rouge-score's own takes "più" for "pi": it knows the letters a to z alone
        def tokenize(self, text):
            return re.findall(r"\w+", text.lower())

    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
    rouge = sum(scorer.score(true, found)["rougeL"].fmeasure for found, true in pairs) / len(pairs)
    bleu = sacrebleu.corpus_bleu([found for found, _ in pairs], [[true for _, true in pairs]]).score
    print(f"BLEU {bleu:.1f}, ROUGE-L {rouge:.3f}")
    return {"bleu": bleu, "rouge_l": rouge}


def media_kind(row: Row) -> tuple:
    """Rows that agree in this can be asked about each other's media."""
    return ()


def show(row: Row, other: Row) -> Row:
    """The row, asked about the other's video."""
    return replace(row, video=other.video, media=other.media, frames=other.frames)


def blank(media: dict) -> dict:
    """What read_images gives, with nothing to see in it: all pixels 0, which is the processor's mean colour."""
    return {"videos": [replace(video, pixels=torch.zeros_like(video.pixels)) for video in media["videos"]]}


def read_images(data: Path, text: Text, prompts: list[Prompt]) -> dict:
    """{"videos": a Video for each prompt tree that shows one, in the order of the row}"""
    return {"videos": [read_video(data, text, prompt.media) for prompt in prompts if prompt.media]}


def read_video(data: Path, text: Text, media: dict) -> Video:
    files, cached_as = media["files"], None
    if text.settings.cache_features:
        cached_as = cache_file(text, media)
        features = read_features(cached_as)
        if features is not None:
            return Video(media["fast"], media["slow"], None, features, cached_as)
        try:
            changed = [n for n in files if runtime.file_sha256(runtime.inside(data, n)) != text.measured[n][1]]
        except OSError as error:
            raise ValueError(f"{media['files'][0]} cannot be read: {error}") from None
        if changed:
            raise ValueError(f"{changed[0]} has changed since it was checked; start again")
    if len(files) == 1:
        frames = list(read_frames(data, files[0], media["frames"]))
    else:
        frames = [frame for name in files for frame in read_frames(data, name)]
    if len(frames) != len(media["frames"]):
        raise ValueError(f"{files[0]} has other frames than when it was checked; start again")
    pixels = text.processor(frames, return_tensors="pt")["pixel_values"]
    return Video(media["fast"], media["slow"], pixels, None, cached_as)


# ------------------------------------------------------------------------------------------------------------
# Features on disk: the tower is frozen, so each video needs to pass it once
# ------------------------------------------------------------------------------------------------------------


def tower_digest(tower: nn.Module) -> str:
    """A digest of the tower's configuration and of every weight, in the format that it computes with."""
    config = {name: value for name, value in tower.config.to_dict().items() if name != "transformers_version"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_file(text: Text, media: dict) -> Path:
    """The file of a video's features, named by all that they depend on: what has changed is looked for elsewhere.

    That is the tower, the image processor, the bytes of the video, and which of its frames are read.
    """
    contents = [text.measured[name][1] for name in media["files"]]
    key = runtime.fingerprint([text.tower, text.processor.to_dict(), contents, media["frames"]])
    return Path(text.settings.cache_features) / key[:2] / f"{key}.safetensors"


def read_features(path: Path) -> torch.Tensor | None:
    """(frames, patches, width of the tower), or None where the file is missing or damaged: it is then written anew."""
    with suppress(OSError, SafetensorError):
        return load_file(path)["features"]
    return None


def write_features(path: Path, features: torch.Tensor) -> None:
    """Beside its name, then renamed: several ranks and runs may use one folder."""
    with runtime.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{random.SystemRandom().getrandbits(64):016x}")
        try:
            save_file({"features": features.cpu().contiguous()}, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


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


def vision_folder(folder: Path, args, weights: bool) -> str | None:
    """The tower's own folder; None where the model was saved by this script and has one."""
    if has_tower(folder):
        if args.from_scratch:
            raise SystemExit(f"--from-scratch: {folder} was trained by this script; draw from the original config.json")
        return args.vision_model  # refused by model_config
    return str(runtime.model_folder(args.vision_model or "facebook/dinov2-large", weights, flag="--vision-model"))


def tower_fingerprint(folder: Path) -> str:
    """Of its weights, and of how frames are prepared for it."""
    small = [path for path in folder.glob("*config.json") if path.is_file()]
    return runtime.model_fingerprint(folder, [*small, *runtime.weight_files(folder)])[:12]


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    if args.count_params:
        folder = runtime.model_folder(args.model, weights=False)
        args.vision_model = vision_folder(folder, args, weights=False)
        text, _ = load_text(folder, args)
        vlm = meta_model(folder, args, text)
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
        needed = not (args.check or args.from_scratch)
        folder = Path(runtime.on_first_rank(lambda: str(runtime.model_folder(args.model, weights=needed))))
        args.vision_model = runtime.on_first_rank(lambda: vision_folder(folder, args, weights=not args.check))
        weights = tower_fingerprint(Path(args.vision_model)) if args.vision_model else None
        if checkpoint and args.vision_weights != weights:
            raise SystemExit(
                f"--vision-model {args.vision_model}: {checkpoint} was trained with another tower or image processor"
            )
        args.vision_weights = weights
        text, faults = load_text(folder, args)
        if args.merge:
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
