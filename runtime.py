"""What keeps a run alive; plumbing that may be trusted unread.

    1  flags          the options every script shares, and where each value came from
    2  devices        device, number format, memory
    3  ranks          several processes train one model: who writes, what is summed, what is sharded
    4  one program    signals finish the step, save, and exit with a code of their own; a run folder has one owner
    5  model folders  downloaded with retries, refused when incomplete
    6  reading data   rows with their file and line, images that cannot do harm, problems listed all at once
    7  checkpoints    atomic, verified, never pickled
    8  the run folder settings, metrics, results; what is shown of rows and parameters

Imports none of our files and knows no model. What decides whether learning is right is in common.py.
"""

import argparse
import difflib
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import numpy
import safetensors
import torch
import torch.distributed as dist
import transformers
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

Image.MAX_IMAGE_PIXELS = None  # open_image has a cap of its own; Pillow's would warn first and raise later
EXIT_STOPPED = 85  # a signal ended the run, which had saved its last step: start it again to go on
EXIT_NOT_FINITE = 86  # several steps in a row had a loss or gradient that is not finite

# ------------------------------------------------------------------------------------------------------------
# 1  Flags
# ------------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A count of at least one, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def shared_flags(doc: str, tunings: dict[str, str] | None = None, **defaults) -> argparse.ArgumentParser:
    """A parser with the options of every script.

    `defaults` are the script's own values for them, `tunings` its own {choice of --tune: what it means}, the default
    first.
    """
    tunings = tunings or {"lora": "adapters", "full": "every parameter"}
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    yes_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("what to train on").add_argument
    add("--model", help="model folder, or hub ID (downloaded first)")
    add("--data", help="data folder")
    add("--out", help="run folder")
    add("--limit", type=positive, help="use only the first LIMIT rows of each split")
    add("--skip-bad", action=yes_no, default=False, help="leave rows with faults out, by name, in check.json")
    add("--only-ids", metavar="FILE", help="train on these rows alone: a line an ID, or a bad_steps.jsonl to replay")

    add = parser.add_argument_group("what is trained").add_argument
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in tunings.items())
    add("--tune", choices=list(tunings), default=next(iter(tunings)), help=f"{meanings} (default: %(default)s)")
    add("--lora-r", type=positive, default=16, help="rank (default: %(default)s)")
    add("--lora-alpha", type=float, default=32, help="scaling is alpha / r (default: %(default)s)")
    add("--lora-dropout", type=float, default=0.05, help="(default: 0.05)")
    add("--rslora", action=yes_no, default=False, help="scaling alpha / sqrt(r) instead")

    add = parser.add_argument_group("how it is trained").add_argument
    add("--lr", type=float, default=2e-4, help="peak learning rate (default: %(default)s)")
    add("--warmup", type=float, default=0.03, help="share of the steps (default: %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="(default: %(default)s)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--epochs", type=positive, default=1, help="(default: %(default)s)")
    add("--max-steps", type=positive, help="stop after so many optimizer steps")
    add("--questions-per-step", type=positive, default=64, help="at most so many a step (default: %(default)s)")
    add(
        "--pack-tokens",
        type=positive,
        default=4096,
        help="most tokens of a packed row (default: %(default)s)",
    )
    add("--share-prefix", action=yes_no, default=True, help="read an image once for all its questions")
    add(
        "--sentinels",
        choices=["strip", "keep"],
        default="strip",
        help="keep <ANS> in the model's input (as the original)",
    )
    add("--seed", type=int, default=0)

    add = parser.add_argument_group("where it runs").add_argument
    add("--device", default="auto", help="cuda, cpu, … (default: the GPU if there is one)")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="bf16 on a GPU, fp32 on a CPU")
    add("--workers", type=int, default=0, help="processes that read media (default: 0, in the trainer itself)")
    add(
        "--parallel",
        choices=["ddp", "fsdp"],
        default="ddp",
        help="several ranks: a whole model each, or decoder layers sharded over them (default: ddp)",
    )
    add("--grad-checkpoint", action=yes_no, default=False, help="recompute activations: less memory, slower")
    add("--compile", action=yes_no, default=False, help="torch.compile the language model")
    add(
        "--tensorboard",
        action=yes_no,
        default=False,
        help="write metrics for TensorBoard as well, into RUN/tensorboard",
    )
    add("--wandb", metavar="PROJECT", help="send metrics to Weights & Biases as well")

    add = parser.add_argument_group("saving and going on").add_argument
    add("--save-every", type=positive, default=200, help="steps between checkpoints (default: %(default)s)")
    add(
        "--eval-every",
        type=positive,
        default=200,
        help="steps between validation losses, each after a checkpoint (default: %(default)s)",
    )
    add("--keep", type=positive, default=2, help="checkpoints kept (default: %(default)s)")
    add("--resume", default="auto", help="auto (newest whole checkpoint of --out), none, or a folder")
    add("--resume-anyway", action="store_true", help="go on although settings or data have changed")
    add("--eval-split", choices=["test", "val", "train"], default="test", help="split answered at the end")
    add(
        "--decode",
        choices=["free", "trie", "score", "both"],
        default="free",
        help="answers: greedy; greedy among the allowed; the likeliest of the allowed; greedy, and the allowed scored "
        "besides (default: %(default)s)",
    )
    add("--max-answer-tokens", type=positive, default=64, help="most tokens of a free answer (default: %(default)s)")
    add(
        "--blind",
        choices=["blank", "shuffled"],
        help="with --eval-only: answer with nothing to see, or with another group's media; into RUN/blind",
    )
    add("--report", action=yes_no, default=True, help="write RUN/report/report.html after answering")

    add = parser.add_argument_group("modes instead of training").add_argument
    add("--check", action="store_true", help="prove the data, write check.json, exit")
    add("--overfit", type=positive, metavar="N", help="learn the first N rows by heart, or exit 1")
    add("--overfit-steps", type=positive, default=200, help="within so many steps (default: %(default)s)")
    add("--overfit-loss", type=float, default=2.0, help="the loss must fall below (default: %(default)s)")
    add("--eval-only", action="store_true", help="answer --eval-split with what --resume has trained")
    add("--merge", metavar="DIR", help="write the model with what --resume has trained as one model folder")
    add("--count-params", action="store_true", help="count parameters from the configuration alone")

    parser.set_defaults(**defaults)
    return parser


