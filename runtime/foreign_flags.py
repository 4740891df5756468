"""What flags of other trainers are called here, and what a misspelt one was meant to be."""

import difflib

NAMES = {
    "--questions-per-step": (
        *("--batch-size", "--per-device-train-batch-size", "--per-gpu-train-batch-size", "--train-batch-size"),
        *("--global-batch-size", "--micro-batch-size", "--gradient-accumulation-steps", "--grad-accum"),
    ),
    "--lr": ("--learning-rate", "--base-lr"),
    "--lr-projector": ("--mm-projector-lr", "--projector-lr", "--merger-lr"),
    "--patience": ("--early-stopping-patience", "--early-stopping"),
    "--answer-with": ("--load-best-model-at-end",),
    "--epochs": ("--num-train-epochs", "--num-epochs", "--n-epochs", "--epoch"),
    "--max-steps": ("--max-train-steps", "--num-steps", "--num-train-steps"),
    "--warmup": ("--warmup-ratio", "--warmup-steps"),
    "--clip": ("--max-grad-norm", "--grad-clip", "--gradient-clipping"),
    "--pack-tokens": ("--max-length", "--max-seq-length", "--max-seq-len", "--model-max-length", "--cutoff-len"),
    "--out": ("--output-dir", "--output", "--save-dir", "--run-dir", "--logging-dir"),
    "--model": ("--model-name-or-path", "--model-path", "--model-name", "--model-id", "--base-model"),
    "--data": ("--dataset", "--dataset-name", "--data-path", "--data-dir", "--train-file"),
    "--media-root": ("--image-folder", "--video-folder", "--image-dir", "--image-root"),
    "--dtype": ("--bf16", "--fp16", "--fp32", "--precision", "--mixed-precision", "--torch-dtype"),
    "--tune": ("--use-lora", "--lora", "--lora-enable", "--use-peft", "--finetuning-type"),
    "--lora-r": ("--lora-rank",),
    "--log-to": ("--report-to", "--tensorboard", "--wandb", "--wandb-project", "--use-wandb"),
    "--resume": ("--resume-from-checkpoint", "--resume-from", "--checkpoint"),
    "--compile": ("--torch-compile", "--use-flash-attn", "--attn-implementation"),
    "--grad-checkpoint": ("--gradient-checkpointing", "--activation-checkpointing"),
    "--save-every": ("--save-steps", "--save-interval", "--save-strategy", "--checkpointing-steps"),
    "--eval-every": ("--eval-steps", "--eval-interval", "--eval-strategy", "--evaluation-strategy"),
    "--workers": ("--num-workers", "--dataloader-num-workers", "--preprocessing-num-workers"),
    "--parallel": ("--fsdp", "--deepspeed", "--ddp", "--tensor-parallel-size"),
    "--limit": ("--max-samples", "--max-train-samples", "--max-eval-samples", "--num-samples"),
    "--max-answer-tokens": ("--max-new-tokens", "--generation-max-length"),
    "--eval-only": ("--do-eval", "--predict-with-generate", "--evaluate"),
    "--predict": ("--do-predict", "--predict-only", "--infer", "--inference", "--generate"),
    "--seed": ("--data-seed", "--random-seed"),
}
REMARKS = {
    "--gradient-accumulation-steps": "a step takes so many questions in as many packed sequences as they need",
    "--warmup-steps": "a share of the steps, not their number",
}


def explain(unknown: list[str], ours: list[str]) -> list[str]:
    """A line for each unknown word of a command line; `ours` are the flags that there are."""
    names = {theirs: name for name, others in NAMES.items() for theirs in others}
    lines = []
    for word in unknown:
        flag = word.split("=")[0]
        written = flag.replace("_", "-")
        if written in ours:
            lines.append(f"unknown flag {flag}: it is written {written}")
        elif written in names:
            remark = f", {REMARKS[written]}" if written in REMARKS else ""
            lines.append(f"unknown flag {flag}: here it is {names[written]}{remark}")
        elif written.startswith("-"):
            close = difflib.get_close_matches(written, ours, n=1, cutoff=0.75)
            meant = f"did you mean {close[0]}?" if close else "--help lists those there are"
            lines.append(f"unknown flag {flag}: {meant}")
    return lines or [f"unexpected: {' '.join(unknown)}"]
