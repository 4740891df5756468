"""Files as they really come: encodings, cut and odd JSON, pipes, links, and names written elsewhere."""

import errno
import importlib
import json
import os
import shutil
import signal
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers import read_lines, refused, run, stop_in
from PIL import Image

import train_llava_med
from inputs import files, layouts, videos, volumes
from inputs.task import Problem
from report import __main__ as report_main

ROW = {"image": "images/a.png", "question": "Which color is the é?", "answer": "rosé"}


@pytest.fixture
def folder(demo_folder, tmp_path):
    """The demo's model, and six pictures with a question each."""
    (tmp_path / "model").symlink_to(demo_folder / "model")
    (tmp_path / "data/images").mkdir(parents=True)
    rows = []
    for i in range(6):
        Image.frombytes("RGB", (8, 8), np.random.default_rng(i).bytes(192)).save(tmp_path / f"data/images/{i}.png")
        rows.append({"id": f"r{i}", "image": f"images/{i}.png", "question": "Is it red?", "answer": "no"})
    write_rows(tmp_path / "data/train.jsonl", rows[:4])
    write_rows(tmp_path / "data/test.jsonl", rows[4:])
    return tmp_path


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(data: Path, kind: str, change=lambda content: content) -> Path:
    """A data folder whose file of this kind holds ROW; its bytes go through `change`."""
    names = {
        "jsonl": ("train.jsonl", json.dumps(ROW, ensure_ascii=False) + "\n"),
        "json": ("train.json", json.dumps([ROW], ensure_ascii=False)),
        "csv": ("train.csv", ",".join(ROW) + "\n" + ",".join(ROW.values()) + "\n"),
        "endovis": ("seq_2/vqa/Classification/frame000_QA.txt", "|".join([ROW["question"], ROW["answer"]]) + "\n"),
        "umbrella": ("train/a.json", json.dumps({**ROW, "volume": "a.npy", "modality": "T1", "group": "s"})),
    }
    path, content = data / names[kind][0], names[kind][1].encode()
    path.parent.mkdir(parents=True)
    if kind == "umbrella":
        content = content.decode("unicode_escape").encode()
    path.write_bytes(change(content))
    return path


def entries(data: Path) -> tuple[list[dict], list[Problem]]:
    """What a folder holds, of one sequence alone if it is EndoVis-18-VQA."""
    found = [entry for where, _, entry in layouts.entries(data, data, "paper") if where.startswith(("train", "seq_2/"))]
    return [e for e in found if not isinstance(e, Problem)], [e for e in found if isinstance(e, Problem)]


# ------------------------------------------------------------------------------------------------------------
# Texts
# ------------------------------------------------------------------------------------------------------------

KINDS = ["jsonl", "json", "csv", "endovis", "umbrella"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_order_mark_is_dropped_by_every_reader(tmp_path, kind):
    write(tmp_path / "data", kind, lambda content: b"\xef\xbb\xbf" + content)
    (entry,), problems = entries(tmp_path / "data")
    assert problems == [] and entry["question"] == ROW["question"] and entry["answer"] == ROW["answer"]
    assert not any("\ufeff" in name for name in entry)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-8 cut off", "NUL"])
def test_another_encoding_is_a_fault_with_byte_and_remedy(tmp_path, kind, encoding):
    def change(content):
        if encoding == "NUL":
            return content[:10] + bytes(30) + content[10:]
        if encoding == "utf-8 cut off":
            return content[: content.rindex("é".encode()) + 1]
        return content.decode().encode(encoding)

    path = write(tmp_path / "data", kind, change)
    found, (problem,) = entries(tmp_path / "data")
    convert = "in line 1); convert it from the encoding it has, as iconv -f"
    due = {
        "latin-1": f"not UTF-8 (byte {path.read_bytes().find(0xE9)}, ",
        "utf-16": f"not UTF-8 (byte 0, {convert} UTF-16 -t UTF-8 does",
        "utf-16-le": "not UTF-8 ",
        "utf-8 cut off": "the file ends within a character: cut off; copy it again",
        "NUL": "not UTF-8 but a NUL (byte 10); copy it again",
    }
    assert found == [] and problem.text.startswith(due[encoding]) and problem.where in str(path)
    assert problem.fatal is (kind != "umbrella"), "of UMBRELLA's conversations each has a file of its own"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"answer": "\\ud800"}', "half a character"),
        ('{"answer": ["\\uDC01 b"]}', "half a character"),
        ('{"answer": "yes", "answer": "no"}', "the field 'answer' twice, with different values"),
        ('{"metadata": {"label": "yes", "label": "no"}}', "the field 'label' twice, with different values"),
        ('{"answer": ' + "[" * 100_000, "nested too deeply"),
        ('{"answer": ' + "[" * 600 + "]" * 600 + "}", "recursion"),
        ('{"answer": ' + "7" * 5000 + "}", "not a JSON object"),
        ('{"conversations": 5}', "conversations must be a list of turns: 5"),
        ('{"messages": "hello"}', "messages must be a list of turns: 'hello'"),
        ("7", "not a JSON object"),
    ],
)
def test_odd_json_is_a_fault_of_its_line_alone(tmp_path, text, words):
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(ROW)}\n{text}\n{json.dumps(ROW)}\n")
    found, (problem,) = entries(tmp_path)
    assert len(found) == 2 and problem.where == "train.jsonl:2" and words in problem.text and not problem.fatal


