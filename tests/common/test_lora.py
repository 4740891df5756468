"""LoRA is W + scaling B A, and nothing else moves."""

import copy
import math

import pytest
import torch
from helpers import far_from_start, llava_logits, same
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
)

import train_llava_med as script
import train_qwen2vl_sentinel
import train_video_plain_lm
from common import LoRALinear, add_lora, lora_layers, merge_lora, train_only
from runtime.show import print_adapted


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


# --- the layer -------------------------------------------------------------------------------------------------


def test_training_starts_from_the_model_as_it_was(base, fresh):
    llava = fresh()
    add_lora(llava, script.LORA_PATTERN, 4, 8)
    assert all(layer.lora_A.abs().sum() > 0 for layer in lora_layers(llava).values())
    assert torch.equal(llava_logits(llava), llava_logits(base))


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
    model = nn.Sequential(layer)
    for _ in range(2):  # not added a second time
        plain = merge_lora(model)[0]
        torch.testing.assert_close(plain.weight, expected)
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


def test_what_is_trained_becomes_float32_and_nothing_else():
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2, dtype=torch.bfloat16))
    train_only(model, r"1\..*")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {f"{i}.{part}": (torch.bfloat16, torch.float32)[i] for i in (0, 1) for part in ("weight", "bias")}


def test_merging_into_bfloat16_rounds_once():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 8, dtype=torch.bfloat16), r=2, alpha=2)
    nn.init.normal_(layer.lora_B)
    expected = (layer.base_layer.weight.float() + layer.lora_B @ layer.lora_A).bfloat16()
    assert torch.equal(merge_lora(nn.Sequential(layer))[0].weight, expected)


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
    with pytest.raises(ValueError, match=r"no linear layer matches .*; there are .*lm_head"):
        add_lora(llava, stale, 4, 8)
    assert lora_layers(llava) == {}
    frozen = [p.requires_grad for p in llava.parameters()]
    with pytest.raises(ValueError, match="no parameter matches"):
        train_only(llava, script.PROJECTOR_PATTERN, stale)
    assert [p.requires_grad for p in llava.parameters()] == frozen


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 40,
}
QWEN = {"text_config": TINY | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}}
QWEN |= {"vision_config": VISION | {"mlp_ratio": 2, "fullatt_block_indexes": [1]}}


def tiny(kind: str, **more):
    """A model of transformers with two layers, without its weights."""
    config = AutoConfig.for_model(kind, **(QWEN if "vl" in kind else TINY), **more)
    with torch.device("meta"):
        return (AutoModelForImageTextToText if "vl" in kind else AutoModelForCausalLM).from_config(config)


PLAIN, QWENS = [train_video_plain_lm.LORA_PATTERN], [train_qwen2vl_sentinel.LORA_PATTERN]
TOWER = [*QWENS, train_qwen2vl_sentinel.VISION_PATTERN]
LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj; without: none"


@pytest.mark.parametrize(
    ("kind", "patterns", "lines"),
    [
        ("llama", PLAIN, [f"model.layers): {LLAMA}"]),
        ("mistral", PLAIN, [f"model.layers): {LLAMA}"]),
        ("mixtral", PLAIN, ["model.layers): q_proj k_proj v_proj o_proj; without: gate gate_up_proj down_proj"]),
        ("qwen2_vl", QWENS, [f"model.language_model.layers): {LLAMA}"]),
        ("qwen2_5_vl", QWENS, [f"model.language_model.layers): {LLAMA}"]),
        (
            "qwen2_vl",
            TOWER,
            ["model.visual.blocks): qkv proj fc1 fc2; without: none", f"model.language_model.layers): {LLAMA}"],
        ),
        (
            "qwen2_5_vl",
            TOWER,
            [
                "model.visual.blocks): qkv proj gate_proj up_proj down_proj; without: none",
                f"model.language_model.layers): {LLAMA}",
            ],
        ),
    ],
)
def test_the_layers_adapted_are_those_that_peft_adapts_and_are_printed(kind, patterns, lines, capsys):
    model = tiny(kind)
    model.requires_grad_(False)
    names = [name for pattern in patterns for name in add_lora(model, pattern, 4, 8)]
    print_adapted(model)
    assert capsys.readouterr().out.splitlines() == [f"LoRA: 2 layers ({line}" for line in lines]
    target = "|".join(patterns).replace(r"\w+", r"(fc\d|\w+_proj)")  # peft refuses the activation
    config = LoraConfig(r=4, target_modules=target)
    theirs = get_peft_model(tiny(kind), config).targeted_module_names
    assert sorted(names) == sorted(theirs)


FUSED = "model.layers.0.mlp.gate_up_proj, model.layers.0.self_attn.qkv_proj"


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("phi3", FUSED),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate"),
        ("phi", "fc0, model.layers.0.self_attn."),
    ],
)
def test_a_decoder_layer_that_the_pattern_knows_in_part_is_refused_by_name(kind, left):
    """Of Phi-3's layers o_proj and down_proj alone have the usual names, and were trained without a word."""
    model, pattern = tiny(kind), PLAIN[0]
    with pytest.raises(ValueError, match=f"leaves out .*{left}.*; edit the script's LORA_PATTERN, or give `without`"):
        add_lora(model, pattern, 4, 8)
    assert lora_layers(model) == {}
    add_lora(model, pattern, 4, 8, without=r".*")  # it is meant
    assert lora_layers(model)


def test_layers_without_an_adapter_beside_others_are_printed(capsys):
    model = tiny("llama")
    add_lora(model, r"model\.layers\.1\..*", 4, 8)
    print_adapted(model)
    bare, adapted = (LLAMA.split(";")[0], "none")[::-1], (LLAMA.split(";")[0], "none")
    lines = [f"LoRA: 1 layers (model.layers): {found}; without: {left}" for found, left in (bare, adapted)]
    assert capsys.readouterr().out.splitlines() == lines


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


# --- merging ---------------------------------------------------------------------------------------------------


def test_a_merged_model_gives_the_logits_of_the_unmerged(fresh):
    llava = with_lora(fresh())
    expected = llava_logits(llava)
    merge_lora(llava)
    assert lora_layers(llava) == {}
    assert same(llava_logits(llava), expected)
    merge_lora(llava)
    assert same(llava_logits(llava), expected)


def test_a_merged_folder_opens_with_plain_transformers(fresh, tmp_path):
    llava = with_lora(fresh())
    expected = llava_logits(llava)
    merge_lora(llava).save_pretrained(tmp_path)
    plain, found = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not (found["missing_keys"] or found["unexpected_keys"] or found["mismatched_keys"])
    assert same(llava_logits(plain.eval()), expected)
