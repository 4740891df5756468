"""What a run prints of its model."""

import re
from collections import Counter, defaultdict

from torch import nn

from common import LAYER


def counts(model: nn.Module) -> tuple[Counter, Counter]:
    """How many parameters each component ("LoRA", "vision_tower", …) has, and how many of them are trained."""
    everything, trained = Counter(), Counter()
    for name, parameter in model.named_parameters():
        component = "LoRA" if ".lora_" in name else name.removeprefix("model.").split(".")[0]
        everything[component] += parameter.numel()
        trained[component] += parameter.numel() * parameter.requires_grad
    return everything, trained


def print_parameters(model: nn.Module) -> None:
    """Every trained parameter by name and size, then a table of all and of trained parameters by component.

    Names that differ in a layer's number alone share a line.
    """
    (everything, trained), sizes = counts(model), defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sizes[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)].append(parameter.numel())
    for name, found in sizes.items():
        print(f"  {name:<72}{sum(found):>14,}" + (f" in {len(found)} layers" if len(found) > 1 else ""))
    print_adapted(model)
    print(f"{'component':<24}{'all':>16}{'trained':>16}")
    for part in everything:
        print(f"{part:<24}{everything[part]:>16,}{trained[part]:>16,}")
    n, t = everything.total(), trained.total()
    print(f"{'without LoRA':<24}{n - everything['LoRA']:>16,}{t - trained['LoRA']:>16,}")
    print(f"{'total':<24}{n:>16,}{t:>16,}  ({t / n:.2%})")


def print_adapted(model: nn.Module) -> None:
    """Which weights of decoder layers have an adapter, and which have none; layers that agree in it share a line."""
    layers = defaultdict(lambda: ({}, {}))  # {layer: (weights with an adapter, without)}, both in the model's order
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight").removesuffix(".base_layer")
        layer = LAYER.match(path)
        if layer and parameter.ndim > 1 and ".lora_" not in name:
            layers[layer[0]][".base_layer." not in name][path.rpartition(".")[2]] = None
    kinds = Counter((layer.rsplit(".", 2)[0], *map(" ".join, found)) for layer, found in layers.items())
    adapted = {stack for stack, weights, _ in kinds if weights}
    for (stack, weights, without), n in kinds.items():
        if stack in adapted:
            print(f"LoRA: {n} layers ({stack}): {weights or 'none'}; without: {without or 'none'}")
