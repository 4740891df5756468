"""The checkpoint of the lowest validation loss is kept and answers, and --patience ends a run: resumed or not."""

import json
import math
import shutil
import signal
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from helpers import metrics_of, read_lines, read_tensors, refused, run, stop_in

import common
from runtime.metrics import Metrics
from runtime.saving import folder_of

# 28 questions, three steps an epoch. The training is real, what its validations find is not: the same on any CPU
FLAGS = ["--limit", 28, "--questions-per-step", 14, "--epochs", 6, "--tune", "full", "--lr", 1e-2]
FLAGS += ["--save-every", 2, "--eval-every", 3, "--max-answer-tokens", 2, "--decode", "both"]
LOSSES = {3: 0.9, 6: 0.4, 9: 0.5, 12: 0.45, 15: 0.4, 18: 0.8}  # of equal ones the first is the best
BEST, STEPS = 6, 18


@pytest.fixture(scope="module", autouse=True)
def losses_are_planned():
    def planned(model, val, task, run):
        return LOSSES[int(run.checkpoint.name[5:])] if run.checkpoint else 1.0  # a step is saved, then validated

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "mean_loss", planned)
        yield


def val_losses(out) -> dict[int, float]:
    return {line["step"]: line["val_loss"] for line in read_lines(out / "metrics.jsonl") if "val_loss" in line}


def answered(out) -> tuple:
    """The step, and whether it is said to have the lowest validation loss."""
    results = json.loads((out / "results.json").read_text())
    return results["step"], results.get("lowest_val_loss")


def checkpoints(out) -> list[int]:
    return sorted(int(path.name[5:]) for path in out.glob("checkpoints/*"))


def weights(folder) -> set[bytes]:
    """Without their names, which are others in a model's folder."""
    return {tensor.numpy().tobytes() for (name, _), tensor in read_tensors(folder).items() if "optimizer" not in name}


def kill_before_validating(monkeypatch, folder, out, *flags) -> None:
    """The next validation that is due finds its checkpoint saved, and the process killed."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "mean_loss", killed)
        run(folder, out, *flags)


def stop_while_validating(monkeypatch, folder, out, *flags) -> None:
    """A SIGTERM in the middle of the next validation that is due."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="85"):
        patch.setattr(common, "mean_loss", lambda *_: signal.raise_signal(signal.SIGTERM))
        run(folder, out, *flags)


@pytest.fixture(scope="module")
def undisturbed(demo_folder, tmp_path_factory):
    """A run that nothing disturbed. Tests must not write here."""
    out = tmp_path_factory.mktemp("best") / "undisturbed"
    run(demo_folder, out, *FLAGS)
    return out


@pytest.fixture
def copy(undisturbed, tmp_path):
    return shutil.copytree(undisturbed, tmp_path / "copy")


def test_what_answers_is_the_checkpoint_of_the_lowest_validation_loss(undisturbed, copy, demo_folder, capsys):
    assert val_losses(undisturbed) == LOSSES and checkpoints(undisturbed) == [BEST, STEPS - 2, STEPS]
    assert answered(undisturbed) == (BEST, True)
    assert weights(undisturbed / "model") == weights(folder_of(undisturbed, BEST))
    assert f"step {BEST} of {STEPS}" in (undisturbed / "model" / "README.md").read_text()
    # answered again, from the files alone
    run(demo_folder, copy, *FLAGS, "--eval-only")
    line = f"(lowest validation loss: step {BEST}, 0.4000; last: step {STEPS}, 0.8000)"
    assert f"answering with step {BEST} {line}" in capsys.readouterr().out
    assert (copy / "predictions.jsonl").read_bytes() == (undisturbed / "predictions.jsonl").read_bytes()
    for step in (STEPS - 2, STEPS):  # then the best is the newest, too
        shutil.rmtree(folder_of(copy, step))
    run(demo_folder, copy, *FLAGS, "--eval-only", "--answer-with", "last")
    assert answered(copy) == (BEST, True)


def test_the_last_answers_where_that_is_asked_for_and_a_named_checkpoint_always(
    undisturbed, copy, demo_folder, tmp_path, capsys
):
    run(demo_folder, copy, *FLAGS, "--answer-with", "last")
    assert answered(copy) == (STEPS, False) and weights(copy / "model") == weights(folder_of(copy, STEPS))
    assert f"answering with step {STEPS} (lowest validation loss: step {BEST}" in capsys.readouterr().out
    last = (copy / "predictions.jsonl").read_bytes()
    assert last != (undisturbed / "predictions.jsonl").read_bytes()
    run(demo_folder, copy, *FLAGS, "--eval-only", "--resume", folder_of(copy, STEPS))
    assert answered(copy) == (STEPS, None) and (copy / "predictions.jsonl").read_bytes() == last
    run(demo_folder, copy, *FLAGS, "--merge", tmp_path / "merged")  # the best again
    assert weights(tmp_path / "merged") == weights(undisturbed / "model")


