"""Model folders: downloaded with retries, refused where files are missing or cut off, known again by their weights."""

import hashlib
import json
import os
import re
import resource
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
import safetensors
from huggingface_hub.errors import StrictDataclassError

from runtime.files import sha256

ENDS = 2**20  # bytes at either end of a file
LAYERS = "num_hidden_layers", "num_layers", "n_layer", "depth", "encoder_layers", "decoder_layers"  # in config.json
SECONDS, WAITED = 10, 200  # of computing, and in all: what a chat template may take, and
ROOM, LONGEST = 2**30, 2**20  # bytes and characters


def find(name: str, weights: bool = True, flag: str = "--model") -> Path:
    """The folder of a model, downloaded first where `name` is a hub ID; SystemExit where it cannot be used.

    Without `weights` only the configuration and tokenizer are needed (and fetched). `flag` is named in messages.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.count("/") != 1 or name.startswith((".", "/")):
            raise SystemExit(f"{flag} {name}: no such folder (a hub ID looks like organisation/name)")
        folder = download(name, weights, flag)
    found = problems(folder, weights)
    if found:
        raise SystemExit("\n".join([f"{flag} {name} cannot be used:", *(f"  {problem}" for problem in found)]))
    return folder


def download(name: str, weights: bool, flag: str, tries: int = 5) -> Path:
    """Fetch a model from the hub; what is here already stays, so that each try goes on where the last one stopped."""
    patterns = ["README.md", "*.json", "*.model", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    for attempt in range(1, tries + 1):
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # the hub's, or its HTTP library's where a connection is reset
            status = getattr(getattr(error, "response", None), "status_code", None)
            offline = huggingface_hub.constants.HF_HUB_OFFLINE  # a compute node: slurm/download.sh
            if attempt == tries or offline or status in (401, 403, 404):
                raise SystemExit(f"{flag} {name}: neither a folder here nor to be downloaded: {error}") from None
            print(f"download of {name} failed ({error}); try {attempt + 1} of {tries}", flush=True)
            time.sleep(2**attempt)


def problems(folder: Path, weights: bool = True) -> list[str]:
    """What is missing or cut off in a model folder, one line a fault; reads headers only, so it takes seconds."""
    found = [f"{path}: a download that did not finish; run it again" for path in sorted(folder.rglob("*.incomplete"))]
    if (folder / "adapter_config.json").exists():  # peft, where it is installed, would load it without a word
        return [f"{folder / 'adapter_config.json'}: an adapter is no model: merge it first (--merge), or remove it"]
    if not (folder / "config.json").is_file():
        found.append(f"{folder / 'config.json'}: missing")
    for path in sorted(folder.glob("*.json")):
        try:
            value = read_json(path)
            if path.name == "model.safetensors.index.json":
                weight_files(folder)
            elif path.name.endswith("config.json"):
                value.keys()
        except ValueError as error:
            found.append(f"{path}: truncated or not JSON ({error}); download it again")
        except (KeyError, TypeError, AttributeError):
            found.append(f"{path}: JSON, but not as in a model's file of that name; download it again")
    if found:
        return found
    if read_json(folder / "config.json").get("quantization_config"):
        text = "the weights are quantised: merged with an adapter they would be rounded again; use the original ones"
        found.append(f"{folder / 'config.json'}: {text}")
    shards = weight_files(folder)
    faults = [f"{shard}: {fault}" for shard in shards if (fault := safetensors_fault(shard))]
    if shards and not faults:
        found += size_faults(folder, shards)
    if not weights:
        return found
    if not shards:
        other = ", ".join(path.name for path in folder.glob("*.bin")) or "no weights"
        found.append(f"{folder}: model.safetensors is missing ({other} found; pickled weights are never read)")
    return found + faults


def weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, or model.safetensors; not whatever else lies in the folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return [path for path in [folder / "model.safetensors"] if path.exists()]


def header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """{name: (number format, shape)} of a file's tensors. SafetensorError where its size is another, or no header."""
    with safetensors.safe_open(path, "np") as file:
        found = {name: file.get_slice(name) for name in sorted(file.keys())}
        return {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in found.items()}


