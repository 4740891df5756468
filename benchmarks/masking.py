"""What learning the video's tokens, too, really does: the same training with and without the mask, side by side.

    make demo SCRIPT=video_plain_lm                          # the data, GPT-2's configuration and the tower
    python benchmarks/masking.py                             # some 20 minutes on two cores; needs matplotlib

A report on the original training blamed its failure on this mistake: 360 of 376 labels were tokens of the video, the
loss stayed at 10.2, and the gradient was 0.1 instead of 6. Here train_video_plain_lm.py trains as it is, with an
encode() that supervises the video's tokens, too, and on the captions without their videos: the same examples in the
same order, in the original layout of 36 + 324 positions. The data check would refuse the second: it is switched off.
Every few steps the weights are probed with the same captions of the validation split: the loss of the captions and of
the video tokens, and the gradient of each. At the end all three answer the test split. A second comparison has GPT-2's
50,257 words instead of the demo's few hundred: only there can a loss begin at 10.8.

In the table loss and gradient are those of the training step, before clipping (--clip 1 holds for all) and before the
update; the other columns are of the validation captions, after it. One seed, and one learning rate for all.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import train_video_plain_lm as script
from inputs import building
from report.scoring import normalise
from runtime import adapters, saving

ARMS = ("masked", "not masked", "no video")
DIRECTIONS = ("destra", "sinistra", "all'insù", "all'ingiù")


class VideoSupervised(script.VideoTask):
    """The mistake: the video's tokens are supervised in training, too. Nearly all of these labels are the same."""

    def encode(self, example, answer):
        prefix, input_ids, labels = super().encode(example, answer)
        if example.split != "train" or not prefix:  # of val and test the answer alone is asked
            return prefix, input_ids, labels
        # nothing stands before the first token, to predict it from
        return [], prefix + input_ids, [common.IGNORE, *prefix[1:], *labels]


@contextmanager
def task_of(arm: str):
    """The script with the mistake, and without the check that would refuse it, for the arm that is not masked."""
    task, check, kept = script.VideoTask, building.check_example, saving.KEPT
    saving.KEPT = 10**6  # every checkpoint is probed
    if arm == "not masked":
        script.VideoTask, building.check_example = VideoSupervised, lambda *_: None
    try:
        yield
    finally:
        script.VideoTask, building.check_example, saving.KEPT = task, check, kept


def folder_for(demo: Path, target: Path, arm: str, vocabulary: int | None) -> None:
    """A copy of the demo's model and data: with more words, or without the videos."""
    shutil.copytree(demo / "model", target / "model")
    if vocabulary:
        path = target / "model/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": vocabulary}))
    shutil.copytree(demo / "data", target / "data", copy_function=os.link)
    for path in (demo / "data").glob("*.json"):
        entries = json.loads(path.read_text())
        for entry in entries if arm == "no video" else []:
            if entry.pop("video", None):
                entry["conversations"][0]["value"] = ""
        (target / "data" / path.name).unlink()  # a hard link to the original
        (target / "data" / path.name).write_text(json.dumps(entries))


def flags_for(demo: Path, folder: Path, out: Path, args, steps: int, save_every: int) -> list[str]:
    flags = ["--model", folder / "model", "--vision-model", demo / "vision", "--data", folder / "data", "--out", out]
    flags += ["--from-scratch", "--lr", args.lr, "--questions-per-step", args.questions_per_step, "--epochs", 1000]
    flags += ["--pack-tokens", args.pack_tokens, "--max-steps", steps, "--save-every", save_every, "--no-report"]
    flags += ["--eval-every", 10**6, "--cache-features", demo / "features", "--eval-split", "test"]
    return [str(flag) for flag in flags]


