"""Fine-tune LLaVA-Med on questions about medical images: vision tower frozen, projector trained, LoRA on the LM.

A data row, one line of DATA/train.jsonl (also val.jsonl, test.jsonl; image paths are relative to DATA):

    {"id": "kv_00017", "image": "images/cl8k2u.jpg", "question": "How many polyps are in the image?", "answer": "1"}

    make demo                                                            # on a CPU, from nothing; or by hand:
    python demo.py llava_med && python train_llava_med.py --model runs/demo/llava_med/model \\
        --data runs/demo/llava_med/data --out runs/demo/llava_med/run --tune full --lr 1e-3 --epochs 8 --pack-tokens 512
    python train_llava_med.py --model LLAVA_FOLDER_OR_HUB_ID --data DATA --out RUN --check               # the proof
    python train_llava_med.py --model LLAVA_FOLDER_OR_HUB_ID --data DATA --out RUN --epochs 3            # one GPU
    torchrun --standalone --nproc-per-node 4 train_llava_med.py --model LLAVA_FOLDER_OR_HUB_ID --data DATA --out RUN
    sbatch slurm/llava_med.sh                                                                            # a cluster

Published layouts that are read as they are: Kvasir-VQA JSONL, EndoVis-18-VQA's seq_* folders, LLaVA conversations.
What the demo must reach, and what each figure means, is in README.md.
"""

import json
import math
import random
import shutil
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, LlavaForConditionalGeneration

import common
import runtime
from common import IGNORE, Prompt
from report import audit_scorer, data_gate, print_audit, print_gate, write_report
from runtime import Problem

# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------

IMAGE = "<image>"
# every projection of the language model and none of the vision tower, whose layers have q_proj and v_proj too
LORA_PATTERN = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
PROJECTOR_PATTERN = r"model\.multi_modal_projector\..*"
OWN_SETTINGS = []  # flags of this script alone that a checkpoint is bound to
# for checkpoints that come without a chat template: Mistral's, as LLaVA-Med v1.5 was trained
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% for part in m.content %}"
    "{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %} [/INST]"
    "{% else %} {{ m.content[0].text }}{{ eos_token }}{% endif %}{% endfor %}"
)
# two published splits that contradict each other; a model trained on one must not be tested on the other
ENDOVIS = {
    "paper": {"train": [2, 3, 4, 6, 7, 9, 10, 11, 12, 14, 15], "test": [1, 5, 16]},
    "sequence": {"train": [5, 6, 7, 10, 11, 12, 14, 15, 16], "val": [9, 13], "test": [1, 2, 3, 4]},
}


def parse_arguments(argv):
    parser = runtime.shared_flags(__doc__)
    add = parser.add_argument_group("EndoVis-18-VQA").add_argument
    add("--endovis-split", choices=list(ENDOVIS), help="which of the two published splits (required for this data)")
    add("--endovis-answers", choices=["Classification", "Sentence"], default="Classification")
    return runtime.parse_flags(parser, argv)


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
    group: str  # patient, video or procedure; the image where nothing else is known
    history: list[tuple[str, str]] = field(default_factory=list)  # earlier turns of a conversation

    @property
    def media(self) -> list[str]:
        return [self.image]


IMAGE_FIELDS = ("image", "image_filename", "image_id", "img_id")
FIELDS = {*IMAGE_FIELDS, "id", "question", "answer", "question_type", "answer_candidates", "group"}


def read_data(data: Path, args) -> tuple[list[Row], list[Problem]]:
    """All rows of the folder in whichever published layout it has, and the rows that cannot be used."""
    if any(data.glob("seq_*/vqa")):
        read = read_endovis(data, args.endovis_split, args.endovis_answers)
    else:
        read = (row for split, path in runtime.data_files(data).items() for row in read_file(data, path, split))
    return runtime.choose_rows(read, args)


def read_file(data: Path, path: Path, split: str | None):
    """Rows of a JSON-lines file (canonical or Kvasir-VQA) or of LLaVA conversations (.json)."""
    if path.suffix == ".json":
        try:
            entries = [
                (f"{path.name}[{i}]", dict(entry)) for i, entry in enumerate(json.loads(path.read_text("utf-8")))
            ]
        except (ValueError, TypeError) as error:
            yield Problem(path.name, None, f"not a JSON list of conversations ({error}); mend the file")
            return
        problems = [] if entries else [Problem(path.name, None, "the file holds no conversations")]
    else:
        entries, problems = runtime.read_jsonl(path)
    yield from problems
    for where, entry in entries:
        try:
            if "conversations" in entry:
                yield from conversation_rows(data, where, entry, split)
            else:
                yield make_row(data, where, entry, split)
        except ValueError as error:
            yield Problem(where, entry.get("id"), str(error))


