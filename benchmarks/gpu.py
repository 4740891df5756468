"""What only a GPU can tell, unattended: do the scripts work on it, how fast, in how much memory, what limits them.

    python benchmarks/gpu.py --json runs/gpu.json         # under 8 minutes on one H100; exit 0 without a GPU
    python benchmarks/gpu.py --rehearse                   # the same code on a CPU, with tiny shapes

    demos       each script on its demo: float32 on the CPU and on the GPU, bf16 on the GPU; a run that is stopped and
                resumed against one that is not; a question answered (--predict); FlexAttention's losses; greedy answers
                of tiny models against transformers' generate
    llava_med_7b, qwen2vl_7b, surgical_9b, qwen2vl_2b, interleave_05b
                the published shapes with random weights, LoRA in bf16: a script's own training loop against
                transformers' Trainer with peft (or, where these are not installed, transformers' forward and AdamW) on
                the same questions, losses first; kinds of attention, compiling, checkpointing of gradients
    answering   greedy answers against generate, with adapters and merged
    profile     what the GPU is busy with in a step

A part is a process of its own, and is ended when its share of the time, and what those before it have left, is over.
What it has measured by then is kept, in FILE after every part; an error is recorded, and what comes next goes on.
"""

import argparse
import gc
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import train_llava_med
import train_qwen2vl_sentinel
import train_surg_video_vqa
import train_umbrella_mri
import train_video_plain_lm
from benchmarks.training import AS_OURS
from common import IGNORE, Prompt
from runtime import EXIT_STOPPED, Run, checkpoints, models, program, shards
from runtime.batches import to_device
from runtime.signals import StopSignal

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by the makers' data sheets
WARM, TIMED = 2, 3  # steps of each contestant
AGREE = 0.02  # largest relative difference of the losses in bf16: beyond it the sides do not compute the same
PEFT = all(importlib.util.find_spec(name) for name in ("peft", "accelerate"))


class Bench:
    """Where experiments run, and the file that gets a line for each."""

    def __init__(self, large: bool, lines: Path):
        self.large, self.lines, self.failed = large, lines, False
        self.device, _ = program.pick_device("cuda" if large else "cpu", "bf16")

    def tried(self, name: str, function, *args, **kwargs) -> dict:
        """What the function returns, or its error; kept as a line."""
        begun = time.perf_counter()
        torch.compiler.reset()
        backend = "inductor" if self.large else "eager"  # which on a CPU takes minutes
        quick = mock.patch.object(torch, "compile", partial(torch.compile, backend=backend))
        torch.cuda.reset_peak_memory_stats() if self.large else None
        try:
            with redirect_stdout(sys.stderr), quick:
                found = function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            found, self.failed = {"error": repr(error)[:600], "where": traceback.format_exc()[-1500:]}, True
        line = {"name": name, "took_s": round(time.perf_counter() - begun, 2), **found}
        with self.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({k: v for k, v in line.items() if k != "operations"}), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        return found

    def wait(self) -> float:
        """The clock, once the GPU has done what it was given."""
        torch.cuda.synchronize() if self.large else None
        return time.perf_counter()


# ---- The five scripts on their demos ---------------------------------------------------------------------------------

SHARED = "--limit 24 --questions-per-step 8 --epochs 2 --max-steps 6 --eval-every 3 --save-every 2 --lr 1e-3 --seed 1"
SHARED += " --max-answer-tokens 6 --no-report"
CLIPS = "--frames 4 --eval-frames 4 --target short_answer --audio-model DEMO/whisper"
VOLUMES = "--tune embedding+lora --modality T1:32x32x32:8x8x8 --modality rsfMRI:24x24x24x4:8x8x8x2"
VIDEOS = "--vision-model DEMO/vision --from-scratch --fast-frames 2 --slow-frames 2 --slow-grid 6"
DEMOS = {  # how many are drawn, tokens of a packed sequence, other flags
    train_llava_med: (60, 512, ""),
    train_qwen2vl_sentinel: (60, 1024, "--decode both"),
    train_surg_video_vqa: (20, 1280, CLIPS),
    train_umbrella_mri: (60, 512, VOLUMES),
    train_video_plain_lm: (40, 512, VIDEOS),
}
RUNS = {  # with dropout, which draws otherwise on another device, only where one is compared with itself
    "cpu": "--device cpu --dtype fp32 --lora-dropout 0",
    "fp32": "--device GPU --dtype fp32 --lora-dropout 0",
    "bf16": "--device GPU --dtype bf16 --lora-dropout 0",
    "compiled": "--device GPU --dtype bf16 --lora-dropout 0 --compile",
    "straight": "--device GPU --dtype bf16 --lora-dropout 0.1",
    "stopped": "--device GPU --dtype bf16 --lora-dropout 0.1",
}


