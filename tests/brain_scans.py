"""The demo of brain scans as tests use it: how its volumes are declared, and its conversations, found and edited."""

import json
from functools import partial
from pathlib import Path

import helpers

import train_umbrella_mri

VOLUMES = ["--modality", "T1:32x32x32:8x8x8", "--modality", "rsfMRI:24x24x24x4:8x8x8x2"]
SMALL = [*VOLUMES, "--questions-per-step", 8, "--max-answer-tokens", 4]

run = partial(helpers.run, script=train_umbrella_mri)
refused = partial(helpers.refused, script=train_umbrella_mri)


def load_demo(folder: Path, *flags):
    return helpers.load_demo(folder, train_umbrella_mri, *VOLUMES, *flags)


def conversation(folder: Path, split: str, task: str, number: int = 0) -> Path:
    """The file of one of the split's conversations about a task."""
    return [p for p in sorted((folder / "data" / split).glob("*.json")) if task in p.name][number]


def edit(path: Path, **fields) -> dict:
    """Change fields of a conversation's file; those that are `...` are taken out."""
    entry = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in entry.items() if v is not ...}))
    return entry


def failures(out: Path) -> list[str]:
    """The faults that the data check has listed in a run folder."""
    return json.loads((out / "check.json").read_text())["failures"]
