"""Attention a document at a time; and a test for language models that nobody has tried: do they heed the mask?"""

from pathlib import Path

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import common
from runtime.batches import to_device


def by_document(module, query, key, value, attention_mask, documents=(), **settings):
    """transformers' attention without the scores between `documents`, (start, end) pairs, which the mask leaves out.

    query, key and value are (1, heads, T, width); returns (1, T, heads, width), and None for no weights.
    """
    if len(documents) < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    found = []
    for start, end in documents:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        found.append(sdpa_attention_forward(module, q, k, v, attention_mask[..., start:end, start:end], **settings)[0])
    return torch.cat(found, dim=1), None


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
