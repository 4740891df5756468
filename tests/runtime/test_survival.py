"""Kills, signals, full disks, second runs, steps that are not finite, files that turn bad: nothing saved is lost."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import metrics_of, read_lines, read_tensors, refused, run, stop_in, task_class
from PIL import Image

import common
import train_llava_med
from inputs import data_check
from report import results
from runtime import files, lock, ranks, saving
from runtime.signals import StopSignal

ROOT = Path(train_llava_med.__file__).parent
# two images and some 18 questions a step
FLAGS = ["--limit", 60, "--questions-per-step", 12, "--lr", 1e-3, "--save-every", 1]
FLAGS += ["--eval-every", 100, "--max-answer-tokens", 1, "--max-steps", 6]


@pytest.fixture(scope="module", autouse=True)
def every_checkpoint_is_kept():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "KEPT", 100)
        yield


@pytest.fixture(scope="module")
def undisturbed(demo_folder, tmp_path_factory):
    """A run of six steps that nothing disturbed. Tests must not write here."""
    out = tmp_path_factory.mktemp("survival") / "undisturbed"
    run(demo_folder, out, *FLAGS)
    return out


def checkpoint(out: Path, step: int) -> dict:
    folder = out / "checkpoints" / f"step-{step:08d}"
    assert saving.fault(folder) is None
    return read_tensors(folder)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def during(monkeypatch, step: int, action) -> None:
    """Do something in the middle of a step, after its backward passes."""
    sum_gradients, at = ranks.sum_gradients, [0]

    def disturbed(parameters):
        sum_gradients(parameters)
        at[0] += 1
        if at[0] == step:
            action(list(parameters))

    monkeypatch.setattr(ranks, "sum_gradients", disturbed)


# ------------------------------------------------------------------------------------------------------------
# Kills and signals
# ------------------------------------------------------------------------------------------------------------


def test_a_run_killed_at_random_instants_ends_as_the_undisturbed_one(demo_folder, tmp_path):
    """Also one that is signalled, and whose workers are killed and hang."""
    command = [sys.executable, ROOT / "benchmarks" / "kills.py", "--demo", demo_folder, "--out", tmp_path / "kills"]
    command += ["--kills", 5, "--signals", 3, "--worker-kills", 2, "--worker-hangs", 1]
    command += ["--save-every", 3, "--max-steps", 90, "--max-answer-tokens", 2, "--seed", os.getpid()]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "different from the undisturbed run: nothing" in done.stdout


def test_a_second_signal_ends_the_program_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopSignal() as stop:
        stop.wait()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)  # `timeout` signals a process twice within moments
        assert stop.received == "SIGUSR1" and ended == []
        stop.at -= 1
        signal.raise_signal(signal.SIGTERM)
        assert ended == [128 + signal.SIGTERM]


def test_a_signal_while_nothing_is_unsaved_ends_the_program_with_85():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, StopSignal():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 85
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_during_validation_loses_nothing(demo_folder, undisturbed, tmp_path, monkeypatch):
    out, flags = tmp_path / "run", [*FLAGS, "--save-every", 100, "--eval-every", 3]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="85"):
        loss, calls = common.mean_loss, []

        def signalled(*rest):
            calls.append(1)
            if len(calls) == 2:  # the first is before training
                signal.raise_signal(signal.SIGTERM)
            return loss(*rest)

        patch.setattr(common, "mean_loss", signalled)
        run(demo_folder, out, *flags)
    assert [line["step"] for line in metrics_of(out)] == [1, 2, 3]
    run(demo_folder, out, *flags)
    assert [line["step"] for line in metrics_of(out) if "val_loss" in line] == [3, 6]  # made up for
    assert equal(checkpoint(out, 6), checkpoint(undisturbed, 6))


def test_a_signal_while_answering_ends_with_85_and_the_next_start_answers(
    demo_folder, undisturbed, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="85"):
        patch.setattr(common, "answer", lambda *rest: signal.raise_signal(signal.SIGUSR1))
        run(demo_folder, out, *FLAGS)
    assert not (out / "predictions.jsonl").exists()
    run(demo_folder, out, *FLAGS)
    assert (out / "predictions.jsonl").read_text() == (undisturbed / "predictions.jsonl").read_text()


def test_ctrl_c_that_also_ends_tee_loses_nothing(demo_folder, undisturbed, tmp_path):
    """`train … 2>&1 | tee log`: the signal goes to both, and whoever prints then gets a broken pipe."""
    out = tmp_path / "run"
    argv = [
        sys.executable,
        ROOT / "train_llava_med.py",
        "--model",
        demo_folder / "model",
        "--data",
        demo_folder / "data",
    ]
    argv += ["--out", out, *FLAGS, "--save-every", 1000, "--max-steps", 10_000, "--epochs", 2000]
    process = subprocess.Popen([str(word) for word in argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 85
    (folder,) = (out / "checkpoints").iterdir()
    assert saving.fault(folder) is None
    assert int(folder.name[5:]) == metrics_of(out)[-1]["step"]


# ------------------------------------------------------------------------------------------------------------
# Processes that read media (--workers)
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def forked():
    """Workers are forks of this process, and so have what a test has changed in it."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("what", ["killed", "stuck"])
