"""train_video_plain_lm on a tiny GPT-2 and DINOv2: what is supervised, both paths, videos of every kind, the cache."""

import contextlib
import io
import itertools
import json
import math
import shutil
from collections import Counter
from copy import copy as shallow_copy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn_videos import drawn, save_as
from helpers import difference, gradients, load_demo, metrics_of, read_lines, read_tensors, refuses_elsewhere, stop_in
from helpers import refused as script_refused
from helpers import run as run_script
from PIL import Image, ImageSequence
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import common
import train_video_plain_lm as script
from common import IGNORE, answering_prompt, pack
from demo.motions import motion_scene, random_motion
from inputs import features, processors
from inputs.building import build_trees
from inputs.features import Video
from runtime import adapters
from train_video_plain_lm import TokenPacker

GRAFT = "with vision_tower, projector, fast_packer and slow_packer, which its own training script alone reads"
# 2 frames x 1 + 2 frames x 4 = 10 positions a video, so that tests are quick
LITTLE = ["--fast-frames", 2, "--fast-grid", 1, "--slow-frames", 2, "--slow-grid", 2]
SMALL = [*LITTLE, "--questions-per-step", 8, "--pack-tokens", 256, "--max-answer-tokens", 4, "--lr", 1e-3]


def vision(folder: Path) -> list:
    return ["--vision-model", folder / "vision"]


def run(folder, out, *flags):
    run_script(folder, out, *vision(folder), "--from-scratch", *flags, script=script)


def refused(folder, out, *flags) -> str:
    return script_refused(folder, out, *vision(folder), "--from-scratch", *flags, script=script)


def load(data) -> script.VideoPlainLM:
    """The model, its packers no longer mere resizing: what they add starts at zero."""
    torch.manual_seed(0)
    model = script.load_model(data.folder / "model", data.task, torch.float32)
    for packer in (model.vlm.fast_packer, model.vlm.slow_packer):
        torch.nn.init.normal_(packer.out.weight, std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def data(plain_folder):
    """In the original layout: 36 + 324 positions a video."""
    return load_demo(plain_folder, script, *vision(plain_folder), "--from-scratch")


@pytest.fixture(scope="module")
def little(plain_folder):
    return load_demo(plain_folder, script, *vision(plain_folder), "--from-scratch", *LITTLE)


@pytest.fixture
def copy(plain_folder, tmp_path):
    return Path(shutil.copytree(plain_folder, tmp_path / "demo"))


def rows_of(folder: Path, split: str) -> list[dict]:
    return json.loads((folder / "data" / f"{split}.json").read_text())


def write_rows(folder: Path, split: str, rows: list[dict]) -> None:
    (folder / "data" / f"{split}.json").write_text(json.dumps(rows))


def printed(action) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        action()
    return text.getvalue()


# --- what is supervised ----------------------------------------------------------------------------------------


def test_the_labels_of_an_example_token_by_token(data):
    """360 video positions and BOS are masked, the caption and EOS are supervised."""
    example = next(example for example in data.examples if example.media)
    prefix, input_ids, labels = data.task.encode(example, example.answer)
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "model")
    caption, end = tokenizer.encode(example.answer), tokenizer.eos_token_id
    named = ["<vid_start>", *["<vid_patch>"] * 34, "<vid_end>"]
    named += ["<slow_vid_start>", *["<vid_patch>"] * 322, "<slow_vid_end>"]
    assert data.task.tokenizer.convert_ids_to_tokens(prefix) == named and len(prefix) == 36 + 324 == 360
    assert input_ids == [end, *caption, end]
    assert labels == [-100, *caption, end]
    [packed] = pack([common.Prompt(prefix, [(input_ids, labels)], [example.id])], 512)
    assert packed["labels"][0].tolist() == [-100] * 361 + caption + [end]


def test_captions_of_the_demo_are_10_to_20_tokens(data):
    supervised = [tree.supervised() for tree in data.trees if tree.media]
    assert len(supervised) == 28 and min(supervised) >= 10 and max(supervised) <= 20


def test_a_text_alone_is_supervised_completely_without_a_video(data):
    example = next(example for example in data.examples if not example.media)
    prefix, input_ids, labels = data.task.encode(example, example.answer)
    assert prefix == [] and labels == [IGNORE, *input_ids[1:]]
    assert data.task.tokenizer.decode(input_ids[1:]) == example.answer + "<|endoftext|>"


def encoded_as(task, change):
    """A copy of the task that encodes wrongly: change(prefix, input_ids, labels) of what is right."""
    task = shallow_copy(task)
    task.encode = lambda example, answer: change(*script.VideoTask.encode(task, example, answer))
    return task


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda prefix, ids, labels: (prefix, ids, [IGNORE] * len(labels)), "supervised would be"),
        (lambda prefix, ids, labels: (prefix, ids, ids), "supervised would be"),
        (lambda prefix, ids, labels: (prefix, ids, [*labels[:-1], IGNORE]), "supervised would be"),
        (lambda prefix, ids, labels: (prefix, [prefix[0], *ids], [IGNORE, *labels]), "placeholder"),
        (lambda prefix, ids, labels: ([], prefix + ids, [IGNORE, *prefix[1:], *labels]), "supervised would be"),
    ],
    ids=["nothing", "the question", "no end", "a video token among the text", "the video"],
)
def test_the_data_check_catches_what_must_not_be_supervised_and_names_the_example(data, change, words):
    """Also the original's mistake, supervised video tokens: benchmarks/masking.py measures what it costs."""
    examples = [example for example in data.examples if example.media][:2]
    trees, faults = build_trees(examples, encoded_as(data.task, change))
    assert trees == [] and list(faults) == [example.where for example in examples]
    assert all(words in fault for fault in faults.values())
    trees, faults = build_trees(examples, encoded_as(data.task, lambda *right: right))
    assert len(trees) == 2 and faults == {}


@pytest.mark.parametrize(
    ("flags", "fast", "slow"),
    [([], 36, 324), (["--fast-frames", 8, "--slow-frames", 1, "--slow-grid", 4], 72, 16), (LITTLE, 2, 8)],
)
def test_positions_follow_from_frames_and_grids_and_are_printed(plain_folder, flags, fast, slow):
    loaded = []
    text = printed(lambda: loaded.append(load_demo(plain_folder, script, *vision(plain_folder), *flags)))
    words = f"video tokens: {fast} on the fast path, {slow} on the slow one, {fast + slow} positions a video"
    assert words in text
    [demo] = loaded
    assert all(len(tree.prefix) == fast + slow for tree in demo.trees if tree.media)


def test_a_shorter_video_has_fewer_positions(copy):
    rows = rows_of(copy, "train")
    folder = next(row["video"] for row in rows if "." not in row.get("video", "."))
    for name in sorted((copy / "data" / folder).iterdir())[2:]:
        name.unlink()
    demo = load_demo(copy, script, *vision(copy))
    lengths = {tree.ids[0]: len(tree.prefix) for tree in demo.trees if tree.media}
    short = next(row["id"] for row in rows if row.get("video") == folder)
    assert lengths.pop(short) == 2 * 9 + 2 * 81
    assert set(lengths.values()) == {360}