def parse_flags(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The settings, all of them printed; ends with what is missing."""
    args = parser.parse_args(argv)
    needed = ["model"] if args.count_params or args.merge else ["model", "data", "out"]
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} required")
    if args.blind and not args.eval_only:
        parser.error("--blind is for --eval-only")
    for package in ("tensorboard", "wandb"):
        if getattr(args, package) and find_spec(package) is None:
            parser.error(f"--{package} needs a package: pip install {package}")
    if args.overfit:
        args.resume, args.epochs, args.max_steps = "none", args.overfit_steps, args.overfit_steps
        args.out = f"{args.out}/overfit"
    print_settings(parser, args, argv)
    return args


def print_settings(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> None:
    """Every setting with its origin: given as a flag, or the default. Of several ranks only the first prints."""
    given, rest = [], []
    for action in parser._actions:
        if action.dest != "help":
            used = any(a.split("=")[0] in action.option_strings for a in argv)
            (given if used else rest).append(f"{action.dest} {getattr(args, action.dest)}")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"settings, given: {', '.join(given)}\nsettings, default: {', '.join(rest)}")


# ------------------------------------------------------------------------------------------------------------
# 2  Devices
# ------------------------------------------------------------------------------------------------------------


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve "auto": the GPU with bf16 where there is one, otherwise the CPU with fp32."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; use --device cpu")
    if device.type == "cuda" and device.index is None:
        index, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        device = torch.device("cuda", index if gpus > 1 else 0)  # Slurm can show each task its own GPU alone
        if device.index >= gpus:
            raise SystemExit(f"rank {index} of this node has no GPU: torch sees {gpus}")
        torch.cuda.set_device(device)
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" else "fp32"
    return device, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]


def peak_memory_mb(device: torch.device) -> float:
    """Most memory so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if sys.platform == "darwin" else kib / 2**10


# ------------------------------------------------------------------------------------------------------------
# 3  Ranks: torchrun, or srun with the same variables, starts the script several times; each process is a rank
# ------------------------------------------------------------------------------------------------------------

PATIENCE = timedelta(hours=2)  # for a rank that does not answer: the first may be writing 80 GB to a slow disk


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start_ranks(device: torch.device, dtype: torch.dtype) -> None:
    """Find the other ranks, where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say that there are some."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        found = gather([socket.gethostname(), f"{device.type} with {dtype}"])
        if len({kind for _, kind in found}) > 1:
            raise SystemExit(f"ranks must all use the same kind of device: {found}")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the first rank reports; errors of all go to stderr)
        print(f"{ranks()} ranks on {', '.join(dict.fromkeys(host for host, _ in found))}")


def end_ranks() -> None:
    """Wait for all: where one leaves early, the others believe that it has died."""
    if dist.is_initialized():
        any_rank(False)
        dist.destroy_process_group()


def any_rank(flag: bool) -> bool:
    """Whether flag is set on any rank; the same answer on all."""
    return bool(sum_over_ranks(torch.tensor(float(flag))))


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        _together(dist.all_reduce, tensor)
    return tensor


def _together(collective, *tensors) -> None:
    try:
        collective(*tensors)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        text = f"rank {rank()} of {ranks()} ends: another has died, left or is stuck; its own message says why"
        raise SystemExit(f"{text} ({error})") from None


def gather(value) -> list:
    """Every rank's JSON-like value, in the order of ranks, on all of them. (torch's own gather pickles.)"""
    if not dist.is_initialized():
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks())]
    _together(dist.all_gather, sizes, torch.tensor([len(data)]))
    parts = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
    _together(dist.all_gather, parts, torch.nn.functional.pad(data, (0, len(parts[0]) - len(data))))
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]


def on_first_rank(function):
    """What function() returns on the first rank, JSON-like, for all of them; where it ends the program, all end."""
    outcome = None
    if rank() == 0:
        try:
            outcome = [function(), None]
        except SystemExit as stop:
            outcome = [None, stop.code]
    value, code = gather(outcome)[0]
    if code is not None:
        raise SystemExit(code if rank() == 0 or isinstance(code, int) else 1)
    return value


def place(model, decoder, device: torch.device, dtype: torch.dtype, parallel: str) -> None:
    """Put the model on the device: whole ("ddp"), or with the layers of its decoder sharded over the ranks ("fsdp").

    Sharded are a layer's matrices. Norms and adapters stay whole on every rank, as does what is outside the
    decoder's layers; their gradients are summed by sum_gradients. `decoder` has its layers in its first ModuleList.
    """
    if parallel == "fsdp" and ranks() > 1:
        mesh = init_device_mesh(device.type, (ranks(),))
        small = torch.bfloat16 if dtype == torch.bfloat16 else None  # what travels; gradients are summed in float32
        policy = MixedPrecisionPolicy(small, torch.float32, cast_forward_inputs=False)
        blocks = next(m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList))  # "layers", or GPT-2's "h"
        layers = set(blocks.parameters())
        adapters = {p for p in layers if p.requires_grad} if any(not p.requires_grad for p in layers) else set()
        norms = {p for p in layers if p.ndim < 2}  # as with DDP they are applied in float32
        stay = {p for p in model.parameters() if p not in layers} | norms | adapters
        for layer in blocks:  # each goes to the device, and is sharded, before the next
            fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=stay)
            layer.set_gradient_divide_factor(1.0)  # a sum, as in sum_gradients: train() has divided already
            layer.set_force_sum_reduction_for_comms(True)  # by a plain sum, which gloo has too
        fully_shard(decoder, mesh=mesh, mp_policy=policy, ignored_params=stay)  # lets a layer be fetched ahead
    model.to(device)
    if dist.is_initialized():
        for parameter in model.parameters():  # whatever drew them, all begin with the first rank's
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                dist.broadcast(parameter.data, 0)


@contextmanager
def equal_passes(decoder, idle):
    """For answering, where ranks differ in their number of forward passes.

    A sharded layer is fetched from all ranks in every pass, so all must make equally many: each pass is announced,
    and a rank that has finished its share goes on with idle() until nobody announces one.
    """
    if not isinstance(decoder, FSDPModule):
        yield
        return

    def announce(module, inputs):  # returns nothing: what a hook returns replaces the inputs
        any_rank(True)

    hook = decoder.register_forward_pre_hook(announce)
    try:
        yield
    finally:
        hook.remove()
    while any_rank(False):
        idle()


def sum_gradients(parameters: list, bucket: int = 2**24) -> None:
    """Add up the gradients of all ranks, some 64 MB at a time; FSDP has already done so for what it shards.

    Unlike DistributedDataParallel this happens once, after the step's last row, and a parameter that only some
    ranks used counts as zero on the others; one that none used keeps no gradient.
    """
    if not dist.is_initialized():
        return
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    used = sum_over_ranks(torch.tensor([float(p.grad is not None) for p in parameters]))
    parameters = [p for p, n in zip(parameters, used.tolist(), strict=True) if n > 0]
    while parameters:
        count, size = 0, 0
        while count < len(parameters) and (count == 0 or size + parameters[count].numel() <= bucket):
            size += parameters[count].numel()
            count += 1
        some, parameters = parameters[:count], parameters[count:]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        summed = sum_over_ranks(torch.cat([g.flatten() for g in grads]))
        for p, part in zip(some, summed.split([p.numel() for p in some]), strict=True):
            p.grad = part.view_as(p)


def clip_gradients(parameters: list, largest: float) -> float:
    """Scale the gradients so that their norm, over all shards, is at most `largest`; returns the norm before."""
    shards = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    norm = torch.nn.utils.get_total_norm(grads)
    if shards:
        norm = torch.hypot(norm, sum_over_ranks(torch.nn.utils.get_total_norm(shards) ** 2).sqrt())
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads + shards:
        grad.mul_(factor)
    return float(norm)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, shards put together: on the first rank. The others must call it too and get none."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            found[name] = tensor.detach().cpu().contiguous()
    return found


# ------------------------------------------------------------------------------------------------------------
# 4  One program: its signals, its run folder
# ------------------------------------------------------------------------------------------------------------


@contextmanager
def program(args: argparse.Namespace, own: bool):
    """What lasts from start to end: ranks know each other, signals are noted, and with `own` --out is nobody else's.

    Gives (device, dtype, stop).
    """
    code = 0
    try:
        with StopSignal() as stop:
            device, dtype = pick_device(args.device, args.dtype)
            start_ranks(device, dtype)
            with Lock(Path(args.out)) if own else nullcontext():
                yield device, dtype, stop
                end_ranks()
    except SystemExit as ended:
        if not isinstance(ended.code, int):  # with a message
            raise
        code = ended.code
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # not through Python's own end: a thread of the process group that needs Python then would abort the process,
        # and its exit code would no longer say whether it has finished
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


class StopSignal:
    """Notes SIGTERM, SIGUSR1 (Slurm's warning) and SIGINT. While `waits` is set, the loop asks for `received` and
    stops after its step; otherwise there is nothing to save, and the program ends. A second signal ends it at once
    (as soon as Python runs again: not while it waits for another rank).
    """

    def __init__(self):
        self.received, self.at, self.waits = None, 0.0, False

    def __enter__(self) -> "StopSignal":
        self.before = {n: signal.signal(n, self._note) for n in STOP_SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def wait(self) -> None:
        """From here on a signal is only noted: the loop finishes its step and saves."""
        self.waits = True

    def act(self) -> None:
        """From here on a signal ends the program where it is, as one that came in between does now: all is saved."""
        self.waits = False
        if self.received:
            raise SystemExit(EXIT_STOPPED)

    def _note(self, number, frame):
        if self.received:
            if time.monotonic() - self.at < 0.1:  # `timeout` signals the process, then its group
                return
            os._exit(128 + number)
        self.received, self.at = signal.Signals(number).name, time.monotonic()
        what = "finishing this step, then saving" if self.waits else "nothing to save; start again to go on"
        with suppress(OSError):  # Ctrl-C has ended `tee` too; print may be what the signal has interrupted
            os.write(2, f"\n{self.received}: {what}\n".encode())
        if not self.waits:
            raise SystemExit(EXIT_STOPPED)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def ignore_signals(worker: int) -> None:
    """For a process that reads media: Ctrl-C, `timeout` and Slurm signal all of them, but the trainer decides."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Lock:
    """RUN/lock names the host and process that own the run folder; a second run is refused, a dead one's lock taken.

    Whether a process of this host lives is asked of the kernel. Of another host nothing can be asked: there the
    owner touches the file every ten seconds, and a lock that nobody touches for two minutes is a dead run's (one
    minute is how long a network file system may show an old time).
    """

    touch, patience = 10.0, 120.0  # seconds

    def __init__(self, folder: Path):
        self.path = folder / "lock"
        self.text = json.dumps(_process(os.getpid()))
        self.done = threading.Event()

    def __enter__(self) -> "Lock":
        on_first_rank(self._take)
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        if _text_of(self.path) == self.text:
            self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    with self.path.open("x") as file:
                        file.write(self.text)
                    break
                except FileExistsError:
                    self._wait_for_the_dead()
        threading.Thread(target=self._keep, daemon=True).start()

    def _keep(self) -> None:
        while not self.done.wait(self.touch):
            with suppress(OSError):  # tried again; if it is gone for good, the next checkpoint says so
                os.utime(self.path)

    def _wait_for_the_dead(self) -> None:
        """Remove the lock of a dead run; SystemExit where its run lives."""
        text = _text_of(self.path)
        if text is None:
            return
        touched = self.path.stat().st_mtime_ns
        try:
            owner = json.loads(text)
            where = f"process {owner['pid']} on {owner['host']}"
        except (ValueError, KeyError, TypeError):
            owner, where = {}, "an unknown process"
        living = f"{self.path.parent} is in use by {where}: stop it first, or use another --out"
        if owner.get("host") == socket.gethostname():
            if owner == _process(owner["pid"]):
                raise SystemExit(living)
        else:
            print(f"{self.path} is of {where}: waiting {self.patience:.0f} s for a sign of life", flush=True)
            end = time.monotonic() + self.patience
            while time.monotonic() < end:
                time.sleep(self.touch / 10)
                if _text_of(self.path) != text:  # given back, or taken over by somebody else
                    return
                if self.path.stat().st_mtime_ns != touched:
                    raise SystemExit(living)
        mine = self.path.with_name(f"lock.{socket.gethostname()}.{os.getpid()}")
        with suppress(FileNotFoundError):  # of several that wait, one can rename it
            self.path.rename(mine)
            if _text_of(mine) == text:
                print(f"{self.path} was left by {where}, which has ended: taken over")
                mine.unlink()
            else:  # another was quicker, and this is its lock
                mine.rename(self.path)


@contextmanager
def replacing(folder: Path):
    """A folder to write into, which takes the place of `folder` once it is complete."""
    temporary = folder.with_name(folder.name + ".writing")
    with writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _process(pid: int) -> dict | None:
    """A living process of this host, told from a later one with its number by when it began; None where it is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text() if sys.platform == "linux" else os.kill(pid, 0)
    except (ProcessLookupError, FileNotFoundError):
        return None
    fields = stat.rpartition(")")[2].split() if stat else [""] * 20
    return None if fields[0] == "Z" else {"host": socket.gethostname(), "pid": pid, "began": fields[19]}


@contextmanager
def writing(path: Path):
    """Turn a write that fails into an error that says what was full, or not ours to write."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        folder = next(p for p in path.absolute().parents if p.exists())
        free = shutil.disk_usage(folder).free
        raise SystemExit(
            f"{path} cannot be written: {error} ({free / 2**20:,.0f} MB free in {folder}). What was saved before is "
            "whole: mend the cause and start the same command again"
        ) from None


# ------------------------------------------------------------------------------------------------------------
# 5  Model folders
# ------------------------------------------------------------------------------------------------------------


def model_folder(name: str, weights: bool = True, tries: int = 5, flag: str = "--model") -> Path:
    """The folder of a model, downloaded first where `name` is a hub ID; refused where files are missing or cut off.

    Without `weights` only the configuration and tokenizer are needed (and fetched).
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.count("/") != 1 or name.startswith((".", "/")):
            raise SystemExit(f"{flag} {name}: no such folder (a hub ID looks like organisation/name)")
        folder = _download(name, weights, tries, flag)
    problems = model_problems(folder, weights)
    if problems:
        raise SystemExit("\n".join([f"{flag} {name} cannot be used:", *(f"  {p}" for p in problems)]))
    return folder


def _download(name: str, weights: bool, tries: int, flag: str) -> Path:
    from huggingface_hub import snapshot_download  # comes with transformers
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    for attempt in range(1, tries + 1):
        try:  # finished files are kept: each try goes on where the last one stopped
            return Path(snapshot_download(name, allow_patterns=patterns))
        except (OSError, HfHubHTTPError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")  # a compute node: slurm/download.sh
            if attempt == tries or offline or status in (401, 403, 404):
                raise SystemExit(f"{flag} {name}: neither a folder here nor to be downloaded: {error}") from None
            print(f"download of {name} failed ({error}); try {attempt + 1} of {tries}", flush=True)
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def model_problems(folder: Path, weights: bool = True) -> list[str]:
    """What is missing or cut off in a model folder, one line a fault; reads headers only, so it takes seconds."""
    problems = [f"{p}: a download that did not finish; run it again" for p in sorted(folder.rglob("*.incomplete"))]
    if not (folder / "config.json").is_file():
        problems.append(f"{folder / 'config.json'}: missing")
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(f"{path}: truncated or not JSON ({error}); download it again")
    if problems:
        return problems
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config"):
        text = "the weights are quantised: merged with an adapter they would be rounded again; use the original ones"
        problems.append(f"{folder / 'config.json'}: {text}")
    if not weights:
        return problems
    shards = weight_files(folder)
    if not shards:
        other = ", ".join(p.name for p in folder.glob("*.bin")) or "no weights"
        problems.append(f"{folder}: model.safetensors is missing ({other} found; pickled weights are never read)")
    for shard in shards:
        fault = _safetensors_fault(shard)
        if fault:
            problems.append(f"{shard}: {fault}")
    return problems


def weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, or model.safetensors; not whatever else lies in the folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [path for path in [folder / "model.safetensors"] if path.exists()]


def _safetensors_fault(path: Path) -> str | None:
    if not path.is_file():
        return "missing; download the model again"
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                return f"truncated or not safetensors ({size} bytes); download it again"
            header = json.loads(file.read(length))
    except ValueError as error:
        return f"unreadable header ({error}); download it again"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"{size} bytes instead of {expected}: truncated; download it again"


def open_model(
    kind,
    folder: Path,
    config,
    dtype,
    grafted: tuple[str, ...] = (),
    replaced: str = "",
    remedy: str = "",
    part: str = "",
):
    """kind.from_pretrained, ended where a weight is missing or has no place: it would be drawn at random, or lost.

    `grafted` are the prefixes of weights that the script loads itself, see load_part; of the model's own the folder
    may lack those whose names contain `replaced`. `remedy` is said where a weight has no place. With `part`, the model
    is that part of a larger one whose names begin so; transformers translates the rest of them, load_part does not.
    """
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would list what is grafted as unexpected
    model, found = kind.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
        key_mapping={rf"^{re.escape(part)}": ""} if part else None,
    )
    transformers.logging.set_verbosity(level)
    missing = sorted(name for name in found["missing_keys"] if not (replaced and replaced in name))
    if missing:
        text = f"{len(missing)} weights are missing, such as {missing[0]}; download it again"
        raise SystemExit(f"--model {folder}: {text}")
    foreign = sorted(name for name in found["unexpected_keys"] if not name.startswith(grafted))
    if foreign and not part:
        text = f"{len(foreign)} weights without a place, such as {foreign[0]}"
        raise SystemExit(f"--model {folder}: {text}" + (f"; {remedy}" if remedy else ""))
    return model


def load_part(folder: Path, prefixes: tuple[str, ...], module: torch.nn.Module) -> None:
    """Load one module's weights, those whose names begin with a prefix, from a folder of safetensors."""
    weights = {}
    for path in weight_files(folder):
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            for prefix in prefixes:
                found = [name for name in names if name.startswith(prefix)]
                weights |= {name.removeprefix(prefix): file.get_tensor(name) for name in found}
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise SystemExit(f"{folder}: {prefixes[0]}* does not fit {type(module).__name__}: {error}") from None


def tokenizer(folder: Path):
    """The checkpoint's tokenizer, with its chat template wherever that stands, which is printed."""
    found = transformers.AutoTokenizer.from_pretrained(folder)
    source = "chat_template.jinja" if (folder / "chat_template.jinja").is_file() else "tokenizer_config.json"
    for name in ("chat_template.json", "processor_config.json"):  # where a processor of an older transformers put it
        path = folder / name
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
        if template and source != "chat_template.jinja":
            found.chat_template, source = template, name
            break
    if found.chat_template:
        print(f"chat template: {folder / source}")
    return found


def image_processor(folder: Path, **expected):
    """The checkpoint's image processor, always through Pillow: the same pixels whether torchvision is there or not.

    `expected` are its attributes that must be the vision tower's own.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text())
            kind = config.get("image_processor", config).get("image_processor_type")
            if kind:
                kind = kind.removesuffix("Fast").removesuffix("Pil")
                found = getattr(transformers, f"{kind}Pil", None)
                if found is None:
                    raise SystemExit(f"--model {folder}: transformers has no {kind}Pil ({name}: image_processor_type)")
                processor = found.from_pretrained(folder)
                for key, value in expected.items():
                    if getattr(processor, key) != value:
                        text = f"{key} {getattr(processor, key)}, the vision tower has {value} (config.json)"
                        raise SystemExit(
                            f"--model {folder}: preprocessor_config.json has {text}; copy the checkpoint's own"
                        )
                return processor
    raise SystemExit(f"--model {folder}: no preprocessor_config.json that names an image_processor_type")


def save_image_processor(processor, folder: Path) -> None:
    """Write it as the model was trained with it, also into the other file that may hold one."""
    processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if "image_processor" in config:
        config["image_processor"] = json.loads((folder / "preprocessor_config.json").read_text())
        write_json(path, config)


# ------------------------------------------------------------------------------------------------------------
# 6  Reading data
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A fault found in the data: file (and line), the row's ID where there is one, what is wrong and what to do."""

    where: str
    row: str | None
    text: str

    def __str__(self):
        return f"{self.where}{f' (id {self.row})' if self.row else ''}: {self.text}"


def read_jsonl(path: Path) -> tuple[list[tuple[str, dict]], list[Problem]]:
    """The objects of a JSON-lines file, each with its "file:line", and the lines that are none."""
    rows, problems = [], []
    try:
        # with a byte order mark or without; splitlines would also cut at U+2028 inside a text
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        return [], [Problem(path.name, None, f"not UTF-8 ({error}); convert the file")]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                rows.append((f"{path.name}:{number}", row))
            except ValueError as error:
                problems.append(Problem(f"{path.name}:{number}", None, f"not a JSON object ({error}); mend the line"))
    if not rows and not problems:
        problems.append(Problem(path.name, None, "the file holds no rows"))
    return rows, problems


def data_files(data: Path) -> dict[str | None, Path]:
    """{split: its file} of a data folder, or {None: its only file}, to be divided by split_of."""
    if not data.is_dir():
        raise SystemExit(f"--data {data}: no such folder")
    found = [path for s in ("train", "val", "test") for path in sorted(data.glob(f"{s}.json*"))]
    files = {path.stem: path for path in found if path.suffix in (".json", ".jsonl")}
    if len(files) < len(found):
        raise SystemExit(f"--data {data}: one file a split, not {', '.join(path.name for path in found)}")
    whole = [] if files else sorted([*data.glob("*.jsonl"), *data.glob("*.json")])
    if len(whole) != 1 and not files:
        raise SystemExit(f"--data {data}: neither train/val/test.jsonl nor a single .jsonl or .json file")
    return files or {None: whole[0]}


def split_of(group: str) -> str:
    """70/15/15 by image or patient, from the name alone: adding rows later moves none of the others."""
    share = random.Random(group).random()
    return "train" if share < 0.70 else "val" if share < 0.85 else "test"


def choose_rows(read, args: argparse.Namespace) -> tuple[list, list[Problem]]:
    """The rows and the problems among what was read; rows as --only-ids and --limit leave them, each ID once."""
    rows, problems = [], []
    for item in read:
        (problems if isinstance(item, Problem) else rows).append(item)
    if args.only_ids:
        ids = read_ids(args.only_ids)
        unknown = sorted(ids - {row.id for row in rows if row.split == "train"})
        if unknown:
            raise SystemExit(f"--only-ids {args.only_ids}: {len(unknown)} are no training rows, such as {unknown[0]!r}")
        rows = [row for row in rows if row.split != "train" or row.id in ids]
    if args.limit:
        rows = [r for s in ("train", "val", "test") for r in [r for r in rows if r.split == s][: args.limit]]
    seen = {}
    for row in rows:
        if row.id in seen:
            problems.append(Problem(row.where, row.id, f"duplicate ID, first used at {seen[row.id]}; make it unique"))
        seen.setdefault(row.id, row.where)
    return rows, problems


def misspelt(row: dict, known: set[str]) -> str | None:
    """A sentence on the first unknown field that is spelt like a known one, which would be ignored silently."""
    for name in row.keys() - known:
        close = difflib.get_close_matches(name, known - row.keys(), n=1, cutoff=0.8)
        if close:
            return f"unknown field {name!r}; did you mean {close[0]!r}?"
    return None


def inside(folder: Path, name: str) -> Path:
    """folder/name, or ValueError where it does not exist or leaves the folder (.., absolute path, symbolic link)."""
    try:
        path = (folder / name).resolve()
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a link to itself
        raise ValueError(f"{name} cannot be opened: {error}") from None
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads outside the data folder; copy the file into it")
    if not found:
        raise ValueError(f"{name} is missing; restore the file or leave the row out (--skip-bad)")
    return path


def find_image(folder: Path, name: str) -> str:
    """Kvasir-VQA names an image by path, by file name or by ID alone; the path is then images/ID.jpg."""
    with suppress(OSError):  # a name too long for any file
        for candidate in (name, f"images/{name}", *(f"images/{name}.{e}" for e in ("jpg", "jpeg", "png"))):
            if (folder / candidate).exists():
                return candidate
    return name  # reported as missing when it is opened


def open_image(folder: Path, name: str, max_pixels: int = 50_000_000) -> Image.Image:
    """Decode a JPEG or PNG of the data folder completely, as RGB. Raises ValueError that names the file and fault."""
    path = inside(folder, name)
    try:
        with Image.open(path, formats=["JPEG", "PNG"]) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {max_pixels:,}; scale it down")
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{image.n_frames} frames; an image row needs one")
            if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
                raise ValueError(f"colour mode {image.mode}; convert it to RGB")
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # damaged files make a decoder raise anything
        what = "neither JPEG nor PNG" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name} cannot be read: {what}") from None


