"""A checkpoint belongs to its model and to the prompts that it was trained on; what answered is in results.json."""

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import refused, run
from safetensors.torch import load_file, save_file

import train_llava_med
import train_qwen2vl_sentinel
import train_video_plain_lm
from runtime import folders, metrics, models
from runtime.files import sha256
from runtime.metrics import Metrics

SMALL = ["--limit", 16, "--questions-per-step", 8, "--max-steps", 2, "--lr", 1e-3, "--max-answer-tokens", 2]


@pytest.fixture(scope="module")
def trained(demo_folder, tmp_path_factory):
    """A short run. Tests must not write here."""
    out = tmp_path_factory.mktemp("bound") / "run"
    run(demo_folder, out, *SMALL)
    return out


@pytest.mark.parametrize("mode", ["--eval-only", "--merge"])
def test_a_checkpoint_of_another_model_is_refused(demo_folder, trained, tmp_path, mode):
    """Of the same shape it would load, answer nonsense, and exit 0."""
    shutil.copytree(demo_folder, tmp_path / "demo")
    path = tmp_path / "demo" / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    out = shutil.copytree(trained, tmp_path / "run")
    flags = [mode, tmp_path / "merged"] if mode == "--merge" else [mode]
    assert "was trained on another model than --model" in refused(tmp_path / "demo", out, *SMALL, *flags)
    run(tmp_path / "demo", out, *SMALL, *flags, "--resume-anyway")


def test_generation_settings_are_not_the_model(demo_folder, trained, tmp_path):
    """Answers are greedy whatever stands there, and tools that serve models write it."""
    shutil.copytree(demo_folder, tmp_path / "demo")
    known = models.part_fingerprint(demo_folder / "model")
    (tmp_path / "demo" / "model" / "generation_config.json").write_text('{"temperature": 0.7}')
    assert models.part_fingerprint(tmp_path / "demo" / "model") == known
    out = shutil.copytree(trained, tmp_path / "run")
    run(tmp_path / "demo", out, *SMALL, "--eval-only")
    assert (out / "predictions.jsonl").read_text() == (trained / "predictions.jsonl").read_text()


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and model folders that somebody else has made: a sentence each
# ------------------------------------------------------------------------------------------------------------


