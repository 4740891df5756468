"""Answering many questions side by side gives what transformers' generate gives for each alone; restricted answers
are always one of the allowed; candidate scores are exact."""

import math
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import load_demo
from transformers import LlavaForConditionalGeneration, MistralConfig, MistralModel

import common
import train_llava_med as script
from common import IGNORE, Prompt, answer, answering_prompt, decode, evaluate, log_probabilities, pack, visible
from inputs.task import Example

NEW_TOKENS = 12


# --- a real LLaVA against generate -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(demo_folder):
    """The demo's model, what reads its images, and its training trees."""
    data = load_demo(demo_folder)
    llava = LlavaForConditionalGeneration.from_pretrained(demo_folder / "model").eval()
    return script.LlavaMed(llava), data.read_media, data.trees


def answers_of(demo, trees, eos, max_tokens=4096) -> dict[str, list[int]]:
    """{question ID: tokens}, from packed sequences."""
    model, read_media, _ = demo
    found = {}
    for batch in pack([answering_prompt(t) for t in trees], max_tokens):
        read_once = read_media(batch["prompts"])

        def read(input_ids, position_ids, mask, cache, media=read_once):
            images = None if cache.get_seq_length() else media
            with torch.no_grad():
                return model.hidden(input_ids, position_ids, mask, cache, images)

        names = [name for prompt in batch["prompts"] for name in prompt.ids]
        answers = decode(read, model.lm_head, batch, eos, NEW_TOKENS)
        found |= dict(zip(names, answers, strict=True))
    return found


@torch.no_grad()
def generated(demo, trees, eos) -> dict[str, list[int]]:
    """{question ID: tokens} from transformers' generate, each question with an image of its own."""
    model, read_media, _ = demo
    same_length = defaultdict(list)  # read together without padding
    for prompt in map(answering_prompt, trees):
        pixel_values = read_media([prompt])["pixel_values"]
        for name, (ids, _) in zip(prompt.ids, prompt.branches, strict=True):
            same_length[len(ids)].append((name, prompt.prefix + ids, pixel_values))
    found = {}
    for batch in same_length.values():
        names, ids, pixels = zip(*batch, strict=True)
        output = model.vlm.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.ones(len(ids), len(ids[0]), dtype=torch.long),
            pixel_values=torch.cat(pixels),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        for name, tokens in zip(names, output[:, len(ids[0]) :].tolist(), strict=True):
            found[name] = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
    return found


@pytest.fixture(scope="module")
def hundred(demo):
    """Trees of at least 100 questions, and a token that ends some of their answers early."""
    trees, questions = [], 0
    for tree in demo[2]:
        if questions < 100:
            trees.append(tree)
            questions += len(tree.ids)
    free = answers_of(demo, trees, eos=-1)
    ends = defaultdict(list)  # token -> how many tokens each answer would have, were it the EOS
    for tokens in free.values():
        for token in set(tokens):
            ends[token].append(tokens.index(token) + 1)
    eos = max(ends, key=lambda token: (len(set(ends[token])), len(ends[token]), token))
    return trees, eos


def test_decode_is_token_for_token_what_generate_gives(demo, hundred):
    trees, eos = hundred
    answers = answers_of(demo, trees, eos, max_tokens=700)
    lengths = {len(tokens) for tokens in answers.values()}
    assert len(answers) >= 100
    assert len(lengths) > 2, "answers of different lengths, so that branches finish at different steps"
    assert NEW_TOKENS in lengths
    assert any(tokens[-1] == eos for tokens in answers.values())
    assert answers == generated(demo, trees, eos)


def test_an_answer_does_not_depend_on_its_neighbours(demo, hundred):
    trees, eos = hundred
    trees = [tree.part(range(5)) for tree in trees[:3]]
    together = answers_of(demo, trees, eos)
    alone = {}
    for tree in trees:
        for i in range(5):
            alone |= answers_of(demo, [tree.part([i])], eos)
    assert together == alone
    assert answers_of(demo, trees[::-1], eos) == together


