"""Packing is exact: prompt trees in packed sequences give the loss and gradients of separate ones in transformers' own
forward, and each way of getting the mask, the positions or the mean wrong is caught by the same comparison."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import difference, gradients, load_demo
from transformers import LlavaForConditionalGeneration

import common
import train_llava_med as script
from common import IGNORE, Prompt, pack, plan_run, supervised_loss, visible
from inputs import data_check
from runtime import Run
from runtime.signals import StopSignal


def tree(prefix: int, *branches: int, name="t") -> Prompt:
    """A tree of parts of these lengths; all its tokens differ, and the last of each branch is supervised."""
    tokens = iter(range(1, 10_000))
    first, *rest = [[next(tokens) for _ in range(length)] for length in (prefix, *branches)]
    rest = [(ids, [IGNORE] * (len(ids) - 1) + ids[-1:]) for ids in rest]
    return Prompt(first, rest, [f"{name}{i}" for i in range(len(branches))], media=name)


def random_trees(seed: int, count: int = 12) -> list[Prompt]:
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    return [tree(number(1, 9), *(number(2, 9) for _ in range(number(1, 12))), name=f"{n}.") for n in range(count)]


# --- packed sequences ------------------------------------------------------------------------------------------


def test_a_packed_sequence_has_the_written_layout():
    (batch,) = pack([tree(3, 2, 3, name="a"), tree(2, 2, name="b")], max_tokens=12)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 5, -100, -100, 8, -100, -100, -100, 4]]
    assert batch["document"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]]
    assert batch["branch"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]]
    assert batch["ends"].tolist() == [4, 7, 11]
    assert [prompt.media for prompt in batch["prompts"]] == ["a", "b"]


def test_mrope_branches_continue_from_the_largest_prefix_position_in_all_three_rows():
    image = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 2, 2], [0, 1, 2, 1, 2]])  # time, height, width
    a, b = tree(5, 2, 3), tree(2, 2)
    a.prefix_positions, b.prefix_positions = image, torch.tensor([[0, 1]] * 3)
    (batch,) = pack([a, b], max_tokens=14)
    after = [3, 4, 3, 4, 5, 0, 1, 2, 3]
    assert batch["position_ids"].shape == (3, 1, 14)
    assert batch["position_ids"][:, 0].tolist() == [[*positions, *after] for positions in image.tolist()]

    divided = pack([a], max_tokens=8)  # each part keeps the prefix's own positions
    assert [batch["position_ids"][2, 0].tolist() for batch in divided] == [
        [0, 1, 2, 1, 2, 3, 4, 5],
        [0, 1, 2, 1, 2, 3, 4],
    ]


def lengths(sequences) -> list[list[int]]:
    return [[len(prompt) for prompt in batch["prompts"]] for batch in sequences]


def test_trees_are_spread_over_as_few_sequences_as_it_takes():
    trees = [tree(1, length - 1) for length in (3, 4, 5, 6, 7)]
    assert lengths(pack(trees, max_tokens=25)) == [[7, 6, 5, 4, 3]]
    assert lengths(pack(trees, max_tokens=24)) == [[7, 4, 3], [6, 5]]
    assert lengths(pack(trees, max_tokens=11)) == [[7], [6, 3], [5, 4]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_every_rank_gets_as_many_sequences_as_the_others_and_each_question_once(ranks, seed):
    draw = random.Random(f"{seed} {ranks}")
    trees = [tree(draw.randrange(1, 9), *draw.choices(range(2, 9), k=draw.randrange(1, 5))) for _ in range(20)]
    sequences = pack(trees, 64, ranks)
    assert len(sequences) % ranks == 0
    assert max(batch["input_ids"].numel() for batch in sequences) <= 64
    supervised = [sum(int((batch["labels"] != -100).sum()) for batch in sequences[r::ranks]) for r in range(ranks)]
    assert sum(supervised) == sum(t.supervised() for t in trees)
    load = [sum(batch["input_ids"].numel() for batch in sequences[r::ranks]) for r in range(ranks)]
    # the emptiest sequence is never fuller than another without its last tree
    assert max(load) - min(load) <= max(map(len, trees)) * len(sequences) / ranks
    own = [batch["input_ids"].tolist() for batch in pack(trees, 64, ranks, rank=ranks - 1)]
    assert own == [batch["input_ids"].tolist() for batch in sequences[ranks - 1 :: ranks]]


def test_for_a_rank_without_a_tree_of_its_own_nothing_is_supervised():
    (full, empty) = pack([tree(2, 3, 2)], 64, ranks=2)
    assert empty["input_ids"].tolist() == full["input_ids"].tolist()
    assert empty["labels"].unique().tolist() == [-100]


def test_a_tree_longer_than_a_sequence_is_divided_and_its_prefix_repeated():
    sequences = pack([tree(4, 3, 3, 3, 3, 3)], max_tokens=10)
    assert [batch["prompts"][0].ids for batch in sequences] == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    assert sequences[1]["input_ids"].tolist() == [[1, 2, 3, 4, 11, 12, 13, 14, 15, 16]]
    assert sequences[1]["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]]
    assert sequences[2]["input_ids"].tolist() == [[1, 2, 3, 4, 17, 18, 19]]


@pytest.mark.parametrize("seed", range(20))
def test_every_branch_is_packed_once_without_padding_and_within_the_limit(seed):
    trees = random_trees(seed)
    branches = {name: (t.prefix, *branch) for t in trees for name, branch in zip(t.ids, t.branches, strict=True)}
    sequences = pack(trees, max_tokens=40)
    seen = []
    for batch in sequences:
        T = batch["input_ids"].shape[1]
        assert T <= 40
        assert sum(len(prompt) for prompt in batch["prompts"]) == T  # no padding
        assert all(batch[name].shape == (1, T) for name in ("labels", "document", "branch", "position_ids"))
        names = [name for prompt in batch["prompts"] for name in prompt.ids]
        for name, end in zip(names, batch["ends"].tolist(), strict=True):
            prefix, input_ids, labels = branches[name]
            start = end + 1 - len(input_ids)
            assert batch["input_ids"][0, start : end + 1].tolist() == input_ids
            assert batch["labels"][0, start : end + 1].tolist() == labels
            own_prefix = (batch["document"] == batch["document"][0, end]) & (batch["branch"] == 0)
            assert batch["input_ids"][own_prefix].tolist() == prefix
            assert batch["position_ids"][0, end] == len(prefix) + len(input_ids) - 1
        seen += names
    assert Counter(seen) == Counter(branches.keys())


def test_packing_is_deterministic():
    first, second = pack(random_trees(3), 40), pack(random_trees(3), 40)
    assert [batch["input_ids"].tolist() for batch in first] == [batch["input_ids"].tolist() for batch in second]
    assert [[p.ids for p in batch["prompts"]] for batch in first] == [
        [p.ids for p in batch["prompts"]] for batch in second
    ]


def test_a_branch_that_does_not_fit_is_named():
    assert len(pack([tree(5, 2, 5)], max_tokens=10)) == 2
    with pytest.raises(ValueError, match=r"example t1 needs 10 tokens, more than --pack-tokens 9"):
        pack([tree(5, 2, 5)], max_tokens=9)


# --- the visibility rule ---------------------------------------------------------------------------------------


def may_see(document, branch, q, k):
    """The rule as it is written: same document, k not after q, and k's branch is 0 or q's branch."""
    return document[q] == document[k] and k <= q and branch[k] in (0, branch[q])


@pytest.mark.parametrize("seed", range(10))
def test_visible_is_the_written_rule(seed):
    draw = torch.Generator().manual_seed(seed)
    T = 30
    document = torch.randint(1, 4, (1, T), generator=draw)
    branch = torch.randint(0, 4, (1, T), generator=draw)
    d, b = document[0].tolist(), branch[0].tolist()
    expected = [[may_see(d, b, q, k) for k in range(T)] for q in range(T)]
    assert visible(document, branch).tolist() == [[expected]]
    for last in (1, 2, 7, T):
        assert visible(document, branch, last).tolist() == [[expected[-last:]]]


def test_visible_draws_the_picture_in_the_source():
    (batch,) = pack([tree(3, 2, 2, name="a"), tree(2, 2, name="b")], max_tokens=11)
    picture = [
        "x . . . . . . . . . .",
        "x x . . . . . . . . .",
        "x x x . . . . . . . .",
        "x x x x . . . . . . .",
        "x x x x x . . . . . .",
        "x x x . . x . . . . .",
        "x x x . . x x . . . .",
        ". . . . . . . x . . .",
        ". . . . . . . x x . .",
        ". . . . . . . x x x .",
        ". . . . . . . x x x x",
    ]
    seen = visible(batch["document"], batch["branch"])[0, 0]
    drawn = [" ".join("x" if look else "." for look in line) for line in seen]
    assert drawn == picture


# --- steps -----------------------------------------------------------------------------------------------------


def steps_of(trees, questions_per_step, seed=0, epochs=1, max_steps=None):
    settings = {"questions_per_step": questions_per_step, "seed": seed, "epochs": epochs, "max_steps": max_steps}
    return plan_run(trees, SimpleNamespace(**settings))


@pytest.mark.parametrize("seed", range(5))
def test_plan_has_every_question_once_an_epoch_and_no_step_over_the_limit(seed):
    trees = random_trees(seed, count=30)
    given = [(name, branch) for t in trees for name, branch in zip(t.ids, t.branches, strict=True)]
    for epochs in (1, 3):
        steps = steps_of(trees, 8, seed, epochs)
        assert max(sum(len(t.ids) for t in step) for step in steps) <= 8
        planned = [pair for step in steps for t in step for pair in zip(t.ids, t.branches, strict=True)]
        assert sorted(planned) == sorted(given * epochs)


def test_plan_divides_a_tree_larger_than_a_step():
    steps = steps_of([tree(3, *[2] * 7)], 3)
    assert sorted(t.ids for step in steps for t in step) == [["t0", "t1", "t2"], ["t3", "t4", "t5"], ["t6"]]
    assert all(t.prefix == [1, 2, 3] for step in steps for t in step)


def test_plan_fills_a_step_before_it_starts_the_next():
    steps = steps_of([tree(3, 2, 2, name=str(n)) for n in range(10)], 4)
    assert [len(step) for step in steps] == [2, 2, 2, 2, 2]


def test_no_step_mixes_two_epochs():
    steps = steps_of([tree(3, 2, name=str(n)) for n in range(5)], 4, epochs=3)
    assert [len(step) for step in steps] == [4, 1] * 3


def ids(steps):
    return [[t.ids for t in step] for step in steps]


def test_plan_depends_on_seed_and_epoch_alone():
    def epochs(seed):
        steps = steps_of([tree(3, 2, name=str(n)) for n in range(30)], 8, seed, epochs=3)
        return [ids(steps[i : i + 4]) for i in (0, 4, 8)]

    first = epochs(0)
    torch.manual_seed(99)
    random.seed(99)
    steps_of(random_trees(0, 30), 8, 5)  # other plans in between change nothing
    assert epochs(0) == first
    assert len({str(order) for seed in range(3) for order in epochs(seed)}) == 9


def test_every_epoch_is_drawn_from_the_order_of_the_data():
    trees = [tree(3, 2, name=str(n)) for n in range(30)]
    planned = [t.ids for step in steps_of(trees, 8, seed=7, epochs=3) for t in step]
    for epoch in range(3):
        drawn = [t.ids for t in trees]
        random.Random(f"7 {epoch}").shuffle(drawn)
        assert planned[30 * epoch : 30 * (epoch + 1)] == drawn


def test_a_plan_that_is_cut_is_the_beginning_of_the_other():
    trees = random_trees(0, 30)
    complete = ids(steps_of(trees, 8, epochs=3))
    for steps in (1, len(complete) // 3, len(complete) // 2, len(complete) + 5):
        assert ids(steps_of(trees, 8, epochs=3, max_steps=steps)) == complete[:steps]


# --- the loss --------------------------------------------------------------------------------------------------


def test_supervised_loss_is_cross_entropy_over_the_full_logits():
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 20, 8), torch.nn.Linear(8, 13)
    labels = torch.randint(0, 13, (1, 20)).masked_fill(torch.rand(1, 20) < 0.6, IGNORE)
    labels[0, 0] = 5  # no token stands before it: it cannot be predicted
    loss, tokens = supervised_loss(hidden, head, labels)
    expected = F.cross_entropy(head(hidden)[0, :-1], labels[0, 1:], ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert tokens == sum(label != IGNORE for label in labels[0, 1:].tolist())


def test_supervised_loss_computes_logits_of_supervised_positions_alone():
    seen = []
    labels = torch.tensor([[IGNORE, IGNORE, 3, 4, IGNORE, 5]])
    hidden = torch.arange(6.0).view(1, 6, 1).expand(1, 6, 7)
    supervised_loss(hidden, lambda h: seen.append(h) or h, labels)
    assert seen[0][:, 0].tolist() == [1, 2, 4]


def test_a_sequence_without_supervised_tokens_has_loss_zero_and_finite_gradients():
    hidden, head = torch.randn(1, 5, 8, requires_grad=True), torch.nn.Linear(8, 13)
    loss, tokens = supervised_loss(hidden, head, torch.full((1, 5), IGNORE))
    loss.backward()
    assert (loss.item(), tokens.item()) == (0.0, 0)
    assert hidden.grad.abs().max() == 0
    assert head.weight.grad.abs().max() == 0


# --- equality with transformers' own forward -------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(demo_folder):
    return load_demo(demo_folder)


def load(data, tune: str) -> script.LlavaMed:
    data.args.tune = tune
    llava = LlavaForConditionalGeneration.from_pretrained(data.folder / "model")
    script.choose_trained(llava, data.args)
    torch.manual_seed(0)
    for layer in common.lora_layers(llava).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)  # at zero, A would have no gradient
    return script.LlavaMed(llava)


@pytest.fixture(scope="module", params=["full", "lora"])
def model(request, data):
    return load(data, request.param)


@pytest.fixture(scope="module")
def full(data):
    return load(data, "full")


def packed(model, data, trees, max_tokens=4096):
    sequences = [{**batch, **data.read_media(batch["prompts"])} for batch in pack(trees, max_tokens)]
    return gradients(model, sum(model(batch)[0] for batch in sequences))


def separate(model, data, trees):
    """Each question in a sequence of its own through transformers' forward: no mask, no positions, nothing of ours."""
    total = 0
    for prompt in trees:
        pixel_values = data.read_media([prompt])["pixel_values"]
        for input_ids, labels in prompt.branches:
            ids = torch.tensor([prompt.prefix + input_ids])
            logits = model.vlm(input_ids=ids, pixel_values=pixel_values).logits[0]
            for t in range(ids.shape[1]):
                if t >= len(prompt.prefix) and labels[t - len(prompt.prefix)] != IGNORE:
                    total = total - logits[t - 1].log_softmax(-1)[ids[0, t]]
    return gradients(model, total)


