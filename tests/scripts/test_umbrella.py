"""train_umbrella_mri on a tiny LLaVA and drawn heads in the real formats: patches, what is trained, packing, runs."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brain_scans import SMALL, VOLUMES, conversation, load_demo, refused, run
from helpers import difference, gradients, metrics_of, read_lines, read_tensors, refuses_elsewhere, stop_in
from helpers import load_demo as load_with
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import common
import train_umbrella_mri as script
from common import IGNORE, answering_prompt, pack
from inputs import volumes
from inputs.volumes import Modality
from runtime import EXIT_STOPPED, Run
from runtime.signals import StopSignal
from train_umbrella_mri import PatchEmbed

TESTS = Path(nibabel.__file__).parent / "tests/data"


@pytest.fixture(scope="module")
def data(mri_folder):
    return load_demo(mri_folder)


@pytest.fixture
def copy(mri_folder, tmp_path):
    return Path(shutil.copytree(mri_folder, tmp_path / "demo"))


def load(data, **settings) -> script.Umbrella:
    task = script.UmbrellaTask(data.folder / "model", SimpleNamespace(**{**vars(data.args), **settings}))
    torch.manual_seed(0)
    model = script.load_model(data.folder / "model", task, torch.float32)
    for layer in common.lora_layers(model.vlm).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)  # at zero, A would have no gradient
    return model


# ---- patches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modality", "ragged", "tokens"),
    [
        ("T1:96x96x96:10x10x10", "crop", 729),
        ("T1:96x96x96:10x10x10", "pad", 1000),
        ("rsfMRI:96x96x96x24:16x16x16x3", "pad", 1728),
        ("rsfMRI:96x96x96x24:16x16x16x3", "crop", 1728),
        ("rsfMRI:96x96x96x24:10x10x10x4", "crop", 9 * 9 * 9 * 6),
        ("rsfMRI:96x96x96x24:10x10x10x4", "pad", 10 * 10 * 10 * 6),
        ("dMRI:90x108x90:9x9x9:7", "crop", 1200),
    ],
)
def test_tokens_are_counted_from_the_grid_and_the_embedding_gives_as_many(modality, ragged, tokens):
    modality = Modality.read(modality)
    assert modality.tokens(ragged) == tokens
    embed = PatchEmbed(modality, ragged, width=2)
    assert embed(torch.zeros(1, modality.channels, *modality.size)).shape == (1, tokens, 2)


@pytest.mark.parametrize("ragged", ["pad", "crop"])
@pytest.mark.parametrize(
    "modality", ["a:9x8x7:4x3x2", "b:9x6x5x7:4x3x2x3:2", "c:4x4x4:2x2x2", "d:6x5x4:4x3x3:3"], ids=lambda m: m[0]
)
def test_a_voxel_changes_exactly_its_own_token(modality, ragged):
    """Token number from the voxel's coordinates; what is cropped changes none, and padding shifts by half."""
    modality = Modality.read(modality)
    torch.manual_seed(0)
    embed = PatchEmbed(modality, ragged, width=5)
    empty = torch.zeros(1, modality.channels, *modality.size)
    before, lost = embed(empty), 0
    for place in itertools.product(range(modality.channels), *map(range, modality.size)):
        volume = empty.clone()
        volume[(0, *place)] = 1
        changed = (embed(volume) != before).any(-1)[0].nonzero().flatten().tolist()
        number, inside = 0, True
        for at, size, patch in zip(place[1:], modality.size, modality.patch, strict=True):
            count = size // patch if ragged == "crop" else math.ceil(size / patch)
            at += math.trunc((count * patch - size) / 2)  # to the left of it stand half of the zeros, or of what is cut
            inside &= 0 <= at < count * patch
            number = number * count + at // patch
        lost += not inside
        assert changed == ([number] if inside else [])
    covered = math.prod(modality.reach(ragged))
    assert lost == (modality.channels * (math.prod(modality.size) - covered) if ragged == "crop" else 0)


