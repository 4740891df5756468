"""LoRA is W + scaling B A and nothing else moves; adapters go to peft and back without a change of the logits."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

import train_llava_med as script
from common import (
    LoRALinear,
    add_lora,
    load_adapter,
    load_trained,
    lora_layers,
    merge_lora,
    save_adapter,
    save_trained,
    train_only,
)


@pytest.fixture(scope="module")
def base(demo_folder):
    return LlavaForConditionalGeneration.from_pretrained(demo_folder / "model").eval()


@pytest.fixture
def fresh(base):
    """A function that gives a copy of the demo's model in which the projector alone is trained."""

    def make():
        llava = copy.deepcopy(base)
        train_only(llava, script.PROJECTOR_PATTERN)
        return llava

    return make


def with_lora(llava, r=4, alpha=8, rslora=False):
    """LoRA whose weights, like the projector's, are far from where they start."""
    add_lora(llava, script.LORA_PATTERN, r, alpha, 0.0, rslora)
    randomise(p for p in llava.parameters() if p.requires_grad)
    return llava


@torch.no_grad()
def randomise(parameters):
    torch.manual_seed(1)
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * 0.1)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, 3, 72, 72, generator=draw)
    return model(input_ids=torch.tensor([[1, *[600] * 64, 5, 300, 400]]), pixel_values=pixel_values).logits


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() / b.norm() < 1e-5)


# --- the layer -------------------------------------------------------------------------------------------------


def test_training_starts_from_the_model_as_it_was(base, fresh):
    llava = fresh()
    add_lora(llava, script.LORA_PATTERN, 4, 8)
    assert all(layer.lora_A.abs().sum() > 0 for layer in lora_layers(llava).values())
    assert torch.equal(logits(llava), logits(base))


def test_the_layer_underneath_is_frozen():
    layer = LoRALinear(nn.Linear(6, 5), r=2, alpha=3)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_merge_adds_scaling_b_a_once():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5), r=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    x, weight, bias = torch.randn(7, 6), layer.base_layer.weight.clone(), layer.base_layer.bias.clone()
    expected = weight + 1.5 * layer.lora_B @ layer.lora_A
    unmerged = layer(x)
    torch.testing.assert_close(unmerged, x @ expected.T + bias)
    for _ in range(2):
        plain = layer.merge()
        torch.testing.assert_close(plain.weight, expected)
        torch.testing.assert_close(layer(x), unmerged)  # not added a second time
        torch.testing.assert_close(plain(x), unmerged)


def test_dropout_acts_on_the_adapter_alone_and_only_in_training():
    layer = LoRALinear(nn.Linear(6, 5), r=2, alpha=3, dropout=1.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 6)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.allclose(layer.eval()(x), layer.base_layer(x))


