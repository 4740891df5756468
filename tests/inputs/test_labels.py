"""Labels: which one a true answer names, never one that it denies; and in which words each is ranked."""

import json
import shutil
from types import SimpleNamespace

import pytest
from brain_scans import SMALL, conversation, edit, failures, load_demo, refused, run

import common
import train_umbrella_mri as script
from inputs import labels
from inputs.task import Task

SEX, SIDE = ["male", "female"], ["left", "right", "none"]
STAGE = ["cognitively normal", "mild dementia", "very mild dementia", "dementia"]


@pytest.fixture
def copy(mri_folder, tmp_path):
    return shutil.copytree(mri_folder, tmp_path / "demo")


def turn(split: str, answer: str, names=tuple(SEX), metadata=None, task="sex", number=[0]) -> script.Turn:  # noqa: B006
    """An example whose label is not settled yet."""
    number[0] += 1
    known = {"where": f"{split}.jsonl:{number[0]}", "split": split, "id": str(number[0]), "group": "s", "media": []}
    known |= {"question": "Which?", "answer": answer, "question_type": task, "candidates": None}
    label = labels.of_metadata(metadata, list(names))
    return script.Turn(**known, volumes=[], turns=[], labels=list(names), label=label)


def settled(answer: str, names: list[str], training: list[str], metadata=None) -> str | None:
    """The label of a test answer beside training answers in which `{}` stands for each label; None for a fault."""
    train = [turn("train", text.format(name), names) for text in training for name in names]
    asked = turn("test", answer, names, metadata)
    problems, _ = labels.settle([*train, asked], {})
    assert (
        (asked.label is not None) == (asked.candidates is not None) == (asked.where not in {p.where for p in problems})
    )
    return asked.label


# ---- which label an answer names ------------------------------------------------------------------------------

