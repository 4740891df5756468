"""From examples to prompt trees; whatever would be trained or asked wrongly is refused here, before any step."""

import functools

import common

once = functools.lru_cache(2**12)  # the same questions are asked about many images
decode = once(lambda tokenizer, _size, *ids: tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def build_trees(examples: list, task) -> tuple[list[common.Prompt], dict[str, str]]:
    """The trees of examples, all of them checked; and {an example's `where`: why it cannot be used}.

    Questions share a tree where their prefixes and media, as the task shows them, are equal (--share-prefix).
    """
    trees, faults, prefixes = {}, {}, {}  # a prefix of 576 placeholders is in memory once, not for each image
    branch = once(lambda *lists: tuple(map(list, lists)))  # and a question that is asked again
    refuse = once(lambda texts, ids: refuse_tokens(task.tokenizer, texts, ids))
    for example in examples:
        try:
            placeholders = task.placeholders(example)
            refuse(tuple(task.texts(example)), tuple(placeholders))
            if None in placeholders:  # a fault of the checkpoint, listed already
                continue
            prefix, input_ids, labels = task.encode(example, example.answer)
            check_example(example, task, prefix, input_ids, labels)
            refuse_long(example, task, prefix, input_ids, labels)
        except ValueError as error:
            faults[example.where] = str(error)
            continue
        prefix, media = prefixes.setdefault(tuple(prefix), prefix), task.media(example)
        key = (id(prefix), repr(media)) if prefix and task.args.share_prefix else example.id
        if key not in trees:
            trees[key] = common.Prompt(prefix, [], [], media, task.positions(example, prefix))
        trees[key].branches.append(branch(tuple(input_ids), tuple(labels)))
        trees[key].ids.append(example.id)
    return list(trees.values()), faults


def refuse_tokens(tokenizer, texts: tuple[str, ...], placeholders: tuple) -> None:
    """Raise ValueError where a text holds what the tokenizer would take for a placeholder, EOS or a sentinel."""
    added = tokenizer.added_tokens_decoder.items()  # not all of them: some are words, or runs of spaces
    for token in (*common.SENTINELS, *(token.content for i, token in added if token.special or i in placeholders)):
        for text in texts:
            if token in text:
                raise ValueError(f"the text contains {token!r}, which the model would read as a token; reword {text!r}")


def check_example(example, task, prefix: list[int], input_ids: list[int], labels: list[int]) -> None:
    """Raise ValueError unless exactly answer + EOS is supervised and there are as many placeholders as features."""
    decoded = decode(task.tokenizer, len(task.tokenizer), *common.supervised_tokens(labels)).lstrip()
    if decoded != example.answer + task.tokenizer.eos_token:
        raise ValueError(f"supervised would be {decoded!r}, not {example.answer + task.tokenizer.eos_token!r}")
    if labels[0] != common.IGNORE:  # before it another branch may stand
        raise ValueError("the branch's first token is supervised; begin it with prompt text")
    for token_id, count in task.placeholders(example).items():
        before, after = prefix.count(token_id), input_ids.count(token_id)
        if (before, after) != (count, 0):
            text = f"{count} features of its media for {before} placeholders (ID {token_id}), and {after} after these"
            raise ValueError(f"{text}; the ID is read from config.json, never computed")


def refuse_long(example, task, prefix: list[int], input_ids: list[int], labels: list[int]) -> None:
    """Raise ValueError where training needs more than --pack-tokens, or answering more positions than the model has."""
    length, remedy = len(prefix) + len(input_ids), task.remedy or "shorten the text"
    if length <= task.args.pack_tokens and task.max_positions is None:
        return
    of_media = sum(task.placeholders(example).values())
    if length > task.args.pack_tokens:
        text = f"{length} tokens, {of_media} of them of its media: more than --pack-tokens {task.args.pack_tokens}"
        raise ValueError(f"{text}; raise it or {remedy}")
    asked = next(i for i, label in enumerate(labels) if label != common.IGNORE)  # what it is answered from
    possible = [len(task.encode(example, candidate)[1]) for candidate in example.candidates or []]
    longest = len(prefix) + max(len(input_ids), asked + task.args.max_answer_tokens, *possible)
    if longest > task.max_positions:
        text = f"up to {longest} positions, {of_media} of them of its media: the language model has "
        raise ValueError(f"{text}{task.max_positions}; {remedy} or lower --max-answer-tokens")