def test_a_path_without_room_for_its_start_and_end_is_refused_by_name(plain_folder, tmp_path):
    assert "faults" in refused(plain_folder, tmp_path, "--fast-frames", 1, "--fast-grid", 1, "--check")
    failures = json.loads((tmp_path / "check.json").read_text())["failures"]
    assert len(failures) == 40 and "a path of 1 position has no room" in failures[0]


def test_candidates_and_other_videos_count_where_positions_end(copy, tmp_path):
    """What fits with its own video or answer may be too long with another: answering would end in an IndexError."""
    rows = rows_of(copy, "test")
    drawn(1)[0].save(copy / "data/one.png")
    long = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "Un quadrato va. " * 40}]
    write_rows(copy, "test", [{"id": "long", "video": "one.png", "conversations": long}, *rows])
    flags = ["--max-steps", 1, "--questions-per-step", 4, "--pack-tokens", 700, "--max-answer-tokens", 4]
    run(copy, tmp_path / "run", *flags)
    assert json.loads((tmp_path / "run/results.json").read_text())["pairs"] == 6  # of seven: nothing else is as short
    rows[0]["answer_candidates"] = ["Un quadrato va. " * 40, "No."]
    write_rows(copy, "test", rows)
    refused(copy, tmp_path / "check", "--check")
    [failure] = json.loads((tmp_path / "check/check.json").read_text())["failures"]
    assert rows[0]["id"] in failure and "the language model has 512" in failure


def test_an_example_longer_than_the_language_model_s_positions_is_refused_by_name(plain_folder, tmp_path):
    """GPT-2 has a table of positions: beyond its end there is none."""
    assert "faults" in refused(plain_folder, tmp_path, "--slow-grid", 11, "--check")
    failures = json.loads((tmp_path / "check.json").read_text())["failures"]
    assert len(failures) == 40 and "520 of them of its media" in failures[0] and "has 512" in failures[0]


@pytest.mark.parametrize("text", ["guarda <vid_patch>", "un <video> bello", "fine <|endoftext|>", "<ANS>sì</ANS>"])
def test_tokens_in_a_text_are_refused(copy, tmp_path, text):
    rows = rows_of(copy, "train")
    rows[0]["conversations"][1]["value"] = text
    write_rows(copy, "train", rows)
    refused(copy, tmp_path, "--check")
    [failure] = json.loads((tmp_path / "check.json").read_text())["failures"]
    assert rows[0]["id"] in failure and "would read as a token" in failure


# --- the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patches", "grid"), [((16, 16), 9), ((16, 16), 3), ((5, 7), 3), ((4, 4), 4), ((2, 3), 4)])
def test_windows_are_those_of_adaptive_pooling(patches, grid):
    torch.manual_seed(0)
    x = torch.randn(2, *patches, 6)
    window = TokenPacker(6, patches, grid, "attention").window.float()  # (grid * grid, patches)
    mean = (window / window.sum(1, keepdim=True)) @ x.flatten(1, 2)
    pool = TokenPacker(6, patches, grid, "pool")(x)
    torch.testing.assert_close(mean, pool)
    torch.testing.assert_close(pool, F.adaptive_avg_pool2d(x.movedim(-1, 1), grid).flatten(2).mT)


