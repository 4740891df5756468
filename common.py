"""What decides the trained weights and the answers: token IDs, masking, prompt trees, packing, LoRA, answering.

Nothing here knows a model's name, reads a command line or does anything on import. It holds what several scripts use
and where a silent mistake would corrupt results; what only keeps a run alive is in runtime/.
"""

import copy
import functools
import json
import math
import random
import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import nn
from transformers import DynamicCache

IGNORE = -100  # the label of a token that is not supervised, as in torch's cross_entropy
LAYER = re.compile(r".*?\.\d+\.")  # how the name of a decoder layer's part begins, such as model.layers.3.
SENTINELS = ("<ANS>", "</ANS>")  # mark the answer in a rendered text

# ---- 1  Token IDs: read, never computed ------------------------------------------------------------------------------


def image_token_id(config) -> int:
    """The ID of the image placeholder, read from a model's configuration.

    `vocab_size - 1` looks right and is an ordinary word piece: the model then reports "tokens: 0". Raises
    ValueError where the configuration names no ID, two different ones, or one outside the embedding.
    """
    named = {getattr(config, name, None) for name in ("image_token_index", "image_token_id")} - {None}
    if len(named) != 1:
        found = f"two different image tokens: {sorted(named)}" if named else "no image token"
        raise ValueError(f"config.json names {found}; copy image_token_index from the original checkpoint")
    token_id, rows = named.pop(), config.get_text_config().vocab_size
    if not 0 <= token_id < rows:
        raise ValueError(f"image token ID {token_id} is outside the embedding of {rows} rows (config.json)")
    return token_id


def single_token_id(tokenizer, token: str) -> int:
    """The ID of a token that must be one piece. Raises ValueError naming the pieces where it is several."""
    pieces = tokenizer.encode(token, add_special_tokens=False)
    named = tokenizer.convert_ids_to_tokens(pieces)
    if named != [token]:
        raise ValueError(f"{token!r} is not one token of this tokenizer but {len(pieces)}: {named}")
    return pieces[0]


def register_placeholder(tokenizer, token: str, token_id: int) -> int:
    """Make `token` one piece with the ID that the model's configuration names; returns the ID.

    A placeholder such as <image> is often missing from the tokenizer: its ID is the first one past the end. As an
    added token the text is split there before any merge. Raises ValueError where the ID already belongs to something
    else: then the configuration's ID was computed, not read.
    """
    if token not in tokenizer.get_vocab() and token_id >= len(tokenizer):
        added = [*(f"<|unused_{i}|>" for i in range(len(tokenizer), token_id)), token]
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in added])
    known = tokenizer.get_vocab().get(token)
    if known != token_id:
        taken = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
        where = f"the tokenizer has it as {known}" if known is not None else f"that ID is the word piece {taken!r}"
        raise ValueError(f"config.json gives {token} the ID {token_id}, but {where}")
    return single_token_id(tokenizer, token)


def reserve_placeholder(tokenizer, tokens: list[str], config, known: int | None) -> int:
    """Add tokens (start, placeholder, end) in rows that the embedding has to spare; returns the placeholder's ID.

    Grown, new rows would be drawn: others in training and answering. ValueError: no room, or not the ID `known`.
    """
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    ids, rows = [single_token_id(tokenizer, token) for token in tokens], config.get_text_config().vocab_size
    if known not in (None, ids[1]):
        raise ValueError(f"the placeholder has the ID {known}, but the tokenizer has {tokens[1]} as {ids[1]}")
    if max(ids) >= rows:
        raise ValueError(f"the embedding of {rows} rows has no room for {', '.join(tokens)} (IDs {ids})")
    return ids[1]