def test_only_adapters_and_projector_move(fresh):
    llava = fresh()
    names = add_lora(llava, script.LORA_PATTERN, 4, 8)
    before = {name: p.detach().clone() for name, p in llava.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in llava.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):  # the first step moves B alone: while B is zero, A has no gradient
        ids = torch.tensor([[1, *[600] * 64, 5, 300, 400]])
        llava(input_ids=ids, pixel_values=torch.ones(1, 3, 72, 72)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in llava.named_parameters() if not torch.equal(p, before[name])}
    adapters = {f"{name}.lora_{matrix}" for name in names for matrix in "AB"}
    projector = {f"model.multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert moved == adapters | projector


def test_float32_adapters_keep_an_update_that_bfloat16_loses():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(4, 4, dtype=torch.bfloat16), r=1, alpha=1)
    assert (layer.lora_A.dtype, layer.lora_B.dtype) == (torch.float32, torch.float32)
    with torch.no_grad():
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1.0)
    output = layer(torch.ones(1, 4, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert layer.lora_A.grad.tolist() == [[4.0] * 4]
    in_bfloat16 = layer.lora_A.detach().bfloat16()
    torch.optim.SGD([layer.lora_A], lr=2.5e-4).step()  # an update of 1e-3
    torch.testing.assert_close(layer.lora_A.detach(), torch.full((1, 4), 0.999), rtol=0, atol=1e-6)
    assert (in_bfloat16 - 1e-3).tolist() == [[1.0] * 4]


def test_merging_into_bfloat16_rounds_once():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 8, dtype=torch.bfloat16), r=2, alpha=2)
    nn.init.normal_(layer.lora_B)
    expected = (layer.base_layer.weight.float() + layer.lora_B @ layer.lora_A).bfloat16()
    assert torch.equal(layer.merge().weight, expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_is_peft_s(rslora):
    ours = LoRALinear(nn.Linear(4, 4), r=16, alpha=32, rslora=rslora)
    config = LoraConfig(r=16, lora_alpha=32, use_rslora=rslora, target_modules=["0"])
    theirs = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    assert ours.scaling == theirs.base_model.model[0].scaling["default"]
    assert ours.scaling == (32 / math.sqrt(16) if rslora else 2)


# --- patterns --------------------------------------------------------------------------------------------------


def test_the_default_pattern_is_every_projection_of_the_language_model_and_none_of_the_tower(fresh):
    llava = fresh()
    tower = [n for n, m in llava.named_modules() if "vision_tower" in n and n.endswith("q_proj")]
    assert len(tower) == 3  # what a pattern such as ".*q_proj" would adapt too
    names = add_lora(llava, script.LORA_PATTERN, 4, 8)
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert sorted(names) == sorted(f"model.language_model.layers.{i}.{part}" for i in range(3) for part in parts)
    assert sorted(lora_layers(llava)) == sorted(names)


@pytest.mark.parametrize("stale", [r"model\.layers\.\d+\.self_attn\.q_proj", r"language_model\..*", "q_proj"])
def test_a_pattern_that_matches_nothing_is_an_error(fresh, stale):
    llava = fresh()
    with pytest.raises(ValueError, match=r"matches no linear layer; there are .*lm_head"):
        add_lora(llava, stale, 4, 8)
    assert lora_layers(llava) == {}
    frozen = [p.requires_grad for p in llava.parameters()]
    with pytest.raises(ValueError, match="no parameter matches"):
        train_only(llava, script.PROJECTOR_PATTERN, stale)
    assert [p.requires_grad for p in llava.parameters()] == frozen


def test_train_only_freezes_all_else(base):
    llava = copy.deepcopy(base)
    names = train_only(llava, r"lm_head\..*", script.PROJECTOR_PATTERN)
    projector = [f"model.multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("bias", "weight")]
    assert names == ["lm_head.weight", *projector]
    assert {name for name, p in llava.named_parameters() if p.requires_grad} == set(names)


def test_a_second_adapter_on_a_layer_is_an_error(fresh):
    llava = fresh()
    add_lora(llava, script.LORA_PATTERN, 4, 8)
    with pytest.raises(ValueError, match="already have an adapter"):
        add_lora(llava, r".*q_proj", 4, 8)
    with pytest.raises(ValueError, match="already have an adapter"):
        add_lora(llava, script.LORA_PATTERN, 4, 8)


# --- files: to peft and back -----------------------------------------------------------------------------------

SIZES = [(4, 8, False), (2, 16, True)]


@pytest.mark.parametrize(("r", "alpha", "rslora"), SIZES)
def test_an_adapter_saved_here_loads_in_peft(base, fresh, tmp_path, r, alpha, rslora):
    llava = with_lora(fresh(), r, alpha, rslora)
    save_adapter(llava, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert same(logits(theirs), logits(llava))
    assert not same(logits(theirs), logits(base))
    projector = theirs.base_model.model.model.multi_modal_projector.linear_1
    assert torch.equal(projector.weight, llava.model.multi_modal_projector.linear_1.weight)


@pytest.mark.parametrize(("r", "alpha", "rslora"), SIZES)
def test_an_adapter_saved_by_peft_loads_here(base, fresh, tmp_path, r, alpha, rslora):
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=script.LORA_PATTERN,
        modules_to_save=["multi_modal_projector"],
    )
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    llava = fresh()
    assert len(load_adapter(llava, tmp_path)) == 21
    assert same(logits(llava), logits(theirs))
    assert not same(logits(llava), logits(base))


@pytest.mark.parametrize(("r", "alpha", "rslora"), SIZES)
def test_an_adapter_saved_here_loads_here_with_its_own_scaling(fresh, tmp_path, r, alpha, rslora):
    llava = with_lora(fresh(), r, alpha, rslora)
    save_adapter(llava, tmp_path)
    again = fresh()
    load_adapter(again, tmp_path)
    prepared = fresh()
    add_lora(prepared, script.LORA_PATTERN, r, alpha=1)  # of which the file knows better
    load_adapter(prepared, tmp_path)
    for other in (again, prepared):
        assert torch.equal(logits(other), logits(llava))
        layer = next(iter(lora_layers(other).values()))
        assert (layer.r, layer.alpha, layer.rslora) == (r, alpha, rslora)
        assert layer.scaling == (alpha / math.sqrt(r) if rslora else alpha / r)


def test_whatever_is_trained_is_saved(fresh, tmp_path):
    llava = with_lora(fresh())
    save_adapter(llava, tmp_path)
    saved = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")}
    trained = {name for name, p in llava.named_parameters() if p.requires_grad}
    assert saved == {f"{name}.weight" if ".lora_" in name else name for name in trained}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)]
    assert config["target_modules"] == sorted(lora_layers(llava))


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
PROJECTOR = "base_model.model.model.multi_modal_projector"


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "0 keys without a place .*, 1 not in the file .*q_proj.lora_B"),
        (lambda t: t.pop(f"{PROJECTOR}.linear_2.bias"), "0 keys without a place .*, 1 not in the file .*linear_2.bias"),
        (
            lambda t: [t.pop(key) for key in list(t) if key.startswith(PROJECTOR)],
            "0 keys without a place .*, 4 not in the file .*linear_1.bias",
        ),
        (lambda t: t.update(extra=torch.ones(1)), r"1 keys without a place \(extra\), 0 not in the file"),
        (lambda t: t.update({f"{Q}.typo.weight": torch.ones(1)}), "1 keys without a place .*typo.weight"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(5, 128)}), r"q_proj.lora_A.weight has shape \(5, 128\)"),
        (lambda t: t.update({f"{PROJECTOR}.linear_2.bias": torch.ones(3)}), r"linear_2.bias has shape \(3,\)"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(fresh, tmp_path, change, error, prepared):
    save_adapter(with_lora(fresh()), tmp_path)
    rewrite(tmp_path, change)
    llava = fresh()
    if prepared:
        add_lora(llava, script.LORA_PATTERN, 4, 8)
    before = logits(llava)
    with pytest.raises(ValueError, match=error):
        load_adapter(llava, tmp_path)
    assert torch.equal(logits(llava), before)


def test_an_adapter_of_fewer_layers_is_refused_by_a_model_with_more(fresh, tmp_path):
    few = fresh()
    add_lora(few, r"model\.language_model\..*\.q_proj", 4, 8)
    save_adapter(few, tmp_path)
    many = fresh()
    add_lora(many, script.LORA_PATTERN, 4, 8)
    with pytest.raises(ValueError, match=r"0 keys without a place .*, 36 not in the file"):
        load_adapter(many, tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"lora_bias": True},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"peft_type": "IA3"},
        {"use_qalora": True},
        {"alora_invocation_tokens": [5, 300]},
        {"init_lora_weights": "pissa"},  # these two change the base weights, which the file does not hold
        {"init_lora_weights": "olora"},
    ],
)
def test_peft_features_that_are_not_supported_are_refused(fresh, tmp_path, setting):
    save_adapter(with_lora(fresh()), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    llava = fresh()
    with pytest.raises(ValueError, match="only plain LoRA adapters can be loaded"):
        load_adapter(llava, tmp_path)
    assert lora_layers(llava) == {}


def test_adapters_of_different_sizes_are_not_saved_because_the_file_names_one(fresh, tmp_path):
    llava = fresh()
    add_lora(llava, r"model\.language_model\..*\.q_proj", r=4, alpha=8)
    add_lora(llava, r"model\.language_model\..*\.v_proj", r=4, alpha=64)
    with pytest.raises(ValueError, match="alpha"):
        save_adapter(llava, tmp_path)


# --- merging ---------------------------------------------------------------------------------------------------


def test_a_merged_model_gives_the_logits_of_the_unmerged(fresh):
    llava = with_lora(fresh())
    expected = logits(llava)
    merge_lora(llava)
    assert lora_layers(llava) == {}
    assert same(logits(llava), expected)
    merge_lora(llava)
    assert same(logits(llava), expected)


def test_a_merged_adapter_is_not_saved(fresh, tmp_path):
    llava = with_lora(fresh())
    first = next(iter(lora_layers(llava).values()))
    first.merge()
    with pytest.raises(ValueError, match="is merged: save the adapter before merging"):
        save_adapter(llava, tmp_path / "adapter")
    merge_lora(llava)
    with pytest.raises(ValueError, match="no LoRA layers to save"):
        save_adapter(llava, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_merged_folder_opens_with_plain_transformers(fresh, tmp_path):
    llava = with_lora(fresh())
    expected = logits(llava)
    merge_lora(llava).save_pretrained(tmp_path)
    plain, found = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not (found["missing_keys"] or found["unexpected_keys"] or found["mismatched_keys"])
    assert same(logits(plain.eval()), expected)


# --- full tuning -----------------------------------------------------------------------------------------------


def test_full_tuning_saves_and_loads_every_trained_parameter(base, tmp_path):
    llava = copy.deepcopy(base)
    train_only(llava, r"model\.language_model\..*", script.PROJECTOR_PATTERN)
    randomise(p for p in llava.parameters() if p.requires_grad)
    trained = {name: p.detach() for name, p in llava.named_parameters() if p.requires_grad}
    save_trained(llava, tmp_path, trained)
    assert load_file(tmp_path / "model.safetensors").keys() == trained.keys()
    again = copy.deepcopy(base)
    train_only(again, r"model\.language_model\..*", script.PROJECTOR_PATTERN)
    load_trained(again, tmp_path)
    assert torch.equal(logits(again), logits(llava))


def test_save_trained_writes_an_adapter_where_there_is_one(fresh, tmp_path):
    llava = with_lora(fresh())
    save_trained(llava, tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = fresh()
    add_lora(again, script.LORA_PATTERN, 4, 8)
    load_trained(again, tmp_path)
    assert torch.equal(logits(again), logits(llava))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("lm_head.weight"),
        lambda t: t.update({"lm_head.extra": torch.ones(1)}),
        lambda t: t.update({"lm_head.weight": torch.ones(639, 128)}),
    ],
)
def test_full_weights_that_do_not_fit_are_refused_and_change_nothing(base, tmp_path, change):
    llava = copy.deepcopy(base)
    train_only(llava, r".*")
    tensors = {name: p.detach() + 1 for name, p in llava.named_parameters()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 parameters do not fit the model, such as lm_head"):
        load_trained(llava, tmp_path)
    assert torch.equal(logits(llava), logits(base))
