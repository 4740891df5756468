"""Fine-tune a LLaVA on conversations about brain MRI: its vision embeddings are replaced by 3D and 4D patch embeddings.

A conversation, one file DATA/{train,validation,test}/NAME.json in UMBRELLA's layout (paths are relative to DATA):

    {"task_type": "sex", "subject_ids": ["sub-07"], "images": [{"path": "sub-07_T1w.nii.gz", "modality": "T1"}],
     "conversations": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Male or female?"}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "The subject is female."}]}]}

or a question a line in DATA/train.jsonl (also val.jsonl, test.jsonl):

    {"volume": "sub-07_T1w.nii.gz", "modality": "T1", "question": "Male or female?", "answer": "It is female.",
     "question_type": "sex", "answer_candidates": ["male", "female"], "group": "sub-07"}

The model reads it in its own chat template, with a token for each patch of a volume; learned is the last answer:

    user        [T1 volume: 1,000 tokens] Male or female?
    assistant   The subject is female.

    make demo SCRIPT=umbrella_mri                                           # on a CPU, from nothing; or by hand:
    python demo.py umbrella_mri && python train_umbrella_mri.py --model runs/demo/umbrella_mri/model \\
        --data runs/demo/umbrella_mri/data --out runs/demo/umbrella_mri/run --modality T1:32x32x32:8x8x8 \\
        --modality rsfMRI:24x24x24x4:8x8x8x2 --lr 5e-3 --epochs 5 --questions-per-step 32 --pack-tokens 512
    python train_umbrella_mri.py --model LLAVA_FOLDER_OR_HUB_ID --data DATA --out RUN --check            # the proof
    python train_umbrella_mri.py --model LLAVA_FOLDER_OR_HUB_ID --data DATA --out RUN --lr 1e-3          # one GPU
    torchrun --standalone --nproc-per-node 4 train_umbrella_mri.py --model LLAVA_FOLDER_OR_HUB_ID --data DATA \\
        --out RUN --lr 1e-3

By default only the patch embeddings are trained, everything else stays frozen. What the demo must reach, and what each
figure means, is in README.md.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
EMBEDDING_PATTERN = r"patch_embed\..*"
# every projection of the language model and none of the vision tower, whose layers have q_proj and v_proj too
LORA_PATTERN = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
MODALITIES = ["T1:96x96x96:10x10x10", "rsfMRI:96x96x96x24:16x16x16x3"]  # UMBRELLA's own
# what a model is bound to: a saved one has it in its config.json, and it is the same in training and answering
VOLUME_SETTINGS = ["modality", "ragged", "resample", "fit_time", "normalise"]
# what a checkpoint is bound to: also which modalities were shown, and in which words labels were scored
OWN_SETTINGS = [*VOLUME_SETTINGS, "supervise", "embedded", "worded"]
RESERVED = dir(nn.ModuleDict)  # no names for modalities


class Modality(NamedTuple):
    """A kind of volume. Sizes are in voxels along x, y, z and, of a series, time."""

    name: str
    size: tuple[int, ...]
    patch: tuple[int, ...]
    channels: int

    @classmethod
    def read(cls, text: str) -> "Modality":
        """From NAME:SIZE:PATCH[:CHANNELS], such as T1:96x96x96:10x10x10. Raises ValueError."""
        found = re.fullmatch(r"([A-Za-z][\w-]*):(\d+(?:x\d+){2,3}):(\d+(?:x\d+){2,3})(?::(\d+))?", text)
        size, patch = (tuple(map(int, part.split("x"))) for part in (found[2], found[3])) if found else ((), ())
        if not found or len(size) != len(patch) or 0 in (*size, *patch, int(found[4] or 1)) or found[1] in RESERVED:
            raise ValueError(f"{text!r} is no NAME:SIZE:PATCH[:CHANNELS] with three or four sizes, as {MODALITIES[0]}")
        return cls(found[1], size, patch, int(found[4] or 1))

    def grid(self, ragged: str) -> tuple[int, ...]:
        """Patches along each axis. 96 voxels in patches of 10: 10 with "pad", 9 with "crop"."""
        whole = math.floor if ragged == "crop" else math.ceil
        return tuple(whole(s / p) for s, p in zip(self.size, self.patch, strict=True))

    def tokens(self, ragged: str) -> int:
        return math.prod(self.grid(ragged))

    def reach(self, ragged: str) -> tuple[int, ...]:
        """Voxels along each axis that the patches cover."""
        return tuple(g * p for g, p in zip(self.grid(ragged), self.patch, strict=True))


def parse_arguments(argv):
    tunings = {
        "embedding": "the patch embeddings alone",
        "embedding+lora": "and adapters in the language model",
        "full": "every parameter",
    }
    parser = runtime.shared_flags(__doc__, tunings, decode="both")
    add = parser.add_argument_group("volumes").add_argument
    add(
        "--modality",
        action="append",
        metavar="NAME:SIZE:PATCH[:CHANNELS]",
        help=f"a kind of volume, in voxels; repeat it for each (default: {' and '.join(MODALITIES)})",
    )
    add(
        "--ragged",
        choices=["pad", "crop", "error"],
        default="pad",
        help="where patches do not fill a size: pad with zeros or crop, both symmetrically (default: pad)",
    )
    yes_no = argparse.BooleanOptionalAction
    add("--resample", action=yes_no, default=False, help="bring other sizes to the declared one, trilinear")
    add("--fit-time", action=yes_no, default=False, help="of longer series the first frames, shorter ones end in zeros")
    add("--normalise", action=yes_no, default=True, help="z-score over the voxels that are not zero, which stay zero")
    add("--flip", action=yes_no, default=False, help="learn each training conversation mirrored left to right, too")
    add = parser.add_argument_group("conversations").add_argument
    add(
        "--supervise",
        choices=["last", "all"],
        default="last",
        help="answers of a training conversation that are learned",
    )
    add(
        "--labels",
        action="append",
        default=[],
        metavar="TASK=LABEL,LABEL,…",
        help="the labels of a task, one of which every answer names; repeat it for each (in data: answer_candidates)",
    )
    parser.set_defaults(embedded=[], worded={})
    args = runtime.parse_flags(parser, argv)
    if args.flip and args.eval_split == "train":
        parser.error("--flip with --eval-split train: mirrored conversations are to learn from, not to be asked")
    args.modality = args.modality or list(MODALITIES)
    try:
        modalities_of(args)
        args.task_labels = dict(read_labels(text) for text in args.labels)
    except ValueError as error:
        parser.error(str(error))
    return args


def modalities_of(args) -> dict[str, Modality]:
    """{name: modality}. Raises ValueError where one is declared wrongly or twice, or does not fit its patches."""
    found = [Modality.read(text) for text in args.modality]
    names = [modality.name for modality in found]
    if len(set(names)) < len(names):
        raise ValueError(f"--modality: {', '.join(names)}: a name twice")
    for m in found:
        if args.ragged == "error" and m.reach("pad") != m.size:
            raise ValueError(f"--ragged error: {m.name}'s {m.size} voxels do not fill patches of {m.patch}")
        if m.tokens(args.ragged) == 0:
            raise ValueError(f"--ragged crop: {m.name}'s patches of {m.patch} are larger than its {m.size} voxels")
    return dict(zip(names, found, strict=True))


def read_labels(text: str) -> tuple[str, list[str]]:
    """("sex", ["male", "female"]) of "sex=male,female"."""
    task, _, labels = text.partition("=")
    return task.strip(), proper_labels([label.strip() for label in labels.split(",")])


def proper_labels(labels: list[str]) -> list[str]:
    if len(labels) < 2 or len({plain(label) for label in labels} - {""}) < len(labels):
        raise ValueError(f"labels must be at least two, and differ: {labels}")
    if any(re.search(SENTENCE + r"|,\s|-\s*$", label) for label in labels):
        raise ValueError(f"a label must be a part of one sentence, without commas, and end in a word: {labels}")
    return labels


# ------------------------------------------------------------------------------------------------------------
# Data: files -> rows
# ------------------------------------------------------------------------------------------------------------


class Volume(NamedTuple):
    """What one <image> stands for: a file, or the frames of a series in the order of time."""

    modality: str
    files: tuple[str, ...]


@dataclass
class Row:
    """An assistant's turn: all that was said and shown before it is its prompt."""

    where: str  # "train/0007.json turn 3"
    split: str
    id: str
    volumes: list[Volume]  # in the order in which they are shown
    turns: list[dict]  # what comes before the answer, as the chat template reads it
    question: str  # the last of it, for whoever reads predictions.jsonl
    answer: str
    question_type: str  # the task
    labels: list[str]  # one of them the answer names; none where it is any text
    groups: list[str]  # the subjects
    label: str | None = None  # which
    candidates: list[str] | None = None  # an answer for each label, as training words it
    also_right: list[str] = field(default_factory=list)
    mirrored: bool = False

    @property
    def media(self) -> list[str]:
        return [name for volume in self.volumes for name in volume.files]

    @property
    def group(self) -> str:
        """For intervals, which resample subjects: the first."""
        return self.groups[0]


