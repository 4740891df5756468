"""Question types and candidates, told from the words of a question; each case is one that is easily told wrongly."""

import itertools
import json
from pathlib import Path

import pytest

from inputs.questions import answer_candidates, question_type
from report.scoring import score_answer

TYPES = ["yes_no", "color", "size_numeric", "count_numeric", "mcq", "open_ended"]
# the published annotations of SurgViVQA-Audio, where they lie beside the project
ANNOTATIONS = Path(__file__).parents[3] / "shared" / "data" / "surgvivqa_audio"


# --- question types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "auxiliary",
    [
        "is",
        "are",
        "was",
        "were",
        "do",
        "does",
        "did",
        "has",
        "have",
        "had",
        "can",
        "could",
        "will",
        "would",
        "should",
        "may",
        "might",
        "must",
        "Isn't",
        "Aren’t",
        "Doesn't",
        "Can't",
        "Is",
        "IS",
    ],
)
def test_every_auxiliary_opens_a_yes_no_question(auxiliary):
    assert question_type(f"{auxiliary} the polyp seen?") == "yes_no"
    assert question_type(f"In this image, {auxiliary.lower()} the polyp seen?") == "yes_no"


@pytest.mark.parametrize(
    "question, expected",
    [
        # Kvasir-VQA
        ("Have all polyps been removed?", "yes_no"),
        ("Is this finding easy to detect?", "yes_no"),
        ("Is there a green/black box artifact?", "yes_no"),
        ("Is there text?", "yes_no"),
        ("Does this image contain any finding?", "yes_no"),
        ("What color is the abnormality? If more than one separate with ;", "color"),
        ("What color is the anatomical landmark? If more than one separate with ;", "color"),
        ("What is the size of the polyp?", "size_numeric"),
        ("How many polyps are in the image?", "count_numeric"),
        ("How many instrumnets are in the image?", "count_numeric"),
        ("Are there any abnormalities in the image? Check all that are present.", "open_ended"),
        ("Are there any instruments in the image? Check all that are present.", "open_ended"),
        ("Where in the image is the abnormality?", "open_ended"),
        ("What type of polyp is present?", "open_ended"),
        ("What type of procedure is the image taken from?", "open_ended"),
        # SurgViVQA
        ("When motion occurs, is the scope pushing forward?", "yes_no"),
        ("When motion occurs, does the scope pull backward?", "yes_no"),
        ("Can you clearly observe clean mucosa in these frames?", "yes_no"),
        ("Is the scope primarily advancing or withdrawing in this sequence?", "mcq"),
        ("Into which millimeter bracket does the lesion size fall?", "size_numeric"),
        ("In what screen quadrant does the lesion appear?", "open_ended"),
        ("How severe is the fluid-based occlusion?", "open_ended"),
        # lists
        ("Is the polyp pink, red, or white?", "mcq"),
        ("Is the polyp pink, red or white?", "mcq"),
        ("Is it a polyp or an ulcer?", "mcq"),
        ("Where is it? (a) upper-left (b) upper-right", "mcq"),
        ("Where is it? a) upper-left b) upper-right", "mcq"),
        ("Where is it? A. upper-left B. upper-right", "mcq"),
        ("How many polyps? A) 1; B) 2", "mcq"),
        ("What color is it? Pink, red, or white?", "mcq"),
        ("What is shown: a polyp, an ulcer or nothing?", "mcq"),
        ("When motion occurs, is the scope advancing or withdrawing?", "mcq"),
        ("Is the polyp in the upper or lower left?", "mcq"),
        # "or" that is no list of answers
        ("Is there a polyp or an ulcer?", "yes_no"),
        ("Are any polyps or ulcers visible?", "yes_no"),
        ("Does the image show a polyp or an ulcer?", "yes_no"),
        ("Is the polyp visible or not?", "yes_no"),
        ("Is the polyp 5 mm or larger?", "yes_no"),
        ("Is there a polyp? Answer yes or no.", "yes_no"),
        ("Is there a polyp? Yes or no?", "yes_no"),
        ("How many polyps or lesions are visible?", "count_numeric"),
        ("How many polyps, large or small, are visible?", "count_numeric"),
        ("In what quadrant or region does the lesion appear?", "open_ended"),
        # words in odd places
        ("What is the colour of the polyp?", "color"),
        ("Which color is the mucosa?", "color"),
        ("WHAT COLOUR IS IT", "color"),
        ("What is seen in the color image?", "open_ended"),
        ("Is the polyp colored?", "yes_no"),
        ("How large is the polyp?", "size_numeric"),
        ("How big is it?", "size_numeric"),
        ("What is the diameter?", "size_numeric"),
        ("What's the estimated diameter?", "size_numeric"),
        ("Give the number of polyps", "count_numeric"),
        ("What is the number of polyps?", "count_numeric"),
        ("Is the number of polyps above 2?", "yes_no"),
        ("Is the diameter larger than 2.5 mm?", "yes_no"),
        ("In which quadrant, if present, is the polyp?", "open_ended"),
        ("This is a colonoscopy. Is a polyp visible?", "yes_no"),
        ("Question: is a polyp visible?", "yes_no"),
        ("What do you see? Do not guess.", "open_ended"),
        ("is there a polyp", "yes_no"),
        ("  Is\n there a polyp? ", "yes_no"),
        ("Island of mucosa: where?", "open_ended"),
        ("Candida is visible where?", "open_ended"),
        ("Is E. coli seen?", "yes_no"),
        ("Select all that apply: (a) polyp (b) ulcer", "open_ended"),
    ],
)
def test_question_type(question, expected):
    assert question_type(question) == expected


