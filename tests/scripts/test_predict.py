"""Answers to questions that have none (--predict), and the model before any training (--eval-only --resume none)."""

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import read_lines, refused, run
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import train_llava_med
import train_qwen2vl_sentinel
import train_surg_video_vqa
import train_umbrella_mri
import train_video_plain_lm
from inputs.predict import write_examples
from report.__main__ import main as report

SMALL = ["--limit", 12, "--max-steps", 2, "--max-answer-tokens", 6, "--lr", 1e-3]
VOLUMES = ["--modality", "T1:32x32x32:8x8x8", "--modality", "rsfMRI:24x24x24x4:8x8x8x2"]
LITTLE = ["--fast-frames", 2, "--fast-grid", 1, "--slow-frames", 2, "--slow-grid", 2]
SCRIPTS = {  # the demo's folder, the script, its flags; those that name a folder of the demo are paths
    "llava": ("demo_folder", train_llava_med, []),
    "qwen": ("qwen_folder", train_qwen2vl_sentinel, []),
    "surg": ("video_folder", train_surg_video_vqa, ["--audio-model", Path("whisper")]),
    "mri": ("mri_folder", train_umbrella_mri, VOLUMES),
    "plain": ("plain_folder", train_video_plain_lm, ["--vision-model", Path("vision"), "--from-scratch", *LITTLE]),
}


@pytest.fixture(scope="module", params=SCRIPTS)
def trained(request, tmp_path_factory):
    """(the demo's folder, the script, its flags, a short run whose candidates were ranked). Do not write here."""
    name, script, flags = SCRIPTS[request.param]
    folder, out = request.getfixturevalue(name), tmp_path_factory.mktemp("predict") / "run"
    flags = [folder / flag if isinstance(flag, Path) else flag for flag in flags]
    run(folder, out, *flags, *SMALL, "--decode", "both", script=script)
    return folder, script, flags, out


@pytest.fixture(scope="module")
def trained_llava(demo_folder, tmp_path_factory):
    """A short run of LLaVA's. Tests must not write here."""
    out = tmp_path_factory.mktemp("predict") / "run"
    run(demo_folder, out, *SMALL, "--decode", "both")
    return out


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def predict(folder: Path, lines, *flags, script, monkeypatch, capfd) -> list[dict]:
    """What the script answers to JSON lines on standard input; media are the demo's."""
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    capfd.readouterr()
    argv = ["--model", folder / "model", "--media-root", folder / "data", "--predict", "-", *flags]
    script.main([str(a) for a in argv])
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def questions(folder: Path, records: list[dict]) -> list[dict]:
    """The demo's test questions as lines without answers, in the order of a run's records."""
    lines = []
    plain = [pair for path in folder.glob("data/test.json*") for pair in rows_of(path)]
    plain = {row.get("id", f"test.jsonl:{i}"): row for i, row in enumerate(plain, start=1)}
    for record in records:
        path = folder / "data" / f"{record['id']}.json"  # of UMBRELLA, a conversation a file
        line = {"id": record["id"]} | (json.loads(path.read_text()) if path.is_file() else plain.get(record["id"], {}))
        if "conversations" in line:
            line["conversations"].pop()
        if record["id"] not in plain and not path.is_file():  # of SurgViVQA, whose IDs and frames are numbered
            line |= {"frames": [name for name in record["media"] if name.startswith("frames/")]}
            line["audio"] = next((name for name in record["media"] if name.startswith("audio/")), None)
            line |= {name: record[name] for name in ("question", "question_type")}
        given = {"answer_candidates": record["candidates"]} if record.get("candidates") and "image" in line else {}
        lines.append({name: value for name, value in line.items() if name not in ("answer", "metadata")} | given)
    return lines


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.suffix == ".json" else read_lines(path)


def test_every_script_answers_as_it_evaluates_and_touches_nothing(trained, monkeypatch, capfd):
    """With RUN's adapter: predictions and probabilities of --eval-only, in order, and no other text beside them."""
    folder, script, flags, out = trained
    before, records = contents(out), read_lines(out / "predictions.jsonl")
    asked = questions(folder, records)[::-1]
    assert not any("answer" in line for line in asked)
    flags = [*flags, "--max-answer-tokens", 6, "--decode", "both", "--out", out]
    found = predict(folder, asked, *flags, script=script, monkeypatch=monkeypatch, capfd=capfd)
    for line, record in zip(found, records[::-1], strict=True):
        expected = {n: record[n] for n in ("id", "media", "prediction", "ended") if n in record}
        chances = record.get("probabilities", {})
        assert line.pop("probabilities", {}) == pytest.approx(chances, abs=1e-5)
        assert line == expected
    assert contents(out) == before