def separate_pad_from_eos(tokenizer, model=None) -> str:
    """Give PAD an ID of its own where it is missing or equals EOS; returns a line saying what was found and done.

    With PAD = EOS, whoever masks PAD in the labels masks EOS too, and generation never stops. Embeddings only grow:
    `resize_token_embeddings(len(tokenizer))` would shrink a padded one (151,936 rows, 151,657 tokens). Call it after
    placeholders are registered: a new PAD would take their IDs. Raises ValueError where the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: answers would never end (tokenizer_config.json: eos_token)")
    pad, eos, done = tokenizer.pad_token_id, tokenizer.eos_token_id, "distinct"
    found = f"PAD {tokenizer.pad_token!r} ({pad}), EOS {tokenizer.eos_token!r} ({eos})"
    if pad in (None, eos):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        done = f"PAD is now '<|pad|>' ({tokenizer.pad_token_id})"
    if model is not None:
        if tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]:
            grow_embeddings(model, tokenizer.pad_token_id + 1)
            done += f", embedding grown to {tokenizer.pad_token_id + 1} rows"
        for config in (model.config, model.config.get_text_config(), model.generation_config):
            config.pad_token_id = tokenizer.pad_token_id
    return f"{found}: {done}"


def grow_embeddings(lm: nn.Module, rows: int) -> None:
    """Room for new tokens, whose rows are the mean of the others, not drawn: the same whenever the model is loaded."""
    old = lm.get_input_embeddings().weight.shape[0]
    if rows > old:  # never fewer: many embeddings are larger than their tokenizer
        lm.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
                module.weight[old:] = module.weight[:old].mean(0)


# ---- 2  Masking: labels are built while encoding, not searched for afterwards ----------------------------------------


def conversation(tokenizer, messages: list[dict], answer: str) -> str:
    """A conversation as text, the answer to its last question between the sentinels; before them exactly what the
    chat template writes with add_generation_prompt=True, because that is what whoever uses the model will ask with.

    Where that does not end in white space, such as Mistral's [/INST], the white space that the template has before an
    answer belongs to the answer: its first word keeps its usual piece. ValueError: no such generation prompt.
    """
    state = f"{tokenizer.chat_template} {tokenizer.special_tokens_map}"
    prompt, space = _asked(tokenizer, state, json.dumps(messages))
    return prompt + SENTINELS[0] + space + answer + SENTINELS[1] + tokenizer.eos_token


@functools.lru_cache(2**12)  # the same questions are asked about many images
def _asked(tokenizer, _state, messages: str) -> tuple[str, str]:
    """The prompt of messages (JSON), and the white space that belongs to the answer."""
    messages, opening = json.loads(messages), SENTINELS[0]
    answered = [*messages, {"role": "assistant", "content": [{"type": "text", "text": opening}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before = tokenizer.apply_chat_template(answered, tokenize=False).partition(opening)[0]
    if before.split() != prompt.split():  # such as "… assistant \n" and "… assistant\n"
        text = f"the chat template asks with {prompt[-40:]!r} (add_generation_prompt), but writes {before[-40:]!r}"
        raise ValueError(f"{text} before an answer: what is trained would not be what is asked")
    return prompt, "" if prompt[-1:].isspace() else before[len(before.rstrip()) :]


def encode_supervised(tokenizer, text: str, keep_sentinels: bool = False) -> tuple[list[int], list[int]]:
    """Encode a rendered conversation in which one answer stands between the sentinels and is followed by EOS.

    The tokenizer splits the text at the sentinels before any merge, because a byte-level BPE would merge `<ANS>Pink`
    to `<`, `ANS`, `>P`, `ink` and a search for the sentinel's pieces finds nothing. Supervised are the answer and the
    EOS directly after it; every other label is IGNORE. The sentinels themselves are dropped, or with keep_sentinels
    become their ordinary pieces, not supervised. ValueError: not one answer, an empty one, or one without EOS.
    """
    input_ids, labels = _encode(tokenizer, len(tokenizer), text, keep_sentinels)
    return input_ids.copy(), labels.copy()


@functools.lru_cache(2**12)  # they are often answered alike, too
def _encode(tokenizer, size: int, text: str, keep_sentinels: bool) -> tuple[list[int], list[int]]:
    """encode_supervised's (input_ids, labels), of the tokenizer as it is with `size` tokens."""
    before, *found = re.split(f"({'|'.join(map(re.escape, SENTINELS))})", text)
    if found[::2] != [*SENTINELS]:
        raise ValueError(f"one answer must stand between {' and '.join(SENTINELS)}; there are {found[::2]} in {text!r}")
    answer, after = found[1::2]
    if not answer:
        raise ValueError(f"empty answer in {text!r}")
    if not after.startswith(tokenizer.eos_token):
        raise ValueError(f"no EOS ({tokenizer.eos_token!r}) directly after the answer in {text!r}")
    asked, joined = (tokenizer.encode(part, add_special_tokens=False) for part in (before, before + answer + after))
    start = len(asked)
    if joined[:start] == asked and tokenizer.eos_token not in answer and not keep_sentinels:
        # as if no sentinel stood there: without the dummy space that some tokenizers put behind it
        end = joined.index(tokenizer.eos_token_id, start) + 1  # at EOS a text is cut before anything is merged
        parts = (asked, 0), (joined[start:end], 1), (joined[end:], 0)
    else:
        splitter, opening, closing = _splitter(tokenizer, size)
        tokens = splitter.encode(f"{before}{SENTINELS[0]}{answer}{SENTINELS[1]}{after}", add_special_tokens=False)
        start, end = tokens.index(opening), tokens.index(closing)
        kept = [tokenizer.encode(s, add_special_tokens=False) if keep_sentinels else [] for s in SENTINELS]
        parts = (tokens[:start] + kept[0], 0), (tokens[start + 1 : end], 1), (kept[1], 0)
        parts += (tokens[end + 1 : end + 2], 1), (tokens[end + 2 :], 0)
    input_ids = [token for part, _ in parts for token in part]
    labels = [token if supervised else IGNORE for part, supervised in parts for token in part]
    # what the tokenizer itself puts first, [1] for Mistral and [] for Qwen: once, also where the template writes it
    bos = [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]
    missing = bos if input_ids[: len(bos)] != bos else []
    return missing + input_ids, [IGNORE] * len(missing) + labels