def test_the_4d_projection_is_a_plain_loop_over_patches():
    modality = Modality.read("rsfMRI:10x9x8x6:4x3x4x3:2")
    torch.manual_seed(0)
    embed, volumes = PatchEmbed(modality, "pad", width=16), torch.randn(2, 2, 10, 9, 8, 6)
    padded = F.pad(volumes, (0, 0, 0, 0, 0, 0, 1, 1))
    found = embed(volumes)
    number = 0
    for i, j, k, t in itertools.product(range(0, 12, 4), range(0, 9, 3), range(0, 8, 4), range(0, 6, 3)):
        patch = padded[:, :, i : i + 4, j : j + 3, k : k + 4, t : t + 3].flatten(1)
        expected = patch @ embed.projection.weight.T + embed.projection.bias + embed.position.weight[number]
        assert (found[:, number] - expected).norm() < 1e-6 * expected.norm()
        number += 1
    assert number == found.shape[1]


def test_the_3d_projection_is_torch_s_convolution():
    embed, volumes = PatchEmbed(Modality.read("T1:12x8x16:4x4x4:3"), "crop", width=6), torch.randn(2, 3, 12, 8, 16)
    weight = embed.projection.weight.view(6, 3, 4, 4, 4)
    expected = F.conv3d(volumes, weight, embed.projection.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(volumes) - embed.position.weight, expected, rtol=0, atol=1e-5)


def test_positions_are_drawn_from_a_truncated_normal_of_0_02():
    weight = PatchEmbed(Modality.read("T1:96x96x96:10x10x10"), "pad", width=64).position.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.02) and float(weight.mean()) == pytest.approx(0, abs=1e-3)


def test_what_cropping_loses_is_said_and_modalities_that_cannot_be_are_refused(mri_folder, tmp_path, capsys):
    assert Modality.read("T1:96x96x96:10x10x10").describe("crop").endswith("17.6% of the voxels are lost")
    assert "lost" not in Modality.read("T1:96x96x96:10x10x10").describe("pad")
    ragged = ["--modality", "T1:32x32x32:10x10x10", "--modality", VOLUMES[3]]
    run(mri_folder, tmp_path, *ragged, "--ragged", "crop", "--check")
    assert "3 x 3 x 3 = 27 tokens a volume; cropped, 17.6% of the voxels are lost" in capsys.readouterr().out
    for flags, why in {
        ("--modality", "T1:32x32x32:40x8x8", "--ragged", "crop"): "patches of (40, 8, 8) are larger than",
        ("--modality", "T1:32x32x32:8x8"): "'T1:32x32x32:8x8' is no NAME:SIZE:PATCH",
        ("--modality", "T1:32x32x0:8x8x8"): "is no NAME:SIZE:PATCH",
        ("--modality", "T1:32x32x32:8x8x8:0"): "is no NAME:SIZE:PATCH",
        ("--modality", "T1:8x8x8:8x8x8", "--modality", "T1:9x9x9:3x3x3"): "T1, T1: a name twice",
        ("--labels", "sex=male"): "labels must be at least two",
    }.items():
        with pytest.raises(SystemExit):
            run(mri_folder, tmp_path, *flags, "--check")
        assert why in capsys.readouterr().err


# ---- what is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["embedding", "embedding+lora", "full"])
def test_after_a_step_what_is_frozen_is_the_same_and_what_is_trained_has_changed(data, tune):
    model = load(data, tune=tune)
    before = {name: p.detach().clone() for name, p in model.vlm.named_parameters()}
    frozen = {name for name, p in model.vlm.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    trees = [tree for tree in data.trees if tree.media[0].modality == "T1"][:2]
    trees += [tree for tree in data.trees if tree.media[0].modality == "rsfMRI"][:2]
    model.train()
    for batch in pack(trees, 4096):
        model({**batch, **data.read_media(batch["prompts"])})[0].backward()
    optimizer.step()
    same = {name for name, p in model.vlm.named_parameters() if torch.equal(p, before[name])}
    assert same == frozen
    embedding = {f"patch_embed.{m}.{p}" for m in ("T1", "rsfMRI") for p in ("projection.weight", "projection.bias")}
    embedding |= {f"patch_embed.{m}.position.weight" for m in ("T1", "rsfMRI")}
    trained = before.keys() - frozen
    if tune == "embedding":
        assert trained == embedding
    elif tune == "embedding+lora":
        adapters = trained - embedding
        assert embedding < trained and all(".language_model.layers." in n and ".lora_" in n for n in adapters)
        assert len(adapters) == 2 * 7 * 2
    else:
        assert all("post_layernorm" in name for name in frozen)  # behind what is read of the tower


def test_a_pattern_that_matches_nothing_is_an_error(data, monkeypatch):
    monkeypatch.setattr(script, "EMBEDDING_PATTERN", r"model\.vision_tower\.vision_model\.embeddings\..*")
    with pytest.raises(SystemExit, match="no parameter matches"):
        load(data)


def test_the_frozen_parts_of_a_run_are_bit_identical_and_the_summary_names_what_is_trained(trained, mri_folder):
    out, printed = trained
    checkpoint = load_file(next((out / "checkpoints").iterdir()) / "model.safetensors")
    assert {name.split(".")[0] for name in checkpoint} == {"patch_embed"}
    before, after = load_file(mri_folder / "model/model.safetensors"), load_file(out / "model/model.safetensors")
    # the tower's own embeddings are the only thing that is gone, the new ones the only thing that came
    assert all("vision_tower" in name and ".embeddings." in name for name in before.keys() - after.keys())
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"patch_embed"}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    count = sum(tensor.numel() for tensor in checkpoint.values())
    assert re.search(rf"trained: {count:,} of [\d,]+ parameters \([\d.]+%\): patch_embed {count:,}\n", printed)