def test_a_decoding_step_that_sees_its_neighbours_is_caught(demo, hundred, monkeypatch):
    trees, eos = hundred
    right = answers_of(demo, trees[:2], eos)

    def leaky(document, branch, last=None):
        return visible(document, branch) if last is None else torch.ones(1, 1, last, document.shape[1], dtype=bool)

    monkeypatch.setattr(common, "visible", leaky)
    assert answers_of(demo, trees[:2], eos) != right


@pytest.mark.parametrize("limit", [1, 5])
def test_decode_stops_at_the_limit(demo, limit):
    model, read_media, trees = demo
    (batch,) = pack([answering_prompt(trees[0].part(range(3)))], 4096)

    def read(input_ids, position_ids, mask, cache):
        images = None if cache.get_seq_length() else read_media(batch["prompts"])
        return model.hidden(input_ids, position_ids, mask, cache, images)

    assert [len(tokens) for tokens in decode(read, model.lm_head, batch, -1, limit)] == [limit] * 3


# --- what the model is given -----------------------------------------------------------------------------------


def test_answering_prompt_cuts_before_the_first_supervised_token():
    positions = torch.tensor([0, 1])
    branches = [([3, 4, 5, 2], [IGNORE, IGNORE, 5, 2]), ([6, 7, 2], [IGNORE, 7, 2])]
    cut = answering_prompt(Prompt([1, 9], branches, ["a", "b"], "image.jpg", positions))
    assert cut.branches == [([3, 4], [IGNORE, IGNORE]), ([6], [IGNORE])]
    assert (cut.prefix, cut.ids, cut.media) == ([1, 9], ["a", "b"], "image.jpg")
    assert cut.prefix_positions is positions
    assert branches[0] == ([3, 4, 5, 2], [IGNORE, IGNORE, 5, 2])  # the tree itself is as it was


# --- constrained answers ----------------------------------------------------------------------------------------

EOS = 2


def tiny_model(seed: int) -> SimpleNamespace:
    """A random language model without images."""
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=40, num_key_value_heads=1, initializer_range=0.7, **size)
    model = MistralModel(config).eval()

    def hidden(input_ids, position_ids, mask, cache=None, media=None):
        return common.last_hidden(model, model.embed_tokens(input_ids), position_ids, mask, cache)

    return SimpleNamespace(hidden=hidden, lm_head=torch.nn.Linear(16, 40, bias=False), eval=model.eval)


def bigram_model(chances: dict[int, dict[int, float]]) -> SimpleNamespace:
    """A model in which the next token depends on the last alone, with these probabilities."""
    logits = torch.full((10, 10), -1e4)
    for token, following in chances.items():
        for after, chance in following.items():
            logits[token, after] = math.log(chance)

    def hidden(input_ids, position_ids, mask, cache=None, media=None):
        if cache is not None:
            cache.update(*[torch.zeros(1, 1, input_ids.shape[1], 1)] * 2, 0)
        return torch.nn.functional.one_hot(input_ids, 10).float()

    return SimpleNamespace(hidden=hidden, lm_head=lambda hidden: hidden @ logits, eval=lambda: None)


def random_answers(draw) -> list[list[int]]:
    """Two to six allowed answers of one to seven tokens, of which one begins another."""
    few = range(int(torch.randint(1, 6, (), generator=draw)))
    answers = [torch.randint(3, 9, (int(torch.randint(1, 7, (), generator=draw)),), generator=draw) for _ in few]
    answers = [answer.tolist() for answer in answers]
    answers.append([*answers[0], 3])
    return [[*answer, EOS] for answer in answers]


def constrained(seed: int, limit: int) -> list[tuple[list[int], list[list[int]]]]:
    """(answer, allowed answers) of twelve branches in two trees of one sequence."""
    draw = torch.Generator().manual_seed(seed)
    model = tiny_model(seed)
    branches = [(torch.randint(3, 40, (1 + i % 4,), generator=draw).tolist(), [IGNORE] * (1 + i % 4)) for i in range(6)]
    trees = [Prompt([1, 10 + n, 20 + n], branches, [f"{n}{i}" for i in range(6)]) for n in range(2)]
    (batch,) = pack(trees, max_tokens=200)
    allowed = [random_answers(draw) for _ in range(12)]
    with torch.no_grad():
        answers = decode(model.hidden, model.lm_head, batch, EOS, limit, allowed)
    return list(zip(answers, allowed, strict=True))


