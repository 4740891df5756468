"""Writes a tiny checkpoint and a small data set, in the real on-disk formats, to try a script on a laptop.

    python -m demo llava_med                       # -> runs/demo/llava_med/model and .../data
    python -m demo qwen2vl_sentinel                # -> runs/demo/qwen2vl_sentinel/model and .../data
    python -m demo surg_video_vqa                  # -> runs/demo/surg_video_vqa/model, .../whisper and .../data
    python -m demo umbrella_mri                    # -> runs/demo/umbrella_mri/model and .../data
    python -m demo video_plain_lm                  # -> runs/demo/video_plain_lm/model, .../vision and .../data
    python -m demo llava_med --out runs/demo/other --count 300 --seed 1

The language model is random and knows nothing; the towers have learned to see and to hear, as pretrained ones have.
Only umbrella_mri's language model, tower and projector have learned to answer as well: that script trains nothing but a
new embedding of volumes, which can say nothing through a language model that knows nothing.
video_plain_lm's folder of the language model holds no weights at all: that script starts from its configuration.
Frames and heads are drawn and recordings made of tones, so that every answer is there to be seen and every spoken
question to be heard, and a script that learns can be told from one that does not. Same seed, same versions: same bytes.
"""

import argparse
from importlib import import_module
from pathlib import Path

import transformers

COUNTS = {  # how many images, clips, subjects or videos of each demo, and what they are called
    "llava_med": (1500, "images"),
    "qwen2vl_sentinel": (1500, "images"),
    "surg_video_vqa": (700, "clips"),
    "umbrella_mri": (1900, "subjects"),
    "video_plain_lm": (3600, "videos"),
}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of the text at the top
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__, formatter_class=raw)
    defaults = ", ".join(f"{count} {things}" for count, things in COUNTS.values())
    parser.add_argument("script", choices=list(COUNTS))
    parser.add_argument("--out", type=Path, help="folder (default: runs/demo/SCRIPT)")
    parser.add_argument("--count", type=int, help=f"how many are drawn (default, in this order: {defaults})")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args()
    out, count = args.out or Path("runs/demo", args.script), args.count or COUNTS[args.script][0]
    if count < 20:
        parser.error(f"{count} are too few: at least 20, so that each split holds some patients")
    transformers.logging.disable_progress_bar()
    demo = import_module(f"demo.{args.script}")
    demo.write_model(out / "model", args.seed)
    demo.write_data(out / "data", count, args.seed)


if __name__ == "__main__":
    main()
