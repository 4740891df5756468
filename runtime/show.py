"""What a run prints of its model, and colours."""

import re
import sys
from collections import Counter, defaultdict

from torch import nn

COLOURS = {"green": 32, "grey": 90, "blue": 34}


def coloured(text: str, colour: str) -> str:
    """The text in a colour of COLOURS, on a terminal; elsewhere as it is."""
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if sys.stdout.isatty() else text


def component(name: str) -> str:
    """The part of a model that a parameter is counted with, such as "vision_tower"."""
    return "LoRA" if ".lora_" in name else name.removeprefix("model.").split(".")[0]


def print_parameters(model: nn.Module) -> None:
    """Every trained parameter by name and size, then a table of all and of trained parameters by component.

    Names that differ in a layer's number alone share a line.
    """
    everything, trained, sizes = Counter(), Counter(), defaultdict(list)
    for name, parameter in model.named_parameters():
        everything[component(name)] += parameter.numel()
        trained[component(name)] += parameter.numel() * parameter.requires_grad
        if parameter.requires_grad:
            sizes[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)].append(parameter.numel())
    for name, found in sizes.items():
        print(f"  {name:<72}{sum(found):>14,}" + (f" in {len(found)} layers" if len(found) > 1 else ""))
    print(f"{'component':<24}{'all':>16}{'trained':>16}")
    for part in everything:
        print(f"{part:<24}{everything[part]:>16,}{trained[part]:>16,}")
    n, t = everything.total(), trained.total()
    print(f"{'without LoRA':<24}{n - everything['LoRA']:>16,}{t - trained['LoRA']:>16,}")
    print(f"{'total':<24}{n:>16,}{t:>16,}  ({t / n:.2%})")
