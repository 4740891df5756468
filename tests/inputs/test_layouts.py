"""The published layouts of the data sets are read as they are."""

import importlib
import json
import random
import shutil
from types import SimpleNamespace

import pytest
from helpers import run
from PIL import Image

import common
import train_llava_med
from inputs import layouts
from report import examples as report_examples


def read(data, **settings):
    """Rows and faults of a folder, the faults as text."""
    defaults = {"endovis": None, "limit": None, "only_ids": None, "media_root": data}
    rows, problems = train_llava_med.read_examples(data, SimpleNamespace(**{**defaults, **settings}))
    return rows, [str(problem) for problem in problems]


def picture(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768)).save(path)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def checked(data, demo_folder, *flags):
    """--check through the demo's model; the rows' images are there."""
    (data.parent / "model").symlink_to(demo_folder / "model")
    run(data.parent, data.parent / "run", "--check", *flags)
    return json.loads((data.parent / "run" / "check.json").read_text())["splits"]


# ------------------------------------------------------------------------------------------------------------
# Kvasir-VQA
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kvasir(tmp_path):
    """200 images, three questions each, in one file; a third of the images named in each way."""
    data, rows = tmp_path / "data", []
    for i in range(200):
        picture(data / "images" / f"cl8k{i:04d}.jpg", i)
        name = [
            {"image_id": f"cl8k{i:04d}"},
            {"image_filename": f"cl8k{i:04d}.jpg"},
            {"image": f"images/cl8k{i:04d}.jpg"},
        ][i % 3]
        for question, answer in [
            ("What color is the abnormality? If more than one separate with ;", "pink;red"),
            ("What is the size of the polyp?", "11-20mm;5-10mm"),
            ("Are there any abnormalities in the image?", "yes"),
        ]:
            rows.append({**name, "source": "HyperKvasir", "question": question, "answer": answer})
    write_jsonl(data / "kvasir_vqa.jsonl", rows)
    return data


def test_kvasir_images_are_found_by_id_file_name_or_path(kvasir):
    rows, faults = read(kvasir)
    assert faults == [] and len(rows) == 600
    assert [row.media[0] for row in rows[::3]] == [f"images/cl8k{i:04d}.jpg" for i in range(200)]
    assert [(row.where, row.id, row.group) for row in rows[:2]] == [
        ("kvasir_vqa.jsonl:1", "kvasir_vqa.jsonl:1", "images/cl8k0000.jpg"),
        ("kvasir_vqa.jsonl:2", "kvasir_vqa.jsonl:2", "images/cl8k0000.jpg"),
    ]


def test_kvasir_answers_of_several_values_stay_whole_and_types_are_told(kvasir):
    rows, _ = read(kvasir)
    assert [(row.answer, row.question_type, row.candidates) for row in rows[:3]] == [
        ("pink;red", "color", None),
        ("11-20mm;5-10mm", "size_numeric", None),
        ("yes", "yes_no", ["yes", "no"]),
    ]


def test_kvasir_fields_of_the_original_recipe_are_taken(kvasir):
    row = {"id": "a", "image_id": "cl8k0007", "question": "Where is it?", "answer": 2, "question_type": "mine"}
    write_jsonl(kvasir / "kvasir_vqa.jsonl", [{**row, "answer_candidates": ["1", "2"]}])
    ((row,), faults) = read(kvasir)
    assert faults == []
    assert (row.id, row.answer, row.question_type, row.candidates) == ("a", "2", "mine", ["1", "2"])


@pytest.mark.parametrize("answer", [None, "nan", "NaN", "", float("nan")])
def test_kvasir_rows_without_an_answer_are_refused(kvasir, answer):
    write_jsonl(kvasir / "kvasir_vqa.jsonl", [{"image_id": "cl8k0007", "question": "Where?", "answer": answer}])
    rows, faults = read(kvasir)
    assert rows == [] and len(faults) == 1
    assert faults[0].startswith("kvasir_vqa.jsonl:1: the answer is empty")


def test_a_single_file_is_split_70_15_15_by_image(kvasir, demo_folder):
    rows, _ = read(kvasir)
    images = {split: {row.media[0] for row in rows if row.split == split} for split in ("train", "val", "test")}
    assert sum(map(len, images.values())) == len(set().union(*images.values())) == 200  # none in two
    assert [len(part) for part in images.values()] == [135, 30, 35]
    assert {split: n["questions"] for split, n in checked(kvasir, demo_folder).items()} == {
        "train": 405,
        "val": 90,
        "test": 105,
    }


