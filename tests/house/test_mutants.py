"""The kept faults still apply, and their tests are there; whether these catch them, `make mutants` tries."""

import ast

import mutants
import pytest
from mutants import ROOT


@pytest.mark.parametrize("file", mutants.FAULTS)
def test_every_fault_applies_and_its_test_is_there(file):
    text = (ROOT / file).read_text()
    for fault in (fault for fault in mutants.chosen() if fault.file == file):
        assert text.count(fault.old) == 1, f"{fault.what}: {fault.old!r} stands {text.count(fault.old)} times in {file}"
        ast.parse(text.replace(fault.old, fault.new))
        path, _, name = fault.test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), fault.test


def test_faults_are_of_every_room_and_script():
    faults, files = mutants.chosen(), list(mutants.FAULTS)
    assert len(faults) >= 100 and len({fault.what for fault in faults}) == len(faults)
    assert len({(fault.file, fault.old, fault.new) for fault in faults}) == len(faults)
    assert {path.name for path in ROOT.glob("*.py")} <= set(files)
    assert all(sum(file.startswith(f"{room}/") for file in files) >= 5 for room in ("inputs", "runtime", "report"))


@pytest.mark.parametrize(
    ("code", "verdict"),
    [(0, "SURVIVED"), (1, "caught"), (2, "test did not run"), (4, "test did not run"), (None, "hangs")],
)
def test_only_a_test_that_fails_catches_a_fault(tmp_path, monkeypatch, capsys, code, verdict):
    """And the copy is afterwards as it was."""
    texts = []
    one = {"a.py": [("a is wrong", "a = 1", "a = 2", "tests/test_a.py::test_a")]}

    def run_tests(copy, tests, patience=None):
        texts.append((copy / "a.py").read_text())
        return (code if patience else 0), ""

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main() sets it: put back afterwards
    monkeypatch.setattr(mutants, "FAULTS", one)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "run_tests", run_tests)
    (tmp_path / "a.py").write_text("a = 1\n")
    if verdict == "caught":
        mutants.main(["--jobs", "1"])
    else:
        with pytest.raises(SystemExit, match="1"):
            mutants.main(["--jobs", "1"])
    assert texts == ["a = 1\n", "a = 2\n"] and (tmp_path / "a.py").read_text() == "a = 1\n"
    assert f"{verdict:<18}a.py: a is wrong (test_a)\n1 faults: 1 {verdict}" in capsys.readouterr().out


def test_a_fault_that_no_longer_applies_is_not_caught(tmp_path):
    (tmp_path / "a.py").write_text("a = 1\na = 1\n")
    assert mutants.attempt(mutants.Fault("", "a.py", "a = 1", "a = 2", ""), tmp_path) == "no longer applies"
