"""Disturb one training run many times at random instants and compare it with an undisturbed run, bit for bit.

    python -m demo llava_med
    python benchmarks/kills.py    # 200 kills, 20 signals, 20 dead and 10 stuck workers
    python benchmarks/kills.py --kills 0 --signals 20 --worker-kills 0 --worker-hangs 0    # one kind alone

In random order. After each the newest checkpoint must be complete, and no process of the run be left:

    kill          SIGKILL of the trainer alone, half of them aimed inside saves; at most one save interval may be lost
    signal        SIGTERM or SIGUSR1; it must end within one step, with code 85, and lose nothing
    worker kill   SIGKILL of a process that reads media; it must end by itself, with code 1, and lose nothing
    worker hang   SIGSTOP of one, and SIGTERM once no step has followed for a second; code 85, and lose nothing

In the end weights, optimizer, metrics and predictions must equal those of the run that nothing disturbed. Exits 1
otherwise. Trainers are forked from this process, which has imported them: without those seconds each time. Flags
that are not named here go to the trainer, such as --epochs or --max-steps.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_llava_med  # noqa: E402
from runtime import saving  # noqa: E402
from runtime.signals import EXIT_STOPPED  # noqa: E402

CLOCK = {"tokens_per_s", "questions_per_s", "peak_memory_mb"}  # what no two runs share

READ_AHEAD = 4  # steps that may still be taken when a worker is dead or stuck: two each, of two workers


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for what, count in (("kills", 200), ("signals", 20), ("worker-kills", 20), ("worker-hangs", 10)):
        parser.add_argument(f"--{what}", type=int, default=count, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which nothing more is disturbed")
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo" / "llava_med", help="what demo.py wrote")
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kills", help="two run folders; deleted first")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    args, flags = parser.parse_known_args(argv)  # the rest goes to the trainer
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    command = ["--model", args.demo / "model", "--data", args.demo / "data", "--device", "cpu"]
    command += ["--save-every", args.save_every, "--tune", "full", "--lr", "1e-3"]
    command += ["--epochs", 8, "--pack-tokens", 512, "--eval-every", 400, "--workers", 2, *flags]
    undisturbed, out = args.out / "undisturbed", args.out / "killed"
    begun = time.monotonic()
    process = start(command, undisturbed)
    while process.is_alive() and last_step(undisturbed) < 1:
        time.sleep(0.01)
    starting = time.monotonic() - begun
    assert ended(process) == 0, "the undisturbed run failed"
    print(f"undisturbed run: {last_step(undisturbed)} steps in {time.monotonic() - begun:.0f} s", flush=True)

    steps, draw = last_step(undisturbed), random.Random(args.seed)
    kinds = {
        "kill": args.kills,
        "signal": args.signals,
        "worker kill": args.worker_kills,
        "worker hang": args.worker_hangs,
    }
    planned = [kind for kind, count in kinds.items() for _ in range(count)]
    draw.shuffle(planned)
    inside, lost, done = 0, [], Counter()
    for number, kind in enumerate(planned):
        if time.monotonic() - begun > 60 * args.minutes:
            break
        # so that the last one still finds it running
        most = (steps - last_step(out)) // (len(planned) - number + 1) - READ_AHEAD
        if kind == "kill":
            inside += kill_once(command, out, draw, draw.random() < 0.5, most, starting)
        else:
            stop_once(kind, command, out, draw, most)
        folders = sorted((out / "checkpoints").glob("step-????????"))
        faults = [f"{folder}: {fault}" for folder in folders if (fault := saving.fault(folder))]
        lost.append(last_step(out) - (int(folders[-1].name[5:]) if folders else 0))
        if faults or lost[-1] > (args.save_every if kind == "kill" else 0):
            raise SystemExit(f"{kind}, number {number + 1}: {lost[-1]} steps lost; {faults or 'checkpoints complete'}")
        done[kind] += 1
        if (number + 1) % 10 == 0:
            print(
                f"{number + 1} of {len(planned)}, step {last_step(out)}, {time.monotonic() - begun:.0f} s", flush=True
            )
    assert ended(start(command, out)) == 0, "the run did not end"
    different = differences(undisturbed, out)
    print(
        f"{', '.join(f'{kind}: {count}' for kind, count in done.items())}; {inside} kills left a checkpoint half "
        f"written; at most {max(lost)} steps lost (interval {args.save_every}), by kills alone; "
        f"different from the undisturbed run: {different or 'nothing'}"
    )
    if different:
        raise SystemExit(1)


def start(command: list, out: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=train, args=(command, out))
    process.start()
    return process


def train(command: list, out: Path) -> None:
    """In a process of its own, the first of a group of its own."""
    os.setsid()
    with out.with_suffix(".log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    flags = [str(word) for word in [*command, "--out", out]]
    sys.argv = [train_llava_med.__file__, *flags]
    code = 0
    try:
        train_llava_med.main(flags)
    except SystemExit as end:  # its frames hold the workers; they are freed here, as they are where Python ends
        code = end.code
    sys.exit(code)


def ended(process: multiprocessing.Process) -> int | None:
    """The exit code, None where it has not ended within an hour."""
    process.join(timeout=3600)
    return process.exitcode


def stop_once(kind: str, command: list, out: Path, draw: random.Random, most_steps: int) -> None:
    """Start the run, disturb it at any instant after its first step, and see that it ends as it should."""
    first, process = last_step(out), start(command, out)
    steps = draw.randint(1, max(1, 2 * most_steps))
    while process.is_alive() and last_step(out) < first + steps:
        time.sleep(0.001)
    time.sleep(draw.random() * 0.2)
    disturbed = draw.choice(workers(process)) if kind.startswith("worker") else process.pid
    number = {"worker kill": signal.SIGKILL, "worker hang": signal.SIGSTOP}
    os.kill(disturbed, number.get(kind) or draw.choice([signal.SIGTERM, signal.SIGUSR1]))
    at, since = last_step(out), time.monotonic()
    if kind == "worker hang":
        while time.monotonic() - since < 1:  # steps that were read already are still taken
            if last_step(out) > at:
                at, since = last_step(out), time.monotonic()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
    code = ended(process)
    late = kind != "worker kill" and last_step(out) > at + 1
    if late or code != (1 if kind == "worker kill" else EXIT_STOPPED):
        raise SystemExit(f"{kind} in step {at + 1}: ended after step {last_step(out)} with code {code}")
    see_all_gone(process)


def processes(group: int) -> dict[int, str]:
    """{process ID: command line} of a process group; Linux alone has /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended since
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text()
    return found