@pytest.mark.parametrize("limit", [1, 64])
def test_a_constrained_answer_is_always_exactly_one_of_the_allowed(limit):
    decoded = [pair for seed in range(84) for pair in constrained(seed, limit)]
    assert all(answer in allowed for answer, allowed in decoded)
    assert max(len(answer) for answer, _ in decoded) > 4
    assert any(answer == allowed[0] for answer, allowed in decoded)  # one that begins another,
    assert any(answer == allowed[-1] for answer, allowed in decoded)  # and the other


def test_constrained_and_greedy_branches_share_a_sequence():
    model = tiny_model(0)
    branches = [([5 + i], [IGNORE]) for i in range(4)]
    (batch,) = pack([Prompt([1, 11], branches, list("abcd"))], max_tokens=50)
    allowed = [None, [[30, 31, 32, EOS]], [], [[33, EOS]]]
    with torch.no_grad():
        greedy = decode(model.hidden, model.lm_head, batch, EOS, 3)
        mixed = decode(model.hidden, model.lm_head, batch, EOS, 3, allowed)
    assert mixed == [greedy[0], [30, 31, 32, EOS], greedy[2], [33, EOS]]


def test_constrained_decoding_takes_the_likeliest_allowed_token():
    model = bigram_model({0: {5: 0.5, 6: 0.1, 7: 0.3, 8: 0.1}, 7: {EOS: 1.0}, 6: {EOS: 1.0}})
    (batch,) = pack([Prompt([1], [([0], [IGNORE])], ["a"])], max_tokens=10)
    assert decode(model.hidden, model.lm_head, batch, EOS, 9, [[[6, EOS], [7, EOS]]]) == [[7, EOS]]


# --- ranked candidates -----------------------------------------------------------------------------------------


def run_of(max_tokens: int, read_media=lambda trees: {}, **args) -> SimpleNamespace:
    """A run of one rank that packs all trees at once."""

    def packed(trees, task, shown=None):
        return ({**batch, **read_media(batch["prompts"])} for batch in pack(trees, max_tokens))

    return SimpleNamespace(
        args=SimpleNamespace(pack_tokens=max_tokens, **args),
        packed=packed,
        autocast=nullcontext,
        share=lambda trees: trees,
        gather=lambda found: [found],
        equal_passes=lambda model: nullcontext(),
    )


QUESTION, A, B, X, Y = 1, 5, 6, 7, 8
# greedy goes from the question to A (0.6), of which both ends are less likely (0.3) than B (0.4)
GREEDY_IS_WRONG = {QUESTION: {A: 0.6, B: 0.4}, A: {X: 0.5, Y: 0.5}, B: {EOS: 1}, X: {EOS: 1}, Y: {EOS: 1}}
CANDIDATES = [[A, X, EOS], [A, Y, EOS], [B, EOS]]


def test_ranking_finds_the_likeliest_answer_where_a_greedy_walk_does_not():
    model = bigram_model(GREEDY_IS_WRONG)
    (asked,) = pack([Prompt([3], [([QUESTION], [IGNORE])], ["q"])], max_tokens=10)
    assert decode(model.hidden, model.lm_head, asked, EOS, 9, [CANDIDATES]) == [[A, X, EOS]]
    branches = [([QUESTION, *answer], [IGNORE, *answer]) for answer in CANDIDATES]
    found = log_probabilities(model, [Prompt([3], branches, ["ax", "ay", "b"])], None, run_of(20))
    assert {name: math.exp(value) for name, value in found.items()} == pytest.approx({"ax": 0.3, "ay": 0.3, "b": 0.4})


def alone(model, trees) -> dict:
    """{branch ID: log-probability}, as log_probabilities, by a forward pass of transformers for every branch."""
    found = {}
    for prompt, media in trees:
        for name, (ids, labels) in zip(prompt.ids, prompt.branches, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt.prefix + ids]), **media).logits[0]
            log_probs = logits.log_softmax(-1)[len(prompt.prefix) - 1 :]  # t predicts the branch's token t
            found[name] = float(sum(log_probs[t, ids[t]] for t in range(len(ids)) if labels[t] != IGNORE))
    return found