def test_a_worker_that_is_killed_or_stuck_costs_no_step(demo_folder, undisturbed, tmp_path, monkeypatch, forked, what):
    out, flags = tmp_path / "run", [*FLAGS, "--workers", 1]
    task, trainer = task_class(train_llava_med), os.getpid()
    read = task.read_media

    def fails(*rest):
        if os.getpid() != trainer and (out / "checkpoints").is_dir():  # a step was saved already
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(2)  # until the trainer waits for this
            os.kill(trainer, signal.SIGTERM)
            time.sleep(900)
        return read(*rest)

    began = time.monotonic()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(task, "read_media", fails)
        run(demo_folder, out, *flags, "--save-every", 2)
    assert time.monotonic() - began < 300
    last = [line["step"] for line in metrics_of(out)][-1]
    if what == "killed":
        assert caught.value.code.startswith(f"step {last + 1}: a process that reads media was killed")
    else:
        assert caught.value.code == 85
    assert 2 <= last < 6 and saving.fault(out / "checkpoints" / f"step-{last:08d}") is None
    assert not multiprocessing.active_children()
    run(demo_folder, out, *flags)
    assert equal(checkpoint(out, 6), checkpoint(undisturbed, 6))


ONE_WORKER = """
import os, sys, time, torch
from types import SimpleNamespace as N
from runtime import batches

class Items:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        print(os.getpid(), flush=True)
        return [torch.ones(5) for _ in range(600)] if "many" in sys.argv else time.sleep(600)

for item in batches.load(Items(), N(args=N(workers=1), stop=N(received=None))):
    print(sum(map(torch.sum, item)))
"""


def test_a_stuck_worker_dies_with_its_trainer():
    command = [sys.executable, "-c", ONE_WORKER]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = Path("/proc") / process.stdout.readline().strip()
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while worker.exists() and "State:\tZ" not in (worker / "status").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_more_tensors_than_files_may_be_open_come_from_a_worker():
    command = ["bash", "-c", 'ulimit -n 200; exec "$@"', "bash", sys.executable, "-c", ONE_WORKER, "many"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.count("tensor(3000.)") == 2, done.stderr


def test_workers_of_a_forkserver_answer_blindly(demo_folder, undisturbed, tmp_path):
    """As Python 3.14 starts them: what they read is sent to them pickled."""
    shutil.copytree(undisturbed, tmp_path / "run")
    flags = [*FLAGS, "--eval-only", "--blind", "blank"]
    answers = tmp_path / "run" / "blind" / "blank" / "predictions.jsonl"
    run(demo_folder, tmp_path / "run", *flags)
    own = answers.read_text()
    answers.unlink()
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        run(demo_folder, tmp_path / "run", *flags, "--workers", 1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert answers.read_text() == own


# ------------------------------------------------------------------------------------------------------------
# Full and read-only disks
# ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_leaves_the_earlier_checkpoints(demo_folder, undisturbed, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs can be mounted by root only")
    try:
        out = disk / "run"
        text = refused(demo_folder, out, *FLAGS)
        folders = sorted((out / "checkpoints").iterdir())  # nothing half written stays: the room is needed
        step = int(folders[-1].name[5:])
        assert 1 <= step < 6 and len(folders) == step
        assert text.startswith(f"{out}/checkpoints/step-{step + 1:08d} cannot be written: ")
        assert "No space left on device" in text and f"MB free in {out}/checkpoints" in text
        assert [saving.fault(folder) for folder in folders] == [None] * step
        for folder in folders[:-1]:
            shutil.rmtree(folder)
        monkeypatch.setattr(saving, "KEPT", 1)
        run(demo_folder, out, *FLAGS)
        assert equal(checkpoint(out, 6), checkpoint(undisturbed, 6))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # the run that failed may hold its metrics open


@pytest.mark.parametrize("limit", [400_000, 2_000], ids=["while saving", "while logging"])
def test_a_file_that_cannot_grow_is_named_and_leaves_the_earlier_checkpoints(
    demo_folder, undisturbed, tmp_path, monkeypatch, limit
):
    out, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            during(patch, 3, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1])))
            text = refused(demo_folder, out, *FLAGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in text and "File too large" in text and "MB free in" in text
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    run(demo_folder, out, *FLAGS)
    assert equal(checkpoint(out, 6), checkpoint(undisturbed, 6))


def test_a_kill_while_a_file_is_replaced_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json(path, "old")

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, "new")
    assert json.loads(path.read_text()) == "old"


