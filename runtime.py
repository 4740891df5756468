"""What keeps a run alive; plumbing that may be trusted unread.

    1  flags          the options every script shares, and where each value came from
    2  devices        device, number format, memory
    3  signals        finish the step, save, exit with a code of its own
    4  model folders  downloaded with retries, refused when incomplete
    5  reading data   rows with their file and line, images that cannot do harm, problems listed all at once
    6  checkpoints    atomic, verified, never pickled
    7  the run folder settings, metrics, results

Imports none of our files and knows no model. What decides whether learning is right is in common.py.
"""

import argparse
import difflib
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy
import safetensors
import torch
import transformers
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

Image.MAX_IMAGE_PIXELS = None  # open_image has a cap of its own; Pillow's would warn first and raise later
EXIT_STOPPED = 85  # a signal ended the run after a saved step: start it again to go on

# ------------------------------------------------------------------------------------------------------------
# 1  Flags
# ------------------------------------------------------------------------------------------------------------


def shared_flags(doc: str, **defaults) -> argparse.ArgumentParser:
    """A parser with the options of every script; `defaults` are the script's own values for them."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    yes_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("what to train on").add_argument
    add("--model", required=True, help="model folder, or hub ID (downloaded first)")
    add("--data", help="data folder")
    add("--out", help="run folder")
    add("--limit", type=int, help="use only the first LIMIT rows of each split")
    add("--skip-bad", action=yes_no, default=False, help="leave rows with faults out, by name, in check.json")

    add = parser.add_argument_group("what is trained").add_argument
    add("--tune", choices=["lora", "full"], default="lora", help="adapters, or every parameter (default: lora)")
    add("--lora-r", type=int, default=16, help="rank (default: 16)")
    add("--lora-alpha", type=float, default=32, help="scaling is alpha / r (default: 32)")
    add("--lora-dropout", type=float, default=0.05, help="(default: 0.05)")
    add("--rslora", action=yes_no, default=False, help="scaling alpha / sqrt(r) instead")

    add = parser.add_argument_group("how it is trained").add_argument
    add("--lr", type=float, default=2e-4, help="peak learning rate (default: %(default)s)")
    add("--warmup", type=float, default=0.03, help="share of the steps (default: %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="(default: %(default)s)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--epochs", type=int, default=1, help="(default: %(default)s)")
    add("--max-steps", type=int, help="stop after so many optimizer steps")
    add("--questions-per-step", type=int, default=64, help="at most so many a step (default: %(default)s)")
    add(
        "--pack-tokens",
        type=int,
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
    add("--grad-checkpoint", action=yes_no, default=False, help="recompute activations: less memory, slower")
    add("--compile", action=yes_no, default=False, help="torch.compile the language model")

    add = parser.add_argument_group("saving and going on").add_argument
    add("--save-every", type=int, default=200, help="steps between checkpoints (default: %(default)s)")
    add("--eval-every", type=int, default=200, help="steps between validation losses (default: %(default)s)")
    add("--keep", type=int, default=2, help="checkpoints kept (default: %(default)s)")
    add("--resume", default="auto", help="auto (newest whole checkpoint of --out), none, or a folder")
    add("--eval-split", choices=["test", "val", "train"], default="test", help="split answered at the end")
    add(
        "--decode",
        choices=["free", "trie", "score"],
        default="free",
        help="answers: greedy, greedy among the allowed, or the likeliest of the allowed",
    )
    add("--max-answer-tokens", type=int, default=64, help="limit of a free answer (default: %(default)s)")

    add = parser.add_argument_group("modes instead of training").add_argument
    add("--check", action="store_true", help="prove the data, write check.json, exit")
    add("--overfit", type=int, metavar="N", help="learn the first N rows by heart, or exit 1")
    add("--overfit-steps", type=int, default=200, help="within so many steps (default: %(default)s)")
    add("--overfit-loss", type=float, default=2.0, help="the loss must fall below (default: %(default)s)")
    add("--eval-only", action="store_true", help="answer --eval-split with the adapter of --resume")
    add("--merge", metavar="DIR", help="write model + adapter of --resume as one plain model folder")
    add("--count-params", action="store_true", help="count parameters from the configuration alone")

    parser.set_defaults(**defaults)
    return parser


def describe_settings(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> str:
    """Every setting with its origin: given as a flag, or the default."""
    given, rest = [], []
    for action in parser._actions:
        if action.dest != "help":
            used = any(a.split("=")[0] in action.option_strings for a in argv)
            (given if used else rest).append(f"{action.dest} {getattr(args, action.dest)}")
    return f"settings, given: {', '.join(given)}\nsettings, default: {', '.join(rest)}"


# ------------------------------------------------------------------------------------------------------------
# 2  Devices
# ------------------------------------------------------------------------------------------------------------


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve "auto": the GPU with bf16 where there is one, otherwise the CPU with fp32."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; use --device cpu")
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
# 3  Signals
# ------------------------------------------------------------------------------------------------------------


class StopSignal:
    """Notes SIGTERM, SIGUSR1 (Slurm's warning) or SIGINT; the loop asks after each step. A second one exits at once."""

    def __init__(self):
        self.received, self.process = None, os.getpid()
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self.before = {number: signal.signal(number, self._note) for number in numbers}

    def close(self) -> None:
        """Signals do again what they did before: the last step is saved, the rest can be cut short."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if os.getpid() != self.process:  # a worker that reads media, stopped by the trainer when it is done
            return
        if self.received:
            os._exit(128 + number)
        self.received = signal.Signals(number).name
        print(f"\n{self.received}: finishing this step, then saving", file=sys.stderr, flush=True)


def leave_group(worker: int) -> None:
    """For a process that reads media: Ctrl-C and `timeout` signal the whole group, but only the trainer may stop it."""
    os.setpgrp()


# ------------------------------------------------------------------------------------------------------------
# 4  Model folders
# ------------------------------------------------------------------------------------------------------------


def model_folder(name: str, weights: bool = True, tries: int = 5) -> Path:
    """The folder of a model, downloaded first where `name` is a hub ID; refused where files are missing or cut off.

    Without `weights` only the configuration and tokenizer are needed (and fetched).
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.count("/") != 1 or name.startswith((".", "/")):
            raise SystemExit(f"--model {name}: no such folder (a hub ID looks like organisation/name)")
        folder = _download(name, weights, tries)
    problems = model_problems(folder, weights)
    if problems:
        raise SystemExit("\n".join([f"--model {name} cannot be used:", *(f"  {p}" for p in problems)]))
    return folder


def _download(name: str, weights: bool, tries: int) -> Path:
    from huggingface_hub import snapshot_download  # comes with transformers
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    for attempt in range(1, tries + 1):
        try:  # finished files are kept: each try goes on where the last one stopped
            return Path(snapshot_download(name, allow_patterns=patterns))
        except (OSError, HfHubHTTPError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if attempt == tries or status in (401, 403, 404):
                raise SystemExit(f"--model {name}: neither a folder here nor to be downloaded: {error}") from None
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
    if not weights:
        return problems
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (folder / "model.safetensors").exists():
        shards = ["model.safetensors"]
    else:
        shards = []
        other = ", ".join(p.name for p in folder.glob("*.bin")) or "no weights"
        problems.append(f"{folder}: model.safetensors is missing ({other} found; pickled weights are never read)")
    for shard in shards:
        fault = _safetensors_fault(folder / shard)
        if fault:
            problems.append(f"{folder / shard}: {fault}")
    return problems


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


def image_processor(folder: Path):
    """The checkpoint's image processor, always through Pillow: the same pixels whether torchvision is there or not."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text())
            kind = config.get("image_processor", config).get("image_processor_type")
            if kind:
                kind = kind.removesuffix("Fast").removesuffix("Pil")
                return getattr(transformers, f"{kind}Pil").from_pretrained(folder)
    raise SystemExit(f"--model {folder}: no preprocessor_config.json that names an image_processor_type")


# ------------------------------------------------------------------------------------------------------------
# 5  Reading data
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
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028 inside a text
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


def misspelt(row: dict, known: set[str]) -> str | None:
    """A sentence on the first unknown field that is spelt like a known one, which would be ignored silently."""
    for name in row.keys() - known:
        close = difflib.get_close_matches(name, known - row.keys(), n=1, cutoff=0.8)
        if close:
            return f"unknown field {name!r}; did you mean {close[0]!r}?"
    return None


def inside(folder: Path, name: str) -> Path:
    """folder/name, or ValueError where it does not exist or leaves the folder (.., absolute path, symbolic link)."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads outside the data folder; copy the file into it")
    if not path.is_file():
        raise ValueError(f"{name} is missing; restore the file or leave the row out (--skip-bad)")
    return path


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


def check_media(folder: Path, rows, open_media) -> list[Problem]:
    """Open every file once with open_media(folder, name); the same bytes or group in two splits is a fault too.

    A row has where, id, split, group and media, a list of names.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.media))

    def look(name: str) -> tuple[str | None, str | None]:
        try:
            open_media(folder, name)
            return None, file_sha256(folder / name)
        except ValueError as error:
            return str(error), None

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # decoding runs outside Python's lock
        looked = tqdm(pool.map(look, names), "media", len(names), unit="file", disable=not sys.stderr.isatty())
        faults = dict(zip(names, looked, strict=True))
    problems, first = [], {}
    for row in rows:
        broken = [faults[name][0] for name in row.media if faults[name][0]]
        shared = [("group", row.group, row.group), *(("file", name, faults[name][1]) for name in row.media)]
        for what, name, key in shared if not broken else []:
            other = first.setdefault((what, key), row)
            if other.split != row.split:
                text = f"{what} {name} of {row.split} is also in {other.split} ({other.where}); keep it in one split"
                broken.append(text)
        if broken:
            problems.append(Problem(row.where, row.id, "; ".join(broken)))
    return problems


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------
# 6  Checkpoints
# ------------------------------------------------------------------------------------------------------------


def save_checkpoint(run: Path, step: int, write, state: dict, keep: int) -> Path:
    """Write checkpoints/step-N: beside its final name, synced, then renamed, so that a kill leaves the old ones whole.

    write(folder) puts the tensors there; state is saved as state.json; manifest.json holds every file's sha256.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    temporary = folder.with_suffix(".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    write_json(temporary / "state.json", state)
    files = {p.name: file_sha256(p) for p in sorted(temporary.iterdir())}
    write_json(temporary / "manifest.json", files)
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    if folder.exists():  # only a broken one: a resumed run starts after the newest that is whole
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync(folder.parent)
    whole = sorted(folder.parent.glob("step-????????"))
    for later in whole[whole.index(folder) + 1 :]:  # gone back from with --resume FOLDER: no longer this run's
        (run / "abandoned").mkdir(exist_ok=True)
        shutil.rmtree(run / "abandoned" / later.name, ignore_errors=True)
        later.rename(run / "abandoned" / later.name)
    for old in whole[: whole.index(folder) + 1][:-keep]:
        shutil.rmtree(old)
    return folder


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
    if resume not in ("auto", "none"):
        fault = checkpoint_fault(Path(resume))
        if fault:
            raise SystemExit(f"--resume {resume}: {fault}")
        return Path(resume)
    folders = sorted((run / "checkpoints").glob("step-????????"), reverse=True)
    if resume == "none" and folders:
        raise SystemExit(f"{run} holds checkpoints of an earlier run: use another --out, or --resume auto to go on")
    for folder in folders:
        fault = checkpoint_fault(folder)
        if not fault:
            print(f"resuming from {folder}")
            return folder
        print(f"passing over {folder}: {fault}")
    if folders:  # starting over without a word would lose the run
        raise SystemExit(f"no checkpoint of {run} is whole; restore one, or start again with another --out")
    return None


# what may not change when a run goes on
SAME_SETTINGS = [
    *("tune", "lora_r", "lora_alpha", "rslora", "lora_dropout", "lr", "warmup", "weight_decay", "clip"),
    *("seed", "questions_per_step", "pack_tokens", "share_prefix", "sentinels", "dtype"),
]


def adopt_settings(checkpoint: Path, args: argparse.Namespace) -> None:
    """For answering and merging: take from the checkpoint what decides which parameters it holds."""
    same = json.loads((checkpoint / "state.json").read_text())["same"]
    for name in ("tune", "lora_r", "lora_alpha", "rslora", "sentinels"):
        if getattr(args, name) != same[name]:
            print(f"{name} {same[name]} (from {checkpoint})")
            setattr(args, name, same[name])


def first_step(checkpoint: Path | None, same: dict) -> int:
    """The step to go on after, 0 without a checkpoint. Exits where a setting in `same` has changed since."""
    if checkpoint is None:
        return 0
    state = json.loads((checkpoint / "state.json").read_text())
    changed = [f"{k} was {state['same'].get(k)}, is {v}" for k, v in same.items() if state["same"].get(k) != v]
    if changed:
        raise SystemExit(f"{checkpoint} is of another run: {'; '.join(changed)}. Use another --out")
    return state["step"]


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, parameters: dict[str, torch.Tensor]) -> None:
    """Optimizer state by parameter name and the random number generators, as safetensors."""
    tensors = {"rng cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name} {key}"] = value.detach().cpu().contiguous()
    save_file(tensors, path)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, parameters: dict[str, torch.Tensor]) -> None:
    """Restore what save_optimizer wrote. Raises ValueError where the parameters are not the same."""
    tensors = load_file(path)
    torch.set_rng_state(tensors.pop("rng cpu"))
    cuda = tensors.pop("rng cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    # a parameter that no output depends on, such as the tower's last layer, has no state
    if not {key.rpartition(" ")[0] for key in tensors} <= parameters.keys():
        raise ValueError(f"{path}: its parameters are not those trained now (--tune and model must match)")
    for key, value in tensors.items():
        name, _, entry = key.rpartition(" ")
        device = "cpu" if entry == "step" else parameters[name].device
        optimizer.state[parameters[name]][entry] = value.to(device)


# ------------------------------------------------------------------------------------------------------------
# 7  The run folder
# ------------------------------------------------------------------------------------------------------------


def write_json(path: Path, value) -> None:
    """Replace a JSON file whole, never in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    temporary.replace(path)


def describe_run(args: argparse.Namespace, argv: list[str]) -> dict:
    """What config.json records: settings, command, versions, commit."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    modules = (torch, transformers, safetensors, numpy)
    return {
        "settings": vars(args),
        "argv": argv,
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
    if failures:
        raise SystemExit(f"{len(failures)} faults, listed in {path}; --skip-bad leaves rows with faults out, by name")


def fingerprint(values) -> str:
    """A digest of JSON-like values: whether the data of two runs are the same."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()


class Metrics:
    """metrics.jsonl, a line a step, and a progress bar (a plain line every ten seconds where there is no terminal).

    Lines after `step` are dropped on opening: they are of steps that a resumed run takes again.
    """

    def __init__(self, path: Path, step: int, total: int):
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # cut off by a kill while it was written
                if entry["step"] <= step:
                    kept.append(entry)
        write_jsonl(path, kept)
        self.validated = max((entry["step"] for entry in kept if "val_loss" in entry), default=0)
        self.file = path.open("a", encoding="utf-8")
        self.total, self.first, self.begun, self.printed = total, step, time.monotonic(), 0.0
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=step, dynamic_ncols=True, unit="step") if terminal else None

    def write(self, **values) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        step = values["step"]
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
            print(
                f"step {step:05d}/{self.total} | loss {values['loss']:.4f} | grad {values['grad_norm']:.2f} | "
                f"lr {values['lr']:.2e} | {values['images']} images, {values['questions']} questions | "
                f"{values['questions_per_s']:.1f} questions/s | {left / 60:.1f} min left",
                flush=True,
            )

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        self.file.close()
        if self.bar is not None:
            self.bar.close()