SPLITS = {"train": "train", "val": "validation", "test": "test"}  # split -> UMBRELLA's name for it
SUFFIXES = (".nii", ".nii.gz", ".npy", ".npz")
FIELDS = {"id", "volume", "modality", "images", "question", "answer", "question_type", "answer_candidates", "group"}
FIELDS |= {"task_id", "task_type", "subject_ids", "modalities", "conversations", "metadata"}  # UMBRELLA's


def read_data(data: Path, args) -> tuple[list[Row], list[Problem]]:
    """All rows of the folder, UMBRELLA's or canonical, and those that cannot be used."""
    folders = {split: data / name for split, name in SPLITS.items() if (data / name).is_dir()}
    published = any(is_json(path) for folder in folders.values() for path in folder.rglob("*"))  # or they hold volumes
    lines = [f"{split}.jsonl" for split in SPLITS if (data / f"{split}.jsonl").is_file()]
    if published and lines:
        raise SystemExit(f"--data {data}: {', '.join(lines)} beside UMBRELLA's folders; keep one of the two")
    if published and (data / "val").is_dir():
        raise SystemExit(f"--data {data}: val/ would not be read; UMBRELLA calls it validation, rename it")
    if published:
        read = (row for split, folder in folders.items() for row in read_folder(data, folder, split, args))
    else:
        read = (row for split, path in runtime.data_files(data).items() for row in read_file(data, path, split, args))
    rows, problems = runtime.choose_rows(read, args)
    unknown = args.task_labels.keys() - {row.question_type for row in rows}
    if rows and unknown:
        raise SystemExit(f"--labels {min(unknown)}=…: no conversation is of this task")
    args.worded = word_labels(rows, args.worded)
    if not args.eval_only:
        shown = {volume.modality for row in rows if row.split == "train" for volume in row.volumes}
        args.embedded = sorted(shown.union(args.embedded))
    for row in rows:
        strange = [volume.modality for volume in row.volumes if volume.modality not in args.embedded]
        if strange:
            text = f"training has not shown {strange[0]}, whose embedding is as it was drawn; leave the row out"
            problems.append(Problem(row.where, row.id, text))
    return rows, problems


def read_folder(data: Path, folder: Path, split: str, args):
    """UMBRELLA's layout: a conversation a file."""
    paths = sorted(path for path in folder.rglob("*") if is_json(path))
    if not paths:
        yield Problem(folder.name, None, "the folder holds no .json files")
    for path in paths:
        where = str(path.relative_to(data))
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(entry, dict):
                raise ValueError("a list or a value, not an object")
        except (OSError, ValueError) as error:
            yield Problem(where, None, f"not a JSON object ({error}); mend the file")
            continue
        yield from rows_of(data, where, {"id": where[: -len(".json")], **entry}, split, args)


def is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def read_file(data: Path, path: Path, split: str | None, args):
    """A question, or a conversation, a line."""
    if path.suffix != ".jsonl":
        yield Problem(path.name, None, "not JSON lines; write an object a line into a .jsonl file")
        return
    entries, problems = runtime.read_jsonl(path)
    yield from problems
    for where, entry in entries:
        yield from rows_of(data, where, entry, split, args)


def rows_of(data: Path, where: str, entry: dict, split: str | None, args):
    """Its rows, and with --flip the mirrored ones; or the Problem it has."""
    try:
        rows = list(conversation_rows(data, where, entry, split, args))
    except (TypeError, AttributeError) as error:  # a number for a list, a list for a text, …
        yield Problem(where, None, f"not as conversations are written ({error}); mend the file")
        return
    except ValueError as error:
        yield Problem(where, entry.get("id"), str(error))
        return
    for row in rows:
        yield row
        if args.flip and row.split == "train":
            yield replace(row, id=f"{row.id} mirrored", mirrored=True)


