"""train_qwen2vl_sentinel on a tiny Qwen2-VL in the real format: what is its own beside the shared loop.

Image sizes are mixed in every test: a wide frame stands for 80 tokens, the others for 64.
"""

import json
import random
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import difference, gradients, load_demo, metrics_of, read_lines, read_tensors, refused, stop_in
from helpers import run as run_script
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

import common
import train_qwen2vl_sentinel as script
from common import IGNORE, Prompt, answering_prompt, pack
from inputs.building import build_trees
from inputs.task import Example
from report import scoring
from runtime import EXIT_STOPPED, Run, models
from runtime.signals import StopSignal

run = partial(run_script, script=script)
refused = partial(refused, script=script)
SMALL = ["--limit", 24, "--questions-per-step", 16, "--max-answer-tokens", 4]


@pytest.fixture(scope="module")
def data(qwen_folder):
    return load_demo(qwen_folder, script)


def mixed_trees(data, count: int, questions: int) -> list[Prompt]:
    """Trees of a few questions each, in turn of a wide and of a square image."""
    by_size = {}
    for tree in data.trees:
        by_size.setdefault(data.task.measured[tree.media[0]]["size"], []).append(tree)
    assert len(by_size) == 2
    pairs = zip(*by_size.values(), strict=False)
    return [tree.part(range(questions)) for pair in pairs for tree in pair][:count]


def load(data, **settings) -> script.Qwen2VL:
    args = SimpleNamespace(**{**vars(data.args), **settings})
    vlm = Qwen2VLForConditionalGeneration.from_pretrained(data.folder / "model")
    script.choose_trained(vlm, args)
    torch.manual_seed(0)
    for layer in common.lora_layers(vlm).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)  # at zero, A would have no gradient
    return script.Qwen2VL(vlm)


# --- tokens, images, positions ---------------------------------------------------------------------------------


def test_prompt_and_placeholders_are_those_of_the_checkpoint_s_own_template(data):
    """IDs equal those of the rendered text with each placeholder repeated, as transformers' processor has it."""
    examples = {example.id: example for example in data.examples}
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "model")
    for tree in mixed_trees(data, 4, 2):
        features = int(data.read_media([tree])["image_grid_thw"].prod()) // 4
        for name, (input_ids, labels) in zip(tree.ids, tree.branches, strict=True):
            example = examples[name]
            text = (
                f"<|im_start|>system\n{script.SYSTEM}<|im_end|>\n"
                f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * features}<|vision_end|>"
                f"Question type: {example.question_type}\nQuestion: {example.question}<|im_end|>\n"
                f"<|im_start|>assistant\n"
            )
            expected = tokenizer.encode(text)
            asked = [token for token, label in zip(input_ids, labels, strict=True) if label == IGNORE]
            assert tree.prefix + asked == expected
            assert tokenizer.decode([label for label in labels if label != IGNORE]) == example.answer + "<|im_end|>"


def keeping(data, **more) -> script.QwenTask:
    """The task with --sentinels keep."""
    args = SimpleNamespace(**{**vars(data.args), "sentinels": "keep", "decode": "greedy", **more})
    task = script.QwenTask(data.folder / "model", args)
    task.measured = data.task.measured
    return task


def test_kept_sentinels_stand_in_the_input_and_are_not_supervised(data):
    task, example = keeping(data), data.examples[0]
    _, input_ids, labels = task.encode(example, example.answer)
    assert task.tokenizer.decode(input_ids).endswith(f"assistant\n<ANS>{example.answer}</ANS><|im_end|>")
    assert task.tokenizer.decode([label for label in labels if label != IGNORE]) == example.answer + "<|im_end|>"
    assert build_trees([example], task)[1] == {}


