"""What can be answered without seeing anything: the baselines that a result must beat, from training answers alone."""

import math
from collections import Counter, defaultdict

import numpy as np

from report.scoring import answer_label, normalise


def blind_answers(train: list[tuple], asked: list[tuple]) -> list[dict[str, str | None]]:
    """For each question what can be answered without seeing anything, {baseline: answer}, from training alone.

    `train` are (question type, question, its right answers), `asked` (question type, question). An answer is the most
    frequent in training to questions of the same "type"; to the same "question", in these words; to the "nearest"
    question, whose words, each weighted by how rare it is (idf), have the highest cosine. Where that was never asked,
    or shares no word with any, it is the type's; of a type that training does not have, the most frequent of all.
    Of answers that are equally frequent the one that was counted first is taken. {} without training.
    """
    if not train:
        return [{} for _ in asked]
    by_type, by_question = defaultdict(Counter), defaultdict(Counter)
    everything, spelt = Counter(), defaultdict(Counter)  # "Yes" and "yes." are one answer, spelt as it mostly is
    for kind, question, answers in train:
        labels = [answer_label(answer) for answer in answers]
        for counter in (by_type[kind], by_question[normalise(question)], everything):
            counter.update(labels)
        for label, answer in zip(labels, answers, strict=True):
            spelt[label][answer] += 1
    words = {question: normalise(question) for _, question in asked}
    similar = nearest(list(by_question), [text for text in set(words.values()) if text not in by_question])
    found = {}
    for kind, question in set(asked):
        of_type, same = by_type.get(kind, everything), by_question.get(words[question])
        near = sum((by_question[text] for text in similar.get(words[question], [])), Counter())
        counts = {"type": of_type, "question": same or of_type, "nearest": same or near or of_type}
        chosen = {name: spelt[most_frequent(counter)] for name, counter in counts.items()}
        found[kind, question] = {name: most_frequent(spellings) for name, spellings in chosen.items()}
    return [found[question] for question in asked]


def most_frequent(counter: Counter) -> str:
    return counter.most_common(1)[0][0]


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
