"""UMBRELLA's conversations, and plain questions about volumes, as examples."""

import json
import shutil

import pytest
from brain_scans import SMALL, conversation, edit, failures, load_demo, refused, run
from transformers import AutoTokenizer

from common import IGNORE


@pytest.fixture(scope="module")
def data(mri_folder):
    return load_demo(mri_folder)


@pytest.fixture
def copy(mri_folder, tmp_path):
    return shutil.copytree(mri_folder, tmp_path / "demo")


def texts_of(entry: dict) -> str:
    """A conversation in the template of the published checkpoint, one <image> for each volume."""
    rendered = ""
    for turn in entry["conversations"]:
        images = "<image>" * sum(part["type"] == "image" for part in turn["content"])
        said = "".join("\n" + part["text"] for part in turn["content"] if part["type"] == "text")
        rendered += f"<|im_start|>{turn['role']} {images}{said}<|im_end|>"
    before, _, answer = rendered.rpartition("assistant \n")
    return f"{before}assistant\n{answer}"  # it is asked so (add_generation_prompt), and writes a space into answers


def test_each_image_expands_to_its_own_volume_s_patches_and_only_the_answer_is_supervised(mri_folder, data):
    """IDs equal those of the template's text with each <image> repeated; the role's header is never learned."""
    tokenizer = AutoTokenizer.from_pretrained(mri_folder / "model")
    tokens, seen = {"T1": 64, "rsfMRI": 54}, set()
    for tree in data.trees:
        for name, (input_ids, labels) in zip(tree.ids, tree.branches, strict=True):
            entry = json.loads((mri_folder / "data" / f"{name}.json").read_text())
            text = texts_of(entry)
            for image in entry["images"]:
                text = text.replace("<image>", "\0" * tokens[image["modality"]], 1)
            assert tree.prefix + input_ids == tokenizer.encode(text.replace("\0", "<image>"))
            answer = entry["conversations"][-1]["content"][0]["text"]
            assert tokenizer.decode([label for label in labels if label != IGNORE]) == answer + "<|im_end|>"
            assert tokenizer.decode(tree.prefix + input_ids).endswith(f"<|im_start|>assistant\n{answer}<|im_end|>")
            seen.add((entry["task_type"], len(entry["images"]), len(entry["conversations"])))
    assert {("comparison", 2, 4), ("active_hemisphere", 1, 2)} < seen


def test_questions_of_one_volume_share_its_reading(data):
    shared = [tree for tree in data.trees if len(tree.ids) > 1]
    assert shared
    for tree in shared:
        assert len({name.split("/")[1].split("_")[0] for name in tree.ids}) == 1  # of one subject


def test_val_and_test_are_asked_for_the_last_answer_whatever_is_supervised(mri_folder):
    last, every = (load_demo(mri_folder, "--supervise", s) for s in ("last", "all"))
    by_split = lambda data: {s: [e.id for e in data.examples if e.split == s] for s in ("train", "val", "test")}  # noqa: E731
    a, b = by_split(last), by_split(every)
    assert (a["val"], a["test"]) == (b["val"], b["test"]) and set(a["train"]) < set(b["train"])
    added = set(b["train"]) - set(a["train"])
    assert all(name.endswith(" turn 1") for name in added)
    assert {example.question_type for example in every.examples if example.id in added} == {"comparison turn 1"}


def test_a_greeting_before_anything_is_shown_is_not_supervised(copy):
    path = conversation(copy, "train", "lesion_side")
    said = [("user", "Hello."), ("assistant", "How can I help?")]
    greeting = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    edit(path, conversations=[*greeting, *json.loads(path.read_text())["conversations"]])
    ids = [example.id for example in load_demo(copy, "--supervise", "all").examples]
    assert f"train/{path.stem}" in ids and f"train/{path.stem} turn 1" not in ids


def test_plain_questions_equal_umbrella_s_conversations(mri_folder, data, tmp_path):
    """A question a line with its volume or volumes, or the conversation itself, gives the same tokens and media."""
    shutil.copytree(mri_folder / "data/volumes", tmp_path / "data/volumes")
    shutil.copytree(mri_folder / "model", tmp_path / "model")
    lines = []
    for path in sorted((mri_folder / "data/train").glob("*.json")):
        entry = json.loads(path.read_text())
        if len(entry["conversations"]) == 2:
            user, assistant = entry["conversations"]
            row = {"question": user["content"][-1]["text"], "answer": assistant["content"][0]["text"]}
            row |= {"question_type": entry["task_type"], "answer_candidates": entry["answer_candidates"]}
            row |= {"group": entry["subject_ids"][0]}
            (image,) = entry["images"]
            where = {"volume": image["path"], "modality": image["modality"]} if len(lines) % 2 else {"images": [image]}
            entry = {**row, **where}
        lines.append({"id": f"train/{path.stem}", **entry})
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "data/train").mkdir()  # a folder that holds volumes, say, is no layout of its own
    found = load_demo(tmp_path)
    assert [(t.prefix, t.branches, t.ids, t.media) for t in found.trees] == [
        (t.prefix, t.branches, t.ids, t.media) for t in data.trees
    ]
    known = {example.id: example for example in data.examples}
    for example in found.examples:
        assert (example.candidates, example.label, example.group) == (
            known[example.id].candidates,
            known[example.id].label,
            known[example.id].group,
        )