@pytest.mark.parametrize("tune", ["embedding", "embedding+lora", "full"])
def test_bf16_trains_float32_masters(mri_folder, tmp_path, tune):
    """On a CPU: a tower in bfloat16 takes the embedding's float32 positions only if they are cast."""
    flags = [*SMALL, "--dtype", "bf16", "--tune", tune, "--max-steps", 2, "--grad-checkpoint", "--lora-dropout", 0]
    run(mri_folder, tmp_path / "bf16", *flags)
    run(mri_folder, tmp_path / "fp32", *flags, "--dtype", "fp32")
    small, full = ([line["loss"] for line in metrics_of(tmp_path / d) if "loss" in line] for d in ("bf16", "fp32"))
    assert small == pytest.approx(full, rel=0.02) and small != full
    saved = read_tensors(tmp_path / "bf16/checkpoints/step-00000002")
    assert {t.dtype for (_, name), t in saved.items() if "patch_embed" in name} == {torch.float32}


def test_gradient_checkpointing_reaches_the_embedding_through_the_frozen_tower(data):
    """The same gradients, with the tower's layers computed twice."""
    trees, found = data.trees[:2], []
    for checkpointing in (False, True):
        model = load(data, grad_checkpoint=checkpointing).train()
        calls = []
        layer = model.vlm.model.vision_tower.encoder.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        (batch,) = pack(trees, 4096)
        found.append(gradients(model, model({**batch, **data.read_media(batch["prompts"])})[0]))
        assert len(calls) == (2 if checkpointing else 1)
    assert found[0]["vlm.patch_embed.T1.projection.weight"].norm() > 0
    assert difference(found[1], found[0]) < 1e-6


def test_a_frozen_tower_has_no_dropout_though_its_configuration_says_so(copy):
    """It stays in training mode, without which transformers would not checkpoint its layers."""
    config = json.loads((copy / "model/config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.5
    (copy / "model/config.json").write_text(json.dumps(config))
    data = load_demo(copy)
    media = data.read_media(data.trees[:2])
    for tune, same in (("embedding", True), ("full", False)):
        model = load(data, tune=tune).train()
        assert torch.equal(model.volume_features(media), model.volume_features(media)) == same


PUBLISHED = {  # llava-hf/llava-interleave-qwen-0.5b-hf: SigLIP so400m without its last layer and head, Qwen1.5 0.5B
    "model_type": "llava",
    "image_token_index": 151646,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "tie_word_embeddings": True,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 24,
        "tie_word_embeddings": True,
        "vocab_size": 152000,
    },
}


@pytest.mark.parametrize("ragged", ["crop", "pad"])
def test_check_counts_the_parameters_of_the_published_size(mri_folder, tmp_path, capsys, ragged):
    """Width 1152 is read from the tower, and the share that is trained is computed from the counts."""
    shutil.copytree(mri_folder / "model", tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    known = json.loads((tmp_path / "config.json").read_text())["image_token_index"]  # of the tokenizer that is there
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, "image_token_index": known}))
    argv = ["--model", str(tmp_path), "--check", "--ragged", ragged]
    script.main([*argv, "--modality", "T1:96x96x96:10x10x10"])
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.split("\n") if line}
    positions = {"crop": 729, "pad": 1000}[ragged]
    t1 = 1000 * 1152 + 1152 + positions * 1152
    assert lines["patch_embed.T1.projection.weight"] == ["1,152,000"]
    assert lines["patch_embed"] == [f"{t1:,}", f"{t1:,}"]
    tower = 26 * (4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152) + 2 * 1152
    assert lines["vision_tower"] == [f"{tower:,}", "0"]
    layer = 4 * 1024 * 1024 + 3 * 1024 + 3 * 1024 * 2816 + 2 * 1024
    assert lines["language_model"] == [f"{152000 * 1024 + 24 * layer + 1024:,}", "0"]
    projector = 1152 * 1024 + 1024 + 1024 * 1024 + 1024
    everything = tower + projector + 152000 * 1024 + 24 * layer + 1024 + t1
    assert lines["total"] == [f"{everything:,}", f"{t1:,}", f"({t1 / everything:.2%})"]
    script.main(argv)
    both = capsys.readouterr().out
    assert f"{t1 + 12288 * 1152 + 1152 + 1728 * 1152:,}" in both


