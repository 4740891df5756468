"""What decides whether learning is right, shared by all training scripts.

    1  token IDs    read from the checkpoint, never computed
    2  masking      which tokens are learned: built while encoding, never searched for afterwards
    3  packing      prompt trees: one image is read once for all its questions
    4  LoRA         float32 adapters on frozen layers, in peft's file format
    5  answering    greedy, restricted to allowed answers, or scored, by the same visibility rule
    6  scoring      whole answers only; a missing answer is wrong and stays in the denominator

Nothing here knows a model's name, reads a command line or does anything on import. It holds only what at
least two scripts use and where a silent mistake would corrupt results; the plumbing is in runtime.py.
"""

import copy
import functools
import json
import math
import random
import re
import statistics
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import nn
from transformers import DynamicCache

IGNORE = -100  # the label of a token that is not learned, as in torch's cross_entropy
SENTINELS = ("<ANS>", "</ANS>")

# ------------------------------------------------------------------------------------------------------------
# 1  Token IDs: read, never computed
# ------------------------------------------------------------------------------------------------------------


def image_token_id(config) -> int:
    """The ID of the image placeholder, read from a model configuration (or its dictionary).

    `vocab_size - 1` looks right and is an ordinary word piece: the model then reports "tokens: 0". Raises
    ValueError where the configuration names no ID, two different ones, or one outside the embedding.
    """
    read = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
    named = {n: read(n) for n in ("image_token_index", "image_token_id") if read(n) is not None}
    if not named:
        raise ValueError("config.json names no image token: add image_token_index as the original checkpoint has it")
    if len(set(named.values())) > 1:
        raise ValueError(f"config.json names two different image tokens: {named}")
    token_id = next(iter(named.values()))
    text = read("text_config") or config
    rows = text.get("vocab_size") if isinstance(text, dict) else getattr(text, "vocab_size", None)
    if rows is not None and not 0 <= token_id < rows:
        raise ValueError(f"image token ID {token_id} is outside the embedding of {rows} rows (config.json)")
    return token_id


def single_token_id(tokenizer, token: str) -> int:
    """The ID of a token that must be one piece. Raises ValueError naming the pieces where it is several."""
    pieces = tokenizer.encode(token, add_special_tokens=False)
    named = tokenizer.convert_ids_to_tokens(pieces)
    if named != [token]:
        raise ValueError(f"{token!r} is not one token of this tokenizer but {len(pieces)}: {named}")
    return pieces[0]


def register_placeholder(tokenizer, token: str, token_id: int) -> None:
    """Make `token` one piece with the ID that the model's configuration names.

    A placeholder such as <image> is often missing from the tokenizer: its ID is the first one past the end.
    As an added token the text is split there before any merge. Raises ValueError where the ID already
    belongs to something else: then the configuration's ID was computed, not read.
    """
    known = tokenizer.get_vocab().get(token)
    if known is None and token_id >= len(tokenizer):
        for filler in range(len(tokenizer), token_id):
            tokenizer.add_tokens([AddedToken(f"<|unused_{filler}|>", special=True, normalized=False)])
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)])
        known = token_id
    if known != token_id:
        taken = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
        where = f"the tokenizer has it as {known}" if known is not None else f"that ID is the word piece {taken!r}"
        raise ValueError(f"config.json gives {token} the ID {token_id}, but {where}")
    single_token_id(tokenizer, token)


