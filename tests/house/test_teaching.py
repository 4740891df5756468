"""The reproductions in docs/failures.md print what is shown there; the exercises of docs/lecture.md are kept faults."""

import contextlib
import io
import re

import mutants
import pytest
from mutants import ROOT

FAILURES = (ROOT / "docs/failures.md").read_text().partition("\n## The others")[0]
EXERCISES = (ROOT / "docs/lecture.md").read_text().partition("\n## Exercises")[2]


def sections(text: str) -> list:
    """A case for each heading of the third level."""
    return [pytest.param(part, id=part.partition("\n")[0]) for part in re.split(r"^### ", text, flags=re.M)[1:]]


@pytest.mark.parametrize("section", sections(FAILURES))
def test_a_failure_is_reproduced_as_the_page_shows(section):
    ((code, shown),) = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", section, flags=re.M | re.S)
    assert section.count("```python") == 1 + section.count("<!-- quote")  # each block is executed, or quoted
    assert len(re.findall(r".+", code)) <= 10
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue() == shown


@pytest.mark.parametrize("section", sections(EXERCISES))
def test_an_exercise_is_a_fault_that_its_test_catches(section):
    """Whether it does, `make mutants` tries."""
    file, what = re.search(r'^In ([\w/]+\.py); "(.*?)"\.$', section, flags=re.M).groups()
    ((old, new),) = re.findall(r"^```diff\n-([^\n]*\n)\+([^\n]*\n)```$", section, flags=re.M)
    text = (ROOT / file).read_text()
    assert text.count(old) == 1
    (fault,) = [fault for fault in mutants.chosen(what) if (fault.what, fault.file) == (what, file)]
    assert text.replace(old, new) == text.replace(fault.old, fault.new)
    assert f"python -m pytest -q {fault.test}\n" in section and "<summary>Solution</summary>" in section


def test_there_are_twelve_failures_and_five_exercises():
    assert (len(sections(FAILURES)), len(sections(EXERCISES))) == (12, 5)
    assert len((ROOT / "docs/lecture.md").read_bytes()) < 12_000