def demos(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folders = {script: Path(scratch, script.__name__) for script in DEMOS}
        for script, folder in folders.items():
            bench.tried(script.__name__, demo, script, folder, bench.device.type)
        for script in folders.keys() & {train_llava_med, train_qwen2vl_sentinel}:
            bench.tried(f"{script.__name__} --predict", predicted, script, folders[script], bench.device.type)
        for script, folder in folders.items():
            bench.tried(f"{script.__name__} --compile", compiled, script, folder, bench.device.type)


def write_demo(script, folder: Path) -> None:
    """The script's demo; its towers are left random to save their training."""
    kind = import_module(f"demo.{script.__name__.removeprefix('train_')}")
    with ExitStack() as stack:
        for module in {kind, *map(import_module, ("demo.qwen2vl_sentinel", "demo.recordings"))}:
            for name in {"pretrain_tower", "pretrain_listener", "pretrain_umbrella"} & set(vars(module)):
                stack.enter_context(mock.patch.object(module, name, lambda *_: None))
        kind.write_model(folder / "model", 0)
    kind.write_data(folder / "data", DEMOS[script][0], 0)


def go(script, folder: Path, run: str, device: str, stop_at: int = 0) -> int:
    """The script's exit code; a signal comes in the step `stop_at`."""
    given = f"--model DEMO/model --data DEMO/data --out DEMO/{run} {SHARED} --pack-tokens {DEMOS[script][1]} "
    given = f"{given} {DEMOS[script][2]} {RUNS[run]}".replace("DEMO", str(folder)).replace("GPU", device)
    rate = script.learning_rate

    def with_signal(step, *rest):
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return rate(step, *rest)

    try:
        with mock.patch.object(script, "learning_rate", with_signal):
            script.main(given.split())
        return 0
    except SystemExit as ended:
        return ended.code


def losses(out: Path) -> list[float]:
    return [entry["loss"] for line in (out / "metrics.jsonl").open() if "loss" in (entry := json.loads(line))]


def demo(script, folder: Path, device: str) -> dict:
    """How far losses on the GPU are from the CPU's, and what a stop and a resume change in the weights."""
    write_demo(script, folder)
    codes = [go(script, folder, run, device) for run in ("cpu", "fp32", "bf16", "straight")]
    codes += [go(script, folder, "stopped", device, stop_at=4), go(script, folder, "stopped", device)]
    if codes != [0, 0, 0, 0, EXIT_STOPPED, 0]:
        raise RuntimeError(f"exit codes {codes}")
    one, other = (tensors(folder / run / "checkpoints" / "step-00000006") for run in ("straight", "stopped"))
    found = {"resumed_differs_by": max(float((one[k].float() - other[k].float()).abs().max()) for k in one)}
    return found | {f"{run}_differs_by": apart(folder, "cpu", run) for run in ("fp32", "bf16")}


def apart(folder: Path, one: str, other: str) -> float:
    """The largest difference of the losses of two runs."""
    return max(abs(a - b) for a, b in zip(losses(folder / one), losses(folder / other), strict=True))


def tensors(folder: Path) -> dict:
    return {(path.name, k): t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def compiled(script, folder: Path, device: str) -> dict:
    """How far losses are from those of the other attention, in bf16."""
    if code := go(script, folder, "compiled", device):
        raise RuntimeError(f"exit code {code}")
    return {"bf16_differs_by": apart(folder, "bf16", "compiled")}


def predicted(script, folder: Path, device: str) -> dict:
    """What a script answers about a picture, with the adapter that it has just trained."""
    asked = json.loads((folder / "bf16" / "predictions.jsonl").open().readline())
    file = folder / "asked.jsonl"
    file.write_text(json.dumps({"image": asked["media"][0], "question": asked["question"]}) + "\n")
    given = f"--model {folder}/model --media-root {folder}/data --out {folder}/bf16 --predict {file} --device {device}"
    script.main([*given.split(), "--max-answer-tokens", "6"])
    return json.loads((folder / "bf16" / "answers.jsonl").read_text())


# ---- Published shapes, random weights --------------------------------------------------------------------------------

IMAGE, OPENING, CLOSING, SOUND, HEARD = 900, 902, 903, 904, 150  # token IDs of placeholders; positions of a recording
MISTRAL_7B = {"model_type": "mistral", "vocab_size": 32064, "sliding_window": None}  # all else is the default
QWEN_05B = {"model_type": "qwen2", "vocab_size": 152000, "hidden_size": 1024, "intermediate_size": 2816}
QWEN_05B |= {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16}
QWEN_2B = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
QWEN_2B |= {"num_attention_heads": 12, "num_key_value_heads": 2}
QWEN_7B = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
QWEN_7B |= {"num_attention_heads": 28, "num_key_value_heads": 4}
SMALL = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
SIGLIP |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False}
EVERY_PATCH = {"vision_feature_select_strategy": "full"}
SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_TOWER |= {"image_size": 56}
WHISPER = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
WHISPER |= {"num_mel_bins": 128, "vocab_size": 51866, "max_source_positions": 1500}
SMALL_WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}


