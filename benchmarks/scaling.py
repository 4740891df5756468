"""The tables of docs/scaling.md: what 8, 64 and 512 GPUs would send, pack and read.  (A minute on one core; no GPU.)

Communication is arithmetic, packing the scripts' own code on public numbers of questions, reading is timed here.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from benchmarks import gpu
from common import IGNORE, Prompt
from inputs import images

# bytes a second, assumed: NVLink; 400 Gb/s InfiniBand for each GPU; 100 Gb/s Ethernet for a node of eight
LINKS = {(8, "NVLink"): 300e9, (64, "InfiniBand"): 50e9, (512, "InfiniBand"): 50e9, (512, "Ethernet"): 100e9 / 8 / 8}
HOP, BUCKET = 5e-6, 2**26  # seconds a hop of a ring, assumed; bytes, as runtime.ranks.sum_gradients sends them
DATA = {"Kvasir-VQA": (41_079, 4_550), "Kvasir-VQA-x1": (159_549, 6_500)}  # questions, pictures; the first: training's
MEASURED = json.loads((Path(__file__).parents[1] / "docs" / "gpu_h100.json").read_text())["llava"]["9 questions, ours"]
FULL = 36  # questions of its packed sequence, four images


def communication() -> list[str]:
    """Milliseconds of the one all-reduce of a step, as a ring: each GPU sends nearly twice the gradients."""
    lines = [f"| model | trained | MB a step | {' | '.join(f'{n}, {link}' for n, link in LINKS)} |", "|---" * 7 + "|"]
    for name in gpu.CASES:
        bench = SimpleNamespace(large=True, device=torch.device("meta"))
        case = gpu.Case(bench, name, heard=name == "surgical_9b")
        vlm = case.build()
        case.script.choose_trained(vlm, case.settings())
        trained = sum(p.numel() for p in vlm.parameters() if p.requires_grad)
        cells = [name, f"{trained:,}", f"{4 * trained / 1e6:,.0f}"]
        for (ranks, _), speed in LINKS.items():
            hops = 2 * (ranks - 1) * -(-4 * trained // BUCKET)
            cells.append(f"{1000 * (2 * (ranks - 1) / ranks * 4 * trained / speed + hops * HOP):,.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def balance(sizes=(8, 64, 512)) -> list[str]:
    """How evenly common.plan_run and common.pack load the ranks, over the first three steps of an epoch."""
    lines = ["| data | GPUs | questions a step | steps an epoch | tokens, mean / slowest | GPUs without a tree |"]
    lines.append("|---" * 6 + "|")
    for name, ranks, step in [(name, n, step) for name in DATA for n in sizes for step in (64, FULL * n)]:
        args = SimpleNamespace(questions_per_step=step, epochs=1, max_steps=None, seed=0)
        plan, loads = list(common.plan_run(made_up(*DATA[name]), args)), []
        for trees in plan[: min(3, len(plan) - 1)]:  # the last one is not full
            sequences = common.pack(trees, 4096, ranks)
            tokens = [len(s["labels"][0]) if (s["labels"] != IGNORE).any() else 0 for s in sequences]
            loads.append([sum(tokens[rank::ranks]) for rank in range(ranks)])
        even = sum(sum(load) / ranks / max(load) for load in loads) / len(loads)
        idle = sum(load.count(0) for load in loads) / len(loads)
        lines.append(f"| {name} | {ranks} | {step:,} | {len(plan):,} | {even:.0%} | {idle:.0f} |")
    return lines


def made_up(questions: int, pictures: int) -> list[Prompt]:
    """So many questions spread evenly over the pictures; 606 tokens a prefix, 30 to 50 a question with its answer."""
    draw, trees = random.Random(0), []
    for i in range(pictures):
        count = (i + 1) * questions // pictures - i * questions // pictures
        lengths = [draw.randint(25, 45) for _ in range(count)]
        # questions differ, or they would be turns of a conversation (common.join_turns)
        branches = [([6 + k] + [5] * (n + 4), [IGNORE] * n + [5] * 5) for k, n in enumerate(lengths)]
        trees.append(Prompt([5] * 606, branches, [f"{i}.{k}" for k in range(count)]))
    return trees


def reading() -> list[str]:
    """A core's time for a picture, prepared as train_llava_med.py does, and for a rank's packing of a step."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
    with tempfile.TemporaryDirectory() as folder:
        gpu.write_demo(gpu.train_llava_med, Path(folder))
        paths = sorted(Path(folder, "data", "images").iterdir())[:30]
        for path in paths:  # in the size of Kvasir-VQA's pictures
            images.open_image(path.parent, path.name).resize((720, 576)).save(path, "JPEG", quality=90)
        size, begun = sum(path.stat().st_size for path in paths) / len(paths), time.process_time()
        for path in paths:
            processor([images.open_image(path.parent, path.name)], return_tensors="pt")
        seconds = (time.process_time() - begun) / len(paths)
    needed = MEASURED["questions_per_s"] / 9  # pictures a second
    lines = [f"a picture of {size / 1000:.0f} kB: {1000 * seconds:.0f} ms; a GPU needs {needed:.1f} a second, "]
    lines[0] += f"{needed * seconds:.2f} cores; 512 GPUs {512 * needed * size / 1e6:.0f} MB/s"
    for ranks in (8, 64, 512):
        trees, begun = made_up(36 * ranks, 4 * ranks), time.process_time()
        common.pack(trees, 4096, ranks, rank=0)
        lines.append(f"packing a step of {ranks} GPUs: {time.process_time() - begun:.3f} s")
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print(f"measured step: {FULL} questions in {MEASURED['seconds']:.3f} s")
    for table in (communication, balance, reading):
        print("\n" + "\n".join(table()), flush=True)


if __name__ == "__main__":
    main()