def test_full_tuning_compares_every_parameter_that_the_features_come_from(data, full):
    found = packed(full, data, data.trees[:1])
    without = [name for name, _ in full.named_parameters() if name not in found]
    unused = ("vlm.model.vision_tower.encoder.layers.2.", "vlm.model.vision_tower.post_layernorm.")
    assert all(name.startswith(unused) for name in without)  # features are read before the last layer


def test_shared_prefix_equals_separate_sequences(data, model):
    (prompt,) = [t for t in data.trees if len(t.ids) >= 9][:1]
    prompt = prompt.part(range(9))
    assert difference(packed(model, data, [prompt]), separate(model, data, [prompt])) < 1e-5


def test_several_trees_in_a_sequence_equal_separate_sequences(data, model):
    trees = [prompt.part(range(4)) for prompt in data.trees[:4]]
    assert len(pack(trees, 4096)) == 1
    assert difference(packed(model, data, trees), separate(model, data, trees)) < 1e-5


def test_several_trees_in_a_sequence_equal_one_tree_a_sequence(data, model):
    longest = max(len(prompt) for prompt in data.trees[:4])
    assert len(pack(data.trees[:4], longest)) == 4
    assert difference(packed(model, data, data.trees[:4]), packed(model, data, data.trees[:4], longest)) < 1e-5