def conversation_rows(data: Path, where: str, entry: dict, split: str | None, args):
    """A row for the last answer of a conversation; with --supervise all, in training, for each."""
    wrong = runtime.misspelt(entry, FIELDS)
    if wrong:
        raise ValueError(wrong)
    groups = subjects_of(entry)
    split = split or runtime.split_of(groups[0])
    turns, volumes = read_turns(data, entry)
    known = modalities_of(args)
    unknown = [volume.modality for volume in volumes if volume.modality not in known]
    if unknown:
        text = f"modality {unknown[0]!r} is not declared, only {', '.join(known)}"
        raise ValueError(f"{text}; declare its size and patch with --modality {unknown[0]}:96x96x96:10x10x10")
    task = entry.get("task_type") or entry.get("question_type")
    declared = labels_of(entry, task, args)
    name = str(where if entry.get("id") in (None, "") else entry["id"])
    last = len(turns) - 1
    for i in range(len(turns)):
        if turns[i]["role"] != "assistant" or (i < last and (split != "train" or args.supervise == "last")):
            continue
        before = turns[:i]
        shown = [part for turn in before for part in turn["content"] if part["type"] == "image"]
        if not shown and i < last:  # a greeting
            continue
        if not shown:
            raise ValueError(f"nothing is shown before the answer of turn {i}")
        question = " ".join(part["text"] for part in before[-1]["content"] if part["type"] == "text")
        answer = " ".join(part["text"] for part in turns[i]["content"])
        fields = {"question": question, "answer": answer, "question_type": task, "answer_candidates": declared}
        if i < last:  # an acknowledgement, say: a task of its own, without labels
            fields |= {"question_type": f"{task or 'conversation'} turn {i}", "answer_candidates": None}
        fields = common.question_fields(fields)
        inferred = fields.pop("candidates")
        labels = proper_labels(inferred) if declared and i == last else []
        yield Row(
            where=where if i == last else f"{where} turn {i}",
            split=split,
            id=name if i == last else f"{name} turn {i}",
            volumes=volumes[: len(shown)],
            turns=before,
            labels=labels,
            label=true_label(fields["answer"], labels) if labels else None,
            groups=groups,
            **fields,
        )


def subjects_of(entry: dict) -> list[str]:
    groups = entry.get("subject_ids") or [entry.get("group")]
    if groups == [None]:
        raise ValueError("no subject_ids and no group: the scans of one subject must not be in two splits, so name it")
    if not isinstance(groups, list) or not all(type(group) in (str, int) and group != "" for group in groups):
        raise ValueError(f"subject_ids must be a list of names (or group one name): {groups!r}")
    return list(dict.fromkeys(map(str, groups)))


def labels_of(entry: dict, task: str | None, args) -> list[str] | None:
    """The labels declared for a conversation's task, in the data or by --labels; None where its answer is any text."""
    here, given = entry.get("answer_candidates"), args.task_labels.get(task)
    if here and given and {plain(label) for label in here} != {plain(label) for label in given}:
        raise ValueError(f"answer_candidates {here} are not those of --labels; leave one of the two out")
    return here or given


