"""The numbers of report.py: against scikit-learn, against their definitions, and for files as others publish them."""

import contextlib
import difflib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import read_lines, run

import common
import report
import runtime
import train_llava_med
import train_qwen2vl_sentinel
import train_surg_video_vqa
import train_umbrella_mri
import train_video_plain_lm

ROOT = Path(report.__file__).parent
ANNOTATIONS = ROOT.parent / "shared" / "data" / "surgvivqa_audio"
SMALL = ["--tune", "full", "--limit", 24, "--max-steps", 2, "--max-answer-tokens", 4, "--decode", "both"]


def as_written(kind, answer, prediction, group="g", **more):
    """A record of predictions.jsonl."""
    scored = common.score_answer(prediction, answer, kind)
    record = {"question_type": kind, "question": f"{kind}?", "answer": answer, "prediction": prediction}
    record |= {"group": group, "media": [], "floors": {}}
    return {**record, "correct": scored["exact"], "tolerant": scored["tolerant"], **more}


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
    found = report.label_figures(records)
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


@pytest.mark.parametrize("seed", range(20))
def test_calibration_and_areas_are_scikit_learn_s(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve
    chance = np.random.default_rng(seed)
    scores = np.round(chance.random(200), chance.integers(1, 4))  # with ties, and with values on the bins' edges
    right = chance.random(200) < scores
    assert common.auroc(scores, right) == pytest.approx(metrics.roc_auc_score(right, scores), abs=1e-12)
    area = metrics.average_precision_score(right, scores)
    assert report.average_precision(scores, right) == pytest.approx(area, abs=1e-12)
    found = report.calibration(scores, right)
    accuracy, confidence = calibration_curve(right, scores, n_bins=10)
    filled = [b for b in found["bins"] if b["n"]]
    assert [b["accuracy"] for b in filled] == pytest.approx(accuracy.tolist(), abs=1e-12)
    assert [b["confidence"] for b in filled] == pytest.approx(confidence.tolist(), abs=1e-12)
    weights = np.array([b["n"] for b in filled]) / 200
    assert found["ece"] == pytest.approx(float(weights @ np.abs(accuracy - confidence)), abs=1e-12)
    labels = [as_written("t", "a" if r else "b", "a", str(i), candidates=["a", "b"]) for i, r in enumerate(right)]
    entry = common.summarise(labels)["types"]["t"]
    expected = metrics.balanced_accuracy_score([r["answer"] for r in labels], ["a"] * 200)
    assert entry["balanced"] == pytest.approx(expected, abs=1e-12)


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
    found = report.scored_figures(records)
    assert found["map"] == pytest.approx(np.mean(areas), abs=1e-12) and found["calibration"]["n"] == 50
    assert "map" not in report.scored_figures(records, overall=True)


def test_an_answer_other_is_not_taken_for_what_is_no_label():
    records = [as_written("t", true, said) for true, said in [("other", "foo"), ("other", "bar"), ("polyp", "polyp")]]
    found = report.label_figures([*records, as_written("t", "polyp", "garbage")])
    assert found["labels"] == ["other", "polyp"] and found["confusion"] == [[0, 0, 2], [0, 1, 1]]
    assert found["per_label"]["other"]["recall"] == 0


def test_a_type_with_one_answer_only_is_flagged():
    records = [as_written("a", "yes", "yes"), as_written("a", "Yes.", "no"), as_written("b", "yes", "no")]
    records += [as_written("b", "no", "no")]
    found = report.summarise_run({"name": "r", "records": records})["types"]
    assert [found[kind]["single_class"] for kind in "ab"] == [True, False]


def test_an_answer_in_another_of_its_forms_is_of_the_same_class():
    both = {"also_right": ["no"]}
    records = [as_written("t", "No, it stays.", "no", **both, correct=True), as_written("t", "yes", "no")]
    found = report.label_figures(records)
    assert found["labels"] == ["no", "yes"] and found["confusion"] == [[1, 0, 0], [1, 0, 0]]


def test_one_group_alone_is_resampled_by_what_shares_no_media():
    """Of clips that overlap a chain is one: 1-2, 2-3 and 3 belong together."""
    media = [["1", "2"], ["2", "3"], ["3"], ["8"], ["9"], ["9", "8x"]]
    records = [as_written("t", "yes", "yes" if i % 2 else "no", media=names) for i, names in enumerate(media)]
    assert len(set(report.clips(records)[:3])) == 1 and len(set(report.clips(records))) == 3
    found = report.summarise_run({"name": "r", "records": records})
    assert found["all"]["groups"] == 3 and found["all"]["interval"] and "of its 3 parts" in found["notes"][0]
    same = [{**record, "media": ["1"]} for record in records]
    assert report.summarise_run({"name": "r", "records": same})["all"]["interval"] is None


def test_runs_are_compared_question_by_question():
    a = [as_written("t", "yes", "yes", str(i), id=str(i)) for i in range(40)]
    b = [{**r, "correct": i > 19} for i, r in enumerate(a)]
    found = report.compare({"name": "a", "records": a}, {"name": "b", "records": b[:32]})
    assert (found["n"], found["all"]["difference"]) == (32, pytest.approx(20 / 32))
    assert found["all"]["interval"][0] > 0 and found["types"].keys() == {"t"}
    other = [{**r, "question": "another"} for r in b]
    assert report.compare({"name": "a", "records": a}, {"name": "b", "records": other}) is None


def test_runs_that_differ_in_their_seed_alone_are_aggregated():
    def of(seed, right, **settings):
        records = [as_written("t", "yes", "yes" if i < right else "no", str(i), id=str(i)) for i in range(10)]
        settings = {"seed": seed, "out": f"run{seed}", "lr": 1e-3, **settings}
        return {"name": str(seed), "records": records, "settings": settings, "script": "x.py", "split": "test"}

    runs = [of(0, 5), of(1, 7), of(2, 9), of(3, 1, lr=1.0)]
    (found,) = report.seeds_of(runs, [report.summarise_run(r) for r in runs])
    assert found["seeds"] == [0, 1, 2] and found["all"]["mean"] == pytest.approx(0.7)
    assert found["all"]["sd"] == pytest.approx(np.std([0.5, 0.7, 0.9], ddof=1))
    assert (found["all"]["least"], found["all"]["most"]) == (0.5, 0.9)


# --- the audit -----------------------------------------------------------------------------------------------


def strict(prediction, row):
    return report.score(prediction, row)["exact"]


def substring(prediction, row):
    """As in public scorers: the one is found in the other, and "" is in everything."""
    said, answer = str(prediction).lower().strip(), row.answer.lower()
    return said in answer or answer in said


def similar(prediction, row):
    return difflib.SequenceMatcher(None, str(prediction).lower(), row.answer.lower()).ratio() > 0.8


def without_the_empty(prediction, row):
    return strict(prediction, row) if str(prediction).strip() else None  # left out of the denominator


ROWS = [("yes_no", "no"), ("yes_no", "yes"), ("open_ended", "normal"), ("open_ended", "no"), ("open_ended", "polyp")]
ROWS += [("open_ended", "polyps"), ("size_numeric", "5-10mm"), ("size_numeric", "11-20mm"), ("mcq", "(a) left")]
ROWS = [
    SimpleNamespace(id=str(i), question_type=kind, question="Is it so?", answer=answer, also_right=[])
    for i, (kind, answer) in enumerate(ROWS)
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
    assert report.audit_scorer(strict, ROWS)["failures"] == []
    found = report.audit_scorer(scorer, ROWS)
    assert found["failed"] and any(said in text for text in found["failures"])


def test_the_audit_tries_every_pair_and_every_probe():
    found = report.audit_scorer(strict, ROWS)
    # 2 answers have 2 ordered pairs, 4 have 12, 2 have 2, one has none; with one answer all answers are that answer
    assert (found["answers"], found["pairs"]) == (9, 2 + 12 + 2)
    probes = found["probes"]
    assert probes["nothing"] == probes["spaces"] == probes["I don't know"] == probes["the question"] == 9
    assert probes["all answers"] == probes["all answers as a set"] == 8


@pytest.mark.parametrize("kept", ["nothing", "spaces", "I don't know", "the question", "all answers"])
def test_each_probe_finds_the_scorer_that_takes_it(kept):
    texts = {"nothing": "", "spaces": " \n\t", "I don't know": "I don't know", "the question": "Is it so?"}

    def lenient(prediction, row):
        taken = prediction == texts[kept] if kept in texts else "no yes" in prediction
        return taken or strict(prediction, row)

    found = report.audit_scorer(lenient, ROWS)
    assert found["failed"] and all(f": {kept}" in text for text in found["failures"])


def test_a_scorer_that_reads_the_beginning_or_the_conclusion_is_not_blamed_for_the_right_one():
    """yes and no are often told by how a text begins: said among others, the right one stands in the middle."""
    rows = [SimpleNamespace(**{**vars(ROWS[0]), "answer": answer}) for answer in ("Yes, it is.", "no", "yes")]

    def begins(said, row):
        return said.lower()[:2] == row.answer.lower()[:2] and said.strip() != ""

    def ends(said, row):
        return said.lower()[-2:] == row.answer.lower()[-2:] and said.strip() != ""

    rows[0].also_right = ["yes"]
    assert [report.audit_scorer(scorer, rows[1:])["failures"] for scorer in (begins, ends)] == [[], []]
    assert report.audit_scorer(begins, rows)["failures"] == []


def test_rows_that_are_alike_are_tried_once_and_counted(monkeypatch):
    asked = []
    rows = [SimpleNamespace(**{**vars(row), "id": f"{row.id} {i}"}) for row in ROWS for i in range(50)]
    found = report.audit_scorer(lambda said, row: asked.append(said), rows)
    assert found["probes"]["nothing"] == 450 and asked.count("") == 9


def test_declared_synonyms_are_no_failure(tmp_path):
    rows = [SimpleNamespace(**{**vars(row), "question_type": "t"}) for row in ROWS[:5]]

    def scorer(prediction, row):
        return strict(prediction, row) or {prediction, row.answer} == {"normal", "no"}

    assert report.audit_scorer(scorer, rows)["failed"] == 2
    (tmp_path / "synonyms.txt").write_text("no\tnormal\n\npolyp | adenoma\n")
    lines = report.read_synonyms(tmp_path / "synonyms.txt")
    assert lines == [["no", "normal"], ["polyp", "adenoma"]]
    found = report.audit_scorer(scorer, rows, lines)
    assert (found["failed"], found["declared"]) == (0, 2)


def test_what_normalising_makes_the_same_is_listed():
    rows = [SimpleNamespace(**{**vars(ROWS[0]), "answer": answer}) for answer in ("two", "2", "The 2.", "no")]
    found = report.audit_scorer(strict, rows)
    assert found["failed"] == 0 and found["declared"] == 6 and ["two", "2"] in found["same"]


VOLUMES = ["--modality", "T1:32x32x32:8x8x8", "--modality", "rsfMRI:24x24x24x4:8x8x8x2"]
LITTLE = ["--fast-frames", 2, "--fast-grid", 1, "--slow-frames", 2, "--slow-grid", 2]
DEMOS = [  # flags that name a folder of the demo are paths
    ("demo_folder", train_llava_med, []),
    ("qwen_folder", train_qwen2vl_sentinel, []),
    ("video_folder", train_surg_video_vqa, ["--audio-model", Path("whisper")]),
    ("mri_folder", train_umbrella_mri, VOLUMES),
    ("plain_folder", train_video_plain_lm, ["--vision-model", Path("vision"), "--from-scratch", *LITTLE]),
]


@pytest.fixture(params=DEMOS, ids=lambda demo: demo[1].__name__)
def demo(request):
    """(folder, script, its flags)"""
    name, script, flags = request.param
    folder = request.getfixturevalue(name)
    return folder, script, [folder / flag if isinstance(flag, Path) else flag for flag in flags]


def test_our_own_scorers_pass_over_the_demo_s_vocabulary(demo, tmp_path):
    folder, script, flags = demo
    argv = ["--model", folder / "model", "--data", folder / "data", "--out", tmp_path, *flags]
    args = script.parse_arguments([str(flag) for flag in argv])
    args.question = "text"  # surgical videos: otherwise chosen when the model is opened
    rows, problems = script.read_data(folder / "data", args)
    assert problems == []
    found = report.audit_scorer(lambda said, row: script.score(said, row)["exact"], rows)
    assert found["failures"] == [] and found["pairs"] > 20 and found["probes"]["nothing"] == len(rows)


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the SurgViVQA annotations are not here")
def test_our_scorer_passes_over_the_real_vocabulary():
    rows, problems = report.read_folder(ANNOTATIONS)
    assert (len(rows), problems) == (3700, [])
    found = report.audit_scorer(strict, rows)
    assert found["failures"] == [] and found["pairs"] > 150 and found["probes"]["nothing"] == 3700
    assert report.audit_scorer(substring, rows)["failed"] and report.audit_scorer(similar, rows)["failed"]


# --- predictions of others -----------------------------------------------------------------------------------


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
    report.main([str(a) for a in argv])
    return json.loads((folder / "out/results.json").read_text())


def test_a_published_predictions_file_gets_its_floors_and_clustered_intervals(published, capsys):
    (found,) = of_others(published)["runs"]
    assert found["n"] == 1000 and found["all"]["floors"]["type"] == 0.573
    lines = read_lines(published / "predictions.jsonl")
    right = sum(line["predicted_answer"] in (line["ground_truth"], line["short_answer"]) for line in lines)
    assert found["all"]["exact"] == right / 1000
    # one video: intervals are of its clips, and the same questions resampled one by one would be surer
    assert found["all"]["groups"] == 719 and "002-004: intervals are of its 719 parts" in found["notes"][0]
    assert found["all"]["interval"][0] < found["all"]["exact"] < found["all"]["interval"][1]
    text = capsys.readouterr().out
    assert "57.3%" in text and "0 wrongly called right" in text
    page = (published / "out/report.html").read_text()
    assert "scope_forward_motion" in page and (published / "out/results.json").is_file()


def test_what_a_predictions_file_has_wrong_is_named(published):
    path = published / "predictions.jsonl"
    lines = read_lines(path)
    renamed = [{"qid": line["question_id"], "said": line["predicted_answer"]} for line in lines]
    runtime.write_jsonl(path, renamed)
    with pytest.raises(SystemExit, match=r"predictions.jsonl:1: no field id or question_id; name it with --fields id="):
        of_others(published)
    assert of_others(published, "--fields", "id=qid,prediction=said")["runs"][0]["n"] == 1000
    with pytest.raises(SystemExit, match="'answer' is none of id, prediction"):
        of_others(published, "--fields", "answer=said")
    runtime.write_jsonl(path, [*lines, lines[3], {**lines[0], "question_id": "qa_9"}])
    with pytest.raises(SystemExit) as caught:
        of_others(published)
    assert f"predictions.jsonl:1001 (id {lines[3]['question_id']}): answered twice" in str(caught.value)
    assert "predictions.jsonl:1002 (id qa_9): no row of --test has this ID" in str(caught.value)
    runtime.write_jsonl(path, [{**lines[0], "predicted_answer": ["no"]}, {**lines[1], "question_id": None}])
    with pytest.raises(SystemExit) as caught:
        of_others(published)
    assert "the prediction must be a text or null: ['no']" in str(caught.value) and "(id None): no row" in str(
        caught.value
    )
    path.write_text("")
    with pytest.raises(SystemExit, match="the file holds no rows"):
        of_others(published)
    path.unlink()
    with pytest.raises(SystemExit, match="no such file"):
        of_others(published)


def test_test_rows_of_one_id_or_without_an_answer_are_refused(tmp_path):
    rows = [{"id": "a", "question": "Is it?", "answer": answer} for answer in ("no", "yes", None, ["x"])]
    runtime.write_jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(SystemExit) as caught:
        report.read_rows(tmp_path / "test.jsonl", "test")
    text = str(caught.value)
    assert "test.jsonl:2 (id a): duplicate ID, first used at test.jsonl:1" in text
    assert "test.jsonl:3 (id a): the answer is empty or no text (None)" in text and "(['x'])" in text


def test_rows_without_a_prediction_count_as_wrong(published):
    lines = read_lines(published / "predictions.jsonl")
    everything = of_others(published)["runs"][0]["all"]["exact"]
    right = [line for line in lines if line["predicted_answer"] == line["ground_truth"]]
    runtime.write_jsonl(published / "predictions.jsonl", right)
    found = of_others(published)["runs"][0]
    assert found["n"] == 1000 and len(right) / 1000 <= found["all"]["exact"] <= everything
    assert f"{1000 - len(right)} of 1000 rows have no prediction" in found["notes"][0]


# --- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(demo_folder, tmp_path_factory):
    """A run as a user starts it, with its report; and what it printed."""
    out, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(demo_folder, out, *SMALL, "--report")
    return out, printed.getvalue()


def test_training_ends_with_the_table_its_floors_and_a_page(trained):
    out, text = trained
    assert "blind floors, by" in text and "above best" in text
    assert f"the report is {out}/report/report.html" in text
    assert {"report.html", "results.json"} <= {path.name for path in (out / "report").iterdir()}
    results, detailed = (json.loads((out / place / "results.json").read_text()) for place in ("", "report"))
    for name in ("exact", "floors", "interval", "above_floor"):
        assert results["all"][name] == detailed["runs"][0]["all"][name]
    records = read_lines(out / "predictions.jsonl")
    share = sum(record["floors"]["type"] for record in records) / len(records)
    assert results["all"]["floors"]["type"] == share > 0
    page = (out / "report/report.html").read_text()
    assert "data:image/jpeg" in page and "&lt;image&gt;" in page  # its thumbnails, its first row's tokens


def test_the_command_line_writes_what_the_script_wrote(trained, capsys):
    out, _ = trained
    before = json.loads((out / "report/results.json").read_text())
    report.main([str(out)])
    assert json.loads((out / "report/results.json").read_text()) == before
    assert "0 wrongly called right" in capsys.readouterr().out


def test_several_runs_stand_side_by_side(trained, tmp_path, capsys):
    out, _ = trained
    shutil.copytree(out, tmp_path / "second")
    records = read_lines(out / "predictions.jsonl")
    runtime.write_jsonl(tmp_path / "second/predictions.jsonl", [{**r, "correct": True} for r in records])
    report.main([str(tmp_path / "second"), str(out), "--out", str(tmp_path / "both")])
    found = json.loads((tmp_path / "both/results.json").read_text())
    wrong = sum(not record["correct"] for record in records) / len(records)
    assert found["comparisons"][0]["all"]["difference"] == pytest.approx(wrong)
    assert f"{tmp_path / 'second'} less {out}, 24 questions: +" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "second"), str(out)])
    assert "--out required" in capsys.readouterr().err


