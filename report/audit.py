"""The audit: a scorer is asked what must be wrong, before a figure of its is believed."""

from collections import Counter, defaultdict
from functools import partial
from itertools import chain, islice

from inputs import show
from report.intervals import united
from report.scoring import answer_label, forms, is_number, number_pair, option_text

MOST_PAIRS = 200_000
MOST_TOGETHER = 20  # answers given in one
MOST_LISTED = 200


def audit_scorer(right, examples: list) -> dict:
    """Ask a scorer what must be wrong; `failures` are what it called right.

    right(prediction, example) -> bool; None, which would leave the example out, is a failure, too. Of each type every
    two distinct answers are scored against each other. Those may be right that are the same after normalising, or forms
    of one example's answer: counted as declared. For every example are scored nothing, spaces, "I don't know", the
    question, and other answers of its type in one. Of more than MOST_PAIRS pairs a regular part is: `pairs` counts it.
    """
    answers = defaultdict(dict)  # type -> answer -> an example that it is right for
    alike = defaultdict(list)  # type -> sets of labels that mean the same
    for example in examples:
        for form in forms(example):
            answers[example.question_type].setdefault(form, example)
        alike[example.question_type].append([answer_label(form) for form in forms(example)])
    meaning = {kind: united(sets) for kind, sets in alike.items()}  # type -> label -> number of its meaning
    tried, same, failures = Counter(), [], []
    for name, n, prediction, example, what in chain(pairs(answers), probes(examples, answers, meaning)):
        own = partial(declared, prediction, example, meaning[example.question_type])
        if name != "pairs" and answer_label(prediction) and own():
            continue
        tried[name] += n
        verdict = right(prediction, example)
        if verdict and own():
            same.append([prediction, example.answer])
        elif verdict is None or verdict:
            called = "is left out" if verdict is None else "is called right"
            failures.append(f"{what} {called} where the answer is {example.answer!r}")
    found = {"answers": sum(map(len, answers.values())), "pairs": tried.pop("pairs", 0), "declared": len(same)}
    found |= {"same": same[:MOST_LISTED], "probes": dict(tried)}
    return found | {"failures": failures[:MOST_LISTED], "failed": len(failures)}


def declared(prediction: str, example, meaning: dict) -> bool:
    """Do the data say themselves that this is the example's answer?"""
    if meaning.get(answer_label(prediction)) == meaning[answer_label(example.answer)]:
        return True
    numbers = is_number(example.question_type) and not example.candidates
    if pair := numbers and number_pair(prediction, example.answer):
        return pair[0] == pair[1]
    option = option_text(example.answer, example.candidates)  # "left" is enough for "(a) left"
    return example.question_type == "mcq" and answer_label(prediction) == answer_label(option)


def pairs(answers: dict):
    """Every answer of a type against every other: ("pairs", 1, prediction, example, what it is called)."""
    squares = sum(len(of_type) ** 2 for of_type in answers.values())
    step = max(1, -(-squares // MOST_PAIRS))  # of very many answers a regular part
    for kind, of_type in answers.items():
        texts = list(of_type)
        for i, true in enumerate(texts):
            others = (text for text in texts[i % step :: step] if text != true)
            yield from (("pairs", 1, text, of_type[true], f"{kind}: {text!r}") for text in others)


def probes(examples: list, answers: dict, meaning: dict):
    """What answers no question; examples that a scorer cannot tell apart are tried once, and counted."""
    alike = defaultdict(list)
    for example in examples:
        alike[example.question_type, example.question, *forms(example)].append(example)
    different = {kind: {meaning[kind][answer_label(x)]: x for x in of_type} for kind, of_type in answers.items()}
    for (kind, *_), part in alike.items():
        example, own = part[0], meaning[kind][answer_label(part[0].answer)]
        others = [text for number, text in islice(different[kind].items(), MOST_TOGETHER) if number != own]
        # the right one in the middle: a text may be judged by how it begins, or by its conclusion
        together = [*others, example.answer, *others]
        tried = {"nothing": "", "spaces": " \n\t", "I don't know": "I don't know", "the question": example.question}
        tried |= {"all answers": " ".join(together), "all answers as a set": "; ".join(together)} if others else {}
        for name, text in tried.items():
            yield name, len(part), text, example, f"{example.id}: {name} ({text[:60]!r})"


def print_audit(audit: dict) -> None:
    for text in audit["failures"][:10]:
        print(show.shorten(f"scorer: {text}"))
    tried = f"{sum(audit['probes'].values())} x {', '.join(audit['probes'])}"
    text = f"{audit['pairs']} pairs of {audit['answers']} answers, {audit['declared']} declared the same"
    print(f"scorer: {text}; tried as answers: {tried}; {audit['failed']} wrongly called right")