def with_candidates(tree: Prompt, answers: list[list[int]]) -> Prompt:
    """The tree with each of `answers` as a candidate of each of its questions."""
    asked = list(zip(tree.ids, answering_prompt(tree).branches, strict=True))
    branches = [(ids + answer, [IGNORE] * len(ids) + answer) for _, (ids, _) in asked for answer in answers]
    return replace(tree, branches=branches, ids=[(name, i) for name, _ in asked for i in range(len(answers))])


@pytest.mark.parametrize("max_tokens", [150, 4096])  # candidates of a question in several sequences, and all in one
def test_log_probabilities_equal_separate_forward_passes(demo, max_tokens):
    model, read_media, trees = demo
    # several begin alike, one begins another, two are the same, and one has a token that is not supervised
    answers = [[8, 9, EOS], [8, EOS], [20, EOS], [8, 9, 30, EOS], [20, EOS], [*range(40, 60), EOS], [8, 31, EOS]]
    trees = [with_candidates(tree.part(range(3)), answers) for tree in trees[:3]]
    for tree in trees:
        tree.branches[0][1][-2] = IGNORE
    found = log_probabilities(model, trees, None, run_of(max_tokens, read_media))
    expected = alone(model.vlm, [(tree, read_media([tree])) for tree in trees])
    assert list(found) == list(expected) and len(found) == 3 * 3 * len(answers)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)
    if max_tokens == 4096:
        assert all(found[name, 2] == found[name, 4] for name, _ in found)


def test_what_candidates_begin_with_is_read_once():
    model, read = tiny_model(3), []
    hidden = model.hidden
    model.hidden = lambda input_ids, *rest, **more: read.append(input_ids.tolist()) or hidden(input_ids, *rest, **more)
    answers = [[30, 31, EOS], [30, EOS], [30, 31, 32, EOS], [33, EOS]]
    branches = [([question, 20, *x], [IGNORE, IGNORE, *x]) for question in (11, 10) for x in answers]
    log_probabilities(model, [Prompt([1, 9], branches, range(8))], None, run_of(100))
    assert read == [[[1, 9, 10, 20, 30, 31, 32, 33, 11, 20, 30, 31, 32, 33]]]  # and no EOS: nothing follows it


def test_candidates_without_a_prefix_have_their_probabilities():
    model, draw = tiny_model(4), torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 40, (3 + i % 3,), generator=draw).tolist() for i in range(12)]
    branches = [(x, [IGNORE, *x[1:]]) for x in ids]
    trees = [Prompt([], branches[:8], range(8)), Prompt([], branches[8:], range(8, 12))]
    one = log_probabilities(model, trees, None, run_of(60))
    for name, branch in enumerate(branches):
        [single] = log_probabilities(model, [Prompt([], [branch], ["x"])], None, run_of(60)).values()
        assert one[name] == pytest.approx(single, abs=1e-4)


def test_probabilities_of_all_answers_of_a_length_sum_to_one():
    """Brute force over every answer of two tokens: they are probabilities, and their argmax the best answer."""
    model = tiny_model(1)
    question = [1, 11, 5]
    answers = [(s, t) for s in range(40) for t in range(40)]
    branches = [([question[-1], *answer], [IGNORE, *answer]) for answer in answers]
    found = log_probabilities(model, [Prompt(question[:-1], branches, answers)], None, run_of(6000))
    best = {}
    with torch.no_grad():
        for s in range(40):  # the chain rule, a sequence for each first token
            ids = torch.tensor([[*question, s]])
            causal = visible(torch.ones_like(ids), torch.zeros_like(ids))
            log_probs = model.lm_head(model.hidden(ids, torch.arange(4)[None], causal))[0].log_softmax(-1)
            best |= {(s, t): float(log_probs[-2, s] + log_probs[-1, t]) for t in range(40)}
    assert sum(map(math.exp, found.values())) == pytest.approx(1.0, rel=1e-4)
    assert max(found, key=found.get) == max(best, key=best.get)


# --- the ways of answering -------------------------------------------------------------------------------------


