"""The figures of a run and their table: every record counts, micro and macro, beside the best blind baseline."""

import json
import random

import numpy as np
import pytest

from report import examples
from report.scoring import score_answer
from report.summary import auroc, results_table, summarise


def record(kind, answer, prediction, group, blind=None):
    """As a script writes it; `blind` is what each baseline says."""
    scored = score_answer(prediction, answer, kind)
    baselines = {name: score_answer(text, answer, kind)["exact"] for name, text in (blind or {}).items()}
    known = {"question_type": kind, "answer": answer, "group": group, "baselines": baselines}
    return {**known, "correct": scored["exact"], "relaxed": scored["relaxed"]}


def test_missing_predictions_stay_in_the_denominator():
    records = [record("yes_no", "yes", p, i, {"type": "yes"}) for i, p in enumerate(["yes", None, "", "no"])]
    overall = summarise(records)["micro"]
    assert (overall["n"], overall["exact"], overall["baselines"]) == (4, 0.25, {"type": 1.0})
    assert overall["gain"] == -0.75


def test_examples_that_another_program_has_not_answered_stay_in_it_too(tmp_path):
    lines = [{"id": name, "question": "Is it?", "answer": "yes"} for name in "abcd"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "said.jsonl").write_text('{"id": "b", "prediction": "yes"}\n{"id": "c", "prediction": null}\n')
    asked = examples.read_examples(tmp_path / "test.jsonl", "test")
    records = examples.read_predictions(tmp_path / "said.jsonl", asked, [])["records"]
    assert [record["id"] for record in records if record["correct"]] == ["b"] and len(records) == 4


def test_the_best_baseline_is_the_one_that_counts():
    blind = {"type": "no", "question": "yes", "nearest": None}
    records = [record("yes_no", "yes", "yes", 0, blind), record("yes_no", "no", "yes", 1, blind)]
    records += [record("yes_no", "yes", "no", 2, blind), record("mcq", "left", "left", 3, blind)]
    results = summarise(records)
    entry = results["types"]["yes_no"]
    assert (
        entry["baselines"] == {"type": 1 / 3, "question": 2 / 3, "nearest": 0.0}
        and entry["best_baseline"] == "question"
    )
    assert entry["gain"] == pytest.approx(1 / 3 - 2 / 3)
    assert results["macro"]["exact"] == (1 / 3 + 1.0) / 2 and results["micro"]["exact"] == 2 / 4
    assert results["macro"]["baselines"]["question"] == (2 / 3 + 0.0) / 2


def test_the_interval_of_a_difference_is_paired():
    """Two baselines of the same share: where they are right on the same questions, the difference is nearly certain."""
    records = [record("t", "yes", "yes" if i % 2 else "no", i, {"type": "yes" if i % 2 else "no"}) for i in range(40)]
    low, high = summarise(records)["micro"]["gain_interval"]
    assert -0.1 < low < 0 < high < 0.1
    crossed = [record("t", "yes", "yes" if i % 2 else "no", i, {"type": "no" if i % 2 else "yes"}) for i in range(40)]
    low, high = summarise(crossed)["micro"]["gain_interval"]
    assert low < -0.2 and high > 0.2


def test_intervals_are_of_complete_groups():
    """Of ten patients, whose twenty questions each go right or wrong together, as much is known as of ten questions."""
    records = [record("t", "yes", "yes" if i % 2 else "no", i, {"type": "no"}) for i in range(10) for _ in range(20)]
    for entry in (summarise(records)["micro"], summarise(records)["types"]["t"]):
        for low, high in (entry["interval"], entry["gain_interval"]):
            assert low < 0.3 and high > 0.7


def test_a_single_group_has_no_interval():
    records = [record("yes_no", "yes", "yes", "one", {"type": "no"}) for _ in range(5)]
    entry = summarise(records)["micro"]
    assert entry["groups"] == 1 and entry["interval"] is None and entry["gain_interval"] is None
    assert "one group" in results_table(summarise(records))


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        summarise([])