@functools.lru_cache(maxsize=8)
def _splitter(tokenizer, _size: int):
    """A copy of the tokenizer that knows the sentinels as tokens of their own; no model ever sees their IDs."""
    splitter = copy.deepcopy(tokenizer)
    splitter.add_tokens([AddedToken(s, special=True, normalized=False) for s in SENTINELS])
    return splitter, *(single_token_id(splitter, s) for s in SENTINELS)


def supervised_tokens(labels: list[int]) -> list[int]:
    """The labels that are not IGNORE: an answer and its EOS."""
    return [label for label in labels if label != IGNORE]


def expand_placeholder(input_ids: list[int], token_id: int, counts: list[int]) -> list[int]:
    """Repeat the i-th placeholder counts[i] times, once for each feature of its image. ValueError: other counts."""
    if input_ids.count(token_id) != len(counts):
        raise ValueError(f"{input_ids.count(token_id)} placeholders of ID {token_id} for {len(counts)} media")
    left, found = iter(counts), []
    for token in input_ids:
        found += [token] * (next(left) if token == token_id else 1)
    return found


def put_features(embeds, input_ids, token_ids, features, what: str = "image") -> torch.Tensor:
    """Embeddings (1, T, width) in which the placeholders' are replaced by `features` (n, width), in their order.

    `token_ids` is the placeholder's ID, or several (a tensor). Raises ValueError unless they are equally many.
    """
    places = torch.isin(input_ids, torch.as_tensor(token_ids, device=input_ids.device))  # (1, T)
    if (tokens := int(places.sum())) != len(features):
        text = f"features and {what} tokens do not match, tokens: {tokens}, features: {len(features)}"
        raise ValueError(f"{what.capitalize()} {text} (the placeholder's ID is read from config.json, never computed)")
    return embeds.masked_scatter(places.unsqueeze(-1), features.to(embeds.dtype))


# ---- 3  Prompt trees: one image is read once for all its questions ---------------------------------------------------


@dataclass
class Prompt:
    """A prompt tree: a prefix (system text and image) and its branches (a question and its answer each).

    `branches` are (input_ids, labels) pairs, `ids` name their examples, `media` is the script's own. The prefix's
    positions, (P,) or (3, P) for M-RoPE, are 0 … P-1 where they are not given.
    """

    prefix: list[int]
    branches: list[tuple[list[int], list[int]]]
    ids: list[str]
    media: object = None
    prefix_positions: torch.Tensor | None = None

    def part(self, indices) -> "Prompt":
        """The same prefix with only the branches at `indices`."""
        return replace(self, branches=[self.branches[i] for i in indices], ids=[self.ids[i] for i in indices])

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(ids) for ids, _ in self.branches)

    def supervised(self) -> int:
        """How many of its tokens are supervised."""
        return sum(len(supervised_tokens(labels)) for _, labels in self.branches)


# ---- 4  Packed sequences and the one visibility rule -----------------------------------------------------------------
# Trees are packed one behind the other into a sequence, without padding. Token q sees token k if and only if
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
# Positions of every branch continue from the       A  . . . . . . . x x .
# end of its prefix, as in a sequence of its own.   B  . . . . . . . x x x
# The rule is exact: loss and all gradients equal those of separate sequences.


