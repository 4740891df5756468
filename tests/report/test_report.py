"""A report's numbers: against scikit-learn, against their definitions, and for files as others publish them."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import read_lines, run

import train_llava_med
from report import compare, examples, scoring, summary, write
from report.__main__ import main
from report.page import table_cells
from runtime.files import write_json, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
ANNOTATIONS = ROOT.parent / "shared" / "data" / "surgvivqa_audio"
SMALL = ["--tune", "full", "--limit", 24, "--max-steps", 2, "--max-answer-tokens", 4, "--decode", "both"]


def as_written(kind, answer, prediction, group="g", **more):
    """A record of predictions.jsonl."""
    scored = scoring.score_answer(prediction, answer, kind)
    record = {"question_type": kind, "question": f"{kind}?", "answer": answer, "prediction": prediction}
    record |= {"group": group, "media": [], "baselines": {}}
    return {**record, "correct": scored["exact"], "relaxed": scored["relaxed"], **more}


# --- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("closed", [True, False])
def test_precision_recall_f1_and_the_confusion_table_are_scikit_learn_s(seed, closed):
    metrics = pytest.importorskip("sklearn.metrics")
    random_, names = random.Random(seed), ["polyp", "ulcer", "clip", "never", "normal"]
    true = [random_.choice([name for name in names if name != "never"]) for _ in range(60)]
    said = [random_.choice([t, t, *names, "something else", "", None]) for t in true]
    more = {"candidates": names} if closed else {}
    records = [as_written("open_ended", t, s, **more) for t, s in zip(true, said, strict=True)]
    found = summary.label_figures(records)
    labels = sorted(names) if closed else sorted({*true})
    assert found["labels"] == labels
    counted = [s if s in labels else "other" for s in said]
    expected = metrics.precision_recall_fscore_support(true, counted, labels=labels, average="macro", zero_division=0)
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(expected[:3], abs=1e-12)
    by_label = metrics.precision_recall_fscore_support(true, counted, labels=labels, average=None, zero_division=0)
    for i, name in enumerate(labels):
        entry = found["per_label"][name]
        assert [entry[c] for c in ("precision", "recall", "f1", "n")] == pytest.approx([x[i] for x in by_label])
    table = metrics.confusion_matrix(true, counted, labels=[*labels, "other"])
    assert found["confusion"] == table[:-1].tolist()
    assert np.trace(np.array(found["confusion"])[:, :-1]) == sum(r["correct"] for r in records)
    cells = table_cells([{**r, "question_type": "other"} for r in records[:9]] + records)[9:]
    assert np.bincount(cells, minlength=table.size - len(table[0])).tolist() == table[:-1].ravel().tolist()


@pytest.mark.parametrize("seed", range(20))
def test_calibration_and_areas_are_scikit_learn_s(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve
    chance = np.random.default_rng(seed)
    scores = np.round(chance.random(200), chance.integers(1, 4))  # with ties, and with values on the bins' edges
    right = chance.random(200) < scores
    area = metrics.average_precision_score(right, scores)
    assert summary.average_precision(scores, right) == pytest.approx(area, abs=1e-12)
    found = summary.calibration(scores, right)
    accuracy, confidence = calibration_curve(right, scores, n_bins=10)
    filled = [b for b in found["bins"] if b["n"]]
    assert [b["accuracy"] for b in filled] == pytest.approx(accuracy.tolist(), abs=1e-12)
    assert [b["confidence"] for b in filled] == pytest.approx(confidence.tolist(), abs=1e-12)
    weights = np.array([b["n"] for b in filled]) / 200
    assert found["ece"] == pytest.approx(float(weights @ np.abs(accuracy - confidence)), abs=1e-12)


def test_mean_average_precision_is_over_the_candidates_that_occur():
    metrics = pytest.importorskip("sklearn.metrics")
    chance, names, records = np.random.default_rng(1), ["a", "b", "c"], []
    for i in range(50):
        p = chance.dirichlet([1, 1, 1])
        records.append(
            as_written("t", "ab"[i % 2], "a", candidates=names, probabilities=dict(zip(names, p, strict=True)))
        )
    areas = [
        metrics.average_precision_score([r["answer"] == x for r in records], [r["probabilities"][x] for r in records])
        for x in "ab"
    ]
    assert summary.choice_figures(records)["map"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert summary.ranked_figures(records)["calibration"]["n"] == 50


def test_an_answer_other_is_not_taken_for_what_is_no_label():
    records = [as_written("t", true, said) for true, said in [("other", "foo"), ("other", "bar"), ("polyp", "polyp")]]
    found = summary.label_figures([*records, as_written("t", "polyp", "garbage")])
    assert found["labels"] == ["other", "polyp"] and found["confusion"] == [[0, 0, 2], [0, 1, 1]]
    assert found["per_label"]["other"]["recall"] == 0


def test_a_type_with_one_answer_only_is_flagged():
    records = [as_written("a", "yes", "yes"), as_written("a", "Yes.", "no"), as_written("b", "yes", "no")]
    records += [as_written("b", "no", "no")]
    found = summary.summarise_run({"name": "r", "records": records})["types"]
    assert [found[kind]["single_class"] for kind in "ab"] == [True, False]


def test_an_answer_in_another_of_its_forms_is_of_the_same_class():
    both = {"also_right": ["no"]}
    records = [as_written("t", "No, it stays.", "no", **both, correct=True), as_written("t", "yes", "no")]
    found = summary.label_figures(records)
    assert found["labels"] == ["no", "yes"] and found["confusion"] == [[1, 0, 0], [1, 0, 0]]


def test_one_group_alone_is_resampled_by_what_shares_no_media():
    """Of clips that overlap a chain is one: 1-2, 2-3 and 3 belong together."""
    media = [["1", "2"], ["2", "3"], ["3"], ["8"], ["9"], ["9", "8x"]]
    records = [as_written("t", "yes", "yes" if i % 2 else "no", media=names) for i, names in enumerate(media)]
    parts = [record["group"] for record in summary.resampled(records)]
    assert len(set(parts[:3])) == 1 and len(set(parts)) == 3
    found = summary.summarise_run({"name": "r", "records": records})
    assert found["micro"]["groups"] == 3 and found["micro"]["interval"] and "of its 3 parts" in found["notes"][0]
    same = [{**record, "media": ["1"]} for record in records]
    assert summary.summarise_run({"name": "r", "records": same})["micro"]["interval"] is None


def test_runs_are_compared_question_by_question():
    a = [as_written("t", "yes", "yes", str(i), id=str(i)) for i in range(40)]
    b = [{**r, "correct": i > 19} for i, r in enumerate(a)]
    found = compare.compare({"name": "a", "records": a}, {"name": "b", "records": b[:32]})
    assert (found["n"], found["micro"]["difference"]) == (32, pytest.approx(20 / 32))
    assert found["micro"]["interval"][0] > 0 and found["types"].keys() == {"t"}
    other = [{**r, "question": "another"} for r in b]
    assert compare.compare({"name": "a", "records": a}, {"name": "b", "records": other}) is None


def test_runs_that_differ_in_their_seed_alone_are_aggregated():
    def of(seed, right, **settings):
        records = [as_written("t", "yes", "yes" if i < right else "no", str(i), id=str(i)) for i in range(10)]
        settings = {"seed": seed, "out": f"run{seed}", "lr": 1e-3, **settings}
        return {"name": str(seed), "records": records, "settings": settings, "script": "x.py", "split": "test"}

    runs = [of(0, 5), of(1, 7), of(2, 9), of(3, 1, lr=1.0)]
    (found,) = compare.seeds_of([summary.summarise_run(r) for r in runs])
    assert found["seeds"] == [0, 1, 2] and found["micro"]["mean"] == pytest.approx(0.7)
    assert found["micro"]["sd"] == pytest.approx(np.std([0.5, 0.7, 0.9], ddof=1))
    assert (found["micro"]["least"], found["micro"]["most"]) == (0.5, 0.9)


# --- predictions of others -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_questions():
    """The real test questions."""
    if not ANNOTATIONS.is_dir():
        pytest.skip("the SurgViVQA annotations are not here")
    return examples.read_examples(ANNOTATIONS / "test_multivideo.jsonl", "test")


@pytest.fixture
def published(tmp_path):
    """The real test questions with answers of an imagined system, in the form in which such files are published."""
    if not ANNOTATIONS.is_dir():
        pytest.skip("the SurgViVQA annotations are not here")
    chance, rows = random.Random(0), read_lines(ANNOTATIONS / "test_multivideo.jsonl")
    with open(tmp_path / "predictions.jsonl", "w") as file:
        for row in rows:
            said = row["answer"] if chance.random() < 0.6 else chance.choice(["no", "", "It moves."])
            line = {"question_id": row["id"], "question_type": row["question_type"], "ground_truth": row["answer"]}
            file.write(json.dumps({**line, "short_answer": row["short_answer"], "predicted_answer": said}) + "\n")
    return tmp_path


def of_others(folder: Path, *flags) -> dict:
    argv = ["--predictions", folder / "predictions.jsonl", "--test", ANNOTATIONS / "test_multivideo.jsonl"]
    argv += ["--train", ANNOTATIONS / "train_multivideo.jsonl", "--out", folder / "out", *flags]
    main([str(a) for a in argv])
    return json.loads((folder / "out/results.json").read_text())


def test_a_published_predictions_file_gets_its_baselines_and_clustered_intervals(published, capsys):
    (found,) = of_others(published)["runs"]
    assert found["n"] == 1000 and found["micro"]["baselines"]["type"] == 0.573
    lines = read_lines(published / "predictions.jsonl")
    right = sum(line["predicted_answer"] in (line["ground_truth"], line["short_answer"]) for line in lines)
    assert found["micro"]["exact"] == right / 1000
    # one video: intervals are of its clips, and the same questions resampled one by one would be surer
    assert found["micro"]["groups"] == 719 and "002-004: intervals are of its 719 parts" in found["notes"][0]
    assert found["micro"]["interval"][0] < found["micro"]["exact"] < found["micro"]["interval"][1]
    text = capsys.readouterr().out
    assert "57.3%" in text and "0 wrongly called right" in text
    page = (published / "out/report.html").read_text()
    assert "scope_forward_motion" in page and (published / "out/results.json").is_file()


def test_what_a_predictions_file_has_wrong_is_named(published, real_questions, capsys):
    path = published / "predictions.jsonl"
    lines = read_lines(path)

    def refused(changed: list[dict]) -> str:
        write_jsonl(path, changed)
        with pytest.raises(SystemExit) as caught:
            examples.read_predictions(path, real_questions, [])
        return str(caught.value)

    text = refused([*lines, lines[3], {**lines[0], "question_id": "qa_9"}])
    assert f"predictions.jsonl:1001 (id {lines[3]['question_id']}): answered twice" in text
    assert "predictions.jsonl:1002 (id qa_9): no example of --test has this ID" in text
    text = refused([{**lines[0], "predicted_answer": ["no"]}, {**lines[1], "question_id": None}])
    assert "the prediction must be a text or null: ['no']" in text and "(id None): no example" in text
    assert "the file holds no examples" in refused([])
    renamed = [{"qid": line["question_id"], "said": line["predicted_answer"]} for line in lines]
    assert "predictions.jsonl:1: no field id or question_id; rename the one that is meant" in refused(renamed)
    path.unlink()
    with pytest.raises(SystemExit):
        of_others(published)
    assert "predictions.jsonl: no such file" in capsys.readouterr().err


def test_test_examples_of_one_id_or_without_an_answer_are_refused(tmp_path):
    rows = [{"id": "a", "question": "Is it?", "answer": answer} for answer in ("no", "yes", None, ["x"])]
    write_jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(SystemExit) as caught:
        examples.read_examples(tmp_path / "test.jsonl", "test")
    text = str(caught.value)
    assert "test.jsonl:2 (id a): duplicate ID, first used at test.jsonl:1" in text
    assert "test.jsonl:3 (id a): the answer is empty or no text (None)" in text and "(['x'])" in text


def test_examples_without_a_prediction_count_as_wrong(published, real_questions):
    path = published / "predictions.jsonl"
    lines = read_lines(path)
    everything = examples.read_predictions(path, real_questions, [])["records"]
    right = [line for line in lines if line["predicted_answer"] == line["ground_truth"]]
    write_jsonl(path, right)
    found = examples.read_predictions(path, real_questions, [])
    assert len(found["records"]) == 1000
    correct = [sum(record["correct"] for record in records) for records in (found["records"], everything)]
    assert len(right) <= correct[0] <= correct[1]
    assert f"{1000 - len(right)} of 1000 examples have no prediction" in found["notes"][0]


# --- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(demo_folder, tmp_path_factory):
    """A run as a user starts it, with its report; and what it printed."""
    out, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [train_llava_med.__file__])  # what config.json names as the script
        run(demo_folder, out, *SMALL, "--report")
    return out, printed.getvalue()


def test_training_ends_with_the_table_its_baselines_and_a_page(trained):
    out, text = trained
    assert "blind baselines, by" in text and "gain" in text
    assert f"the report is {out}/report/report.html" in text
    assert {"report.html", "results.json"} <= {path.name for path in (out / "report").iterdir()}
    results, detailed = (json.loads((out / place / "results.json").read_text()) for place in ("", "report"))
    for name in ("exact", "baselines", "interval", "gain"):
        assert results["micro"][name] == detailed["runs"][0]["micro"][name]
    records = read_lines(out / "predictions.jsonl")
    share = sum(record["baselines"]["type"] for record in records) / len(records)
    assert results["micro"]["baselines"]["type"] == share > 0
    page = (out / "report/report.html").read_text()
    assert "data:image/jpeg" in page and "&lt;image&gt;" in page  # its thumbnails, its first row's tokens
    assert re.search(r"trained parameters</dt><dd>[\d,]+ <.*step-00000001 <", page, re.DOTALL)
    assert "<dd>1 of 1 " in page and "exact match on test" in page


def test_the_command_line_writes_what_the_script_wrote(trained, capsys):
    out, _ = trained
    before = json.loads((out / "report/results.json").read_text())
    main([str(out)])
    assert json.loads((out / "report/results.json").read_text()) == before
    assert "0 wrongly called right" in capsys.readouterr().out


def test_a_strangers_run_folder_opens_and_overwrites_nothing_outside_it(trained, demo_folder, tmp_path, capsys):
    out, private = shutil.copytree(trained[0], tmp_path / "run"), tmp_path / "private"
    shutil.copytree(demo_folder / "data", private)
    hostile = {"data": str(private), "media_root": str(private), "argv": ["; touch pwned"], "script": "evil.py"}
    for name in ("config", "results"):
        found = json.loads((out / f"{name}.json").read_text())
        write_json(out / f"{name}.json", {**found, **hostile, "settings": hostile})
    places, paths = (str(out), str(private), str(demo_folder)), []

    def opened(event, args):
        if event == "open" and str(args[0]).startswith(places):
            paths.append(str(args[0]))

    sys.addaudithook(opened)
    main([str(out)])
    assert paths and all(path.startswith(str(out)) for path in paths)
    page = (out / "report/report.html").read_text()
    assert "data:image/jpeg" not in page and "No pictures: no path that a run folder names is opened" in page
    main([str(out), "--media-root", str(demo_folder / "data")])
    assert "data:image/jpeg" in (out / "report/report.html").read_text()
    assert not any(path.startswith(str(private)) for path in paths)
    (out / "report/exact.svg").symlink_to(private / "test.jsonl")
    with pytest.raises(SystemExit):
        main([str(out)])
    assert "report is or holds a link" in capsys.readouterr().err


def test_several_runs_stand_side_by_side(trained, tmp_path, capsys):
    out, _ = trained
    shutil.copytree(out, tmp_path / "second")
    records = read_lines(out / "predictions.jsonl")
    write_jsonl(tmp_path / "second/predictions.jsonl", [{**r, "correct": True} for r in records])
    main([str(tmp_path / "second"), str(out), "--out", str(tmp_path / "both")])
    found = json.loads((tmp_path / "both/results.json").read_text())
    wrong = sum(not record["correct"] for record in records) / len(records)
    assert found["comparisons"][0]["micro"]["difference"] == pytest.approx(wrong)
    assert f"{tmp_path / 'second'} less {out}, 24 questions: +" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path / "second"), str(out)])
    assert "--out required" in capsys.readouterr().err


def test_blind_runs_stand_beside_the_run_unless_they_were_answered_otherwise(demo_folder, trained, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    for mode in ("blank", "shuffled"):
        run(demo_folder, out, *SMALL, "--eval-only", "--blind", mode)
    assert not (out / "blind/blank/report").exists()

    def reported() -> dict:
        main([str(out)])
        return json.loads((out / "report/results.json").read_text())["runs"][0]

    found = reported()
    assert found["blind"].keys() == {"blank", "shuffled"} and not any("repeat it" in note for note in found["notes"])
    right = [sum(r["correct"] for r in read_lines(out / p / "predictions.jsonl")) / 24 for p in ("", "blind/blank")]
    assert found["blind"]["blank"]["exact"] == right[1]
    assert found["blind"]["blank"]["difference"] == pytest.approx(right[0] - right[1])
    assert f"blank media: {right[1]:.1%} of 24 questions; seeing adds" in capsys.readouterr().out
    # what was answered earlier is said, what was answered otherwise is not compared
    os.utime(out / "predictions.jsonl")
    notes = reported()["notes"]
    assert "shuffled: answered before the run's last answers; repeat it with --eval-only --blind shuffled" in notes
    answered = json.loads((out / "blind/blank/results.json").read_text())
    write_json(out / "blind/blank/results.json", {**answered, "decode": "greedy"})
    found = reported()
    assert found["blind"].keys() == {"shuffled"}
    assert "blank: was answered with another decode; repeat it with --eval-only --blind blank" in found["notes"]


def test_a_report_that_cannot_be_written_fails_no_run(trained, tmp_path, capsys, monkeypatch):
    shutil.copytree(trained[0], tmp_path / "run")
    monkeypatch.setattr(write, "summarise_run", lambda run: 1 / 0)
    write.write_report(tmp_path / "run", tmp_path)
    assert "no report was written; python -m report" in capsys.readouterr().out


def test_folders_that_hold_no_run_are_refused_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"no predictions.jsonl; answer with the script's --eval-only"):
        main([str(tmp_path)])
    (tmp_path / "predictions.jsonl").write_text('{"id": "1", "prediction": "x"}\n')
    with pytest.raises(SystemExit, match=r"predictions.jsonl:1 \(id 1\): no answer, correct, group, media"):
        main([str(tmp_path)])
    (tmp_path / "predictions.jsonl").write_text("")
    with pytest.raises(SystemExit, match="holds no examples"):
        main([str(tmp_path)])
    for argv in ([], [str(tmp_path), "--data", str(tmp_path)], ["--predictions", "x"]):
        with pytest.raises(SystemExit):
            main(argv)


def test_predictions_of_an_older_version_have_no_baselines_and_say_so(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run")
    records = read_lines(trained[0] / "predictions.jsonl")
    write_jsonl(tmp_path / "run/predictions.jsonl", [{k: v for k, v in r.items() if k != "baselines"} for r in records])
    main([str(tmp_path / "run")])
    assert "what can be answered blindly is not known" in capsys.readouterr().out


def test_a_run_below_its_baseline_is_named(tmp_path, capsys):
    blind = {"baselines": {"type": True}, "group": "x"}
    records = [as_written("t", "yes", "no", id=str(i), **blind) for i in range(4)]
    records = [{**record, "group": str(i)} for i, record in enumerate(records)]
    write_jsonl(tmp_path / "predictions.jsonl", records)
    main([str(tmp_path)])
    assert "NOT above its best blind baseline" in capsys.readouterr().out


def test_the_leakage_check_alone_writes_what_it_found_and_ends_with_1_where_there_is_something(demo_folder, tmp_path):
    with pytest.raises(SystemExit) as clean:
        main(["--data", str(demo_folder / "data")])
    assert clean.value.code == 0
    examples = [{"id": i, "question": "Is it?", "answer": "yes", "group": "patient 7"} for i in "ab"]
    write_jsonl(tmp_path / "train.jsonl", examples[:1])
    write_jsonl(tmp_path / "test.jsonl", examples[1:])
    with pytest.raises(SystemExit) as shared:
        main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert shared.value.code == 1 and found["faults"] == []
    assert [finding["kind"] for finding in found["leakage"]["findings"]] == ["shared group"]


def test_the_published_split_of_endovis_is_asked_for(tmp_path, capsys):
    for number in (2, 1):
        folder = tmp_path / f"seq_{number}/vqa/Classification"
        folder.mkdir(parents=True)
        (folder / "frame000_QA.txt").write_text("what is it?|kidney\n")
    with pytest.raises(SystemExit, match="give --endovis"):
        main(["--data", str(tmp_path)])
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path), "--endovis", "paper"])
    text = capsys.readouterr().out
    assert "train: 1 questions" in text and "test: 1 questions" in text and "seq_16" in text  # which is not there