def test_a_divided_tree_equals_the_tree(data, model):
    prompt = data.trees[0]
    assert len(pack([prompt], 120)) > 1
    assert difference(packed(model, data, [prompt], 120), packed(model, data, [prompt])) < 1e-5


def test_the_turns_of_a_conversation_are_read_once_and_equal_separate_sequences(data, model):
    prompt = data.trees[0].part(range(5))
    turns, asked, said = [], [], []
    for input_ids, labels in prompt.branches[:3]:  # a turn is asked with those before it, which it does not learn
        turns.append((asked + input_ids, said + labels))
        asked, said = asked + input_ids, said + [IGNORE] * len(labels)
    # a question that is asked twice counts twice, and two others stand beside the conversation
    prompt.branches = [*turns, turns[-1], *prompt.branches[3:]]
    prompt.ids.append("again")
    (batch,) = pack([prompt], 4096)
    assert batch["branch"].max() == 4 and batch["input_ids"].shape[1] < len(prompt) - len(turns[1][0])
    assert data_check.count([], [prompt])["tokens"] == batch["input_ids"].shape[1], "what is read is counted"
    assert difference(packed(model, data, [prompt]), separate(model, data, [prompt])) < 1e-5
    (answering,) = pack([common.answering_prompt(prompt)], 4096)
    assert len(answering["ends"]) == 6  # each is answered by itself