def test_attention_begins_as_the_resized_frame_and_equals_a_plain_loop(data):
    torch.manual_seed(0)
    packer, x = TokenPacker(128, (16, 16), 9, "attention"), torch.randn(3, 16, 16, 128)
    resized = F.interpolate(x.movedim(-1, 1), size=(9, 9), mode="bilinear", align_corners=False)  # (3, 128, 9, 9)
    torch.testing.assert_close(packer(x), resized.flatten(2).mT)
    torch.nn.init.normal_(packer.out.weight, std=0.1)
    found = packer(x)
    for frame, i, j in itertools.product(range(3), (0, 4, 8), (0, 5, 8)):
        rows = slice(i * 16 // 9, math.ceil((i + 1) * 16 / 9))
        columns = slice(j * 16 // 9, math.ceil((j + 1) * 16 / 9))
        region = packer.norm(x[frame, rows, columns].reshape(-1, 128))
        point = resized[frame, :, i, j]
        heads = []
        for head in range(packer.heads):
            part = slice(head * 64, (head + 1) * 64)
            q = packer.query(packer.norm(point))[part]
            weights = (packer.key(region)[:, part] @ q / 8).softmax(0)  # 8 = sqrt(64)
            heads.append(weights @ packer.value(region)[:, part])
        torch.testing.assert_close(found[frame, 9 * i + j], point + packer.out(torch.cat(heads)), atol=1e-5, rtol=1e-4)


def embeddings(model, packed) -> torch.Tensor:
    """What the language model is given."""
    given = []
    hook = model.decoder.register_forward_pre_hook(lambda m, a, k: given.append(k["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad():
        model(packed)
    hook.remove()
    return given[0][0]  # (T, width)


def batch(demo, trees, max_tokens: int = 4096) -> dict:
    [packed] = pack(trees, max_tokens)
    return {**packed, **demo.read_media(packed["prompts"])}


# of 8 frames 4: 7 / 3 = 2.33 apart
@pytest.mark.parametrize(("fast", "slow"), [([0, 2, 5, 7], [0, 2, 5, 7]), ([0, 7], [0, 2, 5, 7]), ([0, 2, 5, 7], [0])])
def test_every_feature_stands_at_its_own_position(plain_folder, fast, slow):
    """Against transformers' DINOv2 and image processor, and the packers called a frame at a time."""
    flags = [*vision(plain_folder), "--from-scratch", "--fast-frames", len(fast), "--slow-frames", len(slow)]
    data = load_demo(plain_folder, script, *flags)
    model, tree = load(data), next(tree for tree in data.trees if tree.media)
    found = embeddings(model, batch(data, [tree]))
    tower = AutoModel.from_pretrained(data.folder / "vision")
    frames = all_frames(data.folder / "data" / video_of(tree.media))
    assert len(frames) == 8
    expected = []
    for shown, packer in ((fast, model.vlm.fast_packer), (slow, model.vlm.slow_packer)):
        for i in shown:
            pixels = data.task.processor([frames[i]], return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                states = model.vlm.projector(tower(pixels).last_hidden_state[:, 1:]).unflatten(1, (16, 16))
                expected.append(packer(states)[0])
    n = 9 * len(fast) + 81 * len(slow)
    torch.testing.assert_close(found[:n], torch.cat(expected), atol=1e-5, rtol=1e-4)
    ids = torch.tensor(tree.branches[0][0])
    torch.testing.assert_close(found[n:], model.vlm.get_input_embeddings()(ids).detach())


@pytest.mark.parametrize("path", ["fast", "slow"])
def test_both_paths_reach_the_language_model(data, path):
    """The original spliced the slow features over the fast ones: disturbing these changed nothing."""
    model, packed = load(data), batch(data, [next(tree for tree in data.trees if tree.media)])
    before, _ = model(packed)
    packer = getattr(model.vlm, f"{path}_packer")
    hook = packer.register_forward_hook(lambda module, inputs, found: found.flip(-1))
    after, _ = model(packed)
    hook.remove()
    assert abs(after - before) > 1e-3
    before.backward()
    for name, parameter in packer.named_parameters():
        if name != "key.bias":  # softmax does not see it
            assert parameter.grad.abs().max() > 0, name


def test_frames_in_another_order_are_another_video(data):
    model, packed = load(data), batch(data, [next(tree for tree in data.trees if tree.media)])
    before, _ = model(packed)
    packed["videos"][0].pixels = packed["videos"][0].pixels.flip(0)
    assert abs(model(packed)[0] - before) > 1e-4


def test_a_packed_sequence_equals_its_texts_one_by_one_in_transformers_own_forward(little):
    """Loss and gradients; videos and texts alone mixed."""
    model = load(little)
    mixed = [t for t in little.trees if t.media][:3] + [t for t in little.trees if not t.media][:3]
    packed = gradients(model, model(batch(little, mixed))[0])
    model.zero_grad()
    total = 0
    for tree in mixed:
        [(_, labels)] = tree.branches
        one = batch(little, [tree])
        embeds = model.vlm.get_input_embeddings()(one["input_ids"])
        if one["videos"]:
            embeds = torch.cat([model.video_features(one["videos"])[None], embeds[:, len(tree.prefix) :]], dim=1)
        everything = torch.tensor([[IGNORE] * len(tree.prefix) + labels])
        mean = model.vlm(inputs_embeds=embeds, labels=everything).loss
        total = total + mean * sum(label != IGNORE for label in labels)
    assert difference(packed, gradients(model, total)) < 1e-5


def test_answers_are_those_of_transformers_generate(little):
    model, examples = load(little), [example for example in little.examples if example.split == "test"]
    model.vlm.generation_config.pad_token_id = little.task.tokenizer.pad_token_id
    trees, _ = build_trees(examples, little.task)
    asked = [answering_prompt(tree) for tree in trees]
    packed = batch(little, asked)

    def read(input_ids, position_ids, mask, cache):
        return model.hidden(input_ids, position_ids, mask, cache, None if cache.get_seq_length() else packed)

    ours = common.decode(read, model.lm_head, packed, little.task.tokenizer.eos_token_id, 12)
    theirs = []
    for tree in packed["prompts"]:
        one = batch(little, [tree])
        embeds = model.vlm.get_input_embeddings()(one["input_ids"])
        embeds = torch.cat([model.video_features(one["videos"])[None], embeds[:, len(tree.prefix) :]], dim=1)
        with torch.no_grad():
            theirs.append(model.vlm.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False)[0].tolist())
    assert ours == theirs and len({tuple(tokens) for tokens in ours}) > 1


def test_the_tower_is_never_trained_and_all_else_is(plain_folder, tmp_path):
    run(plain_folder, tmp_path, *SMALL, "--max-steps", 2, "--save-every", 1)
    first, last = (load_file(f / "model.safetensors") for f in sorted((tmp_path / "checkpoints").iterdir()))
    assert not any(name.startswith("vision_tower") for name in last)
    same = [name for name in last if torch.equal(first[name], last[name])]
    assert all(name.endswith("key.bias") for name in same), same  # softmax does not see a key's bias
    saved = {k: t for (_, k), t in read_tensors(tmp_path / "model").items() if k.startswith("vision_tower.")}
    original = load_file(plain_folder / "vision/model.safetensors")
    assert {k.removeprefix("vision_tower."): t for k, t in saved.items()}.keys() == original.keys()
    assert all(torch.equal(saved[f"vision_tower.{k}"], t) for k, t in original.items())


def test_the_tower_has_no_dropout_while_all_else_is_trained(little):
    model = load(little).train()
    assert {module.training for module in model.vlm.vision_tower.modules()} == {False}
    assert model.vlm.transformer.training and model.vlm.projector.training and model.vlm.slow_packer.training


def test_projector_alone_leaves_the_language_model_as_it_was(plain_folder, tmp_path):
    folder = pretrained(plain_folder, tmp_path)
    flags = [*SMALL, *vision(folder), "--questions-per-step", 1, "--tune", "projector"]  # steps of a text alone, too
    run_script(folder, tmp_path / "run", *flags, script=script)
    saved = load_file(tmp_path / "run/model/model.safetensors")
    for name, tensor in load_file(folder / "model/model.safetensors").items():
        assert torch.equal(saved[name][: len(tensor)], tensor), name


# --- language models -------------------------------------------------------------------------------------------


def pretrained(folder: Path, target: Path, lm=None) -> Path:
    """The demo with a language model that has weights."""
    made = Path(shutil.copytree(folder, target / "pretrained"))
    torch.manual_seed(1)
    if lm is None:
        lm = GPT2LMHeadModel(AutoConfig.from_pretrained(folder / "model"))
    lm.save_pretrained(made / "model")
    return made


WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400}
WIDE = {**WIDTH, "num_key_value_heads": 1, "intermediate_size": 48}
ENDS = {"bos_token_id": None, "eos_token_id": 336, "pad_token_id": None}


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**WIDE, **ENDS)),
        lambda: Qwen2ForCausalLM(Qwen2Config(**WIDE, **ENDS, tie_word_embeddings=True)),
        lambda: OPTForCausalLM(OPTConfig(**WIDTH, **ENDS, ffn_dim=48, word_embed_proj_dim=32)),
    ],
    ids=["llama", "qwen2", "opt"],
)
def test_other_language_models_train_and_answer(plain_folder, tmp_path, make):
    folder = pretrained(plain_folder, tmp_path, make())
    run_script(folder, tmp_path / "run", *SMALL, *vision(folder), "--max-steps", 2, script=script)
    assert len(read_lines(tmp_path / "run/predictions.jsonl")) == 6


def test_a_language_model_whose_attention_takes_no_such_mask_is_refused(plain_folder, tmp_path):
    """BLOOM counts positions itself, from a mask of another form."""
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=2))
    folder = pretrained(plain_folder, tmp_path, bloom)
    text = script_refused(folder, tmp_path / "run", *SMALL, *vision(folder), "--max-steps", 2, script=script)
    assert "scaled_dot_product_attention" in text