def llava(large: bool, text: dict, vision: dict, **rest) -> transformers.LlavaConfig:
    text, vision = text | (SMALL, {})[large], vision | (SMALL_TOWER, {})[large]
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, **rest)


def qwen2vl(large: bool, text: dict, audio: bool = False, **rest) -> transformers.Qwen2VLConfig:
    text = text | (SMALL, {})[large]
    sections = [16, 24, 24] if large else [2, 3, 3]  # half of a head's width
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
    vision = {"hidden_size": text["hidden_size"]} | ({"embed_dim": 32, "depth": 1, "num_heads": 2}, {})[large]
    ids = {"image_token_id": IMAGE, "video_token_id": 901, "vision_start_token_id": OPENING}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids, **rest)
    config.audio_config = WHISPER | (SMALL_WHISPER, {})[large] if audio else None
    config.audio_token_id = SOUND if audio else None
    return config


CASES = {  # the script, its module, the configuration
    "llava_med_7b": (train_llava_med, "LlavaMed", partial(llava, text=MISTRAL_7B, vision=CLIP)),
    "interleave_05b": (train_llava_med, "LlavaMed", partial(llava, text=QWEN_05B, vision=SIGLIP, **EVERY_PATCH)),
    "qwen2vl_2b": (train_qwen2vl_sentinel, "Qwen2VL", partial(qwen2vl, text=QWEN_2B, tie_word_embeddings=True)),
    "qwen2vl_7b": (train_qwen2vl_sentinel, "Qwen2VL", partial(qwen2vl, text=QWEN_7B, tie_word_embeddings=False)),
    "surgical_9b": (train_surg_video_vqa, "SurgVideo", partial(qwen2vl, text=QWEN_7B, audio=True)),
}