def test_what_json_says_in_other_words_is_read(tmp_path):
    """A pair of surrogates is one character; a field twice with one value is one; NaN is how pandas writes nothing."""
    text = '{"image": "a.png", "answer": "\\ud83d\\ude00", "question": "a", "question": "a", '
    text += '"metadata": {"age": NaN, "dose": 1e999}}'
    (tmp_path / "train.jsonl").write_text(f"{text}\r\n\ufeff{text}\r\n", encoding="utf-8")  # and of two files joined
    found, problems = entries(tmp_path)
    assert problems == [] and len(found) == 2
    assert all(e["answer"] == "\U0001f600" and e["metadata"] == {"age": None, "dose": None} for e in found)


def denied(*_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize("kind", ["pipe", "folder", "dead link", "not ours to read", "name of other bytes"])
def test_what_is_no_readable_file_is_a_fault_and_nothing_hangs(tmp_path, monkeypatch, kind):
    path = tmp_path / ("a\udce9.jsonl" if kind == "name of other bytes" else "train.jsonl")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dead link":
        path.symlink_to("nowhere.jsonl")
    else:
        write_rows(path, [ROW])
    if kind == "not ours to read":  # root may read whatever the mode
        monkeypatch.setattr(Path, "read_text", denied)
    signal.alarm(20)  # a reader that waits for the pipe's other end is killed
    ((_, _, problem),) = layouts.files(tmp_path, tmp_path, None)
    signal.alarm(0)
    words = {"not ours to read": "it cannot be read (Permission denied); make it readable"}
    words |= {"name of other bytes": "the name of the file is not UTF-8; rename it"}
    assert words.get(kind, "it is a folder, a pipe, or a link that leads nowhere") in problem.text and problem.fatal
    str(problem).encode()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("test.jsonl", lambda text: text.encode("utf-16"), "test.jsonl: not UTF-8 (byte 0"),
        ("test.jsonl", lambda text: text.encode()[:-20], "test.jsonl:2: the file ends within this line: cut off"),
        ("test.jsonl", lambda text: b"", "test.jsonl: the file holds no examples"),
        ("test.json", lambda text: b"[" + text.encode()[:60], "test.json: not JSON ("),
        ("test.json", lambda text: b"[]", "test.json: not a JSON list of examples"),
    ],
)
def test_a_file_that_cannot_be_read_ends_the_run_also_with_skip_bad(folder, name, change, words):
    path = folder / "data/test.jsonl"
    content = change(path.read_text())
    path.unlink()
    (folder / "data" / name).write_bytes(content)
    text = refused(folder, folder / "run", "--check", "--skip-bad", "100%")
    assert text.startswith("1 faults, listed in ") and "--skip-bad" not in text
    report = json.loads((folder / "run/check.json").read_text())
    assert report["skipped"] == [] and [fault.startswith(words) for fault in report["failures"]] == [True]


# ------------------------------------------------------------------------------------------------------------
# Links and names
# ------------------------------------------------------------------------------------------------------------


