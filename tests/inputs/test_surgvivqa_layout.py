"""SurgViVQA's own files: read as the same examples as plain lines, and what the published splits share."""

import json
import random
import re
import shutil
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import load_demo, read_lines
from helpers import refused as script_refused
from PIL import Image

import train_surg_video_vqa as script
from inputs import data_check
from inputs.building import build_trees
from report import scoring
from report.baselines import blind_answers

REAL = Path(__file__).parents[3] / "shared/data/surgvivqa_audio"
PUBLISHED = {"train": "train", "val": "eval", "test": "test"}  # split -> SurgViVQA's name for it


@pytest.fixture(scope="module")
def data(video_folder):
    return load_demo(video_folder, script, "--audio-model", video_folder / "whisper")


def test_two_layouts_in_one_folder_are_refused(video_folder, tmp_path):
    shutil.copytree(video_folder, tmp_path / "demo")
    (tmp_path / "demo/data/train.jsonl").write_text("{}")
    words = script_refused(tmp_path / "demo", tmp_path / "out", "--check", "--question", "text", script=script)
    assert "train.jsonl beside SurgViVQA's own files; keep one of the two" in words


def test_plain_lines_give_the_same_tokens_as_published_ones(video_folder, data, tmp_path):
    """Paths instead of names, another file name: the same tokens."""
    shutil.copytree(video_folder / "data/frames", tmp_path / "frames")
    for split, name in PUBLISHED.items():
        rows = read_lines(video_folder / f"data/{name}_multivideo.jsonl")
        lines = [
            {
                "id": f"{row['video_id']}/{row['id']}",
                "frames": [f"frames/{row['video_id']}/{frame}.jpg" for frame in row["frames"]],
                "audio": f"{name}_{row['id']}.wav",
                "group": row["video_id"],
                **{key: row[key] for key in ("question", "question_type", "answer", "short_answer")},
            }
            for row in rows
        ]
        for row in rows:
            shutil.copy(video_folder / f"data/audio/{name}/{row['id']}.wav", tmp_path / f"{name}_{row['id']}.wav")
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples, problems = script.read_examples(tmp_path, data.args)
    assert problems == []
    task = copy(data.task)
    task.measured = {name: task.measure(tmp_path, name)[0] for example in examples for name in example.media}
    trees, faults = build_trees([example for example in examples if example.split == "train"], task)
    assert faults == {}
    expected = [(tree.ids, tree.prefix, tree.branches) for tree in data.trees]
    assert [(tree.ids, tree.prefix, tree.branches) for tree in trees] == expected


# --- real annotations ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """SurgViVQA's own annotations, each frame a tiny picture of its own."""
    if not REAL.is_dir():
        pytest.skip("the published annotations are not here")
    folder = tmp_path_factory.mktemp("published")
    draw = random.Random(0)
    for name in PUBLISHED.values():
        shutil.copy(REAL / f"{name}_multivideo.jsonl", folder)
        for row in read_lines(folder / f"{name}_multivideo.jsonl"):
            for frame in row["frames"]:
                path = folder / f"frames/{row['video_id']}/{frame}.png"
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.frombytes("RGB", (4, 4), draw.randbytes(48)).save(path)
    return folder


def test_the_split_check_counts_what_the_published_splits_share(video_folder, published, tmp_path, capsys):
    """869 of 3,070 frames of eval are in train, too; so is every video of eval. The test split is clean."""
    argv = ["--model", str(video_folder / "model"), "--data", str(published), "--out", str(tmp_path), "--check"]
    with pytest.raises(SystemExit, match="--skip-bad would leave out all of val"):
        script.main([*argv, "--skip-bad", "100%"])
    text = capsys.readouterr().out
    shared = "869 of 3070 frames of val are in earlier splits too, in 169 of 398 questions, 45 of which show nothing"
    assert shared in text
    assert re.search(r"group 002-00. of val is also in train", text)
    report = json.loads((tmp_path / "check.json").read_text())
    assert [report["splits"][split]["questions"] for split in ("train", "val", "test")] == [2302, 0, 1000]
    assert sum(where.startswith("eval_multivideo.jsonl:") for where in report["skipped"]) == 398
    val, test = (report["shared_with_earlier_splits"][split] for split in ("val", "test"))
    assert (val["shared"], val["shown"], val["questions_touched"], val["questions_contained"]) == (869, 3070, 169, 45)
    assert (test["shared"], test["shown"], test["questions"], test["questions_touched"]) == (0, 6685, 1000, 0)


