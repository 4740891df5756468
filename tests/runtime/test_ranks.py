"""Two ranks train as one does, answer each question once, stop together, and do not wait for the dead."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from copies import of_every_kind
from helpers import metrics_of, read_lines, read_tensors, run, stop_in

import train_llava_med
import train_qwen2vl_sentinel
import train_surg_video_vqa
import train_umbrella_mri
import train_video_plain_lm
from runtime import ranks, saving

ROOT = Path(train_llava_med.__file__).parent
FLAGS = ["--limit", 200, "--questions-per-step", 40, "--max-steps", 6, "--lr", 1e-3, "--lora-dropout", 0]
FLAGS += ["--pack-tokens", 256, "--save-every", 2, "--eval-every", 3, "--max-answer-tokens", 4]


def start(argv, ranks: int = 2, before: str = "", script=train_llava_med) -> list[subprocess.Popen]:
    """One process a rank, as srun starts them; `before` is Python that runs first, with `rank` at hand."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"import os, sys, runtime.saving; rank = int(os.environ['RANK']); runtime.saving.KEPT = 100\n{before}\n"
    code += f"import {script.__name__}\n{script.__name__}.main()"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": str(ranks), "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, argv)],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def ended(processes: list[subprocess.Popen], timeout: float = 300) -> tuple[list[int], list[str]]:
    """Exit codes and what was printed."""
    try:
        texts = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts


def arguments(folder: Path, out: Path, *flags) -> list:
    given = ["--model", folder / "model", "--data", folder / "data", "--out", out, "--eval-split", "test"]
    return [*given, "--no-report", *FLAGS, *flags]


def assert_close(out: Path, one: Path) -> None:
    """The same losses to 1e-5 (gradients to 1e-4: Adam magnifies rounding), examples of every step, and answers."""
    mine, theirs = metrics_of(out), metrics_of(one)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.get("ids") == b.get("ids")
        for name in {"loss", "val_loss", "grad_norm"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4 if name == "grad_norm" else 1e-5)
    assert (out / "predictions.jsonl").read_text() == (one / "predictions.jsonl").read_text()


@pytest.fixture(scope="module", params=["lora", "full"])
def one(request, demo_folder, tmp_path_factory):
    """A run of one rank, with adapters or with every parameter trained."""
    out = tmp_path_factory.mktemp("ranks") / request.param
    run(demo_folder, out, *FLAGS, "--report", "--tune", request.param)
    return out


@pytest.fixture(scope="module", autouse=True)
def every_checkpoint_is_kept():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "KEPT", 100)
        yield


# ------------------------------------------------------------------------------------------------------------
# The same training
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_and_answer_as_one(demo_folder, one, tmp_path, parallel):
    out = tmp_path / "two"
    codes, texts = ended(start(arguments(demo_folder, out, "--report", "--tune", one.name, "--parallel", parallel)))
    assert codes == [0, 0], texts
    assert_close(out, one)
    assert "Traceback" not in texts[0] and "macro average" in texts[0]
    assert texts[1].strip() == ""  # the first rank reports
    folder = "adapter" if one.name == "lora" else "model"
    mine, theirs = read_tensors(out / folder), read_tensors(one / folder)
    assert mine.keys() == theirs.keys()
    assert max(float((mine[k] - theirs[k]).abs().max()) for k in mine) < 1e-4  # Adam enlarges what rounding leaves
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in one.iterdir()}  # nothing of a second rank, no lock
    ids = [line["id"] for line in read_lines(out / "predictions.jsonl")]
    assert len(ids) == len(set(ids)) == json.loads((out / "results.json").read_text())["micro"]["n"]


@pytest.mark.parametrize(
    "flags", [["--tune", "full", "--parallel", "fsdp"], ["--lora-vision", "--augment"]], ids=" ".join
)
def test_two_ranks_with_images_of_different_sizes_train_as_one(qwen_folder, tmp_path, flags):
    codes, texts = ended(start(arguments(qwen_folder, tmp_path / "two", *flags), script=train_qwen2vl_sentinel))
    assert codes == [0, 0], texts
    run(qwen_folder, tmp_path / "one", *FLAGS, *flags, script=train_qwen2vl_sentinel)
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("flags", [["--tune", "full", "--parallel", "fsdp"], ["--workers", "1"]], ids=" ".join)
def test_two_ranks_of_which_one_sees_no_image_train_as_one(demo_folder, tmp_path, flags):
    """Then its projector has no gradient; in some steps no rank's has one."""
    flags = [*flags, "--questions-per-step", 2, "--max-steps", 9, "--epochs", 2]
    folder = of_every_kind(demo_folder, tmp_path)
    codes, texts = ended(start(arguments(folder, tmp_path / "two", *flags)))
    assert codes == [0, 0], texts
    run(folder, tmp_path / "one", *FLAGS, *flags)
    assert_close(tmp_path / "two", tmp_path / "one")


