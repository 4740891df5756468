"""Examples read without a script are those of the scripts, in every layout."""

import json

from helpers import load_demo

import train_llava_med
from report.examples import read


def test_lines_that_are_no_examples_are_problems_and_the_others_are_read(tmp_path):
    good = json.dumps({"image": "a.jpg", "question": "Is it red?", "answer": None})
    bad = ["{", "[1]", json.dumps({"conversations": 3})]
    turns = [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "no"}, "no turn"]
    bad.append(json.dumps({"conversations": turns}))
    (tmp_path / "train.jsonl").write_text("\n".join([*bad, good]))
    examples, problems = read(tmp_path)
    assert sorted(problem.where for problem in problems) == [f"train.jsonl:{i}" for i in range(1, 5)]
    assert [(e.where, e.question_type, e.answer, e.media) for e in examples] == [
        ("train.jsonl:5", "yes_no", None, ["a.jpg"])
    ]


def test_a_field_turns_of_plain_lines_is_neither_a_fault_nor_in_the_place_of_history(tmp_path):
    line = {"image": "a.jpg", "question": "Is it red?", "answer": "no"}
    lines = [line | {"turns": None}, line | {"turns": 2, "history": [["Where?", "left"]]}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    examples, problems = read(tmp_path)
    assert problems == [] and [list(e.history) for e in examples] == [[], [("Where?", "left")]]


def test_an_unsplit_file_is_divided_as_the_scripts_do(tmp_path):
    lines = [json.dumps({"img_id": f"i{i}", "question": "Is it red?", "answer": "no"}) for i in range(40)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    flags = ["--model", "m", "--data", str(tmp_path), "--out", "o"]
    theirs, _ = train_llava_med.read_examples(tmp_path, train_llava_med.parse_arguments(flags))
    assert len({e.split for e in theirs}) == 3
    assert [(e.id, e.split, e.media) for e in read(tmp_path)[0]] == [(e.id, e.split, e.media) for e in theirs]


def test_every_layout_is_read_as_its_script_reads_it(demo):
    folder, script, flags = demo
    mine = {example.where: example for example in read(folder / "data")[0]}
    theirs = load_demo(folder, script, *flags, *TARGET.get(script.__name__, [])).examples
    for example in theirs:
        other = mine[example.where]
        fields = ("split", "id", "group", "groups", "question", "answer", "question_type", "history")
        assert [getattr(other, name) for name in fields] == [getattr(example, name) for name in fields]
        assert set(example.shown) <= set(other.shown)  # a script may choose some of a clip's frames
    assert len(mine) - len(theirs) == sum(" turn " in where for where in mine)  # train_umbrella_mri leaves these out


TARGET = {"train_surg_video_vqa": ["--target", "short_answer"]}