def check_media(folder: Path, rows, measure) -> tuple[list[Problem], dict, dict]:
    """Open every file once; the same bytes or group in two splits is a fault too.

    A row has where, id, split, group and media, a list of names; where some of these may be in two splits, such as
    the recording of a question, `shown` lists the others; where it belongs to several groups, `groups` does.
    measure(folder, name) opens a file completely and returns what its tokens are counted from, JSON-like. Returned
    are the faults, {name: what it measured}, and {name: sha256} of what could be read.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.media))

    def look(name: str) -> tuple:
        try:
            return None, measure(folder, name), file_sha256(folder / name)
        except ValueError as error:
            return str(error), None, None

    mine = names[rank() :: ranks()]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # decoding runs outside Python's lock
        looked = progress(pool.map(look, mine), desc="media", total=len(mine), unit="file")
        seen = {k: v for part in gather(dict(zip(mine, looked, strict=True))) for k, v in part.items()}
    problems, first = [], {}
    for row in rows:
        broken = [seen[name][0] for name in row.media if seen[name][0]]
        shared = [("group", group, group) for group in getattr(row, "groups", [row.group])]
        shared += [("file", name, seen[name][2]) for name in shown(row)]
        for what, name, key in shared if not broken else []:
            other = first.setdefault((what, key), row)
            if other.split != row.split:
                text = f"{what} {name} of {row.split} is also in {other.split} ({other.where}); keep it in one split"
                broken.append(text)
        if broken:
            problems.append(Problem(row.where, row.id, "; ".join(broken)))
    digests = {name: found[2] for name, found in seen.items() if not found[0]}
    return problems, {name: found[1] for name, found in seen.items()}, digests


def shown(row) -> list[str]:
    """The files of a row that may not be in two splits: all of them, unless it says which."""
    return getattr(row, "shown", row.media)


def overlaps(rows, digests: dict[str, str]) -> dict[str, dict]:
    """For val and test: how many files, by their content, are in earlier splits too, and whose questions these are.

    `questions_touched` show at least one such file, `questions_contained` nothing else.
    """
    found, earlier = {}, set()
    for split in ("train", "val", "test"):
        part = [{digests.get(name) for name in shown(row)} for row in rows if row.split == split]
        files = set().union(*part) - {None}
        if split != "train" and part:
            shared = files & earlier
            touched = sum(bool(p & shared) for p in part)
            contained = sum(bool(p) and p <= shared for p in part)  # a text alone shows nothing
            found[split] = {"shown": len(files), "shared": len(shared), "questions": len(part)}
            found[split] |= {"questions_touched": touched, "questions_contained": contained}
        earlier |= files
    return found


def print_overlaps(found: dict[str, dict]) -> None:
    for split, n in found.items():
        text = f"{split}: {n['shared']} of {n['shown']} files shown are in earlier splits too, in "
        text += f"{n['questions_touched']} of {n['questions']} questions, "
        print(f"{text}{n['questions_contained']} of which show nothing else")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------
# 7  Checkpoints
# ------------------------------------------------------------------------------------------------------------


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(run: Path, step: int, write, state: dict, keep: int) -> None:
    """Write checkpoints/step-N: beside its final name, synced, then renamed, so that a kill leaves the old ones whole.

    write(folder) puts the tensors there; state is saved as state.json; manifest.json holds every file's sha256.
    The first rank writes, the others wait. SystemExit where it fails: what was saved before is whole.
    """
    folder = checkpoint_folder(run, step)
    temporary = folder.with_suffix(".writing")

    def save() -> None:
        if _text_of(run / "lock") not in (None, json.dumps(_process(os.getpid()))):
            raise SystemExit(f"another run has taken {run} over (see {run / 'lock'}); step {step} is not saved")
        try:
            with writing(folder):
                _write_checkpoint(temporary, write, state)
                temporary.rename(folder)
                for path in (folder.parent, run, run / "metrics.jsonl"):
                    if path.exists():
                        _sync(path)
        except SystemExit:
            shutil.rmtree(temporary, ignore_errors=True)  # the room is needed
            raise
        for old in sorted(folder.parent.glob("step-????????"))[:-keep]:
            old.rename(old.with_suffix(".removing"))  # half removed it must not look like a checkpoint
        for left in [*folder.parent.glob("step-????????.removing"), *folder.parent.glob("step-????????.writing")]:
            shutil.rmtree(left, ignore_errors=True)  # a file that is read elsewhere stays on NFS: next time

    on_first_rank(save)


def _write_checkpoint(folder: Path, write, state: dict) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write(folder)
    write_json(folder / "state.json", state)
    write_json(folder / "manifest.json", {p.name: file_sha256(p) for p in sorted(folder.iterdir())})
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checkpoint_fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"no readable manifest ({error})"
    for name, digest in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_sha256(folder / name) != digest:
            return f"{name} does not match its sha256"
    return None


def find_checkpoint(run: Path, resume: str) -> Path | None:
    """The checkpoint that --resume names: a folder, or with "auto" the newest of the run whose manifest holds."""
    found = on_first_rank(lambda: _find_checkpoint(run, resume))
    return Path(found) if found else None


def _find_checkpoint(run: Path, resume: str) -> str | None:
    if resume not in ("auto", "none"):
        fault = checkpoint_fault(Path(resume))
        if fault:
            raise SystemExit(f"--resume {resume}: {fault}")
        return resume
    folders = sorted((run / "checkpoints").glob("step-????????"), reverse=True)
    if resume == "none" and folders:
        raise SystemExit(f"{run} holds checkpoints of an earlier run: use another --out, or --resume auto to go on")
    for folder in folders:
        fault = checkpoint_fault(folder)
        if not fault:
            print(f"resuming from {folder}")
            return str(folder)
        print(f"passing over {folder}: {fault}")
    if folders:  # starting over without a word would lose the run
        raise SystemExit(f"no checkpoint of {run} is whole; restore one, or start again with another --out")
    return None


# what may not change when a run goes on; how many ranks share the work may
SAME_SETTINGS = [
    *("tune", "lora_r", "lora_alpha", "rslora", "lora_dropout", "lr", "warmup", "weight_decay", "clip"),
    *("seed", "questions_per_step", "pack_tokens", "share_prefix", "sentinels", "dtype"),
]


def adopt_settings(checkpoint: Path, args: argparse.Namespace, own: list[str]) -> None:
    """For answering and merging: take from the checkpoint which parameters it holds and what they were trained to see.

    `own` are the script's own settings of that kind.
    """
    same = json.loads((checkpoint / "state.json").read_text())["same"]
    for name in ("tune", "lora_r", "lora_alpha", "rslora", "sentinels", *own):
        if name not in same:
            raise SystemExit(f"{checkpoint} is of another script, or of an older version: it does not say its {name}")
        if getattr(args, name) != same[name]:
            print(f"{name} {same[name]} (from {checkpoint})")
            setattr(args, name, same[name])


def go_back(run: Path, step: int) -> None:
    """Move checkpoints after `step` to RUN/abandoned: broken ones, and those that --resume FOLDER went back from."""

    def move() -> None:
        for folder in sorted((run / "checkpoints").glob("step-????????")):
            if folder > checkpoint_folder(run, step):
                with writing(run / "abandoned"):
                    (run / "abandoned").mkdir(exist_ok=True)
                    shutil.rmtree(run / "abandoned" / folder.name, ignore_errors=True)
                    folder.rename(run / "abandoned" / folder.name)

    on_first_rank(move)


def first_step(checkpoint: Path | None, same: dict, anyway: bool) -> int:
    """The step to go on after, 0 without a checkpoint. Exits where a setting in `same` has changed, unless `anyway`."""
    if checkpoint is None:
        return 0
    state = json.loads((checkpoint / "state.json").read_text())
    changed = [f"{k} was {state['same'].get(k)}, is {v}" for k, v in same.items() if state["same"].get(k) != v]
    if changed and not anyway:
        raise SystemExit(
            f"{checkpoint} is of another run: {'; '.join(changed)}. Use another --out, or --resume-anyway to go on"
        )
    if changed:
        print(f"going on anyway: {'; '.join(changed)}")
    if state["step"] > same["steps"]:
        raise SystemExit(f"{checkpoint} is of step {state['step']}, but the run has only {same['steps']} steps")
    return state["step"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.Tensor]) -> dict:
    """The optimizer's state under names of its parameters."""
    return {f"{n} {key}": value for n, p in parameters.items() for key, value in optimizer.state[p].items()}


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, parameters: dict[str, torch.Tensor]) -> None:
    """Restore optimizer_tensors from a file. Raises ValueError where the parameters are not the same."""
    tensors = load_file(path)
    # a parameter that no output depends on, such as the tower's last layer, has no state
    if not {key.rpartition(" ")[0] for key in tensors} <= parameters.keys():
        raise ValueError(f"{path}: its parameters are not those trained now (--tune and model must match)")
    for key, value in tensors.items():
        name, _, entry = key.rpartition(" ")
        parameter = parameters[name]
        value = value.clone()  # not a view of the file, which is removed while the run goes on
        if entry != "step":
            value = value.to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        optimizer.state[parameter][entry] = value


