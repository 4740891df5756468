"""What several test files use: the script as a user runs it, in this process, and what it left behind."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train_llava_med


def run(folder: Path, out: Path, *flags) -> None:
    """train_llava_med on folder/model and folder/data; the signal handlers of this process are put back."""
    argv = ["--model", folder / "model", "--data", folder / "data", "--out", out, *flags]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        train_llava_med.main([str(a) for a in argv])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refused(folder: Path, out: Path, *flags) -> str:
    """The last words of a run that must end with exit code 1: SystemExit with a message."""
    with pytest.raises(SystemExit) as caught:
        run(folder, out, *flags)
    assert isinstance(caught.value.code, str), f"exit code {caught.value.code!r} without a message"
    return caught.value.code


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def read_tensors(folder: Path) -> dict:
    """Every tensor of a folder, by file and name."""
    return {(p.name, k): t for p in sorted(folder.glob("*.safetensors")) for k, t in load_file(p).items()}


def metrics_of(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without what is measured by the clock."""
    measured = {"tokens_per_s", "questions_per_s", "peak_memory_mb"}
    return [{k: v for k, v in line.items() if k not in measured} for line in read_lines(out / "metrics.jsonl")]


def stop_in(monkeypatch, step: int) -> None:
    """A SIGTERM in the middle of `step`, received by the script's own handler."""
    rate = train_llava_med.learning_rate

    def signalled(at, *rest):
        if at == step:
            signal.raise_signal(signal.SIGTERM)
        return rate(at, *rest)

    monkeypatch.setattr(train_llava_med, "learning_rate", signalled)