def read_turns(data: Path, entry: dict) -> tuple[list[dict], list[Volume]]:
    """The turns as the chat template reads them, and what each of their images is. Raises ValueError."""
    images = entry.get("images", [])
    if "conversations" not in entry:  # a question with its volume or volumes
        images = [entry] if "volume" in entry else images
        asked = [*({"type": "image"} for _ in images), {"type": "text", "text": entry.get("question")}]
        answered = [{"type": "text", "text": "" if entry.get("answer") is None else str(entry["answer"])}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    else:
        turns = entry["conversations"]
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise ValueError(f"images must be a list of objects with path and modality: {images!r}")
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
    first = 1 if roles[:1] == ["system"] else 0
    if len(roles) == first or roles[first:] != ["user", "assistant"] * ((len(roles) - first) // 2):
        raise ValueError(f"turns must alternate user, assistant, after a system turn if any; there are {roles}")
    found, paths = [], []
    for role, turn in zip(roles, turns, strict=True):
        content = turn.get("content")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kinds = [part.get("type") if isinstance(part, dict) else None for part in content or []]
        if not kinds or not set(kinds) <= {"text", "image"} or (role != "user" and "image" in kinds):
            raise ValueError(f"the {role}'s turn holds {kinds}, not text (or of the user, images)")
        texts = [part.get("text") for part in content if part["type"] == "text"]
        if not all(isinstance(text, str) and text.strip() for text in texts) or (role == "user" and not texts):
            raise ValueError(f"the {role}'s text is empty: {texts}")
        "".join(texts).encode()  # or it holds half a character, of which a tokenizer would make nothing
        paths += [(part.get("image_path"), part.get("modality")) for part in content if part["type"] == "image"]
        parts = [{"type": p["type"]} | ({"text": p["text"].strip()} if "text" in p else {}) for p in content]
        found.append({"role": role, "content": parts})
    named = [(image.get("path", image.get("volume")), image.get("modality")) for image in images]
    pairs = [pair for shown, told in zip(paths, named, strict=False) for pair in zip(shown, told, strict=True)]
    if len(paths) != len(named) or any(shown not in (None, told) for shown, told in pairs):
        raise ValueError(f"the conversation shows {paths}, but images names {named}")
    return found, [read_volume_entry(data, image) for image in images]


def read_volume_entry(data: Path, image: dict) -> Volume:
    path, modality = image.get("path", image.get("volume")), image.get("modality")
    if not isinstance(path, str) or not path or not isinstance(modality, str):
        raise ValueError(f"a volume needs a path and a modality: {path!r}, {modality!r}")
    return Volume(modality, find_files(data, path))


def find_files(data: Path, path: str) -> tuple[str, ...]:
    """The path itself, or the frames of the folder that it is: frame_2 before frame_10."""
    files = [path]
    with suppress(OSError):  # a name too long for any file
        if (data / path).is_dir():
            names = [p.name for p in (data / path).iterdir() if not p.name.startswith(".")]
            files = [f"{path}/{name}" for name in sorted(names, key=natural)]
    wrong = [name for name in files if not name.endswith(SUFFIXES)]
    if wrong or not files:
        raise ValueError(f"{wrong[0] if wrong else path + ', an empty folder,'} is none of {', '.join(SUFFIXES)}")
    numbers = [[int(n) for n in re.findall(r"\d+", Path(name).name)] for name in files]
    counting = [set(column) for column in zip(*numbers, strict=False) if len(set(column)) == len(files)]
    if len(files) > 1 and any(max(column) - min(column) >= len(files) for column in counting):
        raise ValueError(f"{path}: of its {len(files)} frames some are missing, {files[0]} to {files[-1]}")
    return tuple(files)


def natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# ------------------------------------------------------------------------------------------------------------
# Data: labels
# ------------------------------------------------------------------------------------------------------------

SENTENCE = r"(?<=[.;!?])\s+|\n+"
CONCLUSION = r"\banswer(?: is\b|:)|\b(?:therefore|in conclusion)\b"
CLAUSE = r",\s|(?=\bbut\b)|(?=\band (?:the \w+ )?(?:is|are|was|were)\b)"
VERB = r"is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|may|might|must"
DENIAL = r"not?|non|none|never|neither|nor|without|cannot|nothing|nobody|hardly|than|unlike(?:ly)?|improbable|except"
DENIAL += (
    r"|absen(?:t|ce)|lack(?:s|ing)?|fail(?:s|ed)?|negative|unclear|uncertain|wrong|incorrect|false|opposite|beyond"
)
DENIAL += r"|against|doubt\w*|exclud\w+|rul\w+ out|less likely|(?:instead|free|risk|history) of|far from|opposed to"
DENIAL += rf"|cant|wont|(?:{VERB})nt"  # can't, won't, isn't
# behind a label: "… (or …) is very unlikely"; not "larger than before", nor "male, not female" where a label follows
DENIED_AFTER = rf"(?: (?:or|and) _+)*(?: (?:{VERB}|be|been|seems|appears|very|\w+ly))* (?!than |without )(?:{DENIAL})"
DENIED_AFTER += r"(?!\S)(?!.*_)"


def read_label(text: str | None, labels: list[str]) -> str | None:
    """The one label that a text says; None where it says none, or several and no clause of it is the answer.

    Rules of words cannot know every sentence. These read rather none than a wrong one; it counts as wrong, too:
    - Labels are whole words, a longer one first: "male" is not in "female", nor "dementia" said by "no dementia" where
      that is a label, nor "right" by "right-handed". Where yes or no are labels, the answer must begin with one.
    - A denied label is not said: "not male but female", "left rather than right", "dementia is not present", "neither
      left, right nor central". Nor is one in a question.
    - Of several the answer clause decides: what follows "the answer is", "therefore" and the like, or an opening
      sentence that is a label alone, "Left. …".
    """
    known = {plain(label): label for label in labels}
    sentences = [s for s in re.split(SENTENCE, text or "") if s and not s.rstrip().endswith("?")]
    if known.keys() & {"yes", "no"}:
        opening = plain(re.sub(r"^.*\banswer(?: is\b|:)", "", sentences[0], flags=re.I)) if sentences else ""
        longest = sorted(known, key=len, reverse=True)
        return next((known[words] for words in longest if f"{opening} ".startswith(f"{words} ")), None)
    said = set().union(*(said_labels(sentence, known) for sentence in sentences))
    if len(said) > 1:
        concluded = re.split(CONCLUSION, text, flags=re.I)[1:]
        answer = re.split(SENTENCE, concluded[-1])[0] if concluded else sentences[0]
        said = said_labels(answer, known) if concluded or plain(answer) in known else said
    return said.pop() if len(said) == 1 else None


def plain(text: str) -> str:
    """Text as labels are compared: "Right-handed" is a word of its own."""
    return common.normalise(re.sub(r"(?<=[^\W\d])-(?=[^\W\d])", "", text))


def find_labels(text: str, known: dict[str, str]) -> tuple[list[tuple[int, int, str]], str]:
    """(start, end, label) of every label in a plain text, longer ones first, and the text with these blotted out."""
    found = []
    for words in sorted(known, key=len, reverse=True):
        found += [(*match.span(), known[words]) for match in re.finditer(rf"(?<!\S){re.escape(words)}(?!\S)", text)]
        text = re.sub(rf"(?<!\S){re.escape(words)}(?!\S)", lambda match: "_" * len(match[0]), text)
    return found, text


def said_labels(sentence: str, known: dict[str, str]) -> set[str]:
    """The labels that a sentence names and does not deny."""
    said, denied = set(), False
    for clause in re.split(CLAUSE, re.sub(r"^\s*(?:yes|no),", "", sentence, flags=re.I), flags=re.I):
        found, rest = find_labels(plain(clause), known)
        denial = re.search(rf"(?<!\S)(?:{DENIAL})(?!\S)", rest)
        goes_on = re.match(r"(?:(?:or|and|nor) )?_", rest)  # "no polyp, lesion or …": the denial holds for the list
        for start, end, label in found:
            before = (denied and goes_on) or (denial and denial.start() < start)
            after = re.match(DENIED_AFTER, rest[end:])
            said |= set() if before or after else {label}
        denied = denied or bool(denial)
    return said


def true_label(answer: str, labels: list[str]) -> str:
    """The label that a true answer names: read as any answer, and it must name no other, whatever it says of it."""
    label = read_label(answer, labels)
    known = {plain(x): x for x in labels}
    named = {x for _, _, x in find_labels(plain(answer), known)[0]}
    if label is None or (len(named) > 1 and not known.keys() & {"yes", "no"}):
        text = f"the answer {answer!r} does not name just one of {', '.join(labels)}"
        raise ValueError(f"{text}; reword it, or correct answer_candidates or --labels")
    return label


def word_labels(rows: list[Row], worded: dict[str, dict]) -> dict[str, dict]:
    """Give rows with labels their candidates, an answer in the words of training for each label; {task: {label: …}}.

    That is the most frequent training answer of the task whose words, but for the label, occur with every label; where
    there is none, each label's own most frequent answer, or the label alone where no answer occurs twice. `worded` has
    those of an earlier run.
    """
    tasks = defaultdict(list)
    for row in rows:
        if row.labels:
            tasks[(row.question_type, frozenset(row.labels))].append(row)
    found = {}
    for (task, names), part in tasks.items():
        labels = part[0].labels  # in this order for all, or they could not be compared
        answers = [(row.label, row.answer) for row in part if row.split == "train"]
        frames = Counter(frame for label, answer in answers if (frame := without(label, answer)))
        seen = {(without(label, answer), label) for label, answer in answers}
        shared = [frame for frame, _ in frames.most_common() if all((frame, label) in seen for label in labels)]
        own = {label: Counter(answer for said, answer in answers if said == label) for label in labels}
        words = {x: shared[0][0] + x + shared[0][1] for x in labels} if shared else {}
        often = {x: [answer for answer, n in own[x].most_common(1) if n > 1] for x in labels}
        words = words or {x: often[x][0] if often[x] else x for x in labels}
        name = " | ".join([task, *sorted(names)])
        found[name] = words = worded.get(name, words)
        print(f"{task}: scored are {', '.join(map(repr, words.values()))}; true answers", end="")
        for split in SPLITS:
            counts = Counter(row.label for row in part if row.split == split)
            print(f", {split}: " + ", ".join(f"{counts[label]} {label}" for label in words), end="")
        print()
        for row in part:
            row.labels, row.candidates = list(words), list(words.values())
            row.also_right = [x for x in dict.fromkeys([words[row.label], row.label]) if x != row.answer]
    return found


def without(label: str, answer: str) -> tuple[str, str] | None:
    """What stands before and after the label in an answer; None where it is not there exactly once."""
    parts = re.split(rf"(?<!\w){re.escape(label)}(?!\w)", answer)
    return tuple(parts) if len(parts) == 2 else None


# ------------------------------------------------------------------------------------------------------------
# Data: volumes
# ------------------------------------------------------------------------------------------------------------


def measure(data: Path, name: str) -> list[int]:
    """The shape of a volume along x, y, z …, read completely."""
    return list(read_volume(data, name).shape)


def read_volume(data: Path, name: str, largest: int = 2**30) -> np.ndarray:
    """The voxels of a file, float32, of shape (x, y, z[, time][, channels]) with x to the right, y to the front, z up.

    NIfTI axes are swapped and mirrored into this order (RAS, the closest: nothing is interpolated); .npy and .npz are
    taken as being in it. Raises ValueError naming the file.
    """
    path = runtime.inside(data, name)
    try:
        voxels = read_array(path, largest) if path.suffix in (".npy", ".npz") else read_nifti(path, largest)
        if voxels.ndim > 3 and voxels.shape[3] == 1:  # NIfTI writers like to add a time of one frame
            alone = math.prod(voxels.shape[3:]) == 1
            voxels = voxels.reshape(voxels.shape[:3] + (() if alone else voxels.shape[4:]))
        if voxels.ndim not in (3, 4, 5):
            raise ValueError(f"{voxels.ndim} axes {voxels.shape}, not three to five")
        bad = int((~np.isfinite(voxels)).sum())
        if bad:
            raise ValueError(f"{bad} of its {voxels.size} voxels are NaN or infinite; repair it or leave the row out")
        tissue = voxels[voxels != 0]
        if not tissue.size or tissue.min() == tissue.max():
            raise ValueError("it is empty: all its voxels that are not zero are the same, or there are none")
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    return voxels


def read_array(path: Path, largest: int) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            if len(found.files) != 1:
                raise ValueError(f"{len(found.files)} arrays, not one: {', '.join(found.files)}")
            found = found[found.files[0]]
    except Exception as error:  # a damaged file makes it raise anything
        raise ValueError(str(error) or type(error).__name__) from None
    refuse_kind(found.dtype, found.size, largest)
    return found.astype(np.float32)


def refuse_kind(kind: np.dtype, size: int, largest: int) -> None:
    if kind.kind not in "biuf":
        raise ValueError(f"its voxels are no real numbers but {kind}")
    if size > largest:
        raise ValueError(f"{size} voxels, more than {largest}; resample it, or cut it")


def read_nifti(path: Path, largest: int) -> np.ndarray:
    try:
        import nibabel
    except ImportError:
        raise ValueError("NIfTI needs nibabel: pip install nibabel, or convert the volumes to .npy (RAS)") from None
    try:
        image = nibabel.load(path)
        codes = int(image.header["sform_code"]), int(image.header["qform_code"])
        kind, size = image.get_data_dtype(), math.prod(image.shape)
        if codes != (0, 0) and kind.kind in "biuf" and size <= largest:
            return nibabel.as_closest_canonical(image).get_fdata(dtype=np.float32, caching="unchanged")
    except Exception as error:  # a damaged file makes it raise anything
        raise ValueError(f"no whole NIfTI file: {error or type(error).__name__}") from None
    refuse_kind(kind, size, largest)
    raise ValueError("its header says no orientation (sform and qform code 0): left and right could be swapped")


def check_shape(volume: Volume, modality: Modality, measured: dict, args) -> None:
    """Raise ValueError, naming the file, where a volume does not have its modality's shape and no flag says it may."""
    shapes = [tuple(measured[name]) for name in volume.files]
    name, shape = volume.files[0], shapes[0]
    if len(set(shapes)) > 1:
        other = next(i for i, s in enumerate(shapes) if s != shape)
        raise ValueError(f"{name} is {shape}, {volume.files[other]} {shapes[other]}; frames must be alike")
    if len(shapes) > 1 and len(modality.size) == 3:
        raise ValueError(
            f"{name} and {len(shapes) - 1} more files, but a {modality.name} is no series; join them into one"
        )
    if len(shapes) > 1:
        shape = (*shape[:3], len(shapes), *shape[3:])
    axes = len(modality.size) + (modality.channels > 1)
    wanted = (*modality.size, *([modality.channels] if modality.channels > 1 else []))
    if len(shape) != axes or (modality.channels > 1 and shape[-1] != modality.channels):
        raise ValueError(f"{name} is {shape}, {modality.name} {wanted}; is it of another modality?")
    if shape[:3] != modality.size[:3] and not args.resample:
        raise ValueError(
            f"{name} is {shape[:3]} voxels, {modality.name} {modality.size[:3]}; --resample brings it there"
        )
    if len(modality.size) == 4 and shape[3] != modality.size[3] and not args.fit_time:
        text = f"{name} has {shape[3]} frames, {modality.name} {modality.size[3]}"
        raise ValueError(f"{text}; --fit-time takes the first, or adds empty ones")


def load_volume(data: Path, volume: Volume, modality: Modality, args, mirrored: bool) -> torch.Tensor:
    """(channels, x, y, z[, time]) of the modality's size, as the embedding takes it."""
    frames = [torch.from_numpy(np.ascontiguousarray(read_volume(data, name))) for name in volume.files]
    voxels = frames[0]
    if len(frames) > 1:
        voxels = torch.stack(frames, dim=3)
    voxels = voxels.movedim(-1, 0) if modality.channels > 1 else voxels.unsqueeze(0)  # (channels, x, y, z[, time])
    if len(modality.size) == 4:
        voxels = fit_time(voxels, modality.size[3])
    if voxels.shape[1:4] != modality.size[:3]:
        voxels = resample(voxels, modality.size[:3])
    if mirrored:
        voxels = voxels.flip(1)
    return normalise(voxels) if args.normalise else voxels


def fit_time(voxels: torch.Tensor, frames: int) -> torch.Tensor:
    """(channels, x, y, z, any) -> (channels, x, y, z, frames): the first ones, or zeros behind the last."""
    return F.pad(voxels[..., :frames], (0, max(0, frames - voxels.shape[-1])))


def resample(voxels: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """(channels, x, y, z[, time]) -> the same with x, y, z of `size`, trilinear, each axis stretched to its own."""
    channels, shape, rest = voxels.shape[0], voxels.shape[1:4], voxels.shape[4:]
    images = voxels.reshape(channels, *shape, -1).movedim(-1, 1).reshape(1, -1, *shape)  # (1, channels * time, x, y, z)
    found = F.interpolate(images, size=tuple(size), mode="trilinear", align_corners=False)
    return found.reshape(channels, -1, *size).movedim(1, -1).reshape(channels, *size, *rest)


def normalise(voxels: torch.Tensor) -> torch.Tensor:
    """Each channel with mean 0 and standard deviation 1 over its voxels that are not zero; those stay zero."""
    found = torch.zeros_like(voxels)
    for channel, to in zip(voxels, found, strict=True):
        tissue = channel != 0
        values = channel[tissue]
        if len(values):
            to[tissue] = (values - values.mean()) / values.std(correction=0).clamp(min=1e-6)
    return found


# ------------------------------------------------------------------------------------------------------------
# Data: rows -> prompt trees
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """What turns a row into tokens: read from the checkpoint's folder, no weights needed."""

    tokenizer: object
    image_id: int | None  # None where config.json has it wrong
    modalities: dict[str, Modality]
    settings: object  # the flags
    keep_sentinels: bool
    report: dict  # for check.json and results.json: what was found in the checkpoint's files, how volumes are read
    processor: None = None  # of images: there are none
    measured: dict = field(default_factory=dict)  # file -> shape, once all are opened
    branches: dict = field(default_factory=dict)  # what candidate_branches has encoded

    @property
    def media_ids(self) -> list[int]:
        return [self.image_id]

    def tokens(self, volume: Volume) -> int:
        return self.modalities[volume.modality].tokens(self.settings.ragged)


def load_text(folder: Path, args) -> tuple[Text, list[Problem]]:
    """Tokenizer and modalities, and the faults of the checkpoint's own files."""
    config = read_config(folder)
    adopt_volumes(folder, config, args)
    modalities = modalities_of(args)
    tokenizer = runtime.tokenizer(folder)
    problems, image_id = [], None
    try:
        common.register_placeholder(tokenizer, IMAGE, common.image_token_id(config))
        image_id = common.single_token_id(tokenizer, IMAGE)
    except ValueError as error:
        problems.append(Problem("config.json", None, f"{error}; copy image_token_index from the original config.json"))
    try:
        pad_line = f"{folder / 'tokenizer_config.json'}: {common.separate_pad_from_eos(tokenizer)}"
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise SystemExit(f"--model {folder}: {error}; copy the original checkpoint's tokenizer files") from None
    if rendered.count(IMAGE) != 1:
        raise SystemExit(f"--model {folder}: the chat template does not write {IMAGE} for an image but {rendered!r}")
    print(pad_line)
    for m in modalities.values():
        print(describe(m, args.ragged))
    if args.flip:
        print("--flip: each training conversation is learned mirrored, too: left and right in an answer become wrong")
    report = {
        "image_token": image_id,
        "pad": pad_line,
        "tokens": {n: m.tokens(args.ragged) for n, m in modalities.items()},
    }
    report |= {name: getattr(args, name) for name in (*VOLUME_SETTINGS, "supervise", "flip")}
    return Text(tokenizer, image_id, modalities, args, args.sentinels == "keep", report), problems


def describe(m: Modality, ragged: str) -> str:
    """A line on a modality's patches; with the share of its voxels that cropping loses."""
    size, patch, grid = (" x ".join(map(str, numbers)) for numbers in (m.size, m.patch, m.grid(ragged)))
    line = f"{m.name}: {size} voxels in patches of {patch}: {grid} = {m.tokens(ragged):,} tokens a volume"
    covered = math.prod(m.reach(ragged)) / math.prod(m.size)
    return line + (f"; cropped, {1 - covered:.1%} of the voxels are lost" if covered < 1 else "")


def adopt_volumes(folder: Path, config, args) -> None:
    """Take from a model that this script saved how its volumes were read: its embeddings were learned from that."""
    saved = dict(getattr(config, "volumes", None) or {})
    args.embedded = sorted({*args.embedded, *saved.pop("embedded", [])})
    for name, value in saved.items():
        if getattr(args, name) != value:
            print(f"{name} {value} (from {folder / 'config.json'})")
            setattr(args, name, value)


def render(row: Row, text: Text) -> str:
    """The conversation as text, in the checkpoint's own chat template, the answer between sentinels."""
    opening, closing = common.SENTINELS
    answer = {"role": "assistant", "content": [{"type": "text", "text": opening + row.answer + closing}]}
    before, _, after = text.tokenizer.apply_chat_template([*row.turns, answer], tokenize=False).partition(opening)
    return before + opening + after.partition(closing)[0] + closing + text.tokenizer.eos_token


def refuse_tokens(row: Row, text: Text) -> None:
    """Raise ValueError where a text holds what the tokenizer would take for <image>, EOS or a sentinel."""
    said = [part["text"] for turn in row.turns for part in turn["content"] if part["type"] == "text"]
    for part in (*said, row.answer, *row.labels):
        for token in (IMAGE, *common.SENTINELS, *text.tokenizer.get_added_vocab()):
            if token in part:
                raise ValueError(f"the text contains {token!r}, which the model would read as a token; reword {part!r}")


def encode_row(row: Row, text: Text) -> tuple[list[int], list[int], list[int]]:
    """(prefix, input_ids, labels): everything up to the last volume's last placeholder, then question and answer."""
    input_ids, labels = common.encode_supervised(text.tokenizer, render(row, text), keep_sentinels=text.keep_sentinels)
    cut = len(input_ids) - input_ids[::-1].index(text.image_id)
    counts = [text.tokens(volume) for volume in row.volumes]
    prefix = common.expand_placeholder(input_ids[:cut], text.image_id, counts)
    return prefix, input_ids[cut:], labels[cut:]


def prove_row(row: Row, text: Text, prefix: list[int], input_ids: list[int], labels: list[int]) -> None:
    """Raise ValueError unless exactly answer + EOS is learned and the placeholders equal the volumes' patches."""
    learned = [label for label in labels if label != IGNORE]
    decoded = text.tokenizer.decode(learned, clean_up_tokenization_spaces=False)
    if decoded != row.answer + text.tokenizer.eos_token:
        raise ValueError(f"learned would be {decoded!r}, not {row.answer + text.tokenizer.eos_token!r}")
    if text.image_id in input_ids:
        raise ValueError(f"{IMAGE} after the last volume's own placeholder")
    common.check_placeholders(prefix, text.image_id, sum(map(text.tokens, row.volumes)))


def build_prompts(rows: list[Row], text: Text, args) -> tuple[list[Prompt], list[Problem]]:
    """A tree for all questions that begin alike, with the same volumes (or for each), in order of appearance."""
    trees: dict[object, Prompt] = {}
    problems = []
    for row in rows:
        try:
            refuse_tokens(row, text)
            for volume in row.volumes:
                check_shape(volume, text.modalities[volume.modality], text.measured, args)
            if text.image_id is None:  # the checkpoint's fault, already listed
                continue
            prefix, input_ids, labels = encode_row(row, text)
            prove_row(row, text, prefix, input_ids, labels)
            if len(prefix) + len(input_ids) > args.pack_tokens:
                needed = f"{len(prefix) + len(input_ids)} tokens, {prefix.count(text.image_id)} of them its volumes'"
                raise ValueError(
                    f"{needed}, more than --pack-tokens {args.pack_tokens}; raise it, or enlarge the patches"
                )
        except ValueError as error:
            problems.append(Problem(row.where, row.id, str(error)))
            continue
        media = {"volumes": row.volumes, "mirrored": row.mirrored}
        name = (tuple(prefix), *row.volumes, row.mirrored) if args.share_prefix else row.id
        tree = trees.setdefault(name, Prompt(prefix, [], [], media))
        tree.branches.append((input_ids, labels))
        tree.ids.append(row.id)
    return list(trees.values()), problems


# ------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Volumes of one modality -> a token for each patch: one projection of its voxels, and a learned position.

    Tokens come in the order of the grid, its last axis fastest: with 9 x 9 x 9 patches the patch (i, j, k) is token
    81 i + 9 j + k; of a series (i, j, k, t) time is the last. Within a patch voxels are in the same order, channels
    first. Where patches do not fill the size, zeros stand around it ("pad"), or its rim is left out ("crop"), the
    odd voxel at the end.
    """

    def __init__(self, modality: Modality, ragged: str, width: int):
        super().__init__()
        self.modality, self.grid = modality, modality.grid(ragged)
        around = [r - s for r, s in zip(modality.reach(ragged), modality.size, strict=True)]  # negative: cropped
        halves = [(int(a / 2), a - int(a / 2)) for a in around]
        self.around = [n for pair in reversed(halves) for n in pair]  # as F.pad wants it: the last axis first
        self.projection = nn.Linear(modality.channels * math.prod(modality.patch), width)
        self.position = nn.Embedding(math.prod(self.grid), width)
        nn.init.trunc_normal_(self.position.weight, std=0.02)

    def patches(self, volumes: torch.Tensor) -> torch.Tensor:
        """(n, channels, x, y, z[, time]) -> (n, tokens, voxels of a patch)."""
        volumes = F.pad(volumes, self.around)
        split = [n for pair in zip(self.grid, self.modality.patch, strict=True) for n in pair]
        volumes = volumes.reshape(*volumes.shape[:2], *split)  # (n, channels, 9, 10, 9, 10, 9, 10)
        last = volumes.ndim
        volumes = volumes.permute(0, *range(2, last, 2), 1, *range(3, last, 2))  # (n, 9, 9, 9, channels, 10, 10, 10)
        return volumes.reshape(len(volumes), math.prod(self.grid), -1)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:  # -> (n, tokens, width of the vision tower)
        return self.projection(self.patches(volumes)) + self.position.weight


class Embedded(nn.Module):
    """In the place of the tower's own embeddings: what it is given are patch embeddings already."""

    def forward(self, tokens: torch.Tensor, **_) -> torch.Tensor:
        return tokens


class Umbrella(nn.Module):
    """LLaVA whose forward takes a packed row with volumes and returns (loss sum, learned tokens)."""

    def __init__(self, vlm: LlavaForConditionalGeneration, dtype: torch.dtype):
        super().__init__()
        self.vlm = vlm
        self.dtype = dtype
        self.image_id = common.image_token_id(vlm.config)

    def volume_features(self, media: dict) -> torch.Tensor:
        """All volumes of a row -> (tokens, width of the language model), in the order in which the row shows them."""
        inner, layers = self.vlm.model, self.vlm.config.vision_feature_layer
        found = {}
        with self.autocast():
            for name in dict.fromkeys(media["modalities"]):  # the tower reads all volumes of a modality at once
                tokens = self.vlm.patch_embed[name](media[f"volumes of {name}"])  # (n, tokens, width of the tower)
                tokens = tokens.to(self.dtype)  # the positions, which are trained, are float32
                states = inner.vision_tower(tokens, output_hidden_states=True).hidden_states
                chosen = [states[i] for i in ([layers] if isinstance(layers, int) else layers)]
                # all tokens, also where the configuration drops the first: CLIP's class token, which is not embedded
                found[name] = iter(inner.multi_modal_projector(torch.cat(chosen, dim=-1)))
        return torch.cat([next(found[name]) for name in media["modalities"]])

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

    def hidden(self, input_ids, position_ids, mask, cache=None, media: dict | None = None) -> torch.Tensor:
        """Last hidden states (1, T, width) of tokens (1, T) under a mask (1, 1, T, keys); `media` of read_images."""
        with self.autocast():
            embeds = self.vlm.get_input_embeddings()(input_ids)  # (1, T, width)
            if media is not None:
                features = self.volume_features(media)
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


def read_config(folder: Path):
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if found != "llava":
        raise SystemExit(f"--model {folder}: model_type {found!r}, not 'llava'; use a LLaVA in transformers' format")
    config = AutoConfig.from_pretrained(folder)
    if config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise SystemExit(f"--model {folder}: a {config.vision_config.model_type} tower, not CLIP's or SigLIP's")
    return config


def replace_embeddings(vlm: LlavaForConditionalGeneration, args) -> None:
    """Put patch embeddings of every modality, newly drawn, into the place of the tower's own."""
    vlm.model.vision_tower.embeddings = Embedded()
    width = vlm.config.vision_config.hidden_size  # 1152 for SigLIP so400m
    vlm.patch_embed = nn.ModuleDict({n: PatchEmbed(m, args.ragged, width) for n, m in modalities_of(args).items()})
    vlm.config.volumes = {name: getattr(args, name) for name in (*VOLUME_SETTINGS, "embedded")}


def prepare(vlm: LlavaForConditionalGeneration, args) -> None:
    """Choose what is trained; whatever is, is float32, because bfloat16 loses small updates."""
    common.train_only(vlm, EMBEDDING_PATTERN if args.tune != "full" else rf"(?!{unread(vlm)}).*")
    if args.tune == "embedding+lora":
        common.add_lora(vlm, LORA_PATTERN, args.lora_r, args.lora_alpha, args.lora_dropout, args.rslora)
    for parameter in vlm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.grad_checkpoint:  # not reentrant: gradients reach the embedding through a base that needs none
        vlm.gradient_checkpointing_enable({"use_reentrant": False})


def unread(vlm: LlavaForConditionalGeneration) -> str:
    """A pattern of the tower's parts behind the last layer that features are taken from: nothing can train them."""
    layers = vlm.config.vision_feature_layer
    depth = vlm.config.vision_config.num_hidden_layers
    read = max(i % (depth + 1) for i in ([layers] if isinstance(layers, int) else layers))  # -1: all, -2: all but one
    behind = "|".join(rf"encoder\.layers\.{i}\." for i in range(read, depth))
    return rf"model\.vision_tower\.(post_layernorm|head\.{'|' + behind if behind else ''})"


def meta_model(folder: Path, args) -> LlavaForConditionalGeneration:
    """The model from its configuration alone, without weights."""
    config = read_config(folder)
    adopt_volumes(folder, config, args)
    with torch.device("meta"):
        vlm = LlavaForConditionalGeneration(config)
        replace_embeddings(vlm, args)
    return vlm


def load_model(folder: Path, args, text: Text, dtype) -> Umbrella:
    """The model with what is trained chosen, still on the CPU: runtime.place puts it on the device."""
    config = read_config(folder)
    if args.tune != "full":
        config.vision_config.attention_dropout = 0.0  # in training mode, for gradient checkpointing, but frozen
    saved = hasattr(config, "volumes")  # by this script: with patch embeddings, without the tower's own
    ours, theirs = (("patch_embed.",), "vision_tower.embeddings.") if saved else ((), "")
    vlm = runtime.open_model(LlavaForConditionalGeneration, folder, config, dtype, ours, replaced=theirs)
    window = getattr(vlm.config.text_config, "sliding_window", None)
    if window is not None and window < args.pack_tokens:
        raise SystemExit(f"--pack-tokens {args.pack_tokens} is longer than the model's sliding window {window}")
    common.separate_pad_from_eos(text.tokenizer, vlm)
    replace_embeddings(vlm, args)
    if saved:
        runtime.load_part(folder, ours, vlm.patch_embed)
    prepare(vlm, args)
    if args.compile:
        vlm.model.language_model.compile(dynamic=True)
    return Umbrella(vlm, dtype)


@torch.no_grad()
def verify_first_batch(model: Umbrella, trees: list[Prompt], run) -> None:
    """Before step 0: the placeholders of the real first batch against the features of the real model."""
    shown = set()
    for row in packed_rows(trees, run):
        common.check_placeholders(row["input_ids"], model.image_id, len(model.volume_features(row)))
        shown |= set(row["modalities"])
    counts = ", ".join(
        f"{run.text.modalities[name].tokens(run.args.ragged):,} a {name} volume" for name in sorted(shown)
    )
    print(f"image tokens: {counts}, ID {model.image_id} — verified")


def answer_limit(row: Row, args) -> int:
    """The most tokens of a free answer."""
    return args.max_answer_tokens


def score(prediction: str | None, row: Row) -> dict[str, bool]:
    """{"exact", "tolerant"}: where the task has labels, whether the text says the right one and no other."""
    if not row.labels:
        return common.score_answer(prediction, row.answer, row.question_type)
    repeated = common.normalise(prediction) == common.normalise(row.question)  # "Say whether they are enlarged."
    right = read_label(prediction, row.labels) == row.label and not repeated
    return {"exact": right, "tolerant": right}


def own_figures(model, prompts: list[Prompt], records: list[dict], run) -> dict:
    """Figures of this script alone, for results.json: none."""
    return {}


def media_kind(row: Row) -> tuple:
    """Rows that agree in this can be asked about each other's volumes: the same modalities in the same order."""
    return tuple(volume.modality for volume in row.volumes)


def show(row: Row, other: Row) -> Row:
    """The row, asked about the other's volumes."""
    return replace(row, volumes=other.volumes)


def blank(media: dict) -> dict:
    """What read_images gives, with nothing to see in it: all voxels 0."""
    return {name: value if name == "modalities" else torch.zeros_like(value) for name, value in media.items()}


def read_images(data: Path, text: Text, prompts: list[Prompt]) -> dict:
    """The volumes of prompt trees: `modalities` lists them in the order of the row.

    "volumes of T1" are those of T1, in the same order, (n, channels, x, y, z), and so on for each that is there.
    """
    shown = [(volume, prompt.media["mirrored"]) for prompt in prompts for volume in prompt.media["volumes"]]
    found = defaultdict(list)
    for volume, mirrored in shown:
        modality = text.modalities[volume.modality]
        found[f"volumes of {volume.modality}"].append(load_volume(data, volume, modality, text.settings, mirrored))
    stacked = {name: torch.stack(volumes) for name, volumes in found.items()}
    return {"modalities": [volume.modality for volume, _ in shown], **stacked}


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
            vlm = meta_model(runtime.model_folder(args.model, weights=False), args)
            prepare(vlm, args)
        runtime.print_trained(vlm)
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
