"""Both scripts that take clips, on parts of video files: the same run as on their frames as PNG; resume; leakage."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from encoded_videos import all_frames, encode, moving
from helpers import metrics_of, read_lines, refused, run, stop_in
from test_predict import predict

import train_surg_video_vqa as surg
import train_video_plain_lm as plain
from inputs.data_check import check_media, open_media
from report import leakage
from report.examples import read
from report.thumbnails import thumbnails
from runtime import EXIT_STOPPED

RATE, LENGTH = 8, 12  # frames a second; of a clip
SHARED = ["--questions-per-step", 3, "--max-answer-tokens", 4, "--epochs", 2, "--save-every", 2, "--lr", 1e-3]
SURG = [*SHARED, "--frames", 5, "--eval-frames", 3]
PLAIN = [*SHARED, "--fast-frames", 2, "--fast-grid", 1, "--slow-frames", 3, "--slow-grid", 2, "--from-scratch"]


def write(folder: Path, kind: str, script) -> None:
    """Two clips of each of five videos: as parts of an mp4, or as PNG files of what PyAV decodes of it."""
    rows = {"train": [], "val": [], "test": []}
    for number, split in enumerate(["train", "train", "train", "val", "test"]):
        path = folder.with_name("mp4") / f"data/videos/v{number}.mp4"  # x264 may write other bytes the next time
        if kind == "mp4":
            encode(path, moving(2 * LENGTH, 112, 88, seed=number), RATE, g=10, sound=3)
        shown = all_frames(path)[1]
        for clip in (0, 1):
            row = {"id": f"{split}{number}{clip}", "answer": "yes" if clip else "no", "group": f"v{number}"}
            row |= {"question": "Is it late?", "question_type": "yes_no"}
            start = clip * LENGTH
            part = {"video": f"videos/v{number}.mp4", "start": start / RATE, "end": (start + LENGTH) / RATE}
            if kind == "png":
                names = [f"frames/v{number}_{clip}/{i}.png" for i in range(start, start + LENGTH)]
                for name, frame in zip(names, shown[start:], strict=False):
                    (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
                    frame.save(folder / "data" / name)
                part = {"frames": names} if script is surg else {"video": f"frames/v{number}_{clip}"}
            rows[split].append(row | part)
    for split, found in rows.items():
        (folder / f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture(scope="module", params=["surg_video_vqa", "video_plain_lm"])
def both(request, tmp_path_factory):
    """A script, its flags, and two folders with the same clips: `mp4` and `png`."""
    script, demo, flags = {
        "surg_video_vqa": (surg, "video_folder", SURG),
        "video_plain_lm": (plain, "plain_folder", PLAIN),
    }[request.param]
    demo, folder = request.getfixturevalue(demo), tmp_path_factory.mktemp("clips")
    for kind in ("mp4", "png"):
        write(folder / kind, kind, script)
        (folder / kind / "model").symlink_to(demo / "model")
    flags = [*flags, *(["--vision-model", demo / "vision"] if script is plain else [])]
    return SimpleNamespace(script=script, flags=flags, mp4=folder / "mp4", png=folder / "png")


@pytest.fixture(scope="module")
def trained(both, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run(both.mp4, out, *both.flags, "--workers", 2, script=both.script)
    return out


def test_it_is_the_run_of_the_same_frames_as_files(both, trained, tmp_path):
    run(both.png, tmp_path, *both.flags, script=both.script)
    assert metrics_of(trained) == metrics_of(tmp_path)
    ours, theirs = (read_lines(out / "predictions.jsonl") for out in (trained, tmp_path))
    assert len(ours) == 2 and ours[0]["media"][0] == "videos/v4.mp4#t=0.000"
    for record in (*ours, *theirs):
        del record["media"]
    assert ours == theirs
    check = json.loads((trained / "check.json").read_text())
    assert check["passed"] and check["leakage"]["counts"]["not looked at"] == 0 and check["notices"] == []


def test_stopped_and_resumed_it_is_the_same_run_and_another_file_is_refused(both, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in(patch, 3, both.script)
        with pytest.raises(SystemExit) as stopped:
            run(both.mp4, tmp_path, *both.flags, "--workers", 2, script=both.script)
    assert stopped.value.code == EXIT_STOPPED
    path = both.mp4 / "data/videos/v0.mp4"
    before = path.read_bytes()
    path.write_bytes(before + bytes(8))  # plays the same
    text = refused(both.mp4, tmp_path, *both.flags, script=both.script)
    path.write_bytes(before)
    assert "media" in text
    run(both.mp4, tmp_path, *both.flags, "--workers", 1, script=both.script)
    assert metrics_of(tmp_path) == metrics_of(trained)
    assert read_lines(tmp_path / "predictions.jsonl") == read_lines(trained / "predictions.jsonl")


def test_augmented_blind_and_without_answers_it_is_as_with_files(both, tmp_path, monkeypatch, capfd):
    found = {}
    for kind in ("mp4", "png"):
        folder, out = getattr(both, kind), tmp_path / kind
        run(folder, out, *both.flags, "--augment", "--max-steps", 2, script=both.script)
        run(folder, out, *both.flags, "--eval-only", "--eval-split", "train", "--blind", "shuffled", script=both.script)
        blind = [record["prediction"] for record in read_lines(out / "blind/shuffled/predictions.jsonl")]
        asked = [row | {"answer": None} for row in read_lines(folder / "data/test.jsonl")]
        use = {"script": both.script, "monkeypatch": monkeypatch, "capfd": capfd}
        answers = predict(folder, asked, *both.flags, "--out", out, **use)
        found[kind] = metrics_of(out), blind, [line["prediction"] for line in answers]
    assert found["mp4"] == found["png"]


def test_parts_of_one_file_and_frames_that_are_shown_twice_may_not_be_in_two_splits(both, tmp_path):
    rows = read_lines(both.mp4 / "data/train.jsonl")[:2]
    for row, patient in zip(rows, ("v0", "another"), strict=True):  # another part of the same file
        row["patient_id"] = patient
        del row["group"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/videos").symlink_to(both.mp4 / "data/videos")
    (tmp_path / "model").symlink_to(both.mp4 / "model")
    for split, row in zip(("train", "test"), rows, strict=True):
        (tmp_path / f"data/{split}.jsonl").write_text(json.dumps(row) + "\n")
    args = both.script.parse_arguments(
        ["--model", "m", "--data", str(tmp_path / "data"), "--out", "o", *map(str, both.flags)]
    )
    examples, problems = both.script.read_examples(tmp_path / "data", args)
    assert problems == [] and [example.groups for example in examples] == [
        ["v0", "videos/v0.mp4"],
        ["another", "videos/v0.mp4"],
    ]
    measure = (surg.SurgTask if both.script is surg else plain.VideoTask).measure
    found = check_media(examples, open_media(tmp_path / "data", examples, partial(measure, None)))
    text = "video file videos/v0.mp4 of test is also in train (train.jsonl:1); keep it in one split"
    assert str(found[0][0]).endswith(f": {text}")
    findings = leakage.check(tmp_path / "data", examples, found[2])["findings"]
    assert "video file videos/v0.mp4 of test is also in train (train.jsonl:1)" in [each["text"] for each in findings]
    assert "same content" not in [each["kind"] for each in findings]
    examples[1].media = [examples[0].media[0]]
    found = check_media(examples, open_media(tmp_path / "data", examples, partial(measure, None)))
    assert "file videos/v0.mp4#t=0.000 of test is also in train" in str(found[0][0])
    examples, problems = read(tmp_path / "data")  # without a script
    assert problems == [] and examples[1].media[0].startswith("videos/v0.mp4#t=1.500")
    counts = leakage.check(tmp_path / "data", examples)["counts"]
    assert counts["not looked at"] == 0 and counts["shared group"] == 1


def test_the_page_shows_frames_of_a_video_file_as_a_strip(both, trained, tmp_path):
    records = read_lines(trained / "predictions.jsonl")
    media, _, faults = thumbnails(both.mp4 / "data", records, 10**6)
    assert [found["kind"] for found in media] == ["strip", "strip"] and faults == []


def test_features_of_two_parts_of_one_file_are_kept_apart(both, trained, tmp_path):
    if both.script is not plain:
        pytest.skip("its tower is trained")
    for out in ("first", "second"):
        run(both.mp4, tmp_path / out, *both.flags, "--cache-features", tmp_path / "cache", script=plain)
        assert metrics_of(tmp_path / out) == metrics_of(trained)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 10


def test_what_is_wrong_with_a_part_is_said_with_its_line(both, tmp_path):
    rows = read_lines(both.mp4 / "data/train.jsonl")
    rows[0]["end"], rows[1]["start"] = 7, "late"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/videos").symlink_to(both.mp4 / "data/videos")
    (tmp_path / "model").symlink_to(both.mp4 / "model")
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert refused(tmp_path, tmp_path / "out", *both.flags, "--check", script=both.script).startswith("2 faults")
    failures = json.loads((tmp_path / "out/check.json").read_text())["failures"]
    text = "train.jsonl:1 (id train00): videos/v0.mp4 lasts 3.000 s, and start 0, end 7 must lie within; correct it"
    assert failures[0] == text and "train.jsonl:2 (id train01): start and end must be seconds" in failures[1]