def test_every_fault_is_named_with_file_and_remedy(copy, tmp_path):
    files = [conversation(copy, "train", "lesion_side", i) for i in range(26)]
    base = [json.loads(path.read_text()) for path in files]
    user, assistant = base[0]["conversations"]
    other = {"path": "volumes/other.nii.gz", "modality": "T1"}
    image, text = {"type": "image"}, {"type": "text", "text": "Where?"}
    bare = [{"role": "user", "content": [image, text]}, assistant]
    faults = {
        "nobody": ({"subject_ids": []}, "no subject_ids and no group"),
        "listed": ({"subject_ids": ..., "group": ["a", "b"]}, "group must be one name"),
        "number": ({"conversations": 3}, "conversations must be a list of turns: 3"),
        "null": ({"conversations": [{**user, "content": 7}, assistant]}, "the conversation shows []"),
        "list": ({"task_type": ["a"]}, "question_type must be a text, not the list"),
        "half": ({"conversations": [user, {**assistant, "content": "\ud800"}]}, "half a character"),
        "kind": (
            {
                "conversations": [
                    {"role": "user", "content": [{"type": "image", "modality": "rsfMRI"}, text]},
                    assistant,
                ]
            },
            "but images names",
        ),
        "spelt": ({"conversation": base[0]["conversations"], "conversations": ...}, "unknown field 'conversation'"),
        "roles": ({"conversations": [assistant, user]}, "turns must alternate user, assistant"),
        "open": ({"conversations": [user, assistant, user]}, "turns must alternate user, assistant"),
        "silent": ({"conversations": [user, {**assistant, "content": [{"type": "text", "text": " "}]}]}, "text is emp"),
        "kinds": ({"conversations": [{"role": "user", "content": [{"type": "audio"}]}, assistant]}, "holds ['audio']"),
        "paths": ({"images": [other]}, "but images names [('volumes/other.nii.gz', 'T1')]"),
        "count": ({"images": base[0]["images"] * 2}, "the conversation shows"),
        "blind": (
            {"images": [], "conversations": [{"role": "user", "content": [text]}, assistant]},
            "nothing is shown",
        ),
        "token": (
            {"conversations": [{"role": "user", "content": [image, {**text, "text": "an <image> more"}]}, assistant]},
            "the text contains '<image>', which the model would read as a token",
        ),
        "unnamed": (
            {"images": [{"path": base[16]["images"][0]["path"]}], "conversations": bare},
            "a volume needs a path and a modality: 'volumes/",
        ),
        "unknown": (
            {"images": [{**base[17]["images"][0], "modality": "PET"}], "conversations": bare},
            "modality 'PET' is not declared, only T1, rsfMRI; declare its size and patch with --modality PET:",
        ),
        "wrong": (
            {"images": [{**base[18]["images"][0], "modality": "rsfMRI"}], "conversations": bare},
            "(32, 32, 32), rsfMRI (24, 24, 24, 4)",
        ),
        "label": ({"answer_candidates": ["big", "small"]}, "does not name one of big, small in words that"),
        "named": ({"metadata": {"label": "up"}}, "metadata's label 'up' is none of left, right, none; correct it or"),
        "labels": ({"answer_candidates": ["left", "Left "]}, "labels must be at least two, and differ"),
        "gone": (
            {"images": [other], "conversations": [{"role": "user", "content": [image, text]}, assistant]},
            "volumes/other.nii.gz is missing",
        ),
    }
    for (name, (change, _)), path in zip(faults.items(), files, strict=False):
        edit(path, **{"task_id": name, "metadata": ..., **change})
    files[len(faults)].write_text("[1, 2]")
    files[len(faults) + 1].write_text("{")
    assert f"{len(faults) + 2} faults" in refused(copy, tmp_path / "out", *SMALL, "--check")
    listed = failures(tmp_path / "out")
    for (name, (_, why)), path in zip(faults.items(), files, strict=False):
        (line,) = [line for line in listed if f"train/{path.name}" in line]
        assert why in line, (name, line)
    run(copy, tmp_path / "out", *SMALL, "--check", "--skip-bad", "50%")
    skipped = json.loads((tmp_path / "out/check.json").read_text())["skipped"]
    assert skipped == sorted(f"train/{path.name}" for path in files[: len(faults) + 2])


