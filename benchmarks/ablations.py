"""Does the model listen, does it watch? The demo's test split again, with silence for sound, and with frames shuffled.

    make demo SCRIPT=surg_video_vqa           # a model that answers, and its test split
    python benchmarks/ablations.py            # a minute

The data, then copies of it, are answered by train_surg_video_vqa.py --eval-only with the run's last checkpoint. A model
that listens falls to the blind majority of each type, or below, when it hears nothing; one that watches loses the
questions about motion when the same frames stand in another order.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_surg_video_vqa as script
from inputs import sound, videos


def shuffle(data: Path, frames: int) -> None:
    """The frames that the model sees of each test clip, in a random order."""
    path, draw = data / "test_multivideo.jsonl", random.Random(0)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()  # a hard link to the original
    for entry in entries:
        del entry["frame_numbers"]  # they would tell, and the entries be refused
        entry["frames"] = [entry["frames"][i] for i in videos.evenly(len(entry["frames"]), frames)]
        draw.shuffle(entry["frames"])
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo/surg_video_vqa"), help="(default: %(default)s)")
    parser.add_argument("--eval-frames", type=int, default=4, help="as it was trained (default: 4)")
    args = parser.parse_args()
    checkpoint = max((args.demo / "run/checkpoints").glob("step-????????"), default=None)
    if checkpoint is None:
        raise SystemExit(f"{args.demo}/run holds no checkpoint: make demo SCRIPT=surg_video_vqa")
    read, results = sound.read, {}
    for name in ("as it is", "silence", "shuffled"):
        with tempfile.TemporaryDirectory(dir=args.demo) as folder:
            data = Path(folder) / "data"
            shutil.copytree(args.demo / "data", data, copy_function=os.link)
            if name == "shuffled":
                shuffle(data, args.eval_frames)
            sound.read = read
            if name == "silence":  # for the model; the data check, which has no length yet, would refuse it
                sound.read = lambda data, name, samples=None: read(data, name, samples) * np.float32(samples is None)
            flags = ["--eval-only", "--no-report", "--resume", checkpoint, "--eval-frames", args.eval_frames]
            flags += ["--eval-split", "test", "--model", args.demo / "model", "--audio-model", args.demo / "whisper"]
            script.main([str(flag) for flag in [*flags, "--data", data, "--out", Path(folder) / "run"]])
            results[name] = json.loads((Path(folder) / "run/results.json").read_text())
    print(f"\n{'question type':<24}{'n':>5}" + "".join(f"{name:>10}" for name in [*results, "blind"]))
    for kind, found in [*results["as it is"]["types"].items(), ("micro", results["as it is"]["micro"])]:
        right = [(r["micro"] if kind == "micro" else r["types"][kind])["exact"] for r in results.values()]
        shares = [*right, max(found["baselines"].values())]
        print(f"{kind:<24}{found['n']:>5}" + "".join(f"{share:>10.1%}" for share in shares))


if __name__ == "__main__":
    main()
