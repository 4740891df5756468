"""Peak memory of train_surg_video_vqa.py at the published size: Qwen2-VL-7B, Whisper large-v3, LoRA r = 64.

    python benchmarks/memory.py               # a GPU: all 28 layers are measured (this has not been run yet)
                                              # no GPU: 2 to 8 layers are measured, 28 derived; some twenty minutes
    python benchmarks/memory.py --layers 4    # one depth alone

Weights are random and bf16, what is trained is float32. One question a step, all 1,500 audio positions, square frames
of 384 pixels (196 tokens each), gradient checkpointing. Training is two steps with AdamW, so that its moments are
there; evaluation is common.answer of six questions. Every layer is as large as any other, so the peak
grows by the same amount with each: where the measured points lie on a line, it is followed to 28. Each is measured in
a process of its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import train_surg_video_vqa as script
from runtime import Run, models, program, ranks
from runtime.batches import to_device
from runtime.files import write_json
from runtime.metrics import peak_memory_mb
from runtime.signals import StopSignal

LAYERS = 28
TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
TEXT |= {"vocab_size": 152064, "tie_word_embeddings": False, "rope_theta": 1e6, "max_position_embeddings": 32768}
TEXT |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "image_token_id": 151655}
VISION = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14, "hidden_size": 3584}
WHISPER = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
WHISPER |= {"num_mel_bins": 128, "vocab_size": 51866}
AUDIO_ID = 151658
GRID = 28  # patches along a side: 384 pixels are rounded to 392 = 28 * 14; they are merged to 14 x 14 tokens


def build(layers: int, device: torch.device) -> script.SurgVideo:
    config = Qwen2VLConfig(num_hidden_layers=layers, **TEXT, vision_config=VISION)
    config.audio_config, config.audio_token_id = WHISPER, AUDIO_ID
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with device:
        vlm = Qwen2VLForConditionalGeneration(config)
        script.graft(vlm)
    torch.set_default_dtype(torch.float32)
    args = {"tune": "lora", "question": "audio", "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05}
    args |= {"pack_tokens": 1}
    args = SimpleNamespace(**args, grad_checkpoint=True)
    models.prepare_training(script.choose_trained, vlm, Path("drawn"), args)
    return script.SurgVideo(vlm)


def tree(frames: int) -> common.Prompt:
    """One question: 1,500 audio positions, the frames, 40 tokens around them, and 8 supervised."""
    images = GRID**2 // 4 * frames
    prefix = [1] * 20 + [AUDIO_ID] * 1500 + [TEXT["image_token_id"]] * images
    labels = [common.IGNORE] * 20 + list(range(100, 108))
    positions = torch.arange(len(prefix)).expand(3, -1)
    return common.Prompt(prefix, [([2] * 20 + labels[20:], labels)], ["a"], None, positions)


def media(frames: int, clips: int) -> dict:
    return {
        "pixel_values": torch.randn(clips * frames * GRID**2, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, GRID, GRID]] * frames * clips),
        "input_features": torch.randn(clips, WHISPER["num_mel_bins"], 3000),
        "audio_positions": torch.tensor([1500] * clips),
    }


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16)


def train(model, device) -> int:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    (batch,) = common.pack([tree(8)], 4096)
    batch = to_device({**batch, **media(8, 1)}, device)
    for _ in range(2):
        with autocast(device):
            loss, supervised = model(batch)
        (loss / supervised).backward()
        ranks.clip_gradients([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert torch.isfinite(loss)
    return batch["input_ids"].shape[1]


def evaluate(model, device) -> int:
    """Six questions through common.answer: no EOS, so each has 8 tokens."""
    settings = SimpleNamespace(pack_tokens=4096, workers=0, decode="greedy", max_answer_tokens=8, data="none")
    tokenizer = SimpleNamespace(eos_token_id=-1, decode=lambda tokens, **_: str(tokens))
    task = SimpleNamespace(tokenizer=tokenizer, read_media=lambda data, some: media(6, len(some)))
    run = Run(settings, Path("none"), device, torch.bfloat16, StopSignal())
    trees = [
        common.Prompt(t.prefix, t.branches, [str(i)], None, t.prefix_positions) for i, t in enumerate([tree(6)] * 6)
    ]
    found = common.answer(model, trees, {name: None for t in trees for name in t.ids}, task, run)
    assert len(found) == 6 and not any(answered["ended"] for answered in found.values())
    return len(trees[0])


def measure(layers: int, what: str) -> dict:
    """In this process: peak MB, of a CPU without what Python and its modules need."""
    device, _ = program.pick_device("auto", "auto")
    before = peak_memory_mb(device)
    model = build(layers, device)
    tokens = {"training": train, "evaluation": evaluate}[what](model, device)
    peak = peak_memory_mb(device) - before
    return {"layers": layers, "what": what, "peak_mb": peak, "tokens": tokens, "device": str(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", help="depths (default: 28 on a GPU, 2 4 6 8 on a CPU)")
    parser.add_argument("--one", nargs=2, metavar=("LAYERS", "WHAT"), help="measure in this process and print JSON")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(int(args.one[0]), args.one[1])))
        return
    depths = args.layers or ([LAYERS] if torch.cuda.is_available() else [2, 4, 6, 8])
    found = []
    for what in ("training", "evaluation"):
        peaks = []
        for layers in depths:
            command = [sys.executable, __file__, "--one", str(layers), what]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            peaks.append(found[-1]["peak_mb"])
            print(f"{what}, {layers} layers, {found[-1]['tokens']} tokens: {peaks[-1]:,.0f} MB (measured)", flush=True)
        if len(depths) > 2 and LAYERS not in depths:
            x, y = torch.tensor(depths, dtype=torch.float64), torch.tensor(peaks, dtype=torch.float64)
            slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
            start = y.mean() - slope * x.mean()
            off = (start + slope * x - y).abs().max()
            text = f"{start:,.0f} MB + {slope:,.0f} MB a layer, measured points at most {off:,.0f} MB off"
            print(f"{what}, {LAYERS} layers: {start + LAYERS * slope:,.0f} MB (derived: {text})", flush=True)
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
