"""train_umbrella_mri on a tiny LLaVA and drawn heads in the real formats: patches, volumes, conversations, labels."""

import contextlib
import gzip
import io
import itertools
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import difference, gradients, load_demo, metrics_of, read_lines, read_tensors, stop_in
from helpers import refused as script_refused
from helpers import run as run_script
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import common
import runtime
import train_umbrella_mri as script
from common import IGNORE, answering_prompt, pack
from train_umbrella_mri import Modality, PatchEmbed, Volume, read_label

VOLUMES = ["--modality", "T1:32x32x32:8x8x8", "--modality", "rsfMRI:24x24x24x4:8x8x8x2"]
SMALL = [*VOLUMES, "--questions-per-step", 8, "--max-answer-tokens", 4]
TESTS = Path(nibabel.__file__).parent / "tests/data"


def run(folder, out, *flags):
    run_script(folder, out, *flags, script=script)


def refused(folder, out, *flags) -> str:
    return script_refused(folder, out, *flags, script=script)


@pytest.fixture(scope="module")
def data(mri_folder):
    return load_demo(mri_folder, script, *VOLUMES)


@pytest.fixture
def copy(mri_folder, tmp_path):
    return Path(shutil.copytree(mri_folder, tmp_path / "demo"))


def load(data, **settings) -> script.Umbrella:
    args = SimpleNamespace(**{**vars(data.args), **settings})
    torch.manual_seed(0)
    model = script.load_model(data.folder / "model", args, data.text, torch.float32)
    for layer in common.lora_layers(model.vlm).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)  # at zero, A would have no gradient
    return model


def conversation(folder: Path, split: str, task: str, number: int = 0) -> Path:
    """The file of one of the split's conversations about a task."""
    return [p for p in sorted((folder / "data" / split).glob("*.json")) if task in p.name][number]


def edit(path: Path, **fields) -> dict:
    entry = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in entry.items() if v is not ...}))
    return entry


# --- patches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modality", "ragged", "tokens"),
    [
        ("T1:96x96x96:10x10x10", "crop", 729),
        ("T1:96x96x96:10x10x10", "pad", 1000),
        ("rsfMRI:96x96x96x24:16x16x16x3", "pad", 1728),
        ("rsfMRI:96x96x96x24:16x16x16x3", "error", 1728),
        ("rsfMRI:96x96x96x24:10x10x10x4", "crop", 9 * 9 * 9 * 6),
        ("rsfMRI:96x96x96x24:10x10x10x4", "pad", 10 * 10 * 10 * 6),
        ("dMRI:90x108x90:9x9x9:7", "error", 1200),
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
    embed, volumes = PatchEmbed(Modality.read("T1:12x8x16:4x4x4:3"), "error", width=6), torch.randn(2, 3, 12, 8, 16)
    weight = embed.projection.weight.view(6, 3, 4, 4, 4)
    expected = F.conv3d(volumes, weight, embed.projection.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(volumes) - embed.position.weight, expected, rtol=0, atol=1e-5)


def test_positions_are_drawn_from_a_truncated_normal_of_0_02():
    weight = PatchEmbed(Modality.read("T1:96x96x96:10x10x10"), "pad", width=64).position.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.02) and float(weight.mean()) == pytest.approx(0, abs=1e-3)


