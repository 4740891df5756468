"""What an example of data is, and `Task`: what a script decides and shared code asks of it."""

import functools
import gc
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import common
from report import scoring

SPLITS = ("train", "val", "test")
# --augment changes by at most: degrees, shares of size, contrast and brightness, either way. Colours keep their names;
# counts and quadrants hold, but within 7 % of an edge or of a middle line; what is told in mm does not (docs/data.md)
TURN, SCALE, LIGHT = 5, 0.05, 0.10
ONCE = functools.lru_cache(2**12)(str)  # of equal texts, such as questions and groups, one is in memory
MARK = "<image>"  # says where in a question an image is shown (see images.placed)


@dataclass
class Problem:
    """A fault found in the data: file (and line), the example's ID where there is one, what is wrong and what to do."""

    where: str
    id: str | None
    text: str
    split: str | None = None  # where it is known; set by `collect`, as
    kind: str | None = None  # the question type, where the entry names it
    fatal: bool = False  # a file that cannot be read: nobody knows how many examples would be left out

    def __str__(self):
        text = f"{self.where}{f' (id {self.id})' if self.id else ''}: {self.text}"
        return text.encode("utf-8", "backslashreplace").decode()  # the name of a file may be none of UTF-8


@dataclass(kw_only=True, slots=True)
class Example:
    """A question with its answer, about media; a script may add fields in a subclass."""

    where: str  # "train.jsonl:17"
    split: str
    id: str
    group: str  # patient, video or procedure; intervals resample complete groups
    media: list[str]  # files, in the order shown
    question: str
    answer: str
    question_type: str
    candidates: list[str] | None  # all allowed answers, where they are known
    system: str = ""  # a system text of its own
    history: Sequence = ()  # earlier turns, (question, answer)
    also_right: Sequence[str] = ()  # the same answer in other forms
    inferred: bool = False  # the candidates are not the data's own
    groups: Sequence[str] = ()  # all that it belongs to, where these are several
    grouped: str | None = "group"  # the field that names the group; None where the medium stands in for it
    unread: Sequence[str] = ()  # fields of its entry that are not read
    notice: str | None = None  # what the check says of it, though it may be no fault

    def __post_init__(self):
        self.groups = self.groups or [self.group]

    @property
    def shown(self) -> list[str]:
        """The files that may not be in two splits: all of them, unless a subclass says less."""
        return self.media


def named(entry: dict, key: str, otherwise):
    """A field of an entry as text, or `otherwise` where it is missing or empty. Raises ValueError (see as_text)."""
    return otherwise if entry.get(key) in (None, "") else as_text(entry[key], key)


def as_text(value, what: str) -> str:
    """A value of the data as a text, a number as it is written. Raises ValueError that says what to write instead."""
    if isinstance(value, str) or type(value) in (int, float):
        return ONCE(str(value))
    parts = value if isinstance(value, list) else [value]
    parts = ["yes" if part is True else "no" if part is False else part for part in parts]
    clear = len(parts) == 1 or (parts and "answer" in what)  # a set of answers
    clear = clear and all(isinstance(part, str | int | float) for part in parts)
    remedy = json.dumps(";".join(map(str, parts)), ensure_ascii=False) if clear else "a single text"
    kind = {list: "list", dict: "object", bool: "boolean"}.get(type(value), "value")
    shown = json.dumps(value, ensure_ascii=False).replace("'", "\\u0027")
    raise ValueError(f"{what} must be a text, not the {kind} '{shown}'; write {remedy}")


def split_of(group: str) -> str:
    """70/15/15 by image or patient, from the name alone: adding examples later moves none of the others."""
    share = random.Random(group).random()
    return "train" if share < 0.70 else "val" if share < 0.85 else "test"


