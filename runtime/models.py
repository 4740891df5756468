"""Models as the scripts open, count, merge and write them: no weight is ever random, or lost, without a word."""

import functools
import re
import shutil
from collections import Counter
from pathlib import Path

import safetensors
import torch
import transformers
from torch import nn
from transformers import AutoConfig

import common
from runtime import adapters, card, checkpoints, folders, optimizers, original_llava, show
from runtime.attention import in_pieces
from runtime.files import replacing, write_json
from runtime.folders import read_json, readable
from runtime.ranks import on_first_rank

# a part of a model may name Python code too; transformers would ask on the terminal whether to run it
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

SET_ASIDE = "script_config.json"  # the configuration of a model with parts that a script alone reads

# ---- folders ----


def find(name: str, weights: bool, flag: str = "--model") -> Path:
    """The folder of a model, downloaded first where `name` is a hub ID; without `weights` its small files alone.

    All ranks must call it. SystemExit where files are missing or cut off.
    """
    return Path(on_first_rank(lambda: str(original_llava.find(name, weights, flag))))


def find_part(args, kind: str, default: str | None = None) -> None:
    """The model that --KIND-model ("audio", "vision") takes a part from: args.KIND_model becomes its folder.

    args.KIND_weights becomes its fingerprint; both None without flag and default. Refused where a checkpoint, whose
    fingerprint args.KIND_weights then is, was trained with another. All ranks must call it.
    """
    flag, known = f"--{kind}-model", getattr(args, f"{kind}_weights")
    name = getattr(args, f"{kind}_model") or default
    if name is None and known:
        raise SystemExit(f"the checkpoint was trained with a part of another model: give it with {flag}")
    if name is None:
        return
    folder = find(name, not args.check, flag)
    found = part_fingerprint(folder)
    if known not in (None, found):
        raise SystemExit(f"{flag} {folder}: the checkpoint was trained with another model, or another configuration")
    setattr(args, f"{kind}_model", str(folder))
    setattr(args, f"{kind}_weights", found)


@functools.lru_cache
def part_fingerprint(folder: Path) -> str:
    """Of a folder's weights and of every *config.json, such as how images are prepared."""
    small = [path for path in folder.glob("*config.json") if path.is_file()]
    return folders.fingerprint(folder, [*small, *folders.weight_files(folder)])[:12]


