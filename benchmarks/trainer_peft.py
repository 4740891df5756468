"""How many questions a second, and in how much memory, beside transformers' Trainer with peft on the same questions.

    pip install '.[dev]'                                                  # for peft and accelerate
    python benchmarks/trainer_peft.py                                     # about five minutes on two free cores
    python benchmarks/trainer_peft.py --questions 1                       # nothing to share: what the rest brings
    python benchmarks/trainer_peft.py --json runs/trainer_peft.json       # all numbers

Both train the same LLaVA of 108 million random weights: LoRA on the language model, projector trained, vision tower
frozen, float32. Ours is train_llava_med.py's own `train` on prompt trees: an image is read once for all its questions.
The Trainer gets an example for each question, its image repeated, in batches of one (gradients accumulated) or in one
batch; pixels are ready-made on both sides. Dropout is off and the adapters start equal, so that the losses of
all steps must agree: the table compares two ways to compute the same thing.

The sides are processes of their own and take their steps in turn, never at the same time, so that whatever else the
machine does slows down all of them. Ratios carry over to another machine, the absolute numbers do not.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_llava_med
from common import IGNORE, Prompt
from runtime import Run
from runtime.files import write_json
from runtime.metrics import peak_memory_mb
from runtime.signals import StopSignal

WARM_UP = 1  # steps that are not timed
THREADS = 2
# a thread that waits for another sleeps: on a busy machine, spinning takes the processor from the one waited for
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
AGREE = 1e-4  # largest relative difference of the first losses
BOS, EOS, IMAGE, PAD = 1, 2, 32000, 32001

# ------------------------------------------------------------------------------------------------------------
# The same model and questions on both sides
# ------------------------------------------------------------------------------------------------------------


def build_llava() -> LlavaForConditionalGeneration:
    """LLaVA-Med's architecture in small: 576 tokens an image, vocabulary 32,064; always the same random weights."""
    text = MistralConfig(
        vocab_size=32064,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        sliding_window=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=336,
        patch_size=14,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))


def start_equal(model) -> None:
    """The same random LoRA A on both sides: their layers have other names but the same order."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)


def make_trees(images: int, questions: int) -> list[Prompt]:
    """A tree for each image, the image's number as its media."""
    rng = random.Random(0)

    def words(fewest: int, most: int) -> list[int]:
        return [rng.randrange(3, 32000) for _ in range(rng.randint(fewest, most))]

    trees = []
    for image in range(images):
        branches = []
        for _ in range(questions):
            question, answer = words(25, 40), [*words(2, 5), EOS]
            branches.append((question + answer, [IGNORE] * len(question) + answer))
        prefix = [BOS, *words(4, 4), *[IMAGE] * 576]
        trees.append(Prompt(prefix, branches, [f"{image}.{i}" for i in range(questions)], media=image))
    return trees


def pixels(image: int) -> torch.Tensor:
    return torch.randn(3, 336, 336, generator=torch.Generator().manual_seed(image))


# ------------------------------------------------------------------------------------------------------------
# A side: a process that takes a step whenever it is told to
# ------------------------------------------------------------------------------------------------------------


class Turns:
    """Answers a line on stdin with one step and a line of JSON; the time spent waiting is not counted."""

    def __init__(self, stdout):
        self.stdout = stdout

    def say(self, **values) -> None:
        print(json.dumps(values), file=self.stdout, flush=True)

    def loaded(self, model) -> None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.say(loaded_mb=peak_memory_mb(torch.device("cpu")), trained=trained)
        self.wait()

    def step_done(self, _=None) -> None:
        self.say(seconds=time.perf_counter() - self.begun, cpu_seconds=time.process_time() - self.begun_cpu)
        self.wait()

    def wait(self) -> None:
        if not sys.stdin.readline():  # the main process has ended
            raise SystemExit(1)
        self.begun, self.begun_cpu = time.perf_counter(), time.process_time()

    def finished(self, losses: list[float]) -> None:
        self.say(peak_mb=peak_memory_mb(torch.device("cpu")), losses=losses)


class Pixels:
    """What the loop asks of a task: the pixels of prompt trees, ready-made."""

    def read_media(self, data: Path, trees: list[Prompt]) -> dict:
        return {"pixel_values": torch.stack([pixels(tree.media) for tree in trees])}