def probe(folder: Path, flags: list[str], checkpoints: list[Path], examples: int) -> list[dict]:
    """Of each checkpoint: mean loss of the captions' tokens and of the videos', and the gradient of each.

    Both gradients are of what is summed into the mean over all labels, the videos' included, as without the mask.
    """
    args, data = script.parse_arguments(flags), folder / "data"
    task = script.VideoTask(folder / "model", args)
    args.limit = examples
    chosen = [example for example in script.read_examples(data, args)[0] if example.split == "val" and example.media]
    task.measured = {name: task.measure(data, name)[0] for example in chosen for name in example.media}
    model = script.load_model(folder / "model", task, torch.float32)
    trees, _ = building.build_trees(chosen, task)  # masked, as all that is not trained on
    batches = []
    for tree in trees:
        [packed] = common.pack([tree], args.pack_tokens)
        batches.append({**packed, **task.read_media(data, [tree])})
    found = []
    for checkpoint in checkpoints:
        adapters.load_trained(model.vlm, checkpoint)
        model.eval()
        sums, gradients = {"caption": 0.0, "video": 0.0}, {}
        counts = {"caption": sum(t.supervised() for t in trees), "video": sum(len(t.prefix) - 1 for t in trees)}
        for kind in sums:
            model.zero_grad()
            for batch in batches:
                labels = batch["labels"]
                if kind == "video":  # the first has nothing before it to be predicted from
                    labels = torch.full_like(labels, common.IGNORE)
                    n = len(batch["prompts"][0].prefix)
                    labels[:, 1:n] = batch["input_ids"][:, 1:n]
                loss, _ = model({**batch, "labels": labels})
                (loss / sum(counts.values())).backward()
                sums[kind] += loss.item()
            gradients[kind] = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        entry = {"step": int(checkpoint.name.split("-")[1])}
        entry |= {f"{kind}_loss": sums[kind] / counts[kind] for kind in sums}
        entry |= {f"{kind}_gradient": float(gradients[kind]) for kind in sums}
        entry["text_share"] = sums["caption"] / (sums["caption"] + sums["video"])
        entry["dilution"] = counts["caption"] / sum(counts.values())
        found.append(entry)
    return found


def train(demo: Path, work: Path, args, steps: int, every: int, vocabulary: int | None, arms) -> dict:
    found = {}
    for arm in arms:
        folder = work / f"{arm} {vocabulary}".replace(" ", "_")
        folder.mkdir()
        folder_for(demo, folder, arm, vocabulary)
        flags = flags_for(demo, folder, folder / "run", args, steps, every)
        if vocabulary:
            flags += ["--limit", "60"]  # the loss is what is looked at
        with task_of(arm):
            script.main(flags)
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        found[arm] = {"results": json.loads((folder / "run/results.json").read_text())}
        found[arm]["direction"] = directions(folder / "run/predictions.jsonl")
        found[arm]["steps"] = [line for line in lines if "loss" in line]
        if arm != "no video" and not vocabulary:
            checkpoints = sorted((folder / "run/checkpoints").glob("step-*"))
            found[arm]["probes"] = probe(folder, flags, checkpoints, args.probe)
        shutil.rmtree(folder / "run/checkpoints")
    return found


def directions(path: Path) -> float:
    """Of the texts that name a direction, the share of answers that name the same."""

    def named(text: str | None) -> set[str]:
        return {word for word in map(normalise, DIRECTIONS) if f" {word} " in f" {normalise(text)} "}

    records = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = [(named(record["prediction"]), named(record["answer"])) for record in records]
    right = [said == true for said, true in pairs if true]
    return sum(right) / max(1, len(right))


def table(found: dict, shown: list[int]) -> str:
    """The curves as a table: a line for each of the shown steps."""
    head = ["step", "masked: loss", "gradient", "not masked: loss", "gradient", "text's share", "captions' loss"]
    head += ["gradient, captions", "gradient, video tokens"]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    probes = {p["step"]: p for p in found["not masked"]["probes"]}
    masked, wrong = ({s["step"]: s for s in found[arm]["steps"]} for arm in ("masked", "not masked"))
    for step in shown:
        p, a, b = probes[step], masked[step], wrong[step]
        cells = [step, f"{a['loss']:.3f}", f"{a['grad_norm']:.2f}", f"{b['loss']:.4f}", f"{b['grad_norm']:.3f}"]
        cells += [f"{p['text_share']:.1%}", f"{p['caption_loss']:.3f}", f"{p['caption_gradient']:.3f}"]
        lines.append(" | ".join(map(str, [*cells, f"{p['video_gradient']:.4f}"])))
    return "\n".join(f"| {line} |" for line in lines)


