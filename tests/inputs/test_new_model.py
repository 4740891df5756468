"""docs/new_model.md, followed word by word: a copy of the LLaVA-Med script trains SmolVLM."""

import difflib
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from copies import HOUSE, few_images, write_smolvlm
from transformers import SmolVLMForConditionalGeneration

from inputs import contract

PAGE = (HOUSE / "docs" / "new_model.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A folder in which the page's first commands have made the script, with a tiny model and few images."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copy(HOUSE / "train_llava_med.py", folder)
    shutil.copytree(HOUSE / "docs", folder / "docs")
    done = subprocess.run(["bash", "-ec", BLOCKS[0]], cwd=folder, capture_output=True, text=True, check=False)
    text = "docs/new_model.md no longer applies to train_llava_med.py: python docs/quote.py writes its diff again"
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    write_smolvlm(folder / "MODEL")
    return folder


@pytest.fixture
def follow(copy, demo_folder, monkeypatch, capsys):
    """Runs a command of the page in the folder, in this process, and returns what it printed."""
    if not (copy / "DATA").exists():
        few_images(demo_folder / "data", copy / "DATA", train=3, val=1, test=1)
    monkeypatch.chdir(copy)

    def run(command: str, *flags: str) -> str:
        _, *words = command.split()
        module, words = (words[1], words[2:]) if words[0] == "-m" else (None, words)
        assert module in (None, "inputs.contract")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        monkeypatch.setattr(sys, "argv", [*([module] if module else []), *words, *flags])
        capsys.readouterr()
        try:
            contract.main(sys.argv[1:]) if module else runpy.run_path(words[0], run_name="__main__")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return capsys.readouterr().out

    return run


def commands() -> list[str]:
    return [line for block in BLOCKS[1:] for line in block.strip().split("\n")]


def test_fewer_than_one_line_in_nine_is_another(copy):
    old, new = ((copy / name).read_text().split("\n") for name in ("train_llava_med.py", "train_smolvlm.py"))
    changes = list(difflib.unified_diff(old, new, n=0))[2:]
    added, removed = (sum(line.startswith(sign) for line in changes) for sign in "+-")
    assert 0 < max(added, removed) <= len(old) / 9
    assert max(map(len, new)) <= 120


def test_the_copy_holds_the_contract_as_the_page_shows_it(follow):
    printed = follow(commands()[0], "--max-answer-tokens", "2")
    (shown,) = re.findall(r"^```\n(the contract of .*?)^```$", PAGE, re.M | re.S)
    numbers = r"\d[\d.]*(e[+-]\d+)?"
    assert re.sub(numbers, "N", printed) == re.sub(numbers, "N", shown)


def test_the_copy_trains_answers_and_merges(follow, copy):
    train, merge = commands()[1:]
    follow(train, "--max-answer-tokens", "2", "--no-report", "--questions-per-step", "16", "--lr", "1e-3")
    losses = [json.loads(line).get("loss") for line in Path("RUN/metrics.jsonl").read_text().split("\n") if line]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0]
    answered = [json.loads(line) for line in Path("RUN/predictions.jsonl").read_text().split("\n") if line]
    asked = [line for line in Path("DATA/val.jsonl").read_text().split("\n") if line]
    assert len(answered) == len(asked) > 0
    follow(merge)
    _, found = SmolVLMForConditionalGeneration.from_pretrained(copy / "MERGED", output_loading_info=True)
    assert not any(found.values()), found