def make_row(data: Path, where: str, entry: dict, split: str | None, history=()) -> Row:
    wrong = runtime.misspelt(entry, FIELDS)
    if wrong:
        raise ValueError(wrong)
    name = next((str(entry[f]) for f in IMAGE_FIELDS if entry.get(f) not in (None, "")), None)
    if name is None:
        raise ValueError(f"no image; give one of {', '.join(IMAGE_FIELDS)}")
    image = runtime.find_image(data, name)
    group = str(image if entry.get("group") in (None, "") else entry["group"])
    return Row(
        where=where,
        split=split or runtime.split_of(group),
        id=str(where if entry.get("id") in (None, "") else entry["id"]),
        image=image,
        group=group,
        history=list(history),
        **common.question_fields(entry),
    )


def conversation_rows(data: Path, where: str, entry: dict, split: str | None):
    """One row for each answer of a LLaVA conversation, with the turns before it as its history."""
    turns = entry["conversations"]
    roles = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if not turns or roles != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"turns must alternate human, gpt; there are {roles}")
    texts = [str(turn.get("value") or "") for turn in turns]
    if texts[0].count(IMAGE) != 1:
        raise ValueError(f"the first turn must hold {IMAGE} once, for its image")
    texts[0] = texts[0].replace(IMAGE, "")  # wherever it stands, the image goes first, as in LLaVA's own training
    history = []
    for i in range(0, len(turns), 2):
        row = {"id": f"{entry.get('id', where)}.{i // 2}", "question": texts[i], "answer": texts[i + 1]}
        row |= {"image": entry.get("image"), "group": entry.get("group")}
        yield make_row(data, f"{where} turn {i // 2}", row, split, history)
        history.append((texts[i].strip(), texts[i + 1].strip()))


def read_endovis(data: Path, published_split: str | None, answers: str):
    """EndoVis-18-VQA: seq_N/vqa/{Classification,Sentence}/*.txt, a line "question|answer", the frame beside them."""
    if published_split is None:
        raise SystemExit("EndoVis-18-VQA has two published splits that contradict each other: give --endovis-split")
    for split, sequences in ENDOVIS[published_split].items():
        for number in sequences:
            folder = data / f"seq_{number}"
            files = sorted((folder / "vqa" / answers).glob("*.txt"))
            if not files:
                yield Problem(f"seq_{number}/vqa/{answers}", None, "no annotation files")
            for path in files:
                frame = path.stem.removesuffix("_QA")
                # the left camera's frames; right_fr and labels hold files of the same name
                near = [f"seq_{number}/{camera}{frame}" for camera in ("left_fr/", "", "vqa/")]
                places = [f"{place}.{ending}" for place in near for ending in ("png", "jpg")]
                name = next((place for place in places if (data / place).is_file()), places[0])
                for line, text in enumerate(path.read_text("utf-8").splitlines(), start=1):
                    where = f"{path.relative_to(data)}:{line}"
                    question, bar, answer = text.partition("|")
                    if not bar:
                        yield Problem(where, None, 'no "question|answer"')
                        continue
                    entry = {"image": name, "question": question, "answer": answer, "group": f"seq_{number}"}
                    try:
                        yield make_row(data, where, entry, split)
                    except ValueError as error:
                        yield Problem(where, None, str(error))


# ------------------------------------------------------------------------------------------------------------
# Data: rows -> prompt trees
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """What turns a row into tokens: read from the checkpoint's folder, no weights needed."""

    tokenizer: object
    processor: object  # of images
    image_id: int | None  # None where config.json has it wrong
    features: int  # placeholders an image stands for
    bos: list[int]  # what the tokenizer itself puts first: [1] for Mistral, [] for Qwen
    keep_sentinels: bool
    report: dict  # for check.json: what was found in the checkpoint's files
    measured: dict = field(default_factory=dict)  # image -> (width, height), once all are opened
    branches: dict = field(default_factory=dict)  # what candidate_branches has encoded

    @property
    def media_ids(self) -> list[int]:
        return [self.image_id]