def test_blind_runs_show_the_script_s_model_nothing_or_another_s_media(demo_folder, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)  # a run that was moved
    before = (out / "predictions.jsonl").read_bytes()
    command = [sys.executable, ROOT / "report.py", out, "--blind-runs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "predictions.jsonl").read_bytes() == before  # the run's own answers stay
    found = json.loads((out / "report/results.json").read_text())["runs"][0]
    assert found["blind"].keys() == {"blank", "shuffled"}
    assert f"blank media: {found['blind']['blank']['exact']:.1%} of 24 questions; seeing adds" in done.stdout
    assert not (trained[0] / "blind").exists()
    results = [json.loads((out / place / "results.json").read_text()) for place in ("", "blind/blank")]
    assert [r["decode"] for r in results] == ["both", "both"] and "gate" in json.loads((out / "check.json").read_text())
    # what was answered earlier is said, what was answered otherwise is not compared
    os.utime(out / "predictions.jsonl")
    report.main([str(out)])
    found = json.loads((out / "report/results.json").read_text())["runs"][0]
    assert "shuffled: answered before the run's last answers; repeat it with --blind-runs" in found["notes"]
    runtime.write_json(out / "blind/blank/results.json", {**results[1], "decode": "free"})
    report.main([str(out)])
    found = json.loads((out / "report/results.json").read_text())["runs"][0]
    assert found["blind"].keys() == {"shuffled"}
    assert "blank: was answered with another decode; repeat it with --blind-runs" in found["notes"]
    own, shuffled = (read_lines(out / place / "predictions.jsonl") for place in ("", "blind/shuffled"))
    assert [r["id"] for r in own] == [r["id"] for r in shuffled]
    assert all(a["media"] != b["media"] and a["group"] == b["group"] for a, b in zip(own, shuffled, strict=True))
    assert [r["media"] for r in read_lines(out / "blind/blank/predictions.jsonl")] == [r["media"] for r in own]


def test_every_script_answers_without_seeing(demo, tmp_path):
    """blank: what the model is given has no pixel or voxel that is not 0. shuffled: each row shows another's media."""
    folder, script, flags = demo
    flags = [*flags, "--limit", 12, "--max-answer-tokens", 2, "--decode", "free"]
    run(folder, tmp_path, *flags, "--max-steps", 1, script=script)
    own, given = read_lines(tmp_path / "predictions.jsonl"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "blank", lambda media, blank=script.blank: given.append(blank(media)) or given[-1])
        run(folder, tmp_path, *flags, "--eval-only", "--blind", "blank", script=script)
    pixels = [media.get("pixel_values") for media in given]
    pixels += [video.pixels for media in given for video in media.get("videos", [])]
    pixels += [value for media in given for name, value in media.items() if name.startswith("volumes of")]
    pixels = [tensor for tensor in pixels if tensor is not None]
    assert pixels and all(tensor.numel() and not tensor.any() for tensor in pixels)
    run(folder, tmp_path, *flags, "--eval-only", "--blind", "shuffled", script=script)
    for mode in ("blank", "shuffled"):
        blind = read_lines(tmp_path / "blind" / mode / "predictions.jsonl")
        # of the drawn scans a single series is among these: it can show nobody else's
        left = [r for r in own if mode == "blank" or "hemisphere" not in r["question_type"]]
        assert [(r["id"], r["group"], r["question"], r["answer"]) for r in blind] == [
            (r["id"], r["group"], r["question"], r["answer"]) for r in left
        ]
        seen = [[name for name in r["media"] if not name.startswith("audio/")] for r in left]
        shown = [[name for name in r["media"] if not name.startswith("audio/")] for r in blind]
        assert all((a == b) == (mode == "blank") for a, b in zip(seen, shown, strict=True))
        heard = [[name for name in r["media"] if name.startswith("audio/")] for r in blind]
        assert heard == [[name for name in r["media"] if name.startswith("audio/")] for r in left]
    assert read_lines(tmp_path / "predictions.jsonl") == own


def test_shuffled_media_come_from_another_group_where_they_can():
    def row(i, group, image):
        return SimpleNamespace(id=str(i), where=str(i), group=group, media=[image])

    def shown(rows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_llava_med, "show", lambda row, other: other)
            return train_llava_med.exchange(rows)

    rows = [row(i, f"patient {i // 6}", f"{i // 2}.png") for i in range(30)]  # 15 images, three a patient
    others = shown(rows)
    assert all(a.group != b.group for a, b in zip(rows, others, strict=True))
    assert sorted({b.media[0] for b in others}) == sorted({a.media[0] for a in rows})  # each is shown once
    assert all(others[i].media == others[i + 1].media for i in range(0, 30, 2))  # and read once for its questions
    alone = [row(i, "one", f"{i}.png") for i in range(3)]
    assert all(a.media != b.media for a, b in zip(alone, shown(alone), strict=True))
    with pytest.raises(SystemExit, match="no two media to exchange"):
        shown(alone[:1])


def test_blind_is_for_answering_alone(demo_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(demo_folder, tmp_path, "--blind", "blank")
    assert "--blind is for --eval-only" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_fails_no_run(trained, tmp_path, capsys, monkeypatch):
    shutil.copytree(trained[0], tmp_path / "run")
    monkeypatch.setattr(report, "summarise_run", lambda run: 1 / 0)
    report.write_report(tmp_path / "run")
    assert "no report was written; python report.py" in capsys.readouterr().out


def test_folders_that_hold_no_run_are_refused_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"no predictions.jsonl; answer with the script's --eval-only"):
        report.main([str(tmp_path)])
    (tmp_path / "predictions.jsonl").write_text('{"id": "1", "prediction": "x"}\n')
    with pytest.raises(SystemExit, match=r"predictions.jsonl:1 \(id 1\): no answer, correct, group, media"):
        report.main([str(tmp_path)])
    (tmp_path / "predictions.jsonl").write_text("")
    with pytest.raises(SystemExit, match="holds no rows"):
        report.main([str(tmp_path)])
    for argv in ([], [str(tmp_path), "--data", str(tmp_path)], ["--predictions", "x"]):
        with pytest.raises(SystemExit):
            report.main(argv)


def test_predictions_of_an_older_version_have_no_floors_and_say_so(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run")
    records = read_lines(trained[0] / "predictions.jsonl")
    runtime.write_jsonl(
        tmp_path / "run/predictions.jsonl", [{k: v for k, v in r.items() if k != "floors"} for r in records]
    )
    report.main([str(tmp_path / "run")])
    assert "what can be said blindly is not known" in capsys.readouterr().out


def test_a_run_below_its_floor_is_told_so(tmp_path, capsys):
    blind = {"floors": {"type": True}, "group": "x"}
    records = [as_written("t", "yes", "no", id=str(i), **blind) for i in range(4)]
    records = [{**record, "group": str(i)} for i, record in enumerate(records)]
    runtime.write_jsonl(tmp_path / "predictions.jsonl", records)
    report.main([str(tmp_path)])
    assert "NOT above its best blind floor" in capsys.readouterr().out


# --- checking and other boards ---------------------------------------------------------------------------------


def test_check_audits_the_scorer_before_any_weights_are_read(demo_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_llava_med, "score", lambda said, row: {"exact": row.answer in str(said)})
    with pytest.raises(SystemExit, match="faults, listed in"):
        run(demo_folder, tmp_path, "--check")
    text = capsys.readouterr().out
    assert "fault: scorer: " in text and "is called right where the answer is" in text
    assert json.loads((tmp_path / "check.json").read_text())["passed"] is False


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(demo_folder, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ["--limit", 24, "--max-answer-tokens", 1, "--tensorboard", "--save-every", 1]
    run(demo_folder, tmp_path, *flags, "--max-steps", 3, "--questions-per-step", 8)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line]
    for name in ("loss", "lr", "grad_norm", "questions"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert len(events.Scalars("val_loss")) == 1


def test_steps_that_are_taken_again_stand_in_tensorboard_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = SimpleNamespace(tensorboard=True, wandb=None)
    for start, steps in ((0, (1, 2, 3)), (1, (2,))):  # stopped after step 3, gone on from the checkpoint of step 1
        metrics = runtime.Metrics(tmp_path, start, 3, flags)
        for step in steps:
            metrics.write(step=step, val_loss=float(step + 10 * start))
        metrics.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("val_loss")] == [(1, 1.0), (2, 12.0)]


def test_wandb_gets_the_numbers_and_a_resumed_run_goes_on(demo_folder, tmp_path, monkeypatch):
    """Against a stand-in for the package, which would want an account."""
    begun, logged = [], []
    board = SimpleNamespace(
        log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: logged.append("end")
    )
    package = SimpleNamespace(init=lambda **settings: begun.append(settings) or board)
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(runtime, "find_spec", lambda name: name)
    flags = ["--limit", 24, "--max-answer-tokens", 1, "--wandb", "polyps", "--questions-per-step", 8]
    run(demo_folder, tmp_path, *flags, "--max-steps", 2)
    assert begun[0]["project"] == "polyps" and begun[0]["resume"] == "allow" and begun[0]["config"]["lr"] == 2e-4
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [entry[0] for entry in logged[:-1]] == [line["step"] for line in lines] and logged[-1] == "end"
    assert logged[0][1]["loss"] == lines[0]["loss"] and "ids" not in logged[0][1]
    run(demo_folder, tmp_path, *flags, "--max-steps", 2)
    assert begun[1]["id"] == begun[0]["id"]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_board_that_is_not_installed_is_refused_at_once(demo_folder, tmp_path, package, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(demo_folder, tmp_path, f"--{package}", *(["p"] if package == "wandb" else []))
    assert f"--{package} needs a package: pip install {package}" in capsys.readouterr().err