@pytest.mark.parametrize("question", ["", "  ", None])
def test_an_empty_question_is_an_error(question):
    with pytest.raises(ValueError, match="empty question"):
        question_type(question)


# --- candidates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question, expected",
    [
        ("Where is it? (a) upper-left (b) upper-right", ["upper-left", "upper-right"]),
        ("Where is it? (a) upper-left, (b) upper-right, or (c) center?", ["upper-left", "upper-right", "center"]),
        ("Where? A) upper left; B) lower right", ["upper left", "lower right"]),
        ("Which? A. ulcerative colitis B. polyp C. E. coli", None),  # letters a, b, c, e: not read with certainty
        ("Which? A. ulcerative colitis B. polyp\nAnswer with one letter.", ["ulcerative colitis", "polyp"]),
        ("Size? (a) <5mm (b) 5-10mm (c) 2.5 mm", ["<5mm", "5-10mm", "2.5 mm"]),
        ("Visible? (a) yes (b) no", ["yes", "no"]),
        ("Is the polyp pink, red, or white?", ["pink", "red", "white"]),
        ("Is the polyp pink, red or white?", ["pink", "red", "white"]),
        ("Does the lesion move left, right, or up?", ["left", "right", "up"]),
        ("Is the polyp Pink or Red?", ["Pink", "Red"]),
        ("Is it a polyp or an ulcer?", ["polyp", "ulcer"]),
        ("Is it either flat or raised?", ["flat", "raised"]),
        ("Is the lesion upper-left or lower-right?", ["upper-left", "lower-right"]),
        ("Is the scope primarily advancing or withdrawing in this sequence?", ["advancing", "withdrawing"]),
        ("When motion occurs, is the scope advancing or withdrawing?", ["advancing", "withdrawing"]),
        ("What is it, a polyp or an ulcer?", ["polyp", "ulcer"]),
        ("What color is it? Pink, red, or white?", ["Pink", "red", "white"]),
        ("Which is it: ulcerative colitis, a polyp, or a scar?", ["ulcerative colitis", "polyp", "scar"]),
        # not certain, so no candidates
        ("Is it a flat polyp or an ulcer?", None),
        ("Is the polyp in the upper or lower left?", None),
        ("Is it normal mucosa, a polyp, or ulcerative colitis?", None),
        ("Which one? (a) (b)", None),
        ("Which one: polyp, , or ulcer?", None),
    ],
)
def test_mcq_candidates(question, expected):
    assert answer_candidates(question, "mcq") == expected


@pytest.mark.parametrize("type", TYPES)
def test_candidates_of_a_question_without_options(type):
    expected = ["yes", "no"] if type == "yes_no" else None
    assert answer_candidates("Where is it?", type) == expected


@pytest.mark.parametrize("question", ["Is it pink, red, or white?", "Where? A) left B) right"])
def test_every_candidate_is_right_for_itself_only(question):
    options = answer_candidates(question, question_type(question))
    for prediction, answer in itertools.product(options, options):
        assert score_answer(prediction, answer, "mcq")["exact"] == (prediction == answer)


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the SurgViVQA annotations are not here")
def test_types_of_the_real_surgical_questions():
    files = sorted(ANNOTATIONS.glob("*.jsonl"))
    lines = [json.loads(text) for file in files for text in file.read_text(encoding="utf-8").splitlines()]
    yes_no = [line for line in lines if line["short_answer"] in ("yes", "no")]
    missed = {line["question"] for line in yes_no if question_type(line["question"]) != "yes_no"}
    others = [line for line in lines if line["short_answer"] not in ("yes", "no")]
    wrongly = {line["question"] for line in others if question_type(line["question"]) == "yes_no"}
    assert len(yes_no) > 2000 and not missed and not wrongly
    for line in lines:
        assert score_answer(line["short_answer"], line["short_answer"], question_type(line["question"]))["exact"]
        candidates = answer_candidates(line["question"], question_type(line["question"]))
        assert candidates is None or line["short_answer"] in candidates, line["question"]
