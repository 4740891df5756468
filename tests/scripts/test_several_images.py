"""Several images, images of later turns, none at all, and system texts, in the two scripts that take images."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from copies import of_every_kind, turns
from helpers import difference, gradients, load_demo, metrics_of, read_lines, read_tensors, refused, run, stop_in
from PIL import Image
from transformers import LlavaConfig, LlavaProcessor, ProcessorMixin, Qwen2VLProcessor

import common
import train_llava_med
import train_qwen2vl_sentinel
from inputs import own_forward, prompts, questions
from inputs import turns as read_turns
from inputs.building import build_trees
from report import blind, examples
from report.baselines import blind_answers
from runtime import card

BOTH = pytest.mark.parametrize("kind", ["llava", "qwen"])
SCRIPTS = {"llava": train_llava_med, "qwen": train_qwen2vl_sentinel}
SMALL = ["--questions-per-step", 4, "--max-answer-tokens", 2, "--lora-dropout", 0, "--lora-r", 4, "--lr", 3e-3]


@pytest.fixture(scope="module")
def folders(demo_folder, qwen_folder, tmp_path_factory):
    sources = {"llava": demo_folder, "qwen": qwen_folder}
    return {kind: of_every_kind(source, tmp_path_factory.mktemp(kind)) for kind, source in sources.items()}


@pytest.fixture(scope="module")
def loaded(folders):
    return {kind: load_demo(folders[kind], SCRIPTS[kind]) for kind in SCRIPTS}


def by_id(data) -> dict:
    return {example.id: example for example in data.examples if example.split == "train"}


# --- where each image is shown ---------------------------------------------------------------------------------


@BOTH
def test_an_example_has_the_images_up_to_its_turn_and_those_alike_share_a_prefix(loaded, kind):
    found = by_id(loaded[kind])
    a, b = found["first"].media
    shown = {name: [{a: "a", b: "b"}[file] for file in example.media] for name, example in found.items()}
    assert shown == {
        **{name: ["a", "b"] for name in ("marked", "first", "first too", "later.2")},
        **{"later.0": [], "later.1": ["a"], "one": ["b"], "none": [], "text.0": [], "text.1": [], "system": ["a"]},
    }
    assert found["first too"].question == "Is the first red?"
    assert found["later.2"].history == [("Good day?", "yes"), ("<image>Is there a polyp?", "no")]
    (shared,) = [tree.ids for tree in loaded[kind].trees if "first" in tree.ids]
    assert shared == ["first", "first too"]
    assert all(tree.prefix == [] for tree in loaded[kind].trees if not tree.media)


@BOTH
def test_the_prompt_is_that_of_transformers_own_processor(loaded, kind, monkeypatch):
    """Of each example: placeholders where the marks stand, as many as each image has, earlier turns, system texts."""
    data = loaded[kind]
    task, tokenizer = data.task, data.task.tokenizer
    monkeypatch.setattr(
        ProcessorMixin, "check_argument_for_proper_class", lambda *_: None
    )  # no videos, so no torchvision
    if kind == "llava":
        patch = LlavaConfig.from_pretrained(data.folder / "model").vision_config.patch_size
        processor = LlavaProcessor(task.processor, tokenizer, patch, "default", num_additional_image_tokens=1)
    else:
        processor = Qwen2VLProcessor(task.processor, tokenizer, video_processor=SimpleNamespace(merge_size=2))
    for example in by_id(data).values():
        (tree,), _ = build_trees([example], task)
        pictures = [Image.open(data.folder / "data" / name) for name in example.media]
        text = tokenizer.apply_chat_template(task.messages(example), tokenize=False, add_generation_prompt=True)
        settings = {"add_special_tokens": not text.startswith("<s>")}
        expected = processor(text=[text], images=pictures or None, **settings)["input_ids"][0]
        assert tree.prefix + common.answering_prompt(tree).branches[0][0] == list(expected)
        assert "with add_generation_prompt" in prompts.prove(task, example, tree)


WRITTEN = {
    "llava": {
        "marked": "<s>[INST] Old: <image>\n New: <image>\nIs it worse? [/INST]",
        "later.2": "<s>[INST] Good day? [/INST] yes</s>[INST] <image>\nIs there a polyp? [/INST] no</s>"
        "[INST] And <image>\n here? [/INST]",
        "none": "<s>[INST] Is a polyp an organ? [/INST]",
        "system": "<s>[INST] You are a doctor.\n\n<image>\nIs it so? [/INST]",
    },
    "qwen": {
        "marked": "<|im_start|>user\nQuestion type: open_ended\nQuestion: Old: (image) New: (image)Is it worse?",
        "later.1": "<|im_start|>user\nQuestion type: open_ended\nQuestion: Good day?<|im_end|>\n<|im_start|>assistant\n"
        "yes<|im_end|>\n<|im_start|>user\n(image)Question type: yes_no\nQuestion: Is there a polyp?",
        "system": "<|im_start|>system\nYou are a doctor.<|im_end|>\n<|im_start|>user\n(image)Question type: ",
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in WRITTEN for name in WRITTEN[kind]])
def test_images_and_texts_stand_where_they_were_written(loaded, kind, name):
    task, image = loaded[kind].task, "<|vision_start|><|image_pad|><|vision_end|>"
    text = common.conversation(task.tokenizer, task.messages(by_id(loaded[kind])[name]), "x")
    assert WRITTEN[kind][name] in text.replace(image, "(image)")


def test_a_template_that_puts_images_first_is_refused_where_marks_say_otherwise(folders, demo_folder, tmp_path, capsys):
    folder = shutil.copytree(folders["llava"], tmp_path / "demo")
    shutil.copy(demo_folder / "model/chat_template.jinja", folder / "model")
    refused(folder, tmp_path / "out", "--check")
    said = capsys.readouterr().out
    assert "the chat template does not write 'Old: ' behind 0 images; leave the marks of images out" in said
    check = json.loads((tmp_path / "out/check.json").read_text())
    assert {re.search(r"id (?:\w+/)?([\w.]+)", fault)[1] for fault in check["failures"]} == {"marked", "later.2"}


FAULTS = {
    "one mark for two": (
        {"images": ["a", "b"], "question": "Is <image> it?"},
        "1 <image> in what is asked",
    ),
    "marks for none": ({"images": [], "question": "Is <image> it?"}, "1 <image> in what is asked, but 0 images"),
    "no list": ({"images": "a", "question": "Is it?"}, "images must be a list of names, none empty: 'a'"),
    "no list either": (
        {"images": "a.jpg", "messages": [{"role": "user", "content": "<image>Is it?"}]},
        "images must be a list of names, none empty: 'a.jpg'",
    ),
    "an empty name": ({"images": ["a", ""], "question": "Is it?"}, "none empty: ['a', '']"),
    "another's mark": (
        {"images": ["a", "b"], "question": "Is <image 1> it?"},
        "<image 1> shows nothing; write <image> where an image is shown",
    ),
    "another's way": (
        {"conversations": turns("Picture 1: <img>a.jpg</img>\nIs it?", "no")},
        "<img> shows nothing",
    ),
    "an image for an answer": (
        {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": [{"type": "image"}]}]},
        "a part of the kind 'image' of the assistant",
    ),
    "nothing asked": ({"images": ["a"], "messages": [{"role": "system", "content": "Do."}]}, "there are []"),
    "a number": ({"images": [["a"]], "question": "Is it?"}, "each of images must be a text"),
    "nothing": ({"question": "Is it?"}, "no image; give one of image, image_path"),
    "nothing else": ({"question": "Is it?"}, 'or "images": [] where nothing is shown'),
    "marks alone": ({"images": ["a", "b"], "question": "<image> <image>"}, "the question is empty"),
    "another": ({"images": ["a", "b"], "image": "c", "question": "Is it?"}, "c beside images, which lists 2 others"),
    "no medium": ({"conversations": turns("<image>\nIs it?", "no")}, "no image; give one of"),
    "another name": (
        {"img": "a.jpg", "conversations": turns("Is it?", "no")},
        "names a medium",
    ),
    "too many": (
        {"image": "a", "conversations": turns("<image>", "a", "<image> b", "c")},
        "2 <image> in what is asked",
    ),
}


@BOTH
@pytest.mark.parametrize("name", FAULTS)
def test_images_that_nobody_could_place_are_a_fault(tmp_path, kind, name):
    entry, text = FAULTS[name]
    (tmp_path / "train.jsonl").write_text(json.dumps({"answer": "yes", **entry} if "question" in entry else entry))
    args = SCRIPTS[kind].parse_arguments(["--model", "m", "--data", str(tmp_path), "--out", "o"])
    found, problems = SCRIPTS[kind].read_examples(tmp_path, args)
    assert found == [] and all(text in problem.text for problem in problems) and problems


def said(*contents) -> list[dict]:
    return [{"role": ["user", "assistant"][i % 2], "content": content} for i, content in enumerate(contents)]


PUBLISHED = {  # (what is shown, what is asked) of each answer
    "LLaVA's mixtures": (
        {"id": "7", "conversations": turns("Good day?", "yes", "Is it?", "no")},
        [([], "Good day?"), ([], "Is it?")],
    ),
    "LLaVA-Interleave": (
        {"image": ["a.jpg", "b.jpg"], "conversations": turns("<image>\n<image>\nIs it?", "no")},
        [(["a.jpg", "b.jpg"], "Is it?")],
    ),
    "Qwen-VL": (
        {"images": ["a.jpg", "b.jpg"], "conversations": turns("<image>\nIs it?", "no", "<image>\nNow?", "yes")},
        [(["a.jpg"], "Is it?"), (["a.jpg", "b.jpg"], "<image>Now?")],
    ),
    "ms-swift": (
        {"images": ["a.jpg", "b.jpg"], "messages": said("<image><image>Is it?", "no")},
        [(["a.jpg", "b.jpg"], "Is it?")],
    ),
    "transformers": (
        {"messages": said([{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Is it?"}], "no")},
        [(["a.jpg"], "Is it?")],
    ),
    "Hugging Face's exports": (
        {"images": [{"bytes": None, "path": "a.jpg"}], "conversations": turns("See <image> now", "no")},
        [(["a.jpg"], "See  now")],
    ),
}


@BOTH
@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_as_they_are_published_are_read(tmp_path, kind, name):
    entry, expected = PUBLISHED[name]
    (tmp_path / "train.jsonl").write_text(json.dumps(entry))
    args = SCRIPTS[kind].parse_arguments(["--model", "m", "--data", str(tmp_path), "--out", "o"])
    found, problems = SCRIPTS[kind].read_examples(tmp_path, args)
    assert problems == [] and [(example.media, example.question) for example in found] == expected
    assert not any(example.unread for example in found)
    elsewhere, problems = examples.read(tmp_path)
    assert problems == [] and [example.media for example in elsewhere] == [media for media, _ in expected]
    assert [example.group for example in elsewhere] == [example.group for example in found]


def test_messages_that_say_not_where_show_their_medium_first():
    for entry in ({"image": "v"}, {"images": ["v"]}, {"video": "v"}, {"videos": ["v"]}):
        kind = next(iter(entry)).rstrip("s")
        found = read_turns.messages({**entry, "messages": said("Is it?", "no")})
        assert (found[kind], found["conversations"][0]["value"]) == ("v", f"<{kind}>Is it?")


@BOTH
def test_texts_alone_of_two_splits_may_have_the_same_id(tmp_path, kind):
    """They are of no group: numbers from 0 in each file, as mixtures have them, name none."""
    rows = [{"id": "0", "images": [], "question": "Is it?", "answer": "no"}]
    rows.append({"id": "1", "conversations": turns("Good day?", "yes", "Is it?", "no")})
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = SCRIPTS[kind].parse_arguments(["--model", "m", "--data", str(tmp_path), "--out", "o"])
    found, problems = SCRIPTS[kind].read_examples(tmp_path, args)
    assert problems == []
    groups = {split: {example.group for example in found if example.split == split} for split in ("train", "test")}
    assert groups == {split: {f"{split}.jsonl:1", f"{split}.jsonl:2"} for split in groups}  # a conversation has one


def test_a_mark_changes_neither_type_nor_options():
    assert questions.question_type("<image> <image>\nIs there a polyp?") == "yes_no"
    assert questions.answer_candidates("Which one? (a) <image> (b) <image>", "mcq") is None


def test_without_a_script_they_are_the_same_examples(folders, loaded):
    mine = {example.where: example for example in examples.read(folders["llava"] / "data")[0]}
    for example in loaded["llava"].examples:
        other = mine.pop(example.where)
        assert (other.id, other.split, other.group, other.media) == (
            *(example.id.rpartition("/")[2], example.split, example.group, example.media),
        )
    assert mine == {}


# --- training and answering ------------------------------------------------------------------------------------


def model_of(data, script):
    model = script.load_model(data.folder / "model", data.task, torch.float32)
    torch.manual_seed(0)
    for layer in common.lora_layers(model.vlm).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)  # at zero, A would have no gradient
    return model


def packed(data, trees, size=4096):
    args = SimpleNamespace(media_root=str(data.folder / "data"))

    def batches(trees, task):
        return [{**batch, **data.read_media(batch["prompts"])} for batch in common.pack(trees, size)]

    return SimpleNamespace(args=args, packed=batches, device=torch.device("cpu"))


@BOTH
def test_loss_and_gradients_are_those_of_transformers_own_forward_and_of_examples_alone(loaded, kind):
    data, examples = loaded[kind], by_id(loaded[kind])
    model = model_of(data, SCRIPTS[kind]).eval()
    run = packed(data, data.trees)
    for tree in data.trees:
        ours, own, _ = own_forward.losses(model, tree, data.task, examples[tree.ids[0]], run)
        assert ours == pytest.approx(own, rel=1e-5), tree.ids
    loss, grads = own_forward.packing(model, data.trees, data.task, run)
    assert loss < 1e-5 and grads < 1e-3
    unshared = SimpleNamespace(**{**vars(data.args), "share_prefix": False})
    task = SCRIPTS[kind].__dict__[{"llava": "LlavaTask", "qwen": "QwenTask"}[kind]](data.folder / "model", unshared)
    task.measured = data.task.measured
    alone, _ = build_trees(list(examples.values()), task)
    assert len(alone) == len(examples) > len(data.trees)
    sums = [gradients(model, sum(model(batch)[0] for batch in run.packed(t, task))) for t in (data.trees, alone)]
    assert difference(*sums) < 1e-3


@BOTH
def test_it_trains_answers_and_resumes(folders, tmp_path, monkeypatch, kind, capsys):
    script, folder = SCRIPTS[kind], folders[kind]
    flags = [*SMALL, "--epochs", 2, "--save-every", 1]
    run(folder, tmp_path / "run", *flags, "--report", script=script)
    said = capsys.readouterr().out
    assert "train: 11 questions, 4 showing nothing, 2 files" in said
    records = read_lines(tmp_path / "run/predictions.jsonl")
    assert [len(record["media"]) for record in records] == [2, 2, 2, 0, 1, 2, 1, 0, 0, 0, 1]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="85"):
        stop_in(patch, 2, script)
        run(folder, tmp_path / "again", *flags, script=script)
    run(folder, tmp_path / "again", *flags, script=script)
    assert metrics_of(tmp_path / "again") == metrics_of(tmp_path / "run")
    mine, theirs = (read_tensors(tmp_path / name / "adapter") for name in ("again", "run"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@BOTH
def test_blind_runs_exchange_images_of_examples_that_show_as_many(loaded, kind):
    asked = [example for example in loaded[kind].examples if example.split != "train"]
    exchanged = blind.exchange(asked, loaded[kind].task)
    assert [len(e.media) for e in exchanged] == [len(e.media) for e in asked]
    shown = [(a.media, b.media) for a, b in zip(asked, exchanged, strict=True) if a.media]
    assert shown and all(not set(mine) & set(other) for mine, other in shown)
    assert build_trees(exchanged, loaded[kind].task)[1] == {}


def test_a_blind_run_shows_no_image_again_in_another_list(loaded):
    """In another order, say, where no field names a group."""
    a, b, c, d = "abcd"
    lists = [[a, b], [b, a], [b, c], [c, d], [d, c]]
    (first, *_) = loaded["llava"].examples
    asked = [replace(first, id=str(i), group=names[0], media=names) for i, names in enumerate(lists)]
    exchanged = blind.exchange(asked, loaded["llava"].task)
    assert [example.id for example in exchanged] == [example.id for example in asked if example.media != [b, c]]
    assert all(not set(example.media) & set(asked[int(example.id)].media) for example in exchanged)


def test_blind_baselines_read_no_marks(loaded):
    (first, *_) = loaded["llava"].examples
    asked = [replace(first, question="Is it?", history=[("Well?", "yes")], question_type="yes_no")]
    train = [replace(asked[0], question="Is <image> it?", history=[("<image>Well?", "yes")], answer="no")]
    train += [replace(asked[0], question=f"Was {word}?", answer="yes") for word in ("this", "that")]
    (answers,) = blind_answers(train, asked)
    assert (answers["type"], answers["question"], answers["nearest"]) == ("yes", "no", "no")


# --- system texts ----------------------------------------------------------------------------------------------


@BOTH
def test_a_checkpoint_is_bound_to_its_system_text_and_what_is_exported_says_it(folders, tmp_path, capsys, kind):
    folder, script = folders[kind], SCRIPTS[kind]
    flags = [*SMALL, "--max-steps", 1, "--system", "Say what is seen."]
    run(folder, tmp_path / "run", *flags, script=script)
    other = [*flags[:-1], "Be brief."]
    assert "system was Say what is seen., is Be brief." in refused(folder, tmp_path / "run", *other, script=script)
    capsys.readouterr()
    run(folder, tmp_path / "run", *SMALL, "--eval-only", script=script)
    assert "system Say what is seen. (from " in capsys.readouterr().out
    snippet = '{"role": "system", "content": [{"type": "text", "text": "Say what is seen."}]}'
    assert snippet in (tmp_path / "run/adapter/README.md").read_text()
    with_flag = load_demo(folder, script, "--system", "Say what is seen.")
    asked = {name: with_flag.task.messages(example)[0] for name, example in by_id(with_flag).items()}
    assert asked["none"]["content"][0]["text"] == "Say what is seen."
    assert asked["system"]["content"][0]["text"] == "You are a doctor."  # an example's own
    assert snippet in card.messages(with_flag.task)


@BOTH
def test_a_system_text_that_the_template_does_not_write_is_a_fault(folders, tmp_path, capsys, kind):
    folder = shutil.copytree(folders[kind], tmp_path / "demo")
    image = {"llava": "<image>", "qwen": "<|vision_start|><|image_pad|><|vision_end|>"}[kind]
    parts = "{% for c in m.content %}{{ '" + image + "' if c.type == 'image' else c.text }}{% endfor %}"
    for template, text in (
        ("{% for m in messages if m.role != 'system' %}", "does not write 'You are a doctor.' as a system text"),
        ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}", "refuses this"),
    ):
        written = template + "{{ m.role }}: " + parts + "\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
        (folder / "model/chat_template.jinja").write_text(written)
        system = [] if kind == "llava" else ["--system", ""]
        refused(folder, tmp_path / "out", "--check", *system, script=SCRIPTS[kind])
        said = capsys.readouterr().out
        assert "fault: train.jsonl:8 (id system): the chat template" in said or "fault (3 such" in said
        assert text in said


@BOTH
@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("<ANS>", "contains '<ANS>', which the model would read as a token"),
        ("<image>", "<image> shows nothing in 'Mind <image>.'"),
    ],
)
def test_a_system_text_may_hold_no_token(folders, tmp_path, capsys, kind, token, text):
    assert refused(folders[kind], tmp_path, "--check", "--system", f"Mind {token}.", script=SCRIPTS[kind])
    assert text in capsys.readouterr().out or (kind == "llava" and token == "<image>")


@BOTH
def test_an_answer_may_hold_no_mark(loaded, kind):
    task, example = loaded[kind].task, by_id(loaded[kind])["one"]
    for wrong in (replace(example, answer="<image>"), replace(example, history=[("Well?", "<image>")])):
        (fault,) = build_trees([wrong], task)[1].values()
        assert "<image>" in fault


@BOTH
def test_the_card_asks_with_any_system_text_as_it_is(folders, kind):
    text = """Say "yes" or 'no': {question}, {}, {{x}}, \\ \\n \n é 😀 ```{"type": "image"}"""
    data = load_demo(folders[kind], SCRIPTS[kind], "--system", text)
    asked = SimpleNamespace(question="Is it?", question_type="yes_no", history=[], system="", media=["image"])
    names = {"question": asked.question, "question_type": asked.question_type, "image": "a.jpg"}
    found = eval(card.messages(data.task), names)
    expected = data.task.messages(asked)
    expected[1]["content"][0]["image"] = "a.jpg"
    assert found == expected and found[0]["content"][0]["text"] == text
