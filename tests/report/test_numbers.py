"""Questions whose answer is a number: what a text says, how far it lies from the truth, and what that is worth."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from brain_scans import SMALL, edit, failures, refused, run
from helpers import read_lines

from inputs import questions
from report import examples, scoring, summary
from report.__main__ import main
from report.audit import audit_scorer
from report.baselines import number_medians
from report.examples import AnyExample
from report.intervals import resampled_intervals
from report.results import add_baselines
from report.summary import number_line, results_table, summarise
from runtime.files import write_jsonl


def a_record(answer, prediction, group, kind="number", **more):
    right = scoring.score_answer(prediction, answer, kind)
    record = {"question_type": kind, "answer": answer, "prediction": prediction, "group": group, "baselines": {}}
    return record | {"correct": right["exact"], "relaxed": right["relaxed"]} | more


def an_example(answer, kind="number", split="train", i=0, question="How old?"):
    known = {"where": f"{split}:{i}", "id": str(i), "media": [], "candidates": None}
    return AnyExample(split=split, group=str(i), question=question, answer=answer, question_type=kind, **known)


# --- what a text says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, number",
    [
        ("63", 63), ("63.0", 63), ("63.5 years", 63.5), ("-2", -2), ("−5", -5), ("−5 points", -5), ("score:-2", -2),
        ("+5", 5), ("0.5", 0.5), ("age = 63", 63), ("1 point", 1), ("0.30000000000000004", 0.1 + 0.2),
        ("about 63 years", 63), ("~63", 63), ("sixty-three", 63), ("one hundred", 100),
        ("The subject is 63 years old.", 63), ("A 63-year-old", 63), ("T1: 63 years", 63), ("63 %", 63), ("６３", 63),
        ("63;63", 63), (63, 63), (63.5, 63.5), ("1.204", 1.204),
    ],
)  # fmt: skip
def test_a_text_says_one_number(text, number):
    assert scoring.number_said(text)[0] == number == float(number)


@pytest.mark.parametrize(
    "text",
    [
        None, "", "old", "nan", "inf", "1e999", "1e5", "9" * 400, "9" * 3000, "63,5", "1,204", "1 204", "1'204", "5’4",
        "1.204.500", "60-65", "60 to 65", "between 60 and 65", "63 or 64", "63;64", "63 ± 5", "63/100", "63+", "<63",
        ">= 63", "over 63", "not 63", "at least 63", "- 5", "score – 5", "minus five", "two hundred", "2 dozen",
        "a hundred and twenty", "twenty-one point five", "-.5", ".5", "...63", "…63", "from -5", "system −5", "age-63",
        "－ 63", "< -5", "> -5", "age=60 to 65", "63 or older", "63 and up", "63 +", "two-thirds", "no one",
        "zero point five", "10³", "½", "2½", "2 and a half", "63y6m", "0x3f", "sub-07: 5",
    ],
)  # fmt: skip
def test_what_says_no_number_or_may_be_read_as_another_says_none(text):
    assert scoring.number_said(text) is None


def test_the_same_number_is_right_unless_the_unit_differs_and_no_other_type_knows_of_it():
    def right(prediction, answer, kind="age:number", candidates=None):
        found = scoring.score_answer(prediction, answer, kind, candidates)
        assert found["exact"] == found["relaxed"]
        return found["exact"]

    assert right("63", "63.0") and right("It is 63 years", "63") and right("63", "63 years old")
    assert not right("63 months", "63 years") and not right("64", "63") and not right("63 or 64", "63")
    assert not right("5 ms", "5 s") and not right("3 mm³", "3 mm²") and right("3 mm2", "3 mm²") and right("5 s", "5")
    assert not right("", "63") and not right(None, "63") and not right("-63", "63")
    assert not right("63.0", "63", "open_ended") and not right("63.0", "63", "numbers")
    assert not right("63.0", "63", candidates=["63", "64"]) and right("63", "63", candidates=["63", "64"])


def test_an_answer_without_one_number_is_a_fault_unless_candidates_are_given_and_no_question_makes_the_type():
    entry = {"question": "How old?", "question_type": "age:number"}
    for answer in ("60-65", "63,5", "1,204", "unknown"):
        with pytest.raises(ValueError, match="exactly one number, in digits with a point and no separators, such as"):
            questions.fields({**entry, "answer": answer})
    assert questions.fields({**entry, "answer": "63.5 years"})["question_type"] == "age:number"
    labels = questions.fields({**entry, "answer": "60-65", "answer_candidates": ["60-65", "66-70"]})
    assert labels["candidates"] == ["60-65", "66-70"]
    assert questions.fields({"question": "How old, as a number?", "answer": "old"})["question_type"] == "open_ended"
    with pytest.raises(ValueError, match="spell it 'number'"):
        questions.fields({**entry, "answer": "5", "question_type": "Number"})


def test_the_audit_takes_one_number_in_two_forms_for_the_same_and_catches_a_lenient_scorer():
    answers = ["63", "63.0", "sixty-three years", "64", "64 years", "6"]
    examples = [an_example(a, i=i, question=f"How old after {i} years?") for i, a in enumerate(answers)]
    found = audit_scorer(lambda text, e: scoring.score(text, e)["exact"], examples)
    assert found["failures"] == [] and ["63.0", "63"] in found["same"]
    assert audit_scorer(lambda text, e: str(text) in e.answer, examples)["failed"]


# --- how far it lies from the truth ----------------------------------------------------------------------------


def simulated(seed):
    """(records, predictions, true numbers) of twelve groups, each with an error of its own beside its questions'."""
    random = np.random.default_rng(seed)
    true = random.normal(60, 12, 48).round(1)
    said = (true + random.normal(0, 2, 48) + np.repeat(random.normal(0, 8, 12), 4)).round(1)
    pairs = zip(true, said, strict=True)
    return [a_record(f"{t} years", f"about {s}", i // 4, median=59.5) for i, (t, s) in enumerate(pairs)], said, true


def test_errors_and_correlation_are_scikit_learn_s_and_numpy_s():
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(2):
        records, said, true = simulated(seed)
        entry = summarise(records)["types"]["number"]
        assert entry["numbers"] == entry["n"] == 48
        assert entry["mae"] == pytest.approx(metrics.mean_absolute_error(true, said), abs=1e-12)
        assert entry["median_error"] == pytest.approx(metrics.median_absolute_error(true, said), abs=1e-12)
        assert entry["correlation"] == pytest.approx(np.corrcoef(true, said)[0, 1], abs=1e-12)
        assert entry["number_baseline"] == pytest.approx(metrics.mean_absolute_error(true, [59.5] * 48), abs=1e-12)
        assert entry["mae_gain"] == pytest.approx(entry["number_baseline"] - entry["mae"], abs=1e-12)


def test_intervals_are_those_of_drawing_complete_groups_again_and_again():
    """Against a loop over groups with draws of its own: the ends differ by what chance leaves of 5,000 resamples."""
    records, said, true = simulated(3)
    entry, random = summarise(records)["types"]["number"], np.random.default_rng(99)
    drawn = {"mae": [], "median_error": [], "correlation": [], "mae_gain": []}
    for _ in range(5_000):
        at = [4 * g + i for g in random.integers(12, size=12) for i in range(4)]
        s, t = said[at], true[at]
        errors = abs(s - t)
        drawn["mae"].append(errors.mean())
        drawn["median_error"].append(np.median(errors))
        drawn["correlation"].append(np.corrcoef(s, t)[0, 1])
        drawn["mae_gain"].append(abs(59.5 - t).mean() - errors.mean())
    tail = 0.5 * math.erfc(2.201 * math.sqrt(12 / 11) / math.sqrt(2))  # t's quantile with 11 degrees of freedom
    for name, values in drawn.items():
        expected, width = np.quantile(values, [tail, 1 - tail]), np.ptp(values)
        np.testing.assert_allclose(entry[f"{name}_interval"], expected, atol=0.06 * width, err_msg=name)
    alone = summarise([{**record, "group": i} for i, record in enumerate(records)])["types"]["number"]
    assert np.ptp(alone["mae_interval"]) < np.ptp(entry["mae_interval"])  # question by question it seems surer


@pytest.mark.parametrize("groups", [6, 15, 60])
def test_the_interval_of_an_error_covers_the_truth(groups):
    """200 data sets of groups whose errors lie together; their mean is 4 by construction."""
    random, covered = np.random.default_rng(5), 0
    for _ in range(200):
        sizes = random.poisson(3, groups) + 1
        errors = np.repeat(random.gamma(4, 1, groups), sizes) * random.gamma(2, 0.5, sizes.sum())
        of = np.repeat(np.arange(groups), sizes).tolist()
        ((low, high),) = resampled_intervals(lambda at, e=errors: [e[at].mean()], of, 200)
        covered += low <= 4 <= high
    assert covered >= 0.89 * 200


def test_what_is_undefined_is_a_dash_and_few_groups_have_no_interval():
    constant = summarise([a_record(str(50 + i), "60", i, median=55.0) for i in range(10)])["types"]["number"]
    assert constant["correlation"] is None and constant["correlation_interval"] is None
    assert constant["mae"] == 5.5 and constant["mae_interval"] is not None
    assert "correlation –," in number_line("number", constant)
    five = summarise([a_record(str(50 + i), str(52 + i), i % 5, median=55.0) for i in range(10)])["types"]["number"]
    assert five["mae"] == 2 and five["correlation"] == pytest.approx(1) and five["mae_interval"] is None
    (one,) = summarise([a_record("63", "60", "a")])["types"].values()  # and no training, so no median
    assert (one["mae"], one["median_error"], one["correlation"], one["number_baseline"]) == (3, 3, None, None)
    (none,) = summarise([a_record("63", "old", "a", median=1.0)])["types"].values()
    assert none["numbers"] == 0 and none["mae"] is none["number_baseline"] is None
    json.dumps([constant, five, one, none], allow_nan=False)


def test_a_prediction_without_a_number_is_wrong_and_counted_and_the_baseline_is_asked_the_same_questions():
    records = [a_record(str(60 + i), str(61 + i), i, median=60.0) for i in range(8)]
    left = [a_record("90", text, f"x{i}", median=60.0) for i, text in enumerate([None, "I cannot tell", "80-95"])]
    entry, alone = (summarise(part)["types"]["number"] for part in (records + left, records))
    assert entry["exact"] == 0 and entry["n"] == 11 and entry["numbers"] == 8
    for name in ("mae", "median_error", "correlation", "number_baseline", "mae_gain", "mae_interval"):
        assert entry[name] == alone[name]
    text = "WARNING: without 3 of 11 predictions"
    assert text in results_table(summarise(records + left)) and "WARNING" not in results_table(summarise(records))


def test_the_baseline_is_the_median_of_training_s_answers_of_the_type():
    train = [an_example(a, "age:number") for a in ("50", "60 years", "seventy", "99")] + [
        an_example("3", "mmse:number")
    ]
    assert number_medians(train) == {"age:number": 65.0, "mmse:number": 3.0}
    asked = [an_example("64", kind, "test", i) for i, kind in enumerate(["age:number", "other:number", "size"])]
    records = [{} for _ in asked]
    add_baselines(records, asked, train, scoring.score)
    assert [record.get("median") for record in records] == [65.0, None, None]
    asked[0].candidates = ["64", "65"]
    records = [{}]
    add_baselines(records, asked[:1], train, scoring.score)
    assert "median" not in records[0]


def test_types_of_their_own_are_not_averaged_and_candidates_make_labels():
    records = [a_record("63", "60", i, "age:number") for i in range(3)] + [a_record("20", "21", 9, "mmse:number")]
    types = summarise(records)["types"]
    assert types["age:number"]["mae"] == 3 and types["mmse:number"]["mae"] == 1
    labels = [a_record("63", "64", i, candidates=["63", "64"]) for i in range(3)]
    assert "mae" not in summarise(labels)["types"]["number"] and "balanced" in summarise(labels)["types"]["number"]
    others = summarise([a_record("63", "63", 0, "numbers"), a_record("63", "63", 0, "count_numeric")])["types"]
    assert not any("mae" in entry for entry in others.values())
    full = summary.summarise_run({"name": "x", "records": [r | {"media": []} for r in records]})["types"]
    assert "precision" not in full["age:number"]  # each age would be a class


# --- the programs ----------------------------------------------------------------------------------------------


def test_answers_of_others_are_measured_and_a_true_answer_that_is_no_number_is_refused(tmp_path, capsys):
    rows = [{"id": str(i), "question": "How old?", "question_type": "number", "answer": str(50 + i)} for i in range(20)]
    write_jsonl(tmp_path / "test.jsonl", rows[:10])
    write_jsonl(tmp_path / "train.jsonl", rows[10:])
    said = [{"id": str(i), "prediction": f"about {52 + i} years"} for i in range(9)]
    write_jsonl(tmp_path / "said.jsonl", [*said, {"id": "9", "prediction": "old"}])
    argv = ["--predictions", "said.jsonl", "--test", "test.jsonl", "--train", "train.jsonl", "--out", "out"]
    argv = [word if word.startswith("--") else str(tmp_path / word) for word in argv]
    main(argv)
    entry = json.loads((tmp_path / "out/results.json").read_text())["runs"][0]["types"]["number"]
    assert entry["mae"] == 2 and entry["numbers"] == 9 and entry["number_baseline"] == 10.5  # 64.5 less 54, on average
    line = number_line("number", entry)
    assert "mean absolute error 2 (2 – 2)" in line and "WARNING: without 1 of 10" in line
    assert line in capsys.readouterr().out and line in (tmp_path / "out/report.html").read_text()
    write_jsonl(tmp_path / "test.jsonl", [*rows[:9], {**rows[9], "answer": "59,5"}])
    with pytest.raises(SystemExit, match=r"test.jsonl:10 .*'59,5' of the type 'number' must hold exactly one number"):
        examples.read_examples(tmp_path / "test.jsonl", "test")


def ages(folder: Path, answer) -> None:
    """Keep the data's conversations of one task, as questions for an age that answer(number) gives."""
    for path in sorted((folder / "data").glob("*/*.json")):
        if "lesion_side" not in path.name:
            path.unlink()
            continue
        turns = json.loads(path.read_text())["conversations"]
        turns[-1]["content"][0]["text"] = answer(int(path.name[4:8]))
        turns[-2]["content"][-1]["text"] = "How old is the subject?"
        edit(path, task_type="age", question_type="number", conversations=turns, answer_candidates=..., metadata=...)


def test_a_script_trains_on_ages_and_its_table_page_and_card_give_their_error(mri_folder, tmp_path, capsys):
    folder, out = Path(shutil.copytree(mri_folder, tmp_path / "demo")), tmp_path / "out"
    ages(folder, lambda number: str(60 + number % 3))
    learn = ["--tune", "full", "--lr", 1e-2, "--warmup", 0, "--max-steps", 8, "--epochs", 9, "--report"]
    run(folder, out, *SMALL, *learn)
    text, records = capsys.readouterr().out, read_lines(out / "predictions.jsonl")
    entry = json.loads((out / "results.json").read_text())["types"]["age:number"]
    held = [pair for r in records if (pair := scoring.number_pair(r["prediction"], r["answer"]))]
    assert entry["n"] == len(records) and entry["numbers"] == len(held) > len(records) / 2
    expected = np.mean([abs(said - true) for said, true in held])
    assert entry["mae"] == pytest.approx(expected) and entry["number_baseline"] is not None
    line = number_line("age:number", entry)
    assert line in text and line in (out / "report/report.html").read_text()
    assert f"age:number: mean absolute error {entry['mae']:.4g} of the" in (out / "model/README.md").read_text()
    main([str(out)])  # from predictions.jsonl alone
    assert line in capsys.readouterr().out


def test_a_range_stops_the_data_check_with_file_and_remedy(mri_folder, tmp_path):
    folder = Path(shutil.copytree(mri_folder, tmp_path / "demo"))
    ages(folder, lambda number: "60-65" if number % 2 else "63")
    refused(folder, tmp_path / "out", *SMALL, "--check")
    assert any(
        "lesion_side.json" in text and "'60-65' of the type 'age:number' must hold exactly one number" in text
        for text in failures(tmp_path / "out")
    )
