"""A checkpoint belongs to its model and to the prompts that it was trained on; what answered is in results.json."""

import json
import shutil
from types import SimpleNamespace

import pytest
from helpers import refused, run

import train_llava_med
import train_qwen2vl_sentinel
import train_video_plain_lm
from runtime import metrics
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
    args, closing = SimpleNamespace(log_to=[], epochs=1), SimpleNamespace(callback=lambda close: None)
    found = Metrics(
        SimpleNamespace(args=args, folder=tmp_path, device=metrics.torch.device("cpu"), closing=closing), 0, 9
    )
    for step in (1, 2):
        now[0] += 2.0
        found.step(step, [train_llava_med.Prompt([1], [([2], [2])], ["q"])], 1.0, 1.0, 1e-3)
        now[0] += 100.0  # a checkpoint
        found.restart_clock()
    found.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["questions_per_s"] for line in lines] == [0.5, 0.5]
