"""What only a GPU can tell, unattended and in minutes: the demos in bf16, resuming, decoding, and real shapes.

    python benchmarks/gpu.py --json runs/gpu.json         # under 8 minutes on one H100; exit 0 without a GPU
    python benchmarks/gpu.py --rehearse                   # the same code on a CPU, with tiny shapes

    demos     each script on its demo: float32 on the CPU and on the GPU, bf16 on the GPU; stopped, resumed, compared
    decode    greedy answers against transformers' generate on the same questions
    llava     LLaVA-Med-7B's shape, random weights, LoRA in bf16: packed trees against transformers' own forward of the
              same model on a padded row for each question; with and without cuDNN's attention; memory, utilisation
    surgical  Qwen2-VL-7B with Whisper large-v3's encoder, random weights: a step's peak memory

Every part is tried on its own: one that fails leaves its error in the JSON, and the others run.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import train_llava_med
import train_qwen2vl_sentinel
import train_surg_video_vqa
import train_umbrella_mri
import train_video_plain_lm
from common import IGNORE, Prompt

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by the makers' data sheets
SHARED = "--limit 24 --questions-per-step 8 --epochs 2 --max-steps 6 --eval-every 3 --save-every 2 --lr 1e-3 --seed 1"
SHARED = f"{SHARED} --max-answer-tokens 6 --no-report --lora-dropout 0.1".split()
DEMOS = {
    train_llava_med: "--pack-tokens 512",
    train_qwen2vl_sentinel: "--pack-tokens 1024 --decode both",
    train_surg_video_vqa: "--pack-tokens 1280 --frames 4 --eval-frames 4 --target short_answer "
    "--audio-model DEMO/whisper",
    train_umbrella_mri: "--pack-tokens 512 --modality T1:32x32x32:8x8x8 --modality rsfMRI:24x24x24x4:8x8x8x2",
    train_video_plain_lm: "--pack-tokens 512 --vision-model DEMO/vision --from-scratch "
    "--fast-frames 2 --slow-frames 2 --slow-grid 6",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--parts", nargs="+", default=["demos", "decode", "llava", "surgical"], help="(default: all)")
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.rehearse):
        print("torch sees no GPU here: nothing measured")
        return
    device = torch.device("cuda" if not args.rehearse else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, rehearsal"
    found = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    for part in args.parts:
        begun = time.perf_counter()
        try:
            found[part] = {"demos": demos, "decode": decode, "llava": llava, "surgical": surgical}[part](device)
        except Exception:
            found[part] = {"error": traceback.format_exc()}
        found[part]["seconds"] = round(time.perf_counter() - begun, 1)
        print(json.dumps({part: found[part]}, indent=1), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------
# The five scripts on their demos
# ------------------------------------------------------------------------------------------------------------


def write_demo(script, folder: Path) -> Path:
    """The script's demo, with random towers."""
    from conftest import demo_of

    name = script.__name__.removeprefix("train_")
    return demo_of(name, folder, {"surg_video_vqa": 20, "video_plain_lm": 40}.get(name, 60))


def go(script, demo: Path, out: Path, *flags: str, stop_at: int | None = None) -> int:
    """The script's exit code; with stop_at a signal comes in that step."""
    given = DEMOS[script].replace("DEMO", str(demo)).split()
    argv = ["--model", str(demo / "model"), "--data", str(demo / "data"), "--out", str(out), *SHARED, *given, *flags]
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    rate, sent = script.learning_rate, []

    def with_signal(step, *rest):
        if step == stop_at and not sent:
            sent.append(step)
            signal.raise_signal(signal.SIGTERM)
        return rate(step, *rest)

    script.learning_rate = with_signal
    try:
        script.main(argv)
        return 0
    except SystemExit as ended:
        return ended.code
    finally:
        script.learning_rate = rate
        for number, handler in handlers.items():
            signal.signal(number, handler)


def losses(out: Path) -> list[float]:
    return [entry["loss"] for line in (out / "metrics.jsonl").open() if "loss" in (entry := json.loads(line))]


