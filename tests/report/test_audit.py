"""The audit of a scorer: lenient ones are caught, sound ones are not blamed, and ours pass on every demo's answers."""

import difflib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import load_demo, run, task_class

import train_llava_med
from report import scoring
from report.audit import audit_scorer
from report.examples import read
from train_surg_video_vqa import SYNONYMS

# the published annotations of SurgViVQA-Audio, where they lie beside the project
ANNOTATIONS = Path(__file__).parents[3] / "shared" / "data" / "surgvivqa_audio"


def strict(prediction, example):
    return scoring.score(prediction, example)["exact"]


def substring(prediction, example):
    """As in public scorers: the one is found in the other, and "" is in everything."""
    said, answer = str(prediction).lower().strip(), example.answer.lower()
    return said in answer or answer in said


def similar(prediction, example):
    return difflib.SequenceMatcher(None, str(prediction).lower(), example.answer.lower()).ratio() > 0.8


def without_the_empty(prediction, example):
    return strict(prediction, example) if str(prediction).strip() else None  # left out of the denominator


ANSWERS = [("yes_no", "no"), ("yes_no", "yes"), ("open_ended", "normal"), ("open_ended", "no"), ("open_ended", "polyp")]
ANSWERS += [("open_ended", "polyps"), ("size_numeric", "5-10mm"), ("size_numeric", "11-20mm"), ("mcq", "(a) left")]
EXAMPLES = [
    SimpleNamespace(id=str(i), question_type=kind, question="Is it so?", answer=answer, also_right=[], candidates=None)
    for i, (kind, answer) in enumerate(ANSWERS)
]


@pytest.mark.parametrize(
    "scorer, said",
    [
        (substring, "'no' is called right where the answer is 'normal'"),
        (similar, "'polyps' is called right"),
        (without_the_empty, "nothing ('') is left out"),
    ],
)
def test_the_audit_fails_on_lenient_scorers(scorer, said):
    assert audit_scorer(strict, EXAMPLES)["failures"] == []
    found = audit_scorer(scorer, EXAMPLES)
    assert found["failed"] and any(said in text for text in found["failures"])


def test_the_audit_tries_every_pair_and_every_probe():
    found = audit_scorer(strict, EXAMPLES)
    # 2 answers have 2 ordered pairs, 4 have 12, 2 have 2, one has none; with one answer all answers are that answer
    assert (found["answers"], found["pairs"]) == (9, 2 + 12 + 2)
    probes = found["probes"]
    assert probes["nothing"] == probes["spaces"] == probes["I don't know"] == probes["the question"] == 9
    assert probes["all answers"] == probes["all answers as a set"] == 8


@pytest.mark.parametrize("kept", ["nothing", "spaces", "I don't know", "the question", "all answers"])
def test_each_probe_finds_the_scorer_that_takes_it(kept):
    texts = {"nothing": "", "spaces": " \n\t", "I don't know": "I don't know", "the question": "Is it so?"}

    def lenient(prediction, example):
        taken = prediction == texts[kept] if kept in texts else "no yes" in prediction
        return taken or strict(prediction, example)

    found = audit_scorer(lenient, EXAMPLES)
    assert found["failed"] and all(f": {kept}" in text for text in found["failures"])


def test_a_scorer_that_reads_the_beginning_or_the_conclusion_is_not_blamed_for_the_right_one():
    """yes and no are often told by how a text begins: said among others, the right one stands in the middle."""
    examples = [SimpleNamespace(**{**vars(EXAMPLES[0]), "answer": answer}) for answer in ("Yes, it is.", "no", "yes")]

    def begins(said, example):
        return said.lower()[:2] == example.answer.lower()[:2] and said.strip() != ""

    def ends(said, example):
        return said.lower()[-2:] == example.answer.lower()[-2:] and said.strip() != ""

    examples[0].also_right = ["yes"]
    assert [audit_scorer(scorer, examples[1:])["failures"] for scorer in (begins, ends)] == [[], []]
    assert audit_scorer(begins, examples)["failures"] == []


def test_examples_that_are_alike_are_tried_once_and_counted(monkeypatch):
    asked = []
    examples = [
        SimpleNamespace(**{**vars(example), "id": f"{example.id} {i}"}) for example in EXAMPLES for i in range(50)
    ]
    found = audit_scorer(lambda said, example: asked.append(said), examples)
    assert found["probes"]["nothing"] == 450 and asked.count("") == 9


def test_forms_of_one_answer_are_no_failure():
    examples = [SimpleNamespace(**{**vars(example), "question_type": "t"}) for example in EXAMPLES[:5]]

    def scorer(prediction, example):
        return strict(prediction, example) or {prediction, example.answer} == {"normal", "no"}

    assert audit_scorer(scorer, examples)["failed"] == 2
    examples[0].also_right = ["normal"]
    found = audit_scorer(scorer, examples)
    assert (found["failed"], found["declared"]) == (0, 2)


def test_what_normalising_makes_the_same_is_listed():
    examples = [SimpleNamespace(**{**vars(EXAMPLES[0]), "answer": answer}) for answer in ("two", "2", "The 2.", "no")]
    found = audit_scorer(strict, examples)
    assert found["failed"] == 0 and found["declared"] == 6 and ["two", "2"] in found["same"]


def test_our_own_scorers_pass_over_the_demo_s_vocabulary(demo):
    folder, script, flags = demo
    loaded = load_demo(folder, script, *flags)
    found = audit_scorer(lambda said, example: loaded.task.score(said, example)["exact"], loaded.examples)
    assert found["failures"] == [] and found["pairs"] > 20 and found["probes"]["nothing"] == len(loaded.examples)
    found = audit_scorer(lambda said, example: loaded.task.score(said, example)["relaxed"], loaded.examples)
    assert found["failures"] == []


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the SurgViVQA annotations are not here")
def test_our_scorer_passes_over_the_real_vocabulary():
    examples, problems = read(ANNOTATIONS)
    assert (len(examples), problems) == (3700, [])
    found = audit_scorer(strict, examples)
    assert found["failures"] == [] and found["pairs"] > 150 and found["probes"]["nothing"] == 3700
    assert audit_scorer(lambda *asked: scoring.score(*asked, SYNONYMS)["relaxed"], examples)["failures"] == []
    assert audit_scorer(substring, examples)["failed"] and audit_scorer(similar, examples)["failed"]


def test_check_audits_the_scorer_before_any_weights_are_read(demo_folder, tmp_path, capsys, monkeypatch):
    lenient = lambda task, said, example: {"exact": example.answer in str(said), "relaxed": False}  # noqa: E731
    monkeypatch.setattr(task_class(train_llava_med), "score", lenient)
    with pytest.raises(SystemExit, match="faults, listed in"):
        run(demo_folder, tmp_path, "--check")
    text = capsys.readouterr().out
    assert re.search(r"fault.*: scorer: .* is called right where the answer is", text)
    assert json.loads((tmp_path / "check.json").read_text())["passed"] is False