def test_stopped_and_killed_at_several_steps_it_is_the_same_checkpoint(undisturbed, demo_folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for step in (BEST - 2, BEST + 1, BEST + 4):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="85"):
            stop_in(patch, step)
            run(demo_folder, out, *FLAGS)
        kill_before_validating(monkeypatch, demo_folder, out, *FLAGS)
    run(demo_folder, out, *FLAGS)
    assert metrics_of(out) == metrics_of(undisturbed) and answered(out) == (BEST, True)
    assert BEST in checkpoints(out) and weights(out / "model") == weights(undisturbed / "model")
    assert (out / "predictions.jsonl").read_bytes() == (undisturbed / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize("fault", ["cut off", "gone"])
def test_a_best_checkpoint_that_cannot_be_used_is_named_and_the_newest_answers(copy, demo_folder, capsys, fault):
    if fault == "gone":
        shutil.rmtree(folder_of(copy, BEST))
    else:
        (folder_of(copy, BEST) / "model.safetensors").write_bytes(b"short")
    run(demo_folder, copy, *FLAGS, "--eval-only")
    assert answered(copy) == (STEPS, False)
    why = {"gone": "no readable manifest", "cut off": "model.safetensors does not match its sha256"}[fault]
    assert f"passing over step {BEST}, of the lowest validation loss: {why}" in capsys.readouterr().out


def test_what_is_no_validation_up_to_the_newest_checkpoint_chooses_nothing(copy, demo_folder):
    """Where a run was rolled back and killed, metrics.jsonl still holds the steps that it will take again."""
    with (copy / "metrics.jsonl").open("a") as file:
        for step, loss in ((STEPS + 3, 0.001), (2.5, 0.001), (True, 0.001), ("9", 0.001), (9, "0.001"), (9, math.nan)):
            file.write(json.dumps({"step": step, "val_loss": loss}) + "\n")
    run(demo_folder, copy, *FLAGS, "--eval-only")
    assert answered(copy) == (BEST, True)


@pytest.mark.parametrize("end", [kill_before_validating, stop_while_validating])
def test_patience_ends_the_run_and_resumed_it_takes_no_further_step(demo_folder, tmp_path, monkeypatch, capsys, end):
    out, flags, last = tmp_path / "run", [*FLAGS, "--patience", 2], BEST + 6
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="85"):
        stop_in(patch, last - 1)
        run(demo_folder, out, *flags)
    end(monkeypatch, demo_folder, out, *flags)
    assert max(checkpoints(out)) == last
    for _ in range(2):  # resumed it validates and ends; started again it ends at once
        run(demo_folder, out, *flags)
        assert f"step {last:05d} | --patience 2: no lower validation loss since step {BEST}" in capsys.readouterr().out
        assert checkpoints(out) == [BEST, last - 1, last] and answered(out) == (BEST, True)
        assert val_losses(out) == {step: loss for step, loss in LOSSES.items() if step <= last}


def test_a_run_that_patience_has_ended_goes_on_without_it_as_if_it_had_never_had_any(
    undisturbed, demo_folder, tmp_path
):
    for patience in (["--patience", 1], ["--patience", 2], []):
        run(demo_folder, tmp_path, *FLAGS, *patience)
    assert metrics_of(tmp_path) == metrics_of(undisturbed)
    assert (tmp_path / "predictions.jsonl").read_bytes() == (undisturbed / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("losses", "best", "end"),
    [
        ([0.5, 0.4, 0.4, 0.6], 2, 4),  # the first of equals is the best
        ([0.5, 0.6, 0.4, 0.6], 3, 9),
        ([math.nan, 0.5, math.nan, math.inf], 2, 4),
        ([math.nan, math.inf], 0, 2),
        ([0.5, 0.6, 0.7], 1, 3),
    ],
)
def test_the_best_and_the_end_are_decided_from_the_validations_so_far(tmp_path, losses, best, end):
    for step in range(len(losses)):  # resumed after each
        with ExitStack() as closing:
            args = SimpleNamespace(log_to=[], patience=2)
            state = SimpleNamespace(folder=tmp_path, args=args, closing=closing)
            metrics = Metrics(state, step, 9)
            metrics.write(step=step + 1, val_loss=losses[step])
    assert (state.best, metrics.total) == (best, end)


def test_patience_without_anything_to_validate_is_refused(demo_folder, tmp_path):
    shutil.copytree(demo_folder, folder := tmp_path / "demo")
    (folder / "data/val.jsonl").unlink()
    text = "--patience counts validations, but there are no examples of val; leave it out, or add some"
    for mode in ([], ["--check"]):
        assert refused(folder, tmp_path / "run", *FLAGS, "--patience", 1, *mode) == text
    run(folder, tmp_path / "run", *FLAGS, "--max-steps", 1)  # the newest answers, and nothing is said
    assert answered(tmp_path / "run") == (1, None)
    (folder / "data/val.jsonl").write_text('{"image": "images/none.jpg", "question": "Is it?", "answer": "yes"}\n')
    text = "--skip-bad would leave out all of val; fix its examples"
    assert refused(folder, tmp_path / "other", *FLAGS, "--patience", 1, "--skip-bad", "100%") == text