SENTENCES = [  # an answer, the labels, and the one that it means, if it means one
    ("The subject is female.", SEX, "female"),
    ("Female", SEX, "female"),
    ("MALE.", SEX, "male"),
    ("The males' brains differ", SEX, None),
    ("The subject is not male but female.", SEX, "female"),
    ("The subject is male rather than female", SEX, "male"),
    ("This isn't a female subject", SEX, None),
    ("It is male, not female.", SEX, "male"),
    ("Male or female?", SEX, None),
    ("Is it male? No.", SEX, None),
    ("Is it female? No, male.", SEX, "male"),
    ("No, it is male.", SEX, "male"),
    ("Female and male brains overlap; the answer is male.", SEX, "male"),
    ("Male brains are larger than female ones, therefore this subject is female.", SEX, "female"),
    ("Female. Male brains are larger.", SEX, "female"),
    ("The subject is female. Overall brain volume is smaller than in a male.", SEX, "female"),
    ("The subject is male with no visible lesion.", SEX, "male"),
    ("There is no atrophy, and the subject is male.", SEX, "male"),
    ("Males are larger, it could be male or female, therefore unclear", SEX, None),
    ("The answer is male or female", SEX, None),
    ("It can't be male", SEX, None),
    ("I don't think it is male", SEX, None),
    ("It is unlikely that the subject is male.", SEX, None),
    ("Male is unlikely.", SEX, None),
    ("Male is excluded.", SEX, None),
    ("ruled out: male", SEX, None),
    ("It is not true: male", SEX, None),
    ("The subject is not, however, male", SEX, None),
    ("", SEX, None),
    ("There is no lesion on the left, it lies on the right", SIDE, "right"),
    ("None", SIDE, "none"),
    ("Lesion: none.", SIDE, "none"),
    ("Side of the lesion: left.", SIDE, "left"),
    ("Right, the lesion is on the left.", SIDE, None),
    ("The subject is right-handed.", SIDE, None),
    ("very mild dementia", STAGE, "very mild dementia"),
    ("The diagnosis is mild dementia.", STAGE, "mild dementia"),
    ("Dementia", STAGE, "dementia"),
    ("Dementia is not present.", STAGE, None),
    ("Dementia was not found", STAGE, None),
    ("dementia: none", STAGE, None),
    ("No sign of mild dementia, dementia.", STAGE, None),
    ("does not have mild dementia, dementia or any other disorder", STAGE, None),
    ("I see no evidence of: dementia", STAGE, None),
    ("absence of dementia", STAGE, None),
    ("Free of dementia.", STAGE, None),
    ("The scan excludes dementia.", STAGE, None),
    ("Family history of dementia.", STAGE, None),
    ("pre-dementia", STAGE, None),
    ("abnormal", ["normal", "abnormal"], "abnormal"),
    ("The ventricles are larger than normal", ["normal", "abnormal"], None),
    ("The subject is not, in my view, impaired.", ["not impaired", "impaired"], None),
    ("There is no lesion.", ["lesion", "no lesion"], "no lesion"),
    ("There is a lesion.", ["lesion", "no lesion"], "lesion"),
    ("60-70 years", ["50-60 years", "60-70 years"], "60-70 years"),
    ("The subject is 60 – 70 years old", ["50-60", "60-70"], "60-70"),
    ("The subject is older than 60-70", ["50-60", "60-70"], None),
    ("Yes, it is.", ["yes", "no"], "yes"),
    ("No, it isn't.", ["yes", "no"], "no"),
    ("It is normal", ["yes", "no"], None),
    ("The scan is abnormal with no midline shift.", ["yes", "no"], None),
    ("I have no idea", ["yes", "no"], None),
    ("Yes or no? I would say no.", ["yes", "no"], None),
    ("The answer is yes.", ["yes", "no"], "yes"),
    ("Not sure.", ["yes", "no", "not sure"], "not sure"),
    ("The ventricles are larger than in the reference.", ["larger", "smaller"], "larger"),
    ("The subject is a healthy female without neurological disease.", SEX, "female"),
    ("The scan shows no signs of dementia and is cognitively normal.", STAGE, "cognitively normal"),
    ("Dementia seems unlikely.", STAGE, None),
    ("Dementia is very unlikely.", STAGE, None),
    ("Mild dementia or dementia is not present.", STAGE, None),
    ("It is unclear whether the subject is female", SEX, None),
    ("Negative for dementia.", STAGE, None),
    ("Nothing suggests dementia.", STAGE, None),
    ("The lesion is in the left hemisphere, hence the right arm is weak.", SIDE, None),
]
STATEMENTS = ["The subject is {}.", "{}", "The diagnosis is {}.", "Lesion: {}.", "The ventricles are {}."]


@pytest.mark.parametrize(("answer", "names", "meant"), SENTENCES)
def test_no_answer_is_read_to_a_label_that_it_denies(answer, names, meant):
    """Whatever it says, beside training of plain statements: the label that is meant, or a fault."""
    assert settled(answer, names, STATEMENTS) in (meant, None)
    assert settled(answer, names[::-1], STATEMENTS) == settled(answer, names, STATEMENTS)


def test_answers_in_words_that_training_has_for_two_labels_are_read():
    read = {answer for answer, names, _ in SENTENCES if settled(answer, names, STATEMENTS)}
    assert read == {
        *("The subject is female.", "Female", "MALE.", "None", "Lesion: none.", "very mild dementia", "Dementia"),
        *("The diagnosis is mild dementia.", "abnormal", "60-70 years", "Yes, it is.", "No, it isn't.", "Not sure."),
    }
    for answer, meant in {"they are FEMALE now": "female", "Sex: a male": None}.items():  # no other word, no fewer
        assert settled(answer, SEX, ["They are {} now."]) == meant


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ("It is female, smaller than a male brain.", SEX),  # a true answer must not leave any doubt
        ("The subject is not male.", SEX),
        ("The subject is a child.", SEX),
        ("There is atrophy and no lesion", ["yes", "no"]),
        ("No doubt, there is one", ["yes", "no"]),
    ],
)
def test_an_answer_in_doubt_is_a_fault_that_says_how_to_declare_it(answer, names):
    asked = turn("train", answer, names)
    (problem,), _ = labels.settle([turn("train", f"{x}.", names) for x in names] + [asked], {})
    assert asked.label is None and problem.where == asked.where
    assert f"does not name one of {', '.join(names)} in words that training has for two of them" in problem.text
    assert f'declare which it is, such as "metadata": {{"label": "{names[0]}"}}' in problem.text