# ---- packing is exact, with volumes of several kinds ----------------------------------------------------------------


def texts_of(entry: dict) -> str:
    """A conversation in the template of the published checkpoint, one <image> for each volume."""
    rendered = ""
    for turn in entry["conversations"]:
        images = "<image>" * sum(part["type"] == "image" for part in turn["content"])
        said = "".join("\n" + part["text"] for part in turn["content"] if part["type"] == "text")
        rendered += f"<|im_start|>{turn['role']} {images}{said}<|im_end|>"
    before, _, answer = rendered.rpartition("assistant \n")
    return f"{before}assistant\n{answer}"  # it is asked so (add_generation_prompt), and writes a space into answers


def embedded(model, data, input_ids: list[int], media: dict) -> torch.Tensor:
    """(1, T, width) put together by hand: each volume read, cut and sent through the tower alone."""
    features = []
    for volume in media:
        voxels = [volumes.read_file(data.folder / "data", name) for name in volume.files]
        voxels = volumes.normalise(torch.from_numpy(np.ascontiguousarray(voxels[0]))[None])
        tokens = model.vlm.patch_embed[volume.modality](voxels[None])
        states = model.vlm.model.vision_tower(tokens, output_hidden_states=True).hidden_states[-1]
        features.append(model.vlm.model.multi_modal_projector(states)[0])
    ids = torch.tensor([input_ids])
    embeds = model.vlm.get_input_embeddings()(ids).clone()
    embeds[ids == data.task.image_id] = torch.cat(features)
    return embeds


def separate(model, data, trees):
    """Each question in a sequence of its own through transformers' forward."""
    total = 0
    for tree in trees:
        for input_ids, labels in tree.branches:
            embeds = embedded(model, data, tree.prefix + input_ids, tree.media)
            log_probs = model.vlm(inputs_embeds=embeds).logits[0].log_softmax(-1)
            for i, label in enumerate(labels):
                if label != IGNORE:
                    total = total - log_probs[len(tree.prefix) + i - 1, label]
    return gradients(model, total)


def mixed(data) -> list:
    """T1 with several questions, rsfMRI, and a conversation with two volumes, in an order that mixes them."""
    kinds = lambda tree: [volume.modality for volume in tree.media]  # noqa: E731
    one = [tree for tree in data.trees if kinds(tree) == ["T1"] and len(tree.ids) > 1]
    series = [tree for tree in data.trees if kinds(tree) == ["rsfMRI"]]
    two = [tree for tree in data.trees if kinds(tree) == ["T1", "T1"]]
    return [one[0], series[0], two[0], one[1], series[1]]


def packed(model, data, trees, **changed):
    (batch,) = pack(trees, 4096)
    return gradients(model, model({**batch, **data.read_media(batch["prompts"]), **changed})[0])


@pytest.mark.parametrize("tune", ["embedding", "embedding+lora", "full"])
def test_a_mixed_batch_equals_its_conversations_one_by_one(data, tune):
    model = load(data, tune=tune).eval()
    found = packed(model, data, mixed(data))
    assert all(found[f"vlm.patch_embed.{name}.projection.weight"].norm() > 0 for name in ("T1", "rsfMRI"))
    assert difference(found, separate(model, data, mixed(data))) < 1e-5