def separate_pad_from_eos(tokenizer, model=None) -> str:
    """Give PAD an ID of its own where it is missing or equals EOS; returns a line saying what was found and done.

    With PAD = EOS, whoever masks PAD in the labels masks EOS too, and generation never stops. Embeddings only
    grow: `resize_token_embeddings(len(tokenizer))` would shrink a padded one (151,936 rows, 151,657
    tokens). Raises ValueError where the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: answers would never end (tokenizer_config.json: eos_token)")
    found = f"PAD {tokenizer.pad_token!r} ({tokenizer.pad_token_id}), EOS {tokenizer.eos_token!r} "
    found += f"({tokenizer.eos_token_id})"
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        done = "distinct"
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        done = f"PAD is now '<|pad|>' ({tokenizer.pad_token_id})"
    if model is not None:
        if tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(tokenizer.pad_token_id + 1)
            done += f", embedding grown to {tokenizer.pad_token_id + 1} rows"
        for config in (model.config, model.config.get_text_config(), model.generation_config):
            config.pad_token_id = tokenizer.pad_token_id
    return f"{found}: {done}"


# ------------------------------------------------------------------------------------------------------------
# 2  Masking: labels are built while encoding, not searched for afterwards
# ------------------------------------------------------------------------------------------------------------


def encode_supervised(tokenizer, text: str, sentinels=SENTINELS, keep_sentinels=False, spans=1):
    """Encode a rendered conversation in which each answer stands between two sentinels and is followed by EOS.

    The tokenizer splits the text at the sentinels before any merge, because a byte-level BPE would merge
    `<ANS>Pink` to `<`, `ANS`, `>P`, `ink` and a search for the sentinel's pieces finds nothing. Learned are the
    answer and the EOS directly after it; every other label is IGNORE. The sentinels themselves are dropped, or
    with keep_sentinels become their ordinary pieces, not learned.

    Returns (input_ids, labels), two lists of equal length. `spans` is the number of answers meant, None any
    number from one. Raises ValueError where sentinels are missing, too many or out of order, where an answer
    is empty or not followed by EOS.
    """
    splitter, opening, closing = _splitter(tokenizer, tuple(sentinels), len(tokenizer))
    pieces = [tokenizer.encode(s, add_special_tokens=False) if keep_sentinels else [] for s in sentinels]
    input_ids, labels, answers, inside, ended = [], [], 0, False, False

    def add(tokens, learned):
        input_ids.extend(tokens)
        labels.extend(tokens if learned else [IGNORE] * len(tokens))

    for token in splitter.encode(text, add_special_tokens=False):
        if ended and token != tokenizer.eos_token_id:
            raise ValueError(f"no EOS ({tokenizer.eos_token!r}) directly after the answer in {text!r}")
        if token == opening:
            if inside:
                raise ValueError(f"{sentinels[0]} twice without {sentinels[1]} between in {text!r}")
            add(pieces[0], learned=False)
            inside, start = True, len(input_ids)
        elif token == closing:
            if not inside:
                raise ValueError(f"{sentinels[1]} without {sentinels[0]} before it in {text!r}")
            if len(input_ids) == start:
                raise ValueError(f"empty answer in {text!r}")
            add(pieces[1], learned=False)
            inside, ended, answers = False, True, answers + 1
        else:
            add([token], learned=inside or ended)
            ended = False
    if inside or ended:
        raise ValueError(f"{sentinels[1]} or the EOS after it is missing in {text!r}")
    if answers == 0 or spans not in (None, answers):
        raise ValueError(
            f"{answers} answers between {sentinels[0]} and {sentinels[1]}, not {spans or '1 or more'}, in {text!r}"
        )
    whole = None if keep_sentinels else _encode_whole(tokenizer, text, sentinels)
    return whole or (input_ids, labels)


def _encode_whole(tokenizer, text, sentinels):
    """(input_ids, labels) of the text as if no sentinel stood in it, or None where a merge crosses an answer's edge.

    Some SentencePiece tokenizers put a dummy space after every split, which the text itself does not have.
    """
    parts = re.split("|".join(map(re.escape, sentinels)), text)  # prompt, answer, between, answer, …
    encoded = [tokenizer.encode("".join(parts[:i]), add_special_tokens=False) for i in range(1, len(parts) + 1)]
    input_ids = encoded.pop()
    if any(input_ids[: len(before)] != before for before in encoded):
        return None
    labels = [IGNORE] * len(input_ids)
    for start, end in zip(map(len, encoded[::2]), map(len, encoded[1::2]), strict=True):
        labels[start : end + 1] = input_ids[start : end + 1]  # with the EOS
    return input_ids, labels


@functools.lru_cache(maxsize=8)
def _splitter(tokenizer, sentinels, _size):
    """A copy of the tokenizer that knows the sentinels as tokens of their own; no model ever sees their IDs."""
    splitter = copy.deepcopy(tokenizer)
    splitter.add_tokens([AddedToken(s, special=True, normalized=False) for s in sentinels])
    return splitter, *(single_token_id(splitter, s) for s in sentinels)


def mask_tokens(labels: torch.Tensor, token_ids) -> torch.Tensor:
    """A copy of `labels` in which every one of token_ids (placeholders, PAD) is IGNORE."""
    unwanted = torch.isin(labels, torch.as_tensor(list(token_ids), dtype=labels.dtype, device=labels.device))
    return labels.masked_fill(unwanted, IGNORE)


def expand_placeholder(input_ids: list[int], token_id: int, counts: list[int]) -> list[int]:
    """Repeat the i-th placeholder counts[i] times: one stands for all the features of its image."""
    if input_ids.count(token_id) != len(counts):
        raise ValueError(f"{input_ids.count(token_id)} placeholders of ID {token_id} for {len(counts)} media")
    left = iter(counts)
    return [token for t in input_ids for token in ([t] * next(left) if t == token_id else [t])]


def check_placeholders(input_ids, token_id: int, features: int, what: str = "image") -> None:
    """Raise ValueError unless exactly `features` of input_ids (list or tensor) are the placeholder."""
    tokens = int((torch.as_tensor(input_ids) == token_id).sum())
    if tokens != features:
        raise ValueError(
            f"{what.capitalize()} features and {what} tokens do not match, tokens: {tokens}, features: {features} "
            f"(placeholder ID {token_id}; it is read from config.json and must not be computed or truncated away)"
        )


# ------------------------------------------------------------------------------------------------------------
# 3  Packing: prompt trees and the one visibility rule
# ------------------------------------------------------------------------------------------------------------
#
# A tree is a prefix (system text and image) and its branches (a question and its answer each). Trees are packed
# one behind the other into a row, without padding. Token q sees token k if and only if
#
#     same document   and   k is not after q   and   k's branch is 0 (a prefix) or q's branch
#
#     document  1 1 1 1 1 1 1 2 2 2                  k: a a a b b c c A A B
#     branch    0 0 0 1 1 2 2 0 0 1       q: prefix  a  x . . . . . . . . .
#                                                    a  x x . . . . . . . .
#     a = prefix of tree 1: read once,               a  x x x . . . . . . .
#         seen by all its questions        question  b  x x x x . . . . . .
#     b, c = its questions: c sees a,                b  x x x x x . . . . .
#         but never b                      question  c  x x x . . x . . . .    <- as if b were not there
#     A, B = tree 2: sees nothing of 1               c  x x x . . x x . . .
#                                          tree 2    A  . . . . . . . x . .
# Positions of every branch go on from the          A  . . . . . . . x x .
# end of its prefix, so each question stands        B  . . . . . . . x x x
# exactly where it would in a row of its own.


@dataclass
class Prompt:
    """A prompt tree. `branches` are (input_ids, labels) pairs; `ids` names their rows; `media` is the script's own.

    `prefix_positions`, of shape (P,) or (3, P) for M-RoPE, defaults to 0 … P-1.
    """

    prefix: list[int]
    branches: list[tuple[list[int], list[int]]]
    ids: list[str]
    media: object = None
    prefix_positions: torch.Tensor | None = None

    def part(self, indices) -> "Prompt":
        """The same prefix with only the branches at `indices`."""
        indices = list(indices)
        branches, ids = [self.branches[i] for i in indices], [self.ids[i] for i in indices]
        return Prompt(self.prefix, branches, ids, self.media, self.prefix_positions)

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(ids) for ids, _ in self.branches)

    def learned(self) -> int:
        """How many of its tokens are learned."""
        return sum(label != IGNORE for _, labels in self.branches for label in labels)


def pack(prompts: list[Prompt], max_tokens: int, ranks: int = 1) -> list[dict]:
    """Pack prompt trees into rows of at most max_tokens tokens, about as few as it takes, and of nearly equal length.

    Each row is a dictionary of input_ids, labels, document, branch, all (1, T) int64, position_ids (1, T) or
    (3, 1, T), `ends` (questions,), the index of each branch's last token, and `prompts`, the trees in row order.
    The number of rows is a multiple of `ranks`; rank r takes rows[r::ranks]. Where there are fewer trees than
    ranks, rows are added from which nothing is learned: every rank must make as many passes as the others.
    A tree longer than max_tokens is divided, its prefix repeated. Raises ValueError where one branch alone does
    not fit, and where a branch's first token is learned: the token before it in the row is another branch's.
    """
    pieces = [piece for prompt in prompts for piece in _divide(prompt, max_tokens)]
    pieces.sort(key=len, reverse=True)
    count = ranks * math.ceil(sum(map(len, pieces)) / (ranks * max_tokens))
    while (rows := _spread(pieces, count, max_tokens)) is None:
        count += ranks
    return [_row(row or [_nothing_learned(pieces[-1])]) for row in rows]


def _spread(pieces: list[Prompt], count: int, max_tokens: int) -> list[list[Prompt]] | None:
    """The longest first, each into the emptiest of `count` rows; None where one does not fit."""
    rows, lengths = [[] for _ in range(count)], [0] * count
    for piece in pieces:
        emptiest = lengths.index(min(lengths))
        rows[emptiest].append(piece)
        lengths[emptiest] += len(piece)
    return rows if max(lengths, default=0) <= max_tokens else None


def _nothing_learned(prompt: Prompt) -> Prompt:
    branches = [(input_ids, [IGNORE] * len(labels)) for input_ids, labels in prompt.branches]
    return replace(prompt, branches=branches)


def _divide(prompt: Prompt, max_tokens: int) -> list[Prompt]:
    parts, size = [[]], len(prompt.prefix)
    for i, (input_ids, labels) in enumerate(prompt.branches):
        if len(prompt.prefix) + len(input_ids) > max_tokens:
            needed = len(prompt.prefix) + len(input_ids)
            raise ValueError(f"row {prompt.ids[i]} needs {needed} tokens, more than --pack-tokens {max_tokens}")
        if not labels or labels[0] != IGNORE:
            raise ValueError(f"row {prompt.ids[i]}: the branch's first token is learned; begin it with prompt text")
        if size + len(input_ids) > max_tokens:
            parts.append([])
            size = len(prompt.prefix)
        parts[-1].append(i)
        size += len(input_ids)
    return [prompt] if len(parts) == 1 else [prompt.part(indices) for indices in parts]


def _row(prompts: list[Prompt]) -> dict:
    input_ids, labels, document, branch, positions, ends = [], [], [], [], [], []
    for number, prompt in enumerate(prompts, start=1):
        prefix_positions = prompt.prefix_positions
        if prefix_positions is None:
            prefix_positions = torch.arange(len(prompt.prefix))
        parts = [(prompt.prefix, [IGNORE] * len(prompt.prefix)), *prompt.branches]
        after = int(prefix_positions.max()) + 1 if len(prompt.prefix) else 0
        for b, (part_ids, part_labels) in enumerate(parts):
            input_ids += part_ids
            labels += part_labels
            document += [number] * len(part_ids)
            branch += [b] * len(part_ids)
            # M-RoPE: text advances all three coordinates together
            ongoing = (after + torch.arange(len(part_ids))).expand(*prefix_positions.shape[:-1], -1)
            positions.append(prefix_positions if b == 0 else ongoing)
            if b > 0:
                ends.append(len(input_ids) - 1)
    position_ids = torch.cat(positions, dim=-1)  # (T,) or (3, T)
    lists = {"input_ids": input_ids, "labels": labels, "document": document, "branch": branch}
    return {
        **{name: torch.tensor([values]) for name, values in lists.items()},  # each (1, T)
        "position_ids": position_ids.unsqueeze(-2),  # (1, T) or (3, 1, T)
        "ends": torch.tensor(ends),
        "prompts": prompts,
    }


def plan_steps(prompts: list[Prompt], questions_per_step: int, seed: int, epoch: int) -> list[list[Prompt]]:
    """The optimizer steps of one epoch: trees in a new order, each step as many as fit into questions_per_step.

    A tree with more questions than that is divided first. A pure function of (seed, epoch) and the data, so that
    a resumed run takes the same rows in the same order.
    """
    n = questions_per_step
    trees = [t.part(range(i, min(i + n, len(t.ids)))) for t in prompts for i in range(0, len(t.ids), n)]
    random.Random(f"{seed} {epoch}").shuffle(trees)
    steps, free = [], 0
    for tree in trees:
        if len(tree.ids) > free:
            steps.append([])
            free = n
        steps[-1].append(tree)
        free -= len(tree.ids)
    return steps


def visible(document: torch.Tensor, branch: torch.Tensor, last: int | None = None) -> torch.Tensor:
    """The attention mask (1, 1, queries, T), True where the query may look; document and branch are (1, T).

    With `last`, only the rows of the last so many tokens: what a decoding step needs.
    """
    T = document.shape[1]
    n = T if last is None else last
    index = torch.arange(T, device=document.device)
    same_document = document[:, -n:, None] == document[:, None, :]
    not_after = index[None, -n:, None] >= index[None, None, :]
    own_or_prefix = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, -n:, None])
    return (same_document & not_after & own_or_prefix).unsqueeze(1)


def supervised_loss(hidden: torch.Tensor, lm_head: nn.Module, labels: torch.Tensor):
    """Cross-entropy summed over the learned tokens, and their number, both tensors.

    hidden is (1, T, width), labels (1, T) unshifted: token t+1 is predicted from t. Logits are computed only where
    a label is learned (1-2 % of the tokens). The sum, not the mean: dividing by the tokens of the whole optimizer
    step makes accumulation 1 x 8 equal 8 x 1, and a row without learned tokens 0 instead of NaN.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORE
    logits = lm_head(hidden[:, :-1][learned]).float()  # (tokens, vocabulary)
    return F.cross_entropy(logits, targets[learned], reduction="sum"), learned.sum()