def safetensors_fault(path: Path) -> str | None:
    """Why a file of weights cannot be used, from its header and size alone; None where it can."""
    if not path.is_file():
        return "missing; download the model again"
    try:
        tensors = header(path)
    except (safetensors.SafetensorError, OSError) as error:
        return f"truncated or not safetensors ({path.stat().st_size} bytes: {error}); download it again"
    for name, (kind, _) in tensors.items():
        if name.endswith(".weight") and kind not in ("F64", "F32", "F16", "BF16"):  # transformers would convert it
            return f"{name} is {kind}, not floating-point numbers; use the original weights"
    return None


def size_faults(folder: Path, shards: list[Path]) -> list[str]:
    """Sizes in config.json far beyond those of the weights: memory would be full before the two are compared."""
    shapes = [shape for shard in shards for _, shape in header(shard).values()]
    largest = max((size for shape in shapes for size in shape), default=0)
    # what is less wrong is found when weights are loaded; of a part that is left out the vocabulary may be larger
    most = dict.fromkeys(LAYERS, len(shapes)) | {"size": 100 * largest, "image_size": largest}
    text = f"the weights are {len(shapes)} tensors with at most {largest} rows or columns; download it again"
    numbers = re.findall(r'"(\w+)": (\d+)', json.dumps(read_json(folder / "config.json")))  # of its parts, too
    faults = [name for name, n in numbers if int(n) > most.get(name, most.get(name.rpartition("_")[2], int(n)))]
    return [f"{folder / 'config.json'}: {name} cannot be as it stands there: {text}" for name in faults]


def fingerprint(folder: Path, files: list[Path] | None = None) -> str:
    """Whether two folders can hold the same model: of each file its size and both ends, which is all of a small one.

    It takes no time; `weights` covers the rest of large files. With `files` only these count, such as an encoder's.
    """
    digest = hashlib.sha256()
    model = [p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".model", ".safetensors")]
    for path in sorted(model if files is None else files):
        if path.name == "generation_config.json":  # answers are greedy, and end at the tokenizer's EOS
            continue
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(ENDS))
            file.seek(max(0, path.stat().st_size - ENDS))
            digest.update(file.read())
    return digest.hexdigest()


def weights(folders: dict[str, Path], known: dict) -> dict[str, dict]:
    """{"--model model.safetensors": {"sha256": …, "file": its path, size, times, inode}} of {flag: folder}.

    `known` is what this has returned before: a file that is the same by path, size, times and inode is not read again.
    """
    found = {}
    for flag, folder in folders.items():
        for path in filter(Path.is_file, weight_files(folder)):  # of a model that is drawn some may be missing
            name, stat = f"{flag} {path.name}", path.stat()
            file = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            before = known.get(name)
            found[name] = before if before and before["file"] == file else {"sha256": sha256(path), "file": file}
    return found


@contextmanager
def readable(what: str):
    """Ends the program where a folder cannot be read, or a model needs Python code from it, which never runs."""
    try:
        yield
    except (ValueError, OSError, safetensors.SafetensorError, StrictDataclassError) as error:  # the last: config.json
        own = "it needs Python code of its own, which never runs here; use a model that transformers reads without"
        raise SystemExit(f"{what}: {own if 'custom code' in str(error) else error}") from None


def endless(write, inputs: list) -> bool:
    """Whether write(input) takes more than it may, which is found out in a process of its own, and ended there.

    A chat template is a program: loops within loops need not end, and {{ 'a' * 10 ** 10 }} fills the memory.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    code = 0
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(WAITED)  # where it computes nothing, but waits for what a thread held that is not here
        with suppress(OSError, ValueError):  # other systems than Linux have no /proc; `ulimit` may allow less
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        for value in inputs:
            try:
                code |= len(write(value)) > LONGEST
            except MemoryError:
                code = 1
            except Exception:  # a template raises what it likes; it is said where it is written for good
                pass
    finally:
        os._exit(code)


def read_json(path: Path):
    """ValueError where a file is not JSON, or larger or deeper than any of a model's."""
    if path.stat().st_size > 2**28:
        raise ValueError(f"{path.stat().st_size} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("lists within lists without end") from None