def test_words_that_occur_with_one_label_alone_are_not_known_from_it():
    """However often: a label may always be denied in them."""
    denied = [turn("train", "Dementia was not found.", STAGE) for _ in range(9)]
    problems, _ = labels.settle([*denied, turn("train", "Mild dementia.", STAGE)], {})
    assert len(problems) == 9
    # nor from answers whose metadata names another label than they hold
    train = [turn("train", f"The subject is not {x}.", metadata={"label": y}) for x, y in (SEX, SEX[::-1])]
    (problem,), _ = labels.settle([*train, turn("train", "The subject is not male.")], {})
    assert "does not name one of male, female" in problem.text


def test_yes_and_no_are_labels_at_the_start_alone():
    names = ["yes", "no"]
    for answer, label in {
        "Yes": "yes",
        "no.": "no",
        "Yes, there is no lesion.": "yes",
        "No. It is normal": "no",
    }.items():
        assert settled(answer, names, ["{}"]) == label
    for answer in ("Nothing, no", "The scan shows no lesion", "Yes or no", "No idea", "Yes and no, it depends"):
        assert settled(answer, names, ["{}", "The scan shows {} lesion"]) is None
    assert settled("No lesion is there", names, ["{} lesion is there"]) == "no"


@pytest.mark.parametrize("field", ["label", "subject_label"])
def test_metadata_decides_where_it_names_a_label(field):
    answer = "Unlike the male reference, this subject is female."
    assert settled(answer, SEX, ["{}"]) is None
    assert settled(answer, SEX, ["{}"], {field: "Female"}) == "female"
    assert labels.of_metadata({"age": 7}, SEX) is labels.of_metadata(None, SEX) is None
    assert labels.of_metadata({"subject_label": "male"}, ["larger", "smaller"]) is None  # said of something else
    with pytest.raises(ValueError, match="metadata's label 'child' is none of male, female; correct it or the labels"):
        labels.of_metadata({"label": "child"}, SEX)


def test_metadata_that_contradicts_a_plain_answer_is_a_fault():
    train = [turn("train", f"The subject is {name}.") for name in SEX]
    asked = turn("test", "The subject is male.", metadata={"label": "female"})
    (problem,), _ = labels.settle([*train, asked], {})
    assert problem.where == asked.where and asked.label is None
    assert "'The subject is male.', but metadata's label 'female'; correct one of them" in problem.text


def test_every_answer_of_the_demo_is_read_without_its_metadata(mri_folder, copy):
    known = {example.id: example.label for example in load_demo(mri_folder).examples}
    for path in (copy / "data").rglob("*.json"):
        edit(path, metadata=...)
    assert {example.id: example.label for example in load_demo(copy).examples} == known


# ---- candidates -----------------------------------------------------------------------------------------------


def word(*train: tuple[str, str], test: tuple = (), worded=None, names=tuple(SEX)) -> tuple[list, dict]:
    """The settled examples of (answer, label) pairs, and what is kept with a checkpoint."""
    found = [turn("train", answer, names, {"label": label}) for answer, label in train]
    found += [turn("test", answer, names, {"label": label}) for answer, label in test]
    problems, kept = labels.settle(found, worded or {})
    assert problems == []
    return found, kept


