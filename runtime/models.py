import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig

from _old import common as _common
from _old import plain as _plain
from _old import runtime as _old

tokenizer, load_part, print_parameters, print_trained = _old.tokenizer, _old.load_part, _old.print_parameters, _old.print_trained


NO_WEIGHTS = []  # while counting


def open_model(kind, folder, config, dtype, *args, from_scratch=False, **kwargs):
    """As today; with `from_scratch` drawn at random, from its configuration."""
    try:
        if from_scratch and not NO_WEIGHTS:
            return kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
        if NO_WEIGHTS:
            return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        return _old.open_model(kind, folder, config, dtype, *args, **kwargs)
    except ValueError as error:  # no such model, or none whose attention takes a mask
        raise SystemExit(f"--model {folder}: {error}") from None


def load_parts(folder, vlm, prefixes):
    """The weights of what a script has grafted onto a model, saved with it: "projector.", …"""
    for prefix in prefixes if not NO_WEIGHTS else ():
        _old.load_part(folder, (prefix,), vlm.get_submodule(prefix[:-1]))


def count(load_model, folder, task, run):
    """Print how many parameters there are and how many are trained: the script's own model, without its weights."""
    NO_WEIGHTS.append(True)
    with torch.device("meta"):
        vlm = load_model(folder, task, run.dtype).vlm
    NO_WEIGHTS.clear()
    print_trained(vlm)
    print_parameters(vlm)


@functools.lru_cache
def fingerprint(folder):
    """Of a folder's weights and of every *config.json, such as how pictures are prepared."""
    return _plain.tower_fingerprint(Path(folder))


def find_part(args, kind, default):
    """args.vision_model ("vision") becomes a folder, args.vision_weights its fingerprint; refused if a checkpoint's."""
    weights = not (args.check or args.count_params)
    folder = str(find(getattr(args, f"{kind}_model") or default, weights, flag=f"--{kind}-model"))
    found, known = fingerprint(folder), getattr(args, f"{kind}_weights")
    if known not in (None, found):  # adopted from a checkpoint
        raise SystemExit(f"--{kind}-model {folder}: the checkpoint was trained with another")
    setattr(args, f"{kind}_model", folder)
    setattr(args, f"{kind}_weights", found)


def find(name, weights, flag="--model"):
    return Path(_old.on_first_rank(lambda: str(_old.model_folder(name, weights=weights, flag=flag))))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def refuse_template(task, folder, mark):
    """Ends unless the checkpoint's chat template writes `mark` once for an image."""
    try:
        rendered = task.tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise SystemExit(f"--model {folder}: {error}; copy the original checkpoint's tokenizer files") from None
    if rendered.count(mark) != 1:
        raise SystemExit(f"--model {folder}: the chat template does not write {mark} for an image but {rendered!r}")


def heeds_mask(model, trees, task, run):
    """Ends unless packed texts are read as if each were alone, and logits are those of the model's own forward."""
    data = Path(run.args.data)
    old = SimpleNamespace(args=run.args, device=run.device, read_media=lambda part: task.read_media(data, part))
    _plain.verify_first_batch(Autocast(model, run), trees, old)


class Autocast:
    """A model as today's functions call it: they leave autocast to it."""

    def __init__(self, model, run):
        self.model, self.run, self.autocast, self.idle = model, run, run.autocast, None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def hidden(self, *args, **kwargs):
        with self.run.autocast():
            return self.model.hidden(*args, **kwargs)

    def lm_head(self, *args):
        with self.run.autocast():
            return self.model.lm_head(*args)

    def __call__(self, row):
        with self.run.autocast():
            return self.model(row)


def config(folder, kinds, remedy="", flag="--model"):
    """The configuration, whose model_type must be `kinds`, or one of them."""
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if found not in kinds:
        raise SystemExit(f"{flag} {folder}: model_type {found!r}, not {' or '.join(kinds)}. {remedy}")
    return AutoConfig.from_pretrained(folder)


def part(args, flag, known=None):
    """(folder, fingerprint) of the model that a flag takes a part from; refused unless it is the checkpoint's, `known`.

    (None, None) where the flag is not given. Weights are fetched unless --check or --count-params needs none.
    """
    name, weights = getattr(args, flag.strip("-").replace("-", "_")), not (args.check or args.count_params)
    if name is None and known:
        raise SystemExit(f"the checkpoint needs {flag}: give the one that it was trained with")
    if name is None:
        return None, None
    folder = Path(_old.on_first_rank(lambda: str(_old.model_folder(name, weights, flag=flag))))
    found = _old.model_fingerprint(folder, [folder / "config.json", *_old.weight_files(folder)])[:12]
    if known not in (None, found):
        raise SystemExit(f"{flag} {name}: the checkpoint was trained with another")
    return str(folder), found


def refuse_short_window(vlm, args):
    window = getattr(vlm.config.get_text_config(), "sliding_window", None)
    if window is not None and window < args.pack_tokens:
        raise SystemExit(f"--pack-tokens {args.pack_tokens} is longer than the model's sliding window {window}")


def make_faster_or_smaller(vlm, decoder, args):
    if args.grad_checkpoint:  # not reentrant: the inputs of a frozen base need no gradient
        vlm.gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        decoder.compile(dynamic=True)


def write_model(load_model, folder, checkpoint, target, task, dtype):
    vlm = load_model(folder, task, dtype).vlm
    _common.load_trained(vlm, checkpoint)
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja", ".model", ".txt") and ".safetensors" not in path.name:
            shutil.copy(path, target)
    _common.merge_lora(vlm).to(dtype).save_pretrained(target)
    task.tokenizer.save_pretrained(target)
    if task.processor is not None:  # volumes have none
        _old.save_image_processor(task.processor, target)


def merge(load_model, folder, task, run, dtype=None):
    if task.faults:
        raise SystemExit("\n".join(map(str, task.faults)))
    if _old.rank() == 0:
        with _old.writing(Path(run.args.merge)):
            write_model(load_model, folder, run.checkpoint, Path(run.args.merge), task, dtype or run.dtype)
    print(f"wrote {run.args.merge}")


def write_final(load_model, folder, task, run):
    def write():
        adapter = list(run.checkpoint.glob("adapter_*"))
        with _old.replacing(run.folder / ("adapter" if adapter else "model")) as target:
            if not adapter:
                write_model(load_model, folder, run.checkpoint, target, task, run.dtype)
            for path in adapter:
                shutil.copy(path, target)

    _old.on_first_rank(write)
