"""--log-to: TensorBoard and Weights & Biases get the numbers of metrics.jsonl."""

import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from helpers import read_lines, run

from runtime import flags
from runtime.metrics import Metrics

SMALL = ["--limit", 24, "--max-answer-tokens", 1, "--questions-per-step", 8]


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(demo_folder, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(demo_folder, tmp_path, *SMALL, "--log-to", "tensorboard", "--save-every", 1, "--max-steps", 3)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line]
    for name in ("loss", "lr", "grad_norm", "questions"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert len(events.Scalars("val_loss")) == 1


def test_steps_that_are_taken_again_stand_in_tensorboard_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, (1, 2, 3)), (1, (2,))):  # stopped after step 3, resumed from the checkpoint of step 1
        with ExitStack() as closing:
            args = SimpleNamespace(log_to=["tensorboard"], patience=None)
            metrics = Metrics(SimpleNamespace(folder=tmp_path, args=args, closing=closing), start, 3)
            for step in steps:
                metrics.write(step=step, val_loss=float(step + 10 * start))
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("val_loss")] == [(1, 1.0), (2, 12.0)]


def test_wandb_gets_the_numbers_and_a_resumed_run_is_the_same_there(demo_folder, tmp_path, monkeypatch):
    """Against a stand-in for the package, which would want an account."""
    begun, logged = [], []
    board = SimpleNamespace(
        log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: logged.append("end")
    )
    package = SimpleNamespace(init=lambda **settings: begun.append(settings) or board)
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(flags, "find_spec", lambda name: name)
    argv = [*SMALL, "--log-to", "wandb:polyps", "--max-steps", 2]
    run(demo_folder, tmp_path, *argv)
    assert begun[0]["project"] == "polyps" and begun[0]["resume"] == "allow" and begun[0]["config"]["lr"] == 2e-4
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [entry[0] for entry in logged[:-1]] == [line["step"] for line in lines] and logged[-1] == "end"
    assert logged[0][1]["loss"] == lines[0]["loss"] and "ids" not in logged[0][1]
    run(demo_folder, tmp_path, *argv)
    assert begun[1]["id"] == begun[0]["id"]


@pytest.mark.parametrize("board", ["tensorboard", "wandb:p"])
def test_a_board_that_is_not_installed_is_refused_at_once(demo_folder, tmp_path, board, monkeypatch, capsys):
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(demo_folder, tmp_path, "--log-to", board)
    package = board.partition(":")[0]
    assert f"argument --log-to: {package} needs a package: pip install {package}" in capsys.readouterr().err


@pytest.mark.parametrize("board", ["wandb", "wandb:", "tensorboard:p", "comet:p", ""])
def test_a_board_that_is_none_is_refused(demo_folder, tmp_path, board, capsys):
    with pytest.raises(SystemExit):
        run(demo_folder, tmp_path, f"--log-to={board}")
    assert "is neither tensorboard nor wandb:PROJECT" in capsys.readouterr().err
