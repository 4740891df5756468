"""docs/scaling.md has the numbers that its script prints, not others."""

from pathlib import Path

from benchmarks import scaling

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


def test_what_is_sent_is_what_the_page_says():
    lines = scaling.communication()
    assert len(lines) == 2 + len(scaling.gpu.CASES) and "166,068,224" in lines[-1]  # the published count
    assert "\n".join(lines) in PAGE


def test_how_evenly_ranks_are_loaded_is_what_the_page_says(monkeypatch):
    monkeypatch.setattr(scaling, "DATA", {"Kvasir-VQA": scaling.DATA["Kvasir-VQA"]})
    lines = scaling.balance((8,))
    assert len(lines) == 4 and all(line in PAGE for line in lines)
    seconds, questions = scaling.MEASURED["seconds"], scaling.MEASURED["questions_per_s"]
    assert round(seconds * questions) == scaling.FULL and f"{seconds:.2f} s" in PAGE