def model_fingerprint(folder: Path, files: list[Path] | None = None) -> str:
    """Whether two folders hold the same model: small files whole, of weights the size and both ends.

    With `files` only these count: of an encoder, its configuration and weights.
    """
    digest = hashlib.sha256()
    whole = [p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".model", ".safetensors")]
    for path in sorted(whole if files is None else files):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(2**20))
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# 8  The run folder
# ------------------------------------------------------------------------------------------------------------


def write_json(path: Path, value) -> None:
    """Replace a JSON file whole, never in place; on the first rank only."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    if rank() == 0:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".writing")
            temporary.write_text(text, encoding="utf-8")
            _sync(temporary)
            temporary.replace(path)


def describe_run(script: str, args: argparse.Namespace, argv: list[str]) -> dict:
    """What config.json records: command, settings, versions, commit."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    modules = (torch, transformers, safetensors, numpy)
    return {
        "script": Path(script).name,
        "argv": argv,
        "settings": vars(args),
        "versions": {"python": platform.python_version(), **{m.__name__: str(m.__version__) for m in modules}},
        "git_commit": git.stdout.strip() or None,
    }


def report_check(path: Path, report: dict, fatal: list[Problem], faults: list[Problem], skip_bad: bool) -> None:
    """Write check.json and print every fault; ends the program unless there are none or --skip-bad leaves them out.

    `fatal` are the checkpoint's faults, which no row can be left out for.
    """
    for problem in [*fatal, *faults]:
        print(f"fault: {problem}")
    skipped = sorted({p.where for p in faults}) if skip_bad and not fatal else []
    failures = [str(p) for p in ([*fatal, *faults] if not skipped else [])]
    reasons = [str(p) for p in faults] if skipped else []
    result = {"passed": not failures, **report, "failures": failures, "skipped": skipped, "skipped_because": reasons}
    write_json(path, result)
    if failures:  # on every rank; one tells
        text = f"{len(failures)} faults, listed in {path}"
        text += "; --skip-bad leaves rows with faults out, by name" if faults and not fatal else ""
        raise SystemExit(text if rank() == 0 else 1)


