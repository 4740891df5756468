"""What several test files use: the script as a user runs it, in this process, and what it left behind."""

import json
import re
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import train_llava_med
from inputs.building import build_trees
from inputs.task import Task


def run(folder: Path, out: Path, *flags, script=train_llava_med) -> None:
    """The script on folder/model and folder/data, test answered; the signal handlers of this process are put back."""
    shown = [] if "--report" in flags else ["--no-report"]  # most tests need no page
    argv = ["--model", folder / "model", "--data", folder / "data", "--out", out, "--eval-split", "test"]
    argv += [*shown, *flags]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        script.main([str(a) for a in argv])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refused(folder: Path, out: Path, *flags, script=train_llava_med) -> str:
    """The last words of a run that must end with exit code 1: SystemExit with a message."""
    with pytest.raises(SystemExit) as caught:
        run(folder, out, *flags, script=script)
    assert isinstance(caught.value.code, str), f"exit code {caught.value.code!r} without a message"
    return caught.value.code


def task_class(script):
    """The Task of a script."""
    return next(c for c in vars(script).values() if isinstance(c, type) and issubclass(c, Task) and c is not Task)


def load_demo(folder: Path, script=train_llava_med, *flags) -> SimpleNamespace:
    """A demo's args, task, examples, training trees, and what reads their media."""
    argv = ["--model", folder / "model", "--data", folder / "data", "--out", "never written", "--lora-dropout", 0]
    argv += flags
    args = script.parse_arguments([str(a) for a in argv])
    task = task_class(script)(folder / "model", args)
    examples, problems = script.read_examples(folder / "data", args)
    media = Path(args.media_root)
    task.measured = {name: task.measure(media, name)[0] for example in examples for name in example.media}
    trees, found = build_trees([example for example in examples if example.split == "train"], task)
    assert task.faults + problems == [] and found == {}
    read_media = partial(task.read_media, media)
    return SimpleNamespace(args=args, folder=folder, task=task, examples=examples, trees=trees, read_media=read_media)


def refuses_elsewhere(folder: Path, kind, words: str) -> None:
    """All of transformers and peft refuse a folder in these words, also the class that would drop what it lacks."""
    openers = [AutoConfig.from_pretrained, AutoModel.from_pretrained, kind.from_pretrained]
    openers += [partial(kind.from_pretrained, dtype=torch.bfloat16), AutoModelForImageTextToText.from_pretrained]
    if (folder / "adapter_config.json").is_file():
        base = kind.from_pretrained(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
        openers = [PeftConfig.from_pretrained, partial(PeftModel.from_pretrained, base), kind.from_pretrained]
        openers += [base.load_adapter]
    for opener in openers:
        with pytest.raises((ValueError, AttributeError, KeyError), match=re.escape(words)):
            opener(str(folder))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def read_tensors(folder: Path) -> dict:
    """Every tensor of a folder, by file and name."""
    return {(p.name, k): t for p in sorted(folder.glob("*.safetensors")) for k, t in load_file(p).items()}


def metrics_of(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without what is measured by the clock, those of steps with the IDs of steps.jsonl."""
    measured = {"tokens_per_s", "questions_per_s", "peak_memory_mb"}
    lines = [{k: v for k, v in line.items() if k not in measured} for line in read_lines(out / "metrics.jsonl")]
    ids = {line["step"]: line["ids"] for line in read_lines(out / "steps.jsonl")}
    return [line | ({"ids": ids[line["step"]]} if "loss" in line else {}) for line in lines]


def stop_in(monkeypatch, step: int, script=train_llava_med) -> None:
    """A SIGTERM in the middle of `step`, received by the script's own handler."""
    rate = script.learning_rate

    def signalled(at, *rest):
        if at == step:
            signal.raise_signal(signal.SIGTERM)
        return rate(at, *rest)

    monkeypatch.setattr(script, "learning_rate", signalled)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """The loss and the gradient of every trained parameter that has one."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def difference(found: dict, expected: dict) -> float:
    """The largest relative difference of the loss and of any parameter's gradient."""
    assert found.keys() == expected.keys()
    # a key's bias has gradient 0, because softmax does not see it: rounding must not be divided by rounding
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp(min=0.1)) for n in expected)


@torch.no_grad()
def far_from_start(parameters) -> None:
    """Moves parameters, the same way each time."""
    torch.manual_seed(1)
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * 0.1)


@torch.no_grad()
def llava_logits(model) -> torch.Tensor:
    """Of the LLaVA demo's model, for one picture and three tokens."""
    draw = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, 3, 72, 72, generator=draw)
    return model(input_ids=torch.tensor([[1, *[600] * 64, 5, 300, 400]]), pixel_values=pixel_values).logits


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() / b.norm() < 1e-5)