# ------------------------------------------------------------------------------------------------------------
# 4  LoRA, in peft's file format
# ------------------------------------------------------------------------------------------------------------

PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Module):
    """y = W x + scaling * B A x around an existing, frozen nn.Linear.

    A is (r, in), B is (out, r) and starts at zero, so that training starts from the model as it was. Both are
    float32 whatever the base is: a bfloat16 weight of 1 loses every update below 0.004.
    scaling = alpha / r, or alpha / sqrt(r) with rslora.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.r, self.alpha, self.rslora, self.merged = r, alpha, rslora, False
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.dropout = nn.Dropout(dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, in) -> (…, out)
        y = self.base_layer(x)
        if self.merged:
            return y
        # cast the small matrices, not x: the float32 masters still receive every gradient
        update = F.linear(F.linear(self.dropout(x), self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return y + self.scaling * update.to(y.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Add B A to the base weight, once however often it is called; returns the plain layer."""
        if not self.merged:
            weight = self.base_layer.weight
            weight.copy_(weight.float() + self.scaling * (self.lora_B @ self.lora_A))
            self.merged = True
        return self.base_layer


def train_only(model: nn.Module, *patterns: str) -> list[str]:
    """Freeze everything but the parameters whose full name matches a pattern; returns their names.

    Raises ValueError for a pattern that matches nothing: after a library renames its modules a stale pattern
    would silently freeze or train the wrong part.
    """
    matched = {p: [n for n, _ in model.named_parameters() if re.fullmatch(p, n)] for p in patterns}
    for pattern, names in matched.items():
        if not names:
            raise ValueError(f"no parameter matches {pattern!r}; there are {_examples(model.named_parameters())}")
    chosen = {name for names in matched.values() for name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return sorted(chosen)


def add_lora(model: nn.Module, pattern: str, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
    """Wrap every nn.Linear whose full name matches the regular expression; returns the names.

    Raises ValueError where the pattern matches no linear layer, or one that already has an adapter.
    """
    if any(re.fullmatch(pattern, n) for n, m in model.named_modules() if isinstance(m, LoRALinear)):
        raise ValueError(f"layers that match {pattern!r} already have an adapter")
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = [n for n, _ in linear if re.fullmatch(pattern, n)]
    if not names:
        raise ValueError(f"LoRA pattern {pattern!r} matches no linear layer; there are {_examples(linear)}")
    for name in names:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, LoRALinear(base, r, alpha, dropout, rslora))
    return names


def _examples(named) -> str:
    names = sorted({re.sub(r"\d+", "0", name) for name, _ in named})
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge every adapter and put the plain layers back: the model then saves and loads like any other."""
    for name, layer in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.merge())
    return model


def save_adapter(model: nn.Module, folder) -> None:
    """Write adapter_model.safetensors and adapter_config.json as peft does, trained plain modules included.

    A projector that is trained but not saved is lost without a word; here whatever requires a gradient is saved.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers to save")
    tensors = {}
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged: save the adapter before merging")
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    plain = _trained_plain_modules(model)
    for name in plain:
        for key, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"{PEFT_PREFIX}{name}.{key}"] = tensor
    first = next(iter(layers.values()))
    if any((m.r, m.alpha, m.rslora) != (first.r, first.alpha, first.rslora) for m in layers.values()):
        raise ValueError("layers with different r or alpha cannot be saved: adapter_config.json names one of each")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(model, "name_or_path", ""),
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(layers),
        "modules_to_save": plain or None,
        "task_type": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _trained_plain_modules(model: nn.Module) -> list[str]:
    lora = {f"{name}.{part}" for name in lora_layers(model) for part in ("lora_A", "lora_B")}
    trained = [n for n, p in model.named_parameters() if p.requires_grad and n not in lora]
    return sorted({name.rpartition(".")[0] for name in trained})