def row_tokens(tokenizer, prefix: list[int], input_ids: list[int], labels: list[int], media: list) -> list[tuple]:
    """A row as the model sees it: (text, "media", "masked" or "learned", how many tokens).

    Media are the placeholders, whose IDs are in `media`; of the prefix, all that stands between them is one text.
    """
    found = []
    for placeholder, run in groupby(prefix, lambda token: token if token in media else None):
        tokens = list(run)
        name = tokenizer.decode(tokens) if placeholder is None else tokenizer.convert_ids_to_tokens(placeholder)
        found.append((name, "masked" if placeholder is None else "media", len(tokens)))
    pieces = zip(tokenizer.convert_ids_to_tokens(input_ids), labels, strict=True)
    return found + [(piece, "masked" if label < 0 else "learned", 1) for piece, label in pieces]


def print_row(id: str, tokens: list[tuple]) -> None:
    """What row_tokens gives, in colours: green learned, grey masked, blue media."""
    colours = {"learned": 32, "masked": 90, "media": 34}
    texts = [(f"[{count} x {text}]" if kind == "media" else text, colours[kind]) for text, kind, count in tokens]
    shown = " ".join(f"\033[{colour}m{text}\033[0m" for text, colour in texts)
    print(f"row {id}, learned green, masked grey, media blue:\n{shown}")


