"""The blind baselines: what training answers say of a question whose image nobody has seen."""

from types import SimpleNamespace

import numpy as np
import pytest

from report.baselines import blind_answers
from report.results import add_baselines
from report.scoring import normalise, score


def example(question="Is it moving?", answer="no", kind="yes_no", also_right=(), history=(), candidates=None):
    known = {"question": question, "answer": answer, "question_type": kind, "also_right": list(also_right)}
    return SimpleNamespace(**known, history=list(history), candidates=candidates)


def blind(train: list, asked, baseline: str) -> str:
    """What a baseline answers to one example."""
    return blind_answers(train, [asked])[0][baseline]


def test_the_baselines_are_what_training_says_without_an_image():
    train = [example("Is there a polyp?", answer) for answer in ("no", "no", "no", "yes")]
    train += [example("Is there any blood?", "yes"), example("What color is the polyp?", "pink", "color")]
    asked = [example("Is there a polyp"), example("is there any BLOOD?"), example("Any red blood at all?")]
    asked += [example("Which shade?", kind="color"), example("Is there a polyp?", kind="mcq")]
    asked += [example("Where?", kind="mcq")]
    assert blind_answers(train, asked) == [
        {"type": "no", "question": "no", "nearest": "no"},
        {"type": "no", "question": "yes", "nearest": "yes"},  # the words count, not case and punctuation
        {"type": "no", "question": "no", "nearest": "yes"},  # never asked: its type's, and of the one about blood
        {"type": "pink", "question": "pink", "nearest": "pink"},  # no word in common with any
        {"type": "no", "question": "no", "nearest": "no"},  # a type that training does not have: of all
        {"type": "no", "question": "no", "nearest": "no"},
    ]
    assert blind_answers([], asked) == [{}] * 6  # without training nothing is known, which is not 0 %


def test_what_was_said_before_counts():
    """LLaVA's turns are pairs, UMBRELLA's what a chat template reads; "Sure?" alone says nothing."""

    def turns(text):
        said = [("user", "Is there a polyp?"), ("assistant", text)]
        return [{"role": role, "content": [{"type": "image"}, {"type": "text", "text": text}]} for role, text in said]

    for before in (lambda text: [("Is there a polyp?", text)], turns):
        train = [
            example("Sure?", answer, history=before(said)) for said, answer in (("I see one.", "yes"), ("No.", "no"))
        ]
        train += [example("Sure?", "maybe") for _ in range(3)]
        for baseline in ("question", "nearest"):
            assert blind(train, example("Sure?", history=before("I see one")), baseline) == "yes"
            assert blind(train, example("Sure?", history=before("No")), baseline) == "no"
        assert blind(train, example("Sure?", history=before("I see none at all, no.")), "nearest") in ("yes", "no")
        assert blind(train, example("Sure?", history=before("Perhaps")), "question") == "maybe"  # the question alone


def test_where_candidates_are_given_only_they_are_guessed():
    def which(*candidates, answer=""):
        return example(f"Which of {candidates}?", answer, "mcq", candidates=list(candidates))

    train = [which(*("abc"[:i]), "round", *"abc"[i:], answer="round") for i in (0, 1, 2, 3, 3)]
    train += [which(*("abc"[:i]), "oval", *"abc"[i:], answer="oval") for i in (0, 1, 2)]
    assert blind(train, which("x", "y", "oval", "round"), "type") == "round"
    assert blind(train, which("oval", "x"), "type") == "oval"
    assert blind(train, which("a", "b", "c", "y", "oval"), "nearest") == "oval"  # most words are those of "round", too
    unknown = [example("Where?", "left")]  # another type, another question: the first, which is chance
    assert blind_answers(unknown, [which("x", "y")]) == [{"type": "x", "question": "x", "nearest": "x"}]


def test_the_place_of_right_answers_among_the_candidates_counts():
    """The second is right wherever it stands in training, and no answer is frequent."""
    train = [
        example(f"Is it {i} or {i + 1}?", str(i + 1), "mcq", candidates=[str(i), str(i + 1)]) for i in range(20, 29)
    ]
    asked = example("Is it 7 or 8?", "8", "mcq", candidates=["7", "8"])
    assert blind_answers(train, [asked]) == [{"type": "8", "question": "8", "nearest": "8"}]


def test_a_baseline_counts_answers_that_are_the_same_together():
    """30 "Yes", 30 "yes." and 40 "no": whoever guesses says yes."""
    train = [example("Is it?", answer, "t") for answer in [*["Yes"] * 30, *["yes."] * 29, *["no"] * 40]]
    train += [example("Which?", answer, "s") for answer in ("red; pink", "pink;red", "pink;red", "red", "red")]
    said = blind_answers(train, [example("Is it?", kind="t"), example("Which?", kind="s")])
    assert [answers["type"] for answers in said] == ["Yes", "pink;red"]


def test_every_form_of_a_training_answer_is_counted():
    train = [example(answer=sentence, also_right=["no"]) for sentence in ("No, it is not.", "No, it stays.")]
    assert blind(train, example(), "type") == "no"


def test_rare_words_decide_which_question_is_nearest():
    train = [example(f"Is there a {thing} in the image?", thing) for thing in ("polyp", "clip", "snare", "tattoo")]
    assert blind(train, example("In the image is there not a snare?"), "nearest") == "snare"
    # sklearn's TfidfVectorizer with the same weights agrees on which is nearest
    text = pytest.importorskip("sklearn.feature_extraction.text")
    questions = [normalise(one.question) for one in train] + ["how large is the polyp", "what is the clip for"]
    train += [example(question, question) for question in questions[4:]]
    vectors = text.TfidfVectorizer(binary=True, smooth_idf=False, token_pattern=r"\S+").fit(questions)
    for question in ("how many polyp", "the snare and the clip in it", "is the tattoo large", "what for"):
        near = (vectors.transform([normalise(question)]) @ vectors.transform(questions).T).toarray()[0]
        answers = {train[i].answer for i in np.flatnonzero(near > near.max() - 1e-9)}
        assert blind(train, example(question), "nearest") in answers


def test_forms_that_answers_share_are_counted_first():
    """Two sentences, each said once: the word that other answers have, too, is said for the type."""
    train = [
        example(answer=text, also_right=[word]) for text, word in (("No, as in 0.", "no"), ("Yes, as in 1.", "yes"))
    ]
    records = [{}]
    add_baselines(records, [example(answer="No, as in 2.", also_right=["no"])], train, score)
    assert records == [{"baselines": {"type": True, "question": True, "nearest": True}}]


def test_baselines_are_told_from_training_answers_alone():
    train, asked, records = [example(answer="no")], [example(answer="yes")] * 3, [{} for _ in range(3)]
    add_baselines(records, asked, train, score)
    assert records == [{"baselines": {"type": False, "question": False, "nearest": False}}] * 3
