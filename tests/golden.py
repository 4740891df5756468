"""The working tree beside a worktree of the first version: the same numbers, bit for bit, on the same machine.

    git worktree add ../base b18e9c6
    python tests/golden.py ../base [SCRIPT …]      # llava_med …; all five without a name

Each script runs on a tiny demo, undisturbed, stopped by a signal in the middle and resumed, with full tuning, and
merged. Compared are metrics without times, trained tensors, checkpoints, predictions, and the merged folder.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SHARED = "--limit 24 --questions-per-step 8 --epochs 2 --max-steps 6 --eval-every 3 --save-every 2 --lr 1e-3 --seed 1"
SHARED = f"{SHARED} --max-answer-tokens 6 --no-report".split()
FLAGS = {
    "llava_med": "--pack-tokens 512",
    "qwen2vl_sentinel": "--pack-tokens 1024 --decode both",
    "surg_video_vqa": "--pack-tokens 1280 --frames 4 --eval-frames 4 --target short_answer --audio-model DEMO/whisper",
    "umbrella_mri": "--pack-tokens 512 --decode score "
    "--modality T1:32x32x32:8x8x8 --modality rsfMRI:24x24x24x4:8x8x8x2",
    "video_plain_lm": "--pack-tokens 512 --vision-model DEMO/vision --from-scratch "
    "--fast-frames 2 --slow-frames 2 --slow-grid 6",
}
SMALL = {"umbrella_mri": ["--tune", "embedding+lora"]}
# what carries another name now
RENAMED = {"floors": "baselines", "tolerant": "relaxed"}
CLOCK = {"tokens_per_s", "questions_per_s", "peak_memory_mb"}


def main(base: str, *scripts: str) -> None:
    differ = 0
    for script in scripts or FLAGS:
        work = Path("/tmp/golden") / script
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        this = [sys.executable, str(Path(__file__).resolve())]
        subprocess.run([*this, "--demo", base, script, str(work)], check=True, cwd=base)
        sides = [subprocess.Popen([*this, "--side", tree, script, str(work / name)], cwd=tree)
                 for name, tree in (("old", base), ("new", str(HERE)))]  # fmt: skip
        assert [side.wait() for side in sides] == [0, 0], "a side ended with an error"
        for case in ("small", "full", "stopped", "eval"):
            for what, (old, new) in compare(work / "old" / case, work / "new" / case).items():
                differ += old != new
                print(
                    f"{script:<18}{case:<9}{what:<12}{'identical' if old == new else 'DIFFERS'}  ({len(new)})",
                    flush=True,
                )
                if old != new:
                    print(first_difference(old, new))
    sys.exit(bool(differ))


def compare(old: Path, new: Path) -> dict:
    return {what: (read(old), read(new)) for what, read in
            (("metrics", metrics), ("predictions", predictions), ("tensors", tensors))}  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []


def metrics(folder: Path) -> list:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines(folder / "metrics.jsonl")]


def predictions(folder: Path) -> list:
    return [{RENAMED.get(k, k): v for k, v in line.items()} for line in lines(folder / "predictions.jsonl")]


def tensors(folder: Path) -> dict:
    """A digest of each tensor of the run: adapter, model, checkpoints and merged folder."""
    import hashlib

    import torch
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            digest = hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
            found[f"{path.relative_to(folder)} {name}"] = f"{tensor.dtype} {tuple(tensor.shape)} {digest}"
    return found


def first_difference(old, new) -> str:
    keys = sorted(old.keys() | new.keys()) if isinstance(old, dict) else range(max(len(old), len(new)))
    get = (lambda x, k: x.get(k)) if isinstance(old, dict) else (lambda x, k: x[k] if k < len(x) else None)
    key = next(k for k in keys if get(old, k) != get(new, k))
    one, other = get(old, key), get(new, key)
    if isinstance(one, dict) and isinstance(other, dict):
        both = {k: (one.get(k), other.get(k)) for k in one.keys() | other.keys() if one.get(k) != other.get(k)}
        return f"    {key}: {both}"[:600]
    return f"    {key}: {one} != {other}"[:600]


def write_demo(base: str, script: str, work: str) -> None:
    """The first version's demo, without the training of its towers."""
    sys.path[:0] = [base, f"{base}/tests"]
    import conftest

    conftest.demo_of(script, Path(work) / "demo", {"surg_video_vqa": 20, "video_plain_lm": 40}.get(script, 60))


def run_side(tree: str, script: str, out: str) -> None:
    """All cases of one script of one tree, one after the other, in this process."""
    sys.path.insert(0, tree)
    import os

    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    import torch

    torch.set_num_threads(1)
    module, out = __import__(f"train_{script}"), Path(out)
    demo = out.parent / "demo"
    given = FLAGS[script].replace("DEMO", str(demo)).split()
    base = ["--model", str(demo / "model"), "--data", str(demo / "data"), *SHARED, *given]
    small = SMALL.get(script, [])
    out.mkdir(parents=True)

    def go(case: str, *flags: str):
        handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        with (out / f"{case}.log").open("a") as log:
            stdout, sys.stdout = sys.stdout, log
            try:
                module.main([*base, "--out", str(out / case), *flags])
                return 0
            except SystemExit as stop:
                return stop.code
            finally:
                sys.stdout = stdout
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def expect(code, *wanted):
        assert code in wanted, f"{tree} {script}: ended with {code!r}"

    dropout = ["--lora-dropout", "0.1"]
    expect(go("small", *small, *dropout), 0)
    expect(go("full", "--tune", "full", *(["--packer", "pool"] if script == "video_plain_lm" else [])), 0)
    rate, signalled = module.learning_rate, []

    def with_signal(step, *rest):
        if step == 4 and not signalled:
            signalled.append(True)
            signal.raise_signal(signal.SIGTERM)
        return rate(step, *rest)

    module.learning_rate = with_signal
    expect(go("stopped", *small, *dropout), 85)
    module.learning_rate = rate
    expect(go("stopped", *small, *dropout), 0)
    expect(go("stopped", "--merge", str(out / "stopped" / "merged")), 0)
    shutil.copytree(out / "small", out / "eval")
    expect(go("eval", "--eval-only", *small), 0)


if __name__ == "__main__":
    if sys.argv[1] == "--demo":
        write_demo(*sys.argv[2:])
    elif sys.argv[1] == "--side":
        run_side(*sys.argv[2:])
    else:
        main(str(Path(sys.argv[1]).resolve()), *sys.argv[2:])