def test_links_are_followed_wherever_they_lead(folder, capsys):
    """A hub's cache is made of links to ../../blobs/HASH, a folder on scratch of links to elsewhere."""
    run(folder, folder / "run", "--check")
    (folder / "blobs").mkdir()
    for number, path in enumerate(sorted((folder / "data").rglob("*.*"))):
        path.rename(folder / f"blobs/{number}")
        path.symlink_to(os.path.relpath(folder / f"blobs/{number}", path.parent))
    run(folder, folder / "linked", "--check")
    (folder / "elsewhere").mkdir()
    (folder / "data/images").rename(folder / "elsewhere/images")
    (folder / "data/images").symlink_to(folder / "elsewhere/images")
    (folder / "elsewhere/blobs").symlink_to(folder / "blobs")
    for path in (folder / "elsewhere/images").iterdir():
        target = path.readlink().name
        path.unlink()
        path.symlink_to(folder / "blobs" / target)
    run(folder, folder / "scratch", "--check")
    one, *others = (json.loads((folder / out / "check.json").read_text()) for out in ("run", "linked", "scratch"))
    assert others == [one, one]


def test_a_file_behind_a_link_is_of_the_kind_that_its_own_name_says(tmp_path):
    (tmp_path / "blobs").mkdir()
    np.save(tmp_path / "blobs/v.npy", np.arange(27, dtype=np.float32).reshape(3, 3, 3))
    np.save(tmp_path / "blobs/f.npy", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "data").mkdir()
    for name in ("v.npy", "f.npy"):
        (tmp_path / "blobs" / name).rename(tmp_path / "blobs" / name[0])
        (tmp_path / "data" / name).symlink_to(f"../blobs/{name[0]}")
    assert volumes.read_file(tmp_path / "data", "v.npy").shape == (3, 3, 3)
    assert len(list(videos.read_frames(tmp_path / "data", "f.npy"))) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../outside.png", "../outside.png leads outside the data folder; link the file into it, or name its folder"),
        ("images/../images/a.png", "leads outside the data folder"),
        ("/etc/hostname", "/etc/hostname leads outside the data folder"),
        ("images/gone.png", "images/gone.png is missing; restore the file or leave the example out (--skip-bad)"),
        ("images/dead.png", "images/dead.png is missing; it is a link that leads nowhere, so restore what it leads to"),
        ("images/a.PNG", "images/a.PNG is missing; there is images/a.png (names are case-sensitive); correct"),
        ("Images/A.png", "there is images/a.png (names are case-sensitive"),
        ("images\\a.png", "there is images/a.png (folders end with /); correct the name"),
        ("images/" + unicodedata.normalize("NFD", "é.png"), "there is images/é.png (its accents are encoded other"),
        ("images/a.png/b.png", "is missing; restore"),
        ("images", "images cannot be opened: it is a folder or a device"),
        ("images/pipe.png", "images/pipe.png cannot be opened: it is a folder or a device"),
        ("images/loop.png", "images/loop.png cannot be opened: "),
        ("x" * 300, "cannot be opened: File name too long; correct the name"),
        ("a\0b.png", "cannot be opened: embedded null byte"),
        ("a\udce9.png", "its name is not UTF-8; rename the file"),
    ],
)
def test_a_name_that_is_no_file_of_the_folder_is_refused_with_a_hint(tmp_path, name, words):
    folder = tmp_path / "data/images"
    folder.mkdir(parents=True)
    for path in (tmp_path / "outside.png", folder / "a.png", folder / "é.png", tmp_path / "data/a\udce9.png"):
        path.write_bytes(b"")
    (folder / "dead.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(ValueError) as caught:
        files.inside(tmp_path / "data", name)
    assert words in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert files.inside(tmp_path / "data", "images/a.png") == folder / "a.png"


def test_a_name_of_other_bytes_is_a_fault_of_its_example_before_anything_is_trained(plain_folder, tmp_path):
    """Names of a folder's frames are not in the JSON: predictions.jsonl could not be written."""
    script, vision = importlib.import_module("train_video_plain_lm"), ["--vision-model", plain_folder / "vision"]
    (tmp_path / "model").symlink_to(plain_folder / "model")
    shutil.copytree(plain_folder / "data", tmp_path / "data")
    clip = tmp_path / "data/clip"
    clip.mkdir()
    for name in ("a\udce9.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
        shutil.copy(tmp_path / "picture.png", clip / name)
    rows = json.loads((tmp_path / "data/train.json").read_text())
    rows.append({"id": "odd", "video": "clip", "answer": "A clip."})
    (tmp_path / "data/train.json").write_text(json.dumps(rows))
    assert "1 faults" in refused(tmp_path, tmp_path / "run", "--check", *vision, script=script)
    (fault,) = json.loads((tmp_path / "run/check.json").read_text())["failures"]
    assert "clip/a\\udce9.png cannot be opened: its name is not UTF-8; rename the file" in fault


# ------------------------------------------------------------------------------------------------------------
# --media-root
# ------------------------------------------------------------------------------------------------------------

SCRIPTS = {
    "train_llava_med": ("demo_folder", []),
    "train_qwen2vl_sentinel": ("qwen_folder", []),
    "train_surg_video_vqa": ("video_folder", []),
    "train_umbrella_mri": (
        "mri_folder",
        ["--modality", "T1:32x32x32:8x8x8", "--modality", "rsfMRI:24x24x24x4:8x8x8x2"],
    ),
    "train_video_plain_lm": ("plain_folder", []),
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("absolute", [False, True])
def test_media_are_found_in_another_folder_also_by_absolute_names(request, tmp_path, name, absolute):
    """The examples are the same but for nothing: names stay relative."""
    fixture, flags = SCRIPTS[name]
    script, data = importlib.import_module(name), request.getfixturevalue(fixture) / "data"
    parse = ["--model", "m", "--out", "o", *flags]
    due = script.read_examples(data, script.parse_arguments([*parse, "--data", str(data)]))
    for path in [*data.glob("*.json*"), *data.glob("*/*.json")]:
        text = path.read_text()
        for place in ("images", "volumes", "videos", "frames", "audio") if absolute else ():
            text = text.replace(f'"{place}/', f'"{data}/{place}/')
        copy = tmp_path / path.relative_to(data)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text)
    args = script.parse_arguments([*parse, "--data", str(tmp_path), "--media-root", f"{data}/../data"])
    assert script.read_examples(tmp_path, args) == due
    assert due[1] == [] and not any(Path(file).is_absolute() for example in due[0] for file in example.media)


def test_a_run_with_a_media_root_resumes_and_reports_after_the_folders_have_moved(folder, monkeypatch, capsys):
    (folder / "media").mkdir()
    (folder / "data/images").rename(folder / "media/images")
    flags = ["--questions-per-step", 2, "--save-every", 1, "--epochs", 2]
    rows = read_lines(folder / "data/train.jsonl")
    write_rows(folder / "data/train.jsonl", [{**r, "image": f"{folder}/media/{r['image']}"} for r in rows])
    with monkeypatch.context() as patch:
        stop_in(patch, 2)
        with pytest.raises(SystemExit):
            run(folder, folder / "run", *flags, "--media-root", folder / "media")
    write_rows(folder / "data/train.jsonl", rows)
    (folder / "data").rename(folder / "notes")
    (folder / "media").rename(folder / "moved")
    moved = ["--data", folder / "notes", "--media-root", folder / "moved"]
    run(folder, folder / "run", *flags, *moved, "--report")
    assert "steps of at most 2 questions, from step 2" in capsys.readouterr().out
    assert {row["media"][0] for row in read_lines(folder / "run/predictions.jsonl")} == {"images/4.png", "images/5.png"}
    assert json.loads((folder / "run/results.json").read_text())["media_root"] == str(folder / "moved")
    page = folder / "run/report/report.html"
    assert page.read_text().count("data:image/jpeg") == 2
    (folder / "moved").rename(folder / "again")
    report_main.main([str(folder / "run"), "--media-root", str(folder / "again")])
    assert page.read_text().count("data:image/jpeg") == 2


def test_absolute_names_elsewhere_are_refused_and_so_is_a_media_root_that_is_none(folder, capsys):
    rows = read_lines(folder / "data/train.jsonl")
    write_rows(folder / "data/train.jsonl", [{**rows[0], "image": f"{folder}/data/images/0.png"}, *rows[1:]])
    run(folder, folder / "run", "--check")  # in the data folder itself
    (folder / "media").mkdir()
    refused(folder, folder / "run", "--check", "--media-root", folder / "media")
    first, *others = json.loads((folder / "run/check.json").read_text())["failures"]
    assert f"{folder}/data/images/0.png leads outside the data folder" in first and len(others) == 5
    with pytest.raises(SystemExit):
        train_llava_med.parse_arguments(["--model", "m", "--data", "d", "--out", "o", "--media-root", "nowhere"])
    assert "--media-root nowhere: no such folder" in capsys.readouterr().err


def test_the_leakage_check_alone_finds_media_elsewhere(folder, capsys):
    (folder / "media").mkdir()
    (folder / "data/images").rename(folder / "media/images")
    shutil.copy(folder / "media/images/0.png", folder / "media/images/5.png")
    with pytest.raises(SystemExit) as caught:
        report_main.main(["--data", str(folder / "data"), "--media-root", str(folder / "media")])
    assert caught.value.code == 1 and "1 same content, 1 same question" in capsys.readouterr().out
