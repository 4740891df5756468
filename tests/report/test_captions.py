"""What is said of captions: against transformers' own loss, at chance where nothing is seen, with accents kept."""

import copy
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from helpers import load_demo

import train_video_plain_lm as script
from common import IGNORE, Prompt, pack
from inputs.building import build_trees
from report import captions
from runtime.program import Run
from runtime.signals import StopSignal

# 2 frames x 1 + 2 frames x 4 = 10 positions a video, so that tests are quick
LITTLE = ["--from-scratch", "--fast-frames", 2, "--fast-grid", 1, "--slow-frames", 2, "--slow-grid", 2]


@pytest.fixture(scope="module")
def little(plain_folder):
    return load_demo(plain_folder, script, "--vision-model", plain_folder / "vision", *LITTLE)


@pytest.fixture(scope="module")
def model(little):
    """The model, its packers no longer mere resizing: what they add starts at zero."""
    torch.manual_seed(0)
    found = script.load_model(little.folder / "model", little.task, torch.float32)
    for packer in (found.vlm.fast_packer, found.vlm.slow_packer):
        torch.nn.init.normal_(packer.out.weight, std=0.05)
    return found.eval()


def run_of(little, **settings) -> Run:
    args = copy.copy(little.args)
    vars(args).update({"workers": 0, **settings})
    return Run(args, Path("never written"), torch.device("cpu"), torch.float32, StopSignal())


def trees_of(little, *splits) -> tuple[list, list]:
    """The examples with a video of some splits, and their prompt trees."""
    examples = [example for example in little.examples if example.split in splits and example.media]
    trees, faults = build_trees(examples, little.task)
    assert faults == {}
    return examples, trees


def test_perplexity_and_retrieval_are_those_of_transformers_own_loss(little, model):
    examples = [example for example in little.examples if example.split == "test"]
    trees, _ = build_trees(examples, little.task)

    def log_prob(tree, branch):
        [packed] = pack([Prompt(tree.prefix, [branch], ["x"], tree.media)], 4096)
        packed |= little.read_media(packed["prompts"])
        embeds = model.vlm.get_input_embeddings()(packed["input_ids"])
        embeds = torch.cat([model.video_features(packed["videos"])[None], embeds[:, len(tree.prefix) :]], dim=1)
        labels = torch.tensor([[IGNORE] * len(tree.prefix) + branch[1]])
        with torch.no_grad():
            return -float(model.vlm(inputs_embeds=embeds, labels=labels).loss) * sum(x != IGNORE for x in branch[1])

    own = [log_prob(tree, tree.branches[0]) for tree in trees]
    tokens = sum(tree.supervised() for tree in trees)
    records = [{"prediction": None, "answer": example.answer} for example in examples]
    found = captions.figures(model, trees, records, little.task, run_of(little))
    assert found["loss"] == pytest.approx(-sum(own) / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(-sum(own) / tokens), rel=1e-5)
    order = list(range(len(trees)))
    random.Random(0).shuffle(order)
    right = []
    for i, k in enumerate(order):
        others = [order[(i + j) % len(order)] for j in range(1, len(order))]
        other = next(n for n in others if trees[n].branches[0][1] != trees[k].branches[0][1])
        right.append(own[k] > log_prob(trees[other], trees[k].branches[0]))
    assert found["pairs"] == len(trees)
    assert found["retrieval"] == pytest.approx(sum(right) / len(right))


def test_nothing_is_said_of_a_blind_run(little, model):
    assert captions.figures(model, [], [], little.task, run_of(little, blind="blank")) == {}


def test_a_model_that_does_not_see_the_video_is_at_chance_in_retrieval(little, model, monkeypatch):
    """With the same features for every video each comparison is a tie, which counts half."""
    features = script.VideoPlainLM.video_features
    monkeypatch.setattr(script.VideoPlainLM, "video_features", lambda self, videos: features(self, videos) * 0)
    _, trees = trees_of(little, "val", "test")
    task, run = little.task, run_of(little, pack_tokens=40)  # a text a packed sequence: equal to the bit
    assert captions.retrieval(model, trees, task, run) == {"retrieval": 0.5, "pairs": 12}
    same = [Prompt(t.prefix, [trees[0].branches[0]], [str(i)], t.media) for i, t in enumerate(trees)]
    assert captions.retrieval(model, same, task, run) == {"retrieval": None, "pairs": 0}  # all say the same
    assert captions.retrieval(model, [], task, run) == {"retrieval": None, "pairs": 0}


def test_another_text_of_the_same_video_is_no_other_video(little, model):
    """With --no-share-prefix a video has a tree for each text: compared with itself every text would be a tie."""
    first, second, third = [tree for tree in little.trees if tree.media][:3]
    twice = [first, Prompt(first.prefix, second.branches, ["again"], first.media)]
    assert captions.retrieval(model, twice, little.task, run_of(little))["pairs"] == 0
    assert captions.retrieval(model, [*twice, third], little.task, run_of(little))["pairs"] == 3


def test_bleu_and_rouge_keep_accents(monkeypatch, capsys):
    pytest.importorskip("sacrebleu")
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    same = captions.overlap([("Un cerchio va più su.", "Un cerchio va più su.")])
    assert same == {"bleu": pytest.approx(100), "rouge_l": 1}
    assert captions.overlap([("più", "pi"), ("è", "e")])["rouge_l"] == 0
    theirs = rouge_scorer.RougeScorer(["rougeL"]).score("pi", "più")["rougeL"].fmeasure
    assert theirs == 1.0  # what rouge-score itself makes of it
    partly = captions.overlap([("uno due tre", "uno tre quattro"), ("", "uno")])
    assert partly["rouge_l"] == pytest.approx((2 / 3 + 0) / 2)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert captions.overlap([("a", "a")]) == {"bleu": None, "rouge_l": None}
    assert "pip install sacrebleu rouge-score" in capsys.readouterr().out
