"""Attention without what the mask leaves out; and a test for untried language models: do they heed the mask?"""

from functools import partial
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

import common
from runtime.batches import to_device


def in_pieces(module, query, key, value, attention_mask, pieces=(), blocks=None, **settings):
    """transformers' attention without most of the scores that the mask leaves out.

    query, key and value are (1, heads, T, width); returns (1, T, heads, width), and None for no weights. Of each of
    `pieces`, (start, first, end), the queries from `first` to `end` see keys from `start` on; all up to themselves
    where the two are the same, which needs no mask. With `blocks`, and without dropout, it is FlexAttention.
    """
    if blocks is not None and not settings.get("dropout"):
        found = flex_attention(query, key, value, block_mask=blocks, scale=settings.get("scaling"), enable_gqa=True)
        return found.transpose(1, 2), None
    if torch.compiler.is_compiling() or not pieces:  # compiled, it would be so anew for each number of them
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    found, settings = [], settings | {"is_causal": True}  # where there is no mask
    for start, first, end in pieces:
        k, v = key[:, :, start:end], value[:, :, start:end]
        mask = attention_mask[..., first:end, start:end] if first > start else None
        found.append(sdpa_attention_forward(module, query[:, :, first:end], k, v, mask, **settings)[0])
    return torch.cat(found, dim=1), None


def in_blocks(decoder, inputs, given: dict) -> tuple:
    """Before a decoder on a GPU: its mask as `blocks` of 128 x 128, those left out in which nothing is visible."""
    if decoder.training:
        mask = given["attention_mask"][0, 0]  # (T, T), added to scores
        seen = (mask == 0).sum(0)  # by how many: of common.visible, by itself and so many that follow without a gap

        def rule(_batch, _head, q, k):
            return (k <= q) & (q < k + seen[k])

        given["blocks"] = create_block_mask(rule, 1, 1, *mask.shape, mask.device)
    return inputs, given


def compile_layers(decoder, device: torch.device) -> None:
    """--compile: in training the decoder's layers run compiled, for any length; on a GPU with FlexAttention."""

    def forward(layer, plain, compiled, *inputs, **given):  # answering stays plain: its cache grows with every token
        return (compiled if layer.training else plain)(*inputs, **given)

    for layer in [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]:
        compiled = torch.compile(layer.forward, dynamic=True)
        if layer.gradient_checkpointing:  # of the compiled layer; within it dropout could draw other numbers again
            layer.gradient_checkpointing, compiled = False, partial(checkpoint, compiled, use_reentrant=False)
        layer.forward = partial(forward, layer, layer.forward, compiled)
    if device.type == "cuda":  # on a CPU FlexAttention has no gradients
        decoder.register_forward_pre_hook(in_blocks, with_kwargs=True)


@torch.no_grad()
def heeds_mask(model, trees: list, task, run) -> None:
    """Ends the program unless the first trees, packed, are read as if each were alone, and logits are the model's."""
    model.eval()
    trees = (trees * 2)[: max(2, min(4, len(trees)))]  # something must stand before and beside a text
    packed, together = read(model, trees, task, run)
    apart = 0.0
    for number, tree in enumerate(packed["prompts"], start=1):
        for i in range(len(tree.ids)):
            _, alone = read(model, [tree.part([i])], task, run)  # (tokens, width)
            own = (packed["document"] == number) & ((packed["branch"] == 0) | (packed["branch"] == i + 1))
            apart = max(apart, float((together[own[0]] - alone).norm() / alone.norm()))
    if apart > 0.05:  # bfloat16 rounds to 0.004
        text = f"what is packed beside a text changes how it is read (by {apart:.1%})"
        raise SystemExit(f"--model {run.args.model}: {text}: it does not heed attention_mask and position_ids")
    refuse_other_logits(model, trees[0], task, run)
    print("packed texts are read as if each were alone: tested on the first prompts")


def read(model, trees: list, task, run) -> tuple[dict, torch.Tensor]:
    """The trees as one packed sequence, and its last hidden states (tokens, width)."""
    [batch] = common.pack(trees, sum(map(len, trees)))
    try:
        media = task.read_media(Path(run.args.media_root), batch["prompts"])
    except ValueError as error:
        raise SystemExit(f"{error}. Fix the file and start again") from None
    batch = to_device({**batch, **media}, run.device)
    mask = common.visible(batch["document"], batch["branch"])
    with run.autocast():
        return batch, model.hidden(batch["input_ids"], batch["position_ids"], mask, media=batch)[0]


def refuse_other_logits(model, tree, task, run) -> None:
    """Ends the program where logits are more than the output embedding of the last hidden states, scaled or capped."""
    text, hidden = read(model, [common.Prompt([], tree.branches[:1], ["a text"])], task, run)  # without its media
    with run.autocast():
        ours = model.lm_head(hidden).float()
        theirs = model.vlm(input_ids=text["input_ids"], use_cache=False).logits[0].float()
    if (ours - theirs).norm() > 0.05 * theirs.norm():
        text = "its logits are more than its output embedding of the last hidden states, scaled or capped"
        raise SystemExit(f"--model {run.args.model}: {text}, which is not supported")
