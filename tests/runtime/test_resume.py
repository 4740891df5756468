"""A run that is stopped and started again is the same run, bit for bit on a CPU."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import metrics_of, read_lines, read_tensors, refused, run, stop_in

import train_llava_med
import train_umbrella_mri
from runtime import Run, checkpoints, ranks, saving, shards
from runtime.metrics import Metrics
from runtime.saving import KEPT  # as it is before the tests raise it
from runtime.signals import StopSignal

ROOT = Path(train_llava_med.__file__).parent
# 40 questions of four images, at most 12 a step: 4 steps an epoch. Dropout draws random numbers in every step.
LORA = ["--limit", 40, "--questions-per-step", 12, "--epochs", 2, "--lora-dropout", 0.1, "--lr", 1e-3]
LORA += ["--save-every", 1, "--eval-every", 2, "--max-answer-tokens", 1]
FULL = [*LORA, "--tune", "full", "--max-steps", 4]
STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def every_checkpoint_is_kept():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "KEPT", 100)
        yield


@pytest.fixture(scope="module")
def undisturbed(demo_folder, tmp_path_factory):
    """A run that nothing disturbed. Tests must not write here."""
    out = tmp_path_factory.mktemp("resume") / "undisturbed"
    run(demo_folder, out, *LORA)
    assert len(list(out.glob("checkpoints/step-*"))) == STEPS
    return out


def stopped_copy(undisturbed: Path, out: Path, step: int, cut: bool = False) -> Path:
    """The run folder as a kill after `step` leaves it; with `cut` also the next line of the metrics, half written."""
    shutil.copytree(undisturbed, out)
    for name in ("adapter", "predictions.jsonl", "results.json"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in out.glob("checkpoints/step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    if cut:
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        upto = [line for line in lines if json.loads(line)["step"] <= step]
        after = lines[len(upto)] if len(upto) < len(lines) else '{"step": 9, "epoch": 2.2}'
        (out / "metrics.jsonl").write_text("".join(upto) + after[: len(after) // 2])
    return out


def assert_same_run(out: Path, undisturbed: Path, steps: int = STEPS) -> None:
    last = f"checkpoints/step-{steps:08d}"
    for folder in (last, "adapter" if (undisturbed / "adapter").exists() else "model"):
        mine, theirs = read_tensors(out / folder), read_tensors(undisturbed / folder)
        assert mine.keys() == theirs.keys() and mine
        assert [k for k in mine if not torch.equal(mine[k], theirs[k])] == []
    assert any(name.endswith(" exp_avg_sq") for _, name in read_tensors(out / last))
    assert metrics_of(out) == metrics_of(undisturbed)
    assert (out / "predictions.jsonl").read_text() == (undisturbed / "predictions.jsonl").read_text()


# ------------------------------------------------------------------------------------------------------------
# The same run
# ------------------------------------------------------------------------------------------------------------


def test_the_undisturbed_run_takes_every_example_once_an_epoch_and_shuffles(demo_folder, undisturbed):
    steps = [line for line in metrics_of(undisturbed) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    first, second = ([i for line in half for i in line["ids"]] for half in (steps[:4], steps[4:]))
    rows = [row["id"] for row in read_lines(demo_folder / "data" / "train.jsonl")[:40]]
    assert sorted(first) == sorted(second) == sorted(rows)
    assert first != second
    assert [line["step"] for line in metrics_of(undisturbed) if "val_loss" in line] == [2, 4, 6, 8]


@pytest.mark.parametrize("cut", [False, True], ids=["metrics complete", "metrics cut"])
@pytest.mark.parametrize("step", [2, 4, 6, STEPS])
def test_stopped_after_any_step_and_resumed_it_is_the_same_run(demo_folder, undisturbed, tmp_path, capsys, step, cut):
    out = stopped_copy(undisturbed, tmp_path / "run", step, cut)
    run(demo_folder, out, *LORA)
    assert f"resuming from {out}/checkpoints/step-{step:08d}\n" in capsys.readouterr().out
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize("step", [3, 4], ids=["between validations", "where a validation is due"])
def test_a_signal_stops_after_the_step_with_exit_code_85(demo_folder, undisturbed, tmp_path, monkeypatch, capsys, step):
    out = tmp_path / "run"
    flags = [*LORA, "--save-every", 100]  # it saves because it is stopped
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        stop_in(patch, step)
        run(demo_folder, out, *flags)
    assert caught.value.code == 85
    assert f"stopped by SIGTERM after step {step}; the same command resumes from there" in capsys.readouterr().out
    assert max(p.name for p in out.glob("checkpoints/*")) == f"step-{step:08d}"
    run(demo_folder, out, *flags)
    assert_same_run(out, undisturbed)


def test_a_stopped_run_with_full_tuning_and_a_worker_is_the_same_run(demo_folder, tmp_path, monkeypatch):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    run(demo_folder, undisturbed, *FULL)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="85"):
        stop_in(patch, 3)
        run(demo_folder, out, *FULL, "--workers", 1)  # workers change nothing, neither before nor after
    run(demo_folder, out, *FULL, "--workers", 1)
    assert_same_run(out, undisturbed, steps=4)


@pytest.mark.parametrize(
    ("data", "script", "own"),
    [
        ("demo_folder", train_llava_med, ""),
        ("mri_folder", train_umbrella_mri, "--modality T1:32x32x32:8x8x8 --modality rsfMRI:24x24x24x4:8x8x8x2"),
    ],
    ids=["images", "volumes"],
)
def test_a_stopped_run_with_augmented_media_is_the_same_run(request, tmp_path, monkeypatch, data, script, own):
    """What is drawn depends on the number of the step, wherever a run begins and whoever reads."""
    folder, undisturbed, out = request.getfixturevalue(data), tmp_path / "undisturbed", tmp_path / "run"
    flags = [*own.split(), *LORA, "--limit", 12, "--questions-per-step", 6, "--eval-every", 1, "--augment"]
    run(folder, undisturbed, *flags, script=script)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="85"):
        stop_in(patch, 2, script)
        run(folder, out, *flags, "--workers", 2, script=script)
    run(folder, out, *flags, script=script)
    assert_same_run(out, undisturbed, steps=4)


def test_a_real_process_whose_group_is_signalled_is_the_same_run(demo_folder, tmp_path):
    """Ctrl-C and `timeout` signal every process of the group, the workers that read media included."""
    flags = [*LORA, "--epochs", 4, "--workers", 1]
    run(demo_folder, tmp_path / "undisturbed", *flags)
    out = tmp_path / "run"
    argv = ["--model", demo_folder / "model", "--data", demo_folder / "data", "--out", out, *flags]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_llava_med.py", *map(str, argv)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 85, text
    assert "SIGTERM: finishing this step, then saving" in text
    steps = [line["step"] for line in read_lines(metrics) if "loss" in line]
    assert 2 <= steps[-1] < 16
    run(demo_folder, out, *flags)
    assert_same_run(out, tmp_path / "undisturbed", steps=16)


def test_draws_depend_on_seed_step_and_rank_alone(tmp_path, monkeypatch):
    def drawn(seed: int, step: int, rank: int) -> float:
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        device = torch.device("cpu")
        Run(SimpleNamespace(seed=seed), tmp_path, device, torch.float32, StopSignal()).seed(step)
        return float(torch.rand(1))

    cases = list(itertools.product(range(3), repeat=3))
    first = [drawn(*case) for case in cases]
    assert len(set(first)) == len(cases)
    assert [drawn(*case) for case in cases[::-1]] == first[::-1]


def test_a_metrics_line_with_a_line_separator_in_an_id_is_kept(tmp_path):
    line = {"step": 1, "val_loss": 0.5, "ids": ["a\u2028b\u0085c"]}
    for start in (0, 1, 1):  # rewritten on every start
        args = SimpleNamespace(log_to=[], patience=None)
        with ExitStack() as closing:
            metrics = Metrics(SimpleNamespace(folder=tmp_path, args=args, closing=closing), start, 2)
            if start == 0:
                metrics.write_line(**line)
    assert read_lines(tmp_path / "metrics.jsonl") == [line]


def test_a_long_metrics_file_with_bad_bytes_is_read_a_line_at_a_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0, "more": "x" * 200}) + "\n" for step in range(1, 20_001)]
    lines[4_000], lines[9_000] = '{"step": 4000, "val_loss": 0.25}\n', "[" + lines[9_000][1:]
    data = "".join(lines).encode()
    path.write_bytes(data[:500_000] + b"\xff\x00" + data[500_002:])
    tracemalloc.start()
    with ExitStack() as closing:
        run = SimpleNamespace(folder=tmp_path, args=SimpleNamespace(log_to=[], patience=None), closing=closing)
        metrics = Metrics(run, 15_000, 20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000 < len(data) / 10
    assert metrics.val_losses == {4000: 0.25}
    kept = read_lines(path)
    assert kept[-1]["step"] == 15_000 and 14_997 <= len(kept) <= 14_999


def test_a_run_resumed_with_other_settings_keeps_the_ids_of_the_steps_before(demo_folder, undisturbed, tmp_path):
    out = stopped_copy(undisturbed, tmp_path / "run", 4)
    run(demo_folder, out, *LORA, "--seed", 7, "--resume-anyway")
    mine, theirs = (read_lines(folder / "steps.jsonl") for folder in (out, undisturbed))
    assert [line["step"] for line in mine] == list(range(1, len(mine) + 1))
    assert mine[:4] == theirs[:4] and mine[4:] != theirs[4:]


def test_the_epoch_counts_passes_over_the_data_however_early_the_run_ends(demo_folder, undisturbed, tmp_path, capsys):
    def epochs(folder):
        return [line["epoch"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]

    assert epochs(undisturbed)[3] == 1.0 and epochs(undisturbed)[-1] == 2.0
    run(demo_folder, tmp_path / "run", *LORA, "--max-steps", 3)
    assert epochs(tmp_path / "run") == epochs(undisturbed)[:3]
    assert "warning: only" not in capsys.readouterr().out  # so few were asked for
    run(demo_folder, tmp_path / "short", *LORA[:4], "--max-steps", 5)
    text = "warning: only 4 optimizer steps: fewer than 100 steps seldom suffice; give more --epochs or fewer --quest"
    assert text in capsys.readouterr().out


def test_weight_decay_is_of_matrices_alone(demo_folder, tmp_path):
    """Biases and the scales of norms are where they would be without."""
    found = []
    for decay in (0.0, 100.0):
        out = tmp_path / str(decay)
        run(demo_folder, out, *FULL[:-1], 1, "--weight-decay", decay)
        found.append(read_tensors(out / "model"))
    same = {name for name, value in found[0].items() if torch.equal(value, found[1][name])}
    vectors = {name for name, value in found[0].items() if value.ndim < 2}
    assert vectors and vectors <= same and len(found[0]) - len(same) > 20


def test_a_finished_run_started_again_takes_no_further_step(demo_folder, undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    run(demo_folder, out, *LORA)
    assert f"{STEPS} steps of at most 12 questions, from step {STEPS}\n" in capsys.readouterr().out
    assert_same_run(out, undisturbed)


# ------------------------------------------------------------------------------------------------------------
# Another run
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lr", 2e-3], "lr was 0.001, is 0.002"),
        (["--lr-projector", 1e-3], "lr_projector was None, is 0.001"),
        (["--seed", 1], "seed was 0, is 1"),
        (["--limit", 39], "examples was "),
        (["--epochs", 3], "steps was 8, is 12"),
        (["--questions-per-step", 64], "questions_per_step was 12, is 64"),
        (["--pack-tokens", 512], "pack_tokens was 4096, is 512"),
        (["--no-share-prefix"], "share_prefix was True, is False"),
        (["--augment"], "augment was False, is True"),
        (["--lora-alpha", 8], "lora_alpha was 32, is 8.0"),
        (["--lora-r", 8], "lora_r was 16, is 8"),
        (["--tune", "full"], "tune was lora, is full"),
        (["--lora-dropout", 0.2], "lora_dropout was 0.1, is 0.2"),
        (["--warmup", 0.5], "warmup was 0.03, is 0.5"),
        (["--weight-decay", 0.1], "weight_decay was 0.0, is 0.1"),
        (["--clip", 0.5], "clip was 1.0, is 0.5"),
        (["--dtype", "bf16"], "dtype was torch.float32, is torch.bfloat16"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_a_changed_setting_is_refused_by_name(demo_folder, undisturbed, tmp_path, flags, named):
    out = stopped_copy(undisturbed, tmp_path / "run", 2)
    text = refused(demo_folder, out, *LORA, *flags)
    assert text.startswith(f"{out}/checkpoints/step-00000002 is of another run: ")
    assert named in text
    assert "Use another --out" in text


def test_a_changed_answer_in_the_data_is_refused(demo_folder, undisturbed, tmp_path):
    out = stopped_copy(undisturbed, tmp_path / "run", 2)
    other = tmp_path / "other"
    shutil.copytree(demo_folder / "data", other / "data")
    (other / "model").symlink_to(demo_folder / "model")
    train = other / "data" / "train.jsonl"
    train.write_text(train.read_text().replace('"answer": "yes"', '"answer": "no"', 1))
    assert "is of another run: examples was " in refused(other, out, *LORA)


def test_resume_none_does_not_start_over_where_a_run_is(demo_folder, undisturbed, tmp_path):
    """Its first checkpoint would push the old ones out, or be pushed out by them."""
    out = stopped_copy(undisturbed, tmp_path / "run", 2)
    text = refused(demo_folder, out, *LORA, "--resume", "none")
    assert text == f"{out} holds checkpoints of an earlier run: use another --out, or --resume auto to resume it"
    assert (
        read_tensors(out / "checkpoints/step-00000002").keys()
        == read_tensors(undisturbed / "checkpoints/step-00000002").keys()
    )


# ------------------------------------------------------------------------------------------------------------
# Broken checkpoints
# ------------------------------------------------------------------------------------------------------------


def cut_adapter(folder):
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1000)


def flip_optimizer(folder):
    with (folder / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


BREAK = {
    "adapter_model.safetensors does not match its sha256": cut_adapter,
    "optimizer.safetensors does not match its sha256": flip_optimizer,
    "state.json is missing": lambda folder: (folder / "state.json").unlink(),
    "no readable manifest": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("fault", BREAK)
def test_a_broken_newest_checkpoint_is_passed_over_by_name(demo_folder, undisturbed, tmp_path, capsys, fault):
    out = stopped_copy(undisturbed, tmp_path / "run", 7)
    BREAK[fault](out / "checkpoints" / "step-00000007")
    run(demo_folder, out, *LORA)
    text = capsys.readouterr().out
    assert f"passing over {out}/checkpoints/step-00000007: {fault}" in text
    assert f"resuming from {out}/checkpoints/step-00000006\n" in text
    assert_same_run(out, undisturbed)


def test_a_run_without_a_complete_checkpoint_does_not_start_over(demo_folder, undisturbed, tmp_path):
    out = stopped_copy(undisturbed, tmp_path / "run", 2)
    for step in (1, 2):
        cut_adapter(out / "checkpoints" / f"step-{step:08d}")
    metrics = (out / "metrics.jsonl").read_text()
    text = refused(demo_folder, out, *LORA)
    assert text == f"no checkpoint of {out} is complete; restore one, or start again with another --out"
    assert (out / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize("fault", BREAK)
def test_resume_of_a_broken_folder_is_refused(demo_folder, undisturbed, tmp_path, fault):
    out = stopped_copy(undisturbed, tmp_path / "run", 2)
    folder = out / "checkpoints" / "step-00000002"
    BREAK[fault](folder)
    assert refused(demo_folder, out, *LORA, "--resume", folder).startswith(f"--resume {folder}: {fault}")


def test_resume_of_an_earlier_checkpoint_starts_from_there(demo_folder, undisturbed, tmp_path, monkeypatch, capsys):
    """Stopped again, it is resumed from its own step and not from a later one of the time before."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    monkeypatch.setattr(saving, "KEPT", 2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="85"):
        stop_in(patch, 4)
        run(demo_folder, out, *LORA, "--resume", out / "checkpoints" / "step-00000002")
    assert "the same command resumes from there, with --resume auto" in capsys.readouterr().out
    assert [line["step"] for line in metrics_of(out) if "loss" in line] == [1, 2, 3, 4]
    assert sorted(p.name for p in out.glob("checkpoints/*")) == [f"step-0000000{i}" for i in (2, 3, 4)]
    assert sorted(p.name for p in out.glob("abandoned/*")) == [f"step-{i:08d}" for i in range(3, STEPS + 1)]
    run(demo_folder, out, *LORA)
    assert_same_run(out, undisturbed)