def test_the_blind_majority_of_the_published_test_is_57_3_percent(published):
    args = SimpleNamespace(
        question="text", target="answer", only_ids=None, limit=None, frames=8, eval_frames=6, media_root=published
    )
    for target in ("answer", "short_answer"):
        examples, problems = script.read_examples(published, SimpleNamespace(**{**vars(args), "target": target}))
        assert problems == []
        train, test = ([example for example in examples if example.split == split] for split in ("train", "test"))
        answers = blind_answers(train, test)
        right = [scoring.score(blind["type"], example)["exact"] for blind, example in zip(answers, test, strict=True)]
        assert (len(right), sum(right)) == (1000, 573)


def test_ids_are_given_twice_in_a_split_but_not_in_a_video(published, tmp_path, monkeypatch):
    """So recordings kept by video are each of one question, and by split 474 + 18 are of two."""
    monkeypatch.setattr(data_check, "file_sha256", lambda data, name: name)  # frames are not there
    args = SimpleNamespace(
        question="audio", target="answer", only_ids=None, limit=None, frames=8, eval_frames=6, media_root=str(tmp_path)
    )
    for place, shared in [("out_{video_id}", 0), ("{split}", 474 + 18)]:
        shutil.rmtree(tmp_path / "audio", ignore_errors=True)
        for split in PUBLISHED.values():
            for row in read_lines(published / f"{split}_multivideo.jsonl"):
                path = tmp_path / "audio" / place.format(**row, split=split) / f"{row['id']}.mp3"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        examples, problems = script.read_examples(published, args)
        assert len(examples) == 3700 and problems == []
        assert all((tmp_path / example.audio[0]).is_file() for example in examples)
        seen = data_check.open_media(published, examples, lambda data, name: (None, name))
        problems, *_ = data_check.check_media(examples, seen)
        assert sum("is also the recording of another question" in problem.text for problem in problems) == shared


# --- where files lie ---------------------------------------------------------------------------------------------


def read(folder, question="audio"):
    args = SimpleNamespace(
        question=question, target="answer", only_ids=None, limit=None, frames=8, eval_frames=6, media_root=folder
    )
    return script.read_examples(folder, args)


