"""The blind baselines: what training answers say of a question whose image nobody has seen."""

from types import SimpleNamespace

import numpy as np
import pytest

from report.baselines import blind_answers
from report.results import add_baselines
from report.scoring import normalise, score


def test_the_baselines_are_what_training_says_without_an_image():
    train = [("yes_no", "Is there a polyp?", [answer]) for answer in ("no", "no", "no", "yes")]
    train += [("yes_no", "Is there any blood?", ["yes"]), ("color", "What color is the polyp?", ["pink"])]
    asked = [("yes_no", "Is there a polyp"), ("yes_no", "is there any BLOOD?"), ("yes_no", "Any red blood at all?")]
    asked += [("color", "Which shade?"), ("mcq", "Is there a polyp?"), ("mcq", "Where?")]
    assert blind_answers(train, asked) == [
        {"type": "no", "question": "no", "nearest": "no"},
        {"type": "no", "question": "yes", "nearest": "yes"},  # the words count, not case and punctuation
        {"type": "no", "question": "no", "nearest": "yes"},  # never asked: its type's, and of the one about blood
        {"type": "pink", "question": "pink", "nearest": "pink"},  # no word in common with any
        {
            "type": "no",
            "question": "no",
            "nearest": "no",
        },  # a type that training does not have: of all the most frequent
        {"type": "no", "question": "no", "nearest": "no"},
    ]
    assert blind_answers([], asked) == [{}] * 6  # without training nothing is known, which is not 0 %


def test_a_baseline_counts_answers_that_are_the_same_together():
    """30 "Yes", 30 "yes." and 40 "no": whoever guesses says yes."""
    train = [("t", "Is it?", [answer]) for answer in [*["Yes"] * 30, *["yes."] * 29, *["no"] * 40]]
    train += [("s", "Which?", [answer]) for answer in ("red; pink", "pink;red", "pink;red", "red", "red")]
    said = blind_answers(train, [("t", "Is it?"), ("s", "Which?")])
    assert [answers["type"] for answers in said] == ["Yes", "pink;red"]


def test_every_form_of_a_training_answer_is_counted():
    train = [("a", "Is it moving?", ["no", sentence]) for sentence in ("No, it is not.", "No, it stays.")]
    assert blind_answers(train, [("a", "Is it moving?")])[0]["type"] == "no"


def test_rare_words_decide_which_question_is_nearest():
    train = [("t", f"Is there a {thing} in the image?", [thing]) for thing in ("polyp", "clip", "snare", "tattoo")]
    assert blind_answers(train, [("t", "In the image is there not a snare?")])[0]["nearest"] == "snare"
    # sklearn's TfidfVectorizer with the same weights agrees on which is nearest
    text = pytest.importorskip("sklearn.feature_extraction.text")
    questions = [normalise(question) for _, question, _ in train] + ["how large is the polyp", "what is the clip for"]
    train += [("t", question, [question]) for question in questions[4:]]
    vectors = text.TfidfVectorizer(binary=True, smooth_idf=False, token_pattern=r"\S+").fit(questions)
    for question in ("how many polyp", "the snare and the clip in it", "is the tattoo large", "what for"):
        near = (vectors.transform([normalise(question)]) @ vectors.transform(questions).T).toarray()[0]
        answers = {train[i][2][0] for i in np.flatnonzero(near > near.max() - 1e-9)}
        assert blind_answers(train, [("t", question)])[0]["nearest"] in answers


def test_forms_that_answers_share_are_counted_first():
    """Two sentences, each said once: the word that other answers have, too, is said for the type."""
    train = [example("No, as in 0.", ["no"]), example("Yes, as in 1.", ["yes"])]
    records = [{}]
    add_baselines(records, [example("No, as in 2.", ["no"])], train, score)
    assert records == [{"baselines": {"type": True, "question": True, "nearest": True}}]


def test_baselines_are_told_from_training_answers_alone():
    train, asked, records = [example("no", [])], [example("yes", []) for _ in range(3)], [{} for _ in range(3)]
    add_baselines(records, asked, train, score)
    assert records == [{"baselines": {"type": False, "question": False, "nearest": False}}] * 3


def example(answer: str, also_right: list[str]) -> SimpleNamespace:
    known = {"question_type": "yes_no", "question": "Is it moving?"}
    return SimpleNamespace(**known, answer=answer, also_right=also_right)