def test_added_and_reordered_rows_move_no_image_to_another_split(kvasir):
    before = {row.media[0]: row.split for row in read(kvasir)[0]}
    rows = [json.loads(line) for line in (kvasir / "kvasir_vqa.jsonl").read_text().splitlines()]
    picture(kvasir / "images" / "new.jpg", 999)
    new = {"image_id": "new", "question": "Where?", "answer": "here"}
    by_path = [{**row, "image": f"images/{row.pop('image_id')}.jpg"} if "image_id" in row else row for row in rows]
    write_jsonl(kvasir / "kvasir_vqa.jsonl", [new, *by_path[::-1]])
    after = {row.media[0]: row.split for row in read(kvasir)[0]}
    assert after.keys() - before.keys() == {"images/new.jpg"}
    assert {image: after[image] for image in before} == before


def test_two_files_of_unknown_names_are_not_guessed_at(kvasir):
    shutil.copy(kvasir / "kvasir_vqa.jsonl", kvasir / "copy.jsonl")
    with pytest.raises(SystemExit, match=r"neither train/val/test\.jsonl nor a single"):
        read(kvasir)


# ------------------------------------------------------------------------------------------------------------
# EndoVis-18-VQA
# ------------------------------------------------------------------------------------------------------------

SENTENCES = {"Classification": "Idle", "Sentence": "action done by bipolar forceps is idle"}


@pytest.fixture
def endovis(tmp_path):
    """16 sequences of two frames with two questions each."""
    data = tmp_path / "data"
    for n in range(1, 17):
        for frame in ("frame000", "frame001"):
            picture(data / f"seq_{n}" / "left_fr" / f"{frame}.png", 2 * n + int(frame[-1]))
            for kind, answer in SENTENCES.items():
                path = data / f"seq_{n}" / "vqa" / kind / f"{frame}_QA.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"What is the state of bipolar forceps?|{answer}\nWhere is it?|left-top\n")
    return data


def test_endovis_needs_to_be_told_which_split(endovis):
    with pytest.raises(SystemExit, match="two published splits that contradict each other: give --endovis paper"):
        read(endovis)


@pytest.mark.parametrize(
    ("name", "sequences"),
    [
        ("paper", {"train": [2, 3, 4, 6, 7, 9, 10, 11, 12, 14, 15], "test": [1, 5, 16]}),
        ("sequence", {"train": [5, 6, 7, 10, 11, 12, 14, 15, 16], "val": [9, 13], "test": [1, 2, 3, 4]}),
    ],
)
def test_endovis_splits_are_the_published_sequences(endovis, demo_folder, name, sequences):
    rows, faults = read(endovis, endovis=name)
    assert faults == []
    found = {}
    for row in rows:
        found.setdefault(row.split, []).append(row.group)
    expected = {split: [f"seq_{n}" for n in numbers for _ in range(4)] for split, numbers in sequences.items()}
    assert found == expected
    assert layouts.ENDOVIS[name] == (sequences, "Classification")
    counts = checked(endovis, demo_folder, "--endovis", name)
    assert {split: n["questions"] for split, n in counts.items() if n["questions"]} == {
        split: 4 * len(numbers) for split, numbers in sequences.items()
    }


@pytest.mark.parametrize("kind", SENTENCES)
def test_endovis_rows_are_the_lines_of_a_frames_file(endovis, kind):
    rows, _ = read(endovis, endovis={"Classification": "paper", "Sentence": "paper:Sentence"}[kind])
    row = rows[2]
    assert (row.where, row.media[0]) == (f"seq_2/vqa/{kind}/frame001_QA.txt:1", "seq_2/left_fr/frame001.png")
    assert (row.question, row.answer) == ("What is the state of bipolar forceps?", SENTENCES[kind])
    assert rows[3].where == f"seq_2/vqa/{kind}/frame001_QA.txt:2" and rows[3].answer == "left-top"
    assert len({row.id for row in rows}) == len(rows)