def test_table_shows_the_baselines_beside_each_figure():
    blind = {"type": "no", "question": "yes", "nearest": "no"}
    records = [record("yes_no", "yes", prediction, i, blind) for i, prediction in enumerate(["yes", "no"])]
    results = summarise(records)
    lines = results_table(results).splitlines()
    assert lines[1].split()[:2] == ["question", "type"] and "gain" in lines[1]
    interval = "{:.1%} – {:.1%}".format(*results["micro"]["interval"])
    above = "{:+.1%} – {:+.1%}".format(*results["micro"]["gain_interval"])
    shown = f"yes_no 2 50.0% {interval} 50.0% 0.0% 100.0% 0.0% -50.0% {above}"
    assert " ".join(lines[2].split()) == shown
    assert lines[3].startswith("micro average ") and lines[4].startswith("macro average")


# --- label figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_areas_and_balanced_accuracy_are_scikit_learn_s(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    chance = np.random.default_rng(seed)
    scores = np.round(chance.random(200), chance.integers(1, 4))  # with ties
    right = chance.random(200) < scores
    assert auroc(scores, right) == pytest.approx(metrics.roc_auc_score(right, scores), abs=1e-12)
    labels = [{**record("t", "a" if r else "b", "a", str(i)), "candidates": ["a", "b"]} for i, r in enumerate(right)]
    entry = summarise(labels)["types"]["t"]
    expected = metrics.balanced_accuracy_score([r["answer"] for r in labels], ["a"] * 200)
    assert entry["balanced"] == pytest.approx(expected, abs=1e-12)


def test_balanced_accuracy_ranked_accuracy_and_auroc_are_those_of_their_definitions():
    chance = random.Random(0)
    for labels in (["a", "b"], ["a", "b", "c"]):
        records = []
        for i in range(80):
            answer, said = chance.choice(labels), chance.choice(labels)
            weights = [chance.choice([0.1, 0.2, 0.3, 0.4]) + (x == answer) * 0.1 for x in labels]  # with ties
            probabilities = {x: w / sum(weights) for x, w in zip(labels, weights, strict=True)}
            right = said == answer
            record = {"question_type": "t", "group": str(i), "answer": answer, "correct": right, "relaxed": right}
            record["baselines"] = {}
            records.append({**record, "candidates": labels, "probabilities": probabilities})
        entry = summarise(records)["types"]["t"]
        recalls, areas = [], []
        for label in labels:
            mine = [r for r in records if r["answer"] == label]
            others = [r for r in records if r["answer"] != label]
            recalls.append(sum(r["correct"] for r in mine) / len(mine))
            pairs = [(m["probabilities"][label], o["probabilities"][label]) for m in mine for o in others]
            areas.append(sum((m > o) + (m == o) / 2 for m, o in pairs) / len(pairs))
        assert entry["balanced"] == pytest.approx(sum(recalls) / len(labels))
        assert entry["auroc"] == pytest.approx(sum(areas) / len(labels))
        odd = {**records[0], "answer": "z", "correct": False}  # its answer is none of the candidates: it counts, too
        more = summarise([*records, odd])["types"]["t"]
        assert more["balanced"] == pytest.approx(sum(recalls) / (len(labels) + 1))
        assert more["ranked"] == pytest.approx(entry["ranked"] * 80 / 81)
        likeliest = [max(r["probabilities"], key=r["probabilities"].get) == r["answer"] for r in records]
        assert entry["ranked"] == pytest.approx(sum(likeliest) / 80)
    one = [r for r in records if r["answer"] == "a"]
    entry = summarise(one)["types"]["t"]
    assert entry["auroc"] is entry["balanced"] is None  # always saying it is no achievement
    text = results_table(summarise(one))
    assert text.split("\n")[0].endswith("auroc") and text.split("\n")[1].endswith("–")
    for i, record in enumerate(one):
        record["candidates"] = record["candidates"][:i]  # each question has options of its own
    assert "balanced" not in summarise(one)["types"]["t"]