def plan_run(trees: list[Prompt], args) -> list[list[Prompt]]:
    """The trees of every optimizer step: in a new order each epoch, as many as fit into --questions-per-step.

    A tree with more questions than that is divided. The seed and the data alone decide: a run resumes at any step.
    """
    n, plan = args.questions_per_step, []
    parts = [tree.part(range(i, min(i + n, len(tree.ids)))) for tree in trees for i in range(0, len(tree.ids), n)]
    for epoch in range(args.epochs):
        order, free = parts.copy(), 0
        random.Random(f"{args.seed} {epoch}").shuffle(order)
        for part in order:
            if len(part.ids) > free:
                plan.append([])
                free = n
            plan[-1].append(part)
            free -= len(part.ids)
        if args.max_steps and len(plan) >= args.max_steps:
            return plan[: args.max_steps]
    return plan


def pack(trees: list[Prompt], max_tokens: int, ranks: int = 1, rank: int | None = None) -> list[dict]:
    """Pack trees into sequences of at most max_tokens tokens, about as few as it takes, and of nearly equal length.

    Each is a dictionary of input_ids, labels, document, branch, all (1, T) int64, position_ids (1, T) or (3, 1, T),
    `ends` (questions,), the index of each branch's last token, and `prompts`, its trees in order. With `rank` these are
    its own alone, [rank::ranks]; where there are fewer trees than ranks, sequences are added in which nothing is
    supervised: every rank must make as many passes as the others. A tree longer than max_tokens is divided, its prefix
    repeated. Raises ValueError where one branch does not fit.
    """
    pieces = [piece for tree in trees for piece in _divide(join_turns(tree), max_tokens)]
    pieces.sort(key=len, reverse=True)
    count = ranks * math.ceil(sum(map(len, pieces)) / (ranks * max_tokens))
    while (sequences := _spread(pieces, count, max_tokens)) is None:
        count += ranks
    empty = [replace(p, branches=[(ids, [IGNORE] * len(ids)) for ids, _ in p.branches]) for p in pieces[-1:]]
    return [_concatenate(sequence or empty) for sequence in (sequences if rank is None else sequences[rank::ranks])]


def join_turns(tree: Prompt) -> Prompt:
    """The tree with one branch for a conversation whose turns each repeat those before them; the loss is the same.

    In it earlier answers are supervised, too. A turn without labels, which is to be answered, stays by itself.
    """
    branches, ids = [], []
    for (input_ids, labels), name in zip(tree.branches, tree.ids, strict=True):
        earlier, answered = branches[-1] if branches else ([], [])
        n, repeats = len(earlier), input_ids[: len(earlier)] == earlier
        if repeats and supervised_tokens(answered) and not supervised_tokens(labels[:n]):
            branches[-1] = input_ids, answered + labels[n:]
        else:
            branches.append((input_ids, labels))
            ids.append(name)
    return replace(tree, branches=branches, ids=ids)


def _divide(tree: Prompt, max_tokens: int) -> list[Prompt]:
    parts, size = [[]], len(tree.prefix)
    for i, (input_ids, _) in enumerate(tree.branches):
        needed = len(tree.prefix) + len(input_ids)
        if needed > max_tokens:
            raise ValueError(f"example {tree.ids[i]} needs {needed} tokens, more than --pack-tokens {max_tokens}")
        if size + len(input_ids) > max_tokens:
            parts.append([])
            size = len(tree.prefix)
        parts[-1].append(i)
        size += len(input_ids)
    return [tree] if len(parts) == 1 else [tree.part(indices) for indices in parts]


def _spread(pieces: list[Prompt], count: int, max_tokens: int) -> list[list[Prompt]] | None:
    """The longest first, each into the emptiest of `count` sequences; None where one does not fit."""
    sequences, lengths = [[] for _ in range(count)], [0] * count
    for piece in pieces:
        emptiest = lengths.index(min(lengths))
        sequences[emptiest].append(piece)
        lengths[emptiest] += len(piece)
    return sequences if max(lengths, default=0) <= max_tokens else None


