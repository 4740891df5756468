"""Question types and candidates, told from the words of a question; each case is one that is easily told wrongly."""

import itertools
import json
from importlib import import_module
from pathlib import Path

import pytest

from inputs import show
from inputs.questions import allow_training_answers, answer_candidates, fields, question_type
from inputs.task import Example
from report.scoring import answerable, score_answer

TYPES = ["yes_no", "color", "size_numeric", "count_numeric", "mcq", "open_ended"]
# the published annotations of SurgViVQA-Audio, where they lie beside the project
ANNOTATIONS = Path(__file__).parents[3] / "shared" / "data" / "surgvivqa_audio"


MEDIA = {  # script -> what an entry needs beside question and answer
    "llava_med": {"image": "a.jpg"},
    "qwen2vl_sentinel": {"image": "a.jpg"},
    "surg_video_vqa": {"frames": ["a.jpg"], "video_id": "v"},
    "umbrella_mri": {"volume": "a.npy", "modality": "T1", "group": "s"},
    "video_plain_lm": {"video": "a.gif"},
}


# --- texts --------------------------------------------------------------------------------------------------


def faults_of(script: str, folder: Path, *entries: dict) -> list[str]:
    """What a script says of entries; of one that it reads, its question, answer, type and candidates."""
    asked = {"question": "What is it?", "answer": "red", **MEDIA[script]}
    entries = [entry if "conversations" in entry else {**asked, **entry} for entry in entries]
    (folder / "train.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    train = import_module(f"train_{script}")
    args = train.parse_arguments(["--model", "m", "--data", str(folder), "--out", "o"])
    examples, problems = train.read_examples(folder, args)
    found = {x.where: str(x) for x in problems}
    found |= {e.where: (e.question, e.answer, e.question_type, e.candidates) for e in examples}
    return [found[f"train.jsonl:{i}"] for i in range(1, len(entries) + 1)]


@pytest.mark.parametrize("script", MEDIA)
def test_what_is_no_text_is_a_fault_that_says_what_to_write(script, tmp_path):
    faults = {
        'answer must be a text, not the list \'["pink", "red"]\'; write "pink;red"': {"answer": ["pink", "red"]},
        'answer must be a text, not the object \'{"text": "pink"}\'; write a single text': {"answer": {"text": "pink"}},
        "answer must be a text, not the boolean 'true'; write \"yes\"": {"answer": True},
        "answer must be a text, not the boolean 'false'; write \"no\"": {"answer": False},
        "answer must be a text, not the list '[[1]]'; write a single text": {"answer": [[1]]},
        'question must be a text, not the list \'["Is it?"]\'; write "Is it?"': {"question": ["Is it?"]},
        'question must be a text, not the list \'["a", "b"]\'; write a single text': {"question": ["a", "b"]},
        "question must be a text, not the object": {"question": {"a": "b", "c": "d"}},
        'question_type must be a text, not the list \'["a"]\'; write "a"': {"question_type": ["a"]},
        "id must be a text, not the list": {"id": [7]},
        "each of answer_candidates must be a text, not the boolean": {"answer_candidates": ["red", True]},
        "answer_candidates must be a list of texts, none empty: 'red'": {"answer_candidates": "red"},
        "answer_candidates must be a list of texts, none empty: {'a': 'red'}": {"answer_candidates": {"a": "red"}},
    }
    found = faults_of(script, tmp_path, *faults.values())
    assert [text for text, line in zip(faults, found, strict=True) if text not in line] == []


@pytest.mark.parametrize("script", MEDIA)
def test_a_number_is_a_text_as_it_is_written(script, tmp_path):
    entries = [{"answer": 3}, {"answer": 2.0}, {"question": 5, "question_type": 1, "answer_candidates": ["red", 2]}]
    first, second, third = faults_of(script, tmp_path, *entries)
    assert first[1:2] == ("3",) and second[1:2] == ("2.0",) and third[:3] == ("5", "red", "1")
    assert third[3] == ["red", "2"]


@pytest.mark.parametrize("script", MEDIA)
def test_half_a_character_is_a_fault_wherever_it_stands(script, tmp_path):
    half = [
        {"question": "\ud83d?"},
        {"answer": "x\udc00"},
        {"id": "\ud800"},
        {"group": "\ud800"},
        {"question_type": "\ud800"},
    ]
    half += [{"answer_candidates": ["red", "\ud800"]}, {"history": [["\ud800", "x"]]}, {"\ud800": 1}]
    intact = {"question": "What? \U0001f600", "answer": "red \U0001f601"}
    *found, read = faults_of(script, tmp_path, *half, intact)
    assert [line for line in found if "half a character" not in line or not line.encode()] == []
    assert read[:2] == tuple(intact.values())


def test_texts_of_conversations_and_histories_are_no_lists(tmp_path):
    says = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": ["pink", "red"]}]
    fault, history, read = faults_of(
        "llava_med",
        tmp_path,
        {"image": "a.jpg", "conversations": says},
        {"history": [["How many?", [1]]]},
        {"image": "a.jpg", "conversations": [says[0], {"from": "gpt", "value": 1}]},
    )
    assert 'the answer\'s value must be a text, not the list \'["pink", "red"]\'; write "pink;red"' in fault
    assert "each text of history must be a text, not the list '[1]'; write \"1\"" in history
    assert read[1] == "1"


def test_faults_of_lists_of_any_length_have_one_cause():
    texts = []
    for answer in (["pink"], ["pink", "red", "it's"], [1, 2]):
        with pytest.raises(ValueError, match="must be a text") as caught:
            fields({"question": "What?", "answer": answer})
        texts.append(show.cause(str(caught.value)))
    assert len(set(texts)) == 1


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


# --- candidates, from training -----------------------------------------------------------------------------


def allowed(train: list[tuple[str, str]], question: str) -> list[str] | None:
    """The candidates of a question whose answer is not known, beside training's questions and answers."""
    made = []
    for i, (text, answer, split) in enumerate([*((*pair, "train") for pair in train), (question, "?x", "test")]):
        known = {"where": f"{split}.jsonl:{i}", "split": split, "id": str(i), "group": "g", "media": []}
        made.append(Example(**known, **fields({"question": text, "answer": answer})))
    allow_training_answers(made)
    return made[-1].candidates


OPTIONS = "Which? A) red B) pink C) white D) brown"


@pytest.mark.parametrize(
    ("answers", "candidates"),
    [
        (["B", "A", "D", "A"], ["A", "B", "C", "D"]),
        (["B.", "A.", "C.", "D.", "A"], ["A.", "B.", "C.", "D."]),
        (["(b)", "(a)"], ["(a)", "(b)", "C", "D"]),  # which training never gives
        (["pink", "Red"], ["Red", "pink", "white", "brown"]),
        (["B) pink", "A) red"], ["A) red", "B) pink", "C) white", "D) brown"]),
        (["B"] * 19 + ["red"], ["A", "B", "C", "D"]),  # one in twenty is a slip
        (["E", "none of these", "B) red"], ["red", "pink", "white", "brown"]),  # no option, or another's letter
        ([], ["red", "pink", "white", "brown"]),
    ],
)
def test_options_are_allowed_in_the_forms_in_which_training_answers(answers, candidates):
    train = [(f"Of picture {i}: {OPTIONS}", answer) for i, answer in enumerate(answers)]
    assert allowed(train, OPTIONS) == candidates
    for right in candidates:
        assert [score_answer(one, right, "mcq")["exact"] for one in candidates] == [one == right for one in candidates]


@pytest.mark.parametrize(
    "question", ["Which? (a) red (b) pink", "Which?\nA. red\nB. pink\nAnswer with the letter.", "Which? a) red b) pink"]
)
def test_letters_are_candidates_however_options_are_labelled(question):
    assert allowed([(question, "A"), (f"So, {question}", "B")], f"Now, {question}") == ["A", "B"]


def test_answers_that_are_none_of_their_candidates_are_said_with_type_and_example(capsys):
    def example(i: int, answer: str) -> Example:
        asked = fields({"question": OPTIONS, "answer": answer, "answer_candidates": ["x", "y"]})
        return Example(where=f"train.jsonl:{i}", split="train", id=str(i), group="g", media=[], **asked)

    show.print_unanswerable([example(i, "B" if i < 4 else "x") for i in range(10)])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("4 of 10 answers are none of their allowed ones; give or correct answer_candidates: ")
    assert line.endswith("'B' (train.jsonl:0, mcq) is none of x, y")
    show.print_unanswerable([*(example(i, "x") for i in range(39)), example(40, "B")])  # a small share
    assert capsys.readouterr().out == "" and not answerable(example(1, "B"))


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