def test_a_mask_that_is_not_heeded_is_caught_before_the_first_step(plain_folder, tmp_path, monkeypatch):
    hidden = script.VideoPlainLM.hidden

    def careless(self, input_ids, position_ids, mask, cache=None, media=None):
        causal = torch.ones_like(mask).tril()
        return hidden(self, input_ids, position_ids, causal, cache, media)

    monkeypatch.setattr(script.VideoPlainLM, "hidden", careless)
    assert "does not heed attention_mask" in refused(plain_folder, tmp_path, *SMALL, "--max-steps", 2)


@pytest.mark.parametrize("texts", [1, 2], ids=["a text a video", "two texts a video"])
def test_a_text_that_reads_its_neighbours_is_caught_however_few_prompts_there_are(copy, tmp_path, monkeypatch, texts):
    rows = rows_of(copy, "train")[:1]
    write_rows(copy, "train", [{**rows[0], "id": f"v{i}"} for i in range(texts)])
    monkeypatch.setattr(
        script.common, "visible", lambda d, b, last=None: torch.ones(1, 1, *[d.shape[1]] * 2).bool().tril()
    )
    flags = ["--questions-per-step", texts, "--pack-tokens", 64, "--max-steps", 1]
    assert "does not heed attention_mask" in refused(copy, tmp_path, *LITTLE, *flags)


def test_a_language_model_that_scales_its_logits_is_refused(plain_folder, tmp_path):
    """Trained and scored would be other logits than its own."""
    torch.manual_seed(0)
    granite = GraniteForCausalLM(GraniteConfig(**WIDE, **ENDS, logits_scaling=8.0))
    folder = pretrained(plain_folder, tmp_path, granite)
    text = script_refused(folder, tmp_path / "run", *SMALL, *vision(folder), "--max-steps", 2, script=script)
    assert "scaled or capped, which is not supported" in text


def test_a_window_of_attention_shorter_than_a_packed_sequence_is_refused(plain_folder, tmp_path):
    torch.manual_seed(0)
    folder = pretrained(plain_folder, tmp_path, MistralForCausalLM(MistralConfig(**WIDE, **ENDS, sliding_window=64)))
    text = script_refused(folder, tmp_path / "run", *SMALL, *vision(folder), script=script)
    assert "--pack-tokens 256 is longer than the model's sliding window 64" in text


def test_a_vision_language_model_in_the_place_of_a_language_model_is_refused(copy, tmp_path):
    edit_json(copy / "model/config.json", vision_config={"depth": 3})
    assert "is a vision-language model already" in refused(copy, tmp_path, "--check")


def test_gpt2_as_published_is_loaded_and_its_embedding_only_grows(plain_folder, tmp_path):
    """Its file has names without "transformer.", and the old mask buffers. New rows are the mean, not drawn."""
    folder = pretrained(plain_folder, tmp_path)
    file = folder / "model/model.safetensors"
    weights = {k.removeprefix("transformer."): t for k, t in load_file(file).items()}
    mask = torch.ones(1, 1, 512, 512).tril()
    save_file({**weights, **{f"h.{i}.attn.bias": mask.clone() for i in range(3)}}, file, {"format": "pt"})
    demo = load_demo(folder, script, *vision(folder), *LITTLE)
    torch.manual_seed(3)
    model = script.load_model(folder / "model", demo.task, torch.float32)
    old, new = weights["wte.weight"], model.vlm.get_input_embeddings().weight
    assert len(new) == len(demo.task.tokenizer) == len(old) + 7  # six of the video, and PAD
    assert torch.equal(new[: len(old)], old)
    torch.testing.assert_close(new[len(old) :], old.mean(0).expand(7, -1))
    assert new is model.vlm.get_output_embeddings().weight
    assert torch.equal(model.vlm.transformer.h[1].mlp.c_fc.weight, weights["h.1.mlp.c_fc.weight"])


def test_an_embedding_larger_than_the_tokenizer_is_left_alone(plain_folder, tmp_path):
    folder = pretrained(plain_folder, tmp_path, LlamaForCausalLM(LlamaConfig(**WIDE, **ENDS)))
    demo = load_demo(folder, script, *vision(folder), *LITTLE)
    model = script.load_model(folder / "model", demo.task, torch.float32)
    assert len(model.vlm.get_input_embeddings().weight) == 400 > len(demo.task.tokenizer)


def test_lora_is_for_language_models_with_linear_layers_and_gpt_2_is_told(plain_folder, tmp_path):
    folder = pretrained(plain_folder, tmp_path, LlamaForCausalLM(LlamaConfig(**WIDE, **ENDS)))
    flags = [*SMALL, *vision(folder), "--max-steps", 2, "--tune", "lora", "--lora-r", 2]
    run_script(folder, tmp_path / "run", *flags, script=script)
    names = set(load_file(tmp_path / "run/adapter/adapter_model.safetensors"))
    assert not any("vision_tower" in name for name in names)
    assert {name.split(".")[2] for name in names} == {"model", "projector", "fast_packer", "slow_packer"}
    refuses_elsewhere(tmp_path / "run/adapter", LlamaForCausalLM, f"LORA {GRAFT}")
    gpt2 = pretrained(plain_folder, tmp_path / "gpt2")
    text = script_refused(gpt2, tmp_path / "no", *flags[:-6], *vision(gpt2), "--tune", "lora", script=script)
    assert "no linear layer matches" in text and "--tune full" in text


@pytest.mark.parametrize("tune", ["lora", "projector"])
def test_a_random_language_model_must_be_trained(plain_folder, tmp_path, tune, capsys):
    with pytest.raises(SystemExit):
        run(plain_folder, tmp_path, "--tune", tune)
    assert "would stay random" in capsys.readouterr().err


def test_without_from_scratch_weights_are_wanted(plain_folder, tmp_path):
    text = script_refused(plain_folder, tmp_path, *vision(plain_folder), script=script)
    assert "model.safetensors is missing" in text


def test_parameters_are_counted_at_the_published_sizes(plain_folder, tmp_path):
    """GPT-2: 124,439,808. DINOv2-large: 304,368,640. The demo's tokenizer fits into GPT-2's 50,257 rows."""
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "model")
    for path in (plain_folder / "model").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    AutoConfig.for_model("dinov2", **large, image_size=518, patch_size=14).save_pretrained(tmp_path / "vision")
    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}}
    path = tmp_path / "vision/preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "BitImageProcessor", **crop}))
    flags = ["--model", tmp_path / "model", "--vision-model", tmp_path / "vision", "--check"]
    table = printed(lambda: script.main([str(flag) for flag in flags]))
    assert "a frame is 224 x 224 pixels, 16 x 16 patches" in table
    lines = [line.split() for line in table.partition("component")[2].split("\n")[1:] if line]
    found = {line[0]: tuple(int(n.replace(",", "")) for n in line[1:3]) for line in lines if len(line) == 3}
    packer = 4 * (768 * 768 + 768) + 2 * 768
    assert found == {
        "transformer": (124_439_808, 124_439_808),
        "vision_tower": (304_368_640, 0),
        "projector": (1024 * 768 + 768 + 768 * 768 + 768,) * 2,
        "fast_packer": (packer, packer),
        "slow_packer": (packer, packer),
    }


