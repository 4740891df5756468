"""What is trained, as files: adapters in peft's format, or the trained parameters by name.

adapter_model.safetensors and adapter_config.json open in peft, and plain LoRA adapters written by peft open here.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common import LoRALinear, add_lora, lora_layers
from runtime.folders import header, read_json
from runtime.shards import as_sharded

PREFIX = "base_model.model."  # peft's, before the name of every tensor
UNSUPPORTED = ["use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "fan_in_fan_out"]
UNSUPPORTED += ["use_qalora", "alora_invocation_tokens", "target_parameters", "trainable_token_indices"]
VALUES = {"r": None, "lora_alpha": None, "lora_dropout": 0.0, "use_rslora": False}  # and what they are where unsaid


def save_trained(model: nn.Module, folder: Path, trained: dict[str, torch.Tensor]) -> None:
    """Everything that is trained: an adapter, or with full tuning `trained`, by parameter name, on the CPU."""
    if lora_layers(model):
        save_adapter(model, folder)
    else:
        save_file(trained, folder / "model.safetensors")


def load_trained(model: nn.Module, folder: Path) -> None:
    """Load what save_trained wrote. Raises ValueError where names or shapes are not the model's, which then stays."""
    if lora_layers(model):
        load_adapter(model, folder)
        return
    tensors = read_tensors(folder / "model.safetensors")
    copy(tensors, {name: p for name, p in model.named_parameters() if p.requires_grad}, folder)


def with_grafts(kind: str, model: nn.Module) -> str:
    """A type of model or adapter; where a script has grafted parts on, one that transformers and peft refuse."""
    grafted = getattr(model, "grafted", None)
    return f"{kind} with {grafted}, which its own training script alone reads" if grafted else kind


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json as peft does, trained plain modules included.

    A projector that is trained but not saved is lost without a word; here whatever requires a gradient is saved.
    Raises ValueError where there are no LoRA layers, or where they differ in r or alpha.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers to save")
    first = next(iter(layers.values()))
    if any((m.r, m.alpha, m.rslora) != (first.r, first.alpha, first.rslora) for m in layers.values()):
        raise ValueError("layers with different r or alpha cannot be saved: adapter_config.json names one of each")
    plain = trained_plain_modules(model)
    config = {
        "peft_type": with_grafts("LORA", model),
        "base_model_name_or_path": getattr(model, "name_or_path", ""),
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(layers),
        "modules_to_save": plain or None,
        "task_type": None,
    }
    tensors = matrices(layers)
    for name in plain:
        tensors |= {f"{name}.{key}": tensor for key, tensor in model.get_submodule(name).state_dict().items()}
    tensors = {PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: Path) -> list[str]:
    """Load an adapter written by save_adapter or by peft; adds the LoRA layers where the model has none.

    Returns the names of the LoRA layers. Every key of the file must have its place and every adapter and trained
    module of the model its key; anything else raises ValueError, as do peft features not supported here.
    """
    (r, alpha, dropout, rslora), tensors = read_config(folder), read_tensors(folder / "adapter_model.safetensors")
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    names = sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    if not lora_layers(model):
        add_lora(model, "|".join(re.escape(name) for name in names), r, alpha, dropout, rslora, without=".*")
    layers = lora_layers(model)
    for layer in layers.values():
        layer.alpha, layer.rslora = alpha, rslora
    places = matrices(layers)
    plain = {*trained_plain_modules(model), *(key.rpartition(".")[0] for key in tensors.keys() - places.keys())}
    places |= {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] in plain}
    copy(tensors, places, folder)
    return names


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors. ValueError where they are of a number format that weights do not have."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{path}: {name} is {tensor.dtype}, not float32, bfloat16 or float16")
    return tensors


def rank_of(folder: Path) -> int | None:
    """The rows of the adapter's first A, read from the file's header; None where the folder holds no adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = header(path) if path.is_file() else {}
    return next((shape[0] for name, (_, shape) in tensors.items() if name.endswith(".lora_A.weight") and shape), None)


def read_config(folder: Path) -> tuple[int, float, float, bool]:
    """(r, alpha, dropout, rslora) of adapter_config.json.

    Raises ValueError unless it is plain LoRA that fits its matrices: another would load, but answer otherwise.
    """
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: adapter_config.json holds no settings")
    used = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal"):
        used.append("init_lora_weights")  # others, such as PiSSA, change the base weights too
    if str(config.get("peft_type")).partition(" with ")[0] != "LORA" or config.get("bias", "none") != "none" or used:
        raise ValueError(f"{folder}: only plain LoRA adapters can be loaded ({used or config.get('peft_type')})")
    config = VALUES | config
    r, alpha, dropout, rslora = (config[name] for name in VALUES)
    kinds = [type(r) is int, type(alpha) in (int, float), type(dropout) in (int, float), type(rslora) is bool]
    if not all(kinds) or r != rank_of(folder) or not abs(alpha) < 1e6 or not 0 <= dropout < 1:
        found = ", ".join(f"{name} {config[name]!r}" for name in VALUES)
        text = f"but the matrices have {rank_of(folder)} rows, and the others are finite numbers"
        raise ValueError(f"{folder}: adapter_config.json says {found[:200]}, {text}; copy the adapter again")
    return r, alpha, dropout, rslora


def matrices(layers: dict[str, LoRALinear]) -> dict[str, torch.Tensor]:
    """{peft's name, without its prefix: A (r, in) or B (out, r)}"""
    return {f"{name}.lora_{x}.weight": getattr(m, f"lora_{x}") for name, m in layers.items() for x in "AB"}


def trained_plain_modules(model: nn.Module) -> list[str]:
    """The names of trained modules without an adapter, such as a projector's layers."""
    lora = {f"{name}.lora_{x}" for name in lora_layers(model) for x in "AB"}
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name not in lora]
    return sorted({name.rpartition(".")[0] for name in trained})


@torch.no_grad()
def copy(tensors: dict[str, torch.Tensor], places: dict[str, torch.Tensor], folder: Path) -> None:
    """Raises ValueError where names or shapes of the folder's tensors are not those of the model, which then stays."""
    homeless, missing = tensors.keys() - places.keys(), places.keys() - tensors.keys()
    if homeless or missing:
        text = f"{len(homeless)} keys without a place ({min(homeless, default='none')}), "
        text += f"{len(missing)} not in the file ({min(missing, default='none')})"
        raise ValueError(f"{folder}: what was trained does not fit the model: {text}")
    for name, tensor in tensors.items():
        if places[name].shape != tensor.shape:
            raise ValueError(f"{folder}: {name} has shape {tuple(tensor.shape)}, the model {tuple(places[name].shape)}")
    for name, tensor in tensors.items():
        places[name].copy_(as_sharded(tensor, places[name]))