def test_positions_are_those_of_a_question_alone(data):
    """Prefix from get_rope_index, branches from its largest position on: as the model has them for one question."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(data.folder / "model").model
    for tree in mixed_trees(data, 4, 3):
        grid = data.read_media([tree])["image_grid_thw"]
        for i in range(3):
            (batch,) = pack([tree.part([i])], 4096)
            is_image = (batch["input_ids"] == data.task.image_id).int()
            expected, _ = model.get_rope_index(batch["input_ids"], mm_token_type_ids=is_image, image_grid_thw=grid)
            assert torch.equal(batch["position_ids"], expected)


@pytest.mark.parametrize("size", [(224, 224), (280, 224), (30, 900), (1350, 1080), (1, 150), (333, 57)])
def test_placeholders_are_counted_as_the_image_processor_cuts_the_image(data, size):
    from PIL import Image

    read = data.task.processor([Image.new("RGB", size)], return_tensors="pt")
    assert [list(data.task.images.grid(size))] == read["image_grid_thw"].tolist()
    assert data.task.images.tokens(size) == int(read["image_grid_thw"].prod()) // 4


def test_an_image_that_has_changed_since_the_check_is_refused(data, monkeypatch):
    tree = data.trees[0]
    monkeypatch.setitem(data.task.measured, tree.media[0], {"size": (999, 333)})
    with pytest.raises(ValueError, match=f"{tree.media[0]} has another size than when it was checked"):
        data.read_media([tree])


# --- packing is exact ------------------------------------------------------------------------------------------


def packed(model, data, trees, **changed):
    (batch,) = pack(trees, 4096)
    return gradients(model, model({**batch, **data.read_media(batch["prompts"]), **changed})[0])


def separate(model, data, trees):
    """Each question alone through transformers' forward: no mask, no positions, nothing of ours."""
    total = 0
    for tree in trees:
        media = data.read_media([tree])
        for input_ids, labels in tree.branches:
            ids = torch.tensor([tree.prefix + input_ids])
            model.vlm.model.rope_deltas = None
            output = model.vlm(input_ids=ids, mm_token_type_ids=(ids == data.task.image_id).int(), **media)
            log_probs = output.logits[0].log_softmax(-1)
            for i, label in enumerate(labels):
                if label != IGNORE:
                    total = total - log_probs[len(tree.prefix) + i - 1, label]
    return gradients(model, total)


@pytest.mark.parametrize("settings", [{"tune": "full"}, {"tune": "lora"}, {"tune": "lora", "lora_vision": True}])
def test_shared_prefixes_of_mixed_image_sizes_equal_separate_questions(data, settings):
    model = load(data, **settings)
    trees = mixed_trees(data, 4, 3)
    found = packed(model, data, trees)
    assert any("visual" in name for name in found) == (settings != {"tune": "lora"})
    assert difference(found, separate(model, data, trees)) < 1e-5


def test_wrong_positions_or_image_sizes_are_caught(data):
    model = load(data, tune="lora")
    trees = mixed_trees(data, 2, 3)
    right = packed(model, data, trees)
    (batch,) = pack(trees, 4096)
    straight = torch.cat([torch.arange(len(tree)) for tree in batch["prompts"]])[None]
    assert difference(packed(model, data, trees, position_ids=straight.expand(3, 1, -1)), right) > 1e-3
    turned = data.read_media(batch["prompts"])["image_grid_thw"][:, [0, 2, 1]]
    assert difference(packed(model, data, trees, image_grid_thw=turned), right) > 1e-3


def test_qwen2_5_vl_packs_as_exactly(data, tmp_path):
    config = AutoConfig.from_pretrained(data.folder / "model")
    text = {name: value for name, value in config.text_config.to_dict().items() if name != "model_type"}
    vision = {"hidden_size": 64, "out_hidden_size": text["hidden_size"], "num_heads": 2, "depth": 2}
    vision |= {"intermediate_size": 96, "fullatt_block_indexes": [1], "window_size": 112}
    tokens = {name: getattr(config, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    torch.manual_seed(0)
    vlm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    shutil.copytree(data.folder / "model", tmp_path / "model", ignore=lambda *_: ["model.safetensors"])
    vlm.save_pretrained(tmp_path / "model")
    task = script.QwenTask(tmp_path / "model", SimpleNamespace(**{**vars(data.args), "tune": "full"}))
    task.measured = data.task.measured
    trees, faults = build_trees([example for example in data.examples if example.split == "train"], task)
    assert task.faults == [] and faults == {}
    model = script.load_model(tmp_path / "model", task, torch.float32)
    read_media = partial(task.read_media, data.folder / "data")
    data = SimpleNamespace(task=task, trees=trees, read_media=read_media)
    trees = mixed_trees(data, 2, 2)
    assert difference(packed(model, data, trees), separate(model, data, trees)) < 1e-5


# --- answers ---------------------------------------------------------------------------------------------------


def asked(data, trees, decode: str) -> tuple:
    model = load(data, tune="lora").eval()
    args = SimpleNamespace(**{**vars(data.args), "decode": decode, "max_answer_tokens": 12})
    run = Run(args, Path("never written"), torch.device("cpu"), torch.float32, StopSignal())
    return model, common.answer(model, trees, {example.id: example for example in data.examples}, data.task, run)


@torch.no_grad()
def test_greedy_answers_are_what_generate_gives(data):
    trees = mixed_trees(data, 12, 6)
    model, found = asked(data, trees, "greedy")
    for tree in map(answering_prompt, trees):
        media = data.read_media([tree])
        for name, (ids, _) in zip(tree.ids, tree.branches, strict=True):
            input_ids = torch.tensor([tree.prefix + ids])
            output = model.vlm.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                mm_token_type_ids=(input_ids == data.task.image_id).int(),
                max_new_tokens=12,
                do_sample=False,
                **media,
            )
            expected = data.task.tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True).strip()
            assert found[name]["prediction"] == expected
    assert len(found) == 72