def _concatenate(trees: list[Prompt]) -> dict:
    input_ids, labels, document, branch, positions, ends = [], [], [], [], [], []
    for number, tree in enumerate(trees, start=1):
        given = tree.prefix_positions
        prefix_positions = torch.arange(len(tree.prefix)) if given is None else given
        parts = [(tree.prefix, [IGNORE] * len(tree.prefix)), *tree.branches]
        after = int(prefix_positions.max()) + 1 if len(tree.prefix) else 0
        for b, (part_ids, part_labels) in enumerate(parts):
            input_ids += part_ids
            labels += part_labels
            document += [number] * len(part_ids)
            branch += [b] * len(part_ids)
            # M-RoPE: text advances all three coordinates together
            continued = (after + torch.arange(len(part_ids))).expand(*prefix_positions.shape[:-1], -1)
            positions.append(prefix_positions if b == 0 else continued)
            if b > 0:
                ends.append(len(input_ids) - 1)
    lists = {"input_ids": input_ids, "labels": labels, "document": document, "branch": branch}
    return {
        **{name: torch.tensor([values]) for name, values in lists.items()},  # each (1, T)
        "position_ids": torch.cat(positions, dim=-1).unsqueeze(-2),  # (1, T) or (3, 1, T)
        "ends": torch.tensor(ends),
        "prompts": trees,
    }


def visible(document: torch.Tensor, branch: torch.Tensor, last: int | None = None) -> torch.Tensor:
    """The attention mask (1, 1, queries, T), True where the query may look; document and branch are (1, T).

    The queries are all tokens, or the `last` so many: what a decoding step needs.
    """
    n = last or document.shape[1]
    same_document = document[:, -n:, None] == document[:, None, :]  # (1, queries, T)
    not_after = torch.ones_like(same_document).tril(document.shape[1] - n)
    own_or_prefix = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, -n:, None])
    return (same_document & not_after & own_or_prefix).unsqueeze(1)


def last_hidden(decoder: nn.Module, embeds, position_ids, mask, cache=None) -> torch.Tensor:
    """Last hidden states (1, T, width) of embeddings (1, T, width); a cache holds earlier tokens, and takes these."""
    device, (queries, keys) = embeds.device.type, mask.shape[-2:]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeds.dtype
    given = {"past_key_values": cache, "use_cache": cache is not None}
    if device == "cpu" and queries == keys:  # a document in two pieces: to its first question, then the others
        starts = mask[0, 0].byte().argmax(-1)  # the first token that one sees begins its document
        seen = mask[0, 0].sum(-1, dtype=torch.int32)  # a sum copies all it adds; so before the bias
        gaps = seen != torch.arange(1, keys + 1) - starts  # does one not see all from there to itself?
        (starts, _), lengths = torch.stack([starts, gaps]).unique_consecutive(dim=1, return_counts=True)
        ends = lengths.cumsum(0).tolist()
        given["pieces"] = list(zip(starts.tolist(), [0, *ends[:-1]], ends, strict=True))
    # one for all layers, in the form that is added to scores: of a boolean mask every layer makes, and keeps, its own;
    # on a GPU also of rows whose distance in memory is no multiple of eight
    bias = embeds.new_zeros(*mask.shape[:-1], keys + -keys % 8, dtype=dtype)[..., :keys].masked_fill_(~mask, -math.inf)
    return decoder(inputs_embeds=embeds, attention_mask=bias, position_ids=position_ids, **given).last_hidden_state


