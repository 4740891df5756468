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
    modules = (torch, transformers, safetensors, numpy)
    examples = (path for path in sorted(Path(args.data).iterdir()) if path.suffix in (".json", ".jsonl", ".csv"))
    return {
        **code(),
        "argv": args.command,
        "settings": {name: value for name, value in vars(args).items() if name not in ("command", "parts")},
        "versions": {"python": platform.python_version(), **{m.__name__: str(m.__version__) for m in modules}},
        "data_sha256": {path.name: sha256(path) for path in examples if path.is_file()},
    }


def code(file=__file__) -> dict:
    """The script that runs, its digest, the commit of the checkout with `file`, and whether files there differ from it;
    None where it is no checkout. Of whoever answers results.json has it, too."""
    script, folder = Path(sys.argv[0]), Path(file).resolve().parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head, differing = git("rev-parse", "HEAD"), git("status", "--porcelain")
    found = {"script": script.name, "script_sha256": sha256(script) if script.is_file() else None}
    return found | {"git_commit": head, "git_differs": None if head is None else bool(differing)}