LETTERS = {"a": A, "b": B, "x": X, "y": Y}


class Letters:
    """A task whose answers are letters, a token each, to questions that are all the same."""

    def __init__(self):
        self.tokenizer, self.encoded = SimpleNamespace(eos_token_id=EOS, decode=self.decode), 0

    def encode(self, example, answer):
        self.encoded += 1
        tokens = [*map(LETTERS.get, answer), EOS]
        return [3], [QUESTION, *tokens], [IGNORE, *tokens]

    def decode(self, tokens, skip_special_tokens):
        return "".join(letter for token in tokens for letter, named in LETTERS.items() if named == token)

    def score(self, prediction, example):
        return {"exact": prediction == example.answer, "relaxed": prediction in (example.answer, "ax")}


def letters(*candidates):
    """Five questions about two images, the last of which is free."""
    task = Letters()
    shared = {"where": "", "split": "test", "group": "g", "media": [], "question": "?", "question_type": "t"}
    examples = [
        Example(id=f"q{i}", answer="b", candidates=list(candidates) if i < 4 else None, **shared) for i in range(5)
    ]
    encoded = [task.encode(example, example.answer)[1:] for example in examples]
    trees = [Prompt([3], encoded[:3], ["q0", "q1", "q2"]), Prompt([3], encoded[3:], ["q3", "q4"])]
    task.encoded = 0
    return task, examples, trees


def answered(task, examples, trees, **args) -> dict[str, dict]:
    return answer(bigram_model(GREEDY_IS_WRONG), trees, {e.id: e for e in examples}, task, run_of(40, **args))


@pytest.mark.parametrize(
    ("mode", "expected"), [("greedy", "ax"), ("constrained", "ax"), ("ranked", "b"), ("both", "ax")]
)
def test_answers_are_greedy_constrained_or_ranked(mode, expected):
    task, examples, trees = letters("ax", "ay", "b")
    found = answered(task, examples, trees, decode=mode, max_answer_tokens=9)
    assert [found[e.id]["prediction"] for e in examples] == [expected] * 4 + ["ax"]  # the last has no candidates
    for name in ("q0", "q1", "q2", "q3"):
        chances = found[name].get("probabilities")
        if mode in ("ranked", "both"):
            assert chances == pytest.approx({"ax": 0.3, "ay": 0.3, "b": 0.4})
        assert (chances is None) == (mode in ("greedy", "constrained"))
        assert found[name].get("ended") is (None if mode == "ranked" else True)
    assert found["q4"] == {"prediction": "ax", "ended": True}


@pytest.mark.parametrize(("mode", "expected"), [("greedy", "a"), ("constrained", "ay"), ("ranked", "b"), ("both", "a")])
def test_the_limit_cuts_greedy_answers_alone(mode, expected):
    found = answered(*letters("ay", "b"), decode=mode, max_answer_tokens=1)
    assert found["q0"]["prediction"] == expected
    assert found["q4"] == {"prediction": "a", "ended": False}


def test_candidates_of_the_same_question_are_encoded_once():
    task, examples, trees = letters("ax", "ay", "b")
    answered(task, examples, trees, decode="ranked", max_answer_tokens=9)
    assert task.encoded == 3


def test_every_example_has_a_record_and_one_without_an_answer_is_wrong():
    task, examples, trees = letters("ax", "ay", "b")
    run = run_of(40, decode="ranked", max_answer_tokens=9)
    examples[1].also_right = ["bb"]
    missing = [trees[0].part([0, 1]), trees[1]]
    records = evaluate(bigram_model(GREEDY_IS_WRONG), missing, examples, task, run)
    assert [record["id"] for record in records] == ["q0", "q1", "q2", "q3", "q4"]
    assert [record["correct"] for record in records] == [True, True, False, True, False]
    assert [record["relaxed"] for record in records] == [True, True, False, True, True]
    assert records[2] == {
        **{"id": "q2", "group": "g", "media": [], "question_type": "t", "question": "?", "answer": "b"},
        **{"prediction": None, "candidates": ["ax", "ay", "b"], "correct": False, "relaxed": False},
    }
    assert records[1]["also_right"] == ["bb"] and "candidates" not in records[4]
