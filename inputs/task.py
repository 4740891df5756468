"""Examples of data: read from files, checked, refused by name."""
from dataclasses import dataclass, field, replace

import torch

from _old import common as _common
from _old import runtime as _old
from report import scoring

Problem, split_of = _old.Problem, _old.split_of


@dataclass(kw_only=True)
class Example:
    """A question with its answer, about media that a script may add fields for."""

    where: str  # "train.jsonl:17"
    split: str
    id: str
    group: str  # patient, video or procedure; intervals resample whole groups
    media: list[str]  # files, in the order shown
    question: str
    answer: str
    question_type: str
    candidates: list[str] | None
    history: list = field(default_factory=list)  # earlier turns
    also_right: list[str] = field(default_factory=list)  # the same answer in other forms
    inferred: bool = False  # the candidates are not the data's own


def named(entry, key, otherwise):
    return otherwise if entry.get(key) in (None, "") else str(entry[key])


def collect(entries, make, args=None):
    """make(where, split, entry) of every entry; ValueErrors become problems. With args also what `choose` does."""
    examples, problems = [], []
    for where, split, entry in entries:
        try:
            if isinstance(entry, Problem):
                problems.append(entry)
            else:
                examples.append(make(where, split, entry))
        except ValueError as error:
            problems.append(Problem(where, entry.get("id"), str(error)))
    return (examples, problems) if args is None else choose(examples, problems, args)


def choose(examples, problems, args):
    """The examples that --only-ids and --limit leave, and the problems, but for those of examples that are left out."""
    chosen, problems = _old.choose_rows([*examples, *problems], args)
    left_out = {example.where for example in examples} - {example.where for example in chosen}
    return chosen, [problem for problem in problems if problem.where not in left_out]


class Task:
    """What a script decides and shared code asks: how a row becomes tokens and media, when an answer is right."""

    remedy = ""  # what else than raising --pack-tokens helps where an example is too long, such as "lower --frames"
    synonyms = ()  # sets of texts: in a relaxed match a member of one counts as any other of it

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.faults, self.measured, self.report = args, tokenizer, [], {}, {}
        self.processor, self.max_positions = None, None  # of images, saved with the model; of the language model

    def separate_pad(self):
        """PAD and EOS apart, said in a line; ends where the tokenizer has no EOS."""
        try:
            self.report["pad"] = _common.separate_pad_from_eos(self.tokenizer)
        except ValueError as error:
            raise SystemExit(f"--model {self.args.model}: {error}") from None
        print(self.report["pad"])

    def fault(self, where, text):
        self.faults.append(Problem(where, None, text))

    # ---- with defaults ----
    def texts(self, row):
        return [row.question, row.answer, *(row.candidates or []), *(t for turn in row.history for t in turn)]

    def media(self, row):
        return row.media

    def positions(self, row, prefix):
        return None

    def score(self, said, row):
        return scoring.score(said, row, self.synonyms)

    # ---- for blind runs ----
    def kind(self, row):
        return ()

    def show(self, row, other):
        return replace(row, media=other.media)

    def blank(self, media):
        """What read_media gives, with nothing to see in it: every tensor of real numbers is zero."""
        zero = lambda x: torch.zeros_like(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa
        return {name: zero(value) for name, value in media.items()}
