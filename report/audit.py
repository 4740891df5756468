"""The audit: a scorer is asked what must be wrong, before a figure of its is believed."""

from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

from inputs import show
from inputs.texts import read_text
from report.intervals import united
from report.scoring import answer_label, forms, option_text

MOST_PAIRS = 200_000
MOST_TOGETHER = 20  # answers given in one
MOST_LISTED = 200


def audit_scorer(right, examples: list, synonyms: list[list[str]] = ()) -> dict:
    """Ask a scorer what must be wrong; `failures` are what it called right.

    right(prediction, example) -> bool; None, which would leave the example out, is a failure, too. An example has id,
    question, answer, question_type, also_right and candidates. Of each type every two distinct answers are scored
    against each other. Those may be right that are the same after normalising, forms of one example's answer, or of one
    line of `synonyms`: counted as declared. For every example are scored nothing, spaces, "I don't know", the question
    itself, and different answers of its type in one. Of more than MOST_PAIRS pairs a regular part is scored: `pairs`
    says how many.
    """
    audit = Audit(right, examples, synonyms)
    audit.ask_pairs()
    audit.ask_probes(examples)
    found = {"answers": sum(map(len, audit.answers.values())), "pairs": audit.pairs, "declared": len(audit.same)}
    found |= {"same": audit.same[:MOST_LISTED], "probes": dict(audit.probes)}
    return found | {"failures": audit.failures[:MOST_LISTED], "failed": len(audit.failures)}


class Audit:
    """What is known of the answers of each question type, and what the scorer answered to what it was asked."""

    def __init__(self, right, examples: list, synonyms):
        self.right, self.pairs, self.same, self.failures, self.probes = right, 0, [], [], Counter()
        self.answers = defaultdict(dict)  # type -> answer -> an example that it is right for
        lines = [[answer_label(word) for word in line] for line in synonyms]
        alike = defaultdict(lambda: list(lines))  # type -> sets of labels that mean the same
        for example in examples:
            for form in forms(example):
                self.answers[example.question_type].setdefault(form, example)
            alike[example.question_type].append([answer_label(form) for form in forms(example)])
        self.meaning = {kind: united(sets) for kind, sets in alike.items()}  # type -> label -> number of its meaning

    def declared(self, prediction: str, example) -> bool:
        """Do the data say themselves that this is the example's answer?"""
        meaning = self.meaning[example.question_type]
        if meaning.get(answer_label(prediction)) == meaning[answer_label(example.answer)]:
            return True
        option = option_text(example.answer, example.candidates)  # "left" is enough for "(a) left"
        return example.question_type == "mcq" and answer_label(prediction) == answer_label(option)

    def ask(self, prediction: str, example, what: str) -> None:
        verdict = self.right(prediction, example)
        if verdict and self.declared(prediction, example):
            self.same.append([prediction, example.answer])
        elif verdict is None or verdict:
            called = "is left out" if verdict is None else "is called right"
            self.failures.append(f"{what} {called} where the answer is {example.answer!r}")

    def ask_pairs(self) -> None:
        """Every answer of a type against every other."""
        squares = sum(len(answers) ** 2 for answers in self.answers.values())
        step = max(1, -(-squares // MOST_PAIRS))  # of very many answers a regular part
        for kind, answers in self.answers.items():
            texts = list(answers)
            for i, true in enumerate(texts):
                for prediction in texts[i % step :: step]:
                    if prediction != true:
                        self.pairs += 1
                        self.ask(prediction, answers[true], f"{kind}: {prediction!r}")

    def ask_probes(self, examples: list) -> None:
        """What answers no question. Examples that a scorer cannot tell apart are tried once, and counted."""
        alike = defaultdict(list)
        for example in examples:
            alike[example.question_type, example.question, *forms(example)].append(example)
        different = defaultdict(dict)  # type -> meaning -> one answer of it
        for kind, answers in self.answers.items():
            different[kind] |= {self.meaning[kind][answer_label(text)]: text for text in answers}
        for (kind, *_), part in alike.items():
            example, own = part[0], self.meaning[kind][answer_label(part[0].answer)]
            others = [text for meaning, text in islice(different[kind].items(), MOST_TOGETHER) if meaning != own]
            # the right one in the middle: a text may be judged by how it begins, or by its conclusion
            together = [*others, example.answer, *others]
            tried = {"nothing": "", "spaces": " \n\t", "I don't know": "I don't know", "the question": example.question}
            tried |= {"all answers": " ".join(together), "all answers as a set": "; ".join(together)} if others else {}
            for name, prediction in tried.items():
                if not (answer_label(prediction) and self.declared(prediction, example)):
                    self.probes[name] += len(part)
                    self.ask(prediction, example, f"{example.id}: {name} ({prediction[:60]!r})")


def print_audit(audit: dict) -> None:
    """The audit's figures in a line, its failures in lines of their own."""
    for text in audit["failures"][:10]:
        print(show.shorten(f"scorer: {text}"))
    probes = f"{sum(audit['probes'].values())} x {', '.join(audit['probes'])}"
    text = f"{audit['pairs']} pairs of {audit['answers']} answers, {audit['declared']} declared the same"
    print(f"scorer: {text}; tried as answers: {probes}; {audit['failed']} wrongly called right")


def read_synonyms(path: Path | None) -> list[list[str]]:
    """A line for each set of answers that mean the same, separated by tabs or |."""
    if path is None:
        return []
    try:
        lines = read_text(path).splitlines()
    except ValueError as error:
        raise SystemExit(f"--synonyms {path}: {error}") from None
    return [[word.strip() for word in line.replace("|", "\t").split("\t")] for line in lines if line.strip()]