def config(folder: Path, kinds: str | tuple[str, ...] = (), remedy: str = "", flag: str = "--model", grafted=False):
    """The configuration, whose model_type must be `kinds`, or one of them; without, any that transformers has.

    With `grafted` also that of a model which is the script's alone, see write_model.
    """
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    path = folder / SET_ASIDE if grafted and (folder / SET_ASIDE).is_file() else folder / "config.json"
    found = read_json(path).get("model_type")
    if kinds and found not in kinds:
        text = f"{flag} {folder}: model_type {found!r}, not {' or '.join(map(repr, kinds))}"
        raise SystemExit(f"{text}; {remedy}" if remedy else text)
    with readable(f"{flag} {folder}"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def tokenizer(folder: Path):
    """The checkpoint's tokenizer, with its chat template wherever that stands; says where it was found."""
    with readable(f"--model {folder}"):  # it reads the first and the third of these
        found = original_llava.tokenizer(folder, config(folder, grafted=True))
    source = "chat_template.jinja" if (folder / "chat_template.jinja").is_file() else None
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        saved = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if saved and not source:
            found.chat_template, source = saved if isinstance(saved, str) else found.chat_template, name
    if source:
        print(f"chat template: {folder / source}")
    return found


def refuse_template(task, folder: Path, image_id: int | None) -> None:
    """Ends the program unless the chat template writes the image's token once for an image, and asks as it answers."""
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    said = [{"type": "text", "text": "A polyp."}]
    longer = [{"role": "system", "content": said}, *asked, {"role": "assistant", "content": said}, *asked]
    if folders.endless(lambda messages: common.conversation(task.tokenizer, messages, "A polyp."), [asked, longer]):
        text = "its chat template computes without end, or writes without end, where a line is asked for"
        raise SystemExit(f"--model {folder}: {text}; copy the original checkpoint's chat_template.jinja")
    try:
        text = common.conversation(task.tokenizer, asked, "A polyp.")
    except Exception as error:  # a template raises what it likes
        raise SystemExit(f"--model {folder}: {error}; copy the original checkpoint's chat_template.jinja") from None
    if image_id is not None and task.tokenizer.encode(text).count(image_id) != 1:  # None: a fault, listed already
        token = task.tokenizer.convert_ids_to_tokens(image_id)
        text = f"the chat template does not write {token} (ID {image_id}) once for an image but {text!r}"
        raise SystemExit(f"--model {folder}: {text}; copy the original checkpoint's")


# ---- weights ----


def open_model(
    kind, folder: Path, config, dtype: torch.dtype, grafted=(), replaced="", remedy="", part="", from_scratch=False
) -> nn.Module:
    """kind.from_pretrained; ends the program where a weight is missing or has no place: it would be random, or lost.

    `grafted` are the prefixes of weights that the script loads itself, see load_part; of the model's own the folder
    may lack those whose names contain `replaced`. `remedy` is what helps where a weight has no place. With `part` it
    is that part of a larger model whose names begin so; transformers translates the rest of them, load_part does not.
    `from_scratch` alone draws the weights; under torch.device("meta") there are none.
    """
    transformers.AttentionInterface.register("sdpa", in_pieces)  # the same where none are given
    settings = {"dtype": dtype, "attn_implementation": "sdpa", "trust_remote_code": False}
    with readable(f"--model {folder}"):  # it ends where there is no such model, or none whose attention takes a mask
        if torch.get_default_device().type == "meta" or from_scratch:
            if not hasattr(kind, "from_config"):  # no Auto class
                return kind(config)
            return kind.from_config(config, **settings)
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it would list what is grafted as unexpected
        settings |= {"config": config, "key_mapping": {rf"^{re.escape(part)}": ""} if part else None}
        try:
            model, found = original_llava.from_pretrained(kind, folder, **settings)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError("config.json gives other shapes than the weights have; download both again") from None
        transformers.logging.set_verbosity(level)
    missing = sorted(name for name in found["missing_keys"] if not (replaced and replaced in name))
    if missing:
        text = f"{len(missing)} weights are missing, such as {missing[0]}; download it again"
        raise SystemExit(f"--model {folder}: {text}")
    foreign = sorted(name for name in found["unexpected_keys"] if not name.startswith(grafted))
    if foreign and not part:
        text = f"{len(foreign)} weights without a place, such as {foreign[0]}"
        raise SystemExit(f"--model {folder}: {text}" + (f"; {remedy}" if remedy else ""))
    if getattr(model, "generation_config", None):  # answers are greedy; some published settings cannot even be saved
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = {name: getattr(model.generation_config, name) for name in ids}
        model.generation_config = transformers.GenerationConfig(**kept)
    return model


def load_part(folder: Path, prefixes: tuple[str, ...], module: nn.Module) -> None:
    """Load one module's weights, those whose names begin with a prefix, from a folder of safetensors."""
    if torch.get_default_device().type == "meta":  # it is only counted
        return
    weights = {}
    for path in folders.weight_files(folder):
        with safetensors.safe_open(path, "pt") as file:
            found = [(name, prefix) for name in sorted(file.keys()) for prefix in prefixes if name.startswith(prefix)]
            weights |= {name.removeprefix(prefix): file.get_tensor(name) for name, prefix in found}
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise SystemExit(f"{folder}: {prefixes[0]}* does not fit {type(module).__name__}: {error}") from None


def load_parts(folder: Path, vlm: nn.Module, prefixes: tuple[str, ...]) -> None:
    """The weights of what a script has grafted onto a model, saved with it: ("projector.", …)."""
    for prefix in prefixes:
        load_part(folder, (prefix,), vlm.get_submodule(prefix[:-1]))


def prepare_training(choose_trained, vlm: nn.Module, folder: Path, args) -> None:
    """choose_trained(vlm, args), which says what is trained, and --grad-checkpoint.

    Ends the program where the script's patterns, or --pack-tokens, do not fit the model.
    """
    window = getattr(vlm.config.get_text_config(), "sliding_window", None)
    if window is not None and window < args.pack_tokens:
        raise SystemExit(f"--pack-tokens {args.pack_tokens} is longer than the model's sliding window {window}")
    with readable(f"--model {folder}"):  # its layers may have other names than LORA_PATTERN's
        choose_trained(vlm, args)
    if args.grad_checkpoint:  # not reentrant: the inputs of a frozen base need no gradient
        vlm.gradient_checkpointing_enable({"use_reentrant": False})


# ---- counting, merging, writing ----


def print_trained(vlm: nn.Module) -> None:
    """How many parameters are trained, of how many, by component: at most a few lines."""
    everything, trained = show.counts(vlm)
    n, total, parts = trained.total(), everything.total(), [f"{part} {n:,}" for part, n in trained.items() if n]
    print(f"trained: {n:,} of {total:,} parameters ({n / total:.2%}): {'; '.join(parts)}")
    show.print_adapted(vlm)


def refuse_faults(task) -> None:
    """Ends the program where the checkpoint has faults, which the data check would have listed."""
    if task.faults:
        raise SystemExit("\n".join(map(str, task.faults)))


def count(load_model, folder: Path, task, run) -> None:
    """Print which parameters would be trained, and how many: of the script's own model, without its weights."""
    refuse_faults(task)
    with torch.device("meta"):
        vlm = load_model(folder, task, run.dtype).vlm
    show.print_parameters(vlm)
    trained = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    optimizers.parameter_groups(trained, run.args)  # a rate of what is not trained is refused


def merge(load_model, folder: Path, task, run) -> None:
    """--merge DIR: the model with what run.checkpoint has trained, as one folder."""
    refuse_faults(task)
    checkpoints.refuse_other_model(run, folder)
    write(load_model, folder, task, run, Path(run.args.merge))
    print(f"wrote {run.args.merge}")


def write_final(load_model, folder: Path, task, run) -> None:
    """RUN/adapter, or RUN/model where every parameter is trained: what run.checkpoint holds."""
    adapter = [path.name for path in run.checkpoint.glob("adapter_*")]
    write(load_model, folder, task, run, run.folder / ("adapter" if adapter else "model"), adapter)


def write(load_model, folder: Path, task, run, path: Path, adapter: list[str] = ()) -> None:
    """The folder `path` with the files `adapter` of run.checkpoint, or without them the merged model."""

    def fill() -> None:
        with replacing(path) as target:
            if not adapter:
                write_model(load_model, folder, task, run, target)
            for name in adapter:
                shutil.copyfile(run.checkpoint / name, target / name)
            card.complete(target, folder, task, run)

    on_first_rank(fill)


def write_model(load_model, folder: Path, task, run, target: Path) -> None:
    """The merged model, with the small files of the folder it came from; card.complete replaces some.

    What was trained in float32 is rounded once, to --dtype where it is given and else to the base's own format.
    """
    dtype = own_format(folder) if run.args.dtype == "auto" else run.dtype
    vlm = load_model(folder, task, dtype).vlm
    with readable(f"{run.checkpoint} cannot be used"):
        adapters.load_trained(vlm, run.checkpoint)
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja", ".model", ".txt") and ".safetensors" not in path.name:
            shutil.copyfile(path, target / path.name)  # without its permissions: the base may be read-only
    common.merge_lora(vlm).to(dtype).save_pretrained(target)
    words = adapters.with_grafts(vlm.config.model_type, vlm)
    if words != vlm.config.model_type:  # all of transformers refuses these words: it would drop, or draw, what it lacks
        (target / "config.json").rename(target / SET_ASIDE)
        write_json(target / "config.json", {"model_type": words, "dtype": words})


def own_format(folder: Path) -> torch.dtype:
    """The number format of most weights in a folder; float32 where there are none."""
    found = Counter(F32=0)
    for path in filter(Path.is_file, folders.weight_files(folder)):  # drawn from scratch it needs none
        found.update(kind for kind, _ in folders.header(path).values())
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(found.most_common(1)[0][0], torch.float32)