def test_endovis_reads_the_left_frame_and_neither_masks_nor_the_right_eye(endovis):
    for other in ("labels", "right_fr", "vqa/masks"):
        picture(endovis / "seq_2" / other / "frame000.png", 200)
    rows, faults = read(endovis, endovis="paper")
    assert faults == [] and rows[0].media[0] == "seq_2/left_fr/frame000.png"


def test_endovis_faults_are_named(endovis):
    (endovis / "seq_3" / "left_fr" / "frame000.png").unlink()
    (endovis / "seq_4" / "vqa" / "Classification" / "frame001_QA.txt").write_text("no bar here\nWhat?|\n")
    shutil.rmtree(endovis / "seq_6")
    rows, faults = read(endovis, endovis="paper")
    assert faults[0] == 'seq_4/vqa/Classification/frame001_QA.txt:1: not "question|answer"; fix the line'
    assert faults[1].startswith("seq_4/vqa/Classification/frame001_QA.txt:2: the answer is empty")
    assert faults[2:] == ["seq_6/vqa/Classification: no annotation files; complete the data set"]
    (gone,) = {row.media[0] for row in rows if not (endovis / row.media[0]).exists()}
    assert gone.startswith("seq_3/") and "frame000" in gone


# ------------------------------------------------------------------------------------------------------------
# LLaVA conversations
# ------------------------------------------------------------------------------------------------------------


def say(*values):
    roles = ["human", "gpt"]
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def conversations(tmp_path):
    data = tmp_path / "data"
    picture(data / "images" / "a.jpg")
    picture(data / "images" / "b.jpg", 9)
    first = say("What is seen?\n<image>", "A polyp.", "Which color?", "pink", "How many?", "one")
    entries = [
        {"id": "a", "image": "images/a.jpg", "conversations": first},
        {"id": "b", "image": "images/b.jpg", "conversations": say("<image>\nIs it red?", "no")},
    ]
    (data / "train.json").write_text(json.dumps(entries))
    return data


def test_a_conversation_gives_a_row_an_answer_with_the_turns_before_it(conversations):
    rows, faults = read(conversations)
    assert faults == []
    assert [(row.where, row.id, row.question, row.answer) for row in rows] == [
        ("train.json[0] turn 0", "a.0", "What is seen?", "A polyp."),
        ("train.json[0] turn 1", "a.1", "Which color?", "pink"),
        ("train.json[0] turn 2", "a.2", "How many?", "one"),
        ("train.json[1]", "b", "Is it red?", "no"),
    ]
    assert [list(row.history) for row in rows] == [
        [],
        [("What is seen?", "A polyp.")],
        [("What is seen?", "A polyp."), ("Which color?", "pink")],
        [],
    ]


def test_of_a_conversation_only_the_last_answer_is_supervised(conversations, demo_folder):
    args = SimpleNamespace(model=demo_folder / "model", image_fit=None)
    task = train_llava_med.LlavaTask(demo_folder / "model", args)
    rows, _ = read(conversations)
    prefix, input_ids, labels = task.encode(rows[2], rows[2].answer)
    assert task.tokenizer.decode(prefix) == "<s> [INST] " + "<image>" * 64
    turns = "\nWhat is seen? [/INST] A polyp.</s>[INST] Which color? [/INST] pink</s>[INST] How many? [/INST] one</s>"
    assert task.tokenizer.decode(input_ids) == turns
    supervised = [label for label in labels if label != common.IGNORE]
    assert task.tokenizer.decode(supervised).strip() == "one</s>"
    assert labels[-len(supervised) :] == supervised


