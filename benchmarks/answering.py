"""How many questions a second are answered, beside transformers' generate on padded batches of the same questions.

    make demo SCRIPT=qwen2vl_sentinel                                     # a model that answers, and its test split
    python benchmarks/answering.py                                        # about two minutes on two free cores
    python benchmarks/answering.py --larger --min-pixels 200704 --questions 60 --batches 8 --max-answer-tokens 8 \\
        --rounds 3                    # a random Qwen2-VL of 110 million weights, 256 tokens an image and more

Ours is common.answer with train_qwen2vl_sentinel.py's model and task, greedy: an image is read once for all its
questions, and all questions of a packed sequence are answered side by side. generate gets each question with its image,
padded on the left, greedy, in batches of several sizes; the fastest counts. Pixels are ready-made on both sides. Both
answer all questions in turn, several times; ratios are of the same round, and the answers must be the same.

    python benchmarks/answering.py --candidates 200 --questions 20 --pack-tokens 4096

ranks 200 candidates, one to three words of the true answers, for every question, instead; beside it the same with every
candidate a branch of its own, in which its question is repeated.
"""

import argparse
import random
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from transformers import Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import train_qwen2vl_sentinel as script
from inputs.building import build_trees
from runtime import Run, models
from runtime.attention import in_pieces
from runtime.files import write_json
from runtime.signals import StopSignal

THREADS = 2


def load(args) -> tuple:
    """(model, trees, examples by ID, task, run); the task has every image read already."""
    folder, data = Path(args.model), Path(args.data)
    flags = ["--model", args.model, "--data", args.data, "--out", "none", "--decode", "greedy"]
    settings = script.parse_arguments(flags)
    settings.max_answer_tokens, settings.pack_tokens = args.max_answer_tokens, args.pack_tokens
    settings.min_pixels = args.min_pixels
    task = script.QwenTask(folder, settings)
    examples, problems = script.read_examples(data, settings)
    examples = [example for example in examples if example.split == "test"][: args.questions]
    task.measured = {name: task.measure(data, name)[0] for example in examples for name in example.media}
    trees, faults = build_trees(examples, task)
    assert not task.faults + problems and not faults, (task.faults, problems, faults)
    if args.larger:
        config = larger(models.config(folder, script.MODELS))
        torch.manual_seed(0)
        vlm = Qwen2VLForConditionalGeneration(config)
    else:
        vlm = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    ready = {tuple(tree.media): task.read_media(data, [tree]) for tree in trees}

    def read_media(data, trees):
        parts = [ready[tuple(tree.media)] for tree in trees]
        return {key: torch.cat([part[key] for part in parts]) for key in ("pixel_values", "image_grid_thw")}

    task.read_media = read_media
    transformers.AttentionInterface.register("sdpa", in_pieces)  # as models.open_model does
    model = script.Qwen2VL(vlm).eval()
    run = Run(settings, Path(settings.out), torch.device("cpu"), torch.float32, StopSignal())
    return model, trees, {example.id: example for example in examples}, task, run