def test_a_merged_folder_answers_the_same_and_so_does_a_checkpoint_by_its_name(trained, tmp_path, monkeypatch, capfd):
    folder, script, flags, out = trained
    records = read_lines(out / "predictions.jsonl")
    run(folder, out, *flags, "--merge", tmp_path / "merged", script=script)
    (checkpoint,) = (out / "checkpoints").iterdir()
    asked, how = questions(folder, records), ["--max-answer-tokens", 6, "--decode", "both"]
    use = {"script": script, "monkeypatch": monkeypatch, "capfd": capfd}
    own = flags[flags.index("--from-scratch") + 1 :] if "--from-scratch" in flags else flags
    own = [] if "--audio-model" in flags else own  # parts of other models are in the merged folder
    for given in ([*flags, "--resume", checkpoint], [*own, "--model", tmp_path / "merged"]):
        found = predict(folder, asked, *given, *how, **use)
        assert [line["prediction"] for line in found] == [record["prediction"] for record in records]
        for line, record in zip(found, records, strict=True):
            assert line.get("probabilities", {}) == pytest.approx(record.get("probabilities", {}), abs=1e-4)


def test_new_parts_answer_nothing(trained, tmp_path, monkeypatch, capfd):
    """Drawn at random, they would be measured as if they were the model's."""
    folder, script, flags, _ = trained
    said = "drawn at random, so there is nothing to measure or to answer with"
    if script in (train_llava_med, train_qwen2vl_sentinel):
        return
    assert said in refused(folder, tmp_path / "run", *flags, *SMALL, "--eval-only", "--resume", "none", script=script)
    with pytest.raises(SystemExit, match=said):
        predict(folder, [{"question": "Is it?"}], *flags, script=script, monkeypatch=monkeypatch, capfd=capfd)
    assert not (tmp_path / "run" / "baseline" / "predictions.jsonl").exists()


@pytest.mark.parametrize("name", ["llava", "qwen", "surg"])
def test_the_model_before_training_is_measured_into_a_folder_of_its_own(name, request, tmp_path, monkeypatch, capfd):
    """Before the run and after it alike, and as --predict answers with the model alone."""
    folder, script = request.getfixturevalue(SCRIPTS[name][0]), SCRIPTS[name][1]
    baseline, out = [*SMALL, "--eval-only", "--resume", "none"], tmp_path / "run"
    run(folder, out, *baseline, script=script)
    assert [path.name for path in out.iterdir()] == ["baseline"]
    first = read_lines(out / "baseline/predictions.jsonl")
    run(folder, out, *SMALL, "--report", script=script)
    before = contents(out)
    run(folder, out, *baseline, "--report", script=script)
    assert read_lines(out / "baseline/predictions.jsonl") == first
    names = ("check.json", "check_cache.json", "predictions.jsonl", "results.json")
    files = {f"baseline/{name}" for name in names}
    after = contents(out)
    assert {name for name in after if name.startswith("baseline/")} == files
    assert {n: d for n, d in after.items() if n not in files} == {n: d for n, d in before.items() if n not in files}
    results = json.loads((out / "baseline/results.json").read_text())
    assert (results["checkpoint"], results["step"], results["micro"]["n"]) == (None, 0, 12)
    # the paired gain, on the page and in what is printed
    right = [[r["correct"] for r in read_lines(out / p / "predictions.jsonl")] for p in ("", "baseline")]
    gain = sum(a - b for a, b in zip(*right, strict=True)) / 12
    found = json.loads((out / "report/results.json").read_text())["runs"][0]
    assert found["blind"]["before training"]["difference"] == pytest.approx(gain)
    assert found["notes"] == [] or not any("before training" in note for note in found["notes"])
    page = (out / "report/report.html").read_text()
    assert "Without images or training" in page and "its own, before training" in page
    flags = ["--question", "text"] if name == "surg" else []
    found = predict(
        folder,
        questions(folder, first),
        *flags,
        "--max-answer-tokens",
        6,
        script=script,
        monkeypatch=monkeypatch,
        capfd=capfd,
    )
    assert [line["prediction"] for line in found] == [record["prediction"] for record in first]