# --- videos ---------------------------------------------------------------------------------------------------------


def video_of(media) -> str:
    """What the data call a tree's video: its file, or the folder of its frames."""
    return media.files[0] if len(media.files) == 1 else str(Path(media.files[0]).parent)


def all_frames(path: Path) -> list[Image.Image]:
    """Read without the script."""
    if path.is_dir():
        return [Image.open(name).convert("RGB") for name in sorted(path.iterdir())]
    if path.suffix == ".npy":
        return [Image.fromarray(frame) for frame in np.load(path)]
    return [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(path))]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("missing", "videos/none.gif is missing"), ("wmv", "v.wmv is none of")],
    ids=["when it is opened", "by its name"],
)
def test_videos_that_cannot_be_used_are_refused_by_name(copy, tmp_path, kind, words):
    """Every other kind: tests/inputs/test_videos.py."""
    rows = rows_of(copy, "train")
    rows[0] = {**rows[0], "video": {"missing": "videos/none.gif", "wmv": "v.wmv"}[kind]}
    (copy / "data/v.wmv").write_bytes(bytes(100))
    write_rows(copy, "train", rows)
    refused(copy, tmp_path, *SMALL, "--check")
    [failure] = json.loads((tmp_path / "check.json").read_text())["failures"]
    assert rows[0]["id"] in failure and words in failure


def test_missing_frames_are_noticed_once_with_how_many_examples_and_the_videos_are_read(copy, tmp_path):
    rows = rows_of(copy, "train")
    for i in range(3):
        save_as("folder", copy / f"data/cut{i}", drawn())
        (copy / f"data/cut{i}/v/frame_10.png").unlink()
        rows[i]["video"] = f"cut{i}/v"
    write_rows(copy, "train", rows)
    text = printed(lambda: run(copy, tmp_path, *SMALL, "--check"))
    assert (
        text.count("\nnotice ") == 1 and "notice (3 such, also train.json[1] and train.json[2]): train.json[0]" in text
    )
    gap = "as if frames were missing between cut2/v/frame_5.png and cut2/v/frame_15.png"
    assert gap in json.loads((tmp_path / "check.json").read_text())["notices"][2]


def test_an_animation_among_the_frames_of_a_folder_is_refused_by_name(copy, tmp_path):
    rows = rows_of(copy, "train")
    save_as("apng", copy / "data/odd", drawn())
    shutil.copy(copy / "data/odd/v.png", copy / "data/odd/w.png")
    write_rows(copy, "train", [{**rows[0], "video": "odd"}, *rows[1:]])
    refused(copy, tmp_path, *SMALL, "--check")
    [failure] = json.loads((tmp_path / "check.json").read_text())["failures"]
    assert "odd/v.png holds 5 frames; in a folder each file is one" in failure


def test_a_single_image_is_a_video_of_one_frame(copy, tmp_path):
    drawn(1)[0].save(copy / "data/one.jpg")
    rows = rows_of(copy, "train")
    write_rows(copy, "train", [{**rows[0], "video": "one.jpg"}, *rows[1:]])
    demo = load_demo(copy, script, *vision(copy))
    assert len(demo.trees[0].prefix) == 9 + 81


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_center_crop": False}, "images would differ in size"),
        ({"crop_size": {"height": 100, "width": 112}}, "100 x 112 pixels are not divisible into 7 px patches"),
    ],
)
def test_an_image_processor_that_does_not_fit_the_tower_is_refused(copy, tmp_path, change, words):
    edit_json(copy / "vision/preprocessor_config.json", **change)
    assert words in refused(copy, tmp_path, "--check")


def test_what_is_cropped_from_the_frames_is_said_and_image_fit_shows_all(copy, tmp_path):
    save_as("gif", copy / "data/wide", [frame.resize((160, 90)) for frame in drawn()])
    rows = rows_of(copy, "train")
    write_rows(copy, "train", [{**rows[0], "video": "wide/v.gif"}, *rows[1:]])
    text = printed(lambda: run(copy, tmp_path / "crop", *SMALL, "--check"))
    found = json.loads((tmp_path / "crop/check.json").read_text())
    cropped = found["pictures"]["cropped_away"]
    assert (found["image_fit"], cropped["file"], cropped["most"]) == ("crop", "wide/v.gif", 0.4375)
    assert "of the pixels are cropped away, at most 44% (wide/v.gif); --image-fit pad or squash shows all" in text
    assert "cropped away" not in printed(lambda: run(copy, tmp_path / "pad", *SMALL, "--check", "--image-fit", "pad"))


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_a_model_is_bound_to_how_its_frames_were_fitted(copy, tmp_path, fit):
    run(copy, tmp_path / "run", *SMALL, "--max-steps", 1, "--image-fit", fit)
    text = printed(lambda: run(copy, tmp_path / "run", *SMALL, "--eval-only"))
    assert f"image_fit {fit} (from " in text
    assert "image_fit was " in refused(copy, tmp_path / "run", *SMALL, "--max-steps", 1)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run/model", again / "model")
    shutil.copytree(copy / "data", again / "data")
    demo = load_demo(again, script)
    assert demo.args.image_fit == fit and processors.fit_of(demo.task.processor) == fit


def test_features_of_frames_that_were_fitted_otherwise_are_no_features_of_theirs(copy, tmp_path):
    flags = [*vision(copy), *LITTLE, "--from-scratch", "--cache-features", tmp_path]
    caches = [load_demo(copy, script, *flags, *fit).task.cache for fit in ([], ["--image-fit", "pad"])]
    assert len({cache.path(["0f"], [0]) for cache in caches}) == 2


# --- examples --------------------------------------------------------------------------------------------------


def test_json_lines_give_the_same_examples_as_conversations(copy, data):
    for split in ("train", "val", "test"):
        rows = rows_of(copy, split)
        (copy / f"data/{split}.json").unlink()
        lines = [{"id": r["id"], "answer": r["conversations"][1]["value"], "video": r.get("video")} for r in rows]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (copy / f"data/{split}.jsonl").write_text(text)
    found = load_demo(copy, script, *vision(copy))
    places = ("where", "group", "groups")  # a text alone is named by its place
    plain = lambda e: {k: v for k, v in asdict(e).items() if k not in (places if not e.media else places[:1])}  # noqa: E731
    assert [plain(example) for example in found.examples] == [plain(example) for example in data.examples]
    assert [t.branches for t in found.trees] == [t.branches for t in data.trees]