def workers(process: multiprocessing.Process) -> list[int]:
    """The processes that the trainer has forked: they have its command line, a helper of torch has not."""
    found = processes(process.pid)
    return [pid for pid, line in sorted(found.items()) if pid != process.pid and line == found[process.pid]]


def see_all_gone(process: multiprocessing.Process) -> None:
    """Exits where a process of an ended run is still there after five seconds."""
    until = time.monotonic() + 5
    while (left := processes(process.pid)) and time.monotonic() < until:
        time.sleep(0.01)
    if left:
        raise SystemExit(f"the run has ended and left {left}")


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
        while process.is_alive() and last_step(out) < first + steps:
            time.sleep(0.01)
        while process.is_alive() and in_save and half_written(out) <= old:
            time.sleep(0.001)
        time.sleep(wait * 0.05)  # a save of the demo takes about as long
    process.kill()  # alone: its workers must end by themselves
    if ended(process) != -signal.SIGKILL:
        raise SystemExit(f"the run ended by itself with code {process.exitcode}: see {out.with_suffix('.log')}")
    see_all_gone(process)
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
    if not (out / "metrics.jsonl").exists():
        return 0
    with (out / "metrics.jsonl").open("rb") as file:  # its end: it is asked for many times a second
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{") and line.endswith(b"}")]
    return max((line["step"] for line in map(json.loads, lines) if "loss" in line), default=0)


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