def test_structured_answers_are_always_one_of_the_allowed(data):
    """Of a random model, whose greedy answers never are."""
    trees, examples = mixed_trees(data, 12, 7), {example.id: example for example in data.examples}
    structured = [name for tree in trees for name in tree.ids if examples[name].candidates]
    assert {examples[name].question_type for name in structured} == {"yes_no", "color", "mcq"}
    for decode in ("constrained", "ranked"):
        _, found = asked(data, trees, decode)
        assert len(found) == 84
        assert all(found[name]["prediction"] in examples[name].candidates for name in structured)
    _, greedy = asked(data, trees, "greedy")
    assert not any(greedy[name]["prediction"] in examples[name].candidates for name in structured)


@torch.no_grad()
def test_ranking_finds_the_argmax_over_the_model_s_own_sequence_probabilities(data):
    trees, examples = mixed_trees(data, 6, 7), {example.id: example for example in data.examples}
    model, found = asked(data, trees, "ranked")
    checked = 0
    for tree in trees:
        media = data.read_media([tree])
        for example in (examples[name] for name in tree.ids if examples[name].candidates):
            log_probs = {}
            for candidate in example.candidates:
                prefix, input_ids, labels = data.task.encode(example, candidate)
                ids = torch.tensor([prefix + input_ids])
                model.vlm.model.rope_deltas = None
                is_image = (ids == data.task.image_id).int()
                logits = model.vlm(input_ids=ids, mm_token_type_ids=is_image, **media).logits[0].log_softmax(-1)
                at = range(len(prefix), ids.shape[1])
                log_probs[candidate] = sum(
                    float(logits[i - 1, label]) for i, label in zip(at, labels, strict=True) if label != IGNORE
                )
            assert found[example.id]["prediction"] == max(log_probs, key=log_probs.get)
            total = torch.tensor(list(log_probs.values())).softmax(0)
            torch.testing.assert_close(torch.tensor(list(found[example.id]["probabilities"].values())), total)
            checked += 1
    assert checked > 15


# --- question types and candidates -----------------------------------------------------------------------------


def read(folder: Path, limit=None) -> list[Example]:
    """The examples of a folder, which must have no problem."""
    examples, problems = script.read_examples(folder, SimpleNamespace(only_ids=None, limit=limit, media_root=folder))
    assert problems == []
    return examples