def print_learned(tokenizer, name: str, prefix: list[int], input_ids: list[int], labels: list[int]) -> None:
    """Where the labels of a row stand, what they say, and how much of it is masked."""
    places = [len(prefix) + i for i, label in enumerate(labels) if label >= 0]
    learned, length = tokenizer.decode([label for label in labels if label >= 0]), len(prefix) + len(input_ids)
    masked = 1 - len(places) / length
    print(f"row {name}: {length} tokens, learned {places[0]}–{places[-1]}: {learned!r}, masked {masked:.1%}")


def print_parameters(model) -> None:
    """A table of all and of trainable parameters by component."""
    everything, trainable = Counter(), Counter()
    for name, p in model.named_parameters():
        part = "LoRA" if ".lora_" in name else name.removeprefix("model.").split(".")[0]
        everything[part] += p.numel()
        trainable[part] += p.numel() * p.requires_grad
    print(f"{'component':<24}{'all':>16}{'trainable':>16}")
    for part in everything:
        print(f"{part:<24}{everything[part]:>16,}{trainable[part]:>16,}")
    n, t = everything.total(), trainable.total()
    print(f"{'without LoRA':<24}{n - everything['LoRA']:>16,}{t - trainable['LoRA']:>16,}")
    print(f"{'total':<24}{n:>16,}{t:>16,}  ({t / n:.2%})")