def test_the_model_before_training_answers_as_transformers_generates(demo_folder, trained_llava, tmp_path):
    """Greedily, from the text of the chat template, one placeholder repeated."""
    run(demo_folder, tmp_path, *SMALL, "--eval-only", "--resume", "none")
    model = LlavaForConditionalGeneration.from_pretrained(demo_folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained_llava / "adapter")
    processor = CLIPImageProcessorPil.from_pretrained(demo_folder / "model")
    for record in read_lines(tmp_path / "baseline/predictions.jsonl"):
        content = [{"type": "image"}, {"type": "text", "text": record["question"]}]
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        input_ids = [i for token in tokenizer(text).input_ids for i in [token] * (64 if token == 600 else 1)]
        (name,) = record["media"]
        pixels = processor([Image.open(demo_folder / "data" / name)], return_tensors="pt")["pixel_values"]
        given = {"input_ids": torch.tensor([input_ids]), "pixel_values": pixels, "max_new_tokens": 6}
        tokens = model.generate(**given, attention_mask=torch.ones(1, len(input_ids)).long(), do_sample=False)
        text = tokenizer.decode(tokens[0, len(input_ids) :], skip_special_tokens=True).strip()
        assert record["prediction"] == text


def test_a_stale_measure_of_the_model_before_training_is_said(demo_folder, trained_llava, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained_llava, out)
    run(demo_folder, out, *SMALL, "--eval-only", "--resume", "none", "--decode", "both")

    def reported() -> dict:
        report([str(out)])
        return json.loads((out / "report/results.json").read_text())["runs"][0]

    assert reported()["blind"].keys() == {"before training"}
    results = json.loads((out / "baseline/results.json").read_text())
    for name, value in {"model": "another", "limit": 3, "decode": "greedy", "system": "Be short."}.items():
        own = {**results["own_settings"], **({name: value} if name == "system" else {})}
        (out / "baseline/results.json").write_text(json.dumps({**results, name: value, "own_settings": own}))
        found = reported()
        text = f"before training: was answered with another {name}; repeat it with --eval-only --resume none"
        assert found["blind"] == {} and text in found["notes"]
    del results["own_settings"]  # as they were written before
    (out / "baseline/results.json").write_text(json.dumps(results))
    assert reported()["blind"].keys() == {"before training"}


def test_a_file_is_answered_into_the_run_and_ids_are_the_lines_places(demo_folder, trained_llava, tmp_path, capfd):
    out, path = tmp_path / "run", tmp_path / "asked.jsonl"
    shutil.copytree(trained_llava, out)
    before, records = contents(out), read_lines(out / "predictions.jsonl")
    rows = read_lines(demo_folder / "data" / "test.jsonl")[:12]
    asked = [{"image": row["image"], "question": row["question"], "answer": ["not read"]} for row in rows]
    asked[1]["id"], asked[2]["split"] = 7, "train"
    path.write_text("\n".join(map(json.dumps, asked)))
    argv = ["--model", demo_folder / "model", "--media-root", demo_folder / "data", "--out", out, "--limit", 5]
    train_llava_med.main([str(a) for a in [*argv, "--predict", path, "--max-answer-tokens", 6]])
    after = contents(out)
    assert after.pop("answers.jsonl") and after == before
    found = read_lines(out / "answers.jsonl")
    assert [line["id"] for line in found] == ["asked.jsonl:1", 7, *(f"asked.jsonl:{i}" for i in (3, 4, 5))]
    assert [line["prediction"] for line in found] == [record["prediction"] for record in records[:5]]
    assert capfd.readouterr().out == ""