def sparse(path: Path, head: bytes = b"{") -> None:
    """60 GB that take no room."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(60 * 10**9)


def change(path: Path, edit) -> None:
    tensors = {name: edit(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def sealed(file: str, write):
    """The fault written into a file of a checkpoint, whose manifest then is of the changed file."""

    def fault(folder: Path) -> None:
        write(folder / file)
        names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
        (folder / "manifest.json").write_text(json.dumps({name: sha256(folder / name) for name in names}))

    return fault


OPTIMIZER, ADAPTER = "optimizer.safetensors", "adapter_model.safetensors"
NO_MANIFEST = "its manifest.json does not name state.json and optimizer.safetensors"
HOSTILE = {
    "empty manifest": (lambda c: (c / "manifest.json").write_text("{}"), NO_MANIFEST),
    "manifest of a list": (lambda c: (c / "manifest.json").write_text("[]"), NO_MANIFEST),
    "manifest of brackets": (lambda c: (c / "manifest.json").write_text("[" * 10**5), "no readable manifest"),
    "manifest of 60 GB": (lambda c: sparse(c / "manifest.json"), "no readable manifest (60000000000 bytes)"),
    "optimizer of no bytes": (sealed(OPTIMIZER, lambda p: p.write_bytes(b"")), "cannot be used: "),
    "optimizer of no tensors": (sealed(OPTIMIZER, lambda p: save_file({}, p)), "are not those trained now"),
    "optimizer without steps": (
        sealed(OPTIMIZER, lambda p: change(p, lambda name, t: None if name.endswith(" step") else t)),
        "are not those trained now",
    ),
    "optimizer of bytes": (sealed(OPTIMIZER, lambda p: change(p, lambda _, t: t.to(torch.int8))), "is torch.int8, not"),
    "optimizer of other shapes": (
        sealed(OPTIMIZER, lambda p: change(p, lambda name, t: t if name.endswith(" step") else t[:1])),
        "are not those trained now",
    ),
    "adapter of bytes": (sealed(ADAPTER, lambda p: change(p, lambda _, t: t.to(torch.uint8))), "is torch.uint8, not"),
    "adapter of another shape": (sealed(ADAPTER, lambda p: change(p, lambda _, t: t[:1])), "has shape"),
    "adapter of half a byte": (sealed(ADAPTER, lambda p: p.write_bytes(weights("F4", 4, 2))), "cannot be used: "),
}


def weights(dtype: str = "F32", shape: int = 2, size: int = 8) -> bytes:
    """A file of safetensors with one tensor."""
    header = json.dumps({"a": {"dtype": dtype, "shape": [shape], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_checkpoint_that_is_complete_but_none_of_ours_is_refused(demo_folder, trained, tmp_path, what):
    out = shutil.copytree(trained, tmp_path / "run")
    fault, said = HOSTILE[what]
    checkpoint = out / "checkpoints" / "step-00000002"
    fault(checkpoint)
    text = refused(demo_folder, out, *SMALL, "--resume", checkpoint)
    assert str(checkpoint) in text and said in text


WEIGHTS = "model.safetensors"
FOLDERS = {
    "an adapter": ("adapter_config.json", lambda p: p.write_text("{}"), "an adapter is no model: merge it first"),
    "a list": ("config.json", lambda p: p.write_text("[]"), "JSON, but not as in a model's file of that name"),
    "brackets": ("config.json", lambda p: p.write_text("[" * 10**5), "lists within lists"),
    "60 GB of JSON": ("tokenizer.json", sparse, "60000000000 bytes"),
    "60 GB of header": (WEIGHTS, lambda p: sparse(p, struct.pack("<Q", 60 * 10**9 - 8)), "header too large"),
    "60 GB of weights": (WEIGHTS, sparse, "truncated or not safetensors (60000000000 bytes: "),
    "brackets for a header": (WEIGHTS, lambda p: p.write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5), "invalid"),
    "a shape of 2^62": (WEIGHTS, lambda p: p.write_bytes(weights(shape=2**62)), "overflow"),
    "no such dtype": (WEIGHTS, lambda p: p.write_bytes(weights("F99")), "unknown variant"),
    "an index of nothing": (f"{WEIGHTS}.index.json", lambda p: p.write_text("{}"), "JSON, but not as in"),
    "an index of numbers": (
        f"{WEIGHTS}.index.json",
        lambda p: p.write_text('{"weight_map": {"a": 1}}'),
        "but not as in",
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_model_folder_with_a_file_that_is_none_is_refused_by_name(demo_folder, tmp_path, what):
    name, write, said = FOLDERS[what]
    folder = shutil.copytree(demo_folder / "model", tmp_path / "model")
    write(folder / name)
    with pytest.raises(SystemExit) as ended:
        folders.find(str(folder))
    first, *lines = str(ended.value.code).split("\n")
    assert first == f"--model {folder} cannot be used:" and len(lines) == 1
    assert lines[0].startswith(f"  {folder / name}: ") and said in lines[0]


def test_results_name_the_checkpoint_and_the_model_that_answered(demo_folder, trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["model"] == str(demo_folder / "model")
    assert results["checkpoint"] == str(trained / "checkpoints" / "step-00000002")


def test_another_prompt_is_another_run(qwen_folder, tmp_path, monkeypatch):
    """The system text stands in the prefix, not in the branches: whoever edits it would mix two runs."""
    script = train_qwen2vl_sentinel
    run(qwen_folder, tmp_path / "run", *SMALL, script=script)
    monkeypatch.setattr(script, "SYSTEM", "Answer at length.")
    assert "is of another run: examples was" in refused(qwen_folder, tmp_path / "run", *SMALL, script=script)


def test_answers_are_kept_where_the_figures_of_captions_fail(plain_folder, tmp_path, monkeypatch):
    script = train_video_plain_lm

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(script.captions, "figures", fail)
    flags = ["--vision-model", plain_folder / "vision", "--from-scratch", "--fast-frames", 2, "--slow-frames", 2]
    with pytest.raises(RuntimeError, match="out of memory"):
        run(plain_folder, tmp_path / "run", *SMALL, *flags, script=script)
    assert (tmp_path / "run" / "predictions.jsonl").read_text().count("\n") > 0


def test_the_time_that_saving_takes_is_no_step_s(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    args, closing = SimpleNamespace(log_to=[]), SimpleNamespace(callback=lambda close: None)
    device = metrics.torch.device("cpu")
    found = Metrics(SimpleNamespace(args=args, folder=tmp_path, device=device, closing=closing, epochs=[0.5, 1]), 0, 9)
    for step in (1, 2):
        now[0] += 2.0
        found.step(step, [train_llava_med.Prompt([1], [([2], [2])], ["q"])], 1.0, 1.0, 1e-3)
        now[0] += 100.0  # a checkpoint
        found.restart_clock()
    found.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["questions_per_s"] for line in lines] == [0.5, 0.5]