def print_trained(model) -> None:
    """Every trained parameter by name and size; those that differ in a layer's number alone share a line."""
    sizes = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            sizes[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)].append(p.numel())
    print("trained:" if sizes else "nothing is trained")
    for name, found in sizes.items():
        print(f"  {name:<72}{sum(found):>14,}" + (f" in {len(found)} layers" if len(found) > 1 else ""))


def fingerprint(values) -> str:
    """A digest of JSON-like values: whether the data of two runs are the same."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()


def read_ids(path: str) -> set[str]:
    """Row IDs from a file: a line an ID, or a line of JSON with "ids", as in metrics.jsonl and bad_steps.jsonl."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").split("\n")]
        ids = [name for line in lines if line for name in (json.loads(line)["ids"] if line[0] == "{" else [line])]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--only-ids {path}: neither a line an ID nor lines of JSON with ids ({error!r})") from None
    return set(ids)


def _lines_up_to(path: Path, step: int) -> list[dict]:
    """The lines of a JSON-lines file up to a step: a resumed run takes the later ones again."""
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off by a kill while it was written
        if entry["step"] <= step:
            kept.append(entry)
    return kept


def progress(iterable=None, **settings) -> tqdm:
    """A progress bar where there is a terminal, on the first rank."""
    return tqdm(iterable, dynamic_ncols=True, disable=not sys.stderr.isatty() or rank() > 0, **settings)


