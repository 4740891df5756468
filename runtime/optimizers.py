"""The optimizer: which parameters have which weight decay and learning rate, and its state as files."""

import re
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from runtime import adapters, shards


def parameter_groups(trained: dict[str, nn.Parameter], args) -> list[dict]:
    """The optimizer's groups: weight decay for matrices, none for biases and the scales of norms.

    "scale" is what the learning rate is multiplied with: not 1 for a part of the script's PARTS whose rate is given.
    """
    rates = {part: rate for part in args.parts if (rate := getattr(args, f"lr_{part}")) is not None}
    groups, counts = {}, Counter()
    for name, parameter in trained.items():
        part = next((part for part in rates if re.fullmatch(args.parts[part], name)), None)
        counts[part] += parameter.numel()
        decay = args.weight_decay if parameter.ndim > 1 else 0.0
        fused = parameter.is_cuda and not isinstance(parameter, DTensor)  # in one kernel
        new = {"params": [], "weight_decay": decay, "scale": rates[part] / args.lr if part else 1.0, "fused": fused}
        groups.setdefault((part, parameter.ndim > 1, fused), new)["params"].append(parameter)
    for part in sorted(rates.keys() - counts):
        name = f"lr-{part}"
        raise SystemExit(f"--{name}: nothing of the {part} part is trained (--tune {args.tune}); leave it out")
    if rates:
        found = [(part or "all others", rates.get(part, args.lr), n) for part, n in counts.items()]
        print("learning rates:", ", ".join(f"{part} {rate:g} ({n:,} parameters)" for part, rate, n in found))
    return list(groups.values())


def state(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.Tensor]) -> dict:
    """The optimizer's state under names of its parameters."""
    return {f"{n} {key}": value for n, p in parameters.items() for key, value in optimizer.state[p].items()}


def load_state(path: Path, optimizer: torch.optim.Optimizer, parameters: dict[str, torch.Tensor]) -> None:
    """Restore `state` from a file. Raises ValueError where the parameters are not the same."""
    tensors = adapters.read_tensors(path)
    # a parameter that no output depends on, such as the tower's last layer, has no state
    names = parameters.keys() & {key.rpartition(" ")[0] for key in tensors}
    shapes = {f"{name} {key}": parameters[name].shape for name in names for key in ("exp_avg", "exp_avg_sq")}
    shapes |= {f"{name} step": torch.Size() for name in names}
    if not names or shapes != {key: tensor.shape for key, tensor in tensors.items()}:
        raise ValueError(f"{path}: its parameters are not those trained now (--tune and model must match)")
    for key, value in tensors.items():
        name, _, entry = key.rpartition(" ")
        value = value.clone()  # not a view of the file, which is removed during the run
        optimizer.state[parameters[name]][entry] = shards.as_sharded(value, parameters[name])
