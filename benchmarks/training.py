"""Questions a second and peak memory beside what a user would pick instead: Trainer with peft, and TRL's SFTTrainer.

    pip install '.[dev]' trl==1.16.0             # without trl its rows are left out
    python benchmarks/training.py                # six shapes of examples
    python benchmarks/training.py --growth       # with more questions, longer texts, a larger vocabulary, two ranks
    python benchmarks/training.py --quick        # either with a tiny model: is everything installed?

All train the same LLaVA of 108 million random weights on the same answers: LoRA on the language model, projector
trained, vision tower frozen, float32. Ours is train_llava_med.py's own `train` with its defaults: an image is read once
for all its questions. The others get an example for each question, its image repeated, in one batch or in batches of
one (gradients accumulated); of a conversation one example with all its answers, as ours reads it, too. TRL refuses to
pack examples with images, so it packs text alone. Pixels are ready-made on all sides. Dropout is off and the adapters
start equal, so that the losses of all steps must agree.

Each contestant is a process of its own, and they take their steps in turn, never at the same time, so that whatever
else the machine does slows down all of them. Ratios carry over to another machine, the absolute numbers do not.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
import transformers
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_llava_med
from common import IGNORE, Prompt, join_turns
from runtime import Run, ranks
from runtime.attention import in_pieces
from runtime.files import write_json
from runtime.metrics import peak_memory_mb
from runtime.signals import StopSignal

WARM_UP = 1  # steps that are not timed
# a thread that waits for another sleeps: on a busy machine, spinning takes the processor from the one waited for
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
# of a Trainer: the same questions in the same step as ours, a loss for each step, nothing besides
AS_OURS = {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "label_names": ["labels"]}
AS_OURS |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
AGREE = 1e-4  # largest relative difference of the losses
CPU = torch.device("cpu")
BOS, EOS = 1, 2
OURS, NOT_SHARED, BATCH, ACCUMULATED, TRL, TRL_PACKED = (
    "ours",
    "ours, `--no-share-prefix`",
    "Trainer, one batch",
    "Trainer, accumulation",
    "TRL, one batch",
    "TRL, packed",
)


@dataclass(frozen=True)
class Shape:
    """An optimizer step, the model that takes it, and who; lengths in tokens."""

    names: list[str]
    images: int = 1
    questions: int = 1  # about each
    answer: tuple[int, int] = (2, 5)  # the fewest and the most
    turns: bool = False  # the questions about an image are a conversation
    picture: bool = True  # or text alone
    text: int = 4  # before the image
    vocabulary: int = 32064
    layers: int = 8
    ranks: int = 1
    threads: int = 2  # of each rank
    tiny: bool = False

    @property
    def image_id(self) -> int:
        return self.vocabulary - 64

    @property
    def image_size(self) -> int:
        return 28 if self.tiny else 336


ALL = [OURS, NOT_SHARED, BATCH, ACCUMULATED, TRL]
ONE_EACH = [OURS, BATCH, ACCUMULATED, TRL]  # where nothing is shared
SHAPES = {
    "9 questions": Shape(ALL, questions=9),  # as Kvasir-VQA
    "4 questions": Shape(ALL, questions=4),
    "1 question": Shape(ONE_EACH, images=2),
    "conversation": Shape(ALL, images=2, questions=4, answer=(10, 30), turns=True),
    "caption": Shape(ONE_EACH, images=2, answer=(80, 120)),
    "text alone": Shape([OURS, BATCH, ACCUMULATED, TRL_PACKED], images=8, answer=(80, 120), picture=False),
}
FEW = [OURS, ACCUMULATED]
GROWTH = {
    "questions per image": {n: Shape(FEW, layers=2, questions=n) for n in (1, 2, 4, 8)},
    "tokens of text before the image": {n: Shape(FEW, layers=2, text=n) for n in (4, 1024, 3072)},
    "vocabulary": {n: Shape(FEW, layers=2, vocabulary=n) for n in (8064, 32064, 128064)},
    "ranks of one thread": {n: Shape([OURS], 4, 4, layers=2, threads=1, ranks=n) for n in (1, 2)},
}

# ------------------------------------------------------------------------------------------------------------
# The same model and questions on all sides
# ------------------------------------------------------------------------------------------------------------


def build_llava(shape: Shape) -> LlavaForConditionalGeneration:
    """LLaVA-Med's architecture in small: 576 tokens an image; always the same random weights."""
    text = MistralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=48 if shape.tiny else 768,
        intermediate_size=64 if shape.tiny else 2048,
        num_hidden_layers=shape.layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        sliding_window=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=48 if shape.tiny else 384,
        intermediate_size=64 if shape.tiny else 1536,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=shape.image_size,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=shape.image_id)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def start_equal(model) -> None:
    """The same random LoRA A on all sides: their layers have other names but the same order."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)


def pixels(image: int, shape: Shape) -> torch.Tensor:
    size = (3, shape.image_size, shape.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(image))


def make_plan(shape: Shape, steps: int) -> list[list[Prompt]]:
    """Of each step a tree for each image, the image's number as its media."""
    rng = random.Random(0)

    def words(fewest: int, most: int) -> list[int]:
        return [rng.randrange(3, shape.image_id) for _ in range(rng.randint(fewest, most))]

    trees = []
    for image in range(steps * shape.images):
        branches, before = [], []
        for _ in range(shape.questions):
            prompt, answer = before + words(25, 40), [*words(*shape.answer), EOS]
            branches.append((prompt + answer, [IGNORE] * len(prompt) + answer))
            before = prompt + answer if shape.turns else []
        positions = (shape.image_size // 14) ** 2 * shape.picture
        prefix = [BOS, *words(shape.text, shape.text), *[shape.image_id] * positions]
        trees.append(Prompt(prefix, branches, [f"{image}.{i}" for i in range(shape.questions)], media=image))
    return [trees[i : i + shape.images] for i in range(0, len(trees), shape.images)]


def make_examples(tree: Prompt, shape: Shape) -> list[dict]:
    """The same for Trainer and TRL: an example for each question; one for a conversation, whose last turn holds all."""
    branches = tree.branches
    if shape.turns:
        labels = zip_longest(*(own for _, own in branches), fillvalue=IGNORE)
        branches = [(branches[-1][0], [max(at) for at in labels])]  # IGNORE is negative
    before = [IGNORE] * len(tree.prefix)
    return [{"input_ids": tree.prefix + ids, "labels": before + own, "media": tree.media} for ids, own in branches]


class Media:
    """What the loop asks of a task: the pixels of prompt trees, ready-made."""

    def __init__(self, shape: Shape):
        self.shape = shape

    def read_media(self, data: Path, trees: list[Prompt]) -> dict:
        return self.of([tree.media for tree in trees])

    def of(self, images: list[int]) -> dict:
        return {"pixel_values": torch.stack([pixels(i, self.shape) for i in images])} if self.shape.picture else {}

    def pad(self, examples: list[dict]) -> dict:
        """The plain collator of the others: padded to the longest of the batch."""
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

        ids = [example["input_ids"] for example in examples]
        return {
            "input_ids": padded(ids, 0),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded([example["labels"] for example in examples], IGNORE),
            **self.of([example["media"] for example in examples]),
        }


# ------------------------------------------------------------------------------------------------------------
# A contestant: a process that takes a step whenever it is told to
# ------------------------------------------------------------------------------------------------------------


class Turns:
    """Answers a line on stdin with one step and a line of JSON; the time spent waiting is not counted.

    Without a stdout, on all ranks but the first, it neither waits nor answers.
    """

    def __init__(self, stdout):
        self.stdout = stdout

    def say(self, **values) -> None:
        if self.stdout:
            print(json.dumps(values), file=self.stdout, flush=True)

    def loaded(self, model) -> None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.say(loaded_mb=peak_memory_mb(CPU), trained=trained, parameters=sum(p.numel() for p in model.parameters()))
        self.wait()

    def step_done(self, _=None) -> None:
        self.say(seconds=time.perf_counter() - self.begun, cpu_seconds=time.process_time() - self.begun_cpu)
        self.wait()

    def wait(self) -> None:
        if self.stdout and not sys.stdin.readline():  # the main process has ended
            raise SystemExit(1)
        self.begun, self.begun_cpu = time.perf_counter(), time.process_time()


def ours(shape: Shape, plan: list[list[Prompt]], args, out: Path, turns: Turns) -> list[float]:
    """train_llava_med's training loop; saving after each step becomes the wait for the next turn."""
    transformers.AttentionInterface.register("sdpa", in_pieces)  # as models.open_model does
    llava = build_llava(shape)
    train_llava_med.choose_trained(llava, args)
    start_equal(llava)
    model = train_llava_med.LlavaMed(llava)
    turns.loaded(model)
    train_llava_med.checkpoints.Saver = lambda *_: turns.step_done
    run = Run(args, out, CPU, torch.float32, StopSignal(), epochs=[1.0] * len(plan))
    train_llava_med.train(model, plan, 0, [], Media(shape), run)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def trainer(name: str, shape: Shape, plan: list[list[Prompt]], args, out: Path, turns: Turns) -> list[float]:
    """transformers' Trainer, or TRL's, with a peft model, as their documentation sets them up."""
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
    model = get_peft_model(build_llava(shape), lora)
    start_equal(model)

    steps = [[example for tree in step for example in make_examples(tree, shape)] for step in plan]
    settings = {"train_dataset": [example for step in steps for example in step], "data_collator": Media(shape).pad}
    choices, kind, configuration = {}, Trainer, TrainingArguments
    if name in (TRL, TRL_PACKED):
        kind, configuration, own, choices = trl_settings(steps, args, packed=name == TRL_PACKED)
        settings |= own
    batch = 1 if name in (ACCUMULATED, TRL_PACKED) else len(steps[0])
    arguments = configuration(
        output_dir=str(out),
        max_steps=len(plan),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(settings["train_dataset"]) // len(plan) // batch,
        max_grad_norm=args.clip,
        use_cpu=True,
        **AS_OURS,
        **choices,
    )
    turns.loaded(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
    # our schedule, which counts steps from 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: train_llava_med.learning_rate(done + 1, len(plan), args) / args.lr
    )
    run = kind(model=model, args=arguments, optimizers=(optimizer, schedule), callbacks=[StepDone()], **settings)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trl_settings(steps: list[list[dict]], args, packed: bool) -> tuple:
    """(trainer's class, its arguments' class, settings of the first, of the second)."""
    from datasets import Dataset, concatenate_datasets
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer, pack_dataset

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": EOS}, unk_token="<pad>"))  # all is tokens already
    own = {"processing_class": transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")}
    choices = {"bf16": False, "gradient_checkpointing": False}  # both are on by default
    choices |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
    choices |= {"packing": packed, "max_length": args.pack_tokens if packed else None}
    rows = [Dataset.from_list(step) for step in steps]
    if packed:  # a step at a time, for its loss to be comparable; TRL's own collator joins what it has packed
        rows = [pack_dataset(step.select_columns(["input_ids", "labels"]), args.pack_tokens) for step in rows]
        own["data_collator"] = None
    return SFTTrainer, SFTConfig, own | {"train_dataset": concatenate_datasets(rows)}, choices


def take_part(name: str, shape: Shape, steps: int, turns: Turns) -> list[float]:
    """The losses of all steps."""
    plan = make_plan(shape, steps)
    if name == NOT_SHARED:
        plan = [[tree.part([i]) for tree in step for i in range(len(tree.branches))] for step in plan]
    with tempfile.TemporaryDirectory() as out:
        flags = ["--model", "none", "--data", "none", "--out", out, "--device", "cpu", "--dtype", "fp32"]
        args = train_llava_med.parse_arguments([*flags, "--lora-dropout", "0", "--save-every", "1"])
        if name in (OURS, NOT_SHARED):
            return ours(shape, plan, args, Path(out), turns)
        return trainer(name, shape, plan, args, Path(out), turns)


def be_contestant(job: dict) -> None:
    """In a process of its own, or in several ranks."""
    shape = Shape(**job["shape"])
    torch.set_num_threads(shape.threads)
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        ranks.start(CPU, torch.float32)
        turns = Turns(stdout if ranks.rank() == 0 else None)
        losses = take_part(job["name"], shape, job["steps"], turns)
        turns.say(peak_mb=peak_memory_mb(CPU), losses=losses)
        ranks.end()


class Contestant:
    """A process of this script that takes one step a turn."""

    def __init__(self, name: str, shape: Shape, steps: int, log):
        self.name, self.log = name, log
        job = json.dumps({"name": name, "shape": asdict(shape), "steps": steps})
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={shape.ranks}"]
        command = [sys.executable, *(several if shape.ranks > 1 else []), __file__, "--contestant", job]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, env=ENVIRONMENT
        )
        self.result = {"name": name, "seconds": [], "cpu_seconds": []}
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
        return self.result


# ------------------------------------------------------------------------------------------------------------
# The comparison
# ------------------------------------------------------------------------------------------------------------


def measure(shape: Shape, timed: int) -> list[dict]:
    """One step of each contestant after the other, until all have taken theirs; the first is what others compare to."""
    steps = WARM_UP + timed
    names = [name for name in shape.names if name not in (TRL, TRL_PACKED) or importlib.util.find_spec("trl")]
    with contextlib.ExitStack() as logs:
        sides = [Contestant(n, shape, steps, logs.enter_context(tempfile.TemporaryFile("w+"))) for n in names]
        for _ in range(steps):
            for side in sides:
                side.step()
        results = [side.finish() for side in sides]
    supervised = sum(tree.supervised() for step in make_plan(shape, steps)[WARM_UP:] for tree in step)
    for result in results:
        add_figures(result, results[0], shape.images * shape.questions, supervised / timed)
    return results


def add_figures(result: dict, first: dict, questions: float, supervised: float) -> None:
    """Adds to a contestant's result what a step of so much comes to, and what `first` is to it."""
    seconds, of_first = result["seconds"][WARM_UP:], first["seconds"][WARM_UP:]
    result["questions_per_s"] = [questions / s for s in seconds]
    result["supervised_tokens_per_s"] = supervised / statistics.median(seconds)
    result["slower"] = statistics.median(seconds) / statistics.median(of_first)
    result["slower_by_turn"] = [a / b for a, b in zip(seconds, of_first, strict=True)]
    cpu = [statistics.median(side["cpu_seconds"][WARM_UP:]) for side in (result, first)]
    result["more_cpu_seconds"] = cpu[0] / cpu[1]
    result["above_mb"] = result["peak_mb"] - result["loaded_mb"]
    result["share_of_peak"] = first["peak_mb"] / result["peak_mb"]
    result["share_above"] = first["above_mb"] / result["above_mb"]
    result["loss_difference"] = max(abs(a - b) / b for a, b in zip(first["losses"], result["losses"], strict=True))
    if result["loss_difference"] > AGREE:
        raise SystemExit(f"{result['name']} does not compute the same: losses {result['losses']}, {first['losses']}")


HEADER = (
    "| | questions/s, median (min–max) | supervised tokens/s | ours is faster, by turn (min–max) | by processor time "
    "| peak MB | ours / it | the same above the loaded model | largest difference of losses |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def row(result: dict) -> str:
    rates, turns = result["questions_per_s"], result["slower_by_turn"]
    cells = [result["name"], f"{statistics.median(rates):.2f} ({min(rates):.2f}–{max(rates):.2f})"]
    cells += [f"{result['supervised_tokens_per_s']:.1f}"]
    if result["name"] == OURS:
        cells += ["–", "–", f"{result['peak_mb']:,.0f}", "–", "–", "–"]
    else:
        cells += [f"{result['slower']:.2f} × ({min(turns):.2f}–{max(turns):.2f})"]
        cells += [f"{result['more_cpu_seconds']:.2f} ×"]
        cells += [f"{result['peak_mb']:,.0f}", f"{result['share_of_peak']:.2f}", f"{result['share_above']:.2f}"]
        cells += [f"{result['loss_difference']:.1e}"]
    return "| " + " | ".join(cells) + " |"


def compare(shapes: dict[str, Shape], timed: int) -> dict[str, list[dict]]:
    """All contestants on each shape; the table for docs/benchmarks.md is printed as far as it is measured."""
    found = {}
    print(HEADER, flush=True)
    for title, shape in shapes.items():
        found[title] = measure(shape, timed)
        (plan,) = make_plan(shape, 1)
        alone = sum(len(example["input_ids"]) for tree in plan for example in make_examples(tree, shape))
        read = sum(len(join_turns(tree)) for tree in plan)
        text = f"**{title}**: {shape.images} a step, {read:,} tokens, of examples {alone:,}"
        print(f"| {text} |" + " |" * 8)
        print("\n".join(map(row, found[title])), flush=True)
    return found


def plot(found: dict[str, list[dict]], path: Path) -> None:
    """Seconds and memory of a step along each of GROWTH."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(GROWTH), figsize=(12, 5), layout="constrained", sharex="col", squeeze=False)
    for column, (panel, values) in zip(axes.T, GROWTH.items(), strict=True):
        points = [found[f"{panel} {value:,}"] for value in values]
        for results in zip(*points, strict=True):  # of a contestant
            seconds = [statistics.median(result["seconds"][WARM_UP:]) for result in results]
            column[0].plot(list(values), seconds, marker="o", label=results[0]["name"])
            column[1].plot(list(values), [result["peak_mb"] for result in results], marker="o")
        column[1].set_xlabel(panel)
        column[1].set_xticks(list(values))
        for axis in column:
            axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("seconds per step")
    axes[1, 0].set_ylabel("peak MB")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="(default: all)")
    add("--growth", action="store_true", help="instead of the shapes, one number growing at a time")
    add("--steps", type=int, default=3, help="timed steps of each contestant (default: 3)")
    add("--quick", action="store_true", help="a tiny model, which shows no speed")
    add("--json", type=Path, metavar="FILE", help="write all numbers there; with --growth beside it a figure, FILE.svg")
    add("--contestant", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        return be_contestant(options.contestant)

    shapes = {title: SHAPES[title] for title in options.shapes}
    if options.growth:
        shapes = {f"{panel} {value:,}": shape for panel, values in GROWTH.items() for value, shape in values.items()}
    if options.quick:
        shapes = {title: replace(shape, tiny=True, layers=2) for title, shape in shapes.items()}
    if not importlib.util.find_spec("trl"):
        print("TRL is not installed: its rows are missing", file=sys.stderr)
    found = compare(shapes, options.steps)
    if options.json:
        machine = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}
        machine |= {"transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d")}
        write_json(options.json, {"machine": machine, "results": found})
        if options.growth:
            plot(found, options.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