def _tensorboard(run: Path, step: int, args: argparse.Namespace) -> tuple | None:
    """(log(numbers, step), close) where --tensorboard asks for it. What was logged after `step` is taken back."""
    if not args.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run / "tensorboard", purge_step=step + 1)
    return lambda numbers, at: [writer.add_scalar(name, n, at) for name, n in numbers.items()], writer.close


def _wandb(run: Path, step: int, args: argparse.Namespace) -> tuple | None:
    """The same for --wandb PROJECT: a run of the same name goes on where this one is started again."""
    if not args.wandb:
        return None
    import wandb

    name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    board = wandb.init(project=args.wandb, name=str(run), id=name, resume="allow", dir=run, config=vars(args))
    return lambda numbers, at: board.log(numbers, step=at), board.finish


class Metrics:
    """metrics.jsonl, a line a step, and a progress bar (a plain line every ten seconds where there is no terminal).

    bad_steps.jsonl has a line for each step whose loss or gradient was not finite. The first rank writes. What
    --tensorboard and --wandb name gets the numbers of each line, too.
    """

    def __init__(self, run: Path, step: int, total: int, args: argparse.Namespace):
        kept, self.bad_steps = _lines_up_to(run / "metrics.jsonl", step), run / "bad_steps.jsonl"
        self.validated = gather(max((entry["step"] for entry in kept if "val_loss" in entry), default=0))[0]
        write_jsonl(run / "metrics.jsonl", kept)
        if self.bad_steps.exists():
            write_jsonl(self.bad_steps, _lines_up_to(self.bad_steps, step))
        self.path = run / "metrics.jsonl"
        self.file = self.path.open("a", encoding="utf-8") if rank() == 0 else None
        self.total, self.first, self.begun, self.printed = total, step, time.monotonic(), 0.0
        bar = progress(total=total, initial=step, unit="step")
        self.bar = None if bar.disable else bar
        self.boards = [open_board(run, step, args) for open_board in (_tensorboard, _wandb)] if rank() == 0 else []
        self.boards = [board for board in self.boards if board]

    def write(self, **values) -> None:
        if rank() > 0:
            return
        with writing(self.path):
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        step = values["step"]
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        for log, _ in self.boards:
            log(numbers, step)
        if "loss" not in values:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))
            self.say(f"step {step:05d} | {shown}")
        elif self.bar is not None:
            self.bar.update(1)
            rate = f"{values['questions_per_s']:.1f}"
            self.bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{values['lr']:.2e}", q_per_s=rate)
        elif time.monotonic() - self.printed > 10 or step in (1, self.total):
            self.printed = time.monotonic()
            left = (self.printed - self.begun) / (step - self.first) * (self.total - step)
            self.say(
                f"step {step:05d}/{self.total} | loss {values['loss']:.4f} | grad {values['grad_norm']:.2f} | "
                f"lr {values['lr']:.2e} | {values['trees']} trees, {values['questions']} questions | "
                f"{values['questions_per_s']:.1f} questions/s | {left / 60:.1f} min left"
            )

    def write_bad(self, step: int, loss: float, grad_norm: float, ids: list[str]) -> None:
        """A step that changed nothing, because its loss or gradient was not finite."""
        self.say(f"step {step:05d} | loss {loss}, gradient norm {grad_norm}: nothing was changed by rows {ids}")
        if rank() == 0:
            with writing(self.bad_steps), self.bad_steps.open("a", encoding="utf-8") as file:
                entry = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "ids": ids}
                file.write(json.dumps(entry) + "\n")

    def say(self, line: str) -> None:
        try:
            print(line, flush=True) if self.bar is None else self.bar.write(line)
        except OSError:  # whoever read it has gone, such as `tee` by the Ctrl-C that this run saves for
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        for _, close in self.boards:
            close()
        if self.bar is not None:
            self.bar.close()