def test_two_layouts_in_one_folder_and_empty_folders_are_refused(copy, tmp_path):
    (copy / "data/train.jsonl").write_text("{}\n")
    assert "train.jsonl beside UMBRELLA's folders" in refused(copy, tmp_path / "out", *SMALL, "--check")
    (copy / "data/train.jsonl").unlink()
    for path in (copy / "data/validation").iterdir():
        path.unlink()
    assert "1 faults" in refused(copy, tmp_path / "out", *SMALL, "--check")
    found = failures(tmp_path / "out")
    assert found == ["validation: the folder holds no .json files; complete it, or remove it"]
    (copy / "data/val").mkdir()
    assert "one folder a split, not " in refused(copy, tmp_path / "out", *SMALL, "--check")


@pytest.mark.parametrize("name", ["val", "dev", "eval", "valid"])
def test_a_folder_of_validation_goes_by_its_usual_names(copy, data, name):
    (copy / "data/validation").rename(copy / f"data/{name}")
    found = load_demo(copy)
    assert [example.split for example in found.examples] == [example.split for example in data.examples]


def test_files_as_umbrella_s_repository_writes_them_are_read(mri_folder, data, tmp_path):
    """{split}_conversations.jsonl, scans by absolute paths under a base directory, and T1 as sMRI."""
    shutil.copytree(mri_folder / "model", tmp_path / "model")
    (tmp_path / "data").mkdir()
    base = mri_folder / "data"
    for split in ("train", "validation", "test"):
        text = ""
        for path in sorted((base / split).glob("*.json")):
            entry = json.loads(path.read_text())
            for image in (
                part for turn in entry["conversations"] for part in turn["content"] if part["type"] == "image"
            ):
                image.pop("image_path", None)
            for image in entry["images"]:
                image["path"] = str(base / image["path"])
            text += json.dumps({"id": f"{split}/{path.stem}", **entry}) + "\n"
        text = text.replace('"T1"', '"sMRI"').replace('"rsfMRI"', '"fMRI"')
        (tmp_path / f"data/{split}_conversations.jsonl").write_text(text)
    found = load_demo(tmp_path, "--media-root", base)
    assert [vars(tree) for tree in found.trees] == [vars(tree) for tree in data.trees]
    text = (tmp_path / "data/train_conversations.jsonl").read_text().replace('"sMRI"', '"sMRI2"')
    (tmp_path / "data/train_conversations.jsonl").write_text(text)
    refused(tmp_path, tmp_path / "out", *SMALL, "--check", "--media-root", base)
    assert "modality 'sMRI2' is not declared" in failures(tmp_path / "out")[0]


def test_a_subject_in_two_splits_is_refused_by_name_also_as_the_second_of_two(copy, tmp_path):
    train = json.loads(conversation(copy, "train", "lesion_side").read_text())["subject_ids"][0]
    path = conversation(copy, "test", "comparison")
    mine = json.loads(path.read_text())["subject_ids"]
    edit(path, subject_ids=[*mine, train])
    assert "faults" in refused(copy, tmp_path / "out", *SMALL, "--check")
    found = failures(tmp_path / "out")
    assert any(f"test/{path.name}" in f and f"group {train} of test is also in train" in f for f in found)


def test_a_modality_that_training_never_shows_is_refused_in_test(copy, tmp_path):
    for path in (copy / "data/train").glob("*active_hemisphere*"):
        path.unlink()
    assert "faults" in refused(copy, tmp_path / "out", *SMALL, "--check")
    found = failures(tmp_path / "out")
    assert all("training has not shown rsfMRI, whose embedding is as it was drawn" in f for f in found)
    assert {f.partition("/")[0] for f in found} == {"validation", "test"}
    # nor is it answered later, by a checkpoint or a saved model that has not learned it
    complete = copy.with_name("complete")
    shutil.copytree(copy, complete)
    for path in (copy / "data").glob("*/*active_hemisphere*"):
        path.unlink()
    run(copy, tmp_path / "out", *SMALL, "--max-steps", 1)
    flags = ["--resume", tmp_path / "out/checkpoints/step-00000001", "--eval-only"]
    assert "faults" in refused(complete, tmp_path / "eval", *flags)
    shutil.rmtree(complete / "model")
    shutil.copytree(tmp_path / "out/model", complete / "model")
    assert "faults" in refused(complete, tmp_path / "more", "--max-steps", 1)
