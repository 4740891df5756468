"""What happens before the first step: seconds of processor time, and memory, for as many examples as are asked for.

    make demo                                                # a model's folder; its weights are not read
    python benchmarks/startup.py --count 100000              # some seconds to draw the data; a first start, a restart
    python benchmarks/startup.py --count 100000 --distinct   # no two questions and answers alike

The data are nine questions an image in the style of Kvasir-VQA; images are small, because what decoding costs is
another question. Measured are the stages of train_llava_med.py's main up to the first batch, of the first start and of
a restart, which opens no file again (inputs/check_cache.py), each in a process of its own.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import train_llava_med as script
from demo.questions import CANDIDATES, QUESTIONS
from inputs import data_check
from runtime import checkpoints, models, program
from runtime.metrics import peak_memory_mb

HELD_OUT = 2_000  # examples of val, and of test
ANSWERS = {"yes_no": ["yes", "no"], "size_numeric": ["<5mm", "5-10mm", "11-20mm"], "count_numeric": ["0", "1", "2"]}
ANSWERS |= {"mcq": ["left", "right", "upper-left", "lower-right"], "color": CANDIDATES["color"]}
ANSWERS |= {"open_ended": ["colonoscopy", "biopsy forceps and snare", "a large pink polyp", "normal mucosa"]}
WORDS = ["polyp", "image", "large", "pink", "small", "red", "mucosa", "normal", "visible", "snare", "fold"]


def draw(folder: Path, count: int, distinct: bool) -> None:
    """A data folder of `count` examples, nine an image; with `distinct` no two of them are worded alike."""
    (folder / "images").mkdir(parents=True)
    rng, kinds = np.random.default_rng(0), list(QUESTIONS.values())
    files = {split: (folder / f"{split}.jsonl").open("w") for split in ("train", "val", "test")}
    for i in range(count):
        image, left = i // 9, count - i
        if i % 9 == 0:
            order = rng.permutation(len(kinds))
            split = "test" if left <= HELD_OUT else "val" if left <= 2 * HELD_OUT else "train"
            picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            picture.resize((72, 72)).save(folder / "images" / f"{image:06d}.jpg")
        kind, wordings = kinds[order[i % 9]]
        row = {"id": f"q{i:07d}", "image": f"images/{image:06d}.jpg", "group": f"patient {image}"}
        row |= {"question": str(rng.choice(wordings)), "question_type": kind, "answer": str(rng.choice(ANSWERS[kind]))}
        if distinct:
            said = [" ".join(rng.choice(WORDS, n)) for n in (8, 16)]
            row |= {"question": f"What of {said[0]} {i}?", "answer": f"{said[1]} {i}", "question_type": "open_ended"}
        files[split].write(json.dumps(row) + "\n")
    for file in files.values():
        file.close()


def start(args) -> dict:
    """{stage: seconds of processor time} up to the first batch; "by the clock", seconds in all; and "peak MB"."""
    flags = ["--model", args.model, "--data", str(args.out / "data"), "--out", str(args.out / "run")]
    flags += ["--epochs", str(args.epochs), "--workers", "0", "--eval-split", "test"]
    settings, found, clock, begun = script.parse_arguments(flags), {}, time.process_time(), time.monotonic()

    def stage(name: str) -> None:
        nonlocal clock
        found[name], clock = round(time.process_time() - clock, 2), time.process_time()

    with program.start(settings, script.OWN_SETTINGS) as run:
        folder = models.find(settings.model, weights=True)
        task = script.LlavaTask(folder, settings)
        stage("model's folder")
        read = script.read_examples(Path(settings.data), settings)
        stage("examples read")
        _, trees = data_check.check(*read, task, run)
        stage("data check")
        plan = common.plan_run(trees["train"], settings)
        begin = checkpoints.first_step(run, folder, trees["train"], plan)
        stage("plan, and what a checkpoint is bound to")
        next(run.steps(plan, begin, task))
        stage("first batch")
        found |= {"by the clock": round(time.monotonic() - begun, 1), "peak MB": round(peak_memory_mb(run.device))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="examples (default: 100000)")
    parser.add_argument("--epochs", type=int, default=3, help="of the plan (default: 3)")
    parser.add_argument("--distinct", action="store_true", help="no two examples are worded alike")
    parser.add_argument("--model", default="runs/demo/llava_med/model", help="a LLaVA's folder (default: the demo's)")
    parser.add_argument("--out", type=Path, default=Path("runs/startup"), help="a folder (default: runs/startup)")
    parser.add_argument("--measure", action="store_true", help="a start in this process, with the data as they are")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(start(args)))
        return
    if not args.out.exists():
        draw(args.out / "data", args.count, args.distinct)
    shutil.rmtree(args.out / "run", ignore_errors=True)
    for _ in range(2):
        subprocess.run([sys.executable, *sys.argv, "--measure"], check=True)  # memory is of a process that drew nothing


if __name__ == "__main__":
    main()