def demos(device: torch.device) -> dict:
    """Losses of every step on CPU and GPU, and the largest difference that a stop and a resume make."""
    from helpers import read_tensors

    found, small = {}, {train_umbrella_mri: ["--tune", "embedding+lora"]}
    for script in DEMOS:
        with tempfile.TemporaryDirectory() as folder:
            demo, work, flags = write_demo(script, Path(folder) / "demo"), Path(folder), small.get(script, [])
            codes = [go(script, demo, work / "cpu", "--device", "cpu", "--dtype", "fp32", *flags)]
            codes += [go(script, demo, work / "fp32", "--device", device.type, "--dtype", "fp32", *flags)]
            bf16 = ["--device", device.type, "--dtype", "bf16", *flags]
            codes += [go(script, demo, work / "bf16", *bf16)]
            codes += [go(script, demo, work / "stopped", *bf16, stop_at=4), go(script, demo, work / "stopped", *bf16)]
            if codes != [0, 0, 0, 85, 0]:
                raise RuntimeError(f"{script.__name__}: exit codes {codes}, not 0, 0, 0, 85, 0")
            of = {name: losses(work / name) for name in ("cpu", "fp32", "bf16", "stopped")}
            last = "checkpoints/step-00000006"
            one, other = read_tensors(work / "bf16" / last), read_tensors(work / "stopped" / last)
            resumed = max(float((one[k].float() - other[k].float()).abs().max()) for k in one)
            found[script.__name__] = {"exit_codes": codes, "losses": of, "stopped_and_resumed_differs_by": resumed}
            found[script.__name__] |= {
                "fp32_differs_by": most(of["cpu"], of["fp32"]),
                "bf16": most(of["cpu"], of["bf16"]),
            }
    return found


def most(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def decode(device: torch.device) -> dict:
    """How many of the demo's training questions get the same greedy answer from transformers' generate, float32."""
    from helpers import load_demo

    with tempfile.TemporaryDirectory() as folder:
        demo = load_demo(write_demo(train_llava_med, Path(folder) / "demo"))
        model = train_llava_med.load_model(demo.folder / "model", demo.task, torch.float32).to(device).eval()
        same = asked = 0
        for tree in demo.trees[:8]:
            media = {k: v.to(device) for k, v in demo.read_media([tree]).items()}
            packed = common.pack([common.answering_prompt(tree)], 4096)[0]
            packed = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in packed.items()} | media

            def read(input_ids, position_ids, mask, cache, media=packed):
                return model.hidden(input_ids, position_ids, mask, cache, None if cache.get_seq_length() else media)

            eos = demo.task.tokenizer.eos_token_id
            ours = common.decode(read, model.lm_head, packed, eos, 12)
            for (ids, _), answer in zip(common.answering_prompt(tree).branches, ours, strict=True):
                input_ids = torch.tensor([tree.prefix + ids], device=device)
                with torch.no_grad():
                    theirs = model.vlm.generate(
                        input_ids=input_ids,
                        attention_mask=torch.ones_like(input_ids),
                        pixel_values=media["pixel_values"],
                        max_new_tokens=12,
                        do_sample=False,
                        eos_token_id=eos,
                    )
                same += theirs[0, input_ids.shape[1] :].tolist() == answer
                asked += 1
    return {"questions": asked, "same": same}


# ------------------------------------------------------------------------------------------------------------
# Real shapes, random weights
# ------------------------------------------------------------------------------------------------------------


def settings(script, *flags: str):
    return script.parse_arguments(["--model", "none", "--data", "none", "--out", "none", "--lora-dropout", "0", *flags])


def trees_of(images: int, questions: int, image_id: int, per_image: int, vocabulary: int) -> list[Prompt]:
    """30 + 576 + 9 x 40 = 966 tokens an image with nine questions, instead of 9 x 646 = 5,814."""
    draw = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=draw).tolist()

    found = []
    for i in range(images):
        branches = [(words(35) + (a := words(5)), [IGNORE] * 35 + a) for _ in range(questions)]
        ids = [f"{i}.{k}" for k in range(questions)]
        found.append(Prompt([*words(30), *[image_id] * per_image], branches, ids, media=i))
    return found


def timed(step, device: torch.device, rounds: int) -> dict:
    """Median seconds of a step after two that are not timed, and the most memory that one takes."""
    seconds = []
    for i in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
            if i == 0:
                torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"seconds": statistics.median(seconds[2:]), "spread": [min(seconds[2:]), max(seconds[2:])], "peak_gib": peak}


def llava_config(device: torch.device) -> transformers.LlavaConfig:
    large = device.type == "cuda"
    text = transformers.MistralConfig(vocab_size=32064, sliding_window=None)  # Mistral-7B's sizes
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    if not large:
        text.num_hidden_layers, text.hidden_size, text.intermediate_size = 2, 64, 128
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, 16
        vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size, vision.num_attention_heads = (
            2,
            32,
            64,
            2,
        )
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)


