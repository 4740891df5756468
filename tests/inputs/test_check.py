"""Faults of data and model are found before any weights are read, named by file and row, and listed all at once."""

import json
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import read_lines, refused, run
from PIL import Image
from transformers import LlavaForConditionalGeneration

import train_llava_med
from inputs import check_cache, data_check, images, show, texts
from inputs.task import Problem
from report import leakage

IMAGES = {"train": 3, "val": 2, "test": 2}
CHECK = ["--check", "--pack-tokens", 200]  # examples have up to 110 tokens


@pytest.fixture
def folder(demo_folder, tmp_path):
    """The model without weights, and the first images of the data with all their questions."""
    shutil.copytree(demo_folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for split, number in IMAGES.items():
        rows = read_lines(demo_folder / "data" / f"{split}.jsonl")
        names = list(dict.fromkeys(row["image"] for row in rows))[:number]
        write_rows(data, split, [row for row in rows if row["image"] in names])
        for name in names:
            shutil.copy(demo_folder / "data" / name, data / name)
    return tmp_path


def write_rows(data: Path, split: str, rows: list) -> None:
    """Rows are objects, or lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (data / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def listed(text: str) -> list[str]:
    """What was printed of each cause, without the number of faults that share it."""
    return [line.partition(": ")[2] for line in text.split("\n") if re.match(r"fault( \(.*\))?: ", line)]


def failures(folder: Path) -> list[str]:
    """All faults, as check.json lists them."""
    return json.loads((folder / "run" / "check.json").read_text())["failures"]


def change_config(folder: Path, name: str, **values) -> None:
    path = folder / "model" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ------------------------------------------------------------------------------------------------------------
# Rows. Each plants its fault in one row of a split, in place or by returning another line
# ------------------------------------------------------------------------------------------------------------


def change(**values):
    def plant(data, row):
        row.update(values)

    return plant


def misspell(data, row):
    row["anwser"] = row.pop("answer")


def with_image(name, write):
    def plant(data, row):
        write(data / name)
        row["image"] = name

    return plant


def truncated(path):
    whole = next(iter(sorted(path.parent.glob("0*.jpg")))).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def animated(path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def outside_file(data):
    Image.new("RGB", (8, 8)).save(data.parent / "outside.png")
    return data.parent / "outside.png"


def shared_image(data, row):
    row["image"] = json.loads((data / "train.jsonl").read_text().split("\n")[0])["image"]


def shared_copy(data, row):
    train = json.loads((data / "train.jsonl").read_text().split("\n")[0])
    shutil.copy(data / train["image"], data / "images" / "renamed.jpg")
    row["image"] = "images/renamed.jpg"


def shared_group(data, row):
    row["group"] = json.loads((data / "train.jsonl").read_text().split("\n")[0])["group"]


def same_id(data, row):
    row["id"] = "demo_00000_q0"


def leave_absolute(data, row):
    row["image"] = str(outside_file(data))


def leave_upwards(data, row):
    row["image"] = f"../{outside_file(data).name}"


EMPTY = "the answer is empty"
TRAIN_FAULTS = {
    "empty answer": (change(answer=""), EMPTY),
    "blank answer": (change(answer="  "), EMPTY),
    "null answer": (change(answer=None), EMPTY),
    "nan answer": (change(answer="NaN"), EMPTY),
    "empty question": (change(question=" "), "the question is empty"),
    "placeholder in answer": (change(answer="a <image>"), "the text contains '<image>'"),
    "more marks than images": (change(question="Is <image> or <image> red?"), "2 <image> in what is asked, but 1"),
    "eos in question": (change(question="Is </s> red?"), "the text contains '</s>'"),
    "sentinel in answer": (change(answer="a</ANS>b", answer_candidates=None), "the text contains '</ANS>'"),
    "answer without a letter": (change(answer="-", answer_candidates=None), "the answer is empty ('-')"),
    "type that is no text": (change(question_type=["a"]), "question_type must be a text, not the list"),
    "type in other letters": (change(question_type="Yes/No"), "question_type 'Yes/No': spell it 'yes_no'"),
    "empty candidate": (change(answer="yes", answer_candidates=["yes", "no", ""]), "answer_candidates"),
    "candidates as text": (change(answer="no", answer_candidates="no"), "answer_candidates"),
    "candidate with eos": (change(answer="no", answer_candidates=["no", "</s>"]), "the text contains '</s>'"),
    "misspelt field": (misspell, "unknown field 'anwser'; did you mean 'answer'?"),
    "no image": (change(image=None), "no image; give one of image, image_path, image_file"),
    "missing image": (change(image="images/gone.jpg"), "images/gone.jpg is missing"),
    "truncated image": (with_image("images/cut.jpg", truncated), "images/cut.jpg cannot be read: "),
    "text as image": (
        with_image("images/text.jpg", lambda path: path.write_text("no image")),
        "images/text.jpg cannot be read: neither JPEG nor PNG",
    ),
    "gif as image": (
        with_image("images/gif.png", lambda path: Image.new("L", (8, 8)).save(path, format="GIF")),
        "images/gif.png cannot be read: neither JPEG nor PNG",
    ),
    "cmyk": (with_image("images/cmyk.jpg", lambda path: Image.new("CMYK", (8, 8)).save(path)), "colour mode CMYK"),
    "16 bit": (with_image("images/deep.png", lambda path: Image.new("I;16", (8, 8)).save(path)), "colour mode I;16"),
    "animated": (with_image("images/moving.png", animated), "images/moving.png cannot be read: 2 frames"),
    "too many pixels": (
        with_image("images/huge.png", lambda path: Image.new("1", (8000, 7000)).save(path)),
        "8000 x 7000 pixels, more than 50,000,000, or than 12,000 a side; scale it down",
    ),
    "path upwards": (leave_upwards, "../outside.png leads outside the data folder"),
    "absolute path": (leave_absolute, "outside.png leads outside the data folder"),
    "link to nothing": (
        with_image("images/link.png", lambda path: path.symlink_to("nothing.png")),
        "images/link.png is missing; it is a link that leads nowhere",
    ),
    "link to itself": (
        with_image("images/loop.png", lambda path: path.symlink_to(path)),
        "images/loop.png cannot be opened: ",
    ),
    "name too long": (change(image="images/" + "x" * 300 + ".png"), "cannot be opened: "),
    "no json": (lambda data, row: '{"id": 1, ', "not a JSON object"),
    "a list": (lambda data, row: "[1, 2]", "not a JSON object"),
    "too long": (change(question="red? " * 300), "of its media: more than --pack-tokens 200"),
    "duplicate ID": (same_id, "duplicate ID, first used at train.jsonl:1"),
}
TEST_FAULTS = {
    "image of train": (shared_image, "is also in train (train.jsonl:1)"),
    "copy of an image of train": (shared_copy, "file images/renamed.jpg of test shows the same as images/"),
    "group of train": (shared_group, "group patient_0000 of test is also in train (train.jsonl:1)"),
}


def plant(data: Path, names: list[str]) -> dict[str, tuple[str, str]]:
    """Plant faults from the second row on, each in its own; returns {where: (ID, text)}."""
    planted = {}
    for split, faults in (("train", TRAIN_FAULTS), ("test", TEST_FAULTS)):
        rows = read_lines(data / f"{split}.jsonl")
        for index, name in enumerate([n for n in names if n in faults], start=1):
            fault, text = faults[name]
            line = fault(data, rows[index])
            planted[f"{split}.jsonl:{index + 1}"] = (None if line else rows[index]["id"], text)
            rows[index] = line or rows[index]
        write_rows(data, split, rows)
    return planted


def assert_listed(lines: list[str], planted: dict) -> None:
    assert len(lines) == len(planted), lines
    for where, (name, text) in planted.items():
        start = f"{where} (id {name}): " if name else f"{where}: "
        assert [text in line for line in lines if line.startswith(start)] == [True], (start, text, lines)


@pytest.mark.parametrize("name", [*TRAIN_FAULTS, *TEST_FAULTS])
def test_a_fault_is_named_with_file_and_row(folder, capsys, name):
    planted = plant(folder / "data", [name])
    text = refused(folder, folder / "run", *CHECK)
    assert text.startswith(f"1 faults, listed in {folder / 'run' / 'check.json'}")
    assert_listed(failures(folder), planted)
    assert len(listed(capsys.readouterr().out)) == 1


def test_all_faults_are_listed_at_once(folder, capsys):
    names = [*TRAIN_FAULTS, *TEST_FAULTS]
    rows = read_lines(folder / "data" / "train.jsonl")
    more = [{**row, "id": f"more_{i}"} for i, row in enumerate(rows)]
    write_rows(folder / "data", "train", rows + more)
    planted = plant(folder / "data", names)
    text = refused(folder, folder / "run", *CHECK)
    assert text.startswith(f"{len(names)} faults, listed in ")
    report = json.loads((folder / "run" / "check.json").read_text())
    assert_listed(report["failures"], planted)
    assert (report["passed"], report["skipped"]) == (False, [])
    printed = listed(capsys.readouterr().out)
    assert len({line[:60] for line in printed}) == len(printed) < len(planted)
    assert all(any(fault.startswith(line.rstrip("…")[:150]) for fault in report["failures"]) for line in printed)


def test_one_cause_is_printed_once_with_its_count_and_three_examples(folder, capsys):
    """After everything else that is printed, in lines that fit on a screen; check.json has them all."""
    rows = read_lines(folder / "data" / "train.jsonl")
    more = [{**row, "id": f"more_{i}", "image": f"images/gone_{i}.jpg", "group": f"g{i}"} for i, row in enumerate(rows)]
    write_rows(folder / "data", "train", [*rows, *more, {**rows[0], "id": "last", "question": "red? " * 400}])
    refused(folder, folder / "run", *CHECK)
    *before, first, second = capsys.readouterr().out.strip().split("\n")
    n, start = len(more), len(rows) + 1
    wheres = f"train.jsonl:{start + 1} and train.jsonl:{start + 2}"
    assert first.startswith(f"fault ({n} such, also {wheres}): train.jsonl:{start} (id more_0): images/gone_0.jpg is ")
    assert second.startswith(f"fault: train.jsonl:{start + n} (id last): ")
    assert before[-1].startswith("leakage check: ") and not [line for line in before if line.startswith("fault")]
    assert max(map(len, (*before, first, second))) <= 200
    assert len(failures(folder)) == n + 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("images/a.jpg is missing", "b.png is missing", True),
        ("the answer is empty ('')", "the answer is empty ('nan')", True),
        ("812 tokens, more than 200", "5000 tokens, more than 200", True),
        ("the answer is empty ('')", "the question is empty", False),
    ],
)
def test_faults_that_differ_in_names_and_numbers_alone_have_one_cause(one, other, same):
    assert (show.cause(one) == show.cause(other)) is same


def test_a_message_of_several_lines_is_printed_in_one(capsys):
    show.print_faults([Problem("a.jsonl:1", "x", "first\nsecond" + "y" * 300)])
    assert capsys.readouterr().out.count("\n") == 1


def test_faults_of_model_and_rows_are_listed_together(folder, capsys):
    change_config(folder, "config.json", image_token_index=599, image_token_id=599)
    planted = plant(folder / "data", ["null answer", "missing image", "eos in question"])
    assert refused(folder, folder / "run", *CHECK).startswith("4 faults")
    first, *lines = failures(folder)
    assert first.startswith("config.json: ")
    assert_listed(lines, planted)


def test_skip_bad_leaves_out_exactly_the_rows_with_faults_and_trains_on_the_rest(demo_folder, folder):
    shutil.copy(demo_folder / "model" / "model.safetensors", folder / "model")
    before = {split: read_lines(folder / "data" / f"{split}.jsonl") for split in IMAGES}
    planted = plant(folder / "data", ["null answer", "no json", "truncated image", "too long", "group of train"])
    out = folder / "run"
    run(folder, out, "--skip-bad", "50%", "--pack-tokens", 200, "--max-answer-tokens", 1)
    report = json.loads((out / "check.json").read_text())
    assert report["passed"] is True
    assert report["skipped"] == sorted(planted)
    left = {
        split: [row["id"] for i, row in enumerate(rows, 1) if f"{split}.jsonl:{i}" not in planted]
        for split, rows in before.items()
    }
    assert [len(before[split]) - len(left[split]) for split in IMAGES] == [4, 0, 1]
    assert {split: counts["questions"] for split, counts in report["splits"].items()} == {
        split: len(names) for split, names in left.items()
    }
    trained = [name for line in read_lines(out / "steps.jsonl") for name in line["ids"]]
    assert sorted(trained) == sorted(left["train"])
    assert [line["id"] for line in read_lines(out / "predictions.jsonl")] == left["test"]


def test_without_skip_bad_nothing_is_trained(demo_folder, folder):
    shutil.copy(demo_folder / "model" / "model.safetensors", folder / "model")
    plant(folder / "data", ["null answer"])
    assert refused(folder, folder / "run").startswith("1 faults")
    assert sorted(p.name for p in (folder / "run").iterdir()) == ["check.json"]


def test_an_empty_file_is_named(folder, capsys):
    (folder / "data" / "val.jsonl").write_text("\n")
    assert refused(folder, folder / "run", *CHECK).startswith("1 faults")
    assert listed(capsys.readouterr().out) == ["val.jsonl: the file holds no examples; write it again"]


def test_a_file_of_other_bytes_is_named(folder, capsys):
    path = folder / "data" / "val.jsonl"
    path.write_bytes(b"\xff\xfe" + path.read_bytes())
    refused(folder, folder / "run", *CHECK)
    assert [line.startswith("val.jsonl") for line in listed(capsys.readouterr().out)] == [True]


@pytest.mark.parametrize("text", ["[", '{"id": 1}', "[1]", '[{"conversations": [{"from": "human"}, {"from": "gpt"}]}]'])
def test_a_broken_conversation_file_is_named(folder, capsys, text):
    (folder / "data" / "val.jsonl").unlink()
    (folder / "data" / "val.json").write_text(text)
    refused(folder, folder / "run", *CHECK)
    assert [line.startswith("val.json") for line in listed(capsys.readouterr().out)] == [True]


def test_a_line_separator_inside_a_text_ends_no_row(folder, capsys):
    """U+2028 and U+0085 may stand in a JSON string; only a line feed ends a line of the file."""
    rows = read_lines(folder / "data" / "train.jsonl")
    rows[1]["question"] = "Is it\u2028red\u0085now?"
    write_rows(folder / "data", "train", rows)
    run(folder, folder / "run", *CHECK)
    assert f"train: {len(rows)} questions" in capsys.readouterr().out


def test_data_that_are_nowhere_are_refused(folder):
    shutil.rmtree(folder / "data")
    assert refused(folder, folder / "run", *CHECK) == f"--data {folder / 'data'}: no such folder"
    (folder / "data").mkdir()
    assert "neither train/val/test.jsonl nor" in refused(folder, folder / "run", *CHECK)


# ------------------------------------------------------------------------------------------------------------
# Images that could do harm
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some of the damage
def test_whatever_is_wrong_with_the_bytes_it_is_a_value_error_that_names_the_file(demo_folder, tmp_path):
    """Damaged files make a decoder raise anything; each must be listed instead of ending the check."""
    source = Image.open(sorted((demo_folder / "data" / "images").iterdir())[0]).resize((40, 40))
    exif = Image.Exif()
    exif[274], exif[270] = 6, "frame"
    generator = random.Random(0)
    for kind in ("JPEG", "PNG"):
        source.save(tmp_path / "whole", format=kind, exif=exif)
        whole = (tmp_path / "whole").read_bytes()
        for number in range(400):
            damaged = bytearray(whole)
            for _ in range(generator.randint(1, 8)):
                damaged[generator.randrange(min(len(damaged), 250))] = generator.randrange(256)
            (tmp_path / "x.png").write_bytes(damaged)
            try:
                assert images.open_image(tmp_path, "x.png").mode == "RGB"
            except ValueError as error:
                assert str(error).startswith("x.png cannot be read: "), (kind, number)


def test_an_image_over_the_cap_is_refused_without_a_warning(tmp_path):
    Image.new("1", (12_000, 8_000)).save(tmp_path / "huge.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="12000 x 8000 pixels, more than 50,000,000"):
            images.open_image(tmp_path, "huge.png")


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert images.open_image(tmp_path, "turned.jpg").size == (20, 40)


# ------------------------------------------------------------------------------------------------------------
# The checkpoint's own files
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (599, "config.json gives <image> the ID 599, but that ID is the word piece "),  # len(tokenizer) - 1
        (640, "image token ID 640 is outside the embedding of 640 rows"),
        (-1, "image token ID -1 is outside the embedding of 640 rows"),
    ],
)
def test_a_wrong_image_token_is_refused_even_with_skip_bad(folder, capsys, token, text):
    change_config(folder, "config.json", image_token_index=token, image_token_id=token)
    assert refused(folder, folder / "run", *CHECK, "--skip-bad").startswith("1 faults")
    lines = listed(capsys.readouterr().out)
    assert len(lines) == 1 and lines[0].startswith("config.json: ") and text in lines[0]
    assert json.loads((folder / "run" / "check.json").read_text())["skipped"] == []


def test_pad_that_is_eos_is_found_named_and_fixed(folder, capsys):
    change_config(folder, "tokenizer_config.json", pad_token="</s>")
    run(folder, folder / "run", *CHECK)
    line = "PAD '</s>' (2), EOS '</s>' (2): PAD is now '<|pad|>' (601)"
    assert line in capsys.readouterr().out.split("\n")
    assert json.loads((folder / "run" / "check.json").read_text())["pad"] == line


def test_a_tokenizer_without_eos_is_refused(folder):
    change_config(folder, "tokenizer_config.json", eos_token=None)
    assert "EOS" in refused(folder, folder / "run", *CHECK)


def test_images_of_another_size_than_the_tower_are_refused(folder, capsys):
    size = {"height": 36, "width": 36}
    change_config(folder, "preprocessor_config.json", crop_size=size)
    assert refused(folder, folder / "run", *CHECK).startswith("1 faults")
    assert "36 x 36 pixels, the vision tower takes 72" in listed(capsys.readouterr().out)[0]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_model_file_that_is_cut_off_is_named(folder, name):
    path = folder / "model" / name
    path.write_text(path.read_text()[:20])
    assert name in refused(folder, folder / "run", *CHECK)


# ------------------------------------------------------------------------------------------------------------
# Clean data
# ------------------------------------------------------------------------------------------------------------


def test_the_clean_demo_passes_without_weights_and_shows_its_first_example(demo_folder, folder, capsys, monkeypatch):
    assert not list((folder / "model").glob("*.safetensors"))
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run(folder, folder / "run", *CHECK)
    text = capsys.readouterr().out
    row = read_lines(folder / "data" / "train.jsonl")[0]
    assert "check passed\n" in text
    assert f"example {row['id']}: supervised green, between « and »; masked grey; media blue" in text
    supervised = "".join(re.findall(r"\033\[32m(.*?)\033\[0m", text))
    assert re.sub("[ ▁]", "", supervised) == f"«{row['answer']}</s>»".replace(" ", "")
    assert re.findall(r"\033\[34m(.*?)\033\[0m", text) == ["[64 x <image>]"]
    masked = " ".join(re.findall(r"\033\[90m(.*?)\033\[0m", text, re.S))
    assert masked.startswith("<s> [INST]") and masked.replace(" ▁", " ").endswith("[/INST]")

    report = json.loads((folder / "run" / "check.json").read_text())
    assert (report["passed"], report["failures"], report["skipped"]) == (True, [], [])
    assert report["image_token"] == {"id": 600, "per_image": 64}
    for split, number in IMAGES.items():
        rows = read_lines(folder / "data" / f"{split}.jsonl")
        assert report["splits"][split]["questions"] == len(rows)
        assert report["splits"][split]["files"] == number
        assert sum(report["splits"][split]["question_types"].values()) == len(rows)


def test_elsewhere_than_on_a_terminal_nothing_is_coloured(folder, capsys):
    run(folder, folder / "run", *CHECK)
    text, answer = capsys.readouterr().out, read_lines(folder / "data" / "train.jsonl")[0]["answer"]
    assert "\033" not in text
    assert f"«{answer}</s>»".replace(" ", "") in re.sub(r"[ ▁\n]+", "", text)
    assert max(map(len, text.split("\n"))) <= 200


def test_check_without_data_checks_the_checkpoint_alone(folder, capsys):
    flags = ["--model", folder / "model", "--out", folder / "run", "--check"]
    train_llava_med.main(list(map(str, flags)))
    assert "multi_modal_projector" in capsys.readouterr().out  # the table of parameters
    assert not (folder / "run" / "check.json").exists()
    change_config(folder, "config.json", image_token_index=599, image_token_id=599)
    with pytest.raises(SystemExit, match="that ID is the word piece"):
        train_llava_med.main(list(map(str, flags)))


@pytest.mark.parametrize("fault", [{"answer": ""}, {"image": "images/gone.jpg"}])
def test_skip_bad_leaves_out_no_entire_split(folder, fault):
    rows = read_lines(folder / "data" / "val.jsonl")
    write_rows(folder / "data", "val", [{**row, **fault} for row in rows])
    text = refused(folder, folder / "run", *CHECK, "--skip-bad", "100%")
    assert text == "--skip-bad would leave out all of val; fix its examples"


def test_check_writes_its_own_two_files_alone(folder):
    def content():
        return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    before = content()
    run(folder, folder / "run", *CHECK)
    after = content()
    assert {p.name for p in after if p not in before} == {"check.json", "check_cache.json"}
    assert all(after[p] == before[p] for p in before)


def test_a_byte_order_mark_costs_no_row(tmp_path):
    """As editors on Windows write UTF-8: the first line is a row like any other."""
    (tmp_path / "train.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n', encoding="utf-8-sig")
    assert [row["id"] for _, row in texts.read_jsonl(tmp_path / "train.jsonl")] == ["a", "b"]


def test_whoever_answers_test_is_not_told_how_to(capsys):
    for split, said in (("val", "val will be answered; test only with"), ("test", "")):
        args = SimpleNamespace(eval_only=True, check=False, overfit=None, eval_split=split)
        data_check.refuse_empty({"val", "test"}, {"train": [], "val": [1], "test": [1]}, args)
        printed = capsys.readouterr().out
        assert printed.startswith(said) and bool(printed) == bool(said)


def test_no_example_at_all_and_none_to_answer_are_said(demo_folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "model").symlink_to(demo_folder / "model")
    shutil.copytree(demo_folder / "data" / "images", tmp_path / "data" / "images")
    (tmp_path / "data" / "train.jsonl").write_text((demo_folder / "data" / "train.jsonl").read_text())
    (tmp_path / "none.txt").write_text("")
    assert refused(tmp_path, tmp_path / "a", "--check", "--only-ids", tmp_path / "none.txt").endswith(
        "no examples are left"
    )
    run(tmp_path, tmp_path / "b", "--limit", 8, "--max-steps", 1)
    said = "--eval-split test: the data has no such examples, only of train: nothing will be answered"
    assert said in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# What was found is kept: a restart opens no file, unless anything has changed
# ------------------------------------------------------------------------------------------------------------


BASELINE = ["--eval-only", "--resume", "none", "--limit", 9, "--max-answer-tokens", 1]  # a start that trains nothing


@pytest.fixture
def start(demo_folder, folder, monkeypatch):
    """A function that starts a run and returns what was opened for its data check, and check.json's bytes."""
    shutil.copy(demo_folder / "model" / "model.safetensors", folder / "model")
    opened, measure, leaks = [], images.measure, leakage.check
    monkeypatch.setattr(images, "measure", lambda data, name: (opened.append(name), measure(data, name))[1])
    monkeypatch.setattr(leakage, "check", lambda *given: (opened.append("leakage"), leaks(*given))[1])

    def start_run(*flags) -> tuple[set, bytes]:
        opened.clear()
        run(folder, folder / "run", *BASELINE, *flags)
        return set(opened), (folder / "run/baseline/check.json").read_bytes()

    return start_run


def test_a_restart_with_the_same_data_opens_none_of_its_files(folder, start, capsys):
    first, found = start()
    assert len(first) > 3 and "leakage" in first and "as checked before" not in capsys.readouterr().out
    assert start() == (set(), found), "and finds the same"
    assert "files, leakage and scorer: as checked before, nothing has changed" in capsys.readouterr().out
    assert start("--epochs", 7) == (set(), found), "what is trained with it does not matter"
    assert start("--system", "Be short.")[0] == first, "another prompt is another check"
    (folder / "run/baseline/check_cache.json").unlink()
    assert start() == (first, found)


def test_check_opens_every_file_whatever_is_known(folder, monkeypatch):
    opened, measure = [], images.measure
    monkeypatch.setattr(images, "measure", lambda data, name: (opened.append(name), measure(data, name))[1])
    for times in (1, 2):
        run(folder, folder / "run", *CHECK)
        assert len(opened) == times * sum(IMAGES.values())


def rewrite(path: Path) -> None:
    """Other pixels in a file of the same size and time of change."""
    state, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def swap(path: Path) -> None:
    """Another image under this name, moved there."""
    other = next(each for each in path.parent.iterdir() if each != path)
    for source, target in ((path, "x"), (other, path.name), (path.with_name("x"), other.name)):
        source.rename(path.with_name(target))


def edit(path: Path) -> None:
    rows = read_lines(path)
    rows[0]["answer"] = rows[1]["answer"]
    write_rows(path.parent, path.stem, rows)


@pytest.mark.parametrize("change", [rewrite, swap, edit])
def test_after_any_change_all_is_opened_again(folder, start, change):
    first, _ = start()
    rows = read_lines(folder / "data" / "train.jsonl")
    change(folder / "data" / ("train.jsonl" if change is edit else rows[0]["image"]))
    assert start()[0] == first


def test_other_code_and_another_package_check_anew(folder, start, monkeypatch):
    script = folder / "train_mine.py"
    monkeypatch.setattr("sys.argv", [str(script)])
    (folder / "mine").mkdir()
    for path in (script, folder / "mine" / "scoring.py"):
        path.write_text("# as it was")
        first, _ = start()
        assert start()[0] == set()
        path.write_text("# with another measure")
        assert start()[0] == first
    monkeypatch.setattr(check_cache, "distributions", lambda: [SimpleNamespace(name="pillow", version="0")])
    assert start()[0] == first and start()[0] == set()


def test_the_header_of_an_img_is_a_part_of_it(tmp_path):
    for name in ("a.img", "a.hdr", "b.nii"):
        (tmp_path / name).write_bytes(b"0")
    before = [check_cache.state(tmp_path, name) for name in ("a.img", "b.nii", "c.nii")]
    assert [len(found) for found in before] == [2, 1, 0]
    (tmp_path / "a.hdr").write_bytes(b"1")
    (tmp_path / "b.hdr").write_bytes(b"1")
    after = [check_cache.state(tmp_path, name) for name in ("a.img", "b.nii", "c.nii")]
    assert after[0] != before[0] and after[1:] == before[1:]


def test_a_missing_file_is_found_though_all_was_well_before(folder, start):
    start()
    name = read_lines(folder / "data" / "train.jsonl")[0]["image"]
    (folder / "data" / name).unlink()
    refused(folder, folder / "run", *BASELINE)
    found = json.loads((folder / "run/baseline/check.json").read_text())["failures"]
    assert any(f"{name} is missing" in text for text in found)


@pytest.mark.parametrize("module, function", [(images, "open_image"), (leakage, "small_picture")])
def test_what_could_not_be_read_is_not_kept_because_it_may_be_of_the_machine(
    folder, start, monkeypatch, module, function
):
    name, works = read_lines(folder / "data" / "train.jsonl")[0]["image"], getattr(module, function)

    def fail(data, of, *rest):
        if of == name:
            raise ValueError("a package is missing")
        return works(data, of, *rest)

    flags = ["--limit", 30, "--skip-bad", "90%"]
    with monkeypatch.context() as patch:
        patch.setattr(module, function, fail)
        start(*flags)
    assert "leakage" in start(*flags)[0] and start(*flags)[0] == set()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"of": 1}', "\\0"])
def test_a_damaged_check_cache_is_written_anew(folder, start, text):
    first, found = start()
    (folder / "run/baseline/check_cache.json").write_text(text)
    assert start() == (first, found) and start() == (set(), found)


def test_without_room_for_it_a_run_goes_on(folder, start, capsys):
    (folder / "run/baseline/check_cache.json").mkdir(parents=True)
    first, found = start()
    assert "a restart then opens all files again" in capsys.readouterr().out
    assert start() == (first, found) and not (folder / "run/baseline/check_cache.json.writing").exists()


@pytest.mark.parametrize("measured", [{"size": (1, 2)}, ({"size": np.int64(3)}, "content"), (3, 4)])
def test_what_a_restart_could_not_read_is_no_measure(folder, monkeypatch, measured):
    monkeypatch.setattr(images, "measure", lambda data, name: measured)
    assert "Task.measure must return, JSON-like" in refused(folder, folder / "run", *CHECK)
