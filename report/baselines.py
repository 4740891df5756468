"""What can be answered without seeing anything: the baselines that a result must beat, from training answers alone."""

import functools
import math
from collections import Counter, defaultdict

import numpy as np

from inputs.task import MARK
from report.scoring import answer_label, is_number, normalise, number_said


def blind_answers(train: list, asked: list) -> list[dict[str, str]]:
    """For each example asked what can be answered without seeing anything, {baseline: answer}, from training alone.

    An answer is the most frequent in training to questions of the same "type"; to the same "question", in these words
    after the same turns, or else in these words; to the "nearest" question, whose words and those of its turns, each
    weighted by how rare it is (idf), have the highest cosine. Where that was never asked, or shares no word with any,
    it is the question's, or the type's; of a type that training does not have, the most frequent of all. Where an
    example has candidates, only these are guessed, the type's by the answers to it or by the place where right ones
    stand, whichever is more frequent. Of what is equally frequent the first is taken. {} without training.
    """
    if not train:
        return [{} for _ in asked]
    label = functools.cache(answer_label)  # "Yes" and "yes." are one answer, spelt as it mostly is
    by_type, by_text, by_question, places, spelt = (defaultdict(Counter) for _ in range(5))
    everything = Counter()
    for example in train:
        # shared forms first: of equally frequent ones the first is taken, and an example's own wording fits it alone
        forms = [*example.also_right, example.answer]
        labels = list(dict.fromkeys(map(label, forms)))
        kind, text, question = described(example)
        for counter in (by_type[kind], by_text[text], by_question[question], everything):
            counter.update(labels)
        places[kind].update([i for i, option in enumerate(example.candidates or ()) if label(option) in labels][:1])
        for form in forms:
            spelt[label(form)][form] += 1

    def guess(counter: Counter, candidates: tuple, otherwise: str, places: Counter | None = None) -> str:
        if not candidates:
            answer = max(counter, key=counter.get, default=None)
            return max(spelt[answer], key=spelt[answer].get, default=otherwise)
        often = [max(counter[label(option)], places[i] if places else 0) for i, option in enumerate(candidates)]
        return candidates[often.index(max(often))] if any(often) else otherwise

    known = [(*described(example), tuple(example.candidates or ())) for example in asked]
    similar = nearest(list(by_text), list({text for _, text, _, _ in known} - by_text.keys()))
    found = {}
    for kind, text, question, candidates in set(known):
        near = sum((by_text[other] for other in similar.get(text, [])), Counter())
        of_type = guess(by_type.get(kind, everything), candidates, "".join(candidates[:1]), places[kind])
        same = guess(by_text[text], candidates, guess(by_question[question], candidates, of_type))
        near = guess(near, candidates, same)
        found[kind, text, question, candidates] = {"type": of_type, "question": same, "nearest": near}
    return [found[key] for key in known]


def number_medians(train: list) -> dict[str, float]:
    """{a type whose answers are numbers: the median of its training answers}, which has the least absolute error."""
    numbers = defaultdict(list)
    for example in train:
        if is_number(example.question_type) and (said := number_said(example.answer)):
            numbers[example.question_type].append(said[0])
    return {kind: float(np.median(found)) for kind, found in numbers.items()}


def described(example) -> tuple[str, str, str]:
    """An example's type; its earlier turns, pairs or as a chat template has them, with its question; the last alone."""
    turns = [[p.get("text", "") for p in t["content"]] if isinstance(t, dict) else t for t in example.history]
    texts = [*(text for turn in turns for text in turn), example.question]  # each alone: later examples have them again
    *said, question = (" ".join(normalise(text).replace(MARK, " ").split()) for text in texts)  # marks tell nothing
    return example.question_type, " ".join([*said, question]), question


def nearest(texts: list[str], unseen: list[str]) -> dict[str, list[str]]:
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