def test_two_ranks_of_torchrun_train_as_one(demo_folder, one, tmp_path):
    if one.name == "full":
        pytest.skip("adapters are enough here")
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", 2]
    command += [ROOT / "train_llava_med.py", *arguments(demo_folder, tmp_path / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(w) for w in command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "two", one)


def test_two_ranks_then_one_then_two_sharded_are_the_same_run(demo_folder, one, tmp_path, monkeypatch):
    """A checkpoint knows nothing of ranks, neither DDP's nor FSDP's."""
    if one.name == "lora":
        pytest.skip("with adapters nothing that is saved is sharded")
    out, flags = tmp_path / "run", ["--tune", "full", "--save-every", 1]
    codes, texts = ended(start(arguments(demo_folder, out, *flags, "--parallel", "fsdp"), before=SIGNALLED.format(2)))
    assert codes == [85, 85], texts
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="85"):
        stop_in(patch, 4)
        run(demo_folder, out, *FLAGS, *flags)
    codes, texts = ended(start(arguments(demo_folder, out, *flags, "--parallel", "fsdp")))
    assert codes == [0, 0], texts
    assert f"resuming from {out}/checkpoints/step-00000004" in texts[0]
    assert_close(out, one)


LOSSES = "import common; found = iter([9.0, 5.0, 4.0, 6.0]); common.mean_loss = lambda *_: next(found)"


@pytest.mark.parametrize("flags", [["--tune", "full", "--parallel", "fsdp"], []], ids=["sharded", "adapters"])
def test_two_ranks_answer_with_the_weights_of_the_best_checkpoint(demo_folder, tmp_path, flags):
    """Of three steps the second, whose weights the model holds no more when training ends."""

    def probabilities() -> list[float]:
        lines = read_lines(out / "predictions.jsonl")
        return [share for line in lines for share in line.get("probabilities", {}).values()]

    out = tmp_path / "run"
    flags = ["--limit", 28, "--epochs", 3, "--eval-every", 1, "--lr", 1e-2, "--decode", "both", *flags]
    codes, texts = ended(start(arguments(demo_folder, out, *flags), before=LOSSES))
    assert codes == [0, 0], texts
    assert "answering with step 2 (lowest validation loss: step 2, 4.0000; last: step 3, 6.0000)" in texts[0]
    found = probabilities()
    run(demo_folder, out, *FLAGS, *flags, "--eval-only")
    assert found == pytest.approx(probabilities(), rel=1e-4)
    run(demo_folder, out, *FLAGS, *flags, "--eval-only", "--answer-with", "last")
    assert found != pytest.approx(probabilities(), rel=1e-2)


def test_fewer_images_than_ranks_train_and_answer_too(demo_folder, tmp_path):
    """Rank 1 of FSDP must join every pass of rank 0, although it has no question of its own."""
    flags = ["--limit", 5, "--parallel", "fsdp", "--max-steps", 1, "--max-answer-tokens", 9]
    codes, texts = ended(start(arguments(demo_folder, tmp_path / "two", *flags)))
    assert codes == [0, 0], texts
    run(demo_folder, tmp_path / "one", *FLAGS, *flags)
    assert_close(tmp_path / "two", tmp_path / "one")


# ------------------------------------------------------------------------------------------------------------
# The same end
# ------------------------------------------------------------------------------------------------------------

# a signal in the middle of a step, to one rank of two
SIGNALLED = """
import signal, runtime.ranks
count = runtime.ranks.clip_gradients
def clip(*rest, steps=[]):
    steps.append(1)
    if len(steps) == {} and rank == 1:
        signal.raise_signal(signal.SIGUSR1)
    return count(*rest)
runtime.ranks.clip_gradients = clip
"""

INFINITE = """
import runtime.ranks, torch
add = runtime.ranks.sum_gradients
def infinite(parameters):
    if rank == 1:
        next(iter(parameters)).grad.view(-1)[0] = torch.inf
    add(parameters)
runtime.ranks.sum_gradients = infinite
"""

