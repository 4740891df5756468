"""Answering many questions side by side gives what transformers' generate gives for each alone; restricted answers
are always one of the allowed; candidate scores are exact."""

import math
from collections import defaultdict

import pytest
import torch
from helpers import load_demo
from transformers import DynamicCache, LlavaForConditionalGeneration, MistralConfig, MistralModel

import common
import train_llava_med as script
from common import IGNORE, Prompt, answering_prompt, branch_log_probs, build_trie, decode, pack, visible

NEW_TOKENS = 12


# --- a real LLaVA against generate -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(demo_folder):
    """The demo's model, what reads its images, and its training trees."""
    data = load_demo(demo_folder)
    llava = LlavaForConditionalGeneration.from_pretrained(demo_folder / "model").eval()
    return script.LlavaMed(llava, torch.float32), data.read_media, data.trees


def answers_of(demo, trees, eos, max_tokens=4096, limit=NEW_TOKENS, tries=None) -> dict[str, list[int]]:
    """{question ID: tokens}, from packed rows."""
    model, read_media, _ = demo
    found = {}
    for row in pack([answering_prompt(t) for t in trees], max_tokens):
        read_once = read_media(row["prompts"])

        def read(input_ids, position_ids, mask, cache, media=read_once):
            images = None if cache.get_seq_length() else media
            with torch.no_grad():
                return model.hidden(input_ids, position_ids, mask, cache, images)

        names = [name for prompt in row["prompts"] for name in prompt.ids]
        allowed = [tries[name] for name in names] if tries else None
        answers = decode(read, model.lm_head, row, eos, [limit] * len(names), allowed)
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


def test_decode_respects_each_branch_s_own_limit(demo):
    model, read_media, trees = demo
    (row,) = pack([answering_prompt(trees[0].part(range(3)))], 4096)

    def read(input_ids, position_ids, mask, cache):
        images = None if cache.get_seq_length() else read_media(row["prompts"])
        return model.hidden(input_ids, position_ids, mask, cache, images)

    answers = decode(read, model.lm_head, row, -1, limits=[5, 1, 3])
    assert [len(tokens) for tokens in answers] == [5, 1, 3]


# --- what the model is given -----------------------------------------------------------------------------------


def test_answering_prompt_cuts_before_the_first_learned_token():
    positions = torch.tensor([0, 1])
    branches = [([3, 4, 5, 2], [IGNORE, IGNORE, 5, 2]), ([6, 7, 2], [IGNORE, 7, 2])]
    cut = answering_prompt(Prompt([1, 9], branches, ["a", "b"], "image.jpg", positions))
    assert cut.branches == [([3, 4], [IGNORE, IGNORE]), ([6], [IGNORE])]
    assert (cut.prefix, cut.ids, cut.media) == ([1, 9], ["a", "b"], "image.jpg")
    assert cut.prefix_positions is positions
    assert branches[0] == ([3, 4, 5, 2], [IGNORE, IGNORE, 5, 2])  # the tree itself is as it was


# --- restricted answers ----------------------------------------------------------------------------------------

EOS = 2


def test_trie_shares_beginnings():
    assert build_trie([[5, 6, EOS], [5, EOS], [7, EOS]]) == {5: {6: {EOS: {}}, EOS: {}}, 7: {EOS: {}}}
    assert build_trie([]) == {}


def tiny_model(seed: int):
    """(read, lm_head) of a random language model without images."""
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=40, num_key_value_heads=1, initializer_range=0.7, **size)
    model = MistralModel(config).eval()

    def read(input_ids, position_ids, mask, cache):
        output = model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return output.last_hidden_state

    return read, torch.nn.Linear(16, 40, bias=False)


def random_answers(draw) -> list[list[int]]:
    """Two to six allowed answers of one to seven tokens, of which one begins another."""
    few = range(int(torch.randint(1, 6, (), generator=draw)))
    answers = [torch.randint(3, 9, (int(torch.randint(1, 7, (), generator=draw)),), generator=draw) for _ in few]
    answers = [answer.tolist() for answer in answers]
    answers.append([*answers[0], 3])
    return [[*answer, EOS] for answer in answers]


def restricted(seed: int, limit: int) -> list[tuple[list[int], list[list[int]]]]:
    """(answer, allowed answers) of twelve branches in two trees of one row."""
    draw = torch.Generator().manual_seed(seed)
    read, lm_head = tiny_model(seed)
    branches = [(torch.randint(3, 40, (1 + i % 4,), generator=draw).tolist(), [IGNORE] * (1 + i % 4)) for i in range(6)]
    trees = [Prompt([1, 10 + n, 20 + n], branches, [f"{n}{i}" for i in range(6)]) for n in range(2)]
    (row,) = pack(trees, max_tokens=200)
    allowed = [random_answers(draw) for _ in range(12)]
    with torch.no_grad():
        answers = decode(read, lm_head, row, EOS, [limit] * 12, [build_trie(answers) for answers in allowed])
    return list(zip(answers, allowed, strict=True))


@pytest.mark.parametrize("limit", [1, 64])
def test_a_restricted_answer_is_always_exactly_one_of_the_allowed(limit):
    decoded = [pair for seed in range(84) for pair in restricted(seed, limit)]
    assert all(answer in allowed for answer, allowed in decoded)
    assert max(len(answer) for answer, _ in decoded) > 4
    assert any(answer == allowed[0] for answer, allowed in decoded)  # one that begins another,
    assert any(answer == allowed[-1] for answer, allowed in decoded)  # and the other


