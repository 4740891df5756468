"""Stop one training run N times at random instants and compare it with an undisturbed run, bit for bit.

    python demo.py llava_med
    python benchmarks/kills.py --kills 200            # SIGKILL; the demo's 1,261 steps take half an hour
    python benchmarks/kills.py --kills 20 --politely  # SIGTERM and SIGUSR1 in turn

SIGKILL: half of them are aimed inside saves. After each, the newest checkpoint must be complete and at most one save
interval may be lost. Politely: the run must end within one step, with code 85, and lose nothing. In the end weights,
optimizer, metrics and predictions must equal those of the run that nothing disturbed. Exits 1 otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from runtime import saving  # noqa: E402
from runtime.signals import EXIT_STOPPED  # noqa: E402

CLOCK = {"tokens_per_s", "questions_per_s", "peak_memory_mb"}  # what no two runs share


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo" / "llava_med", help="what demo.py wrote")
    parser.add_argument("--politely", action="store_true", help="signals that let a run save")
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kills", help="two run folders; deleted first")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    args, flags = parser.parse_known_args(argv)  # the rest goes to the trainer
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    command = [sys.executable, ROOT / "train_llava_med.py", "--model", args.demo / "model"]
    command += ["--data", args.demo / "data", "--save-every", args.save_every, "--tune", "full", "--lr", "1e-3"]
    command += ["--epochs", 8, "--pack-tokens", 512, "--eval-every", 400, *flags]
    undisturbed, out = args.out / "undisturbed", args.out / "killed"
    begun = time.monotonic()
    process = start(command, undisturbed)
    while process.poll() is None and last_step(undisturbed) < 1:
        time.sleep(0.01)
    starting = time.monotonic() - begun
    assert process.wait() == 0, "the undisturbed run failed"
    print(f"undisturbed run: {last_step(undisturbed)} steps in {time.monotonic() - begun:.0f} s", flush=True)

    steps, draw = last_step(undisturbed), random.Random(args.seed)
    inside, lost = 0, []
    for kill in range(args.kills):
        most = (steps - last_step(out)) // (args.kills - kill + 1)  # so that the last kill still finds it running
        if args.politely:
            number = (signal.SIGTERM, signal.SIGUSR1)[kill % 2]
            stop_politely(command, out, draw, number, most)
        else:
            inside += kill_once(command, out, draw, kill % 2 == 1, most, starting)
        folders = sorted((out / "checkpoints").glob("step-????????"))
        faults = [f"{folder}: {fault}" for folder in folders if (fault := saving.fault(folder))]
        lost.append(last_step(out) - (int(folders[-1].name[5:]) if folders else 0))
        if faults or lost[-1] > (0 if args.politely else args.save_every):
            raise SystemExit(f"kill {kill + 1}: {lost[-1]} steps lost; {faults or 'checkpoints complete'}")
        if (kill + 1) % 10 == 0:
            print(f"{kill + 1} kills, step {last_step(out)}, {time.monotonic() - begun:.0f} s", flush=True)
    assert start(command, out).wait() == 0, "the run did not end"
    different = differences(undisturbed, out)
    print(
        f"{args.kills} kills, {inside} of them with a checkpoint half written; at most {max(lost)} steps lost "
        f"(interval {args.save_every}); different from the undisturbed run: {different or 'nothing'}"
    )
    if different:
        raise SystemExit(1)


def start(command: list, out: Path) -> subprocess.Popen:
    command = [str(word) for word in [*command, "--out", out]]
    log = out.with_suffix(".log").open("a")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


def stop_politely(command: list, out: Path, draw: random.Random, number: int, most_steps: int) -> None:
    """Start the run, signal it at any instant after its first step, and see that it ends within one more."""
    first, process = last_step(out), start(command, out)
    steps = draw.randint(1, max(1, 2 * most_steps))
    while process.poll() is None and last_step(out) < first + steps:
        time.sleep(0.001)
    time.sleep(draw.random() * 0.2)
    os.killpg(process.pid, number)
    at = last_step(out)
    if process.wait() != EXIT_STOPPED or last_step(out) > at + 1:
        raise SystemExit(f"signalled in step {at + 1}: ended after {last_step(out)}, code {process.returncode}")


def kill_once(command: list, out: Path, draw, in_save: bool, most_steps: int, starting: float) -> bool:
    """Start the run and kill it: at any instant, or a moment after a save has begun.

    `starting` are the seconds to the first step of an undisturbed run. Returns whether a checkpoint was left half
    written.
    """
    old, first, process = half_written(out), last_step(out), start(command, out)
    steps, wait = draw.randint(0, max(1, 2 * most_steps)), draw.random()
    if not in_save and wait < 0.1:  # while it starts
        time.sleep(wait * 10 * 0.8 * starting)  # the rest of a short run must not end meanwhile
    else:
        while process.poll() is None and last_step(out) < first + steps:
            time.sleep(0.01)
        while process.poll() is None and in_save and half_written(out) <= old:
            time.sleep(0.001)
        time.sleep(wait * 0.05)  # a save of the demo takes about as long
    os.killpg(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit(f"the run ended by itself with code {process.returncode}: see {out.with_suffix('.log')}")
    return not half_written(out) <= old


def half_written(out: Path) -> set:
    """The folders of checkpoints that are being written, or were when the run was killed."""
    found = set()
    for path in (out / "checkpoints").glob("*.writing"):
        with contextlib.suppress(FileNotFoundError):  # finished since
            found.add((path.name, path.stat().st_ino))
    return found


def last_step(out: Path) -> int:
    """The last optimizer step with a complete line in metrics.jsonl."""
    return max((line["step"] for line in metrics(out) if "loss" in line), default=0)


def metrics(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().split("\n")[:-1] if (out / "metrics.jsonl").exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def differences(undisturbed: Path, out: Path) -> list[str]:
    """What is not the same, bit for bit."""
    found = [name for name in ("predictions.jsonl",) if (undisturbed / name).read_bytes() != (out / name).read_bytes()]
    if metrics(undisturbed) != metrics(out):
        found.append("metrics.jsonl")
    newest = max(path.name for path in (undisturbed / "checkpoints").iterdir())
    for folder in (Path("checkpoints") / newest, Path("model")):
        for path in sorted((undisturbed / folder).glob("*.safetensors")):
            mine, theirs = load_file(out / folder / path.name), load_file(path)
            if mine.keys() != theirs.keys() or not all(torch.equal(mine[k], theirs[k]) for k in mine):
                found.append(str(folder / path.name))
    return found


if __name__ == "__main__":
    main()
