"""How many questions a second are answered, beside transformers' generate on padded batches of the same rows.

    make demo SCRIPT=qwen2vl_sentinel                                     # a model that answers, and its test split
    python benchmarks/answering.py                                        # about two minutes on two free cores
    python benchmarks/answering.py --larger --min-pixels 200704 --questions 60 --batches 8 --max-answer-tokens 8 \\
        --rounds 3                    # a random Qwen2-VL of 110 million weights, 256 tokens an image and more

Ours is train_qwen2vl_sentinel.py's own `answer` with free answers: an image is read once for all its questions, and
all of a row's questions are answered side by side. generate gets a row for each question with its image, padded on the
left, greedy, in batches of several sizes; the fastest counts. Pixels are ready-made on both sides. Both answer all
rows in turn, several times; ratios are of the same round, and the answers must be the same.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import runtime
import train_qwen2vl_sentinel as script

THREADS = 2


def load(args) -> tuple:
    """(model, text, trees, rows by ID, read_media with every image read already)."""
    folder, data = Path(args.model), Path(args.data)
    settings = script.parse_arguments(["--model", args.model, "--data", args.data, "--out", "none", "--decode", "free"])
    settings.max_answer_tokens, settings.pack_tokens = args.max_answer_tokens, args.pack_tokens
    settings.min_pixels = args.min_pixels
    script.MAX_ANSWER_TOKENS.clear()  # generate has one limit for all of a batch
    text, faults = script.load_text(folder, settings)
    rows, problems = script.read_data(data, settings)
    rows = [row for row in rows if row.split == "test"][: args.questions]
    text.measured = {row.image: script.measure(data, row.image) for row in rows}
    trees, found = script.build_prompts(rows, text, settings)
    assert not faults + problems + found, faults + problems + found
    if args.larger:
        config = larger(script.meta_model(folder).config)
        torch.manual_seed(0)
        vlm = Qwen2VLForConditionalGeneration(config)
    else:
        vlm = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    ready = {tree.media: script.read_images(data, text, [tree]) for tree in trees}

    def read_media(prompts):
        parts = [ready[prompt.media] for prompt in prompts]
        return {key: torch.cat([part[key] for part in parts]) for key in ("pixel_values", "image_grid_thw")}

    model = script.Qwen2VL(vlm, torch.float32).eval()
    run = script.Run(settings, None, torch.device("cpu"), runtime.StopSignal(), text, read_media)
    return model, trees, {row.id: row for row in rows}, run


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


def ours(model, trees, rows, run) -> dict[str, str]:
    return {name: found["prediction"] for name, found in script.answer(model, trees, rows, run).items()}


@torch.no_grad()
def generated(model, trees, rows, run, batch: int) -> dict[str, str]:
    """Answers of transformers' generate, `batch` rows at a time, each with its own image, padded on the left."""
    text, answers = run.text, {}
    eos, pad = text.tokenizer.eos_token_id, text.tokenizer.pad_token_id
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
            mm_token_type_ids=(input_ids == text.image_id).int(),
            max_new_tokens=run.args.max_answer_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=pad,
            **run.read_media(some),
        )
        for prompt, new in zip(some, output[:, longest:].tolist(), strict=True):
            kept = new[: new.index(eos)] if eos in new else new
            answers[prompt.ids[0]] = text.tokenizer.decode(kept, skip_special_tokens=True).strip()
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = "runs/demo/qwen2vl_sentinel"
    parser.add_argument("--model", default=f"{demo}/run/model", help="a trained model folder (default: the demo's)")
    parser.add_argument("--data", default=f"{demo}/data", help="its test split is answered (default: the demo's)")
    parser.add_argument("--larger", action="store_true", help="random weights, 110 million, on the same rows")
    parser.add_argument("--min-pixels", type=int, help="enlarge images to so many (default: the checkpoint's own)")
    parser.add_argument("--questions", type=int, default=400, help="of the test split (default: 400)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128], help="of generate (default: 8 32 128)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--pack-tokens", type=int, default=2048, help="of ours (default: 2048)")
    parser.add_argument("--max-answer-tokens", type=int, default=24, help="of both (default: 24)")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    model, trees, rows, run = load(args)
    sides = {"ours": ours} | {f"generate, {n} rows": partial(generated, batch=n) for n in args.batches}
    seconds, answers = {name: [] for name in sides}, {}
    for turn in range(args.rounds + 1):  # the first is not timed
        for name, side in sides.items():
            begun = time.perf_counter()
            answers[name] = side(model, trees, rows, run)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    size = sum(p.numel() for p in model.parameters())
    tokens = statistics.mean(run.text.features(tree.media) for tree in trees)
    print(f"{len(rows)} questions about {len(trees)} images of {tokens:.0f} tokens, {size:,} parameters, float32")
    table = {}
    for name, times in seconds.items():
        ratios = [t / o for t, o in zip(times, seconds["ours"], strict=True)]
        same = sum(answers[name][i] == answers["ours"][i] for i in rows)
        table[name] = {"questions_per_s": len(rows) / statistics.median(times), "same": same, "ours_times": ratios}
        print(
            f"{name:<20} {table[name]['questions_per_s']:8.1f} questions/s   ours is {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f}) times as fast   same answers {same} of {len(rows)}"
        )
    if any(side["same"] < len(rows) for side in table.values()):
        raise SystemExit("the answers differ: this compares two different things")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"table": table, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