class Case:
    """A published shape: random models, and questions about random pictures of the size that it sees."""

    def __init__(self, bench: Bench, name: str, heard: bool = False, tiny: bool = False):
        large = bench.large and not tiny
        self.script, self.module, config = CASES[name]
        self.config, self.bench, self.heard, self.pixels, self.grid = config(large), bench, heard, {}, None
        self.dtype, self.clips = torch.float32 if tiny else torch.bfloat16, self.script is train_surg_video_vqa
        if isinstance(self.config, transformers.LlavaConfig):
            edge = self.config.vision_config.image_size
            self.kind, self.shape = transformers.LlavaForConditionalGeneration, (1, 3, edge, edge)
            self.frames = [(edge // 14) ** 2]
        else:  # a picture of 588 x 728 pixels, eight frames of 280 x 364; in patches of 14
            rows, columns = ((20, 26) if self.clips else (42, 52)) if large else (4, 6)
            self.frames = [rows * columns // 4] * (8 if self.clips else 1)
            self.kind, self.grid = transformers.Qwen2VLForConditionalGeneration, torch.tensor([[1, rows, columns]])
            self.grid, self.shape = self.grid.repeat(len(self.frames), 1), (4 * sum(self.frames), 1176)

    def settings(self, *flags: str):
        given = "--model none --data none --out none --lora-dropout 0 --save-every 1 --no-report "
        given += f"--device {self.bench.device.type} --dtype {'bf16' if self.dtype == torch.bfloat16 else 'fp32'}"
        given += f" --question {('text', 'audio')[self.heard]}" * self.clips
        return self.script.parse_arguments([*given.split(), *flags])

    def autocast(self):
        return torch.autocast(self.bench.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def build(self) -> nn.Module:
        """Always the same random weights, made on the device."""
        torch.manual_seed(0)
        with self.bench.device:
            vlm = self.kind._from_config(self.config, dtype=self.dtype, attn_implementation="sdpa")
            return self.script.graft(vlm).to(self.dtype) if self.clips else vlm

    def trees(self, images: int, questions: int, vlm, first: int = 0) -> list[Prompt]:
        """For LLaVA-Med 30 + 576 + 9 x 40 = 966 tokens an image with nine questions, instead of 9 x 646 = 5,814."""
        draw, found = torch.Generator().manual_seed(first), []

        def words(count: int) -> list[int]:
            return torch.randint(3, IMAGE, (count,), generator=draw).tolist()

        for i in range(first, first + images):
            prefix = words(28) + [SOUND] * HEARD * self.heard
            for count in self.frames:
                prefix += [OPENING, *[IMAGE] * count, CLOSING]
            branches = [(words(35) + (answer := words(5)), [IGNORE] * 35 + answer) for _ in range(questions)]
            tree = Prompt(prefix, branches, [f"{i}.{k}" for k in range(questions)], media=i)
            if self.grid is not None:
                seen, grid = torch.tensor([prefix], device=vlm.device), self.grid.to(vlm.device)
                found_positions, _ = vlm.model.get_rope_index(seen, (seen == IMAGE).int(), image_grid_thw=grid)
                tree.prefix_positions = found_positions[:, 0].cpu()
            found.append(tree)
        return found

    def read_media(self, _data, trees: list[Prompt]) -> dict:
        """What the loop asks of a task: the pixels of prompt trees, ready-made."""
        for tree in trees:
            draw = torch.Generator().manual_seed(tree.media)
            self.pixels.setdefault(tree.media, torch.randn(self.shape, generator=draw))
        found = {"pixel_values": torch.cat([self.pixels[tree.media] for tree in trees])}
        if self.grid is not None:
            found["image_grid_thw"] = self.grid.repeat(len(trees), 1)
        if self.heard:
            audio = self.config.audio_config
            size = len(trees), audio["num_mel_bins"], 2 * audio["max_source_positions"]
            found |= {"input_features": torch.zeros(size), "audio_positions": torch.tensor([HEARD] * len(trees))}
        return found

    def rows(self, asked: list[tuple[Prompt, int]]) -> dict[str, torch.Tensor]:
        """What transformers' own forward reads: a row for each question, equally long, its picture repeated."""
        input_ids = torch.tensor([tree.prefix + tree.branches[i][0] for tree, i in asked])
        labels = torch.tensor([[IGNORE] * len(tree.prefix) + tree.branches[i][1] for tree, i in asked])
        found = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
        if self.grid is not None:
            found["mm_token_type_ids"] = (input_ids == IMAGE).int()
        return found | self.read_media(None, [tree for tree, _ in asked])


def start_equal(model: nn.Module) -> None:
    """The same random adapters for both sides: their layers have other names but the same order."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)


class Clock:
    """Called after each step; where it is `profiled` the last one is recorded."""

    def __init__(self, bench: Bench, profiled: bool = False):
        kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * bench.large]
        self.profiler = torch.profiler.profile(activities=kinds, record_shapes=True) if profiled else None
        self.bench, self.times = bench, [bench.wait()]

    def step(self, *_, **__) -> None:
        self.times.append(self.bench.wait())
        if self.profiler and len(self.times) == WARM + TIMED:
            self.profiler.start()

    def found(self, plan: list, losses: list[float], decoder: nn.Module, tokens: int) -> dict:
        """Utilisation: a frozen weight costs 2 operations a token forward, and 2 backward for its input's gradient."""
        every = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        seconds, questions = statistics.median(every[WARM:]), sum(len(tree.ids) for tree in plan[-1])
        found = {"seconds": seconds, "each_step": [round(s, 4) for s in every], "losses": losses, "tokens": tokens}
        found |= {"questions": questions, "questions_per_s": questions / seconds}
        if self.bench.large:
            linear = [module.weight for module in decoder.modules() if isinstance(module, nn.Linear)]
            frozen = sum(weight.numel() for weight in linear if not weight.requires_grad)
            name, found["peak_gib"] = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**30
            peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)
            found["utilisation"] = peak and 4 * frozen * tokens / seconds / peak
        return found | (self.operations() if self.profiler else {})

    def operations(self) -> dict:
        """Of the last step: milliseconds that the GPU is busy, and with what most."""
        self.profiler.stop()
        rows, field = [], "self_device_time_total" if self.bench.large else "self_cpu_time_total"
        for row in self.profiler.key_averages(group_by_input_shape=True):
            if getattr(row, field) and row.device_type == torch.autograd.DeviceType.CPU:
                rows.append((getattr(row, field) / 1000, row.count, row.key[:80], str(row.input_shapes)[:160]))
        return {"busy_ms": sum(ms for ms, *_ in rows), "operations": sorted(rows, reverse=True)[:60]}


def ours(case: Case, images: int, questions: list[int], *flags: str, cudnn=False, profiled=False) -> dict:
    """The script's own loop; each step has so many questions an image. Instead of saving it looks at the clock."""
    args, vlm = case.settings(*flags), case.build()
    models.prepare_training(case.script.choose_trained, vlm, Path("none"), args)
    start_equal(vlm)
    model = getattr(case.script, case.module)(vlm)
    plan = [case.trees(images, n, vlm, first=images * i) for i, n in enumerate(questions)]
    with tempfile.TemporaryDirectory() as out:
        run = Run(args, Path(out), case.bench.device, case.dtype, StopSignal(), epochs=[0.0] * len(plan))
        shards.place(model, run)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        clock = Clock(case.bench, profiled)
        with mock.patch.object(checkpoints, "Saver", lambda *_: clock.step):
            case.script.train(model, plan, 0, [], case, run)
        torch.backends.cuda.enable_cudnn_sdp(False)
        return clock.found(plan, losses(Path(out)), model.decoder, sum(map(len, plan[-1])))


def theirs(case: Case, images: int, questions: list[int], batch: int) -> dict:
    """Trainer with peft, or what is there of it, on the same questions; `batch` rows at a time."""
    args, vlm = case.settings(), case.build()
    plan = [case.trees(images, n, vlm, first=images * i) for i, n in enumerate(questions)]
    asked = [[(tree, i) for tree in step for i in range(len(tree.ids))] for step in plan]
    clock = Clock(case.bench)
    found = (trainer if PEFT else forward)(case, vlm, asked, args, batch, clock)
    tokens = sum(len(tree.prefix) + len(tree.branches[i][0]) for tree, i in asked[-1])
    name = f"{'Trainer and peft' if PEFT else 'forward and AdamW: no peft, accelerate here'}, batches of {batch}"
    return {"contestant": name, **clock.found(plan, found, vlm.model.language_model, tokens)}


def trainer(case: Case, vlm, asked: list, args, batch: int, clock: Clock) -> list[float]:
    """As its documentation sets it up; its losses."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class StepDone(TrainerCallback):
        on_step_end = clock.step

    lora = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "target_modules": case.script.LORA_PATTERN}
    if hasattr(vlm.model, "multi_modal_projector"):
        vlm.model.multi_modal_projector.float()  # as ours
        lora["modules_to_save"] = ["multi_modal_projector"]
    model = get_peft_model(vlm, LoraConfig(**lora))
    start_equal(model)
    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArguments(
            output_dir=out,
            max_steps=len(asked),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=len(asked[0]) // batch,
            max_grad_norm=args.clip,
            bf16=True,
            use_cpu=not case.bench.large,
            **AS_OURS,
        )
        examples = [example for step in asked for example in step]
        rest = {"optimizers": optimizer_of(model, case, args, len(asked)), "callbacks": [StepDone()]}
        run = Trainer(model, settings, data_collator=case.rows, train_dataset=examples, **rest)
        clock.times = [clock.bench.wait()]
        run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def forward(case: Case, vlm, asked: list, args, batch: int, clock: Clock) -> list[float]:
    """Without Trainer and peft: transformers' forward of the model with our adapters; its losses."""
    case.script.choose_trained(vlm, args)
    start_equal(vlm)
    optimizer, schedule = optimizer_of(vlm, case, args, len(asked))
    found, clock.times = [], [clock.bench.wait()]
    for step in asked:
        found.append(0.0)
        for i in range(0, len(step), batch):
            rows = to_device(case.rows(step[i : i + batch]), case.bench.device)
            with case.autocast():
                loss = vlm(**rows, use_cache=False).loss * len(rows["labels"]) / len(step)
            loss.backward()
            found[-1] += loss.detach()
        nn.utils.clip_grad_norm_([p for p in vlm.parameters() if p.requires_grad], args.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        clock.step()
    return list(map(float, found))


def optimizer_of(model, case: Case, args, steps: int):
    """Fused, as Trainer's own; with our schedule, which counts steps from 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=case.bench.large)
    rate = case.script.learning_rate
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: rate(n + 1, steps, args) / args.lr)


@torch.no_grad()
def answered(case: Case, images: int, questions: int, merged: bool, limit: int = 16) -> dict:
    """Seconds of greedy answers to all questions, ours in one packed sequence, generate's in one batch."""
    bench, vlm = case.bench, case.build()
    case.script.choose_trained(vlm, case.settings())
    start_equal(vlm)
    model = getattr(case.script, case.module)(common.merge_lora(vlm) if merged else vlm).eval()
    trees = [common.answering_prompt(tree) for tree in case.trees(images, questions, vlm)]
    [batch] = common.pack(trees, sum(map(len, trees)))
    batch = to_device({**batch, **case.read_media(None, batch["prompts"])}, bench.device)
    rows = case.rows([(tree, i) for tree in batch["prompts"] for i in range(questions)])
    rows = to_device({k: v for k, v in rows.items() if k != "labels"}, bench.device)
    vlm.generation_config.eos_token_id = None

    def read(input_ids, position_ids, mask, cache):
        return model.hidden(input_ids, position_ids, mask, cache, None if cache.get_seq_length() else batch)

    def generate():
        answers = vlm.generate(**rows, max_new_tokens=limit, do_sample=False)
        return answers[:, rows["input_ids"].shape[1] :].tolist()

    found, answers, seconds = {"questions": images * questions}, [], []
    for function in (partial(common.decode, read, model.lm_head, batch, -1, limit), generate):
        times = []
        for _ in range(3 if bench.large else 1):
            begun = bench.wait()
            with case.autocast():
                answer = function()
            times.append(bench.wait() - begun)
        answers.append(answer)
        seconds.append(min(times))
    found["same"] = sum(a == b for a, b in zip(*answers, strict=True))
    if case.dtype == torch.float32 and found["same"] < found["questions"]:  # bf16 rounds the two in different places
        raise ValueError(f"{found['same']} of {found['questions']} answers are generate's")
    return found | {"ours_s": seconds[0], "generate_s": seconds[1], "times_as_fast": seconds[1] / seconds[0]}


# ---- Parts -----------------------------------------------------------------------------------------------------------


def compared(case: Case, images: int, questions: int, batch: int) -> None:
    """Both sides on the same steps, the losses first."""
    steps = [questions] * (WARM + TIMED)
    one = case.bench.tried(f"{questions} questions, ours", ours, case, images, steps)
    other = case.bench.tried(f"{questions} questions, transformers", theirs, case, images, steps, batch)
    case.bench.tried(f"{questions} questions, compared", compare, one, other)


def compare(one: dict, other: dict) -> dict:
    differs = max(abs(a - b) / b for a, b in zip(one["losses"], other["losses"], strict=True))
    if not differs <= AGREE:
        raise ValueError(f"the losses differ by {differs:.1%}: the sides do not compute the same, nothing is compared")
    found = {"losses_differ_by": differs, "times_as_fast": one["questions_per_s"] / other["questions_per_s"]}
    return found | ({"share_of_peak": one["peak_gib"] / other["peak_gib"]} if "peak_gib" in one else {})


def published(bench: Bench, name: str) -> None:
    case, images, steps = Case(bench, name), 4 if bench.large else 2, [9] * (WARM + TIMED)
    if name == "surgical_9b":  # REAL-Colon-VQA has 1.02 questions a clip
        compared(case, images, 1, 2)
        case = Case(bench, name, heard=True)
        bench.tried("one clip, a spoken question", ours, case, 1, [1] * (WARM + TIMED))
        return
    compared(case, images, 9, 9)
    bench.tried("9 questions, ours, --compile", ours, case, images, steps, "--compile")
    if name == "llava_med_7b":
        compared(case, images, 4, 8)
        compared(case, images, 1, images)
        bench.tried("9 questions, ours, cuDNN's attention", ours, case, images, steps, cudnn=True)
        bench.tried("9 questions, ours, --grad-checkpoint", ours, case, images, steps, "--grad-checkpoint")
        for flags in ([], ["--compile"]):
            bench.tried(f"new lengths {flags}", ours, case, images, [9, 8, 6, 7, 5, 4], *flags)
        bench.tried("new lengths, cuDNN's attention", ours, case, images, [9, 8, 6, 7, 5, 4], cudnn=True)


def answering(bench: Bench) -> None:
    for name in ("llava_med_7b", "qwen2vl_2b"):
        bench.tried(f"{name}, tiny, float32", answered, Case(bench, name, tiny=True), 3, 3, merged=False)
    for merged in (False, True):
        name = f"9 questions an image, {'merged' if merged else 'adapters'}"
        bench.tried(name, answered, Case(bench, "llava_med_7b"), 4 if bench.large else 2, 9, merged)


def profile(bench: Bench) -> None:
    case, images = Case(bench, "llava_med_7b"), 4 if bench.large else 2
    for name, flags in {"as it is": [], "compiled": ["--compile"]}.items():
        bench.tried(name, ours, case, images, [9] * (WARM + TIMED), *flags, profiled=True)


PARTS = {  # the most valuable first, and the seconds of each: under 8 minutes in all
    "demos": (demos, 120),
    "llava_med_7b": (partial(published, name="llava_med_7b"), 130),
    "answering": (answering, 35),
    "qwen2vl_7b": (partial(published, name="qwen2vl_7b"), 60),
    "surgical_9b": (partial(published, name="surgical_9b"), 40),
    "qwen2vl_2b": (partial(published, name="qwen2vl_2b"), 30),
    "interleave_05b": (partial(published, name="interleave_05b"), 25),
    "profile": (profile, 30),
}


def alone(part: str, seconds: float, rehearse: bool) -> dict:
    """A part in a process of its own, ended when its time is over; what it has measured, and why it ended early."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder, "lines"), Path(folder, "log")
        lines.touch()
        command = [sys.executable, __file__, "--part", part, "--lines", str(lines), *["--rehearse"] * rehearse]
        one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # of several GPUs Trainer would take all
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": one, "HF_HUB_OFFLINE": "1"}
        with log.open("w") as errors:
            process = subprocess.Popen(command, stderr=errors, start_new_session=True, env=environment)
            try:
                code = process.wait(max(seconds, 0))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that compile for it
                process.wait()
                code = "its time was over"
        text = lines.read_text()
        found = {"seconds": round(time.monotonic() - begun, 1)}
        found["results"] = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return found | ({"ended": f"{code}", "log": log.read_text()[-3000:]} if code else {})


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, after every part")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes; exit 1 after an error")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="(default: all)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        bench = Bench(not args.rehearse, args.lines)
        PARTS[args.part][0](bench)
        sys.exit(int(bench.failed and args.rehearse))
    if not (torch.cuda.is_available() or args.rehearse):
        print("torch sees no GPU here: nothing measured")
        return
    device = "CPU, rehearsal" if args.rehearse else torch.cuda.get_device_name()
    found = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__, "peft": PEFT}
    ends, failed = time.monotonic(), False
    for part in args.parts:
        ends += PARTS[part][1]
        found[part] = alone(part, ends - time.monotonic(), args.rehearse)
        failed |= "ended" in found[part]
        print(f"{part}: {found[part]['seconds']} s{', ended: ' * failed}{found[part].get('ended', '')}", flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(int(failed and args.rehearse))


if __name__ == "__main__":
    main()