def test_candidates_are_worded_as_in_training_and_alike_for_every_label(capsys):
    male = [("The subject is male.", "male")] * 3 + [("He is male indeed.", "male")] * 2
    female = [("Sex: female.", "female")] * 2 + [("The subject is female.", "female")]
    examples, kept = word(*male, *female, test=[("Certainly a female brain.", "female")])
    assert {tuple(e.candidates) for e in examples} == {("The subject is male.", "The subject is female.")}
    assert examples[-1].also_right == ["The subject is female.", "female"] and examples[0].also_right == ["male"]
    assert "labels, true in training: sex 5 male, 3 female\n" in capsys.readouterr().out
    two = [turn("train", "A male."), turn("train", "A female.", names=("female", "male"))]
    labels.settle(two, {})
    assert {tuple(e.candidates) for e in two} == {("A male.", "A female.")}
    # the same words answer again where training is not at hand, and whatever the order in which labels are listed
    later = [turn("test", "The subject is male."), turn("test", "A female.", ("female", "male"), {"label": "female"})]
    assert labels.settle(later, json.loads(json.dumps(kept))) == ([], kept)
    assert {tuple(e.candidates) for e in later} == {("The subject is male.", "The subject is female.")}
    # no words are shared by both labels: each label's own, most frequent
    yes = ("Yes, male.", "male")
    examples, _ = word(yes, ("A male.", "male"), yes, *[("No, female.", "female")] * 2)
    assert examples[0].candidates == ["Yes, male.", "No, female."]
    # of a label that training never names, the label; of answers that are all different, too: they say more than it
    examples, _ = word(yes, yes, test=[("No, female.", "female")])
    assert examples[1].candidates == ["Yes, male.", "female"]  # and never in words of the test split
    examples, _ = word(("A male of 35 years.", "male"), ("A female of 62 years.", "female"))
    assert examples[0].candidates == ["male", "female"]


# comparisons as they are published: half of them name the label of the reference, too
SAME = [
    "Based on comparison with the reference scan, this appears to be a {} subject. Similarities include volumes.",
    "This scan likely belongs to a {} subject. Key features align with the reference {} scan in volume.",
]
OTHER = [
    "Based on comparison with the {1} reference scan, this appears to be a {0} subject. Differences include volumes.",
    "This scan likely belongs to a {0} subject. Unlike the reference {1} scan, it is typical of {0} neuroanatomy.",
]


@pytest.mark.parametrize(
    ("same", "other", "before", "after"),
    [
        (SAME, OTHER, "This scan likely belongs to a ", " subject."),
        (["It is {}. It agrees with the reference."], ["It is {0}. It departs from the {1} one."], "It is ", "."),
        (["It agrees with the other. It is {}."], ["It departs from the {1} one. It is {0}."], "It is ", "."),
        (["Like the reference, it is {}."], ["Unlike the {1} reference, it is {0}."], "", ""),
        (["Like the reference, it is {}."] * 3, ["It departs from the {1} one."], "", ""),
    ],
)
def test_a_comparison_is_read_by_its_metadata_and_ranked_in_words_that_do_not_tell_what_is_the_same(
    same, other, before, after
):
    """Were "it agrees with the reference" ranked, the likeliest would be the reference's label, whatever is shown."""
    pairs = [(text.format(x, y), x) for text in same for x, y in (("male", "male"), ("female", "female"))]
    pairs += [(text.format(x, y), x) for text in other for x, y in (SEX, SEX[::-1])]
    pairs *= 30
    odd = [("The subject is female, no male.", "female")]  # one in a hundred and twenty decides nothing
    examples, _ = word(*pairs, *odd, test=pairs[:9])
    assert {tuple(e.candidates) for e in examples} == {tuple(before + label + after for label in SEX)}
    assert [example.label for example in examples] == [label for _, label in [*pairs, *odd, *pairs[:9]]]


def test_candidates_are_what_answers_have_in_common_whatever_explanation_follows():
    says = [("The subject is {0}. The brain weighs {1} g.", n) for n in range(1200, 1206)]
    examples, _ = word(*[(text.format(x, n + len(x)), x) for text, n in says for x in SEX])
    assert examples[0].candidates == ["The subject is male.", "The subject is female."]
    always = [(f"As the scan shows, yes. The subject is {x}. So it seems.", x) for x in SEX]  # the complete answer
    assert word(*always)[0][0].candidates == [answer for answer, _ in always]


def test_an_answer_in_doubt_that_limit_does_not_choose_is_no_fault(copy):
    for path in sorted((copy / "data/train").glob("*lesion_side.json"))[-2:]:
        entry = json.loads(path.read_text())
        entry["conversations"][-1]["content"] = "Left or right, who knows?"
        edit(path, conversations=entry["conversations"], metadata=...)
    args = script.parse_arguments(["--model", "m", "--data", "d", "--out", "o", "--limit", "5", *map(str, SMALL)])
    examples, problems = script.read_examples(copy / "data", args)
    assert len(examples) == 15 and problems == []
    args.limit = None
    assert len(script.read_examples(copy / "data", args)[1]) == 2