def supervised_loss(hidden: torch.Tensor, lm_head, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy summed over the supervised tokens, and their number, both tensors.

    hidden is (1, T, width), labels (1, T) unshifted: token t+1 is predicted from t. Logits are computed only for
    supervised tokens (a few in 100). The sum, not the mean: divided by the tokens of the complete optimizer step it
    makes accumulation 1 x 8 equal 8 x 1, and it is 0 instead of NaN where nothing is supervised.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE
    logits = lm_head(hidden[:, :-1][supervised]).float()  # (tokens, vocabulary)
    return F.cross_entropy(logits, targets[supervised], reduction="sum"), supervised.sum()


# ---- 5  LoRA ---------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """y = W x + scaling * B A x around an existing, frozen nn.Linear.

    A is (r, in), B is (out, r) and starts at zero, so that training starts from the model as it was. Both are
    float32 whatever the base is: a bfloat16 weight of 1 loses every update below 0.002.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.dropout = nn.Dropout(dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, in) -> (…, out)
        y = self.base_layer(x)
        # cast the small matrices, not x: the float32 masters still receive every gradient
        small = self.scaling * F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (…, r): scaled while it is small
        return y + F.linear(small, self.lora_B.to(x.dtype)).to(y.dtype)


def train_only(model: nn.Module, *patterns: str) -> list[str]:
    """Freeze all but the parameters whose full name matches a pattern; these become float32. Returns their names.

    bfloat16 loses small updates. ValueError for a pattern without a match: a library may have renamed its modules.
    """
    chosen = {name for pattern in patterns for name in _matching(pattern, model.named_parameters(), "parameter")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        parameter.data = parameter.data.float() if name in chosen else parameter.data
    return sorted(chosen)


def add_lora(model: nn.Module, pattern: str, r: int, alpha: float, dropout=0.0, rslora=False, without="") -> list[str]:
    """Wrap every nn.Linear whose full name matches the regular expression; returns the names.

    Raises ValueError where the pattern matches no linear layer, one that already has an adapter, or only some of a
    decoder layer's: Phi-3's q, k and v are one qkv_proj. What is left out on purpose must match `without`.
    """
    if any(re.fullmatch(pattern, name) for name in lora_layers(model)):
        raise ValueError(f"layers that match {pattern!r} already have an adapter")
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = _matching(pattern, linear, "linear layer")
    layers, meant = tuple(m[0] for m in map(LAYER.match, names) if m), rf"{pattern}|{without}|.*\.base_layer"
    left = sorted({re.sub(r"\d+", "0", n) for n, _ in linear if n.startswith(layers) and not re.fullmatch(meant, n)})
    if left:
        raise ValueError(f"{pattern!r} leaves out {', '.join(left)}; edit the script's LORA_PATTERN, or give `without`")
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), r, alpha, dropout, rslora))
    return names


def _matching(pattern: str, named, what: str) -> list[str]:
    names = [name for name, _ in named]
    if matching := [name for name in names if re.fullmatch(pattern, name)]:
        return matching
    alike = sorted({re.sub(r"\d+", "0", name) for name in names})
    raise ValueError(f"no {what} matches {pattern!r}; there are {', '.join(alike[:12])}{', …' * (len(alike) > 12)}")


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """{full name: layer} of every layer that has an adapter."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Add B A to each adapted weight and put the plain layers back: the model then saves and loads like any other."""
    for name, layer in lora_layers(model).items():
        weight = layer.base_layer.weight
        weight.copy_(weight.float() + layer.scaling * (layer.lora_B @ layer.lora_A))
        model.set_submodule(name, layer.base_layer)
    return model


# ---- 6  Answering by the same rule -----------------------------------------------------------------------------------
# A model has forward(batch) -> (loss sum, supervised tokens), hidden(input_ids, position_ids, mask, cache, media)
# -> (1, T, width) and lm_head(hidden). A run gives packed sequences with their media, and what other ranks found.