def test_all_answers_supervised_as_examples_of_their_own_are_the_conversation_supervised_at_once(copy, data):
    """--supervise all: loss and gradients of one sequence in which every answer is supervised, through transformers.

    Where an answer of the conversation has the header that it is asked with; the published template adds a space.
    """
    mri_folder, template = copy, copy / "model/chat_template.jinja"
    template.write_text(template.read_text().replace("message['role'] + ' '", "message['role']"))
    path = conversation(mri_folder, "train", "comparison")
    entry, name = json.loads(path.read_text()), f"train/{path.stem}"
    every = load_demo(mri_folder, "--supervise", "all")
    trees = [tree for tree in every.trees if any(i in (name, f"{name} turn 1") for i in tree.ids)]
    trees = [tree.part([k for k, i in enumerate(tree.ids) if i in (name, f"{name} turn 1")]) for tree in trees]
    assert sorted(i for tree in trees for i in tree.ids) == [name, f"{name} turn 1"]
    model = load(data).eval()
    (batch,) = pack(trees, 4096)
    found = gradients(model, model({**batch, **every.read_media(batch["prompts"])})[0])

    text = re.sub(r"(user|assistant) ?(?=<image>|\n)", r"\1", texts_of(entry))
    for turn in entry["conversations"][1::2]:
        answer = turn["content"][0]["text"]
        text = text.replace(f"assistant\n{answer}", f"assistant\n<ANS>{answer}</ANS>")
    input_ids, labels = [], []
    for number, part in enumerate(re.split("</?ANS>", text)):  # answers are the odd parts, and EOS follows each
        ids = data.task.tokenizer.encode(part)
        eos = ids[:1] if number and number % 2 == 0 else []
        assert eos in ([], [data.task.tokenizer.eos_token_id])
        input_ids += ids
        labels += ids if number % 2 else eos + [IGNORE] * (len(ids) - len(eos))
    times = [64 if token == data.task.image_id else 1 for token in input_ids]
    input_ids, labels = (
        [x for x, n in zip(part, times, strict=True) for _ in range(n)] for part in (input_ids, labels)
    )
    assert input_ids.count(data.task.image_id) == 128 and sum(label != IGNORE for label in labels) > 10
    last = next(tree for tree in trees if name in tree.ids)
    log_probs = model.vlm(inputs_embeds=embedded(model, data, input_ids, last.media)).logits[0].log_softmax(-1)
    loss = -sum(log_probs[i - 1, label] for i, label in enumerate(labels) if label != IGNORE)
    assert difference(found, gradients(model, loss)) < 1e-5


def test_two_modalities_in_one_conversation_keep_their_order(copy, tmp_path):
    """A series shown before a T1 scan: its tokens are its own, wherever it stands."""
    entry = json.loads(conversation(copy, "train", "active_hemisphere").read_text())
    scan = json.loads(conversation(copy, "train", "lesion_side").read_text())["images"][0]
    content = [{"type": "image"}, {"type": "text", "text": "A series."}, {"type": "image"}]
    entry["conversations"][0]["content"] = [*content, {"type": "text", "text": "A scan."}]
    for number, images in enumerate([[*entry["images"], scan], [scan, *entry["images"]]]):
        (copy / f"data/train/both{number}.json").write_text(json.dumps({**entry, "images": images}))
    data = load_demo(copy)
    model = load(data).eval()
    trees = [tree for tree in data.trees if tree.ids[0].startswith("train/both")]
    assert [[v.modality for v in tree.media] for tree in trees] == [["rsfMRI", "T1"], ["T1", "rsfMRI"]]
    assert difference(packed(model, data, trees), separate(model, data, trees)) < 1e-5


def test_volumes_in_another_order_are_caught(data):
    model = load(data).eval()
    trees = mixed(data)
    right = packed(model, data, trees)
    (batch,) = pack(trees, 4096)
    media = data.read_media(batch["prompts"])
    swapped = media["volumes of T1"].flip(0)
    assert difference(packed(model, data, trees, **{"volumes of T1": swapped}), right) > 1e-3
    with pytest.raises(ValueError, match="Volume features and volume tokens do not match"):
        packed(model, data, trees, modalities=media["modalities"][:-1])