def load_adapter(model: nn.Module, folder) -> list[str]:
    """Load an adapter written by save_adapter or by peft; adds the LoRA layers where the model has none.

    Returns the names of the LoRA layers. Every key of the file must have its place and every adapter and trained
    module of the model its key; anything else raises ValueError, as do peft features not supported here.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    unsupported = [
        *("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "fan_in_fan_out"),
        *("use_qalora", "alora_invocation_tokens", "target_parameters", "trainable_token_indices"),
    ]
    used = [key for key in unsupported if config.get(key)]
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal"):
        used.append("init_lora_weights")  # others, such as PiSSA, change the base weights too
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or used:
        raise ValueError(f"{folder}: only plain LoRA adapters can be loaded ({used or config.get('peft_type')})")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    names = sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    if not lora_layers(model):
        r, alpha = config["r"], config["lora_alpha"]
        pattern = "|".join(re.escape(name) for name in names)
        add_lora(model, pattern, r, alpha, config.get("lora_dropout", 0.0), config.get("use_rslora", False))
    places = {}
    for name, layer in lora_layers(model).items():
        places[f"{name}.lora_A.weight"], places[f"{name}.lora_B.weight"] = layer.lora_A, layer.lora_B
        layer.alpha, layer.rslora = config["lora_alpha"], config.get("use_rslora", False)
        layer.scaling = layer.alpha / (math.sqrt(layer.r) if layer.rslora else layer.r)
    plain = set(_trained_plain_modules(model)) | {key.rpartition(".")[0] for key in tensors.keys() - places.keys()}
    state = model.state_dict()
    places |= {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] in plain}
    if places.keys() != tensors.keys():
        raise ValueError(
            f"{folder}: adapter and model do not fit: {len(tensors.keys() - places.keys())} keys without a place "
            f"({_first(tensors.keys() - places.keys())}), {len(places.keys() - tensors.keys())} not in the file "
            f"({_first(places.keys() - tensors.keys())})"
        )
    for key, tensor in tensors.items():
        if places[key].shape != tensor.shape:
            raise ValueError(f"{folder}: {key} has shape {tuple(tensor.shape)}, the model {tuple(places[key].shape)}")
    with torch.no_grad():
        for key, tensor in tensors.items():
            places[key].copy_(tensor)
    return names


def _first(keys) -> str:
    return min(keys, default="none")


def save_trained(model: nn.Module, folder, trained: dict[str, torch.Tensor]) -> None:
    """Everything that is trained: an adapter, or with full tuning `trained`, by parameter name, on the CPU."""
    if lora_layers(model):
        save_adapter(model, folder)
    else:
        save_file(trained, Path(folder) / "model.safetensors")


def load_trained(model: nn.Module, folder) -> None:
    """Load what save_trained wrote. Raises ValueError where the names or shapes are not the model's."""
    if lora_layers(model):
        load_adapter(model, folder)
        return
    tensors = load_file(Path(folder) / "model.safetensors")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wrong = [
        n
        for n in tensors.keys() | trained.keys()
        if n not in tensors or n not in trained or tensors[n].shape != trained[n].shape
    ]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} parameters do not fit the model, such as {min(wrong)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            trained[name].copy_(tensor)


# ------------------------------------------------------------------------------------------------------------
# 5  Answering by the same rule
# ------------------------------------------------------------------------------------------------------------


def answering_prompt(prompt: Prompt) -> Prompt:
    """The tree with each branch cut before its first learned token: what the model is given to answer."""
    branches = []
    for input_ids, labels in prompt.branches:
        start = next(i for i, label in enumerate(labels) if label != IGNORE)
        branches.append((input_ids[:start], labels[:start]))
    return Prompt(prompt.prefix, branches, prompt.ids, prompt.media, prompt.prefix_positions)


def build_trie(answers: list[list[int]]) -> dict:
    """Nested dictionaries over allowed answers, each a token list that ends with EOS: {token: {token: …}}."""
    root: dict = {}
    for tokens in answers:
        node = root
        for token in tokens:
            node = node.setdefault(token, {})
    return root


@torch.no_grad()
def decode(read, lm_head, row: dict, eos: int, limits: list[int], tries: list[dict | None] | None = None):
    """Answer every branch of a packed row greedily, all branches side by side.

    The row (see `answering_prompt` and `pack`) is read once into a key/value cache; then each step feeds one token
    per unfinished branch, whose mask row sees its own prefix and branch.

    read(input_ids, position_ids, mask, cache) -> hidden (1, n, width) runs the model; limits[i] is the most tokens
    of branch i; tries[i], from build_trie, its allowed answers or None: then the answer is exactly one of them.
    Returns a token list per branch, EOS included where it was reached.
    """
    cache = DynamicCache()  # without a configuration: a sliding window would drop the prefix
    document, branch, ends = row["document"], row["branch"], row["ends"]
    hidden = read(row["input_ids"], row["position_ids"], visible(document, branch), cache)[:, ends]  # (1, B, width)
    answers = [[] for _ in ends]
    nodes = list(tries) if tries else [None] * len(answers)
    alive = list(range(len(answers)))  # branches still being answered
    step = 0
    while alive:
        logits = lm_head(hidden)[0].float()  # (alive, vocabulary)
        for i, b in enumerate(alive):
            if nodes[b] is not None:
                allowed = torch.tensor(sorted(nodes[b]), device=logits.device)
                logits[i] = torch.full_like(logits[i], -math.inf).index_copy(0, allowed, logits[i, allowed])
        tokens = logits.argmax(-1).tolist()
        for b, token in zip(alive, tokens, strict=True):
            answers[b].append(token)
            nodes[b] = nodes[b][token] if nodes[b] is not None else None
        step += 1
        # a trie's answer may be longer than the limit: cutting it would make it none of the allowed
        alive = [b for b in alive if answers[b][-1] != eos and (nodes[b] is not None or len(answers[b]) < limits[b])]
        if alive:
            own = ends[alive]
            document = torch.cat([document, document[:, own]], dim=1)
            branch = torch.cat([branch, branch[:, own]], dim=1)
            fed = torch.tensor([[answers[b][-1] for b in alive]], device=document.device)  # (1, alive)
            mask = visible(document, branch, last=len(alive))
            hidden = read(fed, row["position_ids"][..., own] + step, mask, cache)
    return answers


@torch.no_grad()
def branch_log_probs(hidden: torch.Tensor, lm_head: nn.Module, row: dict) -> torch.Tensor:
    """The log-probability of each branch's learned tokens, in the order of row["ends"].

    With every candidate answer packed as a branch of its own, the largest is the exact argmax over the candidates
    (a greedy walk through a trie is not), and their softmax the probabilities.
    """
    targets = row["labels"][:, 1:]
    learned = targets != IGNORE
    logits = lm_head(hidden[:, :-1][learned]).float()
    log_probs = -F.cross_entropy(logits, targets[learned], reduction="none")  # (tokens,)
    # number the branches of the row 0, 1, … by where each ends
    positions = learned[0].nonzero().squeeze(-1) + 1
    owner = torch.searchsorted(row["ends"], positions)
    return torch.zeros(len(row["ends"]), device=hidden.device).index_add(0, owner, log_probs)


# ------------------------------------------------------------------------------------------------------------
# 6  Scoring
# ------------------------------------------------------------------------------------------------------------
# Answers are compared whole, never searched for: "no" stands inside "normal", "male" inside "female".

ARTICLE = r"(?:an?|the)"
WH_WORD = r"\b(?:what|which|who|whose|where|why|how)\b"
AUXILIARY = (
    r"(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|may|might|must)"
    r"(?:n?['’]t)?\b"
)
# "Is …?" or "When motion occurs, is …?"; group 1 starts at the auxiliary. No wh-word may stand before it:
# "In which quadrant, if present, is the polyp?" is no yes/no question.
YES_NO = rf"^(?:(?:(?!{WH_WORD}).)*,\s*)??({AUXILIARY}.*)"
OPTION_LABEL = r"(?<!\w)\(?([A-Ha-h])(?:\)|\.(?=\s))"  # "(a)", "a)", "A. "

TYPE_PATTERNS = [  # the first that matches decides
    ("color", r"\b(?:what|which)(?: \w+){0,3} colou?rs?\b"),
    ("size_numeric", r"\bwhat(?: \w+){0,3} size\b|\bwhich size\b|\bhow (?:big|large|small|wide)\b"),
    ("count_numeric", r"\bhow many\b"),
    ("yes_no", rf"{YES_NO}|\byes (?:or|/) no\b"),  # before the next: "Is the number of polyps above 2?"
    ("size_numeric", r"\bdiameter\b|\bmillimet(?:er|re)s?\b"),
    ("count_numeric", r"\bnumber of\b"),
]


def _sentence_asked(question):
    """The last sentence that ends in "?", else all: "What color is it? If more than one separate with ;"."""
    sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z])", " ".join(question.split()))
    asked = [sentence for sentence in sentences if sentence.endswith("?")]
    sentence = asked[-1] if asked else " ".join(sentences)
    return re.sub(rf"^[^:]*:\s*(?={AUXILIARY}|{WH_WORD})", "", sentence, flags=re.I)  # "Question: Is …?"


