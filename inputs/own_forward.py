"""A script's loss beside the one of transformers' own forward, and packed sequences beside single examples."""

import inspect
from pathlib import Path

import torch

import common
from inputs.task import Task


@torch.no_grad()
def losses(model, tree: common.Prompt, task: Task, example, run) -> tuple[float, float, list[str]]:
    """The script's loss of a tree's first example, transformers' own, and the tokens whose features are the script's.

    transformers' model reads the same tokens, labels and media, and finds positions, masks and features itself. Only at
    placeholders of a part that the script has grafted on, such as an encoder of sound, are the features the script's.
    """
    model.eval()
    (batch,) = run.packed([tree.part([0])], task)
    seen = {}
    keep = model.decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    total, supervised = model(batch)
    keep.remove()
    media, grafted = own_media(model.vlm, batch, task, tree, example, run)
    places = torch.isin(batch["input_ids"], torch.tensor(grafted).to(total.device))

    def graft(_, args, embeds):
        return torch.where(places.unsqueeze(-1), seen["inputs_embeds"], embeds)

    place = model.vlm.get_input_embeddings().register_forward_hook(graft)
    own = model.vlm(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False, **media).loss
    place.remove()
    names = task.tokenizer.convert_ids_to_tokens(grafted)
    return float(total) / int(supervised), float(own), names


def own_media(vlm, batch: dict, task: Task, tree, example, run) -> tuple[dict, list[int]]:
    """What the model's own forward takes of the media, and the placeholders that it has no features for."""
    takes = inspect.signature(vlm.forward).parameters
    read = task.read_media(Path(run.args.media_root), [tree])
    media = {name: batch[name] for name in read if name in takes}
    placeholders = [token_id for token_id, count in task.placeholders(example).items() if count]
    if not media:
        return {}, placeholders
    image_id = common.image_token_id(vlm.config)
    if "mm_token_type_ids" in takes:  # which tokens are an image's
        media["mm_token_type_ids"] = (batch["input_ids"] == image_id).long()
    return media, [token_id for token_id in placeholders if token_id != image_id]


def packing(model, trees: list[common.Prompt], task: Task, run) -> tuple[float, float]:
    """How much loss and gradients of packed trees differ from those of every example alone, relative to these."""
    model.eval()  # dropout would draw other numbers
    packed = summed(model, run.packed(trees, task))
    single = [tree.part([i]) for tree in trees for i in range(len(tree.ids))]
    alone = summed(model, (batch for tree in single for batch in run.packed([tree], task)))
    model.zero_grad(set_to_none=True)
    loss = abs(packed["loss"] - alone["loss"]) / max(1.0, abs(alone["loss"]))
    if packed.keys() != alone.keys():
        return float(loss), float("inf")
    # a key's bias has gradient 0, because softmax does not see it: rounding must not be divided by rounding
    found = [float((packed[n] - alone[n]).norm() / alone[n].norm().clamp(min=0.1)) for n in alone.keys() - {"loss"}]
    return float(loss), max(found, default=0.0)


def summed(model, batches) -> dict[str, torch.Tensor]:
    """The loss, summed over batches, and the gradient of every trained parameter that has one."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss, _ = model(batch)
        loss.backward()
        total += loss.detach()
    return {"loss": total} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def logits(model, trees: list[common.Prompt], task: Task, run) -> torch.Tensor:
    """(supervised tokens, vocabulary): what the model says before each supervised token of the trees."""
    model.eval()
    found = []
    with torch.no_grad():
        for batch in run.packed(trees, task):
            mask = common.visible(batch["document"], batch["branch"])
            hidden = model.hidden(batch["input_ids"], batch["position_ids"], mask, media=batch)
            found.append(model.lm_head(hidden[:, :-1][batch["labels"][:, 1:] != common.IGNORE]).float().cpu())
    return torch.cat(found)
