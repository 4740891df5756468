"""Attention in pieces equals attention over the complete sequence, and one mask serves all layers."""

import pytest
import torch
import transformers
from helpers import difference
from transformers import AutoModelForCausalLM, LlamaConfig

import common
from common import IGNORE, Prompt
from runtime.attention import in_pieces

transformers.AttentionInterface.register("sdpa", in_pieces)  # as models.open_model does


def decoder(layers: int):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(hidden_size=32, intermediate_size=64, vocab_size=64, num_hidden_layers=layers, **heads)
    return AutoModelForCausalLM.from_config(config).model


def packed(*trees: tuple[int, int]) -> dict:
    """A sequence of trees: (length of the prefix, number of branches)"""
    branch = [3, 4, 5], [IGNORE, 4, 5]
    trees = [Prompt([2] * prefix, [branch] * count, [f"q{i}" for i in range(count)]) for prefix, count in trees]
    [batch] = common.pack(trees, sum(map(len, trees)))
    return batch


def states(model, batch: dict, ours: bool) -> dict[str, torch.Tensor]:
    """Last hidden states and the gradients of embeddings and first layer, of our call or of the model's own."""
    model.zero_grad()
    torch.manual_seed(1)
    embeds = torch.randn(1, batch["input_ids"].shape[1], 32, requires_grad=True)
    mask, positions = common.visible(batch["document"], batch["branch"]), batch["position_ids"]
    if ours:
        hidden = common.last_hidden(model, embeds, positions, mask)
    else:
        hidden = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    (hidden * torch.linspace(-1, 1, 32)).sum().backward()
    return {"hidden": hidden.detach(), "embeds": embeds.grad} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("trees", [[(7, 2), (5, 1), (9, 3)], [(0, 1), (4, 2), (0, 3)], [(6, 4)], [(0, 1)]])
def test_attention_in_pieces_equals_that_over_the_complete_sequence(trees):
    model, batch = decoder(2), packed(*trees)
    assert difference(states(model, batch, True), states(model, batch, False)) < 1e-5


def test_a_piece_reaches_from_a_document_s_beginning_to_its_first_question_or_over_the_others(monkeypatch):
    found = []
    own = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, *args, attn_mask, **settings):
        found.append((query.shape[2], key.shape[2], attn_mask is not None))
        return own(query, key, *args, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    states(decoder(1), packed((7, 3), (5, 1)), True)
    assert found == [(10, 10, False), (6, 16, True), (8, 8, False)]  # queries, keys, with a mask


def test_documents_may_interleave():
    document = torch.tensor([[1, 2, 1, 2, 2, 1]])
    batch = {"document": document, "branch": torch.zeros_like(document), "input_ids": document}
    batch["position_ids"] = torch.arange(6)[None]
    model = decoder(2)
    assert difference(states(model, batch, True), states(model, batch, False)) < 1e-5


@pytest.mark.parametrize("layers", [1, 4])
def test_all_layers_keep_one_mask_for_the_backward_pass(layers):
    batch, kept = packed((400, 2), (200, 2)), set()
    square = batch["input_ids"].shape[1] ** 2

    def keep(tensor):
        if tensor.untyped_storage().nbytes() >= square:  # also of booleans; all else is smaller
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states(decoder(layers), batch, True)
    assert len(kept) == 1