def test_rows_of_a_conversation_share_its_image_and_are_checked(conversations, demo_folder):
    counts = checked(conversations, demo_folder)
    assert (counts["train"]["questions"], counts["train"]["files"]) == (4, 2)


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([{"from": "gpt", "value": "<image>"}, {"from": "human", "value": "b"}], "turns must alternate human, gpt"),
        ([{"from": "user", "value": "<image>"}, {"from": "assistant", "value": "b"}], "turns must alternate"),
        (say("<image> a", "b", "c"), "turns must alternate human, gpt"),
        ([], "turns must alternate"),
        (say("<image> <image> a", "b"), "2 <image> in what is asked, but 1 images; write one for each, or none"),
        (say("<image> a", ""), "the answer is empty"),
        (say("<image>", "b"), "the question is empty"),
        (say("<image> a", "b", "c", None), "the answer is empty"),
        (say(None, "b"), "the question is empty"),
        ([1, 2], "turns must alternate human, gpt"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_named(conversations, turns, text):
    entry = {"id": "a", "image": "images/a.jpg", "conversations": turns}
    (conversations / "train.json").write_text(json.dumps([entry]))
    rows, faults = read(conversations)
    assert len(faults) == 1 and faults[0].startswith("train.json[0]") and text in faults[0]
    assert len(rows) == (turns == say("<image> a", "b", "c", None))  # the turns before the fault stand


def test_more_marks_than_images_are_a_fault_of_every_answer(conversations, demo_folder, capsys):
    entry = {"id": "a", "image": "images/a.jpg", "conversations": say("<image> a", "b", "<image> c", "d")}
    (conversations / "train.json").write_text(json.dumps([entry]))
    with pytest.raises(SystemExit, match="2 faults"):
        checked(conversations, demo_folder)
    assert "(id a.0): 2 <image> in what is asked, but 1 images; write one for" in capsys.readouterr().out


def test_one_split_in_two_formats_is_refused(conversations):
    """Otherwise one of the files would be passed over without a word."""
    write_jsonl(conversations / "train.jsonl", [{"image": "images/a.jpg", "question": "a?", "answer": "b"}])
    with pytest.raises(SystemExit, match=r"train\.json"):
        read(conversations)


# ------------------------------------------------------------------------------------------------------------
# What one reader for each layout gives
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["a", [["a"]], [["a", "b", "c"]], 5, [{"a": "b"}]])
def test_a_history_of_another_form_is_refused_by_name(conversations, history):
    (conversations / "train.json").unlink()
    line = {"image": "images/a.jpg", "question": "a?", "answer": "b", "history": history}
    write_jsonl(conversations / "train.jsonl", [line])
    rows, (fault,) = read(conversations)
    assert rows == [] and fault.startswith("train.jsonl:1: history must be a list of [question, answer]")


def test_one_bad_entry_of_a_json_list_costs_no_other(conversations):
    entries = json.loads((conversations / "train.json").read_text())
    (conversations / "train.json").write_text(json.dumps([entries[1], 5, "x"]))
    rows, faults = read(conversations)
    assert [row.id for row in rows] == ["b"]
    assert [fault.partition(": ")[0] for fault in faults] == ["train.json[1]", "train.json[2]"]


@pytest.mark.parametrize("fixture", ["kvasir", "endovis", "conversations"])
def test_without_a_script_a_folder_has_the_same_entries(request, fixture):
    data = request.getfixturevalue(fixture)
    rows, _ = read(data, endovis="paper")
    found = list(layouts.entries(data, data, "paper"))
    assert [where for where, _, _ in found] == [row.where for row in rows]
    assert [entry["question"].replace("<image>", "").strip() for _, _, entry in found] == [row.question for row in rows]
    assert [str(entry["answer"]) for _, _, entry in found] == [row.answer for row in rows]


MODALITIES = ["--modality", "T1:32x32x32:8x8x8", "--modality", "rsfMRI:24x24x24x4:8x8x8x2"]


@pytest.mark.parametrize(
    ("fixture", "script", "flags"),
    [
        ("demo_folder", "train_llava_med", []),
        ("qwen_folder", "train_qwen2vl_sentinel", []),
        ("video_folder", "train_surg_video_vqa", []),
        ("mri_folder", "train_umbrella_mri", [*MODALITIES, "--supervise", "all"]),
        ("plain_folder", "train_video_plain_lm", ["--fast-frames", "99", "--slow-frames", "99"]),
    ],
)  # fmt: skip
def test_the_examples_of_a_demo_are_the_same_with_and_without_its_script(request, fixture, script, flags):
    """One reader serves scripts, leakage check and report: the fields of all examples agree."""
    script, data = importlib.import_module(script), request.getfixturevalue(fixture) / "data"
    args = script.parse_arguments(["--model", "m", "--data", str(data), "--out", "o", *flags])
    expected, problems = script.read_examples(data, args)
    found, others = report_examples.read(data)
    assert problems == others == [] and len(expected) == len(found) > 20
    for one, other in zip(expected, found, strict=True):
        for name in ("where", "split", "id", "group", "groups", "media", "shown", "question"):
            assert getattr(one, name) == getattr(other, name), name
        assert {one.answer, *one.also_right} >= {other.answer} and one.question_type == other.question_type
