"""Adapters go to peft and back without a change of the logits; whatever does not fit is refused and changes nothing."""

import copy
import json
import math

import pytest
import torch
from helpers import far_from_start, llava_logits, same
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import train_llava_med as script
from common import add_lora, lora_layers, merge_lora, train_only
from runtime.adapters import load_adapter, load_trained, save_adapter, save_trained


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
    far_from_start(p for p in llava.parameters() if p.requires_grad)
    return llava


# --- files: to peft and back -----------------------------------------------------------------------------------

SIZES = [(4, 8, False), (2, 16, True)]


@pytest.mark.parametrize(("r", "alpha", "rslora"), SIZES)
def test_an_adapter_saved_here_loads_in_peft(base, fresh, tmp_path, r, alpha, rslora):
    llava = with_lora(fresh(), r, alpha, rslora)
    save_adapter(llava, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert same(llava_logits(theirs), llava_logits(llava))
    assert not same(llava_logits(theirs), llava_logits(base))
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
    far_from_start(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    llava = fresh()
    assert len(load_adapter(llava, tmp_path)) == 21
    assert same(llava_logits(llava), llava_logits(theirs))
    assert not same(llava_logits(llava), llava_logits(base))


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
        assert torch.equal(llava_logits(other), llava_logits(llava))
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
    before = llava_logits(llava)
    with pytest.raises(ValueError, match=error):
        load_adapter(llava, tmp_path)
    assert torch.equal(llava_logits(llava), before)


def test_an_adapter_of_fewer_layers_is_refused_by_a_model_with_more(fresh, tmp_path):
    few = fresh()
    add_lora(few, r"model\.language_model\..*\.q_proj", 4, 8, without=r".*")
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


@pytest.mark.parametrize("target", ["(", 5, ["lm_head", "x" * 10**6]])
def test_the_layers_of_an_adapter_are_those_of_its_file(fresh, tmp_path, target):
    """target_modules is for who makes an adapter anew: nothing here compiles it, or makes layers of it."""
    llava = with_lora(fresh())
    save_adapter(llava, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": target}))
    again = fresh()
    assert load_adapter(again, tmp_path) == sorted(lora_layers(llava))
    assert torch.equal(llava_logits(again), llava_logits(llava))


def test_adapters_of_different_sizes_are_not_saved_because_the_file_names_one(fresh, tmp_path):
    llava = fresh()
    add_lora(llava, r"model\.language_model\..*\.q_proj", r=4, alpha=8, without=r".*")
    add_lora(llava, r"model\.language_model\..*\.v_proj", r=4, alpha=64, without=r".*")
    with pytest.raises(ValueError, match="alpha"):
        save_adapter(llava, tmp_path)


def test_a_merged_adapter_is_not_saved(fresh, tmp_path):
    llava = merge_lora(with_lora(fresh()))
    with pytest.raises(ValueError, match="no LoRA layers to save"):
        save_adapter(llava, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_with_parts_that_a_script_alone_reads_is_refused_by_peft_and_opens_here(base, fresh, tmp_path):
    """Of a module that the base lacks, peft would drop the weights without a word."""
    llava, again = with_lora(fresh()), fresh()
    for model in (llava, again):
        model.ear = torch.nn.Linear(2, 2)
    llava.grafted = "ear"
    save_adapter(llava, tmp_path)
    with pytest.raises(KeyError, match=r"LORA with ear, which its own training script alone reads"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    load_adapter(again, tmp_path)
    assert torch.equal(again.ear.weight, llava.ear.weight)
    assert torch.equal(llava_logits(again), llava_logits(llava))


# --- full tuning -----------------------------------------------------------------------------------------------


def test_full_tuning_saves_and_loads_every_trained_parameter(base, tmp_path):
    llava = copy.deepcopy(base)
    train_only(llava, r"model\.language_model\..*", script.PROJECTOR_PATTERN)
    far_from_start(p for p in llava.parameters() if p.requires_grad)
    trained = {name: p.detach() for name, p in llava.named_parameters() if p.requires_grad}
    save_trained(llava, tmp_path, trained)
    assert load_file(tmp_path / "model.safetensors").keys() == trained.keys()
    again = copy.deepcopy(base)
    train_only(again, r"model\.language_model\..*", script.PROJECTOR_PATTERN)
    load_trained(again, tmp_path)
    assert torch.equal(llava_logits(again), llava_logits(llava))


def test_save_trained_writes_an_adapter_where_there_is_one(fresh, tmp_path):
    llava = with_lora(fresh())
    save_trained(llava, tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = fresh()
    add_lora(again, script.LORA_PATTERN, 4, 8)
    load_trained(again, tmp_path)
    assert torch.equal(llava_logits(again), llava_logits(llava))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.pop("lm_head.weight"), r"0 keys without a place .*, 1 not in the file \(lm_head.weight"),
        (lambda t: t.update({"lm_head.extra": torch.ones(1)}), r"1 keys without a place \(lm_head.extra"),
        (lambda t: t.update({"lm_head.weight": torch.ones(639, 128)}), r"lm_head.weight has shape \(639, 128\)"),
    ],
)
def test_full_weights_that_do_not_fit_are_refused_and_change_nothing(base, tmp_path, change, error):
    llava = copy.deepcopy(base)
    train_only(llava, r".*")
    tensors = {name: p.detach() + 1 for name, p in llava.named_parameters()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=error):
        load_trained(llava, tmp_path)
    assert torch.equal(llava_logits(llava), llava_logits(base))
