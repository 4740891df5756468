"""Today's common.py without report figures, and what the fences give it: trees, their proof, answering."""
from dataclasses import replace  # noqa
from collections import defaultdict

import torch

from tokenizers import AddedToken

from _old import common as _old
from _old import qwen as _qwen

IGNORE, SENTINELS, Prompt = _old.IGNORE, _old.SENTINELS, _old.Prompt
Prompt.supervised = Prompt.learned
image_token_id, separate_pad_from_eos = _old.image_token_id, _old.separate_pad_from_eos
expand_placeholder, visible, supervised_loss = _old.expand_placeholder, _old.visible, _old.supervised_loss
train_only, add_lora, pack = _old.train_only, _old.add_lora, _old.pack
single_token_id = _old.single_token_id


def register_placeholder(tokenizer, token, token_id):
    _old.register_placeholder(tokenizer, token, token_id)
    return _old.single_token_id(tokenizer, token)


def encode_supervised(tokenizer, text, keep_sentinels=False):
    return _old.encode_supervised(tokenizer, text, keep_sentinels=keep_sentinels)


def image_token_in_template(tokenizer, config):
    """The ID of config.json's image token, which must be what the chat template writes for an image."""
    return _qwen.find_image_token(tokenizer, config)


def reserve_placeholder(tokenizer, tokens, config, known):
    """The ID of the second of three new tokens, such as Qwen2-Audio's, in rows that the embedding has to spare.

    It never grows for them, because new rows, drawn at random, would differ between training and answering. Raises
    ValueError where config.json has another ID (`known`), or there is no room.
    """
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    ids, rows = [single_token_id(tokenizer, token) for token in tokens], config.get_text_config().vocab_size
    if known not in (None, ids[1]):
        raise ValueError(f"the placeholder has the ID {known}, but the tokenizer has {tokens[1]} as {ids[1]}")
    if max(ids) >= rows:
        raise ValueError(f"the embedding of {rows} rows has no room for {', '.join(tokens)} (IDs {ids})")
    return ids[1]


def put_features(embeds, input_ids, token_ids, features, what="image"):
    """Features (n, width) at the n placeholders, which are of one ID or of several; raises unless equally many."""
    places = torch.isin(input_ids, torch.as_tensor(token_ids, device=input_ids.device))
    if int(places.sum()) != len(features):
        raise ValueError(f"{int(places.sum())} {what} placeholders for {len(features)} {what} features")
    return embeds.masked_scatter(places.unsqueeze(-1), features.to(embeds.dtype))