def drawn(kind, config, device: torch.device):
    """A model of random bf16 weights, made on the device."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return kind._from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(dtype)


def llava(device: torch.device) -> dict:
    """Forward and backward over 4 images with 9, 4 and 1 questions each, ours and transformers' own forward."""
    vlm = drawn(transformers.LlavaForConditionalGeneration, llava_config(device), device)
    train_llava_med.choose_trained(vlm, settings(train_llava_med))
    model = train_llava_med.LlavaMed(vlm).train()
    parameters = sum(p.numel() for p in vlm.model.language_model.parameters())
    found = {"parameters": sum(p.numel() for p in vlm.parameters())}
    trained = [p for p in vlm.parameters() if p.requires_grad]
    rounds = 5 if device.type == "cuda" else 1
    for questions in (9, 4, 1):
        trees = trees_of(4, questions, 32000, 576, 32000)
        pixels = torch.randn(4, 3, 336, 336, device=device, dtype=torch.bfloat16)
        batches = common.pack(trees, 4096)
        batches = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches]

        def ours(batches=batches, pixels=pixels):
            for batch in batches:
                images = pixels[[tree.media for tree in batch["prompts"]]]
                with torch.autocast(device.type, torch.bfloat16):
                    loss, _ = model({**batch, "pixel_values": images})
                loss.backward()

        def theirs(trees=trees, pixels=pixels):
            for tree in trees:  # a batch for each image: its questions, the image repeated
                ids = torch.tensor([tree.prefix + ids for ids, _ in tree.branches], device=device)
                masked = [[IGNORE] * len(tree.prefix) + labels for _, labels in tree.branches]
                labels, images = torch.tensor(masked, device=device), pixels[[tree.media] * len(ids)]
                with torch.autocast(device.type, torch.bfloat16):
                    vlm(input_ids=ids, pixel_values=images, labels=labels, use_cache=False).loss.backward()

        tokens = sum(len(tree) for tree in trees)
        for name, step in (("ours", ours), ("transformers", theirs)):
            for cudnn in (True, False) if name == "ours" and device.type == "cuda" else (False,):
                torch.backends.cuda.enable_cudnn_sdp(cudnn)
                for parameter in trained:
                    parameter.grad = None
                result = timed(step, device, rounds)
                result["finite"] = all(bool(p.grad.isfinite().all()) for p in trained if p.grad is not None)
                result["questions_per_s"] = 4 * questions / result["seconds"]
                peak = next((flops for gpu, flops in PEAK_FLOPS.items() if device.type == "cuda" and
                             gpu in torch.cuda.get_device_name()), None)  # fmt: skip
                if (
                    name == "ours" and peak
                ):  # 2 N a token forward, 2 N backward: no gradient of a frozen weight is taken
                    result["utilisation"] = 4 * parameters * tokens / result["seconds"] / peak
                found[f"{questions} questions, {name}{', cuDNN' if cudnn else ''}"] = result
    return found


def surgical(device: torch.device) -> dict:
    """A step of the 9.1B model: 8 frames of 384 x 288 px and 3 s of sound, one question, LoRA of rank 64."""
    script = train_surg_video_vqa
    vlm = drawn(transformers.Qwen2VLForConditionalGeneration, surgical_config(device), device)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with device:
        script.graft(vlm)
    torch.set_default_dtype(dtype)
    vlm.config.audio_token_id = 500
    args = settings(script, "--question", "audio", "--audio-model", "none")
    script.choose_trained(vlm, args)
    model = script.SurgVideo(vlm).train()
    rows, columns, frames = 20, 26, 8  # 280 x 364 pixels in patches of 14
    grid = torch.tensor([[1, rows, columns]] * frames)
    tokens, image_id, sound = frames * rows * columns // 4, vlm.config.image_token_id, 150
    prefix = [600] * 20 + [500] * sound + [image_id] * tokens
    positions = torch.arange(len(prefix)).expand(3, -1).clone()
    answer = [700, 701, 702]
    tree = Prompt(prefix, [([600] * 30 + answer, [IGNORE] * 30 + answer)], ["q"], media=0, prefix_positions=positions)
    (batch,) = common.pack([tree], 4096)
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    patch = 3 * 2 * 14 * 14
    pixels = torch.randn(frames * rows * columns, patch, device=device, dtype=torch.bfloat16)
    mel = vlm.config.audio_config["num_mel_bins"]
    batch |= {"pixel_values": pixels, "image_grid_thw": grid.to(device)}
    length = 2 * vlm.config.audio_config["max_source_positions"]
    batch |= {"input_features": torch.randn(1, mel, length, device=device), "audio_positions": torch.tensor([sound])}
    trained = [p for p in vlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    result = timed(step, device, 3)
    counts = {"parameters": sum(p.numel() for p in vlm.parameters()), "trained": sum(p.numel() for p in trained)}
    return {**result, **counts, "tokens": len(tree)}


def surgical_config(device: torch.device):
    text = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    vision = {"hidden_size": 3584}  # the rest is Qwen2-VL's default
    audio = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
    audio |= {"num_mel_bins": 128, "vocab_size": 51866, "max_source_positions": 1500}
    rope = [16, 24, 24]  # half of a head's 128
    if device.type == "cpu":
        text |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
        text |= {"num_key_value_heads": 1, "vocab_size": 1000}
        vision = {"hidden_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2}
        audio |= {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
        rope = [4, 6, 6]
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": rope, "rope_theta": 1e6}
    special = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
    if device.type == "cpu":
        special = {"image_token_id": 900, "video_token_id": 901, "vision_start_token_id": 902}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **special)
    config.audio_config = audio
    return config


if __name__ == "__main__":
    main()