def _labelled_options(question):
    """["x", "y"] of "… (a) x (b) y", or None. Labels must run a, b, c…: the "E." of "E. coli" is none."""
    labels = list(re.finditer(OPTION_LABEL, question))
    letters = "".join(label[1].lower() for label in labels)
    if len(labels) < 2 or not "abcdefgh".startswith(letters):
        return None
    ends = [label.start() for label in labels[1:]] + [len(question)]
    texts = [question[label.end() : end].strip() for label, end in zip(labels, ends, strict=True)]
    texts[-1] = texts[-1].split("\n")[0]  # an instruction on the next line is no part of the option
    options = [re.sub(r"[\s;,.?]*(?:\bor)?\s*$", "", text) for text in texts]
    return options if all(options) else None


def _asks_which(sentence):
    """Does it close with a choice, "… pink, red, or white?"; "Is there a polyp or an ulcer?" asks whether."""
    whether = r"\b(?:there|any|yes or no|or (?:not|no|more|less|larger|smaller))\b"
    if not re.search(r"\bor\b[^,]*\?$", sentence, re.I) or re.search(whether, sentence, re.I):
        return False
    opening = re.match(YES_NO, sentence, re.I)
    clause = opening[1] if opening else sentence
    # "Does it show a polyp or an ulcer?" asks whether, so other verbs than "be" need a colon or a comma.
    return bool(re.match(r"(?:is|are|was|were)\b", clause, re.I) or re.search(r"[:,].*\bor\b", clause, re.I))


def _listed_options(sentence):
    """The options of a sentence that asks which, or None where prose does not tell where they start and end.

    Free text costs less than a wrong candidate. So without a colon every option must be a single word.
    """
    if not _asks_which(sentence):
        return None
    opening = re.match(YES_NO, sentence, re.I)
    clause = sentence.rpartition(":")[2] if ":" in sentence else opening[1] if opening else sentence
    parts = re.split(r"\s*,\s*(?:or\s+)?|\s+or\s+", clause.strip("? "))
    parts[-1] = re.sub(r"\s(?:in|on|at|to|of|within|during|over|here)\b.*", "", parts[-1])
    has_article = [bool(re.search(rf"\b{ARTICLE}\s\S+$", part, re.I)) for part in parts]
    if ":" not in sentence and opening:
        parts[0] = parts[0].split()[-1]  # "Is the polyp pink" → "pink"
        if has_article[-1] and not has_article[0]:
            return None  # "Is it a flat polyp or an ulcer?": the first option is more than its last word
    elif ":" not in sentence and re.match(WH_WORD, sentence, re.I):
        parts = parts[1:]  # "What is it, a polyp or an ulcer?"
    options = [re.sub(rf"^{ARTICLE}\s", "", part, flags=re.I) for part in parts]
    allowed = r".+" if ":" in sentence else r"[\w-]+"
    certain = len(options) > 1 and all(re.fullmatch(allowed, option) for option in options)
    return options if certain else None