# ---- answers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_answers_are_those_of_a_greedy_walk_through_complete_sequences(data):
    """Token for token what transformers' forward gives when the complete sequence is read again for each."""
    args = SimpleNamespace(**{**vars(data.args), "max_answer_tokens": 5, "decode": "greedy"})
    model = load(data).eval()
    answering = Run(args, Path("never written"), torch.device("cpu"), torch.float32, StopSignal())
    trees = mixed(data)
    found = common.answer(model, trees, {e.id: e for e in data.examples}, data.task, answering)
    eos = data.task.tokenizer.eos_token_id
    for tree in map(answering_prompt, trees):
        for name, (prompt, _) in zip(tree.ids, tree.branches, strict=True):
            said = []
            while len(said) < 5 and eos not in said:
                embeds = embedded(model, data, tree.prefix + prompt + said, tree.media)
                said.append(int(model.vlm(inputs_embeds=embeds).logits[0, -1].argmax()))
            text = data.task.tokenizer.decode(said, skip_special_tokens=True).strip()
            assert found[name] == {"prediction": text, "ended": said[-1] == eos}


@torch.no_grad()
def test_greedy_answers_and_rankings_come_together_and_are_those_of_each_alone(data):
    model = load(data).eval()
    found = {}
    for mode in ("greedy", "ranked", "both"):
        args = SimpleNamespace(**{**vars(data.args), "max_answer_tokens": 5, "decode": mode})
        answering = Run(args, Path("never written"), torch.device("cpu"), torch.float32, StopSignal())
        found[mode] = common.answer(model, mixed(data), {e.id: e for e in data.examples}, data.task, answering)
    for name, both in found["both"].items():
        assert both == {**found["greedy"][name], "probabilities": found["ranked"][name]["probabilities"]}
        assert sum(both["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_probabilities_tell_even_confident_answers_apart(data, monkeypatch):
    """In float32 a log-probability 20 above the other's would be a probability of 1, as one 40 above it: a tie."""
    model = load(data).eval()
    args = SimpleNamespace(**{**vars(data.args), "decode": "ranked"})
    answering = Run(args, Path("never written"), torch.device("cpu"), torch.float32, StopSignal())
    surest = []
    for gap in (20.0, 30.0):
        one_first = lambda _, trees, *rest, gap=gap: {x: -gap * (i % 2) for i, x in enumerate(trees[0].ids)}  # noqa: E731
        monkeypatch.setattr(common, "log_probabilities", one_first)
        tree = next(tree for tree in data.trees if tree.media[0].modality == "rsfMRI")
        (found,) = common.answer(model, [tree], {e.id: e for e in data.examples}, data.task, answering).values()
        surest.append(max(found["probabilities"].values()))
    assert surest[0] < surest[1] < 1


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(mri_folder, tmp_path_factory):
    """A run of six steps with the patch embeddings trained, and what it printed."""
    out, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(mri_folder, out, *SMALL, "--max-steps", 6, "--epochs", 4, "--save-every", 3)
    return out, printed.getvalue()


def test_predictions_hold_the_text_and_the_probabilities_of_every_label(trained, mri_folder):
    out, _ = trained
    lines = read_lines(out / "predictions.jsonl")
    assert len(lines) == len(list((mri_folder / "data/test").glob("*.json")))
    for line in lines:
        assert list(line["probabilities"]) == line["candidates"] and isinstance(line["prediction"], str)
    results = json.loads((out / "results.json").read_text())
    assert set(results["types"]) == {"lesion_side", "ventricle_size", "comparison", "active_hemisphere"}
    for entry in results["types"].values():
        assert {"exact", "baselines", "balanced", "ranked", "auroc"} < entry.keys()
    assert results["modality"] == VOLUMES[1::2] and results["tokens"] == {"T1": 64, "rsfMRI": 54}


def test_stopped_and_resumed_it_is_the_same_run(mri_folder, trained, tmp_path, monkeypatch):
    flags = [*SMALL, "--max-steps", 6, "--epochs", 4, "--save-every", 3]
    with monkeypatch.context() as patch:
        stop_in(patch, 4, script)
        with pytest.raises(SystemExit) as stopped:
            run(mri_folder, tmp_path, *flags)
        assert stopped.value.code == EXIT_STOPPED
    run(mri_folder, tmp_path, *flags)
    assert metrics_of(tmp_path) == metrics_of(trained[0])
    mine, theirs = (read_tensors(out / "checkpoints/step-00000006") for out in (tmp_path, trained[0]))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_the_run_s_model_folder_answers_alike_and_goes_on_with_its_embeddings(mri_folder, trained, tmp_path, capsys):
    """Without any flag: how volumes are read stands in its configuration, which is not for plain transformers."""
    out, _ = trained
    words = "llava with patch_embed in the place of vision_tower.embeddings, which its own training script alone reads"
    refuses_elsewhere(out / "model", LlavaForConditionalGeneration, words)
    (tmp_path / "demo").mkdir()
    shutil.copytree(out / "model", tmp_path / "demo/model")
    os.symlink(mri_folder / "data", tmp_path / "demo/data")
    run(tmp_path / "demo", tmp_path / "more", "--max-steps", 1, "--lr", 0, "--max-answer-tokens", 4)
    printed = capsys.readouterr().out
    assert "modality ['T1:32x32x32:8x8x8', 'rsfMRI:24x24x24x4:8x8x8x2'] (from " in printed
    assert (tmp_path / "more/predictions.jsonl").read_text() == (out / "predictions.jsonl").read_text()
    (tmp_path / "demo/model/script_config.json").rename(tmp_path / "demo/model/config.json")  # as older versions wrote
    weights = load_file(tmp_path / "demo/model/model.safetensors")
    weights.pop("patch_embed.T1.position.weight")
    save_file(weights, tmp_path / "demo/model/model.safetensors", metadata={"format": "pt"})
    assert "patch_embed.* does not fit" in refused(tmp_path / "demo", tmp_path / "third", "--max-steps", 1)


def test_a_checkpoint_decides_how_volumes_are_read(mri_folder, trained, tmp_path, capsys):
    flags = ["--resume", trained[0] / "checkpoints/step-00000006", "--eval-only", "--max-answer-tokens", 4]
    run(mri_folder, tmp_path, *flags, "--no-normalise")
    assert "normalise True (from " in capsys.readouterr().out
    assert (tmp_path / "predictions.jsonl").read_text() == (trained[0] / "predictions.jsonl").read_text()
    changed = refused(mri_folder, trained[0], *SMALL, "--max-steps", 6, "--epochs", 4, "--no-normalise")
    assert "normalise was True, is False" in changed


def test_adapters_and_embeddings_are_saved_together_and_merge(mri_folder, tmp_path):
    flags = [*SMALL, "--tune", "embedding+lora", "--max-steps", 2, "--lora-dropout", 0, "--lr", 1e-2]
    run(mri_folder, tmp_path / "out", *flags)
    saved = {key.removeprefix("base_model.model.") for _, key in read_tensors(tmp_path / "out/adapter")}
    embedding = {name for name in saved if name.startswith("patch_embed.")}
    assert len(embedding) == 6 and all(".lora_" in name for name in saved - embedding)
    run(mri_folder, tmp_path / "out", *SMALL, "--merge", tmp_path / "demo/model")
    os.symlink(mri_folder / "data", tmp_path / "demo/data")
    run(tmp_path / "demo", tmp_path / "again", "--max-steps", 1, "--lr", 0, "--max-answer-tokens", 4)
    a, b = (read_lines(tmp_path / name / "predictions.jsonl") for name in ("out", "again"))
    for mine, theirs in zip(a, b, strict=True):
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], rel=1e-3)