def own_document_only(document, branch):
    """Forgets the branches: a question sees the questions and answers before it."""
    return visible(document, torch.zeros_like(branch))


def own_branch_only(document, branch):
    """Forgets the documents: a question sees the image of another tree."""
    return visible(torch.ones_like(document), branch)


def nothing_of_the_prefix(document, branch):
    return visible(document * 1000 + branch, branch)


def also_what_follows(document, branch):
    mask = visible(document, branch)
    return mask | mask.transpose(2, 3)


@pytest.mark.parametrize("wrong", [own_document_only, own_branch_only, nothing_of_the_prefix, also_what_follows])
def test_a_wrong_mask_is_caught(data, full, monkeypatch, wrong):
    trees = [prompt.part(range(4)) for prompt in data.trees[:2]]
    right = packed(full, data, trees)
    monkeypatch.setattr(common, "visible", wrong)
    assert difference(packed(full, data, trees), right) > 1e-3


def straight_on(batch):
    return {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}


def straight_on_within_the_tree(batch):
    return {"position_ids": torch.cat([torch.arange(len(prompt)) for prompt in batch["prompts"]])[None]}


def images_in_another_order(batch):
    return {"pixel_values": batch["pixel_values"].flip(0)}


def labels_one_late(batch):
    return {"labels": batch["labels"].roll(1)}