def test_a_run_folder_that_cannot_be_written_is_refused_before_weights_are_read(demo_folder, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(train_llava_med, "load_model", None)
    assert f"{file}/run/lock cannot be written: " in refused(demo_folder, file / "run", *FLAGS)

    opened = Path.open

    def read_only(path, *rest, **named):
        if path.name == "lock":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, *rest, **named)

    monkeypatch.setattr(Path, "open", read_only)
    assert "Read-only file system" in refused(demo_folder, tmp_path / "run", *FLAGS)


# ------------------------------------------------------------------------------------------------------------
# One owner of a run folder
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def another():
    """A living process."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def leave_lock(out: Path, owner: dict) -> Path:
    out.mkdir()
    (out / "lock").write_text(json.dumps(owner))
    return out / "lock"


def test_a_second_run_on_the_same_folder_is_refused(demo_folder, tmp_path, another):
    out = tmp_path / "run"
    file = leave_lock(out, lock.process(another.pid))
    text = refused(demo_folder, out, *FLAGS)
    assert text == (
        f"{out} is in use by process {another.pid} on {socket.gethostname()}: stop it first, or use another --out"
    )
    assert [path.name for path in out.iterdir()] == ["lock"]
    run(demo_folder, out, "--check")  # checking the data disturbs nobody
    assert json.loads(file.read_text())["pid"] == another.pid


@pytest.mark.parametrize("what", ["dead", "another process with its number", "unreadable"])
def test_the_lock_of_a_dead_run_is_taken_over(tmp_path, monkeypatch, another, what, capsys):
    owner = lock.process(another.pid)
    if what == "dead":
        another.kill()
        another.wait()
    file = leave_lock(tmp_path / "run", {**owner, "began": "1"} if what.startswith("another") else owner)
    if what == "unreadable":  # of no host: nobody touches it
        file.write_text("")
        monkeypatch.setattr(lock, "PATIENCE", 0.5)
    with lock.locked(tmp_path / "run"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()
    assert "which has ended: taken over" in capsys.readouterr().out


@pytest.mark.parametrize("lives", [True, False])
def test_the_lock_of_another_host_is_watched_for_a_sign_of_life(tmp_path, monkeypatch, lives):
    file = leave_lock(tmp_path / "run", {"host": "elsewhere", "pid": 1, "began": "1"})
    monkeypatch.setattr(lock, "TOUCH", 0.2)
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    if lives:
        threading.Timer(0.3, os.utime, [file]).start()
        with pytest.raises(SystemExit, match="in use by process 1 on elsewhere"), lock.locked(tmp_path / "run"):
            pass
    else:
        with lock.locked(tmp_path / "run"):
            first = file.stat().st_mtime_ns
            time.sleep(0.5)
            assert file.stat().st_mtime_ns > first  # as this run touches its own
    assert file.exists() == lives


def test_a_lock_of_another_container_with_this_host_name_is_watched_too(tmp_path, monkeypatch):
    """Its process number means nothing here: another process may have it, or none."""
    file = leave_lock(tmp_path / "run", {**lock.process(os.getpid()), "pid": 2**22 + 1, "processes": "pid:[1]"})
    monkeypatch.setattr(lock, "TOUCH", 0.2)
    monkeypatch.setattr(lock, "PATIENCE", 2.0)
    threading.Timer(0.3, os.utime, [file]).start()
    with pytest.raises(SystemExit, match=f"in use by process {2**22 + 1} on "), lock.locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("what", ["a folder", "a link that leads nowhere", "no text"])
def test_what_no_run_wrote_as_its_lock_is_a_fault(demo_folder, tmp_path, what):
    file = tmp_path / "run" / "lock"
    file.parent.mkdir()
    if what == "a folder":
        (file / "lock").mkdir(parents=True)
    elif what == "no text":
        file.write_bytes(b"\xff\xfe{}")
    else:
        file.symlink_to(tmp_path / "nowhere")
    text = refused(demo_folder, tmp_path / "run", *FLAGS)
    assert text == f"{file} is a folder, a link or no text, and no run's: remove it, or use another --out"
    assert [path.name for path in file.parent.iterdir()] == ["lock"]


def test_of_several_runs_that_wait_for_a_dead_one_one_gets_the_lock(tmp_path, monkeypatch):
    """The one that is slower to remove the dead run's lock must not remove the quicker one's."""
    file = leave_lock(tmp_path / "run", {"host": "elsewhere", "pid": 1, "began": "1"})
    monkeypatch.setattr(lock, "TOUCH", 0.1)
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    text_of, quicker = lock.text_of, json.dumps(lock.process(os.getppid()))

    def overtaken(path):
        text = text_of(path)
        if path != file:  # renamed: in the same moment it was the other's already
            path.write_text(quicker)
            return quicker
        return text

    monkeypatch.setattr(lock, "text_of", overtaken)
    with pytest.raises(SystemExit, match=f"in use by process {os.getppid()} on "), lock.locked(tmp_path / "run"):
        pass
    assert file.read_text() == quicker
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_run_whose_folder_was_taken_over_saves_nothing_more(demo_folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    during(monkeypatch, 3, lambda _: (out / "lock").write_text('{"host": "elsewhere", "pid": 1, "began": "1"}'))
    assert f"another run has taken {out} over (see {out}/lock): nothing more is written" in refused(
        demo_folder, out, *FLAGS
    )
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert "elsewhere" in (out / "lock").read_text()


@pytest.mark.parametrize("how", ["renamed", "removed", "renamed, and another made", "while answering"])
def test_a_run_whose_folder_goes_ends_and_makes_no_new_one(demo_folder, undisturbed, tmp_path, monkeypatch, how):
    out, moved = tmp_path / "run", tmp_path / "moved"

    def move(*_):
        shutil.rmtree(out) if how == "removed" else out.rename(moved)
        if how.endswith("made"):
            out.mkdir()
            (out / "metrics.jsonl").write_text("")

    with monkeypatch.context() as patch:
        if how == "while answering":
            summarise = results.summarise
            patch.setattr(results, "summarise", lambda records: (move(), summarise(records))[1])
        else:
            during(patch, 3, move)
        text = refused(demo_folder, out, *FLAGS)
    assert " was renamed or removed while this run wrote it, and nothing more is written: give it its" in text
    assert sorted(out.rglob("*")) == ([out / "metrics.jsonl"] if how.endswith("made") else [])
    if how == "renamed":  # and back again
        assert not out.exists()
        (moved / "lock").unlink()  # of this process, which lives
        moved.rename(out)
        run(demo_folder, out, *FLAGS)
        assert equal(checkpoint(out, 6), checkpoint(undisturbed, 6))


# ------------------------------------------------------------------------------------------------------------
# Steps that are not finite
# ------------------------------------------------------------------------------------------------------------


def infinite(parameters) -> None:
    parameters[0].grad.view(-1)[0] = torch.inf


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported(
    demo_folder, undisturbed, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    during(monkeypatch, 5, infinite)
    run(demo_folder, out, *FLAGS)
    assert equal(checkpoint(out, 5), checkpoint(out, 4))  # parameters and moments
    assert not equal(checkpoint(out, 6), checkpoint(out, 5))
    ids = next(line["ids"] for line in metrics_of(undisturbed) if line["step"] == 5)
    (line,) = read_lines(out / "bad_steps.jsonl")
    assert (line["step"], line["grad_norm"], line["ids"]) == (5, "inf", ids)
    assert float(line["loss"]) > 0
    assert [line["step"] for line in metrics_of(out) if "loss" in line] == [1, 2, 3, 4, 6]
    text = capsys.readouterr().out
    assert "step 00005 | loss " in text and f"nothing was changed by examples {', '.join(ids[:3])}" in text


def test_a_loss_that_is_not_finite_changes_nothing(demo_folder, tmp_path, monkeypatch):
    supervised_loss, calls = common.supervised_loss, []

    def sometimes_nan(*rest):
        calls.append(1)
        loss, tokens = supervised_loss(*rest)
        return (loss * torch.nan if len(calls) == 6 else loss), tokens  # validation takes the first two

    monkeypatch.setattr(common, "supervised_loss", sometimes_nan)
    run(demo_folder, tmp_path, *FLAGS)
    (line,) = read_lines(tmp_path / "bad_steps.jsonl")
    assert line["loss"] == "nan"
    assert equal(checkpoint(tmp_path, line["step"]), checkpoint(tmp_path, line["step"] - 1))


def test_three_bad_steps_in_a_row_end_the_run_with_86_and_can_be_replayed(
    demo_folder, undisturbed, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        for step in (1, 3, 4, 5):  # 1 alone does not count
            during(patch, step, infinite)
        run(demo_folder, out, *FLAGS)
    assert caught.value.code == 86
    bad = read_lines(out / "bad_steps.jsonl")
    assert [line["step"] for line in bad] == [1, 3, 4, 5]
    assert f"replay them with --only-ids {out}/bad_steps.jsonl" in capsys.readouterr().out

    flags = [*FLAGS, "--only-ids", out / "bad_steps.jsonl"]
    assert "is of another run" in refused(demo_folder, out, *flags)
    newest = max((out / "checkpoints").iterdir())
    run(demo_folder, tmp_path / "replay", *flags, "--max-steps", 1, "--questions-per-step", 100, "--resume", newest)
    (line,) = [line for line in metrics_of(tmp_path / "replay") if "loss" in line]
    assert sorted(line["ids"]) == sorted(name for line in bad for name in line["ids"])


def test_a_replay_that_is_stopped_is_resumed(demo_folder, undisturbed, tmp_path, monkeypatch):
    ids = tmp_path / "ids"
    ids.write_text("\n".join(row["id"] for row in read_lines(demo_folder / "data" / "train.jsonl")[:30]))
    flags = [*FLAGS, "--only-ids", ids, "--epochs", 3]
    start = undisturbed / "checkpoints" / "step-00000004"
    run(demo_folder, tmp_path / "once", *flags, "--resume", start)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="85"):
        stop_in(patch, 2)
        run(demo_folder, tmp_path / "run", *flags, "--resume", start)
    run(demo_folder, tmp_path / "run", *flags, "--resume", "auto")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "once")
    assert equal(checkpoint(tmp_path / "run", 6), checkpoint(tmp_path / "once", 6))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("no_such_example\n", "1 are no training examples, such as 'no_such_example'"),
        ('{"id": "a"}\n', "neither a line an ID nor lines of JSON with ids"),
        (None, "neither a line an ID nor lines of JSON with ids"),
    ],
)
def test_ids_that_cannot_be_replayed_are_refused(demo_folder, tmp_path, text, fault):
    path = tmp_path / "ids"
    if text is not None:
        path.write_text(text)
    message = refused(demo_folder, tmp_path / "run", *FLAGS, "--only-ids", path)
    assert message.startswith(f"--only-ids {path}: ") and fault in message


# ------------------------------------------------------------------------------------------------------------
# Files that are bad, or turn bad
# ------------------------------------------------------------------------------------------------------------


def test_ten_bad_images_in_a_thousand_are_all_listed_and_exactly_those_left_out(demo_folder, tmp_path, monkeypatch):
    data, folder = tmp_path / "data", tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    (tmp_path / "model").symlink_to(demo_folder / "model")
    good = Image.new("RGB", (8, 8))
    for i in range(1000):
        good.putpixel((i % 8, i // 8 % 8), (i % 256, i // 256, 0))  # no two alike
        good.save(folder / f"{i}.png")
    names = [f"images/{i}.png" for i in range(1000)]
    bad = list(range(50, 1000, 100))

    path = [folder / f"{i}.png" for i in bad]
    path[0].write_bytes(path[0].read_bytes()[:60])
    path[1].write_bytes(b"")
    path[2].write_text("not an image")
    path[3].unlink()
    Image.new("L", (20_000, 15_000)).save(path[4])
    Image.new("CMYK", (8, 8)).save(path[5], format="JPEG")
    good.save(path[6], save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    names[bad[7]] = "../outside.png"
    good.save(tmp_path / "outside.png")
    path[8].unlink()
    path[8].symlink_to(tmp_path / "nowhere.png")
    path[9].chmod(0)
    if os.geteuid() == 0:  # whom no mode keeps from reading
        opened = Image.open

        def unreadable(file, *rest, **named):
            if Path(file) == path[9]:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return opened(file, *rest, **named)

        monkeypatch.setattr(Image, "open", unreadable)
    said = ["cannot be read", "cannot be read", "neither JPEG nor PNG", "is missing", "20000 x 15000 pixels"]
    said += ["colour mode CMYK", "2 frames", "leads outside", "a link that leads nowhere", "Permission denied"]

    rows = [{"id": f"r{i}", "image": name, "question": "Is it red?", "answer": "no"} for i, name in enumerate(names)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with monkeypatch.context() as patch:
        patch.setattr(train_llava_med, "load_model", None)  # before step 0, and before weights are read
        assert refused(tmp_path, tmp_path / "run").startswith("10 faults, listed in ")
    failures = json.loads((tmp_path / "run" / "check.json").read_text())["failures"]
    for i, text, fault in zip(
        bad, said, sorted(failures, key=lambda f: int(f.split(":")[1].split(" ")[0])), strict=True
    ):
        assert fault.startswith(f"train.jsonl:{i + 1} (id r{i}): ") and text in fault

    run(tmp_path, tmp_path / "run", "--check", "--skip-bad")
    report = json.loads((tmp_path / "run" / "check.json").read_text())
    assert sorted(report["skipped"]) == sorted(f"train.jsonl:{i + 1}" for i in bad)
    assert report["splits"]["train"]["questions"] == 990
    assert report["passed"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_turns_bad_during_training_stops_the_run_with_a_checkpoint(
    demo_folder, undisturbed, tmp_path, monkeypatch, workers
):
    shutil.copytree(demo_folder / "data", tmp_path / "data")
    (tmp_path / "model").symlink_to(demo_folder / "model")
    images = {row["id"]: row["image"] for row in read_lines(tmp_path / "data" / "train.jsonl")}
    steps = [[images[name] for name in line["ids"]] for line in metrics_of(undisturbed) if "loss" in line]
    name = steps[-1][0]
    step = 1 + next(i for i, used in enumerate(steps) if name in used)
    assert step > 1
    flags = [*FLAGS, "--save-every", 100, "--workers", workers]

    def cut(*_):
        with (tmp_path / "data" / name).open("r+b") as file:
            file.truncate(100)

    with monkeypatch.context() as patch:
        check = data_check.open_media
        patch.setattr(data_check, "open_media", lambda *rest: (check(*rest), cut())[0])  # right after it was read
        text = refused(tmp_path, tmp_path / "run", *flags)
    assert text.startswith(f"step {step}: {name} cannot be read: ") and "The steps before are saved" in text
    assert saving.fault(tmp_path / "run" / "checkpoints" / f"step-{step - 1:08d}") is None
    shutil.copy(demo_folder / "data" / name, tmp_path / "data" / name)
    run(tmp_path, tmp_path / "run", *flags)
    assert equal(checkpoint(tmp_path / "run", 6), checkpoint(undisturbed, 6))
