"""A field of an entry is read, refused or listed, never passed over; splits, groups and IDs go by their usual names."""

import json
from types import SimpleNamespace

import pytest
from helpers import read_lines, refused, run
from PIL import Image

import train_llava_med
import train_qwen2vl_sentinel
import train_surg_video_vqa
import train_video_plain_lm
from inputs import fields

ROW = {"question": "Is there a polyp?", "answer": "yes"}


@pytest.fixture
def data(tmp_path):
    """A folder of eight pictures."""
    (tmp_path / "data/images").mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (40, 30), (20 * i, 90, 200 - 20 * i)).save(tmp_path / f"data/images/{i}.jpg")
    return tmp_path / "data"


def write(data, split, *rows):
    (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(data, script=train_llava_med, **settings):
    """The examples of a folder, and what is wrong with the others."""
    args = script.parse_arguments(["--model", "m", "--data", str(data), "--out", "never written"])
    examples, problems = script.read_examples(data, SimpleNamespace(**{**vars(args), **settings}))
    return examples, [problem.text for problem in problems]


def rows(*changes):
    return [{"image": f"images/{i}.jpg", **ROW, **change} for i, change in enumerate(changes)]


MATTERS = {
    "options": {"options": ["A. colon", "B. stomach"]},
    "choices": {"choices": {"A": "colon"}},
    "system text": {"system_prompt": "You are a radiologist."},
    "several images": {"images": ["images/1.jpg", "images/7.jpg"]},
    "a second image": {"ref_image": "images/7.jpg"},
    "a second image that is not there": {"priorImagePath": "images/gone.png"},
    "an image under any name": {"comparison": {"file": "images/7.jpg"}},
    "a recording": {"wav": "q7"},
    "a mask": {"annotation": ["images/7.jpg"]},
    "a letter's option": {"Choice A": "colon"},
    "an option of its own": {"A": "colon"},
    "options in other words": {"mc_options": "A. colon"},
    "a segment": {"meta": {"split": [0, 4]}},
    "another segment": {"segment": [0, 4]},
    "a folder": {"folder": "images"},
    "earlier turns of another form": {"history": 5},
    "a start": {"start_time": 1.5},
    "two images": {"image_id": "7"},
}


@pytest.mark.parametrize("field", MATTERS.values(), ids=MATTERS.keys())
@pytest.mark.parametrize("script", [train_llava_med, train_qwen2vl_sentinel], ids=["llava", "qwen"])
def test_a_field_that_changes_what_is_asked_or_shown_is_never_passed_over(data, script, field):
    write(data, "train", *rows(field, {}))
    examples, problems = read(data, script)
    assert len(examples) == 1 and len(problems) == 1
    name = next(iter(field))
    assert name in problems[0] or "7.jpg" in problems[0]
    assert any(word in problems[0] for word in ("remove it", "clip of its own", "keep one", "history must be"))


@pytest.mark.parametrize("name", ["frames", "video_path", "clip", "videos", "videoFile", "media", "vid", "frames_dir"])
def test_a_video_under_another_name_is_never_a_text_alone(data, name):
    write(data, "train", {name: ["images/0.jpg"] if name == "frames" else "images", **ROW}, {"video": "images", **ROW})
    examples, problems = read(data, train_video_plain_lm)
    assert [len(example.media) for example in examples] == [4]  # the frames that are read
    assert ["rename it" in problem or "did you mean 'video'?" in problem for problem in problems] == [True]


def test_a_state_is_no_misspelt_start(data):
    write(data, "train", {"video": "images", "state": "stable", **ROW})
    (example,), problems = read(data, train_video_plain_lm)
    assert problems == [] and example.unread == ["state"]


@pytest.mark.parametrize("name", ["audio_path", "audio_file", "wav", "speech", "questionAudio"])
def test_a_recording_under_another_name_is_never_left_unheard(data, name):
    (data / "q.wav").write_bytes(b"RIFF")
    row = {"frames": ["images/0.jpg"], "video_id": "v", name: "q.wav", **ROW}
    write(data, "train", row)
    examples, problems = read(data, train_surg_video_vqa, question="both")
    assert examples == [] and name in problems[0] and "audio, frames, video is read" in problems[0]


def test_fields_that_say_nothing_about_the_answer_are_listed_with_their_count(data):
    """Of SLAKE and VQA-RAD, whose `qid` is no misspelt `id`."""
    slake = {"img_id": 102, "img_name": "images/0.jpg", "q_lang": "en", "qid": 0, "triple": ["vhead", "_", "_"], **ROW}
    rad = {"image_name": "1.jpg", "qid": 3, "image_organ": "HEAD", "question_frame": "Is there X?", **ROW}
    rad |= {"image_case_url": "https://example.org/a.jpg", "has_image": "yes", "q_lang": None}
    write(data, "train", slake, rad)
    examples, problems = read(data)
    assert problems == []
    assert [example.media for example in examples] == [["images/0.jpg"], ["images/1.jpg"]]
    assert examples[0].unread == ["q_lang", "qid", "triple"]
    assert examples[1].unread == ["qid", "image_organ", "question_frame", "image_case_url", "has_image"]


@pytest.mark.parametrize("name", ["patient_id", "PatientID", "patient", "subject_id", "case", "study_id", "procedure"])
def test_a_patient_is_the_group_by_its_usual_names(data, name):
    write(data, "train", *rows({name: "p1"}, {name: 7}, {"group": "g", name: "p2"}, {"meta": {name: "p3"}}))
    examples, problems = read(data)
    assert problems == [] and [example.group for example in examples] == ["p1", "7", "g", "p3"]
    assert [example.grouped for example in examples] == [name, name, "group", f"meta.{name}"]
    assert [example.groups for example in examples] == [["p1"], ["7"], ["g", f"{name} p2"], ["p3"]]
    assert not any(example.unread for example in examples)


def test_a_patient_is_the_same_whether_pandas_has_written_a_fraction_or_not(data):
    write(data, "train", *rows({"patient_id": 7.0}, {"patient_id": 7}, {"patient_id": "7"}))
    examples, problems = read(data)
    assert problems == [] and [example.group for example in examples] == ["7"] * 3


def test_a_patient_counts_before_a_study(data):
    write(data, "train", *rows({"study_id": "s", "patient_id": "p"}))
    (example,), _ = read(data)
    assert (example.group, example.unread) == ("p", ["study_id"])


def test_an_official_split_is_kept(data):
    names = ["train", "validation", "Test", "dev", "eval", "test"]
    write(data, "all", *rows(*({"split": name, "id": str(i)} for i, name in enumerate(names))))
    examples, problems = read(data)
    assert problems == []
    assert [example.split for example in examples] == ["train", "val", "test", "val", "val", "test"]


def test_a_split_that_is_unknown_or_contradicts_its_file_or_is_not_named_in_every_row_is_a_fault(data):
    write(data, "all", *rows({"split": "train"}, {"split": "fold1"}, {}))
    examples, problems = read(data)
    assert [example.split for example in examples] == ["train"]
    assert "'fold1' is none of train, val, test" in problems[0] and "no split, though others" in problems[1]
    (data / "all.jsonl").unlink()
    write(data, "train", *rows({"split": "test"}, {"split": "training"}))
    examples, (problem,) = read(data)
    assert len(examples) == 1 and "its file is the one of train" in problem


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev", "eval", "Dev"])
def test_a_validation_file_goes_by_its_usual_names(data, name):
    write(data, "train", *rows({}))
    write(data, name, *rows({"image": "images/1.jpg"}))
    assert [example.split for example in read(data)[0]] == ["train", "val"]


@pytest.mark.parametrize(
    "name", ["dev.jsonl", "val.json", "validation.csv", "val.parquet", "valid.json.gz", "val.yaml"]
)
def test_two_files_for_one_split_or_one_that_is_not_read_are_refused(data, name):
    write(data, "train", *rows({}))
    write(data, "val", *rows({"image": "images/1.jpg"}))
    (data / name).write_text("[]")
    with pytest.raises(SystemExit, match="one file a split"):
        read(data)


def test_ids_are_unique_within_a_split_and_named_after_it_where_they_repeat_in_another(data):
    for split, first in (("train", 0), ("val", 2), ("test", 4)):
        changes = [{"id": str(i), "image": f"images/{first + i}.jpg"} for i in range(2)]
        write(data, split, *rows(*changes))
    examples, problems = read(data)
    assert problems == []
    assert [example.id for example in examples] == ["0", "1", "val/0", "val/1", "test/0", "test/1"]
    write(data, "test", *rows({"id": "0", "image": "images/4.jpg"}, {"id": "0", "image": "images/5.jpg"}))
    assert read(data)[1] == ["duplicate ID, first used at test.jsonl:1; make it unique"]


def test_short_names_are_not_misspelt_ones():
    assert fields.alike("qid", frozenset({"id"})) == []
    known = frozenset({"answer", "id", "image_id", "question", "question_type"})
    assert [fields.alike(name, known) for name in ("anwser", "quesionType", "imageId")] == [
        ["answer"],
        ["question_type"],
        ["image_id"],
    ]
    assert [fields.alike(name, known) for name in ("image_width", "question_id", "question_class")] == [[], [], []]


PUBLIC = {  # columns of published data sets, beside question and answer
    "Kvasir-VQA": {"source": "Kvasir-SEG", "img_id": "images/0.jpg"},
    "VQA-RAD": {"phrase_type": "freeform", "qid_linked_id": "03f451ca", "image_name": "0.jpg", "answer_type": "CLOSED"},
    "PathVQA": {"image": "images/0.jpg", "source": "Pathology"},
    "MIMIC-CXR-VQA": {
        "image": "images/0.jpg",
        "subject_id": 10,
        "study_id": 5,
        "content_type": "presence",
        "semantic_type": "verify",
        "template": "Is there ${object}?",
        "template_arguments": {"object": 1},
    },
    "LLaVA-Med": {"image": "images/0.jpg", "domain": {"chest_xray": True, "mri": False}, "pmid": "1"},
    "exported by pandas": {"image": "images/0.jpg", "Unnamed: 0": 3, "start_date": "2020-01-01", "weight": 70.5},
    "of a CSV": {"image": "images/0.jpg", "num_images": "3", "is_video": "False", "frame": "12", "scan": "CT"},
    "surgery": {"image": "images/0.jpg", "video": "VID01", "phase": "Preparation", "procedure": "cholecystectomy"},
    "names of the image": {
        "image": "images/0.jpg",
        "path": "images/0.jpg",
        "original_image": "0.jpg",
        "image_width": 4,
    },
    "kinds": {"image": "images/0.jpg", "subject": "Radiology", "case": "control", "meta": {"group": "AD"}},
    "endoscopy": {
        "image": "images/0.jpg",
        "segment": "rectum",
        "frame": 12,
        "scan": "CT",
        "frame_count": 8,
        "end": None,
    },
    "metadata": {"image": "images/0.jpg", "metadata": {"system": "Olympus", "weight": 3, "is_multiple_choice": True}},
}


@pytest.mark.parametrize("columns", PUBLIC.values(), ids=PUBLIC.keys())
def test_the_columns_of_published_data_are_no_faults(data, columns):
    write(data, "train", {**ROW, **columns})
    examples, problems = read(data)
    (example,) = examples
    assert problems == [] and example.media == ["images/0.jpg"] and example.grouped in (None, "subject_id")


@pytest.mark.parametrize("name", ["split", "subset", "partition", "set", "phase"])
def test_a_split_goes_by_its_usual_names(data, name):
    write(data, "all", *rows({name: "train"}, {name: "test"}))
    assert [example.split for example in read(data)[0]] == ["train", "test"]


def test_fields_of_a_turn_are_read_listed_or_refused(data):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A polyp."}]
    entry = {"image": "images/0.jpg", "conversations": turns}
    write(
        data,
        "train",
        {**entry, "conversations": [{**turns[0], "markdown": "x"}, turns[1]], "question": None, "messages": None},
        {**entry, "conversations": [turns[0], {**turns[1], "loss": False}]},
        {**entry, "conversations": [{**turns[0], "image": "images/1.jpg"}, turns[1]]},
        {**entry, "question": "Is it red?", "answer": "no"},
        {**entry, "conversations": [*turns, {"from": "human"}, turns[1]]},
    )
    (example,), problems = read(data)
    assert example.unread == ["conversations.markdown"]
    assert "'conversations.loss' changes what is asked" in problems[0]
    assert "'conversations.image' names a medium" in problems[1]
    assert "question, answer or history beside conversations" in problems[2]
    assert "a later question is empty" in problems[3]


def test_annotations_that_are_not_read_are_named(data, capsys):
    write(data, "train", *rows({}))
    write(data, "train2", *rows({}))
    assert len(read(data)[0]) == 1
    assert "not read, beside train.jsonl: train2.jsonl" in capsys.readouterr().out


# ---- messages, LLaVA-ST's pictures, CSV ----


MESSAGES = {
    "text": [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A polyp."}],
    "no mark": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A polyp."}],
    "parts": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A polyp."}]},
    ],
}


@pytest.mark.parametrize("turns", MESSAGES.values(), ids=MESSAGES.keys())
@pytest.mark.parametrize("script", [train_llava_med, train_qwen2vl_sentinel], ids=["llava", "qwen"])
def test_messages_are_read_as_conversations(data, script, turns):
    write(data, "train", {"messages": turns, "images": ["images/3.jpg"]})
    (example,), problems = read(data, script)
    assert problems == []
    assert (example.media, example.question, example.answer) == (["images/3.jpg"], "What is it?", "A polyp.")


def test_images_and_system_texts_within_messages_are_read(data):
    first, answer = MESSAGES["parts"]
    named = {**first, "content": [{"type": "image", "image": "images/2.jpg"}, first["content"][1]]}
    system = {"role": "system", "content": "You are a radiologist."}
    write(
        data,
        "train",
        {"messages": [system, named, answer]},
        {"messages": [named, answer, {**named, "content": named["content"][::-1]}, answer]},
        {"messages": [named, answer], "images": ["images/1.jpg"]},
        {"messages": [system, named, answer], "system": "Be brief."},
        {"messages": 5},
        {"messages": [{"role": "user"}]},
    )
    examples, problems = read(data)
    assert [example.media for example in examples] == [["images/2.jpg"], ["images/2.jpg"], ["images/2.jpg"] * 2]
    assert [example.system for example in examples] == ["You are a radiologist.", "", ""]
    assert examples[2].history == [("<image>What is it?", "A polyp.")] and examples[2].question == "What is it?<image>"
    assert "images lists ['images/1.jpg'], but the conversation names ['images/2.jpg']; keep one" in problems[0]
    assert "a system text changes what is asked, but stands beside the field system" in problems[1]
    assert len(problems) == 4


def test_a_system_text_is_never_passed_over_where_it_is_not_read(data):
    turns = [{"role": "system", "content": "You are a radiologist."}, *MESSAGES["text"]]
    write(
        data, "train", {"messages": turns, "images": ["images/3.jpg"]}, {"image": "images/1.jpg", "system": "x", **ROW}
    )
    examples, problems = read(data, train_video_plain_lm)
    assert examples == [] and "a system text changes what is asked, but is not read" in problems[0]
    assert "'system' changes what is asked, but is not read" in problems[1]


def test_a_conversation_has_its_type_and_candidates_and_only_one_answer_may_have_them(data):
    turns = [{"from": "human", "value": "<image>\nPolyp present"}, {"from": "gpt", "value": "yes"}]
    entry = {"image": "images/0.jpg", "question_type": "yes_no", "answer_candidates": ["yes", "no"]}
    write(
        data,
        "train",
        {**entry, "conversations": turns},
        {**entry, "conversations": [*turns, {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "left"}]},
        {**entry, "conversations": turns, "grop": "p1"},
    )
    (example,), problems = read(data)
    assert (example.question_type, example.candidates) == ("yes_no", ["yes", "no"])
    assert "answer_candidates are those of one question" in problems[0]
    assert problems[1] == "unknown field 'grop'; did you mean 'group'?"


def test_a_picture_in_the_video_script_is_a_video_of_one_frame(data):
    """As LLaVA-ST's files name pictures."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A polyp."}]
    write(data, "train", {"image": "images/0.jpg", "conversations": turns}, {"image": "images/1.jpg", **ROW})
    examples, problems = read(data, train_video_plain_lm)
    assert problems == [] and [example.media for example in examples] == [["images/0.jpg"], ["images/1.jpg"]]


def test_csv_with_a_header_is_read(data):
    text = 'image,question,answer,patient_id\nimages/0.jpg,"Is it red, or\npink?",pink,p1\nimages/1.jpg,What?,,p2\n'
    (data / "train.csv").write_text("\ufeff" + text + "images/2.jpg,Is it, red?,no,p3\n", encoding="utf-8")
    (example,), problems = read(data)
    assert (example.where, example.question, example.group) == ("train.csv:3", "Is it red, or\npink?", "p1")
    assert "the answer is empty" in problems[0] and "not the 4 cells of the header" in problems[1]


def test_the_index_that_pandas_writes_without_a_name_is_listed(data):
    (data / "train.csv").write_text(",image,question,answer\n5,images/0.jpg,What?,pink\n")
    (example,), problems = read(data)
    assert problems == [] and example.unread == ["index"]


def test_what_systems_and_editors_leave_beside_a_file_costs_nothing(data):
    write(data, "kvasir", *rows({}))
    for name in ("._kvasir.jsonl", "kvasir.jsonl~", "kvasir.jsonl.bak"):
        (data / name).write_bytes(b"\0\5")
    assert len(read(data)[0]) == 1


@pytest.mark.parametrize("text", ["", "image,question,answer\n", "image,image\na,b\n", '"image\n', "a;b\n1;2\n"])
def test_csv_without_a_usable_header_is_a_fault(data, text):
    (data / "train.csv").write_text(text)
    examples, (problem,) = read(data)
    assert examples == [] and ("header" in problem or "end of data" in problem)


# ---- what the check says of it ----


def test_the_check_lists_unread_fields_groups_and_examples_that_show_nothing(demo_folder, tmp_path, capsys):
    (tmp_path / "model").symlink_to(demo_folder / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images").symlink_to(demo_folder / "data/images")
    lines = {split: read_lines(demo_folder / f"data/{split}.jsonl") for split in ("train", "val", "test")}
    for split, part in lines.items():
        write(tmp_path / "data", split, *({**row, "organ": "colon", "group": None} for row in part))
    run(tmp_path, tmp_path / "out", "--check")
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out/check.json").read_text())
    total = sum(map(len, lines.values()))
    assert f"fields not read: organ ({total} examples)" in said
    assert found["unread"] == {"organ": total} and found["grouped"] == {"": total}
    assert "no example names a group" in said and "a patient may\nstand in two splits" in said
    assert found["splits"]["train"]["showing_nothing"] == 0
    for split, part in lines.items():
        write(tmp_path / "data", split, *({**row, "patient_id": row["image"], "group": None} for row in part))
    run(tmp_path, tmp_path / "out", "--check")
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out/check.json").read_text())
    assert f"groups: patient_id ({total} examples)" in said and "no example names a group" not in said
    assert found["grouped"] == {"patient_id": total}


def test_skip_bad_says_which_share_of_what_goes_and_stops_above_its_limit(demo_folder, tmp_path, capsys):
    (tmp_path / "model").symlink_to(demo_folder / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images").symlink_to(demo_folder / "data/images")
    for split in ("train", "val", "test"):
        part = read_lines(demo_folder / f"data/{split}.jsonl")
        part = [{**row, "question_type": "odd" if i < 10 else "even"} for i, row in enumerate(part)]
        if split == "train":  # two of the first ten: 20 % or less of every type, and a lesser share of the split
            part[0]["answer"] = part[1]["answer"] = ""
        write(tmp_path / "data", split, *part)
    odd = sum(
        row["question_type"] == "odd"
        for s in ("train", "val", "test")
        for row in read_lines(tmp_path / f"data/{s}.jsonl")
    )
    share = 100 * 2 / odd
    low, high = f"{int(share)}%", f"{int(share) + 1}%"
    text = refused(tmp_path, tmp_path / "out", "--check", "--skip-bad", low)
    assert f"--skip-bad would leave out 2 of {odd} odd" in text and f"allow it with --skip-bad {high}" in text
    assert json.loads((tmp_path / "out/check.json").read_text())["passed"] is False
    run(tmp_path, tmp_path / "out", "--check", "--skip-bad", high)
    found = json.loads((tmp_path / "out/check.json").read_text())
    assert found["passed"] and found["left_out"]["odd"] == [2, odd] and found["left_out"]["train"][0] == 2
    assert f"2 of {odd} odd ({share / 100:.1%})" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["10", "0.1", "%", "200%", "x%"])
def test_skip_bad_takes_a_percentage_alone(text, capsys):
    with pytest.raises(SystemExit):
        train_llava_med.parse_arguments(["--model", "m", "--data", "d", "--out", "o", "--skip-bad", text])
    assert "--skip-bad" in capsys.readouterr().err
    settings = ["--model", "m", "--data", "d", "--out", "o", "--skip-bad"]
    assert train_llava_med.parse_arguments(settings).skip_bad == 0.10
    assert train_llava_med.parse_arguments([*settings, "25%"]).skip_bad == 0.25
    assert train_llava_med.parse_arguments(settings[:-1]).skip_bad is None


def test_a_file_that_cannot_be_read_is_fatal_even_with_skip_bad(demo_folder, tmp_path):
    (tmp_path / "model").symlink_to(demo_folder / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images").symlink_to(demo_folder / "data/images")
    write(tmp_path / "data", "train", *read_lines(demo_folder / "data/train.jsonl"))
    text = (demo_folder / "data/test.jsonl").read_text()
    (tmp_path / "data/test.jsonl").write_bytes(text.encode("utf-16"))
    assert "1 faults" in refused(tmp_path, tmp_path / "out", "--check", "--skip-bad", "100%")
    (tmp_path / "data/test.jsonl").write_text(text[:-20])
    assert "1 faults" in refused(tmp_path, tmp_path / "out", "--check", "--skip-bad", "100%")