@pytest.mark.parametrize("wrong", [straight_on, straight_on_within_the_tree, images_in_another_order, labels_one_late])
def test_wrong_positions_images_or_labels_are_caught(data, full, wrong):
    trees = [prompt.part(range(4)) for prompt in data.trees[:2]]
    (batch,) = pack(trees, 4096)
    batch |= data.read_media(batch["prompts"])
    right = gradients(full, full(batch)[0])
    assert difference(gradients(full, full({**batch, **wrong(batch)})[0]), right) > 1e-3


# --- accumulation ----------------------------------------------------------------------------------------------


class Recorder(torch.optim.AdamW):
    """An optimizer that keeps the gradients of its step and changes nothing."""

    def step(self, closure=None):
        Recorder.gradients = {str(i): p.grad.clone() for i, p in enumerate(self.param_groups[0]["params"])}


def test_accumulation_1x8_equals_8x1_and_the_mean_of_means_does_not(data, tmp_path, monkeypatch):
    model = load(data, "lora")
    trees = [prompt.part(range(n)) for n, prompt in enumerate(data.trees[:7], start=1)]
    trees.append(data.trees[7].part(range(1)))
    trees[-1].branches = [(ids + ids[-5:] * 8, labels + ids[-5:] * 8) for ids, labels in trees[-1].branches]
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    monkeypatch.setattr(script.checkpoints, "Saver", lambda *_: lambda step: None)

    def one_group(trained, args):
        return [{"params": list(trained.values()), "scale": 1.0}]

    monkeypatch.setattr(script.optimizers, "parameter_groups", one_group)

    def step(sequences, max_tokens):
        assert len(pack(trees, max_tokens)) == sequences
        args = SimpleNamespace(**{**vars(data.args), "pack_tokens": max_tokens, "clip": 1e9})
        folder = tmp_path / str(sequences)
        folder.mkdir()
        run = Run(args, folder, torch.device("cpu"), torch.float32, StopSignal())
        run.epochs = [1.0]
        loss = script.train(model, [trees], 0, [], data.task, run)
        run.closing.close()
        return {"loss": torch.tensor(loss), **Recorder.gradients}

    once, eight_times = step(1, 4096), step(8, max(len(t) for t in trees))
    assert difference(eight_times, once) < 1e-5

    batches = [{**batch, **data.read_media(batch["prompts"])} for batch in pack(trees, max(len(t) for t in trees))]
    found = [model(batch) for batch in batches]
    mean = gradients(model, sum(loss for loss, _ in found) / sum(tokens for _, tokens in found))
    found = [model(batch) for batch in batches]
    mean_of_means = gradients(model, sum(loss / tokens for loss, tokens in found) / len(found))
    steps, right, wrong = (
        torch.cat([tensor.flatten() for name, tensor in named.items() if name != "loss"])
        for named in (once, mean, mean_of_means)
    )
    assert (steps - right).norm() / right.norm() < 1e-5
    assert (wrong - right).norm() / right.norm() > 0.1