def collect(entries: Iterable[tuple], make: Callable) -> tuple[list, list[Problem]]:
    """make(where, split, entry) of every (where, split, entry); its ValueErrors, and the entries that are Problems."""
    examples, problems = [], []
    watched = gc.isenabled()
    gc.disable()  # it would walk through all that was read again and again: 6 of 36 s for a million examples
    try:
        for where, split, entry in entries:
            if isinstance(entry, Problem):
                problems.append(replace(entry, split=split))
                continue
            try:
                example = make(where, split, entry)
                example.grouped, example.unread = entry.get("grouped", "group"), entry.get("unread") or ()
                example.groups += [entry["second_group"]] if "second_group" in entry else []
                examples.append(example)
            except ValueError as error:
                kind = entry.get("question_type")
                kind = kind if isinstance(kind, str) else None
                problems.append(Problem(where, entry.get("id"), str(error), split, kind))
    finally:
        if watched:
            gc.enable()
    return examples, problems


def choose(examples: list, problems: list[Problem], args) -> tuple[list, list[Problem]]:
    """What --only-ids and --limit leave of the examples, and the problems but for those of examples left out.

    A second function beside `collect`, because whatever must see all examples stands between the two. An ID that is
    used twice in a split is a problem, too; one that an earlier split has gets its split's name: "test/7".
    """
    chosen, earlier = examples, set()
    for split in SPLITS:
        part = [example for example in chosen if example.split == split]
        names = {example.id for example in part}
        for example in part:
            example.id = f"{split}/{example.id}" if example.id in earlier else example.id
        earlier |= names
    if args.only_ids:
        ids = read_ids(args.only_ids)
        unknown = sorted(ids - {example.id for example in chosen if example.split == "train"})
        if unknown:
            text = f"{len(unknown)} are no training examples, such as {unknown[0]!r}"
            raise SystemExit(f"--only-ids {args.only_ids}: {text}; give IDs of this data")
        chosen = [example for example in chosen if example.split != "train" or example.id in ids]
    if args.limit:
        chosen = [e for split in SPLITS for e in [e for e in chosen if e.split == split][: args.limit]]
    left_out = {example.where for example in examples} - {example.where for example in chosen}
    problems, first = [problem for problem in problems if problem.where not in left_out], {}
    for example in chosen:
        other = first.setdefault((example.split, example.id), example.where)
        if other != example.where:
            problems.append(Problem(example.where, example.id, f"duplicate ID, first used at {other}; make it unique"))
    return chosen, problems