def question_type(question: str) -> str:
    """yes_no, color, size_numeric, count_numeric, mcq or open_ended, told from the text of `question` alone.

    Raises ValueError for an empty question.
    """
    if not question or not question.strip():
        raise ValueError("empty question: its type cannot be told")
    if re.search(r"\b(?:check|select|choose|mark) all\b", question, re.I):
        return "open_ended"  # Kvasir's "Are there any …? Check all that are present." is answered by a list
    sentence = _sentence_asked(question)
    if _labelled_options(question) or _asks_which(sentence):
        return "mcq"
    return next((kind for kind, text in TYPE_PATTERNS if re.search(text, sentence, re.I)), "open_ended")


def answer_candidates(question: str, type: str) -> list[str] | None:
    """All allowed answers to a `question` of this `type`: ["yes", "no"], an mcq's options in order, or None.

    An mcq has None, too, where its options cannot be told with certainty. Raises nothing.
    """
    if type == "yes_no":
        return ["yes", "no"]
    if type == "mcq":
        return _labelled_options(question) or _listed_options(_sentence_asked(question))
    return None


def question_fields(entry: dict) -> dict:
    """question, answer, question_type and candidates of a data row, the last two inferred where it does not say.

    Raises ValueError where question or answer is empty, or a type or candidates are given that are none. An answer
    that is none of the candidates is no fault, see `answerable`: left out, such rows would raise the accuracy.
    """
    question, answer = entry.get("question"), entry.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    if answer is None or says_nothing(answer):
        raise ValueError(f"the answer is empty ({answer!r}); leave the row out (--skip-bad)")
    kind, candidates = entry.get("question_type"), entry.get("answer_candidates")
    if kind is None:
        kind = question_type(question)
    if not isinstance(kind, str) or not kind.strip():
        raise ValueError(f"question_type must be a text: {kind!r}")
    usual = re.sub(r"\W+", "_", kind.strip().lower())  # "Yes/No" would be a type of its own, without candidates
    if kind != usual and usual in {"open_ended", "mcq", *(name for name, _ in TYPE_PATTERNS)}:
        raise ValueError(f"question_type {kind!r}: spell it {usual!r}")
    if candidates is not None and (
        not isinstance(candidates, list) or not all(isinstance(c, str) and c.strip() for c in candidates)
    ):
        raise ValueError(f"answer_candidates must be a list of texts, none empty: {candidates!r}")
    return {
        "question": question.strip(),
        "answer": str(answer).strip(),
        "question_type": kind,
        "candidates": candidates or answer_candidates(question, kind),
    }


def says_nothing(answer) -> bool:
    """Is it "nan", or without letters and digits? Such an answer can be neither learned nor scored."""
    members = _members(answer)
    return members == {"nan"} or not re.search(r"\w", "".join(members))


def answerable(row: dict) -> bool:
    """Can an answer that is restricted to the row's candidates be right? Of a row with `question_fields`.

    `also_right`, if it has that, are other forms of its answer.
    """
    candidates, right = row["candidates"] or [], [row["answer"], *row.get("also_right", [])]
    found = (score_answer(candidate, form, row["question_type"])["exact"] for candidate in candidates for form in right)
    return not candidates or row["answer"] in candidates or any(found)


NUMBER_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
SAME_SIGN = str.maketrans({**dict.fromkeys("‐‑‒–—―−", "-"), "'": None, "’": None, "≥": ">=", "≤": "<="})


def _is_kept(char, following):
    """Does `char` carry meaning in an answer? Letters, digits and spaces do, most punctuation does not."""
    if char == "%" or (char in "-./" and following.isdigit()):  # 5-10, 2.5, 1/2
        return True
    category = unicodedata.category(char)
    return category == "Sm" or category[0] not in "PSC"  # Sm, mathematical: "<5", "≠ 5" and "~5" are not "5"


def normalise(text) -> str:
    """`text` (None is "") in the form in which answers are compared. "The Z-Line." → "z line".

    Lower case, NFKC, no punctuation, no articles, number words as digits, spaces folded. Numbers keep what
    tells them apart: "5-10mm", ">20mm", "2.5". "11 – 20 mm" is "11-20mm": its spaces say nothing.
    """
    return _normalise("" if text is None else str(text))


