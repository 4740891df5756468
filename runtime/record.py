"""What config.json records of a run: command, settings, versions, commit, and digests of the script and the data."""

import argparse
import platform
import subprocess
import sys
from pathlib import Path

import numpy
import safetensors
import torch
import transformers

from runtime.files import sha256


def describe(args: argparse.Namespace) -> dict:
    """JSON-like; `args.command` is the command line as it was parsed."""
    script = Path(sys.argv[0])
    modules = (torch, transformers, safetensors, numpy)
    return {
        "script": script.name,
        "script_sha256": sha256(script) if script.is_file() else None,
        "argv": args.command,
        "settings": {name: value for name, value in vars(args).items() if name != "command"},
        "versions": {"python": platform.python_version(), **{m.__name__: str(m.__version__) for m in modules}},
        **commit(Path(__file__).resolve().parent),
        "data_sha256": {path.name: sha256(path) for path in data_files(Path(args.data))},
    }


def commit(folder: Path) -> dict:
    """The commit that the code is of, and whether files differ from it; None where it is no git checkout."""

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head, differing = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"git_commit": head, "git_differs": None if head is None else bool(differing)}


def data_files(data: Path) -> list[Path]:
    """The files of the data folder that hold examples, as far as they lie directly in it."""
    return sorted(path for path in data.iterdir() if path.suffix in (".json", ".jsonl", ".csv") and path.is_file())