def test_a_run_killed_right_after_rolling_back_has_rolled_back(demo_folder, undisturbed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "place", killed)  # before the first step
        run(demo_folder, out, *LORA, "--resume", out / "checkpoints" / "step-00000002")
    run(demo_folder, out, *LORA)
    assert f"resuming from {out}/checkpoints/step-00000002\n" in capsys.readouterr().out
    assert_same_run(out, undisturbed)


def test_what_a_user_keeps_beside_the_checkpoints_stays(demo_folder, undisturbed, tmp_path, monkeypatch):
    out = stopped_copy(undisturbed, tmp_path / "run", 6)
    mine = out / "checkpoints" / "step-00000006.backup"
    mine.mkdir()
    (out / "checkpoints" / "step-00000006.tar").write_text("")
    monkeypatch.setattr(saving, "KEPT", 1)
    run(demo_folder, out, *LORA)
    names = ["step-00000006", "step-00000006.backup", "step-00000006.tar", "step-00000008"]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == names


def test_a_resumed_run_does_not_hold_the_files_it_has_read(demo_folder, undisturbed, tmp_path, monkeypatch):
    """Over NFS a folder whose files are held cannot be removed."""
    out, step = stopped_copy(undisturbed, tmp_path / "run", 6), saving.save

    def looking(run, number, *rest):
        held = [line for line in Path("/proc/self/maps").read_text().split("\n") if f"{out}/checkpoints" in line]
        assert held == []
        step(run, number, *rest)

    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux's /proc")
    monkeypatch.setattr(saving, "save", looking)
    run(demo_folder, out, *LORA)
    assert_same_run(out, undisturbed)


