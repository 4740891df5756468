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

import common
import train_surg_video_vqa as script
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
    task.measured = {name: task.measure(tmp_path, name) for example in examples for name in example.media}
    trees, faults = common.build_trees([example for example in examples if example.split == "train"], task)
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
        script.main([*argv, "--skip-bad"])
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
    args = SimpleNamespace(question="text", target="answer", only_ids=None, limit=None)
    for target in ("answer", "short_answer"):
        examples, problems = script.read_examples(published, SimpleNamespace(**{**vars(args), "target": target}))
        assert problems == []
        train, test = ([example for example in examples if example.split == split] for split in ("train", "test"))
        training = [(e.question_type, e.question, [e.answer, *e.also_right]) for e in train]
        answers = blind_answers(training, [(example.question_type, example.question) for example in test])
        right = [scoring.score(blind["type"], example)["exact"] for blind, example in zip(answers, test, strict=True)]
        assert (len(right), sum(right)) == (1000, 573)


def test_published_recordings_that_two_questions_share_are_all_found(published):
    args = SimpleNamespace(question="audio", target="answer", only_ids=None, limit=None)
    _, problems = script.read_examples(published, args)
    assert sum("is also the recording of another question" in problem.text for problem in problems) == 474 + 18