@torch.no_grad()
def mean_loss(model, trees: list[Prompt], task, run) -> float:
    """The mean over all supervised tokens of the trees, which are divided over the ranks."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # loss, supervised tokens
    with run.equal_passes(model):
        for batch in run.packed(run.share(trees), task):  # media are read outside autocast, which is the model's
            with run.autocast():
                sums += torch.stack(model(batch)).cpu()
    return float(torch.divide(*run.sum(sums)))


def evaluate(model, trees: list[Prompt], examples: list, task, run) -> list[dict]:
    """A record of every example, in their order; one that was not answered has the prediction None, which is wrong."""
    with run.equal_passes(model):
        mine = answer(model, run.share(trees), {example.id: example for example in examples}, task, run)
    found = {name: answered for part in run.gather(mine) for name, answered in part.items()}
    records = []
    for example in examples:
        answered = found.get(example.id, {"prediction": None})
        scores = task.score(answered["prediction"], example)
        record = {n: getattr(example, n) for n in ("id", "group", "media", "question_type", "question", "answer")}
        record |= answered | {n: getattr(example, n) for n in ("candidates", "also_right") if getattr(example, n)}
        records.append({**record, "correct": scores["exact"], "relaxed": scores["relaxed"]})
    return records


@torch.no_grad()
def answer(model, trees: list[Prompt], examples: dict, task, run) -> dict[str, dict]:
    """{example ID: {"prediction": text, "ended": by EOS?, "probabilities": {candidate: share}}}, as --decode says.

    greedy: the likeliest token, one after the other; constrained: only tokens that lead to a candidate; ranked: the
    likeliest candidate; both: greedy, and beside it the candidates' probabilities. Without candidates all are greedy.
    """
    model.eval()
    mode, tokenizer, limit = run.args.decode, task.tokenizer, run.args.max_answer_tokens
    branches = {} if mode == "greedy" else candidate_branches(trees, examples, task)
    ranked = rank_candidates(model, trees, branches, task, run) if mode in ("ranked", "both") else {}
    found = dict(ranked) if mode == "ranked" else {}
    left = [tree.part([i for i, name in enumerate(tree.ids) if name not in found]) for tree in trees]
    left = [answering_prompt(tree) for tree in left if tree.ids]
    for batch in run.packed(left, task, shown="answering"):
        names = [name for tree in batch["prompts"] for name in tree.ids]
        allowed = None
        if mode == "constrained":
            allowed = [[supervised_tokens(labels) for _, labels in branches[name].values()] for name in names]

        def read(input_ids, position_ids, mask, cache, media=batch):
            # media belong to the first reading; afterwards they are in the cache
            return model.hidden(input_ids, position_ids, mask, cache, None if cache.get_seq_length() else media)

        with run.autocast():
            answers = decode(read, model.lm_head, batch, tokenizer.eos_token_id, limit, allowed)
        for name, tokens in zip(names, answers, strict=True):
            text, ended = tokenizer.decode(tokens, skip_special_tokens=True), tokens[-1] == tokenizer.eos_token_id
            found[name] = {**ranked.get(name, {}), "prediction": text.strip(), "ended": ended}
    return found


def answering_prompt(tree: Prompt) -> Prompt:
    """The tree with each branch cut before its first supervised token: what the model is given to answer."""
    branches = []
    for input_ids, labels in tree.branches:
        start = next(i for i, label in enumerate(labels) if label != IGNORE)
        branches.append((input_ids[:start], labels[:start]))
    return replace(tree, branches=branches)


def candidate_branches(trees: list[Prompt], examples: dict, task) -> dict[str, dict]:
    """{example ID: {candidate: (input_ids, labels)}}; the same question about many images is encoded once."""
    known, found = {}, {}
    for tree in trees:
        for name, (asked, _) in zip(tree.ids, answering_prompt(tree).branches, strict=True):
            candidates = examples[name].candidates or []
            key = tuple(asked), tuple(candidates)
            if key not in known:
                known[key] = {candidate: task.encode(examples[name], candidate)[1:] for candidate in candidates}
            found[name] = known[key]
    return found


def rank_candidates(model, trees: list[Prompt], branches: dict[str, dict], task, run) -> dict[str, dict]:
    """{example ID: {"prediction", "probabilities"}}, every candidate a branch of its own.

    The likeliest is the exact argmax over the candidates, which a greedy walk through their tokens is not.
    """
    asked, found = [], {}
    for tree in trees:
        pairs = {(name, text): branch for name in tree.ids for text, branch in branches[name].items()}
        if pairs:
            asked.append(replace(tree, branches=list(pairs.values()), ids=list(pairs)))
    log_probs = log_probabilities(model, asked, task, run)
    for name in filter(branches.get, branches):
        shares = torch.tensor([log_probs[name, text] for text in branches[name]], dtype=torch.float64).softmax(0)
        probabilities = dict(zip(branches[name], shares.tolist(), strict=True))
        found[name] = {"prediction": max(probabilities, key=probabilities.get), "probabilities": probabilities}
    return found


@torch.no_grad()
def log_probabilities(model, trees: list[Prompt], task, run) -> dict:
    """{branch ID: the log-probability of all supervised tokens of the branch}

    What several branches of a tree begin with, such as a question and the first words of its candidates, is read once.
    """
    model.eval()
    found = {name: 0.0 for tree in trees for name in tree.ids}
    for batch in run.packed([join_branches(tree, run.args.pack_tokens) for tree in trees], task):
        joined = [part for tree in batch["prompts"] for part in tree.ids]
        path, scored = torch.eye(batch["branch"].shape[1], dtype=torch.bool), []
        for end, (parents, predicted) in zip(batch["ends"].tolist(), joined, strict=True):
            start = end + 1 - len(parents)
            for i, parent in enumerate(parents, start):
                path[i] |= path[start + parent]  # what leads to the token; of what is before the branch `sees` decides
            scored += [(name, start + number, token) for name, number, token in predicted]
        sees = visible(batch["document"], batch["branch"])
        mask = sees & ((batch["branch"] == 0) | path.to(sees.device))
        position_ids = batch["position_ids"] - (sees.sum(-1) - mask.sum(-1))[0]  # as if what is not seen were not there
        with run.autocast():
            hidden = model.hidden(batch["input_ids"], position_ids, mask, media=batch)[0]  # (T, width)
            for some in (scored[i : i + 256] for i in range(0, len(scored), 256)):  # logits are large
                names, *pairs = zip(*some, strict=True)
                rows, following = torch.tensor(pairs, device=hidden.device)
                rows, inverse = rows.unique(return_inverse=True)
                log_probs = model.lm_head(hidden[rows]).float().log_softmax(-1)  # (rows, vocabulary)
                for name, log_prob in zip(names, log_probs[inverse, following].tolist(), strict=True):
                    found[name] += log_prob
    return found


def join_branches(tree: Prompt, size: int) -> Prompt:
    """The tree with as few branches as hold `size` tokens each, in which what old ones begin with alike stands once.

    The ID of a new branch is (parents, predicted): of every token the number of the one before it, or -1, and
    [(old ID, number of a token, the supervised token that follows it)]. The last token of an old branch is not read.
    """
    joined = []
    for (input_ids, labels), name in sorted(zip(tree.branches, tree.ids, strict=True), key=lambda pair: pair[0][0]):
        last = max(i for i, label in enumerate(labels) if label != IGNORE)
        if not joined or len(tree.prefix) + len(joined[-1][0]) + last > size:
            joined.append(({}, []))
        (numbers, predicted), number = joined[-1], -1  # numbers: (number of the token before, token) -> its own
        for token, following in zip(input_ids[:last], labels[1 : last + 1], strict=True):
            number = numbers.setdefault((number, token), len(numbers))
            if following != IGNORE:
                predicted.append((name, number, following))
    branches = [([token for _, token in numbers], [IGNORE] * len(numbers)) for numbers, _ in joined]
    ids = [([parent for parent, _ in numbers], predicted) for numbers, predicted in joined]
    return replace(tree, branches=branches, ids=ids)


@torch.no_grad()
def decode(read, lm_head, batch: dict, eos: int, limit: int, allowed: list | None = None) -> list[list[int]]:
    """Answer every branch of a packed sequence greedily, all branches side by side.

    The sequence (see `answering_prompt` and `pack`) is read once into a key/value cache; then each step feeds one
    token per unfinished branch, whose query sees its own prefix and branch. read(input_ids, position_ids, mask, cache)
    -> hidden (1, n, width) runs the model. Of branch i allowed[i] is None, and then it has at most `limit` tokens; or
    token lists that end with EOS, and then it is exactly one of them. Returns a token list per branch, with its EOS.
    """
    cache = DynamicCache()  # without a configuration: a sliding window would drop the prefix
    document, branch, ends = batch["document"], batch["branch"], batch["ends"]
    hidden = read(batch["input_ids"], batch["position_ids"], visible(document, branch), cache)[:, ends]  # (1, B, width)
    answers = [[] for _ in ends]
    allowed = allowed or [None] * len(answers)
    alive, step = list(range(len(answers))), 0  # branches still being answered
    while alive:
        logits = lm_head(hidden)[0].float()  # (alive, vocabulary)
        for i, b in enumerate(alive):
            if allowed[b]:
                following = {tokens[step] for tokens in allowed[b] if tokens[:step] == answers[b]}
                following = torch.tensor(sorted(following), device=logits.device)
                logits[i] = torch.full_like(logits[i], -math.inf).index_copy(0, following, logits[i, following])
        for b, token in zip(alive, logits.argmax(-1).tolist(), strict=True):
            answers[b].append(token)
        step += 1
        # an allowed answer may be longer than the limit: cut, it would be none of them
        alive = [b for b in alive if answers[b][-1] != eos and (allowed[b] or step < limit)]
        if alive:
            own = ends[alive]
            document = torch.cat([document, document[:, own]], dim=1)
            branch = torch.cat([branch, branch[:, own]], dim=1)
            fed = torch.tensor([[answers[b][-1] for b in alive]], device=document.device)  # (1, alive)
            mask = visible(document, branch, last=len(alive))
            hidden = read(fed, batch["position_ids"][..., own] + step, mask, cache)
    return answers
