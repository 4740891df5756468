"""Model folders: downloaded with retries, refused where files are missing or cut off."""

import hashlib
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import safetensors
from huggingface_hub.errors import StrictDataclassError


def find(name: str, weights: bool = True, tries: int = 5, flag: str = "--model") -> Path:
    """The folder of a model, downloaded first where `name` is a hub ID; SystemExit where it cannot be used.

    Without `weights` only the configuration and tokenizer are needed (and fetched). `flag` is named in messages.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.count("/") != 1 or name.startswith((".", "/")):
            raise SystemExit(f"{flag} {name}: no such folder (a hub ID looks like organisation/name)")
        folder = download(name, weights, tries, flag)
    found = problems(folder, weights)
    if found:
        raise SystemExit("\n".join([f"{flag} {name} cannot be used:", *(f"  {problem}" for problem in found)]))
    return folder


def download(name: str, weights: bool, tries: int, flag: str) -> Path:
    """Fetch a model from the hub; finished files are kept, so that each try resumes where the last one stopped."""
    from huggingface_hub import snapshot_download  # comes with transformers
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    for attempt in range(1, tries + 1):
        try:
            return Path(snapshot_download(name, allow_patterns=patterns))
        except (OSError, HfHubHTTPError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")  # a compute node: slurm/download.sh
            if attempt == tries or offline or status in (401, 403, 404):
                raise SystemExit(f"{flag} {name}: neither a folder here nor to be downloaded: {error}") from None
            print(f"download of {name} failed ({error}); try {attempt + 1} of {tries}", flush=True)
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


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
    if not weights:
        return found
    shards = weight_files(folder)
    if not shards:
        other = ", ".join(path.name for path in folder.glob("*.bin")) or "no weights"
        found.append(f"{folder}: model.safetensors is missing ({other} found; pickled weights are never read)")
    faults = [(shard, safetensors_fault(shard)) for shard in shards]
    return found + [f"{shard}: {fault}" for shard, fault in faults if fault]


def weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, or model.safetensors; not whatever else lies in the folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return [path for path in [folder / "model.safetensors"] if path.exists()]


def safetensors_fault(path: Path) -> str | None:
    """Why a file of weights cannot be used, from its header and size alone; None where it can."""
    if not path.is_file():
        return "missing; download the model again"
    try:
        with safetensors.safe_open(path, "np"):  # it compares the header's shapes with the file's size
            return None
    except (safetensors.SafetensorError, OSError) as error:
        return f"truncated or not safetensors ({path.stat().st_size} bytes: {error}); download it again"


def fingerprint(folder: Path, files: list[Path] | None = None) -> str:
    """Whether two folders hold the same model: of each file its size and both ends (1 MB), which is all of a small one.

    With `files` only these count: of an encoder, its configuration and weights.
    """
    digest = hashlib.sha256()
    model = [p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".model", ".safetensors")]
    for path in sorted(model if files is None else files):
        if path.name == "generation_config.json":  # answers are greedy, and end at the tokenizer's EOS
            continue
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(2**20))
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


@contextmanager
def readable(what: str):
    """Ends the program where a folder cannot be read, or a model needs Python code from it, which never runs."""
    try:
        yield
    except (ValueError, OSError, safetensors.SafetensorError, StrictDataclassError) as error:  # the last: config.json
        own = "it needs Python code of its own, which never runs here; use a model that transformers reads without"
        raise SystemExit(f"{what}: {own if 'custom code' in str(error) else error}") from None


def read_json(path: Path):
    """ValueError where a file is not JSON, or larger or deeper than any of a model's."""
    if path.stat().st_size > 2**28:
        raise ValueError(f"{path.stat().st_size} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("lists within lists without end") from None