# one image cannot be read any more once the data is checked, and only one rank reads it
BROKEN = """
import inputs.data_check
import inputs.images
check, opened = inputs.data_check.check, inputs.images.open_image
def broken(folder, name, change=None):
    if name == {!r}:
        raise ValueError(name + " cannot be read: gone")
    return opened(folder, name, change)
def checked(*rest):
    found = check(*rest)
    inputs.images.open_image = broken
    return found
inputs.data_check.check = checked
"""


def test_all_ranks_stop_after_the_same_step_when_one_is_signalled(demo_folder, tmp_path):
    out = tmp_path / "run"
    codes, texts = ended(start(arguments(demo_folder, out), before=SIGNALLED.format(3)))
    assert codes == [85, 85], texts
    assert [line["step"] for line in metrics_of(out) if "loss" in line] == [1, 2, 3]
    assert saving.fault(out / "checkpoints" / "step-00000003") is None
    assert "stopped by a signal to another rank after step 3" in texts[0]
    assert not (out / "lock").exists()


def test_an_infinite_gradient_of_one_rank_changes_nothing_on_any(demo_folder, tmp_path):
    codes, texts = ended(start(arguments(demo_folder, tmp_path / "run", "--save-every", 1), before=INFINITE))
    assert codes == [86, 86], texts
    assert [line["step"] for line in read_lines(tmp_path / "run" / "bad_steps.jsonl")] == [1, 2, 3]
    first, second = (read_tensors(tmp_path / "run" / "checkpoints" / f"step-0000000{i}") for i in (1, 2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_file_that_turns_bad_on_one_rank_stops_all_with_a_checkpoint(demo_folder, one, tmp_path):
    if one.name == "full":
        pytest.skip("adapters are enough here")
    rows = {row["id"]: row["image"] for row in read_lines(demo_folder / "data" / "train.jsonl")}
    early = {rows[name] for line in metrics_of(one) if line["step"] <= 2 for name in line.get("ids", [])}
    image = next(
        rows[i] for line in metrics_of(one) if line["step"] > 2 for i in line.get("ids", []) if rows[i] not in early
    )
    step = next(line["step"] for line in metrics_of(one) if image in {rows[i] for i in line.get("ids", [])})
    codes, texts = ended(start(arguments(demo_folder, tmp_path / "run"), before=BROKEN.format(image)))
    assert codes == [1, 1], texts
    assert f"step {step}: {image} cannot be read: gone" in texts[0] + texts[1]
    assert saving.fault(tmp_path / "run" / "checkpoints" / f"step-{step - 1:08d}") is None


def test_a_rank_that_dies_ends_the_others(demo_folder, tmp_path):
    out = tmp_path / "run"
    first, second = start(arguments(demo_folder, out, "--max-steps", 10_000, "--epochs", 1000))
    end = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.05)
    second.kill()
    killed = time.monotonic()
    (code, _), (text, _) = ended([first, second], timeout=300)
    assert time.monotonic() - killed < 300
    assert code == 1, text
    assert "rank 0 of 2 ends: another has died, left or is stuck" in text
    assert not (out / "lock").exists()


def test_a_fault_in_the_data_is_listed_once(demo_folder, tmp_path):
    shutil.copytree(demo_folder / "data", tmp_path / "data")
    (tmp_path / "model").symlink_to(demo_folder / "model")
    names = sorted((tmp_path / "data" / "images").iterdir())[:2]  # one for each rank to find
    for name in names:
        name.write_bytes(b"")
    codes, texts = ended(start(arguments(tmp_path, tmp_path / "run")))
    assert codes == [1, 1]
    faults = [line for line in texts[0].splitlines() if line.startswith("fault")]
    assert len(faults) == 1 and "cannot be read" in faults[0]  # one cause
    failures = json.loads((tmp_path / "run" / "check.json").read_text())["failures"]
    assert all(any(f"images/{name.name} cannot be read" in failure for failure in failures) for name in names)
    assert "faults, listed in" in texts[0] and texts[1].strip() == ""


# ------------------------------------------------------------------------------------------------------------
# What ranks say to each other
# ------------------------------------------------------------------------------------------------------------

TALK = """
import torch
from runtime import ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ranks.start(torch.device("cpu"), torch.float32)
out = sys.stderr
assert (ranks.rank(), ranks.ranks()) == (rank, 2)
assert ranks.gather({"rank": rank, "text": "é" * 1000 * rank}) == [
    {"rank": 0, "text": ""},
    {"rank": 1, "text": "é" * 1000},
]
assert ranks.gather(None) == [None, None]
assert ranks.any_rank(rank == 1) and not ranks.any_rank(False)
assert ranks.on_first_rank(lambda: [rank, "é"]) == [0, "é"]
for code, expected in (("full", ["full", 1]), (85, [85, 85])):
    def leave():
        raise SystemExit(code)
    try:
        ranks.on_first_rank(leave)
        assert False
    except SystemExit as stop:
        assert stop.code == expected[rank], stop.code

# gradients of two inputs, one a rank, against torch's own
torch.manual_seed(0)
model = nn.ModuleList([nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(2, 2)])
theirs = DistributedDataParallel(nn.Sequential(model[0], model[1]))
x = torch.randn(2, 7)
theirs(x[rank]).pow(2).sum().backward()
expected = [2 * p.grad for p in (*model[0].parameters(), *model[1].parameters())]  # DDP's is a mean
model.zero_grad()
model[1](model[0](x[rank])).pow(2).sum().backward()
if rank == 1:
    model[1].bias.grad = None  # not used here
    expected[3] = None
parameters = list(model.parameters())
for bucket in (1, 40, 10**6):
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    ranks.sum_gradients(parameters, bucket)
    for p, e in zip(parameters[:3], expected[:3]):
        assert torch.allclose(p.grad, e)
    assert torch.equal(ranks.sum_over_ranks(parameters[3].grad.clone()), 2 * parameters[3].grad)  # equal on both
    assert parameters[4].grad is None and parameters[5].grad is None  # used by neither
    for p, g in zip(parameters, before):
        p.grad = g
print("talked", file=sys.stderr, flush=True)
ranks.end()
os._exit(0)  # as program.start does: DDP's threads can abort Python's own end
"""


def test_what_ranks_say_to_each_other_arrives():
    codes, texts = ended(start([], before=TALK))
    assert codes == [0, 0], texts
    assert all("talked" in text for text in texts)


@pytest.mark.parametrize("largest", [1.0, 5.0, 20.0])
def test_gradients_are_only_ever_scaled_down(largest):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]  # the last has no gradient
    for parameter, value in zip(parameters, (3.0, -4.0), strict=False):
        parameter.grad = torch.tensor([value])
    assert ranks.clip_gradients(parameters, largest) == 5.0
    scaled = [parameter.grad.item() for parameter in parameters[:2]]
    assert scaled == pytest.approx([3 * min(1, largest / 5), -4 * min(1, largest / 5)])