def read_config(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "llava":
        raise SystemExit(
            f"--model {folder}: model_type {config.get('model_type')!r}, not 'llava'. transformers does not know "
            "LLaVA-Med's original llava_mistral; use a checkpoint converted to transformers' format"
        )
    return config


def load_text(folder: Path, args) -> tuple[Text, list[Problem]]:
    """Tokenizer and image processor, and the faults of the checkpoint's own files."""
    config_file = read_config(folder)
    problems = []
    tokenizer = runtime.tokenizer(folder)
    if not tokenizer.chat_template:
        print("chat template: the checkpoint has none, so Mistral's is used, as LLaVA-Med v1.5 was trained")
        tokenizer.chat_template = CHAT_TEMPLATE
    image_id = None
    try:
        common.register_placeholder(tokenizer, IMAGE, common.image_token_id(config_file))
        image_id = common.single_token_id(tokenizer, IMAGE)
    except ValueError as error:
        problems.append(Problem("config.json", None, f"{error}; copy image_token_index from the original config.json"))
    try:
        pad_line = f"{folder / 'tokenizer_config.json'}: {common.separate_pad_from_eos(tokenizer)}"
    except ValueError as error:
        raise SystemExit(f"--model {folder}: {error}") from None
    print(pad_line)
    bos = [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]
    config = AutoConfig.from_pretrained(folder)
    processor = runtime.image_processor(folder)
    size = getattr(processor, "crop_size", None) or processor.size
    features = features_per_image(config)
    if (size["height"], size["width"]) != (config.vision_config.image_size,) * 2:
        text = f"{size['height']} x {size['width']} pixels, the vision tower takes {config.vision_config.image_size}"
        problems.append(Problem("preprocessor_config.json", None, text))
    report = {"image_token": {"id": image_id, "per_image": features}, "pad": pad_line}
    return Text(tokenizer, processor, image_id, features, bos, args.sentinels == "keep", report), problems


def features_per_image(config) -> int:
    """CLIP-L/14 at 336 px, "default": (336 / 14)^2 + 1 - 1 = 576; SigLIP at 384 px, "full": 27^2 = 729."""
    vision = config.vision_config
    class_token = vision.model_type == "clip_vision_model"
    return (
        (vision.image_size // vision.patch_size) ** 2
        + class_token
        - (config.vision_feature_select_strategy == "default")
    )


def render(row: Row, text: Text) -> str:
    """The conversation as text, in the checkpoint's own chat template, the answer between sentinels."""
    opening, closing = common.SENTINELS
    messages = []
    for i, (question, answer) in enumerate([*row.history, (row.question, opening + row.answer + closing)]):
        question = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [{"type": "image"}, question] if i == 0 else [question]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    before, _, after = text.tokenizer.apply_chat_template(messages, tokenize=False).partition(opening)
    # A template's space before the answer belongs to the answer: the prompt then ends where the template's own
    # generation prompt ends, and SentencePiece gives the answer's first word its usual piece.
    prompt = before.rstrip(" ")
    space = before[len(prompt) :]
    return prompt + opening + space + after.partition(closing)[0] + closing + text.tokenizer.eos_token


def refuse_tokens(row: Row, text: Text) -> None:
    """Raise ValueError where a text holds what the tokenizer would take for <image>, EOS or a sentinel."""
    for part in (row.question, row.answer, *(row.candidates or []), *(t for turn in row.history for t in turn)):
        for token in (IMAGE, *common.SENTINELS, *text.tokenizer.get_added_vocab()):
            if token in part:
                raise ValueError(f"the text contains {token!r}, which the model would read as a token; reword {part!r}")


def encode_row(row: Row, text: Text) -> tuple[list[int], list[int], list[int]]:
    """(prefix, input_ids, labels): everything up to the image's last placeholder, then the question and its answer.

    The tokenizer splits at the placeholder anyway, so the prefix is the same for every question of the image.
    """
    input_ids, labels = common.encode_supervised(text.tokenizer, render(row, text), keep_sentinels=text.keep_sentinels)
    if input_ids[: len(text.bos)] != text.bos:  # once, also where the chat template writes it
        input_ids, labels = text.bos + input_ids, [IGNORE] * len(text.bos) + labels
    cut = input_ids.index(text.image_id) + 1
    prefix = common.expand_placeholder(input_ids[:cut], text.image_id, [text.features])
    return prefix, input_ids[cut:], labels[cut:]


def prove_row(row: Row, text: Text, prefix: list[int], input_ids: list[int], labels: list[int]) -> None:
    """Raise ValueError unless exactly answer + EOS is learned and the placeholders equal the image's features."""
    learned = [label for label in labels if label != IGNORE]
    decoded = text.tokenizer.decode(learned, clean_up_tokenization_spaces=False).lstrip(" ")
    if decoded != row.answer + text.tokenizer.eos_token:
        raise ValueError(f"learned would be {decoded!r}, not {row.answer + text.tokenizer.eos_token!r}")
    if text.image_id in input_ids:
        raise ValueError(f"{IMAGE} after the image's own placeholder")
    common.check_placeholders(prefix, text.image_id, text.features)


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
                raise ValueError(f"{len(prefix) + len(input_ids)} tokens, more than --pack-tokens {args.pack_tokens}")
        except ValueError as error:
            problems.append(Problem(row.where, row.id, str(error)))
            continue
        tree = trees.setdefault(row.image if args.share_prefix else row.id, Prompt(prefix, [], [], media=row.image))
        assert tree.prefix == prefix, f"{row.where}: the questions of {row.image} begin differently"
        tree.branches.append((input_ids, labels))
        tree.ids.append(row.id)
    return list(trees.values()), problems


# ------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------


class LlavaMed(nn.Module):
    """LLaVA whose forward takes a packed row and returns (loss sum, learned tokens)."""

    def __init__(self, vlm: LlavaForConditionalGeneration, dtype: torch.dtype):
        super().__init__()
        self.vlm = vlm
        self.dtype = dtype
        self.image_id = common.image_token_id(vlm.config)

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, height, width) -> (images, features, width of the language model)."""
        inner, config = self.vlm.model, self.vlm.config
        layers = config.vision_feature_layer
        with self.autocast():
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.tower_trains):  # frozen: keep no activations
                states = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states
                chosen = [states[i] for i in ([layers] if isinstance(layers, int) else layers)]
                if config.vision_feature_select_strategy == "default":
                    chosen = [state[:, 1:] for state in chosen]  # drop the class token
            return inner.multi_modal_projector(torch.cat(chosen, dim=-1))

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
        return next(self.vlm.model.vision_tower.parameters()).requires_grad

    def hidden(self, input_ids, position_ids, mask, cache=None, media: dict | None = None) -> torch.Tensor:
        """Last hidden states (1, T, width) of tokens (1, T) under a mask (1, 1, T, keys); `media` of read_images."""
        with self.autocast():
            embeds = self.vlm.get_input_embeddings()(input_ids)  # (1, T, width)
            if media is not None:
                features = self.image_features(media["pixel_values"])
                common.check_placeholders(input_ids, self.image_id, features.shape[0] * features.shape[1])
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
        self.vlm.model.vision_tower.train(mode and self.tower_trains)  # no dropout in a frozen tower
        return self


def prepare(vlm: LlavaForConditionalGeneration, args) -> None:
    """Choose what is trained; whatever is, is float32, because bfloat16 loses small updates."""
    if args.tune == "full":
        common.train_only(vlm, r".*")
    else:
        common.train_only(vlm, PROJECTOR_PATTERN)
        common.add_lora(vlm, LORA_PATTERN, args.lora_r, args.lora_alpha, args.lora_dropout, args.rslora)
    for parameter in vlm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.grad_checkpoint:  # not reentrant: the inputs of a frozen base need no gradient
        vlm.gradient_checkpointing_enable({"use_reentrant": False})


def meta_model(folder: Path) -> LlavaForConditionalGeneration:
    """The model from its configuration alone, without weights."""
    read_config(folder)
    with torch.device("meta"):
        return LlavaForConditionalGeneration(AutoConfig.from_pretrained(folder))


def load_model(folder: Path, args, text: Text, dtype) -> LlavaMed:
    """The model with what is trained chosen, still on the CPU: runtime.place puts it on the device."""
    config = AutoConfig.from_pretrained(folder)
    vlm = runtime.open_model(LlavaForConditionalGeneration, folder, config, dtype)  # a missing weight is refused
    window = getattr(vlm.config.text_config, "sliding_window", None)
    if window is not None and window < args.pack_tokens:
        raise SystemExit(f"--pack-tokens {args.pack_tokens} is longer than the model's sliding window {window}")
    common.separate_pad_from_eos(text.tokenizer, vlm)
    prepare(vlm, args)
    if args.compile:
        vlm.model.language_model.compile(dynamic=True)
    return LlavaMed(vlm, dtype)


@torch.no_grad()
def verify_first_batch(model: LlavaMed, trees: list[Prompt], run) -> None:
    """Before step 0: the placeholders of the real first batch against the features of the real model."""
    for row in packed_rows(trees, run):
        features = model.image_features(row["pixel_values"])  # (images, features, width)
        common.check_placeholders(row["input_ids"], model.image_id, features.shape[0] * features.shape[1])
    print(f"image tokens: {features.shape[1]} per image, ID {model.image_id} — verified")


def measure(data: Path, name: str) -> tuple[int, int]:
    """(width, height) of an image, decoded completely."""
    return runtime.open_image(data, name).size


def score(prediction: str | None, row: Row) -> dict[str, bool]:
    """{"exact", "tolerant"}"""
    return common.score_answer(prediction, row.answer, row.question_type)


def answer_limit(row: Row, args) -> int:
    """The most tokens of a free answer."""
    return args.max_answer_tokens


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
    """The pixel_values (images, 3, height, width) of prompt trees, in the order of the row."""
    images = [runtime.open_image(data, prompt.media) for prompt in prompts]
    return {"pixel_values": text.processor(images, return_tensors="pt")["pixel_values"]}


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