@functools.lru_cache(2**16)  # the same few answers are compared again and again
def _normalise(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower().translate(SAME_SIGN)
    text = re.sub(rf"(?<!\S){ARTICLE}\s+(?=\S)", "", text)  # not "(a)" or a final "A": these are answers
    text = re.sub(rf"\b(?:{'|'.join(NUMBER_WORDS)})\b", lambda word: str(NUMBER_WORDS.index(word[0])), text)
    text = re.sub(r"(?<=[\dm])\s*-\s*(?=\d)", "-", text)
    text = "".join(char if _is_kept(char, text[i + 1 : i + 2]) else " " for i, char in enumerate(text))
    return re.sub(r"(?<=[<>=]) (?=\d)|(?<=\d) (?=[mc]m\b)", "", " ".join(text.split()))


def _members(text):
    """The answers that ";" separates, as a set: "Red; pink;red" → {"red", "pink"}."""
    return {normalise(part) for part in str("" if text is None else text).split(";")} - {""}


def _size_mm(text):
    """(low, high, ends excluded?) in mm of a normalised size, or None: "<5mm" → (0, 5, True)."""
    value = r"(\d*\.?\d+)\s*(mm|cm|millimet\w+|centimet\w+)?"
    size = re.fullmatch(rf"([<>]=?)?{value}(?:\s*(?:-|to)\s*{value})?", text)
    if not size:
        return None
    sign, low, low_unit, high, high_unit = size.groups()
    scale = {"m": 1, "c": 10}
    low_mm = round(float(low) * scale[(low_unit or high_unit or "mm")[0]], 6)  # "1-2 cm": both are cm
    if high:
        high_mm = round(float(high) * scale[(high_unit or low_unit or "mm")[0]], 6)
        return (low_mm, high_mm, False) if low_mm < high_mm and not sign else None
    ends = {"<": (0.0, low_mm), ">": (low_mm, float("inf"))}
    return *ends.get((sign or "=")[0], (low_mm, low_mm)), sign in ("<", ">")


def _same_size(predicted, true):
    """The tolerant rule of `score_answer`; a range is never right for a single value."""
    (low, high, _), (true_low, true_high, excluded) = predicted, true
    if low == high and true_low == true_high:
        return round(abs(low - true_low), 6) <= max(1.0, 0.1 * true_low)
    if low == high:
        return true_low < low < true_high if excluded else true_low <= low <= true_high
    ends = [(low, true_low), (high, true_high)]  # a == b first, because inf - inf is NaN
    return true_low < true_high and all(a == b or round(abs(a - b), 6) <= 1.0 for a, b in ends)


def _single_count(text):
    """The "2" of "2" and "there are 2 polyps"; None for "2-3", "<2", "2mm", "not 2", "2 or 3"."""
    words = normalise(text).split()
    numbers = {word for word in words if re.search(r"\d", word)}
    hedged = {"not", "no", "or", "than", "least", "most", "over", "under"}.intersection(words)
    if len(numbers) != 1 or hedged:
        return None
    number = numbers.pop()
    return number if number.isdecimal() else None


def score_answer(prediction, answer, type: str) -> dict[str, bool]:
    """{"exact", "tolerant"} for a `prediction` (None is wrong), the true `answer` and the question's `type`.

    exact, the strict figure: equal as a whole after `normalise`. ";" separates a set: order, spaces and
    duplicates do not matter, every member is needed, none may be extra. For an mcq "text" is enough where the
    answer is "(a) text"; a label that the answer does not have is wrong.

    tolerant: exact, or
      size_numeric   a value inside the true range; two ranges within 1 mm at each end; two values within 1 mm
                     or 10 % of the true one. A missing unit means mm. Sets: one match for each member.
      count_numeric  the only number in it is the true one ("2 polyps" for "2"); off by one is wrong.
    For every other type, also a data set's own, tolerant = exact.

    Raises ValueError for an answer that is None, "nan" or without letters and digits: never score such a row.
    """
    true, predicted = _members(answer), _members(prediction)
    if says_nothing(answer):
        raise ValueError(f"the true answer is empty ({answer!r}): correct this row or leave it out by name")
    exact = tolerant = predicted == true
    if type == "mcq" and predicted and not exact:
        exact = tolerant = predicted == _members(re.sub(rf"^\s*{OPTION_LABEL}\s*", "", str(answer)))
    if type == "size_numeric" and len(predicted) == len(true):
        sizes, true_sizes = [_size_mm(text) for text in predicted], [_size_mm(text) for text in true]
        if None not in sizes + true_sizes:
            tolerant = exact or any(all(map(_same_size, order, true_sizes)) for order in permutations(sizes))
    if type == "count_numeric":
        count = _single_count(answer)
        tolerant = exact or (count is not None and _single_count(prediction) == count)
    return {"exact": exact, "tolerant": tolerant}


def answer_label(answer) -> str:
    """An answer (None is "") in the form in which it is counted: normalised, the members of a set in order."""
    return "; ".join(sorted(_members(answer)))


def blind_answers(train: list[tuple], rows: list[tuple]) -> list[dict[str, str | None]]:
    """For each row what can be said without seeing anything, {floor: answer}, from the training split alone.

    `train` are (question type, question, its right answers), `rows` (question type, question). An answer is the most
    frequent in training to questions of the same "type"; to the same "question", in these words; to the "nearest"
    question, whose words, each weighted by how rare it is (idf), have the highest cosine. Where that was never asked,
    or shares no word with any, it is the type's; of a type that training does not have, the most frequent of all.
    {} without training.
    """
    if not train:
        return [{} for _ in rows]
    by_type, by_question = defaultdict(Counter), defaultdict(Counter)
    everything, spelt = Counter(), defaultdict(Counter)  # "Yes" and "yes." are one answer, said as it mostly is
    for kind, question, answers in train:
        labels = [answer_label(answer) for answer in answers]
        for counter in (by_type[kind], by_question[normalise(question)], everything):
            counter.update(labels)
        for label, answer in zip(labels, answers, strict=True):
            spelt[label][answer] += 1
    asked = {text: normalise(text) for _, text in rows}
    nearest = _nearest(list(by_question), [text for text in set(asked.values()) if text not in by_question])
    found = {}
    for kind, question in set(rows):
        of_type, same = by_type.get(kind, everything), by_question.get(asked[question])
        similar = sum((by_question[text] for text in nearest.get(asked[question], [])), Counter())
        counts = {"type": of_type, "question": same or of_type, "nearest": same or similar or of_type}
        said = {name: spelt[counter.most_common(1)[0][0]] for name, counter in counts.items()}
        found[kind, question] = {name: spellings.most_common(1)[0][0] for name, spellings in said.items()}
    return [found[row] for row in rows]


def _nearest(texts: list[str], unseen: list[str]) -> dict[str, list[str]]:
    """{an unseen text: those of `texts` that are nearest to it, several where they are equally near, or none}"""
    holding = defaultdict(list)  # word -> which texts it stands in
    for i, text in enumerate(texts):
        for word in set(text.split()):
            holding[word].append(i)
    holding = {word: np.array(where) for word, where in holding.items()}
    idf = {word: 1 + math.log(len(texts) / len(where)) for word, where in holding.items()}
    length = np.zeros(len(texts))
    for word, where in holding.items():
        length[where] += idf[word] ** 2
    length = np.sqrt(np.maximum(length, 1e-12))  # 0 of an empty text
    found = {}
    for text in unseen:
        shared = np.zeros(len(texts))  # the length of the unseen text divides all alike: it is left out
        for word in set(text.split()) & holding.keys():
            shared[holding[word]] += idf[word] ** 2
        cosine = shared / length
        best = cosine.max(initial=0.0)
        found[text] = [texts[i] for i in np.flatnonzero(cosine >= best - 1e-9)] if best > 0 else []
    return found


def clustered_interval(values: list, groups: list, lowest: float = 0.0, resamples: int = 2000) -> list[float] | None:
    """The 95 % interval [low, high] of the mean of `values` (n,), by a bootstrap over whole groups.

    The questions of one image or patient are not independent: resampled one by one they give an interval that is far
    too narrow. None for a single group, which tells nothing about another.

    Percentiles alone are far too narrow as well near 100 %, and for few groups. So two groups are added to those
    resampled, one of the highest value (1) and one of the `lowest` (0; of differences -1), as Agresti and Coull (1998)
    add a success and a failure or two to a proportion; and the percentiles are widened as a t interval is (Hesterberg
    2015, section 4.4, "expanded percentile").
    """
    of = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    if len(of) < 2:
        return None
    values, index = np.asarray(values, dtype=float), np.array([of[group] for group in groups])
    sums, sizes = np.bincount(index, values), np.bincount(index).astype(float)  # (groups,)
    # each added group is worth one independent question: the design effect, from 1 to the size of a group
    alone = values.var() * len(values)
    together = np.sum((sums - values.mean() * sizes) ** 2) * len(of) / (len(of) - 1)
    size = min(max(together / alone, 1.0), sizes.mean()) if alone else sizes.mean()
    sums, sizes = np.append(sums, [size, lowest * size]), np.append(sizes, [size, size])  # (groups + 2,)
    random, means = np.random.default_rng(0), []
    for _ in range(0, resamples, 100):  # a few at a time: memory does not grow with their number
        drawn = random.integers(len(sums), size=(100, len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    normal, freedom = statistics.NormalDist(), len(sums) - 1
    z = normal.inv_cdf(0.975)
    # Student's t from the normal quantile (Abramowitz & Stegun 26.7.5)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    tail = normal.cdf(-t * math.sqrt(len(sums) / freedom))
    return np.quantile(np.concatenate(means), [tail, 1 - tail]).tolist()


def summarise(records: list[dict]) -> dict:
    """Accuracy of all records (micro), of each question type, and the types' mean (macro).

    Every record counts, answered or not. A record has question_type, answer, group, correct, tolerant, where the
    answer has other forms also_right, and floors: whether each of `blind_answers` is right. Each entry has n, groups,
    exact, interval (see `clustered_interval`), tolerant, floors, and how far exact is above the best of these, with
    the interval of that difference: of each record, right or not less floor right or not. Which floor is the best is
    told by these same records, to the floor's advantage.

    A type whose questions all have the same `candidates` has label figures, too, see `_label_figures`.
    """
    if not records:
        raise ValueError("no rows to summarise")
    kinds = defaultdict(list)
    for r in records:
        kinds[r["question_type"]].append(r)
    results = {kind: {**_accuracy(part), **_label_figures(part)} for kind, part in sorted(kinds.items())}
    macro = {c: sum(entry[c] for entry in results.values()) / len(results) for c in ("exact", "tolerant")}
    macro["floors"] = {
        name: sum(entry["floors"][name] for entry in results.values()) / len(results) for name in records[0]["floors"]
    }
    return {"types": results, "all": _accuracy(records), "macro": macro}


def _accuracy(records) -> dict:
    groups = [r["group"] for r in records]
    right = np.array([r["correct"] for r in records], dtype=float)
    floors = {name: np.array([r["floors"][name] for r in records], dtype=float) for name in records[0]["floors"]}
    entry = {
        "n": len(records),
        "groups": len(set(groups)),
        "exact": float(right.mean()),
        "interval": clustered_interval(right, groups),
        "tolerant": sum(r["tolerant"] for r in records) / len(records),
        "floors": {name: float(floor.mean()) for name, floor in floors.items()},
    }
    best = max(floors, key=lambda name: floors[name].mean()) if floors else None
    above = right - floors[best] if floors else None
    return {
        **entry,
        "best_floor": best,
        "above_floor": float(above.mean()) if floors else None,
        "above_floor_interval": clustered_interval(above, groups, lowest=-1.0) if floors else None,
    }


def _label_figures(records) -> dict:
    """Figures that always saying the most frequent label does not raise; {} unless all may give the same answers.

    balanced is the mean over the labels of the share of its records answered rightly. Where the candidates were
    scored: scored, the share whose likeliest candidate is right, and auroc, the mean over the labels of one against
    the others. Without two labels among the true answers balanced and auroc are None.
    """
    labels = records[0].get("candidates")
    if not labels or len(labels) < 2 or any(r.get("candidates") != labels for r in records):
        return {}
    true = [true_candidate(r) for r in records]  # None, a class of its own, where no candidate is right
    answered = {label: [r["correct"] for r, t in zip(records, true, strict=True) if t == label] for label in true}
    shares = [np.mean(right) for right in answered.values()]
    figures = {"balanced": float(np.mean(shares)) if len(shares) > 1 else None}
    if all("probabilities" in r for r in records):
        likeliest = [max(r["probabilities"], key=r["probabilities"].get) for r in records]
        by_label = [auroc([r["probabilities"][x] for r in records], [t == x for t in true]) for x in labels]
        known = [area for area in by_label if area is not None]
        figures["scored"] = float(np.mean([said == t for said, t in zip(likeliest, true, strict=True)]))
        figures["auroc"] = float(np.mean(known)) if known else None
    return figures


def true_candidate(record: dict) -> str | None:
    """The candidate of a record that is right, None where none is."""
    forms = [record["answer"], *record.get("also_right", [])]
    kind = record["question_type"]
    right = (c for c in record["candidates"] if any(c == f or score_answer(c, f, kind)["exact"] for f in forms))
    return next(right, None)


def auroc(scores: list[float], positive: list[bool]) -> float | None:
    """The chance that a positive has a higher score than a negative, a tie counting half; None without either."""
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    above, below = scores[positive], np.sort(scores[~positive])
    if not len(above) or not len(below):
        return None
    wins = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")  # twice: lower, plus equal
    return float(wins.mean() / 2 / len(below))


def results_table(results: dict) -> str:
    """The summary as text: a line a question type, then all questions; label figures where a type has them."""
    width = max(16, 1 + max(map(len, results["types"])))
    floors = list(results["macro"]["floors"])
    extra = [c for c in ("balanced", "scored", "auroc") if any(c in r for r in results["types"].values())]

    def share(value, sign="") -> str:
        return "–" if value is None else f"{value:{sign}.1%}"

    def interval(ends, sign="") -> str:
        return " – ".join(share(end, sign) for end in ends) if ends else "one group"

    above = f"{'above best':>12}{'95 % interval':>18}" if floors else ""
    lines = [f"{'':<{width + 6 + 8 + 16 + 10}}{'blind floors, by':>{10 * len(floors)}}"] if floors else []
    lines += [f"{'question type':<{width}}{'n':>6}{'exact':>8}{'95 % interval':>16}{'tolerant':>10}"]
    lines[-1] += "".join(f"{name:>10}" for name in floors) + above + "".join(f"{column:>10}" for column in extra)
    for kind, r in [*results["types"].items(), ("all", results["all"])]:
        line = f"{kind:<{width}}{r['n']:>6}{share(r['exact']):>8}{interval(r['interval']):>16}"
        line += f"{share(r['tolerant']):>10}" + "".join(f"{share(r['floors'][name]):>10}" for name in floors)
        if floors:
            line += f"{share(r['above_floor'], '+'):>12}{interval(r['above_floor_interval'], '+'):>18}"
        for column in extra if r is not results["all"] else []:
            value = r.get(column)
            line += f"{f'{value:.3f}' if column == 'auroc' and value is not None else share(value):>10}"
        lines.append(line)
    macro = results["macro"]
    line = f"{'mean of types':<{width + 6}}{share(macro['exact']):>8}{'':>16}{share(macro['tolerant']):>10}"
    lines.append(line + "".join(f"{share(macro['floors'][name]):>10}" for name in floors))
    return "\n".join(lines)