def read_ids(path: str) -> set[str]:
    """Example IDs from a file: a line an ID, or a line of JSON with "ids", as in steps.jsonl and bad_steps.jsonl."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
        ids = [name for line in lines if line for name in (json.loads(line)["ids"] if line[0] == "{" else [line])]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--only-ids {path}: neither a line an ID nor lines of JSON with ids ({error!r})") from None
    return set(ids)


class Task:
    """What a script decides and shared code asks: how an example becomes tokens and media, when an answer is right.

    This is the complete contract: whatever else is in a script, nothing shared reads it. A subclass is made by
    Task(folder, args) from the checkpoint's folder, without weights, calls super().__init__(args, tokenizer), and

    must give
        encode(example, answer)     (prefix, input_ids, labels), lists of token IDs. The prefix is what comes before the
                                    question: system text, placeholders, one for each feature of the media. `answer` is
                                    the example's own or a candidate; supervised is it and the EOS behind it, no more
        placeholders(example)       {placeholder's ID: how many the prefix must hold}; an ID None is the checkpoint's
                                    fault, listed already. Texts of the data may not contain these tokens
        measure(data, name)         opens a file of data/ completely; returns, JSON-like, what its tokens are counted
                                    from, afterwards in self.measured[name], and a digest of what it shows, by which
                                    splits are compared (inputs/content.py). Raises ValueError that names the file
        read_media(data, trees)     {name: tensor} of prompt trees' media, in the order of the packed sequence; the
                                    model takes it as `batch[name]`. Runs in worker processes: only self.change draws

    may change
        texts(example)              all texts that become tokens: none may hold a placeholder, EOS or a sentinel
        media(example)              what is shown of an example; questions with the same prefix and media share a tree
        messages(example)           the conversation up to its question, as a chat template reads it, each medium that
                                    transformers reads a {"type": "image"}; None where no template is used
        positions(example, prefix)  (3, P) M-RoPE positions of the prefix; None counts from 0
        score(prediction, example)        {"exact": bool, "relaxed": bool}; prediction is None where there is no answer
        kind(example)               examples that agree in it can be asked about each other's media (--blind shuffled)
        show(example, other)        the example, asked about the other's media
        blank(media)                what read_media gives, with nothing to see in it (--blind blank)
        remedy, unreadable, synonyms  see below

    and has
        args, tokenizer             the settings, as parsed; the tokenizer with every token registered
        processor                   the image processor, saved beside the weights; None where there is none
        processor_settings          what else transformers' processor for such a model must know: {its argument: value}
        measured                    {file: what its tokens are counted from}, once the data check has opened all
        max_positions               of the language model, where more would be an error; None: not limited
        system(example)             its own system text, or --system
        faults                      Problems of the checkpoint's own files, listed by the data check: fault(where, text)
        report                      what was found in them: JSON-like, for check.json and results.json

    `example` is an Example or the script's subclass of it, `data` the Path of --data, `trees` a list of common.Prompt.

    The model that the script's load_model(folder, task, dtype) returns is an nn.Module that has

        vlm                         transformers' model: its parameters are trained, saved and merged
        decoder                     its language model without the head, which is called with inputs_embeds
        lm_head(hidden)             logits
        hidden(input_ids, position_ids, mask, cache=None, media=None)
                                    last hidden states (1, T, width); `media` is a batch, or None once media are cached
        forward(batch)              (loss summed over the supervised tokens, their number)

    python -m inputs.contract SCRIPT.py … puts both to the test.
    """

    remedy = ""  # what else than raising --pack-tokens helps where an example is too long, such as "lower --frames"
    unreadable = ""  # what of a trained folder, or of how it is asked, plain transformers does not know (for its card)
    synonyms = ()  # sets of texts: in a relaxed match a member of one counts as any other of it

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.processor, self.processor_settings = args, tokenizer, None, {}
        self.measured, self.faults, self.report, self.max_positions, self.step = {}, [], {}, None, None

    def fault(self, where: str, text: str) -> None:
        """A fault of the checkpoint's file `where`, for which no example can be left out."""
        self.faults.append(Problem(where, None, text))

    def separate_pad(self) -> None:
        """PAD and EOS apart, printed; ends where the tokenizer has no EOS. Last of all: a new PAD takes the next ID."""
        try:
            self.report["pad"] = common.separate_pad_from_eos(self.tokenizer)
        except ValueError as error:
            raise SystemExit(f"--model {self.args.model}: {error}") from None
        print(self.report["pad"])

    def system(self, example: Example) -> str:
        """The example's own system text, or --system."""
        return example.system or getattr(self.args, "system", "")

    def change(self, tree: common.Prompt) -> tuple[float, ...] | None:
        """(degrees, scale, contrast, brightness) of a tree's media in a step of training with --augment, else None."""
        if self.step is None or not self.args.augment:
            return None
        draw = random.Random(f"{self.args.seed} {self.step} {tree.ids[0]}")
        return draw.uniform(-TURN, TURN), *(draw.uniform(1 - most, 1 + most) for most in (SCALE, LIGHT, LIGHT))

    # ---- may be changed ----

    def texts(self, example: Example) -> list[str]:
        asked, answered = zip(*example.history, (example.question, example.answer), strict=True)
        if "".join(asked).count(MARK) == len(example.media):  # each stands for an image
            asked = [text.replace(MARK, "") for text in asked]
        return [self.system(example), *asked, *answered, *(example.candidates or [])]

    def media(self, example: Example):
        return example.media

    def messages(self, example: Example) -> list[dict] | None:
        return None

    def positions(self, example: Example, prefix: list[int]) -> torch.Tensor | None:
        return None

    def score(self, prediction: str | None, example: Example) -> dict[str, bool]:
        return scoring.score(prediction, example, self.synonyms)

    # ---- for blind runs ----

    def kind(self, example: Example) -> tuple:
        return ()

    def show(self, example: Example, other: Example) -> Example:
        return replace(example, media=other.media)

    def blank(self, media: dict) -> dict:
        """Every tensor of real numbers is zero."""
        floating = {k for k, v in media.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        return {name: torch.zeros_like(value) if name in floating else value for name, value in media.items()}