def test_restricted_and_free_branches_share_a_row():
    read, lm_head = tiny_model(0)
    branches = [([5 + i], [IGNORE]) for i in range(4)]
    (row,) = pack([Prompt([1, 11], branches, list("abcd"))], max_tokens=50)
    tries = [None, build_trie([[30, 31, 32, EOS]]), None, build_trie([[33, EOS]])]
    with torch.no_grad():
        free = decode(read, lm_head, row, EOS, [3] * 4)
        mixed = decode(read, lm_head, row, EOS, [3] * 4, tries)
    assert mixed == [free[0], [30, 31, 32, EOS], free[2], [33, EOS]]


def test_a_trie_chooses_the_likeliest_allowed_token():
    read, lm_head = bigram_model({0: {5: 0.5, 6: 0.1, 7: 0.3, 8: 0.1}, 7: {EOS: 1.0}, 6: {EOS: 1.0}})
    (row,) = pack([Prompt([1], [([0], [IGNORE])], ["a"])], max_tokens=10)
    assert decode(read, lm_head, row, EOS, [9], [build_trie([[6, EOS], [7, EOS]])]) == [[7, EOS]]


# --- candidate scores ------------------------------------------------------------------------------------------


def bigram_model(chances: dict[int, dict[int, float]]):
    """(read, lm_head) of a model in which the next token depends on the last alone, with these probabilities."""
    logits = torch.full((10, 10), -1e4)
    for token, following in chances.items():
        for after, chance in following.items():
            logits[token, after] = math.log(chance)

    def read(input_ids, position_ids, mask, cache):
        return torch.nn.functional.one_hot(input_ids, 10).float()

    return read, lambda hidden: hidden @ logits


def test_candidate_scores_find_the_likeliest_answer_where_a_greedy_walk_does_not():
    question, a, b, x, y = 1, 5, 6, 7, 8
    read, lm_head = bigram_model(
        {question: {a: 0.6, b: 0.4}, a: {x: 0.5, y: 0.5}, b: {EOS: 1.0}, x: {EOS: 1.0}, y: {EOS: 1.0}}
    )
    candidates = [[a, x, EOS], [a, y, EOS], [b, EOS]]
    (asked,) = pack([Prompt([3], [([question], [IGNORE])], ["q"])], max_tokens=10)
    assert decode(read, lm_head, asked, EOS, [9], [build_trie(candidates)]) == [[a, x, EOS]]

    branches = [([question, *answer], [IGNORE, *answer]) for answer in candidates]
    (row,) = pack([Prompt([3], branches, ["ax", "ay", "b"])], max_tokens=20)
    chances = branch_log_probs(read(row["input_ids"], None, None, None), lm_head, row).exp()
    torch.testing.assert_close(chances, torch.tensor([0.3, 0.3, 0.4]))
    assert candidates[chances.argmax()] == [b, EOS]


def test_branch_log_probs_equal_separate_forward_passes(demo):
    model, read_media, trees = demo
    trees = [tree.part(range(4)) for tree in trees[:3]]
    (row,) = pack(trees, 4096)
    media = read_media(row["prompts"])
    with torch.no_grad():
        mask = visible(row["document"], row["branch"])
        hidden = model.hidden(row["input_ids"], row["position_ids"], mask, None, media)
        found = branch_log_probs(hidden, model.lm_head, row)
        expected = []
        for prompt in row["prompts"]:
            images = read_media([prompt])["pixel_values"]
            for ids, labels in prompt.branches:
                logits = model.vlm(input_ids=torch.tensor([prompt.prefix + ids]), pixel_values=images).logits[0]
                log_probs = logits.log_softmax(-1)[len(prompt.prefix) - 1 :]  # row t predicts the branch's token t
                expected.append(sum(log_probs[t, ids[t]] for t in range(len(ids)) if labels[t] != IGNORE))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-4)
    assert len(found) == 12


def test_scores_of_all_answers_of_a_length_sum_to_one():
    """Brute force over every answer of two tokens: the scores are probabilities, and their argmax the best answer."""
    read, lm_head = tiny_model(1)
    question = [1, 11, 5]
    answers = [[s, t] for s in range(40) for t in range(40)]
    branches = [([question[-1], *answer], [IGNORE, *answer]) for answer in answers]
    (row,) = pack([Prompt(question[:-1], branches, [str(answer) for answer in answers])], max_tokens=6000)
    with torch.no_grad():
        mask = visible(row["document"], row["branch"])
        scores = branch_log_probs(read(row["input_ids"], row["position_ids"], mask, DynamicCache()), lm_head, row)
        best = {}
        for s in range(40):  # the chain rule, one row for each first token
            ids = torch.tensor([[*question, s]])
            positions = torch.arange(4)[None]
            causal = visible(torch.ones_like(ids), torch.zeros_like(ids))
            log_probs = lm_head(read(ids, positions, causal, DynamicCache()))[0].log_softmax(-1)
            best |= {(s, t): float(log_probs[-2, s] + log_probs[-1, t]) for t in range(40)}
    torch.testing.assert_close(float(scores.exp().sum()), 1.0, rtol=1e-4, atol=0)
    assert tuple(answers[scores.argmax()]) == max(best, key=best.get)