def test_a_clip_tower_works_too_and_keeps_all_tokens(mri_folder, tmp_path):
    """No class token is embedded, so none is dropped, though the configuration's strategy is "default"."""
    torch.manual_seed(0)
    source = LlavaConfig.from_pretrained(mri_folder / "model")
    tower = CLIPVisionConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    config = LlavaConfig(
        vision_config=tower,
        text_config=source.text_config,
        image_token_index=source.image_token_index,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    shutil.copytree(mri_folder / "model", tmp_path / "demo/model")
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "demo/model")
    os.symlink(mri_folder / "data", tmp_path / "demo/data")
    data = load_demo(tmp_path / "demo")
    model = load(data, tune="full").eval()
    media = data.read_media(mixed(data))
    assert model.volume_features(media).shape == (64 + 54 + 128 + 64 + 54, source.text_config.hidden_size)
    found = gradients(model, model({**pack(mixed(data), 4096)[0], **media})[0])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split("vision_tower.")[1].rsplit(".", 1)[0] for name in frozen} >= {"post_layernorm"}
    assert any(".layers.2." in name for name in frozen) and not any(".layers.1." in name for name in frozen)
    assert (found.keys() - {"loss"}) | frozen == {name for name, _ in model.named_parameters()}
    run(tmp_path / "demo", tmp_path / "out", *SMALL, "--max-steps", 1)