def test_what_cropping_loses_is_said_and_error_refuses_it(mri_folder, tmp_path, capsys):
    assert script.describe(Modality.read("T1:96x96x96:10x10x10"), "crop").endswith("17.6% of the voxels are lost")
    assert "lost" not in script.describe(Modality.read("T1:96x96x96:10x10x10"), "pad")
    ragged = ["--modality", "T1:32x32x32:10x10x10", "--modality", VOLUMES[3]]
    run(mri_folder, tmp_path, *ragged, "--ragged", "crop", "--check")
    assert "3 x 3 x 3 = 27 tokens a volume; cropped, 17.6% of the voxels are lost" in capsys.readouterr().out
    for flags, why in {
        (*ragged, "--ragged", "error"): "T1's (32, 32, 32) voxels do not fill patches of (10, 10, 10)",
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


# --- what is trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["embedding", "embedding+lora", "full"])
def test_after_a_step_what_is_frozen_is_the_same_and_what_is_trained_has_changed(data, tune):
    model = load(data, tune=tune)
    before = {name: p.detach().clone() for name, p in model.vlm.named_parameters()}
    frozen = {name for name, p in model.vlm.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    trees = [tree for tree in data.trees if tree.media["volumes"][0].modality == "T1"][:2]
    trees += [tree for tree in data.trees if tree.media["volumes"][0].modality == "rsfMRI"][:2]
    model.train()
    for row in pack(trees, 4096):
        model({**row, **data.read_media(row["prompts"])})[0].backward()
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
    with pytest.raises(ValueError, match="no parameter matches"):
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
    for name, tensor in checkpoint.items():
        assert any(line.split() == [name, f"{tensor.numel():,}"] for line in printed.split("\n"))


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
        (row,) = pack(trees, 4096)
        found.append(gradients(model, model({**row, **data.read_media(row["prompts"])})[0]))
        assert len(calls) == (2 if checkpointing else 1)
    assert found[0]["vlm.patch_embed.T1.projection.weight"].norm() > 0
    assert difference(found[1], found[0]) < 1e-6


def test_a_frozen_tower_has_no_dropout_though_its_configuration_says_so(copy):
    """It stays in training mode, without which transformers would not checkpoint its layers."""
    config = json.loads((copy / "model/config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.5
    (copy / "model/config.json").write_text(json.dumps(config))
    data = load_demo(copy, script, *VOLUMES)
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
def test_count_params_of_the_published_size(tmp_path, capsys, ragged):
    """Width 1152 is read from the tower, and the share that is trained is computed from the counts."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    argv = ["--model", str(tmp_path), "--count-params", "--ragged", ragged]
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


# --- volumes ---------------------------------------------------------------------------------------------------


def anatomy(shape=(6, 7, 8)) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1000, shape).astype(np.int16)


def write_nifti(path: Path, voxels: np.ndarray, codes: str, zooms=(2.0, 3.0, 4.0)) -> None:
    """The anatomy, given in RAS, as a file whose axes run as `codes` say."""
    image = nibabel.Nifti1Image(voxels, np.diag([*zooms, 1.0]))
    wanted = nibabel.orientations.axcodes2ornt(codes)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), wanted))
    assert "".join(nibabel.aff2axcodes(image.affine)) == codes
    nibabel.save(image, path)


CODES = ["".join(c) for axes in itertools.permutations(["RL", "AP", "SI"]) for c in itertools.product(*axes)]


def test_whatever_way_the_axes_run_left_stays_left(tmp_path):
    assert len(CODES) == 48
    for codes in CODES:
        write_nifti(tmp_path / f"{codes}.nii", anatomy(), codes)
        assert np.array_equal(script.read_volume(tmp_path, f"{codes}.nii"), anatomy())
    series = np.stack([anatomy(), 2 * anatomy()], axis=3)
    write_nifti(tmp_path / "series.nii.gz", series, "PSL")
    assert np.array_equal(script.read_volume(tmp_path, "series.nii.gz"), series)


def test_scaled_integers_are_read_as_their_header_says(tmp_path):
    image = nibabel.Nifti1Image(anatomy(), np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, tmp_path / "a.nii")
    expected = nibabel.load(tmp_path / "a.nii").get_fdata()
    np.testing.assert_allclose(script.read_volume(tmp_path, "a.nii"), expected, rtol=1e-6)


def test_arrays_need_no_nibabel_and_nifti_names_what_it_needs(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", anatomy())
    np.savez_compressed(tmp_path / "a.npz", volume=anatomy())
    write_nifti(tmp_path / "a.nii.gz", anatomy(), "RAS")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    for name in ("a.npy", "a.npz"):
        found = script.read_volume(tmp_path, name)
        assert found.dtype == np.float32 and np.array_equal(found, anatomy())
    with pytest.raises(ValueError, match=r"a.nii.gz cannot be read: NIfTI needs nibabel: pip install nibabel, or"):
        script.read_volume(tmp_path, "a.nii.gz")


def test_volumes_that_cannot_be_used_are_refused_by_name(tmp_path):
    nan, infinite = anatomy().astype(np.float32), anatomy().astype(np.float32)
    nan[2, 3, 4], infinite[0, 0, :3] = np.nan, np.inf
    arrays = {
        "nan": (nan, r"1 of its 336 voxels are NaN or infinite"),
        "inf": (infinite, r"3 of its 336 voxels are NaN or infinite"),
        "zeros": (np.zeros((4, 4, 4), np.float32), "it is empty"),
        "mask": ((anatomy() > 500).astype(np.int16), "all its voxels that are not zero are the same"),
        "none": (np.zeros((0, 4, 4), np.float32), "it is empty"),
        "flat": (anatomy()[..., 0], r"2 axes \(6, 7\), not three to five"),
        "complex": (anatomy().astype(np.complex64), "its voxels are no real numbers but complex64"),
    }
    for name, (voxels, why) in arrays.items():
        np.save(tmp_path / f"{name}.npy", voxels)
        with pytest.raises(ValueError, match=f"{name}.npy cannot be read: .*{why}"):
            script.read_volume(tmp_path, f"{name}.npy")
        if name not in ("none", "flat"):  # which NIfTI cannot say
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}.nii.gz")
            with pytest.raises(ValueError, match=f"{name}.nii.gz cannot be read: .*{why}"):
                script.read_volume(tmp_path, f"{name}.nii.gz")

    write_nifti(tmp_path / "whole.nii", anatomy(), "LAS")
    write_nifti(tmp_path / "whole.nii.gz", anatomy(), "LAS")
    whole, zipped = (tmp_path / "whole.nii").read_bytes(), (tmp_path / "whole.nii.gz").read_bytes()
    nowhere = nibabel.Nifti1Image(anatomy(), None)
    nowhere.header["pixdim"][1:4] = 1
    nibabel.save(nowhere, tmp_path / "nowhere.nii")
    np.savez(tmp_path / "two.npz", a=anatomy(), b=anatomy())
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    files = {
        "cut.nii": whole[:-40],
        "cut.nii.gz": zipped[: len(zipped) // 2],
        "text.nii": b"no volume at all",
        "text.nii.gz": gzip.compress(b"no volume at all"),
        "plain.nii.gz": b"no gzip at all",
        "empty.nii": b"",
        "empty.npy": b"",
        "cut.npy": (tmp_path / "nan.npy").read_bytes()[:-10],
        "text.npz": b"no arrays",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in [*files, "object.npy", "two.npz"]:
        with pytest.raises(ValueError, match=f"{name} cannot be read: "):
            script.read_volume(tmp_path, name)
    with pytest.raises(ValueError, match=r"nowhere.nii cannot be read: its header says no orientation .* swapped"):
        script.read_volume(tmp_path, "nowhere.nii")
    with pytest.raises(ValueError, match=r"missing.nii is missing"):
        script.read_volume(tmp_path, "missing.nii")
    with pytest.raises(ValueError, match="leads outside the data folder"):
        script.read_volume(tmp_path / "demo", "../whole.nii")
    with pytest.raises(ValueError, match="336 voxels, more than 100; resample it, or cut it"):
        script.read_volume(tmp_path, "whole.nii", largest=100)


def test_a_volume_is_normalised_over_its_tissue_and_the_background_stays_zero():
    torch.manual_seed(0)
    volume = torch.rand(2, 8, 8, 8, 3) * 500 + 100
    volume[:, :2] = 0
    found = script.normalise(volume)
    assert (found[:, :2] == 0).all()
    for channel, raw in zip(found, volume, strict=True):
        tissue = channel[2:]
        assert float(tissue.mean()) == pytest.approx(0, abs=1e-5)
        assert float(tissue.std(correction=0)) == pytest.approx(1, rel=1e-5)
        expected = (raw[2:].numpy() - raw[2:].numpy().mean()) / raw[2:].numpy().std()
        np.testing.assert_allclose(tissue.numpy(), expected, atol=1e-4)
    torch.testing.assert_close(script.normalise(volume * 7), found, rtol=0, atol=1e-4)  # whatever the scanner's scale


def test_resampling_is_trilinear_on_every_axis_and_keeps_time_and_channels_apart():
    torch.manual_seed(0)
    volume = torch.rand(2, 5, 6, 7, 3)
    found = script.resample(volume, (8, 4, 9))
    assert found.shape == (2, 8, 4, 9, 3)

    def line(size, to):
        """The two neighbours of each new voxel's centre and the weight of the second."""
        at = np.clip((np.arange(to) + 0.5) * size / to - 0.5, 0, None)
        low = np.minimum(np.floor(at).astype(int), size - 1)
        return low, np.minimum(low + 1, size - 1), at - low

    array = volume.numpy().astype(np.float64)
    for axis, to in ((1, 8), (2, 4), (3, 9)):
        low, high, weight = line(array.shape[axis], to)
        weight = weight.reshape([-1 if a == axis else 1 for a in range(5)])
        array = array.take(low, axis) * (1 - weight) + array.take(high, axis) * weight
    np.testing.assert_allclose(found.numpy(), array, atol=1e-6)


def frames_of(folder: Path, series: np.ndarray) -> None:
    folder.mkdir()
    for t in range(series.shape[3]):
        np.save(folder / f"frame_{t}.npy", series[..., t])  # frame_10 sorts before frame_2


@pytest.fixture
def series(tmp_path) -> np.ndarray:
    """Twelve frames, as a file and as a folder of frames."""
    frames = np.random.default_rng(1).integers(1, 900, (8, 8, 8, 12)).astype(np.float32)
    np.save(tmp_path / "series.npy", frames)
    frames_of(tmp_path / "frames", frames)
    return frames


def loaded(folder: Path, files, text: str, mirrored=False, **settings) -> torch.Tensor:
    args = SimpleNamespace(resample=False, fit_time=False, normalise=False, **settings)
    volume, modality = Volume("v", tuple(files)), Modality.read(text)
    measured = {name: script.measure(folder, name) for name in files}
    script.check_shape(volume, modality, measured, args)
    return script.load_volume(folder, volume, modality, args, mirrored)


def test_a_folder_of_frames_is_the_series_and_time_is_fitted_only_when_asked(tmp_path, series):
    files = script.find_files(tmp_path, "frames")
    assert [name.split("_")[1] for name in files] == [f"{t}.npy" for t in range(12)]
    whole = loaded(tmp_path, ["series.npy"], "v:8x8x8x12:4x4x4x3")
    assert torch.equal(whole, torch.from_numpy(series)[None])
    assert torch.equal(loaded(tmp_path, files, "v:8x8x8x12:4x4x4x3"), whole)
    for text in ("v:8x8x8x10:4x4x4x5", "v:8x8x8x14:4x4x4x7"):
        for names in (["series.npy"], files):
            with pytest.raises(ValueError, match=r"has 12 frames, v 1[04]; --fit-time takes the first, or adds empty"):
                loaded(tmp_path, names, text)
    args = SimpleNamespace(resample=False, fit_time=True, normalise=False)
    for count in (10, 14):
        modality = Modality.read(f"v:8x8x8x{count}:4x4x4x2")
        found = script.load_volume(tmp_path, Volume("v", files), modality, args, False)
        assert found.shape == (1, 8, 8, 8, count)
        assert torch.equal(found[..., :12], whole[..., :count]) and not found[..., 12:].any()


def test_a_shape_that_is_not_the_modality_s_is_refused_by_name(tmp_path, series):
    cases = {
        "v:8x8x9:4x4x3": (["frames/frame_0.npy"], r"frame_0.npy is \(8, 8, 8\) voxels, v \(8, 8, 9\); --resample"),
        "v:8x8x8:4x4x4": (["series.npy"], r"series.npy is \(8, 8, 8, 12\), v \(8, 8, 8\); is it of another modality"),
        "v:8x8x8:4x4x4:11": (["series.npy"], r"series.npy is \(8, 8, 8, 12\), v \(8, 8, 8, 11\)"),
        "v:8x8x8:4x4x4:2": (["frames/frame_0.npy", "frames/frame_1.npy"], "but a v is no series; join them into one"),
        "v:8x8x8x2:4x4x4x1": (["frames/frame_0.npy", "small.npy"], r"small.npy \(4, 8, 8\); frames must be alike"),
    }
    np.save(tmp_path / "small.npy", series[:4, ..., 0])
    for text, (files, why) in cases.items():
        with pytest.raises(ValueError, match=why):
            loaded(tmp_path, files, text)
    # the twelve are directions of a diffusion scan: channels, last in the file, first in the model
    found = loaded(tmp_path, ["series.npy"], "v:8x8x8:4x4x4:12")
    assert torch.equal(found, torch.from_numpy(series).movedim(-1, 0))


def test_empty_folders_and_other_files_are_no_volumes(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "some").mkdir()
    (tmp_path / "some/notes.txt").write_text("")
    for name, why in {"none": "none, an empty folder, is none of", "some": "some/notes.txt is none of"}.items():
        with pytest.raises(ValueError, match=why):
            script.find_files(tmp_path, name)
    for name in ("scan.dcm", "scan.NII"):
        with pytest.raises(ValueError, match=rf"{name} is none of .nii, .nii.gz, .npy, .npz"):
            script.find_files(tmp_path, name)


def test_a_series_with_a_frame_missing_is_refused(tmp_path, series):
    (tmp_path / "frames/frame_7.npy").unlink()
    with pytest.raises(ValueError, match=r"frames: of its 11 frames some are missing, .*frame_0.npy to .*frame_11.npy"):
        script.find_files(tmp_path, "frames")
    (tmp_path / "frames/frame_11.npy").rename(tmp_path / "frames/frame_7.npy")
    assert len(script.find_files(tmp_path, "frames")) == 11  # whole, though not twelve


def test_axes_of_length_one_are_dropped(tmp_path):
    vectors = np.random.default_rng(0).integers(1, 9, (4, 4, 4, 1, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(vectors, np.eye(4)), tmp_path / "vectors.nii")  # as NIfTI writes directions
    nibabel.save(nibabel.Nifti1Image(vectors[..., :1], np.eye(4)), tmp_path / "scan.nii")
    assert np.array_equal(script.read_volume(tmp_path, "vectors.nii"), vectors[:, :, :, 0])
    assert np.array_equal(script.read_volume(tmp_path, "scan.nii"), vectors[:, :, :, 0, 0])


def test_mirroring_swaps_left_and_right_and_nothing_else(tmp_path, series):
    straight = loaded(tmp_path, ["series.npy"], "v:8x8x8x12:4x4x4x3")
    assert torch.equal(loaded(tmp_path, ["series.npy"], "v:8x8x8x12:4x4x4x3", mirrored=True), straight.flip(1))


def test_flip_is_off_and_says_so_when_on(mri_folder, tmp_path, capsys):
    run(mri_folder, tmp_path, *SMALL, "--check")
    assert "mirrored" not in capsys.readouterr().out
    plain = json.loads((tmp_path / "check.json").read_text())["splits"]
    run(mri_folder, tmp_path, *SMALL, "--flip", "--check")
    assert "learned mirrored, too: left and right in an answer become wrong" in capsys.readouterr().out
    flipped = json.loads((tmp_path / "check.json").read_text())["splits"]
    assert flipped["train"]["questions"] == 2 * plain["train"]["questions"]
    with pytest.raises(SystemExit):
        run(mri_folder, tmp_path, *SMALL, "--flip", "--eval-split", "train")
    assert "mirrored conversations are to learn from, not to be asked" in capsys.readouterr().err
    assert [flipped[s]["questions"] for s in ("val", "test")] == [plain[s]["questions"] for s in ("val", "test")]
    data = load_demo(mri_folder, script, *VOLUMES, "--flip")
    pairs = {tree.ids[0]: tree for tree in data.trees}
    name = next(name for name in pairs if f"{name} mirrored" in pairs)
    straight, mirrored = (data.read_media([pairs[n]]) for n in (name, f"{name} mirrored"))
    key = f"volumes of {straight['modalities'][0]}"
    assert torch.equal(mirrored[key], straight[key].flip(2)) and not torch.equal(mirrored[key], straight[key])


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
    found = script.read_volume(copy / "data", name)
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
    data = load_demo(copy, script, "--modality", modality, "--resample", "--fit-time")
    volume = data.read_media(data.trees)[f"volumes of {kind}"][0, 0]
    wanted = Modality.read(modality).size
    assert volume.shape == wanted and volume.isfinite().all()
    if len(wanted) == 4:
        assert volume[..., :2].any() and not volume[..., 2:].any()  # it has two frames; empty ones follow
    tissue = volume[volume != 0]
    assert float(tissue.mean()) == pytest.approx(0, abs=1e-4) and float(tissue.std()) == pytest.approx(1, rel=1e-3)


# --- conversations ---------------------------------------------------------------------------------------------


def texts_of(entry: dict) -> str:
    """A conversation in the template of the published checkpoint, one <image> for each volume."""
    rendered = ""
    for turn in entry["conversations"]:
        images = "<image>" * sum(part["type"] == "image" for part in turn["content"])
        said = "".join("\n" + part["text"] for part in turn["content"] if part["type"] == "text")
        rendered += f"<|im_start|>{turn['role']} {images}{said}<|im_end|>"
    return rendered


def test_each_image_expands_to_its_own_volume_s_patches_and_only_the_answer_is_learned(mri_folder, data):
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
            assert tokenizer.decode(tree.prefix + input_ids).endswith(f"<|im_start|>assistant \n{answer}<|im_end|>")
            seen.add((entry["task_type"], len(entry["images"]), len(entry["conversations"])))
    assert {("comparison", 2, 4), ("active_hemisphere", 1, 2)} < seen


def test_questions_of_one_volume_share_its_reading(data):
    shared = [tree for tree in data.trees if len(tree.ids) > 1]
    assert shared
    for tree in shared:
        assert len({name.split("/")[1].split("_")[0] for name in tree.ids}) == 1  # of one subject


def test_all_answers_learned_as_rows_of_their_own_are_the_whole_conversation_learned_at_once(mri_folder, data):
    """--supervise all: loss and gradients of one sequence in which every answer is learned, through transformers."""
    path = conversation(mri_folder, "train", "comparison")
    entry, name = json.loads(path.read_text()), f"train/{path.stem}"
    every = load_demo(mri_folder, script, *VOLUMES, "--supervise", "all")
    trees = [tree for tree in every.trees if any(i in (name, f"{name} turn 1") for i in tree.ids)]
    trees = [tree.part(k for k, i in enumerate(tree.ids) if i in (name, f"{name} turn 1")) for tree in trees]
    assert sorted(i for tree in trees for i in tree.ids) == [name, f"{name} turn 1"]
    model = load(data).eval()
    (row,) = pack(trees, 4096)
    found = gradients(model, model({**row, **every.read_media(row["prompts"])})[0])

    text = texts_of(entry)
    for turn in entry["conversations"][1::2]:
        answer = turn["content"][0]["text"]
        text = text.replace(f"assistant \n{answer}", f"assistant \n<ANS>{answer}</ANS>")
    input_ids, labels = common.encode_supervised(data.text.tokenizer, text, spans=None)
    times = [64 if token == data.text.image_id else 1 for token in input_ids]
    input_ids, labels = (
        [x for x, n in zip(part, times, strict=True) for _ in range(n)] for part in (input_ids, labels)
    )
    assert input_ids.count(data.text.image_id) == 128 and sum(label != IGNORE for label in labels) > 10
    whole = next(tree for tree in trees if name in tree.ids)
    log_probs = model.vlm(inputs_embeds=embedded(model, data, input_ids, whole.media)).logits[0].log_softmax(-1)
    loss = -sum(log_probs[i - 1, label] for i, label in enumerate(labels) if label != IGNORE)
    assert difference(found, gradients(model, loss)) < 1e-5


def test_val_and_test_are_asked_for_the_last_answer_whatever_is_supervised(mri_folder):
    last, every = (load_demo(mri_folder, script, *VOLUMES, "--supervise", s) for s in ("last", "all"))
    by_split = lambda data: {s: [r.id for r in data.rows if r.split == s] for s in script.SPLITS}  # noqa: E731
    a, b = by_split(last), by_split(every)
    assert (a["val"], a["test"]) == (b["val"], b["test"]) and set(a["train"]) < set(b["train"])
    added = set(b["train"]) - set(a["train"])
    assert all(name.endswith(" turn 1") for name in added)
    assert {row.question_type for row in every.rows if row.id in added} == {"comparison turn 1"}


def test_a_greeting_before_anything_is_shown_is_not_learned(copy):
    path = conversation(copy, "train", "lesion_side")
    said = [("user", "Hello."), ("assistant", "How can I help?")]
    greeting = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    edit(path, conversations=[*greeting, *json.loads(path.read_text())["conversations"]])
    ids = [row.id for row in load_demo(copy, script, *VOLUMES, "--supervise", "all").rows]
    assert f"train/{path.stem}" in ids and f"train/{path.stem} turn 1" not in ids


def test_canonical_rows_equal_umbrella_s_conversations(mri_folder, data, tmp_path):
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
    found = load_demo(tmp_path, script, *VOLUMES)
    assert [(t.prefix, t.branches, t.ids, t.media) for t in found.trees] == [
        (t.prefix, t.branches, t.ids, t.media) for t in data.trees
    ]
    known = {row.id: row for row in data.rows}
    for row in found.rows:
        assert (row.candidates, row.label, row.group) == (
            known[row.id].candidates,
            known[row.id].label,
            known[row.id].group,
        )


def test_every_fault_is_named_with_file_and_remedy(copy, tmp_path, capsys):
    files = [conversation(copy, "train", "lesion_side", i) for i in range(26)]
    base = [json.loads(path.read_text()) for path in files]
    user, assistant = base[0]["conversations"]
    other = {"path": "volumes/other.nii.gz", "modality": "T1"}
    image, text = {"type": "image"}, {"type": "text", "text": "Where?"}
    bare = [{"role": "user", "content": [image, text]}, assistant]
    faults = {
        "nobody": ({"subject_ids": []}, "no subject_ids and no group"),
        "listed": (
            {"subject_ids": ..., "group": ["a", "b"]},
            "subject_ids must be a list of names (or group one name)",
        ),
        "number": ({"conversations": 3}, "not as conversations are written"),
        "null": ({"conversations": [{**user, "content": 7}, assistant]}, "not as conversations are written"),
        "list": ({"task_type": ["a"]}, "not as conversations are written"),
        "half": ({"conversations": [user, {**assistant, "content": "\ud800"}]}, "surrogates not allowed"),
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
        "label": ({"answer_candidates": ["big", "small"]}, "does not name just one of big, small"),
        "commas": ({"answer_candidates": ["one, two", "three"]}, "a part of one sentence, without commas"),
        "labels": ({"answer_candidates": ["left", "Left "]}, "labels must be at least two, and differ"),
        "gone": (
            {"images": [other], "conversations": [{"role": "user", "content": [image, text]}, assistant]},
            "volumes/other.nii.gz is missing",
        ),
    }
    for (name, (change, _)), path in zip(faults.items(), files, strict=False):
        edit(path, task_id=name, **change)
    files[len(faults)].write_text("[1, 2]")
    files[len(faults) + 1].write_text("{")
    assert f"{len(faults) + 2} faults" in refused(copy, tmp_path / "out", *SMALL, "--check")
    printed = [line for line in capsys.readouterr().out.split("\n") if line.startswith("fault: ")]
    for (name, (_, why)), path in zip(faults.items(), files, strict=False):
        (line,) = [line for line in printed if f"train/{path.name}" in line]
        assert why in line, (name, line)
    run(copy, tmp_path / "out", *SMALL, "--check", "--skip-bad")
    skipped = json.loads((tmp_path / "out/check.json").read_text())["skipped"]
    assert skipped == sorted(f"train/{path.name}" for path in files[: len(faults) + 2])


def test_two_layouts_in_one_folder_and_empty_folders_are_refused(copy, tmp_path):
    (copy / "data/train.jsonl").write_text("{}\n")
    assert "train.jsonl beside UMBRELLA's folders" in refused(copy, tmp_path / "out", *SMALL, "--check")
    (copy / "data/train.jsonl").unlink()
    for path in (copy / "data/validation").iterdir():
        path.unlink()
    assert "1 faults" in refused(copy, tmp_path / "out", *SMALL, "--check")
    failures = json.loads((tmp_path / "out/check.json").read_text())["failures"]
    assert failures == ["validation: the folder holds no .json files"]
    (copy / "data/val").mkdir()
    assert "val/ would not be read; UMBRELLA calls it validation" in refused(copy, tmp_path / "out", *SMALL, "--check")


def test_a_subject_in_two_splits_is_refused_by_name_also_as_the_second_of_two(copy, tmp_path):
    train = json.loads(conversation(copy, "train", "lesion_side").read_text())["subject_ids"][0]
    path = conversation(copy, "test", "comparison")
    mine = json.loads(path.read_text())["subject_ids"]
    edit(path, subject_ids=[*mine, train])
    assert "faults" in refused(copy, tmp_path / "out", *SMALL, "--check")
    failures = json.loads((tmp_path / "out/check.json").read_text())["failures"]
    assert any(f"test/{path.name}" in f and f"group {train} of test is also in train" in f for f in failures)


def test_a_modality_that_training_never_shows_is_refused_in_test(copy, tmp_path):
    for path in (copy / "data/train").glob("*active_hemisphere*"):
        path.unlink()
    assert "faults" in refused(copy, tmp_path / "out", *SMALL, "--check")
    failures = json.loads((tmp_path / "out/check.json").read_text())["failures"]
    assert all("training has not shown rsfMRI, whose embedding is as it was drawn" in f for f in failures)
    assert {f.partition("/")[0] for f in failures} == {"validation", "test"}
    # nor is it answered later, by a checkpoint or a saved model that has not learned it
    whole = copy.with_name("whole")
    shutil.copytree(copy, whole)
    for path in (copy / "data").glob("*/*active_hemisphere*"):
        path.unlink()
    run(copy, tmp_path / "out", *SMALL, "--max-steps", 1)
    flags = ["--resume", tmp_path / "out/checkpoints/step-00000001", "--eval-only"]
    assert "faults" in refused(whole, tmp_path / "eval", *flags)
    shutil.rmtree(whole / "model")
    shutil.copytree(tmp_path / "out/model", whole / "model")
    assert "faults" in refused(whole, tmp_path / "more", "--max-steps", 1)


# --- packing is exact, with volumes of several kinds -----------------------------------------------------------


def embedded(model, data, input_ids: list[int], media: dict) -> torch.Tensor:
    """(1, T, width) put together by hand: each volume read, cut and sent through the tower alone."""
    features = []
    for volume in media["volumes"]:
        voxels = [script.read_volume(data.folder / "data", name) for name in volume.files]
        voxels = script.normalise(torch.from_numpy(np.ascontiguousarray(voxels[0]))[None])
        tokens = model.vlm.patch_embed[volume.modality](voxels[None])
        states = model.vlm.model.vision_tower(tokens, output_hidden_states=True).hidden_states[-1]
        features.append(model.vlm.model.multi_modal_projector(states)[0])
    ids = torch.tensor([input_ids])
    embeds = model.vlm.get_input_embeddings()(ids).clone()
    embeds[ids == data.text.image_id] = torch.cat(features)
    return embeds


def separate(model, data, trees):
    """Each question in a row of its own through transformers' forward."""
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
    kinds = lambda tree: [volume.modality for volume in tree.media["volumes"]]  # noqa: E731
    one = [tree for tree in data.trees if kinds(tree) == ["T1"] and len(tree.ids) > 1]
    series = [tree for tree in data.trees if kinds(tree) == ["rsfMRI"]]
    two = [tree for tree in data.trees if kinds(tree) == ["T1", "T1"]]
    return [one[0], series[0], two[0], one[1], series[1]]


def packed(model, data, trees, **changed):
    (row,) = pack(trees, 4096)
    return gradients(model, model({**row, **data.read_media(row["prompts"]), **changed})[0])


@pytest.mark.parametrize("tune", ["embedding", "embedding+lora", "full"])
def test_a_mixed_batch_equals_its_conversations_one_by_one(data, tune):
    model = load(data, tune=tune).eval()
    found = packed(model, data, mixed(data))
    assert all(found[f"vlm.patch_embed.{name}.projection.weight"].norm() > 0 for name in ("T1", "rsfMRI"))
    assert difference(found, separate(model, data, mixed(data))) < 1e-5


def test_two_modalities_in_one_conversation_keep_their_order(copy, tmp_path):
    """A series shown before a T1 scan: its tokens are its own, wherever it stands."""
    entry = json.loads(conversation(copy, "train", "active_hemisphere").read_text())
    scan = json.loads(conversation(copy, "train", "lesion_side").read_text())["images"][0]
    content = [{"type": "image"}, {"type": "text", "text": "A series."}, {"type": "image"}]
    entry["conversations"][0]["content"] = [*content, {"type": "text", "text": "A scan."}]
    for number, images in enumerate([[*entry["images"], scan], [scan, *entry["images"]]]):
        (copy / f"data/train/both{number}.json").write_text(json.dumps({**entry, "images": images}))
    data = load_demo(copy, script, *VOLUMES)
    model = load(data).eval()
    trees = [tree for tree in data.trees if tree.ids[0].startswith("train/both")]
    assert [[v.modality for v in tree.media["volumes"]] for tree in trees] == [["rsfMRI", "T1"], ["T1", "rsfMRI"]]
    assert difference(packed(model, data, trees), separate(model, data, trees)) < 1e-5


def test_volumes_in_another_order_are_caught(data):
    model = load(data).eval()
    trees = mixed(data)
    right = packed(model, data, trees)
    (row,) = pack(trees, 4096)
    media = data.read_media(row["prompts"])
    swapped = media["volumes of T1"].flip(0)
    assert difference(packed(model, data, trees, **{"volumes of T1": swapped}), right) > 1e-3
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        packed(model, data, trees, modalities=media["modalities"][:-1])


@torch.no_grad()
def test_answers_are_those_of_a_greedy_walk_through_whole_rows(data):
    """Token for token what transformers' forward gives when the whole row is read again for each."""
    args = SimpleNamespace(**{**vars(data.args), "max_answer_tokens": 5, "decode": "free"})
    model = load(data).eval()
    state = script.Run(args, None, torch.device("cpu"), runtime.StopSignal(), data.text, data.read_media)
    trees = mixed(data)
    found = script.answer(model, trees, {row.id: row for row in data.rows}, state)
    eos = data.text.tokenizer.eos_token_id
    for tree in map(answering_prompt, trees):
        for name, (prompt, _) in zip(tree.ids, tree.branches, strict=True):
            said = []
            while len(said) < 5 and eos not in said:
                embeds = embedded(model, data, tree.prefix + prompt + said, tree.media)
                said.append(int(model.vlm(inputs_embeds=embeds).logits[0, -1].argmax()))
            text = data.text.tokenizer.decode(said, skip_special_tokens=True).strip()
            assert found[name] == {"prediction": text, "ended": said[-1] == eos}


@torch.no_grad()
def test_free_answers_and_scores_come_together_and_are_those_of_each_alone(data):
    model = load(data).eval()
    found = {}
    for mode in ("free", "score", "both"):
        args = SimpleNamespace(**{**vars(data.args), "max_answer_tokens": 5, "decode": mode})
        state = script.Run(args, None, torch.device("cpu"), runtime.StopSignal(), data.text, data.read_media)
        found[mode] = script.answer(model, mixed(data), {row.id: row for row in data.rows}, state)
    for name, both in found["both"].items():
        assert both == {**found["free"][name], "probabilities": found["score"][name]["probabilities"]}
        assert sum(both["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_probabilities_tell_even_confident_answers_apart(data, monkeypatch):
    """In float32 a log-probability 20 above the other's would be a probability of 1, as one 40 above it: a tie."""
    model = load(data).eval()
    args = SimpleNamespace(**{**vars(data.args), "decode": "score"})
    state = script.Run(args, None, torch.device("cpu"), runtime.StopSignal(), data.text, data.read_media)
    surest = []
    for gap in (20.0, 30.0):
        one_first = lambda hidden, head, row, gap=gap: -gap * torch.arange(len(row["ends"])).remainder(2)  # noqa: E731
        monkeypatch.setattr(common, "branch_log_probs", one_first)
        tree = next(tree for tree in data.trees if tree.media["volumes"][0].modality == "rsfMRI")
        (found,) = script.answer(model, [tree], {row.id: row for row in data.rows}, state).values()
        surest.append(max(found["probabilities"].values()))
    assert surest[0] < surest[1] < 1


# --- labels ----------------------------------------------------------------------------------------------------

SEX, SIDE = ["male", "female"], ["left", "right", "none"]
STAGE = ["cognitively normal", "mild dementia", "very mild dementia", "dementia"]


@pytest.mark.parametrize(
    ("text", "labels", "label"),
    [
        ("The subject is female.", SEX, "female"),
        ("Female", SEX, "female"),
        ("MALE.", SEX, "male"),
        ("The males' brains differ", SEX, None),
        ("The subject is not male but female.", SEX, "female"),
        ("The subject is male rather than female", SEX, "male"),
        ("This isn't a female subject", SEX, None),
        ("It is male, not female.", SEX, "male"),
        ("Male or female?", SEX, None),
        ("Is it male? No.", SEX, None),
        ("Is it female? No, male.", SEX, "male"),
        ("No, it is male.", SEX, "male"),
        ("Female and male brains overlap; the answer is male.", SEX, "male"),
        ("Male brains are larger than female ones, therefore this subject is female.", SEX, "female"),
        ("Female. Male brains are larger.", SEX, "female"),
        ("The subject is female. Overall brain volume is smaller than in a male.", SEX, "female"),
        ("The subject is male with no visible lesion.", SEX, "male"),
        ("There is no atrophy, and the subject is male.", SEX, "male"),
        ("Males are larger, it could be male or female, therefore unclear", SEX, None),
        ("The answer is male or female", SEX, None),
        ("It can't be male", SEX, None),
        ("I don't think it is male", SEX, None),
        ("It is unlikely that the subject is male.", SEX, None),
        ("Male is unlikely.", SEX, None),
        ("Male is excluded.", SEX, None),
        ("ruled out: male", SEX, None),
        ("It is not true: male", SEX, None),
        ("The subject is not, however, male", SEX, None),
        ("", SEX, None),
        (None, SEX, None),
        ("There is no lesion on the left, it lies on the right", SIDE, "right"),
        ("None", SIDE, "none"),
        ("Lesion: none.", SIDE, "none"),
        ("Side of the lesion: left.", SIDE, "left"),
        ("Right, the lesion is on the left.", SIDE, None),
        ("The subject is right-handed.", SIDE, None),
        ("very mild dementia", STAGE, "very mild dementia"),
        ("The diagnosis is mild dementia.", STAGE, "mild dementia"),
        ("Dementia", STAGE, "dementia"),
        ("Dementia is not present.", STAGE, None),
        ("Dementia was not found", STAGE, None),
        ("dementia: none", STAGE, None),
        ("No sign of mild dementia, dementia.", STAGE, None),
        ("does not have mild dementia, dementia or any other disorder", STAGE, None),
        ("I see no evidence of: dementia", STAGE, None),
        ("absence of dementia", STAGE, None),
        ("Free of dementia.", STAGE, None),
        ("The scan excludes dementia.", STAGE, None),
        ("Family history of dementia.", STAGE, None),
        ("pre-dementia", STAGE, None),
        ("abnormal", ["normal", "abnormal"], "abnormal"),
        ("The ventricles are larger than normal", ["normal", "abnormal"], None),
        ("The subject is not, in my view, impaired.", ["not impaired", "impaired"], None),
        ("There is no lesion.", ["lesion", "no lesion"], "no lesion"),
        ("There is a lesion.", ["lesion", "no lesion"], "lesion"),
        ("60-70 years", ["50-60 years", "60-70 years"], "60-70 years"),
        ("The subject is 60 – 70 years old", ["50-60", "60-70"], "60-70"),
        ("The subject is older than 60-70", ["50-60", "60-70"], None),
        ("Yes, it is.", ["yes", "no"], "yes"),
        ("No, it isn't.", ["yes", "no"], "no"),
        ("It is normal", ["yes", "no"], None),
        ("The scan is abnormal with no midline shift.", ["yes", "no"], None),
        ("I have no idea", ["yes", "no"], None),
        ("Yes or no? I would say no.", ["yes", "no"], None),
        ("The answer is yes.", ["yes", "no"], "yes"),
        ("Not sure.", ["yes", "no", "not sure"], "not sure"),
        ("The ventricles are larger than in the reference.", ["larger", "smaller"], "larger"),
        ("The subject is a healthy female without neurological disease.", SEX, "female"),
        ("The scan shows no signs of dementia and is cognitively normal.", STAGE, "cognitively normal"),
        ("Dementia seems unlikely.", STAGE, None),
        ("Dementia is very unlikely.", STAGE, None),
        ("Mild dementia or dementia is not present.", STAGE, None),
        ("It is unclear whether the subject is female", SEX, None),
        ("Negative for dementia.", STAGE, None),
        ("Nothing suggests dementia.", STAGE, None),
        ("The lesion is in the left hemisphere, hence the right arm is weak.", SIDE, None),
    ],
)
def test_labels_are_read_as_whole_words_and_two_only_by_an_answer_clause(text, labels, label):
    assert read_label(text, labels) == label
    assert read_label(text, labels[::-1]) == label


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("It is female, smaller than a male brain.", SEX),  # readable, but a true answer must not leave any doubt
        ("The subject is not male.", SEX),
        ("The subject is a child.", SEX),
        ("There is atrophy and no lesion", ["yes", "no"]),
    ],
)
def test_a_true_answer_names_one_label_beyond_doubt(answer, labels):
    with pytest.raises(ValueError, match="does not name just one of"):
        script.true_label(answer, labels)


def test_what_names_both_labels_is_counted_wrong_never_dropped(mri_folder, tmp_path, monkeypatch):
    run(mri_folder, tmp_path / "first", *SMALL, "--max-steps", 1)
    said = iter(itertools.cycle(["left or right, normal or enlarged, larger or smaller", None, ""]))
    monkeypatch.setattr(
        script, "answer", lambda model, prompts, rows, run: {i: {"prediction": next(said)} for i in rows}
    )
    flags = ["--resume", tmp_path / "first/checkpoints/step-00000001"]
    run(mri_folder, tmp_path / "out", *SMALL, "--eval-only", *flags)
    results = json.loads((tmp_path / "out/results.json").read_text())
    asked = len(list((mri_folder / "data/test").glob("*.json")))
    assert (results["all"]["n"], results["all"]["exact"]) == (asked, 0.0)
    assert {entry["balanced"] for entry in results["types"].values()} == {0.0}


def test_candidates_are_worded_as_in_training_and_alike_for_every_label(capsys):
    def row(split, answer, labels=("male", "female"), task="sex"):
        return script.Row(
            *("w", split, "i", [], [], "q", answer, task, list(labels), ["s"]), label=read_label(answer, list(labels))
        )

    train = ["The subject is male."] * 3 + ["Sex: female."] * 2 + ["The subject is female.", "He is male indeed."] * 2
    rows = [row("train", answer) for answer in train] + [row("test", "Certainly a female brain.")]
    words = script.word_labels(rows, {})
    assert {tuple(r.candidates) for r in rows} == {("The subject is male.", "The subject is female.")}
    assert rows[-1].also_right == ["The subject is female.", "female"] and rows[0].also_right == ["male"]
    rows = [row("train", "A male."), row("train", "A female.", labels=("female", "male"))]
    script.word_labels(rows, {})
    assert {tuple(r.candidates) for r in rows} == {("A male.", "A female.")}
    # the same words answer again where training is not at hand, and whatever the order in which labels are listed
    later = [row("test", "A male brain."), row("test", "A female brain.", labels=("female", "male"))]
    assert script.word_labels(later, words) == words
    assert {tuple(r.candidates) for r in later} == {("The subject is male.", "The subject is female.")}
    assert "'The subject is female.'; true answers, train: 5 male, 4 female, val: 0 male" in capsys.readouterr().out
    # no words are shared by both labels: each label's own, most frequent
    rows = [
        row("train", "Yes, male."),
        row("train", "A male."),
        row("train", "Yes, male."),
        row("train", "No, female."),
        row("train", "No, female."),
    ]
    script.word_labels(rows, {})
    assert rows[0].candidates == ["Yes, male.", "No, female."]
    # of a label that training never names, the label; of answers that are all different, too: they say more than it
    rows = [row("train", "Yes, male."), row("train", "Yes, male."), row("test", "No, female.")]
    script.word_labels(rows, {})
    assert rows[1].candidates == ["Yes, male.", "female"]  # and never in words of the test split
    rows = [row("train", "A male of 35 years."), row("train", "A female of 62 years.")]
    script.word_labels(rows, {})
    assert rows[0].candidates == ["male", "female"]


def test_labels_can_be_declared_for_conversations_that_declare_none(copy, tmp_path):
    for path in (copy / "data").rglob("*.json"):
        edit(path, answer_candidates=...)
    free = load_demo(copy, script, *VOLUMES)
    assert all(row.labels == [] and row.candidates is None for row in free.rows)
    flags = ["--labels", "lesion_side=left,right,none", "--labels", "ventricle_size=normal,enlarged"]
    labelled = load_demo(copy, script, *VOLUMES, *flags)
    edit(conversation(copy, "train", "lesion_side"), answer_candidates=["left", "right"])
    assert "1 faults" in refused(copy, copy / "out", *SMALL, "--check", *flags)
    (fault,) = json.loads((copy / "out/check.json").read_text())["failures"]
    assert "answer_candidates ['left', 'right'] are not those of --labels; leave one of the two out" in fault
    unknown = refused(copy, copy / "out", *SMALL, "--check", "--labels", "lesionside=left,right,none")
    assert "--labels lesionside=…: no conversation is of this task" in unknown
    for row in labelled.rows:
        assert bool(row.labels) == (row.question_type in ("lesion_side", "ventricle_size"))
        assert row.label in (row.labels or [None])


def test_a_question_said_back_is_no_answer():
    row = SimpleNamespace(labels=["enlarged", "normal"], label="enlarged", question="Say whether they are enlarged.")
    assert script.score("They are enlarged.", row)["exact"]
    for said in (row.question, "say whether they are enlarged"):
        assert not script.score(said, row)["exact"]


def test_balanced_accuracy_scored_accuracy_and_auroc_are_those_of_their_definitions():
    chance = random.Random(0)
    for labels in (["a", "b"], ["a", "b", "c"]):
        records = []
        for i in range(80):
            answer, said = chance.choice(labels), chance.choice(labels)
            weights = [chance.choice([0.1, 0.2, 0.3, 0.4]) + (x == answer) * 0.1 for x in labels]  # with ties
            probabilities = {x: w / sum(weights) for x, w in zip(labels, weights, strict=True)}
            right = said == answer
            record = {"question_type": "t", "group": str(i), "answer": answer, "correct": right, "tolerant": right}
            record["floors"] = {}
            records.append({**record, "candidates": labels, "probabilities": probabilities})
        entry = common.summarise(records)["types"]["t"]
        recalls, areas = [], []
        for label in labels:
            mine = [r for r in records if r["answer"] == label]
            others = [r for r in records if r["answer"] != label]
            recalls.append(sum(r["correct"] for r in mine) / len(mine))
            pairs = [(m["probabilities"][label], o["probabilities"][label]) for m in mine for o in others]
            areas.append(sum((m > o) + (m == o) / 2 for m, o in pairs) / len(pairs))
        assert entry["balanced"] == pytest.approx(sum(recalls) / len(labels))
        assert entry["auroc"] == pytest.approx(sum(areas) / len(labels))
        odd = {**records[0], "answer": "z", "correct": False}  # its answer is none of the candidates: it counts, too
        more = common.summarise([*records, odd])["types"]["t"]
        assert more["balanced"] == pytest.approx(sum(recalls) / (len(labels) + 1))
        assert more["scored"] == pytest.approx(entry["scored"] * 80 / 81)
        likeliest = [max(r["probabilities"], key=r["probabilities"].get) == r["answer"] for r in records]
        assert entry["scored"] == pytest.approx(sum(likeliest) / 80)
    one = [r for r in records if r["answer"] == "a"]
    entry = common.summarise(one)["types"]["t"]
    assert entry["auroc"] is entry["balanced"] is None  # always saying it is no achievement
    text = common.results_table(common.summarise(one))
    assert text.split("\n")[0].endswith("auroc") and text.split("\n")[1].endswith("–")
    for i, record in enumerate(one):
        record["candidates"] = record["candidates"][:i]  # each question has options of its own
    assert "balanced" not in common.summarise(one)["types"]["t"]


# --- a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(mri_folder, tmp_path_factory):
    """A run of six steps with the patch embeddings trained, and what it printed."""
    out, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(mri_folder, out, *SMALL, "--max-steps", 6, "--epochs", 4, "--save-every", 3, "--keep", 1)
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
        assert {"exact", "floors", "balanced", "scored", "auroc"} < entry.keys()
    assert results["modality"] == VOLUMES[1::2] and results["tokens"] == {"T1": 64, "rsfMRI": 54}


def test_stopped_and_resumed_it_is_the_same_run(mri_folder, trained, tmp_path, monkeypatch):
    flags = [*SMALL, "--max-steps", 6, "--epochs", 4, "--save-every", 3, "--keep", 1]
    with monkeypatch.context() as patch:
        stop_in(patch, 4, script)
        with pytest.raises(SystemExit) as stopped:
            run(mri_folder, tmp_path, *flags)
        assert stopped.value.code == runtime.EXIT_STOPPED
    run(mri_folder, tmp_path, *flags)
    assert metrics_of(tmp_path) == metrics_of(trained[0])
    mine, theirs = (read_tensors(out / "checkpoints/step-00000006") for out in (tmp_path, trained[0]))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_the_run_s_model_folder_answers_alike_and_goes_on_with_its_embeddings(mri_folder, trained, tmp_path, capsys):
    """Without any flag: how volumes are read stands in its config.json."""
    out, _ = trained
    (tmp_path / "demo").mkdir()
    shutil.copytree(out / "model", tmp_path / "demo/model")
    os.symlink(mri_folder / "data", tmp_path / "demo/data")
    run(tmp_path / "demo", tmp_path / "more", "--max-steps", 1, "--lr", 0, "--max-answer-tokens", 4)
    printed = capsys.readouterr().out
    assert "modality ['T1:32x32x32:8x8x8', 'rsfMRI:24x24x24x4:8x8x8x2'] (from " in printed
    assert (tmp_path / "more/predictions.jsonl").read_text() == (out / "predictions.jsonl").read_text()
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
    data = load_demo(tmp_path / "demo", script, *VOLUMES)
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