def test_a_conversation_becomes_an_example_for_each_answer_with_what_was_said_before(copy):
    rows = rows_of(copy, "train")
    said = ["<video>\nChe cosa si muove?", "Un cerchio.", "Dove va?", "Verso destra."]
    turns = [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * 2, said, strict=True)]
    write_rows(copy, "train", [{**rows[0], "conversations": turns}, *rows[1:]])
    demo = load_demo(copy, script, *vision(copy), *LITTLE)
    [tree] = [tree for tree in demo.trees if f"{rows[0]['id']}.0" in tree.ids]  # the video is read once
    assert tree.ids == [f"{rows[0]['id']}.0", f"{rows[0]['id']}.1"]
    texts = [demo.task.tokenizer.decode(ids) for ids, _ in tree.branches]
    end = "<|endoftext|>"
    assert texts == [
        f"{end}Che cosa si muove?\nUn cerchio.{end}",
        f"{end}Che cosa si muove?\nUn cerchio.\nDove va?\nVerso destra.{end}",
    ]
    supervised = [demo.task.tokenizer.decode([x for x in labels if x >= 0]) for _, labels in tree.branches]
    assert supervised == [f"Un cerchio.{end}", f"Verso destra.{end}"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conversations": []}, "turns must alternate"),
        ({"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "Un cerchio."}]}, "<video> once"),
        ({"conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": " "}]}, "answer is empty"),
        ({"video": None}, "<video> once where the entry names a video, and not otherwise"),
        ({"vidoe": "x"}, "did you mean 'video'"),
        ({"conversations": None}, "the answer is empty"),
        ({"conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": ["a"]}]}, "must be a text"),
        ({"conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "\ud800"}]}, "half a char"),
        ({"video": ["a.gif"]}, "video must be a text, not the list"),
        ({"answer_candidates": "x"}, "answer_candidates must be a list"),
    ],
)
def test_examples_that_cannot_be_used_are_refused_by_name(copy, tmp_path, change, words):
    rows = rows_of(copy, "train")
    row = {**rows[0], **change}
    if "vidoe" in change:
        del row["video"]
    write_rows(copy, "train", [row, *rows[1:]])
    refused(copy, tmp_path, *SMALL, "--check")
    failures = json.loads((tmp_path / "check.json").read_text())["failures"]
    assert len(failures) == 1 and rows[0]["id"] in failures[0] and words in failures[0]


def test_the_turns_of_a_conversation_are_in_one_split(copy):
    """Later ones tell what was said in the earlier ones."""
    rows = [row for split in ("train", "val", "test") for row in rows_of(copy, split)]
    for split in ("train", "val", "test"):
        (copy / f"data/{split}.json").unlink()
    turns = [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * 2, "abcd", strict=True)]
    texts = [{"id": None if i % 2 else f"x{i}", "conversations": turns} for i in range(30)]
    write_rows(copy, "all", [*rows, *texts])
    args = script.parse_arguments(["--model", "m", "--data", str(copy / "data"), "--out", "o"])
    found, problems = script.read_examples(copy / "data", args)
    assert problems == []
    splits = {}
    for example in found:
        splits.setdefault(example.id.removesuffix(".0").removesuffix(".1"), set()).add(example.split)
    assert len(splits) == len(rows) + 30 and all(len(found) == 1 for found in splits.values())


def test_accents_are_composed_so_that_a_word_has_one_spelling(copy):
    rows = rows_of(copy, "train")
    for row, text in zip(rows, ("Va all'insù.", "Va all'insu\u0300."), strict=False):
        row["conversations"][1]["value"] = text
    write_rows(copy, "train", rows)
    demo = load_demo(copy, script, *vision(copy), *LITTLE)
    assert demo.examples[0].answer == demo.examples[1].answer == "Va all'insù."


def test_a_text_alone_shows_nothing_that_could_be_shared(copy, tmp_path):
    write_rows(copy, "val", [*rows_of(copy, "val"), next(row for row in rows_of(copy, "train") if "video" not in row)])
    rows = rows_of(copy, "val")
    write_rows(copy, "val", [*rows[:-1], {**rows[-1], "id": "alone"}])
    run(copy, tmp_path, *SMALL, "--check")
    found = json.loads((tmp_path / "check.json").read_text())["shared_with_earlier_splits"]["val"]
    assert found["questions"] == 7 and found["questions_touched"] == found["questions_contained"] == 0


def test_the_same_video_in_two_splits_is_refused(copy, tmp_path):
    rows = rows_of(copy, "test")
    write_rows(copy, "test", [{**rows[0], "video": rows_of(copy, "train")[0]["video"]}, *rows[1:]])
    refused(copy, tmp_path, *SMALL, "--check")
    [failure] = json.loads((tmp_path / "check.json").read_text())["failures"]
    assert rows[0]["id"] in failure and "is also in train" in failure


# --- features on disk ------------------------------------------------------------------------------------------


@pytest.fixture
def tower_calls(monkeypatch):
    """How many frames the tower has read, each time it was called."""
    calls = []
    forward = script.VideoPlainLM.patch_features

    def counted(self, video: Video):
        if video.features is None:
            calls.append(video.frames)
        return forward(self, video)

    monkeypatch.setattr(script.VideoPlainLM, "patch_features", counted)
    return calls


def test_with_the_cache_later_epochs_run_without_the_tower_and_are_the_same(plain_folder, tmp_path, tower_calls):
    flags = [*SMALL, "--epochs", 3, "--eval-every", 2]
    run(plain_folder, tmp_path / "without", *flags)
    without = len(tower_calls)
    run(plain_folder, tmp_path / "with", *flags, "--cache-features", tmp_path / "cache")
    first = len(tower_calls) - without
    assert first == 40  # each video once, whatever epoch, validation or answer asks for it
    assert without > 3 * 28
    run(plain_folder, tmp_path / "again", *flags, "--cache-features", tmp_path / "cache")
    assert len(tower_calls) == without + first
    for other in ("with", "again"):
        assert metrics_of(tmp_path / other) == metrics_of(tmp_path / "without")
        last = sorted((tmp_path / other / "checkpoints").iterdir())[-1]
        mine, theirs = (read_tensors(f) for f in (last, tmp_path / "without/checkpoints" / last.name))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
        assert read_lines(tmp_path / other / "predictions.jsonl") == read_lines(tmp_path / "without/predictions.jsonl")


def cached_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def check_cache(folder: Path, tmp_path: Path, tower_calls: list, *flags) -> tuple[int, set[str]]:
    """(videos that the tower reads, files of the cache) when the first six training videos are read once."""
    before = len(tower_calls)
    demo = load_demo(folder, script, *vision(folder), *LITTLE, "--from-scratch", "--cache-features", tmp_path, *flags)
    model = load(demo)
    trees = [tree for tree in demo.trees if tree.media][:6]
    model.video_features(batch(demo, trees)["videos"])
    return len(tower_calls) - before, cached_in(tmp_path)