def write(folder, *names, content=b"") -> None:
    """Questions about two videos that share their ID, in each of the files, or other files with a content."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"id": "qa_1", "video_id": video, "frames": [f"{video}_{i}" for i in (8, 16)], "frame_numbers": [8, 16]}
            | {"question": "Is it on?", "answer": "Yes.", "short_answer": "yes", "support_frames": 8}
            for video in ("002-001", "002-002")
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_bytes(text.encode() if name.endswith(".jsonl") else content)


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("train_multivideo.jsonl", "audio/out_{}/qa_1.mp3"),
        ("train_002001_stratified.jsonl", "audio/out_{}/qa_1.mp3"),
        ("out_template.jsonl", "audio/out_{}/qa_1.mp3"),
        ("in_template.jsonl", "audio/in_{}/qa_1.mp3"),
        ("in_002-001.jsonl", "audio/in_{}/qa_1.MP3"),
        ("in_template.jsonl", "audio/in_template/qa_1.mp3"),
        ("train_multivideo.jsonl", "audio/{}/qa_1.flac"),
        ("train_multivideo.jsonl", "audio/train/qa_1.wav"),
        ("eval_multivideo.jsonl", "audio/eval_multivideo/qa_1.wav"),
        ("test_multivideo.jsonl", "audio/qa_1.ogg"),
    ],
)
def test_recordings_are_found_wherever_they_are_kept(tmp_path, file, place):
    write(tmp_path, file, *(place.format(video) for video in ("002-001", "002-002")))
    other = "out" if file.startswith("in_") else "in"  # the same questions in other words
    write(tmp_path, f"audio/{other}_002-001/qa_1.mp3", f"audio/{other}_002-002/qa_1.mp3", content=b"other")
    examples, problems = read(tmp_path)
    assert problems == []
    assert [example.audio for example in examples] == [[place.format("002-001")], [place.format("002-002")]]
    assert [example.id for example in examples] == ["002-001/qa_1", "002-002/qa_1"]


def test_a_recording_that_is_missing_is_named_where_the_others_lie(tmp_path):
    write(tmp_path, "train_multivideo.jsonl")
    assert [example.audio for example in read(tmp_path)[0]] == [[f"audio/out_002-00{i}/qa_1.wav"] for i in (1, 2)]
    write(tmp_path, "audio/train/qa_2.wav", "audio/out_002-001/qa_2.wav")
    places = [["audio/out_002-001/qa_1.wav"], ["audio/train/qa_1.wav"]]
    assert [example.audio for example in read(tmp_path)[0]] == places


def test_recordings_of_a_video_s_own_folder_go_before_all_others(tmp_path):
    """Where files are named by IDs alone, which several videos have, they may be another question's."""
    write(tmp_path, "train_multivideo.jsonl", "audio/train/qa_1.wav", "audio/qa_1.wav", "audio/out_002-001/qa_1.mp3")
    assert [example.audio[0] for example in read(tmp_path)[0]] == ["audio/out_002-001/qa_1.mp3", "audio/train/qa_1.wav"]
    write(tmp_path, "audio/out_002-001/qa_1.wav")  # converted
    assert read(tmp_path)[0][0].audio == ["audio/out_002-001/qa_1.wav"]


def test_frames_are_found_by_name_or_by_number(tmp_path):
    write(tmp_path, "train_multivideo.jsonl", "frames/002-001/002-001_8.jpg", "frames/002-001/16.jpg")
    (first, second), problems = read(tmp_path, question="text")
    assert problems == []
    assert first.media == ["frames/002-001/002-001_8.jpg", "frames/002-001/16.jpg"]
    assert second.media == ["frames/002-002/002-002_8.jpg", "frames/002-002/002-002_16.jpg"]  # reported as missing


def test_of_all_published_files_one_kind_is_read_and_the_others_are_named(tmp_path, capsys):
    kinds = [
        ["eval_multivideo.jsonl", "test_multivideo.jsonl", "train_multivideo.jsonl"],
        ["eval_002001_stratified.jsonl", "train_002001_stratified.jsonl"],
        ["out_template.jsonl", "in_template.jsonl"],
    ]
    write(tmp_path, *(name for kind in kinds for name in kind))
    examples, problems = read(tmp_path, question="text")
    assert problems == [] and [example.split for example in examples] == ["train"] * 2 + ["val"] * 2 + ["test"] * 2
    said = f"not read, beside {', '.join(kinds[0])}: {', '.join(kinds[1] + kinds[2])}\n"
    assert capsys.readouterr().out == said
    for name in kinds[0]:
        (tmp_path / name).unlink()
    examples, _ = read(tmp_path, question="text")
    assert [example.where.partition(":")[0] for example in examples] == [kinds[1][1]] * 2 + [kinds[1][0]] * 2
    for name in kinds[1]:
        (tmp_path / name).unlink()
    capsys.readouterr()
    examples, problems = read(tmp_path, question="text")
    assert problems == [] and {example.where.partition(":")[0] for example in examples} == {"out_template.jsonl"}
    assert capsys.readouterr().out == "not read, beside out_template.jsonl: in_template.jsonl\n"