def test_labels_and_candidates_come_from_all_of_training_whatever_limit_chooses(mri_folder):
    every = {e.id: (e.label, e.candidates, e.also_right) for e in load_demo(mri_folder).examples}
    few = load_demo(mri_folder, "--limit", 3).examples
    assert len(few) == 9 and all((e.label, e.candidates, e.also_right) == every[e.id] for e in few)


def test_a_task_of_many_labels_is_described_in_one_short_line(capsys):
    names = [f"region number {i}" for i in range(40)]
    labels.settle([turn("train", name, names) for name in names], {})
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) <= 200 and "sex 1 region number 0, 1 region number 1" in line and line.endswith("…")


def test_a_text_is_compared_as_any_other_and_a_question_repeated_is_no_answer():
    examples, _ = word(*[(f"They are {x}.", x) for x in ("enlarged", "normal")], names=("enlarged", "normal"))
    task = Task(SimpleNamespace(), None)
    for text, right in {
        "They are enlarged.": True,
        "they are enlarged": True,
        "Enlarged": True,
        "They are normal.": False,
        "They are enlarged or normal.": False,
        "They may be enlarged.": False,
        "Say whether they are enlarged.": False,
        None: False,
    }.items():
        assert task.score(text, examples[0])["exact"] == right


# ---- which labels a task has ----------------------------------------------------------------------------------


def test_labels_are_two_or_more_and_differ():
    assert labels.read_flag("sex = male, female") == ("sex", SEX)
    for text in ("sex=male", "sex=male,Male ", "sex=male,", "sex"):
        with pytest.raises(ValueError, match="labels must be at least two, and differ"):
            labels.read_flag(text)


def test_labels_can_be_declared_for_conversations_that_declare_none(copy):
    for path in (copy / "data").rglob("*.json"):
        edit(path, answer_candidates=...)
    free = load_demo(copy)
    assert all(example.labels == [] and example.candidates is None for example in free.examples)
    flags = ["--labels", "lesion_side=left,right,none", "--labels", "ventricle_size=normal,enlarged"]
    labelled = load_demo(copy, *flags)
    edit(conversation(copy, "train", "lesion_side"), answer_candidates=["left", "right"])
    assert "1 fault" in refused(copy, copy / "out", *SMALL, "--check", *flags)
    (fault,) = failures(copy / "out")
    assert "answer_candidates ['left', 'right'] are not those of --labels; leave one of the two out" in fault
    unknown = refused(copy, copy / "out", *SMALL, "--check", "--labels", "lesionside=left,right,none")
    assert "--labels lesionside=…: no conversation is of this task" in unknown
    for example in labelled.examples:
        assert bool(example.labels) == (example.question_type in ("lesion_side", "ventricle_size"))
        assert example.label in (example.labels or [None])


# ---- a run ----------------------------------------------------------------------------------------------------


def test_what_names_both_labels_is_counted_wrong_never_dropped(mri_folder, tmp_path, monkeypatch):
    run(mri_folder, tmp_path / "first", *SMALL, "--max-steps", 1)
    said = ["left or right, normal or enlarged, larger or smaller", None, ""]
    answer = lambda model, trees, examples, *_: {x: {"prediction": said[i % 3]} for i, x in enumerate(examples)}  # noqa: E731
    monkeypatch.setattr(common, "answer", answer)
    flags = ["--resume", tmp_path / "first/checkpoints/step-00000001"]
    run(mri_folder, tmp_path / "out", *SMALL, "--eval-only", *flags)
    results = json.loads((tmp_path / "out/results.json").read_text())
    asked = len(list((mri_folder / "data/test").glob("*.json")))
    assert (results["micro"]["n"], results["micro"]["exact"]) == (asked, 0.0)
    assert {entry["balanced"] for entry in results["types"].values()} == {0.0}