def train_in_float32(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def last_hidden(decoder, embeds, position_ids, mask, cache):
    """The decoder's last hidden states (1, T, width); with a cache, what it holds is not read again."""
    return decoder(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def grow_embeddings(lm, rows):
    """Room for new tokens. Their rows are the mean of the others, not drawn: the same whenever it is loaded."""
    from _old import plain

    plain.grow(lm, rows)


# ---- trees, each row proved -----------------------------------------------------------------------------------


def build_trees(rows, task):
    """A tree for all questions about the same media (or for each question); and {row: why it cannot be used}."""
    args, trees, faults = task.args, {}, {}
    for row in rows:
        try:
            placeholders = task.placeholders(row)
            refuse_tokens(task.tokenizer, task.texts(row), placeholders)
            if None in placeholders:  # the checkpoint's fault, already listed
                continue
            prefix, input_ids, labels = task.encode(row, row.answer)
            prove(row, task, prefix, input_ids, labels)
            refuse_long(row, task, prefix, input_ids, labels)
            length = len(prefix) + len(input_ids)
            if length > args.pack_tokens:
                text = f"{length} tokens, {sum(placeholders.values())} of them of its media: more than --pack-tokens "
                raise ValueError(f"{text}{args.pack_tokens}; raise it{task.remedy and ' or ' + task.remedy}")
        except ValueError as error:
            faults[row.where] = str(error)
            continue
        media = task.media(row)
        name = (tuple(prefix), repr(media)) if prefix and args.share_prefix else row.id
        if name not in trees:
            trees[name] = Prompt(prefix, [], [], media, task.positions(row, prefix))
        trees[name].branches.append((input_ids, labels))
        trees[name].ids.append(row.id)
    return list(trees.values()), faults


def refuse_tokens(tokenizer, texts, placeholders):
    """Raise ValueError where a text holds what the tokenizer would take for a placeholder, EOS or a sentinel.

    Only special tokens: some tokenizers have added ones that are words, or runs of spaces.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = [token.content for i, token in added if token.special or i in placeholders]
    for text in texts:
        for token in (*SENTINELS, *special):
            if token in text:
                raise ValueError(f"the text contains {token!r}, which the model would read as a token; reword {text!r}")


def refuse_long(row, task, prefix, input_ids, labels):
    """Raise ValueError where learning or answering could need more positions than the language model has."""
    given = next(i for i, label in enumerate(labels) if label != IGNORE)  # what it is answered from
    possible = [len(task.encode(row, candidate)[1]) for candidate in row.candidates or []]
    longest = len(prefix) + max(len(input_ids), given + task.args.max_answer_tokens, *possible)
    if task.max_positions is not None and longest > task.max_positions:
        text = f"up to {longest} positions, {len(prefix)} of them its media's; the language model has "
        raise ValueError(f"{text}{task.max_positions}; {task.remedy or 'shorten the text'} or lower --max-answer-tokens")


def prove(row, task, prefix, input_ids, labels):
    """Raise ValueError unless exactly answer + EOS is learned and placeholders equal features."""
    learned = [label for label in labels if label != IGNORE]
    decoded = task.tokenizer.decode(learned, clean_up_tokenization_spaces=False).lstrip(" ")
    if decoded != row.answer + task.tokenizer.eos_token:
        raise ValueError(f"learned would be {decoded!r}, not {row.answer + task.tokenizer.eos_token!r}")
    for token_id, count in task.placeholders(row).items():
        if token_id in input_ids:
            raise ValueError("a placeholder after the media's own")
        _old.check_placeholders(prefix, token_id, count)


def plan_run(prompts, args):
    """The optimizer steps of the whole run; a function of the seed alone, so that any step can be gone back to."""
    plan = []
    for epoch in range(args.epochs):
        plan += _old.plan_steps(prompts, args.questions_per_step, args.seed, epoch)
        if args.max_steps and len(plan) >= args.max_steps:
            return plan[: args.max_steps]
    return plan


# ---- answering ------------------------------------------------------------------------------------------------


@torch.no_grad()
def mean_loss(model, trees, task, run):
    """The mean over all learned tokens of the trees, which are divided over the ranks."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # loss, learned tokens
    with run.equal_passes(model):
        for row in run.packed(run.share(trees), task):
            with run.autocast():
                sums += torch.stack(model(row)).cpu()
    total, tokens = run.sum(sums).tolist()
    return total / tokens


def evaluate(model, trees, rows, task, run):
    """Answer and score every row; a record each, answered or not: `prediction`, `correct`, `relaxed`."""
    found = {}
    with run.equal_passes(model):
        mine = answer(model, run.share(trees), {row.id: row for row in rows}, task, run)
    for part in run.gather(mine):
        found.update(part)
    records = []
    for row in rows:
        answered = found.get(row.id, {"prediction": None})
        scored = task.score(answered["prediction"], row)
        known = {"id": row.id, "group": row.group, "media": row.media, "question_type": row.question_type}
        known |= {"question": row.question, "answer": row.answer, **answered}
        known |= {"candidates": row.candidates} if row.candidates else {}
        known |= {"also_right": row.also_right} if row.also_right else {}
        records.append({**known, "correct": scored["exact"], "relaxed": scored["relaxed"]})
    return records


@torch.no_grad()
def answer(model, trees, rows, task, run):
    """{row ID: {"prediction": text, "probabilities": {…} where candidates were scored}}"""
    model.eval()
    mode, tokenizer, limit = run.args.decode, task.tokenizer, run.args.max_answer_tokens
    branches = {}  # of each row with candidates, one for each
    for name in (name for tree in trees for name in tree.ids if mode != "free" and rows[name].candidates):
        branches[name] = [task.encode(rows[name], candidate)[1:] for candidate in rows[name].candidates]
    found = score_candidates(model, trees, rows, branches, task, run) if mode in ("score", "both") else {}
    scored, found = found, (found if mode == "score" else {})
    left = [tree.part(i for i, name in enumerate(tree.ids) if name not in found) for tree in trees]
    left = [_old.answering_prompt(tree) for tree in left if tree.ids]
    for packed in run.packed(left, task, shown="answering"):
        ids = [name for tree in packed["prompts"] for name in tree.ids]
        learned = [[[t for t in labels if t != IGNORE] for _, labels in branches.get(name, [])] for name in ids]
        tries = [_old.build_trie(answers) or None if mode == "trie" else None for answers in learned]

        def read(input_ids, position_ids, mask, cache, media=packed):
            # media belong to the first reading; afterwards they are in the cache
            return model.hidden(input_ids, position_ids, mask, cache, None if cache.get_seq_length() else media)

        with run.autocast():
            answers = _old.decode(read, model.lm_head, packed, tokenizer.eos_token_id, [limit] * len(ids), tries)
        for name, tokens in zip(ids, answers, strict=True):
            text, ended = tokenizer.decode(tokens, skip_special_tokens=True), tokens[-1] == tokenizer.eos_token_id
            found[name] = {**scored.get(name, {}), "prediction": text.strip(), "ended": ended}
    return found


def score_candidates(model, trees, rows, branches, task, run):
    """Every allowed answer as a branch of its own: the exact argmax, with probabilities."""
    asked = []
    for tree in trees:
        pairs = [(name, candidate) for name in tree.ids for candidate in rows[name].candidates or []]
        if pairs:
            asked.append(replace(tree, branches=[b for name in tree.ids for b in branches.get(name, [])], ids=pairs))
    scores = defaultdict(dict)
    for (name, candidate), log_prob in log_probabilities(model, asked, task, run).items():
        scores[name][candidate] = log_prob
    found = {}
    for name, by_candidate in scores.items():
        chances = torch.tensor(list(by_candidate.values()), dtype=torch.float64).softmax(0).tolist()
        probabilities = dict(zip(by_candidate, chances, strict=True))
        found[name] = {"prediction": max(probabilities, key=probabilities.get), "probabilities": probabilities}
    return found


@torch.no_grad()
def log_probabilities(model, trees, task, run):
    """{branch ID: the log-probability of all that is learned in it}"""
    model.eval()
    found = {}
    for packed in run.packed(trees, task):
        mask = visible(packed["document"], packed["branch"])
        with run.autocast():
            hidden = model.hidden(packed["input_ids"], packed["position_ids"], mask, media=packed)
            log_probs = _old.branch_log_probs(hidden, model.lm_head, packed)
        ids = [name for tree in packed["prompts"] for name in tree.ids]
        found |= dict(zip(ids, log_probs.tolist(), strict=True))
    return found
