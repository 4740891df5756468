"""Question types, candidates and scoring: every case here is an answer that a lenient scorer gets wrong."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import common
from common import (
    answer_candidates,
    normalise,
    question_type,
    results_table,
    score_answer,
    summarise,
)

TYPES = ["yes_no", "color", "size_numeric", "count_numeric", "mcq", "open_ended"]
# the published annotations of SurgViVQA-Audio, where they lie beside the project
ANNOTATIONS = Path(__file__).parent.parent.parent / "shared" / "data" / "surgvivqa_audio"

# Realistic Kvasir-VQA answers; no two of them mean the same.
VOCABULARY = """
yes; no; none; not relevant; normal; abnormal; polyp; polyps; ulcerative colitis; oesophagitis; barrett's
short-segment barrett's; colonoscopy; gastroscopy; capsule endoscopy; male; female; 0; 1; 2; 3; 4; 5
6; 10; 11; 16; 20; 21; <5mm; 5-10mm; 11-20mm; >20mm; pink; red; white; yellow; green; black; blue; grey
brown; orange
upper-left; upper-right; lower-left; lower-right; center; center-left; z-line; pylorus; cecum; ileum
hyperplastic; adenoma; adenocarcinoma; sigma; rectum; ascending; descending; paris ip; paris is; paris iia
biopsy forceps; metal clip; polyp snare; injection needle; tube
accessory tools; hemorrhoids; evidence of polyps
"""
VOCABULARY = [answer.strip() for line in VOCABULARY.strip().splitlines() for answer in line.split(";")]
VOCABULARY += ["pink;red", "pink;white", "5-10mm;11-20mm", "polyp;oesophagitis", "upper-left;center"]


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


# --- normalise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, ""),
        ("", ""),
        (" \t\n", ""),
        ("!?", ""),
        ("❌", ""),
        ("Yes.", "yes"),
        ("**Yes**", "yes"),
        ("YES\u200b", "yes"),
        ("ｙｅｓ", "yes"),
        ("\ufeffno", "no"),
        ("The Z-Line", "z line"),
        ("a polyp", "polyp"),
        ("polyp and the ulcer", "polyp and ulcer"),
        ("A", "a"),
        ("(a)", "a"),
        ("LA grade A", "la grade a"),
        ("theory", "theory"),
        ("anal", "anal"),
        ("Barrett’s", "barretts"),
        ("barrett's", "barretts"),
        ("lower_left", "lower left"),
        ("two", "2"),
        ("Twenty", "20"),
        ("zero", "0"),
        ("none", "none"),
        ("someone", "someone"),
        ("5-10mm", "5-10mm"),
        ("5 - 10 mm", "5-10mm"),
        ("5–10\u00a0mm", "5-10mm"),
        ("5 mm - 1 cm", "5mm-1cm"),
        ("> 20 mm", ">20mm"),
        ("≥20mm", ">=20mm"),
        ("≤ 5 mm", "<=5mm"),
        ("2.5", "2.5"),
        (".5 cm", ".5cm"),
        ("5.", "5"),
        ("1/2", "1/2"),
        ("50%", "50%"),
        ("≠5", "≠5"),
        ("five-ten mm", "5-10mm"),
        ("-5", "-5"),
        (2, "2"),
        ("नमस्ते", "नमस्ते"),  # vowel signs are no punctuation
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


# --- scores -------------------------------------------------------------------------------------------------

EVERYTHING = " ".join(VOCABULARY)


@pytest.mark.parametrize(
    "prediction, answer",
    [
        # nothing, or something that is no answer
        ("", "yes"),
        (" \n", "yes"),
        (None, "yes"),
        ("nan", "yes"),
        (float("nan"), "no"),
        ("?", "no"),
        (";", "no"),
        ("I don't know", "no"),
        ("Is there a polyp?", "polyp"),
        ("<ANS>yes</ANS>", "yes"),
        ("yes<|im_end|>", "yes"),
        # parts and wholes
        ("normal", "no"),
        ("no", "normal"),
        ("none", "no"),
        ("no", "none"),
        ("not", "no"),
        ("know", "no"),
        ("not yes", "yes"),
        ("yes no", "yes"),
        ("yes no", "no"),
        ("yes;no", "yes"),
        ("yes, no", "no"),
        ("y", "yes"),
        ("yesyes", "yes"),
        ("yes yes", "yes"),
        ("no, normal", "no"),
        ("¬yes", "yes"),
        ("polyps", "polyp"),
        ("female", "male"),
        ("male", "female"),
        ("abnormal", "normal"),
        ("not normal", "normal"),
        ("s", "yes"),
        ("left", "upper-left"),
        ("upper", "upper-left"),
        ("adeno", "adenoma"),
        (EVERYTHING, "yes"),
        (EVERYTHING, "polyp"),
        (EVERYTHING, "2"),
        (EVERYTHING, "<5mm"),
        (EVERYTHING, "pink;red"),
        (";".join(VOCABULARY), "yes"),
        (";".join(VOCABULARY), "pink;red"),
        (";".join(VOCABULARY), "11-20mm"),
        # sets
        ("pink", "pink;red"),
        ("pink;red", "pink"),
        ("pink;red;white", "pink;red"),
        ("pink red", "pink;red"),
        ("pink, red", "pink;red"),
        ("pink;white", "pink;red"),
        ("pink;pink", "pink;red"),
        ("pinkred", "pink;red"),
        (";;", "pink;red"),
        # labels
        ("(b) upper-left", "(a) upper-left"),
        ("A", "(a) upper-left"),
        ("B. A mass", "A"),
        ("(a)", "(b)"),
        ("(a) upper-left", "upper-left"),
        # numbers
        ("12", "1"),
        ("1", "12"),
        ("2.5", "25"),
        ("2 5", "2.5"),
        ("2/5", "2.5"),
        ("-2", "2"),
        ("2 3", "2"),
        ("2;3", "2"),
        ("20 mm 30 mm", "20 mm"),
        ("not 20 mm", "20 mm"),
        ("0", "no"),
        ("3", "2"),
        ("5", "6"),
        ("twenty-one", "20"),
    ],
)
@pytest.mark.parametrize("type", ["yes_no", "mcq", "color", "open_ended", "a_type_of_the_data_set"])
def test_wrong_answers(prediction, answer, type):
    assert score_answer(prediction, answer, type) == {"exact": False, "tolerant": False}


@pytest.mark.parametrize(
    "prediction, answer",
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        (" NO ", "no"),
        ("**no**", "no"),
        ("The polyp", "polyp"),
        ("a polyp", "Polyp"),
        ("upper left", "upper-left"),
        ("Upper‑Left", "upper-left"),
        ("Barrett’s", "barrett's"),
        ("red; pink", "pink;red"),
        ("pink;red", "Red ;PINK"),
        ("pink; red; pink", "red;pink"),
        ("pink;", "pink"),
        ("two", "2"),
        ("2", "two"),
        ("2.", "2"),
        (2, "2"),
        ("11–20 mm", "11-20mm"),
        ("≥ 20 mm", ">=20mm"),
        ("20 MM", "20mm"),
        ("five", 5),
        ("None", "none"),
        ("ﬁve", "5"),
    ],
)
@pytest.mark.parametrize("type", TYPES)
def test_right_answers(prediction, answer, type):
    assert score_answer(prediction, answer, type) == {"exact": True, "tolerant": True}


@pytest.mark.parametrize(
    "prediction, answer",
    [
        ("upper-left", "(a) upper-left"),
        ("(a) upper-left", "(a) upper-left"),
        ("Upper left", "A. upper-left"),
        ("upper-left", "a) upper-left"),
        ("mass", "A. A mass"),
        ("A", "(a)"),
        ("b", "B"),
    ],
)
def test_the_text_of_an_option_is_enough(prediction, answer):
    assert score_answer(prediction, answer, "mcq")["exact"]
    if answer not in ("(a)", "B") and prediction != answer:
        assert not score_answer(prediction, answer, "open_ended")["exact"]


@pytest.mark.parametrize(
    "prediction, answer, tolerant",
    [
        # the same size, written otherwise
        ("11 to 20mm", "11-20mm", True),
        ("1.1-2 cm", "11-20mm", True),
        ("1.1 cm - 2 cm", "11-20 mm", True),
        ("11-20", "11-20mm", True),
        ("> 2 cm", ">20mm", True),
        ("≥20mm", ">20mm", True),
        ("<0.5cm", "<5mm", True),
        ("<5", "<5mm", True),
        ("1.5cm", "15mm", True),
        ("15 millimeters", "15mm", True),
        ("15", "1.5 cm", True),
        ("5 mm to 1 cm", "5-10mm", True),
        ("10-20mm", "11-20mm", True),
        (".5 cm", "5mm", True),
        # one value
        ("20 mm", "20 cm", False),
        ("20 cm", "20 mm", False),
        ("2 cm", "20", True),
        ("16 mm", "15 mm", True),
        ("17mm", "15mm", False),
        ("55mm", "50mm", True),
        ("56mm", "50mm", False),
        ("20 mm or 30 mm", "20 mm", False),
        ("20 mm 20 cm", "20 mm", False),
        ("20;30", "20 mm", False),
        ("not 20 mm", "2 cm", False),
        ("200 mm", "20 mm", False),
        ("-20 mm", "20 mm", False),
        ("20 polyps", "20 mm", False),
        ("mm", "20 mm", False),
        # a value and a range
        ("15 mm", "11-20mm", True),
        ("1.1 cm", "11-20mm", True),
        ("11", "11-20mm", True),
        ("20", "11-20mm", True),
        ("10.9 mm", "11-20mm", False),
        ("21 mm", "11-20mm", False),
        ("20 mm", ">20mm", False),
        ("21mm", ">20mm", True),
        ("20 mm", "≥20mm", True),
        ("5 mm", "<5mm", False),
        ("5mm", "≤5mm", True),
        ("3 mm", "<5mm", True),
        ("99999", ">20mm", True),
        ("11-20mm", "15mm", False),
        (">20mm", "30mm", False),
        ("<5mm", "3mm", False),
        ("<1mm", "1mm", False),
        ("0-1mm", "1mm", False),
        # two ranges
        ("<5mm", ">5mm", False),
        ("5-10mm", "<5mm", False),
        ("5-10mm", "11-20mm", False),
        ("0-100mm", "11-20mm", False),
        ("12-18mm", "11-20mm", False),
        ("20-11mm", "11-20mm", False),
        (">0mm", ">20mm", False),
        (">20cm", ">20mm", False),
        ("11-20cm", "11-20mm", False),
        ("5-10-20mm", "5-10mm", False),
        (">5-10mm", "5-10mm", False),
        # sets
        ("11 to 20 mm; 0.5-1cm", "5-10mm;11-20mm", True),
        ("7mm; 15mm", "11-20mm;5-10mm", True),
        ("10mm;15mm", "5-20mm;10mm", True),
        ("15mm;16mm", "5-10mm;11-20mm", False),
        ("15mm", "5-10mm;11-20mm", False),
        ("7mm;15mm;30mm", "5-10mm;11-20mm", False),
        ("7mm; polyp", "5-10mm;11-20mm", False),
        ("7mm; unclear", "5-10mm; unclear", False),
        # no size at all
        ("", "<5mm", False),
        (None, "<5mm", False),
        ("small", "<5mm", False),
        ("not relevant", "<5mm", False),
        ("5mm", "not relevant", False),
        ("What is the size of the polyp?", "5mm", False),
        (EVERYTHING, "5mm", False),
    ],
)
def test_sizes(prediction, answer, tolerant):
    score = score_answer(prediction, answer, "size_numeric")
    assert score == {"exact": False, "tolerant": tolerant}
    assert score_answer(prediction, answer, "open_ended") == {"exact": False, "tolerant": False}


@pytest.mark.parametrize(
    "prediction, answer, tolerant",
    [
        ("2 polyps", "2", True),
        ("There are two polyps.", "2", True),
        ("2", "2 polyps", True),
        ("I see 0", "zero", True),
        ("2 polyps, 2", "2", True),
        ("3", "2", False),
        ("7", "8", False),
        ("2 polyps and 3 ulcers", "2", False),
        ("2-3", "2", False),
        ("<2", "2", False),
        (">2", "2", False),
        ("2.5", "2", False),
        ("2 mm", "2", False),
        ("2mm", "2", False),
        ("-2", "2", False),
        ("~2", "2", False),
        ("20%", "20", False),
        ("not 2", "2", False),
        ("2 or more", "2", False),
        ("more than 2", "2", False),
        ("at least two", "2", False),
        ("12", "2", False),
        ("no polyps", "0", False),
        ("none", "0", False),
        ("many", "2", False),
        ("", "0", False),
        (None, "0", False),
        ("0 1 2 3 4 5", "2", False),
        (EVERYTHING, "2", False),
        ("2", "2;3", False),
        ("polyp", "none", False),
    ],
)
def test_counts(prediction, answer, tolerant):
    assert score_answer(prediction, answer, "count_numeric") == {"exact": False, "tolerant": tolerant}


@pytest.mark.parametrize("answer", ["", " ", None, "nan", "NaN", " nan ", float("nan"), ";", "?", "...", "≥"])
@pytest.mark.parametrize("type", TYPES)
def test_a_row_without_an_answer_is_never_scored(answer, type):
    for prediction in (answer, "", "yes"):
        with pytest.raises(ValueError, match="the true answer is empty"):
            score_answer(prediction, answer, type)


@pytest.mark.parametrize("type", TYPES)
def test_each_answer_of_a_vocabulary_is_right_for_itself_only(type):
    assert len(VOCABULARY) >= 60 and len(VOCABULARY) == len(set(VOCABULARY))
    for prediction, answer in itertools.product(VOCABULARY, VOCABULARY):
        score = score_answer(prediction, answer, type)
        assert score["exact"] == (normalise(prediction) == normalise(answer)) == (prediction == answer), (
            prediction,
            answer,
        )
        assert score["tolerant"] or not score["exact"]
        if type != "size_numeric":  # there, 16 is a value inside 11-20mm
            assert score["tolerant"] == score["exact"], (prediction, answer)


@pytest.mark.parametrize(
    "prediction",
    [
        "1" * 5000,
        "1" * 5000 + "mm",
        "a;" * 5000,
        "(" * 5000,
        "\ud800",
        "-" * 5000,
    ],
)
@pytest.mark.parametrize("type", TYPES)
def test_no_prediction_stops_the_scoring(prediction, type):
    assert score_answer(prediction, "11-20mm;5-10mm", type) == {"exact": False, "tolerant": False}
    assert score_answer(prediction, "2", type) == {"exact": False, "tolerant": False}


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the SurgViVQA annotations are not here")
def test_types_of_the_real_surgical_questions():
    files = sorted(ANNOTATIONS.glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    yes_no = [row for row in rows if row["short_answer"] in ("yes", "no")]
    missed = {row["question"] for row in yes_no if question_type(row["question"]) != "yes_no"}
    others = [row for row in rows if row["short_answer"] not in ("yes", "no")]
    wrongly = {row["question"] for row in others if question_type(row["question"]) == "yes_no"}
    assert len(yes_no) > 2000 and not missed and not wrongly
    for row in rows:
        assert score_answer(row["short_answer"], row["short_answer"], question_type(row["question"]))["exact"]
        candidates = answer_candidates(row["question"], question_type(row["question"]))
        assert candidates is None or row["short_answer"] in candidates, row["question"]


# --- the table ----------------------------------------------------------------------------------------------


def record(kind, answer, prediction, group, blind=None):
    """As a script writes it; `blind` is what each floor says."""
    scored = score_answer(prediction, answer, kind)
    floors = {name: score_answer(text, answer, kind)["exact"] for name, text in (blind or {}).items()}
    known = {"question_type": kind, "answer": answer, "group": group, "floors": floors}
    return {**known, "correct": scored["exact"], "tolerant": scored["tolerant"]}


def test_missing_predictions_stay_in_the_denominator():
    records = [record("yes_no", "yes", p, i, {"type": "yes"}) for i, p in enumerate(["yes", None, "", "no"])]
    overall = summarise(records)["all"]
    assert (overall["n"], overall["exact"], overall["floors"]) == (4, 0.25, {"type": 1.0})
    assert overall["above_floor"] == -0.75


def test_the_floors_are_what_training_says_without_an_image():
    train = [("yes_no", "Is there a polyp?", [answer]) for answer in ("no", "no", "no", "yes")]
    train += [("yes_no", "Is there any blood?", ["yes"]), ("color", "What color is the polyp?", ["pink"])]
    asked = [("yes_no", "Is there a polyp"), ("yes_no", "is there any BLOOD?"), ("yes_no", "Any red blood at all?")]
    asked += [("color", "Which shade?"), ("mcq", "Is there a polyp?"), ("mcq", "Where?")]
    assert common.blind_answers(train, asked) == [
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
    assert common.blind_answers([], asked) == [{}] * 6  # without training nothing is known, which is not 0 %


def test_a_floor_counts_answers_that_are_the_same_together():
    """30 "Yes", 30 "yes." and 40 "no": whoever guesses says yes."""
    train = [("t", "Is it?", [answer]) for answer in [*["Yes"] * 30, *["yes."] * 29, *["no"] * 40]]
    train += [("s", "Which?", [answer]) for answer in ("red; pink", "pink;red", "pink;red", "red", "red")]
    said = common.blind_answers(train, [("t", "Is it?"), ("s", "Which?")])
    assert [answers["type"] for answers in said] == ["Yes", "pink;red"]


def test_every_form_of_a_training_answer_is_counted():
    train = [("a", "Is it moving?", ["no", sentence]) for sentence in ("No, it is not.", "No, it stays.")]
    assert common.blind_answers(train, [("a", "Is it moving?")])[0]["type"] == "no"


def test_rare_words_decide_which_question_is_nearest():
    train = [("t", f"Is there a {thing} in the image?", [thing]) for thing in ("polyp", "clip", "snare", "tattoo")]
    assert common.blind_answers(train, [("t", "In the image is there not a snare?")])[0]["nearest"] == "snare"
    # sklearn's TfidfVectorizer with the same weights agrees on which is nearest
    text = pytest.importorskip("sklearn.feature_extraction.text")
    questions = [normalise(question) for _, question, _ in train] + ["how large is the polyp", "what is the clip for"]
    train += [("t", question, [question]) for question in questions[4:]]
    vectors = text.TfidfVectorizer(binary=True, smooth_idf=False, token_pattern=r"\S+").fit(questions)
    for question in ("how many polyp", "the snare and the clip in it", "is the tattoo large", "what for"):
        near = (vectors.transform([normalise(question)]) @ vectors.transform(questions).T).toarray()[0]
        answers = {train[i][2][0] for i in np.flatnonzero(near > near.max() - 1e-9)}
        assert common.blind_answers(train, [("t", question)])[0]["nearest"] in answers


def test_the_best_floor_is_the_one_that_counts():
    blind = {"type": "no", "question": "yes", "nearest": None}
    records = [record("yes_no", "yes", "yes", 0, blind), record("yes_no", "no", "yes", 1, blind)]
    records += [record("yes_no", "yes", "no", 2, blind), record("mcq", "left", "left", 3, blind)]
    results = summarise(records)
    entry = results["types"]["yes_no"]
    assert entry["floors"] == {"type": 1 / 3, "question": 2 / 3, "nearest": 0.0} and entry["best_floor"] == "question"
    assert entry["above_floor"] == pytest.approx(1 / 3 - 2 / 3)
    assert results["macro"]["exact"] == (1 / 3 + 1.0) / 2 and results["all"]["exact"] == 2 / 4
    assert results["macro"]["floors"]["question"] == (2 / 3 + 0.0) / 2


def simulated(random, groups: int, right: float, cluster: float):
    """(values, groups): some nine questions a group, whose own rate of right answers spreads around `right`."""
    sizes = random.poisson(8, groups) + 1
    rates = random.beta(right / cluster, (1 - right) / cluster, groups)
    of = np.repeat(np.arange(groups), sizes)
    return (random.random(len(of)) < rates[of]).astype(float), of.tolist()


@pytest.mark.parametrize("groups", [15, 60])
def test_the_interval_covers_the_truth_only_when_whole_groups_are_resampled(groups):
    """1,000 data sets whose true rate is known. 95 % must hold it; question by question it is under 80 %."""
    random, covered, alone = np.random.default_rng(7), 0, 0
    for _ in range(1000):
        values, of = simulated(random, groups, right=0.7, cluster=0.5)
        low, high = common.clustered_interval(values, of, resamples=500)
        covered += low <= 0.7 <= high
        low, high = common.clustered_interval(values, list(range(len(of))), resamples=200)
        alone += low <= 0.7 <= high
    assert 930 <= covered <= 970
    assert alone < 800


@pytest.mark.parametrize("groups", [2, 5, 30])
@pytest.mark.parametrize("right", [0.5, 0.97, 0.99])
def test_the_interval_is_not_too_short_for_few_groups_or_near_100_percent(groups, right):
    """One question a group. Plain percentiles of 30 groups hold 97 % in only six of ten such data sets."""
    random = np.random.default_rng(3)
    found = [common.clustered_interval(random.random(groups) < right, list(range(groups)), 0, 500) for _ in range(300)]
    assert sum(low <= right <= high for low, high in found) >= 0.93 * 300
    low, high = common.clustered_interval([1] * groups, list(range(groups)))
    assert low < 1 - 0.05 ** (1 / groups) / groups and high == 1.0


@pytest.mark.parametrize("groups", [15, 60])
def test_the_interval_holds_near_100_percent_where_questions_go_wrong_together(groups):
    random = np.random.default_rng(11)
    found = [common.clustered_interval(*simulated(random, groups, 0.97, cluster=0.5), 0, 500) for _ in range(500)]
    assert sum(low <= 0.97 <= high for low, high in found) >= 0.88 * 500


def test_what_is_added_to_the_groups_is_worth_one_question_not_a_patient():
    """Of patients with 27 nearly independent questions each the interval is hardly wider than of single questions."""
    random = np.random.default_rng(5)
    values, of = (random.random(27 * 60) < 0.95).astype(float), np.repeat(np.arange(60), 27).tolist()
    (low, high), single = (common.clustered_interval(values, groups) for groups in (of, list(range(len(of)))))
    assert low < values.mean() < high and high - low < 1.4 * (single[1] - single[0])


def test_the_interval_of_a_difference_is_paired():
    """Two floors of the same share: where they are right on the same questions, the difference is nearly certain."""
    records = [record("t", "yes", "yes" if i % 2 else "no", i, {"type": "yes" if i % 2 else "no"}) for i in range(40)]
    low, high = summarise(records)["all"]["above_floor_interval"]
    assert -0.1 < low < 0 < high < 0.1
    crossed = [record("t", "yes", "yes" if i % 2 else "no", i, {"type": "no" if i % 2 else "yes"}) for i in range(40)]
    low, high = summarise(crossed)["all"]["above_floor_interval"]
    assert low < -0.2 and high > 0.2


def test_a_single_group_has_no_interval():
    records = [record("yes_no", "yes", "yes", "one", {"type": "no"}) for _ in range(5)]
    entry = summarise(records)["all"]
    assert entry["groups"] == 1 and entry["interval"] is None and entry["above_floor_interval"] is None
    assert "one group" in results_table(summarise(records))


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        summarise([])


def test_table_shows_the_floors_beside_each_figure():
    blind = {"type": "no", "question": "yes", "nearest": "no"}
    records = [record("yes_no", "yes", prediction, i, blind) for i, prediction in enumerate(["yes", "no"])]
    results = summarise(records)
    lines = results_table(results).splitlines()
    assert lines[1].split()[:2] == ["question", "type"] and "above best" in lines[1]
    interval = "{:.1%} – {:.1%}".format(*results["all"]["interval"])
    above = "{:+.1%} – {:+.1%}".format(*results["all"]["above_floor_interval"])
    shown = f"yes_no 2 50.0% {interval} 50.0% 0.0% 100.0% 0.0% -50.0% {above}"
    assert " ".join(lines[2].split()) == shown
    assert lines[3].startswith("all ") and lines[4].startswith("mean of types")