@pytest.mark.parametrize("change", ["weight", "configuration", "processor", "pixel", "frames"])
def test_whatever_features_depend_on_misses_the_cache_when_it_changes(copy, tmp_path, tower_calls, change):
    cache, flags, missed = tmp_path / "cache", [], 6
    read, files = check_cache(copy, cache, tower_calls)
    assert read == len(files) == 6
    assert check_cache(copy, cache, tower_calls) == (0, files)
    if change == "weight":  # one number in the middle of the file
        weights = load_file(copy / "vision/model.safetensors")
        weights["encoder.layer.1.mlp.fc1.weight"][3, 5] += 1e-4
        save_file(weights, copy / "vision/model.safetensors", {"format": "pt"})
    if change == "configuration":
        edit_json(copy / "vision/config.json", layer_norm_eps=1e-3)
    if change == "processor":
        edit_json(copy / "vision/preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    if change == "pixel":
        video = next(row["video"] for row in rows_of(copy, "train") if "." not in row.get("video", "."))
        name = sorted((copy / "data" / video).iterdir())[-1]
        pixels = np.asarray(Image.open(name)).copy()
        pixels[:8, :8] = 255 - pixels[:8, :8]
        Image.fromarray(pixels).save(name, quality=90)
        missed = 1
    if change == "frames":
        flags = ["--slow-frames", 3]
    read, more = check_cache(copy, cache, tower_calls, *flags)
    assert read == missed and len(more - files) == missed and files < more
    assert check_cache(copy, cache, tower_calls, *flags) == (0, more)


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_what_only_the_language_model_depends_on_does_not_miss_the_cache(copy, tmp_path, tower_calls):
    check_cache(copy, tmp_path, tower_calls)
    edit_json(copy / "model/config.json", n_layer=2)
    assert check_cache(copy, tmp_path, tower_calls, "--slow-grid", 3, "--lr", 1)[0] == 0


def test_a_video_that_changes_after_its_check_is_not_cached_as_what_it_was(copy, tmp_path):
    cache = tmp_path / "cache"
    demo = load_demo(copy, script, *vision(copy), *LITTLE, "--from-scratch", "--cache-features", cache)
    load(demo)
    tree = next(tree for tree in demo.trees if tree.media and tree.media.files[0].endswith(".gif"))
    path = copy / "data" / tree.media.files[0]
    drawn()[0].save(path, save_all=True, append_images=drawn()[1:])
    with pytest.raises(ValueError, match="has changed since it was checked"):
        demo.read_media([tree])
    assert cached_in(cache) == set()


def rewritten(edit):
    """An entry with other tensors and the digest that it had."""

    def damage(path: Path) -> None:
        with safe_open(path, "pt") as file:
            tensors, carried = edit(file.get_tensor("features").clone()), file.metadata()
        save_file(tensors, path, carried)

    return damage


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "one patch a frame": rewritten(lambda t: {"features": t[:, :1].contiguous()}),
    "the same numbers in another shape": rewritten(lambda t: {"features": t.view(t.shape[1], -1, t.shape[2])}),
    "the same bytes of another type": rewritten(lambda t: {"features": t.view(torch.int32)}),
    "half as exact": rewritten(lambda t: {"features": t.bfloat16()}),
    "another key": rewritten(lambda t: {"feature": t}),
    "without a digest": lambda path: save_file(load_file(path), path),
}


def test_damaged_entries_of_the_cache_are_written_anew_and_counted(plain_folder, tmp_path, capsys):
    flags = [*SMALL, "--max-steps", 2, "--limit", 8, "--eval-every", 99, "--workers", 1]
    flags += ["--cache-features", tmp_path / "cache"]
    run(plain_folder, tmp_path / "a", *flags)
    assert "entries were damaged" not in capsys.readouterr().err
    paths = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for damage, path in zip(DAMAGES.values(), paths, strict=False):
        damage(path)
    one, other = paths[len(DAMAGES) : len(DAMAGES) + 2]
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    said = f"--cache-features {tmp_path / 'cache'}: {len(DAMAGES) + 2} entries were damaged "
    run(plain_folder, tmp_path / "b", *flags)
    assert capsys.readouterr().err.count(said) == 1
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")
    assert read_lines(tmp_path / "b/predictions.jsonl") == read_lines(tmp_path / "a/predictions.jsonl")
    run(plain_folder, tmp_path / "c", *flags)
    assert "entries were damaged" not in capsys.readouterr().err


def test_no_flipped_bit_of_an_entry_of_the_cache_is_read(tmp_path):
    path = tmp_path / "entry.safetensors"
    features.write_features(path, torch.linspace(-1, 1, 24).view(2, 3, 4))
    (tmp_path / "new").touch()
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode  # readable to those who share the cache
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert features.read_features(path) == (None, True), bit
    path.write_bytes(content)
    found, damaged = features.read_features(path)
    assert torch.equal(found, torch.linspace(-1, 1, 24).view(2, 3, 4)) and not damaged
    assert features.read_features(tmp_path / "none.safetensors") == (None, False)