def plot(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "masking", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    colors = {"masked": "tab:blue", "not masked": "tab:red"}
    for arm, color in colors.items():
        steps, probes = found[arm]["steps"], found[arm]["probes"]
        x = [s["step"] for s in steps]
        axes[0].plot(x, [s["loss"] for s in steps], color=color, lw=0.8, label=arm)
        x = [p["step"] for p in probes]
        axes[1].plot(x, [p["caption_loss"] for p in probes], color=color, label=arm)
    probes = found["not masked"]["probes"]
    x = [p["step"] for p in probes]
    axes[2].plot(x, [p["caption_gradient"] for p in probes], color="tab:green", label="captions")
    axes[2].plot(x, [p["video_gradient"] for p in probes], color="tab:gray", label="video tokens")
    titles = [
        "The loss that training reports",
        "The captions' own loss, validation",
        "Not masked: gradient of each part",
    ]
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step", yscale="log", xscale="log")
        axis.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--demo", type=Path, default=Path("runs/demo/video_plain_lm"), help="(default: %(default)s)")
    add("--steps", type=int, default=1200, help="of each of the three (default: %(default)s)")
    add("--every", type=int, default=25, help="steps between probes (default: %(default)s)")
    add(
        "--probe",
        type=int,
        default=24,
        help="validation examples of a probe (default: %(default)s)",
    )
    add("--lr", type=float, default=6e-4, help="(default: %(default)s)")
    add("--questions-per-step", type=int, default=8, help="(default: %(default)s)")
    add("--pack-tokens", type=int, default=400, help="one video a packed sequence (default: %(default)s)")
    add("--published-steps", type=int, default=40, help="with GPT-2's vocabulary (default: %(default)s)")
    add("--plot", type=Path, default=Path("docs/masking.svg"), help="(default: %(default)s)")
    args = parser.parse_args()
    if not (args.demo / "vision").is_dir():
        raise SystemExit(f"{args.demo}: make demo SCRIPT=video_plain_lm")
    with tempfile.TemporaryDirectory(dir=args.demo) as work:
        found = train(args.demo, Path(work), args, args.steps, args.every, None, ARMS)
        large = train(args.demo, Path(work), args, args.published_steps, args.published_steps, 50257, ARMS[:2])
    plot(found, args.plot)
    first = found["not masked"]["probes"][0]
    print(f"\n{first['dilution']:.1%} of the labels are text; wrote {args.plot}\n")
    last = args.steps // args.every * args.every
    powers = [args.every * 2**i for i in range(int(math.log2(args.steps / args.every)) + 1)]
    print(table(found, [step for step in powers if step < last] + [last]))
    print(f"\nafter {args.steps} steps, on the test split:\n")
    print("| | captions' loss | exact | direction | right video |\n|---|---|---|---|---|")
    for arm, run in found.items():
        r = run["results"]
        right = "–" if r["retrieval"] is None else f"{r['retrieval']:.1%}"
        exact = f"{r['micro']['exact']:.1%} | {run['direction']:.1%}"
        print(f"| {arm} | {r['loss']:.3f} | {exact} | {right} |")
    print(f"\nwith GPT-2's 50,257 words, {args.published_steps} steps: loss and gradient norm")
    for arm, run in large.items():
        shown = [run["steps"][i] for i in (0, 4, 9, 19, -1) if i < len(run["steps"])]
        print(f"{arm}: " + ", ".join(f"step {s['step']} {s['loss']:.2f} / {s['grad_norm']:.2f}" for s in shown))


if __name__ == "__main__":
    main()