# ------------------------------------------------------------------------------------------------------------
# One rank hears, the other does not
# ------------------------------------------------------------------------------------------------------------


def test_a_rank_with_a_recording_and_one_without_train_as_one(video_folder, tmp_path):
    """With --question both an example without a recording is asked in writing: its rank needs no projector."""
    shutil.copytree(video_folder, tmp_path / "demo")
    silent = set()
    for split, name in (("train", "train"), ("val", "eval"), ("test", "test")):
        path = tmp_path / f"demo/data/{name}_multivideo.jsonl"
        rows = read_lines(path)
        for number, row in enumerate(rows):
            row["frames"] = [f"frames/{row['video_id']}/{frame}.jpg" for frame in row["frames"]]
            row["audio"] = f"audio/{name}/{row['id']}.wav"
            if number % 2:
                del row["audio"]
                silent.add(row["id"])
        path.with_name(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path.unlink()
    flags = ["--model", tmp_path / "demo/model", "--audio-model", tmp_path / "demo/whisper"]
    flags += ["--data", tmp_path / "demo/data", "--question", "both", "--limit", 12, "--questions-per-step", 2]
    flags += ["--max-steps", 5, "--lr", 1e-3, "--lora-dropout", 0, "--max-answer-tokens", 3, "--frames", 2]
    flags += ["--save-every", 1, "--no-report"]
    train_surg_video_vqa.main([str(flag) for flag in [*flags, "--out", tmp_path / "one"]])
    kinds = [[name in silent for name in line["ids"]] for line in metrics_of(tmp_path / "one") if "ids" in line]
    assert any(len(set(kind)) == 2 for kind in kinds)  # one of each in a step, and so a rank each
    for parallel in ("ddp", "fsdp"):
        out = tmp_path / parallel
        processes = start([*flags, "--out", out, "--parallel", parallel], script=train_surg_video_vqa)
        codes, texts = ended(processes)
        assert codes == [0, 0], texts
        assert_close(out, tmp_path / "one")
        for step in ("step-00000001", "step-00000003"):  # Adam's first moment is a mean of the gradients
            ours, theirs = (read_tensors(path / "checkpoints" / step) for path in (out, tmp_path / "one"))
            moments = [key for key in theirs if key[1].endswith("exp_avg")]
            assert any("audio_projector" in name for _, name in moments)
            for key in moments:
                assert (ours[key] - theirs[key]).norm() <= 1e-4 * theirs[key].norm() + 1e-7, key


def test_a_rank_without_a_modality_and_one_with_it_train_as_one(mri_folder, tmp_path):
    """A step of two conversations, one about a T1 scan and one about a series: each rank has one embedding to use."""
    flags = ["--model", mri_folder / "model", "--data", mri_folder / "data", "--pack-tokens", 200, "--lr", 1e-3]
    flags += ["--modality", "T1:32x32x32:8x8x8", "--modality", "rsfMRI:24x24x24x4:8x8x8x2", "--no-share-prefix"]
    flags += [
        "--questions-per-step",
        2,
        "--max-steps",
        8,
        "--max-answer-tokens",
        3,
        "--decode",
        "greedy",
        "--no-report",
    ]
    train_umbrella_mri.main([str(flag) for flag in [*flags, "--out", tmp_path / "one"]])
    series = [["hemisphere" in name for name in line["ids"]] for line in metrics_of(tmp_path / "one") if "ids" in line]
    assert any(len(set(kind)) == 2 for kind in series)  # one of each in a step, and so a rank each
    assert any(not any(kind) for kind in series)  # and steps without any: its embedding keeps no gradient
    for parallel in ("ddp", "fsdp"):
        out = tmp_path / parallel
        codes, texts = ended(start([*flags, "--out", out, "--parallel", parallel], script=train_umbrella_mri))
        assert codes == [0, 0], texts
        assert_close(out, tmp_path / "one")
        ours, theirs = (read_tensors(path / "checkpoints/step-00000008") for path in (out, tmp_path / "one"))
        moments = [key for key in theirs if key[1].endswith("exp_avg")]
        assert {key[1].split(".")[1] for key in moments} == {"T1", "rsfMRI"}
        for key in moments:
            assert (ours[key] - theirs[key]).norm() <= 1e-4 * theirs[key].norm() + 1e-7, key


def test_a_rank_with_a_video_and_one_with_a_text_alone_train_as_one(plain_folder, tmp_path):
    """The tower, projector and packers run on one rank of such a step only; the cache is filled by both."""
    flags = ["--model", plain_folder / "model", "--vision-model", plain_folder / "vision", "--from-scratch"]
    flags += ["--data", plain_folder / "data", "--fast-frames", 2, "--fast-grid", 1, "--slow-frames", 2]
    flags += ["--slow-grid", 2, "--questions-per-step", 2, "--pack-tokens", 64, "--lr", 1e-3, "--max-answer-tokens", 3]
    flags += ["--no-report", "--eval-split", "test"]
    train_video_plain_lm.main([str(flag) for flag in [*flags, "--out", tmp_path / "one"]])
    kinds = [{name[0] for name in line["ids"]} for line in metrics_of(tmp_path / "one") if "ids" in line]
    assert {"t", "v"} in kinds  # one of each in a step, and so a rank each
    results = json.loads((tmp_path / "one/results.json").read_text())
    for parallel in ("ddp", "fsdp"):
        out, cache = tmp_path / parallel, tmp_path / f"cache {parallel}"
        argv = [*flags, "--out", out, "--parallel", parallel, "--cache-features", cache]
        codes, texts = ended(start(argv, script=train_video_plain_lm))
        assert codes == [0, 0], texts
        assert_close(out, tmp_path / "one")
        assert len([path for path in cache.rglob("*") if path.is_file()]) == 40  # one a video, none half written
        found = json.loads((out / "results.json").read_text())
        assert (found["retrieval"], found["pairs"]) == (results["retrieval"], results["pairs"])
        assert found["loss"] == pytest.approx(results["loss"], rel=1e-5)