def examples_of(tmp_path, **splits) -> dict[str, Example]:
    """Examples by ID, read from files in which each is (question, answer, more fields)."""
    for split, entries in splits.items():
        lines = [
            {"id": f"{split}{i}", "image": f"{split}.jpg", "question": question, "answer": answer, **more}
            for i, (question, answer, more) in enumerate(entries)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {example.id: example for example in read(tmp_path)}


REMOVED = "Have all polyps been removed?"


def test_candidates_come_from_the_example_the_question_or_training(tmp_path):
    examples = examples_of(
        tmp_path,
        train=[
            ("What color is the polyp?", "Pink", {}),
            ("What color is the polyp?", "pink;red", {}),
            ("What color is the tool?", "Pink", {"answer_candidates": ["Pink", "blue"]}),
            (REMOVED, "Not relevant", {}),
            (REMOVED, "Yes", {}),
            ("Is there a polyp?", "No", {}),
            ("Where is it? (a) left (b) right", "left", {}),
            ("How many polyps?", "2", {}),
        ],
        test=[
            ("What color is the ulcer?", "green", {}),
            (REMOVED, "no", {}),
            ("Does it bleed?", "yes", {}),
            ("Is it (a) flat or (b) raised?", "raised", {}),
            ("Describe it.", "a polyp", {}),
            ("Can it be seen?", "yes", {"question_type": "own", "answer_candidates": ["yes", "maybe"]}),
        ],
    )
    found = {name: (e.question_type, e.candidates) for name, e in examples.items() if name.startswith("test")}
    assert found == {
        "test0": ("color", ["Pink", "pink;red"]),  # in training's spelling; "green" is only in the test
        "test1": ("yes_no", ["Yes", "No", "Not relevant"]),
        "test2": ("yes_no", ["Yes", "No"]),
        "test3": ("mcq", ["flat", "raised"]),
        "test4": ("open_ended", None),
        "test5": ("own", ["yes", "maybe"]),
    }
    assert examples["train2"].candidates == ["Pink", "blue"]
    assert [scoring.answerable(examples[f"test{i}"]) for i in range(6)] == [False, True, True, True, True, True]


def test_test_answers_never_become_candidates(tmp_path):
    examples = examples_of(
        tmp_path,
        train=[("What color is it?", "red", {})],
        val=[("What color is it?", "blue", {}), (REMOVED, "not relevant", {})],
        test=[("What color is it?", "white", {}), (REMOVED, "partly", {})],
    )
    assert {tuple(example.candidates) for example in examples.values()} == {("red",), ("yes", "no")}


def test_candidates_do_not_depend_on_the_limit(tmp_path):
    train = [("How many?", "1", {}), ("What color is it?", "red", {}), ("What color is it?", "blue", {})]
    examples_of(tmp_path, train=train, test=[("What color is it?", "blue", {})])
    found = [(example.split, example.candidates) for example in read(tmp_path, limit=1)]
    assert found == [("train", None), ("test", ["red", "blue"])]


def test_a_single_file_is_split_by_patient(tmp_path):
    """Several images of one patient: drawn image by image, they would fall into different splits."""
    image = {"question": "Is it?", "answer": "yes"}
    for i in range(30):
        (tmp_path / f"{i}.jpg").touch()
    lines = [json.dumps({**image, "id": i, "image": f"{i}.jpg", "group": i // 5}) for i in range(30)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    examples = read(tmp_path)
    assert (len(examples), examples[0].id, examples[0].group) == (30, "0", "0")
    splits = [{example.split for example in examples if example.group == str(g)} for g in range(6)]
    assert {len(found) for found in splits} == {1} and len(set.union(*splits)) > 1


# --- faults of checkpoint and data -----------------------------------------------------------------------------


@pytest.fixture
def copy(qwen_folder, tmp_path):
    shutil.copytree(qwen_folder, tmp_path / "demo")
    return tmp_path / "demo"


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_an_image_token_that_was_computed_is_refused(copy, tmp_path):
    rows = AutoConfig.from_pretrained(copy / "model").text_config.vocab_size
    change(copy / "model/config.json", image_token_id=rows - 1)
    assert "the chat template does not write" in refused(copy, tmp_path / "out", "--check")


def test_a_processor_that_cuts_other_patches_than_the_tower_is_refused(copy, tmp_path):
    change(copy / "model/preprocessor_config.json", merge_size=1)
    assert "merge_size 1, the vision tower has 2" in refused(copy, tmp_path / "out", "--check")


def test_another_model_is_refused_by_name(copy, tmp_path):
    (copy / "model/config.json").write_text('{"model_type": "llama"}')
    assert "model_type 'llama', not 'qwen2_vl' or 'qwen2_5_vl'" in refused(copy, tmp_path / "out", "--check")


def test_files_are_read_as_published(copy, tmp_path, qwen_folder):
    """The template in chat_template.json, one for text alone in tokenizer_config.json, and pixels without a size."""
    model = copy / "model"
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    text_alone = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    change(model / "tokenizer_config.json", chat_template=text_alone)
    processor = json.loads((model / "preprocessor_config.json").read_text())
    size = processor.pop("size")
    pixels = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (model / "preprocessor_config.json").write_text(json.dumps(processor | pixels))
    for folder, out in ((copy, "published"), (qwen_folder, "ours")):
        run(folder, tmp_path / out, "--check")
    assert read_lines_of_check(tmp_path / "published") == read_lines_of_check(tmp_path / "ours")

    (model / "chat_template.json").unlink()
    assert "copy the original checkpoint's chat_template.jinja" in refused(copy, tmp_path / "out", "--check")


def read_lines_of_check(out) -> dict:
    check = json.loads((out / "check.json").read_text())
    return {**check["splits"], "pixels": check["pixels"]}


def test_pixels_that_hold_no_token_are_refused(qwen_folder, tmp_path):
    for flags in (["--max-pixels", 2000], ["--min-pixels", 5, "--max-pixels", 5]):
        assert "the first must be at least 784, a token's" in refused(qwen_folder, tmp_path, "--check", *flags)


def test_kept_sentinels_allow_no_restricted_answers(qwen_folder, tmp_path):
    for decode in ([], ["--decode", "constrained"], ["--decode", "ranked"], ["--decode", "both"]):
        text = refused(qwen_folder, tmp_path, "--sentinels", "keep", *decode)
        assert text.startswith("--sentinels keep: the end of an answer is not supervised there; give --decode greedy")
    run(qwen_folder, tmp_path, *SMALL, "--sentinels", "keep", "--decode", "greedy", "--max-steps", 1)
    text = refused(qwen_folder, tmp_path, *SMALL, "--eval-only")  # the checkpoint says that they are kept
    assert text.startswith("--sentinels keep")
    run(qwen_folder, tmp_path, "--merge", tmp_path / "merged")  # asks nothing, whatever --decode says
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_a_checkpoint_answers_with_the_sentinels_that_it_was_trained_with(qwen_folder, tmp_path, capsys):
    for out, sentinels in (("kept", "keep"), ("stripped", "strip")):
        run(qwen_folder, tmp_path / out, *SMALL, "--sentinels", sentinels, "--decode", "greedy", "--max-steps", 2)
    kept, stripped = (json.loads((tmp_path / out / "check.json").read_text()) for out in ("kept", "stripped"))
    kept, stripped = kept["splits"]["train"], stripped["splits"]["train"]
    assert kept["supervised_tokens"] == stripped["supervised_tokens"]
    assert kept["tokens"] >= stripped["tokens"] + 2 * 24  # at least a piece for each sentinel
    before = read_lines(tmp_path / "kept/predictions.jsonl")
    run(qwen_folder, tmp_path / "kept", *SMALL, "--eval-only", "--decode", "greedy")
    assert f"sentinels keep (from {tmp_path / 'kept'}" in capsys.readouterr().out
    assert len(before) == 24 and read_lines(tmp_path / "kept/predictions.jsonl") == before


def test_a_candidate_longer_than_a_packed_sequence_is_ranked_all_the_same(copy, tmp_path):
    path = copy / "data/test.jsonl"
    entries = read_lines(path)
    entries[0]["answer_candidates"] = [entries[0]["answer"], "a very long answer " * 40]
    write_lines(path, entries)
    run(copy, tmp_path / "out", *SMALL, "--decode", "ranked", "--max-steps", 1, "--pack-tokens", 256)
    assert len(read_lines(tmp_path / "out/predictions.jsonl")[0]["probabilities"]) == 2


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<ANS>"])
def test_a_question_that_contains_a_token_is_refused(copy, tmp_path, capsys, token):
    path = copy / "data/train.jsonl"
    entries = read_lines(path)
    entries[3]["question"] = f"Is this {token} a polyp?"
    write_lines(path, entries)
    refused(copy, tmp_path / "out", "--check")
    fault = f"train.jsonl:4 (id {entries[3].get('id', 'train.jsonl:4')}): the text contains '{token}'"
    assert fault in capsys.readouterr().out


def test_an_image_too_large_for_a_packed_sequence_is_named_with_both_remedies(qwen_folder, tmp_path, capsys):
    refused(qwen_folder, tmp_path, "--check", "--pack-tokens", 120)
    assert "more than --pack-tokens 120; raise it or lower --max-pixels" in capsys.readouterr().out


def test_decomposed_accents_are_supervised_composed_as_the_tokenizer_has_them(copy, tmp_path):
    path = copy / "data/train.jsonl"
    entries = read_lines(path)
    entries[0] |= {"answer": "e\u0301rythe\u0300me", "question": "Describe it."}
    write_lines(path, entries)
    run(copy, tmp_path / "out", "--check")


# --- runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(qwen_folder, tmp_path_factory):
    """A run of four steps with adapters in the tower, too, and fewer pixels than the checkpoint's own."""
    out = tmp_path_factory.mktemp("run")
    flags = [*SMALL, "--max-steps", 4, "--epochs", 4, "--save-every", 2, "--lr", 1e-3]
    run(qwen_folder, out, *flags, "--lora-vision", "--max-pixels", 112 * 140, "--min-pixels", 56 * 56)
    return out


def test_the_first_examples_are_shown_with_what_is_supervised(qwen_folder, tmp_path, capsys):
    """Of the first image's first question and of the second image's: where, what, and how much is masked."""
    run(qwen_folder, tmp_path, "--check")
    text = capsys.readouterr().out
    pattern = r"^example (.*): (\d+) tokens, supervised (\d+)–(\d+), '(.*)'; masked (.*)%$"
    shown = re.findall(pattern, text, re.M)
    entries = read_lines(qwen_folder / "data/train.jsonl")
    images = list(dict.fromkeys(entry["image_id"] for entry in entries))[:2]
    firsts = [next(entry for entry in entries if entry["image_id"] == image) for image in images]
    assert [supervised for *_, supervised, _ in shown] == [entry["answer"] + "<|im_end|>" for entry in firsts]
    for _, length, first, last, _, masked in shown:
        assert int(last) == int(length) - 1
        assert float(masked) == round(100 * int(first) / int(length), 1)


def test_adapters_of_the_tower_and_the_language_model_are_trained(qwen_folder, trained):
    names = {key.rpartition(".lora_")[0] for _, key in read_tensors(trained / "adapter") if key.endswith("B.weight")}
    assert any("visual.blocks.0.attn.qkv" in name for name in names) and any("merger.mlp.2" in name for name in names)
    assert any("language_model.layers.0.self_attn.q_proj" in name for name in names)
    assert all(tensor.any() for (_, key), tensor in read_tensors(trained / "adapter").items() if "lora_B" in key)


def test_a_frozen_tower_is_bit_for_bit_as_it_was(qwen_folder, tmp_path):
    run(qwen_folder, tmp_path, *SMALL, "--max-steps", 2, "--tune", "lora")
    assert not any("visual" in key for _, key in read_tensors(tmp_path / "adapter"))
    run(qwen_folder, tmp_path, "--resume", tmp_path / "checkpoints/step-00000002", "--merge", tmp_path / "merged")
    before = Qwen2VLForConditionalGeneration.from_pretrained(qwen_folder / "model").state_dict()
    after = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.language_model.layers.") for name in changed)


def test_pixels_are_recorded_and_enforced_when_answering(qwen_folder, trained, tmp_path, capsys):
    same = json.loads((trained / "checkpoints/step-00000004/state.json").read_text())["same"]
    assert (same["min_pixels"], same["max_pixels"], same["lora_vision"]) == (56 * 56, 112 * 140, True)
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    answers = []
    for wrong in ([], ["--max-pixels", 224 * 280]):
        run(qwen_folder, tmp_path, *SMALL, "--eval-only", *wrong)
        assert f"max_pixels {112 * 140} (from {tmp_path}" in capsys.readouterr().out
        answers.append(read_lines(tmp_path / "predictions.jsonl"))
    assert answers[0] == answers[1] == read_lines(trained / "predictions.jsonl")


def test_a_replay_sees_images_as_the_checkpoint_did(qwen_folder, trained, tmp_path, capsys):
    step = metrics_of(trained)[3]
    (tmp_path / "ids").write_text("\n".join(step["ids"]))
    flags = ["--only-ids", tmp_path / "ids", "--resume", trained / "checkpoints/step-00000004", "--max-steps", 1]
    run(qwen_folder, tmp_path / "replay", *flags, "--lora-dropout", 0, "--max-answer-tokens", 4)
    assert f"max_pixels {112 * 140} (from {trained}" in capsys.readouterr().out
    assert metrics_of(tmp_path / "replay")[0]["loss"] < step["loss"]


def test_other_pixels_make_it_another_run(qwen_folder, trained, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    text = refused(qwen_folder, tmp_path, *SMALL, "--max-steps", 4, "--epochs", 4, "--lr", 1e-3, "--lora-vision")
    assert f"max_pixels was {112 * 140}, is " in text


def test_a_merged_folder_opens_alone_and_keeps_the_pixels(qwen_folder, trained, tmp_path):
    flags = ["--resume", trained / "checkpoints/step-00000004"]
    run(qwen_folder, tmp_path, *flags, "--merge", tmp_path / "merged")
    size = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "merged").size
    assert (size["shortest_edge"], size["longest_edge"]) == (56 * 56, 112 * 140)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/model").symlink_to(tmp_path / "merged")
    (tmp_path / "demo/data").symlink_to(qwen_folder / "data")
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    assert not any("lora" in name for name in loaded)
    # the merged model and the adapter answer alike
    run(tmp_path / "demo", tmp_path / "again", *SMALL, "--max-steps", 1, "--lr", 0, "--lora-r", 1)
    assert read_lines(tmp_path / "again/predictions.jsonl") == read_lines(trained / "predictions.jsonl")


def test_stopped_and_resumed_it_is_the_same_run(qwen_folder, trained, tmp_path, monkeypatch):
    flags = [*SMALL, "--max-steps", 4, "--epochs", 4, "--save-every", 2, "--lr", 1e-3]
    flags += ["--lora-vision", "--max-pixels", 112 * 140, "--min-pixels", 56 * 56]
    with monkeypatch.context() as patch:
        stop_in(patch, 3, script)
        with pytest.raises(SystemExit) as stopped:
            run(qwen_folder, tmp_path, *flags)
    assert stopped.value.code == EXIT_STOPPED
    run(qwen_folder, tmp_path, *flags)
    assert metrics_of(tmp_path) == metrics_of(trained)
    ours, theirs = (read_tensors(path / "checkpoints/step-00000004") for path in (tmp_path, trained))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read_lines(tmp_path / "predictions.jsonl") == read_lines(trained / "predictions.jsonl")


def test_eight_examples_are_overfitted(qwen_folder, tmp_path, capsys):
    flags = ["--overfit", 8, "--tune", "full", "--lr", 3e-3, "--max-steps", 60, "--questions-per-step", 8]
    run(qwen_folder, tmp_path, *flags)
    assert "0 answers wrong (must be none)" in capsys.readouterr().out
    first = metrics_of(tmp_path / "overfit")[0]["loss"]
    assert first > 4.0


# --- published sizes -------------------------------------------------------------------------------------------

VISION = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2}
PUBLISHED = {  # config.json as published, flat; total parameters; LoRA r=16 on seven projections of 28 layers
    "2B": (
        {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
        {"vocab_size": 151936, "tie_word_embeddings": True},
        2_208_985_600,
        28 * 16 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960)),
    ),
    "7B": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
        {"vocab_size": 152064, "tie_word_embeddings": False},
        8_291_375_616,
        28 * 16 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counted_parameters_are_the_published_totals(data, tmp_path, capsys, name):
    sizes, more, total, lora = PUBLISHED[name]
    config = {"model_type": "qwen2_vl", "num_hidden_layers": 28, **sizes, **more, "rope_theta": 1e6}
    config |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "image_token_id": 151655}
    config["vision_config"] = {**VISION, "hidden_size": sizes["hidden_size"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = SimpleNamespace(**{**vars(data.args), "lora_r": 16, "pack_tokens": 4096})
    task = SimpleNamespace(args=args, tokenizer=data.task.tokenizer, faults=[])
    models.count(script.load_model, tmp_path, task, SimpleNamespace(args=args, dtype=torch.bfloat16))
    counts = {line.split()[0]: line for line in capsys.readouterr().out.split("\n") if line}
    assert counts["without"].split()[2] == f"{total:,}"
    assert counts["LoRA"].split()[1:] == [f"{lora:,}", f"{lora:,}"]
    assert counts["total"].split()[1:3] == [f"{total + lora:,}", f"{lora:,}"]
    assert counts["total"].endswith(f"({lora / (total + lora):.2%})")


def test_answers_of_every_kind_are_supervised_character_for_character_with_the_checkpoint_s_tokenizer(data):
    """The demo's own tokenizer merges ">" with what follows, as the real one does."""
    tokenizer = data.task.tokenizer
    assert tokenizer.tokenize("<ANS>Pink") == ["<", "ANS", ">P", "ink"]
    draw = random.Random(0)
    for _ in range(300):
        answer = "".join(draw.choices("Pink(a)[1]</ANS é彩🩺0-9.;' ", k=draw.randrange(1, 20))).strip() or "x"
        if any(token in answer for token in ("<ANS>", "</ANS>")):
            continue
        assert build_trees([replace(data.examples[0], answer=answer)], data.task)[1] == {}
