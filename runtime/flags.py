"""The flags that every script shares, and how they are parsed, printed and adopted."""

import argparse
import math
import os
import sys
import textwrap
from contextlib import nullcontext, redirect_stdout, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from runtime.foreign_flags import explain

YES_NO = argparse.BooleanOptionalAction
LORA_AND_FULL = {"lora": "adapters", "full": "every parameter"}
OVERFIT_STEPS = 200  # of --overfit, unless --max-steps is given


def number(kind, allowed: str, holds):
    """A type for argparse: a text is refused where kind(text) fails, or is a number for which `holds` is false."""

    def read(text: str) -> float:
        with suppress(ValueError):
            if holds(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not {allowed}")

    return read


positive = number(int, "a positive integer", lambda n: n > 0)
count = number(int, "an integer from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
share = number(float, "between 0 and 1", lambda x: 0 <= x <= 1)
chance = number(float, "at least 0 and below 1", lambda x: 0 <= x < 1)
above_0 = number(float, "a finite number above 0", lambda x: 0 < x < math.inf)
from_0 = number(float, "a finite number from 0", lambda x: 0 <= x < math.inf)


def percent(text: str) -> float:
    """A share given as "25%", for argparse."""
    if not text.endswith("%"):
        raise argparse.ArgumentTypeError(f"{text} is no percentage such as 25%")
    return share(str(float(text[:-1]) / 100))


def board(text: str) -> str:
    """Where metrics go as well, for argparse: tensorboard or wandb:PROJECT, whose package must be there."""
    package, _, project = text.partition(":")
    if package not in ("tensorboard", "wandb") or bool(project) != (package == "wandb"):
        raise argparse.ArgumentTypeError(f"{text} is neither tensorboard nor wandb:PROJECT")
    if find_spec(package) is None:
        raise argparse.ArgumentTypeError(f"{package} needs a package: pip install {package}")
    return text


def shared(doc: str, tunings: dict[str, str] | None = None, parts: dict[str, str] | None = None, **defaults):
    """An ArgumentParser with the options of every script, whose --help is short.

    `defaults` are the script's own values for them, `tunings` its own {choice of --tune: what it means}, the default
    first, `parts` {name: pattern of parameters} what can have a rate of its own.
    """
    wide = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=120)
    usage = "%(prog)s --model MODEL --data DATA --out RUN [flags]"
    parser = argparse.ArgumentParser(None, usage, doc, formatter_class=wide, allow_abbrev=False, add_help=False)
    add_training(parser.add_argument_group, tunings or LORA_AND_FULL, parts or {})
    add_running(parser.add_argument_group)
    parser.set_defaults(parts=parts or {}, **defaults)
    return parser


def add_training(group, tunings: dict[str, str], parts: dict[str, str]) -> None:
    add = group("what to train on").add_argument
    add("--model", help="model folder, or hub ID (downloaded first); required")
    add("--data", help="data folder; required but for --merge, and for --check of the model alone")
    text = "folder that names of media start from, and absolute ones must lie in (default: --data)"
    add("--media-root", metavar="DIR", help=text)
    add("--out", metavar="RUN", help="run folder: all that is written goes there; required where --data is")
    add("--limit", type=positive, metavar="N", help="use only the first N examples of each split (default: all)")
    text = "leave examples with faults out, by name, up to N%% of a split or question type (alone: 10%%; default: no)"
    add("--skip-bad", type=percent, nargs="?", const=0.10, metavar="N%", help=text)
    text = "train on these examples alone: a line an ID, or a bad_steps.jsonl to replay (default: all)"
    add("--only-ids", metavar="FILE", help=text)

    add = group("what is trained").add_argument
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in tunings.items())
    add("--tune", choices=[*tunings], default=next(iter(tunings)), help=f"{meanings} (default: %(default)s)")
    add("--lora-r", type=positive, metavar="R", default=16, help="rank of the adapters (default: %(default)s)")
    add("--lora-alpha", type=above_0, metavar="A", default=32, help="they are scaled by A / R (default: %(default)s)")
    add("--lora-dropout", type=chance, metavar="P", default=0.05, help="probability, below 1 (default: %(default)s)")

    add = group("how it is trained").add_argument
    add("--lr", type=from_0, metavar="RATE", default=2e-4, help="peak learning rate of AdamW (default: %(default)s)")
    for part in parts:
        name = f"lr-{part}"
        add(f"--{name}", type=from_0, metavar="RATE", help=f"that of the {part} part (default: --lr)")
    text = "share of the steps until the peak; then half a cosine to zero (default: %(default)s)"
    add("--warmup", type=share, metavar="SHARE", default=0.03, help=text)
    add("--weight-decay", type=from_0, metavar="W", default=0.0, help="matrices lose W x lr (default: %(default)s)")
    add("--clip", type=above_0, metavar="NORM", default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--epochs", type=positive, metavar="N", default=1, help="passes over the data (default: %(default)s)")
    add("--max-steps", type=positive, metavar="N", help="end after N optimizer steps (default: all of the epochs)")
    text = "most questions of an optimizer step, over all ranks (default: %(default)s)"
    add("--questions-per-step", type=positive, metavar="N", default=64, help=text)
    text = "most tokens of a packed sequence, as memory allows (default: %(default)s)"
    add("--pack-tokens", type=positive, metavar="N", default=4096, help=text)
    add("--share-prefix", action=YES_NO, default=True, help="read an image once for all its questions (default: yes)")
    add("--augment", action=YES_NO, default=False, help="train on media a little turned, scaled and lit (default: no)")
    add("--seed", type=count, metavar="N", default=0, help="of every random draw (default: %(default)s)")


def add_running(group) -> None:
    add = group("where it runs").add_argument
    add("--device", default="auto", help="cuda, cpu, … (default: the GPU if there is one)")
    text = "number format (default: bf16 on a GPU, fp32 on a CPU)"
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help=text)
    text = "processes that read media (default: 0, in the trainer itself)"
    add("--workers", type=count, metavar="N", default=0, help=text)
    text = "several ranks: a complete model each, or decoder layers sharded over them (default: %(default)s)"
    add("--parallel", choices=["ddp", "fsdp"], default="ddp", help=text)
    text = "compute activations again: less memory, slower (default: no)"
    add("--grad-checkpoint", action=YES_NO, default=False, help=text)
    text = "train with compiled decoder layers (GPU: FlexAttention); faster after a minute (default: no)"
    add("--compile", action=YES_NO, default=False, help=text)
    text = "metrics also go to tensorboard (RUN/tensorboard) or wandb:PROJECT; repeatable (default: no)"
    add("--log-to", action="append", type=board, default=[], metavar="BOARD", help=text)

    add = group("saving, resuming, answering").add_argument
    text = "optimizer steps between checkpoints; the two newest, and the best, are kept (default: %(default)s)"
    add("--save-every", type=positive, metavar="N", default=200, help=text)
    text = "optimizer steps between validation losses, each after a checkpoint (default: %(default)s)"
    add("--eval-every", type=positive, metavar="N", default=200, help=text)
    add("--patience", type=positive, metavar="N", help="end after N validations without a lower loss (default: never)")
    text = "best or last: the checkpoint of the lowest validation loss, or the newest (default: %(default)s)"
    add("--answer-with", choices=["best", "last"], default="best", metavar="WHICH", help=text)
    text = "auto (newest complete checkpoint of RUN), none, or a checkpoint's folder (default: %(default)s)"
    add("--resume", default="auto", metavar="WHAT", help=text)
    text = "resume although settings or data have changed since the checkpoint (default: no)"
    add("--resume-anyway", action="store_true", help=text)
    text = "split that is answered: val, train, or, once settings are chosen, test (default: %(default)s)"
    add("--eval-split", choices=["test", "val", "train"], metavar="SPLIT", default="val", help=text)
    text = "greedy: token by token; constrained: so, among allowed answers; ranked: the likeliest allowed answer, with "
    text += "probabilities; both: greedy, and ranked besides (default: %(default)s)"
    add("--decode", choices=["greedy", "constrained", "ranked", "both"], metavar="HOW", default="greedy", help=text)
    text = "most tokens of an answer that is not ranked (default: %(default)s)"
    add("--max-answer-tokens", type=positive, metavar="N", default=64, help=text)
    text = "with --eval-only: show nothing, or another group's media; into RUN/blind (default: no)"
    add("--blind", choices=["blank", "shuffled"], help=text)
    add("--report", action=YES_NO, default=True, help="write RUN/report/report.html after answering (default: yes)")

    add = group("modes instead of training").add_argument
    add("-h", "--help", action="help", help="show this and exit")
    add("--check", action="store_true", help="check data and checkpoint, count parameters, write check.json, exit")
    text = f"overfit the first N examples in at most {OVERFIT_STEPS} steps (--max-steps); exit code 1 if one is wrong"
    add("--overfit", type=positive, metavar="N", help=text)
    text = "answer --eval-split with what --resume has trained; none: the base, into RUN/baseline"
    add("--eval-only", action="store_true", help=text)
    text = "answer questions: JSON lines, - is standard input; printed, or in RUN/answers.jsonl"
    add("--predict", metavar="FILE", help=text)
    add("--merge", metavar="DIR", help="write the model with what --resume has trained as a new model folder")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The settings, those given printed; ends with what is missing, and says of a flag that it does not know what it
    is called here. `command` is the command line."""
    argv = sys.argv[1:] if argv is None else argv
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error("\n".join(explain(unknown, list(parser._option_string_actions))))
    args.command = argv
    alone = args.merge or args.predict or (args.check and not args.data)
    needed = ["model"] if alone else ["model", "data", "out"]
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} required")
    if args.media_root and not Path(args.media_root).is_dir():
        parser.error(f"--media-root {args.media_root}: no such folder")
    if args.merge and args.resume == "auto" and not args.out:
        parser.error("--merge: --out RUN required, or --resume FOLDER")
    if args.merge and os.path.lexists(args.merge):  # a model, perhaps the base itself
        parser.error(f"--merge {args.merge}: it exists already; name a new folder")
    modes = ("check", "overfit", "eval_only", "merge", "predict")
    modes = [f"--{name.replace('_', '-')}" for name in modes if vars(args)[name]]
    if len(modes) > 1 and (args.merge or args.predict or not args.check):  # --check looks at what the others begin with
        parser.error(f"{' and '.join(modes)}: one at a time")
    if args.lr == 0 and any(getattr(args, f"lr_{part}") is not None for part in args.parts):
        parser.error("--lr 0: other rates are multiples of it; give it above 0")
    if args.blind and not args.eval_only:
        parser.error("--blind is for --eval-only")
    if args.predict and args.data:
        parser.error(f"--predict {args.predict} is read instead of --data; leave --data out")
    if args.eval_only and args.resume == "none":  # the model before it is trained
        args.out, args.report = f"{args.out}/baseline", False
    if args.overfit:
        args.resume, args.max_steps = "none", args.max_steps or OVERFIT_STEPS
        args.epochs, args.out, args.eval_split = args.max_steps, f"{args.out}/overfit", "train"
        args.answer_with, args.patience = "last", None  # it ends once all is learned
    with printing(args):
        print_settings(parser, args)
    args.media_root = args.media_root or args.data
    if args.predict:
        args.eval_only, args.media_root = True, args.media_root or str(Path(args.predict).parent)
        args.resume = args.resume if args.out or args.resume != "auto" else "none"
    return args


def printing(args: argparse.Namespace):
    """Whatever --predict prints that is no answer goes to standard error."""
    return redirect_stdout(sys.stderr) if args.predict else nullcontext()


def print_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The settings that were given, in few lines; config.json has all of them. Of several ranks the first prints."""
    given = []
    for name, value in vars(args).items():
        if name != "command" and value != parser.get_default(name):
            text = str(value)
            given.append(f"{name} {text if len(text) <= 60 else f'{text[:20]}…{text[-38:]}'}")
    if int(os.environ.get("RANK", 0)) == 0:
        text = f"settings: {', '.join(given)}; all others are the defaults (--help)"
        print(textwrap.fill(text, 160, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def adopt(args: argparse.Namespace, saved: dict, source) -> None:
    """Settings that a saved model is bound to, printed where they are not those given."""
    for name, value in saved.items():
        kinds = {type(value), type(getattr(args, name, value))} - {type(None)}
        if not hasattr(args, name) or (len(kinds) > 1 and kinds != {int, float}):
            raise SystemExit(f"{source} cannot be used: {name} {repr(value)[:60]} is no setting of this script")
        if getattr(args, name) != value:
            print(f"{name} {value} (from {source})")
            setattr(args, name, value)