def test_other_models_are_refused_by_name(video_folder, mri_folder, trained, tmp_path):
    (tmp_path / "demo").mkdir()
    os.symlink(video_folder / "model", tmp_path / "demo/model")
    os.symlink(mri_folder / "data", tmp_path / "demo/data")
    assert "model_type 'qwen2_vl', not 'llava'" in refused(tmp_path / "demo", tmp_path / "out", *SMALL)
    (tmp_path / "other").mkdir()
    shutil.copytree(mri_folder / "model", tmp_path / "other/model")
    os.symlink(mri_folder / "data", tmp_path / "other/data")
    weights = load_file(tmp_path / "other/model/model.safetensors")
    kept = dict(list(weights.items())[:-1])
    save_file(kept, tmp_path / "other/model/model.safetensors", metadata={"format": "pt"})
    assert "1 weights are missing, such as" in refused(tmp_path / "other", tmp_path / "out", *SMALL)
    more = {**weights, "elsewhere.weight": torch.zeros(2)}
    save_file(more, tmp_path / "other/model/model.safetensors", metadata={"format": "pt"})
    assert "1 weights without a place, such as elsewhere.weight" in refused(tmp_path / "other", tmp_path / "o", *SMALL)


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("anatomical.nii", "T1:32x32x32:8x8x8"),  # 33 x 41 x 25, LAS
        ("example4d.nii.gz", "rsfMRI:24x24x24x4:8x8x8x2"),  # 128 x 96 x 24, two frames, LAS
    ],
)
def test_real_nifti_files_go_through_loading_reorientation_resampling_and_a_step(copy, tmp_path, name, modality):
    shutil.copy(TESTS / name, copy / "data" / name)
    raw = nibabel.load(TESTS / name)
    assert nibabel.aff2axcodes(raw.affine) == ("L", "A", "S")
    found = volumes.read_file(copy / "data", name)
    assert np.array_equal(found, np.asarray(raw.dataobj)[::-1].astype(np.float32))
    kind = modality.split(":")[0]
    entry = {"volume": name, "modality": kind, "question": "What is shown?", "answer": "a real scan", "group": "s1"}
    for folder in ("train", "validation", "test"):
        shutil.rmtree(copy / "data" / folder)
    (copy / "data/train.jsonl").write_text(json.dumps(entry) + "\n")
    flags = ["--modality", modality, "--max-steps", 1, "--eval-split", "train", "--max-answer-tokens", 3]
    assert "faults" in refused(copy, tmp_path / "out", *flags)  # another size than the model's
    run(copy, tmp_path / "out", *flags, "--resample", "--fit-time")
    (line,) = [line for line in metrics_of(tmp_path / "out") if "loss" in line]
    assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
    data = load_with(copy, script, "--modality", modality, "--resample", "--fit-time")
    volume = data.read_media(data.trees)[f"volumes of {kind}"][0, 0]
    wanted = Modality.read(modality).size
    assert volume.shape == wanted and volume.isfinite().all()
    if len(wanted) == 4:
        assert volume[..., :2].any() and not volume[..., 2:].any()  # it has two frames; empty ones follow
    tissue = volume[volume != 0]
    assert float(tissue.mean()) == pytest.approx(0, abs=1e-4) and float(tissue.std()) == pytest.approx(1, rel=1e-3)


def test_skip_bad_never_leaves_out_an_entire_split_whose_labels_cannot_be_read(mri_folder, tmp_path):
    shutil.copytree(mri_folder, tmp_path / "demo")
    for path in (tmp_path / "demo" / "data" / "test").glob("*.json"):
        entry = json.loads(path.read_text())
        entry.pop("metadata", None)
        entry["conversations"][-1]["content"] = [{"type": "text", "text": "I cannot tell from these scans."}]
        path.write_text(json.dumps(entry))
    text = refused(tmp_path / "demo", tmp_path / "run", *SMALL, "--skip-bad", "100%", "--max-steps", 1)
    assert text == "--skip-bad would leave out all of test; fix its examples"