def ours(plan: list[list[Prompt]], args, out: Path, turns: Turns) -> None:
    """train_llava_med's training loop; saving after each step becomes the wait for the next turn."""
    llava = build_llava()
    train_llava_med.choose_trained(llava, args)
    start_equal(llava)
    model = train_llava_med.LlavaMed(llava)
    turns.loaded(model)
    train_llava_med.checkpoints.Saver = lambda *_: turns.step_done
    run = Run(args, out, torch.device("cpu"), torch.float32, StopSignal())
    train_llava_med.train(model, plan, 0, [], Pixels(), run)
    turns.finished([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])


def trainer(plan: list[list[Prompt]], args, out: Path, turns: Turns, batch: int) -> None:
    """transformers' Trainer with a peft model, as its documentation sets it up; a question an example."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class StepDone(TrainerCallback):
        def on_step_end(self, *_, **__):
            turns.step_done()

    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=train_llava_med.LORA_PATTERN,
        modules_to_save=["multi_modal_projector"],
    )
    model = get_peft_model(build_llava(), lora)
    start_equal(model)
    turns.loaded(model)

    examples = [(tree, branch) for step in plan for tree in step for branch in tree.branches]
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=len(plan),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(examples) // len(plan) // batch,
        max_grad_norm=args.clip,
        train_sampling_strategy="sequential",  # the same questions in the same step as ours
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
    # our schedule, which counts steps from 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: train_llava_med.learning_rate(done + 1, len(plan), args) / args.lr
    )
    run = Trainer(
        model,
        settings,
        data_collator=pad,
        train_dataset=examples,
        optimizers=(optimizer, schedule),
        callbacks=[StepDone()],
    )
    run.train()
    turns.finished([entry["loss"] for entry in run.state.log_history if "loss" in entry])


def pad(examples) -> dict[str, torch.Tensor]:
    """The plain collator: prefix and question one after the other, padded to the longest of the batch."""
    input_ids = [tree.prefix + ids for tree, (ids, _) in examples]
    labels = [[IGNORE] * len(tree.prefix) + labels for tree, (_, labels) in examples]
    longest = max(map(len, input_ids))
    return {
        "input_ids": torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in input_ids]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in input_ids]),
        "labels": torch.tensor([part + [IGNORE] * (longest - len(part)) for part in labels]),
        "pixel_values": torch.stack([pixels(tree.media) for tree, _ in examples]),
    }


def run_side(options) -> None:
    torch.set_num_threads(THREADS)
    turns = Turns(sys.stdout)
    steps, images = WARM_UP + options.steps, options.images_per_step
    trees = make_trees(steps * images, options.questions)
    plan = [trees[i : i + images] for i in range(0, len(trees), images)]
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as out:
        flags = ["--model", "none", "--data", "none", "--out", out, "--device", "cpu", "--dtype", "fp32"]
        args = train_llava_med.parse_arguments([*flags, "--lora-dropout", "0", "--save-every", "1"])
        if options.side == "ours":
            ours(plan, args, Path(out), turns)
        else:
            trainer(plan, args, Path(out), turns, options.batch)


# ------------------------------------------------------------------------------------------------------------
# The comparison
# ------------------------------------------------------------------------------------------------------------


class Side:
    """A process of this script that takes one step a turn."""

    def __init__(self, options, name: str, side: str, images: int, batch: int = 0, log=None):
        self.name, self.questions = name, images * options.questions
        flags = {"--side": side, "--batch": batch, "--questions": options.questions}
        flags |= {"--images-per-step": images, "--steps": options.steps}
        command = [sys.executable, __file__, *(str(part) for flag in flags.items() for part in flag)]
        self.log = log
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, env=ENVIRONMENT
        )
        self.result = {"name": name, "questions_per_step": self.questions, "seconds": [], "cpu_seconds": []}
        self.result |= self.listen()

    def listen(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended early:\n{self.log.read()[-4000:]}")
        return json.loads(line)

    def step(self) -> None:
        self.process.stdin.write("\n")
        for key, seconds in self.listen().items():
            self.result[key].append(seconds)

    def finish(self) -> dict:
        self.process.stdin.write("\n")
        self.result |= self.listen()
        self.process.wait()
        timed = self.result["seconds"][WARM_UP:]
        self.result["questions_per_s"] = [self.questions / seconds for seconds in timed]
        self.result["above_mb"] = self.result["peak_mb"] - self.result["loaded_mb"]
        return self.result


def take_turns(options) -> list[dict]:
    """One step of each side after the other, until all have taken theirs."""
    n, images = options.questions, options.images_per_step
    with contextlib.ExitStack() as logs:

        def start(*rest) -> Side:
            return Side(options, *rest, log=logs.enter_context(tempfile.TemporaryFile("w+")))

        sides = [
            start("ours", "ours", images),
            start(f"Trainer, batch 1 × accumulation {n * images}", "trainer", images, 1),
            start("ours, twice the images a step", "ours", 2 * images),
            start(f"Trainer, batch {n * images} × accumulation 1", "trainer", images, n * images),
        ]
        for turn in range(WARM_UP + options.steps):
            for side in sides:
                side.step()
            shown = ", ".join(f"{side.result['seconds'][-1]:.1f} s" for side in sides)
            print(f"turn {turn + 1} of {WARM_UP + options.steps}: {shown}", file=sys.stderr, flush=True)
        return [side.finish() for side in sides]


def compare(result: dict, reference: dict) -> None:
    """Adds to a Trainer's result what ours, `reference`, is to it."""
    pairs = list(zip(reference["questions_per_s"], result["questions_per_s"], strict=True))
    result["times_as_fast"] = statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
    result["times_as_fast_by_turn"] = [a / b for a, b in pairs]
    cpu = [statistics.median(side["cpu_seconds"][WARM_UP:]) for side in (result, reference)]
    result["times_the_cpu_seconds"] = cpu[0] / cpu[1]
    for key in ("peak_mb", "above_mb"):
        result[f"share_of_{key}"] = reference[key] / result[key]
    differences = [abs(a - b) / b for a, b in zip(reference["losses"], result["losses"], strict=True)]
    result["loss_difference"] = differences


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(results: list[dict]) -> str:
    lines = [
        "| | questions a step | questions/s, median (min–max) | ours is faster, by turn (min–max) "
        "| peak MB | ours / it | above the loaded model, MB | ours / it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        faster, peak, above = "–", "–", "–"
        if "times_as_fast" in result:
            by_turn = result["times_as_fast_by_turn"]
            faster = f"{result['times_as_fast']:.1f} × ({min(by_turn):.1f}–{max(by_turn):.1f})"
            peak, above = f"{result['share_of_peak_mb']:.2f}", f"{result['share_of_above_mb']:.2f}"
        cells = [result["name"], result["questions_per_step"], spread(result["questions_per_s"], 2), faster]
        cells += [f"{result['peak_mb']:,.0f}", peak, f"{result['above_mb']:,.0f}", above]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=9, help="of an image (default: 9, as Kvasir-VQA)")
    parser.add_argument("--images-per-step", type=int, default=1, help="of an optimizer step (default: 1)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each side (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--side", choices=["ours", "trainer"], help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options)
        return

    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_llava().parameters())
    trees = make_trees(options.images_per_step, options.questions)
    tree_tokens = sum(map(len, trees))
    single_tokens = sum(len(tree.prefix) + len(ids) for tree in trees for ids, _ in tree.branches)
    results = take_turns(options)
    reference, trainers = results[0], [results[1], results[3]]
    for result in trainers:
        compare(result, reference)

    print(f"{parameters:,} parameters; trained: ours {reference['trained']:,}, Trainer {trainers[0]['trained']:,}")
    print(f"first step: {tree_tokens:,} tokens as prompt trees, {single_tokens:,} as single examples")
    print("\n" + table(results) + "\n")
    for result in trainers:
        first, worst = result["loss_difference"][0], max(result["loss_difference"])
        print(f"{result['name']}: first loss {result['losses'][0]:.6f}, ours {reference['losses'][0]:.6f}, relative")
        print(f"    difference {first:.1e} (at most {AGREE:.0e}); largest of {len(result['losses'])} steps {worst:.1e}")
        print(f"    processor time, which a busy machine disturbs less: {result['times_the_cpu_seconds']:.1f} × ours")
    if options.json:
        settings = {"questions": options.questions, "images_per_step": options.images_per_step, "threads": THREADS}
        settings |= {"parameters": parameters, "tree_tokens": tree_tokens, "single_tokens": single_tokens}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, {**settings, "results": results})
    if any(result["loss_difference"][0] > AGREE for result in trainers):
        raise SystemExit("the sides do not compute the same thing: the numbers above compare nothing")


if __name__ == "__main__":
    main()