def test_augmented_videos_have_no_cache(plain_folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script(plain_folder, tmp_path, "--augment", "--cache-features", tmp_path / "cache", script=script)
    assert "--augment with --cache-features: what is kept is of unchanged videos" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_says_so(plain_folder, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    text = refused(plain_folder, tmp_path / "run", *SMALL, "--cache-features", tmp_path / "cache")
    assert "cannot be written" in text


# --- training and resuming -------------------------------------------------------------------------------------


def test_stopped_and_started_again_it_is_the_same_run(plain_folder, tmp_path, monkeypatch):
    flags = [*SMALL, "--max-steps", 6, "--save-every", 2]
    run(plain_folder, tmp_path / "complete", *flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        stop_in(patch, 3, script)
        run(plain_folder, tmp_path / "parts", *flags)
    assert ended.value.code == 85
    run(plain_folder, tmp_path / "parts", *flags)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "complete")
    complete, parts = (read_tensors(tmp_path / name / "checkpoints/step-00000006") for name in ("complete", "parts"))
    assert all(torch.equal(complete[k], parts[k]) for k in complete) and complete.keys() == parts.keys()


def test_a_saved_model_has_its_tower_and_layout_and_answers_the_same(plain_folder, tmp_path):
    run(plain_folder, tmp_path / "run", *SMALL, "--max-steps", 4)
    refuses_elsewhere(tmp_path / "run/model", GPT2LMHeadModel, f"gpt2 {GRAFT}")
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(tmp_path / "run/model", again / "model")
    shutil.copytree(plain_folder / "data", again / "data")
    checkpoint = tmp_path / "run/checkpoints/step-00000004"
    text = printed(
        lambda: run_script(again, tmp_path / "more", *SMALL[8:], "--max-steps", 1, "--lr", 1e-9, script=script)
    )
    assert "slow_grid 2 (from " in text and "10 positions a video" in text
    mine, theirs = (
        {r["id"]: r["prediction"] for r in read_lines(tmp_path / name / "predictions.jsonl")}
        for name in ("run", "more")
    )
    assert mine == theirs
    (again / "model/script_config.json").rename(again / "model/config.json")  # as older versions wrote it
    for flags in (vision(plain_folder), ["--from-scratch"]):
        assert "was trained by this script: no" in script_refused(again, tmp_path / "x", *flags, script=script)
    # merged from the checkpoint it is the same, and answering takes the layout from there
    flags = ["--model", plain_folder / "model", *vision(plain_folder), "--from-scratch", "--out", tmp_path / "run"]
    script.main([str(flag) for flag in [*flags, "--merge", tmp_path / "merged"]])
    merged, saved = (read_tensors(folder) for folder in (tmp_path / "merged", tmp_path / "run/model"))
    assert merged.keys() == saved.keys() and all(torch.equal(merged[k], saved[k]) for k in merged)
    flags = ["--eval-only", "--resume", checkpoint, "--max-answer-tokens", 4]
    run(plain_folder, tmp_path / "eval", *flags)
    assert {r["id"]: r["prediction"] for r in read_lines(tmp_path / "eval/predictions.jsonl")} == mine


def test_another_tower_than_in_training_is_refused(plain_folder, copy, tmp_path):
    run(plain_folder, tmp_path, *SMALL, "--max-steps", 1)
    weights = load_file(copy / "vision/model.safetensors")
    weights["layernorm.bias"] += 1
    save_file(weights, copy / "vision/model.safetensors", {"format": "pt"})
    text = refused(copy, tmp_path, "--eval-only")
    assert "--vision-model" in text and "was trained with another model" in text
    assert "vision_weights was" in refused(copy, tmp_path, *SMALL, "--max-steps", 1)


def test_another_image_processor_than_in_training_is_refused(plain_folder, copy, tmp_path):
    run(plain_folder, tmp_path, *SMALL, "--max-steps", 1)
    edit_json(copy / "vision/preprocessor_config.json", image_mean=[0.1, 0.9, 0.1])
    text = refused(copy, tmp_path, "--eval-only")
    assert "--vision-model" in text and "was trained with another model, or another configuration" in text


def test_a_bfloat16_run_trains_in_float32_and_reads_its_cache(plain_folder, tmp_path):
    """On a CPU as on a GPU: the tower in bfloat16, what is trained in float32 and cast where it is used."""
    flags = [*SMALL, "--epochs", 2, "--dtype", "bf16", "--cache-features", tmp_path / "cache", "--workers", 1]
    run(plain_folder, tmp_path / "run", *flags, "--grad-checkpoint")
    weights = load_file(max((tmp_path / "run/checkpoints").iterdir()) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    entries = [load_file(path)["features"] for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert len(entries) == 40 and {entry.dtype for entry in entries} == {torch.bfloat16}
    exact = [*SMALL, "--epochs", 2]
    run(plain_folder, tmp_path / "exact", *exact)
    losses = [[line["loss"] for line in metrics_of(tmp_path / name) if "loss" in line] for name in ("run", "exact")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_a_tower_that_is_no_dinov2_is_refused(plain_folder, copy, tmp_path):
    edit_json(copy / "vision/config.json", model_type="vit")
    assert "model_type 'vit', not 'dinov2'" in refused(copy, tmp_path, "--check")


def test_a_tower_whose_weights_are_missing_is_never_drawn_at_random(copy, tmp_path):
    weights = load_file(copy / "vision/model.safetensors")
    del weights["encoder.layer.2.mlp.fc2.weight"]
    save_file(weights, copy / "vision/model.safetensors", {"format": "pt"})
    assert "weights are missing" in refused(copy, tmp_path, *SMALL)


def test_texts_and_videos_train_the_language_model_alike_after_fifty_steps(plain_folder, tmp_path):
    """Their gradients at the language model are within a factor of three: neither kind of example drowns the other."""
    flags = [*LITTLE, "--slow-grid", 3, "--slow-frames", 4, "--questions-per-step", 4, "--pack-tokens", 256]
    flags += ["--max-answer-tokens", 1, "--max-steps", 50, "--epochs", 9, "--lr", 3e-4]
    run(plain_folder, tmp_path, *flags)
    demo = load_demo(plain_folder, script, *vision(plain_folder), "--from-scratch", *flags)
    model = script.load_model(plain_folder / "model", demo.task, torch.float32)
    adapters.load_trained(model.vlm, tmp_path / "checkpoints/step-00000050")
    model.eval()
    norms = []
    for trees in ([t for t in demo.trees if t.media], [t for t in demo.trees if not t.media]):
        model.zero_grad()
        supervised = sum(tree.supervised() for tree in trees)
        for packed in pack(trees, 256):
            (model({**packed, **demo.read_media(packed["prompts"])})[0] / supervised).backward()
        grads = [
            p.grad for name, p in model.vlm.named_parameters() if name.startswith("transformer.") and p.grad is not None
        ]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
    assert 1 / 3 < norms[0] / norms[1] < 3, norms


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_exact_is_the_text_itself_and_relaxed_as_answers_are_compared_elsewhere(data):
    caption = next(example for example in data.examples if example.media)
    example = replace(caption, answer="Va a destra, più in fretta.")

    def right(prediction) -> tuple[bool, bool]:
        found = data.task.score(prediction, example)
        return found["exact"], found["relaxed"]

    assert right("Va a  destra, piu\u0300 in fretta.\n") == (True, True)
    assert right("va a destra più in fretta") == (False, True)
    assert right("Va destra, più in fretta.") == (False, False)  # "a" is an article at the beginning alone
    assert right("Va a destra, piu in fretta.") == right("") == right(None) == right("Va a destra") == (False, False)
    example = replace(example, question="Dove va?")  # an answer, not a text
    assert right("va a destra più in fretta") == (True, True)


def test_results_hold_the_figures_of_captions(plain_folder, tmp_path):
    text = printed(lambda: run(plain_folder, tmp_path, *SMALL, "--max-steps", 1))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["pairs"] == 6 and 0 <= results["retrieval"] <= 1
    assert results["perplexity"] == pytest.approx(math.exp(results["loss"]))
    assert f"perplexity {results['perplexity']:.3f}" in text and "likelier with its own video" in text
    assert results["positions"] == {"fast": 2, "slow": 8}


def test_the_demo_s_direction_takes_more_than_one_frame():
    """Who knows where the shape is in the first frame, and 12,000 other motions, is right two times in three."""
    rng, places = np.random.default_rng(0), []
    for _ in range(16_000):
        motion = random_motion(rng)
        x, y = motion_scene(motion, 0)["things"][-1]["at"]
        places.append(((int(x // 10), int(y // 10)), motion["direction"]))
    seen = {}
    for place, direction in places[:12_000]:
        seen.setdefault(place, Counter())[direction] += 1
    best = {place: directions.most_common(1)[0][0] for place, directions in seen.items()}
    right = sum(best.get(place) == direction for place, direction in places[12_000:]) / 4_000
    assert 0.6 < right < 0.7, right
