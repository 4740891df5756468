"""The contestants of benchmarks/training.py compute the same thing, also TRL with its packing; its table and figure."""

import importlib.util
from dataclasses import replace

import pytest

from benchmarks import training


@pytest.mark.parametrize("title", ["4 questions", "conversation", "text alone"])
def test_all_contestants_have_the_same_losses(title, monkeypatch):
    """Another mask, another set of examples or another schedule in any of them would make the comparison worthless."""
    monkeypatch.setattr(training.train_llava_med.checkpoints, "Saver", None)  # replaced in a contestant's process
    shape = replace(training.SHAPES[title], tiny=True, layers=2)
    names = [name for name in shape.names if "TRL" not in name or importlib.util.find_spec("trl")]
    losses = {name: training.take_part(name, shape, 2, training.Turns(None)) for name in names}
    assert len(losses) > 2
    for name, found in losses.items():
        assert found == pytest.approx(losses[training.OURS], rel=1e-6), name


def test_contestants_take_turns_in_processes_of_their_own(capsys, tmp_path, monkeypatch):
    """Two ranks, as in the figure; every number of the table is there."""
    shape = training.Shape([training.OURS], images=2, ranks=2, threads=1, layers=1, tiny=True)
    monkeypatch.setattr(training, "GROWTH", {"ranks": {2: shape}})
    found = training.compare({"ranks 2": shape}, timed=1)
    (ours,) = found["ranks 2"]
    assert len(ours["losses"]) == len(ours["seconds"]) == 2 and ours["peak_mb"] > ours["above_mb"] >= 0
    header, rule, title, row = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in (header, rule, title, row)}) == 1 and row.startswith("| ours | ")
    training.plot(found, tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_text().count("<use") > 2  # marks of points