def test_surgvivqa_s_own_lines_are_known_by_their_file(video_folder, tmp_path):
    """Frames and recordings go by the IDs; so does the answer to `--question audio`."""
    flags = ["--audio-model", video_folder / "whisper", *SMALL]
    run(video_folder, tmp_path / "run", *flags, script=train_surg_video_vqa)
    path = tmp_path / "test_multivideo.jsonl"
    rows = [{**row, "answer": None} for row in read_lines(video_folder / "data" / path.name)[:12]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", video_folder / "model", "--media-root", video_folder / "data", "--out", tmp_path / "run", *flags]
    train_surg_video_vqa.main([str(a) for a in [*argv, "--predict", path]])
    found, records = read_lines(tmp_path / "run/answers.jsonl"), read_lines(tmp_path / "run/predictions.jsonl")
    assert [line["id"] for line in found] == [row["id"] for row in rows]
    assert [(line["media"], line["prediction"]) for line in found] == [(r["media"], r["prediction"]) for r in records]
    assert all(line["media"][-1].startswith("audio/") for line in found)


def test_of_a_conversation_the_last_question_is_answered(demo_folder, trained_llava, monkeypatch, capfd):
    row, other = read_lines(demo_folder / "data" / "test.jsonl")[:2]
    turns = [
        ("human", f"<image>\n{row['question']}"),
        ("gpt", "yes"),
        ("human", other["question"]),
        ("gpt", "never read"),
    ]
    turns = [{"from": role, "value": text} for role, text in turns]
    plain = {"image": row["image"], "question": other["question"], "history": [[row["question"], "yes"]]}
    lines = [{"id": "a", "image": row["image"], "conversations": turns[:n]} for n in (3, 4)]
    lines = [lines[0], {**lines[1], "id": "b"}, {**plain, "id": "c"}]
    flags = ["--out", trained_llava, "--max-answer-tokens", 6]
    found = predict(demo_folder, lines, *flags, script=train_llava_med, monkeypatch=monkeypatch, capfd=capfd)
    assert [line["id"] for line in found] == ["a", "b", "c"]
    assert len({line["prediction"] for line in found}) == 1


def test_lines_with_faults_are_all_named_or_answered_by_their_fault(demo_folder, trained_llava, monkeypatch, capfd):
    row = read_lines(demo_folder / "data" / "test.jsonl")[0]
    good = {"image": row["image"], "question": row["question"]}
    lines = [good, "no JSON\n", {"image": "gone.jpg", "question": "Is it?"}, {"id": "q", "image": row["image"]}]
    lines += [{"image": row["image"], "question": "Is </s> it?"}, {**good, "id": "last"}]
    flags = ["--out", trained_llava, "--max-answer-tokens", 6]
    use = {"script": train_llava_med, "monkeypatch": monkeypatch, "capfd": capfd}
    with pytest.raises(
        SystemExit, match="--predict -: 4 lines with faults; fix them, or answer the others: --skip-bad"
    ):
        predict(demo_folder, lines, *flags, **use)
    said = capfd.readouterr()
    assert said.out == ""
    faults = {"stdin:2": "not a JSON object", "stdin:3": "gone.jpg is missing", "stdin:4": "the question is empty"}
    faults |= {"stdin:5": "the text contains '</s>'"}
    assert [where for where, text in faults.items() if f"{where}: {text}" not in said.err] == [], said.err
    found = predict(demo_folder, lines, *flags, "--skip-bad", **use)
    assert [line["id"] for line in found] == ["stdin:1", "stdin:2", "stdin:3", "q", "stdin:5", "last"]
    assert ["error" in line for line in found] == [False, True, True, True, True, False]
    assert all(text in line["error"] for text, line in zip(faults.values(), found[1:5], strict=True))
    assert found[0]["prediction"] == found[-1]["prediction"]
    found = predict(demo_folder, lines[1:3], *flags, "--skip-bad", **use)
    assert [line.keys() for line in found] == [{"id", "error"}] * 2


def test_lines_as_other_programs_write_them_are_answered_under_names_that_can_be_written(
    demo_folder, trained_llava, tmp_path
):
    """Byte order marks between joined files, \\r\\n, blank lines, pandas' NaN, half a character."""
    row, out = read_lines(demo_folder / "data" / "test.jsonl")[0], tmp_path / "run"
    shutil.copytree(trained_llava, out)
    good = {"image": row["image"], "question": row["question"]}
    lines = [json.dumps({**good, **own}) for own in ({}, {"id": "a\u2028b"}, {"id": math.nan}, {"id": "\ud800"})]
    (tmp_path / "asked.jsonl").write_text("\ufeff" + "\r\n\n\ufeff".join(lines) + "\r\n", encoding="utf-8")
    argv = ["--model", demo_folder / "model", "--media-root", demo_folder / "data", "--out", out, "--skip-bad"]
    argv += ["--predict", tmp_path / "asked.jsonl", "--max-answer-tokens", 6]
    train_llava_med.main([str(a) for a in argv])
    found = read_lines(out / "answers.jsonl")
    assert [line["id"] for line in found] == ["asked.jsonl:1", "a\u2028b", "asked.jsonl:5", "asked.jsonl:7"]
    first = read_lines(out / "predictions.jsonl")[0]["prediction"]
    assert [line.get("prediction") for line in found] == [first, first, first, None]
    assert "half a character" in found[-1]["error"]


def test_a_run_without_checkpoints_is_not_taken_for_the_model_alone(demo_folder, tmp_path, monkeypatch, capfd):
    """A misspelt --out would give answers of a model that nobody has trained."""
    row = read_lines(demo_folder / "data" / "test.jsonl")[0]
    use = {"script": train_llava_med, "monkeypatch": monkeypatch, "capfd": capfd}
    line, flags = {"image": row["image"], "question": row["question"]}, ["--out", tmp_path / "rnu"]
    with pytest.raises(SystemExit, match=r"no checkpoint to answer with .*--resume none"):
        predict(demo_folder, [line], *flags, **use)
    assert not (tmp_path / "rnu").exists()
    (found,) = predict(demo_folder, [line], *flags, "--resume", "none", "--max-answer-tokens", 1, **use)
    assert found["media"] == [row["image"]]


def test_labels_of_a_task_that_no_line_is_about_are_no_fault(tmp_path):
    """The flags are those of the run, and its tasks are several."""
    path, line = tmp_path / "asked.jsonl", {"volume": "a.nii", "modality": "T1", "question": "Which?", "task_type": "b"}
    path.write_text(json.dumps(line))
    labels = ["--labels", "a=left,right", "--labels", "b=small,large"]
    args = train_umbrella_mri.parse_arguments(["--model", "M", "--predict", str(path), *labels])
    write_examples(tmp_path / "written.jsonl", args)
    examples, problems = train_umbrella_mri.read_examples(tmp_path / "written.jsonl", args)
    assert [(example.where, example.labels) for example in examples] == [("written.jsonl:1", ["small", "large"])]
    assert problems == []


def test_answers_that_nobody_reads_end_in_a_sentence(demo_folder, trained_llava, monkeypatch, capfd):
    """`| head -1`, or a full disk behind `>`."""
    row = read_lines(demo_folder / "data" / "test.jsonl")[0]
    read, write = os.pipe()
    os.close(read)
    line, flags = (
        {"image": row["image"], "question": row["question"]},
        ["--out", trained_llava, "--max-answer-tokens", 1],
    )
    monkeypatch.setattr(sys, "__stdout__", SimpleNamespace(buffer=os.fdopen(write, "wb", 0)))
    with pytest.raises(SystemExit, match=r"standard output cannot be written: .*pipe"):
        predict(demo_folder, [line], *flags, script=train_llava_med, monkeypatch=monkeypatch, capfd=capfd)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--predict", "gone.jsonl"], "--predict gone.jsonl cannot be read; name a file of UTF-8 text"),
        (["--predict", "a.csv"], "--predict a.csv: JSON lines are read"),
    ],
)
def test_what_cannot_be_read_is_refused(demo_folder, given, said):
    with pytest.raises(SystemExit) as caught:
        train_llava_med.main(["--model", str(demo_folder / "model"), *given])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--data", "D"], "--predict - is read instead of --data; leave --data out"),
        (["--check"], "--check and --predict: one at a time"),
        (["--eval-only"], "--eval-only and --predict: one at a time"),
        (["--merge", "M"], "--merge and --predict: one at a time"),
    ],
)
def test_nothing_else_is_done_beside(given, said, capfd):
    with pytest.raises(SystemExit, match="2"):
        train_llava_med.parse_arguments(["--model", "M", "--out", "R", "--predict", "-", *given])
    assert said in capfd.readouterr().err


def test_one_image_from_the_command_line(demo_folder, trained_llava):
    """Standard output holds the answer and nothing else; two ranks give it once."""
    row = read_lines(demo_folder / "data" / "test.jsonl")[0]
    asked = json.dumps({"image": row["image"], "question": row["question"]})
    command = [sys.executable, train_llava_med.__file__, "--model", demo_folder / "model", "--out", trained_llava]
    command += ["--predict", "-", "--max-answer-tokens", "6"]
    done = subprocess.run(command, cwd=demo_folder / "data", input=asked, capture_output=True, text=True, check=True)
    first = read_lines(trained_llava / "predictions.jsonl")[0]
    (line,) = done.stdout.splitlines()
    expected = {"id": "stdin:1", **{name: first[name] for name in ("media", "prediction", "ended")}}
    assert json.loads(line) == expected
    assert "chat template" in done.stderr
