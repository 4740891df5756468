"""Examples become prompt trees, or are refused with the reason: questions share what they have in common, no more."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import load_demo
from tokenizers import AddedToken

from inputs.building import build_trees, refuse_tokens


@pytest.fixture(scope="module")
def loaded(demo_folder):
    return load_demo(demo_folder)


@pytest.fixture
def demo(loaded):
    """A task and args that a test may change."""
    task, args = copy.copy(loaded.task), copy.copy(loaded.args)
    task.args = args
    return SimpleNamespace(task=task, args=args, examples=loaded.examples)


@pytest.fixture
def asked(demo):
    """Two images with two questions each."""
    by_image = {}
    for example in demo.examples:
        by_image.setdefault(example.media[0], []).append(example)
    pairs = [examples[:2] for examples in by_image.values() if len(examples) > 1]
    return [*pairs[0], *pairs[1]]


def ids(trees) -> list[list[str]]:
    return [tree.ids for tree in trees]


def test_questions_of_an_image_share_a_tree_in_the_order_of_their_appearance(demo, asked):
    a, b, c, d = asked
    trees, faults = build_trees([c, a, b, d], demo.task)
    assert ids(trees) == [[c.id, d.id], [a.id, b.id]]
    assert [tree.media for tree in trees] == [c.media, a.media]
    assert faults == {}
    for tree in trees:
        for name, branch in zip(tree.ids, tree.branches, strict=True):
            example = next(e for e in asked if e.id == name)
            assert (tree.prefix, *branch) == demo.task.encode(example, example.answer)


def test_equal_prefixes_are_in_memory_once(demo, asked):
    trees, _ = build_trees(asked, demo.task)
    assert trees[0].prefix is trees[1].prefix and trees[0].media != trees[1].media


def test_without_sharing_each_question_has_a_tree(demo, asked):
    demo.args.share_prefix = False
    assert ids(build_trees(asked, demo.task)[0]) == [[example.id] for example in asked]


def test_the_same_files_shown_otherwise_are_no_tree_of_both(demo, asked):
    a, b, *_ = asked
    demo.task.media = lambda example: (example.media, example.id)  # such as six of eight frames
    assert ids(build_trees([a, b], demo.task)[0]) == [[a.id], [b.id]]


def test_an_example_that_cannot_be_used_is_named_and_takes_no_other_with_it(demo, asked):
    a, b, c, d = asked
    wrong = [replace(b, question="Is <image> <image>?"), replace(c, answer="a</s>b")]
    trees, faults = build_trees([a, *wrong, d], demo.task)
    assert ids(trees) == [[a.id], [d.id]]
    assert faults == {
        b.where: "the text contains '<image>', which the model would read as a token; reword 'Is <image> <image>?'",
        c.where: "the text contains '</s>', which the model would read as a token; reword 'a</s>b'",
    }


@pytest.mark.parametrize("token", ["<image>", "</s>", "<s>", "<unk>", "<|pad|>", "<ANS>", "</ANS>"])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: {"question": f"{text}, and {text}"},
        lambda text: {"answer": text},
        lambda text: {"candidates": ["yes", text]},
        lambda text: {"history": [["What is it?", text]]},
    ],
)
def test_no_text_may_hold_what_the_tokenizer_takes_for_a_token(demo, asked, token, change):
    example = replace(asked[0], **change(f"a {token} b"))
    trees, faults = build_trees([example], demo.task)
    assert trees == []
    assert faults[example.where].startswith(f"the text contains {token!r}, which the model would read as a token")


def test_added_words_are_no_tokens_to_refuse_and_placeholders_are_whatever_they_are(demo):
    tokenizer = copy.deepcopy(demo.task.tokenizer)
    tokenizer.add_tokens([AddedToken("polyp", special=False), AddedToken("[VIDEO]", special=False)])
    refuse_tokens(tokenizer, ("a polyp", "[VIDEO]"), ())
    with pytest.raises(ValueError, match=r"contains '\[VIDEO\]'"):
        refuse_tokens(tokenizer, ("a polyp", "a [VIDEO]"), (tokenizer.convert_tokens_to_ids("[VIDEO]"),))


def test_a_checkpoint_without_a_placeholder_gives_no_tree_and_no_fault_of_an_example(demo, asked):
    demo.task.image_id = None
    assert build_trees(asked, demo.task) == ([], {})


def test_an_example_that_is_not_supervised_as_it_should_be_is_a_fault(demo, asked):
    encode = demo.task.encode
    demo.task.encode = lambda example, answer: encode(example, answer + ".")
    trees, faults = build_trees(asked[:1], demo.task)
    answer = asked[0].answer
    assert trees == [] and faults == {asked[0].where: f"supervised would be '{answer}.</s>', not '{answer}</s>'"}


def lengths(demo, example) -> tuple[int, int]:
    """How long an example is, and what of it comes before its answer."""
    prefix, input_ids, labels = demo.task.encode(example, example.answer)
    given = next(i for i, label in enumerate(labels) if label != -100)
    return len(prefix) + len(input_ids), len(prefix) + given


def test_an_example_longer_than_a_packed_sequence_is_a_fault_with_a_remedy(demo, asked):
    example = asked[0]
    length, _ = lengths(demo, example)
    demo.args.pack_tokens = length
    assert len(build_trees([example], demo.task)[0]) == 1
    demo.args.pack_tokens = length - 1
    text = f"{length} tokens, 64 of them of its media: more than --pack-tokens {length - 1}; raise it or "
    assert build_trees([example], demo.task) == ([], {example.where: f"{text}show fewer images, or less text"})
    demo.task.remedy = "lower --frames"
    assert build_trees([example], demo.task)[1] == {example.where: f"{text}lower --frames"}


def test_an_answer_must_have_room_among_the_model_s_positions(demo, asked):
    example = replace(asked[0], candidates=None)
    length, given = lengths(demo, example)
    demo.args.max_answer_tokens = 50
    demo.task.max_positions = given + 50
    assert build_trees([example], demo.task)[1] == {}
    demo.task.max_positions = given + 49
    text = f"up to {given + 50} positions, 64 of them of its media: the language model has {given + 49}; "
    text += "show fewer images, or less text or lower --max-answer-tokens"
    assert build_trees([example], demo.task) == ([], {example.where: text})

    demo.args.max_answer_tokens = 1
    demo.task.max_positions = length
    assert build_trees([example], demo.task)[1] == {}
    longer = replace(example, candidates=["no", "a candidate that is longer than the answer by far"])
    assert "positions" in build_trees([longer], demo.task)[1][example.where]
    demo.task.max_positions = length - 1
    assert "positions" in build_trees([example], demo.task)[1][example.where]


def test_only_a_task_with_positions_of_its_own_has_its_candidates_encoded_by_the_check(demo, asked):
    encode, encoded = demo.task.encode, []
    demo.task.encode = lambda example, answer: encoded.append(answer) or encode(example, answer)
    example = replace(asked[0], candidates=["yes", "no"])
    build_trees([example], demo.task)
    assert encoded == [example.answer]
    demo.task.max_positions = 10_000
    build_trees([example], demo.task)
    assert encoded == [example.answer] * 2 + ["yes", "no"]