def larger(config):
    """The demo's configuration with the widths and depth of a language model of 110 million weights."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text |= {"num_key_value_heads": 4, "layer_types": ["full_attention"] * 12}
    vision = {"hidden_size": 768, "embed_dim": 256, "depth": 6, "num_heads": 4}
    for part, changed in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in changed.items():
            setattr(part, name, value)
    config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]  # half of 768 / 12
    return config


def ours(model, trees, examples, task, run) -> dict[str, str]:
    return {name: found["prediction"] for name, found in common.answer(model, trees, examples, task, run).items()}


def propose(examples, count: int) -> None:
    """Give all examples the same `count` candidates."""
    words, draw, found = sorted({word for e in examples for word in e.answer.split()}), random.Random(0), {}
    while len(found) < count:
        found[" ".join(draw.choices(words, k=draw.choice([1, 1, 2, 2, 3])))] = True
    for example in examples:
        example.candidates = list(found)


def apart(model, trees, examples, task, run) -> dict[str, str]:
    """Ours, but nothing that candidates begin with is read once for several."""
    join = common.join_branches

    def alone(tree, size):
        parts = [join(tree.part([i]), size) for i in range(len(tree.ids))]
        return replace(tree, branches=[p.branches[0] for p in parts], ids=[p.ids[0] for p in parts])

    with patch.object(common, "join_branches", alone):
        return ours(model, trees, examples, task, run)


@torch.no_grad()
def generated(model, trees, examples, task, run, batch: int) -> dict[str, str]:
    """Answers of transformers' generate, `batch` questions at a time, each with its own image, padded on the left."""
    tokenizer, answers = task.tokenizer, {}
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = [t.part([i]) for t in map(common.answering_prompt, trees) for i in range(len(t.ids))]
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        tokens = [prompt.prefix + prompt.branches[0][0] for prompt in some]
        longest = max(map(len, tokens))
        input_ids = torch.tensor([[pad] * (longest - len(t)) + t for t in tokens])
        attention = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in tokens])
        output = model.vlm.generate(
            input_ids=input_ids,
            attention_mask=attention,
            mm_token_type_ids=(input_ids == task.image_id).int(),
            max_new_tokens=run.args.max_answer_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=pad,
            **task.read_media(None, some),
        )
        for prompt, new in zip(some, output[:, longest:].tolist(), strict=True):
            kept = new[: new.index(eos)] if eos in new else new
            answers[prompt.ids[0]] = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = "runs/demo/qwen2vl_sentinel"
    parser.add_argument("--model", default=f"{demo}/run/model", help="a trained model folder (default: the demo's)")
    parser.add_argument("--data", default=f"{demo}/data", help="its test split is answered (default: the demo's)")
    parser.add_argument("--larger", action="store_true", help="random weights, 110 million, on the same questions")
    parser.add_argument("--min-pixels", type=int, help="enlarge images to so many (default: the checkpoint's own)")
    parser.add_argument("--questions", type=int, default=400, help="of the test split (default: 400)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128], help="of generate (default: 8 32 128)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--pack-tokens", type=int, default=2048, help="of ours (default: 2048)")
    parser.add_argument("--max-answer-tokens", type=int, default=24, help="of both (default: 24)")
    parser.add_argument("--candidates", type=int, help="rank so many for each question, instead of generating")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    model, trees, examples, task, run = load(args)
    sides = {"ours": ours} | {f"generate, batches of {n}": partial(generated, batch=n) for n in args.batches}
    if args.candidates:
        run.args.decode, sides = "ranked", {"ours": ours, "every candidate apart": apart}
        propose(examples.values(), args.candidates)
    seconds, answers = {name: [] for name in sides}, {}
    for turn in range(args.rounds + 1):  # the first is not timed
        for name, side in sides.items():
            begun = time.perf_counter()
            answers[name] = side(model, trees, examples, task, run)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    size = sum(p.numel() for p in model.parameters())
    tokens = statistics.mean(task.images.tokens(task.measured[tree.media[0]]["size"]) for tree in trees)
    print(f"{len(examples)} questions about {len(trees)} images of {tokens:.0f} tokens, {size:,} parameters, float32")
    print("| | questions/s, median | ours is faster, by round (min–max) |\n|---|---|---|")
    table = {}
    for name, times in seconds.items():
        ratios = [t / o for t, o in zip(times, seconds["ours"], strict=True)]
        same = sum(answers[name][i] == answers["ours"][i] for i in examples)
        rate = len(examples) / statistics.median(times)
        table[name] = {"questions_per_s": rate, "same": same, "ours_times": ratios, "seconds": times}
        print(f"| {name} | {rate:.1f} | {statistics.median(ratios):.1f} × ({min(ratios):.1f}–{max(ratios):.1f}) |")
    if any(side["same"] < len(examples) for side in table.values()):
        raise SystemExit("the answers differ: this compares two different things")
    if args.json:
        write_json(args.json, table)


if __name__ == "__main__":
    main()