def test_a_checkpoint_left_half_written_does_no_harm(demo_folder, undisturbed, tmp_path, capsys):
    out = stopped_copy(undisturbed, tmp_path / "run", 6)
    for step in (6, 7, 8):  # killed while it was written, before the rename
        half = out / "checkpoints" / f"step-{step:08d}.writing"
        half.mkdir()
        (half / "adapter_model.safetensors").write_bytes(b"half")
    run(demo_folder, out, *LORA)
    text = capsys.readouterr().out
    assert f"resuming from {out}/checkpoints/step-00000006\n" in text and "passing over" not in text
    assert_same_run(out, undisturbed)


def test_a_kill_while_an_old_checkpoint_is_removed_does_no_harm(demo_folder, undisturbed, tmp_path, monkeypatch):
    out, remove = stopped_copy(undisturbed, tmp_path / "run", 5), shutil.rmtree
    monkeypatch.setattr(saving, "KEPT", 2)

    def killed(folder, **settings):
        if Path(folder).suffix == ".removing":
            next(Path(folder).iterdir()).unlink()
            raise KeyboardInterrupt
        remove(folder, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        run(demo_folder, out, *LORA)
    folders = sorted(out.glob("checkpoints/step-????????"))
    assert [folder.name for folder in folders] == [f"step-0000000{i}" for i in (4, 5, 6)]  # the best, and two
    assert [saving.fault(folder) for folder in folders] == [None, None, None]
    run(demo_folder, out, *LORA)
    assert sorted(p.name for p in out.glob("checkpoints/*")) == [f"step-0000000{i}" for i in (6, 7, 8)]
    assert_same_run(out, undisturbed)


def test_a_kill_while_saving_leaves_the_earlier_checkpoints_complete(demo_folder, undisturbed, tmp_path, monkeypatch):
    out = stopped_copy(undisturbed, tmp_path / "run", 6)

    def killed(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save_file", killed)
        run(demo_folder, out, *LORA)
    assert (out / "checkpoints" / "step-00000007.writing").exists()
    assert not (out / "checkpoints" / "step-00000007").exists()
    run(demo_folder, out, *LORA)
    assert_same_run(out, undisturbed)


def test_only_the_two_newest_checkpoints_are_kept(demo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "KEPT", KEPT)
    run(demo_folder, tmp_path, *LORA, "--save-every", 3)
    assert sorted(p.name for p in tmp_path.glob("checkpoints/*")) == ["step-00000006", "step-00000008"]
